"""`tools` as the official package sends them and reads the calls."""

import json

import jsonschema
import openai
import pytest

from dijiang.runtime.calls import Tool, described
from dijiang.runtime.chat_template import ChatTemplate

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "days": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "clock"}},
]
ASKED = [{"role": "user", "content": "x"}]
OPTIONS = {"model": "tooled", "messages": ASKED, "tools": TOOLS, "max_tokens": 300, "seed": 3}


def checked(calls):
    for call in calls:
        assert call.type == "function"
        assert call.function.name in ("weather", "clock")
        given = json.loads(call.function.arguments)
        if call.function.name == "weather":
            jsonschema.validate(given, SCHEMA)
        else:
            assert given == {}
    assert len({call.id for call in calls}) == len(calls)
    return [(call.function.name, call.function.arguments) for call in calls]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_tool_that_has_to_be_called_is_called(client, choice):
    found = client.chat.completions.create(**OPTIONS, n=3, tool_choice=choice, parallel_tool_calls=False)
    for answer in found.choices:
        assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
        (call,) = checked(answer.message.tool_calls)
        assert choice == "required" or call[0] == "weather"


@pytest.mark.parametrize("stream", [False, True])
def test_call_that_a_stop_string_cut_is_no_call_to_carry_out(client, stream):
    tool = {"type": "function", "function": {"name": "weather"}}
    found = client.chat.completions.create(
        **OPTIONS, tool_choice=tool, parallel_tool_calls=False, stop=['"days"'], stream=stream
    )
    last = list(found)[-1] if stream else found
    assert last.choices[0].finish_reason == "stop"


def test_stream_tells_the_same_calls(client):
    bias = {str(client_id): 4 for client_id in range(20)}  # another text than without
    options = OPTIONS | {"tool_choice": "required", "logit_bias": bias}
    whole = client.chat.completions.create(**options).choices[0]
    pieces = list(client.chat.completions.create(**options, stream=True))
    calls = {}
    for piece in pieces:
        deltas = piece.choices[0].delta.tool_calls or []
        assert len({delta.index for delta in deltas}) == len(deltas)  # instructor reads the first one only
        for delta in deltas:
            if delta.index not in calls:
                assert delta.id
                calls[delta.index] = [delta.function.name, ""]
            calls[delta.index][1] += delta.function.arguments
    assert [tuple(call) for call in calls.values()] == checked(whole.message.tool_calls)
    assert pieces[-1].choices[0].finish_reason == whole.finish_reason == "tool_calls"
    assert sum(bool(piece.choices[0].delta.tool_calls) for piece in pieces) > 2  # arguments come as they are made
    with client.chat.completions.stream(**options) as stream:  # the package puts them together by itself
        final = stream.get_final_completion().choices[0]
    assert [(c.function.name, c.function.arguments) for c in final.message.tool_calls] == [
        tuple(call) for call in calls.values()
    ]


def test_tool_that_may_be_called_need_not_be(client, models):
    """The model's own text, where nothing leads to a call; a call, where the text begins one."""
    auto = client.chat.completions.create(**OPTIONS | {"max_tokens": 20, "temperature": 0}).choices[0]
    assert auto.message.tool_calls is None
    assert auto.finish_reason in ("length", "stop")
    (opening,) = models["tooled"].tokenizer.encode("(")
    begun = OPTIONS | {"logit_bias": {str(opening): 6}, "parallel_tool_calls": False}
    found = client.chat.completions.create(**begun, n=8).choices
    called = [answer for answer in found if answer.finish_reason == "tool_calls"]
    assert len([answer for answer in called if answer.message.content]) > 2  # text, and then a call
    for answer in called:
        checked(answer.message.tool_calls)
        assert "(" not in (answer.message.content or "")
    none = client.chat.completions.create(**OPTIONS | {"max_tokens": 20, "temperature": 0}, tool_choice="none")
    plain = client.chat.completions.create(model="tooled", messages=ASKED, max_tokens=20, temperature=0)
    assert none.choices[0].message.content == plain.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_tools_beside_a_schema_of_the_answer(client, models, stream):
    """openai-agents, pydantic-ai and the AI SDK send both: the answer is a call, or JSON of the schema."""
    (opening,) = models["tooled"].tokenizer.encode("(")
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    options = OPTIONS | {"response_format": form, "parallel_tool_calls": False}
    seen = set()
    for bias in (-100, 100):
        asked = options | {"logit_bias": {str(opening): bias}}
        if stream:
            with client.chat.completions.stream(**asked) as pieces:
                found = pieces.get_final_completion().choices[0]
        else:
            found = client.chat.completions.create(**asked).choices[0]
        seen.add(found.finish_reason)
        if found.message.tool_calls:
            assert not found.message.content
            checked(found.message.tool_calls)
        else:
            jsonschema.validate(json.loads(found.message.content), SCHEMA)
    assert seen == {"tool_calls", "stop"}
    must = client.chat.completions.create(**options, tool_choice="required").choices[0]
    assert must.finish_reason == "tool_calls"


def test_calls_and_results_of_before_are_rendered(client, models):
    given = {"city": "Rome", "days": 1}
    calls = [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": json.dumps(given)}}]
    messages = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    found = client.chat.completions.create(**OPTIONS | {"messages": messages, "max_tokens": 2})
    parsed = [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": given}}]
    known = [*ASKED, {"role": "assistant", "content": "", "tool_calls": parsed}, messages[2]]
    tools = [
        Tool("weather", SCHEMA, "Of a city."),
        Tool("clock", {"type": "object", "properties": {}, "additionalProperties": False}),
    ]
    text = ChatTemplate.of(models["tooled"].bundle).render(known, tools=[described(tool) for tool in tools])
    assert '(weather: {"city": "Rome", "days": 1})' in text
    assert found.usage.prompt_tokens == len(models["tooled"].tokenizer.as_it_stands(text))


def test_call_of_before_without_arguments(client):
    call = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    counts = set()
    for arguments in ("{}", ""):
        made = [call | {"function": {"name": "clock", "arguments": arguments}}]
        messages = [*ASKED, {"role": "assistant", "tool_calls": made}, {"role": "tool", "content": "12"}]
        found = client.chat.completions.create(**OPTIONS | {"messages": messages, "max_tokens": 1})
        counts.add(found.usage.prompt_tokens)
    assert len(counts) == 1


def test_call_of_before_that_was_cut_is_shown_as_it_was(client, models):
    """An agent sends it back with the tool's complaint, so that the model calls again."""
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ro'}}
    messages = [
        *ASKED,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "malformed"},
    ]
    found = client.chat.completions.create(**OPTIONS | {"messages": messages, "tools": [], "max_tokens": 1})
    known = [*ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}, messages[2]]
    text = ChatTemplate.of(models["tooled"].bundle).render(known)
    assert r'(weather: "{\"city\": \"Ro")' in text
    assert found.usage.prompt_tokens == len(models["tooled"].tokenizer.as_it_stands(text))


def test_schema_that_does_not_compile_names_its_function(client):
    bad = {"function": {"name": "second", "parameters": {"properties": {"x": {"type": "nope"}}}}}
    with pytest.raises(openai.BadRequestError, match="the function second: the schema does not compile") as error:
        client.chat.completions.create(**OPTIONS | {"tools": [TOOLS[1], bad]})
    assert "clock" not in error.value.body["message"]


def test_what_python_types_say_beside_is_no_hindrance(client):
    """As pydantic writes paths, bytes and secrets: JSON Schema lets unknown formats say nothing."""
    remarks = {"format": "path", "uniqueItems": False}
    schema = {
        "type": "object",
        "properties": {"format": {"type": "string", "maxLength": 3} | remarks, "n": {"enum": [{"format": "path"}]}},
        "required": ["format", "n"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    found = client.chat.completions.create(**OPTIONS | {"tools": [tool], "tool_choice": "required"})
    given = json.loads(found.choices[0].message.tool_calls[0].function.arguments)
    assert given.keys() == {"format", "n"}
    assert given["n"] == {"format": "path"}


REFUSED = {
    "no function": ({"tools": [{"type": "retrieval"}]}, "tools[0]"),
    "bad name": ({"tools": [{"function": {"name": "a b"}}]}, "tools[0]"),
    "bad schema": ({"tools": [{"function": {"name": "a", "parameters": {"properties": 3}}}]}, "tools"),
    "schema of a list": ({"tools": [{"function": {"name": "a", "parameters": {"type": "array"}}}]}, "tools[0]"),
    "two of a name": ({"tools": [TOOLS[1], TOOLS[1]]}, "tools"),
    "many": ({"tools": [{"function": {"name": f"f{i}"}} for i in range(129)]}, "tools"),
    "unknown choice": ({"tool_choice": "maybe"}, "tool_choice"),
    "choice of another": ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    "choice without tools": ({"tools": [], "tool_choice": "required"}, "tool_choice"),
    "with a bad format": ({"response_format": {"type": "xml"}}, "response_format"),
    "past calls": ({"messages": [{"role": "assistant", "tool_calls": [3]}]}, "messages[0]"),
    "past arguments": (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": 3}}]}]},
        "messages[0]",
    ),
    "template without tools": ({"model": "tiny"}, "tools"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_tools_are_one_error(client, served, case):
    changed, param = REFUSED[case]
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**OPTIONS | changed)
    assert error.value.body["param"] == param
    assert "\n" not in error.value.body["message"]
    assert served.idle()
