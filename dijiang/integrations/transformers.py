"""A bundle as a model of transformers: `generate()` and pipelines, from 4.57 on.

model = DijiangForCausalLM.from_pretrained("BUNDLE")
pipeline("text-generation", model=model, tokenizer=model.tokenizer)("def main(")
"""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from weakref import finalize

import numpy as np

from .. import Model, State, export, folder_of, load

try:
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        GenerationConfig,
        GenerationMixin,
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerFast,
        StoppingCriteria,
        StoppingCriteriaList,
    )
    from transformers.modeling_outputs import CausalLMOutputWithPast
except ImportError as error:
    raise ImportError(f"{error}; pip install 'dijiang[transformers]'") from error

#: Name of what is kept between two steps: transformers renamed it within its fifth version.
CACHE = next(one.name for one in fields(CausalLMOutputWithPast) if one.name in ("cache", "past_key_values"))
#: Results that a graph does not have.
ABSENT = ("labels", "output_attentions", "output_hidden_states")
#: What transformers passes to models and what changes no logit.
HARMLESS = ("return_dict", "cache_position")


class DijiangConfig(PretrainedConfig):
    """What transformers asks of a model's configuration."""

    model_type = "dijiang"

    @classmethod
    def of(cls, model: Model) -> DijiangConfig:
        """From a loaded bundle."""
        spec = model.spec
        return cls(
            vocab_size=spec.vocab_size,
            hidden_size=spec.hidden_size,
            num_hidden_layers=spec.num_layers,
            num_attention_heads=spec.num_heads,
            num_key_value_heads=spec.num_kv_heads,
            bos_token_id=spec.bos_token_id,
            eos_token_id=list(spec.eos_token_ids) or None,
            tie_word_embeddings=False,
        )


class RecurrentCache:
    """What `generate()` keeps between two steps: a state of constant size, whatever the length.

    Args:
        state: of the sequences so far.
        length: columns of `input_ids` that are in it, padding included.
    """

    is_compileable = False
    is_croppable = False
    is_linear = (True,)

    def __init__(self, state: State, length: int = 0) -> None:
        self.state, self.length = state, length

    def get_seq_length(self, layer: int = 0) -> int:
        """Columns of `input_ids` that are in the state."""
        return self.length

    def reorder_cache(self, beams: torch.Tensor) -> None:
        """Keep the sequences [N] of these rows, in this order."""
        self.state = self.state.take(beams.cpu().numpy())


class PositionsEnd(StoppingCriteria):
    """Ends a batch where the positions of a model with tabled decay end, as `Model.generate` does."""

    def __init__(self, limit: int, padding: int) -> None:
        self.columns = limit + padding

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Whether each of [B] sequences is done."""
        return torch.full((len(input_ids),), input_ids.shape[1] > self.columns)


class DijiangForCausalLM(PreTrainedModel, GenerationMixin):
    """A loaded bundle with the interface of a causal language model of transformers.

    Greedy tokens are those of `Model.generate`. Sampling, beams, penalties, streamers and stopping criteria are
    transformers' own. It runs where the bundle runs; tensors come in and go out on the CPU.
    """

    config_class = DijiangConfig
    main_input_name = "input_ids"
    base_model_prefix = ""
    _is_stateful = True  # a state does not go back: transformers refuses assisted generation

    def __init__(self, model: Model) -> None:
        super().__init__(DijiangConfig.of(model))
        self.model = model
        self.name_or_path = str(model.bundle.path)
        ends = list(model.spec.eos_token_ids) or None
        if (model.bundle.path / "generation_config.json").is_file():
            self.generation_config = GenerationConfig.from_pretrained(self.name_or_path)
        self.generation_config.eos_token_id = ends
        if self.generation_config.pad_token_id is None:
            self.generation_config.pad_token_id = ends and ends[0]

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, precision: str | None = None, revision: str | None = None, **loading: Any
    ) -> DijiangForCausalLM:
        """Load a bundle, or export a checkpoint into a temporary folder and load that.

        Args:
            folder: a bundle or a DiJiang checkpoint, or the name of one on the Hub, ORG/NAME.
            precision: of the export of a checkpoint; None: fp32. A bundle has its own.
            revision: branch, tag or commit of the Hub's.
            loading: options of `dijiang.load`: provider, graph, threads.

        Raises:
            ValueError: a precision for a bundle.
            DijiangError: the folder is neither, or an option is unknown.
        """
        folder = folder_of(str(folder), revision)
        if (folder / "dijiang.json").is_file() or not (folder / "config.json").is_file():
            if precision is not None:
                raise ValueError(
                    f"precision={precision!r} for {folder}, which is a bundle: it has a precision of its own"
                )
            return cls(load(folder, **loading))
        made = mkdtemp(prefix="dijiang-")
        try:
            bundle = export(folder, Path(made, "bundle"), precision=precision or "fp32").path
            loaded = cls(load(bundle, check_hashes=False, **loading))
        except BaseException:
            shutil.rmtree(made)
            raise
        finalize(loaded, shutil.rmtree, made)
        return loaded

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Copy the bundle into a folder that is not there yet, or is empty; the generation_config is this model's.

        Args:
            kwargs: for transformers' sake; what says how weights are written has no effect.

        Raises:
            ValueError: the folder is not empty, or the copy is to be pushed to the Hub.
        """
        target = Path(folder)
        if kwargs.get("push_to_hub"):
            raise ValueError(
                f"push_to_hub: {target} is only written here; hf upload ORG/NAME {target} brings it there"
            )
        if target.exists() and any(target.iterdir()):
            raise ValueError(f"{target} exists and is not empty; bundles are never overwritten")
        shutil.copytree(self.model.bundle.path, target, dirs_exist_ok=True)
        self.generation_config.save_pretrained(target)

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The bundle's tokenizer for transformers, which pads on the left; InputError if it has none."""
        _ = self.model.tokenizer
        made = PreTrainedTokenizerFast.from_pretrained(
            self.model.bundle.path, padding_side="left", model_input_names=["input_ids", "attention_mask"]
        )
        ends = self.model.spec.eos_token_ids
        if made.eos_token is None and ends:
            made.eos_token = made.convert_ids_to_tokens(ends[0])
        if made.pad_token is None:
            made.pad_token = made.eos_token
        return made

    @property
    def device(self) -> torch.device:
        """Where ids come from and logits go."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return torch.float32

    def can_generate(self) -> bool:
        """Always."""
        return True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: RecurrentCache | None = None,
        past_key_values: RecurrentCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Advance the cache over ids.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T or more]; the last T columns count, 0 is padding on any side.
            cache, past_key_values: of an earlier call; advanced. None: a new one.
            use_cache: False: the output has none.
            logits_to_keep: of so many last columns; 0: of all; or the indices of columns.
            kwargs: `position_ids` must be the running ones: a graph counts them itself.

        Returns:
            logits [B, T kept, vocab] float32, and the cache.

        Raises:
            ValueError: a result is asked for that a bundle does not have, an argument that it does not take, or the
                cache of another library.
            InputError: ids or positions out of range.
        """
        positions = kwargs.pop("position_ids", None)
        asked = [name for name, value in kwargs.items() if value is not None and value is not False]
        if absent := [name for name in asked if name in ABSENT]:
            raise ValueError(f"{absent[0]}: a bundle gives logits only; use the checkpoint's PyTorch model")
        if unknown := [name for name in asked if name not in HARMLESS]:
            raise ValueError(f"{unknown[0]}: no argument of a bundle; use the checkpoint's PyTorch model")
        batch, length = input_ids.shape
        before = past_key_values if cache is None else cache
        kept = RecurrentCache(self.model.new_state(batch)) if before is None else before
        if not isinstance(kept, RecurrentCache):
            raise ValueError(f"a {type(kept).__name__}, expected a cache of this model; leave it out")
        given = None if attention_mask is None else attention_mask[:, -length:].float()  # NumPy has no bfloat16
        mask = None if given is None else (given != 0).numpy()
        if positions is not None:
            _require_running(positions, kept.state, np.ones((batch, length), bool) if mask is None else mask)
        # A graph can give the logits of each last token. Without padding on the right, these are the last column.
        one = isinstance(logits_to_keep, int) and logits_to_keep == 1 and (mask is None or bool(mask[:, -1].all()))
        logits = self.model.forward(input_ids.numpy(), kept.state, mask=given, all_logits=not one)
        kept.length += length
        which = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        found = torch.from_numpy(logits[:, None]) if one else torch.from_numpy(logits)[:, which]
        result = CausalLMOutputWithPast(logits=found, **({} if use_cache is False else {CACHE: kept}))
        return result.to_tuple() if kwargs.get("return_dict") is False else result

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        cache: RecurrentCache | None = None,
        past_key_values: RecurrentCache | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of `forward` for the columns that are not in the cache yet.

        Raises:
            ValueError: all of them are, or the cache is of another library.
        """
        kept = cache if cache is not None else past_key_values
        done = 0 if kept is None else kept.get_seq_length()
        if kept is not None and (not isinstance(kept, RecurrentCache) or done >= input_ids.shape[1]):
            raise ValueError(
                f"a cache of {done} tokens and {input_ids.shape[1]} input ids, expected a cache of this model and "
                "more ids than it has: those in it, and the new ones"
            )
        names = ("use_cache", "logits_to_keep", *ABSENT)
        return {
            "input_ids": input_ids[:, done:].contiguous(),
            CACHE: kept,
            "attention_mask": None if attention_mask is None else attention_mask[:, done:].contiguous(),
            **{name: kwargs[name] for name in names if name in kwargs},
        }

    def _reorder_cache(self, cache: RecurrentCache, beams: torch.Tensor) -> RecurrentCache:
        cache.reorder_cache(beams)
        return cache

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """ValueError: transformers keeps keys and values by pages for it, which a state is not."""
        raise ValueError(
            "continuous batching pages keys and values, a bundle has none; use dijiang run --jsonl or serve"
        )

    generate_batch = continuous_batching_context_manager = init_continuous_batching

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`GenerationMixin.generate`; the text ends where the model's positions do. It takes no `position_ids`."""
        if kwargs.get("position_ids") is not None:
            raise ValueError("position_ids: other positions than the running ones; leave them out")
        limit = self.model.manifest.positions_limit
        if limit is not None:
            mask = kwargs.get("attention_mask")
            padding = 0 if mask is None else int((mask == 0).sum(-1).min())
            given = kwargs.get("stopping_criteria") or []
            kwargs["stopping_criteria"] = StoppingCriteriaList([*given, PositionsEnd(limit, padding)])
        return super().generate(*args, **kwargs)


def _require_running(positions: torch.Tensor, state: State, mask: np.ndarray) -> None:
    """ValueError for positions [B or 1, T] of tokens (mask [B, T]) that do not follow those of the state."""
    running = state.position[:, None] + np.cumsum(mask, axis=1) - 1
    if (np.broadcast_to(positions.numpy(), mask.shape) != running)[mask].any():
        raise ValueError("position_ids: other positions than the running ones; pad, or give each sequence a row")


AutoConfig.register(DijiangConfig.model_type, DijiangConfig)
AutoModelForCausalLM.register(DijiangConfig, DijiangForCausalLM)
