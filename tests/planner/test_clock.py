"""The simulator against cases worked out by hand. A link carries 1 MB/s, and a message takes 10 ms to arrive."""

from __future__ import annotations

from typing import Any

import pytest

from fusetile.cluster import Link
from fusetile.device import Messaging
from fusetile.planner.clock import CHUNK_bytes, Message, MESSAGE_seconds, Work, play
from fusetile.runtime import wire

LINK = Link(1e6, 0.01)
CHUNK_seconds = CHUNK_bytes / 1e6


def approximately(seconds: float) -> Any:
    return pytest.approx(seconds, abs=1e-9)


def test_devices_that_share_nothing_take_as_long_as_the_slower() -> None:
    assert play([[Work(0.2), Work(0.3)], [Work(0.1)]], [], LINK).seconds == approximately(0.5)


def test_a_message_takes_its_bytes_and_the_latency() -> None:
    works = [[Work(0.2), Work(ships=(0,))], [Work(posts=(0,)), Work(awaits=(0,)), Work(0.1)]]
    time = play(works, [Message(0, 1, 500_000)], LINK).seconds
    assert time == approximately(0.2 + MESSAGE_seconds + 0.5 + 0.01 + 0.1)


def test_computing_hides_a_message() -> None:
    works = [[Work(ships=(0,)), Work(0.6), Work(awaits=(0,))], [Work(posts=(0,)), Work(0.7), Work(awaits=(0,))]]
    assert play(works, [Message(0, 1, 500_000)], LINK).seconds == approximately(0.7)


def test_nothing_is_sent_before_it_is_posted() -> None:
    works = [[Work(ships=(0,)), Work(awaits=(0,))], [Work(1.0), Work(posts=(0,)), Work(awaits=(0,))]]
    assert play(works, [Message(0, 1, 100_000)], LINK).seconds == approximately(1.0 + MESSAGE_seconds + 0.1 + 0.01)


def test_links_are_full_duplex_and_one_direction_is_shared() -> None:
    def exchange(messages: list[Message], nodes: int) -> float:
        tags = tuple(range(len(messages)))
        works = []
        for device in range(nodes):
            sent = tuple(tag for tag in tags if messages[tag].source == device)
            received = tuple(tag for tag in tags if messages[tag].target == device)
            works.append([Work(posts=received), Work(ships=sent), Work(awaits=(*sent, *received))])
        return play(works, messages, LINK).seconds

    both_ways = exchange([Message(0, 1, 50_000), Message(1, 0, 50_000)], 2)
    assert both_ways == approximately(MESSAGE_seconds + 0.05 + 0.01)
    two_to_one = exchange([Message(0, 2, 50_000), Message(1, 2, 50_000)], 3)
    assert two_to_one == approximately(2 * (MESSAGE_seconds + 0.05) + 0.01)
    ring = exchange([Message(i, (i + 1) % 3, 50_000) for i in range(3)], 3)
    assert ring == approximately(MESSAGE_seconds + 0.05 + 0.01)


def test_an_urgent_message_overtakes_a_long_one_after_a_chunk() -> None:
    messages = [Message(0, 1, 20 * CHUNK_bytes, 9), Message(0, 1, 1000, 1)]
    works = [[Work(ships=(0,)), Work(0.001), Work(ships=(1,))], [Work(posts=(0, 1)), Work(awaits=(1,)), Work(5.0)]]
    assert play(works, messages, LINK).seconds == approximately(
        CHUNK_seconds + 2 * MESSAGE_seconds + 0.001 + 0.01 + 5.0
    )


def test_who_waits_for_a_busy_device_gets_a_share_of_its_link() -> None:
    """A short message from a third device takes turns with two long ones: 2 chunks of its own, 4 of the others."""
    messages = [Message(1, 0, 50 * CHUNK_bytes), Message(2, 0, 50 * CHUNK_bytes), Message(3, 0, 2 * CHUNK_bytes)]
    late = 10.5 * CHUNK_seconds
    works = [
        [Work(posts=(0, 1, 2)), Work(awaits=(0, 1, 2))],
        [Work(ships=(0,)), Work(awaits=(0,))],
        [Work(ships=(1,)), Work(awaits=(1,))],
        [Work(late), Work(ships=(2,)), Work(awaits=(2,))],
    ]
    start, stop = play(works, messages, LINK).messages[2]
    assert start >= late and stop - late < 9 * CHUNK_seconds + LINK.latency_seconds


def test_messages_take_processor_time_from_what_is_computed_meanwhile() -> None:
    """Half a second of bytes costs 0.05 s at either end: one device computes all the time, the other waits."""
    works = [[Work(ships=(0,)), Work(0.7), Work(awaits=(0,))], [Work(posts=(0,)), Work(awaits=(0,)), Work(0.1)]]
    cost = Messaging(message_seconds=0.01, byte_seconds=1e-7)
    found = play(works, [Message(0, 1, 500_000)], LINK, [cost, cost])
    assert found.works[0][0][:2] == (0.0, approximately(0.7 + 0.01 + 0.05))
    arrived = MESSAGE_seconds + 0.5 + 0.01
    assert found.works[1][0][:2] == (approximately(arrived), approximately(arrived + 0.1))


def test_a_schedule_that_waits_for_itself_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="waits for itself"):
        play([[Work(awaits=(0,)), Work(ships=(0,))], [Work(posts=(0,))]], [Message(0, 1, 10)], LINK)


def test_chunks_are_those_of_the_runtime() -> None:
    assert CHUNK_bytes == wire.CHUNK_bytes
