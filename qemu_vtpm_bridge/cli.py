"""The command line of `qemu-vtpm-bridge`.

Theory of operation.  `run` binds its socket before it imports what it needs to
serve it: QEMU connects once and does not retry, so the socket has to be there
early, and a connection that waits in the backlog costs nothing.  Each command
imports its own parts, for the same reason.

Exit status: 0 done; 1 it failed while running; 2 the command line, the
configuration or an entry in XenStore is wrong; 3 the doctor found a problem; 130
interrupted.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli_options import OPERATOR_COMMANDS, build_parser, operator_module
from .config import words_from_file
from .errors import BridgeError, ConfigError, first_of

if TYPE_CHECKING:
    from .bridge.listen import Listener

__all__ = ["OPERATOR_COMMANDS", "build_parser", "main", "main_xapi"]

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class JsonFormatter(logging.Formatter):
    """One JSON object per line, for journald and its like."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON: time, level, logger, message."""
        import json

        document = {
            "time": record.created,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return json.dumps(document)


def set_up_logging(form: str, level: str) -> None:
    """Send the package's log to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        JsonFormatter()
        if form == "json"
        else logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    )
    logging.basicConfig(level=level.upper(), handlers=[handler])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv`; return the exit status."""
    try:
        status = _main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_reads():
            raise  # it is another pipe, and a defect
        # Whoever reads has seen enough, as `head` has; the flush at the end would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _nobody_reads() -> bool:
    """Whether the other end of standard output has been closed."""
    import select

    output = select.poll()
    output.register(sys.stdout, 0)
    return bool(output.poll(0))


def _main(words: list[str]) -> int:
    if words[:1] == ["demo"]:
        from .demo.show import main as demo_main

        return demo_main(words[1:])
    try:
        args = _parse(words)
        # The parser is a heap of cycles; what is imported next may as well use its memory.
        gc.collect()
        set_up_logging(args.log_format, args.log_level)
        if args.command in OPERATOR_COMMANDS:
            return int(operator_module(OPERATOR_COMMANDS[args.command][1]).main(args))
        return _COMMANDS[args.command](args)
    except ConfigError as error:
        print(f"qemu-vtpm-bridge: {error}", file=sys.stderr)
        return EXIT_USAGE
    except BridgeError as error:
        print(f"qemu-vtpm-bridge: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def main_xapi() -> int:
    """Run `qemu-vtpm-bridge-xapi`, whose process may become that of `run`."""
    from .toolstack.xapi import main as xapi_main

    return xapi_main(sys.argv, main)


def _parse(words: list[str]) -> argparse.Namespace:
    # Options may stand before the command's name only if they end the program.
    parser = build_parser(words[0] if words else "")
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(words)[0].config
    if path is not None and words:
        words = [words[0], *words_from_file(Path(path), words[0]), *words[1:]]
    return parser.parse_args(words)


def _run_trio(function: Callable[..., Any], *args: Any) -> Any:
    """Run an async function; an error that left through nurseries comes out bare."""
    import trio

    try:
        return trio.run(function, *args)
    except BaseExceptionGroup as group:
        raise first_of(group) from None


def _run(args: argparse.Namespace) -> int:
    if args.device or args.guest:
        return _run_registers(args)
    if args.socket is None:
        raise ConfigError(
            "nobody is to be served",
            next_step="give --socket for a QEMU that has TPM devices, or --device and --guest "
            "to be the guest's TPM",
        )
    from .bridge.listen import open_listener

    return _serve(args, open_listener(args.socket), "run_bridge")


def _run_registers(args: argparse.Namespace) -> int:
    if not (args.device and args.guest):
        raise ConfigError("--device and --guest go together", next_step="give both")
    for option in ("socket", "embedded", "record"):
        if getattr(args, option) is not None:
            raise ConfigError(
                f"--{option} does not go with --device",
                state="the guest's registers are reached through Xen's ioreq protocol",
                next_step="leave one of them out",
            )
    return _serve(args, None, "run_guest")


def _device(args: argparse.Namespace) -> int:
    from .bridge.listen import open_listener

    if args.socket.startswith("tcp="):
        raise ConfigError("vfio-user passes descriptors, TCP cannot", next_step="give a path")
    if args.record is not None and args.registers == "both":
        raise ConfigError(
            "a record is about one device", next_step="give --registers tis or crb with --record"
        )
    return _serve(args, open_listener(args.socket), "run_device")


def _serve(args: argparse.Namespace, listener: Listener | None, name: str) -> int:
    """Serve a guest at the listener, if any; what needs privileges is opened before trio runs."""
    try:
        from . import commands
        from .opened import open_for_bridge

        opened = open_for_bridge(args, listener)
        try:
            return int(_run_trio(getattr(commands, name), args, listener, opened))
        finally:
            opened.close()
    finally:
        if listener is not None:
            listener.close()


def _vtpm(args: argparse.Namespace) -> int:
    from .commands import run_vtpm_domain
    from .opened import open_for_vtpm

    opened = open_for_vtpm(args)
    try:
        return int(_run_trio(run_vtpm_domain, args, opened))
    finally:
        opened.close()


def _decode(args: argparse.Namespace) -> int:
    from .bridge.tpm import Family
    from .decode import show

    show(args.words, family=Family(args.tpm), size=args.size, as_json=args.json)
    return 0


def _lazily(name: str) -> Callable[[argparse.Namespace], int]:
    def command(args: argparse.Namespace) -> int:
        from . import commands

        return int(_run_trio(getattr(commands, name), args))

    return command


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _run,
    "device": _device,
    "vtpm": _vtpm,
    "attach": _lazily("attach_device"),
    "detach": _lazily("detach_device"),
    "list": _lazily("list_devices"),
    "status": _lazily("show_status"),
    "decode": _decode,
    "embedded-xen": _lazily("embedded_xen"),
}
