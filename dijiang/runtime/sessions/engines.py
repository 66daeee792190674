"""TensorRT engines of a bundle: the libraries that build and run them, and whether one fits here."""

from __future__ import annotations

import importlib
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ...errors import BundleError, SessionError, reason

if TYPE_CHECKING:
    from ...machine.driver import Gpu

#: GPUs whose tensor cores TensorRT-RTX compiles for, and the one whose kernels have no float32 matmul.
RTX_GPUS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
TURING = "sm75"


@dataclass(frozen=True)
class Backend:
    """A library with the TensorRT API.

    module: what to import.  oldest: version that takes types and Q/DQ from the graph.  install: how to
    get it.  gpus: what it can build for without that GPU at hand; empty: only the one that is there.
    profiles: (shortest, typical, longest) tokens of each optimization profile, None: the engine's
    longest. The last profile takes any length; the first is the decode step where there are two.
    """

    module: str
    oldest: tuple[int, int]
    install: str
    gpus: tuple[str, ...]
    profiles: tuple[tuple[int, int | None, int | None], ...]

    @property
    def package(self) -> str:
        """Its name on PyPI."""
        return self.module.replace("_", "-")

    @property
    def title(self) -> str:
        """Its name in messages."""
        return "TensorRT-RTX" if self.gpus else "TensorRT"


#: A second profile doubles the size of a TensorRT-RTX engine (33.5 against 19.0 MB for tiny-python),
#: and it specialises kernels for the shapes at hand when it runs: it gets one.
BACKENDS = {
    "tensorrt": Backend(
        module="tensorrt",
        oldest=(10, 3),
        install="use JetPack's own, or pip install 'dijiang[tensorrt]', with its libraries",
        gpus=(),
        profiles=((1, 1, 1), (1, None, None)),
    ),
    "tensorrt_rtx": Backend(
        module="tensorrt_rtx",
        oldest=(1, 7),
        install="pip install 'dijiang[rtx]'",
        gpus=RTX_GPUS,
        profiles=((1, 1, None),),
    ),
}


@dataclass(frozen=True)
class EngineRecord:
    """What the manifest says about an engine.

    version: of the library that built it.  gpus: compute capabilities it runs on, as in "sm86".
    device: the GPU it was tuned on, None if it was built without one.  batch, longest: sequences and
    tokens a call at most.
    """

    file: str
    backend: str
    version: str
    gpus: tuple[str, ...]
    device: str | None
    batch: int
    longest: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, the inverse of `from_dict`."""
        return asdict(self) | {"gpus": list(self.gpus)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EngineRecord:
        """Read what `to_dict` wrote; BundleError if it is something else."""
        try:
            return cls(**{**data, "gpus": tuple(data["gpus"])})
        except (TypeError, KeyError) as error:
            raise BundleError(f"engine: not a whole record ({reason(error)}); run dijiang build again") from error

    def require(self, version: str, gpu: Gpu) -> None:
        """SessionError unless this library and GPU can run it."""
        if version == self.version and gpu.sm in self.gpus:
            return
        built = f"{BACKENDS[self.backend].title} {self.version} for {', '.join(self.gpus)}"
        raise SessionError(
            f"the engine {self.file} was built with {built}, here is {version} on {gpu}; "
            f"rebuild with: dijiang build BUNDLE --backend {self.backend} --gpu {gpu.sm}"
        )


def import_backend(name: str) -> Any:
    """The module of a backend.

    Raises:
        SessionError: not installed, installed without its libraries (the stub package), or too old.
    """
    backend = BACKENDS[name]
    try:
        trt = importlib.import_module(backend.module)
    except ModuleNotFoundError as error:
        if error.name != backend.module:
            raise _stub(backend, error) from error
        raise SessionError(f"{backend.title} is not installed; {backend.install}") from None
    except Exception as error:  # missing libraries raise whatever the loader raised
        raise _stub(backend, error) from error
    version = str(getattr(trt, "__version__", ""))
    if not version or not hasattr(trt, "Builder"):
        raise _stub(backend, "it has no Builder")
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])  # 1.7rc1 is one, too
    if found < backend.oldest:
        oldest = ".".join(map(str, backend.oldest))
        raise SessionError(f"{backend.title} {version} is too old, expected at least {oldest}; {backend.install}")
    return trt


def _stub(backend: Backend, why: object) -> SessionError:
    reason = (str(why).splitlines() or [repr(why)])[0]
    return SessionError(
        f"the package {backend.module} is here without {backend.title}'s libraries ({reason}); {backend.install}"
    )


def installed_backend() -> str:
    """The first backend that can be imported; SessionError that names both where none can."""
    reasons = []
    for name in BACKENDS:
        try:
            import_backend(name)
        except SessionError as error:
            reasons.append(str(error))
        else:
            return name
    raise SessionError(" · ".join(reasons))
