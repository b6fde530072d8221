"""Convolutions in groups as dense ones: of as many groups at a time as fill whole channel blocks.

    8 groups of 4 -> 4 channels, blocks of 8        4 dense convolutions 8 -> 8, their weights zero between groups

That multiplies by zeros where groups are smaller than a block; groups of whole blocks are dense convolutions of the
weights as they are; one channel per group has kernels of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import gcd, lcm

from fusetile.box import Box, Interval, volume
from fusetile.codegen import conv, depthwise
from fusetile.codegen.calls import Kernel, KernelCall, Lowered, make_kernel, ref
from fusetile.codegen.conv_views import Filter, blocks, filter_view
from fusetile.codegen.job import Job
from fusetile.errors import PlanError
from fusetile.graph import Op, Tensor
from fusetile.ops.base import Access, Domain, row
from fusetile.program import Buffer

_INTS = ("c_blocks", "taps", "lines", "w_lines", "w_k", "w_block", "per_k", "per_c", "groups", "channels")


@dataclass(frozen=True, slots=True)
class _Bundle:
    """Groups that are computed as one dense convolution: how many, and their sizes. `k` and `c` count channels of the
    whole tensors, `block` is the channel block."""

    groups: int
    per_k: int
    per_c: int
    k: int
    c: int

    @property
    def lines(self) -> int:
        """Input channels of a bundle."""
        return min(self.groups * self.per_c, self.c)

    def parts(self, interval: Interval, per: int, size: int, name: str) -> Iterator[tuple[Interval, Interval]]:
        """The output and input channels of every bundle in an interval of channels, of which a group has `per`."""
        step = self.groups * per
        if interval[0] % step:
            raise PlanError(
                f"{name}: groups of {per} channels can't be cut at {interval[0]}, only at multiples of {step}"
            )
        for index in range(interval[0] // step, -(-min(interval[1], size) // step)):
            first, last = index * self.groups, (index + 1) * self.groups
            yield (
                (first * self.per_k, min(last * self.per_k, self.k)),
                (first * self.per_c, min(last * self.per_c, self.c)),
            )


def _bundle(op: Op, k: int, c: int, block: int) -> _Bundle:
    groups = op.attrs["groups"]
    per_k, per_c = k // groups, c // groups
    return _Bundle(lcm(block // gcd(block, per_k), block // gcd(block, per_c)), per_k, per_c, k, c)


def _is_depthwise(bundle: _Bundle, maps: Sequence[Buffer], block: int) -> bool:
    return bundle.per_k == bundle.per_c == 1 and all(buffer.block == (1, block) for buffer in maps)


def lower_grouped_conv(job: Job) -> Lowered:
    """y = activation(bias + x * w)."""
    x, w, *bias = job.inputs
    bundle = _bundle(job.op, job.domain.writes[0][1].size, job.domain.reads[0][1].size, w.block[0])
    if _is_depthwise(bundle, [x, job.output], w.block[0]):
        return depthwise.forward(job)
    before, dense = _dense(job.op, bundle, w, job.need(1))
    channels = job.written()[1]

    def part(dense_op: Op, k: Interval, c: Interval) -> Lowered:
        operands = [_rebased(x, 1, c[0]), _rebased(dense, 0, k[0]), *(_rebased(b, 0, k[0]) for b in bias)]
        shapes = [_sized(job.domain, 0, c), _weights(job.domain, k, c), *((k[1] - k[0],) for _ in bias)]
        written = _written(job.domain, k)
        dense_job = replace(job, op=dense_op, inputs=operands, outputs=[_rebased(job.output, 1, k[0])])
        return conv.lower_conv(_over_channels(dense_job, shapes, written, k, c))

    parts = bundle.parts(channels, bundle.per_k, bundle.k, job.op.name)
    return _joined(job.op, before, parts, part)


def lower_grouped_conv_input_grad(job: Job) -> Lowered:
    """dx from dy and the weights."""
    dy, w = job.inputs
    bundle = _bundle(job.op, job.domain.reads[0][1].size, job.domain.writes[0][1].size, w.block[0])
    if _is_depthwise(bundle, [dy, job.output], w.block[0]):
        return depthwise.input_grad(job)
    filter_box = job.need(1)
    if volume(filter_box) == 0:
        raise PlanError(f"{job.op.name}: no weights are read for {job.box}")
    before, dense = _dense(job.op, bundle, w, filter_box)

    def part(dense_op: Op, k: Interval, c: Interval) -> Lowered:
        operands = [_rebased(dy, 1, k[0]), _rebased(dense, 0, k[0])]
        written, shapes = _written(job.domain, c), [_sized(job.domain, 0, k), _weights(job.domain, k, c)]
        dense_op = replace(dense_op, attrs={**dense_op.attrs, "input_shape": written})
        dense_job = replace(job, op=dense_op, inputs=operands, outputs=[_rebased(job.output, 1, c[0])])
        return conv.lower_conv_input_grad(_over_channels(dense_job, shapes, written, k, c))

    parts = bundle.parts(job.written()[1], bundle.per_c, bundle.c, job.op.name)
    return _joined(job.op, before, parts, part)


def lower_grouped_conv_weight_grad(job: Job) -> Lowered:
    """dw from x and dy: the dense gradient, of which the parts within groups are kept."""
    x, dy = job.inputs
    block = job.output.block[0]
    bundle = _bundle(job.op, job.domain.writes[0][0].size, job.domain.reads[0][1].size, block)
    if _is_depthwise(bundle, job.inputs, block):
        return depthwise.weight_grad(job)
    written = job.written()
    whole = bundle.groups == 1
    dense = job.output if whole else _dense_buffer(job.op, bundle, written, block)
    shape = _shape(job.domain.writes[0])

    def part(dense_op: Op, k: Interval, c: Interval) -> Lowered:
        operands = [_rebased(x, 1, c[0]), _rebased(dy, 1, k[0])]
        shapes = [_sized(job.domain, 0, c), _sized(job.domain, 1, k)]
        dense_job = replace(job, op=dense_op, inputs=operands, outputs=[_rebased(dense, 0, k[0])])
        return conv.lower_conv_weight_grad(
            _over_channels(dense_job, shapes, (k[1] - k[0], c[1] - c[0], *shape[2:]), k, c)
        )

    parts = bundle.parts(written[0], bundle.per_k, bundle.k, job.op.name)
    if whole:
        return _joined(job.op, Lowered(), parts, part)
    found = _joined(job.op, Lowered((), (dense,)), parts, part)
    weights = filter_view(job.output, written)
    kernel = _extract(block)
    ints = _ints(bundle, weights, dense, written[0][1] - written[0][0])
    call = KernelCall(kernel, blocks(written[0], block), (ref(dense), weights.start), ints)
    return Lowered((*found.calls, call), found.scratch)


# -- the dense convolutions -------------------------------------------------------------------------------------------


def _joined(
    op: Op,
    before: Lowered,
    parts: Iterator[tuple[Interval, Interval]],
    part: Callable[[Op, Interval, Interval], Lowered],
) -> Lowered:
    calls, scratch = before.calls, before.scratch
    attrs = {key: value for key, value in op.attrs.items() if key != "groups"}
    for i, (k, c) in enumerate(parts):
        lowered = part(replace(op, name=f"{op.name}.{i}", attrs=attrs), k, c)
        calls, scratch = calls + lowered.calls, scratch + lowered.scratch
    return Lowered(calls, scratch)


def _rebased(buffer: Buffer, axis: int, start: int) -> Buffer:
    """A buffer of which the channels count from `start`."""
    low, high = buffer.box[axis]
    return replace(buffer, box=(*buffer.box[:axis], (low - start, high - start), *buffer.box[axis + 1 :]))


def _shape(access: Access) -> tuple[int, ...]:
    return tuple(dim.size for dim in access)


def _sized(domain: Domain, i: int, channels: Interval) -> tuple[int, ...]:
    """The shape of input i with the channels of a bundle."""
    shape = _shape(domain.reads[i])
    return (shape[0], channels[1] - channels[0], *shape[2:])


def _written(domain: Domain, channels: Interval) -> tuple[int, ...]:
    shape = _shape(domain.writes[0])
    return (shape[0], channels[1] - channels[0], *shape[2:])


def _weights(domain: Domain, k: Interval, c: Interval) -> tuple[int, ...]:
    return (k[1] - k[0], c[1] - c[0], *_shape(domain.reads[1])[2:])


def _over_channels(
    job: Job, inputs: Sequence[tuple[int, ...]], output: tuple[int, ...], k: Interval, c: Interval
) -> Job:
    """A job whose op is dense by now, of these shapes, with the dense op's domain and box: the grouped op's, and all
    channels of a bundle, k and c."""
    domain = row(job.op.kind).domain(job.op.attrs, [Tensor("", shape) for shape in inputs], [Tensor("", output)])
    channels = {"k": (0, k[1] - k[0]), "c": (0, c[1] - c[0])}
    box = tuple(channels.get(axis.name) or job.domain.interval(job.box, axis.name) for axis in domain.axes)
    return replace(job, domain=domain, box=box)


# -- weights ----------------------------------------------------------------------------------------------------------


def _dense_buffer(op: Op, bundle: _Bundle, filter_box: Box, block: int) -> Buffer:
    box = (filter_box[0], (0, bundle.lines), *filter_box[2:])
    return Buffer(f"{op.name}.dense", box, "float32", (block, min(bundle.lines, block)))


def _dense(op: Op, bundle: _Bundle, w: Buffer, filter_box: Box) -> tuple[Lowered, Buffer]:
    """The weights of the dense convolutions, in scratch unless they are the weights themselves."""
    if bundle.groups == 1:
        return Lowered(), w
    block, weights = w.block[0], filter_view(w, filter_box)
    dense = _dense_buffer(op, bundle, filter_box, block)
    count = blocks(filter_box[0], block) * blocks((0, bundle.lines), dense.block[1])
    ints = _ints(bundle, weights, dense, filter_box[0][1] - filter_box[0][0])
    call = KernelCall(_expand(block), count, (weights.start, ref(dense)), ints)
    return Lowered((call,), (dense,)), dense


def _ints(bundle: _Bundle, w: Filter, dense: Buffer, channels: int) -> tuple[int, ...]:
    lines = dense.block[1]
    c_blocks = blocks((0, bundle.lines), lines)
    return (c_blocks, w.taps, lines, w.lines, w.k, w.block, bundle.per_k, bundle.per_c, bundle.groups, channels)


def _expand(block: int) -> Kernel:
    """dense[k][c] = w[k][c - first channel of k's group], or zero. A work unit is a block of both."""
    body = f"""
for u in T.serial(lo, hi):
    for tap in T.serial(taps):
        for line in T.serial(lines):
            for v in T.serial({block}):
                k: T.int32 = u // c_blocks * {block} + v
                c: T.int32 = u % c_blocks * lines + line - k // per_k % groups * per_c
                DENSE[((u * taps + tap) * lines + line) * {block} + v] = T.if_then_else(
                    T.And(c >= 0, c < per_c),
                    W[u // c_blocks * w_k + T.max(c, 0) // w_lines * w_block
                        + (tap * w_lines + T.max(c, 0) % w_lines) * {block} + v],
                    T.float32(0),
                )
"""
    pointers = {"W": "float32", "DENSE": "float32"}
    return make_kernel(f"expand_groups_{block}", pointers=pointers, ints=_INTS, body=body)


def _extract(block: int) -> Kernel:
    """w[k][c] = dense[k][c + first channel of k's group]; zero in pad lanes. A work unit is a block of k."""
    body = f"""
for u in T.serial(lo, hi):
    for tap in T.serial(taps):
        for c in T.serial((per_c + w_lines - 1) // w_lines * w_lines):
            for v in T.serial({block}):
                k: T.int32 = u * {block} + v
                d: T.int32 = T.min(c, per_c - 1) + k // per_k % groups * per_c
                W[u * w_k + c // w_lines * w_block + (tap * w_lines + c % w_lines) * {block} + v] = T.if_then_else(
                    T.And(k < channels, c < per_c),
                    DENSE[(((u * c_blocks + d // lines) * taps + tap) * lines + d % lines) * {block} + v],
                    T.float32(0),
                )
"""
    pointers = {"DENSE": "float32", "W": "float32"}
    return make_kernel(f"extract_groups_{block}", pointers=pointers, ints=_INTS, body=body)
