"""The picture of a layer holds each of its nodes once, and data flows down."""

import re
import sys
from xml.etree import ElementTree

import onnx_ir as ir
import pytest
from click.testing import CliRunner

import dijiang
from dijiang.bundle.opened import open_bundle
from dijiang.cli import main
from dijiang.graph.drawing import HEIGHT, draw, layer_of
from dijiang.graph.writer import write_graph
from dijiang.models.load import load_checkpoint
from tests.conftest import GOLDEN

SVG = "{http://www.w3.org/2000/svg}"


def graphs(bundle):
    opened = open_bundle(bundle)
    return {name: ir.load(opened.graph_file(name)).graph for name in opened.manifest.graphs}


def layers(graph):
    known = {}
    for node in graph:
        known[node] = layer_of(node, known)
    return known


@pytest.mark.parametrize("case", ["tiny-python", "neox-base"])
def test_each_node_of_a_layer_is_drawn_once(exported, case):
    for name, graph in graphs(exported(case)).items():
        known = layers(graph)
        count = dijiang.load(exported(case), check_hashes=False).spec.num_layers
        assert {layer for layer in known.values() if layer is not None} == set(range(count))
        for layer in range(count):
            root = ElementTree.fromstring(draw(graph, layer))
            drawn = sorted(
                group.findall(f"{SVG}text")[0].text for group in root if group.find(f"{SVG}rect") is not None
            )
            assert drawn == sorted(node.op_type for node, found in known.items() if found == layer), name


def test_a_layer_holds_its_own_weights_and_state(exported):
    graph = graphs(exported("tiny-python"))["primitive"]
    for node, layer in layers(graph).items():
        for value in (*node.inputs, *node.outputs):
            found = re.match(r"(?:layers|past_key_values|present)\.(\d+)", (value.name or "") if value else "")
            assert found is None or int(found[1]) <= layer


def test_boxes_lie_apart_and_edges_go_down(exported):
    root = ElementTree.fromstring(draw(graphs(exported("tiny-python"))["primitive"], 3))
    boxes = [(float(box.get("x")), float(box.get("y")), float(box.get("width"))) for box in root.iter(f"{SVG}rect")]
    assert len(set(boxes)) == len(boxes)
    for x, y, width in boxes:
        assert all(other == x or abs(other - x) > width for other, down, _ in boxes if down == y)
    edges = [list(map(float, re.findall(r"[\d.]+", path.get("d")))) for path in root.iter(f"{SVG}path")]
    assert len(edges) >= len(boxes) - 1
    ends = {y for _, y, _ in boxes}
    for edge in edges:
        assert edge[-1] - edge[1] > 0
        assert edge[1] - HEIGHT in ends
        assert edge[-1] in ends


def test_inspect_draws_the_graph_that_is_asked_for(exported, tmp_path):
    bundle = str(exported("tiny-python"))
    for arguments, node in (([], "RecurrentStep"), (["--graph", "ort"], "LinearAttention")):
        done = CliRunner().invoke(main, ["inspect", bundle, "--draw", str(tmp_path / "a.svg"), *arguments])
        assert done.exit_code == 0, done.output
        assert f">{node}<" in (tmp_path / "a.svg").read_text(encoding="utf-8")
    for arguments, reason in (
        (["--layer", "6"], "layer 6 is not in the graph, expected 0 to 5"),
        (["--graph", "onnx"], "onnx"),
    ):
        done = CliRunner().invoke(main, ["inspect", bundle, "--draw", str(tmp_path / "b.svg"), *arguments])
        assert done.exit_code == 1
        assert done.stderr.startswith("Error: ")
        assert reason in done.stderr
    assert not (tmp_path / "b.svg").exists()


@pytest.mark.parametrize("graph", ["native", "primitive"])
def test_before_and_after_stand_side_by_side(exported, tmp_path, graph):
    """Left what the writer wrote of the checkpoint, right what the bundle has; neither lies on the other."""
    bundle, file = exported("tiny-python", precision="fp32"), tmp_path / "both.svg"
    arguments = ["inspect", str(bundle), "--graph", graph, "--draw", str(file), "--layer", "2"]
    done = CliRunner().invoke(main, [*arguments, "--before", str(GOLDEN["tiny-python"])])
    assert done.exit_code == 0, done.output
    whole = ElementTree.parse(file).getroot()
    left, right = whole.findall(f"{SVG}svg")
    assert [text.text for text in whole.findall(f"{SVG}text")] == ["before the passes", f"after them: {graph}"]
    assert float(right.get("x")) == float(left.get("width"))
    written = draw(write_graph(load_checkpoint(GOLDEN["tiny-python"]), graph).graph, 2)
    assert boxes_of(left) == boxes_of(ElementTree.fromstring(written))
    assert boxes_of(right) == boxes_of(ElementTree.fromstring(draw(graphs(bundle)[graph], 2)))
    assert len(boxes_of(left)) > len(boxes_of(right))
    assert not {node for node, weight in boxes_of(right) if weight == "attn_norm.weight"}
    assert ("LayerNormalization", "attn_norm.weight") in boxes_of(left)
    _, _, width, height = map(float, whole.get("viewBox").split())
    for part in (left, right):
        assert float(part.get("x")) + float(part.get("width")) <= width
        assert float(part.get("y")) + float(part.get("height")) <= height


def boxes_of(picture):
    """What each box says: a node and its first weight."""
    groups = [group for group in picture.iter(f"{SVG}g") if group.find(f"{SVG}rect") is not None]
    return [(node.text, weight.text or "") for node, weight in (group.findall(f"{SVG}text") for group in groups)]


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        (["--before", str(GOLDEN["neox-base"])], 2, "--before would change nothing without --draw FILE"),
        (["--layer", "1"], 2, "--layer would change nothing without --draw FILE"),
        (["--graph", "ort"], 2, "--graph would change nothing without --draw FILE"),
        (["--draw", "a.png"], 1, "a.png: the picture is SVG"),
        (["--draw", "a.svg", "--before", str(GOLDEN["neox-base"])], 1, "is another model: its "),
        (["--draw", "a.svg", "--before", "nowhere"], 1, "nowhere"),
    ],
)
def test_before_without_its_checkpoint_is_refused(exported, tmp_path, monkeypatch, arguments, status, reason):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["inspect", str(exported("tiny-python")), *arguments])
    assert done.exit_code == status
    assert reason in done.stderr
    assert "Traceback" not in done.output
    assert not list(tmp_path.iterdir())


def test_a_picture_without_the_exporter_is_one_line(exported, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    done = CliRunner().invoke(main, ["inspect", str(exported("tiny-python")), "--draw", str(tmp_path / "a.svg")])
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: ")
    assert done.stderr.endswith("; pip install 'dijiang[export]'\n")
