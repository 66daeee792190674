"""The real loop of onnxruntime-genai on what `dijiang deploy genai` writes."""

import json
import os
import sys

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import dijiang
from dijiang.cli import main

pytestmark = pytest.mark.ecosystem
PROMPTS = ["def main(", "x", "import os\nclass A:\n    def f(self):\n        return"]


def deploy(*arguments):
    return CliRunner().invoke(main, ["deploy", "genai", *map(str, arguments)])


@pytest.fixture(scope="module")
def deployed(exported, tmp_path_factory):
    """deployed(precision): the bundle's model, and the folder for the loop."""

    def get(precision):
        bundle = exported("tiny-python", precision=precision)
        folder = tmp_path_factory.mktemp("genai") / precision
        done = deploy(bundle, "-o", folder)
        assert done.exit_code == 0, done.output
        return dijiang.load(bundle, graph="ort"), folder

    return get


def continued(folder, prompts, count, **options):
    """New tokens [B, count] of the loop."""
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))
    tokenizer, parameters = genai.Tokenizer(model), genai.GeneratorParams(model)
    parameters.set_search_options(max_length=count + 30, batch_size=len(prompts), **options)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(tokenizer.encode_batch(prompts))
    found = []
    for _ in range(count):
        generator.generate_next_token()
        found.append(generator.get_next_tokens())
    return np.array(found).T.tolist()


def beams(folder, prompt, count):
    """Prompt and `count` tokens of the loop's search with four beams."""
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))
    ids = genai.Tokenizer(model).encode(prompt)
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + count, min_length=len(ids) + count, num_beams=4)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return list(map(int, generator.get_sequence(0)))


def ours(model, prompt, count):
    return [record.token for record in model.generate(prompt, max_tokens=count)]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_hundred_tokens_are_ours(deployed, precision):
    model, folder = deployed(precision)
    assert continued(folder, PROMPTS[:1], 100) == [ours(model, PROMPTS[0], 100)]


def test_a_batch_of_any_lengths_is_ours(deployed):
    model, folder = deployed("fp32")
    assert continued(folder, PROMPTS, 20) == [ours(model, prompt, 20) for prompt in PROMPTS]


def test_beams_of_the_loop_lose_their_states(deployed, monkeypatch):
    """As the page says: they are those of a search that reorders nothing. If this fails, they may work by now."""
    import torch

    from dijiang.integrations.transformers import DijiangForCausalLM, RecurrentCache

    model, folder = deployed("fp32")
    ids = torch.tensor([model.tokenizer.encode(PROMPTS[0])])
    options = {"num_beams": 4, "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    right = DijiangForCausalLM(model).generate(ids, **options)[0].tolist()
    monkeypatch.setattr(RecurrentCache, "reorder_cache", lambda self, beams: None)
    wrong = DijiangForCausalLM(model).generate(ids, **options)[0].tolist()
    assert right != wrong
    assert beams(folder, PROMPTS[0], 12) == wrong


def test_weights_are_a_copy_and_other_tools_read_both(deployed):
    """onnx takes a data file with two names for an attack."""
    model, folder = deployed("fp32")
    assert (folder / "model.onnx.data").read_bytes() == (model.bundle.path / "model.onnx.data").read_bytes()
    for file in (folder / "model.onnx", model.bundle.path / "model.onnx"):
        onnx.load(file)
    assert sum(file.stat().st_size for file in folder.iterdir() if file.suffix != ".data") < 200_000


def test_weights_are_linked_where_that_is_asked_for(deployed, tmp_path):
    model, _ = deployed("fp32")
    done = deploy(model.bundle.path, "-o", tmp_path / "linked", "--link")
    assert (done.exit_code, done.stderr.count("onnxruntime 1.30 or newer")) == (0, 1)
    assert os.path.samefile(tmp_path / "linked" / "model.onnx.data", model.bundle.path / "model.onnx.data")


def test_bundle_that_no_cpu_runs_is_for_a_gpu(exported, tmp_path):
    assert deploy(exported("neox-base", precision="bf16"), "-o", tmp_path / "b").exit_code == 0
    config = json.loads((tmp_path / "b" / "genai_config.json").read_text())
    assert config["model"]["decoder"]["session_options"]["provider_options"] == [{"cuda": {}}]


def test_another_disk_gets_a_copy(deployed, monkeypatch, tmp_path):
    def refuse(*names):
        raise OSError(18, "Invalid cross-device link")

    model, folder = deployed("fp32")
    for name in ("link", "copy_file_range"):
        monkeypatch.setattr(os, name, refuse)
    assert deploy(model.bundle.path, "-o", tmp_path / "copy", "--link").exit_code == 0
    copied = tmp_path / "copy" / "model.onnx.data"
    assert copied.read_bytes() == (folder / "model.onnx.data").read_bytes()
    assert not copied.samefile(folder / "model.onnx.data")


def test_positions_that_end_are_the_context(exported, tmp_path):
    bundle = exported("tiny-python-published")
    assert deploy(bundle, "-o", tmp_path / "new").exit_code == 0
    config = json.loads((tmp_path / "new" / "genai_config.json").read_text())
    limit = dijiang.load(bundle).manifest.positions_limit
    assert (config["model"]["context_length"], config["search"]["max_length"]) == (limit, limit)


def test_bad_input_is_one_line_and_leaves_nothing(exported, tmp_path):
    bundle = exported("tiny-python")
    native = exported("tiny-python", graph="native")
    (tmp_path / "there").mkdir()
    for given, output, reason in (
        (tmp_path, tmp_path / "new", "no dijiang.json, so not a bundle"),
        (bundle, tmp_path / "there", "exists and is never overwritten; choose another folder"),
        (bundle, bundle, "which is read; choose another folder"),
        (native, tmp_path / "new", "every graph needs the compiled operator; export again without --graph"),
    ):
        done = deploy(given, "-o", output)
        assert done.exit_code == 1
        assert done.stderr.startswith("Error: ")
        assert reason in done.stderr
        assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert not list((tmp_path / "there").iterdir())


def test_the_page_does_what_it_says(page):
    assert "def main(f, f):" in page("genai")


def test_a_missing_library_is_one_line(monkeypatch, exported, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "dijiang.integrations.genai", raising=False)
    done = deploy(exported("tiny-python"), "-o", tmp_path / "new")
    assert done.exit_code == 1
    assert "pip install 'dijiang[export]'" in done.stderr
