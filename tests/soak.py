"""A long life in pieces: a generation of 1,000,000 tokens that is saved, killed and taken up again.

    python -m tests.soak live tiny-python --tokens 1000000 --seconds 200    # as often as it takes
    python -m tests.soak judge tiny-python --output benchmarks/results/soak-tiny-python.json

A piece is a process. It takes up the saved state, generates, writes down its resident memory, and saves. At every
100,000th token it goes on after the save, until it is killed (SIGKILL). The next piece has to say what the killed
one said. `judge` looks at the whole: the slope of the memory, the logits at the end beside float64, and the text.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

import dijiang
from benchmarks.reports import tell
from dijiang.models.initial import init
from dijiang.models.load import load_checkpoint
from dijiang.models.reference import Reference
from dijiang.version import __version__
from tests.conftest import EXAMPLES

FOLDER = Path(".soak")
#: What lives: its precision. A name that is no example is a preset with random weights.
LIVES = {"tiny-python": "fp32", "pythia-70m": "int8"}
PROMPT = np.array([1, 2, 3])
#: How a life is sampled. Random weights leave nearly all tokens in a nucleus, whose sort is slower than a step.
SAMPLING: dict[str, dict[str, Any]] = {
    "tiny-python": {"temperature": 0.8, "top_p": 0.95, "seed": 1, "ignore_eos": True},
    "pythia-70m": {"temperature": 0.8, "top_k": 50, "seed": 1, "ignore_eos": True},
}
#: A save, a kill and a resume every so many tokens; tokens that the killed process says after the save.
EVERY, SAID = 100_000, 200
#: Tokens of a piece before its memory counts, and between two looks at it; looks that a slope needs. Until then the
#: allocators take 0.6 MB in two steps.
SETTLED, LOOK, FEWEST = 30_000, 1_000, 10
#: Tokens that float64 reads before the end. A head keeps 0.99805 a token at most: of what was before, not 1e-20 is
#: left after six layers.
REMEMBERED = 50_000
CHUNK = 250
#: Tokens of a window of text, and windows at each end of the life.
WINDOW, WINDOWS = 500, 20


def resident_bytes() -> int:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def prepare(name: str) -> Path:
    """The folder of a life, with its checkpoint and its bundle."""
    folder = FOLDER / name
    if not (folder / "life.json").exists():
        checkpoint = EXAMPLES / name
        if not checkpoint.exists():
            checkpoint = folder / "checkpoint"
            init(name, checkpoint)
        dijiang.export(checkpoint, folder / "bundle", precision=LIVES[name], verify=False, calibration_tokens=0)
        store(folder, {"checkpoint": str(checkpoint), "tokens": 0, "pieces": [], "kills": []})
    return folder


def stored(folder: Path) -> dict[str, Any]:
    """What is known of a life."""
    return json.loads((folder / "life.json").read_text())


def store(folder: Path, life: dict[str, Any]) -> None:
    (folder / "life.new").write_text(json.dumps(life, indent=1))
    (folder / "life.new").replace(folder / "life.json")


def live_on(folder: Path, until: int, seconds: float) -> None:
    """One piece: up to a number of tokens, or so many seconds; then what follows, until it is killed."""
    life, end, sampling = stored(folder), time.monotonic() + seconds, SAMPLING[folder.name]
    # One thread: with as many as there are cores, whatever else runs holds up every step.
    model, file, first = dijiang.load(folder / "bundle", threads=1), folder / "state", life["tokens"]
    state = dijiang.State.load(file) if first else model.new_state()
    prompt: np.ndarray | None = None if first else PROMPT
    ids, looks = np.ones(until - first, np.int64), np.ones((2, until // LOOK + 1), np.int64)
    count = seen = 0
    while first + count < until and time.monotonic() < end:
        # Calls are short, so that time is looked at: n and then m tokens are n + m.
        for record in model.generate(prompt, state=state, max_tokens=min(LOOK, until - first - count), **sampling):
            ids[count] = record.token
            count += 1
        prompt = None
        looks[:, seen] = count, resident_bytes()
        seen += 1
    state.save(file)
    np.save(folder / f"ids-{first:09}.npy", ids[:count])
    print(json.dumps({"first": first, "last": first + count, "memory": looks[:, :seen].T.tolist()}), flush=True)
    if (first + count) % EVERY == 0:
        for record in model.generate(None, state=state, max_tokens=EVERY, **sampling):
            print(record.token, flush=True)


def live(name: str, tokens: int, seconds: float) -> None:
    """Pieces, until a life is long enough or so many seconds have passed."""
    folder, end = prepare(name), time.monotonic() + seconds
    while (life := stored(folder))["tokens"] < tokens and (left := end - time.monotonic()) > 5:
        until = min(tokens, (life["tokens"] // EVERY + 1) * EVERY)
        started = time.monotonic()
        command = [
            sys.executable,
            "-m",
            "tests.soak",
            "piece",
            name,
            "--tokens",
            str(until),
            "--seconds",
            str(left),
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"{name}: a piece ended with {process.wait()}")
            piece = json.loads(line) | {"seconds": round(time.monotonic() - started, 1)}
            said = []
            if piece["last"] % EVERY == 0:
                said = [int(process.stdout.readline()) for _ in range(SAID)]
                process.kill()
            process.wait()
        ids = np.load(folder / f"ids-{piece['first']:09}.npy")
        for kill in life["kills"]:
            if kill["at"] == piece["first"]:
                kill["resumed_equal"] = kill.pop("said") == ids[:SAID].tolist()
        life["pieces"].append(piece)
        life["kills"] += [{"at": piece["last"], "said": said}] if said else []
        store(folder, life | {"tokens": piece["last"]})
        print(f"{name}: {piece['last']:,} tokens", flush=True)


def slope(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    """Bytes a token: the mean over the pieces of the slope of each, and where it lies 19 times in 20."""
    settled = [np.array([look for look in piece["memory"] if look[0] >= SETTLED], float) for piece in pieces]
    slopes = [float(np.polyfit(*looks.T, 1)[0]) for looks in settled if len(looks) >= FEWEST]
    mean = float(np.mean(slopes)) if slopes else float("nan")
    error = stats.sem(slopes) * stats.t.ppf(0.975, len(slopes) - 1) if len(slopes) > 1 else float("inf")
    return {"pieces": len(slopes), "bytes_a_token": mean, "interval": [float(mean - error), float(mean + error)]}


def logits_of(folder: Path, life: dict[str, Any], ids: np.ndarray) -> dict[str, float]:
    """RMS-relative error against float64: of the logits after the last token, and of the same tokens as a start."""
    model, state = dijiang.load(folder / "bundle"), dijiang.State.load(folder / "state")
    state.check(model.spec, model.manifest.fingerprint)
    reference = Reference(load_checkpoint(life["checkpoint"]))
    fed = np.concatenate([PROMPT, ids])
    start, seam = max(0, len(fed) - REMEMBERED), state.seam()
    assert seam is not None
    assert (state.position[0], seam.token) == (len(fed) - 1, fed[-1])
    found = model.forward(fed[None, -1:], state)[0]
    kept = reference.new_state(1)
    for at in range(start, len(fed), CHUNK):
        expected = reference.forward(fed[None, at : at + CHUNK], at, kept)[0, -1]
    fresh = fed[None, -CHUNK:]
    again = model.forward(fresh, model.new_state())[0]
    return {
        "max_error": float(np.abs(found - expected).max()),
        "rms_relative_error": relative(found, expected),
        "rms_relative_error_of_a_fresh_state": relative(again, reference.forward(fresh)[0, -1]),
        "layers_finite": all(bool(np.isfinite(layer).all()) for layer in state.layers),
    }


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def text_of(folder: Path, ids: np.ndarray) -> dict[str, dict[str, float]]:
    """How a fresh model likes the first and the last tokens: nats a token, and how many of a window differ."""
    model, found = dijiang.load(folder / "bundle"), {}
    for where, part in (("first", ids[: WINDOW * WINDOWS]), ("last", ids[-WINDOW * WINDOWS :])):
        windows = part[: len(part) // WINDOW * WINDOW].reshape(-1, WINDOW)
        nats = [float(-model.score(window[None]).mean()) for window in windows]
        found[where] = {"nats": float(np.mean(nats)), "different": float(np.mean([len(set(w)) for w in windows]))}
    return found


def judge(name: str) -> dict[str, Any]:
    """The report of a life."""
    folder = FOLDER / name
    life = stored(folder)
    ids = np.concatenate([np.load(file) for file in sorted(folder.glob("ids-*.npy"))])
    assert len(ids) == life["tokens"]
    kills = [kill["resumed_equal"] for kill in life["kills"] if "resumed_equal" in kill]
    return {
        "dijiang": __version__,
        "model": name,
        "precision": LIVES[name],
        "sampling": SAMPLING[name],
        "tokens": life["tokens"],
        "seconds": round(sum(piece["seconds"] for piece in life["pieces"])),
        "pieces": len(life["pieces"]),
        "killed_and_resumed": len(kills),
        "resumed_equal": sum(kills),
        "memory": slope(life["pieces"]),
        "logits": logits_of(folder, life, ids),
        "text": text_of(folder, ids),
    }


def faults(report: dict[str, Any]) -> list[str]:
    """What a life must not show. Memory: its interval reaches 0, or ends below a megabyte in a million tokens."""
    low, high = report["memory"]["interval"]
    logits, first, last = report["logits"], report["text"]["first"], report["text"]["last"]
    allowed = 1e-4 if report["precision"] == "fp32" else 2 * logits["rms_relative_error_of_a_fresh_state"]
    wrong = {
        "a resumed process said something else": report["resumed_equal"] != report["killed_and_resumed"],
        "the memory grows": low > 0 and high > 1,
        "the state is not finite": not logits["layers_finite"],
        "the logits have drifted": logits["rms_relative_error"] > allowed,
        "the text has changed": not 0.8 < last["nats"] / first["nats"] < 1.25
        or not 0.8 < last["different"] / first["different"] < 1.25,
    }
    return [fault for fault, found in wrong.items() if found]


def main() -> None:
    """See the module. `judge` exits with 1 if anything is wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["live", "judge", "piece"])
    parser.add_argument("name", choices=list(LIVES))
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.what == "piece":
        live_on(FOLDER / options.name, options.tokens, options.seconds)
    elif options.what == "live":
        live(options.name, options.tokens, options.seconds)
    else:
        report = judge(options.name)
        report["faults"] = faults(report)
        tell(report, options.output)
        sys.exit(bool(report["faults"]))


if __name__ == "__main__":
    main()
