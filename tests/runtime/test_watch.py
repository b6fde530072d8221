"""When a peer counts as lost, with a clock that the test sets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from fusetile.runtime import watch
from fusetile.runtime.link import Link
from fusetile.runtime.watch import Activity, Watch
from tests.runtime import toy
from tests.runtime.pair import connected_pair


class Clock:
    """time.monotonic for the watch."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watch, "time", clock)
    return clock


@pytest.fixture
def links(clock: Clock) -> Iterator[list[Link]]:
    ends = [connected_pair() for _ in range(2)]
    links = [Link(pair[0], rank=rank, name="abc"[rank]) for rank, pair in zip((1, 2), ends, strict=True)]
    for link in links:
        link.heard_at = link.moved_at = clock.now
    yield links
    for pair in ends:
        for end in pair:
            end.close()


def make(rank: int = 0, segment_seconds: float = 0.0) -> Watch:
    addresses = ("h:1", "h:2", "h:3")
    return Watch(replace(toy.program(rank, addresses), segment_seconds=segment_seconds), 10.0)


def run(clock: Clock, watch: Watch, links: list[Link], seconds: float, heard: tuple[int, ...]) -> str | None:
    """Let time pass; the ranks in `heard` send heartbeats with what they said last."""
    for _ in range(int(seconds)):
        clock.now += 1
        for link in links:
            if link.rank in heard:
                link.heard_at = clock.now
                watch.hear(link, link.progress, link.activity)
        watch.tick(links)
        complaint = watch.complaint(links, 0, Activity.WAITING)
        if complaint is not None:
            return complaint[1]
    return None


def test_silence(clock: Clock, links: list[Link]) -> None:
    watch = make()
    for link in links:
        watch.hear(link, 1, Activity.WAITING)
    assert run(clock, watch, links, 10, (1,)) is None
    message = run(clock, watch, links, 2, (1,))
    assert message is not None and message.startswith("node 'c' (rank 2, h:3) sent nothing for 11.0 s")


def test_a_peer_that_computes_without_progress(clock: Clock, links: list[Link]) -> None:
    watch = make()
    watch.hear(links[0], 1, Activity.COMPUTING)
    watch.hear(links[1], 1, Activity.WAITING)
    message = run(clock, watch, links, 15, (1, 2))
    assert message is not None and message.startswith("node 'b' (rank 1, h:2) made no progress for 11.0 s")


def test_long_segments_get_their_time(clock: Clock, links: list[Link]) -> None:
    watch = make(segment_seconds=5.0)
    for link in links:
        watch.hear(link, 1, Activity.COMPUTING)
    assert run(clock, watch, links, 49, (1, 2)) is None
    assert "no progress for 51" in str(run(clock, watch, links, 5, (1, 2)))


@pytest.mark.parametrize("activity", [Activity.WAITING, Activity.FINISHING])
def test_who_waits_or_writes_the_result_is_not_to_blame(clock: Clock, links: list[Link], activity: Activity) -> None:
    watch = make(rank=2)
    for link in links:
        watch.hear(link, 1, activity)
    assert run(clock, watch, links, 100, (1, 2)) is None


def test_all_waiting_for_each_other_is_seen_by_the_lowest_rank(clock: Clock, links: list[Link]) -> None:
    watch = make()
    for link in links:
        watch.hear(link, 1, Activity.WAITING)
    assert run(clock, watch, links, 20, (1, 2)) is None
    assert "all nodes wait for each other" in str(run(clock, watch, links, 3, (1, 2)))


def test_a_node_that_was_frozen_itself_blames_nobody(clock: Clock, links: list[Link]) -> None:
    watch = make()
    for link in links:
        watch.hear(link, 1, Activity.COMPUTING)
    watch.tick(links)
    clock.now += 60
    watch.tick(links)
    assert watch.complaint(links, 0, Activity.WAITING) is None


def test_heartbeats_are_regular(clock: Clock, links: list[Link]) -> None:
    watch = make()
    beats = 0
    for _ in range(100):
        clock.now += 0.1
        beats += watch.tick(links)
    assert 9 <= beats <= 11
