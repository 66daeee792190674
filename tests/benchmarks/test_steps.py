"""benchmarks/steps.py: what its tables count is there."""

import onnx
import pytest
import steps

from dijiang.bundle.opened import open_bundle
from tests.conftest import RUNNABLE

pytestmark = pytest.mark.skipif("ort" not in RUNNABLE, reason="onnxruntime is older than 1.30")


@pytest.fixture
def bundle(exported):
    return open_bundle(exported("neox-base", precision="int8"), check_hashes=False)


def test_profile_counts_the_matmuls_of_the_graph(bundle):
    """Constants are folded when a session loads: of the products all are left."""
    graph = onnx.load(bundle.graph_file("ort"), load_external_data=False).graph
    found = {row["kind"]: row for row in steps.profile(bundle, "ort", 4)}
    assert found["MatMulNBits"]["nodes"] == sum(node.op_type == "MatMulNBits" for node in graph.node)
    assert all(row["ms"] > 0 for row in found.values())


def test_first_graph_is_what_others_are_compared_with(bundle, monkeypatch):
    monkeypatch.setattr(steps, "BLOCKS", 3)
    graphs = [graph for graph in bundle.manifest.graphs if graph in RUNNABLE][:2]
    found = steps.in_turn(bundle, graphs, 1)
    assert list(found) == graphs
    assert found[graphs[0]]["ratio"] == 1
    assert all(
        one["ms"] > 0 and one["quartiles"][0] <= one["ratio"] <= one["quartiles"][1] for one in found.values()
    )
