"""What a node has of the data: all (every node has a copy), or all for everybody (it is the source), or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fusetile.errors import ProtocolError, UserError
from fusetile.program import Program, Routine
from fusetile.runtime.data import Data, Feeder, Reader
from fusetile.runtime.options import Options
from fusetile.runtime.outlet import Outlet, read_wanted, wanted_by
from fusetile.runtime.received import Received
from fusetile.runtime.samples import Scaling, check_alike
from fusetile.runtime.stream import Streamed
from fusetile.runtime.transport import Transport

Told = Mapping[int, Mapping[str, Any]]
"""What the nodes have said of the samples, by rank; see `Local.told`."""


@dataclass(frozen=True, slots=True)
class Local:
    """The data for the training, and those held back for validation, as far as they are here."""

    program: Program
    scaling: Scaling
    data: Reader | None
    held_back: Data | None

    @classmethod
    def of(cls, options: Options, program: Program) -> Local:
        """Raises UserError for what is missing, wrong, or not wanted here."""
        scaling = Scaling(options.mean, options.std)
        given = [f"--{name} {path}" for name, path in (("data", options.data), ("val", options.val)) if path]
        if program.source not in (None, program.rank):
            if given:
                raise UserError(
                    f"{given[0]}: leave it out, the node of rank {program.source} is the source of the data"
                )
            return cls(program, scaling, None, None)
        if options.stream is not None:
            streamed = Streamed(program, options.stream, scaling=scaling)
            return cls(program, scaling, streamed, _held_back(options, program, scaling))
        if options.data is None:
            raise UserError("--data DATA is missing: this node needs the data")
        data = Data(
            options.data,
            program,
            shuffle=options.shuffle,
            scaling=scaling,
            augmentation=options.augment,
            checked=options.checked,
        )
        if options.val is not None:
            check_alike(options.data, options.val)
        return cls(program, scaling, data, _held_back(options, program, scaling))

    def close(self) -> None:
        """Read nothing any more."""
        for _, each in self._here():
            each.close()

    @property
    def counts(self) -> list[int | None] | None:
        """Samples to train on and to validate, which must be the same on all nodes that have the data; None with a
        source, whose count is that of all."""
        if self.program.source is not None or self.data is None:
            return None
        return [self.data.count, self.held_back.count if self.held_back else None]

    def told(self) -> dict[str, Any]:
        """What the others must know: what this node wants of every batch, and on the source what there is."""
        if self.program.source is None:
            return {}
        offers = {name: each.offer() for name, each in self._here()}
        return {"wants": {name: wanted_by(routine) for name, routine in self._routines()}, "offers": offers}

    def connected(self, transport: Transport | None, told: Told) -> tuple[Feeder, Feeder | None]:
        """The samples for the training and for validations. Raises ProtocolError for what makes no sense."""
        source, scaling = self.program.source, self.scaling
        if self.data is None:
            assert transport is not None and source is not None
            offers = told[source].get("offers", {})
            if "training" not in offers:
                raise ProtocolError(f"the source offers {offers}")
            received = Received(self.program, transport, offers["training"], scaling=scaling)
            if "validation" not in offers:
                return received, None
            routine = self.program.validation
            return received, Received(self.program, transport, offers["validation"], scaling=scaling, routine=routine)
        if source is not None and transport is not None:
            for name, each in self._here():
                wants = {rank: said.get("wants", {}).get(name, []) for rank, said in told.items()}
                known = {rank: read_wanted(boxes, self.program.samples) for rank, boxes in wants.items()}
                each.share(Outlet(transport, known, validation=name == "validation"))
        return self.data, self.held_back

    def _routines(self) -> list[tuple[str, Routine]]:
        named = (("training", self.program.training), ("validation", self.program.validation))
        return [(name, routine) for name, routine in named if routine is not None]

    def _here(self) -> list[tuple[str, Reader]]:
        named: tuple[tuple[str, Reader | None], ...] = (("training", self.data), ("validation", self.held_back))
        return [(name, data) for name, data in named if data is not None]


def _held_back(options: Options, program: Program, scaling: Scaling) -> Data | None:
    """The data for validation. Raises UserError."""
    if options.val is None:
        for flag, value in (("--val-every", options.val_every), ("--patience", options.patience)):
            if value is not None:
                raise UserError(f"{flag} {value} needs --val DATA")
        return None
    if program.validation is None:
        raise UserError(
            f"--val: the bundle {options.bundle} can't validate: compile with --validation, and copy it again"
        )
    return Data(
        options.val, program, shuffle=False, scaling=scaling, routine=program.validation, checked=options.checked
    )
