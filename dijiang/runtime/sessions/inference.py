"""ONNX Runtime: whether it is there, what it runs, and the one way to open a graph with it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ...environment import NO_TELEMETRY
from ...errors import SessionError
from ...machine.limits import usable_cores
from ...machine.memory import MORE, is_no_memory
from ...recipe import GRAPHS
from ..operators import installed_library, operator_library

#: Packages whose module is MODULE.
PACKAGES = ("onnxruntime", "onnxruntime-gpu")
#: What our operators say, and whether they say what to do.
OURS = re.compile(r"(?:AddNorm|MatMul|RecurrentStep|RotaryAngles): [^;\n]+(; [^\n]+)?")
MODULE, CPU_PROVIDER = "onnxruntime", "CPUExecutionProvider"
#: Where a graph without a file of its own finds its data.
DATA_FOLDER = "session.model_external_initializers_file_folder_path"
#: Measured in docs/adr/0031-session-settings.md.
BLOCK_BASE = ("session.dynamic_block_base", "4")
#: What nodes unpack of weights is unpacked once, when a graph is opened: 4 bytes a weight.
UNPACKED = ("session.disable_quant_qdq", "1")
#: The last onnxruntime for Python 3.10.
LAST_FOR_3_10 = (1, 23)


def import_onnxruntime() -> Any:
    """The onnxruntime module; SessionError where none is installed, or the one there is broken.

    It sends no telemetry (ADR 0044), unless the environment says so, or somebody else has imported it before.
    """
    os.environ.setdefault(NO_TELEMETRY, "1")  # read once, at the import
    try:
        import onnxruntime
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == MODULE:
            raise SessionError(
                "no backend: onnxruntime is not installed; pip install 'dijiang[cpu]' or 'dijiang[gpu]'"
            ) from None
        raise _broken(error) from error
    except OSError as error:
        raise _broken(error) from error
    return onnxruntime


def _broken(error: Exception) -> SessionError:
    if is_no_memory(error):
        return SessionError(f"too little memory for onnxruntime ({first_line(error)}); {MORE}")
    return SessionError(
        f"onnxruntime is installed but does not start ({first_line(error)}); reinstall it: "
        "pip install --force-reinstall 'dijiang[cpu]'"
    )


def onnxruntime_version() -> tuple[int, int] | None:
    """Of the installed package, without importing it; None: there is none."""
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            major, minor = version(package).split(".")[:2]
            return int(major), int(minor)
    return None


def why_not(graph: str, oldest: tuple[int, int] | None = None) -> str:
    """Why this machine does not run a graph, and what to do; empty: it does, or could.

    oldest: version of onnxruntime that it needs; None: as the graph's row says.

    Raises:
        SessionError: `DIJIANG_ISA` asks for what cannot be had: no other graph is taken instead.
    """
    row = GRAPHS[graph]
    if row.operators:
        try:
            installed_library()
        except SessionError as error:
            return str(error)
        operator_library()
    oldest, found = oldest or row.onnxruntime, onnxruntime_version()
    if found is not None and found < oldest:
        needed, here = (".".join(map(str, v)) for v in (oldest, found))
        return f"it needs onnxruntime {needed} or newer, here is {here}; {upgrade(oldest)}"
    return ""


def upgrade(oldest: tuple[int, int]) -> str:
    """What to do for an onnxruntime that is new enough."""
    stuck = sys.version_info < (3, 11) and oldest > LAST_FOR_3_10
    return f"{'use Python 3.11 or newer, and ' if stuck else ''}upgrade onnxruntime"


def runs_here(graph: str) -> bool:
    """Whether this machine runs a graph; where no onnxruntime is installed, whether it could."""
    return not why_not(graph)


def open_inference(
    graph: Path | bytes,
    *,
    data: Path | None = None,
    operators: bool = False,
    threads: int | None = None,
    provider: str = CPU_PROVIDER,
    devices: Sequence[Any] = (),
    settings: dict[str, str] | None = None,
    entries: dict[str, str] | None = None,
    severity: int = 3,
    profile: Path | None = None,
) -> Any:
    """An onnxruntime InferenceSession.

    Args:
        graph: a file, or a serialised model whose data is in the folder `data`.
        operators: register those of ours.
        threads: None: as many as usable cores.
        provider, settings: ONNX Runtime's execution provider and its options; no other is used.
        devices: of a provider that is a plug-in, in the place of its name.
        entries: further session options.
        severity: of what it logs; 4 is nothing but fatal errors.
        profile: start of the name of a file to which `end_profiling` writes what each node took.

    Raises:
        SessionError: a name is no Unicode.
        whatever onnxruntime raises: its errors share no base class.
    """
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = severity
    options.enable_cpu_mem_arena = False  # memory stays flat after a long prefill
    options.enable_mem_pattern = False
    options.intra_op_num_threads = threads or usable_cores()
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    for key, value in {BLOCK_BASE[0]: BLOCK_BASE[1], **(entries or {})}.items():
        options.add_session_config_entry(key, value)
    if data is not None:
        options.add_session_config_entry(DATA_FOLDER, _in_utf8(data.resolve()))
    if operators:
        options.register_custom_ops_library(_in_utf8(operator_library()))
    source = graph if isinstance(graph, bytes) else _in_utf8(graph)
    if devices:
        options.add_provider_for_devices(devices, settings or {})
        return ort.InferenceSession(source, sess_options=options)
    return ort.InferenceSession(
        source, sess_options=options, providers=[(provider, settings or {})], enable_fallback=0
    )


def _in_utf8(path: Path) -> str:
    """A path as onnxruntime reads it: its bytes are UTF-8, whatever Python's locale is."""
    try:
        return os.fsencode(path).decode()
    except UnicodeDecodeError:
        raise SessionError(f"{path}: onnxruntime opens no file whose name is no UTF-8; rename it") from None


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def is_onnxruntimes(error: Exception) -> bool:
    """Whether onnxruntime raised it. Its errors share no base class, only a module, or are pybind11's."""
    plain = type(error) in (RuntimeError, MemoryError, ValueError)
    return plain or type(error).__module__.startswith(MODULE)


@contextmanager
def step_of(tokens: int) -> Iterator[None]:
    """What onnxruntime raises in a block, as `failed_step`."""
    try:
        yield
    except Exception as error:
        if not is_onnxruntimes(error):
            raise
        raise failed_step(tokens, error) from error


def failed_step(tokens: int, error: Exception) -> SessionError:
    """The error of a step that onnxruntime gave up; what one of our operators says of its graph, says enough."""
    if ours := OURS.search(str(error)):
        return SessionError(ours[0] if ours[1] else f"{ours[0]}; export the bundle again")
    return SessionError(
        f"onnxruntime {import_onnxruntime().__version__} failed in a step of {tokens} tokens "
        f"({first_line(error)[:200]}); use a smaller batch, or upgrade onnxruntime"
    )
