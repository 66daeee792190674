"""dijiang convert and dijiang init on the command line."""

import json

import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from dijiang.cli import main
from dijiang.models.load import load_checkpoint
from dijiang.models.presets import PRESETS
from dijiang.recipe import PRECISIONS
from tests.conftest import GOLDEN

TINY = PRESETS["pythia-70m"] | {"vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 1}


@pytest.fixture
def cli(monkeypatch):
    """cli(*arguments): the finished command; pythia-70m is tiny."""
    monkeypatch.setitem(PRESETS, "pythia-70m", TINY | {"intermediate_size": 48})
    return lambda *arguments: CliRunner().invoke(main, [str(a) for a in arguments])


def drawn(folder):
    return load_file(folder / "model.safetensors")["gpt_neox.layers.0.attention.proj_matrix"]


def test_convert_says_that_the_model_needs_fine_tuning(cli, vanilla, tmp_path):
    done = cli("convert", vanilla, "-o", tmp_path / "new")
    assert done.exit_code == 0
    assert "fine-tune it" in done.stdout
    assert "its text makes no sense" in done.stdout
    assert load_checkpoint(tmp_path / "new").positions_limit is None


def test_convert_json_and_seed(cli, vanilla, tmp_path):
    report = json.loads(cli("convert", vanilla, "-o", tmp_path / "a", "--json").stdout)
    assert report["path"] == str(tmp_path / "a")
    assert report["added"] == 2 * (64 * 64 + 16 * 16 + 2 * 64)
    cli("convert", vanilla, "-o", tmp_path / "b", "--seed", 0)
    cli("convert", vanilla, "-o", tmp_path / "c", "--seed", 1)
    assert (drawn(tmp_path / "a") == drawn(tmp_path / "b")).all()
    assert (drawn(tmp_path / "a") != drawn(tmp_path / "c")).any()


@pytest.mark.parametrize("command", [("convert", "VANILLA"), ("init", "pythia-70m")])
def test_progress_is_shown_on_stderr_if_asked_for(cli, vanilla, tmp_path, command):
    verb, source = command
    source = vanilla if source == "VANILLA" else source
    shown = cli(verb, source, "-o", tmp_path / "a", "--progress")
    hidden = cli(verb, source, "-o", tmp_path / "b", "--no-progress")
    assert "write" in shown.stderr
    assert hidden.stderr == ""


def test_convert_of_a_converted_checkpoint_is_one_line(cli, tmp_path):
    done = cli("convert", GOLDEN["neox-base"], "-o", tmp_path / "new")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_init_list_shows_every_preset(cli):
    rows = cli("init", "--list").stdout.splitlines()
    assert rows[0].split() == ["preset", "parameters", "state", *PRECISIONS]
    assert [row.split()[0] for row in rows[1:]] == list(PRESETS)
    sizes = {s["preset"]: s for s in json.loads(cli("init", "--list", "--json").stdout)}
    assert sizes["llama2-7b"]["state_bytes"] == 32 * 32 * 128 * 128 * 4


def test_init_writes_what_it_is_asked_for(cli, tmp_path):
    done = cli("init", "pythia-70m", "-o", tmp_path / "a", "--dtype", "float32", "--seed", 4)
    assert (done.exit_code, "random weights" in done.stdout) == (0, True)
    assert load_checkpoint(tmp_path / "a").weights["embed.weight"].dtype == "float32"
    report = json.loads(cli("init", "pythia-70m", "-o", tmp_path / "b", "--dtype", "float32", "--json").stdout)
    assert report["path"] == str(tmp_path / "b")
    assert (drawn(tmp_path / "a") != drawn(tmp_path / "b")).any()


def test_init_without_preset_or_output_is_wrong_usage(cli):
    assert cli("init").exit_code == 2
    assert cli("init", "pythia-70m").exit_code == 2


def test_unknown_preset_is_one_line(cli, tmp_path):
    done = cli("init", "pythia-7b", "-o", tmp_path / "new")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "expected one of pythia-70m, pythia-160m" in done.stderr
