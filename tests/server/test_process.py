"""The server as a process: its start, its end, what it needs."""

import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from urllib.request import urlopen

import openai
import pytest

from dijiang.errors import InputError
from dijiang.server.logs import Lines
from dijiang.server.process import _listening
from dijiang.server.settings import Serving
from tests.conftest import RUNNABLE


@pytest.mark.parametrize("host", ["a" * 70, "0.0.0.0:80", "", "ü"], ids=["long", "with-port", "empty", "unicode"])
def test_address_that_is_none_is_one_line(host):
    with pytest.raises(InputError, match="cannot be listened on"):
        _listening(Serving(host=host, port=0))


@pytest.mark.parametrize(("host", "reached"), [("::", ("127.0.0.1", "::1")), ("[::1]", ("::1",))])
def test_addresses_of_ipv6_are_taken(host, reached):
    with _listening(Serving(host=host, port=0)) as listening:
        for address in reached:
            socket.create_connection((address, listening.getsockname()[1]), timeout=5).close()
    Serving(host="[::1]").require_safe(None)


@contextmanager
def process_of(bundle, *options, descriptors=None):
    """(a server's process, a client of it, the lines that it began with)."""

    def prepare():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run below nohup
        if descriptors is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, descriptors)

    program = [sys.executable, "-m", "dijiang", "serve", bundle, "--port", "0", "--json-logs", *options]
    process = subprocess.Popen(program, stderr=subprocess.PIPE, text=True, preexec_fn=prepare)
    try:
        lines = [process.stderr.readline() for _ in range(3)]
        url = lines[2].removeprefix("[listening on ").rstrip("]\n")
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            yield process, client, lines
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.skipif("native" not in RUNNABLE, reason="no compiled operator")
def test_sigterm_lets_answers_end(bundles):
    with process_of(bundles / "tiny") as (process, client, lines):
        assert "16 slots in" in lines[0]
        assert lines[1] == f"[a page for browsers: {str(client.base_url).removesuffix('v1/')}]\n"
        long = {"max_tokens": 4000, "stream": True, "extra_body": {"ignore_eos": True}}
        stream = iter(client.completions.create(model="tiny", prompt="x", **long))
        pieces = [next(stream)]
        process.send_signal(signal.SIGTERM)
        pieces += list(stream)
        assert len(pieces) == 4000  # some seconds
        assert pieces[-1].choices[0].finish_reason == "length"
        assert process.wait(20) == 0
        log = [json.loads(line) for line in process.stderr.read().splitlines()]
        assert (log[-1]["route"], log[-1]["status"]) == ("/v1/completions", 200)


@pytest.mark.skipif("native" not in RUNNABLE, reason="no compiled operator")
def test_sighup_ends_it_as_sigterm_does(bundles, tmp_path):
    """A terminal that is closed sends it. Conversations are written."""
    options = {"store": True}
    with process_of(bundles / "tiny", "--conversation-folder", tmp_path) as (process, client, _):
        answer = client.completions.create(model="tiny", prompt="x", max_tokens=2, extra_body=options)
        process.send_signal(signal.SIGHUP)
        assert process.wait(20) == 0
    assert [file.name for file in tmp_path.iterdir()] == [f"{answer.id}.state"]


@pytest.mark.skipif("native" not in RUNNABLE, reason="no compiled operator")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_ends_what_has_begun_with_an_error(bundles, tmp_path, number):
    long = {"model": "tiny", "prompt": "x", "max_tokens": 4096, "stream": True, "extra_body": {"ignore_eos": True}}
    with process_of(bundles / "tiny", "--conversation-folder", tmp_path) as (process, client, _):
        stored = client.completions.create(model="tiny", prompt="x", max_tokens=2, extra_body={"store": True})
        stream = iter(client.completions.create(**long))
        next(stream)
        process.send_signal(number)
        time.sleep(0.1)
        process.send_signal(number)
        with pytest.raises(openai.APIError, match="the model was closed before the end"):
            list(stream)
        assert process.wait(20) == 128 + number
        said = process.stderr.read()
    assert "Traceback" not in said
    assert json.loads(said.splitlines()[1])["status"] == 503
    assert [file.name for file in tmp_path.iterdir()] == [f"{stored.id}.state"]


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


def test_missing_extra_is_one_line_that_names_it(bundles):
    code = "import sys; sys.modules['jinja2'] = None; from dijiang.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "chat", bundles / "tiny"]
    done = subprocess.run(command, input="x\n", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "pip install 'dijiang[chat]'" in done.stderr


def test_more_connections_than_descriptors_are_one_line_and_clients_wait(bundles):
    """While many tries to accept have failed, it ends, too: asyncio tries again on the closed socket."""
    with process_of(bundles / "tiny", "--patience", "1", descriptors=(64, 64)) as (process, client, _):
        place = client.base_url.host, client.base_url.port
        idle = [socket.create_connection(place) for _ in range(100)]
        assert client.with_options(timeout=30).models.list().data[0].id == "tiny"
        for one in idle:
            one.close()
        process.send_signal(signal.SIGTERM)
        process.wait(20)
        said = process.stderr.read()
    assert "Traceback" not in said
    assert said.count("no descriptor is left for another connection, so clients wait; raise ulimit -n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="another process's limits")
def test_a_server_takes_the_descriptors_that_it_may_have(bundles):
    with process_of(bundles / "tiny", descriptors=(64, 512)) as (process, _, _):
        assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (512, 512)


@pytest.mark.skipif("native" not in RUNNABLE, reason="no compiled operator")
def test_conversations_are_written_before_answers_end(bundles, tmp_path):
    """Who waits for the end of a server kills it after a while, and a long answer takes longer."""
    long = {"model": "tiny", "prompt": "x", "max_tokens": 4096, "stream": True, "extra_body": {"ignore_eos": True}}
    with process_of(bundles / "tiny", "--conversation-folder", tmp_path) as (process, client, _):
        stored = {
            client.completions.create(model="tiny", prompt="x", max_tokens=2, extra_body={"store": True}).id
            for _ in range(5)
        }
        stream = iter(client.completions.create(**long))
        next(stream)
        process.send_signal(signal.SIGTERM)
        end = time.monotonic() + 10
        while {file.stem for file in tmp_path.glob("cmpl-*.state")} != stored and time.monotonic() < end:
            next(stream)
        process.kill()
    assert {file.stem for file in tmp_path.glob("cmpl-*.state")} == stored


def test_reader_of_the_log_that_does_not_read_stops_nobody(bundles):
    with process_of(bundles / "tiny") as (process, client, _):
        for _ in range(1500):  # 90 bytes each: more than a pipe holds
            client.models.list()
        with urlopen(f"{str(client.base_url).removesuffix('v1/')}metrics") as found:
            lost = found.read().decode()
        assert "dijiang_log_lines_lost_total 0.0" in lost  # they wait
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_lines_that_nobody_reads_are_counted():
    read, write = os.pipe()
    lines = Lines(write, most=10)
    log = logging.getLogger("dijiang.test-lines")
    log.addHandler(lines)
    for _ in range(1000):
        log.warning("x" * 1000)
    assert lines.lost >= 1000 - 65 - 11
    lines.drain(0.01)
    os.set_blocking(read, False)
    assert os.read(read, 1001) == b"x" * 1000 + b"\n"
    os.close(read)
    end = time.monotonic() + 10
    while lines._waiting.unfinished_tasks and time.monotonic() < end:
        time.sleep(0.01)
    assert lines.lost >= 1000 - 65 + 1  # what waited was for nobody
    log.removeHandler(lines)
    os.close(write)
