"""The server's answers as the official package gets them."""

import json

import jsonschema
import numpy as np
import pytest

import dijiang
from dijiang.runtime.options import Generation
from tests.server.serving import PROMPT, text_of


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 1.1, "top_p": 0.9, "seed": 4},
        {"temperature": 1.5, "seed": 2, "stop": ["\n", "e("]},
    ],
    ids=["greedy", "drawn", "stopped"],
)
def test_completion_is_what_generate_gives(client, model, options):
    expected = text_of(model, PROMPT, max_tokens=20, **options)
    whole = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, **options)
    assert whole.choices[0].text == expected
    pieces = list(
        client.completions.create(
            model="tiny",
            prompt=PROMPT,
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
            **options,
        )
    )
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == expected
    last = list(model.generate(PROMPT, max_tokens=20, top_k=50, **options))[-1]
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (last.prompt_tokens, last.generated)
    assert pieces[-1].usage == whole.usage
    assert whole.choices[0].finish_reason == {"limit": "length", "stop": "stop"}[last.finish_reason]


def test_ids_and_several_prompts_and_choices(client, model):
    ids = model.tokenizer.encode(PROMPT)
    found = client.completions.create(
        model="tiny", prompt=[ids, [5, 6, 7]], n=2, seed=8, temperature=1.2, max_tokens=9
    )
    assert [c.index for c in found.choices] == [0, 1, 2, 3]
    for choice, prompt in zip(found.choices, (ids, ids, [5, 6, 7], [5, 6, 7]), strict=True):
        assert choice.text == text_of(
            model, prompt, seed=Generation(seed=8).attempt(choice.index).seed, temperature=1.2, max_tokens=9
        )
    assert found.usage.prompt_tokens == len(ids) + 3


def test_logprobs_are_the_models(client, model):
    found = client.completions.create(model="tiny", prompt=[5, 6], logprobs=3, max_tokens=4, temperature=0)
    logits = model.forward([[5, 6]], model.new_state())[0].astype(np.float64)
    expected = np.sort(logits - np.log(np.exp(logits).sum()))[::-1][:3]
    best = found.choices[0].logprobs.top_logprobs[0]
    np.testing.assert_allclose(list(best.values()), expected, rtol=1e-5)
    assert found.choices[0].logprobs.token_logprobs[0] == pytest.approx(expected[0], rel=1e-5)
    chat = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "x"}],
        logprobs=True,
        top_logprobs=2,
        max_tokens=3,
        temperature=0,
    )
    assert all(len(entry.top_logprobs) == 2 for entry in chat.choices[0].logprobs.content)
    assert chat.choices[0].logprobs.content[0].top_logprobs[0].token == chat.choices[0].logprobs.content[0].token


def test_tokens_of_logprobs_are_the_bytes_of_the_text(client, model):
    ask = {"model": "tiny", "max_tokens": 12, "seed": 5, "temperature": 1.3}
    chat = client.chat.completions.create(**ask, messages=[{"role": "user", "content": "x"}], logprobs=True)
    entries = chat.choices[0].logprobs.content
    said = b"".join(bytes(entry.bytes) for entry in entries if entry.token != "<|endoftext|>")
    assert said.decode(errors="replace") == chat.choices[0].message.content
    (start, *_) = model.tokenizer.encode("漢")  # the first byte of three
    found = client.completions.create(**ask, prompt="x", logprobs=2, logit_bias={str(start): 100})
    log = found.choices[0].logprobs
    assert log.tokens == ["bytes:\\xe6"] * 12
    assert log.text_offset == list(range(12))
    for logprob, top in zip(log.token_logprobs, log.top_logprobs, strict=True):
        assert (top["bytes:\\xe6"], len(top)) == (logprob, 3)  # the two most likely ones, and itself


def test_spaces_in_tokens_are_spaces_and_a_stream_counts_on(client):
    ask = {"model": "tiny", "prompt": PROMPT, "max_tokens": 30, "temperature": 0, "logprobs": 0}
    found = client.completions.create(**ask)
    pieces = [piece.choices[0].logprobs for piece in client.completions.create(**ask, stream=True)]
    assert [at for piece in pieces for at in piece.text_offset] == found.choices[0].logprobs.text_offset
    assert "".join(found.choices[0].logprobs.tokens).removesuffix("<|endoftext|>") == found.choices[0].text
    assert " " in found.choices[0].text


def test_best_of_as_many_as_are_given_is_no_choice(client):
    found = client.completions.create(model="tiny", prompt="x", n=2, best_of=2, max_tokens=2)
    assert len(found.choices) == 2


def test_schema_beside_json_object_is_kept(client):
    form = {"type": "json_object", "schema": SCHEMA}  # as llama.cpp's server takes it
    found = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=120, seed=1, response_format=form
    )
    jsonschema.validate(json.loads(found.choices[0].message.content), SCHEMA)


def test_messages_as_agents_write_them(client, model):
    """An answer without content, and the newer name of a system prompt where the template has the older one."""
    messages = [
        {"role": "developer", "content": "S"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "hi"},
    ]
    found = client.chat.completions.create(model="tiny", messages=messages, max_tokens=1)
    prompt = (
        "# system: S<|endoftext|>\n# user: hi<|endoftext|>\n# assistant: <|endoftext|>\n# user: hi<|endoftext|>\n"
    )
    assert found.usage.prompt_tokens == len(model.tokenizer.as_it_stands(prompt + "# assistant:"))


def test_logit_bias_and_limits(client, model):
    forced = client.completions.create(
        model="tiny", prompt="x", logit_bias={"40": 100}, max_tokens=3, extra_body={"ignore_eos": True}
    )
    assert forced.choices[0].text == model.tokenizer.decode([40, 40, 40])
    assert client.completions.create(model="tiny", prompt="x").usage.completion_tokens <= 16


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["a", "b c"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "size", "kind", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_text_is_json_of_the_schema(client, temperature):
    found = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "x"}],
        temperature=temperature,
        seed=1,
        n=4,
        max_tokens=120,
        response_format={"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}},
        extra_body={"ignore_eos": True},  # the grammar's end is one all the same
    )
    for choice in found.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    assert len({choice.message.content for choice in found.choices}) == (1 if temperature == 0 else 4)
    anything = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "x"}],
        max_tokens=300,
        seed=3,
        response_format={"type": "json_object"},
        logit_bias={str(token): 20 for token in (94, 93)},
    )
    assert anything.choices[0].message.content.startswith("{")


def test_chat_renders_the_checkpoints_template(client, model):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    found = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=12, temperature=0)
    prompt = "# system: S<|endoftext|>\n# user: hi<|endoftext|>\n# assistant:"
    ids = model.tokenizer.as_it_stands(prompt)
    assert found.choices[0].message.content == text_of(model, ids, max_tokens=12)
    stream = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=12, temperature=0, stream=True
    )
    pieces = list(stream)
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == found.choices[0].message.content


def test_model_without_a_tokenizer_takes_and_gives_ids(served, models):
    status, _, found = served.ask(
        "/v1/completions",
        {"model": "other", "prompt": [4, 5], "max_tokens": 4, "temperature": 0, "ignore_eos": True},
    )
    other = dijiang.load(models["other"].bundle.path)
    assert (status, found["choices"][0]["token_ids"]) == (
        200,
        [r.token for r in other.generate([4, 5], max_tokens=4, ignore_eos=True)],
    )
    refused = served.ask("/v1/completions", {"model": "other", "prompt": "text"})
    assert (refused[0], refused[2]["error"]["type"]) == (400, "invalid_request_error")


def test_models_tokenize_health_metrics(served, client, model):
    assert [m.id for m in client.models.list()] == ["tiny", "other", "tooled"]
    assert client.models.retrieve("tiny").owned_by == "dijiang"
    assert served.ask("/tokenize", {"model": "tiny", "prompt": PROMPT})[2]["tokens"] == model.tokenizer.encode(
        PROMPT
    )
    assert {served.ask(path)[0] for path in ("/healthz", "/readyz", "/health")} == {200}
    page = served.ask("/metrics")[2]
    assert 'dijiang_slots{model="tiny"} 4.0' in page
    assert 'dijiang_generations{model="tiny"} 0.0' in page
