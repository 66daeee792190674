"""Second moments, layer by layer: the whole float32 graph in one session is their twin."""

import numpy as np
import onnx_ir as ir
import pytest
from scipy.special import softmax

from dijiang.exporter import pipeline
from dijiang.exporter.calibration import TOGETHER, LayerMoments, batches_of, draw, feeds_of
from dijiang.graph.passes import optimise
from dijiang.graph.passes.linear import linears
from dijiang.graph.roles import ROUNDED
from dijiang.graph.schemes.nbits import calibrated
from dijiang.graph.writer import write_graph
from dijiang.models.load import load_checkpoint
from dijiang.models.reference import Reference
from dijiang.recipe import GRAPHS, resolve
from dijiang.runtime.sessions.inference import open_inference
from dijiang.runtime.step import Step
from tests.conftest import GOLDEN, RUNNABLE
from tests.graph.test_families import NAMED
from tests.random_models import write

pytestmark = pytest.mark.skipif("ort" not in RUNNABLE, reason="onnxruntime is older than 1.30")


def float32_graph(model):
    return optimise(write_graph(model, "ort"), skip_norms=False)


def layer_moments(model, batches):
    graph = float32_graph(model)
    return LayerMoments(graph, feeds_of(graph, batches))


def whole(model, ids, folder):
    """Moments of the inputs of every weight, of ids [N, T], in float64."""
    graph = float32_graph(model)
    inputs = {str(x.weight.name): x.input for x in linears(graph.graph) if x.role in ROUNDED}
    for value in set(inputs.values()):
        value.type = ir.TensorType(ir.DataType.FLOAT)
        graph.graph.outputs.append(value)
    ir.save(graph, folder / "model.onnx")
    session = open_inference(folder / "model.onnx")
    shapes = {i.name: i.shape for i in session.get_inputs() if "recurrent_state" in i.name}
    states = {name: np.zeros((len(ids), *shape[1:]), np.float32) for name, shape in shapes.items()}
    step = Step.of(ids, np.zeros(len(ids), np.int64), np.broadcast_to(np.arange(ids.shape[1]), ids.shape))
    found = session.run([value.name for value in inputs.values()], step.arrays | states)
    rows = [x.reshape(-1, x.shape[-1]).astype(np.float64) for x in found]
    return {name: x.T @ x for name, x in zip(inputs, rows, strict=True)}


@pytest.mark.parametrize("config", NAMED.values(), ids=NAMED)
def test_moments_by_layer_are_those_of_the_whole_graph(config, tmp_path):
    model = load_checkpoint(write(tmp_path, config, trained=True, seed=3))
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], (TOGETHER + 1, 9))
    moments = layer_moments(model, batches_of(ids.ravel(), 9))
    waiting = []
    for name, expected in whole(model, ids, tmp_path).items():
        found = moments(name)
        waiting.append(len(moments._halves))
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5 * np.abs(expected).max())
        np.testing.assert_array_equal(found, found.T)
    assert max(waiting) <= 5, "what is left belongs to this layer and the next"
    assert waiting[-1] == 0


@pytest.mark.parametrize("name", ["neox-base", "tiny-python"])
def test_weights_are_written_in_the_order_in_which_moments_are_found(name):
    """A moment that is asked for too early makes all that lie before it wait."""
    model = load_checkpoint(GOLDEN[name])
    recipe = pipeline.fitted(resolve("int8", graph="ort", calibration_tokens=64), model)
    widths = {str(x.weight.name): x.shape[0] for x in linears(float32_graph(model).graph) if x.role in ROUNDED}
    asked = []

    def moment(name):
        asked.append(name)
        return np.eye(widths[name], dtype=np.float32)

    graph = pipeline.step_graph(model, "ort", recipe, calibrated(moment))
    for value in graph.graph.initializers.values():
        value.const_value.numpy()
    assert asked == list(widths)


@pytest.mark.parametrize("recipe", [resolve("fp32", graph="ort"), pipeline.drawing()], ids=["float32", "quick"])
def test_drawn_text_is_the_models_own(recipe):
    """Its loss under the float64 reference is the model's entropy, far from that of random tokens."""
    model = load_checkpoint(GOLDEN["tiny-python"])
    name = recipe.graphs[0]
    graph = pipeline.step_graph(model, name, recipe)
    batches = draw(graph, GRAPHS[name], 1024, 64, model.spec.vocab_size)
    ids = np.concatenate(batches)
    assert ids.shape == (16, 64)
    logits = Reference(model).forward(ids)[:, :-1]
    probabilities = softmax(logits, axis=-1)
    loss = -np.log(np.take_along_axis(probabilities, ids[:, 1:, None], -1)).mean()
    entropy = -(probabilities * np.log(probabilities)).sum(-1).mean()
    assert abs(loss - entropy) < 0.3
    assert loss < 0.8 * np.log(model.spec.vocab_size)


def test_sequences_of_a_text():
    ids = np.arange(21 * 256 + 7)
    batches = batches_of(ids, 256)
    assert [len(batch) for batch in batches] == [TOGETHER, TOGETHER, 5]
    np.testing.assert_array_equal(np.concatenate(batches).ravel(), ids[: 21 * 256])
    assert batches_of(ids[:100], 256)[0].shape == (1, 100)
