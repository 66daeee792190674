"""Streaming text: whole characters only, stop strings across token borders."""

import json
import random
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

import dijiang
from dijiang.runtime.sequence import Limits, Sequence
from dijiang.runtime.text import StopStrings, TextTokenizer
from tests.conftest import EXAMPLES, with_start_token
from tests.random_tokenizers import CORPUS, KINDS, sequence, streamed
from tests.random_tokenizers import tokenizer as tokenizer_of


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.read(EXAMPLES / "tiny-python" / "tokenizer.json")


@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
def test_streamed_pieces_make_the_text_and_are_never_half_a_character(tokenizer, text):
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids) == text
    if "�" not in text:
        assert not any("�" in piece for piece in pieces)


def test_character_of_several_tokens_comes_out_once_and_whole(tokenizer):
    ids = tokenizer.encode("漢")
    assert len(ids) == 3  # its UTF-8 bytes
    stream = tokenizer.stream()
    assert [stream.push(token) for token in ids] == ["", "", "漢"]


def test_incomplete_character_at_the_end_is_flushed_as_a_replacement(tokenizer):
    stream = tokenizer.stream()
    assert stream.push(tokenizer.encode("漢")[0]) == ""
    assert stream.flush() == "�"
    assert stream.flush() == ""


@given(ids=st.lists(st.integers(0, 2047), max_size=12))
def test_any_tokens_stream_as_they_read_together(tokenizer, ids):
    stream = tokenizer.stream()
    assert "".join(stream.push(token) for token in ids) + stream.flush() == tokenizer.decode(ids)


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory):
    """A tokenizer as LLaMA's: token b is the byte b, then come x, y and a z with a space before it."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"x": 256, "y": 257, "▁z": 258}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(file))
    return TextTokenizer.read(file)


@given(ids=st.lists(st.integers(128, 258) | st.integers(256, 258), max_size=12))
def test_bytes_that_are_no_character_stop_no_stream(byte_fallback, ids):
    stream = byte_fallback.stream([256])  # as after a prompt: the first space stays
    text = "".join(stream.push(token) for token in ids) + stream.flush()
    assert [c for c in text if c in "xy z"] == list(
        "".join({256: "x", 257: "y", 258: " z"}.get(i, "") for i in ids)
    )
    whole = byte_fallback.decode([256, *ids])
    assert "�" in whole or "x" + text == whole


def test_bytes_wait_for_their_end_because_one_that_fits_no_character_takes_back_the_others(byte_fallback):
    stream, ids = byte_fallback.stream(), [256, 0xC9, 0x94, 0x85, 258, 0xC9, 0x94, 257]
    assert [stream.push(token) for token in ids] == ["x", "", "", "", "��� z", "", "", "ɔy"]
    assert byte_fallback.decode(ids) == "x��� zɔy"


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_text_is_decoded_text_of_every_kind_of_tokenizer(kind):
    """`make fuzz` does ten thousand of each."""
    draw = random.Random(kind)
    for _ in range(200):
        ids = sequence(kind, draw)
        assert streamed(kind, ids) == tokenizer_of(kind).decode(ids), ids


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_tokens_make_the_text_of_every_kind_of_tokenizer(kind):
    draw, known = random.Random(kind), tokenizer_of(kind)
    seen = 0
    for text in (*CORPUS, *(known.decode(sequence(kind, draw)) for _ in range(200))):
        ids = [token for token in known.encode(text) if token not in known.special]
        whole = known.decode(ids)
        if "�" not in whole:
            seen += bool(whole)
            assert b"".join(map(known.piece, ids)).decode().lstrip(" ") == whole.lstrip(" "), ids
    assert seen > 20
    assert {known.piece(token) for token in known.special} == {known.name(t).encode() for t in known.special}


def test_stop_string_in_bytes_that_waited_until_the_last_token_is_a_stop(byte_fallback):
    """LLaMA's bytes wait for the end of their character, here for the end of the text."""
    token = byte_fallback._tokenizer.token_to_id("<0x0A>")
    limits, text = Limits(1), byte_fallback.stream()
    sequence = Sequence(limits, StopStrings(["\n"]), None, text, prompt_tokens=1, started=0.0)
    record = sequence.push(token, 1)
    assert (record.text, record.finish_reason) == ("", "stop")


def test_what_never_becomes_a_character_does_not_pile_up(tokenizer, byte_fallback):
    stream = byte_fallback.stream()
    pieces = [stream.push(0x85) for _ in range(1000)]
    assert "".join(pieces) + stream.flush() == "�" * 1000
    assert max(map(len, pieces)) == stream.WAITING
    special = tokenizer.stream()
    assert {special.push(0) for _ in range(1000)} == {special.flush()} == {""}


def test_prompt_is_not_repeated(tokenizer):
    stream = tokenizer.stream(tokenizer.encode("def main("))
    assert "".join(stream.push(token) for token in tokenizer.encode("self):")) == "self):"


@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    size=st.integers(1, 5),
)
def test_stop_strings_cut_where_a_search_of_the_whole_text_would(text, stops, size):
    watch, out, met = StopStrings(stops), "", False
    for start in range(0, len(text), size):
        piece, met = watch.push(text[start : start + size])
        out += piece
        if met:
            break
    out += "" if met else watch.flush()
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert (out, met) == (text, False)
    else:
        assert met
        assert any(out + stop == text[: len(out) + len(stop)] for stop in stops)
        assert not any(stop in out for stop in stops)


def test_a_sequence_starts_as_the_tokenizer_says_and_a_text_is_never_cut_or_padded(tmp_path, tokenizer):
    stored = with_start_token(EXAMPLES / "tiny-python" / "tokenizer.json")
    stored.enable_truncation(4)
    stored.enable_padding(length=64)
    stored.save(str(tmp_path / "tokenizer.json"))
    with_start, text = TextTokenizer.read(tmp_path / "tokenizer.json"), "def main(arguments):"
    assert len(tokenizer.encode(text)) > 4
    assert with_start.encode(text) == [0, *tokenizer.encode(text)]
    assert with_start.encode(text, start=False) == tokenizer.encode(text)
    assert (with_start.encode(""), tokenizer.encode("")) == ([0], [])


def made(**changes):
    """The bytes of a small tokenizer."""
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return json.dumps({"version": "1.0", "added_tokens": [], "model": model} | parts | changes).encode()


BROKEN = {
    "other": b'{"model": 1}',
    "no text": b"\xff\xfe",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "unknown type": made(model={"type": "Tomorrow"}),
    "panic": made(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_tokenizer_is_one_error(case):
    with pytest.raises(dijiang.BundleError, match=r"t\.json: (not a tokenizer \(|a pointer of Git LFS)") as caught:
        TextTokenizer(BROKEN[case], Path("t.json"))
    assert "\n" not in str(caught.value)


UNREADABLE = {
    "no unknown token": made(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}),
    "catastrophic": made(normalizer={"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_text_that_the_tokenizer_dies_of_is_one_error(case):
    start = time.monotonic()
    with pytest.raises(dijiang.InputError, match="the tokenizer cannot read the text"):
        TextTokenizer(UNREADABLE[case], Path("t.json")).encode("a" * 28 + "!")
    assert time.monotonic() - start < 5


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


EXPLOSIVE = {
    "one rule": {"normalizer": replace({"String": "a"}, "b" * 5000)},
    "rules in turn": {
        "normalizer": {"type": "Sequence", "normalizers": [replace({"String": "a"}, "aaaaaaaaaa")] * 9},
    },
    "expressions": {"normalizer": {"type": "Sequence", "normalizers": [replace({"Regex": ".?"}, "a" * 40)] * 2}},
    "decoder": {"decoder": {"type": "Sequence", "decoders": [replace({"String": "a"}, "a" * 101)] * 2}},
}


@pytest.mark.parametrize("case", EXPLOSIVE)
def test_rules_that_make_thousands_of_characters_of_one_are_refused(case):
    with pytest.raises(dijiang.BundleError, match=r"its rules make up to .* characters of one") as caught:
        TextTokenizer(made(**EXPLOSIVE[case]), Path("t.json"))
    assert "\n" not in str(caught.value)


def test_rules_that_shorten_a_text_or_keep_its_length_are_no_explosion():
    rules = [replace({"String": "''"}, '"'), replace({"String": " "}, "▁"), replace({"Regex": " {2,}"}, "▁")]
    part = {"type": "Sequence", "normalizers": [*rules * 3, {"type": "Prepend", "prepend": "▁"}]}
    assert TextTokenizer(made(normalizer=part), None).encode("a") == [0]


def test_expression_that_is_slow_but_never_too_slow_for_the_library_is_stopped(monkeypatch):
    """Each piece of the text stays below the bound of the library."""
    monkeypatch.setattr("dijiang.models.tokenizer.PATIENCE", 0.3)
    split = {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False}
    slow = TextTokenizer(made(pre_tokenizer=split), None)
    start = time.monotonic()
    with pytest.raises(dijiang.InputError, match=r"cannot read the text \(it took more than 0 s\)"):
        slow.encode(("a" * 20 + "-") * 60)
    assert time.monotonic() - start < 3
