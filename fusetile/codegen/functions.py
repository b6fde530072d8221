"""exp, tanh, erf, log and log1p as vector arithmetic: the C library's functions would take the lanes one by one.

Each is a list of statements, of which the last gives the value; `{a}` is the argument, `{0}`, `{1}`, ... are temporary
vectors. All are within a few units in the last place, and a NaN stays one.
Sources: exp and log from the Cephes library (Moshier); the quotients for tanh and erf from Eigen (MathFunctionsImpl.h).
"""

from __future__ import annotations

from collections.abc import Sequence


def _polynomial(x: str, coefficients: Sequence[float]) -> str:
    """Horner's rule, the highest power first."""
    text = _number(coefficients[0])
    for coefficient in coefficients[1:]:
        text = f"({text} * {x} + {_number(coefficient)})"
    return text


def _number(value: float) -> str:
    return f"T.float32({value!r})"


def _clamped(a: str, low: float, high: float) -> str:
    return f"T.Select({a} < {_number(low)}, {_number(low)}, T.Select({a} > {_number(high)}, {_number(high)}, {a}))"


def _power_of_two(exponent: str) -> str:
    return f'T.reinterpret("float32", (T.Cast("int32", {exponent}) + 127) * 8388608)'


# exp(a) = 2^n * exp(a - n log 2); 2^n in two factors, so that results may be subnormal, or become infinite in time
_EXP = (
    _clamped("{a}", -104.0, 89.0),
    "T.floor({0} * T.float32(1.44269504088896341) + T.float32(0.5))",
    "{0} - {1} * T.float32(0.693359375) + {1} * T.float32(2.12194440e-4)",
    _polynomial(
        "{2}", (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
    ),
    "{3} * {2} * {2} + {2} + T.float32(1)",
    "T.floor({1} * T.float32(0.5))",
    f"{{4}} * {_power_of_two('{5}')} * {_power_of_two('({1} - {5})')}",
)
_TANH = (
    _clamped("{a}", -7.90531110763549805, 7.90531110763549805),
    "{0} * {0}",
    _polynomial(
        "{1}",
        (
            -2.76076847742355e-16,
            2.00018790482477e-13,
            -8.60467152213735e-11,
            5.12229709037114e-08,
            1.48572235717979e-05,
            6.37261928875436e-04,
            4.89352455891786e-03,
        ),
    ),
    _polynomial("{1}", (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)),
    "{0} * {2} / {3}",
)
_ERF = (
    _clamped("{a}", -4.0, 4.0),
    "{0} * {0}",
    _polynomial(
        "{1}",
        (
            -2.72614225801306e-10,
            2.77068142495902e-08,
            -2.10102402082508e-06,
            -5.69250639462346e-05,
            -7.34990630326855e-04,
            -2.95459980854025e-03,
            -1.60960333262415e-02,
        ),
    ),
    _polynomial(
        "{1}",
        (
            -1.45660718464996e-05,
            -2.13374055278905e-04,
            -1.68282697438203e-03,
            -7.37332916720468e-03,
            -1.42647390514189e-02,
        ),
    ),
    "{0} * {2} / {3}",
)
# log(1 + a) = 2 artanh(a / (2 + a)), for 0 <= a <= 1
_LOG1P = (
    "{a} / ({a} + T.float32(2))",
    "{0} * {0}",
    f"T.float32(2) * {{0}} * {_polynomial('{1}', [1 / (2 * i + 1) for i in range(7, -1, -1)])}",
)
# a = 2^n * m with m in [sqrt(1/2), sqrt(2)); of subnormal numbers, which are zero to 32-bit ARM's vectors, the bits are
# taken as an integer: that is 2^149 a
_LOG = (
    'T.Select({a} < T.float32(1.17549435e-38), T.Cast("float32", T.reinterpret("int32", {a})), {a})',
    'T.Cast("float32", T.bitwise_and(T.shift_right(T.reinterpret("int32", {0}), 23), 255) - 126)'
    " - T.Select({a} < T.float32(1.17549435e-38), T.float32(149), T.float32(0))",
    'T.reinterpret("float32", T.bitwise_or(T.bitwise_and(T.reinterpret("int32", {0}), 8388607), 1056964608))',
    "T.Select({2} < T.float32(0.70710678118654752), {1} - T.float32(1), {1})",
    "T.Select({2} < T.float32(0.70710678118654752), {2} + {2}, {2}) - T.float32(1)",
    "{4} * {4}",
    _polynomial(
        "{4}",
        (
            7.0376836292e-2,
            -1.1514610310e-1,
            1.1676998740e-1,
            -1.2420140846e-1,
            1.4249322787e-1,
            -1.6668057665e-1,
            2.0000714765e-1,
            -2.4999993993e-1,
            3.3333331174e-1,
        ),
    ),
    "{6} * {4} * {5} - {3} * T.float32(2.12194440e-4) - T.float32(0.5) * {5}",
    "{4} + {7} + {3} * T.float32(0.693359375)",
    # infinity and NaN stay what they are, by their bits; 0 and what is below have no logarithm
    'T.Select(T.bitwise_and(T.reinterpret("int32", {a}), 2147483647) > 2139095039, {a},'
    ' T.Select(T.reinterpret("int32", {a}) > 0, {8}, T.float32(0) - T.infinity("float32")))',
    'T.Select({a} < T.float32(0), T.reinterpret("float32", T.int32(2143289344)), {9})',
)
STATEMENTS = {"exp": _EXP, "tanh": _TANH, "erf": _ERF, "log": _LOG, "log1p": _LOG1P}
