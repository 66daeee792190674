"""Published shapes on CUDA. Collected where there is such a GPU."""

import pytest

from dijiang.models.presets import PRESETS
from tests.gpu.conftest import HAS
from tests.graph.test_families import check_every_graph

#: Of the published shapes what costs time and changes no kernel.
SHORT = {"num_hidden_layers": 1, "vocab_size": 512, "max_position_embeddings": 64}


@pytest.mark.parametrize("preset", PRESETS if HAS["cuda"] else [])
def test_published_shape_meets_the_reference(preset):
    runs = [("cuda", "cuda"), ("ort", "cuda")]
    check_every_graph(PRESETS[preset] | SHORT, False, seed=1, length=20, runs=runs)
