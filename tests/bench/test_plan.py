"""Names, lists and ranges as llama-bench has them; bad sizes do not end the others."""

import pytest

from dijiang.bench.matrix import Test, plan_tests


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("512", [512]),
        ("1,63,500", [1, 63, 500]),
        ("1-4", [1, 2, 3, 4]),
        ("128-512+128", [128, 256, 384, 512]),
        ("1-16*2", [1, 2, 4, 8, 16]),
        ("8,1-10+4,8", [8, 1, 5, 9]),
    ],
)
def test_sizes(text, values):
    tests, failures = plan_tests(text, "none")
    assert [t.tokens for t in tests] == values
    assert failures == []


def test_product_has_every_combination_once():
    tests, failures = plan_tests("63", "8,9", "0,500", "1,3", "1-2")
    assert len(set(tests)) == len(tests) == 3 * 2 * 2 * 2
    assert failures == []
    assert Test("tg", 9, depth=500, batch=3, threads=2) in tests


@pytest.mark.parametrize(
    ("test", "name", "label"),
    [
        (Test("pp", 512), "pp512", "pp512, batch 1"),
        (Test("tg", 128, 2048, 16, 2), "tg128 @ d2048", "tg128 @ d2048, batch 16, 2 threads"),
    ],
    ids=["pp", "tg"],
)
def test_names(test, name, label):
    assert (test.name, test.label) == (name, label)


@pytest.mark.parametrize("bad", ["0", "-5", "x", "", "8-4", "4-8*1", "0-8*2", "1-100000", "4-8/2"])
def test_a_bad_size_is_one_failure_and_the_others_stay(bad):
    tests, failures = plan_tests(f"{bad},7", "none")
    assert [t.tokens for t in tests] == [7]
    (failure,) = failures
    assert "-p" in failure["message"]
    assert "expected" in failure["message"]


def test_depth_may_be_zero_but_not_negative():
    tests, failures = plan_tests("none", "4", "0,-1")
    assert [t.depth for t in tests] == [0]
    assert len(failures) == 1


def test_nothing_to_do_is_a_failure():
    tests, (failure,) = plan_tests("none", "none")
    assert tests == []
    assert "no tests" in failure["message"]
