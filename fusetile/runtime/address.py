"""Addresses of nodes: read, resolved, listened at."""

from __future__ import annotations

import errno
import ipaddress
import socket
from typing import Any

from fusetile.errors import UserError
from fusetile.program import Program

_HINTS = {
    errno.EADDRINUSE: "another program uses this port, or this bundle runs already; end it or choose another port",
    errno.EADDRNOTAVAIL: "this device does not have this address; start each bundle on its own device",
    errno.EACCES: "ports below 1024 belong to the system; choose another port",
}


def parse(address: str) -> tuple[str, int]:
    """host:port, or [IPv6]:port."""
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"the plan gives a node the address {address!r}, where host:port is expected")
    return host.strip("[]"), int(port)


def resolve(address: str) -> Any:
    """The first answer of getaddrinfo; raises OSError if the name is unknown."""
    host, port = parse(address)
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]


def listen(program: Program) -> socket.socket:
    """A listening socket at this node's address: on all interfaces if the address is a name, because a device's own
    name often means 127.0.1.1 to itself. Raises UserError."""
    address = program.addresses[program.rank]
    host, port = parse(address)
    try:
        ipaddress.ip_address(host)
    except ValueError:
        host = "127.0.0.1" if host == "localhost" else ""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(program.nodes)
    except OSError as error:
        listener.close()
        hint = _HINTS.get(error.errno or 0, "choose another address in the cluster description")
        raise UserError(f"node {program.name!r} can't listen at {address} ({error.strerror}): {hint}") from error
    return listener
