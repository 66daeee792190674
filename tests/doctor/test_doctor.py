"""Doctor: every missing piece has its next command."""

import json
import sys

import pytest
from click.testing import CliRunner

from dijiang.cli import main
from dijiang.doctor import diagnose as doctor
from dijiang.doctor.probes import Probe
from dijiang.errors import InputError, SessionError
from dijiang.machine.bandwidth import measure_bandwidth
from dijiang.machine.describe import describe_machine
from dijiang.machine.memory import build_bytes, parameters_that_fit, run_bytes
from dijiang.recipe import PRECISIONS
from dijiang.runtime import operators as native
from tests.conftest import TESTS
from tests.machine.test_describe import JETSON, NO_GPU, SHARED, lay_out

ROOT = TESTS.parent


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
        ({"onnxruntime": "1", "onnxruntime-gpu": "1"}, [], "wrong", "pip uninstall -y onnxruntime"),
        (
            {"onnxruntime": "1"},
            [Probe("CPUExecutionProvider", True, False, "no such op")],
            "ok",
            "dijiang export CHECKPOINT -o BUNDLE",
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
def test_backend_findings_name_the_next_command(packages, probes, status, command, monkeypatch):
    monkeypatch.setattr(doctor, "clashing_packages", lambda: [*packages] if len(packages) > 1 else [])
    finding = doctor._backends({"packages": packages}, probes)[-1]
    assert finding.status == status
    assert command in (finding.next or "")


def test_packages_in_folders_of_their_own_are_nothing_to_mend(monkeypatch):
    monkeypatch.setattr(doctor, "clashing_packages", list)
    (finding,) = doctor._backends({"packages": {"onnxruntime": "1", "onnxruntime-gpu": "2"}}, [])
    assert (finding.status, finding.next) == ("ok", None)


def test_missing_tools_and_sensors_name_their_extra():
    findings = {f.name: f for f in doctor._tools({"packages": {}}, [])}
    assert findings["tensorrt"].next == "pip install 'dijiang[tensorrt]'"
    assert findings["energy sensors"].status == "unknown"
    assert "intel-rapl" in findings["energy sensors"].next


def test_bandwidth_counts_the_bytes_it_reads():
    measured = measure_bandwidth(threads=2, size=8_000_008, passes=3)
    assert (measured.size, measured.threads, len(measured.passes)) == (8_000_008, 2, 3)
    assert measured.bytes_per_second == 8_000_008 / min(measured.passes)


@pytest.mark.parametrize("options", [{"threads": -1}, {"size": 0}, {"passes": 0}])
def test_bandwidth_of_nothing_is_an_error(options):
    with pytest.raises(InputError, match="expected 1 or more"):
        measure_bandwidth(**options)


def test_a_gpu_with_the_hosts_memory_is_shown(tmp_path):
    machine = describe_machine(lay_out(tmp_path, JETSON), SHARED)
    found = {f.name: f for f in doctor._hardware(machine, measure_bandwidth(size=1 << 20, passes=2))}
    assert found["GPU"].found == "Orin, memory of the host, compute 8.7, driver 540.4.0 for CUDA 12.6"


#: What a Jetson of each JetPack may have installed, and what its providers do.
BOARDS = {
    "bare": ({}, []),
    "both": ({"onnxruntime": "1.23.2", "onnxruntime-gpu": "1.23.0"}, []),
    "old": (
        {"onnxruntime": "1.23.2", "tensorrt": "10.3.0"},
        [Probe("CPUExecutionProvider", True, False, "no such op")],
    ),
    "wrong GPU code": (
        {"onnxruntime-gpu": "1.31.1"},
        [
            Probe("TensorrtExecutionProvider", False, False, "libnvinfer.so.10: not found"),
            Probe("CUDAExecutionProvider", False, False, "no kernel image is available"),
        ],
    ),
}


@pytest.mark.parametrize("board", BOARDS)
def test_every_command_for_a_jetson_is_in_its_guide(tmp_path, monkeypatch, board):
    packages, found = BOARDS[board]
    monkeypatch.setattr(doctor, "clashing_packages", lambda: [*packages] if board == "both" else [])
    machine = describe_machine(lay_out(tmp_path, JETSON), NO_GPU) | {"packages": packages}
    bandwidth = measure_bandwidth(size=1 << 20, passes=2)
    findings = [
        *doctor._hardware(machine, bandwidth),
        *doctor._backends(machine, found),
        *doctor._tools(machine, []),
    ]
    commands = {c for finding in findings if finding.next for c in finding.next.split("; or ")}
    guide = (ROOT / "docs" / "jetson.md").read_text()
    assert {command for command in commands if command not in guide} == set()
    assert "sudo nvpmodel -q" in commands
    assert not any("cpupower" in command or "dijiang[tensorrt]" in command for command in commands)


@pytest.mark.parametrize(("version", "told"), [((3, 10, 13), False), ((3, 11, 0), True), ((3, 13, 0), True)])
def test_nobody_is_told_to_install_what_his_python_has_not(monkeypatch, version, told):
    monkeypatch.setattr(sys, "version_info", version)
    assert ("onnxruntime>=1.30" in doctor._next({}, "LinearAttention")) is told


def test_graphs_that_this_onnxruntime_does_not_run_are_named(monkeypatch):
    monkeypatch.setattr(doctor, "runs_here", lambda graph: graph not in ("ort", "onnx"))
    found = {f.name: f.found for f in doctor._support({"gpus": [], "packages": {}}, [])}
    assert found["--provider cpu"].endswith("; not here: ort, onnx")
    assert found["--provider cuda"].endswith("; not here: ort, onnx")
    assert "not here" not in found["--provider tensorrt"]


def test_remedies_for_a_jetson_are_all_in_its_guide():
    guide = (ROOT / "docs" / "jetson.md").read_text()
    commands = {c for name, r in doctor.REMEDIES.items() if name != "GPU" for c in r.get("jetson", r["usual"])}
    assert {command for command in commands if command not in guide} == set()


@pytest.mark.parametrize(("free", "row"), [(3.0e9, "4 GB"), (6.5e9, "8 GB")])
def test_guide_says_what_fits_as_doctor_does(free, row):
    findings = doctor._room({"memory": {"available_bytes": int(free)}})
    runs, builds = (f.found.removesuffix(" billion parameters at most") for f in findings)
    guide = (ROOT / "docs" / "jetson.md").read_text()
    assert f"| {row} | {free / 1e9:.1f} GB | {runs} | {builds} |" in guide


def test_nothing_fits_into_no_memory():
    assert set(parameters_that_fit(1 << 20).values()) == {0}


def test_what_fits_is_what_is_not_refused():
    for build, need in ((False, lambda weights: run_bytes(weights, 0)), (True, build_bytes)):
        for precision, count in parameters_that_fit(4 << 30, build=build).items():
            weights = count * PRECISIONS[precision].weight_bytes
            assert need(int(weights)) <= 4 << 30 < need(int(1.001 * weights))


@pytest.mark.parametrize("installed", [True, False])
def test_native_operator_names_its_instruction_set(monkeypatch, installed):
    if not installed:
        monkeypatch.setattr(native, "FILE", "_absent.so")
    elif native.find_library() is None:
        pytest.skip("no compiled operator")
    found = doctor._operator(describe_machine())
    assert (found.status, found.next is None) == (("ok", True) if installed else ("missing", False))
    assert not installed or found.found == f"compiled, runs with {native.isa()}"


def test_instruction_set_that_cannot_be_had_is_wrong(monkeypatch):
    def refused():
        raise SessionError("DIJIANG_ISA=avx3 is no instruction set")

    monkeypatch.setattr(doctor, "find_library", lambda: doctor.Path(__file__))
    monkeypatch.setattr(doctor, "isa", refused)
    found = doctor._operator(describe_machine())
    assert (found.status, found.found) == ("wrong", "DIJIANG_ISA=avx3 is no instruction set")
