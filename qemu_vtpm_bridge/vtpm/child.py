"""swtpm as a child process: its two channels, its log, its death.

Purpose: start one swtpm on two socket pairs, speak its control protocol and a
few TPM commands of our own, and never leave an orphan or wait for ever.

Theory of operation.  The child inherits one end of a control pair
(`--ctrl type=unixio,clientfd=`) and one of a data pair (`--fd`); nothing is bound to
a path.  swtpm exits when the data pair closes, so a vTPM process that is killed
takes its swtpm along; a swtpm that hangs at that moment is killed by the kernel
(PR_SET_PDEATHSIG, set by setpriv(1)).  That signal follows the *thread* that
started the child, so the child is started in trio's thread and not in a worker.
The channels stay in blocking mode, for the pump reads them too: what is done
here waits for readiness first and passes MSG_DONTWAIT.

Keeps P1 towards the domain: every exchange has a deadline.  Who may lie: swtpm
parses what guests send, so its answers are bounded and compared with their own
header, and its log lines are cut, made printable, kept few and without dumps (P10).

Source: swtpm(8), swtpm's src/swtpm/tpm_ioctl.h and ctrlchannel.c (big-endian
words: command, body; result first in every answer).
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import trio

from ..errors import BridgeError
from ..ratelimit import RateLimit
from .ordinals import HEADER, TpmFamily

logger = logging.getLogger(__name__)

BUFFER_SIZE_BYTES: Final = 4088
"""What one tpmif page holds; the TPM then reports it as its own limit."""

CMD_INIT: Final = 2
CMD_SHUTDOWN: Final = 3
CMD_SET_LOCALITY: Final = 5
CMD_STORE_VOLATILE: Final = 0x0A
CMD_STOP: Final = 0x0E
CMD_SET_BUFFERSIZE: Final = 0x11

_RESULT: Final = struct.Struct(">I")
_BUFFERSIZE_REPLY: Final = struct.Struct(">IIII")
_LOG_LINE_MAX_BYTES: Final = 512
_LOG_LINES_KEPT: Final = 5
_LOG_PIPE_BYTES: Final = 1 << 16
"""All that a pipe holds, so that one read empties it."""
_LOG_DUMP: Final = re.compile(rb"[0-9A-Fa-f\s]*")
"""A line of bytes.  libtpms logs so, whatever the level, the command that made a TPM 2.0 fail."""
_EXIT_DEADLINE_S: Final = 5.0


class EngineError(BridgeError):
    """swtpm died, hung, refused or answered nonsense."""


class EngineRefusal(EngineError):
    """swtpm said no; its channels are in step."""


class SwtpmChild:
    """One swtpm process.  Use `spawn`, then `async with`; leaving kills and reaps it.

    Not for use by several tasks at once, nor while the pump has the channels,
    except for `wait`, `relay_log` and `kill`.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        control: socket.socket,
        data: socket.socket,
        log_fd: int,
        lines: RateLimit,
    ) -> None:
        self._process = process
        self._pidfd = os.pidfd_open(process.pid)
        self.control = control
        self.data = data
        self._log_fd = log_fd
        self._lines = lines
        self._begun_line = b""
        self._last_lines: deque[str] = deque(maxlen=_LOG_LINES_KEPT)

    @classmethod
    def spawn(cls, program: str, state_dir: Path, family: TpmFamily, lines: RateLimit) -> Self:
        """Start swtpm on `state_dir`; its TPM has no power until CMD_INIT.

        `lines` passes its log on.  Call it in trio's own thread.  Raises EngineError where
        the program cannot be started.
        """
        control, child_control = socket.socketpair()
        data, child_data = socket.socketpair()
        log_fd, child_log = os.pipe()
        os.set_blocking(log_fd, False)
        arguments = [
            *_die_with_us(),
            program,
            "socket",
            *(["--tpm2"] if family is TpmFamily.TPM_2_0 else []),
            "--tpmstate",
            f"dir={state_dir},mode=0600",
            "--ctrl",
            f"type=unixio,clientfd={child_control.fileno()}",
            "--fd",
            str(child_data.fileno()),
        ]
        try:
            process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=child_log,
                stderr=child_log,
                pass_fds=[child_control.fileno(), child_data.fileno()],
                start_new_session=True,  # a terminal's Ctrl-C is for us; we stop swtpm in order
            )
            return cls(process, control, data, log_fd, lines)
        except OSError as error:
            control.close()
            data.close()
            os.close(log_fd)
            raise EngineError(
                f"{program} cannot be started: {error.strerror}",
                next_step="install swtpm, or name the program with --swtpm",
            ) from error
        finally:
            child_control.close()
            child_data.close()
            os.close(child_log)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()
        with trio.CancelScope(shield=True):
            await self.wait()
        self._process.wait()  # already dead: this only collects the status
        self.control.close()
        self.data.close()
        trio.lowlevel.notify_closing(self._log_fd)
        os.close(self._log_fd)
        self._log_fd = -1
        os.close(self._pidfd)

    @property
    def pid(self) -> int:
        """The process id, for the status document and for tests."""
        return self._process.pid

    def kill(self) -> None:
        """Kill the process if it lives; returns at once."""
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL) if self._lives() else None

    def _lives(self) -> bool:
        return self._process.poll() is None

    async def wait(self) -> None:
        """Return once the process is dead.  Cancelling leaves it as it is."""
        while self._lives():
            await trio.lowlevel.wait_readable(self._pidfd)

    def complaint(self) -> str:
        """Return swtpm's last log lines, for an error's text."""
        self._take_log()
        return " / ".join(self._last_lines) or "swtpm said nothing"

    async def relay_log(self) -> None:
        """Relay swtpm's log to ours until it closes its end, or this child is left.

        Where nobody does, swtpm stops in the middle of a command once the pipe is full.
        Cancelling is harmless.
        """
        with suppress(trio.ClosedResourceError):
            while self._log_fd >= 0:
                await trio.lowlevel.wait_readable(self._log_fd)
                if self._take_log() == 0:
                    return

    def _take_log(self) -> int | None:
        """Take in what is in the log pipe; return how much that was, None for nothing yet."""
        try:
            raw = os.read(self._log_fd, _LOG_PIPE_BYTES)
        except OSError:
            return None  # none has come, or this child was left
        # At the end a last line without its newline is one all the same.
        *raw_lines, rest = (self._begun_line + (raw or b"\n")).split(b"\n")
        self._begun_line = rest[:_LOG_LINE_MAX_BYTES]
        for raw_line in raw_lines:
            if not _LOG_DUMP.fullmatch(raw_line):
                self._take_line(raw_line)
        return len(raw)

    def _take_line(self, raw_line: bytes) -> None:
        line = raw_line[:_LOG_LINE_MAX_BYTES].decode("ascii", "replace")
        line = "".join(c if c.isprintable() else "?" for c in line)
        self._last_lines.append(line)
        self._lines.warning("swtpm: %s", line)

    async def control_command(self, command: int, body: bytes, deadline_s: float) -> None:
        """Send a control command whose answer is only a result word.

        Raises EngineRefusal for a result other than 0, EngineError for silence and for
        death.  Cancelling or an EngineError leaves the channel out of step: end the
        child then.
        """
        reply = await self._exchange(
            self.control, _RESULT.pack(command) + body, deadline_s, _RESULT.size
        )
        (result,) = _RESULT.unpack(reply)
        if result:
            raise EngineRefusal(
                f"swtpm answered control command {command:#x} with {result:#x}",
                state=self.complaint(),
                next_step="check that the state directory is writable and holds this TPM's family",
            )

    async def set_buffer_size(self, deadline_s: float) -> None:
        """Limit commands and responses to what the page holds; the TPM must have no power."""
        reply = await self._exchange(
            self.control,
            struct.pack(">II", CMD_SET_BUFFERSIZE, BUFFER_SIZE_BYTES),
            deadline_s,
            _BUFFERSIZE_REPLY.size,
        )
        result, in_use, _, _ = _BUFFERSIZE_REPLY.unpack(reply)
        if result or in_use > BUFFER_SIZE_BYTES:
            raise EngineError(f"swtpm keeps a buffer of {in_use} bytes (result {result:#x})")

    async def tpm_command(self, command: bytes, deadline_s: float) -> int:
        """Run one TPM command at the present locality, return its response code."""
        header = await self._exchange(self.data, command, deadline_s, HEADER.size)
        _, size_bytes, code = HEADER.unpack(header)
        if not HEADER.size <= size_bytes <= BUFFER_SIZE_BYTES:
            raise EngineError(f"swtpm announced a response of {size_bytes} bytes")
        await self._exchange(self.data, b"", deadline_s, size_bytes - HEADER.size)
        return int(code)

    async def _exchange(
        self, channel: socket.socket, request: bytes, deadline_s: float, reply_bytes: int
    ) -> bytes:
        try:
            with trio.fail_after(deadline_s):
                if request:
                    # A socket pair that is in step is empty, so a short request fits at once.
                    channel.send(request, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                reply = b""
                while len(reply) < reply_bytes:
                    await trio.lowlevel.wait_readable(channel)
                    chunk = channel.recv(reply_bytes - len(reply), socket.MSG_DONTWAIT)
                    if not chunk:
                        raise EngineError("swtpm closed its channel", state=self.complaint())
                    reply += chunk
                return reply
        except trio.TooSlowError:
            raise EngineError(
                f"swtpm did not answer within {deadline_s:g} s", state=self.complaint()
            ) from None
        except OSError as error:
            raise EngineError(
                f"swtpm's channel broke: {error.strerror}", state=self.complaint()
            ) from error

    async def end(self, deadline_s: float) -> None:
        """Let swtpm exit by itself (CMD_SHUTDOWN); kill it where it does not."""
        try:
            await self.control_command(CMD_SHUTDOWN, b"", deadline_s)
        except EngineError as error:
            logger.warning("swtpm did not shut down in order: %s", error)
            return
        with trio.move_on_after(_EXIT_DEADLINE_S):
            await self.wait()


def _die_with_us() -> Sequence[str]:
    """Return the words that make a child die with the thread that started it."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []
