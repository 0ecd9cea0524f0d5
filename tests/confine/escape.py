"""Tries what a confined process must not be able to do; run inside one, prints JSON.

    python escape.py bridge|device|broker|vtpm|nothing DIRECTORY

Every way is tried by the raw system call, as somebody would who runs code of his own in the
process, and by a thread that was started after the confinement, where there may be threads.
An answer is the name of the errno, or "done".
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import platform
import resource
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from qemu_vtpm_bridge.confine import Mode, confine, find_user
from qemu_vtpm_bridge.confine_policy import bridge_policy, broker_policy, vtpm_policy

LIBC = ctypes.CDLL(None, use_errno=True)
PARENT = os.getppid()
X86 = platform.machine() == "x86_64"
# Their numbers: on x86-64, and on the processors with the generic table.
NUMBERS = {
    "ptrace": (101, 117),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "kexec_load": (246, 104),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425),
    "userfaultfd": (323, 282),
    "keyctl": (250, 219),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "sethostname": (170, 161),
    "settimeofday": (164, 170),
    "open_by_handle_at": (304, 265),
    "process_vm_readv": (310, 270),
    "pidfd_getfd": (438, 438),
    "mknodat": (259, 33),
    "memfd_create": (319, 279),
    "personality": (135, 92),
    "clone3": (435, 435),
    "capset": (126, 91),
    "setuid": (105, 146),
    "setresuid": (117, 147),
    "setgroups": (116, 159),
    "mprotect": (10, 226),
    "execveat": (322, 281),
}
CLONE_NEWUSER = 0x10000000


def call(name: str, *arguments: object) -> Callable[[], None]:
    number = NUMBERS[name][0 if X86 else 1]

    def attempt() -> None:
        words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
        if LIBC.syscall(ctypes.c_long(number), *words) < 0:
            raise OSError(ctypes.get_errno(), name)

    return attempt


def gain_capability() -> None:
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)(1 << 21, 1 << 21, 0, 0, 0, 0)  # CAP_SYS_ADMIN
    call("capset", header, sets)()


def clone_with_user_namespace() -> None:
    number, flags = 56 if X86 else 220, CLONE_NEWUSER | 17
    pid = LIBC.syscall(ctypes.c_long(number), ctypes.c_long(flags), 0, 0, 0, 0)
    if pid < 0:
        raise OSError(ctypes.get_errno(), "clone")
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def fork() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def execute(*words: str) -> Callable[[], None]:
    """Run a program in a child, which tells the errno where it cannot."""

    def attempt() -> None:
        arguments = (ctypes.c_char_p * (len(words) + 1))(*(os.fsencode(w) for w in words), None)
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            LIBC.execve(arguments[0], arguments, None)
            os.write(writer, ctypes.get_errno().to_bytes(2, "big"))
            os._exit(1)
        os.close(writer)
        told = os.read(reader, 2)
        os.close(reader)
        _, status = os.waitpid(pid, 0)
        if told:
            raise OSError(int.from_bytes(told, "big"), words[0])
        if status:
            raise OSError(errno.EACCES, f"{words[0]} ran and failed")

    return attempt


def execute_here() -> None:
    """Replace this very process: only where that must fail."""
    arguments = (ctypes.c_char_p * 2)(b"/bin/true", None)
    LIBC.execve(arguments[0], arguments, None)
    raise OSError(ctypes.get_errno(), "execve")


def open_file(path: str, flags: int) -> Callable[[], None]:
    return lambda: os.close(os.open(path, flags, 0o600))


def make_socket(family: int, kind: int) -> Callable[[], None]:
    return lambda: socket.socket(family, kind).close()


def connect_tcp() -> None:
    """By a socket that was made before: Landlock has to refuse what seccomp cannot see."""
    TCP.connect(("127.0.0.1", 9))


def connect_abstract() -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(ABSTRACT.getsockname())


def map_to_run(protection: int) -> Callable[[], None]:
    return lambda: mmap.mmap(-1, 4096, prot=protection).close()


def make_runnable() -> None:
    page = mmap.mmap(-1, 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    call("mprotect", address, 4096, mmap.PROT_READ | mmap.PROT_EXEC)()


def raise_limit() -> None:
    _soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (2, max(hard, 2)))


def signal_by_descriptor() -> None:
    """Have the kernel send a signal of one's choice when a pipe can be read."""
    reading, writing = os.pipe()
    try:
        fcntl.fcntl(reading, fcntl.F_SETOWN, PARENT)
        fcntl.fcntl(reading, 10, 0)  # F_SETSIG
    finally:
        os.close(reading)
        os.close(writing)


def terminal_input() -> None:
    fcntl.ioctl(TERMINAL, 0x5412, b"x")  # TIOCSTI: types for whoever owns the terminal


def start_thread() -> None:
    try:
        threading.Thread(target=lambda: None).start()
    except RuntimeError:  # Python's word for it
        raise OSError(errno.EPERM, "clone") from None


def ask_xen(number: int) -> Callable[[], None]:
    """Ask what is no device of Xen's: ENOTTY says that the call itself was let through."""

    def attempt() -> None:
        reading, writing = os.pipe()
        try:
            fcntl.ioctl(reading, number, bytes(64))
        finally:
            os.close(reading)
            os.close(writing)

    return attempt


WAYS: dict[str, Callable[[], None]] = {
    "setuid": call("setuid", 0),
    "setresuid": call("setresuid", 0, 0, 0),
    "setgroups": call("setgroups", 0, 0),
    "capset": gain_capability,
    "read /etc/shadow": open_file("/etc/shadow", os.O_RDONLY),
    "read /etc/hostname": open_file("/etc/hostname", os.O_RDONLY),
    "list /": open_file("/", os.O_RDONLY | os.O_DIRECTORY),
    "write own code": open_file(__file__, os.O_WRONLY),
    "fork": fork,
    "unshare": call("unshare", CLONE_NEWUSER),
    "clone": clone_with_user_namespace,
    "clone3": call("clone3", 0, 0),
    "setns": call("setns", -1, 0),
    "shell": execute("/bin/sh", "-c", "true"),
    "ptrace": call("ptrace", 16, PARENT, 0, 0),
    "process_vm_readv": call("process_vm_readv", PARENT, 0, 0, 0, 0, 0),
    "pidfd_getfd": call("pidfd_getfd", -1, 0, 0),
    "signal": lambda: os.kill(PARENT, 0),
    "signal by a descriptor": signal_by_descriptor,
    "inet": make_socket(socket.AF_INET, socket.SOCK_STREAM),
    "inet6": make_socket(socket.AF_INET6, socket.SOCK_DGRAM),
    "netlink": make_socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "packet": make_socket(socket.AF_PACKET, socket.SOCK_RAW),
    "vsock": make_socket(socket.AF_VSOCK, socket.SOCK_STREAM),
    "connect tcp": connect_tcp,
    "connect abstract": connect_abstract,
    "mount": call("mount", b"none", b"/nonexistent", b"tmpfs", 0, 0),
    "umount2": call("umount2", b"/nonexistent", 0),
    "pivot_root": call("pivot_root", b"/nonexistent", b"/nonexistent"),
    "chroot": call("chroot", b"/nonexistent"),
    "mknod": call("mknodat", -100, b"/nonexistent/node", 0o20600, 0x103),
    "kexec_load": call("kexec_load", 0, 0, 0, -1),
    "init_module": call("init_module", 0, 0, b""),
    "finit_module": call("finit_module", -1, b"", 0),
    "bpf": call("bpf", -1, 0, 0),
    "perf_event_open": call("perf_event_open", 0, 0, -1, -1, 0),
    "io_uring_setup": call("io_uring_setup", 1, 0),
    "userfaultfd": call("userfaultfd", -1),
    "keyctl": call("keyctl", -1, 0, 0, 0, 0),
    "reboot": call("reboot", 0, 0, 0, 0),
    "swapon": call("swapon", b"/nonexistent", 0),
    "sethostname": call("sethostname", b"x", -1),
    "settimeofday": call("settimeofday", 1, 0),
    "open_by_handle_at": call("open_by_handle_at", -1, 0, 0),
    "memfd_create": call("memfd_create", b"x", 0),
    "execveat": call("execveat", -1, b"", 0, 0, 0),
    "personality": call("personality", 0x0040000),
    "map writable and runnable": map_to_run(mmap.PROT_WRITE | mmap.PROT_EXEC),
    "make runnable": make_runnable,
    "raise a limit": raise_limit,
    "terminal input": terminal_input,
    "hypercall": ask_xen(0x00305000),
    "hypercall of a device model": ask_xen(0x00105005),
    "map foreign memory": ask_xen(0x00205004),
    "bind an interrupt of Xen's": ask_xen(0x00044500),
    "bind a domain's port": ask_xen(0x00084501),
}


def outcome(attempt: Callable[[], None]) -> str:
    try:
        attempt()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    except ValueError:
        return "EPERM"  # the resource module's word for it
    return "done"


def main(role: str, directory: Path) -> dict[str, str]:
    # The parent lets everybody write, so that it is Landlock which has to refuse.
    outside = str(directory.parent / "escaped")
    ways = WAYS | {"write elsewhere": open_file(outside, os.O_WRONLY | os.O_CREAT)}
    if role == "vtpm":
        ways["shell by the loader"] = execute(LOADER, "/bin/sh", "-c", "true")
        ways["swtpm"] = execute("/usr/bin/swtpm", "--version")
        ways["keep state"] = open_file(str(directory / "new"), os.O_WRONLY | os.O_CREAT)
        confine(
            vtpm_policy(state_dir=directory, swtpm="swtpm", sockets=[]),
            Mode.REQUIRE,
            find_user("nobody"),
        )
        # A vTPM domain's program may fork, for swtpm's sake.
        del ways["fork"]
    if role in ("bridge", "device"):
        ways["shell here"] = execute_here
        policy = bridge_policy(sockets=[], device_model=role == "device")
        confine(policy, Mode.REQUIRE, find_user("nobody"))
    if role == "broker":
        ways["shell here"] = execute_here
        ways["thread"] = start_thread
        ways["offer a port"] = ask_xen(0x00044502)
        ways["grant"] = ask_xen(0x00184700)
        ways["restrict privcmd"] = ask_xen(0x00025006)
        ways["restrict evtchn"] = ask_xen(0x00024506)
        confine(broker_policy(device_model=True), Mode.AUTO, None)
        return {name: outcome(way) for name, way in ways.items()}
    found: dict[str, str] = {}
    thread = threading.Thread(
        target=lambda: found.update({name: outcome(way) for name, way in ways.items()})
    )
    thread.start()
    thread.join()
    return found


if __name__ == "__main__":
    TCP = socket.socket()
    ABSTRACT = socket.socket(socket.AF_UNIX)
    ABSTRACT.bind("")
    ABSTRACT.listen()
    _, TERMINAL = os.openpty()
    LOADER = "/lib64/ld-linux-x86-64.so.2" if X86 else "/lib/ld-linux-aarch64.so.1"
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
