"""Calls that must fail, drawn; after each, whatever it was about is bit for bit what it was.

python -m tests.refusals --calls 3000 --output benchmarks/results/refusals.json
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import dijiang
from benchmarks.reports import tell
from dijiang.errors import DijiangError, SessionError
from dijiang.runtime.dialogue import Dialogue
from dijiang.runtime.generate import prepare
from dijiang.runtime.model import Model
from dijiang.runtime.options import Generation
from dijiang.runtime.state import State
from dijiang.version import __version__
from tests.conftest import GOLDEN, talkative


@dataclass
class Place:
    """What a call may be about: a state of the model in a file, too, and a conversation where it has a template."""

    draw: random.Random
    model: Model
    state: State
    other: State
    folder: Path
    dialogue: Dialogue | None

    @property
    def vocab(self) -> int:
        return self.model.spec.vocab_size

    @property
    def file(self) -> Path:
        return self.folder / "state"

    def ids(self, length: int | None = None) -> np.ndarray:
        """Ids that fit."""
        length = self.draw.randint(1, 6) if length is None else length
        return np.array([[self.draw.randrange(self.vocab) for _ in range(length)] for _ in range(self.state.batch)])

    def bits(self) -> list[bytes]:
        """All that may not change."""
        return [
            *(bits_of(self.state), bits_of(self.other), self.file.read_bytes()),
            repr(sorted(path.name for path in self.folder.iterdir())).encode(),
            *([] if self.dialogue is None else [_told(self.dialogue)]),
        ]


def bits_of(state: State) -> bytes:
    """All of a state; safetensors has no order of its own."""
    kept = state.snapshot()
    arrays = (*kept.layers, kept.position, kept.last, kept.seen, kept.history)
    told = [(array.dtype, array.shape) for array in arrays], kept.seams, kept.fingerprint, kept.vocab_size
    return repr(told).encode() + b"".join(array.tobytes() for array in arrays)


def _told(dialogue: Dialogue) -> bytes:
    before = [(text, attempt, bits_of(state)) for state, text, attempt in dialogue._before]
    return repr((dialogue.system, before)).encode() + bits_of(dialogue.state)


Bad = Callable[[Place], Any]
OUT_OF_RANGE = (-1, -(2**31), 2**31, 2**62)


def an_id_outside(place: Place) -> np.ndarray:
    ids = place.ids()
    ids[place.draw.randrange(len(ids)), -1] = place.draw.choice([place.vocab, *OUT_OF_RANGE])
    return ids


def ids_that_are_none(place: Place) -> Any:
    """Of a wrong type, shape or number of sequences."""
    good = place.ids()
    return place.draw.choice(
        [
            None,
            3,
            "text",
            [],
            [[]],
            [[1, 2], [3]],
            [[1.5]] * place.state.batch,
            good.astype(np.float32),
            good.astype(bool),
            good.astype(object),
            good.astype(str),
            good[None],
            good[0],
            good[:, :0],
            np.concatenate([good, good]),
            [{}],
            [[None]],
        ]
    )


def a_mask_that_is_none(place: Place) -> tuple[np.ndarray, Any]:
    ids = place.ids()
    turned = np.ones((*ids.shape[::-1], 1))
    return ids, place.draw.choice([np.ones((9, 9)), [1], 1, [[]], turned, "x", [[1], [1, 2]]])


def options_that_are_none(place: Place) -> dict[str, Any]:
    """One option of the wrong type or out of range."""
    numbers = {"max_tokens": 0, "temperature": -1, "top_k": -1, "top_p": 2, "min_p": -0.1, "seed": -1}
    numbers |= {"repetition_penalty": 0}
    name = place.draw.choice(list(numbers))
    return place.draw.choice(
        [
            {name: numbers[name]},
            {name: place.draw.choice(["x", [], {}, float("nan"), True, object()])},
            {place.draw.choice(["stop", "stop_tokens"]): place.draw.choice([3, [None], {"x": 1}, b"x"])},
            {"stop": place.draw.choice(["", [""], ["a", ""]])},
            {"unknown": 1},
        ]
    )


def a_prompt_that_is_none(place: Place) -> Any:
    return place.draw.choice(
        [
            "",
            [],
            [[1, 2]],
            "\ud800",
            [place.vocab],
            [-1],
            [1.5],
            [None],
            ["x"],
            {},
            3,
            np.ones((1, 2, 3)),
            [[1], [1, 2]],
        ]
    )


def rows_that_are_none(place: Place) -> Any:
    return place.draw.choice([[], [place.state.batch], [-1], [0.5], [[0]], "x", None, [None], [True], [2**70]])


def bytes_that_are_none(place: Place) -> Path:
    """A file that was damaged: a byte changed, cut, or something else in its place."""
    data = bytearray(place.file.read_bytes())
    at = place.draw.randrange(len(data))
    kind = place.draw.choice(["byte", "cut", "more", "junk"])
    if kind == "byte":
        data[at] ^= 1 << place.draw.randrange(8)
    made = {"byte": data, "cut": data[:at], "more": data + b"x", "junk": place.draw.randbytes(at % 500)}[kind]
    file = place.folder / "damaged"
    file.write_bytes(made)
    return file


def a_path_for_nothing(place: Place) -> Any:
    return place.draw.choice(
        [place.folder, place.folder / "none" / "x", place.folder / ("n" * 300), "/dev/full", "/proc/x", "", "a\0b"]
    )


def failing(place: Place, call: Callable[[], Any]) -> Any:
    """A call while the backend fails at once, as one out of memory does."""

    def run(*_: Any) -> Any:
        raise SessionError("out of memory; use a smaller batch")

    session = place.model.session
    session.run = run  # type: ignore[method-assign]
    try:
        return call()
    finally:
        del session.run


def listen(records: Any) -> list[Any]:
    return list(records)


def of_batch(place: Place) -> State:
    """A state that `generate` does not take."""
    return place.model.new_state(place.draw.randint(2, 3))


def a_tail(place: Place) -> np.ndarray:
    """One token more than there are positions."""
    limit = place.model.manifest.positions_limit
    return place.ids(int(limit - place.state.position.max()) + 1 if limit else 0)


REFUSED: dict[str, Bad] = {
    "forward: an id outside": lambda p: p.model.forward(an_id_outside(p), p.state),
    "forward: no ids": lambda p: p.model.forward(ids_that_are_none(p), p.state),
    "forward: no mask": lambda p: (lambda ids, mask: p.model.forward(ids, p.state, mask=mask))(
        *a_mask_that_is_none(p)
    ),
    "forward: past the end, or nothing": lambda p: p.model.forward(a_tail(p), p.state),
    "forward: a state of another model": lambda p: p.model.forward(p.ids(), p.other),
    "forward: the backend fails": lambda p: failing(p, lambda: p.model.forward(p.ids(), p.state)),
    "score: too short, or no ids": lambda p: p.model.score(
        p.draw.choice([p.ids(1), ids_that_are_none(p)]), p.state
    ),
    "score: an id outside": lambda p: p.model.score(np.concatenate([p.ids(), an_id_outside(p)], axis=1), p.state),
    "score: the backend fails": lambda p: failing(p, lambda: p.model.score(p.ids(3), p.state)),
    "generate: no option": lambda p: p.model.generate("x", state=p.state, **options_that_are_none(p)),
    "generate: no prompt": lambda p: p.model.generate(a_prompt_that_is_none(p), state=p.state, max_tokens=2),
    "generate: several sequences": lambda p: p.model.generate([1], state=of_batch(p)),
    "generate: a state of another model": lambda p: listen(p.model.generate([1], state=p.other)),
    "generate: nothing to go on from": lambda p: p.model.generate(None, state=p.model.new_state()),
    "generate: the backend fails": lambda p: failing(p, lambda: listen(p.model.generate([1], state=p.state))),
    "generate: past the end, or nothing": lambda p: p.model.generate(a_tail(p)[0], state=p.state),
    "prepare: a bias": lambda p: prepare(
        p.model,
        [1],
        Generation(),
        p.state,
        keeps=False,
        bias=p.draw.choice([{-1: 1.0}, {p.vocab: 1.0}, {0: float("nan")}, {1: float("inf")}]),
    ),
    "grammar": lambda p: p.model.grammar(
        p.draw.choice([{"type": 3}, {"$ref": "#/x"}, {"pattern": "("}, {"type": "x"}])
    ),
    "take: no rows": lambda p: p.state.take(rows_that_are_none(p)),
    "new_state: no batch": lambda p: p.model.new_state(p.draw.choice([0, -1, -(2**40)])),
    "save: no file": lambda p: p.state.save(a_path_for_nothing(p)),
    "load: a damaged file": lambda p: State.load(bytes_that_are_none(p)),
    "load: no file": lambda p: State.load(a_path_for_nothing(p)),
}
SPOKEN: dict[str, Bad] = {
    "say: no text": lambda p: _dialogue(p).say("\ud800"),
    "say: the backend fails": lambda p: failing(p, lambda: listen(_silent(p).say("x"))),
    "undo: no turn": lambda p: _emptied(p).undo(),
    "regenerate: no turn": lambda p: _emptied(p).regenerate(),
    "dialogue: a damaged file": lambda p: _dialogue(p).load(bytes_that_are_none(p)),
    "dialogue: no file": lambda p: _dialogue(p).load(Path(a_path_for_nothing(p))),
    "dialogue: save to no file": lambda p: _dialogue(p).save(Path(a_path_for_nothing(p))),
}


def _dialogue(place: Place) -> Dialogue:
    assert place.dialogue is not None
    return place.dialogue


def _silent(place: Place) -> Dialogue:
    """A fork: a turn that was begun counts, whatever becomes of it."""
    return _dialogue(place).fork()


def _emptied(place: Place) -> Dialogue:
    other = _dialogue(place).fork()
    other._before.clear()
    return other


def made_models(folder: Path) -> list[Model]:
    """One with a conversation, one whose positions end, one whose state is not updated in place."""
    options: dict[str, Any] = {"verify": False, "calibration_tokens": 0}
    bundles = [
        talkative(folder),
        dijiang.export(GOLDEN["neox-trained-decay"], folder / "ends", **options).path,
        dijiang.export(GOLDEN["neox-base"], folder / "apart", graph="primitive", **options).path,
    ]
    return [dijiang.load(bundle, threads=1) for bundle in bundles]


def places(models: list[Model], folder: Path, seed: int, calls: int) -> Any:
    """A new place every few calls: of one model or another, with one sequence or several, begun or not."""
    draw = random.Random(seed)
    for number in range(calls):
        if number % 20 == 0:
            at = draw.randrange(len(models))
            model, stranger = models[at], models[at - 1]
            state = model.new_state(draw.choice([1, 1, 3]))
            if draw.random() < 0.8:
                model.forward(np.array([[draw.randrange(50) for _ in range(5)]] * state.batch), state)
            if state.batch == 1 and draw.random() < 0.7:
                listen(model.generate([1, 2], state=state, max_tokens=draw.randint(1, 3)))
            dialogue = Dialogue(model, Generation(max_tokens=3)) if model.has_tokenizer else None
            if dialogue is not None:
                listen(dialogue.say("hello"))
            place = Place(draw, model, state, stranger.new_state(), folder, dialogue)
            state.save(place.file)
        yield place


def run(models: list[Model], seed: int, calls: int) -> dict[str, Any]:
    """Make calls; the report. found: what was not refused, was no error of ours, or changed something."""
    counts: Counter[str] = Counter()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, place in enumerate(places(models, folder, seed, calls)):
            table = REFUSED | (SPOKEN if place.dialogue is not None else {})
            row = place.draw.choice(list(table))
            before, wrong = place.bits(), ""
            try:
                table[row](place)
                wrong = "not refused"
            except DijiangError as error:
                counts[type(error).__name__] += 1
                wrong = "" if str(error).splitlines() == [str(error)] else f"not one line: {error}"
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"
            (folder / "damaged").unlink(missing_ok=True)
            if not wrong and place.bits() != before:
                wrong = "something changed"
            if wrong:
                found.append({"number": number, "call": row, "found": wrong})
    return {"dijiang": __version__, "seed": seed, "calls": calls, "errors": dict(counts), "found": found}


def main() -> None:
    """See the module; exit 1 if anything was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        report = run(made_models(Path(name)), options.seed, options.calls)
    tell(report, options.output)
    sys.exit(bool(report["found"]))


if __name__ == "__main__":
    main()
