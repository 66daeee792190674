"""Reading a checkpoint folder: config.json and the tensors, one at a time."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from .. import reading
from ..errors import CheckpointError
from .binding import Shape
from .config import token_ids
from .tensor_files import SafetensorsFile, TensorFile, TorchFile


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a CheckpointError that says what is wrong with it."""
    try:
        value = reading.read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found; give the folder of a checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: unreadable ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {type(value).__name__}, expected a JSON object")
    return value


#: Ends of tensor names that only quantized checkpoints (GPTQ, AWQ, bitsandbytes, ...) have.
PACKED = (".qweight", ".qzeros", ".weight_packed", ".weight.absmax", ".SCB")
#: In config.json: the hash of the tensors that nobody has trained yet.
UNTRAINED = "dijiang_untrained"
#: Layouts in order of preference: (index of shards, single file, reader).
LAYOUTS: tuple[tuple[str, str, type[TensorFile]], ...] = (
    ("model.safetensors.index.json", "model.safetensors", SafetensorsFile),
    ("pytorch_model.bin.index.json", "pytorch_model.bin", TorchFile),
)


#: Quantization methods of transformers whose weights are saved as floats again.
RESTORED = ("gguf",)
#: What wrappers put before all names: DataParallel, PEFT, a model that is a field of another.
PREFIXES = ("module.", "base_model.model.", "model.")
#: What others put wherever they wrap: torch.compile, FSDP, gradient checkpointing.
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
#: Beside the tensors of a moving average (torch.optim.swa_utils): how many models it is of.
AVERAGED = "n_averaged"
#: In names of an adapter's tensors, whatever PEFT calls it.
ADAPTER = (".lora_A.", ".lora_B.", ".base_layer.", ".lora_magnitude_vector.")
MERGE = "merge the adapter first: PEFT's merge_and_unload(), then save_pretrained"
#: "model." is such a prefix where one of these follows; elsewhere it is part of the model's own names.
INSIDE = ("model.", "gpt_neox.", "lm_head.", "embed_out.")
#: Files of other formats -> what makes them usable.
OTHERS = {
    "*.distcp": "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER pytorch_model.bin",
    "*/*.distcp": "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER pytorch_model.bin",
    "zero_to_fp32.py": "run it: python zero_to_fp32.py . .",
    "consolidated*.pth": "convert it with transformers' convert_llama_weights_to_hf.py",
    "weights*.npz": "start from the checkpoint that MLX converted",
}


def _without_wrappers(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _common_prefix(names: list[str]) -> str:
    """What a wrapper put before every name; "": nothing."""
    prefix = next((p for p in PREFIXES if names and all(n.startswith(p) for n in names)), "")
    rest = [name.removeprefix(prefix) for name in names]
    if not prefix or (prefix == "model." and not any(name.startswith(INSIDE) for name in rest)):
        return ""
    return prefix + _common_prefix(rest)


class Checkpoint:
    """A checkpoint folder: `config`, tensor `shapes`, and `read(name)`.

    Raises CheckpointError if the folder, its config or its weight files are missing or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        is_folder = os.path.isdir(self.path)
        if self.path.suffix == ".gguf" or (
            is_folder and not self._has("config.json") and any(self.path.glob("*.gguf"))
        ):
            raise CheckpointError(
                f"{path}: a GGUF file, expected a folder with config.json and safetensors; "
                "start from the checkpoint that it was made from"
            )
        if not is_folder:
            raise CheckpointError(f"{path}: not a folder; give the folder of a checkpoint")
        if self._has("adapter_config.json"):
            raise CheckpointError(f"{path}: adapter_config.json, an adapter that would not be applied; {MERGE}")
        if not self._has("config.json"):
            self._refuse_others()
        self.config = read_json(self.path / "config.json")
        self.generation = self._generation()
        #: What was done to read it, a line each.
        self.notes: list[str] = []
        self._owner = self._owners()
        for file in dict.fromkeys(self._owner.values()):
            self.notes += file.notes
        packed = next((name for name in self._owner if name.endswith(PACKED)), None)
        quantized = self.config.get("quantization_config")
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        if packed or (quantized and method not in RESTORED):
            raise CheckpointError(
                f"{path}: a quantized checkpoint ({packed or 'quantization_config in config.json'}), "
                "expected float weights; start from the unquantized checkpoint"
            )
        if adapter := next((name for name in self._owner if any(part in name for part in ADAPTER)), None):
            raise CheckpointError(f"{path}: {adapter} is of an adapter; {MERGE}")
        #: Name of a tensor -> its name in the files.
        self._stored = self._names()
        self.shapes: dict[str, Shape] = {
            name: self._owner[stored].shapes[stored] for name, stored in self._stored.items()
        }
        self._hashes: dict[str, Future[str]] = {}
        self._hashing, self._registering = ThreadPoolExecutor(1), Lock()

    def _names(self) -> dict[str, str]:
        """What the model calls the tensors -> what the files call them, with what wrappers add."""
        stored = [name for name in self._owner if name != AVERAGED]
        names = {_without_wrappers(name): name for name in stored}
        if len(names) < len(stored):
            raise CheckpointError(f"{self.path}: two tensors of one name, but for wrappers'; save one model")
        if any(name != was for name, was in names.items()):
            words = " and ".join(repr(word) for word in WRAPPERS if any(word in name for name in stored))
            self.notes.append(f"tensors' names hold {words}, which is no part of them")
        if prefix := _common_prefix(list(names)):
            self.notes.append(f"every tensor's name begins with {prefix!r}, which is no part of it")
        return {name.removeprefix(prefix): was for name, was in names.items()}

    def _has(self, name: str) -> bool:
        """Whether there is such a file; False for a name that no file can have."""
        return os.path.isfile(self.path / name)

    def _generation(self) -> dict[str, Any]:
        """End tokens of generation_config.json, which go before those of config.json."""
        file = "generation_config.json"
        found = read_json(self.path / file) if self._has(file) else {}
        ends = list(token_ids(found, "eos_token_id", file))
        return {} if found.get("eos_token_id") is None else {"eos_token_id": ends}

    def _owners(self) -> dict[str, TensorFile]:
        """Tensor -> the file that it is read from: where there is an index, the one that it names."""
        found = [(name, row) for row in LAYOUTS for name in (row[1], row[0]) if self._has(name)]
        if not found:
            self._refuse_others()
            raise CheckpointError(
                f"{self.path}: no weights, expected model.safetensors or pytorch_model.bin "
                "(or their index.json with shards)"
            )
        name, (index, _, reader) = found[0]
        if others := [other for other, _ in found[1:]]:
            self.notes.append(f"{name} is read, and {' and '.join(others)} is not")
        if name == index:
            return self._indexed(index, reader)
        file = reader(self.path / name)
        return dict.fromkeys(file.shapes, file)

    def _refuse_others(self) -> None:
        """CheckpointError where there is a file of another format: what makes it usable."""
        for name, advice in OTHERS.items():
            if any(self.path.glob(name)):
                raise CheckpointError(f"{self.path}: {name} is not read; {advice}")

    def _indexed(self, index: str, reader: type[TensorFile]) -> dict[str, TensorFile]:
        where = read_json(self.path / index).get("weight_map")
        if not isinstance(where, dict) or not where or not all(isinstance(s, str) for s in where.values()):
            raise CheckpointError(f"{self.path}: {index} has no weight_map of names to files; download it again")
        shards = sorted(set(where.values()))
        outside = [s for s in shards if Path(s).name != s]
        absent = [s for s in shards if not self._has(s)]
        if outside or absent:
            what = f"leave the folder: {', '.join(outside)}" if outside else f"are missing: {', '.join(absent)}"
            raise CheckpointError(f"{self.path}: shards named in {index} {what}; download them again")
        files = {shard: reader(self.path / shard) for shard in shards}
        lacking = [f"{name} in {shard}" for name, shard in where.items() if name not in files[shard].shapes]
        if lacking:
            raise CheckpointError(f"{self.path}: {index} names {lacking[0]}, which is not there; download it again")
        stale = sum(where.get(name) != shard for shard, file in files.items() for name in file.shapes)
        if stale:
            self.notes.append(f"{stale} tensors are not read: {index} names other files for them, or none")
        return {name: files[shard] for name, shard in where.items()}

    def require_float(self, name: str) -> None:
        """CheckpointError if a tensor has a dtype that no weight has; nothing is read."""
        stored = self._stored[name]
        self._owner[stored].require_float(stored)

    def dtype(self, name: str) -> np.dtype:
        """Of a tensor; CheckpointError if it is none of FLOATS. Nothing is read."""
        stored = self._stored[name]
        return self._owner[stored].numpy_dtype(stored)

    def read(self, name: str) -> np.ndarray:
        """One tensor in its stored dtype; KeyError for an unknown name is our own bug.

        Raises:
            CheckpointError: its dtype is none of FLOATS.
        """
        stored = self._stored[name]
        return self._owner[stored].typed(stored, self._hashed(name))

    def _hashed(self, name: str) -> np.ndarray:
        """The bytes of a tensor, which are hashed when they are first read."""
        stored = self._stored[name]
        raw = self._owner[stored].raw(stored)
        with self._registering:
            if name not in self._hashes:
                if self._hashes:
                    self._hashes[next(reversed(self._hashes))].result()  # one tensor is held for it
                self._hashes[name] = self._hashing.submit(lambda: hashlib.sha256(raw.data).hexdigest())
        return raw

    def sha256(self) -> str:
        """Hash over config.json and `tensors_sha256`; CheckpointError if that file is another one by now."""
        config = self.path / "config.json"
        if json.dumps(read_json(config)) != json.dumps(self.config):  # where a NaN is one, too
            raise CheckpointError(f"{config}: it was written to while it was read; start again when that is done")
        digest = hashlib.sha256(config.read_bytes())
        self._update(digest)
        return digest.hexdigest()

    def tensors_sha256(self) -> str:
        """Hash over name, shape and data of every tensor.

        A tensor is hashed when it is first read, in a thread of its own, so that a pass over the weights
        need not be followed by another; those not read so far are read now. How they are spread over
        files does not matter.
        """
        digest = hashlib.sha256()
        self._update(digest)
        return digest.hexdigest()

    @property
    def untrained(self) -> bool:
        """Whether its tensors are those that `convert` or `init` wrote, who noted their hash in config.json."""
        noted = self.config.get(UNTRAINED)
        return noted is not None and noted == self.tensors_sha256()

    def _update(self, digest: Any) -> None:
        for name, shape in sorted(self.shapes.items()):
            if name not in self._hashes:
                self._hashed(name)
            digest.update(hashed_line(self._stored[name], shape, self._hashes[name].result()))


def hashed_line(name: str, shape: Shape, data_sha256: str) -> bytes:
    """What a tensor is in `Checkpoint.tensors_sha256`, in the order of the names."""
    return f"{name} {list(shape)} {data_sha256}\n".encode()
