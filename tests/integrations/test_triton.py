"""What `dijiang deploy triton` writes: NVIDIA's server reads it, and whoever follows it gets our tokens.

The server that installs here has the backend for Python, and serves that. It has none for onnxruntime: there it
reads and checks the configuration, and `Follower` runs the graph. It knows nothing but the configuration: types,
shapes, and which output is the state of which input.
"""

import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner

import dijiang
from dijiang.cli import main

pytestmark = pytest.mark.ecosystem
TYPES = {"TYPE_INT64": np.int64, "TYPE_FP32": np.float32}
PROMPTS = ["def main(", "import os\nclass A:"]


def deploy(*arguments):
    return CliRunner().invoke(main, ["deploy", "triton", *map(str, arguments)])


def parsed(folder):
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def kind(value):
    from tritonclient.grpc import model_config_pb2

    return TYPES[model_config_pb2.DataType.Name(value)]


class Follower:
    """Keeps a state for each sequence, as a configuration says."""

    def __init__(self, folder):
        self.config = parsed(folder)
        self.session = onnxruntime.InferenceSession(folder / "1" / "model.onnx", providers=["CPUExecutionProvider"])
        self.states = {}

    def infer(self, requests):
        """{sequence: (ids, whether it starts)} of one length -> {sequence: outputs}, in one step."""
        assert len(requests) <= self.config.max_batch_size
        states = self.config.sequence_batching.state
        for sequence, (_, starts) in requests.items():
            if starts:
                assert all(state.initial_state[0].zero_data for state in states)
                self.states[sequence] = [np.zeros(state.dims, kind(state.data_type)) for state in states]
        feeds = {"input_ids": np.array([ids for ids, _ in requests.values()], kind(self.config.input[0].data_type))}
        for at, state in enumerate(states):
            feeds[state.input_name] = np.stack([self.states[sequence][at] for sequence in requests])
        names = [output.name for output in self.config.output]
        found = self.session.run([*names, *(state.output_name for state in states)], feeds)
        for row, sequence in enumerate(requests):
            self.states[sequence] = [value[row] for value in found[len(names) :]]
        return {
            sequence: {name: value[row] for name, value in zip(names, found, strict=False)}
            for row, sequence in enumerate(requests)
        }


@pytest.fixture(scope="module")
def running():
    """See triton_server: what it imports is installed where these tests run."""
    from tests.integrations.triton_server import running

    return running


@pytest.fixture(scope="module")
def folder(exported, tmp_path_factory):
    target = tmp_path_factory.mktemp("triton") / "repository"
    done = deploy(exported("tiny-python"), "-o", target, "--name", "tiny", "--batch", "4", "--candidates", "9")
    assert done.exit_code == 0, done.output
    return target / "tiny"


def test_the_configuration_is_that_of_the_graph(folder):
    config, graph = parsed(folder), onnx.load(folder / "1" / "model.onnx", load_external_data=False).graph
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", "onnxruntime", 4)
    assert config.sequence_batching.oldest.max_candidate_sequences == 9
    states = config.sequence_batching.state
    said = {one.name: one for one in (*config.input, *config.output)}
    said |= {name: state for state in states for name in (state.input_name, state.output_name)}
    values = {value.name: value.type.tensor_type for value in (*graph.input, *graph.output)}
    assert values.keys() == said.keys()
    for name, value in values.items():
        shape = [dimension.dim_value or -1 for dimension in value.shape.dim[1:]]
        expected = [1 if size == -1 and name in ("next_tokens", "logits") else size for size in shape]
        assert list(said[name].dims) == expected, name
        assert onnx.helper.tensor_dtype_to_np_dtype(value.elem_type) == kind(said[name].data_type)
    assert all(list(state.initial_state[0].dims) == list(state.dims) for state in states)


def test_sequences_that_take_turns_are_ours(folder, exported):
    model, follower = dijiang.load(exported("tiny-python")), Follower(folder)
    expected = [[r.token for r in model.generate(prompt, max_tokens=20)] for prompt in PROMPTS]
    found = [[], []]
    for number, prompt in enumerate(PROMPTS):  # prompts of other lengths cannot share a step
        answer = follower.infer({number: (model.tokenizer.encode(prompt), True)})
        found[number].append(int(answer[number]["next_tokens"][0]))
    found[0].append(int(follower.infer({0: (found[0][-1:], False)})[0]["next_tokens"][0]))
    for _ in range(18):  # in one step, at other positions
        answer = follower.infer({number: (found[number][-1:], False) for number in (1, 0)})
        for number in (0, 1):
            found[number].append(int(answer[number]["next_tokens"][0]))
    assert [tokens[:19] for tokens in found] == [tokens[:19] for tokens in expected]
    again = follower.infer({0: (model.tokenizer.encode(PROMPTS[0]), True)})[0]  # a start forgets
    assert int(again["next_tokens"][0]) == expected[0][0]
    assert again["logits"].shape == (1, model.spec.vocab_size)


def test_int8_is_written_too(exported, tmp_path):
    bundle = exported("tiny-python", precision="int8")
    assert deploy(bundle, "-o", tmp_path / "new").exit_code == 0
    model, follower = dijiang.load(bundle), Follower(tmp_path / "new" / "dijiang")
    token = int(follower.infer({5: (model.tokenizer.encode("x"), True)})[5]["next_tokens"][0])
    assert token == next(model.generate("x", max_tokens=1)).token


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_ids_beyond_the_vocabulary_are_refused(exported, tmp_path, precision):
    """An embedding in blocks would give the numbers that lie behind it."""
    bundle = exported("tiny-python", precision=precision)
    done = deploy(bundle, "-o", tmp_path / "new")
    assert "or newer, and graph optimizations that are on" in done.stderr
    follower, vocab = Follower(tmp_path / "new" / "dijiang"), dijiang.load(bundle).spec.vocab_size
    follower.infer({5: ([vocab - 1, 3], True)})
    for wrong in (vocab, 10**9, -1, -vocab, -(10**9)):
        with pytest.raises(Exception, match="out of data bounds"):
            follower.infer({5: ([wrong, 3], True)})


def test_bundle_that_no_cpu_runs_has_instances_on_a_gpu(exported, tmp_path):
    assert deploy(exported("neox-base", precision="bf16"), "-o", tmp_path / "new").exit_code == 0
    assert "kind: KIND_GPU" in (tmp_path / "new" / "dijiang" / "config.pbtxt").read_text()


def test_the_server_takes_the_configuration_and_lacks_only_the_backend(running, folder, tmp_path):
    with running(folder.parent, tmp_path) as client:
        (found,) = client.get_model_repository_index().models
    assert (found.name, found.version) == ("tiny", "1")
    assert "unable to find backend library for backend 'onnxruntime'" in found.reason


def test_the_server_refuses_what_is_no_configuration(running, folder, tmp_path):
    """So the test above can fail."""
    copy = tmp_path / "repository"
    shutil.copytree(folder, copy / "tiny")
    file = copy / "tiny" / "config.pbtxt"
    file.write_text(file.read_text().replace("TYPE_FP32", "TYPE_FP33"))
    (tmp_path / "server").mkdir()
    with running(copy, tmp_path / "server") as client:
        (found,) = client.get_model_repository_index().models
    assert (found.name, found.version) == ("tiny", "")


@pytest.fixture(scope="module", params=["fp32", "int8"])
def served(request, running, exported, tmp_path_factory):
    """A client of a server with the Python backend, and the model that it serves."""
    bundle, target = exported("tiny-python", precision=request.param), tmp_path_factory.mktemp("python")
    done = deploy(bundle, "-o", target / "repository", "--backend", "python", "--batch", "4", "--candidates", "9")
    assert done.exit_code == 0, done.output
    (target / "server").mkdir()
    with running(target / "repository", target / "server") as client:
        assert client.is_model_ready("dijiang"), (target / "server" / "log").read_text()[-3000:]
        yield client, dijiang.load(bundle)


def ask(client, ids, sequence, *, first=False, last=False):
    from tritonclient.grpc import InferInput

    tokens = InferInput("input_ids", [1, len(ids)], "INT64")
    tokens.set_data_from_numpy(np.array([ids], np.int64))
    return client.infer("dijiang", [tokens], sequence_id=sequence, sequence_start=first, sequence_end=last)


def test_sequences_at_once_are_ours(served):
    client, model = served
    prompts = [f"def f{number}(x):\n    return x" + " + 1" * number for number in range(6)]
    expected = [[r.token for r in model.generate(p, max_tokens=12, ignore_eos=True)] for p in prompts]

    def talk(number):
        ids, found = model.tokenizer.encode(prompts[number]), []
        for count in range(12):
            answer = ask(client, ids, number + 1, first=count == 0, last=count == 11)
            ids = [int(answer.as_numpy("next_tokens")[0, 0])]
            found += ids
        assert answer.as_numpy("logits").shape == (1, 1, model.spec.vocab_size)
        return found

    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(talk, range(len(prompts)))) == expected


def test_bad_request_is_one_line_and_harms_no_other(served):
    from tritonclient.utils import InferenceServerException

    client, model = served
    ask(client, [5, 6], 50, first=True)
    with pytest.raises(InferenceServerException, match="token id 99999 is out of range, expected 0 to 2047"):
        ask(client, [99999], 50)
    with pytest.raises(InferenceServerException, match="token id 99999"):
        ask(client, [99999], 52, first=True)
    with pytest.raises(InferenceServerException, match="sequence 52 has no state"):  # nothing of it was read
        ask(client, [7], 52)
    with pytest.raises(InferenceServerException, match="must specify the START flag"):
        ask(client, [7], 51)
    state = model.new_state()
    model.forward([[5, 6]], state)
    found = ask(client, [7], 50, last=True).as_numpy("logits")[0, 0]
    assert found.tobytes() == model.forward([[7]], state)[0].tobytes()
    with pytest.raises(InferenceServerException, match="must specify the START flag"):
        ask(client, [7], 50)


def test_bad_input_is_one_line_and_leaves_nothing(exported, tmp_path):
    for given, reason in (
        (tmp_path, "no dijiang.json, so not a bundle"),
        (exported("tiny-python", graph="native"), "every graph needs the compiled operator"),
    ):
        done = deploy(given, "-o", tmp_path / "new")
        assert done.exit_code == 1
        assert reason in done.stderr
        assert done.stderr.count("\n") == 1
    for name in ("a/b", "..", 'a"b', ""):
        done = deploy(exported("tiny-python"), "-o", tmp_path / "new", "--name", name)
        assert done.exit_code == 1
        assert "is no name of a model" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_page_does_what_it_says(page, tmp_path):
    page("triton")
    assert (tmp_path / "repository" / "model" / "config.pbtxt").is_file()
