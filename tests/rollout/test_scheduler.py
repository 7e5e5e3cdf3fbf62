"""The scheduler without a model: the order in which sequences get slots, and the calls that fill caches and decode."""

import random

import pytest

from apr_jax.rollout.scheduler import FILLED, UNEVEN, Plan, Request, Scheduler
from apr_jax.rollout.slots import HEAD, Sequence, Slots, State

WIDTHS, SIZES, STEPS = [64, 128, 192, 256], [1, 2, 4, 8, 16], 8


def scheduler(slots, devices=1):
    return Scheduler(slots, devices, widths=WIDTHS, sizes=SIZES, steps=STEPS)


class Play:
    """A simulated engine whose caches are lists of ids. It does the copies and prefills of the scheduler's rounds, and
    checks at every decode call that the slots contain the ids that their sequences need."""

    def __init__(self, slots, devices, seed=0):
        self.scheduler = scheduler(slots, devices)
        self.devices, self.rng = devices, random.Random(seed)
        self.cache = [[] for _ in range(slots)]
        self.started = []  # requests in the order in which they got a slot

    def ask(self, sequence, tokens):
        request = Request(sequence, tokens)
        self.scheduler.ask(request)
        return request

    def step(self):
        """Do one turn of the engine's loop. Returns the requests that ended."""
        known = set(map(id, self.started))
        for copies, prefills in self.scheduler.admit():
            for source, target, count in copies:
                assert self.scheduler.slots.device(source) == self.scheduler.slots.device(target)
                self.cache[target][:count] = self.cache[source][:count]
            for sequence, first in prefills:
                self.cache[sequence.slot][first:] = sequence.ids[first:-1]
        self.scheduler.check()
        groups = list(self.scheduler.groups())
        running = [request for group in groups for there in group.requests for request in there]
        self.started += [request for request in running if id(request) not in known]
        self.check_groups(groups, running)
        for request in running:
            self.draw(request, min(request.left, self.rng.randint(1, STEPS)))
        ended = [request for request in running if not request.left]
        for request in ended:
            self.scheduler.end(request)
            assert request.sequence.state is State.IDLE
        self.scheduler.check()
        return ended

    def draw(self, request, count):
        sequence = request.sequence
        cached = len(sequence.ids) - 1
        assert self.cache[sequence.slot][:cached] == sequence.ids[:-1], "the slot lacks ids of its sequence"
        sequence.ids.extend(self.rng.randrange(50) for _ in range(count))
        self.cache[sequence.slot][cached:] = sequence.ids[cached:-1]
        self.scheduler.slots.note(sequence, len(sequence.ids) - 1)
        request.left -= count

    def check_groups(self, groups, running):
        """Check that every running request is in one call, that a call has the smallest width that fits, and that it is
        as full as FILLED demands."""
        owners = [owner for owner in self.scheduler.slots.owners if owner and owner.state is State.RUNNING]
        assert sorted(map(id, owners)) == sorted(id(request.sequence) for request in running)
        slots = [request.sequence.slot for request in running]
        assert len(set(slots)) == len(slots)
        widths = [group.width for group in groups]
        assert widths == sorted(widths, reverse=True)
        for width, size, requests in groups:
            assert width in WIDTHS and size in SIZES and len(requests) == self.devices
            needed = [len(r.sequence.ids) + min(STEPS, r.left) for there in requests for r in there]
            assert max(needed) <= width and not any(shorter >= max(needed) for shorter in WIDTHS if shorter < width)
            fill = max(sum(len(r.sequence.ids) + min(STEPS, r.left) > width - 64 for r in there) for there in requests)
            assert size == SIZES[0] or fill >= FILLED * size
            for device, there in enumerate(requests):
                assert len(there) <= size
                assert all(self.scheduler.slots.device(r.sequence.slot) == device for r in there)


@pytest.mark.parametrize("slots, devices", [(1, 1), (2, 2), (5, 1), (12, 2), (60, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_every_request_ends(slots, devices, seed):
    """Random trees of parents that wait for children, fork and resume, with any number of slots. Some requests are
    cancelled."""
    play, rng = Play(slots, devices, seed), random.Random(seed)
    stems = [[rng.randrange(50) for _ in range(40)] for _ in range(3)]
    asked, children, parents = {}, {}, {}  # keyed by id(): of a request, of a parent's sequence, of a child's request
    ended = 0

    def ask(sequence, parent=None):
        request = play.ask(sequence, rng.randint(1, 20))
        asked[id(request)] = request
        if parent is not None:
            children.setdefault(id(parent), set()).add(id(request))
            parents[id(request)] = parent

    def finish(request, cancelled):
        """After a request that ended or was cancelled: its sequence gets children or is freed. When a parent's last
        child is done, the parent resumes in a fork."""
        nonlocal ended
        ended += 1
        del asked[id(request)]
        sequence, parent = request.sequence, parents.pop(id(request), None)
        if sequence.depth < 4 and not cancelled and len(sequence.ids) < 150 and rng.random() < 0.7:
            for _ in range(rng.randint(1, 3)):
                child = Sequence(sequence.ids[: rng.randint(1, len(sequence.ids))] + [3, 4], None, sequence.depth + 1)
                child.parent, child.shared = sequence, len(child.ids) - 2
                ask(child, sequence)
        else:
            play.scheduler.slots.free(sequence)
        if parent is not None:
            children[id(parent)].discard(id(request))
            if not children[id(parent)]:
                heir = Sequence(parent.ids[: rng.randint(1, len(parent.ids))], None, parent.depth + 1)
                parent.heir, heir.parent, heir.shared = heir, parent, len(heir.ids)
                placed = parent.state is State.IDLE
                play.scheduler.slots.free(parent)
                assert parent.state is State.FREED and heir.state is (State.IDLE if placed else State.OUTSIDE)
                heir.ids += [5, 6]
                heir.depth = 4  # it has no children
                ask(heir)

    for index in range(12):
        ask(Sequence(stems[index % 3][: rng.randint(1, 40)] + [index], None, 1))
    for _ in range(5000):
        if not play.scheduler.busy:
            break
        for request in play.step():
            finish(request, cancelled=False)
        if rng.random() < 0.1 and asked:
            cancelled = rng.choice(list(asked.values()))
            play.scheduler.end(cancelled)
            play.scheduler.check()
            finish(cancelled, cancelled=True)
    assert not asked and not play.scheduler.busy and ended > 12
    play.scheduler.check()


def test_longer_names_are_served_first_and_equal_ones_in_order_of_arrival():
    play = Play(slots=1, devices=1)
    depths = [1, 3, 2, 3, 1, 2]
    requests = [play.ask(Sequence([7, 8, index], None, depth), 1) for index, depth in enumerate(depths)]
    while play.scheduler.busy:
        for request in play.step():
            play.scheduler.slots.free(request.sequence)
    assert [requests.index(request) for request in play.started] == [1, 3, 2, 5, 0, 4]


def test_the_longest_idle_sequence_loses_its_slot_and_a_running_one_keeps_it():
    play = Play(slots=3, devices=1)
    first, second, third, fourth, fifth = (Sequence([number] * 4, None, 1) for number in range(5))
    play.ask(first, 1), play.ask(second, 1), play.ask(third, 100)
    play.step()
    assert [s.state for s in (first, second, third)] == [State.IDLE, State.IDLE, State.RUNNING]
    kept = second.slot
    play.ask(fourth, 100)
    play.ask(second, 100)
    assert (fourth.state, second.state) == (State.WAITING, State.READY)
    taken = first.slot
    play.step()
    assert first.state is State.OUTSIDE and first.slot is None and fourth.slot == taken and second.slot == kept
    again = play.ask(first, 5)
    play.ask(fifth, 5)
    play.step()
    assert first.state is State.WAITING and again.left == 5, "a running sequence lost its slot"
    assert [s.state for s in (second, third, fourth)] == [State.RUNNING] * 3


def test_a_ready_sequence_may_lose_its_slot_to_a_longer_name():
    play = Play(slots=1, devices=1)
    root, child = Sequence([1, 2], None, 1), Sequence([3, 4], None, 2)
    play.ask(root, 1)
    play.step()
    resumed = play.ask(root, 2)
    play.ask(child, 1)
    assert root.state is State.READY
    play.step()
    assert child.state is State.IDLE and root.state is State.WAITING and resumed.left == 2
    while play.scheduler.busy:
        play.step()
    assert root.state is State.IDLE and child.state is State.OUTSIDE and not resumed.left


def test_when_no_request_waits_the_shortest_sequences_of_the_fullest_device_move():
    play = Play(slots=40, devices=2)
    requests = [play.ask(Sequence([50 + index] * (60 + index), None, 1), 100) for index in range(40)]
    play.scheduler.admit()
    of_device = [[r for r in requests if play.scheduler.slots.device(r.sequence.slot) == device] for device in (0, 1)]
    assert len(of_device[0]) == len(of_device[1]) == 20
    for request in of_device[1][:16]:
        play.scheduler.end(request)
        play.scheduler.slots.free(request.sequence)
    plan = play.scheduler.admit()
    play.scheduler.check()
    moved = [r for r in of_device[0] if play.scheduler.slots.device(r.sequence.slot) == 1]
    assert moved == of_device[0][:4] and len(of_device[0]) - 4 - (4 + 4) <= UNEVEN, (
        "the shortest, and no more than needed"
    )
    assert [(p.sequence, p.first) for r in plan for p in r.prefills] == [(r.sequence, 0) for r in moved]


def test_sequences_of_equal_length_share_a_call_and_a_long_one_has_its_own():
    play = Play(slots=16, devices=1)
    for length in [20] * 6 + [200]:
        play.ask(Sequence(range(length), None, 1), 50)
    play.scheduler.admit()
    groups = list(play.scheduler.groups())
    assert [(g.width, g.size, [len(there) for there in g.requests]) for g in groups] == [(256, 1, [1]), (64, 8, [6])]


def test_a_group_s_empty_places_go_to_the_next_shorter_sequences():
    play = Play(slots=16, devices=2)
    for index in range(14):
        play.ask(Sequence(range(100 if index < 6 else 20), None, 1), 50)
    play.scheduler.admit()
    first, *_ = groups = list(play.scheduler.groups())
    assert first.width == 128 and first.size == 4
    assert [len(there) for there in first.requests] == [4, 4], "three of the width, and a shorter one"
    assert sum(len(there) for group in groups for there in group.requests) == 14


def test_invalid_requests_are_refused():
    play = Play(slots=2, devices=1)
    sequence = Sequence([1, 2, 3], None, 1)
    request = play.ask(sequence, 50)
    for _ in range(2):  # first the request waits, then it runs
        with pytest.raises(ValueError, match="already"):
            play.ask(sequence, 1)
        with pytest.raises(ValueError, match="decodes"):
            play.scheduler.slots.free(sequence)
        play.step()
    play.scheduler.end(request)
    play.scheduler.slots.free(sequence)
    with pytest.raises(ValueError, match="freed"):
        play.ask(sequence, 1)
    play.scheduler.check()


def test_all_requests_can_be_ended_at_once():
    play = Play(slots=2, devices=1)
    requests = [play.ask(Sequence([index, 1], None, 1), 50) for index in range(5)]
    play.step()
    play.scheduler.end(requests[4])
    assert set(play.scheduler.end_all()) == set(requests[:4]) and not play.scheduler.busy
    states = [request.sequence.state for request in requests]
    assert states == [State.IDLE, State.IDLE, State.OUTSIDE, State.OUTSIDE, State.OUTSIDE]
    play.scheduler.check()


@pytest.mark.parametrize("field, value", [("state", State.OUTSIDE), ("slot", 1), ("cached", 1)])
def test_a_check_finds_contradictions(field, value):
    play = Play(slots=2, devices=1)
    request = play.ask(Sequence([1, 2, 3], None, 1), 50)
    play.step()
    setattr(request.sequence, field, value)
    with pytest.raises(AssertionError):
        play.scheduler.check()


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_s_rounds_fill_every_slot_with_its_sequence_s_ids(seed):
    """Caches are lists of ids. A copy reads the content that a slot has at that time."""
    rng = random.Random(seed)
    table = Slots(12, devices=2)
    cache = [[] for _ in range(12)]
    stems = [[rng.randrange(9) for _ in range(60)] for _ in range(3)]
    live = []
    for _ in range(40):
        plan, filled = Plan(), []
        for _ in range(rng.randint(1, 5)):
            ids = rng.choice(stems)[: rng.randint(1, 60)] + [rng.randrange(9) for _ in range(rng.randint(1, 6))]
            sequence = Sequence(ids, None, 1)
            table.ask(sequence)
            placed = table.place(sequence)
            if placed is None:
                break
            source, shared = placed
            assert shared == 0 or table.device(source) == table.device(sequence.slot)
            plan.add(sequence, source, shared)
            table.note(sequence, len(ids) - 1)
            live.append(sequence)
            filled.append(sequence)
        for copies, prefills in plan.rounds:
            for source, target, count in copies:
                assert count >= HEAD
                cache[target] = cache[source][:count] + cache[target][count:]
            for sequence, first in prefills:
                new = sequence.ids[first:-1]
                cache[sequence.slot][first : first + len(new)] = new
        for sequence in filled:
            assert cache[sequence.slot][: len(sequence.ids) - 1] == sequence.ids[:-1]
        for sequence in [s for s in live if s.state is State.OUTSIDE or rng.random() < 0.2]:
            live.remove(sequence)  # it lost its slot, or becomes idle and may lose it
            if sequence.state is State.RUNNING:
                table.rest(sequence)
        for sequence in rng.sample(live, rng.randint(0, len(live))):
            live.remove(sequence)
            table.rest(sequence)
            table.free(sequence)
        table.check()
