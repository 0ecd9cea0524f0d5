"""The vTPM domain's kernel, and the modules that it needs there, in the order of loading.

Theory of operation.  A kernel is an image and a directory of modules: this machine's, the
ones that were named, or Debian's kernel for virtual machines, which apt downloads and which
is unpacked, not installed.  What a module depends on stands in the module itself, so neither
depmod nor its files are needed.  A module that the kernel has built in, or that only some
kernels need, may be missing.

Source: Linux, Documentation/kbuild/modules.rst (`depends=` and `softdep=` in .modinfo).
"""

from __future__ import annotations

import gzip
import lzma
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..errors import ConfigError
from .aside import said

NEEDED: Final = ("xen-blkfront", "ext4", "xen-evtchn", "xen-gntdev", "xenfs")
"""Without these no vTPM domain runs; the kernel may have them built in."""

WANTED: Final = ("crc32c-generic", "xen-privcmd", "xen-gntalloc")
"""What some kernels need beside them: ext4's checksums, the rest of /dev/xen."""

_META_PACKAGE: Final = "linux-image-cloud-amd64"
_APT_DEADLINE_S: Final = 600
_DEPENDS: Final = re.compile(rb"\0depends=([^\0]*)")
_SOFT: Final = re.compile(rb"\0softdep=pre: ?([^\0]*)")


@dataclass(frozen=True, slots=True)
class Kernel:
    """An image and its modules' directory, /lib/modules/RELEASE."""

    image: Path
    modules: Path

    @property
    def release(self) -> str:
        """The kernel's release, as `uname -r` says it."""
        return self.modules.name


def named_kernel(image: Path, modules: Path) -> Kernel:
    """Return the kernel of these files; raises ConfigError where they are none."""
    if not image.is_file():
        raise ConfigError(f"{image} is no file", next_step="give a kernel, as /boot/vmlinuz-...")
    if not (modules / "kernel").is_dir():
        raise ConfigError(
            f"{modules} holds no directory named kernel",
            next_step="give the kernel's directory of modules, as /lib/modules/RELEASE",
        )
    return Kernel(image, modules)


def installed_kernel(root: Path = Path("/")) -> Kernel:
    """Return the newest kernel below `root` that has both image and modules."""
    for image in sorted((root / "boot").glob("vmlinuz-*"), key=_version, reverse=True):
        modules = root / "lib/modules" / image.name.removeprefix("vmlinuz-")
        if (modules / "kernel").is_dir():
            return Kernel(image, modules)
    raise ConfigError(
        f"{root / 'boot'} has no kernel with modules in {root / 'lib/modules'}",
        next_step="give --debian DIR to download Debian's, or --kernel and --modules",
    )


def _version(image: Path) -> list[tuple[int, str]]:
    words = re.findall(r"\d+|\D+", image.name)
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in words]


def debian_kernel(directory: Path) -> Kernel:
    """Return Debian's kernel for virtual machines, downloaded below `directory` once.

    Needs no root.  Raises ConfigError where apt cannot deliver it.
    """
    root = directory / "kernel"
    if not root.is_dir():
        # Aside first: what an interrupted download leaves must not be taken for a kernel.
        aside = directory / "kernel.part"
        try:
            with said(directory, "the vTPM domain needs a kernel"):
                directory.mkdir(parents=True, exist_ok=True)
                _unpack(directory, aside)
                aside.rename(root)
        finally:
            # It is large, and the disk may be full.
            shutil.rmtree(aside, ignore_errors=True)
    return installed_kernel(root)


def _unpack(directory: Path, aside: Path) -> None:
    """Download the package and unpack it into `aside`, which is made anew."""
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    package = _downloaded(directory.resolve() / "apt", aside.resolve())
    _run(["dpkg-deb", "--extract", str(package), "."], aside)
    package.unlink()


def _downloaded(private: Path, directory: Path) -> Path:
    """Download the package into `directory`, with lists of packages of our own."""
    for name in ("state/lists/partial", "cache/archives/partial"):
        (private / name).mkdir(parents=True, exist_ok=True)
    (private / "status").touch()
    options = [
        *("-o", f"Dir::State={private / 'state'}", "-o", f"Dir::Cache={private / 'cache'}"),
        *("-o", f"Dir::State::status={private / 'status'}", "-o", "Acquire::Retries=3"),
        *("-o", "APT::Sandbox::User=", "-o", "Acquire::Languages=none", "-q"),
    ]
    _run(["apt-get", *options, "update"], directory)
    depends = _run(["apt-cache", *options, "depends", _META_PACKAGE], directory)
    match = re.search(r"Depends: (linux-image-[0-9]\S*)", depends)
    if match is None:
        raise ConfigError(
            f"apt knows no kernel behind {_META_PACKAGE}",
            next_step="give --kernel and --modules of a kernel with Xen support",
        )
    _run(["apt-get", *options, "download", match[1]], directory)
    return next(directory.glob("linux-image-*.deb"))


def _run(words: list[str], directory: Path) -> str:
    try:
        done = subprocess.run(
            words,
            cwd=directory,
            capture_output=True,
            text=True,
            check=True,
            timeout=_APT_DEADLINE_S,
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip() or str(error)
        raise ConfigError(
            f"`{words[0]} {words[-1]}` failed: {said.splitlines()[-1]}",
            state="the vTPM domain needs a kernel",
            next_step="see that this machine reaches Debian's packages, or give --kernel",
        ) from error
    return done.stdout


def modules_in_order(kernel: Kernel, more: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Return the modules to load, decompressed, each after what it depends on.

    `more` names others that are needed.  Raises ConfigError where one is missing.
    """
    files = {_plain(path): path for path in sorted(kernel.modules.rglob("*.ko*"))}
    listed = (kernel.modules / "modules.builtin").read_text(encoding="ascii").split()
    builtin = {_plain(Path(line)) for line in listed}
    order: dict[str, bytes] = {}

    def add(name: str, *, needed: bool) -> None:
        if name in order or name in builtin:
            return
        if name not in files:
            if needed:
                raise ConfigError(
                    f"the kernel {kernel.release} has no module {name}",
                    next_step="take a kernel with support for Xen's guests",
                )
            return
        raw = _decompressed(files[name])
        for hard in _names(_DEPENDS, raw):
            add(hard, needed=True)
        for soft in _names(_SOFT, raw):
            add(soft, needed=False)
        order[name] = raw

    for name in WANTED:
        add(name.replace("-", "_"), needed=False)
    for name in (*NEEDED, *more):
        add(name.replace("-", "_"), needed=True)
    return order


def _names(pattern: re.Pattern[bytes], raw: bytes) -> list[str]:
    match = pattern.search(raw)
    words = re.split(rb"[ ,]+", match[1]) if match else []
    return [word.decode("ascii").replace("-", "_") for word in words if word]


def _plain(path: Path) -> str:
    return path.name.split(".ko")[0].replace("-", "_")


def _decompressed(path: Path) -> bytes:
    raw = path.read_bytes()
    match path.suffix:
        case ".xz":
            return lzma.decompress(raw)
        case ".gz":
            return gzip.decompress(raw)
        case ".zst":
            done = subprocess.run(["zstd", "-dcq"], input=raw, capture_output=True, check=True)
            return done.stdout
        case _:
            return raw
