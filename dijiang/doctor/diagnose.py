"""What is installed and what will really be used, with the next command for each missing piece."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import SessionError
from ..machine.bandwidth import Bandwidth, measure_bandwidth
from ..machine.describe import describe_machine
from ..machine.memory import parameters_that_fit
from ..machine.sensors import find_sensors
from ..runtime.native import find_library, isa
from ..runtime.sessions.preflight import PACKAGES, clashing_packages
from .probes import Probe, probe_providers
from .remedies import REMEDIES


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis. next: the command that changes it, None if there is nothing to do."""

    name: str
    status: Literal["ok", "wrong", "missing", "unknown"]
    found: str
    next: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """Everything `dijiang doctor` reports."""

    machine: dict[str, Any]
    providers: list[Probe]
    sensors: list[str]
    bandwidth: Bandwidth
    findings: list[Finding]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


def diagnose(root: Path = Path("/"), nvml: Any = None) -> Diagnosis:
    """Look at the machine, run a tiny session on every provider, measure the memory's bandwidth."""
    machine = describe_machine(root, nvml)
    providers = probe_providers()
    sensors = [sensor.name for sensor in find_sensors(root, nvml)]
    bandwidth = measure_bandwidth()
    findings = [*_hardware(machine, bandwidth), *_backends(machine, providers), *_tools(machine, sensors)]
    return Diagnosis(machine, providers, sensors, bandwidth, findings)


def _hardware(machine: dict[str, Any], bandwidth: Bandwidth) -> list[Finding]:
    cpu, memory, jetson = machine["cpu"], machine["memory"], machine["jetson"]
    clock = f", {cpu['mhz']:,.0f} MHz" if cpu["mhz"] else ""
    usable = f", {cpu['usable_cores']} usable here" if cpu["usable_cores"] != cpu["physical_cores"] else ""
    findings = [
        Finding("system", "ok", f"{machine['system']}, Python {machine['python']}"),
        Finding("processor", "ok", f"{cpu['model']}, {cpu['physical_cores']} physical cores{usable}{clock}"),
        Finding("instructions", "ok", ", ".join(cpu["features"]) or "none of those that matter"),
        _governor(cpu["governor"], _next(machine, "governor")),
        Finding(
            "memory",
            "ok",
            f"{memory['available_bytes'] / 1e9:,.1f} of {memory['total_bytes'] / 1e9:,.1f} GB free, "
            f"read at {bandwidth.bytes_per_second / 1e9:,.1f} GB/s by {bandwidth.threads} threads",
        ),
        *_room(machine),
        _temperature(machine["temperatures"]),
    ]
    findings += [
        Finding(
            "GPU",
            "ok",
            f"{gpu['name']}, {gpu['total_bytes'] / 1e9:,.1f} GB, compute {gpu['compute_capability']}, "
            f"driver {gpu['driver']} for CUDA {gpu['cuda_driver']}",
        )
        for gpu in machine["gpus"]
    ]
    if jetson is not None:
        findings.append(_jetson(jetson, _next(machine, "power mode")))
    elif not machine["gpus"]:
        findings.append(Finding("GPU", "unknown", "NVML shows none", _next(machine, "GPU")))
    return findings


def _next(machine: dict[str, Any], name: str) -> str | None:
    """The command for a missing piece on this machine."""
    remedy = REMEDIES.get(name)
    return None if remedy is None else remedy.text(jetson=machine.get("jetson") is not None)


def _room(machine: dict[str, Any]) -> list[Finding]:
    """Sizes of models that the free memory holds, and of those whose engines can be built in it."""
    free = machine["memory"]["available_bytes"]
    return [
        Finding(
            name,
            "ok",
            ", ".join(f"{precision} {count / 1e9:.1f}" for precision, count in found.items())
            + " billion parameters at most",
        )
        for name, found in (
            ("models that fit", parameters_that_fit(free)),
            ("engines built here", parameters_that_fit(free, build=True)),
        )
    ]


def _governor(governor: str | None, steady: str | None) -> Finding:
    if governor is None:
        return Finding("clock governor", "unknown", "not shown by this kernel")
    return Finding("clock governor", "ok", governor, None if governor == "performance" else steady)


def _temperature(zones: dict[str, float]) -> Finding:
    if not zones:
        return Finding("temperature", "unknown", "no thermal zone is shown")
    name = max(zones, key=zones.__getitem__)
    return Finding("temperature", "ok", f"{zones[name]:.0f} °C at most ({name})")


def _jetson(jetson: dict[str, Any], command: str | None) -> Finding:
    known = {key: value or "unknown" for key, value in jetson.items()}
    return Finding(
        "Jetson",
        "ok",
        f"{known['model']}, L4T {known['l4t']}, JetPack {known['jetpack']}, power mode {known['power_mode']}",
        command,
    )


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
            reason = probe.reason or "does not run"
            findings.append(Finding(name, "missing", reason, _next(machine, name)))
        elif probe.linear_attention:
            findings.append(Finding(name, "ok", "runs, with the fused LinearAttention node"))
        else:
            command = _next(machine, "LinearAttention")
            findings.append(Finding(name, "ok", "runs, but has no LinearAttention node", command))
    return findings


def _tools(machine: dict[str, Any], sensors: list[str]) -> list[Finding]:
    packages = machine["packages"]
    findings = []
    for name in ("tensorrt", "onnx-ir", "matplotlib"):
        if name in packages:
            findings.append(Finding(name, "ok", packages[name]))
        else:
            findings.append(Finding(name, "missing", "not installed", _next(machine, name)))
    findings.append(_operator(machine))
    if sensors:
        findings.append(Finding("energy sensors", "ok", ", ".join(sensors)))
    else:
        command = _next(machine, "energy sensors")
        findings.append(Finding("energy sensors", "unknown", "neither NVML, INA3221 nor RAPL answers", command))
    return findings


def _operator(machine: dict[str, Any]) -> Finding:
    if find_library() is None:
        command = _next(machine, "native operator")
        return Finding("native operator", "missing", "not compiled: no native graphs", command)
    try:
        return Finding("native operator", "ok", f"compiled, runs with {isa()}")
    except SessionError as error:
        return Finding("native operator", "wrong", str(error))
