"""Weights that are computed, as weight standardization does: a map [K,C,R,S] (or [K,C]) becomes a filter, and back.

Both hold the same numbers. They differ in how they are stored, and in what their dimensions are called: a filter's are
the output and the input channels of a layer. Each is the other's gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

from fusetile.errors import UserError
from fusetile.graph import BACKWARD, Graph, Op, Tensor
from fusetile.ops.base import Access, All, Along, Attrs, Axis, Domain, Row, Spec, register


def _shape(attrs: Attrs, inputs: Sequence[Tensor]) -> list[Spec]:
    (x,) = inputs
    if len(x.shape) not in (2, 4):
        raise UserError(f"{x.name!r} of shape {x.shape} can't be the weights of a layer, which are [K,C,R,S] or [K,C]")
    return [Spec(x.shape, x.dtype, "filter" if x.kind == "map" else "map")]


def _domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    k, c, *window = inputs[0].shape
    access: Access = (Along("k", k), Along("c", c), *map(All, window))
    return Domain((Axis("k", k), Axis("c", c)), (access,), (access,))


def _vjp(graph: Graph, op: Op, grads: Sequence[str | None]) -> list[str | None]:
    assert grads[0] is not None
    back = "MapOf" if op.kind == "FilterOf" else "FilterOf"
    return [*graph.add(back, [grads[0]], stem=f"grad.{op.inputs[0]}", phase=BACKWARD, origin=op.origin)]


for _kind in ("FilterOf", "MapOf"):
    register(Row(_kind, _shape, _domain, lambda op, domain, box, inputs: [inputs[0].copy()], _vjp, kernel="restored"))
