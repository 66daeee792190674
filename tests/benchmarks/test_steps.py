"""benchmarks/steps.py: what its tables count is there."""

import json

import onnx
import pytest
import steps
from click.testing import CliRunner

from dijiang.bench.measure import Effort
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


def test_report_has_each_graph_for_the_cpu_and_its_nodes(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "PRECISIONS", ("int8",))
    monkeypatch.setattr(steps, "Effort", lambda *_: Effort(2, 0.0, probe=False))
    arguments = [str(tmp_path / "cache"), "--preset", "tiny", "-o", str(tmp_path / "steps.json")]
    CliRunner().invoke(steps.main, arguments, catch_exceptions=False)
    found = json.loads((tmp_path / "steps.json").read_text())
    graphs = [graph for graph in ("native", "ort") if graph in RUNNABLE]
    assert [side["name"] for side in found["report"]["models"]] == [f"int8 {graph}" for graph in graphs]
    assert [(r["model"], r["session"]["graph"]) for r in found["report"]["results"][: len(graphs)]] == [
        (f"int8 {graph}", graph) for graph in graphs
    ]
    assert [(row["model"], row["tokens"]) for row in found["nodes"]] == [
        (f"int8 {graph}", length) for graph in graphs for length in steps.LENGTHS
    ]
    assert not found["report"]["errors"]
