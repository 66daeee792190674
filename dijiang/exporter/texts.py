"""What an export reads text for: to verify on, and to calibrate by."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import ExportError, InputError
from ..graph.schemes import scheme_of
from ..models.load import DijiangModel
from ..models.tokenizer import TOKENIZER
from ..parity.verify import default_slice
from ..parity.windows import read_ids
from ..recipe import Recipe
from ..runtime.text import TextTokenizer


@dataclass(frozen=True)
class Texts:
    """Files that were asked for, and what reads them.

    reader: the checkpoint's tokenizer; None: it has none, and there are no files.
    """

    reader: TextTokenizer | None
    verification: Path | None
    calibration: Path | None

    @classmethod
    def of(
        cls,
        model: DijiangModel,
        tokenizer: bytes | None,
        verification: str | Path | None,
        calibration: str | Path | None,
    ) -> Texts:
        """Those files, after it was seen that they can be read: minutes go by until they are.

        Raises:
            InputError: one cannot be read as tokens, or the one to verify on is too short.
        """
        reader = None if tokenizer is None else TextTokenizer(tokenizer, model.path / TOKENIZER)
        files = [None if file is None else Path(file) for file in (verification, calibration)]
        for file in files:
            if file is not None:
                _require_readable(model, file, reader)
        if reader is not None and files[0] is not None:
            read_ids(reader, files[0], default_slice(model, text=True)[0])
        return cls(reader, *files)

    def require_use(self, recipe: Recipe) -> None:
        """ExportError if a fitted recipe calibrates nothing and there is a text for it."""
        if self.calibration is None or recipe.calibration_tokens:
            return
        none = f"precision {recipe.precision} for target {recipe.target} is not calibrated"
        reason = "the calibration has 0 tokens" if scheme_of(recipe).calibrates else none
        raise ExportError(f"{self.calibration} would not be read: {reason}; leave --calibration-text out")

    def calibration_ids(self, recipe: Recipe) -> np.ndarray | None:
        """Token ids to calibrate by; None: the model writes them."""
        if self.reader is None or self.calibration is None:
            return None
        return read_ids(self.reader, self.calibration, recipe.calibration_tokens or 0)


def _require_readable(model: DijiangModel, file: Path, reader: TextTokenizer | None) -> None:
    if reader is None:
        raise InputError(f"{model.path}: no {TOKENIZER} to read {file} with; leave the text out")
    if not os.path.isfile(file):
        found = "not a regular file" if os.path.exists(file) else "no such file"
        raise InputError(f"{file}: cannot be read ({found}); give a UTF-8 text file")
