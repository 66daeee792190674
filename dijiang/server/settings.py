"""Options of `dijiang serve`."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from numbers import Integral, Real

from ..environment import API_KEY
from ..errors import InputError
from ..runtime.options import Checked, option


def is_loopback(host: str | None) -> bool:
    """Whether a name or address always means this machine."""
    try:
        return host is not None and (host == "localhost" or ipaddress.ip_address(host).is_loopback)
    except ValueError:
        return False


@dataclass(frozen=True)
class Serving(Checked):
    """Where and how much is served.

    host: an address. One that is not of this machine needs a key.
    slots: generations at once, for each model; None: what half of the free memory holds, 16 at most.
    queue: generations that may wait, beside those. More are told to come again (429).
    max_prompt, max_tokens: tokens that a request may give and ask for.
    max_body: bytes of a request; None: 1 MiB and the largest sealed state.
    timeout: seconds that a request may take from its first byte to the end of its last generation.
    patience: seconds for the head of a request, and for each look whether a client reads its answer. A body has
        as many, and one more for each 10 kB of it.
    keep_alive: seconds that a connection may rest between two requests. A proxy must let go of it earlier.
    priorities: requests may have one. Whoever may ask is then before all who do not.
    conversations: states that are kept in memory for `previous_response_id`, the last ones used.
    conversation_folder, conversation_disk: where others go, and MB of them; None: they are forgotten.
    prefix_memory, prefix_disk: MB of states of prompts' beginnings, for each model; prefix_folder: where on
        disk, None: in memory only. Servers may share it.
    """

    host: str = option("127.0.0.1", str, "Address to listen on; others than this machine need an API key.")
    port: int = option(8000, Integral, "0: any that is free.", low=0, high=65535)
    slots: int | None = option(None, Integral, "Generations at once, for each model.", low=1, high=4096)
    queue: int = option(64, Integral, "Generations that may wait.", low=0, high=1 << 20)
    max_prompt: int = option(1 << 20, Integral, "Tokens of a prompt at most.", low=1)
    max_tokens: int = option(4096, Integral, "Tokens of an answer at most.", low=1, flags=("--max-tokens",))
    max_body: int | None = option(None, Integral, "Bytes of a request at most.", low=1)
    timeout: float = option(600.0, Real, "Seconds of a request at most.", low=0.01, high=1e6)
    patience: float = option(20.0, Real, "Seconds that a client may be silent.", low=0.01, high=1e6)
    keep_alive: float = option(75.0, Real, "Seconds that an idle connection stays open.", low=0.01, high=1e6)
    priorities: bool = option(False, bool, "Requests may give a priority: only for clients that trust each other.")
    conversations: int = option(64, Integral, "States kept for previous_response_id.", low=0, high=1 << 20)
    conversation_folder: str | None = option(None, str, "Folder for conversations that leave the memory.")
    conversation_disk: int = option(4096, Integral, "MB of them on disk.", low=1)
    prefix_memory: int = option(256, Integral, "MB of beginnings of prompts in memory; 0: none.", low=0)
    prefix_folder: str | None = option(None, str, "Folder for beginnings of prompts; servers may share it.")
    prefix_disk: int = option(4096, Integral, "MB of them on disk.", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        folder, other = self.prefix_folder, self.conversation_folder
        if folder is not None and not self.prefix_memory:
            raise InputError(f"{folder} would keep nothing: prefix_memory is 0; leave one of them out")
        if folder is not None and other is not None and os.path.realpath(folder) == os.path.realpath(other):
            raise InputError(
                f"prefix_folder and conversation_folder are both {other}, where each would remove files of the "
                "other; give two folders"
            )

    @property
    def address(self) -> str:
        """The host, without the brackets that an address of IPv6 has in a URL."""
        return self.host.removeprefix("[").removesuffix("]")

    def require_room(self, state: int) -> None:
        """InputError if a folder has no room for one state of so many bytes."""
        for folder, most, name in (
            (self.prefix_folder, self.prefix_disk, "prefix_disk"),
            (self.conversation_folder, self.conversation_disk, "conversation_disk"),
        ):
            if folder is not None and most << 20 < state:
                raise InputError(
                    f"{name} is {most} MB, and one state has {state / 2**20:.1f} MB; let {folder} take more"
                )

    def require_safe(self, api_key: str | None) -> None:
        """InputError if anybody on the network could use it, or nobody."""
        if api_key and not (api_key.isascii() and api_key.isprintable() and api_key == api_key.strip()):
            raise InputError(
                f"{API_KEY} holds what no client can send in a header: blanks at an end, line ends or letters "
                "beyond ASCII; choose another key"
            )
        if not is_loopback(self.address) and not api_key:
            raise InputError(
                f"host is {self.host}, which others can reach, and there is no API key; set {API_KEY}, or "
                "listen on 127.0.0.1"
            )
