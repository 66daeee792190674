"""After a refused or failed call everything is bit for bit what it was."""

import pytest

from dijiang.runtime.model import Model
from dijiang.runtime.step import Step
from tests import refusals
from tests.conftest import RUNNABLE

pytestmark = pytest.mark.skipif("native" not in RUNNABLE, reason="onnxruntime is older than 1.30")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return refusals.made_models(tmp_path_factory.mktemp("refusals"))


def test_sample_of_failing_calls_changes_nothing(models):
    report = refusals.run(models, seed=1, calls=300)
    assert report["found"] == []
    assert report["errors"].keys() == {"InputError", "SessionError"}


forward = Model.forward


def advanced_first(self, ids, state, **options):
    """A model that moves before it looks."""
    state.commit(state.after(Step.single(state.batch)))
    return forward(self, ids, state, **options)


BROKEN = {
    "moves before it looks": (Model, "forward", advanced_first, "something changed"),
    "looks at nothing": (Model, "grammar", lambda *_: None, "not refused"),
    "an error that is not ours": (Model, "grammar", lambda *_: 1 / 0, "ZeroDivisionError"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_draws_see_what_they_look_for(models, monkeypatch, name):
    owner, method, broken, seen = BROKEN[name]
    monkeypatch.setattr(owner, method, broken)
    found = refusals.run(models, seed=1, calls=100)["found"]
    assert any(seen in one["found"] for one in found), found
