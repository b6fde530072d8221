"""Samples that come from another node, the source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fusetile.box import volume
from fusetile.errors import ProtocolError
from fusetile.program import Program, Routine
from fusetile.runtime.data import Feeder, Values
from fusetile.runtime.outlet import Inlet, wanted_by
from fusetile.runtime.samples import Scaling
from fusetile.runtime.transport import Transport


class Received(Feeder):
    """What the source sends. `offer` is what it has said of its data; see `Data.offer`."""

    def __init__(
        self,
        program: Program,
        transport: Transport,
        offer: Mapping[str, Any],
        *,
        scaling: Scaling | None = None,
        routine: Routine | None = None,
    ) -> None:
        super().__init__(program, scaling=scaling, routine=routine)
        wanted = wanted_by(self._routine)
        try:
            self.count = int(offer["count"])
            types = {key: str(offer["types"][key]) for key, _ in wanted}
            self._inlet = Inlet(transport, wanted, types, rank=program.rank, validation=routine is not None)
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"the source offers {offer}") from error

    def _take(self, batch: int, rows: np.ndarray | None) -> Values:
        parts = iter(self._inlet.take(batch))
        return [self._scaled(feed, next(parts)) if volume(feed.buffer.box) else None for feed in self._feeds]

    def _prepare(self, batch: int, rows: np.ndarray | None) -> None:
        self._inlet.expect(batch)
