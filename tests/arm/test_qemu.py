"""Training on emulated ARM processors: what a Raspberry Pi would run, over TCP, gives what this computer gives."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from fusetile.device import PROFILES
from fusetile.local import free_ports
from models import lenet, resnet18, vgg_small
from tests.arm import transformer
from tests.arm.rootfs import ARM64, ARMHF, PYTHON, root_of
from tests.commands import fusetile, images, losses, save

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]
EMULATED = {  # the emulator, its processor, and the system that it runs
    "pi3": ("qemu-aarch64-static", "cortex-a53", ARM64),
    "pi4": ("qemu-aarch64-static", "cortex-a72", ARM64),
    "pi5": ("qemu-aarch64-static", "cortex-a76", ARM64),
    # the Pi 2's: it has no instruction that a later one could lack
    "pi3-32": ("qemu-arm-static", "cortex-a7", ARMHF),
    "pi5-32": ("qemu-arm-static", "cortex-a7", ARMHF),
}
ADAMW = ("--optimizer", "adamw", "--clip-norm", "0.5", "--label-smoothing", "0.1", "--ema", "0.9")
EQUAL_flops = 120e9  # per second: a whole number of cores of every kind
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
Launch = Callable[[str], list[str]]


@pytest.fixture(scope="session")
def python_on() -> Launch:
    """The command that runs Python on a kind of device. Skips where there is no qemu or apt, unless all tests must
    run."""
    must = bool(os.environ.get("FUSETILE_TEST_ALL"))
    tools = {"apt-get", "dpkg-deb", *(emulator for emulator, _, _ in EMULATED.values())}
    missing = [name for name in sorted(tools) if not shutil.which(name)]
    if missing and not must:
        pytest.skip(f"{missing[0]} is not installed (Debian: apt install qemu-user-static)")
    try:
        roots = {architecture: root_of(architecture) for architecture in (ARM64, ARMHF)}
    except (OSError, subprocess.CalledProcessError) as error:
        if must:
            raise
        pytest.skip(f"no ARM system could be made: {error} {getattr(error, 'stderr', '') or ''}")

    def command(device: str) -> list[str]:
        if device == "host":
            return [sys.executable]
        emulator, cpu, architecture = EMULATED[device]
        root = roots[architecture]
        return [emulator, "-cpu", cpu, "-L", str(root), str(root / "usr" / "bin" / PYTHON)]

    return command


def train(folder: Path, model: Path, data: Path, devices: Sequence[str], python_on: Launch, *options: str) -> Path:
    """Compile for the devices, run every node on its own kind of processor for two steps, the second with updated
    weights; returns the folder with log.jsonl and gradients.npz."""
    folder.mkdir()
    ports = free_ports(len(devices))
    entries = [
        f'[[node]]\nname = "n{rank}"\naddress = "127.0.0.1:{port}"\ndevice = "{device}"\n'
        for rank, (port, device) in enumerate(zip(ports, devices, strict=True))
    ]
    if "host" in devices:  # a plan for what they really are would leave all work to it
        cores = [round(EQUAL_flops / PROFILES[device].core_flops) for device in devices]
        entries = [f"{entry}cores = {count}\n" for entry, count in zip(entries, cores, strict=True)]
    (folder / "cluster.toml").write_text("".join(entries))
    build = folder / "build"
    given = ("--cluster", folder / "cluster.toml", "--batch", 4, "--lr", 0.001, *options)
    assert fusetile("compile", model, *given, "-o", build) == 0
    ops = json.loads((build / "plan.json").read_text())["ops"]
    assert all(any(op["compute"][rank] for op in ops if op["phase"] == "forward") for rank in range(len(devices)))
    nodes = []
    for rank, device in enumerate(devices):
        command = [*python_on(device), "-m", "fusetile.runtime.node", str(build / "nodes" / f"n{rank}")]
        command += ["--data", str(data), "--steps", "2", "--threads", "2", "--quiet"]
        command += ["--save-gradients", str(folder / "gradients.npz")]
        command += ["--log", str(folder / "log.jsonl")] if rank == 0 else []
        nodes.append(subprocess.Popen(command, env=ENVIRONMENT, cwd=folder, stderr=subprocess.PIPE, text=True))
    try:
        ends = [(node.communicate(timeout=200)[1], node.returncode) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert ends == [("", 0)] * len(nodes)
    return folder


def check_equal(found: Path, expected: Path) -> None:
    """Losses to 1e-5 in the first step and 1e-4 in the second; every gradient of that to 2e-3 of its largest. In a
    third step of a ResNet rounding would take one of its many kinks to the other side."""
    (first, second), (first_expected, second_expected) = losses(found / "log.jsonl"), losses(expected / "log.jsonl")
    assert first == pytest.approx(first_expected, rel=1e-5)
    assert second == pytest.approx(second_expected, rel=1e-4)
    gradients = np.load(expected / "gradients.npz")
    for name, value in np.load(found / "gradients.npz").items():
        np.testing.assert_allclose(value, gradients[name], rtol=0, atol=2e-3 * abs(gradients[name]).max(), err_msg=name)


@pytest.mark.parametrize(
    ("build", "devices", "plan", "options"),
    [
        (vgg_small.build, ("pi3", "pi3"), "grid:2x1", ()),
        (vgg_small.build, ("pi3", "host", "pi3-32"), "batch", ()),  # all kinds of processor in one training
        (resnet18.build, ("pi4", "pi4"), "grid:1x2", ()),
        (lenet.build, ("pi5", "pi5-32"), "channel", ()),
        (transformer.build, ("pi3", "host"), "batch", ADAMW),
    ],
    ids=["pi3-vgg-grid", "all-kinds-vgg-batch", "pi4-resnet-grid", "pi5-lenet-channel", "pi3-transformer-adamw"],
)
def test_training_on_arm_equals_the_host(
    build: Callable[..., onnx.ModelProto],
    devices: Sequence[str],
    plan: str,
    options: Sequence[str],
    python_on: Launch,
    tmp_path: Path,
) -> None:
    size = 64 if build is resnet18.build else 16  # the last maps must not be so small that BatchNorm is chaotic
    narrow = {resnet18.build: 0.125, transformer.build: 12}
    width = narrow.get(build, 0.25 if plan == "grid:2x1" else 0.5)
    model = save(build(size=size, channels=3, classes=5, width=width), tmp_path / "model.onnx")
    data = images(tmp_path / "data.npz", shape=(12, 3, size, size))
    expected = train(tmp_path / "host", model, data, ("host",), python_on, "--plan", "single", *options)
    found = train(tmp_path / "arm", model, data, devices, python_on, "--plan", plan, *options)
    check_equal(found, expected)


@pytest.mark.parametrize(
    ("device", "expected"),
    [("pi3", "aarch64, numpy 1.24.4, 64-bit ARM"), ("pi3-32", "armv7l, numpy 1.24.2, 32-bit ARM (armv7)")],
)
def test_the_emulated_processor_is_the_one_asked_for(device: str, expected: str, python_on: Launch) -> None:
    code = "import platform, numpy; from fusetile.runtime.abi import own\n"
    code += "print(platform.machine(), f'numpy {numpy.__version__}', own(), sep=', ')"
    command = [*python_on(device), "-c", code]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert said.stdout.strip() == expected
