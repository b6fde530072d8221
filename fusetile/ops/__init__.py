"""The op table: one row per op kind."""

from fusetile.ops.base import ROWS, Axis, Domain, Row, Spec, domain_of, register, row

__all__ = ["ROWS", "Axis", "Domain", "Row", "Spec", "domain_of", "register", "row"]
