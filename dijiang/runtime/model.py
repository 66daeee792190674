"""Model: token ids in, logits out, with a state of constant size."""

from __future__ import annotations

import os
from collections.abc import Iterator
from collections.abc import Sequence as Ordered
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..bundle.opened import Bundle, open_bundle
from ..errors import BundleError, InputError
from ..models.tokenizer import TOKENIZER
from ..progress import Progress, silent
from ..reading import given, read_regular
from .generate import as_ids, generate
from .grammar import Grammar, GrammarTokenizer
from .options import Generation, Loading
from .sampling import log_softmax, require_numbers
from .sequence import Record
from .sessions.base import Session
from .sessions.providers import Say, open_session
from .state import State, as_state
from .step import Step
from .text import TextTokenizer

#: Logits that `likelihood` looks at together: bounds its float64 temporaries to 128 MB each.
LOGITS = 1 << 24


class Model:
    """A loaded bundle. `spec` and `manifest` describe it, `session` runs it."""

    def __init__(self, bundle: Bundle, session: Session) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.spec = bundle.manifest.spec
        self.session = session
        self._tokenizer: TextTokenizer | None = None
        self._grammars: GrammarTokenizer | None = None
        self._tokenizer_data = _read_tokenizer(bundle)

    @property
    def provider(self) -> str:
        """What runs it, in its own words."""
        return self.session.provider

    @property
    def graph(self) -> str:
        """Which graph of the bundle is run."""
        return self.session.graph

    @property
    def has_tokenizer(self) -> bool:
        """Whether the bundle has a tokenizer."""
        return self._tokenizer_data is not None

    @property
    def tokenizer(self) -> TextTokenizer:
        """The bundle's tokenizer; InputError if it was exported without one."""
        if self._tokenizer is None:
            if self._tokenizer_data is None:
                raise InputError(
                    f"{self.bundle.path}: no tokenizer in the bundle; pass token ids, or add "
                    "tokenizer.json to the checkpoint and export again"
                )
            self._tokenizer = TextTokenizer(self._tokenizer_data, self.bundle.path / TOKENIZER)
        return self._tokenizer

    def grammar(self, form: dict[str, Any] | str) -> Grammar:
        """Texts of a form, see `grammar.Grammar`; InputError if it does not compile, or there is no tokenizer."""
        if self._grammars is None:
            _ = self.tokenizer
            assert self._tokenizer_data is not None
            self._grammars = GrammarTokenizer(self._tokenizer_data, self.spec.vocab_size, self.spec.eos_token_ids)
        return Grammar(self._grammars, form)

    def new_state(self, batch: int = 1) -> State:
        """The state of `batch` sequences before their first token."""
        return State.empty(batch, self.spec, self.manifest.fingerprint)

    def adopt(self, state: State) -> None:
        """Have a state know the vocabulary of its ids: who keeps a state, and who goes on from one, calls it.

        Raises:
            InputError: they are another tokenizer's.
        """
        if not self.has_tokenizer:
            return
        here = self.tokenizer.vocabulary
        if state.vocabulary not in ("", here):
            raise InputError(
                f"the state's token ids are of another vocabulary ({state.vocabulary}, expected {here}); use the "
                "bundle that made it, or feed its text again"
            )
        state.vocabulary = here

    def forward(
        self, ids: ArrayLike, state: State, *, mask: ArrayLike | None = None, all_logits: bool = False
    ) -> np.ndarray:
        """Advance the state over ids; any split of the same ids gives the same logits.

        Exactly the ids are fed: a token that a generation left in the state is not, unless it is one of
        them.

        Args:
            ids: [B, T] int64; T = 1 is the decode step, T > 1 prefill in pieces.
            state: of this model, batch B; advanced in place.
            mask: [B, T], 0 where a token is padding (left, right or between); None: no padding. The first call of a
                sequence has a token of it.
            all_logits: return every token's logits instead of each sequence's last.

        Returns:
            [B, vocab] float32, or [B, T, vocab] if all_logits. Rows of padding hold no meaning, nor does the one
            row of a sequence that has no token in this call.

        Raises:
            InputError: ids, mask, state or positions that do not fit, or another thread advances the state; it is
                not touched.
        """
        ids = as_ids(ids)
        real = None if mask is None else _as_mask(mask)
        with as_state(state).leased() as user:
            self.check(ids, state, real, user)
            return self._forward(ids, state, real, all_logits=all_logits)

    def _forward(
        self, ids: np.ndarray, state: State, real: np.ndarray | None = None, *, all_logits: bool = False
    ) -> np.ndarray:
        """`forward` of what was checked, by who has the state's lease."""
        batch, length = int(ids.shape[0]), int(ids.shape[1])
        if real is None:
            last = np.full(batch, length - 1)
        else:
            ids = np.where(real, ids, 0)  # what stands under padding is never looked up
            last = length - 1 - np.argmax(real[:, ::-1], axis=1)
        result = np.empty((batch, length if all_logits else 1, self.spec.vocab_size), np.float32)
        longest = self.session.longest
        for start in range(0, length, longest):
            piece = slice(start, min(start + longest, length))
            inside = (last >= start) & (last < piece.stop)
            if all_logits:
                kept = np.tile(np.arange(piece.stop - start), (batch, 1))
            else:
                kept = np.where(inside, last - start, 0)[:, None]
            of_piece = None if real is None else real[:, piece]
            output = self.session.run(Step.of(ids[:, piece], state.position, kept, of_piece), state)
            if all_logits:
                result[:, piece] = output.logits
            elif inside.any():
                result[inside] = output.logits[inside]
        return result if all_logits else result[:, 0]

    def score(self, ids: ArrayLike, state: State | None = None) -> np.ndarray:
        """Log-probabilities that the model gives to a text: the first result of `likelihood`."""
        return self.likelihood(ids, state)[0]

    def likelihood(
        self, ids: ArrayLike, state: State | None = None, *, mask: ArrayLike | None = None, last: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """How likely texts are, token by token.

        Args:
            ids: [B, T] int64, T at least 2.
            state: to start from, batch B; advanced over ids. None: a new one.
            mask: [B, T], 0 where a token is padding on the right; None: no padding.
            last: whether the state is advanced over the last of ids, too; nothing that is returned needs it.

        Returns:
            [B, T - 1] float64, nats: of ids[:, t + 1] after ids[:, : t + 1].
            [B, T - 1] bool: whether no token was more likely.  Under padding both hold no meaning.

        Raises:
            InputError: as `forward`.
            SessionError: the logits of a real token hold NaN.
        """
        ids = as_ids(ids)
        if ids.ndim != 2 or ids.shape[1] < 2:
            raise InputError(f"ids of shape {list(ids.shape)}, expected [batch, 2 or more tokens]")
        state = self.new_state(len(ids)) if state is None else as_state(state)
        real = None if mask is None else _as_mask(mask)
        if real is not None and real.shape != ids.shape:
            raise InputError(f"the mask is {list(real.shape)}, expected {list(ids.shape)}, as ids are; change it")
        if real is not None and (np.diff(real, axis=1) > 0).any():
            raise InputError("the mask has padding before a token, expected it on the right; shift the text")
        end = ids.shape[1] - (not last)
        with state.leased() as user:
            self.check(ids[:, :end], state, None if real is None else real[:, :end], user)
            self._require_known(ids if real is None else ids[real != 0])
            return self._likelihood(ids, state, real, end)

    def _likelihood(
        self, ids: np.ndarray, state: State, real: np.ndarray | None, end: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """`likelihood` of what was checked, by who has the state's lease; end: of what is fed."""
        if real is not None:
            ids, real = np.where(real, ids, 0), real[:, :end]
        longest = max(1, min(self.session.longest, LOGITS // (len(ids) * self.spec.vocab_size)))
        found, best, fed = [], [], state.position.copy()
        for start in range(0, end, longest):
            piece, following = ids[:, start : min(start + longest, end)], ids[:, start + 1 : start + longest + 1]
            of_piece = None if real is None else real[:, start : start + longest]
            logits = self._forward(piece, state, of_piece, all_logits=True)[:, : following.shape[1]]
            read = slice(following.shape[1])
            positions = fed[:, None] + np.arange(start + 1, ids.shape[1] + 1)[read]
            require_numbers(logits, positions, True if of_piece is None else of_piece[:, read] != 0)
            nats = log_softmax(logits)
            chosen = np.take_along_axis(nats, following[..., None], axis=-1)[..., 0]
            found.append(chosen)
            best.append(chosen == nats.max(-1))
        return np.concatenate(found, axis=1), np.concatenate(best, axis=1)

    def check(self, ids: np.ndarray, state: State, real: np.ndarray | None = None, user: object = None) -> None:
        """InputError unless ids [B, T] (real [B, T]: 0 for padding) can follow the state.

        user: who holds the state's lease.
        """
        real = np.ones(ids.shape, np.int64) if real is None else real
        if ids.ndim != 2 or ids.dtype.kind not in "iu":
            raise InputError(f"ids are {ids.dtype} of shape {list(ids.shape)}, expected integers [batch, tokens]")
        if ids.shape[1] == 0:
            raise InputError("no tokens, expected at least one a sequence; give a prompt")
        if len(ids) != state.batch or real.shape != ids.shape:
            raise InputError(
                f"ids {list(ids.shape)} with mask {list(real.shape)} and a state of batch "
                f"{state.batch}, expected the same shape and batch; use new_state({len(ids)})"
            )
        state.check(self.spec, self.manifest.fingerprint, user)
        self._require_known(ids[real != 0])
        counts = real.sum(axis=1)
        empty = (counts == 0) & (state.position == 0)
        if empty.any():
            raise InputError(f"sequence {int(np.argmax(empty))} is all padding; give it a token")
        limit, end = self.manifest.positions_limit, int((state.position + counts).max())
        if limit is not None and end > limit:
            raise InputError(
                f"position {end} is past the limit {limit}: {self.manifest.limit_reason}; start a new state"
            )

    def _require_known(self, ids: np.ndarray) -> None:
        """InputError unless the vocabulary has all of them."""
        if ids.size and (ids.min() < 0 or ids.max() >= self.spec.vocab_size):
            bad = int(ids.min() if ids.min() < 0 else ids.max())
            raise InputError(
                f"token id {bad} is out of range, expected 0 to {self.spec.vocab_size - 1}; "
                "use this bundle's tokenizer"
            )

    def generate(
        self,
        prompt: str | Ordered[int] | np.ndarray | None = None,
        *,
        state: State | None = None,
        progress: Progress = silent,
        grammar: Grammar | None = None,
        **options: Any,
    ) -> Iterator[Record]:
        """Stream records of generated text: `generate.generate` with `options.Generation`."""
        return generate(self, prompt, Generation.of(options), state, progress, grammar)


def _as_mask(mask: object) -> np.ndarray:
    """A mask as int64 of 0 and 1; InputError for rows of different lengths, and for other values."""
    try:
        found = np.asarray(mask)
    except (ValueError, TypeError, RuntimeError) as error:  # torch has types that NumPy lacks
        raise InputError(f"the mask is no array ({error}); give it the shape of the ids") from error
    if found.dtype.kind not in "biuf":
        raise InputError(f"the mask is {found.dtype}, expected numbers, 0 where a token is padding; change it")
    other = found[(found != 0) & (found != 1)]
    if other.size:
        raise InputError(f"the mask holds {other[0]}, expected 1, or 0 where a token is padding; change it")
    return found.astype(np.int64)


def _read_tokenizer(bundle: Bundle) -> bytes | None:
    """The tokenizer's bytes, read when the bundle is loaded: later changes of the file do not matter."""
    if TOKENIZER not in bundle.manifest.files:
        return None
    return given(bundle.path / TOKENIZER, read_regular, BundleError, "copy the bundle again")


def load(bundle: str | Path, *, check_hashes: bool = True, say: Say = lambda text: None, **loading: Any) -> Model:
    """Load a bundle.

    Args:
        bundle: folder written by `dijiang export`.
        check_hashes: compare every file's sha256 with the manifest.
        say: told why provider `auto` takes what it takes, where a trial decided.
        loading: provider, graph, threads, cuda_graph, require_signature: see `options.Loading`.

    Raises:
        BundleError, SessionError
        InputError: an option is unknown or out of range.
    """
    if isinstance(signers := loading.get("require_signature"), os.PathLike):
        loading["require_signature"] = os.fspath(signers)
    options = Loading.of(loading)
    opened = open_bundle(bundle, check_hashes=check_hashes, require_signature=options.require_signature)
    return Model(opened, open_session(opened, options, say))
