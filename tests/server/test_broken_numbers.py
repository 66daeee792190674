"""A model whose numbers leave the range of its types: every way to ask for its text says so."""

import pytest

import dijiang
from tests.parity.test_extremes import changed
from tests.server.serving import events, running

#: Of requests, beside the prompt.
ASKED = {
    "sampled": {},
    "greedy": {"temperature": 0},
    "with logprobs": {"temperature": 0, "logprobs": 2},
    "of the likeliest": {"top_k": 3, "seed": 1},
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    changed(folder / "c", "llama", r"lm_head", 3e38)
    dijiang.export(folder / "c", folder / "b", verify=False)
    with running({"b": dijiang.load(folder / "b", threads=1)}, slots=2) as found:
        yield found


@pytest.mark.parametrize("options", ASKED.values(), ids=ASKED)
def test_numbers_out_of_range_are_one_line_and_no_text(broken, options):
    body = {"model": "b", "prompt": [1, 2, 3], "max_tokens": 3, **options}
    status, _, value = broken.ask("/v1/completions", body)
    assert status == 503
    assert "hold NaN or infinity" in value["error"]["message"]
    streamed = events(broken.ask("/v1/completions", body | {"stream": True})[2])
    assert [set(one) for one in streamed] == [{"error"}]
    assert broken.ask("/readyz")[0] == 200  # another prompt may do


def test_scores_of_a_prompt_are_none_either(broken):
    body = {"model": "b", "prompt": [1, 2, 3], "echo": True, "logprobs": 0, "max_tokens": 0}
    status, _, value = broken.ask("/v1/completions", body)
    assert status == 503
    assert "the logits at position 0 hold NaN or infinity" in value["error"]["message"]
