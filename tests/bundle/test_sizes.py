"""What `inspect` says about memory, against counts made by hand."""

import json

import numpy as np
from click.testing import CliRunner
from safetensors.numpy import load_file

import dijiang
from dijiang.bundle.opened import open_bundle
from dijiang.bundle.sizes import sizes
from dijiang.cli import main
from tests.conftest import GOLDEN
from tests.graph.test_families import NAMED
from tests.random_models import write


def test_sizes_of_a_bundle(exported):
    bundle = open_bundle(exported("neox-base"))
    found, spec = sizes(bundle), bundle.manifest.spec
    tensors = load_file(GOLDEN["neox-base"] / "model.safetensors")
    counted = {name: t.size for name, t in tensors.items() if not name.endswith((".D1", ".D2"))}
    assert found.parameters == sum(counted.values())
    hashed = [file for file in bundle.path.iterdir() if file.name not in bundle.manifest.reports]
    assert found.bundle_bytes == sum(file.stat().st_size for file in hashed)
    assert found.state_bytes == dijiang.load(bundle.path).new_state().nbytes
    assert found.memory_bytes == (bundle.path / "model.onnx.data").stat().st_size + found.state_bytes
    # keys and values of every layer and head in float16
    one_token = np.zeros((spec.num_layers, 2, spec.num_kv_heads, spec.head_size), np.float16).nbytes
    assert found.cache_bytes_per_token == one_token
    assert (found.cache_larger_from - 1) * one_token <= found.state_bytes
    assert found.cache_larger_from * one_token > found.state_bytes
    assert found.cache_bytes[2048] == 2048 * one_token


def test_inspect_shows_the_sizes(exported):
    bundle = str(exported("neox-base"))
    text = CliRunner().invoke(main, ["inspect", bundle]).stdout
    shown = json.loads(CliRunner().invoke(main, ["inspect", bundle, "--json"]).stdout)["sizes"]
    assert f"{shown['parameters']:,}" in text
    assert f"larger from {shown['cache_larger_from']:,} tokens on" in " ".join(text.split())


def test_cache_has_the_heads_of_keys_and_values(tmp_path):
    folder = write(tmp_path, NAMED["llama-gqa-4"], trained=False, seed=0)
    bundle = dijiang.export(folder, tmp_path / "b", verify=False)
    spec = bundle.manifest.spec
    assert spec.num_kv_heads < spec.num_heads
    assert sizes(bundle).cache_bytes_per_token == 2 * 2 * spec.num_layers * spec.num_kv_heads * spec.head_size
