"""Gives an unmodified QEMU the TPM of a Xen vTPM domain.

The package imports nothing here, so that a tool which needs one pure-Python
part of it (a register device, say) does not need the compiled shim.
"""

__version__ = "0.1.0"
