"""What each figure of a bench means, as its formula: printed by --explain, and nowhere else written."""

from __future__ import annotations

FORMULAS = {
    "pp N": "a prompt of N tokens in one forward call per piece, at a depth of d tokens",
    "tg N": "N decode steps of one token, each fed the most likely token of the step before",
    "@ d D": "tokens in the state before the test starts; the Transformer has D keys and values a layer",
    "TTFT": "seconds from the prompt's ids to the first token = pp's median repetition",
    "ITL": "seconds between two generated tokens; percentiles are over all steps of all repetitions",
    "TPOT": "(total - TTFT) / (n - 1) = seconds of a tg repetition / its steps; median of repetitions",
    "tokens/s": "batch * tokens / median seconds of a repetition",
    "spread": "(p90 - p10) / p50 of the repetitions; above 10 % the row is marked as noisy",
    "load": "seconds from the folder to a session that can run; the file system's cache is warm",
    "peak memory": "largest resident set of a process that only warmed up for this test; weights mapped "
    "from the file count; GPU: this process's memory as NVML shows it after the test",
    "bytes per step": "weights + batch * (rows + 2 * state + (depth + 1) * cache); weights: every "
    "parameter but looked-up tables, once; rows: looked-up table rows; state: recurrent state, read "
    "and written; cache: keys and values of one token (Transformer only); depth: of the middle token",
    "bytes per token": "bytes per step / batch",
    "bandwidth": "bytes / seconds of the fastest of 10 reads of 1 GiB with the same threads, before "
    "the tests and after them; the faster of the two counts",
    "% of roofline": "100 * (bytes per step / bandwidth) / TPOT, on a CPU; caches can lift a small model over 100",
    "J/token": "energy of the sensor named, over all repetitions, / (batch * tokens); idle-subtracted: "
    "less idle power (2 s before the tests) * seconds; without a sensor: unknown",
    "slope": "least-squares line of the medians over depth; where depths took turns in one process: of "
    "the medians of their ratios to the smallest depth's turn; change: over the range of depths, "
    "relative to the smallest one; flat: at most 2 % in time; interval: 95 %, bootstrap",
    "ratio": "seconds of a repetition of the Transformer / of the bundle's beside it; median of the "
    "turns; interval: 95 %, bootstrap",
    "predicted ratio": "bytes per step of the Transformer / of the bundle: what it would be if both "
    "moved bytes equally fast and did nothing else",
}


def explain() -> str:
    """The formulas, one a paragraph."""
    return "\n".join(f"{name:16} {text}" for name, text in FORMULAS.items())
