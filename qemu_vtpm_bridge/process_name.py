"""The name by which other programs and people find a process again.

Theory of operation.  An interpreter cannot be started under another name, as it finds its
modules by it; of a script the kernel forgets the name it was called by; and a process that
was forked has its parent's.  So the words in memory are overwritten, as setproctitle does.

Source: proc(5), /proc/PID/stat, arg_start, arg_end.
"""

from __future__ import annotations

import ctypes
from pathlib import Path


def take_name(*names: str) -> None:
    """Have these words be this process' command line, if they are no longer than the old one."""
    raw = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace")
    fields = raw.rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    words = b"".join(name.encode() + b"\0" for name in names)
    size = end - start
    if 0 < len(words) <= size:
        ctypes.memmove(start, words[:size].ljust(size, b"\0"), size)
