"""What goes on from a state: conversations, stored or sealed, and beginnings of prompts."""

import base64
import json
import shutil

import pytest

import dijiang
from dijiang.runtime.chat_template import ChatTemplate
from dijiang.server.process import build
from dijiang.server.settings import Serving
from tests.server.serving import KEY, PROMPT, running, text_of


def conversation(model, turns, **options):
    """Answers of a conversation whose whole text is fed anew each time."""
    template, messages, answers, state = ChatTemplate.of(model.bundle), [], [], None
    for said in turns:
        messages.append({"role": "user", "content": said})
        if state is None:
            state, ids = model.new_state(), model.tokenizer.as_it_stands(template.render(messages))
        else:  # what ended the answer was the limit: the template's own end follows
            ids = model.tokenizer.encode(f"<|endoftext|>\n# user: {said}<|endoftext|>\n# assistant:", start=False)
        records = list(model.generate(ids, state=state, top_k=50, **options))
        answers.append("".join(r.text for r in records))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


OPTIONS = {"max_tokens": 8, "temperature": 1.0, "seed": 5}


@pytest.mark.parametrize("way", ["stored", "sealed"])
def test_conversation_goes_on_in_as_many_tokens_as_are_new(client, served, model, way):
    expected = conversation(model, ["one", "two", "three"], ignore_eos=True, **OPTIONS)
    extra, answers, fed = {"ignore_eos": True}, [], []
    for said in ("one", "two", "three"):
        extra |= {"store": True} if way == "stored" else {"return_state": True}
        found = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": said}], extra_body=extra, **OPTIONS
        )
        answers.append(found.choices[0].message.content)
        fed.append(found.usage.prompt_tokens - found.usage.prompt_tokens_details.cached_tokens)
        extra = {"ignore_eos": True}
        extra |= {"previous_response_id": found.id} if way == "stored" else {"state": found.state}
    assert answers == expected
    assert fed[1] < 30


def test_any_stored_answer_can_be_continued_twice(client):
    first = client.completions.create(model="tiny", prompt=PROMPT, seed=1, extra_body={"store": True})
    more = [
        client.completions.create(
            model="tiny", prompt=" x", temperature=0, extra_body={"previous_response_id": first.id}
        )
        for _ in range(2)
    ]
    assert more[0].choices[0].text == more[1].choices[0].text


def test_end_token_is_fed_once(client, model):
    """An answer that the end token ended: it is the pending token, and the template writes it, too."""
    ends = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "x"}],
        logit_bias={"0": 100},
        extra_body={"store": True},
    )
    assert (ends.choices[0].finish_reason, ends.choices[0].message.content) == ("stop", "")
    found = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "y"}],
        extra_body={"previous_response_id": ends.id},
        temperature=0,
        max_tokens=8,
    )
    text = "# user: x<|endoftext|>\n# assistant:<|endoftext|>\n# user: y<|endoftext|>\n# assistant:"
    assert found.choices[0].message.content == text_of(model, model.tokenizer.as_it_stands(text), max_tokens=8)
    assert found.usage.prompt_tokens == len(model.tokenizer.as_it_stands(text))


def test_sealed_state_goes_on_in_another_server_and_in_no_other_way(client, served, models):
    body = {"model": "tiny", "prompt": PROMPT, "seed": 1}
    sealed = served.ask("/v1/completions", body | {"return_state": True})[2]["state"]
    more = {"model": "tiny", "prompt": " x", "temperature": 0, "state": sealed}
    expected = served.ask("/v1/completions", more)[2]["choices"][0]["text"]

    def fails(server, **changes):
        status, _, found = server.ask("/v1/completions", more | changes)
        return status, found["error"]["param"], found["error"]["code"]

    with running({"tiny": models["other"]}, seal_key=KEY) as wrong, running(models, seal_key="z" * 40) as foreign:
        assert fails(wrong, prompt=[1])[0] == 400  # another checkpoint
        assert fails(foreign) == (400, "state", "invalid_state")
    data = bytearray(base64.b64decode(sealed))
    for place in (0, 8, 20, 60, len(data) // 2, len(data) - 1):
        changed = bytes(data[:place]) + bytes([data[place] ^ 1]) + bytes(data[place + 1 :])
        assert fails(served, state=base64.b64encode(changed).decode()) == (400, "state", "invalid_state")
    assert fails(served, state="%%%")[1] == "state"
    assert fails(served, state=base64.b64encode(data[:50]).decode()) == (400, "state", "invalid_state")
    assert served.ask("/v1/completions", more)[2]["choices"][0]["text"] == expected


def test_conversations_are_the_last_ones(models):
    with running(models, conversations=2, slots=2) as server:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
        names = [server.ask("/v1/completions", body | {"store": True})[2]["id"] for _ in range(3)]
        found = [server.ask("/v1/completions", body | {"previous_response_id": name}) for name in names]
        assert [status for status, *_ in found] == [400, 200, 200]
        assert found[0][2]["error"]["code"] == "previous_response_not_found"


def test_conversations_go_on_in_the_next_server(models, tmp_path):
    body, names, more = {"model": "tiny", "prompt": "x", "max_tokens": 3, "seed": 1}, [], []
    for start in (True, False):
        with running(models, conversations=1, slots=2, conversation_folder=str(tmp_path)) as server:
            if start:
                for n in range(3):
                    names.append(server.ask("/v1/completions", body | {"seed": n, "store": True})[2]["id"])
            found = [server.ask("/v1/completions", body | {"previous_response_id": name}) for name in names]
            more.append([answer["choices"][0]["text"] for _, _, answer in found])
            for name in ("../" + names[0], "", "a/b", "x" * 500, "\0"):
                assert server.ask("/v1/completions", body | {"previous_response_id": name})[0] == 400
    assert more[0] == more[1]
    assert len(list(tmp_path.iterdir())) == 3


def test_beginnings_are_kept_on_disk_for_the_next_server(models, model, tmp_path):
    body = {"model": "tiny", "prompt": "x = 1\n" * 60, "max_tokens": 8, "temperature": 0}
    spared = []
    for _ in range(2):
        with running(models, slots=1, prefix_folder=str(tmp_path)) as server:
            found = server.ask("/v1/completions", body)[2]
            assert found["choices"][0]["text"] == text_of(model, body["prompt"], max_tokens=8)
            spared.append(found["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert spared[0] == 0
    assert spared[1] % 64 == 0
    assert found["usage"]["prompt_tokens"] - spared[1] <= 64


def test_conversations_that_cannot_be_written_are_said(models, tmp_path, monkeypatch, caplog):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    folder = tmp_path / "conversations"
    with running(models, conversations=4, conversation_folder=str(folder)) as server:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 1, "store": True}
        for _ in range(2):
            assert server.ask("/v1/completions", body)[0] == 200
        monkeypatch.setattr("dijiang.runtime.snapshot.Snapshot.save", full)
    messages = [record.getMessage() for record in caplog.records if record.name == "dijiang.states"]
    assert len(messages) == 2
    assert "states cannot be kept ([Errno 28] No space left on device)" in messages[0]
    assert messages[1] == "2 conversations are lost: their folder could not take them"


def test_bundle_that_is_replaced_or_removed_changes_nothing_that_is_served(bundles, tmp_path):
    bundle = shutil.copytree(bundles / "tiny", tmp_path / "tiny")
    with running({"tiny": dijiang.load(bundle, threads=1)}) as server:
        template = bundle / "tokenizer_config.json"
        config = json.loads(template.read_text())
        template.write_text(json.dumps(config | {"chat_template": "another {{ messages[0].content * 9 }}"}))
        (bundle / "chat_template.jinja").write_text("another {{ messages[0].content * 9 }}")
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0}
        with running({"tiny": dijiang.load(bundles / "tiny", threads=1)}) as other:
            expected = other.ask("/v1/chat/completions", body)[2]["choices"], other.ask("/v1/models")[2]["data"][0]
        shutil.rmtree(bundle)
        assert server.ask("/v1/chat/completions", body)[2]["choices"] == expected[0]
        status, _, found = server.ask("/v1/models")
        assert (status, found["data"][0]["dijiang"]) == (200, expected[1]["dijiang"])


def test_model_without_a_template_is_named_not_its_folder(served, bundles):
    body = {"model": "other", "messages": [{"role": "user", "content": "hi"}]}
    status, _, found = served.ask("/v1/chat/completions", body)
    assert status == 400
    assert str(bundles) not in found["error"]["message"]


def test_conversations_in_memory_outlive_the_server(models, tmp_path):
    body = {"model": "tiny", "prompt": "x", "max_tokens": 3, "seed": 1}
    with running(models, slots=2, conversation_folder=str(tmp_path)) as server:
        name = server.ask("/v1/completions", body | {"store": True})[2]["id"]
        assert not list(tmp_path.iterdir())
    with running(models, slots=2, conversation_folder=str(tmp_path)) as server:
        assert server.ask("/v1/completions", body | {"previous_response_id": name})[0] == 200


def test_damaged_file_stays_and_is_found_when_it_is_restored(models, tmp_path, caplog):
    """As one that is being copied back while clients ask for it."""
    body = {"model": "tiny", "prompt": "x", "max_tokens": 3, "seed": 1}
    with running(models, slots=2, conversation_folder=str(tmp_path)) as server:
        name = server.ask("/v1/completions", body | {"store": True})[2]["id"]
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with running(models, slots=2, conversation_folder=str(tmp_path)) as server:
        assert server.ask("/v1/completions", body | {"previous_response_id": name})[0] == 400
        (said,) = [record.getMessage() for record in caplog.records if record.name == "dijiang.states"]
        assert "not a saved state" in said
        assert said.endswith("; it is taken for none until it is restored")
        file.write_bytes(whole)
        assert server.ask("/v1/completions", body | {"previous_response_id": name})[0] == 200


@pytest.mark.parametrize("kind", ["conversation", "prefix"])
def test_folder_without_room_for_one_state_is_refused_at_the_start(models, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("dijiang.runtime.snapshot.Snapshot.dump", lambda self: b"x" * (3 << 20))
    options = {f"{kind}_folder": str(tmp_path), f"{kind}_disk": 2}
    with pytest.raises(dijiang.InputError, match=rf"{kind}_disk is 2 MB, and one state has 3.0 MB"):
        build(models, Serving.of(options))
