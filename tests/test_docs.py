"""What the documents promise is there."""

import re
from dataclasses import fields
from pathlib import Path

import generate
import pytest

from dijiang.bundle.manifest import FORMAT_VERSION, Manifest
from dijiang.cli import main
from dijiang.environment import VARIABLES
from dijiang.models.presets import size
from dijiang.recipe import GRAPHS
from dijiang.runtime.snapshot import FIXED, FORMAT, VERSION
from dijiang.server.openapi import REFUSALS
from dijiang.server.unserved import UNSERVED

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8"))
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert missing == []


def test_commands_and_flags_of_the_readme_exist():
    for line in re.findall(r"^ {4}dijiang (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE):
        name, *rest = line.split("#")[0].split()
        known = {opt for p in main.commands[name].params for opt in p.opts}
        assert {word for word in rest if word.startswith("-")} <= known


def test_readme_names_only_folders_that_exist():
    tree = (ROOT / "README.md").read_text().split("## Where things are")[1]
    for folder in re.findall(r"^ +([\w/]+/)", tree, re.MULTILINE):
        assert (ROOT / folder).is_dir() or (ROOT / "dijiang" / folder).is_dir(), folder


def test_pages_are_made_from_the_tables():
    assert len(generate.PAGES) == 12
    for path, page in generate.PAGES.items():
        assert path.read_text(encoding="utf-8") == page(), "run make docs"


def test_page_of_formats_is_of_these_formats():
    page = (ROOT / "docs" / "bundle-format.md").read_text(encoding="utf-8")
    assert f"# Bundle format {FORMAT_VERSION}\n" in page
    assert f"`{FORMAT}`, {VERSION}." in page
    named = set(re.findall(r"`([\w.]+)`", page))
    assert {row.file for row in GRAPHS.values()} | {one.name for one in fields(Manifest)} | FIXED.keys() <= named


def test_page_of_the_architecture_names_every_room_once():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = page.split("## The rooms")[1].split("\n\n")[1].splitlines()[2:]
    named = [name for row in rows for name in re.findall(r"`(\w+)/?`", row.split("|")[1])]
    there = [
        path for path in (ROOT / "dijiang").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    ]
    assert sorted(named) == sorted(path.stem for path in there if not path.name.startswith("__"))


def test_every_variable_of_the_environment_stands_in_its_table():
    code = [*(ROOT / "dijiang").rglob("*.py"), *(ROOT / "native").glob("*.cc")]
    read = {name for file in code for name in re.findall(r'"((?:DIJIANG|ORT)_[A-Z_]+)', file.read_text("utf-8"))}
    assert read == VARIABLES.keys()


def test_page_of_the_server_names_what_is_refused():
    page = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^\| refused \|(.*)\|$", page, re.MULTILINE)
    assert UNSERVED.keys() <= set(re.findall(r"`(\w+)`", row))


def test_budget_of_the_readme_is_one_of_its_model():
    """Between every projection in 4 bits and in 8, with the head in 8."""
    (megabytes,) = re.findall(
        r"--precision int4 --budget (\d+) # MB, here of 410M", (ROOT / "README.md").read_text()
    )
    sizes = size("pythia-410m").weight_bytes
    assert sizes["int4"] < int(megabytes) * 1e6 < sizes["int8"]


def test_figures_of_the_server_have_the_names_that_it_tells():
    page = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(dijiang_\w+)` \| (\w+) \|", page, re.MULTILINE)
    assert all(name.endswith("_total") == (kind == "counter") for name, kind in rows)


def test_statuses_of_the_server_stand_in_its_table():
    page = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| (\d{3}) \|", page, re.MULTILINE)) == REFUSALS.keys()
