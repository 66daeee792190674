"""What of benchmarks/peers.py needs no peer: parsing, pairing, tables, and the published forward."""

from __future__ import annotations

import json

import llama
import numpy as np
import peers
import pytest
import targets
import torch
import torch_models
from bundles import load_loops

from dijiang.bench import measure
from dijiang.bench.matrix import Test
from dijiang.bench.measure import Effort, Samples, Turn
from dijiang.bench.render import report_rows, tables, to_csv, to_html, to_json
from dijiang.bench.report import read_report
from dijiang.bench.results import summarise
from dijiang.bench.runner import run_sides
from dijiang.bench.subject import Side, Subject, Traffic, bundle_side, load_bundle
from dijiang.bundle.opened import open_bundle
from dijiang.machine.sensors import Meter
from dijiang.models.presets import PRESETS
from tests.bench.test_bench import validate
from tests.conftest import GOLDEN, TESTS, Golden

RESULTS = TESTS.parent / "benchmarks" / "results"


Seconds = dict[Test, dict[str, list[float]]]


def rates(rows: dict[str, dict[str, list[float]]], tokens: int = 32) -> Seconds:
    """Seconds from tokens/s by test (pp512, tg32 @ d2048) and side."""
    found = {}
    for name, sides in rows.items():
        depth = int(name.partition("@ d")[2] or 0)
        test = Test(name[:2], tokens, depth, threads=2)
        found[test] = {side: [tokens / rate for rate in values] for side, values in sides.items()}
    return found


def made(rows: Seconds, *, waited: dict[tuple[str, int], float] | None = None, **header: str) -> dict:
    """A report of quiet turns, from seconds by test and side. waited: by side and turn."""
    names = list(next(iter(rows.values())))
    counts = {"all": 100, "step": 80, "head": 30}
    facts = {"kind": "k", "precision": "p", "graph": None, "bytes": 70, "spec": None, "parameters": counts}
    sides = [Side(n, "", load_bundle, Traffic(80 if n.startswith("dijiang") else 0), facts) for n in names]
    found = {}
    for test, sides_of in rows.items():
        for side, seconds in sides_of.items():
            samples = found[side, test] = Samples(None, "CPUExecutionProvider", interleaved=True)
            for i, one in enumerate(seconds):
                turn = Turn(i, [one], (waited or {}).get((side, i), 0.0))
                (samples.turns if turn.waited <= measure.QUIET else samples.disturbed).append(turn)
    count = max(len(seconds) for sides_of in rows.values() for seconds in sides_of.values())
    figures = summarise([sides], list(rows), found, {2: 1000.0}, Meter([]))
    cpu = {"model": "X", "physical_cores": 2, "features": []}
    machine = {"cpu": cpu, "memory": {"total_bytes": 2**33}, "system": "S", "python": "3"}
    machine |= {"packages": {"numpy": "2"}, "gpus": [], "jetson": None}
    bandwidth = [{"bytes_per_second": 1000.0, "threads": 2, "turn": i} for i in range(count)]
    known = {"schema_version": 2, "created": "2026-01-01T00:00:00Z", "commit": "c", "environment": machine}
    return known | {"bandwidth": bandwidth, "models": [side.to_dict() for side in sides]} | figures | header


def loops(pairs: list[tuple[float, float]]) -> Seconds:
    """Seconds of the records of `generate` and of the bare session, turn by turn."""
    tests = [Test("tg", 32, threads=2, way=way) for way in ("generate", "bare")]
    return {test: {"dijiang-int8": list(one)} for test, one in zip(tests, zip(*pairs, strict=True), strict=True)}


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
    assert isinstance(subject, Subject)
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
    both = {"tg": {"dijiang-int8": [32.0, 32.0, 16.0] * 2, "peer": [16.0, 32 / 3, 16 / 3] * 2}}
    found = ratio_of(made(rates(both)), "tg32")
    assert (found["measured"], found["low"], found["high"]) == pytest.approx((3, 2, 3))


def test_every_target_reads_a_group_and_a_test_that_are_measured():
    for target in peers.TARGETS:
        group = peers.GROUPS[target.run]
        names = {test.name for test in group.tests()}
        for row in filter(None, (target.ours, target.theirs)):
            assert row[0] in group.sides.split()
            assert row[1] in names or target.kind == "size"


def test_targets_are_judged_on_their_median():
    step = {"dijiang-int8": [1.0, 10.0, 10.0] * 2, "llama.cpp-q8_0": [1.0, 6.0, 5.0] * 2}
    depths = {10**6: [1.25] * 5, 0: [1.0] * 5}
    endless = {Test("tg", 16, depth, threads=2): {"dijiang-int8": seconds} for depth, seconds in depths.items()}
    int8 = rates(dict.fromkeys(("tg", "tg @ d2048"), step))
    rows = targets.target_rows(peers.TARGETS, {"int8": made(int8), "endless": made(endless)})
    by_label = {row["what"]: tuple(row.values())[1:] for row in rows}
    share, ratio, deep = (
        next(row for label, row in by_label.items() if text in label)
        for text in ("bandwidth", "Q8_0, depth 0", "10^6")
    )
    assert share == ("74.0%", "80.0%", "80.0%", "8.0% to 80.0%", "stretch", "100.0%")
    assert ratio == ("1.5", "1.8", "1.67", "1 to 2", "reached", "2.5")
    assert deep == ("1.02", "", "1.25", "1.25 to 1.25", "missed", "1")


def runs(*reports: tuple[str, dict]) -> dict:
    found = [{"group": group, "report": report} for group, report in reports]
    return {"llama.cpp": {"options": "O"}, "runs": found}


def test_reports_of_one_commit_are_joined_turn_by_turn():
    first = made(rates({"tg": {"ours": [10.0] * 3, "peer": [10.0] * 3}}))
    second = made(rates({"tg": {"ours": [40.0] * 3, "peer": [20.0] * 3}}), created="2026-01-02")
    joined = peers.newest(runs(("int8", second), ("int8", first)))["int8"]
    found = ratio_of(joined, "tg32")
    assert (found["low"], found["high"]) == pytest.approx((1, 2))
    assert [b["turn"] for b in joined["bandwidth"]] == [*range(6)]
    assert [r["decode"]["latency"]["count"] for r in joined["results"]] == [6, 6]


def test_markdown_shows_the_newest_commit_of_a_group():
    same, more = {"ours": [1.0] * 5, "peer": [1.0] * 5}, {"ours": [50.0] * 5, "peer": [20.0] * 5}
    old = made(rates({"pp": same}, 128))
    new = made(rates({"pp": more}, 128), created="2026-01-02", commit="d")
    loop = made(loops([(1.1, 1.0), (1.2, 1.0), (1.0, 1.0)] * 2))
    text = peers.markdown(runs(("fp32", new), ("fp32", old), ("70m-loop-int8", loop)))
    assert "| ours | pp128 | 1 | peer | 2.5 | 2.5 to 2.5 |" in text
    assert "| dijiang-int8 | p | tg32 generate | 1 | 2 | 29.09 |" in text
    assert "| 10.0% | 0.0% to 20.0% | missed | 0.0% |" in text


def test_every_ratio_stands_beside_what_reading_allows():
    """80 weights of 1 byte at 1,000 bytes/s: 12.5 steps a second, and as many prompts of 512 tokens."""
    rate = {"dijiang-int8": [6.0], "llama.cpp-q8_0": [5.0]}
    decoding = ratio_of(made(rates({"tg": rate})), "tg32")
    prompt = ratio_of(made(rates({"pp": rate}, 512)), "pp512")
    assert (decoding["measured"], decoding["limit"]) == pytest.approx((1.2, 2.5))
    assert (prompt["measured"], prompt["limit"]) == pytest.approx((1.2, 512 * 2.5))


def test_a_peer_of_unknown_weights_has_no_limit():
    both = {"llama.cpp-q8_0-fa0": [1.0], "llama.cpp-q8_0-fa1": [1.0]}
    assert ratio_of(made(rates({"pp": both}, 512)), "pp512")["limit"] is None


@pytest.mark.parametrize("group", peers.GROUPS)
def test_groups_have_their_tests(group):
    tests = peers.GROUPS[group].tests(2)
    assert len(tests) == len(set(tests)) >= 1
    assert {test.threads for test in tests} == {2}


def test_loops_take_turns_in_one_process(exported, monkeypatch):
    """No times are judged: that each loop made its steps, in turn, from one state."""
    monkeypatch.setattr(measure, "QUIET", float("inf"))
    monkeypatch.setattr(measure, "PATIENCE", 0.0)
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
    both = {Test("tg", 128, threads=2): {"ours": [1.0, 2.0], "peer": [2.0, 9.0]}}
    report = made(both, waited={("peer", 1): 0.4})
    assert ratio_of(report, "tg128")["measured"] == pytest.approx(2)
    assert [r["decode"]["latency"]["count"] for r in report["results"]] == [2, 1]
    report = made(both, waited={("peer", 1): 0.4, ("peer", 0): 0.4})
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
    paths = [path for path in RESULTS.glob("2*.json") if not path.stem.endswith("peers")]
    assert len(paths) >= 3
    for path in paths:
        assert json.loads(path.read_text())["schema_version"] == 1
        report = read_report(path)
        validate(report)
        assert len(to_csv(report).splitlines()) == 1 + len(report_rows(report, "results"))
        assert tables(report)
        assert "<svg" in to_html(report)
        assert json.loads(to_json(report)) == report


def test_results_of_the_peers_are_reports_of_the_one_schema():
    """They were records of another layout, and were converted with every sample."""
    (path,) = RESULTS.glob("2026-11-25-*-peers.json")
    reports = [run["report"] for run in json.loads(path.read_text())["runs"]]
    kept = 0
    for report in reports:
        validate(report)
        turns = [result["contention"] for result in report["results"]]
        kept += sum(len(one["turns"]) + len(one["disturbed"]) for one in turns)
        assert [len(one["turns"]) for one in turns] == [
            len((r["decode"] or r["prefill"])["latency"]["values"]) for r in report["results"]
        ]
    assert kept == 1194
