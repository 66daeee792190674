"""A tied embedding in blocks of integers is stored once, and read as head and as table."""

import json

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

import dijiang
from dijiang.graph.schemes import nbits
from tests.conftest import RUNNABLE
from tests.graph.test_families import LLAMA, NEOX, OPT
from tests.random_models import write

pytestmark = pytest.mark.skipif("ort" not in RUNNABLE, reason="onnxruntime is older than 1.30")
TIED = {"vocab_size": 700, "num_attention_heads": 3, "tie_word_embeddings": True}
#: Name -> config, width of the table, and the names of table and head in a checkpoint.
CASES = {
    "neox": (
        NEOX | TIED | {"hidden_size": 48},
        48,
        ("gpt_neox.embed_in.weight", "embed_out.weight"),
    ),
    "llama": (LLAMA | TIED, 48, ("model.embed_tokens.weight", "lm_head.weight")),
    "opt-350m-like": (
        OPT | TIED | {"hidden_size": 48, "word_embed_proj_dim": 32},
        32,
        ("model.decoder.embed_tokens.weight", "lm_head.weight"),
    ),
}
#: Precision -> options under which an untied head is rounded as its table is.
ALIKE = {"int8": {}, "int4": {"head_precision": "int4"}}
#: How far logits of random weights are apart when a table is rounded in two ways.
ROUNDED_APART = {"int8": 0.12, "int4": 0.9}


def untied(folder, target, table, head):
    """The same checkpoint with its table repeated as a head of its own."""
    target.mkdir()
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {head: tensors[table].copy()}, target / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return target


def exported_as(folder, target, precision, **options):
    return dijiang.export(
        folder,
        target,
        precision=precision,
        calibration_tokens=0,
        verify=False,
        **{"block_size": 16} | options,
    )


@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize("precision", ALIKE)
@pytest.mark.parametrize("name", CASES)
def test_tied_table_is_stored_once_and_computes_as_twice(tmp_path, monkeypatch, name, precision, mixed):
    """A head of its own is rotated, its table is not: where both are one, a row is rotated back."""
    if not mixed:
        monkeypatch.setattr(nbits, "rotation_of", lambda rounding, width: 1)
    config, width, names = CASES[name]
    (tmp_path / "tied").mkdir()
    once = write(tmp_path / "tied", config)
    twice = untied(once, tmp_path / "untied", *names)
    bundles = [
        exported_as(folder, tmp_path / f"{folder.name}-{precision}", precision, **ALIKE[precision])
        for folder in (once, twice)
    ]
    sizes = [(bundle.path / "model.onnx.data").stat().st_size for bundle in bundles]
    table = config["vocab_size"] * width * (1 if precision == "int8" else 0.5)
    assert sizes[1] - sizes[0] == pytest.approx(table + 2 * config["vocab_size"] * width / 16, rel=0.02)
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], (2, 9))
    models = [dijiang.load(bundle.path) for bundle in bundles]
    found, expected = (m.forward(ids, m.new_state(2), all_logits=True) for m in models)
    if mixed:  # 1.4 and more if rows are not rotated back
        assert np.linalg.norm(found - expected) < ROUNDED_APART[precision] * np.linalg.norm(expected)
    else:
        assert (found == expected).all()


def test_head_keeps_its_eight_bits_under_int4_and_the_table_reads_them(tmp_path):
    folder = write(tmp_path, CASES["llama"][0])
    bundle = exported_as(folder, tmp_path / "b", "int4")
    graph = onnx.load(bundle.path / "model.onnx", load_external_data=False).graph
    table = next(node for node in graph.node if node.op_type == "GatherBlockQuantized")
    head = next(node for node in graph.node if "logits" in node.output)
    assert table.input[0] == head.input[1]
    assert {a.name: a.i for a in table.attribute if a.name == "bits"} == {"bits": 8}
    assert bundle.manifest.graphs["ort"].reads["step"] > 700 * 48  # a step reads the shared table whole


def test_table_whose_rows_are_no_whole_blocks_stays_apart(tmp_path):
    folder = write(tmp_path, CASES["llama"][0])
    bundle = exported_as(folder, tmp_path / "b", "int8", block_size=32)
    graph = onnx.load(bundle.path / "model.onnx", load_external_data=False).graph
    table = next(node for node in graph.node if node.op_type == "GatherBlockQuantized")
    assert table.input[0] == "embed.weight.codes"
    model = dijiang.load(bundle.path)
    assert np.isfinite(model.forward(np.array([[1, 2]]), model.new_state())).all()
