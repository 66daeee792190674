"""kill -9 of a server that writes conversations and beginnings of prompts; what is left must be whole, and right.

python benchmarks/kill_server.py BUNDLE --runs 200 -o report.json

Every file that is left is read, and compared bit for bit with the state that its tokens lead to.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import openai
from load import serving

import dijiang
from dijiang.batching.prefixes import Prefixes, worth_keeping
from dijiang.errors import InputError
from dijiang.runtime.snapshot import Snapshot

#: Prompts of so many tokens; tokens of an answer; requests at once; longest life of a server once it answers, s.
LENGTHS, ANSWER, CLIENTS, LIFE = range(100, 1300, 100), 4, 6, 0.3


def prompt_of(number: int, vocab: int) -> list[int]:
    """Token ids, the same for everybody."""
    return np.random.default_rng(number).integers(0, vocab, LENGTHS[number]).tolist()


def expected_states(bundle: Path) -> dict[bytes, list[bytes]]:
    """History -> layers, of every state that a server could write."""
    model = dijiang.load(bundle)
    found: dict[bytes, list[bytes]] = {}
    for number in range(len(LENGTHS)):
        prompt = prompt_of(number, model.spec.vocab_size)
        state, fed = model.new_state(), 0
        kept = sorted(worth_keeping(Prefixes(model, 0).borders(state, np.array(prompt))))
        for border in kept:
            model.forward(np.array([prompt[fed:border]]), state)
            found[state.history[0].tobytes()] = [layer.tobytes() for layer in state.layers]
            fed = border
        for _ in model.generate(prompt[fed:], state=state, max_tokens=ANSWER, ignore_eos=True):
            pass
        found[state.history[0].tobytes()] = [layer.tobytes() for layer in state.layers]
    return found


async def asking(url: str, model: str, vocab: int, draw: random.Random, life: float) -> int:
    """Requests until the time is over; how many were answered."""
    answered = 0

    async def client() -> None:
        nonlocal answered
        while True:
            await api.completions.create(
                model=model,
                prompt=prompt_of(draw.randrange(len(LENGTHS)), vocab),
                max_tokens=ANSWER,
                temperature=0,
                extra_body={"store": True, "ignore_eos": True},
            )
            answered += 1

    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as api:
        tasks = [asyncio.create_task(client()) for _ in range(CLIENTS)]
        while not answered:
            await asyncio.sleep(0.005)
        await asyncio.sleep(life)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return answered


def judged(file: Path, expected: dict[bytes, list[bytes]]) -> str:
    """What a file is."""
    if file.suffix != ".state":
        return "unfinished"
    try:
        kept = Snapshot.load(file)
    except InputError:
        return "refused"
    layers = expected.get(kept.history[0].tobytes())
    return "right" if layers == [layer.tobytes() for layer in kept.layers] else "wrong"


def measured(bundle: Path, runs: int, seed: int) -> dict[str, object]:
    """The report of so many kills of servers that share folders. `unfinished` files go when the next one starts."""
    draw, expected = random.Random(seed), expected_states(bundle)
    vocab, name = dijiang.load(bundle).spec.vocab_size, bundle.resolve().name
    files: Counter[str] = Counter()
    answered, seen = 0, set[tuple[str, int]]()
    with tempfile.TemporaryDirectory() as folder:
        places = ["--conversation-folder", f"{folder}/c", "--prefix-folder", f"{folder}/p"]
        options = ["--conversations", "0", "--prefix-memory", "1", *places]
        for _ in range(runs):
            with serving(bundle, *options) as (server, url, _):
                answered += asyncio.run(asking(url, name, vocab, draw, draw.uniform(0, LIFE)))
                server.kill()
                server.wait()
            for file in Path(folder).glob("*/*"):
                if (written := (file.name, file.stat().st_mtime_ns)) not in seen:
                    seen.add(written)
                    files[judged(file, expected)] += 1
        with serving(bundle, *options):
            pass
        files["unfinished, after the last start"] = len(list(Path(folder).glob("*/.*")))
    return {"kills": runs, "seed": seed, "answers": answered, "files": dict(sorted(files.items()))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    report = measured(given.bundle, given.runs, given.seed)
    print(json.dumps(report))
    if given.output:  # beside those of other seeds
        others = json.loads(given.output.read_text()) if given.output.exists() else []
        kept = [one for one in others if one["seed"] != given.seed]
        given.output.write_text(json.dumps([*kept, report], indent=1) + "\n")


if __name__ == "__main__":
    main()
