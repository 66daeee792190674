"""n tokens and m more are n + m tokens: in ids and in text, with any options, wherever the cut is."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers

import dijiang
from dijiang.runtime.text import TextTokenizer

LENGTH = 16
OPTIONS = {
    "greedy": {},
    "penalty": {"repetition_penalty": 1.7},
    "counted": {"presence_penalty": 0.7, "frequency_penalty": 0.4, "temperature": 0.8, "seed": 2},
    "drawn": {"temperature": 2.5, "seed": 11},
    "filtered": {"temperature": 1.3, "top_k": 50, "top_p": 0.9, "seed": 5, "repetition_penalty": 1.2},
    "stopped": {"temperature": 1.5, "seed": 3, "stop": ["ing", " the", "():\n", "\ufffd\ufffd"]},
}


def spaced():
    """A tokenizer as LLaMA's: bytes, and words with a space that it also puts before any text."""
    words = [*"xyz.\n", "▁", *(f"▁{a}{b}" for a in "abcdefghijklmnopqrst" for b in "aeiouxyz" * 11)]
    names = [f"<0x{byte:02X}>" for byte in range(256)] + list(dict.fromkeys(words))
    vocab = {name: i for i, name in enumerate(names)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return TextTokenizer(made.to_str().encode(), None)


@pytest.fixture(scope="module", params=["byte-level", "spaced"])
def model(request, exported):
    loaded = dijiang.load(exported("tiny-python", precision="int8"), threads=1)
    if request.param == "spaced":
        loaded._tokenizer = spaced()
    return loaded


def told(records):
    """Ids, text and the last reason of a stream of records."""
    records = list(records)
    return [r.token for r in records], "".join(r.text for r in records), records[-1].finish_reason


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_any_split_of_a_generation_is_the_whole(model, options):
    """100 splits of every kind of options and tokenizer."""
    random = np.random.default_rng(len(options))
    for _ in range(20):
        prompt = random.integers(0, model.spec.vocab_size, random.integers(1, 9)).tolist()
        ids, text, reason = told(
            model.generate(prompt, max_tokens=LENGTH, state=model.new_state(), ignore_eos=True, **options)
        )
        for _ in range(5):
            cuts = np.sort(random.choice(np.arange(1, LENGTH), random.integers(1, 4), replace=False))
            counts = np.diff([0, *cuts, LENGTH]).tolist()
            state, start, found = model.new_state(), prompt, ([], "", None)
            for count in counts:
                part = told(model.generate(start, max_tokens=count, state=state, ignore_eos=True, **options))
                found = (found[0] + part[0], found[1] + part[1], part[2])
                start = None
                if part[2] != "limit":
                    break
            assert found == (ids, text, reason)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_prompt_may_be_fed_before(model, options):
    random = np.random.default_rng(2)
    for _ in range(5):
        prompt = random.integers(0, model.spec.vocab_size, 9).tolist()
        whole = told(model.generate(prompt, max_tokens=LENGTH, ignore_eos=True, **options))
        for cut in range(1, 9):
            state = model.new_state()
            model.forward([prompt[:cut]], state)
            part = told(
                model.generate(prompt[cut:], max_tokens=LENGTH, state=state.clone(), ignore_eos=True, **options)
            )
            # A caller's state keeps what is held back at the end.
            assert (part[0], part[2]) == (whole[0], whole[2])
            assert whole[1].startswith(part[1])


def test_a_split_may_go_through_a_file(model, tmp_path):
    options = {"temperature": 2.5, "seed": 11, "repetition_penalty": 1.3, "frequency_penalty": 1.5, "stop": ["zz"]}
    state, cut = model.new_state(), model.new_state()
    whole = told(model.generate([5, 6], max_tokens=30, state=state, ignore_eos=True, **options))
    found = told(model.generate([5, 6], max_tokens=7, state=cut, ignore_eos=True, **options))
    for count in (1, 2, 20):
        cut.save(tmp_path / "s")
        part = told(
            model.generate(
                None, max_tokens=count, state=dijiang.State.load(tmp_path / "s"), ignore_eos=True, **options
            )
        )
        next_cut = dijiang.State.load(tmp_path / "s")
        again = told(model.generate(None, max_tokens=count, state=next_cut, ignore_eos=True, **options))
        assert part == again
        found, cut = (found[0] + part[0], found[1] + part[1], part[2]), next_cut
    assert found == whole


def test_character_that_the_seam_cuts_is_whole(exported):
    model = dijiang.load(exported("tiny-python"))
    ids = model.tokenizer.encode("# café")
    half, rest = ids[:-1], ids[-1]
    stream = model.tokenizer.stream(half)
    assert stream.push(rest) == "é"
    state = model.new_state()
    model.forward([half], state)
    assert model.tokenizer.stream(state.last[0][state.last[0] >= 0].tolist()).push(rest) == "é"


def test_two_turns_lose_no_token(model):
    state = model.new_state()
    first = told(model.generate([1, 2, 3], max_tokens=4, state=state))[0]
    second = told(model.generate([9, 8], max_tokens=4, state=state))[0]
    twin = told(model.generate([1, 2, 3, *first, 9, 8], max_tokens=4))[0]
    assert second == twin


def test_a_text_that_goes_on_gets_no_space_of_its_own():
    tokenizer = spaced()
    one, two = tokenizer.encode("xy ab"), tokenizer.encode("z.xy", start=False)
    assert tokenizer.decode([*one, *two]) == "xy abz.xy"
    assert tokenizer.encode("z", start=True) != tokenizer.encode("z", start=False)


def test_where_there_is_no_text_none_is_open_or_held_back(exported):
    model = dijiang.load(exported("neox-base"))
    state = model.new_state()
    assert len(list(model.generate([1, 2], max_tokens=3, state=state))) == 3
    seam = state.seam()
    assert (seam.at, seam.open, seam.held, seam.counts) == (4, 0, "", b"")
