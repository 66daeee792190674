"""The kernels of the cuda graph on a GPU: single nodes, as their twins are tested, and published shapes."""

import onnxruntime
import pytest

from dijiang.models.presets import PRESETS
from dijiang.runtime.operators import operator_library
from dijiang.runtime.sessions.kernels import load_kernels
from dijiang.runtime.sessions.preflight import require_gpu
from tests.graph.test_families import check_every_graph
from tests.native.test_cuda import (  # noqa: F401
    test_angles_are_those_of_float64_at_any_position,
    test_no_tokens_are_no_work,
    test_norm_meets_float64_and_its_sum_is_exact,
    test_numbers_of_16_bits_are_read_as_they_are_and_rounded_as_numpy_does,
    test_pieces_of_any_length_leave_the_same_state,
    test_step_adds_the_projections_bias,
    test_step_meets_float64,
)

#: Of the published shapes what costs time and changes no kernel.
SHORT = {"num_hidden_layers": 1, "vocab_size": 512, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def session_of():
    """session_of(model): a session with our operators on the first GPU."""
    require_gpu(onnxruntime, 0, "cuda")
    load_kernels(0)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(operator_library()))
    settings = [("CUDAExecutionProvider", {"use_tf32": "0"})]
    return lambda model: onnxruntime.InferenceSession(model, options, settings, enable_fallback=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_published_shape_meets_the_reference(preset):
    runs = [("cuda", "cuda"), ("ort", "cuda")]
    check_every_graph(PRESETS[preset] | SHORT, False, seed=1, length=20, runs=runs)
