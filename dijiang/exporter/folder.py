"""The output folder: whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ExportError
from ..runtime.bundle import MANIFEST


def check_target(target: Path, *, force: bool) -> None:
    """ExportError if the target is there and may not be replaced: only a bundle ever is."""
    if not target.exists():
        return
    if not force:
        raise ExportError(f"{target} exists and is never overwritten; use --force or another folder")
    if not (target / MANIFEST).is_file():
        raise ExportError(f"{target} exists and is no bundle, expected {MANIFEST} in it; move it away")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside the target that takes its name when the block ends well, else vanishes.

    A killed process leaves a hidden folder without a manifest: nothing that loads.
    """
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    replaced = target.parent / f".{target.name}.{os.getpid()}.replaced"
    try:
        partial.mkdir()
        yield partial
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
    except OSError as error:
        raise ExportError(
            f"{target}: cannot be written ({error.strerror or error}); "
            "free some space, or choose a folder that exists and is yours"
        ) from error
    finally:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        for leftover in (partial, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
