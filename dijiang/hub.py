"""Models of the Hugging Face Hub: a folder of its cache for a name like org/name."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from .errors import HubError

NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*", re.ASCII)
#: What is not fetched: other formats, and what lies in folders.
UNREAD = ("*/*", "*.gguf", "*.h5", "*.msgpack", "*.onnx_data", "*.ot", "*.pt", "*.pth", "consolidated*")
#: Fetched only where there is nothing better.
PYTORCH = "*.bin"


def folder_of(given: str, revision: str | None = None) -> Path:
    """The folder that a path or a name of the Hub stands for; what is on this machine goes first.

    Args:
        given: a folder, or org/name; ./org/name is a folder.
        revision: branch, tag or commit of the repository; None: its main branch.

    Raises:
        HubError: it is not there, cannot be fetched, or huggingface_hub is not installed.
    """
    if os.path.lexists(given) or not NAME.fullmatch(given):
        return Path(given)
    folder = _snapshot(given, revision, (*UNREAD, PYTORCH))
    if not any(file.suffix in (".safetensors", ".onnx") for file in folder.iterdir()):
        folder = _snapshot(given, revision, UNREAD)
    return folder


def is_snapshot(folder: Path) -> bool:
    """Whether a folder belongs to the Hub's cache, which is not ours to write to."""
    return folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")


def _snapshot(name: str, revision: str | None, ignored: Iterable[str]) -> Path:
    """The repository's files, from the cache where it has them all, else from the Hub."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError:
        raise HubError(
            f"{name}: no such folder, and models of the Hub need huggingface_hub; pip install 'dijiang[hub]'"
        ) from None
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        try:
            found = snapshot_download(name, revision=revision, ignore_patterns=list(ignored), local_files_only=True)
        except LocalEntryNotFoundError:
            found = snapshot_download(name, revision=revision, ignore_patterns=list(ignored))
    except Exception as error:  # of the network, the server, the disk: each library below has its own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        what = f"{name}: no such folder, and the Hub does not give it ({reason})"
        raise HubError(f"{what}; check the name, and huggingface_hub's login for what is private") from error
    return Path(found)
