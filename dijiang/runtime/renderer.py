"""Chat templates run in a process of their own: no time, memory or lock of the interpreter is theirs to take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Empty, LifoQueue
from typing import Any

from ..errors import InputError, SessionError

PROGRAM = Path(__file__).with_name("sandbox.py")
#: Seconds that a text may take, and how many more for each character of what it is made of.
PATIENCE, PER_CHARACTER = 10.0, 1e-5
#: Seconds later the process ends itself, where nobody did.
GRACE = 5.0
#: Texts that are made at once, each in a process of its own; further ones wait.
TOGETHER = 4
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
        InputError: jinja2 is missing.
        SessionError: no process starts.
    """

    def __init__(self, source: str) -> None:
        try:
            import jinja2  # noqa: F401 - the program needs it
        except ImportError:
            raise InputError("a chat needs jinja2; pip install 'dijiang[chat]' or 'dijiang[serve]'") from None
        self._source = source
        self._owner, self._free = 0, LifoQueue[_Process]()
        self._ask({"source": source})

    def render(self, variables: dict[str, Any]) -> str:
        """The text; Refusal by the template, or where it took too much time or memory.

        Raises:
            SessionError: no process starts, or none was free for as long as a text may take.
        """
        return self._ask({"source": self._source, "variables": variables})

    def _ask(self, request: dict[str, Any]) -> str:
        try:
            line = json.dumps(request)
        except (TypeError, ValueError, RecursionError) as error:
            raise Refusal(f"they hold what JSON cannot say: {error}") from None
        seconds = PATIENCE + PER_CHARACTER * len(line)
        if not sys.executable or getattr(sys, "frozen", False):
            from .sandbox import answer

            found: dict[str, str] | None = answer(json.loads(line))
        else:
            found = self._answer(line, seconds)
        if found is None:
            found = {
                "refused" if "variables" in request else "broken": f"it took more than {seconds:.0f} s, or ended"
            }
        if "broken" in found:
            raise Broken(found["broken"])
        if "refused" in found:
            raise Refusal(found["refused"])
        return str(found["text"])

    def _answer(self, line: str, seconds: float) -> dict[str, str] | None:
        """Of a process that is free; None: it took too long, or ended."""
        if self._owner != os.getpid():  # at first; and in a fork, whose processes are its parent's
            made = LifoQueue[_Process]()
            for _ in range(TOGETHER):
                made.put(_Process())
            self._free, self._owner = made, os.getpid()  # in this order: others look at the owner first
        free = self._free
        try:
            process = free.get(timeout=seconds)
        except Empty:
            raise SessionError(
                f"all {TOGETHER} processes of the chat template have been busy for {seconds:.0f} s; ask again later"
            ) from None
        try:
            reply = process.ask(f"{seconds + GRACE} {line}\n".encode(), seconds)
        finally:
            free.put(process)
        return json.loads(reply) if reply.endswith(b"\n") else None


class _Process:
    """One that runs the program; it is started when it is needed, and anew after it has ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] = _nothing

    def ask(self, line: bytes, seconds: float) -> bytes:
        """The line of its answer; not a whole one where it ended, or was ended.

        Raises:
            SessionError: it does not start.
        """
        if self._process is None or self._process.poll() is not None:
            self._start()
        return self._exchange(line, seconds)

    def _start(self) -> None:
        self._end()
        modules = [entry for entry in sys.path if isinstance(entry, str)]  # Python looks at no others
        command = [sys.executable, "-I", "-S", "-c", START, json.dumps(modules), str(PROGRAM)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for this process
            )
        except OSError as error:
            raise SessionError(
                f"a chat template needs a process of its own, which does not start ({error.strerror}); allow it"
            ) from error
        self._end = weakref.finalize(self, _stop, self._process, os.getpid())
        if self._exchange(b"", PATIENCE) != b"\n":
            raise SessionError(
                f"a chat template needs a process of its own, and {sys.executable} runs none; use Python's own"
            )

    def _exchange(self, line: bytes, seconds: float) -> bytes:
        """Send a line, get a line; the process is ended after so many seconds."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(seconds, process.kill)
        timer.daemon = True
        timer.start()
        reply = b""
        try:
            with suppress(OSError):  # it has ended
                process.stdin.write(line)
                process.stdin.flush()
                reply = process.stdout.readline(LONGEST_ANSWER)
        except BaseException:  # as Ctrl-C: the answer that comes still would be taken for the next one
            self._end()
            raise
        finally:
            timer.cancel()
        if not reply.endswith(b"\n"):
            self._end()
        return reply


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
