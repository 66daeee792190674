"""DiJiang linear-attention models in production: export, load, generate.

    bundle = dijiang.export("checkpoint", "bundle")
    model = dijiang.load("bundle")
    for record in model.generate("def main("):
        print(record.text, end="")

Importing this package loads neither a backend nor the exporter.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

#: Public name -> module that defines it; that of an error is `errors`.
_PUBLIC = {
    "export": "exporter.export",
    "build": "exporter.engine",
    "verify": "parity.verify",
    "load": "runtime.model",
    "Model": "runtime.model",
    "Record": "runtime.sequence",
    "State": "runtime.state",
    "Bundle": "bundle.opened",
    "ModelSpec": "models.spec",
    "folder_of": "hub",
}

if TYPE_CHECKING:
    from .bundle.opened import Bundle
    from .errors import (
        BenchError,
        BundleError,
        CheckpointError,
        DecayError,
        DijiangError,
        EvalError,
        ExportError,
        HubError,
        InputError,
        ParityError,
        SessionError,
        VersionError,
    )
    from .exporter.engine import build
    from .exporter.export import export
    from .hub import folder_of
    from .models.spec import ModelSpec
    from .parity.verify import verify
    from .runtime.model import Model, load
    from .runtime.sequence import Record
    from .runtime.state import State

__all__ = [
    "BenchError",
    "Bundle",
    "BundleError",
    "CheckpointError",
    "DecayError",
    "DijiangError",
    "EvalError",
    "ExportError",
    "HubError",
    "InputError",
    "Model",
    "ModelSpec",
    "ParityError",
    "Record",
    "SessionError",
    "State",
    "VersionError",
    "build",
    "export",
    "folder_of",
    "load",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'dijiang' has no attribute {name!r}")
    from .extras import extras  # not of the package's start, which is its version

    with extras():
        return getattr(import_module(f".{_PUBLIC.get(name, 'errors')}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
