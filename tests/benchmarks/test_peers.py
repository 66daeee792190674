"""What of benchmarks/peers.py needs no peer: parsing, pairing, tables, and the published forward."""

from __future__ import annotations

import json
from functools import partial

import jsonschema
import llama
import numpy as np
import old_peers
import peers
import pytest
import targets
import torch
import torch_models
from bundles import load_loops

from dijiang.bench import measure, runner
from dijiang.bench.matrix import Test
from dijiang.bench.measure import Effort
from dijiang.bench.page import to_html
from dijiang.bench.render import result_rows, tables, to_csv, to_json
from dijiang.bench.report import read_report
from dijiang.bench.runner import run_sides
from dijiang.bench.subject import SelfTimed, bundle_side
from dijiang.bundle.opened import open_bundle
from dijiang.machine.bandwidth import measure_bandwidth
from dijiang.models.presets import PRESETS
from tests.bench.test_bench import SCHEMA, validate
from tests.conftest import GOLDEN, TESTS, Golden

RESULTS = TESTS.parent / "benchmarks" / "results"
RESULT = SCHEMA["properties"]["results"]["items"]


def record(group: str, tests: dict[str, dict[str, list[float]]], tokens: int = 32) -> dict:
    """A record of the older layout, a sample a round, from tokens/s by test and side."""
    quiet = {"waited": 0.0, "stolen": 0.0, "disturbed": []}
    samples = [
        {"round": i, "side": side, "test": test, "tokens": tokens, "seconds": [tokens / rate]} | quiet
        for test, sides in tests.items()
        for side, rates in sides.items()
        for i, rate in enumerate(rates)
    ]
    sides = list(next(iter(tests.values())))
    cpu = {"model": "X", "physical_cores": 2, "features": []}
    environment = {"cpu": cpu, "memory": {"total_bytes": 2**33}, "system": "S", "python": "3"}
    environment |= {"commit": "c", "packages": {"numpy": "2"}}
    return {
        "group": group,
        "preset": "pythia-410m",
        "sides": sides,
        "threads": 2,
        "started": "2026-01-01T00:00:00Z",
        "environment": environment,
        "models": {
            "parameters": {"all": 100, "step": 80, "head": 30},
            "bytes": dict.fromkeys(sides, 70),
        },
        "bandwidth": [1000.0] * max(sample["round"] + 1 for sample in samples),
        "samples": samples,
    }


def pairs(group: str, pair: str, seconds: list[tuple[float, float]]) -> dict:
    """A record of pairs of blocks."""
    tokens = int(peers.GROUPS[group].tokens)
    one = record(group, {pair: {"dijiang-int8": [1.0] * len(seconds)}}, tokens)
    for sample, both in zip(one["samples"], seconds, strict=True):
        sample["seconds"] = list(both)
    return one


def test_llama_bench_report_gives_its_samples_in_seconds():
    report = json.dumps([{"n_gen": 32, "avg_ns": 2, "samples_ns": [1_500_000_000, 500_000_000]}])
    assert llama.samples(report) == [1.5, 0.5]


def test_llama_bench_is_asked_for_one_repetition_of_the_test(tmp_path):
    tools = tmp_path / "build" / "bin"
    tools.mkdir(parents=True)
    for tool in llama.TOOLS:
        script = 'echo "$@" >> asked; echo \'[{"samples_ns": [2000000000]}]\''
        (tools / tool).write_text(f"#!/bin/sh\ncd {tmp_path}\n{script}\n")
        (tools / tool).chmod(0o755)
    subject = llama.LlamaBench(str(tmp_path / "m.gguf"), 2, "cpu", ("-fa", "1"))
    assert isinstance(subject, SelfTimed)
    assert subject.seconds(Test("tg", 32, 2048)) == subject.seconds(Test("pp", 128)) == [2.0]
    model = f"-m {tmp_path / 'm.gguf'} -o json -r 1 -fa 1 -t 2"
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == [f"{model} -p 0 -n 32 -d 2048", f"{model} -p 128 -n 0 -d 0"]


@pytest.mark.parametrize("tests", [[], [{"samples_ns": []}], [{"samples_ns": [1]}] * 2])
def test_llama_bench_report_of_other_than_one_test_is_refused(tests):
    with pytest.raises(ValueError, match="expected one"):
        llama.samples(json.dumps(tests))


def test_gguf_has_the_parameters_of_the_published_shape():
    shapes = llama.tensor_shapes(PRESETS["pythia-410m"])
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 405_334_016


def ratio_of(report, test):
    (found,) = [r for r in report["ratios"] if r["test"] == test]
    return found


def test_ratios_pair_the_samples_of_a_round():
    both = {"tg @ d0": {"dijiang-int8": [20.0, 30.0, 90.0], "peer": [10.0, 10.0, 30.0]}}
    found = ratio_of(old_peers.of_record(record("int8", both)), "tg32")
    assert (found["measured"], found["low"], found["high"]) == pytest.approx((3, 2, 3))


def test_every_target_reads_a_group_and_a_test_that_are_measured():
    for target in peers.TARGETS:
        group = peers.GROUPS[target.run]
        names = {test.name for test in group.tests()}
        for row in filter(None, (target.ours, target.theirs)):
            assert row[0] in group.sides.split()
            assert row[1] in names or target.kind == "size"


def test_targets_are_judged_on_their_median():
    step = {"dijiang-int8": [1.0, 10.0, 10.0], "llama.cpp-q8_0": [1.0, 6.0, 5.0]}
    endless = old_peers.of_record(pairs("endless", "depth", [(1.25, 1.0)]))
    int8 = record("int8", dict.fromkeys(("tg @ d0", "tg @ d2048"), step))
    rows = targets.target_rows(peers.TARGETS, {"int8": old_peers.of_record(int8), "endless": endless})
    by_label = {row["what"]: tuple(row.values())[1:] for row in rows}
    share, ratio, deep = (
        next(row for label, row in by_label.items() if text in label)
        for text in ("bandwidth", "Q8_0, depth 0", "10^6")
    )
    assert share == ("74.0%", "80.0%", "80.0%", "8.0% to 80.0%", "stretch", "100.0%")
    assert ratio == ("1.5", "1.8", "1.67", "1 to 2", "reached", "2.5")
    assert deep == ("1.02", "", "1.25", "1.25 to 1.25", "missed", "1")


def runs(*records: dict) -> dict:
    reports = [{"group": one["group"], "report": old_peers.of_record(one)} for one in records]
    return {"llama.cpp": {"options": "O"}, "runs": reports}


def test_reports_of_one_commit_are_joined_turn_by_turn():
    first = record("int8", {"tg @ d0": {"ours": [10.0], "peer": [10.0]}})
    second = record("int8", {"tg @ d0": {"ours": [40.0], "peer": [20.0]}}) | {"started": "2026-01-02"}
    joined = peers.newest(runs(second, first))["int8"]
    found = ratio_of(joined, "tg32")
    assert (found["low"], found["high"]) == pytest.approx((1, 2))
    assert [b["turn"] for b in joined["bandwidth"]] == [0, 1]
    assert [r["decode"]["latency"]["count"] for r in joined["results"]] == [2, 2]


def test_markdown_shows_the_newest_commit_of_a_group():
    rates = {"ours": [1.0, 1.0], "peer": [1.0, 1.0]}
    old = record("fp32", {"pp128": rates}, 128)
    new = record("fp32", {"pp128": {"ours": [50.0, 50.0], "peer": [20.0, 20.0]}}, 128)
    new |= {"started": "2026-01-02"}
    new["environment"] = new["environment"] | {"commit": "d"}
    loop = pairs("70m-loop-int8", "loop", [(1.1, 1.0), (1.2, 1.0), (1.0, 1.0)])
    text = peers.markdown(runs(new, old, loop))
    assert "| ours | pp128 | 1 | peer | 2.5 | 2.5 to 2.5 |" in text
    assert "| dijiang-int8 | int8 | tg32 generate | 1 | 2 | 29.09 |" in text
    assert "| 10.0% | 0.0% to 20.0% | missed | 0.0% |" in text


def test_every_ratio_stands_beside_what_reading_allows():
    """80 weights of 1 byte at 1,000 bytes/s: 12.5 steps a second, and as many prompts of 512 tokens."""
    rate = {"dijiang-int8": [6.0], "llama.cpp-q8_0": [5.0]}
    decoding = ratio_of(old_peers.of_record(record("int8", {"tg @ d0": rate})), "tg32")
    prompt = ratio_of(old_peers.of_record(record("int8", {"pp512": rate}, 512)), "pp512")
    assert (decoding["measured"], decoding["limit"]) == pytest.approx((1.2, 2.5))
    assert (prompt["measured"], prompt["limit"]) == pytest.approx((1.2, 512 * 2.5))


def test_a_peer_of_unknown_weights_has_no_limit():
    rates = {"llama.cpp-q8_0-fa0": [1.0], "llama.cpp-q8_0-fa1": [1.0]}
    flash = old_peers.of_record(record("flash-q8_0", {"pp512": rates}, 512))
    assert ratio_of(flash, "pp512")["limit"] is None


@pytest.mark.parametrize("group", peers.GROUPS)
def test_groups_have_their_tests(group):
    tests = peers.GROUPS[group].tests(2)
    assert len(tests) == len(set(tests)) >= 1
    assert {test.threads for test in tests} == {2}


def test_loops_take_turns_in_one_process(exported, monkeypatch):
    """No times are judged: that each loop made its steps, in turn, from one state."""
    monkeypatch.setattr(measure, "QUIET", float("inf"))
    monkeypatch.setattr(measure, "PATIENCE", 0.0)
    monkeypatch.setattr(runner, "measure_bandwidth", partial(measure_bandwidth, size=1 << 20))
    side = bundle_side("dijiang-fp32", open_bundle(exported("tiny-python")), load_loops)
    tests = [Test("tg", 3, way=way) for way in ("", "generate", "bare")]
    effort = Effort(2, 0.0, quiet=True, probe=False)
    report = run_sides([[side]], tests, effort, provider="cpu")
    validate(json.loads(json.dumps(report)))
    assert report["errors"] == []
    assert [r["test"] for r in report["results"]] == ["tg3", "tg3 generate", "tg3 bare"]
    assert all(r["interleaved"] for r in report["results"])
    taken = {b["turn"] for b in report["bandwidth"]}
    assert taken == {None, 0, 1}
    for result in report["results"]:
        assert result["contention"]["turns"] == [0, 1]


def test_ways_of_decoding_choose_the_same_tokens(exported):
    subject = load_loops(str(exported("tiny-python")), 1, "cpu")
    start, positions = np.array([5]), []
    for loop in (subject.steps, *subject.ways.values()):
        state = subject.at(1, 50, 60)
        steps = loop(start.copy(), state)
        before = int(state.position[0])
        for _ in zip(range(4), steps, strict=False):
            pass
        positions.append(int(state.position[0]) - before)
    assert positions[:2] == [4, 4]


@pytest.mark.parametrize("name", ["neox-base", "neox-trained-decay"])
def test_published_forward_meets_the_published_logits(name):
    golden = Golden.load(name)
    published = torch_models.Published(str(GOLDEN[name]), torch.get_num_threads(), "cpu")
    logits = published.forward(torch.from_numpy(golden.ids)).numpy()
    assert golden.error(logits) < 1e-4


def test_disturbed_rounds_count_for_neither_side():
    both = record("70m-int8", {"tg @ d0": {"ours": [20.0, 30.0], "peer": [10.0, 1.0]}})
    both["samples"][3]["waited"] = 0.4
    report = old_peers.of_record(both)
    assert ratio_of(report, "tg32")["measured"] == pytest.approx(2)
    assert [r["decode"]["latency"]["count"] for r in report["results"]] == [2, 1]
    both["samples"][2]["waited"] = 0.4
    report = old_peers.of_record(both)
    assert report["ratios"] == []
    assert "other processes ran in every repetition" in report["errors"][0]["message"]
    rows = targets.target_rows(peers.TARGETS, {"70m-int8": report})
    assert rows[0]["measured"] == "not measured"


def test_results_in_the_repository_can_be_printed():
    results = sorted(RESULTS.glob("*-peers.json"))
    assert results
    for path in results:
        document = json.loads(path.read_text())
        assert path.with_suffix(".md").read_text() == peers.markdown(document)


def test_every_older_result_is_still_read():
    """Reports of layout 1 are upgraded: tables, pages and pictures are made of them."""
    paths = [path for path in RESULTS.glob("*.json") if not path.stem.endswith(("peers", "presets"))]
    assert len(paths) >= 3
    for path in paths:
        assert json.loads(path.read_text())["schema_version"] == 1
        report = read_report(path)
        validate(report)
        assert len(to_csv(report).splitlines()) == 1 + len(result_rows(report))
        assert tables(report)
        assert "<svg" in to_html(report)
        assert json.loads(to_json(report)) == report


def test_older_peers_are_reports_of_the_one_schema():
    (path,) = RESULTS.glob("2026-11-25-*-peers.json")
    document = json.loads(path.read_text())
    for run in old_peers.read(document):
        for result in run["report"]["results"]:
            jsonschema.validate(result, RESULT, cls=jsonschema.Draft202012Validator)
    kept = sum(len(t["seconds"]) for record in document["records"] for t in record["samples"])
    read = sum(
        len(r["contention"]["turns"]) + len(r["contention"]["disturbed"])
        for run in old_peers.read(document)
        for r in run["report"]["results"]
    )
    assert read == kept
