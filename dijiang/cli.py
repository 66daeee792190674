"""The command line: the verbs of `commands`, and what is the same for all of them.

Results go to stdout, progress and errors to stderr.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

import click

from .commands import printable, tell
from .commands.bench import bench
from .commands.build import build
from .commands.chat import chat
from .commands.convert import convert
from .commands.deploy import deploy
from .commands.doctor import doctor
from .commands.eval import evaluate
from .commands.export import export
from .commands.init import init
from .commands.inspect import inspect
from .commands.run import run
from .commands.serve import serve
from .commands.sign import sign
from .commands.state import state
from .commands.upgrade import upgrade
from .commands.verify import verify
from .errors import DijiangError
from .extras import extras
from .files import FULL
from .machine.memory import MORE, is_no_memory
from .version import __version__

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
#: What a command ends with.
STATUSES = {
    0: "All was done.",
    1: "It was not: one line on stderr says why. Or what was compared differs.",
    2: "The command is not written as it must be.",
    INTERRUPTED: "Ctrl-C ended it. `serve` ends with 0 after the first one, when all is answered.",
    TERMINATED: "SIGTERM or SIGHUP ended it. `serve` as above.",
}
#: What a terminal that is closed sends; not on Windows.
HANGUP = getattr(signal, "SIGHUP", None)
SPACE = "free some space, or choose another file"
#: What the system refuses -> what helps, of what no command has a line for.
ADVICE = {
    **dict.fromkeys(FULL, SPACE),
    errno.ENOENT: "check that the working directory is still there",
    errno.EMFILE: "raise ulimit -n",
}
#: What Python says where the system starts no thread.
NO_THREAD = "can't start new thread"
#: Standard streams, and how each is opened where the parent has closed it.
STREAMS = {"stdin": "r", "stdout": "w", "stderr": "w"}


class OneLineErrors(click.Group):
    """A group whose commands report a DijiangError as one line and exit with 1.

    SIGTERM ends a command as Ctrl-C does, so that nothing half-written is left, and SIGHUP is taken for it. What an
    output cannot show is written as an escape; input that is no text reaches the command, which says so.
    """

    def main(self, *args: Any, **options: Any) -> Any:
        """See click. What the system refuses, as a full disk does what is printed, is one line, too."""
        for name in (name for name in STREAMS if getattr(sys, name) is None):
            setattr(sys, name, open(os.devnull, STREAMS[name]))  # noqa: SIM115 - for the whole process
        try:
            return super().main(*args, **options)
        except OSError as error:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - what is left to print would fail once more
            advice = ADVICE.get(error.errno or 0, "choose another file")
            tell(f"Error: {printable(str(error))}; {advice}")
            sys.exit(1)
        except (MemoryError, ImportError, RuntimeError) as error:
            if str(error) == NO_THREAD:
                tell("Error: the system starts no more threads; raise ulimit -u or the container's limit")
            elif is_no_memory(error):
                tell(f"Error: too little memory ({printable(str(error)) or 'a request was refused'}); {MORE}")
            else:
                raise
            sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _terminate)
            if HANGUP is not None and signal.getsignal(HANGUP) is not signal.SIG_IGN:  # as below nohup
                signal.signal(HANGUP, _hang_up)
        for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors=errors)
        try:
            with extras():
                return super().invoke(ctx)
        except DijiangError as error:
            tell(f"Error: {printable(' '.join(str(error).split()))}")
            ctx.exit(1)
        except KeyboardInterrupt:
            tell("Interrupted")
            ctx.exit(INTERRUPTED)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(TERMINATED)


def _hang_up(number: int, frame: FrameType | None) -> None:
    signal.raise_signal(signal.SIGTERM)  # whoever handles that by now, as a server does


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """DiJiang checkpoints to ONNX, and text from them with constant memory per token."""


for command in (
    *(bench, build, chat, convert, deploy, doctor, evaluate),
    *(export, init, inspect, run, serve, sign, state, upgrade, verify),
):
    main.add_command(command)
