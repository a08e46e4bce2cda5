"""Live teachers, compiled."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
@pytest.mark.slow
def test_teachers_compiled_on_a_cpu_are_frozen():
    """Dynamo cannot trace the type checks of the tests, so in a process without them."""
    script = Path(__file__).parent / "helpers" / "frozen_teachers.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["check_features", "check_constants", "check_many", "check_student"]
