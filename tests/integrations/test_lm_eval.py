"""The real lm-evaluation-harness on bundles, with tasks and data of our own: nothing comes from a network."""

import json
import shutil
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers

import dijiang
from dijiang.cli import main
from dijiang.models.load import load_checkpoint
from dijiang.models.reference import Reference
from tests.conftest import EXAMPLES, GOLDEN, with_start_token

pytestmark = pytest.mark.ecosystem
TEXT = (EXAMPLES / "tiny-python" / "held_out.txt").read_text()
#: Documents of the tasks: pieces of the held-out text of other lengths.
PIECES = [TEXT[start : start + 150 + 37 * number] for number, start in enumerate(range(0, 6000, 600))]
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text[:80]}}",
        "doc_to_choice": "{{[text[80:110], other, 'x', text[80:95]]}}",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "endings": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text[:100]}}",
        "doc_to_target": "{{text[100:130]}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "written": {
        "output_type": "generate_until",
        "doc_to_text": "{{text[:90]}}",
        "doc_to_target": "{{text[90:120]}}",
        "generation_kwargs": {"until": ["\n\n", ")"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"text": text, "other": PIECES[number - 1][:30]} for number, text in enumerate(PIECES)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}},
        "test_split": "test",
    }
    for name, task in TASKS.items():  # JSON is YAML
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name} | shared | task))
    return folder


@pytest.fixture(scope="module")
def lm(exported):
    from dijiang.integrations.lm_eval import DijiangLM

    return DijiangLM(dijiang.load(exported("tiny-python")), batch_size=3)


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


@pytest.fixture(scope="module")
def reference():
    return Reference(load_checkpoint(GOLDEN["tiny-python"]))


def nats(reference, ids, start):
    """Log-probabilities of ids[start:], and whether all are the most likely, of the float64 reference."""
    logits = reference.forward(np.array([ids]))[0].astype(np.float64)
    logits = logits[start - 1 : -1] - logits[start - 1 : -1].max(-1, keepdims=True)
    chosen = logits[np.arange(len(logits)), ids[start:]]
    return float((chosen - np.log(np.exp(logits).sum(-1))).sum()), bool((chosen == 0).all())


PAIRS = [
    *((text[:cut], text[cut : cut + 12]) for text in PIECES[:4] for cut in (0, 1, 33, 90)),
    *((PIECES[0][:60], choice) for choice in ("x", " y", "return self", "\n")),  # one context
    ("def f(self", "):"),
    ("  ", "return"),
]


def test_likelihoods_are_those_of_the_float64_reference(lm, reference):
    found = lm.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        if context:
            before, after = lm._encode_pair(context, continuation)  # the harness's own rule
            before = before or [lm.prefix_token_id]
        else:
            before, after = [lm.prefix_token_id], lm.tok_encode(continuation)
        whole, start = before + after, len(before)
        expected, most_likely = nats(reference, whole, start)
        assert abs(value - expected) <= 1e-5 * (len(whole) - start)
        assert greedy == most_likely
    assert {greedy for _, greedy in found} == {True, False}


def test_a_tokenizer_that_begins_texts_begins_them_once(lm, copy_of, tmp_path):
    from dijiang.integrations.lm_eval import DijiangLM

    folder = copy_of(GOLDEN["tiny-python"])
    with_start_token(folder / "tokenizer.json").save(str(folder / "tokenizer.json"))
    bundle = dijiang.export(folder, tmp_path / "bundle", verify=False).path
    other = DijiangLM(dijiang.load(bundle))
    plain = lm.tok_encode("def f")
    assert other.tok_encode("def f") == other.tok_encode("<|endoftext|>def f") == [0, *plain]
    assert other.tok_encode("def f", add_special_tokens=False) == plain
    asked = requests("loglikelihood", ("", "def f"), ("<|endoftext|>def", " f"))
    for (found, _), (expected, _) in zip(
        other.loglikelihood(asked, True), lm.loglikelihood(asked, True), strict=True
    ):
        assert found == pytest.approx(expected, abs=1e-4)
    rolled = requests("loglikelihood_rolling", (TEXT[:800],))
    assert other.loglikelihood_rolling(rolled, True) == pytest.approx(lm.loglikelihood_rolling(rolled, True))


@pytest.mark.parametrize("length", [511, 40])
def test_rolling_likelihoods_are_those_of_the_float64_reference(lm, reference, monkeypatch, length):
    monkeypatch.setattr(lm, "max_length", length)
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in PIECES)), True)
    for text, value in zip(PIECES, found, strict=True):
        ids = lm.tok_encode(text)
        windows = [ids[start : start + length] for start in range(0, len(ids) - len(ids) % length, length)]
        expected = 0.0
        before = [lm.prefix_token_id]
        for window in windows:
            expected += nats(reference, before + window, len(before))[0]
            before = window[-1:]
        if rest := ids[len(windows) * length :]:
            context = ([lm.prefix_token_id, *ids][: -len(rest)])[-(length - len(rest) + 1) :]
            expected += nats(reference, context + rest, len(context))[0]
        assert abs(value - expected) <= 1e-5 * len(ids)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_a_batch_changes_no_score(lm, monkeypatch, batch_size):
    kind = requests("loglikelihood", *PAIRS)
    expected = lm.loglikelihood(kind, disable_tqdm=True)
    monkeypatch.setattr(lm, "batch_size", batch_size)
    found = lm.loglikelihood(kind, disable_tqdm=True)
    np.testing.assert_allclose([a for a, _ in found], [a for a, _ in expected], atol=1e-4)
    assert [b for _, b in found] == [b for _, b in expected]


def test_a_context_goes_through_the_model_once(lm, monkeypatch):
    fed, forward = [], lm.model._forward
    monkeypatch.setattr(
        lm.model, "_forward", lambda ids, *a, **k: fed.append(np.shape(ids)) or forward(ids, *a, **k)
    )
    lm.loglikelihood(requests("loglikelihood", *(("a = b + c;" * 20, choice) for choice in "xyzuvw")), True)
    contexts = [shape for shape in fed if shape[1] > 10]
    assert contexts == [(1, len(lm.tok_encode("a = b + c;" * 20)) - 1)]


@pytest.fixture(scope="module")
def results(lm, tasks):
    """results(model): of all tasks, as the harness finds them; without a model, ours."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    @cache
    def found(model=lm):
        how = {"tasks": list(TASKS), "task_manager": TaskManager(include_path=str(tasks))}
        return simple_evaluate(model=model, **how, bootstrap_iters=0, log_samples=False)["results"]

    return found


@contextmanager
def own_batching(lm):
    """The harness's class for transformers, around ours for transformers, which knows nothing of scores."""
    from lm_eval.models.huggingface import HFLM

    from dijiang.integrations.transformers import DijiangForCausalLM

    wrapped = DijiangForCausalLM(lm.model)
    yield HFLM(pretrained=wrapped, tokenizer=wrapped.tokenizer, max_length=lm.max_length, batch_size=4)


@contextmanager
def client_of_a_server(lm):
    """The harness's class for OpenAI's API, which has prompts echoed."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from tests.server.serving import running

    with running({"tiny": dijiang.load(lm.model.bundle.path)}, slots=4) as served:
        yield LocalCompletionsAPI(
            base_url=f"{served.url}/completions",
            model="tiny",
            tokenizer=str(lm.model.bundle.path),
            max_length=lm.max_length,
            batch_size=5,
        )


@pytest.mark.parametrize("way", [own_batching, client_of_a_server])
def test_the_harness_gets_the_same_results_in_its_own_ways(lm, results, way):
    with way(lm) as theirs:
        both = results(), results(theirs)
    for name in TASKS:
        ours, other = ({k: v for k, v in one[name].items() if isinstance(v, float)} for one in both)
        assert ours.keys() == other.keys()
        assert ours
        for metric, value in ours.items():
            assert value == pytest.approx(other[metric], rel=1e-4), (name, metric)


def test_a_long_context_leaves_room_for_the_answer_where_positions_end(tmp_path):
    """As with the harness's own model."""
    from dijiang.integrations.lm_eval import DijiangLM

    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN["neox-trained-decay"], checkpoint)
    config = json.loads((checkpoint / "config.json").read_text()) | {"bos_token_id": 95, "eos_token_id": 95}
    (checkpoint / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(96)}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    lm = DijiangLM(dijiang.load(dijiang.export(checkpoint, tmp_path / "b", verify=False).path))
    context = " ".join(f"w{2 + n % 50}" for n in range(lm.max_length + 20))
    options = {"until": ["zzz"], "max_gen_toks": 30}
    (found,) = lm.generate_until(requests("generate_until", (context, options)), True)
    assert len(found.split()) == 30


def test_generated_text_is_that_of_model_generate(lm):
    options = {"until": ["\n", "zzz"], "max_gen_toks": 15}
    found = lm.generate_until(
        requests("generate_until", *((text[:50], dict(options)) for text in PIECES[:3])), True
    )
    expected = [
        "".join(r.text for r in lm.model.generate(text[:50], max_tokens=15, stop=["\n", "zzz"]))
        for text in PIECES[:3]
    ]
    assert found == expected
    assert lm.generate_until(requests("generate_until", ("", {"until": "(", "max_tokens": 3})), True)[0]
    with pytest.raises(ValueError, match="num_beams: not an option of dijiang, expected one of temperature"):
        lm.generate_until(requests("generate_until", ("x", {"num_beams": 4})), True)


def test_eval_reports_fp32_and_int8(exported, tasks):
    values = {}
    for precision in ("fp32", "int8"):
        folder = str(exported("tiny-python", precision=precision))
        arguments = ["eval", folder, "--tasks", "texts,choices", "--include", str(tasks), "--json", "--limit", "5"]
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, done.output
        values[precision] = json.loads(done.stdout)
    bits = {name: one["texts"]["bits_per_byte,none"] for name, one in values.items()}
    print(f"\n{bits}")
    assert bits["fp32"] != bits["int8"] == pytest.approx(bits["fp32"], rel=0.03)
    done = CliRunner().invoke(main, ["eval", folder, "--tasks", "texts", "--include", str(tasks), "--limit", "2"])
    assert "bits_per_byte" in done.stdout
    assert done.stdout.startswith("|")


@pytest.mark.parametrize(("group", "own"), [("dijiang_paper", set()), ("dijiang_paper_llama2", {"race_middle"})])
def test_a_group_of_the_paper_has_tasks_of_the_harness_or_of_ours(group, own):
    import yaml  # comes with the harness
    from lm_eval.tasks import TaskManager

    from dijiang.integrations.lm_eval import TASKS

    listed = yaml.safe_load((TASKS / f"{group}.yaml").read_text())["task"]
    assert len(set(listed)) == len(listed) == {"dijiang_paper": 6, "dijiang_paper_llama2": 11}[group]
    known, with_ours = TaskManager(), TaskManager(include_path=[str(TASKS)])
    assert set(listed) - {*known.all_subtasks, *known.all_groups} == own
    assert own <= set(with_ours.all_subtasks)
    assert group not in known.all_groups
    assert group in with_ours.all_groups


def test_race_for_middle_schools_asks_a_question_a_row(exported, tmp_path):
    """The rows have the columns of its data, which need a network."""
    import yaml

    from dijiang.integrations.lm_eval import TASKS, DijiangLM

    task = yaml.safe_load((TASKS / "race_middle.yaml").read_text())
    options = ["import numpy", "zq;;%% xx", "def f(x):", "§§§§ 7"]
    rows = [{"article": TEXT[:200], "question": "What?", "options": options, "answer": right} for right in "DAB"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
    del task["dataset_name"]
    (tmp_path / "race_middle.yaml").write_text(json.dumps(task | data))
    folder = str(exported("tiny-python"))
    arguments = ["eval", folder, "--tasks", "race_middle", "--include", str(tmp_path), "--json"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    asked = f"Article: {TEXT[:200]}\n\nQuestion: What?\nAnswer:"
    pairs = [(asked, f" {option}") for option in options]
    found = DijiangLM(dijiang.load(folder)).loglikelihood(requests("loglikelihood", *pairs))
    likely = int(np.argmax([one[0] for one in found]))
    right = np.mean([likely == "ABCD".index(row["answer"]) for row in rows])
    assert json.loads(done.stdout)["race_middle"]["acc,none"] == pytest.approx(right)


def test_the_group_of_the_paper_is_found_and_averaged(exported, tasks, tmp_path):
    """Each task with other data, which includes go before: the harness's own need a network."""
    choices = json.loads((tasks / "choices.yaml").read_text())
    names = ["piqa", "winogrande", "wsc", "arc_easy", "arc_challenge", "logiqa"]
    for number, name in enumerate(names):
        answer = {"task": name, "doc_to_target": 2 * (number % 3 > 0)}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(choices | answer))
    arguments = ["eval", str(exported("tiny-python")), "--tasks", "dijiang_paper", "--include", str(tmp_path)]
    done = CliRunner().invoke(main, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    accuracies = [found[name]["acc,none"] for name in names]
    assert len(set(accuracies)) > 1
    assert found["dijiang_paper"]["acc,none"] == pytest.approx(np.mean(accuracies))


@pytest.mark.parametrize("name", ["nothing_of_this_name", "none.yaml"])
def test_an_unknown_task_is_one_line(exported, name):
    done = CliRunner().invoke(main, ["eval", str(exported("tiny-python")), "--tasks", name])
    assert done.exit_code == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"Error: {name}: not evaluated (")
    assert "Traceback" not in done.output


def test_a_bundle_without_a_tokenizer_is_one_line(exported):
    done = CliRunner().invoke(main, ["eval", str(exported("neox-base")), "--tasks", "texts"])
    assert done.exit_code == 1
    assert "no tokenizer in the bundle" in done.stderr.splitlines()[-1]


def test_a_window_past_the_positions_is_refused(exported):
    from dijiang.integrations.lm_eval import DijiangLM

    model = dijiang.load(exported("tiny-python-published"))
    with pytest.raises(
        ValueError, match=r"max_length is 999, expected at most 512: the model's positions end there"
    ):
        DijiangLM(model, max_length=999)
    assert DijiangLM(model).max_length == model.manifest.positions_limit == 512  # as the harness's own model has
    assert np.isfinite(
        DijiangLM(model).loglikelihood_rolling(requests("loglikelihood_rolling", (TEXT[:3000],)), True)
    )


def test_the_page_does_what_it_says(page):
    assert '"acc,none": 1.0' in page("lm-eval").replace("'", '"')
