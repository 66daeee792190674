"""Models by their names on the Hub, against a server of our own that speaks its interface."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from click.testing import CliRunner

import dijiang
from dijiang.cli import main
from dijiang.hub import PYTORCH, _is_whole, folder_of, name_of
from tests.conftest import GOLDEN
from tests.fake_hub import COMMIT, OLD, Hub

SHORT = ("--no-verify", "--graph", "primitive", "--json")


@pytest.fixture(scope="module")
def hub(exported):
    server = Hub()
    server.add("org/model", GOLDEN["neox-base"])
    server.add("org/model", GOLDEN["neox-trained-decay"], OLD)
    server.add("org/bin", GOLDEN["neox-fp16-bin"])
    server.add("org/bundle", exported("tiny-python"))
    server.add("org/private", GOLDEN["neox-base"])
    server.private.add("org/private")
    yield server
    server.close()


@pytest.fixture
def variables(hub, tmp_path):
    """The environment of a process that asks the hub, with an empty cache."""
    hub.broken = False
    hub.asked.clear()
    return hub.variables(tmp_path / "home")


@pytest.fixture
def cli(variables, tmp_path):
    """cli(*arguments, **environment): the finished command."""

    def run(*arguments, **environment):
        return subprocess.run(
            [sys.executable, "-m", "dijiang", *map(str, arguments)],
            env=variables | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_bundle_runs_by_its_name_and_then_without_the_hub(cli, hub, tmp_path):
    first = cli("run", "org/bundle", "-p", "def main(", "-n", "4", "--json")
    assert first.returncode == 0, first.stderr
    asked = len(hub.asked)
    assert asked
    hub.broken = True
    again = cli("run", "org/bundle", "-p", "def main(", "-n", "4", "--json")
    assert json.loads(again.stdout)["text"] == json.loads(first.stdout)["text"]
    assert len(hub.asked) == asked
    (snapshot,) = (tmp_path / "home" / "hub" / "models--org--bundle" / "snapshots").iterdir()
    (snapshot / "model.onnx.data").unlink()  # as a download that was interrupted leaves it
    hub.broken = False
    assert cli("inspect", "org/bundle").returncode == 0
    assert (snapshot / "model.onnx.data").exists()


def test_checkpoint_is_exported_by_its_name_and_revision(cli, tmp_path):
    for revision, golden in (("main", "neox-base"), ("old", "neox-trained-decay"), (OLD, "neox-trained-decay")):
        target = tmp_path / revision
        done = cli(
            "export", "org/model", "--revision", revision, "-o", target, "--no-verify", "--graph", "primitive"
        )
        assert done.returncode == 0, done.stderr
        expected = dijiang.export(GOLDEN[golden], tmp_path / f"{revision}-local", verify=False, graph="primitive")
        assert json.loads((target / "dijiang.json").read_text())["fingerprint"] == expected.manifest.fingerprint


def test_verify_of_a_bundle_in_the_cache_writes_nothing_there(cli, hub, tmp_path, exported):
    hub.add("org/base", exported("neox-base"))
    done = cli("verify", "org/base", "--against", "org/model", "--tokens", "20", "--json")
    assert done.returncode == 0, done.stderr
    (snapshot,) = (tmp_path / "home" / "hub" / "models--org--base" / "snapshots").iterdir()
    assert {file.name for file in snapshot.iterdir()} == {file.name for file in exported("neox-base").iterdir()}
    assert not json.loads((snapshot / "dijiang.json").read_text())["graphs"]["primitive"]["passed"]


def test_a_served_model_is_called_as_it_was_asked_for(variables):
    program = [sys.executable, "-m", "dijiang", "serve", "org/bundle", "--port", "0"]
    with subprocess.Popen(program, env=variables, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines = [process.stderr.readline() for _ in range(3)]
            assert lines[0].startswith("[org/bundle: ")
            url = lines[2].removeprefix("[listening on ").rstrip("]\n")
            with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
                assert [one.id for one in client.models.list()] == ["org/bundle"]
                assert client.models.retrieve("org/bundle").id == "org/bundle"
                answer = client.completions.create(model="org/bundle", prompt="x", max_tokens=2)
                assert answer.usage.completion_tokens == 2
        finally:
            process.terminate()


def test_a_report_calls_a_model_as_it_was_asked_for(cli):
    done = cli("bench", "org/bundle", "-p", "none", "-n", "1", "-r", "1", "--seconds", "0", "-o", "json")
    assert done.returncode == 0, done.stderr
    assert [model["name"] for model in json.loads(done.stdout)["models"]] == ["org/bundle"]


def test_a_name_is_that_of_the_folder_or_of_the_link_to_it(tmp_path, monkeypatch):
    (tmp_path / "v3").mkdir()
    (tmp_path / "current").symlink_to("v3")
    assert name_of(tmp_path / "current") == "current"
    assert name_of(tmp_path / "v3" / ".." / "v3") == "v3"
    monkeypatch.chdir(tmp_path / "v3")
    assert name_of(Path(".")) == "v3"
    assert name_of(tmp_path / "models--org--a-b.c" / "snapshots" / COMMIT) == "org/a-b.c"


def test_pytorch_files_are_fetched_only_where_nothing_else_is(cli, hub, tmp_path):
    both = tmp_path / "both"
    shutil.copytree(GOLDEN["neox-base"], both)
    for name in ("pytorch_model.bin", "model.gguf", "original/consolidated.00.pth"):
        (both / name).parent.mkdir(exist_ok=True)
        (both / name).write_bytes(b"x")
    hub.add("org/both", both)
    assert cli("inspect", "org/both").returncode == 1  # no bundle, but it was fetched
    fetched = {path.rsplit("/", 1)[1] for path in hub.asked if "/resolve/" in path}
    assert fetched == {file.name for file in GOLDEN["neox-base"].iterdir()}
    only = shutil.copytree(GOLDEN["neox-fp16-bin"], tmp_path / "only")
    (only / "model.onnx").write_bytes(b"x")  # of another program
    hub.add("org/onnx", only)
    for name in ("bin", "onnx"):
        done = cli("export", f"org/{name}", "-o", tmp_path / name, *SHORT)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("lists", "whole"),
    [
        ({}, True),
        ({"dijiang.json": {"files": {"here": {}}}}, True),
        ({"dijiang.json": {"files": {"here": {}, "gone": {}}}}, False),
        ({"model.safetensors.index.json": {"weight_map": {"a": "here", "b": "gone"}}}, False),
        ({"pytorch_model.bin.index.json": {"weight_map": {"a": "gone.bin"}}}, True),  # not asked for
        ({"dijiang.json": [1], "x.index.json": {"weight_map": None}}, True),
    ],
)
def test_a_folder_of_the_cache_is_whole_if_it_has_what_it_names(tmp_path, lists, whole):
    """Not every huggingface_hub sees to it."""
    (tmp_path / "here").touch()
    for name, content in lists.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert _is_whole(tmp_path, (PYTORCH,), ()) is whole


def test_a_folder_of_the_cache_without_what_is_wanted_is_not_whole(tmp_path):
    assert not _is_whole(tmp_path, (), (PYTORCH,))
    (tmp_path / "pytorch_model.bin").touch()
    assert _is_whole(tmp_path, (), (PYTORCH,))


REFUSED = {
    "no repository": (("org/nothing",), {}, "no such folder, and the Hub does not give it"),
    "no revision": (("org/model", "--revision", "gone"), {}, "no such folder, and the Hub does not give it"),
    "no access": (("org/private",), {}, "no such folder, and the Hub does not give it"),
    "offline": (("org/other",), {"HF_HUB_OFFLINE": "1"}, "no such folder, and the Hub does not give it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_hub_does_not_give_is_one_line(cli, case):
    arguments, environment, message = REFUSED[case]
    done = cli("inspect", *arguments, **environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_token_of_the_user_is_sent(cli, tmp_path):
    done = cli(
        "export", "org/private", "-o", tmp_path / "b", "--no-verify", "--graph", "primitive", HF_TOKEN="secret"
    )
    assert done.returncode == 0, done.stderr


def test_folder_of_that_name_goes_first(cli, hub, tmp_path, exported):
    shutil.copytree(exported("tiny-python"), tmp_path / "org" / "model")
    assert cli("inspect", "org/model").returncode == 0
    assert hub.asked == []


def test_without_the_extra_it_is_one_line_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    found = CliRunner().invoke(main, ["inspect", "org/model"])
    assert found.exit_code == 1
    assert "pip install 'dijiang[hub]'" in found.stderr


@pytest.mark.parametrize("path", ["b", "./a/b", "a/b/c", "/a/b", "a/../b", "a/", "-/é"])
def test_what_is_no_name_of_the_hub_is_a_path(path):
    assert folder_of(path) == Path(path)


def test_bundle_has_a_model_card_that_anyone_may_edit(exported, copy_of):
    folder = copy_of(exported("neox-base"))
    manifest = json.loads((folder / "dijiang.json").read_text())
    assert "README.md" in manifest["reports"]
    assert "README.md" not in manifest["files"]
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: dijiang\n")
    assert f"| parameters | {manifest['parameters']:,} |" in card
    assert "dijiang run THIS_FOLDER --jsonl" in card  # it has no tokenizer
    assert 'dijiang run THIS_FOLDER -p "' in (exported("tiny-python") / "README.md").read_text()
    (folder / "README.md").write_text("mine")
    dijiang.load(folder)
