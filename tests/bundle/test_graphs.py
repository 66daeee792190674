"""Graphs from strangers: what is no graph of ours, or does not fit the manifest, is refused before it runs."""

import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

import dijiang
from dijiang.cli import main
from tests.bundle.test_upgrade import as_format_1
from tests.conftest import GOLDEN, RUNNABLE, edit_manifest, onnx_file, signed

BASE = GOLDEN["neox-base"]


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
    edit_manifest(bundle, lambda manifest: manifest["spec"].update(changes))
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
    edit_manifest(bundle, lambda manifest: manifest["graphs"]["primitive"].update(file=new.name))
    edit_manifest(bundle, lambda manifest: manifest["files"].update({new.name: manifest["files"].pop(old.name)}))
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
