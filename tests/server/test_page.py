"""The page of the server: its files, and what a person meets in Chromium."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

import dijiang
from dijiang.bundle.sizes import sizes
from dijiang.runtime.options import Generation
from dijiang.server.front_page import FILES, FOLDER, POLICY
from dijiang.server.hosted import Hosted
from tests.chromium import PROGRAM, Chromium
from tests.server.serving import events, running

in_browser = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here; .ci/run installs one")
#: Answers that the model does not end itself come slowly enough to be stopped.
LONG = 4000
A, B = ".branch:nth-child(1)", ".branch:nth-child(2)"


@pytest.fixture(scope="module")
def models(chatty):
    return {"tiny": dijiang.load(chatty, threads=1)}


@pytest.fixture(scope="module")
def served(models):
    with running(models, slots=2, max_prompt=300, prefix_memory=0) as found:
        yield found


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def opened(chromium, served):
    """opened(server, **tab): the page of a server. The test fails if the page complains of anything."""
    tabs = []

    def get(server=served, **how):
        made = chromium.tab(**how)
        tabs.append((made, made.__enter__()))
        tab = tabs[-1][1]
        tab.home = f"http://127.0.0.1:{server.port}/"
        tab.goto(tab.home)
        tab.until("!document.querySelector('#gate').hidden || document.querySelector('.ask textarea')")
        return tab

    yield get
    complaints = [found for _, tab in tabs for found in tab.complaints()]
    for made, _ in tabs:
        made.__exit__(None, None, None)
    assert complaints == []


def statuses(tab):
    """Statuses that Chromium itself writes to the console; anything else there fails the test."""
    texts = [found["entry"]["text"] for found in tab.complaints()]
    return [int(re.fullmatch(r"Failed to load resource: .* status of (\d+) .*", text)[1]) for text in texts]


def focused(selector):
    return f"document.activeElement.matches({json.dumps(selector)})"


def choose(tab, **options):
    """Set options by the keyboard, in their order; the focus comes back to the first branch."""
    tab.press_until("Tab", focused("summary"))
    if not tab.run("document.querySelector('details').open"):
        tab.press("Enter")
    for name, value in options.items():
        tab.press_until("Tab", focused(f"[name={name}]"))
        tab.write(str(value))
    tab.press_until("Tab", focused(f"{A} textarea"))


def send(tab, text, branch=A):
    """Ask, by the keyboard."""
    tab.press_until("Tab", focused(f"{branch} textarea"))
    tab.write(text)
    tab.press("Enter")


def ask(tab, text, branch=A):
    """Ask, and wait for the end of the answer; the answer."""
    send(tab, text, branch)
    tab.until(f"document.querySelector('{branch} .stop').hidden")
    return tab.run(f"document.querySelector('{branch} article:last-child .answer')?.textContent")


def answer_of(server, said, **more):
    """What the API answers to a message, and to whole conversations."""
    messages = [{"role": "user", "content": said}] if isinstance(said, str) else said
    body = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 20, "store": True} | more
    return server.ask("/v1/chat/completions", body)[2]


def content(answer):
    return answer["choices"][0]["message"]["content"]


# The files, and what the page is told.


def test_files_have_a_policy_and_name_nothing_outside(served):
    assert {name for name, _ in FILES.values()} == {file.name for file in FOLDER.iterdir()}
    for path, (_, kind) in FILES.items():
        status, headers, text = served.ask(path)
        assert (status, headers["content-type"]) == (200, f"{kind}; charset=utf-8")
        assert headers["content-security-policy"] == POLICY
        assert not re.search(r"https?:", text.replace('"http://www.w3.org/2000/svg"', ""))
        assert not re.search(r"@import|url\(|innerHTML|Storage|cookie|\sstyle=|\son\w+=", text)
        assert served.ask(path, method="POST", body=b"")[0] == 405


def test_files_are_part_of_the_package():
    assert FOLDER.is_relative_to(Path(dijiang.__file__).parent)


def test_models_say_their_sizes_and_options(served, models):
    found = served.ask("/v1/models")[2]["data"][0]["dijiang"]
    size = sizes(models["tiny"].bundle)
    assert found["state_bytes"] == size.state_bytes == models["tiny"].new_state().nbytes
    assert found["cache_bytes_per_token"] == size.cache_bytes_per_token
    assert (found["text"], found["chat"]) == (True, True)
    options = {one["name"]: one for one in found["options"]}
    assert options.keys() == {one.name for one in fields(Generation)} - {
        "stop",
        "stop_tokens",
        "ignore_eos",
        "speculate",
    }
    assert options["top_k"]["default"] == 50  # its authors' choice
    assert options["max_tokens"]["high"] == served.server.settings.max_tokens


def test_each_piece_says_what_it_took_so_far(served):
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"model": "tiny", "prompt": "x", "max_tokens": 5, "ignore_eos": True, "stream": True}
    *pieces, last = events(served.ask("/v1/completions", body | {"stream_options": options})[2])
    assert [piece["usage"]["completion_tokens"] for piece in pieces] == [1, 2, 3, 4, 5]
    assert last["usage"] == pieces[-1]["usage"]
    plain = events(served.ask("/v1/completions", body | {"stream_options": {"include_usage": True}})[2])
    assert ["usage" in piece for piece in plain] == [False] * 5 + [True]


# In Chromium.


@in_browser
def test_by_keyboard_alone_a_conversation_is_forked_and_compared(opened, served, models):
    tab = opened()
    assert tab.run(focused(f"{A} textarea"))
    choose(tab, max_tokens=20, temperature=0)
    first, second = answer_of(served, "one"), "two\n"
    assert ask(tab, "one") == content(first)
    assert ask(tab, second) == content(answer_of(served, second, previous_response_id=first["id"]))
    tab.press_until("Tab", focused(f"{A} article:first-child .fork"))
    tab.press("Enter")
    assert tab.run(focused(f"{B} textarea"))
    forked = answer_of(served, "three", previous_response_id=first["id"])
    assert ask(tab, "three", B) == content(forked)
    assert tab.run("[...document.querySelectorAll('.question')].map(e => e.textContent)") == [
        "one",
        second,
        "one",
        "three",
    ]
    # What the page says of sizes is what the server says.
    used, spec = forked["usage"], models["tiny"].spec
    assert f"Memory after {used['total_tokens']} tokens." in tab.text(f"{B} caption")
    cache = used["total_tokens"] * sizes(models["tiny"].bundle).cache_bytes_per_token
    for kind, size in (("state", spec.state_bytes), ("cache", cache)):
        assert float(tab.text(f"{B} .{kind} .bytes").removesuffix(" MB")) == pytest.approx(size / 1e6, rel=6e-3)
    fed = used["prompt_tokens"] - used["prompt_tokens_details"]["cached_tokens"]
    note = tab.text(f"{B} article:last-child .note")
    assert re.fullmatch(rf"20 tokens, [\d.]+ tokens/s; {fed} tokens of prompt fed", note)
    assert tab.text(f"{B} [role=status]") == note
    # The question asked again, in a branch that takes the place of this one.
    tab.press_until("Tab", focused(f"{B} .close"))
    tab.press("Enter")
    assert tab.run("document.querySelectorAll('.branch').length") == 1
    tab.press_until("Tab", focused(f"{A} article:first-child .again"))
    tab.press("Enter")
    assert tab.run("document.activeElement.value") == "one"
    tab.press("Enter")
    tab.until(f"document.querySelector('{B} .stop').hidden && document.querySelector('{B} article')")
    assert tab.text(f"{B} .answer") == content(first)


@in_browser
def test_a_text_goes_on_in_completion_mode(opened, served):
    tab = opened()
    tab.press_until("Tab", focused("#mode"))
    tab.press("ArrowDown")
    choose(tab, max_tokens=8, temperature=0)
    body = {"model": "tiny", "prompt": "def main(", "max_tokens": 8, "temperature": 0, "store": True}
    first = served.ask("/v1/completions", body)[2]
    assert ask(tab, "def main(") == first["choices"][0]["text"]
    assert tab.run("document.querySelector('#fixed').disabled")
    more = served.ask("/v1/completions", body | {"prompt": "\n", "previous_response_id": first["id"]})[2]
    tab.press("Enter", shift=True)
    assert tab.run("document.activeElement.value") == "\n"
    assert ask(tab, "") == more["choices"][0]["text"]
    tab.click("#fresh")
    assert not tab.run("document.querySelector('#fixed').disabled || document.querySelector('article')")


@in_browser
def test_stop_keeps_what_came_and_the_conversation_goes_on(opened, served):
    tab = opened()
    choose(tab, max_tokens=LONG, temperature=0)
    send(tab, "one")
    tab.until(f"document.querySelector('{A} .answer').textContent.length > 20")
    assert tab.run(f"document.querySelector('{A} article').getAttribute('aria-busy')") == "true"
    tab.press("Escape")
    tab.until(f"document.querySelector('{A} .stop').hidden")
    assert served.idle(2)
    kept = tab.text(f"{A} .answer")
    assert re.match(r"Stopped after \d+ tokens, ", tab.text(f"{A} .status"))
    assert tab.run(f"document.querySelector('{A} article').getAttribute('aria-busy')") == "false"
    choose(tab, max_tokens=20)
    said = [("user", "one"), ("assistant", kept), ("user", "two")]
    whole = [{"role": role, "content": text} for role, text in said]
    assert ask(tab, "two") == content(answer_of(served, whole))
    # By the button: the focus goes to where the next question is written.
    choose(tab, max_tokens=LONG)
    send(tab, "three")
    tab.press_until("Tab", focused(f"{A} .stop"))
    tab.press("Enter")
    tab.until(f"document.querySelector('{A} .stop').hidden")
    assert tab.run(focused(f"{A} textarea"))


@in_browser
def test_a_full_server_and_too_long_a_prompt_are_said_in_words(opened, models):
    with running(models, slots=1, queue=0, max_prompt=300) as server:
        tab = opened(server)
        choose(tab, max_tokens=5, temperature=0)
        ask(tab, "one")
        tab.click(f"{A} .fork")
        choose(tab, max_tokens=LONG)
        send(tab, "two")
        tab.until(f"document.querySelector('{A} article:last-child .answer').textContent")
        send(tab, "x", B)
        tab.until(f"document.querySelector('{B} .trouble').textContent")
        message = tab.text(f"{B} [role=alert]")
        assert "ask again later" in message
        assert "in 1 s or more" in message
        assert tab.run(f"document.querySelector('{B} textarea').value") == "x"  # it need not be written again
        assert tab.run(f"document.querySelectorAll('{B} article').length") == 1
        assert not tab.run(f"document.querySelector('{A} .stop').hidden")  # the other goes on
        tab.click(f"{A} .stop")
        assert server.idle()
        choose(tab, max_tokens=5)
        ask(tab, "", B)  # what stands there still
        assert (tab.text(f"{B} .trouble"), tab.text(f"{B} article:last-child .question")) == ("", "x")
        ask(tab, "long " * 400, B)
        assert re.match(r"the prompt has \d+ tokens, expected at most 300", tab.text(f"{B} [role=alert]"))
        assert statuses(tab) == [429, 400]


@in_browser
def test_an_answer_that_the_server_forgot_is_sent_again(opened, models):
    with running(models, slots=1, conversations=1, prefix_memory=0) as server:
        tab = opened(server)
        choose(tab, max_tokens=9, temperature=0)
        first = ask(tab, "one")
        tab.click(f"{A} .fork")
        ask(tab, "two")
        found = ask(tab, "three", B)
        said = [("user", "one"), ("assistant", first), ("user", "three")]
        whole = [{"role": role, "content": text} for role, text in said]
        assert tab.text(f"{B} article:last-child .question") == "three"
        assert tab.text(f"{B} .trouble") == ""
        assert found == content(answer_of(server, whole, max_tokens=9))
        assert statuses(tab) == [400]


@in_browser
def test_a_key_is_asked_for_and_kept_nowhere(opened, models):
    with running(models, slots=1, api_key="sesame") as server:
        tab = opened(server)
        assert tab.run(focused("#key"))
        assert (tab.text("#trouble"), tab.run("document.querySelector('#settings').hidden")) == ("", True)
        for key in ("wrong", "sesame"):
            assert tab.run("document.querySelector('#key').value") == ""
            tab.write(key)
            tab.press("Enter")
            tab.until("document.querySelector('#trouble').textContent || document.querySelector('.branch')")
            if key == "wrong":
                assert tab.text("#trouble") == "The server does not take this key."
        choose(tab, max_tokens=5)
        ask(tab, "one")
        assert tab.text(f"{A} .status").startswith("5 tokens")
        kept = "localStorage.length + sessionStorage.length + document.cookie.length"
        assert tab.run(kept) == 0
        assert "sesame" not in tab.run("document.documentElement.outerHTML + location.href")
        tab.goto("about:blank")
        tab.goto(tab.home)
        tab.until(focused("#key"))
        assert set(statuses(tab)) == {401}


@in_browser
def test_a_model_without_a_template_or_a_tokenizer_offers_what_it_has(opened, monkeypatch):
    monkeypatch.setattr(Hosted, "chats", False)
    tab = opened()
    tab.until(f"document.querySelector('{A}')")
    assert tab.run(
        "[document.querySelector('#mode').value, document.querySelector('#mode').options[0].disabled]"
    ) == [
        "text",
        True,
    ]
    monkeypatch.setattr(dijiang.Model, "has_tokenizer", False)
    tab.goto("about:blank")
    tab.goto(tab.home)
    tab.until("document.querySelector('#trouble').textContent.includes('No model here has a tokenizer')")
    assert tab.run("document.querySelector('#settings').hidden")


@in_browser
def test_a_server_that_is_gone_is_said_in_words(opened, models):
    with running(models, slots=1) as server:
        tab = opened(server)
    ask(tab, "one")
    assert tab.text(f"{A} [role=alert]") == "The server does not answer. See whether it runs, then try again."
    assert tab.run(f"document.querySelector('{A} textarea').value") == "one"
    assert "ERR_CONNECTION_REFUSED" in tab.complaints()[0]["entry"]["text"]


#: A server whose stream comes byte by byte, and may break off.
FAKE = """window.fetch = async () => {
  const bytes = new TextEncoder().encode(%s);
  let at = 0;
  return new Response(new ReadableStream({
    pull(stream) { at < bytes.length ? stream.enqueue(bytes.slice(at, ++at)) : stream.close(); } }));
}"""


def stream_of(*texts, end="data: [DONE]\n\n"):
    pieces = [{"id": "x", "choices": [{"delta": {"content": text}}]} for text in texts]
    return json.dumps("".join(f"data: {json.dumps(piece, ensure_ascii=False)}\n\n" for piece in pieces) + end)


@in_browser
def test_what_a_model_says_is_text_however_it_comes(opened):
    tab = opened()
    said = ["<img src=x onerror=alert(1)>", "é😀\n\n", "</div><script>throw 1</script>&amp;"]
    tab.run(FAKE % stream_of(*said))
    assert ask(tab, "<b>one</b>") == "".join(said)
    assert tab.text(f"{A} .question") == "<b>one</b>"
    assert tab.run("document.querySelectorAll('img, b, main script').length") == 0


@in_browser
@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("", "The answer broke off"),
        ('data: {"error": {"message": "a step failed"}}\n\ndata: [DONE]\n\n', "a step failed"),
    ],
    ids=["cut", "failed"],
)
def test_an_answer_that_breaks_off_is_kept_and_said(opened, end, message):
    tab = opened()
    tab.run(FAKE % stream_of("some", " text", end=end))
    assert ask(tab, "one") == "some text"
    assert tab.text(f"{A} [role=alert]").startswith(message)
    assert tab.text(f"{A} .status").startswith("Broken off")


@in_browser
def test_the_policy_holds(opened, served):
    tab = opened()
    tried = "(() => { try { document.body.innerHTML = '<b>x</b>'; } catch (error) { return error.name; } })()"
    assert tab.run(tried) == "TypeError"
    tried = f"fetch('http://localhost:{served.port}/healthz').then(() => 'came', (error) => error.name)"
    assert tab.run(tried) == "TypeError"
    assert "Content Security Policy" in str(tab.complaints())


#: Texts that stand out too little from what is behind them, by WCAG 2: [ratio, text].
FAINT = """(() => {
  const colour = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
  const behind = (box) => {
    for (; box; box = box.parentElement) {
      const found = colour(getComputedStyle(box).backgroundColor);
      if (found.length < 4 || found[3] > 0) return found;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll("body *")]
    .filter((box) => box.checkVisibility() && !box.closest(":disabled, .unseen") && box.innerText?.trim())
    .map((box) => [light(colour(getComputedStyle(box).color)), light(behind(box)), box.innerText])
    .map(([a, b, text]) => [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), text])
    .filter(([ratio]) => ratio < 4.5);
})()"""
#: Things to press that are too small, by WCAG 2.2.
SMALL = """[...document.querySelectorAll("button, input, select, textarea, summary")]
  .filter((box) => box.checkVisibility())
  .map((box) => [box.outerHTML, box.getBoundingClientRect()]).filter(([, r]) => r.width < 24 || r.height < 24)"""


@in_browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (360, True)])
def test_page_fits_is_readable_and_is_named(opened, served, width, dark):
    tab = opened(width=width, height=800, dark=dark)
    choose(tab, max_tokens=30, seed=1)
    ask(tab, "def main(" + "x" * 150)
    tab.click(f"{A} .fork")
    ask(tab, "a prompt that is too long " * 100, B)
    assert tab.text(f"{B} .trouble")
    assert tab.run("document.documentElement.scrollWidth") == width
    assert tab.run(FAINT) == []
    assert tab.run(SMALL) == []
    a, b = tab.run("[...document.querySelectorAll('.branch')].map((box) => box.getBoundingClientRect().toJSON())")
    beside = a["top"] == b["top"] and a["right"] <= b["left"]
    assert beside if width > 600 else a["bottom"] <= b["top"]
    paper = tab.run("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") != dark
    names = tab.names()
    assert all(name for role, name in names if role not in ("RootWebArea", "generic")), names
    for expected in (
        ("textbox", "Prompt for branch A"),
        ("textbox", "Prompt for branch B"),
        ("log", "Text of branch B"),
        ("button", "Close branch B"),
        ("spinbutton", "seed Default: a new one each time."),
    ):
        assert expected in names
    assert statuses(tab) == [400]


def test_system_message_is_said_once(opened, served):
    tab = opened()
    tab.run("document.querySelector('#system').value = 'be brief'")
    choose(tab, max_tokens=20, temperature=0)
    system = {"role": "system", "content": "be brief"}
    first = answer_of(served, [system, {"role": "user", "content": "one"}])
    assert ask(tab, "one") == content(first)
    second = answer_of(served, "two", previous_response_id=first["id"])
    assert ask(tab, "two") == content(second)
    usage = second["usage"]
    fed = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
    assert tab.text(f"{A} article:last-child .note").endswith(f"; {fed} tokens of prompt fed")


def test_branch_that_is_closed_frees_its_slot(opened, served):
    tab = opened()
    choose(tab, max_tokens=LONG, temperature=0)
    send(tab, "one")
    tab.until(f"document.querySelector('{A} .answer').textContent.length > 20")
    tab.click("#fresh")
    assert served.idle(0.3)
