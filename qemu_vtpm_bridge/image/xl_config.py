"""The vTPM domain's xl.cfg."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .init import STATE_LABEL


@dataclass(frozen=True, slots=True)
class DomainWords:
    """What the configuration says."""

    name: str
    type: str
    kernel: Path
    ramdisk: Path
    memory_mib: int
    tpm: str
    state_disk: str
    """The disk in xl's words for a target: a file or a block device of domain 0."""
    state_uuid: str | None
    """The UUID of its file system; without one, the label is looked for."""
    trust_reset: tuple[int, ...] = ()

    @property
    def command_line(self) -> str:
        """The kernel's command line, which the domain's first program reads too.

        On a tmpfs the initramfs could fill half of the memory at most: hence ramfs.
        """
        disk = f"UUID={self.state_uuid}" if self.state_uuid else f"LABEL={STATE_LABEL}"
        words = [
            "console=hvc0",
            "quiet",
            "panic=5",
            "rootfstype=ramfs",
            f"vtpm.tpm={self.tpm}",
            f"vtpm.disk={disk}",
        ]
        words += [f"vtpm.trust-reset={domid}" for domid in self.trust_reset]
        return " ".join(words)


def xl_config(words: DomainWords) -> str:
    """Return the configuration."""
    pvh = ['tsc_mode = "native"'] if words.type == "pvh" else []
    lines = [
        "# A vTPM domain: one TPM, for one guest. Start it with `xl create -q THIS`, then",
        f"#     qemu-vtpm-bridge attach --backend {words.name} --guest GUEST",
        f"#     qemu-vtpm-bridge run --backend {words.name} --socket PATH",
        f'name = "{words.name}"',
        f'type = "{words.type}"',
        *pvh,
        f'kernel = "{words.kernel}"',
        f'ramdisk = "{words.ramdisk}"',
        "# The disk by its UUID: with another disk, or none, the domain says so and waits.",
        f'extra = "{words.command_line}"',
        f"memory = {words.memory_mib}",
        "vcpus = 1",
        "# The TPM is kept here and nowhere else. Two domains must never have it at a time.",
        f'disk = ["format=raw, vdev=xvda, access=rw, target={words.state_disk}"]',
        'on_poweroff = "destroy"',
        "# A TPM that crashed has lost its power: the guest's bridge finds out, and reconnects.",
        'on_reboot = "restart"',
        'on_crash = "restart"',
    ]
    return "\n".join(lines) + "\n"
