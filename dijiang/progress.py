"""How far a long task is: what is done, rate, remaining time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: progress(stage, done, total): bytes or counts of a stage; a new stage starts a new bar.
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """Shows nothing."""


@contextmanager
def bars(shown: bool | None = None, *, counts: bool = False) -> Iterator[Progress]:
    """Progress bars on stderr, one a stage. shown: None shows them if stderr is a terminal. counts: not bytes."""
    if not (sys.stderr.isatty() if shown is None else shown):
        yield silent
        return
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        *((rich.MofNCompleteColumn(),) if counts else (rich.DownloadColumn(), rich.TransferSpeedColumn())),
        rich.TimeRemainingColumn(),
    )
    tasks: dict[str, rich.TaskID] = {}
    with rich.Progress(*columns, console=Console(stderr=True)) as display:

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = display.add_task(stage)
            display.update(tasks[stage], completed=done, total=total)

        yield update
