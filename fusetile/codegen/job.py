"""A job: iterations of an op for a CPU, and the buffers that they read and write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fusetile.box import Box
from fusetile.codegen.targets import Target
from fusetile.graph import Op
from fusetile.ops import Domain
from fusetile.program import Buffer

Numerics = Literal["fast", "strict"]


@dataclass(frozen=True, slots=True)
class Job:
    """What is lowered: the iterations `box` of an op.

    `inputs[i]` holds at least `need(i)`, `outputs[o]` gets `written(o)`, its pad lanes included; nothing else of the
    outputs changes. Boxes start at multiples of the blocks. `numerics` chooses among algorithms that round differently;
    with `lean` less scratch is used, where it takes more time.
    """

    op: Op
    domain: Domain
    box: Box
    inputs: Sequence[Buffer]
    outputs: Sequence[Buffer]
    target: Target
    numerics: Numerics = "fast"
    lean: bool = False

    @property
    def output(self) -> Buffer:
        """The first output."""
        return self.outputs[0]

    def need(self, i: int) -> Box:
        """The box of input i that is read."""
        return self.domain.need(self.box, i)

    def reach(self, i: int) -> Box:
        """The same with the padding, which is outside the tensor."""
        return self.domain.reach(self.box, i)

    def written(self, o: int = 0) -> Box:
        """The box of output o that is written."""
        return self.domain.output(self.box, o)

    def operand(self, i: int) -> tuple[Buffer, Box]:
        """Input i, and the box of it that is read."""
        return self.inputs[i], self.need(i)

    @property
    def operands(self) -> list[tuple[Buffer, Box]]:
        """All inputs, with their boxes."""
        return [self.operand(i) for i in range(len(self.inputs))]

    def result(self, o: int = 0) -> tuple[Buffer, Box]:
        """Output o, and the box of it that is written."""
        return self.outputs[o], self.written(o)

    @property
    def results(self) -> list[tuple[Buffer, Box]]:
        """All outputs, with their boxes."""
        return [self.result(o) for o in range(len(self.outputs))]
