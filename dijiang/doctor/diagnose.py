"""What is installed and what will really be used, with the next command for each missing piece."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import SessionError
from ..machine.bandwidth import Bandwidth, measure_bandwidth
from ..machine.describe import describe_machine
from ..machine.memory import parameters_that_fit
from ..machine.sensors import find_sensors
from ..recipe import PROVIDERS, named
from ..runtime.operators import find_library, isa
from ..runtime.sessions.engines import BACKENDS
from ..runtime.sessions.inference import CPU_PROVIDER, PACKAGES, runs_here
from ..runtime.sessions.kernels import why_no_kernels
from ..runtime.sessions.preflight import clashing_packages
from .probes import Probe, probe_providers
from .support import support

#: Missing piece -> commands for any machine, and for a Jetson or Python 3.10 where they differ; first one first.
REMEDIES = json.loads(Path(__file__).with_name("remedies.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis. next: the command that changes it, None if there is nothing to do."""

    name: str
    status: Literal["ok", "wrong", "missing", "unknown"]
    found: str
    next: str | None = None


def diagnose(root: Path = Path("/"), nvml: Any = None) -> dict[str, Any]:
    """Look at the machine, run a tiny session on every provider, measure the memory's bandwidth; JSON-ready."""
    machine, providers, bandwidth = describe_machine(root, nvml), probe_providers(), measure_bandwidth()
    sensors = [sensor.name for sensor in find_sensors(root, nvml)]
    findings = [*_hardware(machine, bandwidth), *_backends(machine, providers)]
    findings += [*_tools(machine, sensors), *_support(machine, providers)]
    return {
        "machine": machine,
        "providers": [asdict(probe) for probe in providers],
        "sensors": sensors,
        "bandwidth": asdict(bandwidth),
        "findings": [asdict(finding) for finding in findings],
    }


def _next(machine: dict[str, Any], name: str) -> str | None:
    """The commands for a missing piece on this machine, in one line."""
    remedy = REMEDIES.get(name, {})
    here = {"jetson": machine.get("jetson"), "python 3.10": sys.version_info < (3, 11)}
    kind = next((kind for kind in here if here[kind] and kind in remedy), "usual")
    return "; or ".join(remedy.get(kind, ())) or None


def _hardware(machine: dict[str, Any], bandwidth: Bandwidth) -> list[Finding]:
    cpu, memory, jetson, zones = (machine[name] for name in ("cpu", "memory", "jetson", "temperatures"))
    clock = f", {cpu['mhz']:,.0f} MHz" if cpu["mhz"] else ""
    usable = f", {cpu['usable_cores']} usable here" if cpu["usable_cores"] != cpu["physical_cores"] else ""
    free, total = memory["available_bytes"] / 1e9, memory["total_bytes"] / 1e9
    rate = f"read at {bandwidth.bytes_per_second / 1e9:,.1f} GB/s by {bandwidth.threads} threads"
    governor, hottest = cpu["governor"], max(zones, key=zones.__getitem__, default=None)
    steady = _next(machine, "governor") if governor not in (None, "performance") else None
    findings = [
        Finding("system", "ok", f"{machine['system']}, Python {machine['python']}"),
        Finding("processor", "ok", f"{cpu['model']}, {cpu['physical_cores']} physical cores{usable}{clock}"),
        Finding("instructions", "ok", ", ".join(cpu["features"]) or "none of those that matter"),
        Finding("clock governor", "ok", governor, steady)
        if governor
        else Finding("clock governor", "unknown", "not shown by this kernel"),
        Finding("memory", "ok", f"{free:,.1f} of {total:,.1f} GB free, {rate}"),
        *_room(machine),
        Finding("temperature", "ok", f"{zones[hottest]:.0f} °C at most ({hottest})")
        if hottest
        else Finding("temperature", "unknown", "no thermal zone is shown"),
    ]
    for gpu in machine["gpus"]:
        size = f"{gpu['total_bytes'] / 1e9:,.1f} GB" if gpu["total_bytes"] else "memory of the host"
        driver = f"compute {gpu['compute_capability']}, driver {gpu['driver']} for CUDA {gpu['cuda_driver']}"
        findings.append(Finding("GPU", "ok", f"{gpu['name']}, {size}, {driver}"))
    if jetson is not None:
        known = {key: value or "unknown" for key, value in jetson.items()}
        board = "{model}, L4T {l4t}, JetPack {jetpack}, power mode {power_mode}".format(**known)
        findings.append(Finding("Jetson", "ok", board, _next(machine, "power mode")))
    elif not machine["gpus"]:
        findings.append(Finding("GPU", "unknown", "NVML shows none", _next(machine, "GPU")))
    return findings


def _room(machine: dict[str, Any]) -> list[Finding]:
    """Sizes of models that the free memory holds, and of those whose engines can be built in it."""
    findings = []
    for name, build in (("models that fit", False), ("engines built here", True)):
        found = parameters_that_fit(machine["memory"]["available_bytes"], build=build)
        sizes = ", ".join(f"{precision} {count / 1e9:.1f}" for precision, count in found.items())
        findings.append(Finding(name, "ok", f"{sizes} billion parameters at most"))
    return findings


def _backends(machine: dict[str, Any], probes: list[Probe]) -> list[Finding]:
    packages = machine["packages"]
    found = [f"{name} {packages[name]}" for name in PACKAGES if name in packages]
    if not found:
        return [Finding("onnxruntime", "missing", "not installed", _next(machine, "onnxruntime"))]
    both = _next(machine, "two onnxruntimes") if clashing_packages() else None
    findings = [Finding("onnxruntime", "wrong" if both else "ok", ", ".join(found), both)]
    for probe in probes:
        name = probe.provider
        if not probe.runs:
            findings.append(Finding(name, "missing", probe.reason or "does not run", _next(machine, name)))
        elif probe.linear_attention:
            findings.append(Finding(name, "ok", "runs, with the fused LinearAttention node"))
        else:
            command = _next(machine, "LinearAttention")
            findings.append(Finding(name, "ok", "runs, but has no LinearAttention node", command))
    return findings


def _support(machine: dict[str, Any], probes: list[Probe]) -> list[Finding]:
    """What every provider of dijiang runs, and whether it runs here."""
    running = {probe.provider for probe in probes if probe.runs}
    rows: dict[str, list[str]] = {}
    for one in support():
        rows.setdefault(one.provider, []).append(f"{one.precision} {one}")
    findings = []
    for name, row in PROVIDERS.items():
        if row.onnxruntime:
            needs = named(row.detail).name if row.detail else CPU_PROVIDER
            ready = needs in running
            lacking = [graph for graph in row.graphs if not _runs(graph)]
            rows[name] += [f"not here: {', '.join(lacking)}"] if lacking else []
        else:
            needs = BACKENDS[name].package
            ready = bool(machine["gpus"]) and needs in machine["packages"]
        command = None if ready else _next(machine, needs)
        findings.append(Finding(f"--provider {name}", "ok" if ready else "missing", "; ".join(rows[name]), command))
    return findings


def _runs(graph: str) -> bool:
    with suppress(SessionError):  # a variable asks for what cannot be had: `_operator` says so
        return runs_here(graph)
    return False


def _tools(machine: dict[str, Any], sensors: list[str]) -> list[Finding]:
    packages = machine["packages"]
    findings = [
        Finding(name, "ok", packages[name])
        if name in packages
        else Finding(name, "missing", "not installed", _next(machine, name))
        for name in ("tensorrt", "onnx-ir", "matplotlib")
    ]
    findings += [_operator(machine), *_kernels(machine)]
    if sensors:
        return [*findings, Finding("energy sensors", "ok", ", ".join(sensors))]
    silent = "neither NVML, INA3221 nor RAPL answers"
    return [*findings, Finding("energy sensors", "unknown", silent, _next(machine, "energy sensors"))]


def _kernels(machine: dict[str, Any]) -> list[Finding]:
    """What the fastest graph on CUDA needs; nothing is said where there is no NVIDIA GPU."""
    if not machine.get("gpus") or find_library() is None:
        return []
    missing = why_no_kernels()
    return [Finding("kernels of the cuda graph", "missing" if missing else "ok", missing or "can be compiled")]


def _operator(machine: dict[str, Any]) -> Finding:
    if find_library() is None:
        command = _next(machine, "native operator")
        return Finding("native operator", "missing", "not compiled: no native graphs", command)
    try:
        return Finding("native operator", "ok", f"compiled, runs with {isa()}")
    except SessionError as error:
        return Finding("native operator", "wrong", str(error))
