"""Memory bandwidth of a device, by the provider that runs the model: the ceiling of its decode steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...errors import SessionError
from ...machine.bandwidth import Bandwidth, timed
from .device import Device, Tensor
from .preflight import explain

#: y [n] = -x [n] in float32, and z [1], the last of y.
COPY = Path(__file__).with_name("copy.onnx")
#: Bytes of x: beyond a GPU's caches. Copies before the clock is read.
BYTES, COPIES, PASSES = 256 << 20, 4, 5


def device_bandwidth(row: Device, index: int, nbytes: int = BYTES) -> Bandwidth:
    """Bytes that the memory of a device moves: copies by the provider's kernel, read and written.

    Raises:
        SessionError: the provider is not to be had, or the copies failed.
    """
    ort, session = row.require(index), row.open(COPY, index)
    x, y = (Tensor(ort, row, index, (nbytes // 4,), np.float32) for _ in range(2))
    z = Tensor(ort, row, index, (1,), np.float32)
    x.write(np.ones(nbytes // 4, np.float32))
    io = session.io_binding()
    io.bind_ortvalue_input("x", x.value)
    for name, tensor in {"y": y, "z": z}.items():
        io.bind_ortvalue_output(name, tensor.value)

    def copies() -> None:
        for _ in range(COPIES):
            session.run_with_iobinding(io)
        if z.numpy() != -1:  # which waits for the device
            raise SessionError(f"{row.name} copies {nbytes:,} bytes wrongly; see dijiang doctor")

    try:
        return timed(copies, 2 * nbytes * COPIES, PASSES)
    except SessionError:
        raise
    except Exception as error:
        raise explain(error, f"{row.name} cannot copy {nbytes:,} bytes") from error
