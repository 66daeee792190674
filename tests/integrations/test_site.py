"""The site: built without a warning and without a network, and its first page does what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from dijiang.cli import main
from tests.conftest import EXAMPLES

pytestmark = pytest.mark.ecosystem
ROOT = EXAMPLES.parent


def build(folder, *options, config=ROOT / "mkdocs.yml"):
    command = [Path(sys.executable).parent / "mkdocs", "build", "--strict", "-f", config, "-d", folder, *options]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "http_proxy": "http://127.0.0.1:9", "https_proxy": ""}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_there(site):
    pages = {page.relative_to(ROOT / "docs").with_suffix(".html") for page in (ROOT / "docs").rglob("*.md")}
    assert pages <= {page.relative_to(site) for page in site.rglob("*.html")}
    assert {f"dijiang {verb}" for verb in main.commands} <= set(
        re.findall(r'id="dijiang-\w+">(dijiang \w+)', (site / "cli.html").read_text())
    )


def test_a_reader_needs_no_network(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img)[^>]*\ssrc="([^"]+)"|<link[^>]*rel="stylesheet"[^>]*href="([^"]+)"', page.read_text()
        )
        assert not [url for pair in loaded for url in pair if url.startswith(("http", "//"))], page


def test_a_broken_link_fails_the_build(tmp_path):
    text = (ROOT / "mkdocs.yml").read_text()
    (tmp_path / "docs").mkdir()
    config = tmp_path / "mkdocs.yml"
    config.write_text(text[: text.index("not_in_nav")])
    for link, status in (("[a](other.md#there)", 0), ("[a](other.md#gone)", 1), ("[a](gone.md)", 1)):
        (tmp_path / "docs" / "index.md").write_text(f"# One\n\n{link}\n")
        (tmp_path / "docs" / "other.md").write_text("# Two\n\n## There\n")
        assert build(tmp_path / "site", config=config).returncode == status, link


def test_the_first_page_does_what_it_says(page):
    printed = page("../index")
    assert "result" in printed
    assert printed.count("f, f):") == 2


def said(picture):
    """What an SVG says: nodes, tokens, names and ticks of axes; and what it says when one points at it."""
    kinds = {f"{{http://www.w3.org/2000/svg}}{kind}" for kind in ("text", "title")}
    return [element.text for element in ElementTree.parse(picture).iter() if element.tag in kinds]


def test_the_tour_makes_the_pictures_that_it_shows(page, tmp_path):
    page("../tour")
    docs = ROOT / "docs"
    shown = re.findall(r"^!\[.+\]\((.+)\)$", (docs / "tour.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(shown) == len(list(docs.glob("tour-*.svg"))) == 3
    for name in shown:
        assert said(tmp_path / name) == said(docs / name) != [], f"cp {tmp_path}/tour-*.svg docs"
