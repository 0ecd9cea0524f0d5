"""Confinement's own rules: who, when, and what a kernel without it means."""

from __future__ import annotations

import os
import pwd
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from qemu_vtpm_bridge import confine as confining
from qemu_vtpm_bridge.confine import Access, Call, Mode, check, confine, find_user
from qemu_vtpm_bridge.confine_policy import bridge_policy, broker_policy, vtpm_policy
from qemu_vtpm_bridge.errors import ConfigError, LocalProtocolError
from qemu_vtpm_bridge.vtpm.engine import make_state_dir
from tests.confine.places import open_directory

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
NOBODY = pwd.getpwnam("nobody")


# Docker's and other filters answer with ENOSYS, and so does a kernel that was built without.
FORBID = """
def forbid(*names):
    rules = [
        {"number": number, "argument": lib.CONFINE_ANY, "refusal": refusal}
        for numbers, refusal in (
            ([lib.confine_syscall(name) for name in names], errno.ENOSYS),
            ([*range(335), *range(424, 450)], 0),
        )
        for number in numbers
    ]
    assert lib.confine_no_new_privs() == 0
    assert lib.confine_seccomp(ffi.new("struct confine_rule[]", rules), len(rules)) == 0
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process that has nothing to lose."""
    prologue = """
    import errno, logging, os, resource, socket, threading
    from pathlib import Path
    from qemu_vtpm_bridge._shim import ffi, lib
    from qemu_vtpm_bridge.confine import *
    from qemu_vtpm_bridge.confine import _restrict_calls
    from qemu_vtpm_bridge.confine_policy import bridge_policy
    from qemu_vtpm_bridge.errors import BridgeError
    logging.basicConfig(level="INFO", format="%(message)s")
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(prologue) + FORBID + textwrap.dedent(script)],
        check=False,
        capture_output=True,
        text=True,
    )


@ROOT
def test_another_root_is_entered_before_the_user_is_another(tmp_path: Path) -> None:
    done = run(f"""
    confine(bridge_policy(sockets=[]), Mode.AUTO, find_user("54321:54322"), Path({str(tmp_path)!r}))
    print(os.getresuid(), os.getcwd(), os.path.exists("/proc"))
    """)
    assert done.stdout == "(54321, 54321, 54321) / False\n", done


@ROOT
def test_where_no_threads_can_be_counted_privileges_are_given_up_all_the_same(
    tmp_path: Path,
) -> None:
    script = f"""
    policy, user = bridge_policy(sockets=[]), find_user("54321:54322")
    os.chroot({str(tmp_path)!r})
    print(confine(policy, Mode.{{mode}}, user), os.getresuid())
    """
    done = run(script.format(mode="AUTO"))
    assert "uid=54321" in done.stdout, done
    assert done.stdout.endswith("(54321, 54321, 54321)\n"), done
    assert "/proc is not there" in done.stderr
    refused = run(script.format(mode="REQUIRE"))
    assert "/proc is not there" in refused.stderr
    assert refused.returncode != 0


def test_names_and_numbers_are_users() -> None:
    nobody = find_user("nobody")
    assert (nobody.uid, nobody.gid) == (NOBODY.pw_uid, NOBODY.pw_gid)
    assert nobody.groups == (NOBODY.pw_gid,)
    assert find_user(f"{NOBODY.pw_uid}") == nobody
    assert find_user("nobody:7").gid == 7
    assert find_user("nobody:root").gid == 0
    stranger = find_user("54321:54322")
    assert (stranger.uid, stranger.gid, stranger.groups) == (54321, 54322, (54322,))


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("no-such-user", "there is no user 'no-such-user'"),
        ("54321", "UID:GID"),
        ("99999999999999999999", "there is no user"),
        ("", "there is no user"),
        ("nobody:no-such-group", "there is no group 'no-such-group'"),
        ("root", "names root"),
        ("0", "names root"),
    ],
)
def test_who_is_no_user_is_said(word: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        find_user(word)


def test_what_cannot_go_together_is_refused_before_anything_is_opened() -> None:
    check(Mode.OFF, None)
    check(Mode.AUTO, None)
    with pytest.raises(ConfigError, match="--confine off switches off"):
        check(Mode.OFF, find_user("nobody"))
    if os.geteuid() == 0:
        with pytest.raises(ConfigError, match="root would stay root"):
            check(Mode.REQUIRE, None)


@ROOT
def test_only_root_becomes_another_user() -> None:
    done = run("""
    nobody, policy = find_user("nobody"), bridge_policy(sockets=[])
    os.setresuid(54321, 54321, 54321)
    check(Mode.AUTO, None)
    try:
        check(Mode.AUTO, nobody)
    except BridgeError as error:
        print(error)
    done = confine(policy, Mode.REQUIRE, None)
    print(done.uid, done.seccomp)
    """)
    assert done.stdout.splitlines() == [
        "this is user 54321, who cannot become nobody; next: start it as root, or without --run-as",
        "54321 True",
    ], done.stderr


def test_a_process_with_several_threads_is_not_confined() -> None:
    done = run("""
    go = threading.Event()
    threading.Thread(target=go.wait).start()
    try:
        confine(bridge_policy(sockets=[]), Mode.AUTO, None)
    except BridgeError as error:
        print(error)
    open("/etc/passwd").close()
    go.set()
    """)
    assert done.stdout == "2 threads cannot be confined together\n", done.stderr
    assert done.returncode == 0


def test_off_changes_nothing() -> None:
    assert confine(bridge_policy(sockets=[]), Mode.OFF, None) is None


def test_a_kernel_without_landlock_is_said_and_refused_where_it_is_required() -> None:
    done = run("""
    forbid(b"landlock_create_ruleset")
    user = find_user("nobody") if os.geteuid() == 0 else None
    for mode in (Mode.AUTO, Mode.REQUIRE):
        try:
            check(mode, user)
        except BridgeError as error:
            print(error)
    done = confine(bridge_policy(sockets=[]), Mode.AUTO, user)
    print(done.as_dict()["landlock-abi"], done.seccomp)
    """)
    assert done.returncode == 0, done.stderr
    assert "not confined by Landlock (Function not implemented)" in done.stderr
    refused, found = done.stdout.splitlines()
    assert refused.startswith("--confine require: this kernel has no Landlock")
    assert "next: use a kernel that has it" in refused
    assert found == "None True"


def test_a_kernel_without_seccomp_is_said_and_refused_where_it_is_required() -> None:
    done = run("""
    forbid(b"seccomp")
    print(_restrict_calls([], Mode.AUTO))
    try:
        _restrict_calls([], Mode.REQUIRE)
    except BridgeError as error:
        print(error)
    """)
    assert done.returncode == 0, done.stderr
    assert "not confined by seccomp" in done.stderr
    found, refused = done.stdout.splitlines()
    assert found == "False"
    assert refused.startswith("--confine require: this kernel has no seccomp")


def test_limits_go_down_only() -> None:
    done = run("""
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
    confine(bridge_policy(sockets=[]), Mode.AUTO, None)
    print(resource.getrlimit(resource.RLIMIT_NOFILE), resource.getrlimit(resource.RLIMIT_CORE))
    """)
    # With a limit of 1, and not with 0, the kernel starts no program that takes the core.
    cores = min(1, resource.getrlimit(resource.RLIMIT_CORE)[1] % (1 << 64))
    assert done.stdout == f"(100, 100) ({cores}, {cores})\n", done.stderr


def test_every_call_in_the_policies_is_known_to_the_shim(tmp_path: Path) -> None:
    policies = [
        bridge_policy(sockets=[]),
        broker_policy(),
        vtpm_policy(state_dir=tmp_path, swtpm="swtpm", sockets=[tmp_path / "status"]),
    ]
    for policy in policies:
        assert sum(len(confining._rule(call)) for call in policy.calls) > 80
    with pytest.raises(LocalProtocolError, match="no system call that the shim knows"):
        confining._rule(Call("raed"))


def test_policies_name_the_paths_that_are_used(tmp_path: Path) -> None:
    bridge = bridge_policy(sockets=[tmp_path / "socket"])
    assert bridge.paths[tmp_path] is Access.REMOVE_FILE
    assert not any(rights & Access.EXECUTE for rights in bridge.paths.values())
    vtpm = vtpm_policy(state_dir=tmp_path, swtpm="swtpm", sockets=[tmp_path / "status"])
    assert vtpm.paths[tmp_path] & Access.MAKE_REG
    programs = {path.name for path, rights in vtpm.paths.items() if rights & Access.EXECUTE}
    assert {"swtpm", "setpriv"} < programs
    assert len(programs) == 3  # and their loader
    assert resource.RLIMIT_FSIZE in vtpm.limits
    broker = broker_policy()
    assert not any(path.match("/dev/xen/[!x]*") for path in broker.paths)
    of_a_device = {str(path) for path in broker_policy(device_model=True).paths}
    assert of_a_device - {str(path) for path in broker.paths} == {
        "/dev/xen/privcmd",
        "/dev/xen/evtchn",
    }
    for policy in (bridge, broker, vtpm):
        for path, rights in policy.paths.items():
            if rights & (Access.WRITE_FILE | Access.MAKE_REG):
                assert path.is_relative_to("/dev") or path == tmp_path


def test_a_wrapper_in_place_of_swtpm_is_refused(tmp_path: Path) -> None:
    wrapper = tmp_path / "swtpm"
    wrapper.write_text('#!/bin/sh\nexec swtpm "$@"\n', encoding="ascii")
    wrapper.chmod(0o755)
    with pytest.raises(ConfigError, match="is a script"):
        vtpm_policy(state_dir=tmp_path, swtpm=str(wrapper), sockets=[])
    # One that is missing is for the start of swtpm to complain about.
    vtpm_policy(state_dir=tmp_path, swtpm="/nonexistent/swtpm", sockets=[])


def test_a_path_that_is_missing_is_passed_over() -> None:
    done = run("""
    paths = {Path("/nonexistent"): READ, Path("/dev/null"): KEEP_FILES}
    calls = bridge_policy(sockets=[]).calls
    confine(Policy(calls, paths), Mode.AUTO, None)
    open("/dev/null", "w").close()
    print("done")
    """)
    assert done.stdout == "done\n", done.stderr


# The directory of a TPM's state.


@ROOT
def test_a_state_directory_of_root_is_given_along_with_what_is_in_it() -> None:
    with open_directory() as place:
        state = place / "a" / "state"
        make_state_dir(state, None)
        assert state.stat().st_uid == 0
        assert state.stat().st_mode & 0o777 == 0o700
        (state / "tpm2-00.permall").write_bytes(b"nv")
        (state / "link").symlink_to("/etc/passwd")
        make_state_dir(state, find_user("nobody"))
        for path in (state, state / "tpm2-00.permall"):
            assert path.stat().st_uid == NOBODY.pw_uid
        assert (state / "link").lstat().st_uid == NOBODY.pw_uid
        assert Path("/etc/passwd").stat().st_uid == 0


@ROOT
@pytest.mark.parametrize("whose", ["another user's", "writable for all"])
def test_what_somebody_else_may_have_put_there_is_not_given_along(whose: str) -> None:
    with open_directory() as place:
        state = place / "state"
        state.mkdir(mode=0o700)
        roots = state / "roots"
        roots.write_bytes(b"x")
        if whose == "another user's":
            os.chown(state, NOBODY.pw_uid, NOBODY.pw_gid)
        else:
            state.chmod(0o777)
        make_state_dir(state, find_user("nobody"))
        assert roots.stat().st_uid == 0


def test_a_state_directory_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="state: the TPM's state is kept there"):
        make_state_dir(tmp_path / "file" / "state", None)


def test_policy_without_calls_stops_python_itself() -> None:
    """The list is what keeps the process alive; a filter that is empty proves that it counts."""
    done = run("""
    confine(Policy([Call("write"), Call("exit_group")], {}), Mode.AUTO, None)
    try:
        os.getppid()
        print("read", os.stat("/"))
    except OSError as error:
        os.write(1, errno.errorcode[error.errno].encode())
    os._exit(0)
    """)
    assert done.stdout.endswith("EPERM"), done
