"""fusetile: train convolutional networks on a handful of small computers, with no server.

`fusetile.compile` and `fusetile.train` are in `fusetile.api`. They need the compiler, which a device does not have: so
they are loaded when they are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusetile.api import FusetileError, RunOptions, StepRecord, Trained, Training, UserError, compile, train

__all__ = ["FusetileError", "RunOptions", "StepRecord", "Trained", "Training", "UserError", "compile", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fusetile import api

    return getattr(api, name)
