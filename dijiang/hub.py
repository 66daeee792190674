"""Models of the Hugging Face Hub: a folder of its cache for a name like org/name."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from .errors import HubError
from .reading import read_json

NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*", re.ASCII)
#: What is not fetched: other formats, and what lies in folders.
UNREAD = ("*/*", "*.gguf", "*.h5", "*.msgpack", "*.onnx_data", "*.ot", "*.pt", "*.pth", "consolidated*")
#: What every bundle has (`bundle.manifest.MANIFEST`).
BUNDLE = "dijiang.json"
#: Fetched only where there is nothing better.
PYTORCH = "*.bin"
#: How a folder of the cache begins: models--ORG--NAME/snapshots/COMMIT.
REPOSITORY = "models--"
#: Files that name others beside them.
LISTS = (BUNDLE, "*.index.json")


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
    folder = _snapshot(given, revision, (*UNREAD, PYTORCH), ())
    if not any(file.suffix == ".safetensors" or file.name == BUNDLE for file in folder.iterdir()):
        folder = _snapshot(given, revision, UNREAD, (PYTORCH,))
    return folder


def name_of(folder: Path) -> str:
    """What a model is called: ORG/NAME if its folder is of the Hub's cache, else as its folder, or a link to it."""
    repository = repository_of(folder)
    if repository is not None:
        return repository.name.removeprefix(REPOSITORY).replace("--", "/", 1)
    return os.path.basename(os.path.abspath(folder))


def repository_of(folder: Path) -> Path | None:
    """The repository in the Hub's cache that a folder is of, with the files that it links to; None: it is of none.

    Nothing of it is ours to write to.
    """
    found = folder.parent.parent
    return found if folder.parent.name == "snapshots" and found.name.startswith(REPOSITORY) else None


def is_own(file: Path) -> bool:
    """Whether a file, where links lead, is of its folder, or of the repository in the Hub's cache that it is of."""
    real = Path(os.path.realpath(file.parent))
    return (repository_of(real) or real) in Path(os.path.realpath(file)).parents


def _is_whole(folder: Path, ignored: Iterable[str], wanted: Iterable[str]) -> bool:
    """Whether a folder of the cache has the files that it names itself, but for ignored ones, and the wanted ones.

    Older releases of huggingface_hub (1.17, say) give what an interrupted download left, too.
    """
    try:
        lists = [read_json(file) for pattern in LISTS for file in folder.glob(pattern)]
        named = [name for one in lists for name in (*one.get("files", ()), *one.get("weight_map", {}).values())]
        kept = [name for name in named if not any(fnmatchcase(name, one) for one in ignored)]
        return all((folder / name).exists() for name in kept) and all(any(folder.glob(one)) for one in wanted)
    except (AttributeError, OSError, TypeError, ValueError):  # whoever reads the model says what is wrong with it
        return True


def _snapshot(name: str, revision: str | None, ignored: Iterable[str], wanted: Iterable[str]) -> Path:
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
            whole = _is_whole(Path(found), ignored, wanted)
        except LocalEntryNotFoundError:
            whole = False
        if not whole:
            found = snapshot_download(name, revision=revision, ignore_patterns=list(ignored))
    except Exception as error:  # of the network, the server, the disk: each library below has its own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        what = f"{name}: no such folder, and the Hub does not give it ({reason})"
        raise HubError(f"{what}; check the name, and huggingface_hub's login for what is private") from error
    return Path(found)
