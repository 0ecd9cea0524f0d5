"""Recording what a guest does, for `qemu-vtpm-bridge decode` and for playing it again.

Theory of operation.  A record is a text file of JSON objects, one a line: a `seq` line
about the device, a line for each step, an `end` line.

  {"op":"seq","n":0,"dev":"tis","tpm":2,"buf":4096,"est":0}
        dev "tis", "crb" or "chardev", tpm 1 (1.2) or 2 (2.0), buf the TPM's buffer
        size in bytes, est whether a D-RTM sequence has happened
  {"op":"r","o":24,"s":4,"v":67175040}   read of s bytes at offset o gave v
  {"op":"w","o":24,"s":1,"v":64}         write
  {"op":"cmd"}                           QEMU sent a command (chardev)
  {"op":"ctl","name":"CMD_INIT"}         QEMU sent a control request (chardev)
  {"op":"done","rsp":"8001..."}          the running command ended
  {"op":"reset"}                         the machine was reset
  {"op":"end","n":0,"tags":[]}

A step may carry `irq`, the levels that the interrupt line went through, and `ev`, what
reached the TPM: ["submit", locality, command], ["cancel"], ["reset_est", locality].

Commands and responses hold secrets, and the promise is that no payload is kept (P10).
So a command and a response are cut to their ten-byte headers, with their length beside
them (a fourth element of "submit", `len` in "done"), and the `v` of an access to FIFO or
buffer is null.  Only a recorder that is told so keeps payloads; only such a record can
be played again.  A record stops growing at `limit_bytes`, since a guest drives it; its
last line then has the tag "cut".

A write to the file blocks: a record is for finding an error, not for daily service.
One that fails, on a full disk, ends the record and nothing else.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Final, TextIO

from ..errors import ConfigError
from .tpm import HEADER_SIZE, Family

log = logging.getLogger(__name__)

LIMIT_BYTES: Final = 256 << 20

Step = dict[str, Any]


def create_record(path: str) -> TextIO:
    """Create the file of a record, readable by its owner only; raises ConfigError."""
    try:
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        os.fchmod(number, 0o600)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}", next_step="choose another --record"
        ) from error
    return os.fdopen(number, "w", encoding="utf-8")


def close_record(out: TextIO) -> None:
    """Close a record's file; what a full disk does not take is lost, and was told of."""
    with suppress(OSError):
        out.close()


class Recorder:
    """Writes one sequence to an open text file; closing the file is the caller's."""

    def __init__(
        self,
        out: TextIO,
        *,
        device: str,
        family: Family,
        buffer_bytes: int,
        established: bool = False,
        payloads: bool = False,
        limit_bytes: int = LIMIT_BYTES,
    ) -> None:
        """Write the `seq` line."""
        self._out = out
        self._payloads = payloads
        self._left_bytes = limit_bytes
        self._ended = False
        self._write(
            {
                "op": "seq",
                "n": 0,
                "dev": device,
                "tpm": 2 if family is Family.TPM_2_0 else 1,
                "buf": buffer_bytes,
                "est": int(established),
            }
        )

    def access(
        self,
        op: str,
        offset: int,
        size: int,
        value: int,
        *,
        data: bool = False,
        irq: Iterable[bool] = (),
        ev: Iterable[list[Any]] = (),
    ) -> None:
        """A read ("r") or write ("w"); `data`: its value is part of a command or response."""
        kept = None if data and not self._payloads else value
        self._write({"op": op, "o": offset, "s": size, "v": kept}, irq, ev)

    def command(self, locality: int, command: bytes) -> None:
        """QEMU sent a command over the data channel."""
        self._write({"op": "cmd"}, ev=[self.submit_event(locality, command)])

    def control(self, name: str, *, ev: Iterable[list[Any]] = ()) -> None:
        """QEMU sent a control request."""
        self._write({"op": "ctl", "name": name}, ev=ev)

    def done(
        self, response: bytes, *, irq: Iterable[bool] = (), ev: Iterable[list[Any]] = ()
    ) -> None:
        """The running command ended."""
        step: Step = {"op": "done", "rsp": self._cut(response)}
        if not self._payloads:
            step["len"] = len(response)
        self._write(step, irq, ev)
        self._put("", flush=True)

    def reset(self, *, irq: Iterable[bool] = (), ev: Iterable[list[Any]] = ()) -> None:
        """The machine was reset."""
        self._write({"op": "reset"}, irq, ev)

    def end(self, *tags: str) -> None:
        """Write the `end` line; what comes after is not recorded."""
        if not self._ended:
            self._put(json.dumps({"op": "end", "n": 0, "tags": sorted(tags)}) + "\n", flush=True)
            self._ended = True

    def submit_event(self, locality: int, command: bytes) -> list[Any]:
        """Return the event of a command that went to the TPM."""
        event: list[Any] = ["submit", locality, self._cut(command)]
        return event if self._payloads else [*event, len(command)]

    def _cut(self, payload: bytes) -> str:
        return (payload if self._payloads else payload[:HEADER_SIZE]).hex()

    def _write(self, step: Step, irq: Iterable[bool] = (), ev: Iterable[list[Any]] = ()) -> None:
        if self._ended:
            return
        if levels := [int(level) for level in irq]:
            step["irq"] = levels
        if events := list(ev):
            step["ev"] = events
        line = json.dumps(step, separators=(",", ":")) + "\n"
        self._left_bytes -= len(line)
        if self._left_bytes < 0:
            self.end("cut")
        else:
            self._put(line)

    def _put(self, line: str, *, flush: bool = False) -> None:
        if self._ended:
            return
        try:
            self._out.write(line)
            if flush:
                self._out.flush()
        except OSError as error:
            # The guest must not lose its TPM for it.
            self._ended = True
            log.warning("the record ends here: %s; nothing else changes", error.strerror)
