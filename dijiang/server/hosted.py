"""A model that is served: its thread of steps, and the way from there to the answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import numpy as np

from ..batching.batcher import Batcher
from ..batching.prefixes import Prefixes
from ..batching.slots import slots_that_fit
from ..batching.turn import NO_BORDERS, Turn
from ..bundle.opened import Bundle
from ..bundle.sizes import sizes
from ..errors import DijiangError, InputError
from ..runtime.calls import Syntax, described
from ..runtime.chat_template import ChatTemplate, continued
from ..runtime.generate import prepare
from ..runtime.grammar import Grammar
from ..runtime.model import Model
from ..runtime.options import authors_choice
from ..runtime.state import State
from ..runtime.state_folder import StateFolder
from .failures import Refused
from .relay import Job, Post
from .settings import Serving
from .tools import Offer
from .wanted import Wanted

#: Threads that turn prompts into ids: more share the same cores.
READERS = 2
#: Tokens of prompts that an answer names one by one, at most.
MOST_SCORED = 1 << 14


def _prefixes(model: Model, settings: Serving) -> Prefixes | None:
    """The store of beginnings that the settings ask for; InputError if its folder cannot be used."""
    if not settings.prefix_memory:
        return None
    folder = settings.prefix_folder
    kept = None if folder is None else StateFolder(Path(folder), settings.prefix_disk << 20)
    return Prefixes(model, settings.prefix_memory << 20, kept)


def _template(bundle: Bundle) -> ChatTemplate | DijiangError:
    """The template of a bundle as it was loaded, or why it has none."""
    try:
        return ChatTemplate.of(bundle)
    except DijiangError as error:
        return error


class Hosted:
    """One model, its slots and its queue."""

    def __init__(self, name: str, model: Model, settings: Serving) -> None:
        self.name, self.model, self.settings = name, model, settings
        self.slots = settings.slots or slots_that_fit(model)
        self._prefixes = _prefixes(model, settings)
        self.batcher = Batcher(model, self.slots, prefixes=self._prefixes)
        self.created = int(time.time())
        #: Choices on their way.
        self.load = 0
        self.sampling = authors_choice(model.bundle.sampling)
        self._thread = threading.Thread(target=self.batcher.run, name=f"steps of {name}", daemon=True)
        self.sizes = sizes(model.bundle)
        self._stamp = model.bundle.stamp or (0, 0, 0, 0)
        self._template = _template(model.bundle)
        self._syntax: Syntax | None = None
        self._readers = anyio.CapacityLimiter(READERS)

    def start(self) -> None:
        """Begin to run steps."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what is on its way fails."""
        self.batcher.close()
        self._thread.join()
        if self._prefixes is not None:
            self._prefixes.close()

    @property
    def alive(self) -> bool:
        """Whether steps are run."""
        return self._thread.is_alive()

    def require_ready(self) -> None:
        """Refused where it takes no steps, or its weights were written over: of some the file is the memory."""
        if not self.alive:
            raise Refused(f"{self.name} takes no steps; start the server again", status=503)
        # One that took its place, by its name, changes nothing here: the file that was opened stays.
        stamp = self.model.bundle.stamp
        if stamp != self._stamp and stamp is not None and stamp[:2] == self._stamp[:2]:
            raise Refused(f"{self.name}: its bundle was written over; start the server again", status=503)

    @property
    def template(self) -> ChatTemplate:
        """The checkpoint's own; InputError if it has none, BundleError if it cannot be read."""
        if isinstance(self._template, DijiangError):
            raise type(self._template)(str(self._template))  # a new one: each raise makes a traceback longer
        return self._template

    @property
    def syntax(self) -> Syntax:
        """How it writes calls of tools; Refused if its template does not."""
        if self._syntax is None:
            try:
                self._syntax = Syntax.learn(self.template, self.model.tokenizer, self.model.spec.eos_token_ids)
            except InputError as error:
                raise Refused(str(error), param="tools") from None
        return self._syntax

    @property
    def chats(self) -> bool:
        """Whether messages can be sent: there are a tokenizer and a template that can be read."""
        return self.model.has_tokenizer and isinstance(self._template, ChatTemplate)

    async def job(self, wanted: Wanted, state: State | None, deadline: float) -> Job:
        """What a request asks for, with its places taken; not begun. Whoever has it closes it.

        Args:
            state: to continue from.
            deadline: of `time.monotonic`.

        Raises:
            InputError, Refused: the prompt or an option does not fit the model, or there is no place.
        """
        self.require_ready()
        places = self.slots + self.settings.queue
        if wanted.choices > places:
            raise Refused(
                f"{wanted.choices} choices are asked for, this server has places for {places}; ask for fewer",
                param="n",
            )
        if self.load + wanted.choices > places:
            raise Refused(
                f"{self.load} generations are on their way, this server takes {self.slots} and lets "
                f"{self.settings.queue} wait; ask again later",
                status=429,
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )
        job = Job(
            self.batcher,
            wanted.choices,
            timeout=self.settings.timeout,
            deadline=deadline,
            most=wanted.logprobs or 0,
            closed=partial(self._left, wanted.choices),
        )
        self.load += wanted.choices
        try:
            with anyio.fail_after(job.left):
                job.turns = await anyio.to_thread.run_sync(
                    lambda: self._turns(wanted, state, job.posts), limiter=self._readers, abandon_on_cancel=True
                )
        except TimeoutError:
            job.close()
            raise job.late from None
        except BaseException:
            job.close()
            raise
        return job

    def _left(self, choices: int) -> None:
        self.load -= choices

    def _turns(self, wanted: Wanted, state: State | None, posts: Sequence[Post]) -> list[Turn]:
        """One a choice; those of one prompt are forks of the first of them."""
        turns: list[Turn] = []
        self._require_tokens(wanted)
        grammar = self._grammar(wanted)
        for given in [self._chat_ids(wanted, state)] if wanted.messages else wanted.prompts:
            prompt: str | Sequence[int] | np.ndarray = given
            forks: list[Turn] = []
            for _ in range(wanted.n):
                choice = len(turns) + len(forks)
                turn = self._turn(wanted, prompt, state, posts[choice], choice, grammar)
                if state is None:
                    prompt = turn.plan.ids  # encoded once
                forks.append(turn)
            forks[0].forks = forks[1:]
            turns += forks
        if wanted.scores and (told := sum(len(turn.plan.ids) for turn in turns[:: wanted.n])) > MOST_SCORED:
            raise Refused(
                f"the prompts have {told} tokens, expected at most {MOST_SCORED} with echo and logprobs; send less",
                param=wanted.asked,
                code="context_length_exceeded",
            )
        return turns

    def _turn(
        self,
        wanted: Wanted,
        prompt: str | Sequence[int] | np.ndarray,
        state: State | None,
        post: Post,
        choice: int,
        grammar: Grammar | None,
    ) -> Turn:
        own = self.model.new_state() if state is None else state
        try:
            self.model.adopt(own)
            options = wanted.options.attempt(choice)
            plan = prepare(self.model, prompt, options, own, keeps=False, bias=dict(wanted.bias), grammar=grammar)
        except InputError as error:
            raise Refused(str(error), param=wanted.asked) from None
        if len(plan.ids) > self.settings.max_prompt:
            raise Refused(
                f"the prompt has {len(plan.ids)} tokens, expected at most {self.settings.max_prompt}; send less",
                param=wanted.asked,
                code="context_length_exceeded",
            )
        return Turn(
            plan,
            own,
            post,
            priority=wanted.priority,
            keeps=wanted.store or wanted.seal,
            wants_logits=wanted.logprobs is not None,
            scored=post.scored if wanted.scores else None,
            borders=NO_BORDERS
            if self._prefixes is None or wanted.scores
            else self._prefixes.borders(own, plan.ids, wanted.salt),
        )

    def _require_tokens(self, wanted: Wanted) -> None:
        """Refused for ids that the vocabulary does not have."""
        end = self.model.spec.vocab_size
        for name, tokens in (("logit_bias", dict(wanted.bias)), ("stop_tokens", wanted.options.stop_tokens)):
            if unknown := [token for token in tokens if token >= end]:
                raise Refused(f"{name} has the token {unknown[0]}, expected ids from 0 to {end - 1}", param=name)

    def _grammar(self, wanted: Wanted) -> Grammar | None:
        """What the answer has to look like; None: like anything."""
        form: dict[str, Any] | str | None = wanted.schema
        offer = wanted.offer
        try:
            if offer is not None:
                syntax, schema = self.syntax, wanted.schema
                form = syntax.grammar(offer.tools, must=offer.must, several=offer.several, schema=schema)
            return None if form is None else self.model.grammar(form)
        except InputError as error:
            if offer is not None:
                self._require_compiled(offer)
            raise Refused(str(error), param="response_format" if offer is None else "tools") from None

    def _require_compiled(self, offer: Offer) -> None:
        """Refused for the first tool whose schema is to blame."""
        for tool in offer.tools:
            try:
                self.model.grammar(tool.parameters)
            except InputError as error:
                raise Refused(f"the function {tool.name}: {error}", param="tools") from None

    def _chat_ids(self, wanted: Wanted, state: State | None) -> list[int]:
        """Token ids of a chat's messages, after what a state has seen."""
        tokenizer, offer = self.model.tokenizer, wanted.offer
        tools = [] if offer is None else [described(tool) for tool in offer.tools]
        how: dict[str, Any] = {"tools": tools, "variables": wanted.variables}
        if wanted.goes_on:
            return tokenizer.as_it_stands(self.template.unfinished(wanted.messages, **how))
        how["answer"] = wanted.answer
        if state is None:
            return tokenizer.as_it_stands(self.template.render(wanted.messages, **how))
        ends = self.model.spec.eos_token_ids
        return continued(self.template, tokenizer, state, ends, wanted.messages, **how)
