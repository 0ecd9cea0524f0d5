"""A short run of the fuzz target for vfio-user connections; FUZZ_SECONDS makes it longer."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.test_fuzz_devices import SECONDS, pytestmark

__all__ = ["pytestmark"]


def test_fuzzing_finds_no_client_that_breaks_a_connection_s_rules(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = subprocess.run(
        [
            *(sys.executable, "-m", "tests.fuzz.fuzz_vfio_user"),
            *(f"-max_total_time={SECONDS}", "-max_len=2048", "-timeout=60"),
            *(f"-artifact_prefix={tmp_path}/", str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    report = result.stdout + result.stderr
    assert result.returncode == 0, report[-4000:]
    [*_, (inputs, answered)] = re.findall(r"(\d+) inputs, (\d+) frames", report)
    coverage = re.findall(r"cov: (\d+)", report)
    with capsys.disabled():
        print(f"\nvfio-user: {inputs} inputs, {answered} frames answered, coverage {coverage[-1]}")
    assert int(answered) > 100
