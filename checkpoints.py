"""Model files: the one place that knows what is in them, where they lie, and how to read them."""

import re
import zipfile
from pathlib import Path

import torch
from torch import nn

from command_line import UserError
from Generator import Generator

FORMAT = 1  # version of the files
NETWORKS = ("generator", "critic", "projected", "identity", "frechet")  # each {config, state} in a file, or None


def read_model_file(path):
    """Return the dict in a model file, with all tensors on the CPU; run nothing in it.

    Raises UserError for a file that is missing or torn or that neither this project nor the report wrote.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such model file")
    check_zip(path)
    # The report's files are pickles of a class that was called as ours is. A bare module stands in for it.
    classes = [(nn.Module, "Generator.Generator"), nn.Linear, nn.ConvTranspose2d, nn.Conv2d, nn.BatchNorm2d]
    try:
        # meta: a layer that the pickle makes anew, rather than its tensors, takes no memory.
        with torch.serialization.safe_globals(classes), torch.device("meta"):
            file = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a torn or foreign file
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it names {named[1]}; nothing in it was run" if named else str(error).split(". ")[0].split("\n")[0]
        raise UserError(f"{path} is not a whole model file ({reason or type(error).__name__})") from error
    if isinstance(file, nn.Module):
        return convert_report_file(file, path)
    if not isinstance(file, dict) or not isinstance(file.get("generator"), dict) or "format" not in file:
        bare = isinstance(file, dict) and file and all(isinstance(value, torch.Tensor) for value in file.values())
        reason = "bare weights without the settings to build a network from" if bare else "no generator of this project"
        raise UserError(f"{path} holds {reason}; take a generator_*.pt or checkpoint_*.pt")
    if type(file["format"]) is not int or file["format"] != FORMAT:
        raise UserError(f"{path} has format {str(file['format'])[:9]}, this version reads format {FORMAT}")
    kinds = {"step": int, "settings": dict, "made_by": dict}
    networks = [name for name in NETWORKS if file.get(name) is not None]
    wrong = [name for name, kind in kinds.items() if not isinstance(file.get(name), kind | None)]
    wrong += [name for name in networks if not is_network(file[name])]
    wrong += [] if file.get("ema") is None or is_state(file["ema"]) else ["ema"]
    if wrong:
        raise UserError(f"{path} is damaged: its {wrong[0]} is not what it should be")
    for part in (file[name] for name in networks):
        if all(key.startswith("module.") for key in part["state"]):  # it was in DataParallel
            part["state"] = {key.removeprefix("module."): tensor for key, tensor in part["state"].items()}
    return file


def is_state(part):
    """Whether a part of a file is a state dict: tensors by their names."""
    return isinstance(part, dict) and all(type(key) is str and isinstance(t, torch.Tensor) for key, t in part.items())


def is_network(part):
    """Whether a part of a file is a network: the arguments it is built with, and its weights."""
    return isinstance(part, dict) and isinstance(part.get("config"), dict) and is_state(part.get("state"))


def check_zip(path):
    """Raise UserError unless the file is a whole zip as torch.save writes it: torch.load itself ignores checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            # Stored, not compressed: so reading takes no more memory than the file has bytes. And no member that is
            # marked as a folder, which torch would not read: its numbers would be what lay in memory before.
            stored = all(m.compress_type == zipfile.ZIP_STORED and not m.external_attr & 16 for m in archive.infolist())
            reason = None if stored and archive.testzip() is None else "its checksums are wrong"
            pickled = [archive.read(name) for name in archive.namelist() if not reason and name.endswith("data.pkl")]
            if b"bytearray\n" in b"".join(pickled):  # torch.load would make one of any length
                reason = "it names bytearray"
    except Exception:  # zipfile raises many types for a damaged file
        with open(path, "rb") as file:
            start = file.read(512).lstrip()
        reason = "it is a web page" if start.startswith(b"<") else "it is torn, or something else" if start else "empty"
    if reason:
        raise UserError(f"{path} is not a whole model file ({reason}); download or copy it again")


def check_like(value, example, where):
    """Raise UserError unless `value`, from a file, is built as `example` is: keys, types, shapes. where: its name."""
    if isinstance(example, dict):
        if not isinstance(value, dict) or value.keys() != example.keys():
            other = sorted(map(str, value.keys() ^ example.keys())) if isinstance(value, dict) else [str(type(value))]
            raise UserError(f"{where} is not what its settings make: {', '.join(other[:3])}")
        for key in example:
            check_like(value[key], example[key], f"{where}.{key}")
    elif isinstance(example, torch.Tensor):
        if not isinstance(value, torch.Tensor) or value.is_meta or value.layout != example.layout:
            raise UserError(f"{where} is no plain tensor")
        if value.shape != example.shape:
            raise UserError(f"{where} is not what its settings make")
        if value.is_floating_point() != example.is_floating_point() or not value.isfinite().all():
            raise UserError(f"{where} holds no finite numbers; its training has diverged, or the file is damaged")
    elif type(value) is not type(example):
        raise UserError(f"{where} is not of type {type(example).__name__}")


def check_network(kind, part, where):
    """Raise UserError unless the weights of a network in a file, {config, state}, fit its config. kind: its class."""
    try:
        with torch.device("meta"):  # a plan without memory, so that no file can ask for more than it holds
            plan = kind(**part["config"])
    except (UserError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise UserError(f"{where}: cannot be built from its settings ({str(error).splitlines()[0]})") from error
    check_like(part["state"], plan.state_dict(), where)


def weights_of(file):
    """Return the state dict of a model file's generator: its EMA weights where there are some, else the raw ones."""
    return file.get("ema") or file["generator"]["state"]


def generator_only(file):
    """Return what a generator file holds of any model file: one set of weights, and settings that tell no folders."""
    generator = {"config": file["generator"]["config"], "state": dict(weights_of(file))}
    settings = {name: base_names(value) for name, value in (file.get("settings") or {}).items()}
    made = {"settings": settings, "made_by": file.get("made_by") or {}}
    return {"format": FORMAT, "step": file.get("step"), **made, "generator": generator}


def base_names(value):
    """Return a setting or a word of a command, or a list of them, with paths cut to their last part."""
    if isinstance(value, list):
        return [base_names(part) for part in value]
    return re.sub(r"(?s)(^|=)[^=]*[/\\](?=.)", r"\1", value) if isinstance(value, str) else value


def load_generator(source, device="cpu", name="the model"):
    """Return the Generator in a model file, in eval mode and without gradients, built from what is saved there.

    source: a path, or the dict that read_model_file returned for `name`.
    Raises UserError where the file is missing, torn, no such model, or not finite.
    """
    file, name = (source, name) if isinstance(source, dict) else (read_model_file(source), source)
    check_network(Generator, file["generator"] | {"state": weights_of(file)}, f"{name}: generator")
    generator = Generator(**file["generator"]["config"])
    generator.load_state_dict(weights_of(file))
    return generator.to(device).eval().requires_grad_(False)


def step_of(path):
    """Return the step in the name of a checkpoint_N.pt, generator_N.pt (six digits or more) or report file, else -1.

    A number in any other name, such as mine_20240101.pt, is not a step, and that in generator_128.pt is a size.
    """
    name = path.name.split(".")[0]  # a download's goes on after .pt
    found = re.fullmatch(r"(?:checkpoint|generator)_(\d{6,})|generator_model_batch_(\d+)", name)
    return int(found[1] or found[2]) if found else -1


def list_models(folder):
    """Return the model files in a folder, by the steps in their names; raises UserError where there is none.

    Where a run has a checkpoint and a generator file of a step, it is the checkpoint: it also holds the critic.
    """
    files = sorted(folder.glob("*.pt"), key=lambda file: (step_of(file), file.name))
    if not files:
        raise UserError(f"{folder}: no model files (*.pt) in it; name a run's folder or model files")
    twins = {file.name.replace("checkpoint_", "generator_", 1) for file in files if file.name.startswith("checkpoint_")}
    return [file for file in files if file.name not in twins]


# ---- the report's files ---------------------------------------------------------------------------------------


def convert_report_file(module, path):
    """Return the dict of a model file for `module`, which the report's code pickled whole and `path` held.

    The layers are the same under other names, and their numbers are taken as they are; `module` itself never runs.
    Raises UserError where they are not those of the report's 128 px generator.
    """
    keys = {"linear": "linear", "conv": "to_rgb.128"}
    for i, resolution in enumerate((8, 16, 32, 64, 128), start=1):
        keys |= {f"convT{i}": f"up.{resolution}.conv", f"bn{i}": f"up.{resolution}.norm"}
    try:
        layers = module._modules
        if layers.keys() != keys.keys():
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
    settings = plan.config | {"crop": "squash", "split": "all", "loss": "wgan", "norm": "batch"}
    made_by = {"command": "the report's code, torch.save(model)", "data": "CelebA, img_align_celeba"}
    generator = {"config": plan.config, "state": dict(plan.state_dict())}
    return {"format": FORMAT, "step": max(step_of(path), 0), "settings": settings, "made_by": made_by,
            "generator": generator}  # fmt: skip
