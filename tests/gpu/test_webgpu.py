"""The WebGPU provider, its kernels executed."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import dijiang
from dijiang.environment import SOFTWARE_GPU
from dijiang.recipe import GRAPHS, PROVIDERS
from dijiang.runtime.sessions.webgpu import WEBGPU, adapter, is_software
from tests.conftest import EXAMPLES
from tests.graph.test_families import NAMED
from tests.random_models import write

TINY = EXAMPLES / "tiny-python"
#: Tokens of a text that a verification compares.
VERIFIED = 1024


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("name", NAMED)
def test_named_variant_in_blocks_is_the_cpus(tmp_path, name, precision):
    """Both compute with float activations: they differ by the rounding of float32."""
    (tmp_path / "checkpoint").mkdir()
    folder = write(tmp_path / "checkpoint", NAMED[name])
    bundle = dijiang.export(folder, tmp_path / "b", precision=precision, calibration_tokens=0, verify=False)
    ids = np.random.default_rng(0).integers(0, NAMED[name]["vocab_size"], (2, 9))
    found, expected = (
        (model := dijiang.load(bundle.path, provider=provider, graph="webgpu")).forward(
            ids, model.new_state(2), all_logits=True
        )
        for provider in ("webgpu", "cpu")
    )
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


def test_fp16_fails_its_gate_as_the_table_says(exported, monkeypatch):
    """When a newer plug-in sums in float32, this fails, and the row can go."""
    row, form = PROVIDERS["webgpu"], GRAPHS["webgpu"]
    monkeypatch.setitem(PROVIDERS, "webgpu", replace(row, refused={}))
    monkeypatch.setitem(GRAPHS, "webgpu", replace(form, types=("fp32", "fp16")))
    bundle = exported("tiny-python", precision="fp16", graph="webgpu")
    report = dijiang.verify(
        bundle, TINY, text=TINY / "held_out.txt", tokens=VERIFIED, provider="webgpu", store=False
    )
    (logits,) = (verdict for verdict in report.gates if verdict.metric == "error_over_rounding")
    assert not logits.passed
    said = re.search(r"about (\d+) times plain rounding's, allowed (\d+)$", row.refused["fp16"])
    times, allowed = (int(figure) for figure in said.groups())
    assert logits.bound == allowed
    # A driver in software sums in the order of the vectors of its CPU: 20 and 21 times were seen.
    assert logits.found == pytest.approx(times, rel=0.25)


def test_auto_stays_on_the_cpu_where_only_software_is(exported):
    if not is_software(adapter()):
        pytest.skip("this machine has a GPU")
    assert dijiang.load(exported("tiny-python")).provider == "CPUExecutionProvider"


def test_no_vulkan_driver_is_one_line(exported):
    path = exported("neox-base")
    environment = os.environ | {"VK_ICD_FILENAMES": "/nothing.json", "VK_DRIVER_FILES": "/nothing.json"}
    command = [sys.executable, "-m", "dijiang", "run", str(path), "-p", "x", "--provider", "webgpu"]
    done = subprocess.run(command, env=environment | {SOFTWARE_GPU: "1"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert [line for line in done.stderr.splitlines() if line.startswith("Error: ")] == [
        f"Error: {path / 'model.webgpu.onnx'}: {WEBGPU.name} cannot load it (Failed to get a WebGPU adapter: "
        "No supported adapters); install the GPU's Vulkan driver (vulkaninfo shows it)"
    ]
    assert "Traceback" not in done.stderr
