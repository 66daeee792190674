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
    reads = {name: stored_in(bundle.path / graph.file) for name, graph in bundle.manifest.graphs.items()}
    everything = {name: length for read in reads.values() for name, length in read.items()}
    assert sum(everything.values()) == bundle.data_bytes
    for name, read in reads.items():
        # Our operators mix their inputs, and compute angles, without a table.
        left = {one for one in everything.keys() - read.keys() if not one.startswith(("hadamard_", "constant_"))}
        assert not left, name


def stored_in(graph):
    """Tensors of a graph that lie in the data file -> their bytes."""
    found = {}
    for value in onnx.load(graph, load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in value.external_data}
        if place:
            found[value.name] = int(place["length"])
    return found
