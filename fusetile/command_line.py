"""Options of commands as the fields of dataclasses: a field's annotation is its option, with name, help and panel."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer

from fusetile.errors import UserError


def option(panel: str, flag: str, help_text: str, **more: Any) -> Any:
    """What annotates a field."""
    return typer.Option(flag, help=help_text, rich_help_panel=panel, **more)


def numbers(flag: str, text: str) -> tuple[float, ...]:
    """Numbers separated by commas. Raises UserError."""
    try:
        values = tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        values = (math.nan,)
    if not all(map(math.isfinite, values)):
        raise UserError(f"{flag} {text!r}: give numbers separated by commas")
    return values


def check_values(options: Any) -> None:
    """That the fields hold what their options allow: typer sees only those of the command line. Raises UserError."""
    for name, hint in get_type_hints(type(options), include_extras=True).items():
        kind, declared = get_args(hint)
        flag, value = declared.default, getattr(options, name)  # in annotations typer takes names for defaults
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        if choices and value not in choices:
            raise UserError(f"{flag} {value}: choose one of {', '.join(choices)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag} {value}: must be a finite number")
        if value is not None and declared.min is not None and value < declared.min:
            raise UserError(f"{flag} {value}: must be at least {declared.min:g}")
        if value is not None and declared.max is not None and value > declared.max:
            raise UserError(f"{flag} {value}: must be at most {declared.max:g}")


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameters that are dataclasses are replaced by the fields of these, for typer to see."""
    parameters, groups = [], {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        kind = parameter.annotation
        if not isinstance(kind, type) or not is_dataclass(kind):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        hints = get_type_hints(kind, include_extras=True)
        groups[parameter.name] = (kind, [each.name for each in fields(kind)])
        for each in fields(kind):
            default = inspect.Parameter.empty if each.default is MISSING else each.default
            made = inspect.Parameter(
                each.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[each.name]
            )
            parameters.append(made)

    @functools.wraps(command)
    def spread_command(**values: Any) -> None:
        made = {name: kind(**{key: values.pop(key) for key in keys}) for name, (kind, keys) in groups.items()}
        command(**values, **made)

    vars(spread_command)["__signature__"] = inspect.Signature(parameters)
    return spread_command
