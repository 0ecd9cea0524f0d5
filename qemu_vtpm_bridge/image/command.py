"""`qemu-vtpm-bridge vtpm-image`: builds the vTPM domain and prints its xl.cfg."""

from __future__ import annotations

import argparse
import json
import logging
import re
import time
from pathlib import Path
from typing import Any, Final

from ..errors import ConfigError
from .kernel import Kernel, debian_kernel, installed_kernel, named_kernel
from .state_disk import SIZE_DEFAULT_MIB, make_state_disk
from .xl_config import DomainWords, xl_config

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


def main(args: argparse.Namespace) -> int:
    """Build; return the exit status."""
    _check(args)
    from .build import build

    began = time.monotonic()
    directory = Path(args.directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{directory}: {error.strerror}", next_step="name another") from error
    kernel = _kernel(args)
    log.info("kernel %s", kernel.release)
    image = build(kernel, tuple(args.module))
    kernel_path, ramdisk_path = directory / "vmlinuz", directory / "initramfs.gz"
    packed = image.archive.gzipped()
    _replace(kernel_path, kernel.image.read_bytes())
    _replace(ramdisk_path, packed)
    log.info(
        "%s: %.1f MB, %.1f unpacked",
        ramdisk_path,
        len(packed) / 1e6,
        image.archive.size_bytes / 1e6,
    )
    state = Path(args.state_disk or directory / "state.img").absolute()
    uuid = make_state_disk(state, args.state_size_mib) if args.make_state else args.state_uuid
    words = DomainWords(
        name=args.name,
        type=args.type,
        kernel=kernel_path.absolute(),
        ramdisk=ramdisk_path.absolute(),
        memory_mib=args.memory,
        tpm=args.tpm,
        state_disk=str(state),
        state_uuid=uuid,
        trust_reset=tuple(args.trust_reset),
    )
    _tell(args, xl_config(words), _summary(kernel, words, image, len(packed), began))
    return 0


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


def _replace(path: Path, content: bytes) -> None:
    """Write a file in one step: a domain may be starting from it."""
    aside = path.with_name(path.name + ".part")
    try:
        aside.write_bytes(content)
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise ConfigError(
            f"{path}: {error.strerror}", next_step="see that there is room"
        ) from error


def _summary(
    kernel: Kernel, words: DomainWords, image: Any, packed_bytes: int, began: float
) -> dict[str, Any]:
    return {
        "kernel": {
            "path": str(words.kernel),
            "release": kernel.release,
            "size-bytes": words.kernel.stat().st_size,
        },
        "initramfs": {
            "path": str(words.ramdisk),
            "size-bytes": packed_bytes,
            "unpacked-bytes": image.archive.size_bytes,
            "parts-bytes": image.sizes_bytes,
        },
        "state-disk": {"path": words.state_disk, "uuid": words.state_uuid},
        "seconds": round(time.monotonic() - began, 1),
    }


def _tell(args: argparse.Namespace, config: str, summary: dict[str, Any]) -> None:
    if args.output:
        _replace(Path(args.output), config.encode())
    else:
        print(config, end="")
    if args.json:
        print(json.dumps(summary))
