"""Validation: the loss and the metrics over held-back data, by all devices together, and what follows from them.

A batch is one turn of the program's routine `validation`. The last batch is filled up with its last sample; what that
adds to the loss, a batch of nothing but that sample tells, and it is taken off again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fusetile.program import Measure, Program
from fusetile.runtime.data import Feeder
from fusetile.runtime.executor import Executor
from fusetile.runtime.gathering import Shard
from fusetile.runtime.metrics import Compared, as_bytes, from_bytes, metric_of
from fusetile.runtime.storage import Place, clear
from fusetile.runtime.transport import Transport


@dataclass(frozen=True, slots=True)
class History:
    """What the validations of a run have shown: the best `score` (larger is better), its step, and how many have come
    since then. `values` are the last one's."""

    values: Mapping[str, float]
    score: tuple[float, ...] = ()
    best_step: int = 0
    since: int = 0

    def after(self, step: int, values: Mapping[str, float], score: tuple[float, ...]) -> History:
        """With one more. One whose score is no number is never the best."""
        better = all(map(math.isfinite, score)) and (not self.score or score > self.score)
        if better:
            return History(values, score, step)
        return replace(self, values=values, since=self.since + 1)

    def json(self) -> dict[str, Any]:
        """For messages and checkpoints; what is no number is null."""
        values = {name: value if math.isfinite(value) else None for name, value in self.values.items()}
        return {"values": values, "score": list(self.score), "best_step": self.best_step, "since": self.since}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> History:
        """Raises KeyError, TypeError or ValueError if it is none."""
        values = {str(name): math.nan if value is None else float(value) for name, value in found["values"].items()}
        score = tuple(map(float, found["score"]))
        return cls(values, score, int(found["best_step"]), int(found["since"]))


class Validation:
    """Held-back data, and a program that has a routine for it."""

    def __init__(
        self, program: Program, data: Feeder, *, executor: Executor, arena: np.ndarray, transport: Transport | None
    ) -> None:
        assert program.validation is not None
        self._routine, self._batch, self._data = program.validation, program.batch, data
        self._executor, self._arena, self._transport = executor, arena, transport
        self._terms = [_Term(measure, arena, data.count) for measure in self._routine.measures]
        self._rank = program.rank

    def run(self, step: int, history: History) -> History:
        """Validate after a step of the training."""
        for feed in self._routine.feeds:
            clear(self._arena, feed.buffer)  # what pads it
        counts = [term.empty() for term in self._terms]
        batches = list(self._batches())
        for i, (rows, counted, times) in enumerate(batches):
            then = batches[i + 1][0] if i + 1 < len(batches) else None
            self._data.fill_rows(self._arena, rows, then=then)
            self._executor.run(step)
            for term, mine in zip(self._terms, counts, strict=True):
                term.add(mine, rows, counted=counted, times=times)
        shards = [
            (description | {"term": i, "counts": what}, view)
            for i, mine in enumerate(counts)
            for what, (description, view) in zip(("loss", "metric"), map(as_bytes, mine), strict=True)
            if len(view)
        ]
        if self._transport is None:
            return self._decide(step, history, shards)
        if self._rank:
            return History.from_json(self._transport.ask(shards))
        answer = self._transport.answer(lambda others: self._decide(step, history, shards + others).json())
        return History.from_json(answer)

    def _batches(self) -> Iterator[tuple[np.ndarray, int, float]]:
        """(samples of a batch, how many of them count in the metrics, how often it counts in the loss)."""
        for start in range(0, self._data.count, self._batch):
            rows = np.arange(start, min(start + self._batch, self._data.count))
            lacking = self._batch - len(rows)
            last = np.full(self._batch, rows[-1])
            yield np.concatenate([rows, last[:lacking]]), len(rows), 1.0
            if lacking:
                yield last, 0, -lacking / self._batch

    def _decide(self, step: int, history: History, shards: list[Shard]) -> History:
        """`shards`: what all devices have counted, in the order of their ranks."""
        counts: dict[tuple[Any, Any], list[np.ndarray]] = {}
        for description, view in shards:
            key = description.get("term"), description.get("counts")
            counts.setdefault(key, []).append(from_bytes(description, view))
        alone = len(self._terms) == 1
        loss, values, score = 0.0, dict[str, float](), tuple[float, ...]()
        for i, term in enumerate(self._terms):
            total, weight = np.sum(counts[i, "loss"], axis=0)
            found = {"loss": float(total / weight) if weight else 0.0}
            if term.metric is not None:
                found |= term.finish(counts.get((i, "metric"), []))
                score = (found[term.metric.best],) if term.metric.best and alone else ()
            loss += found.pop("loss")
            values |= {name if alone else f"{name}{i}": value for name, value in found.items()}
        return history.after(step, {"loss": loss, **values}, (*score, -loss))


class _Term:
    """The loss of one output, and what a device sees of it."""

    def __init__(self, measure: Measure, arena: np.ndarray, count: int) -> None:
        self._measure, self._count = measure, count
        self.metric = metric_of(measure.kind, measure.shape)
        logged = (measure.loss, measure.weight)
        self._loss, self._weight = (Place(arena, buffer, buffer.box) if buffer else None for buffer in logged)
        self._output = Place(arena, measure.output, measure.output_box) if measure.output else None
        self._target = Place(arena, measure.target, measure.target_box) if measure.target else None

    def empty(self) -> list[np.ndarray]:
        """[sum of weighted losses, weight], and no counts."""
        return [np.zeros(2), np.zeros(0)]

    def finish(self, counts: list[np.ndarray]) -> dict[str, float]:
        """The metrics, from the counts of all devices; a loss among them is multiplied as the others are."""
        assert self.metric is not None
        found = self.metric.finish(self.metric.combine(counts))
        return found | ({"loss": self._measure.factor * found["loss"]} if "loss" in found else {})

    def add(self, mine: list[np.ndarray], rows: np.ndarray, *, counted: int, times: float) -> None:
        """A batch of the samples `rows`, of which the first so many count; `times` is its part in the loss."""
        if self._loss is not None:
            weight = self._weight.read().item() if self._weight is not None else len(rows)
            mine[0] = mine[0] + times * weight * np.array([self._loss.read().item(), 1.0])
        if self.metric is None or self._output is None or self._target is None:
            return
        measure = self._measure
        low, high = measure.output_box[0]
        inside = max(0, min(high, counted) - low)
        if not inside:
            return
        part = Compared(
            self._output.read()[:inside],
            self._target.read()[:inside],
            ((low, low + inside), *measure.output_box[1:]),
            ((low, low + inside), *measure.target_box[1:]),
            rows[low : low + inside],
            self._count,
            measure.shape,
            measure.attrs,
        )
        counts = self.metric.measure(part)
        mine[1] = self.metric.combine([mine[1], counts]) if mine[1].size else counts
