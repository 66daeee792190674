"""docs/models.md holds what benchmarks/results/presets.json does."""

import json
import sys

import plan
import presets
import pytest

from dijiang.models.presets import PRESETS


def test_table_is_written_from_the_results():
    results = json.loads(presets.RESULTS.read_text())
    assert presets.TABLE.read_text() == presets.table(results)
    assert {row["preset"] for row in results["rows"]} <= set(PRESETS)
    assert all(row["verify"]["passed"] for row in results["rows"])


def test_copying_is_timed_and_leaves_nothing(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    assert presets.copied(checkpoint, tmp_path) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_process_reports_its_peak_and_what_it_printed():
    code = "import time; x = bytearray(200_000_000); time.sleep(0.5); print(len(x))"
    found = plan.run([sys.executable, "-c", code])
    assert found.output == "200000000\n"
    assert 2e8 < found.figures["anonymous_bytes"] < 3e8


def test_step_that_fails_ends_the_plan():
    with pytest.raises(SystemExit, match="failed with 3"):
        presets.watched([sys.executable, "-c", "raise SystemExit(3)"])
