"""The predicted time of a step: actions are works, transfers messages, and both are played against the clock."""

from __future__ import annotations

from collections.abc import Sequence

from fusetile.box import volume
from fusetile.cluster import Cluster
from fusetile.passes.communicate import Communication
from fusetile.passes.schedule import Await, Compute, Pack, Place, Post, Schedule, Ship
from fusetile.planner.clock import Message, Timeline, Work, play

NARROWING = 2.5
"""Of what copying its bytes takes: float32 values are read twice, for the largest and to be made half as long."""


def simulate(communication: Communication, order: Schedule, cluster: Cluster) -> Timeline:
    """A step, from its start on all devices to the end of the last; works are numbered like the actions."""
    messages = [Message(t.source, t.target, t.size_bytes, t.priority) for t in order.transfers]
    works = works_of(communication, order, cluster, messages)
    return play(works, messages, cluster.link, [node.device.messaging for node in cluster.nodes])


def works_of(
    communication: Communication, order: Schedule, cluster: Cluster, messages: Sequence[Message]
) -> list[list[Work]]:
    """Per device, its actions as works."""
    works: list[list[Work]] = []
    for device, node in enumerate(cluster.nodes):
        copied = 2 / node.device.bandwidth  # seconds per byte that is read and written
        mine: list[Work] = []
        for action in order.actions[device]:
            match action:
                case Compute(_, _, seconds):
                    mine.append(Work(seconds))
                case Pack(tag):
                    narrow = all(dtype == "float16" for dtype in order.transfers[tag].dtypes)
                    mine.append(Work(messages[tag].size_bytes * copied * (NARROWING if narrow else 1)))
                case Ship(tag):
                    mine.append(Work(ships=(tag,)))
                case Post(tag):
                    mine.append(Work(posts=(tag,)))
                case Await(tags):
                    mine.append(Work(awaits=tags))
                case Place(index):
                    delivery = communication.deliveries[index]
                    moves = [volume(move.box) for move in delivery.moves if move.target == device]
                    mine.append(Work(4 * sum(moves) * copied))
        works.append(mine)
    return works
