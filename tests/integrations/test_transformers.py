"""transformers' `generate()` on a bundle: its tokens are ours. `make ecosystem` runs this on 4.57, too."""

import gc
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    MaxTimeCriteria,
    StoppingCriteria,
    TextIteratorStreamer,
    pipeline,
)

from dijiang.errors import InputError
from dijiang.integrations.transformers import CACHE, DijiangConfig, DijiangForCausalLM, RecurrentCache
from dijiang.runtime.options import Generation
from dijiang.runtime.sampling import candidates
from tests.conftest import GOLDEN
from tests.fake_hub import Hub

PROMPTS = ["def main(", "x", "import os\nclass A:\n    def f(self):\n        return"]
pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default")


@pytest.fixture(scope="module")
def model(exported):
    return DijiangForCausalLM.from_pretrained(exported("tiny-python"))


def ours(model, prompt, count, **options):
    return [record.token for record in model.model.generate(prompt, max_tokens=count, **options)]


def continued(model, texts, **options):
    """New ids [B, N] of transformers."""
    given = model.tokenizer(texts, return_tensors="pt", padding=True)
    found = model.generate(**given, **options)
    return found[:, given["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens_are_those_of_model_generate(model, prompt, use_cache):
    found = continued(model, [prompt], max_new_tokens=25, do_sample=False, use_cache=use_cache)
    assert found == [ours(model, prompt, 25)]


def test_padding_on_the_left_changes_no_sequence_of_a_batch(model):
    found = continued(model, PROMPTS, max_new_tokens=20, do_sample=False)
    assert found == [ours(model, prompt, 20) for prompt in PROMPTS]


@pytest.mark.parametrize("beams", [2, 5])
def test_beams_with_states_are_beams_without(model, beams):
    options = {"max_new_tokens": 16, "num_beams": beams, "num_return_sequences": 2, "do_sample": False}
    found = continued(model, PROMPTS, use_cache=True, **options)
    assert found == continued(model, PROMPTS, use_cache=False, **options)


def test_beams_need_their_states_in_order(model, monkeypatch):
    options = {"max_new_tokens": 16, "num_beams": 5, "do_sample": False}
    right = continued(model, PROMPTS, **options)
    monkeypatch.setattr(RecurrentCache, "reorder_cache", lambda self, beams: None)
    assert continued(model, PROMPTS, **options) != right


def test_a_sampled_token_has_the_probabilities_of_our_sampler(model):
    given = model.tokenizer(PROMPTS[0], return_tensors="pt")
    settings = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}
    torch.manual_seed(1)
    found = model.generate(
        **given, max_new_tokens=12, do_sample=True, output_scores=True, return_dict_in_generate=True, **settings
    )
    state, ids = model.model.new_state(), given["input_ids"].numpy()
    for token, scores in zip(found.sequences[0, ids.shape[1] :], found.scores, strict=True):
        tokens, weights = candidates(model.model.forward(ids, state)[0], Generation(**settings))
        expected = np.zeros(model.config.vocab_size)
        expected[tokens] = weights / weights.sum()
        np.testing.assert_allclose(torch.softmax(scores[0].double(), -1).numpy(), expected, atol=1e-6)
        ids = np.array([[int(token)]])


def test_the_same_seed_samples_the_same_tokens(model):
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        drawn.append(continued(model, PROMPTS, max_new_tokens=12, do_sample=True, num_return_sequences=2))
    assert drawn[0] == drawn[1] != drawn[2]


def test_text_is_streamed(model):
    streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    given = model.tokenizer(PROMPTS[0], return_tensors="pt")
    model.generate(**given, max_new_tokens=20, do_sample=False, streamer=streamer)
    pieces = list(streamer)
    expected = "".join(record.text for record in model.model.generate(PROMPTS[0], max_tokens=20))
    assert "".join(pieces) == expected
    assert len(pieces) > 3


def test_stopping_criteria_and_stop_strings_end_the_text(model):
    class Fifth(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 8)

    options = {"max_new_tokens": 30, "do_sample": False}
    assert continued(model, ["def main("], stopping_criteria=[Fifth()], **options) == [ours(model, "def main(", 5)]
    assert len(continued(model, ["x"], stopping_criteria=[MaxTimeCriteria(0)], **options)[0]) == 1
    stopped = continued(model, ["def main("], stop_strings=["):"], tokenizer=model.tokenizer, **options)
    assert model.tokenizer.decode(stopped[0]) == "f, f):"


def test_an_end_token_ends_the_text_and_pads_the_batch(model):
    end = ours(model, "x", 4)[3]
    found = continued(model, ["x", "def main("], max_new_tokens=12, do_sample=False, eos_token_id=end)
    expected = ours(model, "x", 12, stop_tokens=[end])
    assert found[0] == expected + [0] * (len(found[1]) - len(expected))


def test_the_pad_token_of_a_checkpoint_stays(copy_of, exported):
    """transformers leaves out pad tokens by itself, unless they are end tokens."""
    bundle = copy_of(exported("tiny-python"))
    (bundle / "generation_config.json").write_text('{"eos_token_id": 0, "pad_token_id": 5}')
    model = DijiangForCausalLM.from_pretrained(bundle)
    ids = torch.tensor([[5, 5, 5, 316, 1647, 8]])
    found = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert found[0, 6:].tolist() == ours(model, ids[0, 3:].numpy(), 12)


def test_positions_and_arguments_that_a_graph_does_not_take_are_refused(exported):
    model = DijiangForCausalLM.from_pretrained(exported("neox-base"))
    ids, mask = torch.tensor([[3, 4, 5], [3, 4, 5]]), torch.tensor([[1, 1, 1], [0, 1, 1]], dtype=torch.bfloat16)
    running = torch.tensor([[0, 1, 2], [1, 0, 1]])
    expected = model(ids, attention_mask=mask).logits
    assert torch.equal(model(ids, attention_mask=mask, position_ids=running).logits, expected)
    for positions in ([[0, 1, 0]], [[1, 2, 3]]):
        with pytest.raises(ValueError, match="position_ids: other positions than the running ones"):
            model(ids, position_ids=torch.tensor(positions))
    cache = model(ids)[CACHE]
    with pytest.raises(ValueError, match="position_ids: other positions"):
        model(ids, position_ids=torch.tensor([[0, 1, 2]]), **{CACHE: cache})
    model(ids, position_ids=torch.tensor([[3, 4, 5]]), **{CACHE: cache})
    for wrong in ("inputs_embeds", "token_type_ids"):
        with pytest.raises(ValueError, match=f"{wrong}: no argument of a bundle"):
            model(ids, **{wrong: torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="a DynamicCache, expected a cache of this model"):
        model(ids, **{CACHE: DynamicCache()})


def test_ids_and_masks_of_any_layout_and_form(model):
    ids = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4], [0, 0, 9, 9]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]])
    expected = model(ids, attention_mask=mask).logits
    transposed = [tensor.t().contiguous().t() for tensor in (ids, mask)]
    found = model(transposed[0], attention_mask=transposed[1].bool(), return_dict=False)
    assert isinstance(found, tuple)
    assert torch.equal(found[0][mask.bool()], expected[mask.bool()])
    assert torch.equal(model(ids[:1].expand(3, -1)).logits, model(ids[:1]).logits.expand(3, -1, -1))
    additive = torch.where(mask == 1, 0.0, -1e9)
    with pytest.raises(InputError, match="expected 1, or 0 where a token is padding"):
        model(ids, attention_mask=additive)
    with pytest.raises(ValueError, match="position_ids: other positions than the running ones"):
        model.generate(ids, attention_mask=mask, position_ids=torch.arange(4)[None] + 50, max_new_tokens=2)


@pytest.mark.skipif(not hasattr(GenerationMixin, "generate_batch"), reason="transformers 4 has none")
def test_continuous_batching_is_refused(model):
    with pytest.raises(ValueError, match="pages keys and values, a bundle has none"):
        model.generate_batch([[1, 2, 3]])
    with pytest.raises(ValueError, match="pages keys and values, a bundle has none"):
        model.init_continuous_batching()


def test_a_cache_goes_on_where_it_was(model):
    given = model.tokenizer("def main(", return_tensors="pt")
    first = model.generate(**given, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    cache = first[CACHE]
    assert cache.state.nbytes == model.model.new_state().nbytes
    second = model.generate(first.sequences, max_new_tokens=6, do_sample=False, **{CACHE: cache})
    assert second[0].tolist()[3:] == ours(model, "def main(", 12)
    with pytest.raises(ValueError, match=r"a cache of 14 tokens and 3 input ids, expected .* more ids"):
        model.generate(given["input_ids"], max_new_tokens=2, **{CACHE: cache})


def test_positions_end_as_in_model_generate(exported):
    model = DijiangForCausalLM.from_pretrained(exported("neox-trained-decay"))
    limit = model.model.manifest.positions_limit
    prompt = 1 + np.arange(limit - 5)[None] % (model.config.vocab_size - 1)
    expected = ours(model, prompt[0], 50, ignore_eos=True)
    found = model.generate(torch.from_numpy(prompt), max_new_tokens=50, do_sample=False, eos_token_id=None)
    assert found[0, limit - 5 :].tolist() == expected
    assert len(expected) == 6


def test_padded_batch_ends_where_its_first_positions_end(exported):
    model = DijiangForCausalLM.from_pretrained(exported("neox-trained-decay"))
    limit = model.model.manifest.positions_limit
    ids, mask = torch.arange(3, 23).reshape(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[1, :4] = 0
    model.generation_config.eos_token_id = None
    found = model.generate(ids, attention_mask=mask, max_new_tokens=2 * limit, do_sample=False)
    assert found.shape == (2, limit + 1)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"prompt_lookup_num_tokens": 3}, "assisted generation is not supported with stateful models"),
        ({"assistant_model": True}, "assisted generation is not supported with stateful models"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions: a bundle gives logits"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states: a bundle gives"),
        ({"inputs_embeds": torch.zeros(1, 2, 4)}, "inputs_embeds"),
        ({"nonsense": 1}, "nonsense"),
        ({"streamer": True, "num_beams": 2}, "streamer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_done_is_a_value_error(model, options, reason):
    options = {name: model if name == "assistant_model" else value for name, value in options.items()}
    with pytest.raises(ValueError, match=reason):
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, **options)


def test_a_pipeline_generates_from_a_batch(model):
    pipe = pipeline("text-generation", model=model, tokenizer=model.tokenizer)
    found = pipe(PROMPTS, max_new_tokens=10, do_sample=False, batch_size=2, return_full_text=False)
    expected = ["".join(r.text for r in model.model.generate(prompt, max_tokens=10)) for prompt in PROMPTS]
    assert [one[0]["generated_text"] for one in found] == expected


def test_all_logits_are_those_of_forward(model):
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    found = model(ids).logits
    np.testing.assert_array_equal(
        found, model.model.forward(ids.numpy(), model.model.new_state(2), all_logits=True)
    )
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, -1])).logits, found[:, [0, -1]])
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, found[:, -2:])
    for labels in (ids, torch.tensor([[0]])):  # a zero is equal to False
        with pytest.raises(ValueError, match="labels: a bundle gives logits only"):
            model(ids, labels=labels)
    torch.testing.assert_close(model(ids, logits_to_keep=1).logits, found[:, -1:], atol=2e-5, rtol=0)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])  # columns count, on whatever side the padding is
    for kept in (1, 2):
        padded = model(ids, attention_mask=mask, logits_to_keep=kept).logits
        assert torch.equal(padded, model(ids, attention_mask=mask).logits[:, -kept:])


def test_a_checkpoint_is_exported_and_gone_afterwards(model):
    loaded = DijiangForCausalLM.from_pretrained(GOLDEN["neox-base"], precision="int8")
    folder = loaded.model.bundle.path
    assert loaded.model.manifest.recipe.precision == "int8"
    found = loaded.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False)
    assert found[0, 3:].tolist() == ours(loaded, [1, 2, 3], 5)
    del loaded
    gc.collect()
    assert not folder.exists()
    with pytest.raises(ValueError, match="it has a precision of its own"):
        DijiangForCausalLM.from_pretrained(model.model.bundle.path, precision="int8")


CODE = """
import torch
from dijiang.integrations.transformers import DijiangForCausalLM as Model
for name, more in {"org/bundle": {}, "org/checkpoint": {"precision": "int8", "revision": "main"}}.items():
    model = Model.from_pretrained(name, **more)
    ids = model.tokenizer("x", return_tensors="pt").input_ids if model.model.has_tokenizer else torch.tensor([[1]])
    print(model.model.manifest.recipe.precision, model.generate(ids, max_new_tokens=3).shape)
"""


def test_models_of_the_hub_are_loaded_by_their_names(exported, tmp_path):
    hub = Hub()
    hub.add("org/bundle", exported("tiny-python"))
    hub.add("org/checkpoint", GOLDEN["neox-base"])
    program = [sys.executable, "-c", CODE]
    done = subprocess.run(program, env=hub.variables(tmp_path), capture_output=True, text=True, check=False)
    hub.close()
    assert done.stdout.splitlines() == ["fp32 torch.Size([1, 4])", "int8 torch.Size([1, 4])"], done.stderr


def test_a_model_is_saved_as_the_bundle_that_it_is(model, tmp_path):
    model.save_pretrained(tmp_path / "new")
    again = DijiangForCausalLM.from_pretrained(tmp_path / "new")
    assert continued(again, ["x"], max_new_tokens=5) == continued(model, ["x"], max_new_tokens=5)
    again.generation_config.repetition_penalty = 1.3
    again.save_pretrained(tmp_path / "changed", safe_serialization=True)
    changed = DijiangForCausalLM.from_pretrained(tmp_path / "changed")
    assert changed.generation_config.repetition_penalty == 1.3
    with pytest.raises(ValueError, match=r"push_to_hub: .* is only written here; hf upload"):
        model.save_pretrained(tmp_path / "pushed", push_to_hub=True)
    assert not (tmp_path / "pushed").exists()
    with pytest.raises(ValueError, match="is not empty; bundles are never overwritten"):
        model.save_pretrained(tmp_path / "new")


def test_transformers_knows_the_class(model):
    assert AutoModelForCausalLM._model_mapping[DijiangConfig] is DijiangForCausalLM


@pytest.mark.timing
def test_a_token_takes_at_most_a_millisecond_more_than_ours(model):
    def seconds(run):
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    ids, count = torch.tensor([[316, 1647, 8]]), 300
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    theirs = min(seconds(lambda: model.generate(ids, **options)) for _ in range(5))
    own = min(seconds(lambda: ours(model, ids[0].numpy(), count, ignore_eos=True)) for _ in range(5))
    print(f"\n{1e3 * theirs / count:.3f} ms a token through transformers, {1e3 * own / count:.3f} ms ours")
    assert theirs - own < 1e-3 * count


@pytest.mark.ecosystem  # its last command is optimum's
def test_the_page_does_what_it_says(page):
    page("transformers")
