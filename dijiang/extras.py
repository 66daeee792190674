"""What `pip install dijiang` leaves out, and the extra that brings it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import InputError

#: Module -> the extra of pyproject.toml that has its package.
EXTRAS = dict.fromkeys(("ml_dtypes", "onnx", "onnx_ir", "scipy"), "export") | dict.fromkeys(
    ("anyio", "prometheus_client", "starlette", "uvicorn"), "serve"
)


@contextmanager
def extras() -> Iterator[None]:
    """InputError for a module that is not there and that an extra brings: it says which one."""
    try:
        yield
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        raise InputError(f"{error}; pip install 'dijiang[{extra}]'") from error
