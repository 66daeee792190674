"""What of benchmarks/peers.py needs no peer: parsing, pairing, tables, and the published forward."""

from __future__ import annotations

import json

import numpy as np
import peer_cases
import peer_llama
import peer_ours
import peer_report
import peer_run
import peer_torch
import pytest
import torch

from tests.conftest import GOLDEN, TESTS, Golden


def record(group: str, tests: dict[str, dict[str, list[float]]]) -> dict:
    """A record of 10-token samples, one a round, from tokens/s by test and side."""
    quiet = {"waited": 0.0, "stolen": 0.0, "disturbed": []}
    samples = [
        {"round": i, "side": side, "test": test, "tokens": 10, "seconds": [10 / rate]} | quiet
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
    """A record of a pair of blocks of 10 tokens."""
    one = record(group, {pair: {"dijiang-int8": [1.0] * len(seconds)}})
    for sample, both in zip(one["samples"], seconds, strict=True):
        sample["seconds"] = list(both)
    return one


def test_llama_bench_report_gives_its_samples_in_seconds():
    report = json.dumps([{"n_gen": 32, "avg_ns": 2, "samples_ns": [1_500_000_000, 500_000_000]}])
    assert peer_llama.seconds(report) == [1.5, 0.5]


@pytest.mark.parametrize("tests", [[], [{"samples_ns": []}], [{"samples_ns": [1]}] * 2])
def test_llama_bench_report_of_other_than_one_test_is_refused(tests):
    with pytest.raises(ValueError, match="expected one"):
        peer_llama.seconds(json.dumps(tests))


def test_gguf_has_the_parameters_of_the_published_shape():
    shapes = peer_llama.tensor_shapes(peer_cases.PRESETS["pythia-410m"])
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 405_334_016


def test_ratios_pair_the_samples_of_a_round():
    both = record("int8", {"tg @ d0": {"ours": [20.0, 30.0, 90.0], "peer": [10.0, 10.0, 30.0]}})
    assert peer_report.ratios(both, *both["sides"], "tg @ d0") == pytest.approx([2, 3, 3])


def test_every_target_reads_a_group_and_a_test_that_are_measured():
    for target in peer_cases.TARGETS:
        names = [test.name for test in peer_run.tests(peer_cases.GROUPS[target.group])]
        assert target.kind in peer_report.KINDS
        assert not target.test or target.test in names
        assert (target.kind in ("pair", "overhead")) == (names[0] in peer_cases.PAIRS)


def test_targets_are_judged_on_their_median():
    step = {"dijiang-int8": [1.0, 10.0, 10.0], "peer": [1.0, 6.0, 5.0]}
    groups = {
        "int8": record("int8", dict.fromkeys(("tg @ d0", "tg @ d2048", "pp512"), step)),
        "endless": pairs("endless", "depth", [(1.25, 1.0)]),
    }
    rows = {row[0]: row[1:] for row in peer_report.target_rows(groups)}
    share, ratio, endless = (
        next(row for label, row in rows.items() if text in label) for text in ("bandwidth", "Q8_0, depth 0", "10^6")
    )
    assert share == ("74.0%", "80.0%", "80.0%", "8.0% to 80.0%", "stretch", "100.0%")
    assert ratio == ("1.5", "1.8", "1.67", "1 to 2", "reached", "2.5")
    assert endless == ("1.02", "", "1.25", "1.25 to 1.25", "no", "1")


def test_records_of_one_commit_are_joined_round_by_round():
    first = record("int8", {"tg @ d0": {"ours": [10.0], "peer": [10.0]}})
    second = record("int8", {"tg @ d0": {"ours": [40.0], "peer": [20.0]}}) | {"started": "2026-01-02"}
    joined = peer_report.newest([second, first])["int8"]
    assert peer_report.ratios(joined, "ours", "peer", "tg @ d0") == pytest.approx([1, 2])
    assert len(joined["bandwidth"]) == 2


def test_markdown_shows_the_newest_commit_of_a_group():
    old = record("fp32", {"pp128": {"ours": [1.0], "peer": [1.0]}})
    new = record("fp32", {"pp128": {"ours": [50.0], "peer": [20.0]}}) | {"started": "2026-01-02"}
    new["environment"] |= {"commit": "d"}
    loop = pairs("70m-loop-int8", "loop", [(1.1, 1.0), (1.2, 1.0), (1.0, 1.0)])
    text = peer_report.markdown({"records": [new, old, loop], "llama.cpp": {"options": "O"}})
    assert "| pp128 | peer | 20.0 | 20.0 to 20.0 | 1 | 2.50x |  | 2.50 to 2.50 |  |" in text
    assert "| 110.000 | 100.000 | 1.100 | 1.000 to 1.200 | 1.000 to 1.200 | 3 |" in text
    assert "| 10.0% | 0.0% to 20.0% | no | 0.0% |" in text


def test_every_ratio_stands_beside_what_is_asked_and_what_reading_allows():
    """80 weights of 1 byte at 1,000 bytes/s: 12.5 steps a second, and as many prompts of 10 tokens."""
    rate = {"dijiang-int8": [6.0], "llama.cpp-q8_0": [5.0]}
    both = record("int8", {"tg @ d0": rate, "pp512": rate})
    rows = [row for row in peer_report.rate_rows(both) if row[1] == "llama.cpp-q8_0"]
    assert [(row[5], row[6], row[8]) for row in rows] == [("1.20x", "1.5", "2.5"), ("1.20x", "3", "25")]


def test_prefill_of_a_peer_alone_has_no_limit_of_ours():
    flash = record("flash-q8_0", {"pp512": {"llama.cpp-q8_0-fa0": [1.0], "llama.cpp-q8_0-fa1": [1.0]}})
    assert peer_report.limit(flash, "llama.cpp-q8_0-fa1", "pp512") is None


@pytest.mark.parametrize("pair", peer_cases.PAIRS)
def test_a_pair_gives_the_seconds_of_both_in_turn(exported, pair):
    """No times are judged: that steps were made, and that the state a block starts from stays."""
    depths = (0, 50) if pair == "depth" else ()
    group = peer_cases.Group("pythia-70m", ("dijiang-fp32",), depths, (), 3, 1, 2, pair)
    [test] = peer_run.tests(group)
    side = peer_ours.Ours(exported("tiny-python"), threads=1)
    seconds = getattr(side, test.method)(*test.arguments)
    assert len(seconds) == 4
    assert min(seconds) > 0
    assert side.state(50).position == 50


@pytest.mark.parametrize("name", ["neox-base", "neox-trained-decay"])
def test_published_forward_meets_the_published_logits(name):
    golden = Golden.load(name)
    published = peer_torch.Published(GOLDEN[name], threads=torch.get_num_threads())
    logits = published.forward(torch.from_numpy(golden.ids)).numpy()
    assert golden.error(logits) < 1e-4


def test_disturbed_rounds_count_for_neither_side():
    both = record("int8", {"tg @ d0": {"ours": [20.0, 30.0], "peer": [10.0, 1.0]}})
    both["samples"][3]["waited"] = 0.4
    assert peer_report.ratios(both, *both["sides"], "tg @ d0") == pytest.approx([2])
    both["samples"][2]["waited"] = 0.4
    assert ("tg @ d0", "peer", "no undisturbed sample", "", "0", *[""] * 4) in peer_report.rate_rows(both)
    assert peer_report.target_rows({"70m-int8": both})[0][3] == "no undisturbed sample"


def test_results_in_the_repository_can_be_printed():
    results = sorted((TESTS.parent / "benchmarks" / "results").glob("*-peers.json"))
    assert results
    for path in results:
        assert path.with_suffix(".md").read_text() == peer_report.markdown(json.loads(path.read_text()))
