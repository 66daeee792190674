"""The reader of graphs: it reads what the onnx package, its twin, reads by its own code, or refuses it."""

from contextlib import suppress
from itertools import product

import onnx
import onnx_ir as ir
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

import dijiang
from dijiang.bundle import wire
from dijiang.bundle.graphs import check_graph
from dijiang.bundle.opened import open_bundle
from dijiang.bundle.wire import OnnxGraph, read_onnx
from dijiang.errors import ExportError
from dijiang.exporter.pipeline import fitted, step_graph
from dijiang.graph.builder import GraphBuilder
from dijiang.models.activations import ACTIVATIONS
from dijiang.models.load import load_checkpoint
from dijiang.recipe import GRAPHS, PRECISIONS, SCHEMES, TARGETS, resolve
from tests.graph.test_families import NAMED
from tests.random_models import write

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
