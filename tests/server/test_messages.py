"""What messages of a chat say, and how the last one is gone on with."""

import pytest

from dijiang.runtime.chat_template import ChatTemplate

USER, IMAGE = {"role": "user", "content": "x"}, {"type": "image_url", "image_url": {"url": "data:"}}
TEXT, REFUSAL = {"type": "text", "text": "yes"}, {"type": "refusal", "refusal": " no"}


def asked(served, *messages, **options):
    body = {"model": "tiny", "messages": messages, "max_tokens": 1} | options
    status, _, found = served.ask("/v1/chat/completions", body)
    return status, found


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ({"content": [TEXT]}, "yes"),
        ({"content": [TEXT, REFUSAL]}, "yes no"),
        ({"content": None, "refusal": "no"}, "no"),
        ({"refusal": "no"}, "no"),
        ({"content": None}, ""),
        ({"content": []}, ""),
    ],
)
def test_what_an_answer_said_is_kept(served, models, said, text):
    status, found = asked(served, USER, {"role": "assistant"} | said)
    assert status == 200
    rendered = ChatTemplate.of(models["tiny"].bundle).render([USER, {"role": "assistant", "content": text}])
    assert found["usage"]["prompt_tokens"] == len(models["tiny"].tokenizer.as_it_stands(rendered))


@pytest.mark.parametrize(
    ("said", "param"),
    [
        ({"content": [TEXT, IMAGE]}, "messages[1]"),
        ({"content": [IMAGE]}, "messages[1]"),
        ({"content": [TEXT, 3]}, "messages[1]"),
        ({"content": 3}, "messages[1]"),
        ({}, "messages[1]"),
        ({"content": None, "function_call": {"name": "f", "arguments": "{}"}}, "messages[1].function_call"),
        ({"content": None, "audio": {"id": "a"}}, "messages[1].audio"),
    ],
)
def test_what_an_answer_said_is_never_left_out(served, said, param):
    status, found = asked(served, USER, {"role": "assistant"} | said)
    assert (status, found["error"]["param"]) == (400, param)


def test_last_message_is_gone_on_with(served, models):
    model, begun = models["tiny"], {"role": "assistant", "content": " def foo("}
    head = ChatTemplate.of(model.bundle).render([USER])
    ids = model.tokenizer.as_it_stands(head + " def foo(")
    expected = "".join(record.text for record in model.generate(ids, max_tokens=8))
    options = {"max_tokens": 8, "temperature": 0, "continue_final_message": True}
    for more in ({}, {"add_generation_prompt": False}):
        status, found = asked(served, USER, begun, **options | more)
        assert status == 200
        assert found["choices"][0]["message"]["content"] == expected


def test_answer_need_not_begin_as_the_template_says(served, models):
    _, found = asked(served, USER, add_generation_prompt=False)
    text = ChatTemplate.of(models["tiny"].bundle).render([USER], answer=False)
    assert found["usage"]["prompt_tokens"] == len(models["tiny"].tokenizer.as_it_stands(text))


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
        ({"continue_final_message": True, "response_format": {"type": "json_object"}}, "continue_final_message"),
        ({"continue_final_message": True, "previous_response_id": "x"}, "continue_final_message"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": 3}, "chat_template_kwargs"),
        ({"add_special_tokens": True}, "add_special_tokens"),
    ],
)
def test_what_does_not_go_together_is_refused(served, options, param):
    status, found = asked(served, USER, {"role": "assistant", "content": "x"}, **options)
    assert (status, found["error"]["param"]) == (400, param)


def test_empty_message_cannot_be_gone_on_with(served):
    status, found = asked(served, USER, {"role": "assistant", "content": ""}, continue_final_message=True)
    assert (status, found["error"]["message"][:17]) == (400, "the chat template")


def test_variables_reach_the_template():
    template = ChatTemplate("{{ messages[0].content }}{% if not thinks %}<no thoughts>{% endif %}", {})
    assert template.render([USER]) == "x<no thoughts>"
    assert template.render([USER], variables={"thinks": True}) == "x"


def test_variables_of_a_request_reach_the_template(served):
    plain, given = (
        asked(served, USER, chat_template_kwargs=kwargs)[1]["usage"]["prompt_tokens"]
        for kwargs in ({}, {"eos_token": "much longer than a token"})
    )
    assert plain == given  # the checkpoint's own tokens are not changed
