"""Dropout, with the mask of `fusetile.philox`: a function of the element's index in the whole tensor."""

from __future__ import annotations

from fusetile.box import view4
from fusetile.codegen.calls import Lowered, ref, vectors
from fusetile.codegen.job import Job
from fusetile.codegen.mapped import loops_over, mapped_call, mapped_kernel
from fusetile.codegen.reblock import conform

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = "T.bitwise_and({}, T.uint64(0xFFFFFFFF))"
_INTS = ("channel", "row", "column", "image", "C", "H", "W", "site", "key0", "key1")


def lower_dropout(job: Job) -> Lowered:
    """y = x / (1 - ratio) where the element's uniform number is at least `ratio`, else 0."""
    block, written = job.output.block[1], job.written()
    before, [moved] = conform(job.op, [job.operand(0)], job.output.block)
    kernel = mapped_kernel(
        "dropout",
        block=block,
        maps={"X": "float32", "Y": "float32"},
        pointers={"STEP": "int32"},
        ints=_INTS,
        floats=("ratio", "scale"),
        scratch={**dict.fromkeys(("c0", "c1", "c2", "c3"), "uint32"), "p": "uint64", "q": "uint64", "t": "float32"},
        before_unit="\n".join(f"seed{i}: T.uint64 = {_unsigned(f'key{i}')}" for i in range(2)),
        pixel=vectors(_statements(block), block),
    )
    images, channels, rows, columns = view4(written)
    _, *sizes = (*(dim.size for dim in job.domain.writes[0]), 1, 1, 1)[:4]
    seed, ratio = job.op.attrs["seed"], job.op.attrs["ratio"]
    keys = (_signed(seed & 0xFFFFFFFF), _signed(seed >> 32 & 0xFFFFFFFF))
    call = mapped_call(
        kernel,
        loops_over(written, block),
        [moved, job.result()],
        pointers=[ref(*job.operand(1))],
        ints=(channels[0], rows[0], columns[0], images[0], *sizes, _signed(job.op.attrs["site"]), *keys),
        floats=(ratio, 1 / (1 - ratio)),
    )
    return Lowered((*before.calls, call), before.scratch)


def _statements(block: int) -> list[str]:
    """Philox4x32-10 on the lanes; products of 32-bit words are 64 bits wide, so nothing overflows."""
    place = f'(T.Cast("int64", image + n) * C + (channel + k * {block} + v)) * H + (row + h)'
    index = f'p[v] = T.Cast("uint64", ({place}) * W + (column + w))'
    lines = [
        index,
        f"c0[v] = {_word('p[v]')}",
        'c1[v] = T.Cast("uint32", T.shift_right(p[v], T.uint64(32)))',
        'c2[v] = T.Cast("uint32", STEP[0])',
        'c3[v] = T.Cast("uint32", site)',
    ]
    for number in range(_ROUNDS):
        keys = [_word(f"(seed{i} + T.uint64({number * weyl}))") for i, weyl in enumerate(_WEYL)]
        p_high, q_high = (f'T.Cast("uint32", T.shift_right({name}[v], T.uint64(32)))' for name in "pq")
        lines += [
            f'p[v] = T.Cast("uint64", c0[v]) * T.uint64({_MULTIPLIERS[0]})',
            f'q[v] = T.Cast("uint64", c2[v]) * T.uint64({_MULTIPLIERS[1]})',
            f"c0[v] = T.bitwise_xor(T.bitwise_xor({q_high}, c1[v]), {keys[0]})",
            f"c2[v] = T.bitwise_xor(T.bitwise_xor({p_high}, c3[v]), {keys[1]})",
            f"c1[v] = {_word('q[v]')}",
            f"c3[v] = {_word('p[v]')}",
        ]
    # 24 bits are exact in float32, and as an int32
    uniform = 'T.Cast("float32", T.Cast("int32", T.shift_right(c0[v], T.uint32(8)))) * T.float32(2.0**-24)'
    return [*lines, f"t[v] = {uniform}", "{Y} = T.Select(t[v] >= ratio, {X} * scale, T.float32(0))"]


def _word(value: str) -> str:
    """The low 32 bits of a 64-bit value."""
    return f'T.Cast("uint32", {_LOW.format(value)})'


def _unsigned(name: str) -> str:
    """The 32 bits of an int argument, as a 64-bit value."""
    return _LOW.format(f'T.Cast("uint64", {name})')


def _signed(word: int) -> int:
    """The int32 with the bits of a 32-bit word."""
    return word - (1 << 32) if word >> 31 else word
