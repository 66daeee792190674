"""The output folder of an export, and what it may replace."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from .. import folder
from ..bundle.manifest import MANIFEST
from ..errors import ExportError


def check_target(target: Path, *, force: bool) -> None:
    """ExportError if the target is there and may not be replaced: only a bundle ever is."""
    if not target.exists():
        return
    if not force:
        raise ExportError(f"{target} exists and is never overwritten; use --force or another folder")
    if not (target / MANIFEST).is_file():
        raise ExportError(f"{target} exists and is no bundle, expected {MANIFEST} in it; move it away")


def new_folder(target: Path) -> AbstractContextManager[Path]:
    """`dijiang.folder.new_folder` for an export: what goes wrong is an ExportError."""
    return folder.new_folder(target, ExportError)
