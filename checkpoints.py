"""Model files: the one place that knows how they are written, what is in them, and how to read them."""

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

import torch
from torch import nn

from command_line import UserError
from Generator import Generator

FORMAT = 1  # version of the files


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
        if error.errno and not error.filename:  # a full disk is told without
            error.filename = str(path)
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


def read_model_file(path):
    """Return the dict in a model file, with all tensors on the CPU; run nothing in it.

    Raises UserError for a file that is missing or torn or that neither this project nor the report wrote.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such model file")
    # The report's files are pickles of a class that was called as ours is. A bare module stands in for it.
    classes = [(nn.Module, "Generator.Generator"), nn.Linear, nn.ConvTranspose2d, nn.Conv2d, nn.BatchNorm2d]
    try:
        with torch.serialization.safe_globals(classes):
            file = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a torn or foreign file
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it names {named[1]}; nothing in it was run" if named else str(error).split(". ")[0].split("\n")[0]
        raise UserError(f"{path} is not a whole model file ({reason or type(error).__name__})") from error
    if isinstance(file, nn.Module):
        return convert_report_file(file, path)
    if not isinstance(file, dict) or "generator" not in file or "format" not in file:
        raise UserError(f"{path} is not a model file of this project: it has no generator")
    if file["format"] != FORMAT:
        raise UserError(f"{path} has format {file['format']}, this version reads format {FORMAT}")
    return file


def weights_of(file):
    """Return the state dict of a model file's generator: its EMA weights where there are some, else the raw ones."""
    return file.get("ema") or file["generator"]["state"]


def load_generator(source, device="cpu"):
    """Return the Generator in a model file, in eval mode and without gradients.

    source: a path, or the dict that read_model_file returned. Checkpoints, generator files and the report's files are
    built from the settings saved in them. Nothing in the file is executed.

    Raises UserError where the file is missing, torn, no such model, or not finite.
    """
    file = source if isinstance(source, dict) else read_model_file(source)
    name = "the model" if isinstance(source, dict) else source
    try:
        generator = Generator(**file["generator"]["config"])
        generator.load_state_dict(weights_of(file))
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).rpartition("\n")[2].strip()  # torch lists what does not fit, a line each
        raise UserError(f"{name} does not hold a generator that fits its own settings: {reason}") from error
    if not all(tensor.isfinite().all() for tensor in generator.state_dict().values()):
        raise UserError(f"{name} holds weights that are not finite; its training has diverged")
    return generator.to(device).eval().requires_grad_(False)


def step_of(path):
    """Return the step in a model file's name, the last number there; -1 without one."""
    return int((re.findall(r"\d+", path.stem) or [-1])[-1])


def convert_report_file(module, path):
    """Return the dict of a model file for `module`, which the report's code pickled whole and `path` held.

    The layers are the same under other names (linear, convT1 .. convT5, bn1 .. bn5, conv), and their numbers
    are taken as they are; `module` itself never runs. Its ngf is read from the layers, its step from the name.

    Raises UserError where the layers are not those of the report's 128 px generator.
    """
    keys = {"linear": "linear", "conv": "to_rgb.128"}
    for i, resolution in enumerate((8, 16, 32, 64, 128), start=1):
        keys |= {f"convT{i}": f"up.{resolution}.conv", f"bn{i}": f"up.{resolution}.norm"}
    try:
        layers = module._modules
        if set(layers) != set(keys):
            raise UserError(f"its layers are {', '.join(layers) or 'none'}")
        with torch.device("meta"):  # a plan without memory: it takes over the file's tensors below
            plan = Generator(layers["linear"].in_features, layers["convT4"].out_channels, stem_norm=False)
        state = {}
        for name, layer in layers.items():
            ours = plan.get_submodule(keys[name])
            if str(layer) != str(ours):  # kind, widths, kernel, stride, padding, bias, eps
                raise UserError(f"its {name} is {layer}, not {ours}")
            tensors = {**layer._parameters, **layer._buffers}
            state |= {f"{keys[name]}.{key}": tensor for key, tensor in tensors.items() if tensor is not None}
        plan.load_state_dict(state, assign=True)  # checks that all are there, and their shapes
    except (KeyError, TypeError, UserError, AttributeError, RuntimeError) as error:
        reason = str(error).rpartition("\n")[2].strip()
        raise UserError(f"{path} is a pickled module, but not the report's generator: {reason}") from error
    return {
        "format": FORMAT,
        "step": max(step_of(path), 0),
        "settings": plan.config | {"crop": "squash", "split": "all", "lipschitz": "clip", "norm": "batch"},
        "generator": {"config": plan.config, "state": dict(plan.state_dict())},
        "made_by": {"command": "the report's code, torch.save(model)", "data": "CelebA, img_align_celeba"},
    }
