"""An arm64 Python with numpy in a folder, for qemu-user; nothing else of this machine is changed.

Debian's packages are only unpacked: no script of theirs runs, so neither root nor chroot is needed. They come from
where this machine's own apt gets its packages; numpy comes from pip.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

SUITE, PYTHON = "bookworm", "python3.11"
NUMPY = "1.24.4"  # about the oldest that the runtime supports
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")


def arm64_root() -> Path:
    """The folder, made on first use (some 150 MB). Raises OSError or CalledProcessError if that can't be done here."""
    cache = Path(os.environ.get("FUSETILE_TEST_CACHE", Path.home() / ".cache" / "fusetile-test"))
    root = cache / f"arm64-{SUITE}-numpy{NUMPY}"
    if root.is_dir():
        return root
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="arm64-", dir=cache) as folder:
        made = Path(folder) / "root"
        _unpack(_download(Path(folder)), made)
        _install_numpy(made)
        made.rename(root)  # only what is complete gets the name
    return root


def _download(work: Path) -> list[Path]:
    """Python and what it depends on, as .deb files; apt works on a state of its own."""
    for folder in ("state/lists/partial", "cache/archives/partial", "etc"):
        (work / folder).mkdir(parents=True)
    (work / "status").touch()
    sources = work / "etc" / "sources.list"
    sources.write_text(f"deb [arch=arm64 signed-by={KEYRING}] {_mirror()} {SUITE} main\n")
    settings = {
        "Dir::State": work / "state",
        "Dir::State::status": work / "status",
        "Dir::Cache": work / "cache",
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "-",
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",
        "Debug::NoLocking": "1",
    }
    apt = ["apt-get", "-qq", *(part for name, value in settings.items() for part in ("-o", f"{name}={value}"))]
    _run(*apt, "update")
    _run(*apt, "-y", "--download-only", "install", PYTHON, "libstdc++6", "ca-certificates-")
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


def _install_numpy(root: Path) -> None:
    target = root / "usr" / "local" / "lib" / PYTHON / "dist-packages"
    platforms = [part for name in PLATFORMS for part in ("--platform", name)]
    kind = ["--only-binary=:all:", "--python-version", "3.11", "--implementation", "cp", "--abi", "cp311", *platforms]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    _run(*pip, *kind, "--target", str(target), f"numpy=={NUMPY}")


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
