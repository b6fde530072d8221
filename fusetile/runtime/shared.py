"""What the executor's thread and the I/O thread both see."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable

from fusetile.runtime.watch import Activity


class Shared:
    """How far the executor is, which transfers are complete, and what has ended the run.

    A key is the tag of a transfer, or a tuple for what else is waited for.
    """

    def __init__(self) -> None:
        self.step = 0  # of the training: for messages
        self.turn = 0  # the routines that this node has begun, as all do in the same order
        self.progress = 0  # counted by the executor; the thread counts chunks
        self.activity = Activity.COMPUTING
        self.failure: BaseException | None = None
        self._condition = threading.Condition()
        self._done: set[Hashable] = set()
        self._wanted: set[Hashable] = set()

    def wait(self, keys: Iterable[Hashable]) -> None:
        """Block until all these are complete, or the run is over: then raise what has ended it."""
        with self._condition:
            self._wanted = {key for key in keys if key not in self._done}
            self.activity = Activity.WAITING
            while self._wanted and self.failure is None:
                self._condition.wait()
            self.activity = Activity.COMPUTING
        self.check()

    def check(self) -> None:
        """Raise what has ended the run, if something has."""
        if self.failure is not None:
            raise self.failure

    def complete(self, key: Hashable) -> None:
        """This one is complete."""
        with self._condition:
            self._done.add(key)
            self._wanted.discard(key)
            if not self._wanted:
                self._condition.notify()

    def forget(self, keys: Iterable[Hashable]) -> None:
        """These may come again."""
        with self._condition:
            self._done.difference_update(keys)

    def fail(self, error: BaseException) -> None:
        """The run is over; who waits is woken."""
        with self._condition:
            self.failure = error
            self._condition.notify()

    def wanted(self) -> list[Hashable]:
        """What the executor waits for now."""
        with self._condition:
            return sorted(self._wanted, key=str) if self.activity == Activity.WAITING else []
