"""The page of a verification shows the report's own numbers, and nothing of a text can leave its place."""

import html
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

import dijiang
from dijiang.bundle.opened import open_bundle
from dijiang.cli import main
from dijiang.models.decay import Decay
from dijiang.parity.page import half_lives, to_html
from tests.conftest import EXAMPLES, GOLDEN

TINY = EXAMPLES / "tiny-python"


@pytest.fixture(scope="module")
def verified(exported):
    bundle = exported("tiny-python")
    return open_bundle(bundle), dijiang.verify(bundle, TINY, text=TINY / "held_out.txt", tokens=600, store=False)


def test_details_add_up_to_the_report(verified):
    _, report = verified
    for one in report.each:
        detail = one.detail
        assert len(detail.ids) == len(detail.positions) == len(detail.errors) == len(detail.kl) == 600
        assert detail.positions == (*range(512), *range(88))
        assert np.mean(detail.kl) == pytest.approx(one.logits.kl)
        relative = np.mean(np.square(detail.errors)) ** 0.5 / one.logits.reference_rms
        assert relative == pytest.approx(one.logits.rms_relative_error)
        assert [max(errors) for errors in detail.states.values()] == [
            e.rms_relative_error for e in one.state_errors
        ]


def test_the_page_shows_every_graph_layer_and_the_worst_token(verified):
    bundle, report = verified
    page = to_html(report, bundle)
    assert re.findall(r"<h2>Graph (\w+)</h2>", page) == [one.graph for one in report.each]
    for one in report.each:
        for errors in one.detail.states.values():
            assert all(f">{error:.1e}</td>" in page for error in errors)
        worst = int(np.argmax(one.detail.kl))
        assert f"<tr><td>{one.detail.positions[worst]}</td>" in page
        assert f"<td>{max(one.detail.kl):.2e}</td>" in page
    assert "nothing was trained beside gamma" in page
    assert "<script" not in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)


def curve(page):
    """Of a page of one graph: the words beside the curve, and its points [N, 2]."""
    (svg,) = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert 'viewBox="-60 -10 980 200"' in svg
    points = re.search(r'points="([^"]*)"', svg)[1].split()
    return re.findall(r"<text[^>]*>([^<]+)</text>", svg), np.array([point.split(",") for point in points], float)


def test_the_curve_is_the_error_of_four_positions_at_a_time_in_decades(verified):
    bundle, report = verified
    detail = report.detail
    (top, bottom, *ends), points = curve(to_html(replace(report, others=()), bundle))
    assert ends == ["0", "511"]
    np.testing.assert_allclose(points[:, 0], np.linspace(0, 900, 128), atol=0.06)
    found = float(top) * (float(bottom) / float(top)) ** (points[:, 1] / 160)
    squares = [[e**2 for e, at in zip(detail.errors, detail.positions, strict=True) if at == n] for n in range(512)]
    expected = np.array([np.mean(each) for each in squares]).reshape(128, 4).mean(1) ** 0.5
    np.testing.assert_allclose(found, expected, rtol=5e-3)
    assert float(bottom) <= min(expected)
    assert float(top) >= max(expected)


def test_the_curve_of_one_token_is_a_point(verified):
    bundle, report = verified
    one = {name: getattr(report.detail, name)[:1] for name in ("ids", "positions", "errors", "kl")}
    words, points = curve(to_html(replace(report, detail=replace(report.detail, **one), others=()), bundle))
    assert words[2:] == ["0", "0"]
    assert points[:, 0].tolist() == [0]


def test_the_worst_tokens_stand_with_what_came_before_them(verified):
    bundle, report = verified
    detail, page = report.detail, to_html(replace(report, others=()), bundle)
    tokenizer = dijiang.load(bundle.path).tokenizer
    worst = np.argsort(detail.kl)[::-1][:12]
    for at in worst:
        before = min(detail.positions[at], 8)
        text = tokenizer.decode(list(detail.ids[at - before : at + 1]))
        assert html.escape(repr(text)) in page
    assert page.count("</tr>") - page.split("furthest off")[0].count("</tr>") >= len(worst)


def test_text_is_escaped(verified):
    bundle, report = verified
    markup = bundle_ids(bundle, "<b>&amp;</b>" * 60)
    page = to_html(replace(report, detail=replace(report.detail, ids=markup), others=()), bundle)
    assert "&lt;b&gt;" in page
    assert "<b>" not in page


def bundle_ids(bundle, text):
    ids = dijiang.load(bundle.path).tokenizer.encode(text)
    return tuple((ids * 600)[:600])


def test_half_lives_are_in_tokens():
    gamma = np.array([0.5, 0.5**0.1, 1.0])
    found = half_lives(Decay(gamma, None, None))
    np.testing.assert_allclose(found, [1, 10, math.inf])


def test_trained_tables_stand_beside_gamma(exported):
    bundle = exported("neox-trained-decay")
    report = dijiang.verify(bundle, GOLDEN["neox-trained-decay"], tokens=40, store=False)
    page = to_html(report, open_bundle(bundle))
    decay = next(one for one in report.detail.decays if one.u is not None)
    assert f"<td>{decay.u[0].min():.3g} to {decay.u[0].max():.3g}</td>" in page


def test_verify_writes_the_page(exported, tmp_path):
    arguments = ["verify", str(exported("neox-base")), "--against", str(GOLDEN["neox-base"]), "--tokens", "40"]
    done = CliRunner().invoke(main, [*arguments, "--no-store", "--html", str(tmp_path / "page.html")])
    assert done.exit_code == 0, done.output
    assert "Half-life of each head" in (tmp_path / "page.html").read_text(encoding="utf-8")
    done = CliRunner().invoke(main, [*arguments, "--no-store", "--html", str(tmp_path / "none" / "page.html")])
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: ")
