"""A real Xen that boots in QEMU, without KVM, and what is tried in it."""
