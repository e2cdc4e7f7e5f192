"""Who is next: the queue between clients, within a client, and what may share a pass."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from numpyesm.service.fair_queue import FairQueue, QueueFull
from numpyesm.service.jobs import Job

ROWS = 100


def job(client: str, lengths: list[int], group: str = "mean") -> Job:
    """A job whose sequences take as many rows as said."""
    work: Any = SimpleNamespace(group=group, lengths=[length - 2 for length in lengths])
    return Job(work, client, 0, cast(Any, None), cast(Any, None))


def take(queue: FairQueue) -> list[tuple[Job, int]]:
    return queue.take(ROWS, lambda _: True)


def served(queue: FairQueue) -> list[list[str]]:
    """Clients of each pass until the queue is empty."""
    passes = []
    while len(queue):
        passes.append([one.client for one, _ in take(queue)])
    return passes


def test_small_jobs_share_a_pass_up_to_its_rows() -> None:
    queue = FairQueue(50, 50)
    jobs = [job(f"c{i}", [30]) for i in range(5)]
    for one in jobs:
        queue.put(one)
    assert [one for one, _ in take(queue)] == jobs[:3]
    assert [one for one, _ in take(queue)] == jobs[3:]
    assert take(queue) == []


def test_clients_take_turns_whatever_they_send() -> None:
    queue = FairQueue(50, 50)
    for _ in range(6):
        queue.put(job("greedy", [100]))
    queue.put(job("modest", [100]))
    assert served(queue)[:2] == [["greedy"], ["modest"]]


def test_turns_are_by_rows_not_by_requests() -> None:
    queue = FairQueue(50, 50)
    for _ in range(4):
        queue.put(job("long", [100]))
    for _ in range(20):
        queue.put(job("short", [10]))
    first = served(queue)[:2]
    assert first == [["long"], ["short"] * 10]


def test_who_comes_back_has_no_credit() -> None:
    queue = FairQueue(50, 50)
    for _ in range(5):
        queue.put(job("steady", [100]))
    for _ in range(3):
        take(queue)
    queue.put(job("late", [100]))
    queue.put(job("late", [100]))
    assert served(queue) in ([["steady"], ["late"], ["steady"], ["late"]], [["late"], ["steady"], ["late"], ["steady"]])


def test_a_job_of_many_passes_lets_short_ones_of_its_client_through() -> None:
    queue = FairQueue(50, 50)
    large, other_large, small = job("one", [100] * 4), job("one", [100] * 3), job("one", [10], "contacts")
    for one in (large, other_large, small):
        queue.put(one)
    assert take(queue) == [(large, 0)]
    assert take(queue) == [(small, 0)]
    late = job("one", [10], "contacts")
    assert take(queue) == [(large, 1)]
    queue.put(late)
    assert take(queue) == [(large, 2)]
    assert take(queue) == [(late, 0)]
    assert take(queue) == [(large, 3)]
    assert take(queue) == [(other_large, 0)]


def test_groups_do_not_mix() -> None:
    queue = FairQueue(50, 50)
    for number, group in enumerate(["mean", "contacts", "mean"]):
        queue.put(job(f"c{number}", [10], group))
    assert served(queue) == [["c0", "c2"], ["c1"]]


def test_a_long_sequence_goes_alone() -> None:
    queue = FairQueue(50, 50)
    queue.put(job("c", [500]))
    queue.put(job("c", [10]))
    assert [len(passed) for passed in served(queue)] == [1, 1]


def test_bounds() -> None:
    queue = FairQueue(3, 2)
    queue.put(job("a", [10]))
    second = job("a", [10])
    queue.put(second)
    with pytest.raises(QueueFull) as failure:
        queue.put(job("a", [10]))
    assert failure.value.mine
    queue.put(job("b", [10]))
    with pytest.raises(QueueFull) as failure:
        queue.put(job("c", [10]))
    assert not failure.value.mine
    queue.remove(second)
    queue.remove(second)
    assert len(queue) == 2
    queue.put(job("c", [10]))


def test_what_does_not_fit_the_memory_waits() -> None:
    queue = FairQueue(50, 50)
    large, small = job("a", [10]), job("b", [10])
    queue.put(large)
    queue.put(small)
    assert queue.take(ROWS, lambda one: one is small) == [(small, 0)]
    assert list(queue) == [large]
