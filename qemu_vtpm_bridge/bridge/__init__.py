"""QEMU's door to Xen's door."""
