"""How a command ends when nobody reads what it prints, and that it refuses an empty path; a film stands for all."""

import subprocess
import sys

import pytest

import Interpolation


def test_command_does_its_job_though_nobody_reads_what_it_prints(tmp_path):
    flags = f"--out {tmp_path}/x.png --frames 2 --pace perceptual --device cpu".split()
    with subprocess.Popen([sys.executable, "-u", Interpolation.__file__, *flags], stdout=-1, stderr=-1) as process:
        process.stdout.close()  # as | head -0 does
        assert process.stderr.read() == b""
    assert process.returncode == 0 and (tmp_path / "x.png").is_file()


def test_error_is_one_line_whatever_the_name_in_it(capsys):
    assert Interpolation.main(["--model", "two\nlines.pt"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "--model two lines.pt" in message


@pytest.mark.parametrize("flag", ["--model", "--out"])
def test_empty_path_is_refused(capsys, flag):
    assert Interpolation.main([flag, ""]) == 2
    assert f"{flag}: the path is empty" in capsys.readouterr().err
