"""The errors that a user sees. Each ends the command with one message and the exit status of its class."""

from __future__ import annotations


class FusetileError(Exception):
    """Base: a message that says what, where, which value, and what to do."""

    exit_status = 1


class UserError(FusetileError):
    """A mistake in what the user gave: files, options, data, cluster description."""

    exit_status = 2


class UnsupportedOp(UserError):
    """The model holds a node that fusetile can't train."""


class DoesNotFit(UserError):
    """A device has too little memory for its part of the plan."""


class PlanError(FusetileError):
    """A plan breaks its own rules: a fault of fusetile, never of the user."""


class ProtocolError(FusetileError):
    """A peer sent bytes that are not the protocol, or of another plan."""


class PeerFailure(FusetileError):
    """A peer died, froze, stopped or can't be reached."""
