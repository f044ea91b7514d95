"""One way to write a file: whole or not at all, whatever ends the process meanwhile."""

import contextlib
import os
import re
import signal
import sys
import threading
import uuid
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, which has no such locks: there nothing is swept
    fcntl = None


@contextlib.contextmanager
def atomic_write(path):
    """Give a temporary path beside `path`, with its ending, to write a whole file to; then rename it to `path`.

    So `path` is old or new, never torn, also after kill -9, and a good file survives an error, which is raised on.
    What killed processes left in the folder is removed.
    """
    path = Path(path)
    remove_dead(path.parent)
    temporary = path.with_name(f".{path.stem}.tmp-{uuid.uuid4().hex}{path.suffix}")
    try:
        with ending_on_signals(), open(temporary, "xb") if fcntl else contextlib.nullcontext() as file:
            is_locked(file)  # until the file is closed, by us or by the end of this process
            yield temporary
            with open(temporary, "rb+") as written:
                os.fsync(written.fileno())
            os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or path  # a full disk is told without
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_dead(folder):
    """Remove the temporaries in a folder whose process has ended, however it did."""
    for left in folder.glob(".*.tmp-*") if fcntl else ():
        with contextlib.suppress(OSError):  # another process was faster, or it is not ours to open
            if re.search(r"\.tmp-[0-9a-f]{32}(\.\w+)?$", left.name) and left.is_file():
                with open(left, "rb") as file:
                    if not is_locked(file):
                        left.unlink()


def is_locked(file):
    """Whether another process holds the lock of an open file; if none does, hold it. Some file systems have none."""
    try:
        fcntl and fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


@contextlib.contextmanager
def ending_on_signals():
    """Let SIGTERM and SIGHUP raise where they would kill at once, so that what is half written is removed."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    is_main = threading.current_thread() is threading.main_thread()  # no other thread may set handlers
    numbers = [number for number in numbers if is_main and signal.getsignal(number) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
