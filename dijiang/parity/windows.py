"""The tokens that a verification compares: of a text, of the model's own, or random."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import InputError, SessionError
from ..progress import Progress, silent
from ..runtime.model import Model
from ..runtime.text import TextTokenizer

#: Characters of a text file that are read for each token wanted: 3 to 5 are in one.
CHARACTERS = 64
#: And at once: `read` takes as much memory as it is asked for.
PIECE = 1 << 20
#: What a report calls tokens that are not from a file.
RANDOM, OWN = "random token ids", "text that the bundle drew itself"


def windows_of(
    model: Model, text: str | Path | None, tokens: int, window: int, *, own: bool, progress: Progress = silent
) -> tuple[str, list[np.ndarray]]:
    """What the tokens are, and their ids in windows [<= window]; a rest of one token is left out.

    own: without a text, draw one from the model; otherwise token ids are random. Either is one window:
    a second would add nothing to learn from random ids, and drawing is slow.
    """
    if tokens < 2:
        raise InputError(f"tokens is {tokens}, expected at least 2; compare more")
    if text is not None:
        ids = read_ids(model.tokenizer, Path(text), tokens)
        return str(text), [ids[start : start + window] for start in range(0, len(ids) - 1, window)]
    count = min(tokens, window)
    ids = np.random.default_rng(0).integers(0, model.spec.vocab_size, count)
    if not own:
        return RANDOM, [ids]
    drawn = [int(ids[0])]
    try:
        for record in model.generate(drawn, max_tokens=count - 1, temperature=1.0, seed=0, ignore_eos=True):
            drawn.append(record.token)
            progress("draw", len(drawn), count)
    except SessionError:  # logits that hold NaN: the comparison will say so
        return RANDOM, [ids]
    return OWN, [np.array(drawn)]


def read_ids(tokenizer: TextTokenizer, text: Path, tokens: int) -> np.ndarray:
    """The first token ids of a UTF-8 file, int64 [<= tokens]; InputError if they are fewer than 2."""
    content, wanted = "", CHARACTERS * tokens
    try:
        with text.open(encoding="utf-8-sig") as stream:
            while len(content) < wanted and (piece := stream.read(min(PIECE, wanted - len(content)))):
                content += piece
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{text}: cannot be read ({error}); give a UTF-8 text file") from error
    ids = np.array(tokenizer.encode(content))[:tokens]
    if len(ids) < 2:
        raise InputError(f"{text}: {len(ids)} token, expected at least 2; give a longer text")
    return ids
