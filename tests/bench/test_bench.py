"""A whole bench on small bundles: what it reports, and that nothing it meets stops it."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
from dataclasses import replace
from functools import reduce
from importlib.resources import files
from operator import getitem

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner

import dijiang
from dijiang.bench import measure, render, runner
from dijiang.bench.matrix import Test
from dijiang.bench.measure import Run
from dijiang.bench.render import FORMULAS, explain
from dijiang.bench.report import target
from dijiang.bench.runner import Options, run_bench
from dijiang.bench.subject import Side, Traffic, bundle_side, load_bundle
from dijiang.cli import main
from dijiang.errors import BenchError, SessionError
from dijiang.machine.sensors import Sensor
from dijiang.runtime.sequence import Sequence
from tests.conftest import EXAMPLES

SCHEMA = json.loads(files("dijiang.bench").joinpath("schema.json").read_text())
QUICK = {"repetitions": 2, "seconds": 0.0}


@pytest.fixture(scope="module")
def report(exported):
    """A report over two depths and a batch."""
    options = Options("7", "5", "0,63", "1,2", threads="1", **(QUICK | {"repetitions": 5}))
    return run_bench([exported("tiny-python")], options)


def test_bundles_of_one_name_and_their_baselines_are_told_apart(exported, tmp_path):
    paths = [tmp_path / "a" / "m", tmp_path / "b" / "m", tmp_path / "b" / "m"]
    for path in paths[:2]:
        shutil.copytree(exported("tiny-python"), path)

    def baseline(name, bundle, folder, positions):
        return replace(bundle_side(f"Transformer of {name}", bundle), baseline_of=name)

    found = run_bench(paths, Options("none", "1", **QUICK), baseline=baseline)
    names = ["m", str(paths[1]), f"{paths[1]} (2)"]
    sides = [(model["name"], model["baseline_of"]) for model in found["models"]]
    assert sides == [side for name in names for side in ((name, None), (f"Transformer of {name}", name))]
    assert len(found["results"]) == 6


def validate(report):
    jsonschema.validate(report, SCHEMA, cls=jsonschema.Draft202012Validator)


def test_a_report_has_all_that_the_page_names_in_the_words_of_mlperf(report):
    """And the medians are TTFT and TPOT as this bench defines them."""
    page = (EXAMPLES.parent / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| .+ \| (`pp`|`tg`|both) \| (.+) \|$", page.split("MLPerf's words")[1], re.MULTILINE)
    assert len(lines) == 7
    for row in report["results"]:
        prompt = row["kind"] == "pp"
        for kind, places in lines:
            for place in re.findall("`([a-z0-9_.]+)`", places):
                if kind.strip("`") == row["kind"] or place.startswith("prefill" if prompt else "decode"):
                    found = reduce(getitem, place.split("."), row)
                    assert found > 0 if ".energy." not in place else found is None or found > 0, place
        if prompt:
            assert row["ttft_s"] == row["prefill"]["latency"]["p50"]
        else:
            assert row["tpot_s"] == pytest.approx(row["decode"]["latency"]["p50"] / row["tokens"])


def objects(schema):
    """Every object schema inside a schema."""
    if isinstance(schema, dict):
        if "properties" in schema:
            yield schema
        for value in schema.values():
            yield from objects(value)


def test_report_fits_its_schema(report):
    validate(json.loads(render.to_json(report)))


def test_schema_describes_every_field_and_allows_no_other():
    for schema in objects(SCHEMA):
        assert schema["additionalProperties"] is False
        assert all(field["description"] for field in schema["properties"].values())


def test_every_test_has_a_result_with_raw_samples(report):
    assert report["errors"] == []
    names = [(r["test"], r["batch"]) for r in report["results"]]
    series = [(f"{kind}{n}", batch) for kind, n in (("pp", 7), ("tg", 5)) for batch in (1, 2)]
    assert names == [(name + at, batch) for name, batch in series for at in ("", " @ d63")]
    for result in report["results"]:
        latency = target(result)["latency"]
        assert len(latency["values"]) >= 2
        steps = result["per_token"]
        assert (steps is None) == (result["kind"] == "pp")
        if steps:
            assert steps["latency"]["count"] == 5 * latency["count"]
            assert steps["latency"]["total"] == pytest.approx(latency["total"])
            assert result["tpot_s"] == pytest.approx(latency["p50"] / 5)


def test_memory_and_load_time_are_those_of_the_child(report):
    for result in report["results"]:
        peak = target(result)["memory"]["max_ram"]
        # Python, NumPy and ONNX Runtime take more than 30 MB; this process has torch too.
        assert 30 < peak < 300
        assert result["load_model"]["latency"]["count"] == 1


def test_bytes_come_from_the_bundle(report, exported):
    model = dijiang.load(exported("tiny-python"))
    traffic = report["models"][0]["traffic"]
    assert traffic["state"] == model.spec.state_bytes
    embedding = 4 * model.spec.vocab_size * model.spec.hidden_size
    data = (exported("tiny-python") / "model.onnx.data").stat().st_size
    assert 0.98 < traffic["weights"] / (data - embedding) < 1
    assert traffic["rows"] >= 4 * model.spec.hidden_size
    decode = next(r for r in report["results"] if r["kind"] == "tg" and r["batch"] == 2)
    assert decode["roofline"]["bytes_per_token"] * 2 == decode["roofline"]["bytes_per_step"]


def test_flatness_has_a_slope_for_each_series(report):
    series = [(f["kind"], f["batch"], f["depths"]) for f in report["flatness"]]
    assert series == [(kind, batch, [0, 63]) for kind in ("pp", "tg") for batch in (1, 2)]
    assert all(f["interleaved"] for f in report["flatness"])
    for f in report["flatness"]:
        assert f["time"]["low"] <= f["time"]["change"] <= f["time"]["high"]


def test_markdown_names_machine_and_every_row(report):
    text = render.to_markdown(report)
    assert report["environment"]["cpu"]["model"] in text
    assert text.count("| tiny-python | fp32 |") == 8
    assert "energy sensor: unknown" in text or report["idle"]["watts"] is not None


def test_csv_and_json_lines_hold_the_same_rows(report):
    rows = list(csv.DictReader(render.to_csv(report).splitlines()))
    lines = [json.loads(line) for line in render.to_jsonl(report).splitlines()]
    assert [row["test"] for row in rows] == [line["test"] for line in lines]
    assert float(rows[0]["tokens/s"]) == pytest.approx(lines[0]["tokens_per_second"])
    assert lines[0]["model"]["precision"] == "fp32"
    assert lines[0]["environment"] == report["environment"]


def test_llama_bench_rows_are_those_of_one_sequence(report):
    rows = json.loads(render.to_llama_bench(report))
    ours = [result for result in report["results"] if result["batch"] == 1]
    assert len(rows) == len(ours) == 4
    for row, result in zip(rows, ours, strict=True):
        assert (row["n_prompt"], row["n_gen"])[result["kind"] == "tg"] == result["tokens"]
        assert row["n_prompt"] * row["n_gen"] == 0
        assert row["n_depth"] == result["depth"]
        assert row["avg_ts"] == pytest.approx(np.mean([result["tokens"] / ns * 1e9 for ns in row["samples_ns"]]))
        assert row["avg_ns"] == pytest.approx(np.mean(row["samples_ns"]), rel=1e-5)  # samples have six digits


def test_noise_is_said():
    quiet = [1.0] * 10
    assert not runner_result(quiet)["noisy"]
    loud = runner_result([1.0, 1.2] * 5)
    assert loud["noisy"]
    text = "\n".join(render.remarks({"results": [loud], "errors": []}))
    assert "NOISY" in text
    assert "17 %" in text or "18 %" in text


def runner_result(totals, joules=None, idle=None, provider="CPUExecutionProvider", facts=None, metered=None):
    from dijiang.bench.measure import Samples, Turn
    from dijiang.bench.results import result_of
    from dijiang.machine.sensors import Meter

    seconds, metered = (sum(totals), len(totals)) if metered is None else (sum(totals[:metered]), metered)
    side = Side("m", "p", load_bundle, Traffic(weights=10_000_000), {})
    turns = [Turn(i, [t / 4] * 4) for i, t in enumerate(totals)]
    samples = Samples(1.0, provider, facts or {}, turns, [], {"host": 5}, joules, seconds, metered)
    meter = Meter([], seconds=2.0, joules=idle)
    return result_of(side, Test("tg", 4, batch=2), samples, 40e6, meter)


def test_roofline_is_bytes_over_bandwidth_over_time():
    found = runner_result([2.0] * 3)["roofline"]
    assert (found["bound_s"], found["percent"]) == (0.25, 50.0)


def test_a_gpu_is_not_held_against_the_hosts_memory():
    assert runner_result([2.0] * 3, provider="CUDAExecutionProvider")["roofline"] is None
    known = runner_result([2.0] * 3, provider="CUDAExecutionProvider", facts={"bandwidth": 80e6})["roofline"]
    assert (known["bandwidth"], known["percent"]) == (80e6, 25.0)


def test_energy_is_gross_and_less_idle():
    found = runner_result([2.0] * 3, joules=48.0, idle=6.0)["decode"]["energy"]
    assert (found["gross"], found["idle_subtracted"]) == (48 / 24, (48 - 3 * 6) / 24)


def test_commit_is_that_of_the_sources_and_of_no_repository_around_them(tmp_path, monkeypatch):
    place = tmp_path / ".venv" / "site-packages" / "dijiang" / "bench"
    place.mkdir(parents=True)
    git = ["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x@x"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(runner, "__file__", str(place / "runner.py"))
    assert runner.commit() is None
    monkeypatch.setattr(runner, "__file__", str(tmp_path / "dijiang" / "bench" / "runner.py"))
    assert len(runner.commit()) == 40


def test_turns_that_a_sensor_missed_are_not_counted_as_free():
    found = runner_result([2.0] * 3, joules=32.0, idle=6.0, metered=2)["decode"]["energy"]
    assert (found["gross"], found["idle_subtracted"]) == (32 / 16, (32 - 3 * 4) / 16)


def test_sensors_are_read_around_each_repetition(exported, monkeypatch):
    counter = iter(range(10**6))
    sensor = Sensor("test counter", "energy", lambda: float(next(counter)))
    monkeypatch.setattr(runner, "find_sensors", lambda: [sensor])
    monkeypatch.setattr(measure, "IDLE", 0.0)
    report = run_bench([exported("tiny-python")], Options("none", "3", **QUICK))
    energy = report["results"][0]["decode"]["energy"]
    assert energy["sensor"] == report["idle"]["sensor"] == "test counter"
    assert energy["gross"] > 0


@pytest.mark.parametrize("batch", [1, 2])
def test_timed_tokens_are_the_greedy_continuation(exported, batch):
    """The timed path is the real one: its ids are those of a plain loop."""
    test = Test("tg", 6, depth=0, batch=batch)
    subject = load_bundle(str(exported("tiny-python")), None, "auto")
    subject.prepare([test])
    ids = subject.ids(test)
    assert len(subject.seconds(test)) == 6
    state = subject.model.new_state(batch)
    for _ in range(6):
        ids = subject.model.forward(ids, state).argmax(axis=-1)[:, None]
    np.testing.assert_array_equal(subject.chosen, ids[:, 0])
    assert subject.state.position.tolist() == [6] * batch


def test_timed_loop_is_the_one_that_generate_runs(exported, monkeypatch):
    """Where a sequence chooses other tokens, the timed ones are others, too."""
    subject = load_bundle(str(exported("tiny-python")), None, "auto")
    real = Sequence.choose

    def timed():
        test = Test("tg", 5)
        subject.prepare([test])
        subject.seconds(test)
        first = int(subject.ids(test)[0, 0])
        state = subject.model.new_state()
        records = subject.model.generate([first], state=state, max_tokens=5, ignore_eos=True)
        return int(subject.chosen[0]), [record.token for record in records][-1]

    before, generated = timed()
    assert before == generated
    monkeypatch.setattr(Sequence, "choose", lambda *args: (real(*args) + 1) % subject.vocab_size)
    after, generated = timed()
    assert after != before


@pytest.mark.parametrize("batch", [1, 3])
def test_timed_tokens_are_those_of_every_sequence_alone(exported, batch):
    subject = load_bundle(str(exported("tiny-python")), None, "auto")
    test = Test("tg", 6, batch=batch)
    subject.prepare([test])
    subject.seconds(test)
    for row, first in enumerate(subject.ids(test)[:, 0].tolist()):
        records = list(subject.model.generate([first], max_tokens=6, ignore_eos=True))
        assert int(subject.chosen[row]) == records[-1].token


def test_prompt_is_what_generate_prefills(exported, monkeypatch):
    subject, seen = load_bundle(str(exported("tiny-python")), None, "auto"), []
    run = subject.model.session.run
    monkeypatch.setattr(
        subject.model.session, "run", lambda step, state: seen.append(step.ids.shape) or run(step, state)
    )
    subject.prepare([Test("pp", 7)])
    subject.seconds(Test("pp", 7))
    next(subject.model.generate(list(range(7)), max_tokens=1))
    assert seen == [(1, 7)] * 2


def test_failures_are_kept_beside_what_was_measured(exported, tmp_path):
    report = run_bench(
        [tmp_path / "nothing", exported("tiny-python-published")],
        Options("none", "4", "0,-3,510", **QUICK),
    )
    validate(json.loads(json.dumps(report)))
    assert [r["test"] for r in report["results"]] == ["tg4"]
    messages = [e["message"] for e in report["errors"]]
    assert len(messages) == 3
    assert "-d -3" in messages[0]
    assert "run dijiang export first" in messages[1]
    assert "514 positions, this bundle has 512" in messages[2]
    with pytest.raises(BenchError, match="1 tests were measured, 3 were not"):
        render.require(report)


def test_a_test_beyond_the_memory_is_one_line(exported):
    report = run_bench([exported("tiny-python")], Options("none", "1", batches="100000000", **QUICK))
    assert report["results"] == []
    assert "GB are free" in report["errors"][0]["message"]


@pytest.mark.parametrize(("turns", "kept"), [(0, []), (1, ["tg3"]), (3, ["tg3", "tg3 @ d5"])])
def test_what_was_measured_before_an_interruption_is_kept(exported, monkeypatch, turns, kept):
    class Interrupted(Run):
        def _repeat(self, *turn):
            if sum(len(one.turns) for one in self.samples.values()) == turns:
                os.kill(os.getpid(), signal.SIGTERM)
            super()._repeat(*turn)

    monkeypatch.setattr(runner, "Run", Interrupted)
    report = run_bench([exported("tiny-python")], Options("none", "3", "0,5", **QUICK))
    assert [r["test"] for r in report["results"]] == kept
    assert "interrupted" in report["errors"][0]["message"]
    validate(json.loads(json.dumps(report)))


def test_report_of_nothing_replaces_none(exported, tmp_path):
    """Ctrl-C in the first test would take the last good report away."""
    file = tmp_path / "r.json"
    file.write_text("last month's")
    command = ["bench", exported("tiny-python"), "-p", "none", "-n", 1, "-b", 100_000_000, "-o", "json", "-f", file]
    done = CliRunner().invoke(main, list(map(str, command)))
    assert done.exit_code == 1
    assert "0 tests were measured" in done.stderr
    assert file.read_text() == "last month's"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process")
def test_a_process_bound_to_one_core_is_held_against_one_threads_bandwidth(exported):
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        report = run_bench([exported("tiny-python")], Options("none", "3", **QUICK))
    finally:
        os.sched_setaffinity(0, cores)
    assert {b["threads"] for b in report["bandwidth"]} == {1} == {report["environment"]["cpu"]["usable_cores"]}
    assert report["results"][0]["roofline"]["bandwidth"] in [b["bytes_per_second"] for b in report["bandwidth"]]


def test_unknown_provider_is_the_sessions_error(exported):
    with pytest.raises(SessionError, match="abacus"):
        run_bench([exported("tiny-python")], Options("none", "3", provider="abacus", **QUICK))


@pytest.mark.parametrize("effort", [{"repetitions": 0}, {"seconds": -1.0}])
def test_no_repetitions_is_an_error(exported, effort):
    with pytest.raises(BenchError, match="expected at least"):
        run_bench([exported("tiny-python")], Options(**effort))


def test_command_line_writes_files_and_exits_with_1_on_failures(exported, tmp_path):
    quick = ["-p", "none", "-n", "3", "-r", "2", "--seconds", "0"]
    bundle = str(exported("tiny-python"))
    done = CliRunner().invoke(main, ["bench", bundle, *quick, "-b", "1,0", "-f", str(tmp_path / "r.md")])
    assert done.exit_code == 1
    assert done.stdout == ""
    assert "tiny-python: tg3, batch 1" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("Error: 1 tests were measured, 1 were not: -b 0")
    assert "| tg3 |" in (tmp_path / "r.md").read_text()
    done = CliRunner().invoke(main, ["bench", bundle, *quick, "-o", "json", "-t", "1"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["results"][0]["threads"] == 1


def test_report_that_cannot_be_written_any_more_is_on_stdout(tmp_path, capsys):
    with pytest.raises(BenchError, match=r"cannot be written .*; the report is on stdout instead"):
        render.write("report", tmp_path / "no" / "r.md")
    assert capsys.readouterr().out == "report\n"


def test_explain_prints_every_formula():
    done = CliRunner().invoke(main, ["bench", "--explain"])
    assert done.exit_code == 0
    assert done.stdout.strip() == explain().strip()
    assert all(name in done.stdout for name in FORMULAS)


def test_no_bundle_is_wrong_usage():
    assert CliRunner().invoke(main, ["bench"]).exit_code == 2
    told = CliRunner().invoke(main, ["bench", "x", "-o", "llama-bench", "-b", "1,2"])
    assert (told.exit_code, "one sequence at a time" in told.stderr) == (2, True)
