"""Graphs from strangers: what is no graph of ours, or does not fit the manifest, is refused before it runs.

The twin of our reader is the onnx package: it reads the same bytes by its own code.
"""

import json
from contextlib import suppress
from itertools import product

import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

import dijiang
from dijiang.bundle import wire
from dijiang.bundle.graphs import check_graph
from dijiang.bundle.opened import open_bundle
from dijiang.bundle.wire import OnnxGraph, read_onnx
from dijiang.cli import main
from dijiang.errors import ExportError
from dijiang.exporter.pipeline import fitted, step_graph
from dijiang.graph.builder import GraphBuilder
from dijiang.models.activations import ACTIVATIONS
from dijiang.models.load import load_checkpoint
from dijiang.recipe import GRAPHS, PRECISIONS, SCHEMES, TARGETS, resolve
from tests.bundle.test_upgrade import as_format_1
from tests.conftest import GOLDEN, RUNNABLE, onnx_file, signed
from tests.graph.test_families import NAMED
from tests.random_models import write

BASE = GOLDEN["neox-base"]
#: Of graphs that older versions wrote.
OLD = {("", "Mod")}


def recipes():
    """Every graph form in every precision for every target that there is."""
    for precision, target, graph in product(PRECISIONS, TARGETS, GRAPHS):
        try:
            yield graph, resolve(precision, target=target, graph=graph)
        except ExportError:  # they do not go together
            continue


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Form -> (scheme, nodes) of every family in every recipe; nothing is computed or saved."""
    found = {name: set() for name in GRAPHS}
    for number, variant in enumerate(NAMED):
        folder = tmp_path_factory.mktemp("checkpoint")
        model = load_checkpoint(write(folder, NAMED[variant], trained=bool(number % 2)))
        for graph, recipe in recipes():
            nodes = step_graph(model, graph, fitted(recipe, model)).graph
            found[graph] |= {(recipe.scheme, (node.domain, node.op_type)) for node in nodes}
    return found


def activations(graph):
    """Nodes of every activation in a form."""
    builder = GraphBuilder(GRAPHS[graph].opset)
    x = builder.input("x", ir.DataType.FLOAT, [3])
    for row in ACTIVATIONS.values():
        (row.fused if GRAPHS[graph].fused else row.nodes)(builder, x)
    return {(node.domain, node.op_type) for node in builder._tape.nodes}


@pytest.mark.parametrize("graph", GRAPHS)
def test_nodes_that_we_write_are_allowed(written, graph):
    foreign = {kind for scheme, kind in written[graph] if kind not in GRAPHS[graph].nodes | SCHEMES[scheme].nodes}
    assert foreign | activations(graph) - GRAPHS[graph].nodes == set()


def test_no_node_is_allowed_that_we_do_not_write(written):
    every = set().union(*(activations(graph) | {kind for _, kind in written[graph]} for graph in GRAPHS))
    allowed = set().union(*(row.nodes for row in (*GRAPHS.values(), *SCHEMES.values())))
    assert allowed - every == OLD
    assert allowed.isdisjoint({("", name) for name in ("Loop", "If", "Scan", "SequenceMap", "Constant")})
    assert ("com.microsoft", "EPContext") not in allowed


def by_onnx(data):
    """What the onnx package reads."""
    model = onnx.ModelProto.FromString(bytes(data))
    graph = model.graph
    assert not model.functions
    assert not model.training_info
    assert not graph.sparse_initializer
    for node in graph.node:
        for attribute in node.attribute:
            assert not attribute.HasField("g")
            assert not attribute.HasField("t")
            assert not attribute.graphs
            assert not attribute.tensors
    return OnnxGraph(
        nodes=tuple(wire.Node((n.domain, n.op_type), tuple(n.input), tuple(n.output)) for n in graph.node),
        inputs=tuple(map(value_by_onnx, graph.input)),
        outputs=tuple(map(value_by_onnx, graph.output)),
        external=tuple(
            tuple((pair.key, pair.value) for pair in tensor.external_data)
            for tensor in graph.initializer
            if tensor.external_data
        ),
    )


def value_by_onnx(value):
    tensor = value.type.tensor_type
    sizes = (d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
    return wire.Value(value.name, tensor.elem_type if tensor.HasField("elem_type") else None, tuple(sizes))


@pytest.mark.parametrize("precision", ["fp32", "int8", "fp16"])
def test_reader_sees_what_onnx_sees(exported, precision):
    bundle = open_bundle(exported("neox-base", precision=precision))
    for name in bundle.manifest.graphs:
        data = bundle.graph_file(name).read_bytes()
        graph = read_onnx(data)
        assert graph == by_onnx(data)
        assert graph.external
        check_graph(graph, name, bundle.manifest)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small graph's bytes, the form's name, and the manifest."""
    folder = tmp_path_factory.mktemp("small")
    config = NAMED["neox-parallel"] | {"num_hidden_layers": 1}
    bundle = dijiang.export(write(folder, config), folder / "b", graph="primitive", verify=False)
    return bundle.graph_file("primitive").read_bytes(), "primitive", bundle.manifest


def mutated(data, edits):
    """Bytes after edits: (kind, place, value, length) each."""
    found = bytearray(data)
    for kind, place, value, length in edits:
        at = place % max(len(found), 1)
        if kind == "set":
            found[at : at + 1] = bytes([value])
        elif kind == "bit":
            found[at : at + 1] = bytes([found[at] ^ 1 << value % 8]) if found else b""
        elif kind == "cut":
            del found[at : at + length]
        elif kind == "twice":
            found[at:at] = found[at : at + length]
        else:
            del found[at:]
    return bytes(found)


EDIT = st.tuples(
    st.sampled_from(["set", "bit", "bit", "cut", "twice", "end"]),
    st.integers(0, 1 << 20),
    st.integers(0, 255),
    st.integers(1, 40),
)


@settings(max_examples=150, deadline=1000, derandomize=True)
@given(edits=st.lists(EDIT, min_size=1, max_size=3))
def test_mutated_graph_is_refused_or_read_as_onnx_reads_it(small, edits):
    data, name, manifest = small
    changed = mutated(data, edits)
    try:
        graph = read_onnx(changed)
        check_graph(graph, name, manifest)
    except ValueError:
        return
    try:
        theirs = by_onnx(changed)
    except (DecodeError, UnicodeDecodeError):  # in a part that is not looked at before onnxruntime does
        return
    assert graph == theirs


@settings(max_examples=150, deadline=1000, derandomize=True)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data):
    with suppress(ValueError):
        read_onnx(data)


def test_fields_are_counted(monkeypatch, small):
    monkeypatch.setattr(wire, "MOST_FIELDS", 100)
    with pytest.raises(ValueError, match="more than 100 fields"):
        read_onnx(small[0])


@pytest.fixture
def changed(exported, copy_of):
    """changed(edit): a bundle with right hashes after edit(model) on one of its graphs."""

    def apply(edit, graph="primitive"):
        bundle = copy_of(exported("neox-base", graph=graph))
        file = onnx_file(bundle)
        model = onnx.load(file, load_external_data=False)
        edit(model)
        file.write_bytes(model.SerializeToString())
        signed(bundle, file)
        return bundle

    return apply


def endless(model):
    """A Loop that never ends, before all else."""
    true = helper.make_node("Identity", ["go"], ["again"])
    values = [helper.make_tensor_value_info(n, TensorProto.BOOL, []) for n in ("go", "again")]
    count = helper.make_tensor_value_info("n", TensorProto.INT64, [])
    body = helper.make_graph([true], "body", [count, values[0]], [values[1]])
    model.graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
    model.graph.node.insert(0, helper.make_node("Loop", ["", "yes"], [], body=body))


def subgraph_of(kind):
    def edit(model):
        body = helper.make_graph([], "body", [], [])
        model.graph.node.append(helper.make_node(kind, [], ["never"], then_branch=body))

    return edit


def node(kind, domain="", **attributes):
    return lambda model: model.graph.node.append(
        helper.make_node(kind, ["input_ids"], ["never"], domain=domain, **attributes)
    )


def function(model):
    made = helper.make_function(
        "", "Add", ["a"], ["b"], [helper.make_node("Identity", ["a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    model.functions.append(made)


def sparse(model):
    values = helper.make_tensor("sparse", TensorProto.FLOAT, [1], [1.0])
    index = helper.make_tensor("index", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, index, [2]))


def trained(model):
    model.training_info.add()


def place(**places):
    """Where the first stored tensor lies, changed; None: not said."""

    def edit(model):
        tensor = next(t for t in model.graph.initializer if t.external_data)
        kept = {pair.key: pair.value for pair in tensor.external_data} | places
        del tensor.external_data[:]
        for key, value in kept.items():
            if value is not None:
                tensor.external_data.add(key=key, value=value)

    return edit


def placed_twice(model):
    tensor = next(t for t in model.graph.initializer if t.external_data)
    tensor.external_data.add(key="location", value="../secret")


FOREIGN = {
    "loop": (endless, "an attribute has a subgraph"),
    "if": (subgraph_of("If"), "an attribute has a subgraph"),
    "scan": (subgraph_of("Scan"), "an attribute has a subgraph"),
    "subgraph of our node": (subgraph_of("Add"), "an attribute has a subgraph"),
    "loop without a body": (node("Loop"), "node Loop, expected those of the primitive graph"),
    "unknown": (node("Nonsense"), "node Nonsense, expected"),
    "another domain": (node("Add", "evil"), r"node evil\.Add, expected"),
    "onnx by its long name": (node("Add", "ai.onnx"), r"node ai\.onnx\.Add, expected"),
    "a file by a node": (node("EPContext", "com.microsoft"), r"node com\.microsoft\.EPContext, expected"),
    "joined name": (node("microsoft.MatMulNBits", "com"), r"node com\.microsoft\.MatMulNBits, expected"),
    "node of another form": (node("LinearAttention", "com.microsoft"), "node com.microsoft.LinearAttention"),
    "node of another scheme": (node("DequantizeLinear"), "node DequantizeLinear, expected"),
    "tensor in a node": (
        node("Add", value=helper.make_tensor("t", TensorProto.FLOAT, [1], [1.0])),
        "an attribute has a tensor of its own",
    ),
    "function": (function, "the model has a function"),
    "sparse": (sparse, "the graph has a sparse tensor"),
    "training": (trained, "the model has a training graph"),
    "absolute path": (place(location="/etc/passwd"), "weights in '/etc/passwd', expected 'model.onnx.data'"),
    "path outside": (place(location="../secret"), r"weights in '\.\./secret', expected"),
    "memory": (place(location="*/_ORT_MEM_ADDR_/*"), "_ORT_MEM_ADDR_.*, expected 'model.onnx.data'"),
    "no path": (place(location=None), "weights in '', expected 'model.onnx.data'"),
    "two paths": (placed_twice, "weights with location, offset, length.*, expected location, offset"),
    "behind the end": (place(length="9" * 12), "weights at .*999999999999, expected a place in the"),
    "before the start": (place(offset="-1"), "weights at -1, .*expected a place in the"),
    "no number": (place(offset="1e3"), "weights at 1e3, .*expected a place in the"),
    "endless number": (place(offset="1" * 5000), "weights at 1{60}, .*expected a place in the"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_graph_is_refused(changed, case):
    edit, reason = FOREIGN[case]
    with pytest.raises(
        dijiang.BundleError, match=rf"primitive\.onnx: not a graph of dijiang \(.*{reason}"
    ) as found:
        dijiang.load(changed(edit))
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 600


def renamed(old, new):
    def edit(model):
        for value in (*model.graph.input, *model.graph.output):
            value.name = new if value.name == old else value.name
        for one in model.graph.node:
            for names in (one.input, one.output):
                names[:] = [new if name == old else name for name in names]

    return edit


def value_of(model, name):
    return next(v for v in (*model.graph.input, *model.graph.output) if v.name == name)


def retyped(name, kind):
    def edit(model):
        value_of(model, name).type.tensor_type.elem_type = kind

    return edit


def resized(name, at, size):
    def edit(model):
        value_of(model, name).type.tensor_type.shape.dim[at].dim_value = size

    return edit


def flattened(name):
    def edit(model):
        del value_of(model, name).type.tensor_type.shape.dim[-1]

    return edit


def sequence(model):
    value_of(model, "logits").type.sequence_type.elem_type.tensor_type.elem_type = 1


def more(model):
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))


def twice(model):
    model.graph.input.append(model.graph.input[0])


def without_output(model):
    del model.graph.output[-1]


def out_of_range(model):
    """next_tokens beyond the vocabulary."""
    renamed("next_tokens", "best")(model)
    value_of(model, "best").name = "next_tokens"
    model.graph.initializer.append(helper.make_tensor("far", TensorProto.INT64, [], [1 << 40]))
    model.graph.node.append(helper.make_node("Add", ["best", "far"], ["next_tokens"]))


PAST, PRESENT = "past_key_values.0.recurrent_state", "present.0.recurrent_state"
MISFITS = {
    "renamed input": (renamed("input_ids", "ids"), "no input input_ids, found .*ids"),
    "renamed state": (renamed(PAST, "state"), f"no input {PAST}, found "),
    "renamed output": (renamed("logits", "scores"), "no output logits, found scores"),
    "no output": (without_output, r"no output present\.1\.recurrent_state; the manifest says 2 layers"),
    "one input more": (more, "input more is not expected; the manifest says 2 layers"),
    "two inputs of a name": (twice, "two inputs of one name"),
    "type": (retyped("input_ids", TensorProto.INT32), r"input_ids of type 6 \[\*, \*\], expected input_ids int64"),
    "type of a state": (retyped(PRESENT, TensorProto.FLOAT16), "of type 10 .*, expected .*float32"),
    "rank": (flattened("input_ids"), r"input_ids int64 \[\*\], expected input_ids int64 \[\*, \*\]"),
    "fixed batch": (resized("input_ids", 0, 1), r"input_ids int64 \[1, \*\], expected input_ids int64 \[\*, \*\]"),
    "vocabulary": (
        resized("logits", 2, 7),
        r"logits float32 \[\*, \*, 7\], expected logits float32 \[\*, \*, \d+\]",
    ),
    "no tensor": (sequence, "a type has field 4"),
    "tokens out of range": (out_of_range, "next_tokens is not the ArgMax of logits"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_graph_that_does_not_fit_its_manifest_is_refused(changed, case):
    edit, reason = MISFITS[case]
    with pytest.raises(dijiang.BundleError, match=rf"not a graph of dijiang \(.*{reason}"):
        dijiang.load(changed(edit))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_layers": 1}, "is not expected; the manifest says 1 layers"),
        ({"num_layers": 3}, r"no input past_key_values\.2\.recurrent_state; the manifest says 3 layers"),
        ({"num_layers": 10**9}, "the manifest says 1000000000 layers"),
        ({"num_layers": 2.0}, r"not a whole manifest \(spec\.num_layers is float, expected int\)"),
        ({"vocab_size": 10**9}, r"expected logits float32 \[\*, \*, 1000000000\]"),
        ({"num_heads": 1, "num_kv_heads": 1, "rotary_dims": 0}, r"recurrent_state float32 .*, expected "),
    ],
    ids=str,
)
def test_manifest_that_does_not_fit_its_graph_is_refused(exported, copy_of, changes, reason):
    bundle = copy_of(exported("neox-base", graph="primitive"))
    manifest = json.loads((bundle / "dijiang.json").read_text())
    manifest["spec"] |= changes
    (bundle / "dijiang.json").write_text(json.dumps(manifest))
    with pytest.raises(dijiang.BundleError, match=reason):
        dijiang.load(bundle)


@pytest.mark.parametrize("data", [b"", b"\x08\x0a", b"\xff" * 99, b"\x3a\xff\xff\xff\xff\x0f"], ids=len)
def test_file_that_is_no_graph_is_refused(exported, copy_of, data):
    bundle = copy_of(exported("neox-base", graph="primitive"))
    onnx_file(bundle).write_bytes(data)
    signed(bundle, onnx_file(bundle))
    with pytest.raises(dijiang.BundleError, match="not a graph of dijiang"):
        dijiang.load(bundle)


def test_graph_in_another_format_by_its_name_is_refused(exported, copy_of):
    bundle = copy_of(exported("neox-base", graph="primitive"))
    old, new = onnx_file(bundle), onnx_file(bundle).with_suffix(".ort")
    old.rename(new)
    path = bundle / "dijiang.json"
    path.write_text(path.read_text().replace(old.name, new.name))
    with pytest.raises(dijiang.BundleError, match=r"its name does not end in \.onnx"):
        dijiang.load(bundle)


@pytest.mark.parametrize("graph", RUNNABLE)
def test_every_form_is_checked_unhashed_too(changed, graph):
    with pytest.raises(dijiang.BundleError, match="a subgraph"):
        dijiang.load(changed(endless, graph), check_hashes=False)


COMMANDS = {
    "run": ["run", "BUNDLE", "-p", "x"],
    "verify": ["verify", "BUNDLE", "--against", str(BASE)],
    "bench": ["bench", "BUNDLE", "-p", "1", "-n", "1"],
    "inspect": ["inspect", "BUNDLE", "--draw", "picture.svg"],
    "upgrade": ["upgrade", "BUNDLE"],
    "build": ["build", "BUNDLE"],
    "serve": ["serve", "BUNDLE", "--port", "0"],
}


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_verb_refuses_an_endless_graph(changed, verb):
    bundle = changed(endless)
    before = {file.name: file.read_bytes() for file in bundle.iterdir()}
    arguments = [str(bundle) if word == "BUNDLE" else word for word in COMMANDS[verb]]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1
    assert "a subgraph (of a Loop, If or Scan)" in done.stderr
    assert "Traceback" not in done.output
    assert {file.name: file.read_bytes() for file in bundle.iterdir()} == before


def test_old_bundle_of_a_stranger_is_left_as_it_is(changed):
    bundle = as_format_1(changed(endless), "primitive", "fp32")
    before = {file.name: file.read_bytes() for file in bundle.iterdir()}
    done = CliRunner().invoke(main, ["upgrade", str(bundle)])
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "a subgraph" in done.stderr
    assert {file.name: file.read_bytes() for file in bundle.iterdir()} == before


def dangling(model):
    model.graph.node[3].input[0] = "nowhere"


def negative(model):
    model.graph.initializer[0].dims[:] = [-7]


def untyped(model):
    next(n for n in model.graph.node if n.op_type == "Cast").ClearField("attribute")


def cyclic(model):
    one, other = model.graph.node[2], model.graph.node[5]
    one.input[0] = other.output[0]


def unstored(model):
    del next(t for t in model.graph.initializer if t.external_data).external_data[:]


BROKEN = {edit.__name__: edit for edit in (dangling, negative, untyped, cyclic, unstored)}


@pytest.mark.parametrize("case", BROKEN)
def test_graph_that_is_broken_inside_is_one_error(changed, case):
    bundle = changed(BROKEN[case])
    for use in (dijiang.load, lambda path: dijiang.verify(path, BASE, tokens=8, store=False)):
        with pytest.raises(dijiang.DijiangError, match=r"cannot (be read as a graph|load the primitive graph)"):
            use(bundle)


def misfit(at):
    """Input `at` of the compiled operator is one number."""

    def edit(model):
        model.graph.initializer.append(helper.make_tensor("small", TensorProto.FLOAT, [1], [0.5]))
        next(n for n in model.graph.node if n.op_type == "RecurrentStep").input[at] = "small"

    return edit


def heads(count):
    def edit(model):
        step = next(n for n in model.graph.node if n.op_type == "RecurrentStep")
        next(a for a in step.attribute if a.name == "kv_num_heads").i = count

    return edit


#: Of a step of three tokens of one sequence.
STARTS = ([0], [0, 2], [1, 3], [0, 4], [-1, 3], [3, 0], [0, 1, 3], [0, 1 << 62, 3])


def starts(numbers):
    """Where the sequences of every step begin, whatever the step."""

    def edit(model):
        model.graph.initializer.append(helper.make_tensor("wrong", TensorProto.INT64, [len(numbers)], numbers))
        next(n for n in model.graph.node if n.op_type == "RecurrentStep").input[10] = "wrong"

    return edit


def without_starts(model):
    """As native graphs were before there were ragged steps."""
    model.graph.input.remove(next(value for value in model.graph.input if value.name == "sequence_starts"))
    for node in model.graph.node:
        if node.op_type == "RecurrentStep":
            del node.input[10:]


@pytest.mark.skipif("native" not in RUNNABLE, reason="the operator is not compiled")
def test_native_graph_of_before_runs_as_it_did(changed, exported):
    old, new = dijiang.load(changed(without_starts, "native")), dijiang.load(exported("neox-base", graph="native"))
    assert (old.session.ragged, new.session.ragged) == (False, True)
    logits = [model.forward([[1, 2, 3]], model.new_state()).tobytes() for model in (old, new)]
    assert logits[0] == logits[1]


@pytest.mark.skipif("native" not in RUNNABLE, reason="the operator is not compiled")
@pytest.mark.parametrize(
    "edit", [*map(misfit, range(1, 10)), *map(starts, STARTS), heads(0), heads(-1), heads(1 << 62)]
)
def test_operator_reads_nothing_outside_of_its_tensors(changed, edit):
    bundle = changed(edit, "native")

    def step():
        model = dijiang.load(bundle)
        model.forward([[1, 2, 3]], model.new_state())

    with pytest.raises(dijiang.SessionError, match=r"RecurrentStep: |cannot load the native graph"):
        step()
