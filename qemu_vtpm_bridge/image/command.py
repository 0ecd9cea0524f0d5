"""`qemu-vtpm-bridge vtpm-image`: builds the vTPM domain and prints its xl.cfg.

Theory of operation.  What can be refused is refused first.  Then everything is written aside,
and only what cannot fail for want of room is left: kernel, initramfs and xl.cfg replace the
old ones, and the state disk gets its name last.  A run that is killed before that can be run
again as it was; after it, everything is there, and the xl.cfg has the disk's UUID.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import time
import uuid
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..errors import ConfigError
from .aside import Aside, said
from .kernel import Kernel, debian_kernel, installed_kernel, named_kernel
from .state_disk import SIZE_DEFAULT_MIB, check_state_disk, written_aside
from .xl_config import DomainWords, xl_config

if TYPE_CHECKING:
    from .build import Image

log = logging.getLogger(__name__)

MEMORY_DEFAULT_MIB: Final = 192
"""A PVH domain needs more than 128 while it unpacks its initramfs."""
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_TARGET: Final = re.compile(r"/[A-Za-z0-9_./:+@-]+")
"""What can stand in xl's words for a disk without being taken for something else."""

_DESCRIPTION: Final = """\
Builds a vTPM domain: a kernel and an initramfs with Python, this package and swtpm as they
are installed on this machine. The TPM is kept on a disk of its own, which --make-state makes
once. The xl.cfg goes to standard output, or to --output."""

_EPILOG: Final = """\
    qemu-vtpm-bridge vtpm-image --debian /var/cache/vtpm --make-state \\
        --state-disk /var/lib/vtpm/guest.img --name vtpm-of-guest \\
        --output /etc/xen/vtpm-of-guest.cfg /var/lib/vtpm/image
    xl create -q /etc/xen/vtpm-of-guest.cfg

The same inputs give the same bytes. One image serves many domains: give --output and another
--state-disk and --name for each."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument(
        "directory", metavar="DIRECTORY", help="where kernel and initramfs go; made if missing"
    )
    kernel = parser.add_argument_group("the kernel (default: this machine's newest)")
    kernel.add_argument("--kernel", metavar="FILE", help="an image; with --modules")
    kernel.add_argument("--modules", metavar="DIR", help="its /lib/modules/RELEASE")
    kernel.add_argument(
        "--debian", metavar="DIR", help="download Debian's kernel for virtual machines into DIR"
    )
    kernel.add_argument(
        "--module",
        action="append",
        default=[],
        metavar="NAME",
        help="load this module too; once for each",
    )
    state = parser.add_argument_group("the state disk")
    state.add_argument(
        "--state-disk",
        metavar="PATH",
        help="a file or a block device of domain 0 (default: DIRECTORY/state.img)",
    )
    state.add_argument(
        "--make-state", action="store_true", help="make it; an existing one is left alone"
    )
    state.add_argument("--state-uuid", metavar="UUID", help="of its file system, if it is there")
    state.add_argument(
        "--state-size-mib",
        type=int,
        default=SIZE_DEFAULT_MIB,
        metavar="N",
        help=f"with --make-state (default: {SIZE_DEFAULT_MIB})",
    )
    domain = parser.add_argument_group("the domain")
    domain.add_argument("--name", default="vtpm", help="(default: vtpm)")
    domain.add_argument("--type", choices=["pv", "pvh"], default="pv", help="(default: pv)")
    domain.add_argument("--tpm", choices=["2.0", "1.2"], default="2.0", help="(default: 2.0)")
    domain.add_argument(
        "--memory",
        type=int,
        default=MEMORY_DEFAULT_MIB,
        metavar="MIB",
        help=f"(default: {MEMORY_DEFAULT_MIB})",
    )
    domain.add_argument(
        "--trust-reset",
        type=int,
        action="append",
        default=[],
        metavar="DOMID",
        help="a frontend in this domain may power-cycle the TPM (default: 0)",
    )
    parser.add_argument("--output", metavar="FILE", help="where the xl.cfg goes")
    parser.add_argument(
        "--json", action="store_true", help="print a JSON summary; the xl.cfg needs --output then"
    )


@dataclass(frozen=True, slots=True)
class _Paths:
    """Where the files go."""

    kernel: Path
    ramdisk: Path
    state: Path
    config: Path | None


def main(args: argparse.Namespace) -> int:
    """Build; return the exit status."""
    _check(args)
    began = time.monotonic()
    paths = _paths(args)
    if args.make_state:
        check_state_disk(paths.state, args.state_size_mib)
    with said(paths.kernel.parent, "nothing was built"):
        paths.kernel.parent.mkdir(parents=True, exist_ok=True)
    kernel = _kernel(args)
    log.info("kernel %s", kernel.release)
    image, packed = _built(kernel, tuple(args.module), paths.kernel.parent)
    words = _words(args, paths)
    with said(kernel.image, "nothing was replaced"):
        kernel_raw = kernel.image.read_bytes()
    summary = _summary(kernel, words, image, (len(kernel_raw), len(packed)), began)
    _store(args, paths, words, {paths.kernel: kernel_raw, paths.ramdisk: packed}, summary)
    log.info(
        "%s: %.1f MB, %.1f unpacked",
        paths.ramdisk,
        len(packed) / 1e6,
        image.archive.size_bytes / 1e6,
    )
    return 0


def _paths(args: argparse.Namespace) -> _Paths:
    directory = Path(args.directory)
    paths = _Paths(
        directory / "vmlinuz",
        directory / "initramfs.gz",
        Path(args.state_disk or directory / "state.img").absolute(),
        Path(args.output) if args.output else None,
    )
    given = [path for path in (paths.kernel, paths.ramdisk, paths.state, paths.config) if path]
    real = [str(path.parent.resolve() / path.name) for path in given]
    for name in real:
        if real.count(name) > 1:
            raise ConfigError(
                f"two files would be {name}", next_step="give each of them a name of its own"
            )
    return paths


def _built(kernel: Kernel, modules: tuple[str, ...], directory: Path) -> tuple[Image, bytes]:
    """Return the initramfs, and its bytes."""
    from .build import build

    try:
        image = build(kernel, modules)
    except (OSError, subprocess.SubprocessError) as error:
        temporary = os.environ.get("TMPDIR", "/tmp")
        raise ConfigError(
            f"the initramfs cannot be built: {error}",
            state=f"{directory} is as it was",
            next_step=f"see what is said above, and that there is room: df {temporary}",
        ) from error
    return image, image.archive.gzipped()


def _words(args: argparse.Namespace, paths: _Paths) -> DomainWords:
    return DomainWords(
        name=args.name,
        type=args.type,
        kernel=paths.kernel.absolute(),
        ramdisk=paths.ramdisk.absolute(),
        memory_mib=args.memory,
        tpm=args.tpm,
        state_disk=str(paths.state),
        state_uuid=str(uuid.uuid4()) if args.make_state else args.state_uuid,
        trust_reset=tuple(args.trust_reset),
    )


def _store(
    args: argparse.Namespace,
    paths: _Paths,
    words: DomainWords,
    image: dict[Path, bytes],
    summary: dict[str, Any],
) -> None:
    """Write all files aside, then give them their names; the state disk's is the last."""
    config = xl_config(words)
    contents = image | ({paths.config: config.encode()} if paths.config else {})
    with ExitStack() as stack:
        asides = []
        for path, content in contents.items():
            asides.append(stack.enter_context(Aside(path)))
            asides[-1].write(content)
        disk = None
        if args.make_state:
            assert words.state_uuid is not None
            made = written_aside(paths.state, args.state_size_mib, words.state_uuid)
            disk = stack.enter_context(made)
        for aside in asides:
            aside.replace()
        # An xl.cfg that nobody could read would take the disk's UUID with it.
        if not paths.config:
            _tell(config, "the image is there, and no state disk was made")
        if disk:
            disk.put_new()
    if args.json:
        _tell(json.dumps(summary) + "\n", "everything else is done")


def _check(args: argparse.Namespace) -> None:
    if (args.kernel is None) != (args.modules is None):
        raise ConfigError("--kernel and --modules go together")
    if args.kernel and args.debian:
        raise ConfigError("--debian downloads a kernel, and --kernel names another")
    if args.json and not args.output:
        raise ConfigError("--json and the xl.cfg both go to standard output; give --output")
    if not _NAME.fullmatch(args.name):
        raise ConfigError(
            f"{args.name!r} is no name for a domain",
            next_step="use letters, digits, and any of . _ -",
        )
    for word in (args.directory, args.state_disk):
        if word and not _TARGET.fullmatch(str(Path(word).absolute())):
            raise ConfigError(
                f"{word!r} cannot stand in an xl.cfg",
                next_step="use a path of letters, digits, and any of / _ . : + @ -",
            )


def _kernel(args: argparse.Namespace) -> Kernel:
    if args.kernel:
        return named_kernel(Path(args.kernel), Path(args.modules))
    return debian_kernel(Path(args.debian)) if args.debian else installed_kernel()


def _summary(
    kernel: Kernel, words: DomainWords, image: Image, sizes: tuple[int, int], began: float
) -> dict[str, Any]:
    return {
        "kernel": {
            "path": str(words.kernel),
            "release": kernel.release,
            "size-bytes": sizes[0],
        },
        "initramfs": {
            "path": str(words.ramdisk),
            "size-bytes": sizes[1],
            "unpacked-bytes": image.archive.size_bytes,
            "parts-bytes": image.sizes_bytes,
        },
        "state-disk": {"path": words.state_disk, "uuid": words.state_uuid},
        "seconds": round(time.monotonic() - began, 1),
    }


def _tell(text: str, state: str) -> None:
    """Write to standard output now, so that what comes after is done only if it was written."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        # The flush at the end would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise ConfigError(
            f"standard output: {error.strerror}",
            state=state,
            next_step="send it where there is room for it",
        ) from error
