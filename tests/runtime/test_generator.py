"""Generation: what ends it, what each record says, and where a state goes on."""

import numpy as np
import pytest

import dijiang
from dijiang.runtime import sequence
from dijiang.runtime.text import StopStrings
from tests.conftest import EXAMPLES, poisoned, with_start_token

PROMPT = "def main("
#: Ways to choose tokens: by a graph's own ArgMax, by the sampler, by drafts.
WAYS = [
    ("native", {}),
    ("ort", {}),
    ("primitive", {}),
    ("native", {"temperature": 1.0}),
    ("native", {"speculate": True}),
]


@pytest.fixture(scope="module")
def model(exported):
    return dijiang.load(exported("tiny-python"))


def text_of(records):
    return "".join(record.text for record in records)


def test_greedy_text_is_the_argmax_of_every_step(model):
    ids = model.tokenizer.encode(PROMPT)
    records = list(model.generate(PROMPT, max_tokens=20))
    state, expected = model.new_state(), []
    logits = model.forward(np.array([ids]), state)
    for _ in range(20):
        expected.append(int(logits[0].argmax()))
        logits = model.forward(np.array([expected[-1:]]), state)
    assert [record.token for record in records] == expected
    assert PROMPT + text_of(records) == model.tokenizer.decode([*ids, *expected])


def test_records_count_and_only_the_last_one_finishes(model):
    records = list(model.generate(PROMPT, max_tokens=5))
    assert [record.generated for record in records] == [1, 2, 3, 4, 5]
    assert [record.finish_reason for record in records] == [None] * 4 + ["limit"]
    assert {record.prompt_tokens for record in records} == {len(model.tokenizer.encode(PROMPT))}
    assert records[-1].prefill_rate > 0
    assert records[-1].decode_rate > 0


def test_same_seed_gives_the_same_text(model):
    options = {"max_tokens": 30, "temperature": 1.0, "top_p": 0.95}
    first, again, other = (text_of(model.generate(PROMPT, seed=s, **options)) for s in (1, 1, 2))
    assert first == again != other


def test_stop_string_ends_the_text_before_it(model):
    free = text_of(model.generate(PROMPT, max_tokens=60))
    stop = free[10:14]  # crosses token borders
    records = list(model.generate(PROMPT, max_tokens=60, stop=[stop, "never there"]))
    assert records[-1].finish_reason == "stop"
    assert text_of(records) == free[: free.index(stop)]


def test_held_back_text_is_given_out_when_the_stop_string_never_completes(model):
    free = text_of(model.generate(PROMPT, max_tokens=12))
    assert text_of(model.generate(PROMPT, max_tokens=12, stop=[free[-3:] + "\0"])) == free


def test_a_single_stop_string_need_not_be_in_a_list(model):
    free = text_of(model.generate(PROMPT, max_tokens=30))
    assert text_of(model.generate(PROMPT, max_tokens=30, stop=free[5:8])) == free[: free.index(free[5:8])]


def test_stop_token_ends_the_text_and_is_not_in_it(model):
    tokens = [record.token for record in model.generate(PROMPT, max_tokens=20)]
    stop = tokens[7]
    records = list(model.generate(PROMPT, max_tokens=20, stop_tokens=[stop]))
    assert [record.token for record in records] == tokens[: tokens.index(stop) + 1]
    assert (records[-1].finish_reason, records[-1].text) == ("stop", "")


def test_the_models_own_end_token_stops_unless_ignored(model, monkeypatch):
    tokens = [record.token for record in model.generate(PROMPT, max_tokens=9)]
    spec = dijiang.ModelSpec.from_dict(model.spec.to_dict() | {"eos_token_ids": [tokens[4]]})
    monkeypatch.setattr(model, "spec", spec)
    assert list(model.generate(PROMPT, max_tokens=9))[-1].finish_reason == "stop"
    *_, last = model.generate(PROMPT, max_tokens=9, ignore_eos=True)
    assert (last.finish_reason, last.generated) == ("limit", 9)


def test_stop_string_that_is_a_special_token_ends_the_text(model):
    """No text shows special tokens, so that no search of the text finds one. Clients send them."""
    special = "<|endoftext|>"
    (end,) = model.tokenizer.special_ids([special])
    records = list(model.generate([1], max_tokens=3_000, ignore_eos=True, temperature=3.0, seed=1, stop=[special]))
    assert (records[-1].token, records[-1].finish_reason, records[-1].text) == (end, "stop", "")


@pytest.mark.parametrize("prompts", [([5], [6]), (None, None)])
def test_generation_of_a_state_that_went_on_since_is_refused(model, prompts):
    """Both would feed the token that the state has left."""
    state = model.new_state()
    list(model.generate([1, 2], max_tokens=2, state=state))
    first, second = [model.generate(prompt, max_tokens=3, state=state) for prompt in prompts]
    list(first)
    position = state.position.tolist()
    with pytest.raises(
        dijiang.InputError, match=r"^the state is at position \d+ by now, was at 3 .* call generate"
    ):
        list(second)
    assert state.position.tolist() == position


def test_a_given_state_is_continued(model):
    ids = model.tokenizer.encode("import os\n\n\ndef main(")
    expected = [record.token for record in model.generate(ids, max_tokens=10)]
    state = model.new_state()
    model.forward(np.array([ids[:5]]), state)
    found = [record.token for record in model.generate(ids[5:], max_tokens=10, state=state)]
    assert found == expected
    assert state.position[0] == len(ids) + 9  # the last token was never fed


def test_a_text_gets_the_tokenizers_start_token_where_a_sequence_starts(model, copy_of):
    folder = copy_of(EXAMPLES / "tiny-python")
    stored = with_start_token(folder / "tokenizer.json")
    stored.save(str(folder / "tokenizer.json"))
    started = dijiang.load(dijiang.export(folder, folder / "bundle", verify=False).path)
    ids, state = model.tokenizer.encode(PROMPT), started.new_state()
    assert text_of(started.generate(PROMPT)) == text_of(model.generate([0, *ids]))
    *_, first = started.generate(PROMPT, max_tokens=1, state=state)
    *_, second = started.generate(PROMPT, max_tokens=1, state=state)
    # The second goes on from the first one's token, which is fed with its prompt.
    assert (first.prompt_tokens, second.prompt_tokens) == (len(ids) + 1, len(ids) + 1)


def test_nothing_is_computed_before_the_first_record_is_asked_for(model):
    state = model.new_state()
    records = model.generate(PROMPT, state=state)
    assert state.position[0] == 0
    next(records)
    assert state.position[0] == len(model.tokenizer.encode(PROMPT))


def test_the_largest_options_are_taken(model):
    options = {"seed": 2**64 - 1, "top_k": 10**400, "temperature": 1.0, "max_tokens": 3}
    assert text_of(model.generate(PROMPT, **options)) == text_of(model.generate(PROMPT, **options))


@pytest.mark.parametrize("dtype", ["uint64", "uint8", "int16"])
def test_ids_of_any_integers_are_taken(model, dtype):
    ids, state = [1, 2, 3], model.new_state()
    given = np.array(ids, dtype)
    assert text_of(model.generate(given, max_tokens=3)) == text_of(model.generate(ids, max_tokens=3))
    for _ in range(2):  # the second time behind a token that was left
        assert len([*model.generate(given, max_tokens=2, state=state)]) == 2


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_tiniest_temperature_takes_the_most_likely_token(model, filters):
    drawn = model.generate(PROMPT, max_tokens=3, temperature=1e-310, **filters)
    assert text_of(drawn) == text_of(model.generate(PROMPT, max_tokens=3))


@pytest.mark.parametrize(("graph", "options"), WAYS)
def test_nan_ends_a_text_and_is_not_saved(exported, tmp_path, graph, options):
    """ArgMax of NaN is the first token of the vocabulary: greedy text would go on with it for ever."""
    precision = "int8" if options.get("speculate") else "fp32"
    model = dijiang.load(exported("tiny-python", precision=precision), graph=graph)
    state = poisoned(model)
    with pytest.raises(dijiang.SessionError, match="the logits at position 5 hold NaN"):
        list(model.generate(None, state=state, **options))
    with pytest.raises(dijiang.InputError, match="layer 5 of the state holds NaN or infinity, so it is not saved"):
        state.save(tmp_path / "state")
    assert not list(tmp_path.iterdir())
    with pytest.raises(dijiang.SessionError, match="the logits at position 6 hold NaN"):
        model.score([[3, 4, 5]], state)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "the prompt is empty, expected at least one token"),
        ([], {}, "the prompt is empty, expected at least one token"),
        ([10**9], {}, "token id 1000000000 is out of range"),
        (PROMPT, {"max_tokens": 0}, "max_tokens is 0, expected a whole number from 1 to"),
        (PROMPT, {"stop": [""]}, "a stop string is empty"),
        (PROMPT, {"temperature": -1.0}, "temperature is -1.0, expected a number from 0 to 1000"),
        (PROMPT, {"temperature": float("nan")}, "temperature is nan"),
        (PROMPT, {"top_k": -1}, "top_k is -1"),
        (PROMPT, {"top_p": 0.0}, "top_p is 0.0"),
        (PROMPT, {"top_p": 1.1}, "top_p is 1.1"),
        (PROMPT, {"min_p": 2.0}, "min_p is 2.0"),
        (PROMPT, {"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        (PROMPT, {"seed": -1}, "seed is -1"),
        (PROMPT, {"seed": 2**64}, "seed is 18446744073709551616"),
        (PROMPT, {"max_tokens": 2.5}, "max_tokens is 2.5, expected a whole number"),
        (PROMPT, {"max_tokens": None}, "max_tokens is None"),
        (PROMPT, {"stop_tokens": [1.5]}, r"stop_tokens is \[1.5\], expected a whole number"),
        (PROMPT, {"stop": None}, "stop is None, expected text"),
        (PROMPT, {"topk": 3}, "option 'topk' is unknown, expected one of max_tokens"),
        (None, {}, "nothing to go on from"),
        ([[1, 2], [3]], {}, "ids are no array"),
        ("lone \ud800 surrogate", {}, r"character 5 of the text, .*, is no Unicode; give text in UTF-8"),
    ],
)
def test_bad_options_are_refused_before_the_first_record(model, prompt, options, message):
    with pytest.raises(dijiang.InputError, match=message):
        model.generate(prompt, **options)


def test_stop_strings_without_a_tokenizer_are_refused(exported):
    model = dijiang.load(exported("neox-base"))
    with pytest.raises(dijiang.InputError, match="stop strings need a tokenizer"):
        model.generate([1], stop=["x"])
    assert [record.text for record in model.generate([1, 2], max_tokens=3)] == ["", "", ""]


def test_long_prompt_tells_how_far_it_is(exported):
    model, told = dijiang.load(exported("tiny-python")), []
    list(model.generate([3] * 300, max_tokens=1, progress=lambda *what: told.append(what)))
    assert told == [("prompt", 256, 300), ("prompt", 300, 300)]
    list(model.generate([3] * 200, max_tokens=1, progress=lambda *what: told.append(what)))
    assert len(told) == 2


def test_rates_are_of_the_tokens_after_the_first(monkeypatch):
    now = iter([12.0, 12.5, 13.0])  # the prompt took 2 s, each step half a second
    monkeypatch.setattr(sequence.time, "perf_counter", lambda: next(now))
    one = sequence.Sequence(sequence.Limits(9), StopStrings(()), None, None, prompt_tokens=10, started=10.0)
    last = [one.push(7, at) for at in range(3)][-1]
    assert (last.prefill_rate, last.decode_rate) == (5.0, 2.0)


def test_every_position_is_used(exported):
    model = dijiang.load(exported("neox-trained-decay"))
    limit = model.manifest.positions_limit
    records = list(model.generate([3, 4], max_tokens=10 * limit, ignore_eos=True))
    assert (len(records), records[-1].finish_reason) == (limit - 2 + 1, "length")  # the last is not fed
