"""The WebGPU provider, its kernels executed."""

import pytest

import dijiang
from tests.conftest import EXAMPLES, GOLDEN, Golden
from tests.graph.test_families import NAMED, check_every_graph
from tests.graph.test_golden import PADDED, SIDES, SPLITS, check_logits, check_padding

TINY = EXAMPLES / "tiny-python"
#: Tokens that a greedy text has in common with the CPU's.
TOKENS = 1000


@pytest.fixture(scope="module")
def loaded(exported):
    """loaded(checkpoint, **options): the bundle on WebGPU, loaded once."""
    models = {}

    def get(name, **options):
        key = (name, *sorted(options.items()))
        if key not in models:
            models[key] = dijiang.load(exported(name, **options), provider="webgpu")
        return models[key]

    return get


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_bundle_meets_published_logits(loaded, name, split):
    check_logits(loaded(name), Golden.load(name), split)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", PADDED)
def test_padded_batch_meets_published_logits(loaded, name, side):
    check_padding(loaded(name), Golden.load(name), side)


@pytest.mark.parametrize("trained", [False, True], ids=["analytic", "tabled"])
@pytest.mark.parametrize("name", NAMED)
def test_named_variant_meets_the_reference(name, trained):
    check_every_graph(NAMED[name], trained, seed=1, runs=[("webgpu", "webgpu")])


def test_greedy_text_is_the_cpus_from_a_captured_step(loaded):
    model = loaded("tiny-python")
    assert model.session.cuda_graph
    cpu = dijiang.load(model.bundle.path, provider="cpu")
    found, expected = (
        [record.token for record in one.generate("def main(", max_tokens=TOKENS, ignore_eos=True)]
        for one in (model, cpu)
    )
    assert found == expected
    assert len(found) == TOKENS


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_precision_meets_its_gates(loaded, precision):
    bundle = loaded("tiny-python", precision=precision).bundle.path
    report = dijiang.verify(bundle, TINY, text=TINY / "held_out.txt", tokens=1024, provider="webgpu", store=False)
    assert report.failures == ()
    assert len(report.gates) >= 2
    print(precision, report.metrics)
