"""Many generations at once: each is what it would be alone, whenever the others come and go."""

import numpy as np
import pytest

import dijiang
from dijiang.batching.batcher import Batcher, Pace
from dijiang.batching.scheduler import Scheduler
from dijiang.batching.turn import Turn
from dijiang.runtime.generate import prepare
from dijiang.runtime.options import Generation
from tests.conftest import RUNNABLE

KINDS = [
    {},
    {"temperature": 1.3, "top_p": 0.95},
    {"temperature": 1.0, "repetition_penalty": 1.3, "top_k": 40},
    {"temperature": 2.0, "stop": ["e"]},
]


class Told:
    """Keeps what a turn was told."""

    def __init__(self):
        self.records, self.errors, self.logits = [], [], []

    def record(self, record, logits):
        self.records.append(record)
        self.logits.append(logits)

    def failed(self, error):
        self.errors.append(error)

    @property
    def result(self):
        return result(self.records)


def result(records):
    return [r.token for r in records], "".join(r.text for r in records), records[-1].finish_reason


def turn_of(model, prompt, *, state=None, bias=None, priority=0, keeps=False, wants_logits=False, **options):
    state = model.new_state() if state is None else state
    plan = prepare(model, prompt, Generation.of(options), state, keeps=False, bias=bias or {})
    return Turn(plan, state, Told(), priority=priority, keeps=keeps, wants_logits=wants_logits)


def alone(model, prompt, **options):
    return result(list(model.generate(prompt, **options)))


def requests(model, count, seed):
    random = np.random.default_rng(seed)
    for number in range(count):
        prompt = random.integers(0, model.spec.vocab_size, random.integers(1, 60)).tolist()
        kind = KINDS[number % len(KINDS)]
        yield prompt, kind | {"max_tokens": int(random.integers(1, 30)), "seed": int(random.integers(1000))}


@pytest.fixture(scope="module", params=["int8", "int4"])
def exact(request, exported):
    if "native" not in RUNNABLE:
        pytest.skip("no compiled operator")
    return dijiang.load(exported("tiny-python", precision=request.param, graph="native"), threads=1)


@pytest.fixture(scope="module")
def model(exported):
    return dijiang.load(exported("tiny-python"), threads=1)


def run(batcher, turns, arrivals=3):
    """Submit turns at random steps."""
    random, waiting = np.random.default_rng(0), list(turns)
    while True:
        for _ in range(random.integers(0, arrivals + 1)):
            if waiting:
                batcher.submit(waiting.pop(0))
        if not batcher.step() and not waiting:
            return


@pytest.mark.parametrize(("slots", "budget"), [(1, None), (3, 7), (8, None), (8, 16)])
def test_batched_is_single_bit_for_bit(exact, slots, budget):
    asked = list(requests(exact, 24, slots))
    turns = [turn_of(exact, prompt, keeps=True, **options) for prompt, options in asked]
    run(Batcher(exact, slots, budget), turns)
    for turn, (prompt, options) in zip(turns, asked, strict=True):
        state = exact.new_state()
        expected = alone(exact, prompt, state=state, **options)
        tokens, _, reason = turn.listener.result
        assert (tokens, reason) == (expected[0], expected[2])
        assert [a.tobytes() for a in turn.state.layers] == [a.tobytes() for a in state.layers]
        assert turn.state.position.tolist() == state.position.tolist()
        assert (turn.state.history == state.history).all()
        assert (turn.state.last == state.last).all()
        assert (turn.state.seen == state.seen).all()
        assert turn.listener.result[1] == alone(exact, prompt, **options)[1]


@pytest.mark.parametrize("graph", RUNNABLE)
def test_batched_is_near_single_in_every_graph(exported, graph):
    model = dijiang.load(exported("tiny-python", graph=graph))
    prompts = [prompt for prompt, _ in requests(model, 6, 1)]
    turns = [turn_of(model, p, max_tokens=4, wants_logits=True, ignore_eos=True) for p in prompts]
    run(Batcher(model, 4, 9), turns)
    for turn, prompt in zip(turns, prompts, strict=True):
        state, ids = model.new_state(), prompt
        for record, logits in zip(turn.listener.records, turn.listener.logits, strict=True):
            expected = model.forward([ids], state)[0]
            np.testing.assert_allclose(logits, expected, atol=1e-4)
            ids = [record.token]


def test_prompt_and_tokens_go_through_the_native_graph_in_one_step(exact, monkeypatch):
    batcher, steps, run_step = Batcher(exact, 4, budget=9), [], exact.session.run

    def counted(step, state):
        steps.append([len(piece) for piece in step.fed()])
        return run_step(step, state)

    monkeypatch.setattr(exact.session, "run", counted)
    running, joins = (turn_of(exact, [4] * n, max_tokens=20, ignore_eos=True) for n in (1, 20))
    batcher.submit(running)
    batcher.step()
    batcher.submit(joins)
    for _ in range(3):
        batcher.step()
    assert steps[2:] == [[1, 9], [1, 9], [1, 2]]
    assert len(running.listener.records) == 5
    assert len(joins.listener.records) == 1


def test_prompt_goes_on_alone_where_the_last_running_turn_is_cancelled(exact):
    batcher, prompt = Batcher(exact, 4, budget=5), list(range(40))
    running, joins = turn_of(exact, [3], max_tokens=90, ignore_eos=True), turn_of(exact, prompt, max_tokens=5)
    batcher.submit(running)
    batcher.step()
    batcher.submit(joins)
    batcher.step()
    batcher.step()
    batcher.cancel(running)
    while batcher.step():
        pass
    assert joins.listener.result == alone(exact, prompt, max_tokens=5)


def test_cancelled_turn_frees_its_slot_within_one_step_and_harms_nobody(exact):
    batcher = Batcher(exact, 2)
    first, second, third = (turn_of(exact, [n + 5], max_tokens=40, ignore_eos=True) for n in range(3))
    for turn in (first, second, third):
        batcher.submit(turn)
    for _ in range(6):
        batcher.step()
    assert not third.listener.records
    told = len(first.listener.records)
    batcher.cancel(first)
    batcher.step()
    assert third.listener.records
    while batcher.step():
        pass
    assert len(first.listener.records) == told
    assert second.listener.result == alone(exact, [6], max_tokens=40, ignore_eos=True)
    assert third.listener.result == alone(exact, [7], max_tokens=40, ignore_eos=True)


def test_better_priority_takes_a_slot_and_the_other_goes_on_as_if_nothing_was(exact):
    batcher = Batcher(exact, 1)
    slow = turn_of(exact, [5, 6], max_tokens=30, ignore_eos=True, priority=1, temperature=1.0, seed=3)
    urgent = turn_of(exact, [7, 8], max_tokens=5, ignore_eos=True)
    batcher.submit(slow)
    for _ in range(10):
        batcher.step()
    before = len(slow.listener.records)
    batcher.submit(urgent)
    while not urgent.listener.records or not urgent.listener.records[-1].finish_reason:
        batcher.step()
    assert len(slow.listener.records) == before
    while batcher.step():
        pass
    assert slow.listener.result == alone(exact, [5, 6], max_tokens=30, ignore_eos=True, temperature=1.0, seed=3)


def test_forks_share_a_prompt_and_draw_by_their_own_seed(exact):
    batcher, prompt = Batcher(exact, 2), list(range(5, 60))
    first, *others = (
        turn_of(exact, prompt, max_tokens=9, temperature=1.5, seed=seed, ignore_eos=True) for seed in range(4)
    )
    first.forks = others
    batcher.submit(first)
    while batcher.step():
        pass
    for seed, turn in enumerate([first, *others]):
        assert turn.listener.result == alone(
            exact, prompt, max_tokens=9, temperature=1.5, seed=seed, ignore_eos=True
        )


def test_short_prompt_does_not_wait_for_a_long_one_nor_do_tokens(model):
    batcher = Batcher(model, 3, budget=16)
    running = turn_of(model, [3], max_tokens=200, ignore_eos=True)
    batcher.submit(running)
    batcher.step()
    long, short = turn_of(model, [4] * 400, max_tokens=1), turn_of(model, [5] * 20, max_tokens=1)
    batcher.submit(long)
    batcher.step()
    batcher.submit(short)
    for _ in range(4):  # two pieces of its own, two of the long one
        before = len(running.listener.records)
        batcher.step()
        assert len(running.listener.records) == before + 1  # one token a step, whatever joins
    assert short.listener.records
    assert not long.listener.records


@pytest.mark.parametrize("temperature", [0, 1])
def test_error_of_one_turn_is_its_own(model, temperature):
    batcher = Batcher(model, 3)
    good = turn_of(model, [3, 4], max_tokens=6, ignore_eos=True)
    bad = turn_of(model, [3, 5], max_tokens=6, ignore_eos=True, temperature=temperature)
    for turn in (good, bad):
        batcher.submit(turn)
    batcher.step()
    batcher.step()
    told = len(bad.listener.records)
    batcher._slots._memory[0][batcher._slots.turns.index(bad)] = np.nan
    while batcher.step():
        pass
    assert "hold NaN" in str(bad.listener.errors[0])
    assert len(bad.listener.records) == told
    assert good.listener.result == alone(model, [3, 4], max_tokens=6, ignore_eos=True)


def test_failed_step_ends_who_was_in_it_and_others_go_on(model, monkeypatch):
    batcher = Batcher(model, 2)
    first, second = (turn_of(model, [n], max_tokens=6, ignore_eos=True) for n in (3, 4))
    batcher.submit(first)
    batcher.step()
    batcher.step()

    def fail(step, state):
        raise dijiang.SessionError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(model.session, "run", fail)
        batcher.step()
    assert [str(error) for error in first.listener.errors] == ["out of memory"]
    batcher.submit(second)
    while batcher.step():
        pass
    assert second.listener.result == alone(model, [4], max_tokens=6, ignore_eos=True)


def test_failed_step_of_both_ends_every_prompt_whose_state_was_in_it(exact, monkeypatch):
    batcher = Batcher(exact, 4, budget=5)
    running, fed, waits = (turn_of(exact, [4] * n, max_tokens=50, ignore_eos=True) for n in (1, 40, 40))
    for turn in (running, fed, waits):
        batcher.submit(turn)
        batcher.step()
        batcher.step()
    last = turn_of(exact, [5] * 9, max_tokens=6, ignore_eos=True)
    batcher.submit(last)  # has not begun: its state is its own

    def fail(step, state):
        state.tear("out of memory")
        raise dijiang.SessionError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(exact.session, "run", fail)
        batcher.scheduler.feeding.rotate(1)  # the last prompt comes later
        batcher.step()
    for turn in (running, fed, waits):
        assert [str(error) for error in turn.listener.errors] == ["out of memory"]
    while batcher.step():
        pass
    assert last.listener.result == alone(exact, [5] * 9, max_tokens=6, ignore_eos=True)


def test_prompt_that_fails_at_its_end_harms_nobody(exact, monkeypatch):
    batcher = Batcher(exact, 2)
    good, bad = turn_of(exact, [3, 4], max_tokens=9, ignore_eos=True), turn_of(exact, [5], max_tokens=9)
    batcher.submit(good)
    batcher.step()

    def fail(model):
        raise dijiang.InputError("the grammar cannot begin")

    monkeypatch.setattr(bad, "begin", fail)
    batcher.submit(bad)
    while batcher.step():
        pass
    assert [str(error) for error in bad.listener.errors] == ["the grammar cannot begin"]
    assert good.listener.result == alone(exact, [3, 4], max_tokens=9, ignore_eos=True)


def test_bias_forces_and_forbids_tokens(model):
    forced = turn_of(model, [3], max_tokens=4, bias={9: 1e4}, ignore_eos=True)
    batcher = Batcher(model, 1)
    batcher.submit(forced)
    while batcher.step():
        pass
    assert [r.token for r in forced.listener.records] == [9] * 4
    with pytest.raises(dijiang.InputError, match="the bias is for token id 99999999"):
        turn_of(model, [3], bias={99999999: 1.0})


def test_scheduler_keeps_to_its_slots_and_takes_the_best_first(model):
    scheduler, random = Scheduler(3), np.random.default_rng(0)
    turns = [turn_of(model, [1], priority=int(p)) for p in random.integers(0, 4, 40)]
    ended = []
    for turn in turns:
        scheduler.add(turn)
    while scheduler.busy:
        scheduler.admit()
        assert len(scheduler.feeding) + len(scheduler.running) <= 3
        turn = scheduler.next_fed() or scheduler.running[0]
        scheduler.end(turn)
        ended.append(turn.rank[0])
    assert ended == sorted(ended)
    assert len(ended) == len(turns)


def test_pace_of_steps_of_both_keeps_to_its_part_of_a_step():
    pace = Pace(256, least=4, part=0.5)
    assert pace.budget == 4
    pace.stepped_and_fed(4, 1.0)  # of a step alone nothing is known yet
    pace.stepped(10e-3)
    for _ in range(60):
        pace.stepped_and_fed(pace.budget, 10e-3 + pace.budget * 1e-4)  # 50 tokens add 5 ms
    assert abs(pace.budget - 50) <= 1
    for _ in range(60):
        pace.stepped_and_fed(pace.budget, 9e-3)  # faster than a step alone: noise
    assert pace.budget == 256


def test_pace_comes_to_a_piece_that_takes_as_long_as_a_step():
    pace = Pace(256)
    for _ in range(60):
        pace.stepped(10e-3)
        pace.fed(pace.budget, 4e-3 + pace.budget * 1e-4)  # 60 tokens take 10 ms
    assert abs(pace.budget - 60) <= 2
    for _ in range(60):
        pace.fed(pace.budget, 1e-9)
    assert pace.budget == 256


def test_turn_that_comes_after_the_end_is_told_so_at_once(model):
    """A thread of steps that ended has nobody who would take it."""
    batcher = Batcher(model, 2)
    early, late = (turn_of(model, [1, 2], max_tokens=3) for _ in range(2))
    batcher.submit(early)
    batcher.close()
    batcher.run()
    batcher.submit(late)
    for turn in (early, late):
        (error,) = turn.listener.errors
        assert "closed before the end" in str(error)


def test_scored_prompt_goes_in_pieces_of_its_own_pace(exact, monkeypatch):
    """Beside running turns; a piece that joins their step is shorter."""
    heard, pieces, run_step = [], [], type(exact.session).run

    def noted(session, step, state):
        pieces.append(step.ids.shape[1])
        return run_step(session, step, state)

    monkeypatch.setattr(type(exact.session), "run", noted)
    batcher = Batcher(exact, 2)
    running = turn_of(exact, [5, 6], max_tokens=200, ignore_eos=True)
    batcher.submit(running)
    while not running.listener.records:
        batcher.step()
    ids = [7 * at % 2000 for at in range(300)]
    scored = turn_of(exact, ids, max_tokens=1)
    scored.scored = lambda following, logits: heard.extend(following.tolist())
    batcher.submit(scored)
    pieces.clear()
    while not scored.listener.records:
        batcher.step()
    assert heard == ids[1:]
    assert min(length for length in pieces if length > 1) >= 12  # the last one is what is left
    assert len(running.listener.records) > 1
