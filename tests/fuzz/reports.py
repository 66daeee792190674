"""Reports of strangers: for `bench --compare`, plans of tests, stored parity, prompts and answers in lines."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import dijiang
from dijiang.batching.jobs import answer_file
from dijiang.bench import compare
from dijiang.bench.matrix import plan_tests
from dijiang.bench.report import read_report
from dijiang.bundle.opened import open_bundle
from dijiang.commands.inspect import cost_line
from dijiang.parity.difference import Difference
from dijiang.runtime.options import Generation
from tests.conftest import edit_manifest
from tests.fuzz import bundles, states
from tests.fuzz.bundles import one_line
from tests.fuzz.grammar import Case
from tests.fuzz.trees import bytes_edit, edit_bytes, edit_tree, tree_edit

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
LINES = [{"prompt": "ab", "max_tokens": 2}, {"prompt": [1, 2], "temperature": 0.5, "seed": 3, "max_tokens": 1}]
PARITY = json.dumps(
    {"passed": True, "tokens": 8, "text": "held_out.txt", "logits": asdict(Difference(*[0.5] * 8))}
    | {"gates": [{"metric": "kl", "bound": 1}]}
)
PIECES = (
    "1",
    "0",
    "512",
    "-",
    "*",
    "+",
    ",",
    "none",
    " ",
    "1-1000000000",
    "1-16*2",
    "9" * 30,
    "x",
    "1-9*1",
    "1-9+0",
)


@cache
def report() -> str:
    """A report of the bench, with few results."""
    whole = json.loads(next(RESULTS.glob("*flatness.json")).read_text())
    return json.dumps(whole | {"results": whole["results"][:3]})


def warm() -> None:
    bundles.warm()


def draw_case(seed: int, number: int) -> Case:
    draw = random.Random(f"reports {seed} {number}")
    verb = draw.choice(["compare", "compare", "plan", "parity", "prompts", "answers"])
    if verb == "plan":
        return {"class": "reports", "verb": verb, "edits": ["".join(draw.choices(PIECES, k=4)) for _ in range(5)]}
    how = draw.choice(["tree", "tree", "bytes"])
    edits = [(tree_edit if how == "tree" else bytes_edit)(draw) for _ in range(draw.choice([1, 1, 2]))]
    return {"class": "reports", "verb": verb, "how": how, "edits": edits}


def changed(text: str, case: Case) -> bytes:
    """JSON, or bytes, after a case's edits."""
    data = text.encode()
    for edit in case["edits"]:
        if case["how"] == "bytes":
            data = edit_bytes(data, edit)
            continue
        try:
            data = edit_tree(json.loads(data), edit).encode()
        except (ValueError, RecursionError):
            break
    return data


def attempt(case: Case, folder: Path) -> str:
    """What a command does with it."""
    try:
        return VERBS[case["verb"]](case, folder)
    except dijiang.DijiangError as error:
        one_line(error)
        return type(error).__name__


def compared(case: Case, folder: Path) -> str:
    good, bad = folder / "good", folder / "bad"
    good.write_text(report())
    bad.write_bytes(changed(report(), case))
    for before, after in ((good, bad), (bad, good), (bad, bad)):
        found = compare.compare(read_report(before), read_report(after), threshold=0.05)
        compare.to_markdown(found)
        json.dumps(found)
    return "compared"


def planned(case: Case, folder: Path) -> str:
    tests, failures = plan_tests(*case["edits"])
    assert tests or failures
    return "planned"


def parity(case: Case, folder: Path) -> str:
    import shutil

    bundle = Path(shutil.copytree(bundles.base("fp32"), folder / "bundle"))
    edit_manifest(bundle, lambda manifest: manifest["reports"].append("parity.json"))
    (bundle / "parity.json").write_bytes(changed(PARITY, case))
    opened = open_bundle(bundle)
    _ = cost_line(opened.parity), opened.passed
    return "read"


def asks_for_much(line: bytes) -> bool:
    """Whether a line of prompts wants so many tokens that it takes long."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return False
    wanted = found.get("max_tokens") if isinstance(found, dict) else None
    return isinstance(wanted, int) and wanted > 1000


def prompts(case: Case, folder: Path) -> str:
    lines = [changed(json.dumps(line), case) for line in LINES]
    if any(asks_for_much(line) for line in lines):
        return "left out"  # who asks for a billion tokens gets them
    (folder / "prompts").write_bytes(b"\n".join(lines))
    failed = answer_file(states.model(), folder / "prompts", folder / "answers", Generation(max_tokens=2))
    count = len([line for line in (folder / "prompts").read_bytes().splitlines() if line.strip()])
    found: list[Any] = [json.loads(line) for line in (folder / "answers").read_bytes().splitlines()]
    assert len(found) == count
    assert sum("error" in one for one in found) == failed
    return "answered"


def answers(case: Case, folder: Path) -> str:
    """Going on with a damaged file of answers."""
    (folder / "prompts").write_text("\n".join(map(json.dumps, LINES)))
    answer_file(states.model(), folder / "prompts", folder / "answers", Generation(max_tokens=2))
    old = (folder / "answers").read_text().splitlines()
    (folder / "answers").write_bytes(changed(old[0], case) + b"\n" + old[1].encode() + b"\n")
    answer_file(states.model(), folder / "prompts", folder / "answers", Generation(max_tokens=2))
    return "gone on"


VERBS = {"compare": compared, "plan": planned, "parity": parity, "prompts": prompts, "answers": answers}
