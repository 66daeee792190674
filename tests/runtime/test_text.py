"""Streaming text: whole characters only, stop strings across token borders."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dijiang
from dijiang.runtime.text import StopStrings, TextTokenizer

from ..conftest import EXAMPLES


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer(EXAMPLES / "tiny-python" / "tokenizer.json")


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


def test_broken_tokenizer_is_one_error(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(dijiang.BundleError, match="not a tokenizer"):
        TextTokenizer(tmp_path / "tokenizer.json")
