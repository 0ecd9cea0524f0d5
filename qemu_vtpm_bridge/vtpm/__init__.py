"""The other end: the vTPM domain, a tpmback for Linux on swtpm."""
