"""The order in which those who wait get memory: nobody starves, whoever asks for how much."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gms_core.server.memory_queue import LONGEST_TURN_S, PASSES, MemoryQueue

SIZES = st.integers(1, 100)


def test_first_that_fits_is_next_when_several_wait() -> None:
    queue = MemoryQueue()
    large, small, other = (queue.join(size, 0.0) for size in (50, 10, 5))
    assert queue.next(100, 0.0) == large
    assert queue.next(20, 0.0) == small
    assert queue.next(7, 0.0) == other
    assert queue.next(4, 0.0) is None


@given(st.lists(SIZES, min_size=1, max_size=20))
def test_order_is_that_of_arrival_when_everything_fits(sizes: list[int]) -> None:
    queue = MemoryQueue()
    tickets = [queue.join(size, 0.0) for size in sizes]
    served = []
    while (ticket := queue.next(max(sizes), 0.0)) is not None:
        queue.served(ticket)
        served.append(ticket)
    assert served == tickets


@given(st.lists(st.tuples(SIZES, st.floats(0, 5)), min_size=1, max_size=60), st.integers(1, 100))
def test_whoever_is_next_fits_and_nobody_fits_who_came_before(asked: list[tuple[int, float]], free: int) -> None:
    queue, now = MemoryQueue(), 0.0
    for size, pause in asked:
        queue.join(size, now)
        now += pause
        before = {waiting.ticket: waiting for waiting in queue}
        ticket = queue.next(free, now)
        if ticket is not None:
            assert before[ticket].size <= free
            assert all(other.size > free for number, other in before.items() if number < ticket)
            queue.served(ticket)


@given(st.integers(50, 100), st.lists(st.integers(1, 20), min_size=5, max_size=5), st.integers(1, 10))
def test_large_request_is_served_when_small_ones_never_stop_coming(large: int, small: list[int], held_for: int) -> None:
    """Memory of 100; small requests hold theirs for some rounds, and more of them wait at all times than fit."""
    queue, now, round_number = MemoryQueue(), 0.0, 0
    held = [(held_for, 20)] * 5  # the device is full when the large one comes
    sizes: dict[int, int] = {}
    wanted = queue.join(large, now)
    while True:
        round_number += 1
        now += 0.5
        for size in small:
            sizes[queue.join(size, now)] = size
        held = [(left - 1, size) for left, size in held if left > 1]
        while (ticket := queue.next(100 - sum(size for _, size in held), now)) is not None:
            queue.served(ticket)
            if ticket == wanted:
                return
            held.append((held_for, sizes[ticket]))
        assert round_number < 500, "the large request starves"


@given(st.integers(1, 20))
def test_small_request_is_served_when_a_large_one_waits_for_what_never_comes(size: int) -> None:
    queue, now = MemoryQueue(), 0.0
    queue.join(1000, now)
    longest = 0.0
    for _ in range(20 * PASSES):
        small, came = queue.join(size, now), now
        while queue.next(20, now) != small:
            now += 0.25
            assert now - came <= LONGEST_TURN_S + 1
        queue.served(small)
        longest = max(longest, now - came)
    assert longest > 0, "the large one has had turns alone"


def test_turn_ends_when_whoever_had_it_leaves() -> None:
    queue = MemoryQueue()
    large = queue.join(100, 0.0)
    for _ in range(PASSES):
        queue.served(queue.join(1, 0.0))
    small = queue.join(1, 0.0)
    assert queue.next(10, 0.0) is None
    assert queue.before(small) == 1
    queue.leave(large)
    assert queue.next(10, 0.0) == small
    assert len(queue) == 1
