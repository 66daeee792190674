"""Energy sensors behind one interface: NVML (NVIDIA GPUs), INA3221 (Jetson), RAPL (Intel, AMD).

A sensor either counts energy or shows the power of the moment; a Meter samples it in a thread and
gives joules for both. A machine without a readable sensor has none: its energy is unknown, not zero.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

#: Seconds between two samples.
INTERVAL = 0.05
#: Rails that add up to a Jetson module's power, by board; the first set that is complete is used.
MODULE_RAILS = (
    ("VDD_IN",),  # Orin Nano, Orin NX
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin
)


@dataclass(frozen=True)
class Sensor:
    """name: what is measured, as reported; read: joules since some moment, or watts of this moment.

    modulus: joules at which a counter starts again from 0; None: it never does.
    """

    name: str
    kind: Literal["energy", "power"]
    read: Callable[[], float]
    modulus: float | None = None


def find_sensors(root: Path = Path("/"), nvml: Any = None) -> list[Sensor]:
    """Every sensor that answers now.

    Args:
        root: of the file system, for recorded layouts.
        nvml: a module like pynvml; None: the installed one, if there is one.
    """
    candidates = [*_nvml(nvml), *_ina3221(root), *_rapl(root)]
    return [sensor for sensor in candidates if _answers(sensor)]


def _answers(sensor: Sensor) -> bool:
    try:
        sensor.read()
    except Exception:  # pynvml's errors share no base class with OSError
        return False
    return True


def load_nvml() -> Any:
    """The initialised pynvml module, or None where package or driver is missing."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # ImportError, or NVMLError without a driver
        return None
    return pynvml


def _nvml(nvml: Any) -> list[Sensor]:
    nvml = load_nvml() if nvml is None else nvml
    if nvml is None:
        return []

    def counter(handle: Any) -> Callable[[], float]:
        return lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3  # mJ

    return [
        Sensor(f"NVML GPU {i}", "energy", counter(nvml.nvmlDeviceGetHandleByIndex(i)))
        for i in range(nvml.nvmlDeviceGetCount())
    ]


def _number(path: Path) -> float:
    return float(path.read_text())


def _ina3221(root: Path) -> list[Sensor]:
    rails: dict[str, Callable[[], float]] = {}
    for label in sorted((root / "sys/class/hwmon").glob("hwmon*/in*_label")):
        chip = label.parent / "name"
        if not chip.is_file() or chip.read_text().strip() != "ina3221":
            continue
        channel = label.name[2 : -len("_label")]
        volts, amperes = label.parent / f"in{channel}_input", label.parent / f"curr{channel}_input"
        if amperes.is_file():
            rails[label.read_text().strip()] = _watts(volts, amperes)
    for names in MODULE_RAILS:
        if all(name in rails for name in names):
            reads = [rails[name] for name in names]
            name = f"INA3221 {'+'.join(names)}"
            return [Sensor(name, "power", _sum(reads))]
    return []


def _sum(reads: list[Callable[[], float]]) -> Callable[[], float]:
    return lambda: sum(read() for read in reads)


def _watts(volts: Path, amperes: Path) -> Callable[[], float]:
    return lambda: _number(volts) * _number(amperes) / 1e6  # mV, mA


def _rapl(root: Path) -> list[Sensor]:
    found = []
    for zone in sorted((root / "sys/class/powercap").glob("intel-rapl:*")):
        name = (zone / "name").read_text().strip() if (zone / "name").is_file() else ""
        if name.startswith("package") or name == "dram":
            found.append(
                Sensor(
                    f"RAPL {name}",
                    "energy",
                    _joules(zone / "energy_uj"),
                    _number(zone / "max_energy_range_uj") / 1e6,
                )
            )
    return found


def _joules(path: Path) -> Callable[[], float]:
    return lambda: _number(path) / 1e6  # microjoules


@dataclass
class Meter:
    """Samples sensors in a thread while its block runs; then `joules` and `seconds` are known.

    clock: seconds; a test gives its own. `joules` is None without sensors.
    """

    sensors: list[Sensor]
    interval: float = INTERVAL
    clock: Callable[[], float] = time.perf_counter
    seconds: float = 0.0
    joules: float | None = None
    _readings: list[tuple[float, ...]] = field(default_factory=list)
    _times: list[float] = field(default_factory=list)
    _lost: bool = False

    @property
    def watts(self) -> float | None:
        """Mean power of the block."""
        return self.joules / self.seconds if self.joules is not None and self.seconds > 0 else None

    @property
    def name(self) -> str:
        """The sensors' names, `unknown` if there are none."""
        return " + ".join(sensor.name for sensor in self.sensors) or "unknown"

    def sample(self) -> None:
        """Read every sensor once; one that stops answering makes the energy unknown, not wrong."""
        self._times.append(self.clock())
        try:
            self._readings.append(tuple(sensor.read() for sensor in self.sensors))
        except Exception:  # pynvml's errors share no base class with OSError
            self._lost = True

    def __enter__(self) -> Meter:
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.sample()
        if self.sensors:
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stopped.wait(self.interval):
            self.sample()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        if self.sensors:
            self._thread.join()
        self.sample()
        self.seconds = self._times[-1] - self._times[0]
        if self.sensors and not self._lost:
            self.joules = sum(self._energy(i, sensor) for i, sensor in enumerate(self.sensors))

    def _energy(self, index: int, sensor: Sensor) -> float:
        values = [reading[index] for reading in self._readings]
        pairs = list(pairwise(values))
        if sensor.kind == "energy":
            return sum((b - a) % sensor.modulus if sensor.modulus else b - a for a, b in pairs)
        steps = [b - a for a, b in pairwise(self._times)]
        return sum((a + b) / 2 * step for (a, b), step in zip(pairs, steps, strict=True))
