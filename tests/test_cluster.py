"""cluster.toml: what is read, and one clear message for everything that can be wrong in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fusetile.cluster import Link, local_cluster, read_cluster
from fusetile.device import PROFILES, PARALLEL_efficiency
from fusetile.errors import UserError

GOOD = """
[[node]]
name = "kitchen"
address = "192.168.1.21:7300"
device = "pi4"
memory = "1GB"
cores = 3

[[node]]
name = "attic-2.home"
address = "[fe80::1]:65535"
device = "pi3"

[link]
rate = "1Gbit/s"
latency = "250us"
"""


def write(folder: Path, content: str) -> Path:
    path = folder / "cluster.toml"
    path.write_text(content)
    return path


def node(**changes: str) -> str:
    """One entry with keys changed; values are TOML, "" leaves the key out."""
    entry = {"name": '"a"', "address": '"h:1"', "device": '"pi3"'} | changes
    return "[[node]]\n" + "".join(f"{key} = {value}\n" for key, value in entry.items() if value)


def test_reading(tmp_path: Path) -> None:
    cluster = read_cluster(write(tmp_path, GOOD))
    kitchen, attic = cluster.nodes
    assert (kitchen.name, kitchen.address) == ("kitchen", "192.168.1.21:7300")
    assert (kitchen.device.memory_bytes, kitchen.device.cores, kitchen.device.kind) == (10**9, 3, "pi4")
    assert attic.device == PROFILES["pi3"] and attic.address == "[fe80::1]:65535"
    assert cluster.link == Link(125e6, 250e-6)
    together = PARALLEL_efficiency
    expected = (3 * together * PROFILES["pi4"].core_flops, 4 * together * PROFILES["pi3"].core_flops)
    assert cluster.speeds == pytest.approx(expected)


def test_the_link_has_defaults(tmp_path: Path) -> None:
    assert read_cluster(write(tmp_path, node())).link == Link(94e6 / 8, 0.3e-3)


@pytest.mark.parametrize(
    ("memory", "expected"),
    [('"512MiB"', 1 << 29), ('"0.5 GiB"', 1 << 29), ("300_000_000", 300_000_000), ('"2e3 MB"', 2_000_000_000)],
)
def test_memory_units(tmp_path: Path, memory: str, expected: int) -> None:
    assert read_cluster(write(tmp_path, node(memory=memory))).nodes[0].device.memory_bytes == expected


@pytest.mark.parametrize(
    ("device", "abi", "kind"),
    [("pi3", "armv7", "pi3-32"), ("pi4", "armv7", "pi4-32"), ("pi3", "aarch64", "pi3"), ("pi5-32", "armv7", "pi5-32")],
)
def test_the_abi_picks_the_profile(tmp_path: Path, device: str, abi: str, kind: str) -> None:
    written = write(tmp_path, node(device=f'"{device}"', abi=f'"{abi}"', memory='"1GB"'))
    [found] = read_cluster(written).nodes
    assert found.device == replace(PROFILES[kind], memory_bytes=10**9)
    assert (found.device.target == "armv7") == (abi == "armv7")


BAD = {
    "not TOML": ("[[node]\nname=", ["not a TOML file"]),
    "empty": ("", ["no [[node]] entry"]),
    "node is a table": ('[node]\nname = "a"\n', ["[[node]]"]),
    "nodes are strings": ('node = ["a", "b"]\n', ["node 1", "'a'", "table"]),
    "nodes are numbers": ("node = [7]\n", ["node 1", "7", "table"]),
    "unknown table": (node() + "[links]\nrate = 1\n", ["'links'", "link, node"]),
    "unknown key": (node(ram='"1GB"'), ["node 1", "'ram'", "memory"]),
    "no name": (node(name=""), ["node 1", "name is missing"]),
    "no address": (node(address=""), ["node 1", "address is missing"]),
    "no device": (node(device=""), ["node 1", "device is missing"]),
    "name is a number": (node(name="7"), ["node 1", "name", "not a string"]),
    "name with a slash": (node(name='"../a"'), ["node 1", "'../a'"]),
    "name is a dot": (node(name='".."'), ["node 1", "'..'"]),
    "name is empty": (node(name='""'), ["node 1", "''"]),
    "no port": (node(address='"h"'), ["(a)", "'h'", "host:port"]),
    "no host": (node(address='":7300"'), ["(a)", "':7300'", "host:port"]),
    "port 0": (node(address='"h:0"'), ["(a)", "'h:0'"]),
    "port too large": (node(address='"h:65536"'), ["(a)", "'h:65536'"]),
    "port is no number": (node(address='"h:http"'), ["(a)", "'h:http'"]),
    "port is another script's digit": (node(address='"h:²"'), ["(a)", "'h:²'"]),
    "unknown device": (node(device='"pi9"'), ["(a)", "'pi9'", "host, pi3, pi3-32, pi3b+, pi3b+-32, pi4"]),
    "memory without a number": (node(memory='"much"'), ["(a)", "memory", "'much'", "GB"]),
    "memory in an unknown unit": (node(memory='"1 Mbit/s"'), ["(a)", "memory", "'1 Mbit/s'"]),
    "no memory at all": (node(memory="0"), ["(a)", "memory", "0"]),
    "negative memory": (node(memory='"-1GB"'), ["(a)", "memory", "'-1GB'"]),
    "infinite memory": (node(memory="inf"), ["(a)", "memory", "inf"]),
    "memory overflows": (node(memory='"1e999GB"'), ["(a)", "memory", "'1e999GB'"]),
    "more memory than 32 bits address": (node(abi='"armv7"', memory='"3GB"'), ["(a)", "'3GB'", "32-bit", "2GB"]),
    "unknown abi": (node(abi='"armv6"'), ["(a)", "abi = 'armv6'", "aarch64, armv7"]),
    "abi is a list": (node(abi="[1]"), ["(a)", "abi = [1]", "aarch64, armv7"]),
    "abi of a host": (node(abi='"armv7"', device='"host"'), ["(a)", "'host'", "abi = 'armv7'"]),
    "cores 0": (node(cores="0"), ["(a)", "cores = 0"]),
    "cores 1000": (node(cores="1000"), ["(a)", "cores = 1000"]),
    "cores true": (node(cores="true"), ["(a)", "cores = True"]),
    "cores 1.5": (node(cores="1.5"), ["(a)", "cores = 1.5"]),
    "same name": (node() + node(address='"h:2"'), ["two nodes", "name", "'a'"]),
    "same address": (node() + node(name='"b"'), ["two nodes", "address", "'h:1'"]),
    "second node": (node() + node(name='"b"', address='"h:2"', device='"x"'), ["node 2 (b)", "'x'"]),
    "link is no table": ('link = "fast"\n' + node(), ["[link]", "rate and latency"]),
    "unknown link key": (node() + '[link]\nspeed = "1MB/s"\n', ["[link]", "'speed'", "latency, rate"]),
    "rate without unit": (node() + "[link]\nrate = 100\n", ["[link]: rate", "100", "Mbit/s"]),
    "rate 0": (node() + '[link]\nrate = "0Mbit/s"\n', ["[link]: rate", "'0Mbit/s'"]),
    "latency in minutes": (node() + '[link]\nlatency = "1 min"\n', ["[link]: latency", "'1 min'", "ms"]),
    "two points": (node() + '[link]\nrate = "1.2.3MB/s"\n', ["[link]: rate", "'1.2.3MB/s'"]),
}


@pytest.mark.parametrize(("content", "parts"), BAD.values(), ids=BAD.keys())
def test_mistakes_are_named(tmp_path: Path, content: str, parts: list[str]) -> None:
    path = write(tmp_path, content)
    with pytest.raises(UserError) as caught:
        read_cluster(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    for part in parts:
        assert part in message.removeprefix(str(path)), message


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.toml: No such file"):
        read_cluster(tmp_path / "none.toml")
    with pytest.raises(UserError, match="directory"):
        read_cluster(tmp_path)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a TOML file"):
        read_cluster(path)


def test_local_cluster() -> None:
    cluster = local_cluster(3, target="pi3")
    assert [node.address for node in cluster.nodes] == ["127.0.0.1:7300", "127.0.0.1:7301", "127.0.0.1:7302"]
    assert len(set(cluster.speeds)) == 1
    with pytest.raises(UserError, match="--nodes 0"):
        local_cluster(0)
    with pytest.raises(UserError, match="pi7"):
        local_cluster(1, target="pi7")
