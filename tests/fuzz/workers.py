"""Running cases, in processes that may hang or die."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnxruntime  # noqa: F401  what a worker would import in its first case
import scipy.special  # noqa: F401
import torch._subclasses.fake_tensor  # noqa: F401

import dijiang
from dijiang.bundle.opened import open_bundle
from dijiang.models.convert import convert
from dijiang.models.load import load_checkpoint
from tests.fuzz import bundles, reports, requests, states
from tests.fuzz.folders import build
from tests.fuzz.grammar import Case

#: A case may take so many seconds of a processor, and a resident set of so many megabytes.
SECONDS, MEGABYTES = 5, 1000
#: Seconds on the clock without an answer, where a case waits and does not work: a busy machine is slow.
WAIT = 60
#: What else than checkpoints is fuzzed.
CLASSES = {"bundles": bundles, "states": states, "reports": reports, "requests": requests}
#: A worker begins anew after so many cases, and may never have more than so many bytes.
CASES, LIMIT = 400, 6 << 30


def attempt(case: Case, folder: Path) -> str:
    """Run a case in an empty folder: what became of it, or the class of the error; AssertionError: a finding."""
    return (CLASSES[case["class"]].attempt if "class" in case else checkpoint)(case, folder)


def checkpoint(case: Case, folder: Path) -> str:
    """A case of checkpoints: "written", or the class of the error."""
    build(case, folder / "checkpoint")
    area = folder / "area"
    area.mkdir()
    target = area / "target"
    options = {"graph": case["graph"], "precision": case["precision"], "verify": case["verify"]}
    if not case["verify"]:
        options["calibration_tokens"] = 0  # thousands of tokens are drawn else
    try:
        if case["verb"] == "export":
            dijiang.export(folder / "checkpoint", target, **options)
        else:
            convert(folder / "checkpoint", target)
    except dijiang.DijiangError as error:
        line = str(error)
        assert line.splitlines() == [line.strip()], f"not one line: {line!r}"
        assert len(line) < 3000, f"a line of {len(line)} characters: {line[:200]}"
        assert not list(area.iterdir()), f"left behind: {list(area.rglob('*'))}"
        return type(error).__name__
    assert [path.name for path in area.iterdir()] == ["target"], list(area.iterdir())
    if case["verb"] == "export":
        open_bundle(target)
    else:
        load_checkpoint(target)  # what convert accepts, export accepts
        dijiang.export(target, folder / "bundle", graph=case["graph"], verify=False)
    return "written"


def worker(pipe: Any, folder: Path) -> None:
    """Cases as they come; of each (outcome or None, what was found, processor seconds, largest resident set)."""
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    warnings.simplefilter("error")  # a warning is no line of ours either
    warnings.simplefilter("ignore", RuntimeWarning)  # sums of weights of 1e38
    while (case := pipe.recv()) is not None:
        place = Path(tempfile.mkdtemp(dir=folder))
        outcome, found, start = None, "", time.process_time()
        try:
            outcome = attempt(case, place)
        except BaseException:
            found = traceback.format_exc()[-1500:]
        seconds = time.process_time() - start
        shutil.rmtree(place, ignore_errors=True)
        pipe.send((outcome, found, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
    os._exit(0)  # a server's thread would be waited for


class Worker:
    """A process that runs cases; a new one after a hang, a crash, or many."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._begin()

    def _begin(self) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=worker, args=(theirs, self.folder), daemon=True)
        # Python 3.12 warns of forks beside threads: `run_cases` is for a process whose libraries have none.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.process.start()
        theirs.close()
        self.cases = 0

    def run(self, case: Case) -> tuple[str, str, float, int]:
        """(outcome, what was found or "", processor seconds, bytes)."""
        if self.cases >= CASES:
            self.end()
            self._begin()
        self.cases += 1
        self.pipe.send(case)
        try:
            answered = self.pipe.poll(WAIT)
            outcome, found, seconds, peak = self.pipe.recv() if answered else ("hang", "no answer", WAIT, 0)
        except EOFError:
            self.process.join()
            outcome, found, seconds, peak = "crash", f"the process ended with {self.process.exitcode}", 0, 0
        if outcome not in ("hang", "crash"):
            outcome = "finding" if found else outcome
            if not found and seconds > SECONDS:
                outcome, found = "hang", f"{seconds:.1f} s"
            if not found and peak > MEGABYTES * 10**6:
                outcome, found = "memory", f"{peak / 1e6:.0f} MB"
        if outcome in ("hang", "crash", "memory"):
            self.process.kill()
            self.process.join()
            self._begin()
        return outcome, found, seconds, peak

    def end(self) -> None:
        self.pipe.send(None)
        self.process.join()


def run_cases(
    cases: Iterator[tuple[int, Case]], say: Callable[[str], None] = lambda _: None, workers: int = 1
) -> dict[str, Any]:
    """Run cases, in so many processes side by side; the report."""
    outcomes: Counter[str] = Counter()
    findings: list[dict[str, Any]] = []
    slowest, largest, lock = [0.0], [0], threading.Lock()

    def work(one: Worker) -> None:
        while True:
            with lock:
                number, case = next(cases, (0, None))
            if case is None:
                return
            outcome, found, seconds, peak = one.run(case)
            with lock:
                outcomes[f"{case['verb']}: {outcome}"] += 1
                slowest[0], largest[0] = max(slowest[0], seconds), max(largest[0], peak)
                if found:
                    findings.append({"number": number, "outcome": outcome, "found": found, "case": case})
                    say(json.dumps(findings[-1]))
                if outcomes.total() % 500 == 0:
                    say(f"{outcomes.total()} cases, {len(findings)} findings")

    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        made = [Worker(Path(name)) for _ in range(workers)]
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(work, made))
        for one in made:
            one.end()
    return {
        "outcomes": dict(sorted(outcomes.items())),
        "slowest_seconds": round(slowest[0], 2),
        "largest_megabytes": round(largest[0] / 1e6),
        "findings": findings,
    }
