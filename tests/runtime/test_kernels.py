"""Where the kernels of the cuda graph cannot be had: another graph is taken, or one line says what to do."""

import pytest

import dijiang
from dijiang.recipe import PROVIDERS
from dijiang.runtime.sessions import kernels, providers
from tests.conftest import RUNNABLE
from tests.runtime.test_cuda import stand_in  # noqa: F401

pytestmark = pytest.mark.skipif("cuda" not in RUNNABLE, reason="the operators are not compiled")


@pytest.fixture
def without_compiler(monkeypatch):
    monkeypatch.setattr(kernels, "_candidates", lambda: iter(["libnothing.so.1"]))
    kernels._compiler.cache_clear()
    yield
    kernels._compiler.cache_clear()


def test_best_graph_is_the_providers_own(stand_in, exported):  # noqa: F811
    bundle = exported("neox-base")
    assert PROVIDERS["cuda"].graphs[0] == dijiang.load(bundle, provider="cuda").graph == "cuda"
    assert dijiang.load(bundle, provider="cpu").graph == "native"
    assert dijiang.load(exported("neox-base", precision="fp16"), provider="cpu").graph == "ort"


def test_missing_compiler_leaves_the_next_graph(stand_in, exported, without_compiler, monkeypatch):  # noqa: F811
    monkeypatch.setattr(providers, "why_no_kernels", kernels.why_no_kernels)
    bundle = exported("neox-base")
    assert dijiang.load(bundle, provider="cuda").graph == "ort"
    with pytest.raises(dijiang.SessionError, match=r"NVIDIA's compiler .* not installed; pip install"):
        dijiang.load(bundle, provider="cuda", graph="cuda")


def test_driver_that_does_not_load_them_is_one_line(monkeypatch):
    monkeypatch.setattr(kernels, "compile_kernels", lambda source, sm: b"no machine code")
    monkeypatch.setattr(kernels, "Cuda", lambda index: type("Cuda", (), {"gpu": type("Gpu", (), {"sm": "sm90"})}))
    with pytest.raises(dijiang.SessionError, match=r"did not load the kernels .*\(CUresult -1\); install"):
        kernels.load_kernels.__wrapped__(0)


def test_gpu_of_another_generation_is_refused_where_kernels_are_loaded(monkeypatch):
    monkeypatch.setattr(kernels, "LOADED", ["sm80"])
    monkeypatch.setattr(kernels, "Cuda", lambda index: type("Cuda", (), {"gpu": type("Gpu", (), {"sm": "sm90"})}))
    with pytest.raises(
        dijiang.SessionError, match=r"^GPU 1 is sm90, and this process has .* for sm80; use a process"
    ):
        kernels.load_kernels.__wrapped__(1)
