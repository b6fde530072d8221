"""All that is known of a routine of the training before its programs are assembled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusetile.codegen.draft import Draft
from fusetile.codegen.targets import Target
from fusetile.graph import Graph
from fusetile.passes.buffers import DeviceBuffers
from fusetile.passes.communicate import Communication, Held
from fusetile.passes.plan_memory import MemoryPlan
from fusetile.passes.schedule import Schedule
from fusetile.plan import Plan


@dataclass(frozen=True, slots=True)
class LaidOut:
    """A plan with all that follows from it, down to the arenas; `lean` as in `Job`."""

    graph: Graph
    plan: Plan
    communication: Communication
    order: Schedule
    storage: Sequence[DeviceBuffers]
    targets: Sequence[Target]
    drafts: Sequence[Draft] = ()
    memories: Sequence[MemoryPlan] = ()
    lean: bool = False

    @property
    def arena_bytes(self) -> np.ndarray:
        """Per device."""
        return np.array([memory.arena_bytes for memory in self.memories], float)

    def held(self) -> Held:
        """The parameters, for another routine of the same programs."""
        layouts = {name: self.communication.layouts[name] for name in self.graph.next_value}
        found = []
        for storage in self.storage:
            there = {name: buffer for name, buffer in storage.home.items() if name in self.graph.parameters}
            for index, delivery in enumerate(self.communication.deliveries):
                if delivery.tensor in self.graph.parameters and delivery.tensor not in layouts:
                    there |= {delivery.tensor: storage.delivered[index]} if index in storage.delivered else {}
            found.append(there)
        return Held(layouts, tuple(found))
