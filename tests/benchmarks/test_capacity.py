"""The model of many nodes: what can be computed by hand, and what must not get lost."""

import random
from collections import deque

import numpy as np
import pytest
import simpy
from capacity_model import Cluster, Conversation, Load, Node, Seen, Server, Turn, Way

NODE = Node({1: 0.01, 2: 0.012, 8: 0.024}, prompt=0.001, slots=8)
SENT = Way("sent", constant=1e6, moves=True)


def fluid(node, asked):
    """When each turn had its first token, and its last: one event where something begins or ends."""
    env, times = simpy.Environment(), [[0.0, 0.0] for _ in asked]
    server = Server(env, 0, node, node.table(), SENT, Seen())

    def turn(number, at, feed, tokens, read):
        yield env.timeout(at)
        one = Turn(Conversation(0), at, feed, read, env.event(), tokens)
        server.submit(one)
        yield one.done
        times[number] = [one.first, env.now]

    for number, one in enumerate(asked):
        env.process(turn(number, *one))
    env.run()
    return np.array(times)


def stepped(node, asked):
    """The naive twin: token by token. After a step of all that run, the prompt is fed for as long as it took."""
    now, table, times = 0.0, node.table(), [[0.0, 0.0] for _ in asked]
    coming, feeding, running = deque(sorted(enumerate(asked), key=lambda one: one[1][0])), deque(), {}
    while coming or feeding or running:
        if not feeding and not running:
            now = max(now, coming[0][1][0])
        while coming and coming[0][1][0] <= now and len(feeding) + len(running) < node.slots:
            number, (_, feed, tokens, read) = coming.popleft()
            feeding.append([number, feed, tokens, read])
        step = table[len(running)] + sum(read for _, read in running.values()) / node.bandwidth if running else 0.0
        now += step
        for number in list(running):
            running[number][0] -= 1
            if not running[number][0]:
                del running[number]
                times[number][1] = now
        if feeding:
            number, left, tokens, read = feeding[0]
            fed = min(left, step / node.prompt or 1)
            now += fed * node.prompt
            feeding[0][1] -= fed
            if feeding[0][1] < 1e-9:
                feeding.popleft()
                times[number][0], running[number] = now, [tokens, read]
    return np.array(times)


@pytest.mark.parametrize("busy", [0.5, 2.0], ids=["some wait", "most wait"])
def test_events_of_turns_are_steps_of_tokens(busy):
    """A turn is two events, however many steps it has. The twin's times come near as its steps get short."""
    draw, asked, now = random.Random(1), [], 0.0
    for _ in range(200):
        now += draw.expovariate(busy)
        asked.append((now, draw.randint(1, 300), 1 + int(draw.expovariate(1 / 60)), draw.choice([0.0, 1e8])))
    apart = []
    for finer in (1, 10):
        steps = {rows: seconds / finer for rows, seconds in NODE.steps.items()}
        node = Node(steps, NODE.prompt, NODE.slots, bandwidth=NODE.bandwidth * finer)
        many = [(at, feed, tokens * finer, read) for at, feed, tokens, read in asked]
        found, naive = fluid(node, many), stepped(node, many)
        assert (found > 0).all()
        apart.append(abs(found - naive).max() / (found[:, 1] - found[:, 0]).mean())
    assert apart[0] < 0.1
    assert apart[1] < min(0.015, apart[0] / 5)


def test_one_turn_at_a_time_takes_what_its_parts_take():
    load = Load(question=64, answer=50, think=0.0, system=0)
    seen = Cluster(1, NODE, SENT, load, 1).run(300)
    assert [wait for _, wait in seen.first] == pytest.approx(
        [0.001 * 64 + 1e6 / NODE.link] * len(seen.first), rel=1e-4
    )
    assert seen.each == pytest.approx([0.01] * len(seen.each), rel=1e-4)
    assert seen.moved == pytest.approx(2e6 * len(seen.first), abs=2e6)


def test_full_slots_share_the_step_of_so_many_rows():
    """Eight turns that go on for ever after short prompts: each gets a token a step of eight."""
    load = Load(question=1, answer=1000, think=0.0, system=0)
    seen = Cluster(1, NODE, SENT, load, 8).run(500)
    assert seen.tokens / 500 == pytest.approx(8 / 0.024, rel=0.05)


def test_more_turns_than_slots_wait_for_one():
    load = Load(question=1, answer=100, think=0.0, system=0)
    few, many = (Cluster(1, NODE, SENT, load, n).run(200) for n in (8, 16))
    assert many.tokens == pytest.approx(few.tokens, rel=0.1)
    waits = [np.mean([wait for _, wait in seen.first]) for seen in (few, many)]
    assert waits[1] > 20 * waits[0]


@pytest.mark.parametrize("memory", [1e12, 3e6], ids=["roomy", "tight"])
def test_kept_pasts_are_not_fed_again_while_there_is_room(memory):
    node, load = Node(NODE.steps, NODE.prompt, 8, memory=memory), Load(think=10.0, system=0)
    way = Way("kept", constant=1e6, keeps=True)
    cluster = Cluster(2, node, way, load, 40)
    seen = cluster.run(500)
    assert (seen.fed_again > 0, seen.evicted > 0) == (memory < 1e7, memory < 1e7)
    for server in cluster.servers:
        assert server.kept_bytes == pytest.approx(sum(server.kept.values()))
        assert server.kept_bytes <= max(memory, 1e6)
        assert all(conversation.home == server.number for conversation in server.kept)


@pytest.mark.parametrize("way", [SENT, Way("kept", constant=1e6, keeps=True)], ids=lambda way: way.name)
def test_turns_of_a_node_that_dies_are_asked_elsewhere(way):
    """All conversations go on; only what was kept there is fed again."""
    load = Load(question=10, answer=50, think=1.0, system=0, turns=5)
    cluster = Cluster(3, NODE, way, load, 30)
    dead = cluster.servers[0]
    seen = cluster.run(200, {100.0: dead.die})
    assert seen.lost > 0
    assert dead.load == 0
    assert (seen.fed_again > 0) == way.keeps
    last = max(asked for asked, _ in seen.first)
    assert last > 190
    assert len({round(asked) for asked, _ in seen.first if asked > 101}) > 80


def test_reading_a_cache_makes_steps_longer():
    load = Load(question=100, answer=100, think=0.0, system=0, turns=5)
    node = Node(NODE.steps, NODE.prompt, 8, bandwidth=1e9)
    plain, cache = (
        Cluster(1, node, Way("w", each=1e5, moves=True, reads=reads), load, 4).run(200) for reads in (0, 1)
    )
    assert cache.tokens < 0.7 * plain.tokens
