import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.skipif(sys.platform == "win32", reason="no fork there")
@pytest.mark.parametrize(("program", "rounds"), [("kill.py", 6), ("fuzz.py", 20)])
def test_a_reduced_round_of_the_campaigns_finds_nothing(program, rounds):
    argv = [sys.executable, TESTS / program, "--rounds", str(rounds), "--seed", "7000"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
