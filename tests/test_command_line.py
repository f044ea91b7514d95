"""How a command ends when it is killed, or when nobody reads what it prints; a film stands for all of them."""

import signal
import subprocess
import sys
import time

import pytest

import Interpolation


def start(out, *flags):
    command = [sys.executable, "-u", Interpolation.__file__, "--out", out, "--device", "cpu", *flags]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.skipif(sys.platform == "win32", reason="signals as Windows has none")
def test_killed_command_leaves_nothing_for_long(tmp_path):
    for sign, status in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        with start(tmp_path / "long.gif", "--frames", 2_000) as process:
            while process.poll() is None and not list(tmp_path.glob(".long*")):
                time.sleep(0.02)
            process.send_signal(sign)
        assert process.returncode == status and len(list(tmp_path.iterdir())) == (sign == signal.SIGKILL)
    assert Interpolation.main(["--out", str(tmp_path / "next.png"), "--frames", "1", "--device", "cpu"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["next.png"]


def test_command_does_its_job_though_nobody_reads_what_it_prints(tmp_path):
    with start(tmp_path / "x.png", "--frames", 2, "--pace", "perceptual") as process:
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
