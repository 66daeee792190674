"""The same weights with another tokenizer: what was said in one vocabulary is not gone on with in another."""

import json

import pytest
from click.testing import CliRunner

import dijiang
from dijiang.cli import main
from tests.conftest import EXAMPLES
from tests.server.serving import KEY, running


def renamed(tokenizer):
    """Other ids for the last of its tokens."""
    vocab = tokenizer["model"]["vocab"]
    last = len(vocab) - 1
    tokenizer["model"]["vocab"] = {name: last + 600 - at if at >= 600 else at for name, at in vocab.items()}


def rewritten(tokenizer):
    """Another text that means the same."""
    tokenizer["model"]["vocab"] = dict(reversed(tokenizer["model"]["vocab"].items()))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """own, and of the same weights: renamed, rewritten."""
    place, found = tmp_path_factory.mktemp("vocabulary"), {}
    for name, change in {"own": len, "renamed": renamed, "rewritten": rewritten}.items():
        checkpoint = place / f"{name}-checkpoint"
        checkpoint.mkdir()
        for file in ("config.json", "model.safetensors"):
            (checkpoint / file).write_bytes((EXAMPLES / "tiny-python" / file).read_bytes())
        tokenizer = json.loads((EXAMPLES / "tiny-python" / "tokenizer.json").read_text())
        change(tokenizer)
        (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
        options = {"precision": "int8", "calibration_tokens": 0, "verify": False}
        found[name] = dijiang.export(checkpoint, place / name, **options).path
    return found


def cli(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_saved_state_goes_on_in_its_own_vocabulary_alone(bundles, tmp_path):
    kept, short = tmp_path / "kept", ["--max-tokens", 5]
    assert cli("run", bundles["own"], "-p", "def main(", *short, "--save-state", kept).exit_code == 0
    told = {name: cli("run", bundle, "--load-state", kept, *short) for name, bundle in bundles.items()}
    assert told["own"].stdout == told["rewritten"].stdout
    for refused in (told["renamed"], cli("state", "verify", kept, bundles["renamed"])):
        assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
        assert "token ids are of another vocabulary" in refused.stderr
    assert cli("state", "verify", kept, bundles["rewritten"]).exit_code == 0


def test_state_that_nobody_named_goes_on_anywhere(bundles, tmp_path):
    """As `State.save` writes, which knows ids only."""
    model = dijiang.load(bundles["own"], threads=1)
    state = model.new_state()
    model.forward([[5, 6]], state)
    state.save(tmp_path / "kept")
    assert cli("run", bundles["renamed"], "--load-state", tmp_path / "kept", "-p", "x").exit_code == 0


def test_answers_of_another_tokenizer_are_not_gone_on_with(bundles, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    source.write_text('{"prompt": "x = "}\n{"prompt": "def f"}\n')
    command = ["--jsonl", source, "-o", out, "--max-tokens", 2]
    assert cli("run", bundles["own"], *command).exit_code == 0
    first = out.read_text().splitlines(keepends=True)[0]
    out.write_text(first)
    refused = cli("run", bundles["renamed"], *command)
    assert "line 1 was answered by another bundle" in refused.stderr
    assert out.read_text() == first


def test_servers_refuse_conversations_of_another_vocabulary(bundles, tmp_path):
    models = {name: dijiang.load(bundle, threads=1) for name, bundle in bundles.items()}
    folders = {"conversation_folder": str(tmp_path / "c"), "prefix_folder": str(tmp_path / "p")}
    body = {
        "model": "m",
        "prompt": [7] * 200,
        "max_tokens": 3,
        "temperature": 0,
        "store": True,
        "return_state": True,
    }
    with running({"m": models["own"]}, seal_key=KEY, **folders) as server:
        first = server.ask("/v1/completions", body)[2]
    follow = {"previous_response_id": first["id"]}, {"state": first["state"]}
    for name, expected in (("renamed", 400), ("rewritten", 200)):
        with running({"m": models[name]}, seal_key=KEY, **folders) as server:
            for before in follow:
                status, _, found = server.ask("/v1/completions", body | {"prompt": "x"} | before)
                assert status == expected
                assert status == 200 or "another vocabulary" in found["error"]["message"]
            # What a prompt begins with is the same state for both, and what follows is in each one's own words.
            again = server.ask("/v1/completions", body)[2]
            assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 192
            own = {"prompt": "x", "previous_response_id": again["id"]}
            assert server.ask("/v1/completions", body | own)[0] == 200
