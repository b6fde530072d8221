"""The matrices of Winograd's convolutions, and straight-line code that multiplies by them.

F(m, r) computes m outputs of a convolution with r taps from a = m + r - 1 inputs with a products instead of m * r:

    y = AT ((G g) * (BT d))         (Winograd 1980; Cook-Toom construction; for images Lavin and Gray, arXiv 1509.09308)

and in two dimensions with every matrix on both sides. The points of F(4, 3) are 0, ±5/8, ±3/2 and infinity: BT is
exact in float32, and the error is half that of the textbook's 0, ±1, ±2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from math import prod

Matrix = list[list[Fraction]]

POINTS = {
    2: tuple(map(Fraction, (0, 1, -1))),
    4: (Fraction(0), Fraction(5, 8), Fraction(-5, 8), Fraction(3, 2), Fraction(-3, 2)),
}


def matrices(m: int, *, gradient: bool = False) -> tuple[Matrix, Matrix, Matrix]:
    """AT (m x a), G (a x 3), BT (a x a) of F(m, 3). With `gradient` those of F(3, m), which sums over m x m pixels for
    each of the 3 taps: BT is the same, and AT instead of G has the fractions."""
    points, outputs, taps = POINTS[m], 3 if gradient else m, m if gradient else 3
    size = outputs + taps - 1
    others = [[q for q in points if q != p] for p in points]
    norms = [prod((p - q for q in rest), start=Fraction(1)) for p, rest in zip(points, others, strict=True)]
    input_matrix = [[*_polynomial(rest), Fraction(0)] for rest in others] + [_polynomial(points)]
    filter_matrix = [[p**k for k in range(taps)] for p in points] + [
        [Fraction(int(k == taps - 1)) for k in range(taps)]
    ]
    output_matrix = [[p**i for p in points] + [Fraction(int(i == outputs - 1))] for i in range(outputs)]
    for j in range(size - 1):
        if gradient:
            for row in output_matrix:
                row[j] /= norms[j]
        else:
            filter_matrix[j] = [value / norms[j] for value in filter_matrix[j]]
    return output_matrix, filter_matrix, input_matrix


def _polynomial(roots: Sequence[Fraction]) -> list[Fraction]:
    """Coefficients of the product of (x - root), constant first."""
    found = [Fraction(1)]
    for root in roots:
        shifted, scaled = [Fraction(0), *found], [*(root * value for value in found), Fraction(0)]
        found = [a - b for a, b in zip(shifted, scaled, strict=True)]
    return found


def both_sides(matrix: Matrix, load: Callable[[int, int], str], store: Callable[[int, int], str]) -> list[str]:
    """Vector statements over `v` for  store = matrix * load * matrix^T, in the local arrays of `local_arrays`."""
    rows, columns = len(matrix), len(matrix[0])
    temporary = (f"temporary[{i}, v]" for i in range(10**6))
    statements = []
    for j in range(columns):
        column = [f"loaded[{i * columns + j}, v]" for i in range(columns)]
        statements += [f"{target} = {load(i, j)}" for i, target in enumerate(column)]
        statements += _times(matrix, column, [f"halfway[{i * columns + j}, v]" for i in range(rows)], temporary)
    for i in range(rows):
        row = [f"halfway[{i * columns + j}, v]" for j in range(columns)]
        statements += _times(matrix, row, [store(i, j) for j in range(rows)], temporary)
    return statements


def local_arrays(size: int, width: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """What `both_sides` needs for matrices of at most `size` rows and columns: (shape, dtype) by name."""
    counts = {"loaded": size * size, "halfway": size * size, "temporary": 8 * size}
    return {name: ((count, width), "float32") for name, count in counts.items()}


def _times(matrix: Matrix, sources: Sequence[str], targets: Sequence[str], temporary: Iterator[str]) -> list[str]:
    """Statements for targets = matrix * sources. Points come as +p and -p: rows, or columns, of such a pair differ in
    some signs only, and share the sums of what is equal and of what is opposite."""
    matrix, sources, statements = [list(row) for row in matrix], list(sources), []
    for x, y in _pairs(len(sources)):
        one, other = [row[x] for row in matrix], [row[y] for row in matrix]
        equal, opposite = _signs(one, other)
        if sum(map(bool, one)) >= 3 and not all(equal) and not all(opposite) and _either(equal, opposite):
            total, difference = next(temporary), next(temporary)
            statements += [
                f"{total} = {sources[x]} + {sources[y]}",
                f"{difference} = {sources[x]} - {sources[y]}",
            ]
            sources[x], sources[y] = total, difference
            for row, same in zip(matrix, equal, strict=True):
                row[x], row[y] = (row[x], Fraction(0)) if same else (Fraction(0), row[x])
    done: set[int] = set()
    for i, j in _pairs(len(matrix)):
        equal, opposite = _signs(matrix[i], matrix[j])
        if done & {i, j} or not _either(equal, opposite) or all(equal) or all(opposite):
            continue
        even = [value if same else Fraction(0) for value, same in zip(matrix[i], equal, strict=True)]
        odd = [value - part for value, part in zip(matrix[i], even, strict=True)]
        if sum(map(bool, even)) + sum(map(bool, odd)) >= 3 and any(even):
            first, second = next(temporary), next(temporary)
            statements += [
                f"{first} = {_sum(even, sources)}",
                f"{second} = {_sum(odd, sources)}",
                f"{targets[i]} = {first} + {second}",
                f"{targets[j]} = {first} - {second}",
            ]
            done |= {i, j}
    rest = [i for i in range(len(matrix)) if i not in done]
    return statements + [f"{targets[i]} = {_sum(matrix[i], sources)}" for i in rest]


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(i + 1, count)]


def _signs(one: Sequence[Fraction], other: Sequence[Fraction]) -> tuple[list[bool], list[bool]]:
    pairs = list(zip(one, other, strict=True))
    return [a == b for a, b in pairs], [a == -b for a, b in pairs]


def _either(equal: Sequence[bool], opposite: Sequence[bool]) -> bool:
    return all(a or b for a, b in zip(equal, opposite, strict=True))


def _sum(factors: Sequence[Fraction], terms: Sequence[str]) -> str:
    """The sum of factor * term; terms with factor 1 come first, so that the others are fused multiply-adds."""
    used = sorted(
        ((f, t) for f, t in zip(factors, terms, strict=True) if f), key=lambda pair: (pair[0] != 1, pair[0] != -1)
    )
    text = ""
    for factor, term in used:
        sign = " - " if factor == -1 else " + "
        product = term if abs(factor) == 1 else f"{term} * T.float32({float(factor)!r})"
        text = f"{text}{sign}{product}" if text else (f"T.float32(0) - {term}" if factor == -1 else product)
    return text or "T.float32(0)"
