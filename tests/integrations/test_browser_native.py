"""Our module of WebAssembly and its reader of native graphs, in browsers: the bits of the compiled operators."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

import dijiang
from dijiang.models.activations import ACTIVATIONS
from dijiang.models.load import load_checkpoint
from dijiang.models.reference import Reference
from dijiang.nodes import DOMAIN
from dijiang.runtime.operators import operator_library
from tests.chromium import PROGRAM, Chromium
from tests.conftest import EXAMPLES, onnx_file
from tests.graph.test_families import NAMED
from tests.native import norms, products, steps
from tests.native.test_kernels import same_bits
from tests.random_models import float32_gate, write

pytestmark = pytest.mark.ecosystem
in_chromium = pytest.mark.parametrize("browser", ["chromium"], indirect=True)
BUILDS = ["core-relaxed.wasm", "core.wasm"]
#: A family, and a variant whose every node between the norms is ours or exact.
FAMILIES = {
    "gpt_neox": NAMED["neox-parallel"],
    "opt": NAMED["opt-350m-like"],
    "llama": NAMED["llama-gqa-4"] | {"hidden_act": "relu"},
}


@pytest.fixture
def page(serve, tab, exported):
    """A tab that can import the module."""
    tab.goto(serve(exported("tiny-python"))[0])
    return tab


@pytest.fixture
def builds(page):
    """Those of BUILDS that this browser compiles."""
    code = """async (builds) => {
      const data = await Promise.all(builds.map(async (name) => (await fetch(name)).arrayBuffer()));
      return builds.filter((_, at) => WebAssembly.validate(data[at]));
    }"""
    return page.evaluate(code, BUILDS)


@pytest.fixture(params=BUILDS)
def build(request, builds):
    if request.param not in builds:
        pytest.skip(f"this browser does not compile {request.param}")
    return request.param


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


#: Runs a model of one node on each of `feeds`; a result of each.
NODE = """async ([build, model, longest, feeds, results]) => {
  const { loadCore } = await import("./core.js");
  const { Graph } = await import("./graph.js");
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const text = (view) => {
    const all = new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
    let found = "";
    for (let at = 0; at < all.length; at += 4096) found += String.fromCharCode(...all.subarray(at, at + 4096));
    return btoa(found);
  };
  const graph = await Graph.load(bytes(model), await loadCore([build]), null, longest);
  return feeds.map((feed) => {
    for (const [name, data] of Object.entries(feed)) graph.write(name, new Float32Array(bytes(data).buffer));
    graph.run();
    return results.map((name) => text(graph.view(name)));
  });
}"""


def run(page, build, model, feeds, results, rows=1):
    """results of a model of one node for each of `feeds`, as flat float32 arrays."""
    given = [{name: text(np.ascontiguousarray(value).tobytes()) for name, value in feed.items()} for feed in feeds]
    found = page.evaluate(NODE, [build, text(model), {"batch": 1, "tokens": rows}, given, results])
    return [[np.frombuffer(base64.b64decode(part), np.float32) for part in parts] for parts in found]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """What the plain twin computes of every single node."""
    path = tmp_path_factory.mktemp("plain") / "plain.npz"
    command = [sys.executable, "-m", "tests.native.steps", str(path)]
    subprocess.run(command, env=os.environ | {"DIJIANG_ISA": "plain"}, cwd=EXAMPLES.parent, check=True)
    return dict(np.load(path))


def test_steps_have_the_bits_of_the_plain_twin(page, plain, build):
    for name, case in steps.EVEN.items():
        [(output, present)] = run(page, build, steps.node(case), [steps.inputs(case)], ["output", "present"])
        assert same_bits(output, plain[f"{name}.output"].ravel()), name
        assert same_bits(present, plain[f"{name}.present"].ravel()), name


def test_products_have_the_bits_of_the_plain_twin_whatever_the_rows(page, plain, build):
    counts = (products.ROWS, *products.FEWER)
    for name, case in products.CASES.items():
        product = products.Product.of(case)
        feeds = [{"x": product.x[:rows]} for rows in counts]
        found = run(page, build, product.model(), feeds, ["y"], products.ROWS)
        for rows, (y,) in zip(counts, found, strict=True):
            assert same_bits(y, plain[f"{name}.{rows}-rows"].ravel()), (name, rows)


def test_sums_of_products_are_exact_at_the_ends_of_their_range(page, build):
    """Codes and inputs at their largest, where a kernel with less room would saturate: the sum is an integer."""
    inputs = 64
    for bits, codes in [(8, (0, 255)), (4, (0, 15))]:
        for code in codes:
            for sign in (1, -1):
                case = products.Case(inputs, 16, bits=bits, rotation=1, scale_bytes=4)
                product = products.Product(
                    case,
                    np.full((1, inputs), sign * 127, np.float32),
                    np.full((16, 1, inputs), code, np.uint8),
                    np.ones((16, 1), np.float32),
                    None,
                )
                [(y,)] = run(page, build, product.model(), [{"x": product.x}], ["y"])
                assert (y == sign * 127 * inputs * (code - 2 ** (bits - 1))).all(), (bits, code, sign)


def test_norms_have_the_bits_of_the_plain_twin(page, plain, build):
    for name, case in norms.CASES.items():
        [(y, total)] = run(page, build, norms.model(case), [norms.inputs(case)], ["y", "sum"], norms.ROWS)
        assert same_bits(y, plain[f"{name}.output"].ravel()), name
        assert same_bits(total, plain[f"{name}.sum"].ravel()), name


def test_multiply_add_rounds_once(page, plain, build):
    code = """async ([build, given]) => {
      const core = await (await import("./core.js")).loadCore([build]);
      core.memory.grow(32);
      const start = core.__heap_base.value;
      const bytes = given.map((text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)));
      const size = bytes[0].length;
      const memory = new Uint8Array(core.memory.buffer);
      bytes.forEach((one, at) => memory.set(one, start + at * size));
      const found = [];
      for (const together of [size / 4, 3]) { // vectors, and none
        for (let at = start; at < start + size; at += 4 * together) {
          const count = Math.min(together, (start + size - at) / 4);
          core.multiply_add(count, ...[0, 1, 2, 3].map((which) => at + which * size));
        }
        found.push([...new Int32Array(core.memory.buffer, start + 3 * size, size / 4)]);
      }
      return found;
    }"""
    found = page.evaluate(code, [build, [text(row.tobytes()) for row in steps.triples()]])
    for one in found:
        assert same_bits(np.array(one, np.int32).view(np.float32), plain["multiply_add"])


def with_our_norms(bundle: Path) -> onnxruntime.InferenceSession:
    """The native graph of a bundle, with our nodes for all norms: ONNX Runtime's own add in another order."""
    file = onnx_file(bundle, "native")
    model = onnx.load(file, load_external_data=False)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        if node.op_type in ("LayerNormalization", "RMSNormalization"):
            (x, *weights), (y,) = node.input, node.output
            epsilon = next(a.f for a in node.attribute if a.name == "epsilon")
            centred = int(node.op_type == "LayerNormalization")
            model.graph.node.append(helper.make_node("Sub", [x, x], [f"{y}.zero"]))
            node = helper.make_node(
                "AddNorm",
                [x, f"{y}.zero", *weights],
                [y, f"{y}.sum"],
                domain=DOMAIN,
                epsilon=epsilon,
                centred=centred,
            )
        model.graph.node.append(node)
    edited = file.with_name("edited.onnx")
    onnx.save(model, edited)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(operator_library()))
    session = onnxruntime.InferenceSession(str(edited), options, providers=["CPUExecutionProvider"])
    edited.unlink()
    return session


def logits_of(session: onnxruntime.InferenceSession, pieces: list[list[int]]) -> list[np.ndarray]:
    """The logits of the last token of each piece, one after the other."""
    layers = {
        i.name: np.zeros([1, *i.shape[1:]], np.float32)
        for i in session.get_inputs()
        if i.name.startswith("past_key_values")
    }
    found, position = [], 0
    for ids in pieces:
        feeds = layers | {
            "input_ids": np.array([ids]),
            "position_ids": np.arange(position, position + len(ids))[None],
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "logit_indices": np.array([[len(ids) - 1]]),
        }
        if any(i.name == "sequence_starts" for i in session.get_inputs()):
            feeds["sequence_starts"] = np.array([0, len(ids)])
        outputs = [name.replace("past_key_values", "present") for name in layers]
        logits, *states = session.run(["logits", *outputs], feeds)
        layers = dict(zip(layers, states, strict=True))
        found.append(logits.ravel())
        position += len(ids)
    return found


#: The logits of the last token of each piece.
LOGITS = """async ([pieces, options]) => {
  const { Model } = await import("./dijiang.js");
  const model = await Model.load(location.origin + "/bundle/", { provider: "cpu", ...options });
  const state = model.newState();
  const found = [];
  for (const ids of pieces) {
    await model.step(ids, state);
    found.push([...model.session.graph.view("logits")]);
  }
  return found;
}"""


def made(family, precision, folder, **options):
    """A bundle of a small random model of a family."""
    checkpoint = write(folder, FAMILIES[family], seed=3)
    options = {"precision": precision, "calibration_tokens": 0, "verify": False} | options
    return dijiang.export(checkpoint, folder / "bundle", **options).path


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_have_the_bits_of_the_native_graph(build, serve, tab, tmp_path, family, precision):
    bundle = made(family, precision, tmp_path)
    ids = np.random.default_rng(1).integers(0, 61, 30).tolist()
    pieces = [ids[:17], ids[17:18], ids[18:19], ids[19:]]
    session = with_our_norms(bundle)
    tab.goto(serve(bundle)[0])
    found = tab.evaluate(LOGITS, [pieces, {"builds": [build]}])
    for one, expected in zip(found, logits_of(session, pieces), strict=True):
        assert same_bits(np.array(one, np.float32), expected)


#: Every variant, and every activation where it is a node of its own.
VARIANTS = NAMED | {name: NAMED["neox-sequential-tied"] | {"hidden_act": name} for name in ACTIVATIONS}


@in_chromium
@pytest.mark.parametrize("name", VARIANTS)
def test_fp32_meets_float64_in_every_variant(serve, tab, tmp_path, name):
    """Beside the reference in float64, with the bound that an fp32 export must meet; trained decay, too."""
    config = VARIANTS[name]
    checkpoint = write(tmp_path, config, trained=True, seed=1)
    bundle = dijiang.export(checkpoint, tmp_path / "bundle", verify=False).path
    ids = np.random.default_rng(1).integers(0, config["vocab_size"], 17)
    expected = Reference(load_checkpoint(checkpoint)).forward(ids[None])
    gate = float32_gate(checkpoint, ids[None], expected)
    tab.goto(serve(bundle)[0])
    pieces = [ids[:9].tolist(), ids[9:10].tolist(), ids[10:].tolist()]
    for build in BUILDS if name in NAMED else BUILDS[:1]:
        found = tab.evaluate(LOGITS, [pieces, {"builds": [build]}])
        for logits, at in zip(found, (8, 9, 16), strict=True):
            assert np.abs(np.array(logits) - expected[0, at]).max() <= gate


#: Ids of a generation from ids.
TOKENS = """async ([prompt, count, options]) => {
  const { Model } = await import("./dijiang.js");
  const model = await Model.load(location.origin + "/bundle/", { provider: "cpu", ...options });
  const ids = [];
  for await (const _ of model.generate(prompt, { maxTokens: count, onToken: (id) => ids.push(id) }));
  return ids;
}"""


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("name", ["neox-sequential-tied", "opt-350m-like", "llama-gqa-4"])
def test_50_tokens_are_those_of_the_native_graph(builds, serve, tab, tmp_path, name, precision):
    """A prompt that is longer than a piece, in a model whose positions have no end."""
    config = NAMED[name] | {"max_position_embeddings": 600}
    checkpoint = write(tmp_path, config, seed=1)
    bundle = dijiang.export(
        checkpoint, tmp_path / "bundle", precision=precision, calibration_tokens=0, verify=False
    ).path
    prompt = np.random.default_rng(1).integers(1, 61, 300).tolist()
    expected = [r.token for r in dijiang.load(bundle, graph="native").generate(prompt, max_tokens=50)]
    tab.goto(serve(bundle)[0])
    for build in builds:
        assert tab.evaluate(TOKENS, [prompt, 50, {"builds": [build]}]) == expected


@in_chromium
def test_states_take_turns_and_come_back(serve, tab, exported):
    """Two texts in turn, one of them saved and taken up by another model, are what each is alone."""
    bundle = exported("tiny-python", precision="int8")
    tab.goto(serve(bundle)[0])
    code = """async () => {
      const { Model, State } = await import("./dijiang.js");
      const [model, other] = [0, 0].map(() => Model.load(location.origin + "/bundle/", { provider: "cpu" }));
      const models = await Promise.all([model, other]);
      const states = [models[0].newState(), models[0].newState()];
      const found = [[], []];
      const go = async (which, at, prompt) => {
        const options = { state: states[at], maxTokens: 10, onToken: (id) => found[at].push(id) };
        for await (const _ of models[which].generate(prompt, options));
      };
      await go(0, 0, "def main(");
      await go(0, 1, "import os");
      await go(0, 0, "");
      states[1] = State.from(structuredClone(states[1].toObject()));
      await go(1, 1, "");
      await go(1, 0, "");
      await go(0, 1, "");
      return found;
    }"""
    found = tab.evaluate(code)
    model = dijiang.load(bundle, graph="native")
    for ids, prompt in zip(found, ("def main(", "import os"), strict=True):
        assert ids == [r.token for r in model.generate(prompt, max_tokens=30)]


@in_chromium
def test_a_refused_call_changes_no_state(serve, tab, exported):
    tab.goto(serve(exported("tiny-python"))[0])
    code = """async () => {
      const { Model } = await import("./dijiang.js");
      const model = await Model.load(location.origin + "/bundle/", { provider: "cpu" });
      const state = model.newState();
      await model.step([1, 2, 3], state);
      const before = JSON.stringify(state.toObject());
      const errors = [];
      for (const ids of [[5, 100000], [-1], [1.5], Array(257).fill(1), []]) {
        await model.step(ids, state).catch((error) => errors.push(error.message));
      }
      return [errors, JSON.stringify(state.toObject()) === before];
    }"""
    errors, same = tab.evaluate(code)
    vocabulary = json.loads((EXAMPLES / "tiny-python" / "config.json").read_text())["vocab_size"]
    tokens = [f"token {token}, expected 0 to {vocabulary - 1}" for token in ("100000", "-1", "1.5")]
    assert errors == [*tokens, "input_ids: 257 at once, expected at most 256", "no token to feed"]
    assert same


@in_chromium
@pytest.mark.parametrize("options", [{"provider": "cpu"}, {"provider": "wasm"}], ids=["ours", "onnxruntime"])
def test_nan_ends_a_text(serve, tab, exported, options):
    tab.goto(serve(exported("tiny-python"))[0])
    code = """async ([options]) => {
      const { Model } = await import("./dijiang.js");
      const model = await Model.load(location.origin + "/bundle/", options);
      const state = model.newState();
      const text = async () => { for await (const _ of model.generate("def main(", { state, maxTokens: 3 })); };
      await text();
      state.layers = state.layers.map((layer) => layer.map(() => NaN));
      return text().catch((error) => error.message);
    }"""
    assert tab.evaluate(code, [options]) == "the state holds NaN: begin a new one"


@in_chromium
def test_positions_of_tabled_decay_end(serve, tab, exported):
    """Nothing beyond a table is read."""
    bundle = exported("neox-trained-decay")
    limit = json.loads((bundle / "dijiang.json").read_text())["positions_limit"]
    tab.goto(serve(bundle)[0])
    code = """async (limit) => {
      const { Model } = await import("./dijiang.js");
      const model = await Model.load(location.origin + "/bundle/", { provider: "cpu" });
      const state = model.newState();
      state.position = limit - 2;
      await model.step([1, 2], state);
      return model.step([1], state).catch((error) => error.message);
    }"""
    assert tab.evaluate(code, limit) == f"the model's positions end at {limit}"


def changed(name: str, change):
    """A server that changes one file of the page."""

    def wrap(handler):
        class Changed(handler):
            def do_GET(self):
                if not self.path.endswith(f"/{name}"):
                    return super().do_GET()
                data = change(Path(self.translate_path(self.path)).read_bytes())
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        return Changed

    return wrap


def said(tab, address, provider="cpu"):
    """What the page says when it is loaded."""
    tab.goto(f"{address}?provider={provider}")
    tab.until("document.getElementById('status').textContent !== 'Loading the bundle'")
    return tab.text("#status")


def test_a_cut_module_is_said_in_one_line_and_the_other_build_or_runtime_runs(serve, tab, exported):
    bundle = exported("tiny-python")
    address, _ = serve(bundle, changed("core-relaxed.wasm", lambda data: data[:5000]))
    assert said(tab, address).startswith("cpu, native graph")
    address, _ = serve(
        bundle,
        lambda handler: changed("core.wasm", lambda d: d[:9])(
            changed("core-relaxed.wasm", lambda d: d[:9])(handler)
        ),
    )
    line = said(tab, address)
    assert "core.wasm: 9 bytes that this browser does not compile" in line
    assert "\n" not in line
    tab.goto(address)
    tab.until("document.getElementById('status').textContent.startsWith('wasm, ort graph')")


def test_a_browser_without_simd_runs_onnxruntime(serve, tab, exported):
    small = "bytes.byteLength < 10000"  # what onnxruntime-web asks with
    tab.before_each(f"const real = WebAssembly.validate; WebAssembly.validate = (bytes) => {small} && real(bytes)")
    tab.goto(serve(exported("tiny-python"))[0])
    tab.until("document.getElementById('status').textContent.startsWith('wasm, ort graph')")


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium here; .ci/run installs one")
def test_an_engine_that_rounds_twice_gets_the_plain_build(serve, tmp_path):
    """V8 without its multiply-add rounds a relaxed one twice. The logits are the same."""
    bundle = made("opt", "int8", tmp_path)
    address = serve(bundle)[0]
    ids = list(range(1, 12))
    code = """async () => {
      const { loadCore } = await import("./core.js");
      const names = [];
      await loadCore(undefined, async (name) => (names.push(name), (await fetch(name)).arrayBuffer()));
      return names;
    }"""
    found = {}
    for flag in ("", "--js-flags=--no-enable-fma3"):
        browser = Chromium(tmp_path / f"profile{flag}", flag)
        with browser.tab() as tab:
            tab.goto(address)
            found[flag] = tab.evaluate(code), tab.evaluate(LOGITS, [[ids], {}])
        browser.close()
    (names, logits), (again, others) = found.values()
    assert (names, again) == (BUILDS[:1], BUILDS)
    assert logits == others


def test_a_bundle_without_a_native_graph_runs_onnxruntime(serve, tab, exported):
    address, _ = serve(exported("tiny-python", graph="ort"))
    assert "cpu: the bundle has no native graph" in said(tab, address)
    tab.goto(address)
    tab.until("document.getElementById('status').textContent.startsWith('wasm, ort graph')")


def test_what_does_not_fit_is_one_line(page):
    """Cut weights and graphs, foreign nodes and shapes: of files whose hashes are right, too."""
    product = products.Product.of(products.CASES["8-bits"])
    whole = product.model()

    def edited(change):
        model = onnx.load_from_string(whole)
        change(model.graph)
        return model.SerializeToString()

    def elsewhere(graph):
        codes = next(tensor for tensor in graph.initializer if tensor.name == "codes")
        codes.ClearField("raw_data")
        codes.data_location = onnx.TensorProto.EXTERNAL
        for key, value in {"location": "w.data", "offset": "0", "length": "16384"}.items():
            codes.external_data.add(key=key, value=value)

    def attribute(name, value):
        def change(graph):
            next(a for a in graph.node[0].attribute if a.name == name).i = value

        return change

    def scale_of_nothing(graph):
        next(tensor for tensor in graph.initializer if tensor.name == "scales").raw_data = bytes(128 * 2 * 2)

    cases = {
        "a graph that is cut": whole[:-7],
        "a graph without nodes: damaged, or no ONNX file": b"",
        "w.data is cut: codes is not whole": edited(elsewhere),
        "a node  Loop, which is not known here": edited(
            lambda graph: graph.node[0].MergeFrom(onnx.NodeProto(op_type="Loop", domain=""))
        ),
        "MatMul: K, N, bits, block_size and rotation do not go together": edited(attribute("bits", 5)),
        "MatMul: shapes of codes, scales and bias do not fit K and N": edited(attribute("N", 64)),
        "scales: a scale is 0 or no number; export the bundle again": edited(scale_of_nothing),
    }
    code = """async (models) => {
      const { loadCore } = await import("./core.js");
      const { Graph } = await import("./graph.js");
      const errors = [];
      for (const model of models) {
        const bytes = Uint8Array.from(atob(model), (c) => c.charCodeAt(0));
        const read = async () => new Uint8Array(100);
        const loading = Graph.load(bytes, await loadCore(), read, { batch: 1, tokens: 4 });
        await loading.catch((error) => errors.push(error.message));
      }
      return errors;
    }"""
    assert page.evaluate(code, [text(model) for model in cases.values()]) == list(cases)
