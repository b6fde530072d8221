"""Addresses as the plan gives them."""

from __future__ import annotations

import pytest

from fusetile.errors import UserError
from fusetile.runtime.address import listen, parse
from tests.runtime import toy


def test_addresses_are_read() -> None:
    assert parse("10.0.0.2:7000") == ("10.0.0.2", 7000)
    assert parse("pi1.local:7000") == ("pi1.local", 7000)
    assert parse("[::1]:7000") == ("::1", 7000)


@pytest.mark.parametrize("address", ["10.0.0.2", "host:", "host:port", "host:0", "host:70000", ""])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(UserError, match="host:port is expected"):
        parse(address)


def test_a_name_means_all_interfaces_and_an_address_only_itself() -> None:
    port = toy.free_addresses(1)[0].split(":")[1]
    for host, bound in (("some-pi.local", "0.0.0.0"), ("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1")):
        with listen(toy.program(0, (f"{host}:{port}",))) as listener:
            assert listener.getsockname() == (bound, int(port))


def test_another_device_s_address_is_refused() -> None:
    with pytest.raises(UserError, match="this device does not have this address"):
        listen(toy.program(0, ("192.0.2.7:7000",)))
