"""The doctor's checks of Xen, its libraries, and what the kernel has for them.

Theory of operation.  Each check is a plain function that looks at files and returns
findings; the caller runs it in a thread that it leaves behind if a file system hangs.
Libraries are loaded as the bridge loads them.  Where a check does not apply to the role,
it says so and why.

Who may lie: nobody but the machine's administrator; still, every value is printed bounded.

Source: Linux' Documentation/ABI/stable/sysfs-hypervisor-xen, modprobe.d(5); libxl for the
custom that domain 0 has the capability `control_d`.
"""

from __future__ import annotations

import ctypes
import re
import stat
from typing import Any, Final

from ..errors import XenError
from .doctor_host import Case, Host, Role
from .doctor_report import Finding, Mend, Verdict, shell

LIBRARIES: Final = {"libxengnttab.so.1": "libxengnttab1", "libxenevtchn.so.1": "libxenevtchn1"}
"""What the C part loads, and Debian's packages with it."""

NODES: Final = {
    Role.DOM0: ("evtchn", "gntalloc"),
    Role.VTPM: ("evtchn", "gntdev", "xenbus"),
}
"""Below /dev/xen: a bridge grants pages, a vTPM domain maps them and has no XenStore socket."""

MODULES: Final = {
    Role.DOM0: ("xen-evtchn", "xen-gntalloc"),
    Role.VTPM: ("xen-evtchn", "xen-gntdev"),
}
_MODULES_TO_TELL: Final = ("xen-evtchn", "xen-gntalloc", "xen-gntdev", "xenfs")
_AT_BOOT: Final = "/etc/modules-load.d"
_BLACKLIST: Final = "/etc/modprobe.d"
_MODPROBE_DIRS: Final = (
    *("/etc/modprobe.d", "/run/modprobe.d", "/usr/local/lib/modprobe.d"),
    *("/usr/lib/modprobe.d", "/lib/modprobe.d"),
)
TPMFRONT: Final = "xen-tpmfront"


def check_xen(case: Case) -> list[Finding]:
    """Find out whether this is Xen, which, and which domain."""
    if case.embedded is not None:
        return [
            Finding(
                "xen",
                Verdict.OK,
                f"the embedded Xen in {case.embedded}, as domain {case.domid or 0}",
                {"type": "embedded", "world": str(case.embedded), "domain": case.domid or 0},
            )
        ]
    host = case.host
    kind = (host.read("/sys/hypervisor/type") or "").strip()
    case.on_xen = kind == "xen"
    if not case.on_xen:
        return [_no_xen(case, kind)]
    version = [
        (host.read(f"/sys/hypervisor/version/{part}") or "").strip()
        for part in ("major", "minor", "extra")
    ]
    if all(re.fullmatch(r"\d{1,4}", number) for number in version[:2]):
        case.xen_version = (int(version[0]), int(version[1]))
    capabilities = host.read("/proc/xen/capabilities")
    if capabilities is not None:
        case.control_domain = "control_d" in capabilities.split()
    domain = {None: "which domain is not known", True: "this is domain 0"}.get(
        case.control_domain, "this is a domain other than 0"
    )
    shown = f"{version[0]}.{version[1]}{version[2]}" if version[0] else "of unknown version"
    facts = {"type": kind, "version": shown, "capabilities": (capabilities or "").split()}
    verdict, summary = Verdict.OK, f"Xen {shown}; {domain}"
    mend: tuple[Mend, ...] = ()
    if capabilities is None:
        verdict = Verdict.WARNING
        summary += ": xenfs is not mounted"
        mend = (Mend("mount what says which domain this is", "mount -t xenfs xenfs /proc/xen"),)
    elif case.wanted is Role.DOM0 and not case.control_domain:
        summary += "; a bridge here is for a QEMU in this very domain"
        verdict = Verdict.WARNING
    return [Finding("xen", verdict, summary, facts, mend)]


def _no_xen(case: Case, kind: str) -> Finding:
    facts: dict[str, Any] = {"type": kind or None}
    here = f"the hypervisor here is {kind}, not Xen" if kind else "this machine is no Xen domain"
    if case.wanted is not Role.ANY:
        return Finding(
            "xen",
            Verdict.PROBLEM,
            f"{here}, so it cannot be {case.wanted.value}",
            facts,
            (
                Mend(
                    "install Xen, and boot the entry that it adds to the boot menu (Debian)",
                    "apt-get install xen-system-amd64",
                ),
            ),
        )
    return Finding(
        "xen",
        Verdict.NOT_APPLICABLE,
        f"{here}; the rest is checked",
        facts,
        (
            Mend("see guests on the whole chain, with an embedded Xen", "qemu-vtpm-bridge demo"),
            Mend(
                "play with an embedded Xen by hand; it says how",
                "qemu-vtpm-bridge embedded-xen /run/embedded-xen",
            ),
        ),
    )


def _without_xen(case: Case, check: str, what: str) -> list[Finding]:
    where = "the embedded Xen has none" if case.embedded else "without Xen none is needed"
    return [Finding(check, Verdict.NOT_APPLICABLE, f"{what}: {where}")]


def check_libraries(case: Case) -> list[Finding]:
    """Load Xen's libraries as the bridge does."""
    if not case.real_xen:
        return _without_xen(case, "xen.libraries", "Xen's libraries")
    failures = {}
    for library in LIBRARIES:
        try:
            ctypes.CDLL(library)
        except OSError as error:
            failures[library] = str(error)
    facts: dict[str, Any] = {
        "libraries": {name: failures.get(name, "loaded") for name in LIBRARIES}
    }
    if failures:
        packages = [LIBRARIES[name] for name in failures]
        return [
            Finding(
                "xen.libraries",
                Verdict.PROBLEM,
                f"cannot be loaded: {', '.join(failures)}",
                facts,
                (Mend("install them (Debian)", shell("apt-get", "install", *packages)),),
            )
        ]
    refusal = _opening()
    if refusal is not None:
        facts["refusal"] = str(refusal)
        return [
            Finding(
                "xen.libraries",
                Verdict.PROBLEM,
                refusal.cause,
                facts,
                (Mend(refusal.next_step or "see what this package was built with"),),
            )
        ]
    return [Finding("xen.libraries", Verdict.OK, f"{', '.join(LIBRARIES)} load", facts)]


def _opening() -> XenError | None:
    """Return what the bridge would say on opening Xen; what is about devices is not told here."""
    try:
        from ..xen.platform import Platform

        Platform.open_xen().close()
    except ImportError as error:
        return XenError(
            f"this package's C part cannot be loaded: {error}",
            next_step="install the package again, with the Python that runs it",
        )
    except XenError as error:
        return None if "/dev/xen/" in error.cause else error
    return None


# Modules and device nodes.


def check_modules(case: Case) -> list[Finding]:
    """Look for the modules that make Xen's device nodes."""
    if not case.real_xen:
        return _without_xen(case, "xen.modules", "Xen's kernel modules")
    states = {name: module_state(case.host, name) for name in _MODULES_TO_TELL}
    wanted = MODULES[case.role]
    facts = {"kernel": case.host.kernel, "modules": states, "wanted": list(wanted)}
    nodes = {
        f"xen-{node}": case.host.exists(f"/dev/xen/{node}")
        for node in ("evtchn", "gntalloc", "gntdev")
    }
    lacking = [name for name in wanted if states[name] not in ("loaded", "built in")]
    # A node without a module is what a kernel shows whose module list cannot be read.
    lacking = [name for name in lacking if not nodes[name]]
    if not lacking:
        shown = ", ".join(f"{name} {states[name]}" for name in wanted)
        return [Finding("xen.modules", Verdict.OK, shown, facts)]
    steps = []
    for name in lacking:
        if states[name] == "not there":
            does = f"boot a kernel that has {name}: {case.host.kernel or 'this one'} has not"
            steps.append(Mend(does))
        else:
            steps.append(_load(name))
            line = f"mkdir -p {_AT_BOOT} && echo {name} >{_AT_BOOT}/{name}.conf"
            steps.append(Mend(f"have {name} loaded at each boot", line))
    shown = ", ".join(f"{name} {states[name]}" for name in lacking)
    return [Finding("xen.modules", Verdict.PROBLEM, shown, facts, tuple(steps))]


def _load(module: str) -> Mend:
    return Mend(f"load {module}", shell("modprobe", module))


def module_state(host: Host, module: str) -> str:
    """Return `loaded`, `built in`, `not loaded`, `not there`, or `unknown`."""
    underscored = module.replace("-", "_")
    loaded = host.read("/proc/modules") or ""
    if any(line.split(" ", 1)[0] == underscored for line in loaded.splitlines()):
        return "loaded"
    directory = f"/lib/modules/{host.kernel}"
    found = {
        name: _names_module(host.read(f"{directory}/{name}"), underscored)
        for name in ("modules.builtin", "modules.dep")
    }
    if found["modules.builtin"]:
        return "built in"
    if found["modules.dep"]:
        return "not loaded"
    return "unknown" if found["modules.dep"] is None else "not there"


def _names_module(text: str | None, underscored: str) -> bool | None:
    """Return whether a list of module files has this one; None where there is no list."""
    if text is None:
        return None
    for line in text.splitlines():
        name = line.partition(":")[0].rpartition("/")[2].partition(".ko")[0]
        if name.replace("-", "_") == underscored:
            return True
    return False


def check_nodes(case: Case) -> list[Finding]:
    """Look at the device nodes: there, ours to open, and nobody else's."""
    if not case.real_xen:
        return _without_xen(case, "xen.devices", "the nodes in /dev/xen")
    facts: dict[str, Any] = {}
    faults: list[str] = []
    steps: list[Mend] = []
    for node in NODES[case.role]:
        fact, fault, step = _node(case.host, f"/dev/xen/{node}")
        facts[f"/dev/xen/{node}"] = fact
        if fault:
            faults.append(f"/dev/xen/{node} {fault}")
            steps += [step] if step else []
    if faults:
        return [Finding("xen.devices", Verdict.PROBLEM, "; ".join(faults), facts, tuple(steps))]
    return [Finding("xen.devices", Verdict.OK, f"{', '.join(facts)} may be used", facts)]


def _node(host: Host, name: str) -> tuple[dict[str, Any], str, Mend | None]:
    """Return facts on a node, what is wrong with it, and what mends that."""
    found = host.stat(name)
    if found is None:
        return {"there": False}, "is missing", _make_node(host, name)
    kind = "character device" if stat.S_ISCHR(found.st_mode) else "something else"
    mode = stat.S_IMODE(found.st_mode)
    fact = {
        "there": True,
        "kind": kind,
        "mode": f"{mode:04o}",
        "uid": found.st_uid,
        "gid": found.st_gid,
    }
    if not stat.S_ISCHR(found.st_mode):
        return fact, "is no device", Mend(f"remove what stands in for {name}", shell("rm", name))
    if mode & 0o006:
        return (
            fact,
            f"may be opened by everybody (mode {mode:04o})",
            Mend(
                f"take {name} away from other users: it reaches guests' memory",
                shell("chmod", "o-rw", name),
            ),
        )
    if not host.may_use(name):
        return fact, "may not be opened by this user", Mend("be root")
    return fact, "", None


def _make_node(host: Host, name: str) -> Mend | None:
    """Return what makes a node appear."""
    node = name.rpartition("/")[2]
    numbers = (host.read(f"/sys/class/misc/xen!{node}/dev") or "").strip()
    if match := re.fullmatch(r"(\d+):(\d+)", numbers):
        # The kernel has the device, nobody made its node: a chroot, a container.
        made = f"mkdir -p /dev/xen && mknod -m 0600 {name} c {match[1]} {match[2]}"
        return Mend(f"make {name}", made)
    return None if node == "xenbus" else _load(f"xen-{node}")


# The kernel's own frontend.


def check_tpmfront(case: Case) -> list[Finding]:
    """Look for a driver that would make a guest's TPM domain 0's own."""
    check = "xen.tpmfront"
    if not case.real_xen or case.role is not Role.DOM0 or case.control_domain is False:
        return [Finding(check, Verdict.NOT_APPLICABLE, "xen-tpmfront matters in domain 0 only")]
    host = case.host
    state = module_state(host, TPMFRONT)
    running = host.exists("/sys/bus/xen/drivers/vtpm")
    taken = [
        name
        for name in host.names("/sys/bus/xen/devices")
        if name.startswith("vtpm-") and host.exists(f"/sys/bus/xen/devices/{name}/driver")
    ]
    blacklisted = _blacklisted(host)
    facts = {
        "module": state,
        "driver": running,
        "taken": taken,
        "blacklisted-by": blacklisted,
    }
    forbid = Mend(
        "keep xen-tpmfront from being loaded by itself",
        f"mkdir -p {_BLACKLIST} && echo 'blacklist {TPMFRONT}' >{_BLACKLIST}/no-{TPMFRONT}.conf",
    )
    unload = Mend("unload xen-tpmfront", f"modprobe -r {TPMFRONT}")
    if state == "built in":
        forbid = unload = Mend(
            "xen-tpmfront is built in: add initcall_blacklist=xen_tpmfront_init to the kernel's "
            "command line, or attach with --path-mode seed or zeros only"
        )
    if taken:
        summary = f"this kernel has made {', '.join(taken)} domain 0's own TPM"
        return [Finding(check, Verdict.PROBLEM, summary, facts, (forbid, unload))]
    if running:
        summary = "xen-tpmfront runs, and would take frontends of --path-mode device"
        return [Finding(check, Verdict.WARNING, summary, facts, (forbid, unload))]
    if state == "not loaded" and blacklisted is None:
        summary = "xen-tpmfront is loaded as soon as a frontend of --path-mode device is there"
        return [Finding(check, Verdict.WARNING, summary, facts, (forbid,))]
    known = "cannot be told, but does not run" if state == "unknown" else state
    summary = f"xen-tpmfront: {known}" + (", blacklisted" if blacklisted else "")
    return [Finding(check, Verdict.OK, summary, facts)]


def _blacklisted(host: Host) -> str | None:
    """Return who keeps xen-tpmfront from being loaded by itself, or None."""
    for directory in _MODPROBE_DIRS:
        for name in host.names(directory):
            text = host.read(f"{directory}/{name}") if name.endswith(".conf") else None
            for line in (text or "").splitlines():
                words = line.replace("-", "_").split()
                if words[:2] in (["blacklist", "xen_tpmfront"], ["install", "xen_tpmfront"]):
                    return f"{directory}/{name}"
    for word in (host.read("/proc/cmdline") or "").split():
        name, _, value = word.partition("=")
        if name in ("modprobe.blacklist", "module_blacklist") and "xen_tpmfront" in value.replace(
            "-", "_"
        ).split(","):
            return "the kernel's command line"
    return None
