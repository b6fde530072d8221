"""Programs: what one device runs each step, and the buffers in its arena. The runtime's input language.

A program is a list of steps: `Run` (one native call that executes a segment of kernel calls), `Send`, `Recv` and
`Wait`. Sends and receives are asynchronous: `Recv` makes its buffer ready for the peer (credit), `Send` hands a
buffer to the transport, `Wait` blocks until the named transfers are complete. A tag names one transfer of the step, the
same number on both sides.

Storage. Every tensor is seen as four dimensions (see `box.view4`). A buffer holds the box `box` of it as

    [d0 / b0] [d1 / b1] [d2 + 2 * border[0]] [pitch] [b1] [b0]

with `b0, b1 = block`, `pitch >= d3 + 2 * border[1]`. Activations have block (1, B): [N][C/B][H][W][B]; convolution
weights have block (B, min(C, B)): [K/B][C/B][R][S][Bc][Bk]. Extents that do not divide are padded with zeros in the
last block. Boxes start at multiples of the block. The border is zero whenever the buffer is live.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import prod
from typing import Any

import numpy as np

from fusetile.box import Box, extents, view4
from fusetile.rates import Rates

ALIGNMENT_bytes = 64
REDZONE_bytes = 256  # before and behind every buffer of a program with guards
SCHEMA_VERSION = 5


@dataclass(frozen=True, slots=True)
class Buffer:
    """A block of the arena that holds one box of one tensor. `box` is in the tensor's own rank."""

    name: str
    box: Box
    dtype: str = "float32"
    block: tuple[int, int] = (1, 1)
    border: tuple[int, int] = (0, 0)
    pitch: int = 0
    offset_bytes: int = -1

    @property
    def storage_shape(self) -> tuple[int, int, int, int, int, int]:
        """[d0/b0, d1/b1, rows with border, pitch, b1, b0]."""
        d0, d1, d2, d3 = extents(view4(self.box))
        b0, b1 = self.block
        pitch = self.pitch or d3 + 2 * self.border[1]
        return (-(-d0 // b0), -(-d1 // b1), d2 + 2 * self.border[0], pitch, b1, b0)

    @property
    def strides(self) -> tuple[int, int, int, int]:
        """Elements from one d0 block, d1 block, row and pixel to the next."""
        _, s1, s2, s3, b1, b0 = self.storage_shape
        pixel = b1 * b0
        return (s1 * s2 * s3 * pixel, s2 * s3 * pixel, s3 * pixel, pixel)

    @property
    def size_bytes(self) -> int:
        """Bytes of storage, without alignment."""
        return prod(self.storage_shape) * np.dtype(self.dtype).itemsize

    def element(self, box: Box) -> int:
        """Elements from the start of the buffer to the first element of `box` (a box of the same tensor)."""
        starts = [start - origin for (start, _), (origin, _) in zip(view4(box), view4(self.box), strict=True)]
        s0, s1, s2, s3 = self.strides
        b0, b1 = self.block
        if starts[0] % b0 or starts[1] % b1:
            raise ValueError(f"{self.name}: {box} does not start at a block of {self.block} in {self.box}")
        rows, columns = starts[2] + self.border[0], starts[3] + self.border[1]
        return starts[0] // b0 * s0 + starts[1] // b1 * s1 + rows * s2 + columns * s3


@dataclass(frozen=True, slots=True)
class Call:
    """One kernel call. `split` is the number of independent work units that threads share, at most `workers` of them
    unless that is 0; `pointers` are byte offsets into the arena; `ints` and `floats` are the kernel's scalar arguments,
    in order; `op` is the graph's op that it is part of, if any."""

    kernel: str
    split: int
    pointers: tuple[int, ...]
    ints: tuple[int, ...] = ()
    floats: tuple[float, ...] = ()
    op: str = ""
    workers: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """A segment: calls executed in order by one native call."""

    calls: tuple[Call, ...]


@dataclass(frozen=True, slots=True)
class Send:
    """Send `size_bytes` at `offset_bytes` of the arena to `peer`; lower `priority` goes first on the wire."""

    peer: int
    tag: int
    offset_bytes: int
    size_bytes: int
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Recv:
    """Make `size_bytes` at `offset_bytes` ready for the transfer `tag` from `peer`."""

    peer: int
    tag: int
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Block until the transfers `tags` (sent or received here) are complete."""

    tags: tuple[int, ...]


Step = Run | Send | Recv | Wait
_STEPS = {"run": Run, "send": Send, "recv": Recv, "wait": Wait}
_NAMES = {cls: name for name, cls in _STEPS.items()}
_ROUTINES = ("micro", "validation")


@dataclass(frozen=True, slots=True)
class Feed:
    """A buffer that the runtime fills before each step. `role` is input, target, step or one of `Rates`; `key` is the
    name in the data (input or target); `shape` is that of the whole batch."""

    role: str
    key: str
    shape: tuple[int, ...]
    buffer: Buffer
    classes: int = 0  # targets that are class indices, or boxes: how many classes there are
    ignore: int | None = None  # the one label beyond them that is allowed
    boxes: bool = False  # targets [batch, most, 5] that are boxes, see `runtime.detection`


@dataclass(frozen=True, slots=True)
class Shard:
    """The box of a parameter that this device owns, in its buffer (which may hold more than the box). Constants
    (`updated` False) are loaded and never gathered: every device has what it needs of them."""

    parameter: str  # name in the graph
    onnx_name: str  # the initializer whose result this is; "" for state, and for weights of which an average is kept
    shape: tuple[int, ...]  # of the whole parameter, in the graph
    transposed: bool
    box: Box
    buffer: Buffer
    updated: bool = True
    lasting: bool = True  # False: it means nothing between two steps


@dataclass(frozen=True, slots=True)
class Gradient:
    """The box of a trained parameter's gradient that this device has just before call `call` of step `step`: in
    `buffer` or, if the gradient itself is never in memory, as transposed(`buffer`) times `factor`, both of which are
    [batch, channels] and may hold more."""

    parameter: str
    onnx_name: str
    shape: tuple[int, ...]
    transposed: bool
    box: Box
    buffer: Buffer
    step: int
    call: int
    factor: Buffer | None = None


@dataclass(frozen=True, slots=True)
class Zone:
    """Where a buffer lies, and the (step, call) that uses it first and last: (-1, 0) before the first step, the number
    of steps after the last. For `runtime.guard`."""

    name: str
    offset_bytes: int
    size_bytes: int
    first: tuple[int, int]
    last: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Measure:
    """What a device knows of the loss of one output after a batch of a validation: on the lowest rank the loss itself,
    and what the batch's labels weigh if they are weighed; on devices that compare a part of the output with the target,
    those (their boxes are `output_box` and `target_box`). `kind` and `attrs` are those of the op that compares."""

    kind: str
    attrs: Mapping[str, Any]
    shape: tuple[int, ...]  # of the output, for the whole batch; () where nothing is compared
    factor: float = 1.0  # by which the loss was multiplied
    loss: Buffer | None = None
    weight: Buffer | None = None
    output: Buffer | None = None
    target: Buffer | None = None
    output_box: Box = ()
    target_box: Box = ()


@dataclass(frozen=True, slots=True)
class Routine:
    """What a device runs for a batch: a training step, or something else with the same arena and parameters."""

    steps: tuple[Step, ...]
    feeds: tuple[Feed, ...]
    loss: Buffer | None = None
    zones: tuple[Zone, ...] = ()
    measures: tuple[Measure, ...] = ()


@dataclass(frozen=True, slots=True)
class Program:
    """Everything that one device needs to know."""

    rank: int
    nodes: int
    name: str
    addresses: tuple[str, ...]  # host:port of every node
    plan_hash: str
    model_hash: str
    library: str  # file name of the kernel library
    batch: int
    seed: int
    arena_bytes: int
    steps: tuple[Step, ...]
    feeds: tuple[Feed, ...]
    shards: tuple[Shard, ...]
    gradients: tuple[Gradient, ...]
    loss: Buffer | None
    segment_seconds: float = 0.0  # longest predicted segment: the progress deadline derives from it
    rates: Rates = field(default_factory=lambda: Rates(learning_rate=0.0))
    peers: tuple[int, ...] = ()  # ranks with which this device exchanges something (besides the gathering at the end)
    zones: tuple[Zone, ...] = ()  # with --guard: all buffers, each between redzones
    validation: Routine | None = None  # the forward pass of a trained model, and its loss
    accumulate: int = 1  # batches per training step
    source: int | None = None  # the rank that alone has the data, if not all have them
    samples: tuple[Feed, ...] = ()  # what the whole model is fed of them, in no arena
    micro: Routine | None = None  # one of those that come before the last, which is a training step
    schema: int = field(default=SCHEMA_VERSION)

    @property
    def training(self) -> Routine:
        """The training step."""
        return Routine(self.steps, self.feeds, self.loss, self.zones)

    def routines(self) -> tuple[Routine, ...]:
        """All there are, the training step first."""
        return (self.training, *(each for each in (self.micro, self.validation) if each is not None))


def to_json(program: Program) -> str:
    """The text of program.json: one step per line."""
    rest = {key: value for key, value in _as_dict(program).items() if key != "steps"}
    for name in _ROUTINES:
        if rest[name] is not None:
            rest[name] = _as_dict(rest[name]) | {"steps": list(map(_named, rest[name].steps))}
    steps = ",\n".join(json.dumps(_named(step), default=_as_dict) for step in program.steps)
    return json.dumps(rest, indent=1, default=_as_dict)[:-2] + f',\n "steps": [\n{steps}\n]\n}}\n'


def _named(step: Step) -> dict[str, Step]:
    return {_NAMES[type(step)]: step}


def _as_dict(item: Any) -> dict[str, Any]:
    """One level of a dataclass, for the encoder: it goes on with what is in there."""
    return {each.name: getattr(item, each.name) for each in fields(item)}


def from_json(source: str) -> Program:
    """Read program.json; raises ValueError, KeyError or TypeError if it is not one."""
    found = json.loads(source)
    if found.get("schema") != SCHEMA_VERSION:
        raise ValueError(f"schema version {found.get('schema')} where this fusetile reads {SCHEMA_VERSION}")
    found |= _routine(found)
    for name in _ROUTINES:
        found[name] = Routine(**_routine(found[name])) if found[name] else None
    found["samples"] = tuple(Feed(**_with_buffer(item)) for item in found["samples"])
    found["shards"] = tuple(Shard(**_with_buffer(item)) for item in found["shards"])
    found["gradients"] = tuple(Gradient(**_with_buffer(item)) for item in found["gradients"])
    found["rates"] = Rates(**{key: _tuples(value) for key, value in found["rates"].items()})
    return Program(**{key: _tuples(value) for key, value in found.items()})


def _routine(item: dict[str, Any]) -> dict[str, Any]:
    """The fields of a routine, wherever they stand."""
    measures = {"measures": tuple(map(_measure, item["measures"]))} if "measures" in item else {}
    return {
        "steps": tuple(_step(*next(iter(step.items()))) for step in item["steps"]),
        "feeds": tuple(Feed(**_with_buffer(feed)) for feed in item["feeds"]),
        "zones": tuple(Zone(**{key: _tuples(value) for key, value in zone.items()}) for zone in item["zones"]),
        "loss": _buffer(item["loss"]) if item["loss"] else None,
        **measures,
    }


def _measure(item: dict[str, Any]) -> Measure:
    buffers = {key: _buffer(item[key]) for key in ("loss", "weight", "output", "target") if item[key]}
    return Measure(**{key: _tuples(value) for key, value in item.items()} | buffers)


def _step(name: str, item: dict[str, Any]) -> Step:
    if name == "run":
        return Run(tuple(Call(**{key: _tuples(value) for key, value in call.items()}) for call in item["calls"]))
    step: Step = _STEPS[name](**{key: _tuples(value) for key, value in item.items()})
    return step


def _buffer(item: dict[str, Any]) -> Buffer:
    return Buffer(**{key: _tuples(value) for key, value in item.items()})


def _with_buffer(item: dict[str, Any]) -> dict[str, Any]:
    buffers = {key: _buffer(item[key]) for key in ("buffer", "factor") if item.get(key)}
    return {key: _tuples(value) for key, value in item.items()} | buffers


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value
