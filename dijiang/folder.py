"""An output folder: whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import DijiangError


@contextmanager
def new_folder(target: Path, error: type[DijiangError]) -> Iterator[Path]:
    """A folder beside the target that takes its name when the block ends well, else vanishes.

    A folder that stands at the target is replaced in that moment. A killed process leaves a hidden
    folder beside it.

    Raises:
        error: the folder cannot be written.
    """
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    replaced = target.parent / f".{target.name}.{os.getpid()}.replaced"
    try:
        partial.mkdir()
        yield partial
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
    except OSError as reason:
        raise error(
            f"{target}: cannot be written ({reason.strerror or reason}); "
            "free some space, or choose a folder that exists and is yours"
        ) from reason
    finally:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        for leftover in (partial, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
