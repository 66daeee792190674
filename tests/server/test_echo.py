"""A prompt as the beginning of its answer: its log-probabilities are the model's, as harnesses ask for them."""

import threading

import numpy as np
import pytest

from dijiang.server import hosted
from dijiang.server.echo import Echo
from tests.random_tokenizers import KINDS, tokenizer
from tests.server.serving import PROMPT

#: More ids than go through the graph at once.
LONG = [5 + 7 * at % 2000 for at in range(600)]


def nats_of(model, ids):
    """Log-probabilities [T - 1, vocab] of what follows each of the ids but the last, float64."""
    logits = model.forward([ids], model.new_state(), all_logits=True)[0, :-1].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def require_scores(found, model, ids):
    """The log-probabilities of a choice begin with those of the ids."""
    expected = nats_of(model, ids)
    assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
    own = expected[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(found.token_logprobs[1 : len(ids)], own, rtol=1e-4, atol=1e-5)
    likeliest = [max(top.values()) for top in found.top_logprobs[1 : len(ids)]]
    np.testing.assert_allclose(likeliest, expected.max(-1), rtol=1e-4, atol=1e-5)


def test_long_prompts_are_scored_as_the_model_scores_them(client, model):
    found = client.completions.create(
        model="tiny", prompt=[LONG, [5, 6]], n=2, echo=True, logprobs=1, max_tokens=2, temperature=0
    )
    for choice, ids in zip(found.choices, (LONG, LONG, [5, 6], [5, 6]), strict=True):
        require_scores(choice.logprobs, model, ids)
        assert len(choice.logprobs.tokens) == len(ids) + 2
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (602, 8)


def test_prompts_are_scored_beside_answers_that_go_on(served, client, model):
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "seed": 1}
    others = [threading.Thread(target=served.ask, args=("/v1/completions", body)) for _ in range(3)]
    for other in others:
        other.start()
    found = client.completions.create(model="tiny", prompt=LONG, echo=True, logprobs=1, max_tokens=1)
    for other in others:
        other.join()
    require_scores(found.choices[0].logprobs, model, LONG)


def test_text_begins_with_the_prompt_and_tokens_say_where_they_stand(client, model):
    ask = {"model": "tiny", "prompt": "def main(漢, b)", "max_tokens": 6, "temperature": 0}
    plain = client.completions.create(**ask, logprobs=0).choices[0]
    found = client.completions.create(**ask, logprobs=0, echo=True).choices[0]
    assert found.text == ask["prompt"] + plain.text
    ids = model.tokenizer.encode(ask["prompt"])
    assert found.logprobs.tokens == [*[found.logprobs.tokens[at] for at in range(len(ids))], *plain.logprobs.tokens]
    for token, at in zip(found.logprobs.tokens, found.logprobs.text_offset, strict=True):
        if not token.startswith(("bytes:", "<|")):
            assert found.text[at:].startswith(token)
    assert found.logprobs.token_logprobs[len(ids) :] == pytest.approx(plain.logprobs.token_logprobs, rel=1e-4)
    as_ids = client.completions.create(**ask | {"prompt": ids}, echo=True).choices[0]
    assert (as_ids.text, as_ids.logprobs) == (found.text, None)


def test_no_tokens_is_the_prompt_alone(client, model):
    ids = model.tokenizer.encode(PROMPT)
    found = client.completions.create(model="tiny", prompt=PROMPT, echo=True, logprobs=2, max_tokens=0)
    choice = found.choices[0]
    assert (choice.text, choice.finish_reason, found.usage.completion_tokens) == (PROMPT, "length", 0)
    assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset) == len(ids)
    require_scores(choice.logprobs, model, ids)


def test_without_a_tokenizer_ids_are_told(served):
    body = {"model": "other", "prompt": [5, 6, 7], "echo": True, "logprobs": 0, "max_tokens": 2, "temperature": 0}
    choice = served.ask("/v1/completions", body)[2]["choices"][0]
    assert choice["token_ids"][:3] == [5, 6, 7]
    assert choice["logprobs"]["tokens"] == [str(token) for token in choice["token_ids"]]
    assert choice["text"] == ""


@pytest.mark.parametrize("beside", [{"stream": True}, {"store": True}, {"return_state": True}, {"state": "x"}])
def test_what_it_does_not_go_with_is_one_line(served, beside):
    status, _, found = served.ask("/v1/completions", {"model": "tiny", "prompt": "x", "echo": True} | beside)
    assert (status, found["error"]["param"]) == (400, "echo")


def test_chats_have_none_and_other_prompts_are_bounded(served, monkeypatch):
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "echo": True}
    assert served.ask("/v1/chat/completions", chat)[2]["error"]["code"] == "unsupported_parameter"
    body = {"model": "tiny", "prompt": [[5] * 4, [6] * 5], "echo": True, "max_tokens": 1}
    monkeypatch.setattr(hosted, "MOST_SCORED", 8)
    assert served.ask("/v1/completions", body)[0] == 200
    status, _, found = served.ask("/v1/completions", body | {"logprobs": 0})
    assert (status, found["error"]["param"]) == (400, "prompt")
    assert "have 9 tokens, expected at most 8 with echo and logprobs" in found["error"]["message"]


@pytest.mark.parametrize("text", ["the main thing", "  the main", "the main e\u0301 漢"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_stand_in_the_text_that_was_given(kind, text):
    """Whatever the tokenizer drops of it, or puts before it."""
    tokens = tokenizer(kind)
    echo = Echo(tokens.encode(text), [], text, tokens)
    assert (echo.text, len(echo.offsets)) == (text, len(echo.ids))
    for token, at in zip(echo.ids, echo.offsets, strict=True):
        own = tokens.piece(token).decode(errors="ignore").strip()
        assert own == "<unk>" or not own.isascii() or text[at:].strip().startswith(own)


def test_special_tokens_in_a_prompt_take_room(client):
    prompt = "def f<|endoftext|>x = 1"
    found = client.completions.create(model="tiny", prompt=prompt, echo=True, logprobs=0, max_tokens=0)
    log = found.choices[0].logprobs
    assert [prompt[at:].startswith(token) for token, at in zip(log.tokens, log.text_offset, strict=True)] == [
        True
    ] * 6


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_stand_where_their_text_does(kind):
    """Some tokenizers drop the space of the first word, or begin texts with a token that is no text."""
    text, tokens = "the main 漢 thing", tokenizer(kind)
    ids = [*tokens.special, *tokens.encode(text)]
    echo = Echo(ids, [], None, tokens)
    offsets = echo.offsets
    assert offsets == sorted(offsets)
    pieces = [echo.text[at:end] for at, end in zip(offsets, [*offsets[1:], None], strict=True)]
    assert "".join(pieces) == echo.text == tokens.decode(ids)
    for token, piece in zip(ids, pieces, strict=True):
        own = tokens.piece(token).decode(errors="ignore").strip()
        assert token in tokens.special or piece.strip() in (own, "", "漢")
