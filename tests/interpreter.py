"""Run a test file in a process of its own under Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

TESTS = Path(__file__).parent


def run_interpreted(*arguments):
    """`pytest *arguments` in tests/, which must pass. A process: triton reads TRITON_INTERPRET when it is imported."""
    import triton

    if (
        tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
        and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0"
    ):
        pytest.skip("Triton 3.6's interpreter does not run on numpy 2.4")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-W", "error::UserWarning:lorasp", *arguments],
        env=environment | {"TRITON_INTERPRET": "1"},
        cwd=TESTS,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
