"""The embedded Xen: a XenStore and a hypervisor stand-in for one machine without Xen.

Only the command line and the tests use it.  The programs under test do not know
that it is not Xen: they speak XenStore's wire protocol to a socket, and ask the
C shim's embedded implementation of the Xen operations for pages and ports.
"""
