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
from .doors import Look, Passed, on_its_way, power_story
from .guest import MARKED_PCR, Boot, build_initramfs, find_kernel, unpacked_kernel
from .machine import OVMF, SEABIOS, GuestSetup, Machine
from .screen import Screen

_POLL_S: Final = 0.2
_BOOT_DEADLINE_S: Final = 120.0
_KVM_BOOT_DEADLINE_S: Final = 40.0
_STEP_DEADLINE_S: Final = 30.0
_ZERO: Final = "0" * 64
_PCRS_SHOWN: Final = (0, 4, 7, MARKED_PCR)
_SHORT: Final = 20

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


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the demo's options."""
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
        f"{_KVM_BOOT_DEADLINE_S:g} s",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome there")
    return parser


def main(words: Sequence[str]) -> int:
    """Run the demo; return its exit status."""
    args = build_parser().parse_args(words)
    screen = Screen()
    status = 1
    try:
        trio.run(_run, args, screen)
        status = 0 if screen.ok else 1
    except KeyboardInterrupt:
        status = 130
    except (BridgeError, BaseExceptionGroup, OSError, trio.TooSlowError) as error:
        first = first_of(error)
        if isinstance(first, KeyboardInterrupt):
            status = 130
        elif isinstance(first, BridgeError | OSError | trio.TooSlowError):
            screen.fail(_why(first), str(args.directory.resolve()))
        else:
            raise
    if status == 130:
        screen.end("Interrupted; everything that was started has ended.", ok=False)
    if args.json:
        args.json.write_text(json.dumps(screen.summary(), indent=2) + "\n")
    return status


def _why(error: BaseException) -> str:
    if isinstance(error, trio.TooSlowError):
        return f"a step that takes moments was not done within {_STEP_DEADLINE_S:g} s"
    return str(error) or type(error).__name__


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
    if unpacked_kernel(directory) is None:
        screen.say("Downloading its package (27 MB), this once.")
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
    await _wait(screen, chain, lambda status: status["frontend"]["state"] == "WAIT_BACKEND")
    screen.check(
        "the bridge listens while there is no vTPM domain yet", chain.tpm_socket.is_socket()
    )
    screen.stage("The vTPM domain", "swtpm behind tpmif: TPM 2.0, new state.")
    await chain.start_vtpm()
    await _wait(screen, chain, lambda status: status["frontend"]["state"] == "RUNNING")
    screen.say("The two have met. XenStore now, as the stock xenstore-ls shows it:")
    screen.quote(await chain.xenstore(FRONTEND, BACKEND))
    screen.say(
        "ring-ref names the page that domain 0 granted to domain 2, event-channel the bell "
        "beside it; state 4 on both sides is Connected."
    )
    screen.check(
        "the vTPM domain mapped the bridge's page and bound its port",
        (await chain.vtpm_status())["frontends"][0]["state"] == "CONNECTED",
    )


async def _wait(screen: Screen, chain: Chain, wanted: Any) -> dict[str, Any]:
    with trio.fail_after(_STEP_DEADLINE_S):
        while not wanted(status := await chain.bridge_status()):
            screen.live(f"the bridge's frontend: {status['frontend']['state']}")
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
    before = await Look.take(chain)
    machine = await Machine.start(setup, directory)
    try:
        first, after = await _boot(screen, chain, machine, setup, 1, before)
        _check_boot(screen, first, setup)
        if before.bridge["pump"]["commands"] > 1:
            screen.check(
                "the TPM was power-cycled for this guest: it had served another one",
                after.resets > before.resets,
            )
        await _show_reset(screen, chain, machine, setup, first)
        screen.heading("The end of this guest")
        screen.say("QEMU ends; the bridge goes back to listening for the next one")
    finally:
        with trio.CancelScope(shield=True):
            await machine.quit()
    await _wait(screen, chain, lambda status: not status["qemu"]["data-attached"])
    end = await Look.take(chain)
    pump = end.bridge["pump"]
    screen.check(
        "QEMU left in order (CMD_SHUTDOWN), and nothing went wrong on the page",
        "CMD_SHUTDOWN" in Passed.between(before, end).control
        and pump["errors"] == pump["timeouts"] == 0
        and not end.bridge["last-error"],
    )


async def _boot(
    screen: Screen,
    chain: Chain,
    machine: Machine,
    setup: GuestSetup,
    number: int,
    before: Look,
) -> tuple[Boot, Look]:
    """Wait until the guest has said all of this boot, and show what passed each door."""
    deadline_s = _KVM_BOOT_DEADLINE_S if setup.kvm else _BOOT_DEADLINE_S
    boots: list[Boot] = []
    with trio.move_on_after(deadline_s):
        while True:
            machine.ensure_running()
            boots = machine.boots()
            look = await Look.take(chain)
            if len(boots) >= number and boots[number - 1].ended:
                screen.heading(f"Boot {number}, door by door")
                _show_doors(screen, Passed.between(before, look))
                return boots[number - 1], look
            who = "Linux" if len(boots) >= number else f"{setup.firmware}, kernel"
            screen.live(f"{who:<15} {on_its_way(before, look)}")
            await trio.sleep(_POLL_S)
    reached = "Linux began to speak" if len(boots) >= number else "Linux said nothing"
    raise XenError(
        f"the guest did not finish boot {number} within {deadline_s:g} s; {reached}",
        state="a nested KVM may accept a guest and then hang" if setup.kvm else "",
        next_step=("try without KVM; " if setup.kvm else "")
        + f"see console.log and qemu.log in {machine.directory}",
    )


def _show_doors(screen: Screen, passed: Passed) -> None:
    for label, words in passed.rows():
        screen.row(label, words)
    screen.check(
        "each command got one answer, from the vTPM domain or a refusal",
        passed.pump["responses"] == passed.forwarded > 0 and passed.served >= passed.forwarded,
    )


def _short(value: str | None) -> str:
    """Return the beginning of a PCR's value, for a line that holds two of them."""
    return f"{value[:_SHORT]}..." if value else "missing"


def _check_boot(screen: Screen, boot: Boot, setup: GuestSetup) -> None:
    screen.heading("What Linux found")
    screen.say(f"Linux {boot.facts.get('kernel', '?')}: {boot.facts.get('driver', 'no driver')}")
    for number in _PCRS_SHOWN:
        screen.quote(f"PCR {number:<2}  {_short(boot.pcrs.get(number))}")
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
    screen.heading("Reset (QMP system_reset)")
    screen.say(
        f"PCR {MARKED_PCR} gives it away if the TPM is not reset too: "
        "no firmware measures into it, and the guest just has."
    )
    before = await Look.take(chain)
    lines = len(chain.said("bridge", "power: "))
    await machine.command("system_reset")
    second, after = await _boot(screen, chain, machine, setup, 2, before)
    screen.heading("What the bridge did before it let a command of the new boot through")
    told = power_story(chain.said("bridge", "power: ")[lines:])
    screen.quote("\n".join(told))
    if sum(line.startswith("WAIT_RING") for line in told) > 1:
        screen.say("(Twice, since SeaBIOS answers a reset with a reset of its own.)")
    screen.say("and how it asked, in XenStore:")
    tree = await chain.xenstore(FRONTEND, BACKEND)
    screen.quote("\n".join(line.strip() for line in tree.splitlines() if " reset-" in line))
    screen.heading("Boot 1, as it ended, and boot 2")
    for number in _PCRS_SHOWN:
        ended = first.facts.get("marked") if number == MARKED_PCR else first.pcrs.get(number)
        screen.quote(f"PCR {number:<2}  {_short(ended):<26}{_short(second.pcrs.get(number))}")
    screen.check("the vTPM domain power-cycled the TPM", after.resets > before.resets)
    screen.check(
        f"PCR {MARKED_PCR}, which the guest had extended, is zero again",
        second.pcrs.get(MARKED_PCR) == _ZERO,
    )
    same = [n for n, value in first.pcrs.items() if second.pcrs.get(n) == value]
    screen.check(
        f"the same boot gave the same PCRs 0 to 10: measured anew, not kept ({len(same)} equal)",
        len(same) == len(first.pcrs) > 0,
    )
