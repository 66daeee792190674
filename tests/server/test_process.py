"""The server as a process: its start, its end, what it needs."""

import json
import signal
import subprocess
import sys

import openai
import pytest

from dijiang.errors import InputError
from dijiang.server.process import _listening
from dijiang.server.settings import Serving
from tests.conftest import RUNNABLE


@pytest.mark.parametrize("host", ["a" * 70, "0.0.0.0:80", "", "ü"], ids=["long", "with-port", "empty", "unicode"])
def test_address_that_is_none_is_one_line(host):
    with pytest.raises(InputError, match="cannot be listened on"):
        _listening(Serving(host=host, port=0))


@pytest.mark.skipif("native" not in RUNNABLE, reason="no compiled operator")
def test_sigterm_lets_answers_end(bundles):
    program = [sys.executable, "-m", "dijiang", "serve", bundles / "tiny", "--port", "0", "--json-logs"]
    process = subprocess.Popen(program, stderr=subprocess.PIPE, text=True)
    try:
        lines = [process.stderr.readline() for _ in range(3)]
        assert "16 slots in" in lines[0]
        url = lines[2].removeprefix("[listening on ").rstrip("]\n")
        assert lines[1] == f"[a page for browsers: {url.removesuffix('v1')}]\n"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            stream = iter(
                client.completions.create(
                    model="tiny", prompt="x", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
                )
            )
            pieces = [next(stream)]
            process.send_signal(signal.SIGTERM)
            pieces += list(stream)
            assert len(pieces) == 400
            assert pieces[-1].choices[0].finish_reason == "length"
        assert process.wait(20) == 143
        log = [json.loads(line) for line in process.stderr.read().splitlines()]
        assert log[-1]["route"] == "/v1/completions"
        assert log[-1]["status"] == 200
    finally:
        process.kill()
        process.stderr.close()


def test_two_bundles_of_one_name_are_refused(bundles, tmp_path):
    (tmp_path / "tiny").symlink_to(bundles / "tiny")
    done = subprocess.run(
        [sys.executable, "-m", "dijiang", "serve", bundles / "tiny", bundles / "tiny"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "two bundles have the name tiny" in done.stderr


@pytest.mark.parametrize(
    ("module", "verb", "extra"), [("uvicorn", "serve", "dijiang[serve]"), ("jinja2", "chat", "dijiang[chat]")]
)
def test_missing_extra_is_one_line_that_names_it(bundles, module, verb, extra):
    code = f"import sys; sys.modules[{module!r}] = None; from dijiang.cli import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, verb, bundles / "tiny"],
        input="x\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert f"pip install '{extra}'" in done.stderr
