"""Products of matrices per image and channel: the lanes of a vector are channels, that is different products."""

from __future__ import annotations

from collections.abc import Sequence

from fusetile.box import Box, view4
from fusetile.codegen.calls import Lowered, ref, vectors
from fusetile.codegen.elementwise import has_lanes, with_lanes
from fusetile.codegen.mapped import loops_over, mapped_call, mapped_kernel
from fusetile.codegen.targets import Target
from fusetile.graph import Op
from fusetile.ops import Domain
from fusetile.program import Buffer


def lower_mat_mul(
    op: Op, domain: Domain, box: Box, inputs: Sequence[Buffer], outputs: Sequence[Buffer], *, target: Target
) -> Lowered:
    """Every output is one sum over c, in order."""
    block, written = outputs[0].block[1], domain.output(box)
    needs = [domain.need(box, i) for i in (0, 1)]
    before, operands = with_lanes(op, list(zip(inputs, needs, strict=True)), outputs[0])
    elements: list[str] = []
    ints: dict[str, int] = {}
    name = "mat_mul"
    for key, operand, outer in zip("AB", operands, "hw", strict=True):
        buffer, need = operand
        turned = op.attrs["turned"][key == "B"]
        # a is [h, c] and b is [c, w], as long as they are not turned
        down, across = ("c", outer) if turned == (key == "A") else (outer, "c")
        lanes = has_lanes(operand, written)
        image, depth, row, pixel = buffer.strides
        counts = [stop - start for start, stop in view4(need)[:2]]
        full = [stop - start for start, stop in view4(written)[:2]]
        ints |= {
            f"{key}_image": image if counts[0] == full[0] else 0,
            f"{key}_block": depth if counts[1] == full[1] else 0,
            f"{key}_row": row,
            f"{key}_pixel": pixel,
        }
        at = f"n * {key}_image + k * {key}_block + {down} * {key}_row + {across} * {key}_pixel"
        elements.append(f"{key}[{at}{' + v' if lanes else ''}]")
        name += f"_{key}{'_turned' if turned else ''}{'' if lanes else '_alone'}"
    add = vectors([f"total[v] = total[v] + {elements[0]} * {elements[1]}"], block).replace("\n", "\n    ")
    pixel_text = f"""
{vectors(["total[v] = T.float32(0)"], block)}
for c in T.serial(inner):
    {add}
{vectors(["{Y} = T.Select(k * " + str(block) + " + v < channels, total[v], T.float32(0))"], block)}
"""
    kernel = mapped_kernel(
        name,
        block=block,
        maps={"Y": "float32"},
        pointers={"A": "float32", "B": "float32"},
        ints=["inner", "channels", *ints],
        scratch={"total": "float32"},
        pixel=pixel_text,
    )
    start, stop = domain.interval(box, "c")
    call = mapped_call(
        kernel,
        loops_over(written, block),
        [(outputs[0], written)],
        pointers=[ref(buffer, need) for buffer, need in operands],
        ints=(stop - start, written[1][1] - written[1][0], *ints.values()),
    )
    return Lowered((*before.calls, call), before.scratch)
