"""Fully connected layers: the update happens where the gradient is made.

    GemmWeightGrad -> g;  SGD(w, g, v)        one kernel: w and v change as the sums of g leave the registers

Such a layer has few samples and many weights, so a step of it is nothing but memory traffic, of which a gradient that
is written, and read by the update that follows, would be a third. It exists nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from fusetile.codegen.calls import Lowered, ref
from fusetile.codegen.conv import lower_conv_weight_grad
from fusetile.codegen.job import Job
from fusetile.codegen.update import Updating, arithmetic, control_refs
from fusetile.graph import UPDATE, Graph, Op
from fusetile.ops import domain_of
from fusetile.passes.buffers import DeviceBuffers
from fusetile.passes.communicate import Communication
from fusetile.passes.schedule import Action, Compute
from fusetile.plan import Plan
from fusetile.program import Buffer


def updating(
    graph: Graph,
    plan: Plan,
    communication: Communication,
    storage: DeviceBuffers,
    actions: tuple[Action, ...],
    device: int,
) -> dict[str, str]:
    """Update -> the op that makes its gradient, where one kernel is to do both on a device: the update comes at once,
    on the box that was made, and what it changes lies like the gradient would."""
    found = {}
    for action, following in pairwise(actions):
        if not isinstance(action, Compute) or not isinstance(following, Compute):
            continue
        maker, update = graph.ops[action.op], graph.ops[following.op]
        gradient = maker.outputs[0]
        if maker.kind != "GemmWeightGrad" or update.phase != UPDATE or gradient not in update.inputs:
            continue
        made, taken = (domain_of(graph, op).output(plan.placements[op.name].compute[device]) for op in (maker, update))
        home = storage.home[gradient]
        in_place = storage.delivered[communication.reads[update.name, gradient]] == home
        alike = all(storage.home[changed].strides == home.strides for changed in update.outputs)
        if in_place and made == taken and alike:
            found[update.name] = maker.name
    return found


def lower_updating(job: Job, update: Op, others: Sequence[Buffer]) -> Lowered:
    """Both: the job is the maker's, but its outputs are what the update changes; `others` are the inputs of the update
    but for the gradient."""
    does, floats = arithmetic(update)
    states = tuple(ref(state, job.written()) for state in job.outputs[1:])
    beside = Updating(does, floats, states, control_refs(update, others))
    return lower_conv_weight_grad(replace(job, outputs=job.outputs[:1]), updating=beside)
