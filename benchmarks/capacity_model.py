"""A model of many servers: nodes that decode for many conversations, as discrete events (SimPy).

A node is fluid between events: its running turns all go on at the speed that a step of so many rows has, and one
prompt is fed beside them. So an event is a turn that comes, is fed, or ends; not a token.
"""

from __future__ import annotations

import heapq
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy


@dataclass(frozen=True)
class Node:
    """What a node can do, as measured.

    steps: seconds of a decode step by rows (from 1), between which is interpolated.  prompt: seconds a token of a
    prompt.  slots: turns at once.  memory: bytes for what is kept between turns.  bandwidth: bytes/s from memory.
    link: bytes/s over the network.  hop: seconds that a request takes beside all that.
    """

    steps: dict[int, float]
    prompt: float
    slots: int = 16
    memory: float = 8e9
    bandwidth: float = 20e9
    link: float = 1.25e9
    hop: float = 0.0

    def table(self) -> list[float]:
        """Seconds of a step of 0, 1, 2, ... rows."""
        known = sorted(self.steps)
        rows = range(self.slots + 1)
        return [float(np.interp(row, known, [self.steps[one] for one in known])) for row in rows]


@dataclass(frozen=True)
class Way:
    """How a conversation's past reaches the node of its next turn.

    constant, each: bytes of it, and of each of its tokens.  moves: it travels with the request, to any node.
    keeps: it stays where the last turn was, until that node's memory is full.  Neither: its text is fed again.
    reads: whether a step reads all of it, beside the weights.
    """

    name: str
    constant: float = 0.0
    each: float = 0.0
    moves: bool = False
    keeps: bool = False
    reads: bool = False

    def size(self, tokens: int) -> float:
        """Bytes of the past of a conversation."""
        return self.constant + self.each * tokens


@dataclass(frozen=True)
class Load:
    """What is asked: a turn is a question and an answer of so many tokens; then somebody thinks for some seconds.

    Lengths of answers, pauses and conversations are exponential, with these means.  system: tokens at the start of
    each conversation, which every node has kept.  turns: of a conversation.
    """

    question: int = 200
    answer: int = 400
    think: float = 300.0
    system: int = 500
    turns: float = 10.0


@dataclass(eq=False)
class Conversation:
    """Tokens of its past, and the node that has kept them."""

    past: int
    home: int = -1


@dataclass(eq=False)
class Turn:
    """A question that waits, is fed, and is answered."""

    conversation: Conversation
    asked: float
    feed: float
    read: float
    done: simpy.Event
    tokens: int
    end: float = 0.0
    first: float = 0.0

    def __lt__(self, other: Turn) -> bool:
        return self.end < other.end


@dataclass
class Seen:
    """What was measured in the model, by the time when a turn was asked for."""

    first: list[tuple[float, float]] = field(default_factory=list)
    each: list[float] = field(default_factory=list)
    tokens: int = 0
    fed: float = 0.0
    fed_again: float = 0.0
    moved: float = 0.0
    evicted: int = 0
    lost: int = 0


class Server:
    """A node at work. Time is taken up in `_advance`, and one timer stands for what happens next."""

    def __init__(
        self, env: simpy.Environment, number: int, node: Node, table: list[float], way: Way, seen: Seen
    ) -> None:
        self.env, self.number, self.node, self.table, self.way, self.seen = env, number, node, table, way, seen
        self.kept: OrderedDict[Conversation, float] = OrderedDict()
        self.kept_bytes = self.rows = 0.0
        self.up = True
        self._waiting: deque[Turn] = deque()
        self._feeding: deque[Turn] = deque()
        self._running: list[Turn] = []
        self._read = 0.0
        self._progress = self._fed = self._then = 0.0
        self._timer = 0

    @property
    def load(self) -> int:
        return len(self._waiting) + len(self._feeding) + len(self._running)

    def submit(self, turn: Turn) -> None:
        self._advance()
        self._waiting.append(turn)
        self._settle()

    def _speeds(self) -> tuple[float, float]:
        """Tokens a second of each running turn, and of the prompt that is fed; beside each other at half speed."""
        share = 0.5 if self._feeding and self._running else 1.0
        step = self.table[len(self._running)] + self._read / self.node.bandwidth
        return share / step if self._running else 0.0, share / self.node.prompt if self._feeding else 0.0

    def _advance(self) -> None:
        passed, self._then = self.env.now - self._then, self.env.now
        decode, feed = self._speeds()
        self._progress += passed * decode
        self._fed += passed * feed
        self.rows += passed * len(self._running)

    def _settle(self) -> None:
        """Let turns go on whose time has come, and set the timer for the next of them."""
        while True:
            if self._running and self._running[0].end <= self._progress + 1e-6:
                turn = heapq.heappop(self._running)
                self._read -= turn.read
                turn.done.succeed()
            elif self._feeding and self._feeding[0].feed <= self._fed + 1e-6:
                turn, self._fed = self._feeding.popleft(), 0.0
                turn.first = self.env.now
                turn.end = self._progress + turn.tokens
                self._read += turn.read
                heapq.heappush(self._running, turn)
            elif self._waiting and len(self._running) + len(self._feeding) < self.node.slots:
                self._feeding.append(self._waiting.popleft())
            else:
                break
        decode, feed = self._speeds()
        waits = []
        if decode:
            waits.append((self._running[0].end - self._progress) / decode)
        if feed:
            waits.append((self._feeding[0].feed - self._fed) / feed)
        self._timer += 1
        if waits:
            event = self.env.timeout(max(min(waits), 1e-9), self._timer)
            event.callbacks.append(self._rung)

    def _rung(self, event: simpy.Event) -> None:
        if event.value == self._timer:  # not one that was set before something else happened
            self._advance()
            self._settle()

    def keep(self, conversation: Conversation) -> None:
        """Its past stays here; those that were not used for longest make room."""
        size = self.way.size(conversation.past)
        self.kept_bytes += size - self.kept.pop(conversation, 0.0)
        self.kept[conversation], conversation.home = size, self.number
        while self.kept_bytes > self.node.memory and len(self.kept) > 1:
            other, gone = self.kept.popitem(last=False)
            self.kept_bytes -= gone
            other.home = -1
            self.seen.evicted += 1

    def forget(self, conversation: Conversation) -> None:
        self.kept_bytes -= self.kept.pop(conversation, 0.0)
        conversation.home = -1

    def die(self) -> None:
        """All that was here is lost; who waited is told at once, and asks another node."""
        self._advance()
        self.up = False
        for turn in (*self._waiting, *self._feeding, *self._running):
            self.seen.lost += 1
            turn.done.fail(ConnectionError())
        self._waiting.clear()
        self._feeding.clear()
        self._running.clear()
        self._read, self._fed = 0.0, 0.0
        self._timer += 1
        for conversation in self.kept:
            conversation.home = -1
        self.kept.clear()
        self.kept_bytes = 0.0

    def rise(self) -> None:
        self._advance()
        self.up = True


class Cluster:
    """Nodes, and conversations that go on one turn after another until the end."""

    def __init__(self, nodes: int, node: Node, way: Way, load: Load, conversations: int, *, seed: int = 1) -> None:
        self.env, self.way, self.load, self.seen = simpy.Environment(), way, load, Seen()
        self.draw, self.node = random.Random(seed), node
        table = node.table()
        self.servers = [Server(self.env, number, node, table, way, self.seen) for number in range(nodes)]
        for _ in range(conversations):
            self.env.process(self._talk(self._begun()))

    def run(self, seconds: float, at: dict[float, Callable[[], None]] | None = None) -> Seen:
        """Let so much time pass; at: what happens besides, and when."""
        for when, what in (at or {}).items():
            event = self.env.timeout(when)
            event.callbacks.append(lambda _, what=what: what())
        self.env.run(until=seconds)
        return self.seen

    def _begun(self) -> Conversation:
        """One that has gone on for a while; where pasts are kept, its own is at some node."""
        turns = int(self.draw.expovariate(1 / self.load.turns))
        found = Conversation(self.load.system + turns * (self.load.question + self.load.answer))
        if self.way.keeps and turns:
            self.draw.choice(self.servers).keep(found)
        return found

    def _choose(self, conversation: Conversation) -> Server:
        """Where the past is; else the emptier one of two nodes."""
        if conversation.home >= 0:
            return self.servers[conversation.home]
        while True:
            pair = self.draw.choice(self.servers), self.draw.choice(self.servers)
            up = [server for server in pair if server.up]
            if up:
                return min(up, key=lambda server: server.load)

    def _talk(self, conversation: Conversation) -> Generator[Any, Any, None]:
        load, way, seen, env = self.load, self.way, self.seen, self.env
        yield env.timeout(self.draw.expovariate(1 / load.think) if load.think else 0)
        asked = env.now
        while True:
            if self.node.hop:
                yield env.timeout(self.node.hop)
            server, again = self._choose(conversation), 0.0
            if way.moves:
                size = way.size(conversation.past)
                seen.moved += 2 * size
                yield env.timeout(size / self.node.link)
            elif conversation.home < 0:
                again = conversation.past - load.system
            feed, tokens = load.question + again, max(1, round(self.draw.expovariate(1 / load.answer)))
            read = way.size(conversation.past) if way.reads else 0.0
            turn = Turn(conversation, asked, feed, read, env.event(), tokens)
            server.submit(turn)
            try:
                yield turn.done
            except ConnectionError:
                continue
            seen.first.append((asked, turn.first - asked))
            seen.each.append((env.now - turn.first) / tokens)
            seen.tokens += tokens
            seen.fed += feed
            seen.fed_again += again
            conversation.past += load.question + tokens
            if self.draw.random() * load.turns < 1:
                if conversation.home >= 0:
                    server.forget(conversation)
                conversation.past = load.system
            elif way.keeps and server.up:
                server.keep(conversation)
            if load.think:
                yield env.timeout(self.draw.expovariate(1 / load.think))
            asked = env.now
