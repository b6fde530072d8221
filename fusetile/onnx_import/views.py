"""What an ONNX tensor is of a tensor of the graph: reshapes and transposes move nothing as long as nobody looks.

    Transpose(x, [0, 2, 3, 1]) -> LayerNormalization -> MatMul -> Transpose(., [0, 3, 1, 2])

is a normalization and a 1x1 convolution of x as it is stored: rules of ops that work element by element, or along
whole axes, work on the stored tensor and hand the view on. Others have the view made into a tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from fusetile.ops.rearrange import Digit, Dims, joined, reshaped, shape_of, whole_view


@dataclass(frozen=True, slots=True)
class View:
    """Dimensions in digits of the axes of the graph's tensor `base` (see ops/rearrange.py)."""

    base: str
    dims: Dims

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the model sees."""
        return shape_of(self.dims)

    def over(self, base: str) -> View:
        """The same view of another tensor of the same shape."""
        return replace(self, base=base)

    def permuted(self, order: Sequence[int]) -> View:
        """Dimensions in another order."""
        return replace(self, dims=tuple(self.dims[axis] for axis in order))

    def reshaped(self, shape: Sequence[int]) -> View | None:
        """The same elements in another shape, if whole digits make it up."""
        dims = reshaped(self.dims, shape)
        return None if dims is None else replace(self, dims=dims)

    def without(self, axes: Collection[int]) -> View:
        """Dimensions of one left out."""
        return replace(self, dims=tuple(digits for i, digits in enumerate(self.dims) if i not in axes))

    def of_rank(self, rank: int) -> View:
        """Dimensions of one in front, as broadcasting adds them."""
        return replace(self, dims=((),) * (rank - len(self.dims)) + self.dims)

    def is_whole(self, shape: Sequence[int]) -> bool:
        """Whether it is the tensor, of this shape, as it is stored."""
        return self.dims == whole_view(shape) and self.shape == tuple(shape)

    def stored_as(self, dims: Dims, shape: Sequence[int]) -> View | None:
        """The view that is, whole, a tensor of this shape, of which this view is what `dims` are of it; with sizes of
        one along axes that it does not vary along. None if it varies along a part of an axis only."""
        digits: list[list[tuple[int, tuple[Digit, ...]]]] = [[] for _ in shape]
        for own, wanted in zip(self.dims, dims, strict=True):
            parts = reshaped((own,), [size for _, size, _ in wanted]) if own else ()
            if parts is None:
                return None
            for (axis, _, step), part in zip(wanted, parts, strict=False):
                digits[axis].append((step, part))
        found = tuple(joined([digit for _, part in sorted(along, reverse=True) for digit in part]) for along in digits)
        whole = all(size in (1, full) for size, full in zip(shape_of(found), shape, strict=True))
        return replace(self, dims=found) if whole else None

    def axes(self, dimensions: Collection[int]) -> set[int] | None:
        """The axes of the tensor that these dimensions are made of, or None if others have a part in them."""
        inside, outside = (
            {axis for i, digits in enumerate(self.dims) if (i in dimensions) is chosen for axis, _, _ in digits}
            for chosen in (True, False)
        )
        return None if inside & outside else inside


def merged(shapes: Sequence[Sequence[int]], most: int = 4) -> list[list[int]] | None:
    """Shapes of one rank with neighbouring dimensions put together where all of them are broadcast alike, the first
    one last; None if more than `most` are left."""
    full = [max(sizes) for sizes in zip(*shapes, strict=True)]
    marks = [tuple(size == 1 for size in sizes) for sizes in zip(*shapes, strict=True)]
    groups = [[axis] for axis in range(len(full))]
    for first in (1, 0):
        at = first
        while len(groups) > most and at + 1 < len(groups):
            one, other = groups[at], groups[at + 1]
            free = all(full[axis] == 1 for axis in one) or all(full[axis] == 1 for axis in other)
            if free or marks[one[0]] == marks[other[0]]:
                groups[at : at + 2] = [[*one, *other] if full[one[0]] > 1 else [*other, *one]]
            else:
                at += 1
    if len(groups) > most:
        return None
    result = []
    for shape in shapes:
        sizes = []
        for group in groups:
            size = 1
            for axis in group:
                size *= shape[axis]
            sizes.append(size)
        result.append(sizes)
    return result
