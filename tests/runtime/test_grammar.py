"""A form that is none is one line, whoever finds out: Python, or llguidance."""

import pytest

import dijiang
from dijiang.runtime.calls import Syntax, Tool

ENDLESS: dict = {}
ENDLESS["properties"] = {"a": ENDLESS}


@pytest.fixture(scope="module")
def model(exported):
    return dijiang.load(exported("tiny-python"), threads=1)


@pytest.mark.parametrize("form", [ENDLESS, {"type": "nope"}, "start: (("], ids=["endless", "schema", "Lark"])
def test_form_that_does_not_compile_is_one_line(model, form):
    with pytest.raises(dijiang.InputError, match=r"^the schema does not compile \([^\n]+\); change it$"):
        model.grammar(form)


def wide(count):
    return {"type": "object", "properties": {f"k{number}": {} for number in range(count)}}


@pytest.mark.parametrize(
    "form",
    [wide(2_001), {"anyOf": [wide(1)] * 2_001}, {"type": "array", "prefixItems": [wide(1_500), wide(1_500)]}],
    ids=["properties", "forms", "together"],
)
def test_form_that_would_take_long_to_compile_is_refused(model, form):
    """Time goes by the square: 8,000 properties took 10 seconds, for which all other prompts waited."""
    with pytest.raises(
        dijiang.InputError, match=r"too many properties or forms side by side, expected at most 2,000"
    ):
        model.grammar(form)
    with pytest.raises(dijiang.InputError, match="too many properties"):
        Syntax("<", ">", None, "", (",", ":")).grammar([Tool("f", form)], must=True, several=False)


def test_long_lists_of_values_are_taken(model):
    assert model.grammar({"enum": [f"v{number}" for number in range(5_000)]}).begin().allowed().any()


def test_every_text_of_a_form_begins_anew(model):
    grammar = model.grammar('start: "ab"')
    first, second = grammar.begin(), grammar.begin()
    before = first.allowed()
    first.take(int(before.nonzero()[0][0]))
    assert (second.allowed() == before).all()
    assert (first.allowed() != before).any()
