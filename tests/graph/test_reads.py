"""Bytes that a step reads, against a count over the file."""

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from dijiang.bundle.opened import open_bundle
from dijiang.graph.builder import GraphBuilder
from dijiang.graph.reads import parameter_reads
from dijiang.graph.roles import Role


def test_reads_of_a_bundle_are_its_initializers_less_the_tables(exported):
    bundle = open_bundle(exported("tiny-python"))
    graph = onnx.load(bundle.graph_file("ort"), load_external_data=False).graph
    sizes = {i.name: np.prod(i.dims, dtype=int) * (4 if i.data_type == 1 else 8) for i in graph.initializer}
    tables = {n.input[0] for n in graph.node if n.op_type == "Gather"} & set(sizes)
    rows = {i.name: i.dims[0] for i in graph.initializer if i.name in tables}
    assert bundle.manifest.graphs["ort"].reads == {
        "step": sum(size for name, size in sizes.items() if name not in tables),
        "token": sum(sizes[name] // rows[name] for name in tables),
    }
    assert "embed.weight" in tables


@pytest.mark.parametrize("tied", [False, True])
def test_a_table_that_is_also_multiplied_is_read_whole(tied):
    b = GraphBuilder(17)
    ids = b.input("ids", ir.DataType.INT64, ["n"])
    table = b.weight("table", (8, 4), lambda: np.zeros((8, 4)), Role.HEAD if tied else Role.TABLE)
    x = b.op("Gather", table, ids, axis=0)
    y = b.op("MatMul", x, b.op("Transpose", table)) if tied else x
    b.output(y, "y", ir.DataType.FLOAT, ["n", "m"])
    expected = {"step": 128, "token": 0} if tied else {"step": 0, "token": 16}
    assert parameter_reads(b.model("m")) == expected


def test_an_older_bundle_without_the_note_is_not_benched_but_still_loads(exported):
    from dijiang.bench.subject import bundle_side
    from dijiang.errors import InputError

    bundle = open_bundle(exported("tiny-python"))
    graphs = bundle.manifest.graphs
    assert all(record.reads["step"] > 0 for record in graphs.values())
    older = {name: replace(record, reads={}) for name, record in graphs.items()}
    with pytest.raises(InputError, match="export it again"):
        bundle_side("older", replace(bundle, manifest=replace(bundle.manifest, graphs=older)))
