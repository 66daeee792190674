"""A .safetensors file is what its library wrote, or refused in one line before a tensor is read."""

import json

import numpy as np
import pytest
from safetensors.numpy import load, save

from dijiang.errors import CheckpointError
from dijiang.models.tensor_files import HEADER_BYTES, SafetensorsFile


def written(path, header, data=14, length=None):
    """A file of a header as JSON or bytes and so many bytes of data; length: what it says of its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + text + bytes(range(data)))
    return path


def entry(dtype="F32", shape=(2,), span=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


WHOLE = {"a": entry(), "b": entry("F16", (3, 1), (8, 14))}


@pytest.mark.parametrize("padding", range(9))
def test_a_whole_file_is_read_as_the_library_reads_it(tmp_path, padding):
    """Wherever the data begins."""
    file = written(tmp_path / "f", json.dumps(WHOLE).encode() + b" " * padding)
    expected, found = load(file.read_bytes()), SafetensorsFile(file)
    assert found.shapes == {"a": (2,), "b": (3, 1)}
    assert found.dtypes == {"a": "float32", "b": "float16"}
    for name, array in expected.items():
        np.testing.assert_array_equal(found.typed(name, found.raw(name)), array)


def test_what_the_library_writes_is_read(tmp_path):
    random = np.random.default_rng(0)
    arrays = {f"t{n}": random.normal(size=(n, 3)).astype(np.float32) for n in range(4)}
    (tmp_path / "f").write_bytes(save(arrays, metadata={"format": "pt"}))
    found = SafetensorsFile(tmp_path / "f")
    assert found.shapes.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found.typed(name, found.raw(name)), array)


#: What is wrong -> (header, bytes of data, what is said).
DAMAGED = {
    "no list of tensors": ([1], 0, "its header: "),
    "a tensor that is a number": ({"a": 1}, 0, "its header: "),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8, "its header: no 'shape'"),
    "no place": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "its header: no 'data_offsets'"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, 8, "its header: no 'dtype'"),
    "one end": ({"a": entry(span=(8,))}, 8, "its header: not enough values"),
    "a shape that is a word": ({"a": entry() | {"shape": "2"}}, 8, "2, expected a list of counts"),
    "a negative size": ({"a": entry(shape=(-1, -2))}, 8, "expected a list of counts"),
    "a size that is true": ({"a": entry(shape=(True, 2))}, 8, "expected a list of counts"),
    "half a size": ({"a": entry(shape=(2.0,))}, 8, "expected a list of counts"),
    "a size beyond 2^62": ({"a": entry(shape=(1 << 62, 0))}, 8, "expected a list of counts"),
    "a gap at the start": ({"a": entry(span=(4, 12))}, 12, "leave or share bytes from 0 on"),
    "a gap between": ({"a": entry(), "b": entry(span=(9, 17))}, 17, "leave or share bytes from 8 on"),
    "two in one place": ({"a": entry(), "b": entry(span=(4, 12))}, 12, "leave or share bytes from 4 on"),
    "an end before its start": ({"a": entry(), "b": entry(span=(8, 4))}, 8, "leave or share bytes from 8 on"),
    "too little data": (WHOLE, 13, "bytes, its header says "),
    "data that is nobody's": (WHOLE, 15, "bytes, its header says "),
    "more bytes than numbers": ({"a": entry(shape=(1,))}, 8, r"a \[1\] of float32 in 8 bytes"),
    "fewer bytes than numbers": ({"a": entry(shape=(3,))}, 8, r"a \[3\] of float32 in 8 bytes"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_one_line(tmp_path, damage):
    header, data, said = DAMAGED[damage]
    with pytest.raises(CheckpointError, match=rf"not a whole safetensors file \(.*{said}.*download it again"):
        SafetensorsFile(written(tmp_path / "f", header, data))


@pytest.mark.parametrize(
    ("length", "said"),
    [
        (HEADER_BYTES + 1, "a header of 100000001 bytes"),
        (HEADER_BYTES, "bytes 8 to 100000008 of"),
        (2, "its header"),
    ],
)
def test_a_header_has_100_megabytes_at_most_and_lies_in_the_file(tmp_path, length, said):
    with pytest.raises(CheckpointError, match=said):
        SafetensorsFile(written(tmp_path / "f", WHOLE, length=length))


def test_a_file_that_ends_in_its_first_bytes_is_one_line(tmp_path):
    (tmp_path / "f").write_bytes(bytes(7))
    with pytest.raises(CheckpointError, match="bytes 0 to 8 of 7"):
        SafetensorsFile(tmp_path / "f")
