"""What is refused: requests, pages, keys, addresses and sizes."""

import codecs
import gc
import gzip
import json
import threading
import time

import numpy as np
import openai
import pytest

import dijiang
from dijiang.batching.turn import Turn
from dijiang.runtime.grammar import Matcher
from dijiang.server.settings import Serving
from dijiang.server.unserved import UNSERVED
from tests.server.serving import running

REFUSED = {
    "no model": ({"prompt": "x"}, 400, "model"),
    "unknown model": ({"model": "none", "prompt": "x"}, 404, "model"),
    "no prompt": ({"model": "tiny"}, 400, "prompt"),
    "empty prompt": ({"model": "tiny", "prompt": ""}, 400, "prompt"),
    "prompt of numbers": ({"model": "tiny", "prompt": [1.5]}, 400, "prompt"),
    "prompt of booleans": ({"model": "tiny", "prompt": [True]}, 400, "prompt"),
    "mixed prompt": ({"model": "tiny", "prompt": ["x", 3]}, 400, "prompt"),
    "id out of range": ({"model": "tiny", "prompt": [10**6]}, 400, "prompt"),
    "surrogate": ({"model": "tiny", "prompt": "\ud800"}, 400, "prompt"),
    "surrogate in a name": ({"model": "\ud800", "prompt": "x"}, 404, "model"),
    "hot": ({"model": "tiny", "prompt": "x", "temperature": 1e9}, 400, "temperature"),
    "text for a number": ({"model": "tiny", "prompt": "x", "top_p": "x"}, 400, "top_p"),
    "boolean for a number": ({"model": "tiny", "prompt": "x", "max_tokens": True}, 400, "max_tokens"),
    "too many tokens": ({"model": "tiny", "prompt": "x", "max_tokens": 10**6}, 400, "max_tokens"),
    "no tokens": ({"model": "tiny", "prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
    "bias beyond floats": ({"model": "tiny", "prompt": "x", "logit_bias": {"5": 10**400}}, 400, "logit_bias"),
    "bias that is no number": ({"model": "tiny", "prompt": "x", "logit_bias": {"5": "1"}}, 400, "logit_bias"),
    "many choices": ({"model": "tiny", "prompt": "x", "n": 99}, 400, "n"),
    "no tokens by the other name": (
        {"model": "tiny", "prompt": "x", "max_completion_tokens": 0},
        400,
        "max_completion_tokens",
    ),
    "many stops": ({"model": "tiny", "prompt": "x", "stop": list("abcde") * 13}, 400, "stop"),
    "stop token of no token": ({"model": "tiny", "prompt": "x", "stop_token_ids": [99999]}, 400, "stop_tokens"),
    "empty stop": ({"model": "tiny", "prompt": "x", "stop": [""]}, 400, "stop"),
    "stop of numbers": ({"model": "tiny", "prompt": "x", "stop": [1]}, 400, "stop"),
    "seed": ({"model": "tiny", "prompt": "x", "seed": 2**64}, 400, "seed"),
    "bias of words": ({"model": "tiny", "prompt": "x", "logit_bias": {"a": 1}}, 400, "logit_bias"),
    "bias out of range": ({"model": "tiny", "prompt": "x", "logit_bias": {"1": 1e9}}, 400, "logit_bias"),
    "bias of no token": ({"model": "tiny", "prompt": "x", "logit_bias": {"99999": 1}}, 400, "logit_bias"),
    "stream of text": ({"model": "tiny", "prompt": "x", "stream": "yes"}, 400, "stream"),
    "penalty": ({"model": "tiny", "prompt": "x", "presence_penalty": 2.5}, 400, "presence_penalty"),
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
    "rules of vLLM": ({"model": "tiny", "prompt": "x", "guided_json": {}}, 400, "guided_json"),
    "rules of llama.cpp": ({"model": "tiny", "prompt": "x", "grammar": "root ::= x"}, 400, "grammar"),
    "best of more": ({"model": "tiny", "prompt": "x", "best_of": 3, "n": 2}, 400, "best_of"),
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


#: Values of fields that "something" would not change.
OTHER = {"functions": [{}], "modalities": ["audio"], "best_of": 2, "add_special_tokens": False}


@pytest.mark.parametrize("name", [*UNSERVED, "add_special_tokens"])
def test_field_that_would_change_the_answer_is_refused_and_never_ignored(served, name):
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
    status, _, found = served.ask("/v1/completions", body | {name: OTHER.get(name, "something")})
    assert (status, found["error"]["param"], found["error"]["code"]) == (400, name, "unsupported_parameter")
    for same in UNSERVED.get(name, (None, True)):
        assert served.ask("/v1/completions", body | {name: same})[0] == 200


def test_least_tokens_are_taken_where_nothing_ends_an_answer_earlier(served):
    """As tools that measure send it."""
    body = {"model": "tiny", "prompt": "x", "max_tokens": 3, "min_tokens": 3}
    assert served.ask("/v1/completions", body | {"ignore_eos": True})[0] == 200
    for more in ({}, {"ignore_eos": True, "stop": "a"}, {"ignore_eos": True, "stop_token_ids": [5]}):
        assert served.ask("/v1/completions", body | more)[0] == 400


def test_bounds_that_are_told_are_the_servers(served):
    for name, value, bounds in (
        ("max_tokens", 10**9, "from 1 to 4096"),
        ("max_completion_tokens", 0, "from 1 to 4096"),
        ("seed", 2**64, f"from {-(2**63)} to {2**64 - 1}"),
        ("seed", -(2**63) - 1, f"from {-(2**63)} to {2**64 - 1}"),
    ):
        _, _, found = served.ask("/v1/completions", {"model": "tiny", "prompt": "x", name: value})
        assert found["error"]["message"] == f"{name} is {value}, expected a whole number {bounds}"


def test_stops_of_evaluation_tasks_are_taken(served):
    stops = [f"never {at}" for at in range(63)] + ["\n"]
    body = {"model": "tiny", "prompt": "def main(", "max_tokens": 200, "temperature": 0, "stop": stops}
    _, _, found = served.ask("/v1/completions", body)
    assert found["choices"][0]["finish_reason"] == "stop"
    assert "\n" not in found["choices"][0]["text"]


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


@pytest.mark.parametrize(
    "path", ["/v1/responses", "/v1/embeddings", "/v1/v1/chat/completions", "/chat/completions"]
)
def test_address_that_is_not_there_says_what_is(served, caplog, path):
    with caplog.at_level("INFO", logger="dijiang.server"):
        status, _, found = served.ask(path, {"model": "tiny", "input": "x"})
    error = found["error"]
    assert (status, error["type"], error["param"]) == (404, "invalid_request_error", None)
    for part in (f"POST '{path}'", "POST /v1/completions", "POST /v1/chat/completions", "GET /v1/models;"):
        assert part in error["message"]
    lines = [json.loads(record.message) for record in caplog.records]
    assert [line["status"] for line in lines if line["route"] == path] == [404]


def test_method_that_is_not_there(served):
    status, headers, found = served.ask("/v1/completions")
    assert (status, headers["allow"], found["error"]["type"]) == (405, "post", "invalid_request_error")
    assert "expected POST" in found["error"]["message"]


def test_what_was_refused_by_its_address_is_counted(served):
    def counted(route, status):
        name = f'dijiang_requests_total{{route="{route}",status="{status}"}} '
        lines = served.ask("/metrics")[2].splitlines()
        return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))

    kinds = [("other", 404), ("/v1/completions", 405)]
    before = [counted(*kind) for kind in kinds]
    for path in ("/v1/responses", "/wp-login.php", "/v1/completions"):
        served.ask(path)
    assert [counted(*kind) - had for kind, had in zip(kinds, before, strict=True)] == [2, 1]


def test_models_at_an_address_that_ends_with_a_slash(served):
    assert served.ask("/v1/models/")[2] == served.ask("/v1/models")[2]
    assert served.ask("/v1/models/tiny/")[2] == served.ask("/v1/models/tiny")[2]


def test_bodies_as_clients_encode_them(served):
    body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 1}).encode()
    assert served.ask("/v1/completions", codecs.BOM_UTF8 + body)[0] == 200  # as files of Windows begin
    status, _, found = served.ask("/v1/completions", gzip.compress(body), headers=["Content-Encoding: gzip"])
    assert (status, found["error"]["type"]) == (415, "invalid_request_error")
    assert "gzip" in found["error"]["message"]
    assert served.idle()


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
    for key in ("secret\n", " ", "sécret"):
        with pytest.raises(dijiang.InputError, match="what no client can send in a header"):
            Serving(host=host).require_safe(key)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"prefix_folder": "a", "prefix_memory": 0}, "a would keep nothing: prefix_memory is 0"),
        ({"prefix_folder": "a", "conversation_folder": "./a"}, "each would remove files of the other"),
    ],
)
def test_folders_that_keep_nothing_are_refused(options, reason):
    with pytest.raises(dijiang.InputError, match=reason):
        Serving(**options)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_needs_none(host):
    Serving(host=host).require_safe(None)


def test_body_and_prompt_have_limits(models):
    with running(models, max_body=2000, max_prompt=50, slots=1) as server:
        body = {"model": "tiny", "prompt": "x " * 60}
        assert server.ask("/v1/completions", body)[2]["error"]["code"] == "context_length_exceeded"
        assert server.ask("/v1/completions", {"model": "tiny", "prompt": "x" * 3000})[0] == 413
        chunked = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert b" 413 " in server.raw(
            chunked + b"7d0\r\n" + b"x" * 2000 + b"\r\n7d0\r\n" + b"x" * 2000 + b"\r\n0\r\n\r\n"
        )


def test_fault_of_ours_is_counted_as_one(models, monkeypatch):
    with running(models, slots=1) as server:
        monkeypatch.setattr(server.server, "_hosted", lambda body: 1 / 0)
        assert server.ask("/v1/completions", {"model": "tiny", "prompt": "x"})[0] == 500
        assert 'status="500"} 1' in server.ask("/metrics")[2]


def test_more_choices_than_there_are_places_is_not_for_later(models):
    with running(models, slots=2, queue=1) as server:
        status, headers, found = server.ask("/v1/completions", {"model": "tiny", "prompt": "x", "n": 4})
        assert (status, found["error"]["param"]) == (400, "n")
        assert "Retry-After" not in headers
        assert server.ask("/v1/completions", {"model": "tiny", "prompt": "x", "n": 3, "max_tokens": 2})[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_schema_that_fails_on_its_way_is_the_clients_error(models, stream):
    """`$ref` to itself compiles, and has no text."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}
    with running(models, slots=1) as server:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "response_format": form}
        found = json.dumps(server.ask("/v1/chat/completions", body | {"stream": stream, "max_tokens": 3})[2])
        assert "invalid_request_error" in found


@pytest.mark.parametrize("stream", [False, True])
def test_refused_request_leaves_nothing_behind(models, stream):
    """Without Python's collector of cycles, which comes seldom: a compiled schema may have many megabytes."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "response_format": form}

    def alive():
        return sum(type(one) in (Turn, Matcher) for one in gc.get_objects())

    with running(models, slots=2) as server:
        gc.collect()
        gc.disable()
        try:
            for _ in range(5):
                server.ask("/v1/chat/completions", body | {"stream": stream, "max_tokens": 3})
            ends = time.monotonic() + 10
            while alive() and time.monotonic() < ends:
                time.sleep(0.05)
            assert alive() == 0
        finally:
            gc.enable()


def test_priority_is_for_clients_that_trust_each_other(served, models):
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
    status, _, found = served.ask("/v1/completions", body | {"priority": -1})
    assert (status, found["error"]["param"]) == (400, "priority")
    assert served.ask("/v1/completions", body | {"priority": 0})[0] == 200
    with running(models, slots=1, priorities=True) as server:
        assert server.ask("/v1/completions", body | {"priority": -1})[0] == 200


def test_beginnings_of_another_salt_are_not_found(models):
    def known(salt):
        body = {"model": "tiny", "prompt": list(range(5, 205)), "max_tokens": 1} | salt
        return server.ask("/v1/completions", body)[2]["usage"]["prompt_tokens_details"]["cached_tokens"]

    with running(models, slots=1) as server:
        salts = ({}, {"cache_salt": "a"}, {"cache_salt": "b"})
        assert [known(salt) for salt in salts] == [0, 0, 0]
        assert [known(salt) for salt in salts] == [192, 192, 192]


def test_schema_has_a_size(served):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["x" * 100_000]}}}
    body = {"model": "tiny", "prompt": "x", "response_format": form}
    status, _, found = served.ask("/v1/completions", body)
    assert (status, "characters, expected at most 100,000" in found["error"]["message"]) == (400, True)
    form["json_schema"]["schema"] = {"enum": ["x"], "description": "y" * 200_000, "title": "z" * 200_000}
    assert served.ask("/v1/completions", body | {"max_tokens": 2})[0] == 200  # what is for people costs nothing


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


def test_body_in_pieces_has_the_limit_of_all(models):
    with running(models, max_body=5000) as server, server.connect() as sock:
        sock.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(6):
            sock.sendall(b"3e8\r\n" + b" " * 1000 + b"\r\n")
            time.sleep(0.05)
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 413 ")


def test_prompt_of_the_largest_size_and_one_more(models):
    with running(models, max_prompt=5) as server:
        body = {"model": "tiny", "max_tokens": 1}
        assert [server.ask("/v1/completions", body | {"prompt": [3] * n})[0] for n in (5, 6)] == [200, 400]


def test_choices_that_find_no_places_together_wait(models):
    with running(models, slots=1, queue=2, max_tokens=100_000, timeout=1.0) as server:
        body = {"model": "tiny", "prompt": "x", "ignore_eos": True}
        long = threading.Thread(target=lambda: server.ask("/v1/completions", body | {"max_tokens": 100_000}))
        long.start()
        while not server.server.models["tiny"].load:
            time.sleep(0.01)
        assert server.ask("/v1/completions", body | {"n": 3, "max_tokens": 1})[0] == 429  # 1 + 3 of 3 places
        long.join()


def test_seconds_to_the_first_token(models):
    with running(models, slots=2) as server:
        started = time.monotonic()
        for _ in range(3):
            server.ask("/v1/completions", {"model": "tiny", "prompt": "x = 1\n" * 20, "max_tokens": 2})
        elapsed = time.monotonic() - started
        lines = server.ask("/metrics")[2].splitlines()
    found = dict(line.rsplit(" ", 1) for line in lines if line.startswith("dijiang_first_token_seconds_"))
    assert float(found['dijiang_first_token_seconds_count{model="tiny"}']) == 3
    assert 0 < float(found['dijiang_first_token_seconds_sum{model="tiny"}']) < elapsed
