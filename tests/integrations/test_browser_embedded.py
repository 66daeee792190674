"""web/ as a part of something larger: options of others, other models and pages on its address, an end."""

import re
import time

import pytest
from tokenizers import Tokenizer, decoders, models

import dijiang
from tests.conftest import EXAMPLES, GOLDEN
from tests.integrations.test_browser import PROMPTS, in_chromium, ours, ready, write

pytestmark = [pytest.mark.ecosystem, in_chromium]


@pytest.fixture
def page(serve, tab, exported):
    """A page with the module, and the bundle."""
    bundle = exported("tiny-python", precision="int8")
    tab.goto(serve(bundle)[0])
    ready(tab)
    return tab, bundle


def test_options_that_are_none_are_refused_and_the_prompt_is_not_read(page):
    tab, _ = page
    code = """async (options) => {
      const { Model } = await import("./dijiang.js");
      const model = await Model.load(location.origin + "/bundle/", { provider: "cpu" });
      const state = model.newState();
      const said = await model.generate("def main(", { ...options, state }).next().catch((error) => error.message);
      return [said, state.position];
    }"""
    for count in (0, -1, 2.5, None, "abc"):
        said, position = tab.evaluate(code, {"maxTokens": count})
        assert re.fullmatch(r"maxTokens is .*, expected a whole number, 1 or more", said)
        assert position == 0
    said, position = tab.evaluate(code, {"max_tokens": 3})
    assert "option max_tokens is unknown, expected one of state, maxTokens, onToken, signal" in said
    assert position == 0


def test_a_generation_can_be_aborted_and_gone_on_with(page):
    tab, bundle = page
    code = """async () => {
      const { Model } = await import("./dijiang.js");
      const model = await Model.load(location.origin + "/bundle/", { provider: "cpu" });
      const state = model.newState(), ids = [], ended = new AbortController();
      const onToken = (id) => { ids.push(id); if (ids.length === 7) ended.abort(); };
      let reason;
      try {
        for await (const text of model.generate("def main(", { state, onToken, signal: ended.signal })) text;
      } catch (error) {
        reason = error.name;
      }
      for await (const text of model.generate("", { state, maxTokens: 13, onToken })) text;
      return [reason, ids];
    }"""
    reason, ids = tab.evaluate(code)
    assert reason == "AbortError"
    assert ids == ours(bundle, "def main(", 20)[0]


@pytest.mark.parametrize("provider", ["cpu", "wasm"])
def test_a_closed_model_says_so_and_its_states_go_on_elsewhere(page, provider):
    tab, bundle = page
    code = """async (provider) => {
      const { Model } = await import("./dijiang.js");
      const load = () => Model.load(location.origin + "/bundle/", { provider });
      const first = await load();
      const state = first.newState(), ids = [], onToken = (id) => ids.push(id);
      for await (const text of first.generate("def main(", { state, maxTokens: 5, onToken })) text;
      await first.close();
      const said = await first.generate("", { state }).next().catch((error) => error.message);
      const second = await load();
      for await (const text of second.generate("", { state, maxTokens: 5, onToken })) text;
      return [said, ids];
    }"""
    said, ids = tab.evaluate(code, provider)
    assert said == "the model is closed: load it again"
    assert ids == ours(bundle, "def main(", 10, graph={"cpu": "native", "wasm": "ort"}[provider])[0]


def test_why_what_is_better_does_not_run_is_kept(page):
    tab, _ = page
    code = """async () => {
      const { Model } = await import("./dijiang.js");
      const model = await Model.load(location.origin + "/bundle/", { builds: ["none.wasm"] });
      return [model.provider, model.failures];
    }"""
    provider, failures = tab.evaluate(code)
    assert provider == "wasm"
    assert any(failure.startswith("cpu: ") for failure in failures)


def test_a_tokenizer_that_would_be_read_otherwise_is_refused(serve, tab, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for name in ("config.json", "model.safetensors"):
        (checkpoint / name).write_bytes((GOLDEN["neox-base"] / name).read_bytes())
    pieces = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(60)), ("a", -1.0), ("b", -2.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.decoder = decoders.ByteFallback()
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    bundle = dijiang.export(checkpoint, tmp_path / "b", verify=False).path
    tab.goto(serve(bundle)[0])
    tab.until("document.getElementById('status').textContent.includes('Unigram')")
    assert "the tokenizer spells unknown text in bytes (Unigram, byte_fallback)" in tab.text("#status")


def test_the_text_of_another_model_on_the_address_is_kept(serve, tab, exported, tmp_path):
    first = exported("tiny-python")
    second, served = (
        dijiang.export(EXAMPLES / "tiny-python", tmp_path / "b", decay="analytic", verify=False).path,
        [],
    )

    def chosen(handler):
        class Chosen(handler):
            def translate_path(self, path):
                inside = path.split("?")[0].partition("/bundle/")[2]
                return str(served[-1] / inside) if inside else super().translate_path(path)

        return Chosen

    address, _ = serve(first, chosen)
    found = []
    for bundle in (first, second, first, second):
        served.append(bundle)
        tab.goto(address)
        ready(tab)
        found.append(tab.text("#text"))
        if len(found) < 3:
            tab.run("document.getElementById('prompt').value = 'def main('")
            write(tab)
    assert dijiang.load(first).manifest.fingerprint != dijiang.load(second).manifest.fingerprint
    assert found == [
        "",
        "",
        PROMPTS[0] + ours(first, PROMPTS[0], 50)[1],
        PROMPTS[0] + ours(second, PROMPTS[0], 50)[1],
    ]


def test_files_of_bundles_below_stay_kept(page):
    tab, _ = page
    code = """async () => {
      const { Model } = await import("./dijiang.js");
      const cache = await caches.open("dijiang"), at = location.origin + "/bundle/";
      const names = ["small/model.onnx.data?12ab", "old.onnx?34cd"];
      for (const name of names) await cache.put(at + name, new Response("x"));
      await Model.load(at, { provider: "cpu" });
      const kept = (await cache.keys()).map(({ url }) => url.slice(at.length));
      return names.filter((name) => kept.includes(name));
    }"""
    assert tab.evaluate(code) == ["small/model.onnx.data?12ab"]


def test_the_worker_leaves_alone_what_is_not_the_pages(serve, tab, exported):
    def more(handler):
        class More(handler):
            def do_GET(self):
                if self.path == "/events":
                    self.send_response(200)
                    self.send_header("Content-Type", "text/event-stream")
                    self.end_headers()
                    self.wfile.write(b"data: 1\n\n")
                    self.wfile.flush()
                    time.sleep(3)
                    self.wfile.write(b"data: 2\n\n")
                    self.close_connection = True
                elif self.path == "/me":
                    self.send_response(200)
                    self.send_header("Cache-Control", "no-store, private")
                    self.end_headers()
                    self.wfile.write(b"secret")
                else:
                    super().do_GET()

        return More

    tab.goto(serve(exported("tiny-python"), more)[0])
    ready(tab)
    tab.until("navigator.serviceWorker.controller !== null")
    code = """async () => {
      const began = performance.now();
      const stream = (await fetch("/events")).body.getReader();
      await stream.read();
      const first = performance.now() - began;
      await (await fetch("/me")).text();
      const kept = (await (await caches.open("dijiang-page")).keys()).map(({ url }) => new URL(url).pathname);
      return [first, kept];
    }"""
    first, kept = tab.evaluate(code)
    assert first < 2000
    assert not {"/me", "/events"} & set(kept)
    assert all(re.fullmatch(r"/([\w-]+\.(js|html|wasm)|node_modules/.*)?", path) for path in kept)
