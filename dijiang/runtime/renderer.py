"""Chat templates run in a process of their own: no time, memory or lock of the interpreter is theirs to take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import InputError

PROGRAM = Path(__file__).with_name("sandbox.py")
#: Seconds that a text may take, and how many more for each character of what it is made of.
PATIENCE, PER_CHARACTER = 10.0, 1e-5
#: Bytes of an answer: each character as an escape of JSON.
LONGEST_ANSWER = 12 << 24
#: Runs the program with the modules of this process, and none that its folder or a variable name.
START = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv[1]); runpy.run_path(sys.argv[2], {}, '__main__')"
)


class Broken(Exception):
    """The source is no template."""


class Refusal(Exception):
    """The template refuses what it was given."""


class Renderer:
    """A template of any origin, compiled and rendered by `sandbox.py`.

    Where there is no Python to start, as in a program that PyInstaller made, it runs in this process.

    Raises:
        Broken: it does not compile.
        InputError: jinja2 is missing, or the process does not start.
    """

    def __init__(self, source: str) -> None:
        try:
            import jinja2  # noqa: F401 - the program needs it
        except ImportError:
            raise InputError("a chat needs jinja2; pip install 'dijiang[chat]' or 'dijiang[serve]'") from None
        self._source, self._lock = source, threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._end: Callable[[], object] = _nothing
        self._ask({"source": source}, PATIENCE)

    def render(self, variables: dict[str, Any], characters: int) -> str:
        """The text; characters: of what it is made of.

        Raises:
            Refusal: by the template, or it took too much time or memory.
        """
        return self._ask({"source": self._source, "variables": variables}, PATIENCE + PER_CHARACTER * characters)

    def _ask(self, request: dict[str, Any], seconds: float) -> str:
        try:
            line = json.dumps(request).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise Refusal(f"they hold what JSON cannot say: {error}") from None
        if not sys.executable or getattr(sys, "frozen", False):
            from .sandbox import answer

            found = answer(json.loads(line))
        else:
            with self._lock:
                ended = "refused" if "variables" in request else "broken"
                found = json.loads(self._reply(line, seconds, ended))
        if "broken" in found:
            raise Broken(found["broken"])
        if "refused" in found:
            raise Refusal(found["refused"])
        return str(found["text"])

    def _reply(self, line: bytes, seconds: float, ended: str) -> bytes:
        """What the process answers; that it `ended`, if it did."""
        process, late = self._running(), threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, stop)
        timer.daemon = True
        timer.start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
            reply = process.stdout.readline(LONGEST_ANSWER)
        except OSError:
            reply = b""  # it has ended
        except BaseException:  # as Ctrl-C: the answer that comes still would be taken for the next one
            self._end()
            raise
        finally:
            timer.cancel()
        if reply.endswith(b"\n"):
            return reply
        self._end()
        return json.dumps(
            {ended: f"it took more than {seconds:.0f} s" if late.is_set() else "its process ended"}
        ).encode()

    def _running(self) -> subprocess.Popen[bytes]:
        """The process, of this process and no fork of it; InputError if it does not start."""
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self._end()
            self._process = None
            command = [sys.executable, "-I", "-S", "-c", START, json.dumps(sys.path), str(PROGRAM)]
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C is for this process
                )
            except OSError as error:
                raise InputError(
                    f"a chat template needs a process of its own, which does not start ({error.strerror}); allow it"
                ) from error
            self._owner = os.getpid()
            self._end = weakref.finalize(self, _stop, self._process, self._owner)
        return self._process


def _nothing() -> None:
    """No process is to be ended."""


def _stop(process: subprocess.Popen[bytes], owner: int) -> None:
    """End a process; in a fork of its owner, only leave it."""
    if os.getpid() == owner:
        process.kill()
        process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
