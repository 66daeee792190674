"""Two served models, for the tests of one file."""

import openai
import pytest

import dijiang
from tests.conftest import GOLDEN, TOOLED
from tests.server.serving import KEY, running


@pytest.fixture(scope="session")
def bundles(chatty, tmp_path_factory):
    """tiny: with a chat template.  tooled: with one that knows tools.  other: of the shape, without a tokenizer."""
    (chatty.parent / "checkpoint" / "chat_template.jinja").write_text(TOOLED)
    dijiang.export(
        chatty.parent / "checkpoint", chatty.parent / "tooled", precision="int8", calibration_tokens=0, verify=False
    )
    checkpoint = tmp_path_factory.mktemp("other")
    for name in ("config.json", "model.safetensors"):
        (checkpoint / name).write_bytes((GOLDEN["tiny-python-published"] / name).read_bytes())
    dijiang.export(checkpoint, chatty.parent / "other", precision="int8", calibration_tokens=0, verify=False)
    return chatty.parent


@pytest.fixture(scope="module")
def models(bundles):
    return {name: dijiang.load(bundles / name, threads=1) for name in ("tiny", "other", "tooled")}


@pytest.fixture(scope="module")
def model(bundles):
    return dijiang.load(bundles / "tiny", threads=1)


@pytest.fixture(scope="module")
def served(models):
    with running(models, slots=4, queue=40, seal_key=KEY, patience=5.0) as found:
        yield found


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=served.url, api_key="none", max_retries=0) as made:
        yield made
