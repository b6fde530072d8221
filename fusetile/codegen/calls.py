"""Kernels and calls: what the lowerings hand to `build` (kernels) and to the memory planner (calls).

A kernel is the text of one TVMScript function

    BODY(lo, hi, worker, pointers..., ints..., floats...)

that does the work units [lo, hi) of a call on thread `worker`. Buffers are one-dimensional and strides are arguments,
so that one kernel serves every shape. `SYMBOL(lo, hi, const ft_call *, worker)`, generated in C, unpacks a call's
arguments for it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fusetile.box import Box
from fusetile.errors import PlanError
from fusetile.program import Buffer, Call

# the limits of ft_call in segment.h
MAX_POINTERS, MAX_INTS, MAX_FLOATS = 10, 40, 6
BODY = "{}_body"


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel: its exported symbol, the TVMScript of its body, and the number of its arguments of each sort."""

    symbol: str
    source: str
    pointers: int
    ints: int
    floats: int


@dataclass(frozen=True, slots=True)
class Ref:
    """An address: bytes from the start of a named buffer."""

    buffer: str
    offset_bytes: int = 0


@dataclass(frozen=True, slots=True)
class KernelCall:
    """One call of a kernel, before memory planning. `split` independent work units are shared by the threads,
    but by no more than `workers` of them unless that is 0; `op` is the graph's op that it is part of, if any."""

    kernel: Kernel
    split: int
    pointers: tuple[Ref, ...]
    ints: tuple[int, ...] = ()
    floats: tuple[float, ...] = ()
    op: str = ""
    workers: int = 0

    def __post_init__(self) -> None:
        given = (len(self.pointers), len(self.ints), len(self.floats))
        wanted = (self.kernel.pointers, self.kernel.ints, self.kernel.floats)
        if given != wanted:
            raise PlanError(f"kernel {self.kernel.symbol} takes {wanted} pointers, ints and floats, not {given}")
        if any(not -(2**31) <= value < 2**31 for value in (self.split, *self.ints)):
            raise PlanError(
                f"kernel {self.kernel.symbol}: {self.ints} do not fit 32 bits: split the tensor over devices"
            )

    def placed(self, offsets_bytes: Mapping[str, int]) -> Call:
        """The call when every buffer has its offset in the arena."""
        pointers = tuple(offsets_bytes[pointer.buffer] + pointer.offset_bytes for pointer in self.pointers)
        return Call(self.kernel.symbol, self.split, pointers, self.ints, self.floats, self.op, self.workers)


@dataclass(frozen=True, slots=True)
class Lowered:
    """The calls of one op, in order, and the buffers that exist only during them. `prepared`: one of these, which the
    first call makes of the weights alone and the others only read."""

    calls: tuple[KernelCall, ...] = ()
    scratch: tuple[Buffer, ...] = field(default=())
    prepared: str = ""


def make_kernel(
    symbol: str,
    *,
    pointers: Mapping[str, str],
    body: str,
    ints: Sequence[str] = (),
    floats: Sequence[str] = (),
    scratch: Mapping[str, tuple[tuple[int, ...], str]] | None = None,
    aliased: bool = False,
) -> Kernel:
    """A kernel from the statements of its body, which loop over the units [lo, hi); `worker` is the number of the
    thread, that kernels need which have scratch for each.

    `pointers` maps one-dimensional buffers to dtypes (any alignment of their elements), `scratch` local arrays to
    (shape, dtype). Buffers that may overlap must be declared `aliased`.
    Every vectorized loop must hold one statement: TVM miscompiles scratch that lives in a single one.
    """
    if len(pointers) > MAX_POINTERS or len(ints) > MAX_INTS or len(floats) > MAX_FLOATS:
        raise PlanError(f"kernel {symbol} has more arguments than a call holds")
    parameters = [
        "lo: T.int32",
        "hi: T.int32",
        "worker: T.int32",
        *(f"{name}_: T.handle" for name in pointers),
        *(f"{name}: T.int32" for name in ints),
        *(f"{name}: T.float32" for name in floats),
    ]
    head = [f"T.func_attr({{'global_symbol': '{BODY.format(symbol)}', 'tirx.noalias': {not aliased}}})"]
    for name, dtype in pointers.items():
        align = np.dtype(dtype).itemsize
        # the shape only has to be large: addresses follow from the kernel's own strides
        head.append(f"{name} = T.match_buffer({name}_, (1073741824,), '{dtype}', align={align})")
    for name, (shape, dtype) in (scratch or {}).items():
        head.append(f"{name} = T.sblock_alloc_buffer({shape}, '{dtype}', scope='local')")
    statements = "\n".join(head) + "\n" + textwrap.dedent(body).strip("\n")
    source = f"@T.prim_func(s_tir=True)\ndef kernel({', '.join(parameters)}):\n{textwrap.indent(statements, '    ')}\n"
    return Kernel(symbol, source, len(pointers), len(ints), len(floats))


def indented(text: str, levels: int) -> str:
    """Statements for use in a body, `levels` loops deep."""
    return textwrap.indent(textwrap.dedent(text).strip("\n"), "    " * levels)


def vectors(statements: Sequence[str], lanes: int) -> str:
    """One vectorized loop over v per statement."""
    return "".join(f"for v in T.vectorized({lanes}):\n    {statement}\n" for statement in statements)


def greater(x: str, best: str) -> str:
    """Whether a float32 is greater than the greatest so far: a NaN is greater than all, told by its bits, because TVM
    takes floats to be ordered when it simplifies comparisons."""
    return f'T.Or({x} > {best}, T.bitwise_and(T.reinterpret("int32", {x}), 2147483647) > 2139095040)'


def prefetch(*addresses: str) -> str:
    """Statements that ask for cache lines which are needed soon: they change nothing and may name what is not there."""
    call = 'T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of({}), {}))'
    read_near_data = ", ".join(f"T.int32({value})" for value in (0, 3, 1))
    return "\n".join(call.format(address, read_near_data) for address in addresses)


def ref(buffer: Buffer, box: Box | None = None) -> Ref:
    """The first element of `box` (a box of the tensor, at a multiple of the block) in its buffer."""
    elements = 0 if box is None else buffer.element(box)
    return Ref(buffer.name, elements * np.dtype(buffer.dtype).itemsize)


def named_call(
    kernel: Kernel,
    split: int,
    pointers: Sequence[Ref],
    names: Sequence[str],
    ints: Mapping[str, int],
    floats: Sequence[float] = (),
    *,
    workers: int = 0,
) -> KernelCall:
    """A call whose integers are given by name; `names` is their order among the kernel's arguments."""
    values = tuple(ints[name] for name in names)
    return KernelCall(kernel, split, tuple(pointers), values, tuple(floats), workers=workers)


def scratch_buffer(name: str, elements: int) -> Buffer:
    """A buffer of so many float32 that exists only during the calls of an op."""
    return Buffer(name, ((0, elements),))
