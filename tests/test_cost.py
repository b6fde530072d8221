"""What convolutions cost, against counting their multiplications."""

from __future__ import annotations

import pytest

from fusetile.cost import cost_of
from fusetile.graph import Graph
from fusetile.ops import domain_of
from fusetile.passes.differentiate import Criterion, differentiate
from fusetile.passes.fuse import fuse
from tests.graphs import Net


def flops(graph: Graph, kind: str) -> list[float]:
    """Of all ops of a kind, in their order."""
    return [cost_of(graph, op, domain_of(graph, op).box).flops for op in graph.sorted().ops.values() if op.kind == kind]


@pytest.mark.parametrize("activation", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("groups", "channels"), [(1, 24), (3, 24), (24, 24)])
def test_a_convolution_and_both_its_gradients_multiply_equally_often(
    groups: int, channels: int, stride: int, activation: bool
) -> None:
    net = Net((2, 3, 16, 16))
    x = net.conv(net.x, channels)
    x = net.conv(x, 48, stride=stride, groups=groups)
    net.graph.outputs = [net.relu(x) if activation else x]
    graph = fuse(differentiate(net.graph, Criterion(loss="mse")))
    expected = 2.0 * 2 * 48 * (16 // stride) ** 2 * (channels // groups) * 9
    assert flops(graph, "Conv")[1] == expected
    assert expected in flops(graph, "ConvInputGrad")
    assert expected in flops(graph, "ConvWeightGrad")
