"""The session uses what was asked for, or says what is missing."""

import sys

import pytest

import dijiang


def test_unknown_provider_is_refused(exported):
    with pytest.raises(dijiang.SessionError, match="execution provider 'tpu' is not available"):
        dijiang.load(exported("neox-base"), provider="tpu")


def test_provider_in_use_is_the_one_asked_for(exported):
    model = dijiang.load(exported("neox-base"), provider="cpu")
    assert model._session.provider == "CPUExecutionProvider"


def test_missing_backend_names_the_extras(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(dijiang.SessionError, match=r"pip install 'dijiang\[cpu\]'"):
        dijiang.load(exported("neox-base"))


def test_graph_that_the_backend_cannot_load_is_one_error(exported, copy_of):
    bundle = copy_of(exported("neox-base", dialect="ort"))
    (bundle / "model.onnx").write_bytes(b"\x08\x0a")
    with pytest.raises(dijiang.SessionError, match=r"cannot load the ort dialect .*upgrade"):
        dijiang.load(bundle, check_hashes=False)


def test_threads_reach_the_backend(exported):
    model = dijiang.load(exported("neox-base"), threads=1)
    assert model._session._session.get_session_options().intra_op_num_threads == 1
