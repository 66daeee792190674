"""Calls of tools are read out of what a template writes, in any pieces, and grammars allow nothing else."""

import json
import random

import pytest

import dijiang
from dijiang.runtime.calls import Part, Syntax, Tool
from dijiang.runtime.chat_template import ChatTemplate
from tests.conftest import TEMPLATE, TOOLED

TOKENS = {"eos_token": "<|endoftext|>", "bos_token": "<s>"}
CALL = '{"name": "{{ c.function.name }}", "%s": {{ c.function.arguments | tojson }}}'
LOOP = "{% for c in m.tool_calls or [] %}"
HEAD = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}@{{ m.role }}\n"
TAIL = "{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}@assistant\n{% endif %}"
ONE = (
    "{% if m.tool_calls and m.tool_calls | length > 1 %}{{ raise_exception('one call at once') }}{% endif %}"
    f"{LOOP}{CALL % 'parameters'}{{% endfor %}}"
)
WIDE = (", ", ": ")
#: In the manner of published models.
FORMS = {
    "tagged": (
        f"{HEAD}{LOOP}{{{{ '<call>\\n' }}}}{CALL % 'arguments'}{{{{ '\\n</call>' }}}}"
        "{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}" + TAIL,
        Syntax('<call>\n{"name": "', '", "arguments": ', '}\n</call>\n<call>\n{"name": "', "}\n</call>", WIDE),
    ),
    "short": (TOOLED, Syntax("(", ": ", ")(", ")", WIDE)),
    "list": (
        f"{HEAD}{{% if m.tool_calls %}}CALLS [{{% endif %}}{LOOP}{CALL % 'arguments'}"
        "{% if not loop.last %}, {% endif %}{% endfor %}{% if m.tool_calls %}]{% endif %}" + TAIL,
        Syntax('CALLS [{"name": "', '", "arguments": ', '}, {"name": "', "}]", WIDE),
    ),
    "bare, one at once": (HEAD + ONE + TAIL, Syntax('{"name": "', '", "parameters": ', None, "}", WIDE)),
    "narrow": (
        HEAD + LOOP + "<f={{ c.function.name }}>{{ c.function.arguments | tojson(separators=(',', ':')) }}</f>"
        "{% endfor %}" + TAIL,
        Syntax("<f=", ">", "</f><f=", "</f>", (",", ":")),
    ),
}
CITY = {"type": "string", "maxLength": 5}
WEATHER = Tool("weather", {"type": "object", "properties": {"city": CITY}, "required": ["city"]})
CLOCK = Tool("clock", {"type": "object", "properties": {}, "additionalProperties": False})


@pytest.fixture(scope="module")
def model(exported):
    return dijiang.load(exported("tiny-python"), threads=1)


def learnt(source, model):
    return Syntax.learn(ChatTemplate(source, TOKENS), model.tokenizer, model.spec.eos_token_ids)


@pytest.mark.parametrize("form", FORMS)
def test_syntax_is_that_of_the_template(model, form):
    source, expected = FORMS[form]
    assert learnt(source, model) == expected


REFUSED = {
    "no tools": (TEMPLATE, "the chat template knows no tools"),
    "calls are left out": (HEAD + TAIL, "does not write a call of a tool as text around its name and its JSON"),
    "tags for each argument": (
        HEAD + LOOP + "<{{ c.function.name }}>{% for k, v in c.function.arguments | items %}<{{ k }}>{{ v }}"
        "{% endfor %}{% endfor %}" + TAIL,
        "does not write a call",
    ),
    "ids": (HEAD + LOOP + "{{ c.id }}" + CALL % "a" + "{% endfor %}" + TAIL, "does not write a call"),
    "a special token": (
        HEAD + LOOP + "{{ eos_token }}" + CALL % "a" + "{% endfor %}" + TAIL,
        r"with the special token <\|endoftext\|>",
    ),
    "no call is taken": (HEAD + "{% if m.tool_calls %}{{ raise_exception('none') }}{% endif %}" + TAIL, "refuses"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_template_that_writes_calls_otherwise_is_refused(model, case):
    source, reason = REFUSED[case]
    with pytest.raises(dijiang.InputError, match=reason) as error:
        learnt(source, model)
    assert "\n" not in str(error.value)


def written(syntax, said, calls):
    parts = [name + syntax.between + json.dumps(given, separators=syntax.spacing) for name, given in calls]
    return said + syntax.opening + (syntax.joint or "").join(parts) + syntax.closing if calls else said


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("said", ["", "Let me see. ", "<ca<call", '{"nam', "x <f"])
def test_reader_gives_what_was_called_in_any_pieces(form, said):
    syntax, random_ = FORMS[form][1], random.Random(1)
    calls = [("weather", {"city": 'a"}\\ {[', "deep": [{"x": ["]}"]}]}), ("clock", {}), ("f-2_", {"é": None})]
    for count in range(1 if syntax.joint is None else 3, -1, -1):
        text = written(syntax, said, calls[:count])
        for _ in range(40):
            reader, at, parts = syntax.reader(), 0, []
            while at < len(text):
                size = random_.randint(1, 9)
                parts += reader.push(text[at : at + size], last=at + size >= len(text))
                at += size
            assert "".join(part.text for part in parts if part.call is None) == said
            names = [part.name for part in parts if part.name is not None]
            given = ["".join(part.text for part in parts if part.call == at) for at in range(count)]
            assert [(n, json.loads(g)) for n, g in zip(names, given, strict=True)] == calls[:count]
            assert reader.calls == count


def allows(model, grammar, text):
    """Whether a text, and then its end, are of a grammar."""
    matcher = grammar.begin()
    for token in model.tokenizer.encode(text):
        if not matcher.allowed()[token]:
            return False
        matcher.take(token)
    return bool(matcher.allowed()[0])


def test_reader_holds_nothing_back_that_is_no_call():
    reader = FORMS["tagged"][1].reader()
    assert reader.push("a <cal") == [Part("a ")]
    assert reader.push("m") == [Part("<calm")]
    assert reader.push("<call") == []
    assert reader.push("", last=True) == [Part("<call")]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("said", ["", '{"a": "OPENING"}', "x"])
def test_reader_of_a_call_alone_takes_no_text_for_one(form, said):
    """What is said holds the opening of a call: it is none, but at the start."""
    syntax, random_ = FORMS[form][1], random.Random(1)
    said = said.replace("OPENING", syntax.opening)
    text = said or written(syntax, "", [("weather", {"city": "Oslo"})])
    for _ in range(40):
        reader, at, parts = syntax.reader(alone=True), 0, []
        while at < len(text):
            size = random_.randint(1, 9)
            parts += reader.push(text[at : at + size], last=at + size >= len(text))
            at += size
        if syntax.opening.startswith("{") and said.startswith("{"):
            continue  # refused, see below
        assert "".join(part.text for part in parts if part.call is None) == said
        assert reader.calls == (not said)


@pytest.mark.parametrize("form", FORMS)
def test_grammar_allows_a_call_or_an_answer_of_its_schema(model, form):
    syntax, answer = FORMS[form][1], {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    schema, options = answer | {"additionalProperties": False}, {"several": True}
    if syntax.opening.startswith("{"):
        with pytest.raises(dijiang.InputError, match="begins a call as JSON begins"):
            syntax.grammar([CLOCK], must=False, schema=schema, **options)
    else:
        grammar = model.grammar(syntax.grammar([CLOCK], must=False, schema=schema, **options))
        call = written(syntax, "", [("clock", {})])
        assert [allows(model, grammar, text) for text in ('{"n":3}', call)] == [True, True]
        for wrong in ("plain", '{"n":"x"}', '{"n":3}' + call, "I say: " + call):
            assert not allows(model, grammar, wrong)
    only = model.grammar(syntax.grammar([CLOCK], must=True, schema=schema, **options))
    assert not allows(model, only, '{"n":3}')
    assert allows(model, only, written(syntax, "", [("clock", {})]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("must", [True, False], ids=["must", "may"])
def test_grammar_allows_calls_of_the_schema_alone(model, form, must):
    syntax = FORMS[form][1]
    grammar = model.grammar(syntax.grammar([WEATHER, CLOCK], must=must, several=True))

    def allowed(text):
        return allows(model, grammar, text)

    assert allowed(written(syntax, "", [("weather", {"city": "Oslo"})]))
    assert allowed(written(syntax, "", [("clock", {}), ("weather", {"city": ""})])) == (syntax.joint is not None)
    assert allowed(written(syntax, "I say: ", [("clock", {})])) == (not must)
    assert allowed("plain text") == (not must)
    for wrong in ([("weather", {})], [("weather", {"city": "too long"})], [("clock", {"a": 1})], [("other", {})]):
        assert not allowed(written(syntax, "", wrong))
    single = model.grammar(syntax.grammar([CLOCK], must=must, several=False)).begin()
    for token in model.tokenizer.encode(written(syntax, "", [("clock", {})])):
        assert single.allowed()[token]
        single.take(token)
    assert single.allowed().sum() == 1
