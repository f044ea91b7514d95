"""One way to write a file: whole or not at all, whatever ends the process meanwhile."""

import contextlib
import os
import re
import signal
import sys
import tempfile
import threading
import uuid
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, which has no such locks: there nothing is swept
    fcntl = None


def is_writable(folder):
    """Make a folder where it is missing, and return whether files can be written there."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder.stat().st_mode & 0o222 != 0  # root could write where it is marked read-only, but should not
    return False


@contextlib.contextmanager
def atomic_write(path):
    """Give a temporary path beside `path`, with its ending, to write a whole file to; then rename it to `path`.

    So `path` is old or new, also after kill -9 or an error, which is raised on. What killed processes left is removed.
    """
    path = Path(path)
    for left in path.parent.glob(".*.tmp-*") if fcntl else ():
        with contextlib.suppress(OSError):  # its process lives and has locked it, or it is gone, or not ours
            if re.search(r"\.tmp-[0-9a-f]{32}(\.\w+)?$", left.name) and left.is_file():
                with open(left, "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    left.unlink()
    temporary = path.with_name(f".{path.stem}.tmp-{uuid.uuid4().hex}{path.suffix}")
    try:
        with ending_on_signals(), open(temporary, "xb") if fcntl else contextlib.nullcontext() as file:
            with contextlib.suppress(OSError):  # of a file system without locks
                fcntl and fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process closes it or ends
            yield temporary
            with open(temporary, "rb+") as written:
                os.fsync(written.fileno())
            os.replace(temporary, path)
    except OSError as error:
        if error.errno and not error.filename:  # a full disk is told without
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def ending_on_signals():
    """Let SIGTERM and SIGHUP raise where they would kill at once, so that what is half written is removed."""
    is_main = threading.current_thread() is threading.main_thread()  # no other thread may set handlers
    numbers = [number for number in signal.Signals if number.name in ("SIGTERM", "SIGHUP") and is_main]
    numbers = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
