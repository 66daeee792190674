"""A tokenizer of any origin: found beside a checkpoint, made where there are only older files, opened, bounded."""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar

from .. import reading
from ..errors import CheckpointError, DijiangError
from .config import brief

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
#: How a file begins that Git LFS did not fetch.
POINTER = b"version https://git-lfs"
#: Characters that a tokenizer may make of one, at most: a few rules of a file make any number of them.
GROWTH = 1000
#: Seconds that a text may take, and how many more for each of its characters; libraries need a thousandth.
PATIENCE, PER_CHARACTER = 10.0, 1e-5
#: Makes tokenizer.json of whatever files a folder has.
COMMAND = (
    'pip install transformers sentencepiece protobuf; python -c "from transformers import AutoTokenizer as A; '
    "A.from_pretrained('{0}').save_pretrained('{0}')\""
)
T = TypeVar("T")


class TooSlow(Exception):
    """A text took far more time than one of its length should; see `patiently`."""


#: What tokenizers raises beside, and the reading of its file.
RAISED = (TooSlow, ImportError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RecursionError)


@contextmanager
def reported(error_of: Callable[[BaseException], DijiangError]) -> Iterator[None]:
    """What tokenizers raises, as our error: bare Exception, or a panic of Rust, which is a BaseException.

    What else comes, as of a signal's handler that ends a call, is not about the tokenizer.
    """
    try:
        yield
    except BaseException as error:
        bare = type(error) is Exception or type(error).__name__ == "PanicException"
        if bare or isinstance(error, RAISED):
            raise error_of(error) from error
        raise


def open_tokenizer(data: bytes, path: Path | None, error: type[DijiangError]) -> Tokenizer:
    """The tokenizer in a tokenizer.json; `error` if it is none, or one that makes thousands of characters of one.

    path: for the error.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one text has nothing to share
    from tokenizers import Tokenizer

    if data.startswith(POINTER):
        raise error(f"{path}: a pointer of Git LFS, not a tokenizer; run git lfs pull")
    with reported(lambda e: error(f"{path}: not a tokenizer ({e}); download it again")):
        made = Tokenizer.from_str(data.decode("utf-8"))
        parts = (made.normalizer, made.pre_tokenizer, made.decoder)
        growth = math.prod(_growth(json.loads(part.__getstate__())) for part in parts if part is not None)
    if growth > GROWTH:
        raise error(f"{path}: its rules make up to {growth:.0e} characters of one; do not use this tokenizer")
    # A file may hold what its training cut and padded texts to.
    made.no_truncation()
    made.no_padding()
    return made


def _growth(part: Any) -> float:
    """Characters that the rules in a part of a tokenizer.json make of one."""
    if isinstance(part, list):
        return math.prod(map(_growth, part))
    if not isinstance(part, dict):
        return 1
    if part.get("type") == "Replace":
        pattern, content = part["pattern"].get("String"), len(part["content"])
        return max(1, content / len(pattern)) if pattern else 1 + content  # an expression may match nothing
    return math.prod(_growth(value) for value in part.values())


def patiently(work: Callable[[], T], characters: int) -> T:
    """What `work` returns or raises; TooSlow if a text of so many characters should take far less time.

    It runs in a thread, which is stopped where Python runs in it, and else goes on: no library stops a regular
    expression. `work` must not hold the interpreter's lock.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    allowed = PATIENCE + PER_CHARACTER * characters
    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(allowed)
    if errors:
        raise errors.pop()
    if not results:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
        raise TooSlow(f"it took more than {allowed:.0f} s")
    return results[0]


def find_tokenizer(folder: Path, vocab_size: int) -> bytes | None:
    """The tokenizer.json of a checkpoint, checked; made of older files where it has only those. None: no tokenizer.

    Raises:
        CheckpointError: it cannot be read, opened or made, or is another model's.
    """
    data = _read(folder)
    if data is None:
        return None
    beyond = beyond_vocabulary(open_tokenizer(data, folder / TOKENIZER, CheckpointError), vocab_size)
    if beyond:
        token, number = max(beyond.items(), key=lambda pair: pair[1])
        raise CheckpointError(
            f"{folder / TOKENIZER}: the token {brief(token)} has the id {number}, but the model has "
            f"{vocab_size} tokens; it is the tokenizer of another model"
        )
    return data


def beyond_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> dict[str, int]:
    """Ordinary tokens that a model of this vocabulary does not have, and their ids.

    Added tokens are not among them: [PAD] often has the id after the last one, and no text gives it.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=False)
    return {token: number for token, number in vocabulary.items() if number >= vocab_size}


def _read(folder: Path) -> bytes | None:
    file = folder / TOKENIZER
    if os.path.lexists(file):
        return reading.given(file, reading.read_regular, CheckpointError, "make it readable")
    found = next((names for names in OLDER if all((folder / name).is_file() for name in names)), None)
    if found is None:
        return None

    def unmade(reason: BaseException) -> CheckpointError:
        what = f"{' and '.join(found)}, but no {TOKENIZER} ({' '.join(str(reason).split())[:200]})"
        return CheckpointError(f"{folder}: {what}; make it: {COMMAND.format(folder)}")

    with reported(unmade):
        made: str = OLDER[found](folder).to_str()
    return made.encode()


def _from_merges(folder: Path) -> Tokenizer:
    """Byte-level BPE as GPT-2 and OPT have it: vocab.json and merges.txt, its options beside them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", CONFIG):
        if (folder / name).is_file():
            config |= reading.read_json(folder / name)
    made = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
    made.decoder = decoders.ByteLevel()
    for _, token in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda pair: int(pair[0])):
        kept = {n: v for n, v in token.items() if not n.startswith("__")}
        made.add_tokens([AddedToken(kept.pop("content"), **kept)])
    special = {key: config.get(key, "<|endoftext|>") for key in ("unk_token", "bos_token", "eos_token")}
    special["pad_token"] = config.get("pad_token")
    words = {key: value["content"] if isinstance(value, dict) else value for key, value in special.items()}
    made.add_special_tokens([word for word in dict.fromkeys(words.values()) if word is not None])
    if config.get("add_bos_token"):
        start = words["bos_token"]
        pair = (start, made.token_to_id(start))
        made.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=[pair])
    return made


def _from_sentencepiece(folder: Path) -> Tokenizer:
    """By transformers, where it is installed: each family has rules of its own."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False).backend_tokenizer


#: Files of a tokenizer without tokenizer.json -> what makes it.
OLDER: dict[tuple[str, ...], Callable[[Path], Any]] = {
    ("vocab.json", "merges.txt"): _from_merges,
    ("tokenizer.model",): _from_sentencepiece,
    ("spiece.model",): _from_sentencepiece,
}
