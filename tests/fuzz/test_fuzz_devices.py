"""A short run of each fuzz target; FUZZ_SECONDS makes it longer."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = int(os.environ.get("FUZZ_SECONDS", "20"))

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("atheris") is None,
        reason="atheris is not installed: there is no wheel of it for this Python or machine",
    ),
    pytest.mark.timeout(SECONDS + 300),
]


@pytest.mark.parametrize("kind", ["tis", "crb"])
def test_P11_fuzzing_breaks_no_promise_of_a_device(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = subprocess.run(
        [
            *(sys.executable, "-m", "tests.fuzz.fuzz_devices", kind),
            *(f"-max_total_time={SECONDS}", "-max_len=1024", "-timeout=60"),
            *(f"-artifact_prefix={tmp_path}/", str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    report = result.stdout + result.stderr
    assert result.returncode == 0, report[-4000:]
    [*_, (inputs, accesses)] = re.findall(r"(\d+) inputs, (\d+) accesses", report)
    coverage = re.findall(r"cov: (\d+)", report)
    with capsys.disabled():
        print(f"\n{kind}: {inputs} inputs, {accesses} accesses, coverage {coverage[-1]}")
    assert int(accesses) > 1000
