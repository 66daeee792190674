"""Many prompts from a file: answered together, written in order, taken up again after a kill."""

from __future__ import annotations

import codecs
import errno
import hashlib
import json
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.manifest import DATA
from ..errors import DijiangError, InputError
from ..files import FULL
from ..hidden import lock
from ..models.tokenizer import TOKENIZER
from ..reading import parse_json, read_regular
from ..runtime.generate import prepare
from ..runtime.model import Model
from ..runtime.options import Generation
from ..runtime.sequence import Record
from .batcher import Batcher
from .prefixes import Prefixes
from .slots import slots_that_fit
from .turn import Turn

#: Prompts that are begun before the first of them is written, for each slot.
AHEAD = 4
PROMPT = "prompt"
#: Bytes of states of what prompts begin with.
PREFIXES = 256 << 20
#: Number of a line -> what its answer begins with.
Head = Callable[[int], dict[str, Any]]


class Answer:
    """The line of one prompt, while it is made; see `batching.turn.Listener`."""

    def __init__(self, head: dict[str, Any]) -> None:
        self.head = head
        self.found: dict[str, Any] | None = None
        self._text: list[str] = []

    def record(self, record: Record, logits: np.ndarray | None) -> None:
        """See Listener."""
        self._text.append(record.text)
        if record.finish_reason:
            self.found = {
                "text": "".join(self._text),
                "finish_reason": record.finish_reason,
                "prompt_tokens": record.prompt_tokens,
                "generated": record.generated,
            }

    def failed(self, error: DijiangError) -> None:
        """See Listener."""
        self.found = {"error": str(error)}

    @property
    def line(self) -> bytes:
        """As it is written."""
        return json.dumps(self.head | (self.found or {})).encode() + b"\n"


def job_of(model: Model, options: Generation) -> str:
    """What answers call the bundle and the options that they are made by: others go on in another file."""
    files = model.manifest.files
    deciding = [files[name].sha256 for name in (DATA, TOKENIZER) if name in files]
    return named(json.dumps([model.manifest.fingerprint, *deciding, asdict(options)]).encode())


def named(data: bytes) -> str:
    """A short hash."""
    return hashlib.sha256(data).hexdigest()[:16]


def answer_file(
    model: Model,
    source: Path,
    target: Path,
    options: Generation,
    *,
    slots: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Answer every line of a file of JSON lines; the number of those that failed.

    Each line of the source is an object with `prompt` (text or token ids) and any options of a generation. Each
    line of the target has `index`, `input` (a hash of the line), `job` (a hash of weights and options), and `text`,
    `finish_reason`, `prompt_tokens` and `generated`, or `error`. A target that is there is gone on with, after its
    last whole line.

    Raises:
        InputError: a file cannot be read or written, the target has something else than answers to these lines, or
            another process answers them.
    """
    try:
        data = read_regular(source).removeprefix(codecs.BOM_UTF8)
    except (OSError, ValueError) as error:
        raise InputError(f"{source}: cannot be read ({error}); give a file of JSON lines") from error
    lines, failed = [line for line in data.splitlines() if line.strip()], 0
    try:
        with os.fdopen(os.open(target, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b") as out:
            if not stat.S_ISREG(os.fstat(out.fileno()).st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            if lock(out.fileno(), wait=False) is False:
                raise InputError(f"{target}: another job writes it; wait for that one, or choose another file")
            job = job_of(model, options)

            def head(index: int) -> dict[str, Any]:
                """What the answer to a line begins with."""
                return {"index": index, "input": named(lines[index].strip()), "job": job}

            done, end, failed = _done(out.read(), len(lines), head, target)
            out.truncate(end)
            out.seek(end)
            progress(done, len(lines))
            for answer in _answers(model, lines, head, done, options, slots or slots_that_fit(model)):
                out.write(answer.line)
                out.flush()
                done += 1
                failed += "error" in (answer.found or {})
                progress(done, len(lines))
            os.fsync(out.fileno())
    except OSError as error:
        advice = "free some space and run it again: it goes on" if error.errno in FULL else "choose another file"
        raise InputError(f"{target}: cannot be written ({error.strerror or error}); {advice}") from error
    return failed


def _done(data: bytes, count: int, head: Head, target: Path) -> tuple[int, int, int]:
    """Answers of `count` lines that are whole, where the last of them ends, and how many of them failed."""
    # After a loss of power a file system may leave zeros behind what was written.
    *whole, rest = (data.rstrip(b"\0") or data).split(b"\n")
    failed = 0
    for index, line in enumerate(whole):
        try:
            found, expected = parse_json(line), head(index)
            same = all(found[name] == expected[name] for name in ("index", "input"))
        except (ValueError, TypeError, KeyError, IndexError):
            same = False
        if not same:
            raise _foreign(target, index)
        if found.get("job") != expected["job"]:
            raise InputError(
                f"{target}: line {index + 1} was answered by another bundle or with other options; choose another "
                "file, or remove it"
            )
        failed += "error" in found
    if rest and (len(whole) == count or not _begins(rest, head(len(whole)))):
        raise _foreign(target, len(whole))
    return len(whole), sum(len(line) + 1 for line in whole), failed


def _begins(rest: bytes, head: dict[str, Any]) -> bool:
    """Whether a line that a killed process left can be the answer that begins with a head."""
    start = json.dumps(head).encode()[:-1]
    return rest.startswith(start) or start.startswith(rest)


def _foreign(target: Path, index: int) -> InputError:
    return InputError(f"{target}: line {index + 1} answers something else; choose another file, or remove it")


def _answers(
    model: Model,
    lines: Sequence[bytes],
    head: Head,
    start: int,
    options: Generation,
    slots: int,
) -> Iterator[Answer]:
    """In the order of the lines; so many are begun ahead of the first that is not finished."""
    prefixes = Prefixes(model, PREFIXES)
    batcher, begun = Batcher(model, slots, prefixes=prefixes), OrderedDict[int, Answer]()
    upcoming = start
    while upcoming < len(lines) or begun:
        while upcoming < len(lines) and len(begun) < AHEAD * slots:
            answer = begun[upcoming] = Answer(head(upcoming))
            try:
                batcher.submit(_turn(model, lines[upcoming], options, answer, prefixes))
            except InputError as error:
                answer.failed(error)
            upcoming += 1
        batcher.step()
        while begun and (first := next(iter(begun.values()))).found is not None:
            begun.popitem(last=False)
            yield first


def _turn(model: Model, line: bytes, options: Generation, answer: Answer, prefixes: Prefixes) -> Turn:
    try:
        found = parse_json(line)
    except ValueError as error:
        raise InputError(f"the line is no JSON ({error}); give an object with {PROMPT}") from error
    if not isinstance(found, dict) or not isinstance(found.get(PROMPT), (str, list)):
        raise InputError(f"the line has no {PROMPT} of text or token ids; add one")
    given = {name: value for name, value in found.items() if name != PROMPT}
    state = model.new_state()
    plan = prepare(model, found[PROMPT], Generation.of(asdict(options) | given), state, keeps=False)
    return Turn(plan, state, answer, borders=prefixes.borders(state, plan.ids))
