"""`python -m tests.mutants`: see the package."""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import coverage
import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

from dijiang.version import __version__

ROOT = Path(__file__).parents[2]
SITE, KEPT = Path(__file__).parent / "site", ROOT / ".mutants"
TARGETS = ("dijiang/runtime/**/*.py", "dijiang/models/*.py", "dijiang/parity/*.py", "dijiang/recipe/*.py")
MUTANTS, SEED = 300, 1
#: Seconds of tests that a mutant may cost, as they took without it; and on the clock.
TESTS, CLOCK = 25.0, 120
#: A mutant may ask for endless memory.
MEMORY = 8 << 30
#: A signal in the middle of coverage's own code never ends.
UNSEEN = "not signal and not interrupt and not ctrl_c"
#: Files that read tables which are made when a module is imported: asked first, and whole.
WHOLE = {
    **{
        f"dijiang/recipe/{file.name}": ["tests/test_recipe.py", "tests/test_docs.py"]
        for file in (ROOT / "dijiang" / "recipe").glob("*.py")
    },
    "dijiang/runtime/options.py": ["tests/runtime/test_options.py", "tests/test_docs.py"],
    "dijiang/runtime/sessions/webgpu.py": ["tests/runtime/test_webgpu.py"],
}
#: What tests import that is not ours, before a mutant's process is forked: seconds each.
COMMON = ("matplotlib.pyplot", "onnx_ir", "onnxruntime", "openai", "scipy.stats", "torch", "transformers")
#: pytest's words for: all passed; a test failed; it was interrupted, broke, or could not import.
PASSED, NOTICED = 0, (1, 2, 3, 4)


def record(paths: list[str]) -> None:
    """Run tests, and keep the lines that each of them runs."""
    KEPT.mkdir(exist_ok=True)
    name = "-".join(Path(path).stem for path in paths)[:80]
    command = [sys.executable, "-m", "coverage", "run", f"--data-file={KEPT / name}.coverage", "--source=dijiang"]
    command += ["-m", "pytest", "-q", "-k", UNSEEN, "-p", "tests.mutants.recorder", *paths]
    os.execve(sys.executable, command, os.environ | {"MUTANTS_DURATIONS": str(KEPT / f"{name}.durations")})


class Known:
    """Which tests run a line."""

    def __init__(self) -> None:
        self.durations: dict[str, float] = {}
        self.lines: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        for file in KEPT.glob("*.durations"):
            self.durations |= json.loads(file.read_text())
        for file in KEPT.glob("*.coverage"):
            data = coverage.CoverageData(str(file))
            data.read()
            for path in data.measured_files():
                for line, tests in data.contexts_by_lineno(path).items():
                    self.lines[path][line].update(filter(None, tests))

    def tests(self, file: Path, first: int, last: int) -> list[str]:
        """Tests that run one of the lines, the quickest first; at import alone: those of the module."""
        lines, (first, last) = self.lines.get(str(file), {}), in_function(file.read_text(), first, last)
        found = set().union(*(lines.get(line, set()) for line in range(first, last + 1)))
        found = found or set().union(*lines.values())
        chosen, seconds = [], 0.0
        for test in sorted(found, key=lambda test: self.durations.get(test, 1e9)):
            seconds += self.durations.get(test, 1e9)
            if seconds > TESTS:
                break
            chosen.append(test)
        name = str(file.relative_to(ROOT))
        return WHOLE.get(name, []) + chosen


def in_function(source: str, first: int, last: int) -> tuple[int, int]:
    """Lines that run when the place does: itself in a function; the body below a decorator; else none, (0, -1).

    What runs at import runs in whichever test imports the module first.
    """
    found = (0, -1)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[0].lineno, node.end_lineno or 0
            if body[0] <= first <= body[1]:
                return first, last
            if any(one.lineno <= first <= (one.end_lineno or 0) for one in node.decorator_list):
                found = body
    return found


def annotated(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Places of annotations: nothing reads them when the code runs."""
    found = []
    for node in ast.walk(ast.parse(source)):
        for name in ("annotation", "returns"):
            one = getattr(node, name, None)
            if isinstance(one, ast.expr):
                found.append(((one.lineno, one.col_offset), (one.end_lineno or 0, one.end_col_offset or 0)))
    return found


def places(file: Path) -> Iterator[tuple[Any, str, int]]:
    """All that an operator could change in a file: the place, the operator, and its number for it."""
    source = file.read_text()
    nodes, idle = list(ast_nodes(get_ast(source))), annotated(source)
    for name in operator_names():
        operator = get_operator(name)
        if operator.arguments():
            continue
        number = 0
        for node in nodes:
            for start, end in operator().mutation_positions(node):
                if not any(first <= start and end <= last for first, last in idle):
                    yield (start, end), name, number
                number += 1


def draw() -> list[dict[str, Any]]:
    """The mutants of the seed: a place each, and one of the ways to change it that Python still reads."""
    ways: dict[Any, list[tuple[str, int]]] = defaultdict(list)
    for file in sorted(file for pattern in TARGETS for file in ROOT.glob(pattern)):
        for place, name, number in places(file):
            ways[file, place].append((name, number))
    random_ = random.Random(SEED)
    mutants: list[dict[str, Any]] = []
    for file, place in random_.sample(sorted(ways), len(ways)):
        name, number = random_.choice(ways[file, place])
        before = file.read_text()
        after = mutate_code(before, get_operator(name)(), number)
        try:
            if ast.dump(ast.parse(after)) == ast.dump(ast.parse(before)):
                continue
        except SyntaxError:
            continue
        mutants.append({"file": str(file.relative_to(ROOT)), "place": place, "operator": name, "code": after})
        if len(mutants) == MUTANTS:
            break
    return mutants


def ask(tests: list[str], told: str, folder: str, said: Path) -> NoReturn:
    """In a forked process, where nothing of ours is imported: run the tests on the mutant, leave as they end."""
    os.setsid()
    output = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    os.environ |= {"PYTHONPATH": str(SITE), "DIJIANG_MUTANT": told}
    for name in [name for name in sys.modules if name.split(".")[0] in ("dijiang", "sitecustomize")]:
        del sys.modules[name]
    sys.path.insert(0, str(SITE))
    importlib.import_module("sitecustomize")
    options = ["-x", "-q", "-p", "no:cacheprovider", "--no-header", f"--basetemp={folder}/t"]
    options += ["-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]
    status = 1  # pytest raises what finalizers raised
    try:
        status = int(pytest.main(options + tests))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def attempt(mutant: dict[str, Any], tests: list[str]) -> dict[str, Any]:
    """Ask the tests; what they say."""
    file = ROOT / mutant["file"]
    facts = {name: mutant[name] for name in ("file", "place", "operator")} | {"tests": len(tests)}
    before, after = file.read_text().splitlines(), mutant["code"].splitlines()
    changed = [
        line for line in difflib.unified_diff(before, after, n=0, lineterm="") if line[:2] not in ("--", "++")
    ]
    facts["change"] = changed[1:]
    if not tests:
        return facts | {"outcome": "not run by any test", "seconds": 0}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        code, said = Path(folder) / "code.py", Path(folder) / "said"
        code.write_text(mutant["code"])
        module = mutant["file"].removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        told = json.dumps({"module": module, "file": str(file), "code": str(code)})
        process = multiprocessing.get_context("fork").Process(target=ask, args=(tests, told, folder, said))
        process.start()
        process.join(CLOCK)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            outcome = "out of time"
        else:
            status = process.exitcode
            outcome = "survived" if status == PASSED else "killed" if status in NOTICED or status < 0 else "?"
        lines = said.read_text(errors="replace").splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return facts | {
        "outcome": outcome,
        "by": failed[:1] or lines[-1:],
        "seconds": round(time.monotonic() - started, 1),
    }


def run(first: int, count: int, seconds: float) -> None:
    """Some of the mutants, one after another, as many as the seconds allow; what is known of each is kept."""
    end = time.monotonic() + seconds
    known, mutants = Known(), draw()
    for name in COMMON:
        importlib.import_module(name)
    source = (ROOT / "dijiang/typed.py").read_text()
    same = {"file": "dijiang/typed.py", "place": ((1, 0), (1, 0)), "operator": "none", "code": f"{source}# same\n"}
    if (found := attempt(same, ["tests/test_typed.py"]))["outcome"] != "survived":
        raise SystemExit(f"tests fail where nothing was changed: {found['by']}")
    for number in range(first, min(first + count, len(mutants))):
        file = KEPT / f"mutant-{number:03}.json"
        if file.exists() or time.monotonic() > end:
            continue
        mutant = mutants[number]
        (first_line, _), (last_line, _) = mutant["place"]
        found = attempt(mutant, known.tests(ROOT / mutant["file"], first_line, last_line))
        file.write_text(json.dumps({"number": number} | found))
        print(number, found["outcome"], found["seconds"], found["file"], found["change"], flush=True)


def report() -> dict[str, Any]:
    """What is known by now. judged: why a survivor is no fault of the tests, by hand: its file and its new line."""
    found = [json.loads(file.read_text()) for file in sorted(KEPT.glob("mutant-*.json"))]
    judged = json.loads((Path(__file__).parent / "judged.json").read_text())
    left = [one for one in found if one["outcome"] != "killed"]
    for one in left:
        one["judged"] = judged.get(f"{one['file']}: {one['change'][-1][1:].strip()}")
    killed = len(found) - len(left)
    return {
        "dijiang": __version__,
        "seed": SEED,
        "mutants": len(found),
        "outcomes": dict(Counter(one["outcome"] for one in found)),
        "killed_share": round(killed / max(1, len(found)), 3),
        "judged_equal": sum(one["judged"] is not None for one in left),
        "seconds_a_mutant": round(sum(one["seconds"] for one in found) / max(1, len(found)), 1),
        "left": left,
    }


def main() -> None:
    """See the package."""
    parser = argparse.ArgumentParser()
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("record").add_argument("paths", nargs="+")
    some = verbs.add_parser("run")
    some.add_argument("--first", type=int, default=0)
    some.add_argument("--count", type=int, default=MUTANTS)
    some.add_argument("--seconds", type=float, default=1e9)
    verbs.add_parser("report").add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.verb == "record":
        record(options.paths)
    elif options.verb == "run":
        run(options.first, options.count, options.seconds)
    else:
        text = json.dumps(report(), indent=1)
        print(text)
        if options.output is not None:
            options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
