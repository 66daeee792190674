"""Tests that run kernels: on a GPU, or on lavapipe as `make gpu` sets it up."""

from pathlib import Path

import onnxruntime
import pytest

import dijiang
from dijiang.doctor.support import support
from dijiang.errors import DijiangError
from dijiang.machine.driver import Cuda
from dijiang.recipe import PROVIDERS
from dijiang.runtime.sessions.webgpu import PACKAGE, installed

HERE = Path(__file__).parent


def has_cuda() -> bool:
    """Whether there is an NVIDIA GPU, and an onnxruntime for it."""
    try:
        return Cuda().gpu is not None and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    except DijiangError:
        return False


#: Providers whose kernels can be executed here.
HAS = {"webgpu": installed(PACKAGE), "cuda": has_cuda()}
MISSING = pytest.mark.skipif(not HAS["webgpu"], reason=f"{PACKAGE} is not installed: it needs Python 3.11")
#: Files about WebGPU alone, and what is not even looked at where there is no GPU for CUDA.
collect_ignore = [] if HAS["cuda"] else ["test_cuda.py"]
WEBGPU_ONLY = ("test_webgpu", "test_norms")


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if item.path.stem in WEBGPU_ONLY:
                item.add_marker(MISSING)


def pytest_generate_tests(metafunc):
    """`provider`: those that are here; `precision`, `graph`: with it, those that the provider runs."""
    here, asked = [name for name, there in HAS.items() if there], metafunc.fixturenames
    if "provider" not in asked:
        return
    if "precision" in asked:
        pairs = [(one.provider, one.precision) for one in support() if one.provider in here and one.target]
        metafunc.parametrize("provider, precision", pairs, scope="module")
    elif "graph" in asked:
        # The standard function of opset 27 is what onnxruntime makes of it, and varies with its version.
        pairs = [(name, graph) for name in here for graph in PROVIDERS[name].graphs if graph != "onnx"]
        metafunc.parametrize("provider, graph", pairs, scope="module")
    else:
        metafunc.parametrize("provider", here, scope="module")


@pytest.fixture(scope="module")
def loaded(exported, provider):
    """loaded(checkpoint, **options): the bundle on the provider, loaded once."""
    models = {}

    def get(name, **options):
        if provider == "cuda" and options.get("precision") in ("int8", "int4"):
            options["target"] = "cuda"
        key = (name, *sorted(options.items()))
        if key not in models:
            models[key] = dijiang.load(exported(name, **options), provider=provider)
        return models[key]

    return get
