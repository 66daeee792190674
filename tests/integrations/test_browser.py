"""The page and the module of web/ in browsers: their tokens are ours, and they outlive reloads and networks."""

import json
import shutil

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import dijiang
from tests.conftest import EXAMPLES, GOLDEN
from tests.random_tokenizers import byte_fallback

pytestmark = pytest.mark.ecosystem
#: What is not about a browser, or needs something that Firefox has not.
in_chromium = pytest.mark.parametrize("browser", ["chromium"], indirect=True)
#: The last one is longer than a piece.
PROMPTS = ["def main(", "é ∑ 😀 = ", "import os\nclass A:\n    def f(self):\n        return " * 24]


def ours(bundle, prompt, count, **loading):
    records = list(dijiang.load(bundle, **loading).generate(prompt, max_tokens=count))
    return [record.token for record in records], "".join(record.text for record in records)


#: Runs the module, without the page: ids and text of each prompt, and the last call of progress.
SCRIPT = """async ([prompts, count, options]) => {
  const { Model } = await import("./dijiang.js");
  let progress;
  options = { ...options, progress: (...told) => progress = told };
  const model = await Model.load(location.origin + "/bundle/", options);
  const found = [];
  for (const prompt of prompts) {
    const ids = [];
    let text = "";
    const stream = model.generate(prompt, { maxTokens: count, onToken: (id) => ids.push(id) });
    for await (const piece of stream) text += piece;
    found.push([ids, text]);
  }
  return { found, progress, provider: model.provider, graph: model.graph };
}"""


@pytest.mark.parametrize(
    ("provider", "precision"),
    [("cpu", "fp32"), ("cpu", "int8"), ("cpu", "int4"), ("wasm", "fp32"), ("wasm", "int8")],
)
def test_tokens_and_text_are_ours(serve, tab, exported, provider, precision):
    bundle = exported("tiny-python", precision=precision)
    address, _ = serve(bundle)
    tab.goto(address)
    ready(tab)
    tab.run("caches.delete('dijiang')")
    done = tab.evaluate(SCRIPT, [PROMPTS, 50, {"provider": provider}])
    assert done["graph"] == {"cpu": "native", "wasm": "ort"}[provider]
    assert done["progress"] == [(bundle / "model.onnx.data").stat().st_size] * 2
    for prompt, (ids, text) in zip(PROMPTS, done["found"], strict=True):
        expected, words = ours(bundle, prompt, 50, graph=done["graph"])
        assert ids == expected
        assert text == words.rstrip("\ufffd")


@in_chromium
def test_int4_of_onnxruntime_differs_where_two_tokens_are_nearly_as_likely(serve, tab, exported):
    """Its kernels of WebAssembly round activations otherwise."""
    bundle = exported("tiny-python", precision="int4")
    address, _ = serve(bundle)
    tab.goto(address)
    done = tab.evaluate(SCRIPT, [PROMPTS, 30, {"provider": "wasm"}])
    model = dijiang.load(bundle, graph=done["graph"])
    for prompt, (ids, _) in zip(PROMPTS, done["found"], strict=True):
        expected = ours(bundle, prompt, 30, graph=done["graph"])[0]
        same = next((at for at, pair in enumerate(zip(ids, expected, strict=True)) if pair[0] != pair[1]), None)
        if same is not None:
            fed = model.tokenizer.encode(prompt) + expected[:same]
            logits = model.forward([fed], model.new_state())[0]
            assert logits[expected[same]] - logits[ids[same]] < 0.1


def test_threads_need_isolation_and_the_page_works_without(serve, tab, exported):
    def without_headers(handler):
        class Plain(handler):
            def send_header(self, name, value):
                if not name.startswith("Cross-Origin"):
                    super().send_header(name, value)

        return Plain

    bundle = exported("tiny-python")
    address, _ = serve(bundle)
    tab.goto(address)
    assert tab.run("crossOriginIsolated")
    address, _ = serve(bundle, without_headers)
    tab.goto(address)
    assert not tab.run("crossOriginIsolated")
    assert not tab.run("'SharedArrayBuffer' in globalThis")
    for provider in ("cpu", "wasm"):
        found = tab.evaluate(SCRIPT, [PROMPTS[:1], 20, {"provider": provider}])["found"]
        assert found[0][0] == ours(bundle, PROMPTS[0], 20)[0]


@in_chromium  # 140 ESR has no WebGPU on Linux
def test_webgpu_is_ours_too_and_one_in_software_is_used_only_if_asked_for(serve, tab, exported):
    bundle = exported("tiny-python")
    address, _ = serve(bundle)
    tab.goto(address)
    done = tab.evaluate(SCRIPT, [PROMPTS[:1], 8, {"provider": "webgpu"}])
    assert (done["provider"], done["graph"]) == ("webgpu", "webgpu")
    assert done["found"][0][0] == ours(bundle, PROMPTS[0], 8)[0]
    assert tab.evaluate(SCRIPT, [PROMPTS[:1], 8, {}])["provider"] == "cpu"


def test_a_provider_that_is_not_here_is_said(serve, tab, exported):
    address, _ = serve(exported("tiny-python"))
    tab.before_each("Object.defineProperty(navigator, 'gpu', { value: undefined })")
    tab.goto(address + "?provider=webgpu")
    tab.until("document.getElementById('status').textContent.includes('nothing runs')")
    assert "webgpu is not here" in tab.text("#status")
    tab.goto(address + "?provider=abacus")
    tab.until("document.getElementById('status').textContent.includes('abacus is not here')")
    tab.goto(address)
    ready(tab)
    assert tab.text("#status").startswith("cpu")


def write(tab):
    """Press the button; wait until the text is written."""
    ready(tab)
    tab.run("document.getElementById('status').textContent = ''")
    tab.click("#write")
    tab.until("document.getElementById('status').textContent.includes('tokens/s')")
    ready(tab)


def spaced(checkpoint):
    """Give a checkpoint a tokenizer as LLaMA's: it puts a space before any text."""
    byte_fallback(normalizer=True).save(str(checkpoint / "tokenizer.json"))


def untouched(checkpoint):
    """As Pythia's and OPT's configs: they do not say whether spaces before signs are taken out."""


@in_chromium
@pytest.mark.parametrize("change", [untouched, spaced])
def test_texts_and_what_they_go_on_with_are_ours_with_other_tokenizers(serve, tab, tmp_path, change):
    checkpoint = shutil.copytree(EXAMPLES / "tiny-python", tmp_path / "c")
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    config.pop("clean_up_tokenization_spaces", None)
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config))
    change(checkpoint)
    bundle = dijiang.export(checkpoint, tmp_path / "b", calibration_tokens=0, precision="int8", verify=False).path
    model = dijiang.load(bundle, graph="native")
    parts = ["def f(self):", " return x", "self . x != 1 , 'd' 's"]
    state, expected = model.new_state(), []
    for part in parts:
        fed = model.tokenizer.encode(part, start=not expected)
        records = list(model.generate(part, max_tokens=5, state=state, ignore_eos=True))
        expected.append([fed, [record.token for record in records]])
    ids = model.tokenizer.encode(parts[2])
    streams = [ids, *(model.tokenizer.encode(text, start=False) for text in ("é ∑ 😀", "\n你好"))]
    code = """async ([parts, streams]) => {
      const { Model, TextStream } = await import("./dijiang.js");
      const model = await Model.load(location.origin + "/bundle/", { provider: "cpu" });
      model.spec.eos_token_ids = [];
      const state = model.newState();
      const found = [];
      for (const part of parts) {
        const made = [];
        const fed = model.read(part, !found.length);
        for await (const _ of model.generate(part, { state, maxTokens: 5, onToken: (id) => made.push(id) }));
        found.push([fed, made]);
      }
      const texts = streams.map((ids) => {
        const stream = new TextStream(model.tokenizer, []);
        return ids.map((id) => stream.push(id)).join("") + stream.flush();
      });
      return { found, texts };
    }"""
    tab.goto(serve(bundle)[0])
    done = tab.evaluate(code, [parts, streams])
    assert done["found"] == expected
    assert done["texts"] == [parts[2], "é ∑ 😀", "\n你好"]


@in_chromium
def test_last_token_before_positions_end_is_told_and_what_does_not_fit_was_not_written(serve, tab, tmp_path):
    checkpoint = shutil.copytree(GOLDEN["neox-trained-decay"], tmp_path / "c")
    letters = [letter for letter in sorted(pre_tokenizers.ByteLevel.alphabet()) if letter.isascii()]
    made = Tokenizer(models.BPE({letter: at for at, letter in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.save(str(checkpoint / "tokenizer.json"))
    bundle = dijiang.export(checkpoint, tmp_path / "b", verify=False).path
    limit = json.loads((bundle / "dijiang.json").read_text())["positions_limit"]
    address, _ = serve(bundle)
    tab.goto(address)
    ready(tab)
    done = tab.evaluate(SCRIPT, [["abcd"], 2 * limit, {"provider": "cpu"}])
    assert done["found"] == [list(ours(bundle, "abcd", 2 * limit, graph="native"))]
    long = "a" * (limit + 1)
    tab.run(f"document.getElementById('prompt').value = {json.dumps(long)}")
    tab.click("#write")
    tab.until("document.getElementById('status').textContent.includes('positions end')")
    ready(tab)
    assert tab.text("#text") == ""
    assert tab.run("document.getElementById('prompt').value") == long


@in_chromium
def test_bundle_without_a_tokenizer_says_so(serve, tab, exported):
    tab.goto(serve(exported("neox-base"))[0])
    tab.until("document.getElementById('status').textContent.includes('the bundle has no tokenizer')")
    assert tab.run("document.getElementById('write').disabled")
    code = """async () => {
      const { Model } = await import("./dijiang.js");
      const model = await Model.load(location.origin + "/bundle/", { provider: "cpu" });
      return model.generate("x").next().catch((error) => error.message);
    }"""
    assert tab.evaluate(code) == "the bundle has no tokenizer: give token ids"


def ready(tab):
    tab.until("!document.getElementById('write').disabled")


def test_the_page_goes_on_after_a_reload_and_without_a_network(serve, tab, exported):
    bundle = exported("tiny-python")
    address, server = serve(bundle)
    tab.goto(address)
    write(tab)
    prompt = PROMPTS[0]
    assert tab.text("#text") == prompt + ours(bundle, prompt, 50)[1]
    tab.until("navigator.serviceWorker.controller !== null")
    tab.reload()  # what was loaded before the worker came is kept now
    ready(tab)
    assert tab.text("#text") == prompt + ours(bundle, prompt, 50)[1]
    write(tab)
    assert tab.text("#text") == prompt + ours(bundle, prompt, 100)[1]
    server.shutdown()
    server.server_close()
    tab.reload()
    write(tab)
    assert tab.text("#text") == prompt + ours(bundle, prompt, 150)[1]
    tab.click("#clear")
    ready(tab)
    tab.reload()
    ready(tab)
    assert tab.text("#text") == ""


def test_a_browser_without_room_for_the_files_runs_them(serve, tab, exported):
    full = "async () => { throw new DOMException('full', 'QuotaExceededError'); }"
    tab.before_each(f"if (globalThis.Cache) Cache.prototype.put = {full}")
    bundle = exported("tiny-python")
    address, _ = serve(bundle)
    tab.goto(address)
    write(tab)
    assert tab.text("#text") == PROMPTS[0] + ours(bundle, PROMPTS[0], 50)[1]


def test_a_damaged_file_is_refused_and_not_kept(serve, tab, exported, copy_of):
    bundle = copy_of(exported("tiny-python"))
    data = bundle / "model.onnx.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    address, _ = serve(bundle)
    tab.goto(address)
    tab.until("document.getElementById('status').textContent.includes('damaged or of another bundle')")
    data.write_bytes(whole)
    tab.reload()
    write(tab)


@in_chromium
def test_another_bundle_at_the_same_address_replaces_the_kept_one(serve, tab, exported, tmp_path):
    first, second = exported("tiny-python"), exported("tiny-python-published")
    place = tmp_path / "bundle"
    place.symlink_to(first)
    address, _ = serve(place)
    tab.goto(address)
    write(tab)
    place.unlink()
    place.symlink_to(second)
    tab.reload()
    ready(tab)
    assert tab.text("#text") == ""  # the state was of another checkpoint
    found = tab.evaluate(SCRIPT, [PROMPTS[:1], 20, {}])["found"][0][0]
    assert found == ours(second, PROMPTS[0], 20)[0]
    kept = tab.run("caches.open('dijiang').then(c => c.keys()).then(keys => keys.map(key => key.url))")
    files = json.loads((second / "dijiang.json").read_text())["files"].values()
    listed = {"".join(chunk[:8] for chunk in record["sha256"]) for record in files}
    assert {url.split("?")[1] for url in kept if "?" in url} <= listed


@in_chromium
def test_an_address_below_the_page_drops_what_another_bundle_had(serve, tab, exported, tmp_path):
    first, second = exported("tiny-python"), exported("tiny-python", precision="int8")
    place = tmp_path / "bundle"
    place.symlink_to(first)
    address, _ = serve(place)
    tab.goto(address)
    ready(tab)
    code = """async () => {
      const { Model } = await import("./dijiang.js");
      await caches.delete("dijiang");
      await Model.load("bundle/", { provider: "cpu" });
      return (await (await caches.open("dijiang")).keys()).length;
    }"""
    files = tab.evaluate(code)
    place.unlink()
    place.symlink_to(second)
    assert tab.evaluate(code.replace('await caches.delete("dijiang");', "")) == files


@in_chromium
def test_manifests_that_are_not_read_are_one_line(serve, tab, exported, copy_of):
    bundle = copy_of(exported("tiny-python", graph="ort"))
    manifest = json.loads((bundle / "dijiang.json").read_text())
    address, _ = serve(bundle)
    tab.goto(address)
    ready(tab)
    code = """async () => {
      const { Model } = await import("./dijiang.js");
      return Model.load("bundle/", { provider: "cpu" }).then(() => "", (error) => error.message);
    }"""
    assert "cpu: the bundle has no native graph" in tab.evaluate(code)
    changes = {
        "bundle format 3, this page reads 2; export the checkpoint again": {"format_version": 3},
        "bundle format 1, this page reads 2": {"format_version": 1},
        "no graphs, no spec or no weights": {"spec": None},
        "no spec or no weights; export": {"files": {}},
        "no graphs, no spec": {"graphs": None},
    }
    for reason, change in changes.items():
        (bundle / "dijiang.json").write_text(json.dumps(manifest | change))
        assert reason in tab.evaluate(code)


@in_chromium
def test_a_state_has_one_generation_at_a_time(serve, tab, exported):
    bundle = exported("tiny-python")
    tab.goto(serve(bundle)[0])
    code = """async () => {
      const { Model } = await import("./dijiang.js");
      const model = await Model.load("bundle/");
      const state = model.newState();
      const ids = [];
      let refused;
      for await (const _ of model.generate("def main(", { state, maxTokens: 12, onToken: (id) => ids.push(id) })) {
        refused ??= await model.generate("x", { state }).next().catch((error) => error.message);
      }
      for await (const _ of model.generate("", { state, maxTokens: 5, onToken: (id) => ids.push(id) })) break;
      for await (const _ of model.generate("", { state, maxTokens: 2, onToken: (id) => ids.push(id) }));
      return [ids, refused];
    }"""
    ids, refused = tab.evaluate(code)
    assert refused.startswith("the state is in use by a generation that has not ended")
    assert ids == ours(bundle, "def main(", len(ids))[0]


@in_chromium
def test_a_state_of_another_checkpoint_is_refused(serve, tab, exported):
    address, _ = serve(exported("tiny-python"))
    tab.goto(address)
    code = """async () => {
      const { Model } = await import("./dijiang.js");
      const model = await Model.load(location.origin + "/bundle/");
      const state = model.newState();
      state.fingerprint = "x";
      const errors = [];
      for (const [prompt, given] of [["a", state], ["", model.newState()]]) {
        await model.generate(prompt, { state: given }).next().catch((error) => errors.push(error.message));
      }
      return errors;
    }"""
    assert tab.evaluate(code) == ["the state is of another checkpoint", "nothing to go on from: give a prompt"]
