"""What Xen does, as checks that run against any Xen: `python -m tests.xen.conformance`.

Theory of operation.  A check is a function that makes requests and says what xenstored (the
C one of Xen 4.17), or Xen itself, answers; it stands in one registry (`registry.py`) under
its name.  `runner.py` runs checks and judges them by the table of known differences
(`differences.py`).  pytest runs the same checks against the embedded Xen and the real
daemons without Xen; inside a dom0 they need a plain Python and this package, no pytest.

docs/conformance.md says what is compared and lists the differences.
"""
