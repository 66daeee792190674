"""The version is the tag's, whatever way the package came."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import setuptools_scm
from packaging.version import Version

import dijiang
from dijiang.version import UNKNOWN, version_of

ROOT = Path(__file__).parents[1]
#: What git itself reads of this machine is left out.
ALONE = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
AUTHOR = ("-c", "user.name=Nobody", "-c", "user.email=nobody@example.org")


@pytest.fixture
def sources(tmp_path):
    """A repository with the part of this one that tells a version."""
    folder = tmp_path / "sources"
    for name in ("dijiang/__init__.py", "dijiang/version.py", ".gitattributes", ".git_archival.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    git(folder, "init", "-q")
    commit(folder)
    return folder


def git(folder, *arguments):
    subprocess.run(["git", *AUTHOR, *arguments], cwd=folder, env=ALONE, check=True)


def commit(folder):
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "--allow-empty", "-m", "a change")


def archive(folder):
    """What `git archive` makes of a repository, without git."""
    git(folder, "archive", "-o", "../sources.tar", "HEAD")
    with tarfile.open(folder.parent / "sources.tar") as file:
        file.extractall(folder.parent / "archive", filter="data")
    return folder.parent / "archive"


def imported(folder):
    """The version that a plain Python finds in a folder: no package is installed, and no finder of one."""
    code = "import dijiang; print(dijiang.__version__)"
    command = [sys.executable, "-E", "-S", "-c", code]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("after", [0, 1, 12])
@pytest.mark.parametrize("tag", ["v0.2.0", "v0.10.9", "v1.0.0rc1"])
def test_sources_have_the_version_that_a_build_would_have(sources, tag, after):
    git(sources, "tag", tag)
    for _ in range(after):
        commit(sources)
    built = setuptools_scm.get_version(sources)
    assert built == tag.removeprefix("v") if after == 0 else f".dev{after}+g" in built
    assert version_of(sources) == imported(sources) == built
    plain = archive(sources)
    assert version_of(plain) == imported(plain) == setuptools_scm.get_version(plain)
    assert version_of(plain).split("+")[0] == built.split("+")[0]


def test_sources_of_an_sdist_have_its_version(sources, tmp_path):
    (tmp_path / "sdist").mkdir()
    (tmp_path / "sdist" / "PKG-INFO").write_text("Metadata-Version: 2.4\nName: dijiang\nVersion: 0.2.1.dev3+gabc\n")
    assert version_of(tmp_path / "sdist") == "0.2.1.dev3+gabc"
    assert setuptools_scm.get_version(tmp_path / "sdist") == "0.2.1.dev3+gabc"


def test_what_was_built_knows_its_version_without_git(sources):
    (sources / "dijiang" / "_version.py").write_text('__version__ = "7.8.9"')
    assert imported(sources) == "7.8.9"


def test_sources_that_nothing_tells_about_have_a_version(sources, tmp_path, monkeypatch):
    assert version_of(sources) == UNKNOWN  # no tag
    built = setuptools_scm.get_version(sources, fallback_version=UNKNOWN)
    assert Version(built).base_version == Version(UNKNOWN).base_version
    git(sources, "tag", "v7.0.0")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert version_of(sources) == UNKNOWN  # no git
    shutil.rmtree(sources / ".git")
    assert version_of(sources) == UNKNOWN  # nobody filled the file in
    (sources / ".git_archival.txt").unlink()
    assert version_of(sources) == UNKNOWN


def test_the_changelog_ends_with_this_version():
    """A release has the newest heading; what comes after it, at most the number after that."""
    headings = re.findall(r"^## \[(.+?)\](.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    names = [name for name, _ in headings]
    assert names[0] == "Unreleased"
    assert [one for one, date in headings[1:] if not re.fullmatch(r" - 20\d\d-\d\d-\d\d", date)] == []
    released = [Version(name) for name in names[1:]]
    assert released == sorted(released, reverse=True)
    newest, found = released[0], Version(dijiang.__version__)
    following = Version(f"{newest.major}.{newest.minor}.{newest.micro + 1}")
    assert found == newest or (found.is_prerelease and Version(found.base_version) <= following)
    assert Version(UNKNOWN).base_version == newest.base_version
    assert f'fallback_version = "{UNKNOWN}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
