"""Samples that a program makes: a Python iterable there, a node here, and a socket between them.

The node says what it wants of a sample (a line of JSON: names, shapes, classes, and how many samples a batch has), the
program what it has (`count`, 0 if unknown, and the types). Then a line for every batch, and the batch: one array after
the other.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fusetile.errors import FusetileError, UserError
from fusetile.program import Program
from fusetile.runtime.data import Reader
from fusetile.runtime.samples import Scaling, fits

Sample = Mapping[str, ArrayLike]
_MORE = b"more\n"


class Streamed(Reader):
    """The node's end."""

    def __init__(self, program: Program, descriptor: int, *, scaling: Scaling) -> None:
        super().__init__(program, scaling=scaling, routine=None)
        self._shapes = {feed.key: feed.shape for feed in program.samples}
        self._line = socket.socket(fileno=descriptor).makefile("rwb")
        parts = [
            {
                "key": feed.key,
                "shape": feed.shape[1:],
                "role": feed.role,
                "classes": feed.classes,
                "ignore": feed.ignore,
            }
            for feed in program.samples
        ]
        self._say(json.dumps({"batch": program.batch, "batches": program.accumulate, "parts": parts}).encode() + b"\n")
        has = json.loads(self._line.readline() or b"{}")
        if not has:
            raise FusetileError("the program that makes the data has ended")
        self.count, self._types = int(has["count"]), dict(has["types"])

    def offer(self) -> dict[str, Any]:
        """See Reader."""
        return {"count": self.count, "types": self._types}

    def _whole(self, batch: int, rows: np.ndarray | None) -> dict[str, np.ndarray]:
        self._say(_MORE)
        found = {}
        for key, shape in self._shapes.items():
            array = np.empty(shape, self._types[key])
            if self._line.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
                raise FusetileError("the program that makes the data has ended")
            found[key] = array
        return found

    def _say(self, text: bytes) -> None:
        try:
            self._line.write(text)
            self._line.flush()
        except BrokenPipeError:
            raise FusetileError("the program that makes the data has ended") from None


class Stream:
    """The program's end: an iterable of samples, each a mapping from names to arrays. When it ends it is iterated anew;
    samples that fill no step are left out."""

    def __init__(self, samples: Iterable[Sample], line: socket.socket) -> None:
        self._samples, self._line = samples, line.makefile("rwb")
        self.failure: BaseException | None = None

    def serve(self) -> None:
        """Until the node has ended. What goes wrong is kept as `failure`; the node then ends as well."""
        try:
            self._serve()
        except (BrokenPipeError, ConnectionResetError):
            pass  # the node has ended; it says why itself
        except BaseException as error:
            self.failure = error
        finally:
            self._line.close()

    def _serve(self) -> None:
        asked = self._line.readline()
        if not asked:
            return
        wanted = json.loads(asked)
        steps = self._steps(wanted)
        step, batch, size = next(steps), 0, wanted["batch"]
        count = len(self._samples) if isinstance(self._samples, Sized) else 0
        types = {key: array.dtype.str for key, array in step.items()}
        self._line.write(json.dumps({"count": count, "types": types}).encode() + b"\n")
        self._line.flush()
        while self._line.readline():
            if batch == wanted["batches"]:
                step, batch = next(steps), 0
            for key, array in step.items():
                part = array[batch * size : (batch + 1) * size].astype(types[key], casting="same_kind")
                self._line.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
            self._line.flush()
            batch += 1

    def _steps(self, wanted: Mapping[str, Any]) -> Iterator[dict[str, np.ndarray]]:
        """The samples of one step after the other. Raises UserError where there are no more."""
        size, given = wanted["batch"] * wanted["batches"], 0
        while True:
            before, samples = given, iter(self._samples)
            step: list[dict[str, np.ndarray]] = []
            for sample in samples:
                step.append(_checked(sample, wanted["parts"], given))
                given += 1
                if len(step) == size:
                    yield {key: np.stack([each[key] for each in step]) for key in step[0]}
                    step = []
            if given - before < size or samples is self._samples:
                raise UserError(
                    f"the data end after {given} samples; a step takes {size}, and more steps are to come: give fewer "
                    "steps, or an iterable that can be iterated again"
                )


def _checked(sample: Sample, parts: list[dict[str, Any]], number: int) -> dict[str, np.ndarray]:
    """The parts of a sample as arrays. Raises UserError, naming the sample, if it is not what the model wants."""
    found = {}
    for part in parts:
        key, alike = part["key"], [other for other in parts if other["role"] == part["role"]]
        short = {"input": "x", "target": "y"}[part["role"]]
        name = key if key in sample or len(alike) > 1 else short
        if name not in sample:
            raise UserError(f"sample {number} of the data has no {name!r}; it has {', '.join(map(repr, sample))}")
        array = np.asarray(sample[name])
        wanted = tuple(part["shape"])
        if array.shape != wanted and not (part["role"] == "target" and fits(array.shape, wanted, part["classes"])):
            raise UserError(f"sample {number} of the data: {name!r} has shape {array.shape}, not {wanted}")
        found[key] = _typed(array.reshape(wanted), part, f"sample {number} of the data: {name!r}")
    return found


def _typed(array: np.ndarray, part: Mapping[str, Any], what: str) -> np.ndarray:
    if part["classes"]:
        right = (array >= 0) & (array < part["classes"]) | (array == part["ignore"])
        if array.dtype.kind not in "iu" or not right.all():
            value = array[~right][0] if array.dtype.kind in "iu" else f"of type {array.dtype}"
            raise UserError(f"{what} is {value}; classes are whole numbers from 0 to {part['classes'] - 1}")
        return array.astype(np.int32)
    if array.dtype.kind != "f" and not (array.dtype == np.uint8 and part["role"] == "input"):
        raise UserError(f"{what} has dtype {array.dtype}; it must be floating-point numbers, or uint8 for an input")
    return array.astype(np.float32) if array.dtype.kind == "f" else array
