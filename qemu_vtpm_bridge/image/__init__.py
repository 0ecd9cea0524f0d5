"""A small bootable vTPM domain: `qemu-vtpm-bridge vtpm-image`.

Theory of operation.  `python_files.py` finds what our backend imports and
`shared_objects.py` the libraries that its programs load; `kernel.py` brings the kernel and
the modules that a domain needs; `init.py` is the domain's first program.  `build.py` packs
them, `state_disk.py` makes the disk that the TPM is kept on, `xl_config.py` writes the
domain's xl.cfg, and `command.py` is the command.  What they write gets its name when it is
whole (`aside.py`).  It runs on the machine that builds, as any user, and nothing else in the
package uses it.
"""
