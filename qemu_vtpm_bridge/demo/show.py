"""The demo's stages, in the order in which they are shown."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import trio

from ..errors import BridgeError, XenError, first_of
from .chain import BACKEND, FRONTEND, VTPM_DOMID, Chain, running_chain
from .guest import MARKED_PCR, Boot, build_initramfs, find_kernel
from .machine import OVMF, SEABIOS, GuestSetup, Machine
from .screen import Screen

_POLL_S: Final = 0.2
_BOOT_DEADLINE_S: Final = 120.0
_ZERO: Final = "0" * 64

_PICTURE: Final = """\
guest      firmware and Linux, with the kernel's own TPM driver
  |          registers at 0xFED40000
QEMU       unmodified: -tpmdev emulator, -chardev socket
  |          swtpm's control channel and data socket
bridge     qemu-vtpm-bridge run, in domain 0
  |          XenStore, one granted page, one event channel
vTPM       qemu-vtpm-bridge vtpm, in domain 2
  |          two socket pairs
swtpm      the TPM itself"""


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Return the demo's options."""
    parser = argparse.ArgumentParser(
        prog="qemu-vtpm-bridge demo",
        description="Shows the whole chain on this machine, without Xen: the firmware of two "
        "guests and a Linux kernel use a TPM that lives in a vTPM domain. "
        "Exit status 0 if everything that is shown was checked and held.",
    )
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path("build/demo"),
        help="for the kernel, the initramfs and all logs (default: build/demo)",
    )
    parser.add_argument(
        "--kvm",
        action="store_true",
        help="use KVM; a nested one may accept a guest and then hang, which is told after "
        f"{_BOOT_DEADLINE_S:g} s",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome there")
    return parser.parse_args(words)


def main(words: Sequence[str]) -> int:
    """Run the demo; return its exit status."""
    args = parse(words)
    screen = Screen()
    status = 1
    try:
        trio.run(_run, args, screen)
        status = 0 if screen.ok else 1
    except (BridgeError, BaseExceptionGroup, OSError, trio.TooSlowError) as error:
        first = first_of(error)
        if isinstance(first, KeyboardInterrupt):
            status = 130
        elif not isinstance(first, BridgeError | OSError | trio.TooSlowError):
            raise
        screen.end(f"The demo ended early: {first or type(first).__name__}", ok=False)
    except KeyboardInterrupt:
        screen.end("Interrupted; everything that was started has ended.", ok=False)
        status = 130
    if args.json:
        args.json.write_text(json.dumps(screen.summary(), indent=2) + "\n")
    return status


async def _run(args: argparse.Namespace, screen: Screen) -> None:
    directory = args.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    # Unix sockets need short paths, which a checkout may not have.
    place = Path(tempfile.mkdtemp(prefix="qvb-demo-"))
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(_watch_for_signals, nursery.cancel_scope)
            async with running_chain(place, directory) as chain:
                await _show(args, screen, chain, directory)
            nursery.cancel_scope.cancel()
    finally:
        shutil.rmtree(place, ignore_errors=True)
    _close(screen, directory)


async def _watch_for_signals(
    scope: trio.CancelScope, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGHUP) as signals:
        task_status.started()
        async for _ in signals:
            raise XenError("told to stop")
        scope.cancel()


def _close(screen: Screen, directory: Path) -> None:
    wrong = sum(not check.ok for check in screen.checks)
    if wrong:
        screen.end(f"{wrong} of {len(screen.checks)} checks failed; logs: {directory}", ok=False)
    else:
        screen.end(
            f"All {len(screen.checks)} checks held, in {screen.elapsed_s:.0f} s. Logs: {directory}",
            ok=True,
        )


async def _show(args: argparse.Namespace, screen: Screen, chain: Chain, directory: Path) -> None:
    screen.title("A guest's TPM in a domain of its own, reached by an unmodified QEMU", "")
    screen.say(_PICTURE)
    screen.stage("The guest's kernel", "Debian's, unpacked; its initramfs is built here.")
    screen.live("downloading the kernel's package, once")
    kernel = await trio.to_thread.run_sync(find_kernel, directory)
    initramfs = build_initramfs(directory)
    screen.say(f"{kernel.name}; initramfs of {initramfs.stat().st_size // 1024} KiB")
    await _show_chain(screen, chain)
    for firmware, device in ((SEABIOS, "tpm-tis"), (OVMF, "tpm-crb")):
        setup = GuestSetup(firmware, device, chain.tpm_socket, kernel, initramfs, args.kvm)
        (directory / device).mkdir(exist_ok=True)
        await _show_guest(screen, chain, setup, directory / device)


# The chain.


async def _show_chain(screen: Screen, chain: Chain) -> None:
    screen.stage("The embedded Xen", "A XenStore and a hypervisor stand-in, for want of Xen.")
    await chain.start_xen()
    screen.say(f"domains: 0 (where QEMU runs), {VTPM_DOMID} (where the TPM will be)")
    screen.stage("The toolstack's part", "Entries in XenStore join the two domains.")
    screen.quote(await chain.attach())
    screen.stage("The bridge", "It listens for QEMU at once, and waits for the vTPM domain.")
    await chain.start_bridge()
    screen.check(
        "the bridge listens while there is no vTPM domain yet",
        (await chain.bridge_status())["frontend"]["state"] == "WAIT_BACKEND"
        and chain.tpm_socket.exists(),
    )
    screen.stage("The vTPM domain", "swtpm behind tpmif: TPM 2.0, new state.")
    await chain.start_vtpm()
    await _wait(screen, chain, lambda status: status["frontend"]["state"] == "RUNNING")
    screen.say("both ends are Connected; XenStore now, as xenstore-ls shows it:")
    screen.quote(await chain.xenstore(FRONTEND, BACKEND))
    screen.check(
        "the vTPM domain mapped the bridge's page and bound its port",
        (await chain.vtpm_status())["frontends"][0]["state"] == "CONNECTED",
    )


async def _wait(screen: Screen, chain: Chain, wanted: Any) -> dict[str, Any]:
    with trio.fail_after(30):
        while not wanted(status := await chain.bridge_status()):
            screen.live(f"the frontend is in state {status['frontend']['state']}")
            await trio.sleep(_POLL_S)
    return status


# A guest.


async def _show_guest(screen: Screen, chain: Chain, setup: GuestSetup, directory: Path) -> None:
    screen.stage(
        f"{setup.firmware} with {setup.device}",
        "QEMU powers the TPM on; the firmware measures, then Linux boots.",
    )
    screen.say("QEMU is as Debian ships it; its words for the TPM:")
    screen.quote(" ".join(setup.tpm_words()).replace(" -", "\n-"))
    before = await chain.bridge_status()
    resets = await _resets(chain)
    machine = await Machine.start(setup, directory)
    try:
        first = await _boot(screen, chain, machine, setup, 1, before)
        _check_boot(screen, first, setup)
        if before["pump"]["commands"] > 1:
            screen.check(
                "the TPM was power-cycled for this guest: it had served another one",
                await _resets(chain) > resets,
            )
        await _show_reset(screen, chain, machine, setup, first)
        screen.say("QEMU ends; the bridge goes back to listening for the next one")
    finally:
        with trio.CancelScope(shield=True):
            await machine.quit()
    after = await _wait(screen, chain, lambda status: not status["qemu"]["data-attached"])
    asked = _difference(before["control"]["requests"], after["control"]["requests"])
    screen.say(f"asked on the control channel: {_counted(asked)}")
    screen.check(
        "QEMU left in order, and nothing went wrong on the page",
        "CMD_SHUTDOWN" in asked
        and after["pump"]["errors"] == after["pump"]["timeouts"] == 0
        and not after["last-error"],
    )


async def _resets(chain: Chain) -> int:
    return int((await chain.vtpm_status())["frontends"][0]["resets"])


async def _boot(
    screen: Screen,
    chain: Chain,
    machine: Machine,
    setup: GuestSetup,
    number: int,
    before: dict[str, Any],
) -> Boot:
    """Wait until the guest has said all that it has to say in this boot."""
    with trio.move_on_after(_BOOT_DEADLINE_S):
        while True:
            machine.ensure_running()
            status = await chain.bridge_status()
            boots = machine.boots()
            counts = _counted(_difference(before["ordinals"], status["ordinals"]))
            who = "Linux" if len(boots) >= number else setup.firmware
            if len(boots) >= number and boots[number - 1].ended:
                screen.say(f"commands: {counts}")
                return boots[number - 1]
            screen.live(f"{who}: {counts}")
            await trio.sleep(_POLL_S)
    raise XenError(
        f"the guest did not finish its boot within {_BOOT_DEADLINE_S:g} s",
        state="a nested KVM may hang under a Linux kernel" if setup.kvm else "",
        next_step="see console.log and qemu.log beside the demo's logs"
        + ("; try without KVM" if setup.kvm else ""),
    )


def _difference(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    counts = {name: count - before.get(name, 0) for name, count in after.items()}
    return {name: count for name, count in counts.items() if count}


def _counted(counts: dict[str, int]) -> str:
    """Return counters as words, the largest first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(
        f"{name.removeprefix('TPM2_').removeprefix('CMD_')} {count}" for name, count in ordered
    )


def _check_boot(screen: Screen, boot: Boot, setup: GuestSetup) -> None:
    screen.say(f"Linux {boot.facts.get('kernel', '?')}: {boot.facts.get('driver', 'no driver')}")
    for number in (0, 4, 7):
        screen.quote(f"PCR {number}: {boot.pcrs.get(number, 'missing')}")
    driver = {"tpm-tis": "tpm_tis", "tpm-crb": "tpm_crb"}[setup.device]
    screen.check(
        f"Linux drives it with its own {driver}, as TPM 2.0",
        boot.facts.get("driver") == driver and boot.facts.get("version") == "2",
    )
    screen.check(
        f"{setup.firmware} measured into PCRs 0 to 7",
        all(boot.pcrs.get(number, _ZERO) != _ZERO for number in range(8)),
    )
    random = boot.facts.get("random", "")
    screen.check(
        "a command through /dev/tpm0 was answered: 16 random bytes",
        random.startswith("80010000001c000000000010") and len(random) == 2 * 28,
    )
    screen.check(
        f"the guest extended PCR {MARKED_PCR}, which was zero",
        boot.pcrs.get(MARKED_PCR) == _ZERO and boot.facts.get("marked", _ZERO) != _ZERO,
    )


async def _show_reset(
    screen: Screen, chain: Chain, machine: Machine, setup: GuestSetup, first: Boot
) -> None:
    screen.say("now the guest is reset (QMP system_reset): QEMU says CMD_STOP, CMD_INIT, and the")
    screen.say("bridge lets no command through before the TPM has shown that it was power-cycled")
    before = await chain.bridge_status()
    resets = await _resets(chain)
    lines = len(chain.said("bridge", "power: "))
    await machine.command("system_reset")
    second = await _boot(screen, chain, machine, setup, 2, before)
    screen.say("the bridge's log of that:")
    screen.quote("\n".join(chain.said("bridge", "power: ")[lines:]))
    screen.check("the vTPM domain power-cycled the TPM", await _resets(chain) > resets)
    screen.check(
        f"PCR {MARKED_PCR}, which the guest had extended, is zero again",
        second.pcrs.get(MARKED_PCR) == _ZERO,
    )
    same = [n for n, value in first.pcrs.items() if second.pcrs.get(n) == value]
    screen.check(
        f"the same boot gave the same PCRs 0 to 10: measured anew, not kept ({len(same)} equal)",
        len(same) == len(first.pcrs) > 0,
    )
