"""The graphs of a bundle lie over the same weights: each reads all of the data file."""

import onnx
import pytest

import dijiang
from tests.graph.test_families import NAMED
from tests.random_models import write


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("name", ["neox-parallel", "opt-350m-like", "llama-gqa-4"])
def test_every_graph_reads_all_of_the_weights(name, precision, tmp_path):
    folder = write(tmp_path, NAMED[name], trained=False, seed=1)
    bundle = dijiang.export(folder, tmp_path / "b", precision=precision, verify=False)
    assert len(bundle.manifest.graphs) > 1
    for graph in bundle.manifest.graphs.values():
        model = onnx.load(bundle.path / graph.file, load_external_data=False)
        places = [{entry.key: entry.value for entry in value.external_data} for value in model.graph.initializer]
        assert sum(int(place.get("length", 0)) for place in places) == bundle.data_bytes
