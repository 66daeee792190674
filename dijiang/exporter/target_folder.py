"""Where a bundle may be written: nothing is ever replaced but a bundle."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..bundle.manifest import MANIFEST
from ..bundle.opened import read_manifest
from ..errors import ExportError
from ..files import check_new, check_output, refuse_foreign
from ..hidden import sweep


def check_target(folder: Path, inputs: Iterable[Path], *, force: bool) -> None:
    """ExportError if a folder may not be written: only a bundle is ever replaced, and only whole."""
    if not force:
        either = "use --force or " if os.path.isfile(folder / MANIFEST) else "choose "
        check_new(folder, inputs, ExportError, f"{either}another folder")
        return
    check_output(folder, inputs, ExportError)
    if os.path.lexists(folder):
        refuse_foreign(folder, foreign(folder), ExportError)


def foreign(folder: Path) -> list[str]:
    """Names in the folder of a bundle that its manifest does not list.

    Raises:
        ExportError: it is no bundle.
        BundleError: its manifest cannot be read.
    """
    if not os.path.isfile(folder / MANIFEST):
        raise ExportError(f"{folder} exists and is no bundle, expected {MANIFEST} in it; move it away")
    sweep(folder)
    old = read_manifest(folder)
    listed = {MANIFEST, *old.files, *old.reports}
    with os.scandir(folder) as found:
        return sorted(one.name for one in found if one.name not in listed or one.is_dir(follow_symlinks=False))
