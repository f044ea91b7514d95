"""A run's folder: its checkpoints, which of them to go on from, and the lock that keeps other trainings out."""

import contextlib
import os
import platform
import threading
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from atomic_write import atomic_write
from checkpoints import generator_only, read_model_file, step_of
from command_line import UserError

NUMBERED = "[0-9][0-9][0-9][0-9]-*"  # the names that runs/ gives


def save_checkpoint(content, out, keep):
    """Write the dict of a full checkpoint, and its generator, into `out`; then drop all but `keep` checkpoints."""
    step = content["step"]
    for name, file in (("generator", generator_only(content)), ("checkpoint", content)):
        with atomic_write(out / f"{name}_{step:06d}.pt") as temporary, open(temporary, "wb") as opened:
            torch.save(file, opened)
    for old in [path for path in list_checkpoints(out) if step_of(path) <= step][keep:]:
        old.unlink()


@contextlib.contextmanager
def telling_what_is_kept(out):
    """Raise an OSError, such as that of a full disk, with one line: the file, what is kept in `out`, what to do."""
    hook = threading.excepthook  # TensorBoard writes in a thread; what ends it is raised here at the next write
    threading.excepthook = lambda args: isinstance(args.exc_value, OSError) or hook(args)
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error
        while cause.__context__ and not isinstance(cause, (OSError, KeyboardInterrupt)):
            cause = cause.__context__  # torch.save raises a RuntimeError over what has stopped it
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        if not isinstance(cause, OSError):
            raise
        whole = list_checkpoints(out)
        kept = f"make room and go on with --resume {out} from step {step_of(whole[0])}" if whole else (
            "no checkpoint is there yet: make room and start again")  # fmt: skip
        raise OSError(f"{cause.filename or out}: {cause.strerror or cause}; {kept}") from error
    finally:
        threading.excepthook = hook


def list_checkpoints(folder):
    """Return the full checkpoints in a run's folder, the newest first."""
    names = (path for path in folder.glob("checkpoint_*.pt") if step_of(path) >= 0)  # not checkpoint_006000-good.pt
    return sorted(names, key=step_of, reverse=True)


def newest_checkpoint(folder, check):
    """Return (path, file) of the newest checkpoint in a folder that passes check(file, path), else (None, None)."""
    for path in list_checkpoints(folder):
        try:
            file = read_model_file(path)
            check(file, path)
            return path, file
        except UserError as error:
            print(f"Passing over a damaged checkpoint: {error}", flush=True)
    return None, None


def newest_run():
    """Return the newest numbered folder in runs/, which "latest" means; runs/ itself where there is none."""
    return max(filter(Path.is_dir, Path("runs").glob(NUMBERED)), default=Path("runs"))  # not 0001-archive.zip


def find_resume(resume, out, check):
    """Return (path, file) of the checkpoint that --resume means, or (None, None) for a new run.

    Raises UserError where there is none that passes check(file, path), or --out is taken.
    """
    taken = out and list_checkpoints(Path(out))
    if resume is None:
        if taken:
            raise UserError(f"--out {out}: holds a run already; go on with --resume latest, or name another folder")
        return None, None
    folder = Path(resume)
    if resume in ("latest", "auto"):
        folder = Path(out) if out else newest_run()
    elif not folder.exists():
        raise UserError(f"--resume {resume}: no such checkpoint or run folder")
    elif taken and Path(out).resolve() != (folder.parent if folder.is_file() else folder).resolve():
        raise UserError(f"--out {out}: holds another run already; name a new folder to branch off into")
    if folder.is_file():
        file = read_model_file(folder)
        check(file, folder)
        newest = next(iter(list_checkpoints(folder.parent)), folder)
        if (taken or not out) and step_of(newest) > file["step"]:
            raise UserError(f"--resume {resume}: {newest.name} is newer; branch off with --out NEW_FOLDER")
        return folder, file
    path, file = newest_checkpoint(folder, check)
    if not file and (resume != "auto" or list_checkpoints(folder)):
        raise UserError(f"--resume {resume}: no checkpoint that can be read in {folder}; name another run's folder")
    return path, file


def new_run_folder(name):
    """Create and return runs/NUMBER-name with the next free number."""
    number = 1 + max((int(path.name[:4]) for path in Path("runs").glob(NUMBERED)), default=0)
    folder = Path("runs") / f"{number:04d}-{name}"
    try:
        folder.mkdir(parents=True)
    except FileExistsError:  # another run was faster
        return new_run_folder(name)
    return folder


@contextlib.contextmanager
def locked(out, is_new):
    """Make a run's folder and keep other trainings out; the operating system frees the lock when this process ends.

    Raises UserError where another one holds it, or where one has trained since `out` was seen to be free for a new run.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(out / ".lock"), out / ".owner"
    try:
        held = lock.acquire(timeout=0)
    except Timeout as error:
        by = owner.read_text() if owner.is_file() else "another process"
        raise UserError(f"--out {out}: {by} trains there already; stop it, or name another folder") from error
    with held:
        if is_new and list_checkpoints(out):
            raise UserError(f"--out {out}: another process has trained there meanwhile; go on with --resume {out}")
        owner.write_text(f"process {os.getpid()} on {platform.node()}")  # stays: it counts only while the lock is held
        yield
