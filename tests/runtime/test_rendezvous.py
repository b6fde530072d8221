"""The meeting, against peers that the test plays by hand."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor

from fusetile.local import free_ports
from fusetile.program import Program
from fusetile.runtime.rendezvous import meet
from fusetile.runtime.wire import Kind, encode_json
from tests.runtime import toy


def hello(program: Program) -> bytes:
    """What rank 1 says first."""
    said = {"plan": program.plan_hash, "nodes": 2, "rank": 1, "name": "b", "run": {}, "wants": {}, "samples": {}}
    return encode_json(Kind.HELLO, said)


def connect(port: int) -> socket.socket:
    """A connection with this port of this machine, as soon as somebody listens there."""
    end = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=10)
        except ConnectionRefusedError:
            if time.monotonic() > end:
                raise
            time.sleep(0.01)


def test_a_second_of_the_same_rank_is_refused_whatever_it_has_sent_already() -> None:
    port, other = free_ports(2)
    program = toy.program(0, (f"127.0.0.1:{port}", f"127.0.0.1:{other}"))
    ready = encode_json(Kind.READY, {"starts": [0]})
    with ThreadPoolExecutor(1) as pool:
        meeting = pool.submit(meet, program, run={}, wants={}, timeout=10.0)
        with connect(port) as first, connect(port) as second:
            first.sendall(hello(program))
            assert first.recv(4)
            second.sendall(hello(program) + ready)
            told = b""
            while part := second.recv(4096):
                told += part
            assert b"is its bundle started twice?" in told
            assert not meeting.done(), "the first is still to be ready"
            first.sendall(ready)
            links = meeting.result(10).links
            assert [link.socket.getpeername() for link in links.values()] == [first.getsockname()]
            links[1].socket.close()
