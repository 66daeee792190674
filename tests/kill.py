"""Killing what writes: at every file event, then a look at what is left, then the same once more.

    python -m tests.kill --runs 500 --output benchmarks/results/kill.json

Each run is a forked child. An audit hook counts what it does to files of its area and kills it before the
n-th. Whatever n is: the target is the old one or the new one, and the next run leaves nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

import dijiang
import dijiang.exporter.export
import dijiang.models.convert
from benchmarks.reports import tell
from dijiang import files
from dijiang.bundle.opened import open_bundle
from dijiang.bundle.upgrade import upgrade
from dijiang.machine import driver
from dijiang.models.binding import ADDED
from dijiang.models.initial import write_random
from dijiang.models.presets import PRESETS
from dijiang.version import __version__
from tests.conftest import GOLDEN
from tests.fake_gpu import FakeLibcuda, fake_tensorrt

BASE = GOLDEN["neox-base"]
TINY = PRESETS["pythia-70m"] | {"vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 1}
TINY |= {"intermediate_size": 48, "max_position_embeddings": 64}
EVENTS = {"open", "os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink"}
EVENTS |= {"shutil.copyfile", "shutil.rmtree", "ctypes.dlsym"}


@dataclass(frozen=True)
class Case:
    """What is killed: `work` writes `target`; `once`: it refuses to write it again.

    bundle: the target may also be a bundle that opens, with every hash, and lists all that it holds.
    """

    work: Callable[[Path], object]
    old: Path | None = None
    bundle: bool = False
    once: bool = False


def no_exchange(work: Callable[[Path], object]) -> Callable[[Path], object]:
    """The same where the system has no renameat2."""

    def apply(target: Path) -> None:
        files._rename = lambda *_: False
        work(target)

    return apply


def build(target: Path) -> None:
    """An engine, by a TensorRT that is not there."""
    library = FakeLibcuda()
    driver.load_library = lambda: library
    sys.modules["tensorrt"] = fake_tensorrt(library)
    dijiang.build(target, backend="tensorrt")


def cases(folder: Path) -> dict[str, Case]:
    """Every command that writes, with what stands at its target before."""
    vanilla = folder / "vanilla"
    shutil.copytree(BASE, vanilla)
    tensors = load_file(vanilla / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if not n.endswith(ADDED)}, vanilla / "model.safetensors")
    bundle, engine, first = folder / "bundle", folder / "engine", folder / "first"
    child(lambda: dijiang.export(BASE, bundle, verify=False, graph="primitive"))
    shutil.copytree(bundle, engine)
    child(lambda: build(engine))
    shutil.copytree(bundle, first)
    to_format_1(first)
    state = folder / "state"
    new_state(1).save(state)

    def exported(target: Path, **options: object) -> object:
        return dijiang.export(BASE, target, verify=False, **options)

    return {
        "export": Case(exported, once=True),
        "export, verified": Case(lambda t: dijiang.export(BASE, t / "a" / "b", graph="primitive"), once=True),
        "export --force": Case(lambda t: exported(t, force=True), bundle),
        "export --force, no exchange": Case(no_exchange(lambda t: exported(t, force=True)), bundle),
        "convert": Case(lambda t: dijiang.models.convert.convert(vanilla, t), once=True),
        "init": Case(lambda t: write_random(TINY, t), once=True),
        "verify": Case(lambda t: dijiang.verify(t, BASE, tokens=40), bundle, bundle=True),
        "build": Case(build, bundle, bundle=True),
        "build again": Case(build, engine, bundle=True),
        "upgrade": Case(upgrade, first),
        "State.save": Case(lambda t: new_state(2).save(t), state),
    }


def new_state(value: float) -> dijiang.State:
    """A state with a number in it."""
    layers = [np.full((1, 2, 8, 8), value, np.float32) for _ in range(3)]
    return dijiang.State(layers, np.array([3]), "f" * 64, 50)


def to_format_1(bundle: Path) -> None:
    """Rewrite a primitive bundle as format 1 had it."""
    manifest = json.loads((bundle / "dijiang.json").read_text())
    graph = manifest["graphs"].pop("primitive")
    (bundle / graph["file"]).rename(bundle / "model.onnx")
    manifest |= {"format_version": 1, "dialect": "primitive", "precision": "fp32", "in_place": graph["in_place"]}
    names = [name for name in manifest["files"] if name != graph["file"]] + ["model.onnx"]
    manifest["files"] = {n: hashlib.sha256((bundle / n).read_bytes()).hexdigest() for n in names}
    (bundle / "dijiang.json").write_text(json.dumps(manifest))


def child(work: Callable[[], object], area: Path | None = None, at: int = -1):
    """Run in a child that gets a signal before its event `at` in an area. Its status, and its events."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        code, events = 1, 0

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal events
            if event not in EVENTS or not _concerns(event, arguments, str(area)):
                return
            events += 1
            if events - 1 == at:
                os.kill(os.getpid(), signal.SIGKILL)

        if area is not None:
            sys.addaudithook(hook)
        try:
            work()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except dijiang.errors.DijiangError as error:
            sys.stderr.write(f"{error}\n")
        except BaseException:
            traceback.print_exc()
            code = 99
        finally:
            os.write(writer, str(events).encode())
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        found = stream.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, int(found or 0)


def _concerns(event: str, arguments: tuple[object, ...], area: str) -> bool:
    """Whether an event is about files of an area; a relative name or a descriptor is."""
    if event == "ctypes.dlsym":
        return arguments[1] == "renameat2"
    first = arguments[0]
    if isinstance(first, int):
        return event == "os.chmod"
    name = os.fsdecode(first) if isinstance(first, (str, bytes, os.PathLike)) else "/"
    return name.startswith(area) or not name.startswith("/")


def contents(path: Path) -> dict[str, str]:
    """Names and hashes of all files; empty: nothing is there."""
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in found
        if file.is_file()
    }


class Killed:
    """One case: its target is made anew for each kill."""

    def __init__(self, folder: Path, name: str, case: Case) -> None:
        self.folder, self.name, self.case = folder, name, case
        self.area = folder / "area"
        self.target = self.area / "target"
        self.outcomes: Counter[str] = Counter()
        self._prepare()
        self.old = contents(self.target) if self.target.exists() else {}
        status, self.events = child(self._work, self.area)
        assert status == 0, name
        self.new = contents(self.target)
        assert self.new != self.old

    def _work(self) -> object:
        return self.case.work(self.target)

    def _prepare(self) -> None:
        shutil.rmtree(self.area, ignore_errors=True)
        self.area.mkdir()
        if self.case.old is not None:
            (shutil.copytree if self.case.old.is_dir() else shutil.copyfile)(self.case.old, self.target)

    def kill(self, at: int) -> None:
        """Kill before one event, look, run again, look."""
        self._prepare()
        where = f"{self.name}, event {at} of {self.events}"
        status, _ = child(self._work, self.area, at)
        assert status == -signal.SIGKILL, (where, status)
        outcome = self._outcome(where)
        self.outcomes[outcome] += 1
        if not (self.case.once and outcome == "new"):
            status, _ = child(self._work)
            assert status == 0, (where, status)
        after = contents(self.target)
        assert self.case.bundle or after == self.new, where
        if self.case.bundle:
            self._check_bundle(where)
        assert [path.name for path in self.area.iterdir()] == ["target"], (where, list(self.area.iterdir()))

    def _outcome(self, where: str) -> str:
        found = contents(self.target) if self.target.exists() else {}
        found = {name: value for name, value in found.items() if ".partial" not in name}  # what nobody sees
        if not found and self.case.old is not None:
            assert "no exchange" in self.name, where
            open_bundle(self.target)
            assert contents(self.target) == self.old, where
            return "put aside, brought back"
        if found == self.old:
            return "old" if found else "absent"
        if found == self.new:
            return "new"
        assert self.case.bundle, (where, found.keys() ^ self.new.keys())
        self._check_bundle(where)
        return "between, whole"

    def _check_bundle(self, where: str) -> None:
        """Every hash is right, and every file is listed or one that is swept."""
        manifest = open_bundle(self.target).manifest
        listed = {"dijiang.json", *manifest.files, *manifest.reports}
        for path in self.target.iterdir():
            assert path.name in listed or path.suffix == ".partial", (where, path)


def main() -> None:
    """Kill as often as asked for, over all cases and events, and say what was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-") as name:
        folder = Path(name)
        all_cases = [Killed(folder, name, case) for name, case in cases(folder).items()]
        points = [(case, at) for case in all_cases for at in range(case.events)]
        draw = random.Random(options.seed)
        chosen = [(case, draw.randrange(case.events)) for case in all_cases]
        chosen += draw.sample(points, max(0, min(len(points), options.runs - len(chosen))))
        chosen += draw.choices(points, k=max(0, options.runs - len(chosen)))
        for case, at in chosen[: options.runs]:
            case.kill(at)
    report = {
        "dijiang": __version__,
        "kills": options.runs,
        "seed": options.seed,
        "cases": {c.name: {"events": c.events, "kills": c.outcomes.total(), **c.outcomes} for c in all_cases},
    }
    tell(report, options.output)


if __name__ == "__main__":
    main()
