"""Energy sensors on recorded layouts: the files and calls as their drivers lay them out."""

import math
from itertools import count
from types import SimpleNamespace

import pytest

from dijiang.machine.sensors import Meter, Sensor, find_sensors

#: hwmon folder -> file -> content, as a Jetson with the L4T kernel shows them.
ORIN_NANO = {
    "hwmon0": {"name": "tmp451", "in1_label": "VDD_IN", "in1_input": "1", "curr1_input": "1"},
    "hwmon1": {
        "name": "ina3221",
        "in1_label": "VDD_IN",
        "in1_input": "4960",
        "curr1_input": "1200",
        "in2_label": "VDD_CPU_GPU_CV",
        "in2_input": "4960",
        "curr2_input": "200",
        "in3_label": "VDD_SOC",
        "in3_input": "4960",
        "curr3_input": "300",
        "in7_label": "sum of shunt voltages",
        "in7_input": "0",
    },
}
AGX_ORIN = {
    "hwmon3": {
        "name": "ina3221",
        "in1_label": "VDD_GPU_SOC",
        "in1_input": "19000",
        "curr1_input": "200",
        "in2_label": "VDD_CPU_CV",
        "in2_input": "19000",
        "curr2_input": "100",
        "in3_label": "VIN_SYS_5V0",
        "in3_input": "5000",
        "curr3_input": "1000",
    },
    "hwmon4": {"name": "ina3221", "in1_label": "NC", "in2_label": "VDDQ_VDD2_1V8AO"},
}


NO_GPU = SimpleNamespace(nvmlDeviceGetCount=lambda: 0)


def lay_out(root, base, folders):
    for folder, files in folders.items():
        target = root / base / folder
        target.mkdir(parents=True)
        for name, text in files.items():
            (target / name).write_text(f"{text}\n")
    return root


@pytest.mark.parametrize(
    ("folders", "name", "watts"),
    [
        (ORIN_NANO, "INA3221 VDD_IN", 4.96 * 1.2),
        (AGX_ORIN, "INA3221 VDD_GPU_SOC+VDD_CPU_CV+VIN_SYS_5V0", 19 * 0.3 + 5 * 1.0),
    ],
    ids=["orin-nano", "agx-orin"],
)
def test_ina3221_gives_the_modules_power(tmp_path, folders, name, watts):
    (sensor,) = find_sensors(lay_out(tmp_path, "sys/class/hwmon", folders), NO_GPU)
    assert (sensor.name, sensor.kind) == (name, "power")
    assert sensor.read() == pytest.approx(watts)


def test_rapl_counts_packages_and_memory_but_not_cores(tmp_path):
    zones = {
        "intel-rapl:0": {"name": "package-0", "energy_uj": "5000000", "max_energy_range_uj": "262143"},
        "intel-rapl:0:0": {"name": "core", "energy_uj": "1", "max_energy_range_uj": "262143"},
        "intel-rapl:0:1": {"name": "dram", "energy_uj": "250000", "max_energy_range_uj": "65712"},
    }
    package, dram = find_sensors(lay_out(tmp_path, "sys/class/powercap", zones), NO_GPU)
    assert (package.name, package.read()) == ("RAPL package-0", 5.0)
    assert (dram.name, dram.read(), dram.modulus) == ("RAPL dram", 0.25, pytest.approx(0.065712))


def test_a_counter_that_cannot_be_read_is_left_out(tmp_path):
    zones = {"intel-rapl:0": {"name": "package-0", "max_energy_range_uj": "262143"}}
    assert find_sensors(lay_out(tmp_path, "sys/class/powercap", zones), NO_GPU) == []


def test_nvml_counts_millijoules_of_each_gpu(tmp_path):
    def old_gpu_fails(handle):
        if handle == 1:
            raise RuntimeError("Not Supported")
        return 1234567

    nvml = SimpleNamespace(
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=old_gpu_fails,
    )
    (sensor,) = find_sensors(tmp_path, nvml)
    assert (sensor.name, sensor.read()) == ("NVML GPU 0", 1234.567)


def metered(sensor, samples):
    """A meter over `samples` readings, one a second, without its thread."""
    meter = Meter([sensor], interval=1e9, clock=map(float, count()).__next__)
    with meter:
        for _ in range(samples - 2):
            meter.sample()
    return meter


def test_meter_integrates_power_over_time():
    watts = iter([2.0, 2.0, 4.0, 4.0])
    meter = metered(Sensor("x", "power", lambda: next(watts)), 4)
    assert (meter.seconds, meter.joules, meter.watts) == (3.0, 2 + 3 + 4, 3.0)


def test_meter_follows_a_counter_over_its_end():
    counter = iter([90.0, 95.0, 5.0, 20.0])
    assert metered(Sensor("x", "energy", lambda: next(counter), 100.0), 4).joules == 30.0


def test_meter_samples_in_its_thread():
    counter = map(float, count())
    with Meter([Sensor("x", "energy", lambda: next(counter))], interval=0.001) as meter:
        while len(meter._readings) < 5:
            pass
    assert meter.joules == len(meter._readings) - 1


def test_a_sensor_that_stops_answering_makes_energy_unknown():
    def fails():
        next(left)
        return 1.0

    left = iter(range(2))
    assert metered(Sensor("x", "power", fails), 4).joules is None


@pytest.mark.parametrize(
    ("kind", "modulus", "readings"),
    [
        ("energy", 262_143.0, [5_000, 5_001, 0.5, 1.5]),  # a driver was loaded anew
        ("energy", None, [5_000, 5_001, 0.5, 1.5]),
        ("energy", None, [1, 2, math.inf, math.inf]),
        ("energy", 100.0, [1, math.nan, 2, 3]),
        ("power", None, [5, -0.1, 5, 5]),
        ("power", None, [5, math.nan, 5, 5]),
    ],
)
def test_a_reading_that_cannot_be_makes_energy_unknown(kind, modulus, readings):
    told = iter(readings)
    assert metered(Sensor("x", kind, lambda: next(told), modulus), len(readings)).joules is None


def test_odd_files_of_other_chips_and_zones_hide_no_sensor(tmp_path):
    root = lay_out(tmp_path, "sys/class/hwmon", ORIN_NANO)
    whole = {"name": "package-0", "energy_uj": "2500000", "max_energy_range_uj": "65712000"}
    lay_out(root, "sys/class/powercap", {"intel-rapl:0": whole, "intel-rapl:1": {"name": "dram", "energy_uj": "1"}})
    for file in ("hwmon/hwmon0/name", "hwmon/hwmon1/in2_label", "powercap/intel-rapl:1/name"):
        (root / "sys/class" / file).write_bytes(b"\xff\xfe")
    assert [s.name for s in find_sensors(root, NO_GPU)] == ["INA3221 VDD_IN", "RAPL package-0"]


def test_no_sensor_is_unknown_not_zero(tmp_path):
    with Meter(find_sensors(tmp_path, NO_GPU)) as meter:
        pass
    assert (meter.name, meter.joules, meter.watts) == ("unknown", None, None)
