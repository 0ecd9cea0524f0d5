"""What the commands do: each builds its parts from the options and runs them under trio."""

from __future__ import annotations

import argparse
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import trio

from .errors import ConfigError, XenError
from .opened import Opened, backend_name, paths_of, store_path
from .supervise import stop_on_signals
from .xen import xenbus
from .xen.domains import resolve_domain
from .xen.store import Store, open_store

if TYPE_CHECKING:
    from .bridge.chardev import Door, TpmBehind
    from .bridge.listen import Listener
    from .bridge.recorded import DeviceRecords
    from .device_service import RegisterService
    from .service import Bridge, BridgeConfig
    from .vtpm.domain import VtpmDomain


async def run_bridge(args: argparse.Namespace, listener: Listener, opened: Opened) -> int:
    """Serve one guest until told to stop."""
    return await _run_with(args, listener, opened, _serve_guest)


async def run_device(args: argparse.Namespace, listener: Listener, opened: Opened) -> int:
    """Serve one guest's register devices until told to stop."""
    args.on_reset_failure = "tpm-failure"
    return await _run_with(args, listener, opened, _serve_registers)


async def run_guest(args: argparse.Namespace, _listener: None, opened: Opened) -> int:
    """Be a guest's TPM at its registers' addresses until told to stop."""
    await _serve_registers_of_guest(args, await _configured(args, opened), opened)
    return 0


async def _run_with(
    args: argparse.Namespace,
    listener: Listener,
    opened: Opened,
    serve: Callable[[argparse.Namespace, BridgeConfig, Opened, Listener], Awaitable[None]],
) -> int:
    """Run what serves a guest on the listener, with the configuration that the options give."""
    await serve(args, await _configured(args, opened), opened, listener)
    return 0


async def _configured(args: argparse.Namespace, opened: Opened) -> BridgeConfig:
    """Return the configuration that the options give, once the entries are there if so asked."""
    from .bridge import power, tpm
    from .service import BridgeConfig

    paths_for = paths_of(args, opened.domid)
    sysfs = None if args.embedded else Path("/sys")
    paths = paths_for(opened.backend_domid)
    if args.attach:
        from .toolstack.attach import attach

        async with open_store(opened.store) as store:
            await attach(store, paths, sysfs=sysfs)
    return BridgeConfig(
        paths=paths,
        family=tpm.Family(args.tpm),
        reset=power.ResetPolicy(args.reset),
        restart_command=tuple(args.restart_command),
        stop_guest_on_reset_failure=args.on_reset_failure == "stop-guest",
        require_feature=not args.allow_missing_feature,
        vtpm_uuid=args.vtpm_uuid,
        backend_name=backend_name(args),
        paths_for=paths_for,
        follows_entries=args.backend is None,
        writes_entries=args.attach,
        sysfs=sysfs,
        store_path=opened.store,
    )


async def _serve_guest(
    args: argparse.Namespace, config: BridgeConfig, opened: Opened, listener: Listener
) -> None:
    from .bridge.chardev import Door, DoorConfig
    from .service import Bridge

    bridge = Bridge(config, opened.platform)

    def document() -> dict[str, Any]:
        return bridge.status() | {"control": {"clients": door.clients, "requests": door.requests}}

    async with _recorded(args, config, bridge, opened.record) as behind:
        door = Door(
            behind,
            DoorConfig(terminate=args.terminate, empty_state_blobs=args.state_blobs == "empty"),
        )
        await _serve_with(door, bridge, opened, listener, document)


async def _serve_registers(
    args: argparse.Namespace, config: BridgeConfig, opened: Opened, listener: Listener
) -> None:
    from .device_service import Registers, RegisterService
    from .service import Bridge

    bridge = Bridge(config, opened.platform)
    registers = Registers(args.registers)

    def document() -> dict[str, Any]:
        return bridge.status() | {"device": service.status()}

    with _device_records(args, config, opened.record) as records:
        service = RegisterService(bridge, registers, terminate=args.terminate, records=records)
        await _serve_with(service, bridge, opened, listener, document)


async def _serve_with(
    service: Door | RegisterService,
    bridge: Bridge,
    opened: Opened,
    listener: Listener,
    document: Callable[[], dict[str, Any]],
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop_on_signals, bridge.close, opened.supervisor)
        await _serve_status(nursery, opened, document)
        await nursery.start(_until_closed, bridge, nursery.cancel_scope)
        _ready(nursery, opened, bridge.alive)
        await service.serve(listener)
        # QEMU has left for good; the frontend closes in order, and that ends the rest.
        bridge.close()


async def _serve_registers_of_guest(
    args: argparse.Namespace, config: BridgeConfig, opened: Opened
) -> None:
    from .device_service import Registers
    from .guest_service import GuestService
    from .service import Bridge

    bridge = Bridge(config, opened.platform)
    service = GuestService(
        bridge,
        Registers(args.device),
        opened.guest,
        terminate=args.terminate,
        devices=opened.guest_devices,
    )

    def document() -> dict[str, Any]:
        return bridge.status() | {"guest": service.status()}

    async with trio.open_nursery() as nursery:
        served = trio.CancelScope()
        nursery.start_soon(stop_on_signals, served.cancel, opened.supervisor)
        await _serve_status(nursery, opened, document)
        await nursery.start(_until_closed, bridge, nursery.cancel_scope)
        with served:
            ready = False

            def tell_once() -> None:
                nonlocal ready
                if not ready:
                    _ready(nursery, opened, bridge.alive)
                    ready = True

            await service.run(tell_once)
        # The range is given up; now the frontend closes in order, and that ends the rest.
        bridge.close()


async def _serve_status(
    nursery: trio.Nursery, opened: Opened, document: Callable[[], dict[str, Any]]
) -> None:
    if opened.status is not None:
        from .bridge.status import serve_status

        await nursery.start(serve_status, opened.status, lambda: document() | opened.status_part())


def _ready(nursery: trio.Nursery, opened: Opened, alive: Callable[[], bool]) -> None:
    opened.supervisor.tell("READY=1")
    nursery.start_soon(opened.supervisor.feed_watchdog, alive)


@contextmanager
def _device_records(
    args: argparse.Namespace, config: BridgeConfig, out: TextIO | None
) -> Iterator[DeviceRecords | None]:
    """Give what records the device, if asked for."""
    if out is None:
        yield None
        return
    from .bridge.recorded import DeviceRecords

    records = DeviceRecords(out, config.family, payloads=args.record_payloads)
    try:
        yield records
    finally:
        records.end()


@asynccontextmanager
async def _recorded(
    args: argparse.Namespace, config: BridgeConfig, bridge: Bridge, out: TextIO | None
) -> AsyncIterator[TpmBehind]:
    """Give the TPM that the door serves: the bridge, with a recorder before it if asked for."""
    if out is None:
        yield bridge
        return
    from .bridge.record import Recorder
    from .bridge.tap import TappedTpm
    from .bridge.tpm import COMMAND_MAX_BYTES

    recorder = Recorder(
        out,
        device="chardev",
        family=config.family,
        buffer_bytes=COMMAND_MAX_BYTES,
        payloads=args.record_payloads,
    )
    try:
        async with trio.open_nursery() as nursery:
            yield TappedTpm(bridge, recorder, nursery)
            nursery.cancel_scope.cancel()
    finally:
        recorder.end()


async def _until_closed(
    bridge: Any,
    scope: trio.CancelScope,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    await bridge.run(task_status=task_status)
    scope.cancel()


async def run_vtpm_domain(args: argparse.Namespace, opened: Opened) -> int:
    """Be a vTPM domain until told to stop."""
    from .vtpm.domain import VtpmConfig, VtpmDomain
    from .vtpm.ordinals import TpmFamily

    config = VtpmConfig(
        state_dir=Path(args.state_dir),
        family=TpmFamily(args.tpm),
        swtpm=args.swtpm,
        trusted_reset_domids=frozenset(args.trust_reset or [0]),
        store_path=opened.store,
    )
    domain = VtpmDomain(config, lambda: opened.platform)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop_on_signals, domain.close, opened.supervisor)
        await _serve_status(nursery, opened, domain.status)
        await nursery.start(_serve_tpm, domain, nursery.cancel_scope)
        _ready(nursery, opened, domain.alive)
    return 0


async def _serve_tpm(
    domain: VtpmDomain,
    scope: trio.CancelScope,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    await domain.run(task_status=task_status)
    scope.cancel()


# The toolstack's part.


@asynccontextmanager
async def _device(args: argparse.Namespace) -> AsyncIterator[tuple[Store, xenbus.DevicePaths]]:
    """Give domain 0's XenStore and the directories of the device that the options name."""
    async with open_store(store_path(args, 0)) as store:
        yield (
            store,
            xenbus.device_paths(
                xenbus.PathMode(args.path_mode),
                backend_domid=await resolve_domain(store, args.backend),
                handle=args.handle,
                frontend_domid=await resolve_domain(store, args.domid or "0"),
                explicit=args.frontend_path,
            ),
        )


def _tell(args: argparse.Namespace, document: Any, text: str) -> None:
    import json

    print(json.dumps(document) if args.json else text)


async def attach_device(args: argparse.Namespace) -> int:
    """Write a device's entries."""
    from .toolstack.attach import attach

    async with _device(args) as (store, paths):
        written = await attach(
            store,
            paths,
            uuid=args.uuid,
            guest=args.guest,
            trust_reset=args.trust_reset,
            force=args.force,
            sysfs=None if args.embedded else Path("/sys"),
        )
    _tell(
        args,
        {"frontend": paths.frontend, "backend": paths.backend, "written": written},
        f"{paths.frontend} -> {paths.backend}: {'attached' if written else 'was attached'}",
    )
    return 0


async def detach_device(args: argparse.Namespace) -> int:
    """Remove a device's entries."""
    from .toolstack.attach import detach

    async with _device(args) as (store, paths):
        removed = await detach(store, paths, force=args.force)
    _tell(
        args,
        {"frontend": paths.frontend, "backend": paths.backend, "removed": removed},
        f"{paths.frontend} -> {paths.backend}: {'detached' if removed else 'was not attached'}",
    )
    return 0


async def list_devices(args: argparse.Namespace) -> int:
    """List all vtpm devices."""
    from .toolstack.attach import list_entries

    async with open_store(store_path(args, 0)) as store:
        entries = await list_entries(store)
    lines = [
        f"{e.frontend or '?'} ({e.frontend_name or '?'}: {e.frontend_state})"
        f" -> {e.backend} ({e.backend_name or '?'}: {e.backend_state})"
        + "".join(f"\n    {problem}" for problem in e.problems)
        for e in entries
    ]
    _tell(
        args,
        [entry.as_dict() for entry in entries],
        "\n".join(lines) or "no vtpm device is attached",
    )
    return 0


async def embedded_xen(args: argparse.Namespace) -> int:
    """Serve a world to play with until interrupted."""
    from .embedded.world import run_embedded_xen

    domains = []
    for word in args.domain or ["2:vtpm"]:
        domid, _, name = word.partition(":")
        if not domid.isdecimal():
            raise ConfigError(f"'{word}' is no ID:NAME")
        domains.append((int(domid), name or f"dom{domid}"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop_on_signals, nursery.cancel_scope.cancel)
        await run_embedded_xen(Path(args.world), domains)
    return 0


async def show_status(args: argparse.Namespace) -> int:
    """Print the JSON document that a status socket answers with."""
    import json

    try:
        stream = await trio.open_unix_socket(args.status_socket)
    except OSError as error:
        raise XenError(
            f"{args.status_socket}: {error.strerror}", next_step="is the bridge running?"
        ) from error
    raw = b""
    with trio.fail_after(5):
        async with stream:
            while chunk := await stream.receive_some():
                raw += chunk
    json.dump(json.loads(raw), sys.stdout, indent=2)
    print()
    return 0
