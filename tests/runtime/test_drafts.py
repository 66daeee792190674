"""Drafts from the text so far: the text and the state of decoding one token a call."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dijiang
from dijiang.runtime import drafts
from dijiang.runtime.drafts import LONGEST, MATCHED, Lookup
from tests.conftest import RUNNABLE

pytestmark = pytest.mark.skipif("native" not in RUNNABLE, reason="no compiled operator")

#: Texts that repeat themselves, and at the end one that does not.
PROMPTS = (
    "def area(width, height):\n    return width * height\n\ndef area_of(width, height):\n    return ",
    "import os\nimport sys\nimport os\nimport ",
    "for i in range(10):\n    print(i)\nfor i in range(10):\n    pr",
    "xyzzy",
)
N = 60


@pytest.fixture(scope="module", params=["int8", "int4"])
def model(request, exported):
    return dijiang.load(exported("tiny-python", precision=request.param), graph="native")


def told(model, prompt, state, **options):
    """Records without their times."""
    return [
        (record.text, record.token, record.finish_reason, record.generated)
        for record in model.generate(prompt, state=state, **options)
    ]


def same_state(a, b):
    assert all(np.array_equal(x, y) for x, y in zip(a.layers, b.layers, strict=True))
    assert np.array_equal(a.position, b.position)
    assert np.array_equal(a.last, b.last)
    assert np.array_equal(a.seen, b.seen)
    assert np.array_equal(a.history, b.history)
    assert a.seam() == b.seam()


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("options", [{}, {"stop": ["\n\n"]}, {"ignore_eos": True}], ids=["plain", "stop", "no-end"])
def test_text_and_state_are_those_of_one_token_a_call(model, prompt, options):
    plain, drafted = model.new_state(), model.new_state()
    expected = told(model, prompt, plain, max_tokens=N, **options)
    assert told(model, prompt, drafted, max_tokens=N, speculate=True, **options) == expected
    same_state(drafted, plain)


def test_calls_are_fewer(model, monkeypatch):
    calls = []
    monkeypatch.setattr(drafts, "_call", lambda *a, call=drafts._call: calls.append(1) or call(*a))
    repeated = PROMPTS[:3]
    for prompt in repeated:
        assert len(told(model, prompt, None, max_tokens=N, ignore_eos=True, speculate=True)) == N
    assert 5 < len(calls) / len(repeated) < 0.7 * N


@pytest.mark.parametrize("end", range(1, 30))
def test_a_generation_that_is_closed_leaves_what_was_told(model, end):
    plain, drafted = model.new_state(), model.new_state()
    for state, speculate in ((plain, False), (drafted, True)):
        records = model.generate(PROMPTS[0], state=state, max_tokens=N, speculate=speculate)
        for _ in range(end):
            next(records)
        records.close()
    same_state(drafted, plain)


def test_a_state_that_is_looked_at_meanwhile_is_never_ahead(model):
    plain, drafted, told = model.new_state(), model.new_state(), len(model.tokenizer.encode(PROMPTS[0]))
    for state, speculate in ((plain, False), (drafted, True)):
        records = model.generate(PROMPTS[0], state=state, max_tokens=N, ignore_eos=True, speculate=speculate)
        for number, _ in zip(range(N - 1), records, strict=False):
            kept = state.snapshot()  # notes what was fed
            assert kept.position[0] <= told + number
        records.close()
    same_state(drafted, plain)


@pytest.mark.parametrize("number", range(1, 30))
def test_a_copy_between_two_records_has_every_token_but_the_last(model, number, tmp_path):
    copies = []
    for speculate in (False, True):
        state = model.new_state()
        records = model.generate(PROMPTS[0], state=state, max_tokens=N, ignore_eos=True, speculate=speculate)
        told = [next(records).token for _ in range(number)]
        copies.append(state.clone())
        state.save(tmp_path / "state")
        same_state(dijiang.State.load(tmp_path / "state"), copies[-1])
        told += [record.token for record in records]  # and the generation goes on as if nobody had looked
        copies.append(state)
        copies.append(told)
    plain, drafted = copies[:3], copies[3:]
    assert drafted[2] == plain[2]
    for theirs, ours in zip(drafted[:2], plain[:2], strict=True):
        same_state(theirs, ours)
        again = [
            [r.token for r in model.generate(None, state=s, max_tokens=5, ignore_eos=True)] for s in (theirs, ours)
        ]
        assert again[0] == again[1]


@pytest.mark.parametrize("first", [1, 7, 20])
def test_n_and_m_tokens_are_n_plus_m(model, first):
    state, whole = model.new_state(), told(model, PROMPTS[1], None, max_tokens=N, ignore_eos=True)
    options = {"ignore_eos": True, "speculate": True}
    parts = told(model, PROMPTS[1], state, max_tokens=first, **options)
    parts += told(model, None, state, max_tokens=N - first, **options)
    assert [token for _, token, *_ in parts] == [token for _, token, *_ in whole]


def test_positions_end_where_they_end(exported, monkeypatch):
    model = dijiang.load(exported("tiny-python", precision="int8"), graph="native")
    limit = 40
    monkeypatch.setattr(model, "manifest", replace(model.manifest, positions_limit=limit, limit_reason="enough"))
    expected = told(model, PROMPTS[2], None, max_tokens=N, ignore_eos=True)
    assert expected[-1][2] == "length"
    assert told(model, PROMPTS[2], None, max_tokens=N, ignore_eos=True, speculate=True) == expected


@pytest.mark.parametrize("options", [{"temperature": 1.0, "seed": 1}, {"repetition_penalty": 1.1}])
def test_drawn_tokens_are_refused(model, options):
    with pytest.raises(dijiang.InputError, match="speculate needs the most likely token"):
        model.generate("x", speculate=True, **options)


@pytest.mark.parametrize(("precision", "graph"), [("fp32", "native"), ("int8", "ort")])
def test_graphs_whose_bits_depend_on_the_split_are_refused(exported, precision, graph):
    model = dijiang.load(exported("tiny-python", precision=precision), graph=graph)
    with pytest.raises(dijiang.InputError, match=r"speculate needs .* int8 or int4 in the native graph"):
        model.generate("x", speculate=True)


def test_a_call_that_was_not_judged_is_taken_back(model, monkeypatch):
    """As where Ctrl-C comes right after it."""
    call, drafted, proposals = drafts._call, model.new_state(), []

    def cut(session, state, waiting, proposed):
        found = call(session, state, waiting, proposed)
        proposals.extend(proposed)
        if len(proposals) > 8:
            raise KeyboardInterrupt
        return found

    records = model.generate(PROMPTS[2], max_tokens=N, ignore_eos=True, state=drafted, speculate=True)
    told = []
    with monkeypatch.context() as patch:
        patch.setattr(drafts, "_call", cut)
        with pytest.raises(KeyboardInterrupt):
            told.extend(record.token for record in records)
    assert len(told) > 4
    plain = model.new_state()
    records = model.generate(PROMPTS[2], max_tokens=N, ignore_eos=True, state=plain)
    assert told == [next(records).token for _ in told]
    records.close()
    same_state(drafted, plain)


def slow_draft(text, longest):
    """The twin: looks through the whole text."""
    for matched in MATCHED:
        for start in range(len(text) - matched - 1, -1, -1):
            if text[start : start + matched] == text[-matched:]:
                return text[start + matched : start + matched + longest]
    return []


@given(st.lists(st.integers(0, 3), min_size=0, max_size=60), st.integers(1, LONGEST))
@settings(max_examples=200, deadline=None)
def test_lookup_finds_what_a_search_finds(text, longest):
    lookup = Lookup(text[: len(text) // 2])
    lookup.add(text[len(text) // 2 :])
    assert lookup.draft(longest) == slow_draft(text, longest)


def test_lookup_is_bounded(monkeypatch):
    monkeypatch.setattr(drafts, "WINDOW", 50)
    lookup = Lookup([])
    for token in range(1000):
        lookup.add([token])
        assert len(lookup._text) <= 100
        assert len(lookup._places) <= 2 * 100
    lookup.add([990, 991])
    assert lookup.draft(3) == [992, 993, 994]
