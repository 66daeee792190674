"""The HTML page and the pictures: self-contained, and looked at in a real browser."""

import html.parser
import json
import re
import subprocess
import sys

import matplotlib.image
import pytest
from click.testing import CliRunner

from dijiang.bench import plots, render
from dijiang.bench.render import to_html
from dijiang.cli import main
from dijiang.errors import BenchError
from tests.bench.test_compare import TESTS, report
from tests.chromium import FLAGS, PROGRAM

COMMAND = [PROGRAM, *FLAGS, "--enable-logging=stderr", "--window-size=1000,2600"]


def whole(tests=TESTS, name="<model> & co"):
    """A report with everything that a page shows, from made-up samples."""
    found = report(tests, name)
    machine = {
        "system": "Linux",
        "python": "3",
        "packages": {"numpy": "2"},
        "cpu": {"model": "CPU", "physical_cores": 2, "features": ["AVX2"]},
        "memory": {"total_bytes": 10**10},
        "gpus": [],
        "jetson": None,
    }
    header = {"created": "today", "environment": machine, "commit": None, "bandwidth": []}
    found |= header | {"idle": {"sensor": "unknown", "watts": None}, "ratios": [], "flatness": []}
    found["models"][0] |= {"precision": "fp32"}
    return found | {"errors": [{"model": "x", "test": None, "message": "</script><b>broken"}]}


class Elements(html.parser.HTMLParser):
    """Tags of a page and what their attributes refer to."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.references = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [v for k, v in attrs if k in ("src", "href", "xlink:href", "data", "action")]


def test_page_refers_to_nothing_outside_itself():
    text = to_html(whole())
    page = Elements(text)
    assert all(r.startswith(("#", "data:")) for r in page.references)
    assert not re.search(r"url\((?!#)|@import", text)
    assert page.tags.count("svg") == len(plots.PANELS)


def test_page_escapes_what_it_shows_and_keeps_the_raw_report():
    found = whole()
    text = to_html(found)
    assert "&lt;model&gt; &amp; co" in text
    assert "<b>broken" not in text
    data = text.split('id="report">')[1].split("</script>")[0]
    assert json.loads(data) == json.loads(json.dumps(found))


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium here; .ci/run installs one")
def test_page_renders_in_a_browser_without_console_messages(tmp_path):
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    page.write_text(to_html(whole()), encoding="utf-8")
    command = [*COMMAND, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    pixels = matplotlib.image.imread(picture)[..., :3]
    # The bars and lines of the pictures are in the models' colours.
    blue = [int(plots.COLOURS[0][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    assert (abs(pixels - blue).max(axis=-1) < 0.02).sum() > 500
    assert (pixels[:2400].max(axis=(1, 2)) - pixels[:2400].min(axis=(1, 2)) > 0.5).sum() > 700


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium here; .ci/run installs one")
def test_the_browser_does_report_console_messages(tmp_path):
    """The assertion above can fail: a page with an error is noticed."""
    page = tmp_path / "page.html"
    page.write_text("<script>undefined_function()</script>")
    command = [*COMMAND, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" in done.stderr


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_pictures_of_a_report_in_one_file(tmp_path, ending):
    file = tmp_path / f"plot.{ending}"
    plots.save_plot(whole(), file)
    if ending == "png":
        assert matplotlib.image.imread(file).shape == (1300, 1400, 4)
    else:
        assert file.read_text().count("<svg") == 1


@pytest.mark.parametrize("name", [r"price$x\y$", "_hidden", "a$b", "$"])
def test_names_of_models_are_shown_as_they_are(tmp_path, name):
    """Not as a formula of TeX, and not left out of the legend."""
    report = whole(name=name)
    assert any(name in picture for picture in plots.panels(report).values())
    plots.save_plot(report, tmp_path / "plot.svg")


def test_panels_without_data_are_left_out():
    from dijiang.bench.matrix import Test

    assert list(plots.panels(whole({Test("pp", 8): 1.0}))) == ["Prefill speed over prompt length"]


def test_bad_picture_files_are_one_line(tmp_path, exported):
    with pytest.raises(BenchError, match=r"ends in .png or .svg"):
        plots.check_plot(tmp_path / "plot.jpg")
    with pytest.raises(BenchError, match="cannot be written"):
        plots.save_plot(whole(), tmp_path / "no" / "plot.png")
    done = CliRunner().invoke(main, ["bench", str(exported("tiny-python")), "--plot", "x.jpg"])
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: x.jpg: a picture ends in")


def test_reports_and_pictures_go_through_no_link(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    for name, write in (
        ("r.md", lambda f: render.write("text", f)),
        ("p.svg", lambda f: plots.save_plot(whole(), f)),
    ):
        (tmp_path / name).symlink_to(outside)
        write(tmp_path / name)
        assert not (tmp_path / name).is_symlink()
    assert outside.read_text() == "mine"


def test_pictures_without_matplotlib_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BenchError, match=r"dijiang\[bench\]"):
        plots.import_matplotlib()


def test_command_line_writes_the_page_and_the_picture(exported, tmp_path):
    page, plot = tmp_path / "r.html", tmp_path / "r.svg"
    quick = ["-p", "3", "-n", "3", "-r", "1", "--seconds", "0", "-o", "html"]
    done = CliRunner().invoke(
        main, ["bench", str(exported("tiny-python")), *quick, "-f", str(page), "--plot", str(plot)]
    )
    assert done.exit_code == 0, done.stderr
    assert Elements(page.read_text()).tags.count("svg") == len(plots.PANELS)
    assert plot.stat().st_size > 10_000
