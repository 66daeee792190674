"""--compare: regressions are found, noise is none, and what does not compare is said."""

import copy
import json

import numpy as np
import pytest
from click.testing import CliRunner

from dijiang.bench.compare import compare, to_markdown
from dijiang.bench.matrix import Test
from dijiang.bench.measure import Samples, Turn
from dijiang.bench.report import read_report
from dijiang.bench.results import result_of
from dijiang.bench.subject import Side, Traffic, load_bundle
from dijiang.cli import main
from dijiang.errors import BenchError
from dijiang.machine.sensors import Meter


def report(tests, name="model", noise=0.002, seed=0, repetitions=10):
    """A report whose tests {test: seconds a repetition} have a little noise."""
    random = np.random.default_rng(seed)
    side = Side(name, "p", load_bundle, Traffic(weights=1000), {})
    results = []
    for test, seconds in tests.items():
        totals = seconds * (1 + noise * random.standard_normal(repetitions))
        turns = [Turn(i, [total]) for i, total in enumerate(totals)]
        samples = Samples(1.0, "CPUExecutionProvider", turns=turns, peaks={"host": 5_000_000})
        results.append(result_of(side, test, samples, 1e9, Meter([])))
    models = [{"name": name, "baseline_of": None}]
    return {"schema_version": 2, "models": models, "results": results}


TESTS = {Test("pp", 512): 2.0, Test("tg", 1): 0.1}


def test_a_slower_test_has_regressed():
    found = compare(report(TESTS), report(TESTS | {Test("tg", 1): 0.12}, "renamed"), threshold=0.05)
    assert found["regressions"] == ["bundle: tg1, batch 1"]
    row = found["rows"][1]
    assert row["ratio"] == pytest.approx(1 / 1.2, rel=0.01)
    assert row["low"] <= row["ratio"] <= row["high"] < 1
    assert row["memory_ratio"] == 1


@pytest.mark.parametrize(
    ("seconds", "noise", "threshold"), [(0.12, 0.002, 0.3), (0.08, 0.002, 0.0), (0.11, 0.5, 0.01)]
)
def test_within_the_threshold_faster_or_lost_in_noise_is_no_regression(seconds, noise, threshold):
    after = report({Test("tg", 1): seconds}, noise=noise, seed=3)
    assert compare(report(TESTS, noise=noise), after, threshold=threshold)["regressions"] == []


@pytest.mark.parametrize("repetitions", [1, 4])
def test_few_repetitions_have_no_interval_and_nothing_has_regressed(repetitions):
    """The same bundle twice is "slower" by noise: one repetition each had an interval without a width."""
    before, after = (report({Test("tg", 1): 0.1}, noise=0.2, seed=seed, repetitions=repetitions) for seed in (0, 5))
    found = compare(before, after, threshold=0.0)
    (row,) = found["rows"]
    assert (row["low"], row["high"], row["noisy"], found["regressions"]) == (None, None, True, [])
    assert f"| {row['ratio']:.4g} |  |" in to_markdown(found)
    assert "not judged: fewer than 5 repetitions" in to_markdown(found)


def test_tests_of_one_side_only_are_listed():
    after = report({Test("tg", 1): 0.1, Test("tg", 1, batch=4): 0.3})
    found = compare(report(TESTS), after, threshold=0.05)
    assert found["only_before"] == ["bundle: pp512, batch 1"]
    assert found["only_after"] == ["bundle: tg1, batch 4"]


def test_models_of_several_bundles_are_told_apart_by_name():
    two = report(TESTS, "a")
    other = report(TESTS, "b")
    two["models"] += other["models"]
    two["results"] += other["results"]
    slow = copy.deepcopy(two)
    slow["results"][3] = report({Test("tg", 1): 0.2}, "b")["results"][0]
    assert compare(two, slow, threshold=0.05)["regressions"] == ["b: tg1, batch 1"]


def test_nothing_in_common_is_an_error():
    with pytest.raises(BenchError, match="no test in common"):
        compare(report(TESTS), report({Test("tg", 9): 1.0}), threshold=0.05)


@pytest.mark.parametrize("threshold", [-0.1, 1.0])
def test_threshold_is_a_fraction(threshold):
    with pytest.raises(BenchError, match="expected from 0 to less than 100"):
        compare(report(TESTS), report(TESTS), threshold=threshold)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        "not json",
        "[" * 100_000,
        '{"schema_version": 1, "models": [], "results": [{}]}',
        '{"schema_version": "1", "models": [], "results": []}',
    ],
)
def test_a_file_that_is_no_report_is_one_line(tmp_path, text):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(BenchError, match="not a report of dijiang bench"):
        read_report(path)


def test_a_report_of_another_layout_is_refused(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(report(TESTS) | {"schema_version": 3}))
    with pytest.raises(BenchError, match="layout 3, expected 1 to 2"):
        read_report(path)
    with pytest.raises(BenchError, match="cannot be read"):
        read_report(tmp_path / "nothing.json")


def test_command_exits_with_1_on_a_regression(tmp_path):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, seconds in zip(paths, (0.1, 0.12), strict=True):
        path.write_text(json.dumps(report({Test("tg", 1): seconds})))
    cli = CliRunner()
    slow = cli.invoke(main, ["bench", "--compare", *map(str, paths)])
    assert slow.exit_code == 1
    assert "REGRESSED" in slow.stdout
    assert slow.stderr.startswith("Error: 1 of 1 tests are slower by more than 5 %: bundle: tg1")
    fine = cli.invoke(main, ["bench", "--compare", *map(str, paths), "--threshold", "30", "-o", "json"])
    assert fine.exit_code == 0
    assert json.loads(fine.stdout)["rows"][0]["regressed"] is False
    assert cli.invoke(main, ["bench", "--compare", *map(str, paths), "-o", "csv"]).exit_code == 2


def test_memory_ratio_is_after_over_before():
    before, after = report(TESTS), report(TESTS)
    for result in after["results"]:
        (result["decode"] or result["prefill"])["memory"]["max_ram"] *= 1.5
    assert [row["memory_ratio"] for row in compare(before, after, threshold=0.05)["rows"]] == [1.5, 1.5]
