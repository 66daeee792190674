"""Running a group: sides in turn, round by round, every sample kept."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from peer_cases import PAIRS, QUIET, SIDES, Group, Place, bundle_kind, gguf_type
from peer_machine import Watch, environment, wait_until_idle

from dijiang.machine.bandwidth import measure_bandwidth

Call = Callable[..., "list[float]"]
TRIES = 3
#: Seconds to wait for an idle machine before a sample, and after which it is not tried again.
PATIENCE = 20


@dataclass(frozen=True)
class Test:
    """A test in llama-bench's words: method of the side, its arguments, those of its warm-up."""

    name: str
    method: str
    arguments: tuple[int, ...]
    warm: tuple[int, ...]
    tokens: int


def tests(group: Group) -> list[Test]:
    """The tests of a group: its pair, or prompts (`pp512`), then decoding by depth (`tg @ d2048`)."""
    if group.pair:
        arguments = (*group.depths, group.tokens)
        method = PAIRS[group.pair].method
        return [Test(group.pair, method, (*arguments, group.repeat), (*arguments, 1), group.tokens)]
    found = [Test(f"pp{n}", "prefill", (n, group.repeat), (n, 1), n) for n in group.prompts]
    for depth in group.depths:
        arguments = (depth, group.tokens, group.repeat)
        found.append(Test(f"tg @ d{depth}", "decode", arguments, (depth, 1, 1), group.tokens))
    return found


def run(
    name: str, group: Group, cache: Path, threads: int, minutes: float, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Measure a group: rounds until all are done, or `minutes` are over.

    Yields the record after each round, grown by it: every sample in seconds, and what the machine did.
    """
    place, todo = Place(cache, group.preset, threads), tests(group)
    record: dict[str, Any] = {
        "group": name,
        "preset": group.preset,
        "sides": list(group.sides),
        "threads": threads,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": environment(),
        "models": models(group, cache),
        "bandwidth": [],
        "samples": [],
    }
    with ExitStack() as stack:
        calls = {side: stack.enter_context(worker(side, place)) for side in group.sides}
        for side in group.sides:
            # Pages, kernels and states; llama-bench warms itself up before each test.
            for test in [] if gguf_type(side) else todo:
                calls[side](test.method, *test.warm)
        ending = time.monotonic() + 60 * minutes
        for turn in range(group.rounds):
            if turn and time.monotonic() > ending:
                break
            wait_until_idle(PATIENCE)
            record["bandwidth"].append(measure_bandwidth(threads=threads).bytes_per_second)
            for test in todo:
                for side in group.sides:
                    record["samples"].append({"round": turn} | _sample(side, calls[side], test))
                    rate = test.tokens / min(record["samples"][-1]["seconds"])
                    say(f"{name} {turn + 1}/{group.rounds}: {side}, {test.name}: {rate:,.1f} tokens/s")
            yield record


def _sample(side: str, call: Call, test: Test) -> dict[str, Any]:
    """A sample that no other process disturbed, or the least disturbed of TRIES."""
    tries: list[dict[str, Any]] = []
    ending = time.monotonic() + PATIENCE
    while not tries or (len(tries) < TRIES and tries[-1]["waited"] > QUIET and time.monotonic() < ending):
        wait_until_idle(ending - time.monotonic())
        watch = Watch()
        seconds = call(test.method, *test.arguments)
        tries.append({"seconds": seconds, **watch.seen()})
    best = min(tries, key=lambda one: one["waited"])
    others = [one for one in tries if one is not best]
    return {"side": side, "test": test.name, "tokens": test.tokens, **best, "disturbed": others}


def models(group: Group, cache: Path) -> dict[str, Any]:
    """Parameter counts of ours, and bytes of each bundle or model file."""
    from peer_ours import checkpoint, parameters

    found: dict[str, Any] = {"parameters": parameters(checkpoint(cache, group.preset)), "bytes": {}}
    for side in group.sides:
        if kind := bundle_kind(side):
            file = cache / f"{group.preset}-{kind}"
            found["bytes"][side] = sum(part.stat().st_size for part in file.iterdir())
        elif kind := gguf_type(side):
            found["bytes"][side] = (cache / f"{group.preset}-{kind}.gguf").stat().st_size
    return found


def _serve(connection: Connection, side: str, place: Place) -> None:
    """A worker process: build the side, then answer calls until told to stop."""
    try:
        made = SIDES[side](place)
        connection.send(None)
        while (call := connection.recv()) is not None:
            method, arguments = call
            connection.send(getattr(made, method)(*arguments))
    except Exception as error:
        connection.send(error)


def _answer(connection: Connection) -> Any:
    answer = connection.recv()
    if isinstance(answer, Exception):
        raise answer
    return answer


@contextmanager
def worker(side: str, place: Place) -> Iterator[Call]:
    """A callable (method, *arguments) -> seconds of a side.

    The side lives in a process of its own, so that no thread pool of one disturbs another.
    """
    if gguf_type(side):
        made = SIDES[side](place)
        yield lambda method, *arguments: getattr(made, method)(*arguments)
        return
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, side, place))
    process.start()
    there.close()

    def call(method: str, *arguments: int) -> list[float]:
        here.send((method, arguments))
        return list(_answer(here))

    try:
        _answer(here)
        yield call
        here.send(None)
    finally:
        here.close()
        process.join(10)
        process.kill()
