"""The version of this package: that of the git tag.

A build writes it into `_version.py`. Sources that were never built ask git, or read what lies beside them.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

#: Of sources that nothing is known of. `fallback_version` of pyproject.toml is the same.
UNKNOWN = "0.2.0.dev0"
#: What tells the version of sources: a file that `git archive` fills in, or one of an sdist.
TOLD = {".git_archival.txt": r"^describe-name: (v\S+)$", "PKG-INFO": r"^Version: (\S+)$"}
#: A tag, and where there are any, the commits after it.
DESCRIBED = re.compile(r"v(?P<head>\S*?)(?P<last>\d+)(?:-(?P<after>\d+)-(?P<commit>g[0-9a-f]+))?")


def version_of(sources: Path) -> str:
    """The version of a folder of sources, as a build names it; changes that are not committed do not count."""
    described = describe(sources, "--tags", "--match=v[0-9]*", "--abbrev=9") or _read(sources)
    found = DESCRIBED.fullmatch(described)
    if found is None:
        return described or UNKNOWN
    if found["after"] is None:
        return f"{found['head']}{found['last']}"
    return f"{found['head']}{int(found['last']) + 1}.dev{found['after']}+{found['commit']}"


def describe(sources: Path, *options: str) -> str:
    """What `git describe` says of sources; empty where they are no repository, or it says nothing."""
    if not (sources / ".git").exists():  # what git finds further out is somebody else's
        return ""
    import subprocess  # slow, and not needed by what was built

    command = ("git", "describe", *options)
    try:
        return subprocess.run(command, cwd=sources, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _read(sources: Path) -> str:
    """What a file tells; empty where there is none."""
    for name, line in TOLD.items():
        file = sources / name
        if file.is_file() and (found := re.search(line, file.read_text(encoding="utf-8"), re.MULTILINE)):
            return found[1]
    return ""


try:
    # By name: where nothing was built there is no such module, and tools that read imports would take another.
    __version__ = str(import_module(f"{__package__}._version").__version__)
except ImportError:
    __version__ = version_of(Path(__file__).parents[1])
