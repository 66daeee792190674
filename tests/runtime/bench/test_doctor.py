"""Doctor: every missing piece has its next command."""

import json

import pytest
from click.testing import CliRunner

from dijiang.cli import main
from dijiang.errors import InputError
from dijiang.runtime.bench import doctor
from dijiang.runtime.bench.bandwidth import measure_bandwidth
from dijiang.runtime.bench.probes import Probe


@pytest.fixture
def small_probe(monkeypatch):
    """The bandwidth of a megabyte: the real one takes a second."""
    monkeypatch.setattr(doctor, "measure_bandwidth", lambda: measure_bandwidth(size=1 << 20, passes=2))


def test_doctor_reports_providers_by_running_them(small_probe):
    done = CliRunner().invoke(main, ["doctor"])
    assert done.exit_code == 0
    assert "CPUExecutionProvider" in done.stdout
    assert "GB/s by" in done.stdout


def test_doctor_json_holds_the_same(small_probe):
    report = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)
    assert sorted(report) == ["bandwidth", "findings", "machine", "providers", "sensors"]
    assert {"system", "processor", "memory", "onnxruntime"} <= {f["name"] for f in report["findings"]}


@pytest.mark.parametrize(
    ("packages", "probes", "status", "command"),
    [
        ({}, [], "missing", "pip install 'dijiang[cpu]'"),
        ({"onnxruntime": "1", "onnxruntime-gpu": "1"}, [], "ok", "pip uninstall onnxruntime"),
        (
            {"onnxruntime": "1"},
            [Probe("CPUExecutionProvider", True, False, "no such op")],
            "ok",
            "--dialect primitive",
        ),
        (
            {"onnxruntime-gpu": "1"},
            [Probe("CUDAExecutionProvider", False, False, "no driver")],
            "missing",
            "nvidia-smi",
        ),
    ],
    ids=["none", "both", "old", "no-driver"],
)
def test_backend_findings_name_the_next_command(packages, probes, status, command):
    finding = doctor._backends({"packages": packages}, probes)[-1]
    assert finding.status == status
    assert command in (finding.next or "")


def test_missing_tools_and_sensors_name_their_extra():
    findings = {f.name: f for f in doctor._tools({"packages": {}}, [])}
    assert findings["tensorrt"].next == "pip install 'dijiang[tensorrt]'"
    assert findings["energy sensors"].status == "unknown"
    assert "intel-rapl" in findings["energy sensors"].next


def test_bandwidth_counts_the_bytes_it_reads():
    measured = measure_bandwidth(threads=2, size=8_000_008, passes=3)
    assert (measured.size, measured.threads, len(measured.passes)) == (8_000_008, 2, 3)
    assert measured.bytes_per_second == 8_000_008 / min(measured.passes)


@pytest.mark.parametrize("options", [{"threads": -1}, {"size": 7}, {"passes": 0}])
def test_bandwidth_of_nothing_is_an_error(options):
    with pytest.raises(InputError, match="expected 1 or more"):
        measure_bandwidth(**options)
