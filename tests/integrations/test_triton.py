"""What `dijiang deploy triton` writes: NVIDIA's parser reads it, and whoever follows it gets our tokens.

There is no server to be had here. `Follower` knows nothing but the configuration: types, shapes, and which output
is the state of which input.
"""

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
