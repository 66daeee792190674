"""A bundle as a model of lm-evaluation-harness.

simple_evaluate(model=DijiangLM(dijiang.load("BUNDLE")), tasks=["lambada_openai"])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .. import DijiangError, EvalError, Model, State, load

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
    from tqdm import tqdm
except (ImportError, AttributeError) as error:  # not installed, or beside a transformers that it does not know
    raise ImportError(f"{error}; pip install 'dijiang[eval]'") from error

#: Tasks of our own: the groups of the paper, and what of them the harness lacks.
TASKS = Path(__file__).parent / "tasks"
#: Options of a task's generation that `Model.generate` has, too, under the same names.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
#: Names of the largest number of tokens; the first goes first.
COUNTS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
Ids = list[int]
T = TypeVar("T")


class DijiangLM(TemplateLM):
    """Scores and generates with a loaded bundle.

    Args:
        model: with a tokenizer.
        batch_size: sequences that are scored together. Generation is one by one.
        max_length: tokens of a window; None: those that the model was trained on.

    Raises:
        InputError: the bundle has no tokenizer.
        ValueError: the model has no token to begin with, or fewer positions.
    """

    def __init__(self, model: Model, batch_size: int = 8, max_length: int | None = None) -> None:
        super().__init__()
        self.model, self.batch_size = model, batch_size
        first = [model.spec.bos_token_id, *model.spec.eos_token_ids]
        known = [token for token in first if token is not None]
        if not known:
            raise ValueError(
                "the model has neither a start nor an end token; add one to config.json and export again"
            )
        self._prefix, self._end = known[0], known[-1]
        limit = model.manifest.positions_limit
        longest = model.spec.max_positions if limit is None else limit
        self.max_length = min(model.spec.max_positions, longest) if max_length is None else max_length
        if limit is not None and self.max_length > longest:
            raise ValueError(
                f"max_length is {self.max_length}, expected at most {longest}: the model's positions end there"
            )
        self._adds_prefix = model.tokenizer.encode("a")[:1] == [self._prefix]

    @property
    def eot_token_id(self) -> int:
        """An end token of the model."""
        return self._end

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: the model's start token, else an end token."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in caches of requests."""
        return str(self.model.bundle.path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> Ids:
        """Ids of a text that starts a sequence; one start token at most, none if add_special_tokens is False."""
        ids = self.model.tokenizer.encode(string)
        if not self._adds_prefix:
            return ids
        doubled = ids[:2] == [self._prefix] * 2
        return ids[1:] if doubled or add_special_tokens is False else ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Ids, Ids]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(nats of a continuation, whether it is the greedy one) of each (_, context, continuation)."""
        begin = [self.prefix_token_id]  # a context of blanks has no tokens: they went to the continuation
        pairs = [_cut(context or begin, continuation, self.max_length) for _, context, continuation in requests]
        results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        with tqdm(total=len(pairs), disable=disable_tqdm, desc="Scoring") as bar:
            for rows, batch in self._batches(pairs):
                for row, result in zip(rows, batch, strict=True):
                    results[row] = result
                bar.update(len(rows))
        for (key, *_), result in zip(requests, results, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, result)
        return results

    def _batches(self, pairs: list[tuple[Ids, Ids]]) -> Iterator[tuple[list[int], list[tuple[float, bool]]]]:
        """Rows that were scored together, and their results. A context goes through the model once."""
        order = sorted(range(len(pairs)), key=lambda row: (-len(pairs[row][0]), pairs[row][0]))
        shared = [(context, list(rows)) for context, rows in groupby(order, key=lambda row: pairs[row][0])]
        for single, part in groupby(shared, key=lambda one: len(one[0]) == 1):
            for contexts in _chunks(list(part), self.batch_size):
                before = self.model.new_state(len(contexts))
                if not single:
                    ids, mask = _padded([context[:-1] for context, _ in contexts])
                    self.model.forward(ids, before, mask=mask)
                members = [(at, row) for at, (_, rows) in enumerate(contexts) for row in rows]
                for batch in _chunks(members, self.batch_size):
                    texts = [pairs[row][0][-1:] + pairs[row][1] for _, row in batch]
                    yield [row for _, row in batch], self._judge(texts, before.take([at for at, _ in batch]))

    def _judge(self, texts: list[Ids], state: State) -> list[tuple[float, bool]]:
        ids, mask = _padded(texts)
        if ids.shape[1] < 2:  # nothing but empty continuations
            return [(0.0, True)] * len(texts)
        nats, best = self.model.likelihood(ids, state, mask=mask, last=False)
        real = mask[:, 1:].astype(bool)
        return [(float(nats[row][real[row]].sum()), bool(best[row][real[row]].all())) for row in range(len(texts))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Nats of whole texts, in windows of `max_length` tokens that each begin with one token of context."""
        windows: list[tuple[Any, Ids, Ids]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(owner)
        sums = np.zeros(len(requests))
        for owner, (nats, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            sums[owner] += nats
        for request, total in zip(requests, sums.tolist(), strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums.tolist()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to a stop string, by `Model.generate`; ValueError for an option that it does not have."""
        texts = []
        for request in tqdm(requests, disable=disable_tqdm, desc="Generating"):
            context, given = request.args
            count, stops, options = _options(given)
            ids = self.tok_encode(context)[-self._room(count) :] or [self.prefix_token_id]
            records = self.model.generate(ids, max_tokens=count, stop=stops, **options)
            texts.append("".join(record.text for record in records))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _room(self, count: int) -> int:
        """Tokens of a context at most: it and `count` tokens fit a window, as the harness cuts it."""
        return max(1, self.max_length - count)


def _cut(context: Ids, continuation: Ids, length: int) -> tuple[Ids, Ids]:
    """The end of a context, one token at least, so that `length` tokens go before the last of a continuation."""
    return context[-max(1, length + 1 - len(continuation)) :], continuation


def _padded(rows: list[Ids]) -> tuple[np.ndarray, np.ndarray]:
    """Ids [B, T] int64 and mask [B, T], padded on the right."""
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.zeros(mask.shape, np.int64)
    ids[mask] = np.concatenate([np.array(row, np.int64) for row in rows])
    return ids, mask


def _chunks(items: list[T], size: int) -> Iterator[list[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _options(given: dict[str, Any]) -> tuple[int, list[str], dict[str, Any]]:
    """Tokens at most, stop strings and options of `Model.generate`, from those of a task's generation."""
    options = dict(given)
    counts = [options.pop(name) for name in COUNTS if name in options]
    stops = options.pop("until", None) or []
    sampled = options.pop("do_sample", options.get("temperature", 0) > 0)
    if unknown := sorted(set(options) - set(SAMPLING)):
        raise ValueError(f"{unknown[0]}: not an option of dijiang, expected one of {', '.join(SAMPLING)}")
    if not sampled:
        options["temperature"] = 0.0
    else:
        options.setdefault("temperature", 1.0)
    return counts[0] if counts else 256, [stops] if isinstance(stops, str) else list(stops), options


def evaluate(
    bundle: str | Path,
    tasks: Sequence[str],
    *,
    include: str | Path | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    **loading: Any,
) -> tuple[dict[str, Any], str]:
    """Evaluate a bundle.

    Args:
        bundle, loading: as `dijiang.load` takes them.
        tasks: names of tasks, groups or tags; `dijiang_paper`, `dijiang_paper_llama2`: those that the paper
            measures Pythia and LLaMA2-7B by.
        include: folder with further tasks.
        batch_size, max_length: see `DijiangLM`.
        num_fewshot: examples before each question; None: as the task says.
        limit: questions of each task at most.

    Returns:
        results by task (metric -> value), and the harness's table of them.

    Raises:
        EvalError: whatever the harness raises, as one line.
        DijiangError: the bundle cannot be loaded.
    """
    wanted = [tasks] if isinstance(tasks, str) else list(tasks)
    model = load(bundle, **loading)
    try:
        found = simple_evaluate(
            model=DijiangLM(model, batch_size, max_length),
            tasks=wanted,
            task_manager=TaskManager(include_path=[str(TASKS), *([] if include is None else [str(include)])]),
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=False,
        )
    except DijiangError:
        raise
    except Exception as error:  # of the harness, its tasks, their data: each library below has its own
        reason = " ".join(str(error).split())[:300]
        what = f"{', '.join(wanted)}: not evaluated ({type(error).__name__}: {reason})"
        raise EvalError(f"{what}; lm_eval ls tasks names all tasks") from error
    return found["results"], make_table(found)
