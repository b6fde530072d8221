"""A Python with numpy for an ARM architecture in a folder, for qemu-user; nothing else of this machine is changed.

Debian's packages are only unpacked: no script of theirs runs, so neither root nor chroot is needed. They come from
where this machine's own apt gets its packages. On 64 bits numpy comes from pip; for 32 bits PyPI has none, and it is
Debian's, as on a Raspberry Pi.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

SUITE, PYTHON = "bookworm", "python3.11"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


@dataclass(frozen=True, slots=True)
class Architecture:
    """`name` is Debian's; `packages` are unpacked, with what they depend on; numpy's version `numpy` comes from pip,
    built for one of `platforms`, if there are any."""

    name: str
    packages: tuple[str, ...]
    numpy: str
    platforms: tuple[str, ...] = ()


ARM64 = Architecture(
    "arm64",
    (PYTHON, "libstdc++6"),
    "1.24.4",  # about the oldest that the runtime supports
    ("manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64"),
)
ARMHF = Architecture("armhf", (PYTHON, "python3-numpy"), "1.24.2")


def root_of(architecture: Architecture) -> Path:
    """The folder, made on first use (some 150 MB). Raises OSError or CalledProcessError if that can't be done here."""
    cache = Path(os.environ.get("FUSETILE_TEST_CACHE", Path.home() / ".cache" / "fusetile-test"))
    root = cache / f"{architecture.name}-{SUITE}-numpy{architecture.numpy}"
    if root.is_dir():
        return root
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{architecture.name}-", dir=cache) as folder:
        made = Path(folder) / "root"
        _unpack(_download(Path(folder), architecture), made)
        if architecture.platforms:
            _install_numpy(made, architecture)
        made.rename(root)  # only what is complete gets the name
    return root


def _download(work: Path, architecture: Architecture) -> list[Path]:
    """Python and what it depends on, as .deb files; apt works on a state of its own."""
    for folder in ("state/lists/partial", "cache/archives/partial", "etc"):
        (work / folder).mkdir(parents=True)
    (work / "status").touch()
    sources = work / "etc" / "sources.list"
    sources.write_text(f"deb [arch={architecture.name} signed-by={KEYRING}] {_mirror()} {SUITE} main\n")
    settings = {
        "Dir::State": work / "state",
        "Dir::State::status": work / "status",
        "Dir::Cache": work / "cache",
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "-",
        "APT::Architecture": architecture.name,
        "APT::Architectures": architecture.name,
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",
        "Debug::NoLocking": "1",
    }
    apt = ["apt-get", "-qq", *(part for name, value in settings.items() for part in ("-o", f"{name}={value}"))]
    _run(*apt, "update")
    _run(*apt, "-y", "--download-only", "install", *architecture.packages, "ca-certificates-")
    return sorted((work / "cache" / "archives").glob("*.deb"))


def _mirror() -> str:
    """Where this machine's apt gets Debian's main packages."""
    found = _run("apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Component: main")
    mirrors = [line.rstrip("/") for line in found.splitlines() if line.rstrip("/").endswith("/debian")]
    if not mirrors:
        raise OSError("apt has no Debian mirror configured")
    return mirrors[0]


def _unpack(packages: list[Path], root: Path) -> None:
    for name in ("bin", "sbin", "lib"):  # merged /usr: what packages have in /lib unpacks into /usr/lib
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    for package in packages:
        archive = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], check=True, capture_output=True).stdout
        unpack = ["tar", "-x", "--keep-directory-symlink", "--no-same-owner", "-C", str(root)]
        subprocess.run(unpack, input=archive, check=True, capture_output=True)
    for name in ("blas", "lapack"):  # what a package's script would choose among alternatives
        for library in root.glob(f"usr/lib/*/{name}/lib{name}.so.3"):
            (library.parents[1] / library.name).symlink_to(f"{name}/{library.name}")


def _install_numpy(root: Path, architecture: Architecture) -> None:
    target = root / "usr" / "local" / "lib" / PYTHON / "dist-packages"
    platforms = [part for name in architecture.platforms for part in ("--platform", name)]
    kind = ["--only-binary=:all:", "--python-version", "3.11", "--implementation", "cp", "--abi", "cp311", *platforms]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    _run(*pip, *kind, "--target", str(target), f"numpy=={architecture.numpy}")


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
