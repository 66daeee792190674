"""Two replicas in Ray Serve: a conversation goes on when the replica that began it is killed."""

import os
import signal
import time
from functools import partial

import openai
import psutil
import pytest

import dijiang
from tests.server.serving import KEY, text_of
from tests.server.test_conversations import conversation

pytest.importorskip("ray", reason="made by `make ecosystem-ray`")
pytestmark = [pytest.mark.ecosystem, pytest.mark.filterwarnings("ignore")]
OPTIONS = {"model": "tiny", "max_tokens": 24, "temperature": 1.0, "seed": 5}


@pytest.fixture(scope="module")
def url(chatty):
    """The address of two replicas on loopback; one would be enough for each of the tests."""
    from loopback import on_loopback

    with on_loopback(KEY, bundle=str(chatty), replicas=2, slots=4) as found:
        yield found


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def model(chatty):
    return dijiang.load(chatty, threads=1)


def asked(client, **more):
    """A chat, and the process that answered it."""
    raw = client.chat.completions.with_raw_response.create(**OPTIONS | more)
    return raw.parse(), int(raw.headers["x-replica"].rpartition(":")[2])


def both(client):
    """The processes that answer, once there are two of them."""
    found, end = set(), time.monotonic() + 60
    while len(found) < 2 and time.monotonic() < end:
        found.add(asked(client, messages=[{"role": "user", "content": "x"}], max_tokens=1)[1])
        found = {one for one in found if psutil.pid_exists(one)}
    assert len(found) == 2
    return found


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)


def patiently(ask):
    """What a client does whose connection broke: ask again. It may, for the state is its own."""
    for _ in range(200):
        try:
            return ask()
        except openai.APIError:
            time.sleep(0.1)
    raise AssertionError("nobody answered")


def test_conversation_goes_on_when_its_replica_is_killed(client, model):
    expected = conversation(
        model, ["one", "two", "three"], ignore_eos=True, **{k: OPTIONS[k] for k in OPTIONS if k != "model"}
    )
    both(client)
    answers, given, killed = [], {}, set()
    for said in ("one", "two", "three"):
        extra = {"ignore_eos": True, "return_state": True} | given
        ask = partial(asked, client, messages=[{"role": "user", "content": said}], extra_body=extra)
        found, pid = patiently(ask)
        assert pid not in killed
        answers.append(found.choices[0].message.content)
        given = {"state": found.state}
        kill(pid)
        killed.add(pid)
    assert answers == expected
    assert len(killed) == 3
    assert both(client).isdisjoint(killed)  # Ray has replaced them


def test_stream_that_broke_is_asked_for_again(client, model):
    first, _ = asked(client, messages=[{"role": "user", "content": "one"}], extra_body={"return_state": True})
    options = {"messages": [{"role": "user", "content": "two"}], "max_tokens": 2000}
    options = OPTIONS | options | {"extra_body": {"state": first.state, "ignore_eos": True}}
    both(client)

    def stream(killing=False):
        raw = client.chat.completions.with_raw_response.create(**options, stream=True)
        text, reason = "", None
        for number, piece in enumerate(raw.parse()):
            text, reason = text + (piece.choices[0].delta.content or ""), piece.choices[0].finish_reason
            if killing and number == 5:
                kill(int(raw.headers["x-replica"].rpartition(":")[2]))
        return text, reason

    try:
        broken = stream(killing=True)
    except Exception:  # of which class depends on the package's HTTP client
        broken = "", None
    assert broken[1] is None
    again = patiently(stream)
    assert again == patiently(stream)
    assert (len(again[0]) > 1000, again[1]) == (True, "length")


def test_streams_come_in_pieces_and_a_client_that_goes_frees_its_slot(client, url):
    both(client)
    for _ in range(12):  # more than the slots of both
        stream = client.completions.create(
            model="tiny", prompt="x", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
        )
        assert next(iter(stream)).choices[0].text is not None
        stream.close()
    started = time.monotonic()
    client.completions.create(model="tiny", prompt="x", max_tokens=1)
    assert time.monotonic() - started < 5


def test_answer_is_that_of_one_process(client, model):
    found = client.completions.create(model="tiny", prompt="def main(", max_tokens=20, temperature=0)
    assert found.choices[0].text == text_of(model, "def main(", max_tokens=20)
