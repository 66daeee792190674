"""Messages as the text that a checkpoint was trained on: its own Jinja template, in a sandbox."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..bundle.opened import Bundle
from ..errors import BundleError, InputError
from ..reading import read_json, read_regular
from .renderer import Broken, Refusal, Renderer
from .state import State
from .text import TextTokenizer

FILE, CONFIG, MAP = "chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json"
#: Tokens of these two that templates write.
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
#: Stand for a conversation before, when what follows it is rendered alone.
ASKED, ANSWERED = "\u2402asked\u2403", "\u2402answered\u2403"
#: One message: `role` and `content`, text; with calls of tools also `tool_calls` or `tool_call_id`.
Message = dict[str, Any]


class ChatTemplate:
    """A template and the special tokens that it may write.

    Args:
        source: Jinja, of any origin: it is run in a process of its own, which has bounds (ADR 0045).
        tokens: the values of `bos_token`, `eos_token` and so on.
    """

    def __init__(self, source: str, tokens: dict[str, str]) -> None:
        self._tokens, self._developer = tokens, "developer" in source
        try:
            self._renderer = Renderer(source)
        except Broken as error:
            raise BundleError(f"{FILE}: not a template ({error}); export again with another one") from error

    @classmethod
    def of(cls, bundle: Bundle) -> ChatTemplate:
        """The bundle's own; InputError if it has none, BundleError if it is none."""
        files = bundle.manifest.files
        try:
            config: dict[str, Any] = {}
            for name in (MAP, CONFIG):  # what the second says goes before what the first says
                found = read_json(bundle.path / name) if name in files else {}
                if not isinstance(found, dict):
                    raise ValueError(f"{name} is not an object")
                config |= {key: value for key, value in found.items() if value is not None}
            source = config.get("chat_template")
            if FILE in files:
                source = read_regular(bundle.path / FILE).decode()
        except (OSError, ValueError) as error:
            raise BundleError(f"{bundle.path}: chat template unreadable ({error}); export again") from error
        if isinstance(source, list):  # of several, the one that is meant for plain chats
            named = {one.get("name"): one.get("template") for one in source if isinstance(one, dict)}
            source = named.get("default")
        if not isinstance(source, str):
            raise InputError(
                f"{bundle.path}: the checkpoint has no chat template; ask for plain completions, or add {FILE} to "
                "the checkpoint and export again"
            )
        given = {name: config[name] for name in SPECIAL if name in config}
        tokens = {name: t.get("content") if isinstance(t, dict) else t for name, t in given.items()}
        return cls(source, {name: text for name, text in tokens.items() if isinstance(text, str)})

    def render(
        self,
        messages: Sequence[Message],
        *,
        answer: bool = True,
        tools: Sequence[dict[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation.

        answer: with the start of the assistant's answer.  tools: may be called; as OpenAI's API describes them.
        variables: more that the template reads, by name.

        Raises:
            InputError: the template refuses the messages, or takes too long, or too much memory.
            SessionError: it cannot be run, or not now.
        """
        given = {
            "messages": [self._known(message) for message in messages],
            "add_generation_prompt": answer,
            "tools": list(tools) or None,
            "documents": None,
        }
        try:
            return self._renderer.render(dict(variables or {}) | self._tokens | given)
        except Refusal as error:
            raise InputError(
                f"the chat template refuses the messages ({error}); change them, or use another template"
            ) from error

    def _known(self, message: Message) -> Message:
        """A message as this template knows it: `developer` is what OpenAI's API calls `system` now."""
        old = message.get("role") == "developer" and not self._developer
        return message | {"role": "system"} if old else message

    def unfinished(self, messages: Sequence[Message], **how: Any) -> str:
        """The text of a conversation up to the end of what its last message says, to be gone on with.

        how: `tools` and `variables` of `render`.

        Raises:
            InputError: as `render`; or the template writes the last message otherwise than it is.
        """
        text, last = self.render(messages, answer=False, **how), str(messages[-1]["content"])
        for said in (last, last.strip()):  # many templates trim what is said
            at = text.rfind(said)
            if said and at >= 0:
                return text[: at + len(said)]
        raise InputError("the chat template does not write the last message as it is; it cannot be continued")

    def following(self, messages: Sequence[Message], **how: Any) -> str:
        """The text from the end of an answer on: what ends it, further messages, the start of the next answer.

        So a conversation goes on from its state, without what was said before.  how: as `render`.

        Raises:
            InputError: as `render`; or the template writes an earlier answer otherwise than a new one.
        """
        before: list[Message] = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}]
        _, found, rest = self.render([*before, *messages], **how).partition(ANSWERED)
        if not found:
            raise InputError(
                "the chat template leaves out what was answered before; send the whole conversation instead"
            )
        return rest


def continued(
    template: ChatTemplate,
    tokenizer: TextTokenizer,
    state: State,
    ends: Collection[int],
    messages: Sequence[Message],
    **how: Any,
) -> list[int]:
    """Token ids that continue a conversation from its state, which stands at the end of an answer.

    ends: end tokens of the model. The state's pending token is fed first. If it is one, or a special token that was
    told to end the answer, it is not repeated, nor is the space that a template writes before it.  how: as
    `ChatTemplate.render`.

    Raises:
        InputError: as `ChatTemplate.following`.
    """
    text, seam = template.following(messages, **how), state.seam()
    if seam is None or not (seam.token in ends or seam.token in tokenizer.special):
        return tokenizer.encode(text, start=False)
    name, rest = tokenizer.name(seam.token), text.lstrip()
    return tokenizer.after(seam.token, rest.removeprefix(name) if rest.startswith(name) else text)
