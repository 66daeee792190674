"""AIPerf puts load on our server: what it counts is what was asked for, and what the server says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dijiang
from tests.server.serving import running

pytest.importorskip("aiperf", reason="made by `make ecosystem-aiperf`")
pytestmark = pytest.mark.ecosystem
PROGRAM = Path(sys.executable).with_name("aiperf")
REQUESTS, PROMPT, ANSWER = 12, 40, 16


@pytest.fixture(scope="module")
def served(chatty):
    with running({"tiny": dijiang.load(chatty, threads=1)}, slots=3) as found:
        yield found


@pytest.fixture
def profile(served, chatty, tmp_path):
    """profile(options): AIPerf's report, and what it read of the server's metrics."""

    def run(*options):
        sizes = ["--synthetic-input-tokens-mean", PROMPT, "--output-tokens-mean", ANSWER, "--random-seed", 1]
        place = ["--url", served.url.removesuffix("/v1"), "--tokenizer", chatty, "--output-artifact-dir", tmp_path]
        command = [PROGRAM, "profile", "--model", "tiny", "--ui", "none", "--streaming", *place, *sizes, *options]
        done = subprocess.run(
            [str(one) for one in command],
            env={name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        report = tmp_path / "profile_export_aiperf.json"
        assert report.is_file(), done.stdout[-3000:] + done.stderr[-3000:]
        metrics = json.loads((tmp_path / "server_metrics_export.json").read_text())["metrics"]
        return json.loads(report.read_text()), metrics

    return run


def test_completions(profile):
    report, metrics = profile(
        *("--endpoint-type", "completions", "--concurrency", 3, "--request-count", REQUESTS),
        *("--extra-inputs", "ignore_eos:true"),
    )
    assert report["error_summary"] == []
    assert report["request_count"]["avg"] == REQUESTS
    # The server counts the tokens of a prompt as the tokenizer that made it does, and answers as long as asked.
    assert report["usage_prompt_tokens"]["min"] == report["usage_prompt_tokens"]["max"] == PROMPT
    assert report["usage_prompt_tokens_diff_pct"]["max"] == 0
    assert report["usage_completion_tokens"]["min"] == report["usage_completion_tokens"]["max"] == ANSWER
    assert report["http_req_chunks_received"]["max"] > 1  # a stream
    assert 0 < report["time_to_first_token"]["min"] <= report["request_latency"]["min"]
    # It reads /metrics, but so seldom that a run of a second may lie between two readings.
    (seen,) = metrics["dijiang_first_token_seconds"]["series"]
    assert seen["labels"] == {"model": "tiny"}
    assert metrics["dijiang_first_token_seconds"]["type"] == "histogram"


def test_chats_of_several_turns(profile):
    report, _ = profile(
        *("--endpoint-type", "chat", "--concurrency", 2, "--conversation-num", 3),
        *("--conversation-turn-mean", 3, "--conversation-turn-stddev", 0),
    )
    assert report["error_summary"] == []
    assert report["request_count"]["avg"] == 9
    assert report["usage_prompt_tokens"]["max"] > 2 * PROMPT  # a later turn holds what was said before


def test_the_page(page):
    assert "Time to First Token" in page("aiperf")
