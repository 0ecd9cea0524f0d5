"""`python -m qemu_vtpm_bridge` is the command `qemu-vtpm-bridge`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
