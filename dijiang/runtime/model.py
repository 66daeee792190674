"""Model: token ids in, logits out, with a state of constant size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.manifest import TOKENIZER, Bundle, open_bundle
from ..errors import InputError
from .decode import Decoder
from .generate import Record, generate
from .sessions.base import Session
from .sessions.providers import open_session
from .state import State
from .text import TextTokenizer


class Model:
    """A loaded bundle. `spec` and `manifest` describe it."""

    def __init__(self, bundle: Bundle, session: Session) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.spec = bundle.manifest.spec
        self._session = session
        self._tokenizer: TextTokenizer | None = None

    @property
    def has_tokenizer(self) -> bool:
        """Whether the bundle has a tokenizer."""
        return TOKENIZER in self.manifest.files

    @property
    def tokenizer(self) -> TextTokenizer:
        """The bundle's tokenizer; InputError if it was exported without one."""
        if self._tokenizer is None:
            if not self.has_tokenizer:
                raise InputError(
                    f"{self.bundle.path}: no tokenizer in the bundle; pass token ids, or add "
                    "tokenizer.json to the checkpoint and export again"
                )
            self._tokenizer = TextTokenizer(self.bundle.path / TOKENIZER)
        return self._tokenizer

    def new_state(self, batch: int = 1) -> State:
        """The state of `batch` sequences before their first token."""
        return State.empty(batch, self.spec.num_layers, self.spec.state_shape)

    def forward(
        self,
        ids: np.ndarray,
        state: State,
        *,
        mask: np.ndarray | None = None,
        all_logits: bool = False,
    ) -> np.ndarray:
        """Advance the state over ids; any split of the same ids gives the same logits.

        Args:
            ids: [B, T] int64; T = 1 is the decode step, T > 1 prefill in pieces.
            state: of this model, batch B; advanced in place.
            mask: [B, T], 0 where a token is padding (left, right or between); None: no padding.
            all_logits: return every token's logits instead of each sequence's last.

        Returns:
            [B, vocab] float32, or [B, T, vocab] if all_logits (rows of padding hold no meaning).

        Raises:
            InputError: ids, mask, state or positions that do not fit; the state is not touched.
        """
        ids = np.asarray(ids)
        real = np.ones(ids.shape, np.int64) if mask is None else (np.asarray(mask) != 0).astype(np.int64)
        self.check(ids, state, real)
        batch, length = int(ids.shape[0]), int(ids.shape[1])
        last = length - 1 - np.argmax(real[:, ::-1], axis=1)
        longest = self._session.longest
        if length <= longest and not all_logits:
            return self._piece(ids, real, state, last[:, None])[:, 0].copy()
        result = np.empty((batch, length if all_logits else 1, self.spec.vocab_size), np.float32)
        for start in range(0, length, longest):
            piece = slice(start, min(start + longest, length))
            if all_logits:
                kept = np.broadcast_to(np.arange(piece.stop - start), ids[:, piece].shape)
                result[:, piece] = self._piece(ids[:, piece], real[:, piece], state, kept)
            else:
                inside = (last >= start) & (last < piece.stop)
                kept = np.where(inside, last - start, 0)[:, None]
                result[inside] = self._piece(ids[:, piece], real[:, piece], state, kept)[inside]
        return result if all_logits else result[:, 0]

    def decoder(self, state: State) -> Decoder:
        """Steps of one token for a state of batch 1, without the checks of `forward`."""
        return self._session.decoder(state)

    def _piece(self, ids: np.ndarray, real: np.ndarray, state: State, kept: np.ndarray) -> np.ndarray:
        return self._advance(self._session.run, ids, real, state, kept)

    @staticmethod
    def _advance(
        run: Callable[..., np.ndarray],
        ids: np.ndarray,
        real: np.ndarray,
        state: State,
        kept: np.ndarray,
    ) -> np.ndarray:
        positions = state.position[:, None] + np.cumsum(real, axis=1) - 1
        result = run(ids, np.maximum(positions, 0), real, kept, state)
        state.position += real.sum(axis=1)
        return result

    def next_token(self, ids: np.ndarray, state: State) -> int:
        """Advance the state of one sequence over ids [1, T]; its most likely next token.

        On a GPU only the token leaves it. Raises as `forward` does.
        """
        self.check(ids, state)
        longest, length, pick = self._session.longest, ids.shape[1], self._session.next_tokens
        for start in range(0, length, longest):
            piece = ids[:, start : start + longest]
            last = np.array([[piece.shape[1] - 1]])
            tokens = self._advance(pick, piece, np.ones(piece.shape, np.int64), state, last)
        return int(tokens[0, 0])

    def check(self, ids: np.ndarray, state: State, real: np.ndarray | None = None) -> None:
        """InputError unless ids [B, T] (real [B, T]: 0 for padding) can follow the state."""
        real = np.ones(ids.shape, np.int64) if real is None else real
        if ids.ndim != 2 or ids.dtype.kind not in "iu":
            raise InputError(
                f"ids are {ids.dtype} of shape {list(ids.shape)}, expected integers [batch, tokens]"
            )
        if ids.shape[1] == 0:
            raise InputError("no tokens, expected at least one a sequence; give a prompt")
        if len(ids) != state.batch or real.shape != ids.shape:
            raise InputError(
                f"ids {list(ids.shape)} with mask {list(real.shape)} and a state of batch "
                f"{state.batch}, expected the same shape and batch; use new_state({len(ids)})"
            )
        expected = [(state.batch, *self.spec.state_shape)] * self.spec.num_layers
        if state.shapes != expected:
            raise InputError("the state is of another model, expected new_state() of this one")
        seen = ids[real.astype(bool)]
        if seen.size and (seen.min() < 0 or seen.max() >= self.spec.vocab_size):
            bad = int(seen.min() if seen.min() < 0 else seen.max())
            raise InputError(
                f"token id {bad} is out of range, expected 0 to {self.spec.vocab_size - 1}; "
                "use this bundle's tokenizer"
            )
        empty = (real.sum(axis=1) == 0) & (state.position == 0)
        if empty.any():
            raise InputError(f"sequence {int(np.argmax(empty))} is all padding; give it a token")
        limit = self.manifest.positions_limit
        if limit is not None and (state.position + real.sum(axis=1)).max() > limit:
            raise InputError(
                f"position {int((state.position + real.sum(axis=1)).max())} is past the limit "
                f"{limit}: {self.manifest.limit_reason}; start a new state"
            )

    def generate(self, prompt: str | Sequence[int] | np.ndarray, **sampling: Any) -> Iterator[Record]:
        """Stream records of generated text; see `generator.generate` for the options."""
        return generate(self, prompt, **sampling)


def load(
    bundle: str | Path,
    *,
    provider: str = "auto",
    threads: int | None = None,
    cuda_graph: bool | None = None,
    check_hashes: bool = True,
) -> Model:
    """Load a bundle.

    Args:
        bundle: folder written by `dijiang export`.
        provider: a name of `providers.PROVIDERS`, with `:N` for the N-th GPU; `auto`: an engine of the
            bundle if there is a GPU, CUDA if the installed onnxruntime has it, else the CPU. The one
            asked for is used, or it is an error.
        threads: intra-op threads; None: as many as usable cores (`limits`).
        cuda_graph: replay decode steps as CUDA graphs; None: where they are proven equal.
        check_hashes: compare every file's sha256 with the manifest.

    Raises:
        BundleError, SessionError
    """
    opened = open_bundle(bundle, check_hashes=check_hashes)
    session = open_session(opened, provider=provider, threads=threads, cuda_graph=cuda_graph)
    return Model(opened, session)
