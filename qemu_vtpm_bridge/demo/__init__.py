"""The demonstration: firmware and Linux guests use a TPM that lives in a vTPM domain.

It starts the programs as a person would, through the command line, each in a process of
its own, and watches them from outside: their status sockets, XenStore, the guest's
console.  Nothing else in the package uses it.
"""
