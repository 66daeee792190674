"""/openapi.json says what the server takes; and a sample of `make malformed`."""

import jsonschema
import pytest
from malformed import measured

from dijiang.server.fields import CHAT, COMPLETION, options
from dijiang.server.openapi import document
from dijiang.server.unserved import UNSERVED


@pytest.mark.samples
def test_server_fails_on_no_request(chatty):
    report = measured(chatty, 400, cases=5)
    assert report["found"] == "", report["found"]
    assert (report["server_errors"], report["tracebacks"], report["alive"]) == (0, 0, True)
    assert report["answers"] >= 400
    assert {"200", "400"} <= set(report["statuses"])


def test_every_field_that_is_read_is_told():
    told = document(["tiny"])["paths"]
    for path, table in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        schema = told[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert set(schema["properties"]) == set(table) | set(options())
        assert not set(schema["properties"]) & set(UNSERVED)
        jsonschema.Draft202012Validator.check_schema(schema)


CASES = {
    "good": ({"n": 2, "temperature": 0.5, "stop": "x", "logprobs": 3, "seed": None}, True),
    "n": ({"n": 17}, False),
    "temperature": ({"temperature": -1}, False),
    "stop": ({"stop": [1]}, False),
    "stream": ({"stream": "yes"}, False),
    "logprobs": ({"logprobs": 21}, False),
    "bias": ({"logit_bias": {"3": 101}}, False),
    "penalty": ({"frequency_penalty": 2.1}, False),
}


@pytest.mark.parametrize("case", CASES)
def test_document_and_server_agree(served, case):
    fields, good = CASES[case]
    body = {"model": "tiny", "prompt": "x", "max_tokens": 2} | fields
    told = served.ask("/openapi.json")[2]["paths"]["/v1/completions"]["post"]
    schema = told["requestBody"]["content"]["application/json"]["schema"]
    assert jsonschema.Draft202012Validator(schema).is_valid(body) == good
    assert served.ask("/v1/completions", body)[0] == (200 if good else 400)
