"""Values that travel as float16: a box is scaled by a power of two, and every value rounded to nearest, ties to even.

    largest   partials[u] = the largest |x| of work unit u (as bits)
    encode    staging[box] = float16(x * scale), and 1 / scale behind it
    decode    target[box] = (or +=) float32(staging[box]) / scale

The scale brings the largest |x| of the message's part to [2^14, 2^15): nothing overflows, and a value's error is at
most 2^-11 |x| + 2^-28 max|x|: values below 2^-28 of the largest become 0. Infinity and NaN stay what they are; a part
that holds one is not scaled. All is integer arithmetic, which every CPU has as vectors; not all have float16.
"""

from __future__ import annotations

from fusetile.box import Box
from fusetile.codegen.calls import KernelCall, Ref
from fusetile.codegen.strided import LANES, strided_call, strided_kernel
from fusetile.program import Buffer

SCALE_bytes = 4  # behind the values
_BITS = 'T.bitwise_and(T.reinterpret("int32", {x}), 2147483647)'
_NORMAL, _OVERFLOW, _INFINITY, _NAN = 0x38800000, 0x477FF000, 0x7C00, 0x7E00
_TOP = 127 + 14  # the exponent, as float32 has it, of the largest value after scaling


def encode(source: Buffer, staging: Buffer, box: Box, partials: Ref, scale: Ref) -> tuple[KernelCall, ...]:
    """Narrow a box of float32 into a float16 buffer for exactly this box; `partials` is scratch (`partials_bytes`)."""
    largest = strided_call(_LARGEST, [(source, box)], constants=[partials])
    count = largest.split
    return largest, strided_call(
        _ENCODE, [(source, box), (staging, box)], constants=[partials, scale], more_ints=[count]
    )


def decode(staging: Buffer, target: Buffer, box: Box, scale: Ref, *, add: bool) -> KernelCall:
    """Put (or add) what came into a float32 buffer."""
    return strided_call(_DECODE[add], [(staging, box), (target, box)], constants=[scale])


def partials_bytes(source: Buffer, box: Box) -> int:
    """Scratch memory of `encode`."""
    return 4 * strided_call(_LARGEST, [(source, box)], constants=[Ref("")]).split


_LARGEST = strided_kernel(
    "largest",
    operands={"X": "float32"},
    constants={"P": "int32"},
    scratch={"best": "int32"},
    before_unit=f"for v in T.vectorized({LANES}):\n    best[v] = 0",
    statements=[f"best[v] = T.max(best[v], {_BITS.format(x='{X}')})"],
    after_unit=f"P[u] = best[0]\nfor v in T.serial({LANES}):\n    P[u] = T.max(P[u], best[v])",
)

# 1 / scale has the exponent of the largest value, less 14; no scale for zeros, infinity and NaN
_FIND_SCALE = f"""
most[0] = 0
for i in T.serial(count):
    most[0] = T.max(most[0], P[i])
exponent: T.int32 = T.shift_right(most[0], 23)
plain: T.bool = T.Or(most[0] == 0, exponent == 255)
shift: T.int32 = T.if_then_else(plain, 0, T.max(-126, T.min(126, exponent - {_TOP})))
scale: T.float32 = T.reinterpret("float32", (127 - shift) * 8388608)
"""
_SCALED = "({X} * scale)"
_MAGNITUDE = _BITS.format(x=_SCALED)
_ROUNDED = f"T.shift_right({_MAGNITUDE} + 4095 + T.bitwise_and(T.shift_right({_MAGNITUDE}, 13), 1), 13) - {112 << 10}"
_HALF = (
    f"T.Select({_MAGNITUDE} < {_NORMAL}, 0, T.Select({_MAGNITUDE} < {_OVERFLOW}, {_ROUNDED},"
    f" T.Select({_MAGNITUDE} > 2139095040, {_NAN}, {_INFINITY})))"
)
_SIGN = f'T.bitwise_and(T.shift_right(T.reinterpret("int32", {_SCALED}), 16), 32768)'

_ENCODE = strided_kernel(
    "encode_float16",
    operands={"X": "float32", "Y": "uint16"},
    constants={"P": "int32", "S": "float32"},
    scratch={"most": "int32"},
    more_ints=["count"],
    before_unit=_FIND_SCALE,
    statements=[f'{{Y}} = T.Cast("uint16", T.bitwise_or({_HALF}, {_SIGN}))'],
    after_unit='if u == 0:\n    S[0] = T.reinterpret("float32", (127 + shift) * 8388608)',
)

_CODE = 'T.Cast("int32", {X})'
_WIDE = f"T.shift_left(T.bitwise_and({_CODE}, 32767), 13)"
_EXPONENT = f"T.bitwise_and({_CODE}, {_INFINITY})"
_VALUE = (
    f"T.Select({_EXPONENT} == 0, 0, T.Select({_EXPONENT} == {_INFINITY},"
    f" T.bitwise_or({_WIDE}, 2139095040), {_WIDE} + {112 << 23}))"
)
_DECODED = f'T.reinterpret("float32", T.bitwise_or({_VALUE}, T.shift_left(T.bitwise_and({_CODE}, 32768), 16))) * S[0]'
_DECODE = {
    add: strided_kernel(
        "add_float16" if add else "decode_float16",
        operands={"X": "uint16", "Y": "float32"},
        constants={"S": "float32"},
        statements=[f"{{Y}} = {{Y}} + {_DECODED}" if add else f"{{Y}} = {_DECODED}"],
    )
    for add in (False, True)
}
