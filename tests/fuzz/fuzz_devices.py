"""Coverage-guided fuzzing of the register devices with atheris.

    python -m tests.fuzz.fuzz_devices tis|crb [libFuzzer options] [corpus directory]

The input's first byte chooses family and buffer size, the rest is what `Player` does;
it checks the device after each step.  An input that breaks a promise ends the run and is
kept as a file.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(
    include=[f"qemu_vtpm_bridge.bridge.{name}" for name in ("tis", "crb", "device", "tis_states")]
):
    from qemu_vtpm_bridge.bridge.tpm import Family
    from tests.support.player import BUFFER_SIZES, Player

FAMILIES = tuple(Family)


def target(kind: str, data: bytes) -> int:
    """Play one input."""
    if not data:
        return 0
    family = FAMILIES[data[0] % 2]
    buffer_bytes = BUFFER_SIZES[data[0] // 2 % len(BUFFER_SIZES)]
    player = Player(kind, family, buffer_bytes)
    player.play(data[1:])
    return player.accesses


class Counter:
    """Counts what a run did; libFuzzer ends a run with _exit, so that it is printed on the way."""

    def __init__(self, kind: str) -> None:
        self.kind, self.inputs, self.accesses = kind, 0, 0

    def __call__(self, data: bytes) -> None:
        self.inputs += 1
        self.accesses += target(self.kind, data)
        if self.inputs % 1000 == 0:
            print(f"{self.kind}: {self.inputs} inputs, {self.accesses} accesses", flush=True)


def main() -> None:
    """Run libFuzzer; it does not return."""
    kind, *options = sys.argv[1:]
    if kind not in ("tis", "crb"):
        raise SystemExit(__doc__)
    atheris.Setup([sys.argv[0], *options], Counter(kind))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
