"""ONNX Runtime with the CUDA graphs that its CPU provider does not have.

A run with a graph id other than -1 is captured the first time: it warms up, is recorded with the tensors
that are bound then, and replayed. Later runs with that id replay the record: they read and write those
tensors, whatever is bound by then. Other shapes are refused. New tensors hold garbage, and what the host gets
of one is a copy: the CPU's own would be a view.
"""

from __future__ import annotations

import numpy as np
import onnxruntime

#: Runs before the capture, in the same call: as the CUDA provider does.
WARM_UP = 2
INPUTS, OUTPUTS = "bind_ortvalue_input", "bind_ortvalue_output"


def install(monkeypatch):
    """Patch onnxruntime for a test."""
    session, binding, value = onnxruntime.InferenceSession, onnxruntime.IOBinding, onnxruntime.OrtValue
    run, new = session.run_with_iobinding, value.ortvalue_from_shape_and_type

    def garbage(shape, dtype, *place):
        made = new(shape, dtype, *place)
        numbers = np.full(shape, np.nan if np.dtype(dtype).kind == "f" else -(1 << 40), dtype)
        made.update_inplace(numbers)
        return made

    def noting(kind):
        bind = getattr(binding, kind)

        def note(self, name, tensor):
            bind(self, name, tensor)
            self.__dict__.setdefault("noted", {})[kind, name] = tensor

        return note

    def shapes(noted):
        return {key: tensor.shape() for key, tensor in noted.items()}

    def captured(self, io, options=None):
        graph = None if options is None else options.get_run_config_entry("gpu_graph_id")
        if graph in (None, "", "-1"):
            return run(self, io, options)
        noted, graphs = io.__dict__["noted"], self.__dict__.setdefault("graphs", {})
        if graph not in graphs:
            for _ in range(WARM_UP):
                run(self, io, options)
            record = self.io_binding()
            for (kind, name), tensor in noted.items():
                getattr(record, kind)(name, tensor)
            graphs[graph] = record
        record = graphs[graph]
        if shapes(noted) != shapes(record.__dict__["noted"]):
            raise RuntimeError(f"graph {graph} was captured with other shapes")
        return run(self, record, options)

    numpy = value.numpy
    monkeypatch.setattr(value, "numpy", lambda self: numpy(self).copy())
    monkeypatch.setattr(value, "ortvalue_from_shape_and_type", staticmethod(garbage))
    for kind in (INPUTS, OUTPUTS):
        monkeypatch.setattr(binding, kind, noting(kind))
    monkeypatch.setattr(session, "run_with_iobinding", captured)
