"""A report as llama-bench of llama.cpp writes it, for what reads that, as its `scripts/compare-llama-bench.py`.

Only tests of one sequence: llama-bench has no other. What means nothing here is as llama-bench has it by default.
"""

from __future__ import annotations

import json
from statistics import fmean, stdev
from typing import Any

from .report import Report

#: Settings of llama-bench that have no counterpart here.
DEFAULTS: dict[str, Any] = {
    "build_number": 0,
    "cpu_mask": "0x0",
    "cpu_strict": False,
    "poll": 50,
    "type_k": "f32",
    "type_v": "f32",
    "n_gpu_layers": 0,
    "split_mode": "none",
    "main_gpu": 0,
    "no_kv_offload": False,
    "flash_attn": False,
    "tensor_split": "0.00",
    "tensor_buft_overrides": "none",
    "load_mode": "mmap",
    "embeddings": False,
    "no_op_offload": 0,
    "n_cpu_moe": 0,
    "fit_target": 0,
    "fit_min_ctx": 0,
}


def to_llama_bench(report: Report) -> str:
    """A JSON list with one entry a result; times in nanoseconds, speeds in tokens a second."""
    machine = report["environment"]
    models = {model["name"]: model for model in report["models"]}
    head = DEFAULTS | {
        "build_commit": (report["commit"] or "unknown")[:9],
        "cpu_info": machine["cpu"]["model"],
        "gpu_info": ", ".join(gpu["name"] for gpu in machine["gpus"]),
        "test_time": report["created"],
    }
    rows = [
        head | _row(result, models[result["model"]], machine)
        for result in report["results"]
        if result["batch"] == 1
    ]
    return json.dumps(rows, indent=2)


def _row(result: Report, model: Report, machine: Report) -> dict[str, Any]:
    """Of one test."""
    is_prompt = result["prefill"] is not None
    latency = (result["prefill"] or result["decode"])["latency"]
    tokens, nanoseconds = result["tokens"], [round(seconds * 1e9) for seconds in latency["values"]]
    speeds = [tokens / seconds for seconds in latency["values"]]
    piece = result["session"].get("longest_piece", tokens)  # a baseline takes a prompt whole
    return {
        "backends": result["provider"],
        "model_filename": model["path"],
        "model_type": model["name"],
        "model_size": model.get("weight_bytes", model["bytes"]),
        "model_n_params": model.get("parameter_count", 0),
        "n_batch": piece,
        "n_ubatch": piece,
        "n_threads": result["threads"] or machine["cpu"]["usable_cores"],
        "n_prompt": tokens if is_prompt else 0,
        "n_gen": 0 if is_prompt else tokens,
        "n_depth": result["depth"],
        "avg_ns": round(latency["mean"] * 1e9),
        "stddev_ns": round(latency["stdev"] * 1e9),
        "avg_ts": fmean(speeds),
        "stddev_ts": stdev(speeds) if len(speeds) > 1 else 0.0,
        "samples_ns": nanoseconds,
        "samples_ts": speeds,
    }
