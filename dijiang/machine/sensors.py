"""Energy sensors behind one interface: NVML (NVIDIA GPUs), INA3221 (Jetson), RAPL (Intel, AMD).

A sensor either counts energy or shows the power of the moment; a Meter samples it in a thread and
gives joules for both. A machine without a readable sensor has none: its energy is unknown, not zero.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from .kernel_files import text_of

#: Seconds between two samples.
INTERVAL = 0.05
#: More than what a sensor measures takes, and seconds between two values of a counter, at most.
MOST_WATTS, UPDATE = 10_000, 1.0
#: Rails that add up to a Jetson module's power, by board; the first set that is complete is used.
MODULE_RAILS = (
    ("VDD_IN",),  # Orin Nano, Orin NX
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin
)


@dataclass(frozen=True)
class Sensor:
    """One that measures what no other sensor does, for a Meter adds all of them up.

    name: what is measured, as reported; read: joules since some moment, or watts of this moment.

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
    found = []
    for sensor in (*_nvml(load_nvml() if nvml is None else nvml), *_ina3221(root), *_rapl(root)):
        with suppress(Exception):  # pynvml's errors share no base class with OSError
            sensor.read()
            found.append(sensor)
    return found


def load_nvml() -> Any:
    """The initialised pynvml module, or None where package or driver is missing."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # ImportError, or NVMLError without a driver
        return None
    return pynvml


def answered(question: Callable[..., Any], *about: Any) -> Any:
    """What NVML answers; None where it does not: a GPU that shares the host's memory shows none of its own."""
    with suppress(Exception):  # pynvml's errors share no base class with OSError
        return question(*about)
    return None


def handles(nvml: Any) -> dict[int, Any]:
    """NVML's handle of each GPU that answers, by its number. nvml: None: there are none."""
    count = 0 if nvml is None else answered(nvml.nvmlDeviceGetCount) or 0
    found = {index: answered(nvml.nvmlDeviceGetHandleByIndex, index) for index in range(count)}
    return {index: handle for index, handle in found.items() if handle is not None}


def _nvml(nvml: Any) -> list[Sensor]:
    return [
        Sensor(f"NVML GPU {index}", "energy", partial(_counted, nvml, handle))
        for index, handle in handles(nvml).items()
    ]


def _ina3221(root: Path) -> list[Sensor]:
    rails: dict[str, tuple[Path, Path]] = {}
    for label in sorted((root / "sys/class/hwmon").glob("hwmon*/in*_label")):
        channel = label.name.removeprefix("in").removesuffix("_label")
        volts, amperes = label.with_name(f"in{channel}_input"), label.with_name(f"curr{channel}_input")
        if amperes.is_file() and text_of(label.with_name("name")) == "ina3221":
            rails[text_of(label)] = (volts, amperes)
    for names in MODULE_RAILS:
        if all(name in rails for name in names):
            watts = partial(_watts, [rails[name] for name in names])
            return [Sensor(f"INA3221 {'+'.join(names)}", "power", watts)]
    return []


def _rapl(root: Path) -> list[Sensor]:
    found = []
    for zone in sorted((root / "sys/class/powercap").glob("intel-rapl:*")):
        name = text_of(zone / "name")
        if name.startswith("package") or name == "dram":
            with suppress(OSError, ValueError):
                modulus = _joules(zone / "max_energy_range_uj")
                found.append(Sensor(f"RAPL {name}", "energy", partial(_joules, zone / "energy_uj"), modulus))
    return found


def _counted(nvml: Any, handle: Any) -> float:
    return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3  # mJ


def _watts(rails: Sequence[tuple[Path, Path]]) -> float:
    return sum(float(volts.read_text()) * float(amperes.read_text()) for volts, amperes in rails) / 1e6  # mV, mA


def _joules(path: Path) -> float:
    return float(path.read_text()) / 1e6  # microjoules


@dataclass
class Meter:
    """Samples sensors in a thread while its block runs; then `joules` and `seconds` are known.

    clock: seconds; a test gives its own. `joules` is None without sensors, or if one stopped
    answering or said what cannot be.
    """

    sensors: list[Sensor]
    interval: float = INTERVAL
    clock: Callable[[], float] = time.perf_counter
    seconds: float = 0.0
    joules: float | None = None
    #: When, and what each sensor said; None: one did not answer.
    _readings: list[tuple[float, tuple[float, ...] | None]] = field(default_factory=list)

    @property
    def watts(self) -> float | None:
        """Mean power of the block."""
        return self.joules / self.seconds if self.joules is not None and self.seconds > 0 else None

    @property
    def name(self) -> str:
        """The sensors' names, `unknown` if there are none."""
        return " + ".join(sensor.name for sensor in self.sensors) or "unknown"

    def sample(self) -> None:
        """Read every sensor once."""
        now, values = self.clock(), None
        with suppress(Exception):  # pynvml's errors share no base class with OSError
            values = tuple(sensor.read() for sensor in self.sensors)
        self._readings.append((now, values))

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

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        if self.sensors:
            self._thread.join()
        self.sample()
        self.seconds = self._readings[-1][0] - self._readings[0][0]
        known = [(now, values) for now, values in self._readings if values is not None]
        if self.sensors and len(known) == len(self._readings):
            parts = [
                _spent(sensor, before, a[i], after, b[i])
                for i, sensor in enumerate(self.sensors)
                for (before, a), (after, b) in pairwise(known)
            ]
            self.joules = sum(parts) if all(0 <= part < math.inf for part in parts) else None


def _spent(sensor: Sensor, before: float, a: float, after: float, b: float) -> float:
    """Joules between two readings a and b, seconds before and after; NaN where nothing real says that."""
    seconds = after - before
    if sensor.kind == "power":
        return (a + b) / 2 * seconds if min(a, b) >= 0 else math.nan
    if a <= b:
        return b - a
    wrapped = (b - a) % sensor.modulus if sensor.modulus else math.nan
    # Else the counter was set to 0 by a driver that was loaded anew.
    return wrapped if wrapped <= MOST_WATTS * (seconds + UPDATE) else math.nan
