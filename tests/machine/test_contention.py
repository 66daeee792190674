"""What other programs take of the machine."""

from collections import namedtuple

from dijiang.machine import contention

Times = namedtuple("Times", "user nice system idle iowait irq softirq steal guest guest_nice")


def test_without_proc_nothing_was_seen(monkeypatch):
    def refuse(*_):
        raise FileNotFoundError

    for name in ("cpu_times", "cpu_percent"):
        monkeypatch.setattr(contention.psutil, name, refuse)
    contention.wait_until_idle(60)
    assert contention.Watch().seen()[1] == 0


def test_stolen_is_a_share_of_the_cpus_time(monkeypatch):
    told = iter([Times(*[0.0] * 10), Times(30.0, 0, 0, 45.0, 0, 0, 0, 25.0, 30.0, 0)])
    monkeypatch.setattr(contention.psutil, "cpu_times", lambda: next(told))
    assert contention.Watch().seen()[1] == 0.25
