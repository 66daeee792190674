"""Tensor names of a step graph: what the exporter writes and the sessions bind."""

INPUT_IDS = "input_ids"
POSITION_IDS = "position_ids"
ATTENTION_MASK = "attention_mask"
LOGIT_INDICES = "logit_indices"
LOGITS = "logits"
NEXT_TOKENS = "next_tokens"
#: In the order of Session.run.
INPUTS = (INPUT_IDS, POSITION_IDS, ATTENTION_MASK, LOGIT_INDICES)
#: Of graphs that take ragged steps.
SEQUENCE_STARTS = "sequence_starts"


def past_state(layer: int) -> str:
    """Input state of a layer; the name onnxruntime-genai expects."""
    return f"past_key_values.{layer}.recurrent_state"


def present_state(layer: int) -> str:
    """Output state of a layer."""
    return f"present.{layer}.recurrent_state"


#: Of the vanilla Transformer that benchmarks compare with: int32, tokens so far less one [B], tokens [].
LAST_POSITION = "seqlens_k"
TOTAL_LENGTH = "total_sequence_length"


def past_cache(layer: int) -> tuple[str, str]:
    """Input keys and values of a layer."""
    return f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"


def present_cache(layer: int) -> tuple[str, str]:
    """Output keys and values of a layer."""
    return f"present.{layer}.key", f"present.{layer}.value"
