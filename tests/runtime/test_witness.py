"""Snapshots of a generation: on any bundle of the checkpoint they go on, and what follows can be proven."""

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from multiprocessing import get_context

import numpy as np
import pytest
from click.testing import CliRunner

import dijiang
from dijiang.cli import main
from dijiang.runtime.options import Generation
from dijiang.runtime.snapshot import Snapshot
from dijiang.runtime.witness import take, verify
from tests.conftest import RUNNABLE

DRAWN = {"temperature": 1.2, "top_p": 0.9, "seed": 7, "repetition_penalty": 1.2}
#: Of each bundle; `make soak` takes 1,000, continued by another process.
CONTINUATIONS = 20


@pytest.fixture(scope="module")
def model(exported):
    return dijiang.load(exported("tiny-python"), threads=1)


def after(model, tokens=5, **options):
    state = model.new_state()
    for _ in model.generate("def main(", max_tokens=tokens, ignore_eos=True, state=state, **options):
        pass
    return state


@pytest.fixture(scope="module")
def kept(model):
    return Snapshot.parse(take(model, after(model), Generation()).dump(), "here")


@pytest.fixture
def cli():
    return lambda *arguments: CliRunner().invoke(main, [str(a) for a in arguments])


def test_history_is_of_the_tokens_alone(model):
    ids = list(range(40))
    whole, steps, padded = model.new_state(), model.new_state(), model.new_state(2)
    model.forward([ids], whole)
    for token in ids:
        model.forward([[token]], steps)
    model.forward([[*ids, 0, 0], [0, 0, *ids]], padded, mask=[[1] * 40 + [0] * 2, [0] * 2 + [1] * 40])
    other = steps.clone()
    model.forward([[1]], other)
    found = {state.history[0].tobytes() for state in (whole, steps, padded)}
    assert found == {padded.history[1].tobytes()}
    assert other.history[0].tobytes() not in found
    assert steps.history[0].tobytes() in found  # a clone's steps are not its own


@pytest.mark.parametrize("graph", RUNNABLE)
def test_what_follows_is_the_same_in_every_graph(exported, kept, graph):
    other = dijiang.load(exported("tiny-python", graph=graph))
    assert "as it was" in verify(other, kept)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_what_follows_is_near_in_another_precision(exported, kept, precision):
    other = dijiang.load(exported("tiny-python", precision=precision))
    before = [layer.tobytes() for layer in kept.layers]
    assert "allowed 1e-01" in verify(other, kept)
    assert [layer.tobytes() for layer in kept.layers] == before  # computed on a clone
    own = Snapshot.parse(take(other, after(other), Generation()).dump(), "here")
    assert "allowed 1e-04" in verify(other, own)


#: Options of one of every four continuations each.
KINDS = (
    {},
    DRAWN,
    {"temperature": 0.8, "repetition_penalty": 1.7, "presence_penalty": 0.5, "frequency_penalty": 0.9},
    {"temperature": 1.3, "top_k": 50, "stop": ["ing", "\n", "\ufffd\ufffd"]},
)


@cache
def opened(bundle):
    """A model of a process: the parent's is another one."""
    return dijiang.load(bundle, threads=1)


def gone_on(bundle, file, tokens, options):
    """What a model makes of a saved state: ids and text."""
    return told(opened(bundle).generate(state=dijiang.State.load(file), max_tokens=tokens, **options))


def told(records):
    records = list(records)
    return [r.token for r in records], "".join(r.text for r in records), records[-1].finish_reason


def compare_continuations(bundle, file, count, elsewhere):
    """Random prompts, options and cuts; elsewhere(*arguments): `gone_on` by another model."""
    random, model, compared = np.random.default_rng(3), dijiang.load(bundle, threads=1), 0
    while compared < count:
        prompt = random.integers(0, model.spec.vocab_size, random.integers(1, 30)).tolist()
        total, kind = int(random.integers(2, 16)), KINDS[compared % len(KINDS)]
        options = {"seed": int(random.integers(99)), "ignore_eos": True} | kind
        whole = told(model.generate(prompt, max_tokens=total, state=model.new_state(), **options))
        cut, state = int(random.integers(1, total)), model.new_state()
        first = told(model.generate(prompt, max_tokens=cut, state=state, **options))
        if first[2] != "limit":  # a stop string came before the cut
            continue
        state.save(file)
        rest = elsewhere(bundle, file, total - cut, options)
        assert (first[0] + rest[0], first[1] + rest[1], rest[2]) == whole
        compared += 1


ALL_BUNDLES = [
    pytest.param(precision, graph, id=f"{graph}-{precision}")
    for graph in ("native", "ort")
    if graph in RUNNABLE
    for precision in ("fp32", "int8", "int4")
]


@pytest.mark.parametrize(("precision", "graph"), ALL_BUNDLES)
def test_random_continuations_by_another_model_are_the_whole(exported, tmp_path, precision, graph):
    bundle = exported("tiny-python", precision=precision, graph=graph)
    compare_continuations(bundle, tmp_path / "s", CONTINUATIONS, gone_on)


@pytest.mark.soak
@pytest.mark.parametrize(("precision", "graph"), ALL_BUNDLES)
def test_1000_continuations_by_another_process_are_the_whole(exported, tmp_path, precision, graph):
    bundle = exported("tiny-python", precision=precision, graph=graph)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
        compare_continuations(bundle, tmp_path / "s", 1000, lambda *what: other.submit(gone_on, *what).result())


FAULTS = {
    "a layer scaled": lambda k: replace(k, layers=[k.layers[0] * 1.01, *k.layers[1:]]),
    "layers exchanged": lambda k: replace(k, layers=k.layers[::-1]),
    "another pending token": lambda k: replace(k, seams=[replace(k.seams[0], token=k.seams[0].token ^ 1)]),
    "another logit": lambda k: replace(k, note=replace(k.note, top=((k.note.top[0][0], 0.0), *k.note.top[1:]))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_another_state_does_not_pass(model, kept, fault):
    changed = Snapshot.parse(FAULTS[fault](kept).dump(), "here")  # its digest is right
    with pytest.raises(dijiang.InputError, match="of the logits' range off, allowed 1e-04"):
        verify(model, changed)


def test_snapshot_without_a_pending_token_or_of_another_model_is_refused(model, exported, kept):
    state = model.new_state()
    model.forward([[1]], state)
    with pytest.raises(dijiang.InputError, match="holds no pending token"):
        verify(model, take(model, state, Generation()))
    assert list(model.generate([1], max_tokens=2, ignore_eos=True, state=state))
    with pytest.raises(dijiang.InputError, match="holds no pending token with its logits"):
        verify(model, state.snapshot())  # a token, but nobody kept what follows it
    with pytest.raises(dijiang.InputError, match="the state is of checkpoint"):
        verify(dijiang.load(exported("tiny-python-published")), kept)


def test_any_changed_byte_is_refused(kept):
    data, random = kept.dump(), np.random.default_rng(0)
    places = [*random.integers(0, 4000, 60), *random.integers(4000, len(data), 60), len(data) - 1]
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << int(random.integers(8))
        with pytest.raises(dijiang.InputError, match=r"^here: .*save it again"):
            Snapshot.parse(bytes(changed), "here")
    for length in random.integers(0, len(data), 60):
        with pytest.raises(dijiang.InputError, match="save it again"):
            Snapshot.parse(data[:length], "here")


def test_run_goes_on_from_a_file_as_if_it_had_not_stopped(cli, exported, tmp_path):
    bundle, file = exported("tiny-python"), tmp_path / "s"
    hot = ["--temperature", 1.2, "--top-p", 0.9, "--repetition-penalty", 1.2, "--ignore-eos"]
    whole = cli("run", bundle, "-p", "def main(", "-n", 24, "--seed", 7, *hot).stdout
    first = cli("run", bundle, "-p", "def main(", "-n", 10, "--seed", 7, *hot, "--save-state", file).stdout
    rest = cli("run", bundle, "-n", 14, "--load-state", file)  # draws as the first did
    assert first[:-1] + rest.stdout == whole
    assert "elsewhere" not in rest.stderr
    cold = cli("run", bundle, "-n", 14, "--load-state", file, "--temperature", 0)
    assert first[:-1] + cold.stdout != whole  # an option of the command line goes before the file's
    twice = [cli("run", bundle, "-n", 14, "--load-state", file, "-p", " x").stdout for _ in range(2)]
    assert twice[0] == twice[1]
    assert first[:-1] + twice[0] != whole


def test_run_draws_a_seed_that_the_file_keeps(cli, exported, tmp_path):
    bundle, file = exported("tiny-python"), tmp_path / "s"
    cli("run", bundle, "-p", "x", "-n", 4, "--temperature", 2, "--ignore-eos", "--save-state", file)
    texts = {cli("run", bundle, "-n", 20, "--load-state", file).stdout for _ in range(3)}
    assert len(texts) == 1


def test_run_says_that_a_state_goes_on_elsewhere(cli, exported, tmp_path):
    cli("run", exported("tiny-python"), "-p", "def", "-n", 3, "--save-state", tmp_path / "s")
    done = cli("run", exported("tiny-python", precision="int8"), "-n", 3, "--load-state", tmp_path / "s")
    assert done.exit_code == 0
    assert "[the state goes on elsewhere: precision fp32 -> int8]" in done.stderr


@pytest.mark.skipif("native" not in RUNNABLE, reason="no compiled operator")
def test_a_state_of_drafts_goes_on_where_there_are_none(cli, exported, tmp_path):
    """How fast it was written is no part of how its tokens are drawn."""
    bundle, file = exported("tiny-python", precision="int8"), tmp_path / "s"
    done = cli("run", bundle, "-p", "def", "-n", 9, "--speculate", "--graph", "native", "--save-state", file)
    assert done.exit_code == 0, done.output
    for options in (["--graph", "ort"], ["--temperature", 1]):
        done = cli("run", bundle, "-n", 3, "--load-state", file, *options)
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize("file", ["none", "damaged", "foreign"])
def test_run_refuses_a_file_and_leaves_what_is_there(cli, model, exported, tmp_path, file):
    bundle, out = exported("tiny-python"), tmp_path / "out"
    out.write_bytes(b"mine")
    path = tmp_path / file
    if file == "damaged":
        path.write_bytes(b"x" * 1000)
    elif file == "foreign":
        dijiang.load(exported("tiny-python-published")).new_state().save(path)
    done = cli("run", bundle, "-p", "x", "-n", 2, "--load-state", path, "--save-state", out)
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert out.read_bytes() == b"mine"


def test_state_show_verify_diff(cli, model, exported, tmp_path):
    bundle, one, two = exported("tiny-python"), tmp_path / "one", tmp_path / "two"
    run = ["run", bundle, "-p", "def main(", "--temperature", 1, "--seed", 3, "--frequency-penalty", 0.1]
    for file, count in ((one, 4), (two, 6)):
        assert cli(*run, "-n", count, "--save-state", file).exit_code == 0
    shown = json.loads(cli("state", "show", one, "--json").stdout)
    assert shown["made"]["precision"] == "fp32"
    assert (len(shown["top"]), shown["sampler"]["seed"]) == (8, 3)
    (pending,) = shown["pending"]
    assert sum(count for _, count in pending["counts"]) == 4
    assert pending["token"] in dict(pending["counts"])
    assert shown["state_bytes"] == model.spec.state_bytes
    assert shown["cache_bytes"] == shown["position"][0] * 4 * model.spec.num_layers * model.spec.hidden_size
    assert "cache bytes" in cli("state", "show", one).stdout
    for graph in RUNNABLE:
        verified = cli("state", "verify", one, exported("tiny-python", graph=graph), "--graph", graph)
        assert "as it was" in verified.stdout
    same = json.loads(cli("state", "diff", one, one, "--json").stdout)
    assert (same["equal"], same["same_tokens"], max(same["rms_relative_difference"])) == (True, True, 0)
    apart = json.loads(cli("state", "diff", one, two, "--json").stdout)
    assert (apart["equal"], apart["same_tokens"]) == (False, False)
    assert min(apart["rms_relative_difference"]) > 0
    assert "same tokens" in cli("state", "diff", one, two).stdout
    model.new_state(2).save(tmp_path / "batch")
    refused = cli("state", "diff", one, tmp_path / "batch")
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)


def test_pending_tokens_that_differ_are_told(exported, cli, tmp_path):
    model = dijiang.load(exported("neox-base"))
    for name, options in (("a", {}), ("b", {"stop_tokens": []}), ("c", {"temperature": 1.0, "seed": 1})):
        state = model.new_state()
        list(model.generate([3, 4, 5], max_tokens=1, state=state, ignore_eos=True, **options))
        state.save(tmp_path / name)
    same, other = (json.loads(cli("state", "diff", tmp_path / "a", tmp_path / n, "--json").stdout) for n in "bc")
    assert same["same_pending"] is True
    assert (other["same_tokens"], other["same_pending"], other["equal"]) == (True, False, False)


def test_caches_of_all_sequences_count(exported, cli, tmp_path):
    model = dijiang.load(exported("neox-base"))
    state = model.new_state(2)
    model.forward(np.array([[1, 2, 3], [1, 2, 3]]), state, mask=np.array([[1, 1, 1], [1, 0, 0]]))
    state.save(tmp_path / "two")
    shown = json.loads(cli("state", "show", tmp_path / "two", "--json").stdout)
    assert shown["position"] == [3, 1]
    assert shown["cache_bytes"] == 4 * 4 * model.spec.num_layers * model.spec.hidden_size
