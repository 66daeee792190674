"""The server as clients meet it: the official package, and bytes on a socket."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import jsonschema
import numpy as np
import openai
import pytest

import dijiang
from dijiang.runtime.chat_template import ChatTemplate
from dijiang.server.settings import Serving
from tests.conftest import GOLDEN, RUNNABLE
from tests.server.serving import events, running

KEY = "k" * 40
PROMPT = "def main("


@pytest.fixture(scope="module")
def bundles(chatty, tmp_path_factory):
    """tiny: with a chat template.  other: another checkpoint of the shape, without a tokenizer."""
    checkpoint = tmp_path_factory.mktemp("other")
    for name in ("config.json", "model.safetensors"):
        (checkpoint / name).write_bytes((GOLDEN["tiny-python-published"] / name).read_bytes())
    dijiang.export(checkpoint, chatty.parent / "other", precision="int8", calibration_tokens=0, verify=False)
    return chatty.parent


@pytest.fixture(scope="module")
def models(bundles):
    return {name: dijiang.load(bundles / name, threads=1) for name in ("tiny", "other")}


@pytest.fixture(scope="module")
def model(bundles):
    return dijiang.load(bundles / "tiny", threads=1)


@pytest.fixture(scope="module")
def served(models):
    with running(models, slots=4, queue=40, seal_key=KEY, patience=5.0) as found:
        yield found


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=served.url, api_key="none", max_retries=0) as made:
        yield made


def text_of(model, prompt, **options):
    options = {"top_k": 50} | options  # its authors' choice
    return "".join(r.text for r in model.generate(prompt, **options))


# What the official client gets.


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
        assert choice.text == text_of(model, prompt, seed=8 + choice.index, temperature=1.2, max_tokens=9)
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
    assert [m.id for m in client.models.list()] == ["tiny", "other"]
    assert client.models.retrieve("tiny").owned_by == "dijiang"
    assert served.ask("/tokenize", {"model": "tiny", "prompt": PROMPT})[2]["tokens"] == model.tokenizer.encode(
        PROMPT
    )
    assert served.ask("/healthz")[0] == served.ask("/readyz")[0] == 200
    page = served.ask("/metrics")[2]
    assert 'dijiang_slots{model="tiny"} 4.0' in page
    assert 'dijiang_generations{model="tiny"} 0.0' in page


# Conversations.


def conversation(model, turns, **options):
    """Answers of a conversation whose whole text is fed anew each time."""
    template, messages, answers, state = ChatTemplate.of(model.bundle), [], [], None
    for said in turns:
        messages.append({"role": "user", "content": said})
        if state is None:
            state, ids = model.new_state(), model.tokenizer.as_it_stands(template.render(messages))
        else:  # what ended the answer was the limit: the template's own end follows
            ids = model.tokenizer.encode(f"<|endoftext|>\n# user: {said}<|endoftext|>\n# assistant:", start=False)
        records = list(model.generate(ids, state=state, top_k=50, **options))
        answers.append("".join(r.text for r in records))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


OPTIONS = {"max_tokens": 8, "temperature": 1.0, "seed": 5}


@pytest.mark.parametrize("way", ["stored", "sealed"])
def test_conversation_goes_on_in_as_many_tokens_as_are_new(client, served, model, way):
    expected = conversation(model, ["one", "two", "three"], ignore_eos=True, **OPTIONS)
    extra, answers, fed = {"ignore_eos": True}, [], []
    for said in ("one", "two", "three"):
        extra |= {"store": True} if way == "stored" else {"return_state": True}
        found = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": said}], extra_body=extra, **OPTIONS
        )
        answers.append(found.choices[0].message.content)
        fed.append(found.usage.prompt_tokens - found.usage.prompt_tokens_details.cached_tokens)
        extra = {"ignore_eos": True}
        extra |= {"previous_response_id": found.id} if way == "stored" else {"state": found.state}
    assert answers == expected
    assert fed[1] < 30


def test_any_stored_answer_can_be_continued_twice(client):
    first = client.completions.create(model="tiny", prompt=PROMPT, seed=1, extra_body={"store": True})
    more = [
        client.completions.create(
            model="tiny", prompt=" x", temperature=0, extra_body={"previous_response_id": first.id}
        )
        for _ in range(2)
    ]
    assert more[0].choices[0].text == more[1].choices[0].text


def test_end_token_is_fed_once(client, model):
    """An answer that the end token ended: it is the pending token, and the template writes it, too."""
    ends = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "x"}],
        logit_bias={"0": 100},
        extra_body={"store": True},
    )
    assert (ends.choices[0].finish_reason, ends.choices[0].message.content) == ("stop", "")
    found = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "y"}],
        extra_body={"previous_response_id": ends.id},
        temperature=0,
        max_tokens=8,
    )
    text = "# user: x<|endoftext|>\n# assistant:<|endoftext|>\n# user: y<|endoftext|>\n# assistant:"
    assert found.choices[0].message.content == text_of(model, model.tokenizer.as_it_stands(text), max_tokens=8)
    assert found.usage.prompt_tokens == len(model.tokenizer.as_it_stands(text))


def test_sealed_state_goes_on_in_another_server_and_in_no_other_way(client, served, models):
    body = {"model": "tiny", "prompt": PROMPT, "seed": 1}
    sealed = served.ask("/v1/completions", body | {"return_state": True})[2]["state"]
    more = {"model": "tiny", "prompt": " x", "temperature": 0, "state": sealed}
    expected = served.ask("/v1/completions", more)[2]["choices"][0]["text"]

    def fails(server, **changes):
        status, _, found = server.ask("/v1/completions", more | changes)
        return status, found["error"]["param"], found["error"]["code"]

    with running({"tiny": models["other"]}, seal_key=KEY) as wrong, running(models, seal_key="z" * 40) as foreign:
        assert fails(wrong, prompt=[1])[0] == 400  # another checkpoint
        assert fails(foreign) == (400, "state", "invalid_state")
    data = bytearray(base64.b64decode(sealed))
    for place in (0, 8, 20, 60, len(data) // 2, len(data) - 1):
        changed = bytes(data[:place]) + bytes([data[place] ^ 1]) + bytes(data[place + 1 :])
        assert fails(served, state=base64.b64encode(changed).decode()) == (400, "state", "invalid_state")
    assert fails(served, state="%%%")[1] == "state"
    assert fails(served, state=base64.b64encode(data[:50]).decode()) == (400, "state", "invalid_state")
    assert served.ask("/v1/completions", more)[2]["choices"][0]["text"] == expected


def test_conversations_are_the_last_ones(models):
    with running(models, conversations=2, slots=2) as server:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
        names = [server.ask("/v1/completions", body | {"store": True})[2]["id"] for _ in range(3)]
        found = [server.ask("/v1/completions", body | {"previous_response_id": name}) for name in names]
        assert [status for status, *_ in found] == [400, 200, 200]
        assert found[0][2]["error"]["code"] == "previous_response_not_found"


def test_conversations_go_on_in_the_next_server(models, tmp_path):
    body, names, more = {"model": "tiny", "prompt": "x", "max_tokens": 3, "seed": 1}, [], []
    for start in (True, False):
        with running(models, conversations=1, slots=2, conversation_folder=str(tmp_path)) as server:
            if start:
                for n in range(3):
                    names.append(server.ask("/v1/completions", body | {"seed": n, "store": True})[2]["id"])
            found = [server.ask("/v1/completions", body | {"previous_response_id": name}) for name in names]
            more.append([answer["choices"][0]["text"] for _, _, answer in found])
            for name in ("../" + names[0], "", "a/b", "x" * 500, "\0"):
                assert server.ask("/v1/completions", body | {"previous_response_id": name})[0] == 400
    assert more[0] == more[1]
    assert len(list(tmp_path.iterdir())) == 3


# What is refused.

REFUSED = {
    "no model": ({"prompt": "x"}, 400, "model"),
    "unknown model": ({"model": "none", "prompt": "x"}, 404, "model"),
    "no prompt": ({"model": "tiny"}, 400, "prompt"),
    "empty prompt": ({"model": "tiny", "prompt": ""}, 400, None),
    "prompt of numbers": ({"model": "tiny", "prompt": [1.5]}, 400, "prompt"),
    "prompt of booleans": ({"model": "tiny", "prompt": [True]}, 400, "prompt"),
    "mixed prompt": ({"model": "tiny", "prompt": ["x", 3]}, 400, "prompt"),
    "id out of range": ({"model": "tiny", "prompt": [10**6]}, 400, None),
    "surrogate": ({"model": "tiny", "prompt": "\ud800"}, 400, None),
    "surrogate in a name": ({"model": "\ud800", "prompt": "x"}, 404, "model"),
    "hot": ({"model": "tiny", "prompt": "x", "temperature": 1e9}, 400, "temperature"),
    "text for a number": ({"model": "tiny", "prompt": "x", "top_p": "x"}, 400, "top_p"),
    "boolean for a number": ({"model": "tiny", "prompt": "x", "max_tokens": True}, 400, "max_tokens"),
    "too many tokens": ({"model": "tiny", "prompt": "x", "max_tokens": 10**6}, 400, "max_tokens"),
    "no tokens": ({"model": "tiny", "prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
    "many choices": ({"model": "tiny", "prompt": "x", "n": 99}, 400, "n"),
    "five stops": ({"model": "tiny", "prompt": "x", "stop": list("abcde")}, 400, "stop"),
    "empty stop": ({"model": "tiny", "prompt": "x", "stop": [""]}, 400, "stop"),
    "stop of numbers": ({"model": "tiny", "prompt": "x", "stop": [1]}, 400, "stop"),
    "seed": ({"model": "tiny", "prompt": "x", "seed": -1}, 400, "seed"),
    "bias of words": ({"model": "tiny", "prompt": "x", "logit_bias": {"a": 1}}, 400, "logit_bias"),
    "bias out of range": ({"model": "tiny", "prompt": "x", "logit_bias": {"1": 1e9}}, 400, "logit_bias"),
    "bias of no token": ({"model": "tiny", "prompt": "x", "logit_bias": {"99999": 1}}, 400, None),
    "stream of text": ({"model": "tiny", "prompt": "x", "stream": "yes"}, 400, "stream"),
    "penalty": ({"model": "tiny", "prompt": "x", "presence_penalty": 1}, 400, "presence_penalty"),
    "format": (
        {"model": "tiny", "prompt": "x", "response_format": {"type": "xml"}},
        400,
        "response_format",
    ),
    "no schema": (
        {"model": "tiny", "prompt": "x", "response_format": {"type": "json_schema"}},
        400,
        "response_format",
    ),
    "bad schema": (
        {"model": "tiny", "prompt": "x"}
        | {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nope"}}}},
        400,
        "response_format",
    ),
    "both states": ({"model": "tiny", "prompt": "x", "state": "a", "previous_response_id": "b"}, 400, "state"),
    "no such answer": ({"model": "tiny", "prompt": "x", "previous_response_id": "b"}, 400, "previous_response_id"),
    "list": ([], 400, "model"),
    "no JSON": (b"{", 400, None),
    "no UTF-8": (b"\xff\xfe", 400, None),
    "deep": (b"[" * 100_000, 400, None),
    "huge number": (b'{"model": "tiny", "prompt": "x", "temperature": 1' + b"0" * 9000 + b"}", 400, None),
    "NaN": (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', 400, "temperature"),
}
CHATS = {
    "no messages": ({"model": "tiny"}, "messages"),
    "empty messages": ({"model": "tiny", "messages": []}, "messages"),
    "message of text": ({"model": "tiny", "messages": ["x"]}, "messages[0]"),
    "no content": ({"model": "tiny", "messages": [{"role": "user"}]}, "messages[0]"),
    "image": ({"model": "tiny", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]"),
    "tools": ({"model": "tiny", "messages": [{"role": "user", "content": "x"}], "tools": [{}]}, "tools"),
    "top without": (
        {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "top_logprobs": 2},
        "top_logprobs",
    ),
}


@pytest.mark.parametrize("case", [*REFUSED, *CHATS])
def test_bad_request_is_one_error_of_the_apis_shape(served, case):
    if case in REFUSED:
        body, expected, param = REFUSED[case]
        status, _, found = served.ask("/v1/completions", body)
    else:
        (body, param), expected = CHATS[case], 400
        status, _, found = served.ask("/v1/chat/completions", body)
    assert (status, found["error"]["param"]) == (expected, param)
    assert found["error"]["type"] == "invalid_request_error"
    assert "\n" not in found["error"]["message"]
    assert served.idle()


def test_unknown_fields_are_ignored_and_null_is_nothing(served):
    body = {
        "model": "tiny",
        "prompt": "x",
        "user": "me",
        "metadata": {"a": 1},
        "stop": None,
        "seed": None,
        "n": None,
    }
    assert served.ask("/v1/completions", body)[0] == 200


def test_client_sees_the_classes_of_its_package(client):
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="x", temperature=1e9)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="none", prompt="x")


def test_addresses_and_methods_that_are_not_there(served):
    assert served.ask("/v1/nothing")[0] == 404
    status, _, found = served.ask("/v1/completions")
    assert (status, found["error"]["type"]) == (405, "invalid_request_error")


def test_key_is_needed_where_there_is_one(models):
    with running(models, api_key="secret", slots=1) as server:
        for headers in ([], ["Authorization: Bearer wrong"], ["Authorization: Basic secret"], ["Authorization: é"]):
            status, found, body = server.ask("/v1/models", headers=headers)
            assert (status, found["www-authenticate"], body["error"]["code"]) == (401, "bearer", "invalid_api_key")
        assert server.ask("/v1/models", headers=["Authorization: Bearer secret"])[0] == 200
        assert server.ask("/healthz")[0] == 200


FOREIGN = ["example.org", "localhost.example.org", "192.168.1.1", "0.0.0.0", "[::", "x" * 300]


@pytest.mark.parametrize("name", [*FOREIGN, "null"])
def test_page_of_another_site_gets_nothing_without_a_key(models, name):
    """A browser says whose page asks (Origin), and by which name (Host)."""
    with running(models, slots=1) as server:
        status, _, body = server.ask(
            "/v1/models", headers=[f"Origin: https://{name}" if name != "null" else "Origin: null"]
        )
        assert (status, body["error"]["code"]) == (403, "not_local")
        found = server.raw(f"GET /v1/models HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n".encode())
        assert found.startswith(b"HTTP/1.1 403 ")
        for own in (f"http://127.0.0.1:{server.port}", "http://localhost:1", "http://[::1]"):
            assert server.ask("/v1/models", headers=[f"Origin: {own}"])[0] == 200
    with running(models, api_key="secret", slots=1) as server:
        headers = [f"Origin: https://{name}", "Authorization: Bearer secret"]
        assert server.ask("/v1/models", headers=headers)[0] == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.1", "::", "example.org"])
def test_other_addresses_need_a_key(host):
    with pytest.raises(dijiang.InputError, match="there is no API key; set DIJIANG_API_KEY"):
        Serving(host=host).require_safe(None)
    Serving(host=host).require_safe("secret")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_needs_none(host):
    Serving(host=host).require_safe(None)


# Limits, and clients that misbehave.


def test_body_and_prompt_have_limits(models):
    with running(models, max_body=2000, max_prompt=50, slots=1) as server:
        body = {"model": "tiny", "prompt": "x " * 60}
        assert server.ask("/v1/completions", body)[2]["error"]["code"] == "context_length_exceeded"
        assert server.ask("/v1/completions", {"model": "tiny", "prompt": "x" * 3000})[0] == 413
        chunked = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert b" 413 " in server.raw(
            chunked + b"7d0\r\n" + b"x" * 2000 + b"\r\n7d0\r\n" + b"x" * 2000 + b"\r\n0\r\n\r\n"
        )


def test_silent_and_slow_clients_are_let_go(models):
    with running(models, patience=0.3, slots=1) as server:
        started = time.monotonic()
        assert server.raw(b"") == b""  # never asks
        assert server.raw(b"POST /v1/comp") == b""  # asks half
        found = server.raw(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
        assert found.startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - started < 5
        assert server.ask("/healthz")[0] == 200


def test_who_does_not_read_loses_the_connection_and_the_slot(models):
    with running(models, patience=0.3, slots=1, max_tokens=100_000, buffer=8192) as server:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 100_000, "stream": True, "ignore_eos": True}
        data = json.dumps(body | {"logprobs": 20}).encode()
        with server.connect() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data) + data
            )
            time.sleep(0.5)
            assert server.server.models["tiny"].load == 1
            assert server.idle(15)


def test_who_goes_frees_the_slot(models):
    with running(models, slots=1, max_tokens=100_000) as server:
        for stream in (True, False):
            body = {"model": "tiny", "prompt": "x", "max_tokens": 100_000, "stream": stream, "ignore_eos": True}
            data = json.dumps(body).encode()
            with server.connect() as sock:
                sock.sendall(
                    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data)
                    + data
                )
                while not server.server.models["tiny"].batcher.scheduler.running:
                    time.sleep(0.01)
            assert server.idle(2)


def test_full_queue_is_429_and_time_is_408(models):
    with running(models, slots=1, queue=1, timeout=1.0, max_tokens=100_000) as server:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 100_000, "ignore_eos": True}
        found = []
        threads = [
            threading.Thread(target=lambda: found.append(server.ask("/v1/completions", body))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(status for status, *_ in found) == [408, 408, 429, 429]
        refused = next(f for f in found if f[0] == 429)
        assert (refused[1]["retry-after"], refused[2]["error"]["type"]) == ("1", "rate_limit_error")
        pieces = server.ask("/v1/completions", body | {"stream": True})[2]
        assert "took more than 1 s" in events(pieces)[-1]["error"]["message"]
        assert server.idle()


def test_many_clients_of_all_kinds_leave_nothing(models, served):
    """A sample of the long load: benchmarks/load.py."""
    with running(models, slots=4, queue=8, patience=2.0) as server:
        assert server.ask("/healthz")[0] == 200
        before = len(os.listdir("/proc/self/fd"))
        found = []

        def one(number):
            body = {"model": "tiny", "prompt": "x " * (1 + number % 9), "max_tokens": 6, "stream": number % 2 == 0}
            if number % 7 == 3:  # goes at once
                with server.connect() as sock:
                    data = json.dumps(body | {"stream": True}).encode()
                    sock.sendall(
                        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
                        % len(data)
                        + data
                    )
                return
            found.append(server.ask("/v1/completions", body)[0])

        threads = [threading.Thread(target=one, args=(number,)) for number in range(60)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(found) <= {200, 429}
        assert found.count(200) >= 12
        assert server.idle()
        end = time.monotonic() + 10
        while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < end:
            time.sleep(0.05)
        assert len(os.listdir("/proc/self/fd")) <= before
        steps = [thread.name for thread in threading.enumerate() if thread.name.startswith("steps of")]
        assert steps.count("steps of other") == 2  # of this server and of the fixture's


def test_random_requests_are_never_the_servers_fault(served):
    random = np.random.default_rng(0)
    values = [
        None,
        True,
        -1,
        0,
        1,
        3,
        1e308,
        "",
        "x",
        "\ud800",
        [],
        [1],
        [[1], "x"],
        {},
        {"1": 2},
        {"type": "text"},
    ]
    names = [*Serving.__dataclass_fields__, "prompt", "messages", "n", "stop", "logprobs", "stream", "temperature"]
    names += ["top_p", "top_k", "seed", "logit_bias", "max_tokens", "state", "stream_options", "priority", "min_p"]
    statuses = set()
    for number in range(250):
        body = {"model": "tiny", "prompt": "x", "max_tokens": 2}
        for name in random.choice(names, random.integers(1, 4), replace=False):
            body[str(name)] = values[random.integers(len(values))]
        data = bytearray(json.dumps(body).encode())
        if number % 3 == 0:
            data[random.integers(len(data))] = random.integers(256)
        path = ("/v1/completions", "/v1/chat/completions", "/tokenize")[number % 3]
        statuses.add(served.ask(path, bytes(data))[0])
    for _ in range(60):
        reply = served.raw(random.bytes(random.integers(1, 200)) + b"\r\n\r\n")
        statuses.add(int(reply.split()[1]) if reply else 400)
    assert {200, 400} <= statuses <= {200, 400, 404}
    assert served.idle()


# The process.


@pytest.mark.skipif("native" not in RUNNABLE, reason="no compiled operator")
def test_sigterm_lets_answers_end(bundles):
    program = [sys.executable, "-m", "dijiang", "serve", bundles / "tiny", "--port", "0", "--json-logs"]
    process = subprocess.Popen(program, stderr=subprocess.PIPE, text=True)
    try:
        lines = [process.stderr.readline() for _ in range(3)]
        assert "16 slots in" in lines[0]
        url = lines[2].removeprefix("[listening on ").rstrip("]\n")
        assert lines[1] == f"[a page for browsers: {url.removesuffix('v1')}]\n"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            stream = iter(
                client.completions.create(
                    model="tiny", prompt="x", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
                )
            )
            pieces = [next(stream)]
            process.send_signal(signal.SIGTERM)
            pieces += list(stream)
            assert len(pieces) == 400
            assert pieces[-1].choices[0].finish_reason == "length"
        assert process.wait(20) == 143
        log = [json.loads(line) for line in process.stderr.read().splitlines()]
        assert log[-1]["route"] == "/v1/completions"
        assert log[-1]["status"] == 200
    finally:
        process.kill()
        process.stderr.close()


def test_two_bundles_of_one_name_are_refused(bundles, tmp_path):
    (tmp_path / "tiny").symlink_to(bundles / "tiny")
    done = subprocess.run(
        [sys.executable, "-m", "dijiang", "serve", bundles / "tiny", bundles / "tiny"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "two bundles have the name tiny" in done.stderr


def test_beginnings_are_kept_on_disk_for_the_next_server(models, model, tmp_path):
    body = {"model": "tiny", "prompt": "x = 1\n" * 60, "max_tokens": 8, "temperature": 0}
    spared = []
    for _ in range(2):
        with running(models, slots=1, prefix_folder=str(tmp_path)) as server:
            found = server.ask("/v1/completions", body)[2]
            assert found["choices"][0]["text"] == text_of(model, body["prompt"], max_tokens=8)
            spared.append(found["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert spared[0] == 0
    assert spared[1] % 64 == 0
    assert found["usage"]["prompt_tokens"] - spared[1] <= 64


@pytest.mark.parametrize(
    ("module", "verb", "extra"), [("uvicorn", "serve", "dijiang[serve]"), ("jinja2", "chat", "dijiang[chat]")]
)
def test_missing_extra_is_one_line_that_names_it(bundles, module, verb, extra):
    code = f"import sys; sys.modules[{module!r}] = None; from dijiang.cli import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, verb, bundles / "tiny"],
        input="x\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert f"pip install '{extra}'" in done.stderr
