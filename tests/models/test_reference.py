"""The NumPy reference against the published code's logits, and its two forms against each other."""

import numpy as np
import pytest

from dijiang.models.load import load_checkpoint
from dijiang.models.reference import Reference

from ..conftest import GOLDEN, Golden


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_reference_meets_published_logits_in_both_forms(name):
    golden = Golden.load(name)
    reference = Reference(load_checkpoint(golden.path))
    parallel = reference.forward(golden.ids)
    recurrent = reference.forward(golden.ids, 0, reference.new_state(len(golden.ids)))
    assert golden.error(parallel) <= 2e-5  # float32 rounding of the published code
    np.testing.assert_allclose(recurrent, parallel, atol=1e-12)
