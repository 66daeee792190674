"""NVIDIA's server as a wheel of nvidia-pytriton carries it, unpacked beside the environment, on loopback."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from dijiang.runtime.operators import find_library

ROOT = Path(__file__).parents[2]
SERVER = Path(f"{sys.prefix}-server")
#: Seconds until a server has looked at its models.
PATIENCE = 60


def backends(folder: Path) -> Path:
    """A folder with the Python backend, and its stub for the Python that runs the tests."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    try:
        ctypes.CDLL(f"libpython{version}.so.1.0")
    except OSError as error:
        pytest.skip(f"the stub of the Python backend does not start: {error}")
    files = SERVER / "pytriton" / "tritonserver"
    python = folder / "python"
    python.mkdir()
    stub = files / "python_backend_stubs" / version / "triton_python_backend_stub"
    for file in (*(files / "backends" / "python").iterdir(), stub):
        (python / file.name).symlink_to(file)
    stub.chmod(0o755)
    return folder


def packages(folder: Path) -> Path:
    """What this Python has, in one folder: the stub of this wheel reads no PYTHONPATH, but where it starts."""
    folder.mkdir()
    shutil.copytree(ROOT / "dijiang", folder / "dijiang", ignore=shutil.ignore_patterns("__pycache__"))
    if (library := find_library()) is not None:
        shutil.copy(library, folder / "dijiang" / "runtime")
    folders = [SERVER / "packages", *(Path(path) for path in sys.path if path.endswith("site-packages"))]
    for entry in (entry for packages in folders for entry in packages.iterdir()):
        if not (folder / entry.name).exists():
            (folder / entry.name).symlink_to(entry)
    return folder


@contextmanager
def running(repository: Path, folder: Path) -> Iterator[InferenceServerClient]:
    """A server of a repository, after it looked at all models; folder: an empty one."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(2)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        http, grpc = (one.getsockname()[1] for one in sockets)
    binary = SERVER / "pytriton" / "tritonserver" / "bin" / "tritonserver"
    binary.chmod(0o755)
    options = {
        "model-repository": repository,
        "backend-directory": backends(folder),
        "exit-on-error": "false",
        "http-address": "127.0.0.1",
        "http-port": http,
        "grpc-address": "127.0.0.1",
        "grpc-port": grpc,
        "allow-metrics": "false",
        "exit-timeout-secs": 2,
    }
    environment = os.environ | {"LD_LIBRARY_PATH": str(SERVER / "nvidia_pytriton.libs")}
    command = [str(binary), *(f"--{name}={value}" for name, value in options.items())]
    with (folder / "log").open("wb") as log:
        here = packages(folder / "packages")
        process = subprocess.Popen(command, cwd=here, env=environment, stdout=log, stderr=log)
        try:
            yield _ready(InferenceServerClient(f"127.0.0.1:{grpc}"), process, folder / "log")
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE)


def _ready(client: InferenceServerClient, process: subprocess.Popen[bytes], log: Path) -> InferenceServerClient:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        try:
            if client.is_server_live():
                return client
        except (OSError, InferenceServerException):
            time.sleep(0.2)
    raise AssertionError(log.read_text(errors="replace")[-2000:])
