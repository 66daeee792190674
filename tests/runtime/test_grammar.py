"""A form that is none is one line, whoever finds out: Python, or llguidance."""

import pytest

import dijiang

ENDLESS: dict = {}
ENDLESS["properties"] = {"a": ENDLESS}


@pytest.fixture(scope="module")
def model(exported):
    return dijiang.load(exported("tiny-python"), threads=1)


@pytest.mark.parametrize("form", [ENDLESS, {"type": "nope"}, "start: (("], ids=["endless", "schema", "Lark"])
def test_form_that_does_not_compile_is_one_line(model, form):
    with pytest.raises(dijiang.InputError, match=r"^the schema does not compile \([^\n]+\); change it$"):
        model.grammar(form)


def test_every_text_of_a_form_begins_anew(model):
    grammar = model.grammar('start: "ab"')
    first, second = grammar.begin(), grammar.begin()
    before = first.allowed()
    first.take(int(before.nonzero()[0][0]))
    assert (second.allowed() == before).all()
    assert (first.allowed() != before).any()
