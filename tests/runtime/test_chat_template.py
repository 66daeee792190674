"""Chat templates give what transformers makes of them; hostile ones give one line."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

import dijiang
from dijiang.runtime import renderer, sandbox
from dijiang.runtime.chat_template import ChatTemplate, continued
from dijiang.runtime.snapshot import Seam
from tests.conftest import EXAMPLES, TEMPLATE
from tests.random_tokenizers import tokenizer as tokenizer_of

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
#: In the manner of published models: what their templates use of Jinja.
TEMPLATES = {
    "plain": TEMPLATE,
    "marked turns": (
        "{%- for message in messages %}\n"
        "    {%- if loop.first and message['role'] != 'system' %}\n"
        "        {{- '<|start|>system\\nBe brief.<|end|>\\n' }}\n    {%- endif %}\n"
        "    {{- '<|start|>' + message['role'] + '\\n' + message['content'] | trim + '<|end|>' + '\\n' }}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|start|>assistant\\n' }}\n{%- endif %}\n"
    ),
    "system inside the first turn": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
        "{% set system = '<<S>>' ~ messages[0]['content'] ~ '<</S>>' %}"
        "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
        "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m['role'] == 'user' %}{{ bos_token + '[I] ' + (system if loop.first else '') + m['content'].strip() "
        "+ ' [/I]' }}{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "namespace, loop controls, json": (
        "{%- set ns = namespace(found=false) -%}\n"
        "{% for m in messages %}\n"
        "{% if m.role == 'system' %}{% continue %}{% endif %}\n"
        "{% if loop.index > 5 %}{% break %}{% endif %}\n"
        "{% set ns.found = true %}\n"
        "{{ m | tojson }}{{ m.content | tojson(indent=2) }}\n"
        "{% endfor %}{{ ns.found }}"
    ),
    "generation marks": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}A: {{ m.content }}\n"
        "{% endgeneration %}"
        "{% else %}{{ m.role | capitalize }}: {{ m['content'] }}{{ unk_token }}{% endif %}{% endfor %}"
    ),
    "the date": "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "tools": "{% if tools is not none %}T{% endif %}{% if documents %}D{% endif %}{{ messages | length }}",
}
TALKS = {
    "one": [{"role": "user", "content": "hi"}],
    "system": [{"role": "system", "content": " be  kind "}, {"role": "user", "content": "a<b> & 'c' é\n"}],
    "long": [
        {"role": role, "content": f" {n} "}
        for n, role in enumerate(["user", "assistant", "user", "assistant", "user"])
    ],
}


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_is_that_of_transformers(name, talk):
    for answer in (True, False):
        (expected,), _ = render_jinja_template(
            [TALKS[talk]], chat_template=TEMPLATES[name], add_generation_prompt=answer, **TOKENS
        )
        assert ChatTemplate(TEMPLATES[name], TOKENS).render(TALKS[talk], answer=answer) == expected


@pytest.mark.parametrize("name", ["plain", "marked turns", "system inside the first turn", "generation marks"])
def test_what_follows_an_answer_is_the_rest_of_the_whole(name):
    template, talk = ChatTemplate(TEMPLATES[name], TOKENS), TALKS["long"]
    whole = template.render(talk)
    found = template.following(talk[4:])
    assert whole.endswith(found)
    assert whole.removesuffix(found).rstrip().endswith("3")


def test_developer_is_system_where_the_template_does_not_know_it():
    source, said = "{{ messages[0].role }}", [{"role": "developer", "content": "x"}]
    assert ChatTemplate(source, TOKENS).render(said) == "system"
    assert ChatTemplate(source + "{# developer #}", TOKENS).render(said) == "developer"


REFUSED = {
    "not jinja": ("{% for %}", dijiang.BundleError),
    "no such name": ("{{ messages[0].nothing.more }}", dijiang.InputError),
    "a way out": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", dijiang.InputError),
    "changes messages": ("{{ messages.append(1) }}", dijiang.InputError),
    "division": ("{{ 1 // 0 }}", dijiang.InputError),
    "endless": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        dijiang.InputError,
    ),
    "refuses": ("{{ raise_exception('no system') }}", dijiang.InputError),
    "a number without end": ("{% set n = 8 + messages|length %}{{ n ** (9 ** n) }}", dijiang.InputError),
    "such a number, compiled": ("{{ 9 ** (9 ** 9) }}", dijiang.BundleError),
    "a text without end": ("{{ '%2000000000d' % messages|length }}", dijiang.InputError),
    "a text that is too long": ("{{ 'x' * 20000000 }}", dijiang.InputError),
    "a list in itself": (
        "{% set n = namespace(l=[]) %}{% for i in range(40) %}{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l }}",
        dijiang.InputError,
    ),
    "calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", dijiang.InputError),
}


@pytest.mark.parametrize("case", REFUSED)
def test_hostile_template_is_one_error(case, monkeypatch):
    monkeypatch.setattr(renderer, "PATIENCE", 1.0)
    source, error = REFUSED[case]
    with pytest.raises(error, match=r"^(the chat template|chat_template\.jinja)[^\n]+; [^\n]+$"):
        ChatTemplate(source, TOKENS).render(TALKS["one"])


def process_of(template):
    """Of the one that made the last text."""
    return template._renderer._free.queue[-1]._process


def test_template_goes_on_after_its_process_was_ended_and_in_a_fork():
    template = ChatTemplate("{{ messages[0].content }}", TOKENS)
    process = process_of(template)
    process.kill()
    process.wait()
    assert template.render(TALKS["one"]) == "hi"
    process = process_of(template)
    taken = [template._renderer._free.get() for _ in range(4)]  # by other threads, which a fork does not have
    fork = os.fork()
    if not fork:
        os._exit(template.render(TALKS["one"]) != "hi")
    assert os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) == 0
    for one in reversed(taken):
        template._renderer._free.put(one)
    assert template.render(TALKS["one"]) == "hi"
    assert process_of(template) is process
    del template, taken, one
    gc.collect()
    assert process.poll() is not None


SLOW = (
    "{% for i in range(30000 if messages[0].content == 'slow' else 1) %}"
    "{% for j in range(100) %}{% endfor %}{% endfor %}{{ messages[0].content }}"
)


def test_slow_text_keeps_no_other_waiting():
    template = ChatTemplate(SLOW, TOKENS)
    slow = threading.Thread(target=template.render, args=[[{"role": "user", "content": "slow"}]])
    slow.start()
    try:
        assert template.render([{"role": "user", "content": "fast"}]) == "fast"
        assert slow.is_alive()
    finally:
        slow.join()


def test_text_that_finds_no_process_free_is_told_to_ask_later(monkeypatch):
    template = ChatTemplate(SLOW, TOKENS)
    monkeypatch.setattr(renderer, "PATIENCE", 0.2)
    taken = [template._renderer._free.get() for _ in range(renderer.TOGETHER)]
    with pytest.raises(dijiang.SessionError, match="all 4 processes of the chat template have been busy for 0 s"):
        template.render(TALKS["one"])
    for one in taken:
        template._renderer._free.put(one)
    assert template.render(TALKS["one"]) == "hi"


def test_template_that_never_ends_ends_also_where_who_started_it_is_gone():
    made = subprocess.Popen([sys.executable, renderer.PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert made.stdout.readline() == b"\n"
    line = json.dumps({"source": "{% set n = 9 %}{{ n ** (9 ** n) }}", "variables": {}}).encode()
    made.stdin.write(b"1.0 " + line + b"\n")
    made.stdin.close()
    assert made.wait(20) == -signal.SIGALRM
    made.stdout.close()


def test_system_without_a_bound_of_memory_renders(monkeypatch):
    """As macOS, which refuses it."""

    def refuse(*_):
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr("resource.setrlimit", refuse)
    sandbox.limit_memory()


def test_interrupt_while_a_text_is_made_leaves_no_answer_for_the_next():
    """Ctrl-C in `dijiang chat`."""
    template = ChatTemplate(SLOW, TOKENS)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            template.render([{"role": "user", "content": "slow"}])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert template.render([{"role": "user", "content": "fast"}]) == "fast"


def test_program_that_is_no_python_renders_by_itself(monkeypatch):
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    template = ChatTemplate("{{ messages[0].content }}", TOKENS)
    assert template.render(TALKS["one"]) == "hi"
    assert template._renderer._free.empty()


def test_what_cannot_be_sent_to_it_or_started_is_one_line(monkeypatch):
    template = ChatTemplate("{{ messages[0].content }}", TOKENS)
    with pytest.raises(dijiang.InputError, match="they hold what JSON cannot say"):
        template.render([{"role": "user", "content": object()}])
    deep = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(dijiang.InputError, match="they hold what JSON cannot say"):
        template.render([{"role": "user", "content": deep}])
    monkeypatch.setattr(sys, "path", [*sys.path, Path("/nowhere")])
    ChatTemplate("x", TOKENS)
    monkeypatch.setattr(sys, "executable", "/usr/bin/env")
    with pytest.raises(dijiang.SessionError, match=r"a process of its own, and /usr/bin/env runs none"):
        ChatTemplate("x", TOKENS)
    assert template.render([{"role": "user", "content": "x"}], variables={"self": 1}) == "x"
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(dijiang.SessionError, match=r"a process of its own, which does not start \(No such file"):
        ChatTemplate("x", TOKENS)


def test_bundle_names_its_template_and_tokens(chatty, exported):
    template = ChatTemplate.of(dijiang.load(chatty).bundle)
    assert template.render(TALKS["one"]) == "# user: hi<|endoftext|>\n# assistant:"
    with pytest.raises(dijiang.InputError, match="has no chat template"):
        ChatTemplate.of(dijiang.load(exported("tiny-python")).bundle)


def test_template_inside_of_the_config_is_read(tmp_path):
    folder = shutil.copytree(EXAMPLES / "tiny-python", tmp_path / "c")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    several = [{"name": "rag", "template": "no"}, {"name": "default", "template": "{{ bos_token }}!"}]
    config |= {"chat_template": several, "bos_token": {"content": "<b>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    bundle = dijiang.export(folder, tmp_path / "b", verify=False)
    assert ChatTemplate.of(bundle).render(TALKS["one"]) == "<b>!"


ENDINGS = {
    "a space before": "{{ ' ' + m['content'] + ' ' + eos_token }}",
    "a line after": "{{ m['content'] + eos_token + '\n' }}",
    "nothing around": "{{ m['content'] + eos_token }}",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_follows_an_answer_has_the_ids_of_the_whole_text(ending):
    """In LLaMA-2's tokenizer each part between special tokens begins with a space of its own.

    The end token waits to be fed, and was not told to be the model's end in each case.
    """
    source = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[I] ' + m['content'] + ' [/I]' }}"
        "{% else %}" + ENDINGS[ending] + "{% endif %}{% endfor %}"
    )
    template, tokenizer = ChatTemplate(source, TOKENS), tokenizer_of("byte fallback, normalizer")
    talk = [{"role": role, "content": said} for role, said in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    whole, end = tokenizer.as_it_stands(template.render(talk)), tokenizer.special_ids(["</s>"])[0]
    state = SimpleNamespace(seam=lambda: Seam(end, 9))
    for ends in ([end], []):
        assert continued(template, tokenizer, state, ends, talk[2:]) == whole[whole.index(end) + 1 :]


def test_special_tokens_may_stand_in_a_file_of_their_own(tmp_path):
    folder = shutil.copytree(EXAMPLES / "tiny-python", tmp_path / "c")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config = {name: value for name, value in config.items() if name not in ("eos_token", "unk_token")}
    config |= {
        "chat_template": "{{ eos_token }}{{ bos_token }}{{ unk_token }}",
        "bos_token": "<b>",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    special = {"eos_token": {"content": "<e>"}, "bos_token": "<other>", "unk_token": "<u>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    bundle = dijiang.export(folder, tmp_path / "b", verify=False)
    assert ChatTemplate.of(bundle).render(TALKS["one"]) == "<e><b><u>"


def test_end_token_that_waits_to_be_fed_is_not_repeated(chatty):
    model = dijiang.load(chatty)
    template, ends = ChatTemplate.of(model.bundle), model.spec.eos_token_ids

    def after(seam):
        said = [{"role": "user", "content": "x"}]
        return continued(template, model.tokenizer, SimpleNamespace(seam=lambda: seam), ends, said)

    whole = after(None)
    assert whole[0] in ends
    assert after(Seam(whole[0], 3)) == whole[1:]
    assert after(Seam(whole[1], 3)) == whole
