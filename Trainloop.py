"""Train the Wasserstein GAN: python Trainloop.py --data img_align_celeba.zip

A step is one update of the generator, preceded by --n-critic updates of the critic. Everything random in a
step is a pure function of (seed, step), so a run that is stopped and resumed equals one that never stopped.

On several GPUs, or machines: torchrun --nproc-per-node 8 Trainloop.py --data img_align_celeba.zip
"""

import argparse
import contextlib
import copy
import math
import os
import platform
import re
import shlex
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from tqdm import tqdm

from checkpoints import FORMAT, read_model_file, step_of
from command_line import is_out_of_memory
from Critic import NORMS, Critic, clip_weights, critic_loss, generator_loss, gradient_penalty
from Dataset import add_data_flags, batch_indices, estimate_pack, open_data, seeded
from device import add_device_flag, pick_device, prepare, resolve_precision
from Generator import BLOCKS, SIZES, Generator, check_parts, latent, to_uint8

PRESETS = {
    # What the report's published models were trained with.
    "report": {
        "size": 128, "crop": "squash", "split": "all", "flip": False, "nz": 100, "ngf": 128, "ndf": 128,
        "stem_norm": False, "norm": "batch", "lipschitz": "clip", "clip": 0.01, "n_critic": 1, "batch_size": 32,
        "optimizer": "adam", "lr_g": 5e-5, "lr_d": 5e-5, "betas": [0.9, 0.999], "ema": 0.0, "precision": "fp32",
        "steps": 3_924_000, "log_every": 50, "checkpoint_every": 6000,
    },
    # Something to look at after about five minutes on two CPU cores.
    "quick": {
        "size": 64, "ngf": 16, "ndf": 16, "batch_size": 16, "n_critic": 1, "lr_g": 4e-4, "lr_d": 8e-4, "ema": 0.99,
        "steps": 1500, "log_every": 25, "sample_every": 100, "checkpoint_every": 500,
    },
}  # fmt: skip
NUMBERED = "[0-9][0-9][0-9][0-9]-*"  # the names that runs/ gives
# Settings that a resumed run may change: they change where, how long and how fast, not what is trained.
FREE = {"data", "cache", "workers", "device", "out", "resume", "preset", "steps", "keep", "dry_run",
        "checkpoint_every", "log_every", "sample_every", "cuda_graphs"}  # fmt: skip
# Of these, what the checkpoint does not hand on to the resumed run.
NOT_RESTORED = {"workers", "device", "out", "resume", "preset", "dry_run", "cuda_graphs"}
SAMPLES = 32  # faces in a sample grid: cell i is the face of seed i


def build_parser():
    """Every setting is declared here once: its flag, default and help, and its name in the checkpoint."""
    # Without a usage line an argparse error is one line.
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Train a Wasserstein GAN on faces. A step is one update of the generator.",
    )  # fmt: skip
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), help="report: the report's recipe; quick: five minutes on a laptop's CPU; "
        "a flag beside it wins%(default).0s")  # fmt: skip
    add_data_flags(parser.add_argument_group("images"))
    add = parser.add_argument_group("networks").add_argument
    add("--size", type=int, default=128, choices=SIZES, help="side of the images in pixels")
    add("--nz", type=int, default=100, help="length of the latent vector")
    add("--ngf", type=int, default=64, help="width of the generator: its channels at 64x64")
    add("--ndf", type=int, default=64, help="width of the critic: its channels at 64x64")
    add("--stem-norm", action=argparse.BooleanOptionalAction, default=True,
        help="BatchNorm and ReLU after the generator's linear layer")  # fmt: skip
    add("--norm", choices=NORMS, default="layer", help="normalisation in the critic; batch only with --lipschitz clip")
    add("--blocks", choices=list(BLOCKS), default="plain", help="plain: the report's convolutions with stride; "
        "residual: deeper, twice the convolutions, resized instead of transposed")  # fmt: skip
    add("--attention", type=int, default=0, metavar="R", help="resolution of a self-attention layer in both networks; "
        "0: none")  # fmt: skip
    add("--grow-from", metavar="PATH", help="checkpoint of half the --size, whose networks are taken over and grown by "
        "one block each%(default).0s")  # fmt: skip
    add("--fade-steps", type=int, default=2000, help="steps over which the blocks of --grow-from are faded in")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=int, default=100_000, help="total number of steps, those before a resume included")
    add("--batch-size", type=int, default=32, help="images in a batch, that of all processes together")
    add("--n-critic", type=int, default=1, help="critic updates in a step")
    add("--lipschitz", choices=["gp", "clip"], default="gp", help="gradient penalty or weight clipping")
    add("--gp", type=float, default=10.0, help="factor of the gradient penalty")
    add("--clip", type=float, default=0.01, help="bound of the critic's weights with --lipschitz clip")
    add("--optimizer", choices=["adam", "rmsprop"], default="adam", help="for both networks")
    add("--betas", type=float, nargs=2, default=[0.0, 0.9], help="Adam's decay rates")
    add("--lr-g", type=float, default=2e-4, help="learning rate of the generator")
    add("--lr-d", type=float, default=4e-4, help="learning rate of the critic")
    add("--ema", type=float, default=0.999, help="decay of the moving average of the generator's weights; 0: none")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror half of the images")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 where the device has it")
    add("--seed", type=int, default=0, help="chooses initial weights, order of the images, latents and flips")
    add = parser.add_argument_group("run").add_argument
    add("--out", metavar="DIR", help="the run's folder (default: runs/ and the next number)%(default).0s")
    add("--resume", metavar="PATH|latest|auto", help="go on from a checkpoint or run folder; latest: the newest in "
        "--out or, without it, in runs/; auto: the same where there is one, else start%(default).0s")  # fmt: skip
    add("--checkpoint-every", type=int, default=6000, help="steps between checkpoints; each also keeps the generator")
    add("--keep", type=int, default=2, help="full checkpoints kept; generators are all kept")
    add("--log-every", type=int, default=50, help="steps between scalars")
    add("--sample-every", type=int, default=1000, help="steps between sample grids")
    add("--cuda-graphs", action=argparse.BooleanOptionalAction, default=False,
        help="replay each update as one CUDA graph, on one NVIDIA GPU; to be given again on a resume")  # fmt: skip
    add("--dry-run", action="store_true", help="print parameters, memory, disk and expected hours, and stop")
    add_device_flag(parser.add_argument_group("run on"))
    return parser


def read_settings(argv=None):
    """Return (settings, checkpoint file or None, its path or None): defaults < preset < checkpoint < given flags.

    Raises ValueError or FileNotFoundError for settings that are impossible or contradict the checkpoint.
    """
    parser = build_parser()
    defaults = vars(parser.parse_args([]))
    # argparse leaves alone what a namespace already has, so what is no longer None was given by the user.
    parsed = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults))))
    given = {name: value for name, value in parsed.items() if value is not None}
    asked = PRESETS.get(given.get("preset"), {}) | given

    path, checkpoint = find_resume(given.get("resume"), given.get("out"))
    saved = {}
    if checkpoint:
        # An older file lacks the settings that came later; it was trained with what is their default now.
        saved = {name: value for name, value in (defaults | checkpoint["settings"]).items() if name not in NOT_RESTORED}
        for name, value in asked.items():
            if name not in FREE and saved[name] != value and (name, value) != ("precision", "auto"):
                raise ValueError(
                    f"{flag(name)} {value}: the run in {path} was trained with {flag(name)} {saved[name]}; "
                    "leave the flag out to go on, or start a new run with another --out"
                )
    if asked.get("grow_from") and not checkpoint:
        asked |= settings_of_grown(given)
    settings = argparse.Namespace(**(defaults | asked | saved | given))
    if saved:
        settings.precision = saved["precision"]
    settings.out = given.get("out") or (str(path.parent) if path else None)
    check_settings(settings)
    return settings, checkpoint, path


def settings_of_grown(given):
    """Return the settings that the file of --grow-from decides: its architecture, and twice its size.

    Raises ValueError where a given flag contradicts them, or the file cannot be grown.
    """
    path = given["grow_from"]
    file = read_model_file(path)
    if "critic" not in file:
        raise ValueError(f"--grow-from {path}: holds no critic; take a checkpoint_*.pt")
    if file["generator"]["state"].get("fade", 1) < 1:
        raise ValueError(f"--grow-from {path}: is itself still fading in; train it beyond its --fade-steps first")
    config = file["generator"]["config"] | file["critic"]["config"]
    config = {name: value for name, value in config.items() if name not in ("nc", "grown")}
    config["size"] *= 2
    for name, value in config.items():
        if given.get(name, value) != value:
            raise ValueError(f"{flag(name)} {given[name]}: --grow-from {path} was trained for {flag(name)} "
                             f"{value // 2 if name == 'size' else value} and gives {flag(name)} {value}")  # fmt: skip
    return config


def flag(name):
    return "--" + name.replace("_", "-")


def check_settings(settings):
    """Raise ValueError, naming flag and value, for numbers that make no sense."""
    for name in ("nz", "ngf", "ndf", "steps", "batch_size", "n_critic", "lr_g", "lr_d", "clip", "keep",
                 "checkpoint_every", "log_every", "sample_every", "workers"):  # fmt: skip
        if not 0 < getattr(settings, name) < math.inf:
            raise ValueError(f"{flag(name)} {getattr(settings, name)}: must be a number above 0")
    for name, values in (("betas", settings.betas), ("ema", [settings.ema])):
        if not all(0 <= value < 1 for value in values):
            raise ValueError(f"{flag(name)} {' '.join(map(str, values))}: must be at least 0 and below 1")
    if settings.fade_steps < 0:
        raise ValueError(f"--fade-steps {settings.fade_steps}: must not be negative")
    check_parts(settings.size, settings.blocks, settings.attention, grown=bool(settings.grow_from))
    if not 0 <= settings.gp < math.inf:
        raise ValueError(f"--gp {settings.gp}: must not be negative")
    latent(settings.seed)  # refuses a seed that would repeat another one
    if settings.lipschitz == "gp" and settings.norm == "batch":
        gradient_penalty(Critic(1, 3, 32, "batch"), None, None, None)  # raises, with the reason


# ---- state and checkpoints ------------------------------------------------------------------------------------


@dataclass
class State:
    """All that training changes."""

    generator: Generator
    critic: Critic
    ema: Generator | None
    optim_g: torch.optim.Optimizer
    optim_d: torch.optim.Optimizer
    step: int = 0
    # The networks again, wrapped to average their gradients over the ranks, or None where there is but one process.
    # What is saved are the networks themselves: so a file does not tell how many ranks wrote it.
    ddp_generator: nn.Module | None = None
    ddp_critic: nn.Module | None = None


def build_state(settings, device):
    """Return the State of step 0. The initial weights depend on the seed alone, not on the device."""
    torch.manual_seed(settings.seed)
    shared = settings.blocks, settings.attention, bool(settings.grow_from)
    generator = Generator(settings.nz, settings.ngf, 3, settings.size, settings.stem_norm, *shared)
    critic = Critic(settings.ndf, 3, settings.size, settings.norm, *shared)
    generator.to(device, memory_format=torch.channels_last)
    critic.to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(generator).eval().requires_grad_(False) if settings.ema else None

    def optimizer(network, lr):
        if settings.optimizer == "rmsprop":
            return torch.optim.RMSprop(network.parameters(), lr, foreach=True)
        return torch.optim.Adam(network.parameters(), lr, tuple(settings.betas), fused=device.type != "mps")

    state = State(generator, critic, ema, optimizer(generator, settings.lr_g), optimizer(critic, settings.lr_d))
    if under_torchrun():
        state.ddp_generator, state.ddp_critic = spread_over_ranks(generator), spread_over_ranks(critic)
    return state


def checkpoint_of(state, settings, made_by, history=()):
    """Return the full checkpoint as a dict of plain tensors and plain types. history: noted and not logged yet."""
    return {
        "format": FORMAT,
        "step": state.step,
        "settings": vars(settings),
        "generator": {"config": state.generator.config, "state": state.generator.state_dict()},
        "critic": {"config": state.critic.config, "state": state.critic.state_dict()},
        "ema": state.ema.state_dict() if state.ema else None,
        "optim_g": state.optim_g.state_dict(),
        "optim_d": state.optim_d.state_dict(),
        "rng": {"torch": torch.get_rng_state()},
        "history": torch.stack(history).cpu() if history else torch.empty(0, 6),
        "made_by": made_by,
    }


def restore(state, checkpoint):
    """Load a checkpoint into `state`."""
    state.generator.load_state_dict(checkpoint["generator"]["state"])
    state.critic.load_state_dict(checkpoint["critic"]["state"])
    if state.ema:
        state.ema.load_state_dict(checkpoint["ema"])
    state.optim_g.load_state_dict(checkpoint["optim_g"])
    state.optim_d.load_state_dict(checkpoint["optim_d"])
    for group in (*state.optim_g.param_groups, *state.optim_d.param_groups):
        group["capturable"] = False  # as the file has it where it was written by a run with --cuda-graphs
    torch.set_rng_state(checkpoint["rng"]["torch"])
    state.step = checkpoint["step"]


def history_of_commands(file, command):
    """Return all commands that made a model, a line each: those that made `file`, then the one that goes on from it."""
    before = (file.get("made_by") or {}).get("command", "")
    return before if before.endswith(command) else f"{before}\n{command}".strip()


def grow(state, path):
    """Take over all blocks of the networks of half the size in a model file, by their names; the rest stays new.

    Returns the file. Raises ValueError where its networks do not fit.
    """
    file = read_model_file(path)
    parts = [(state.generator, file["generator"]["state"]), (state.critic, file["critic"]["state"])]
    if state.ema:
        parts.append((state.ema, file.get("ema") or file["generator"]["state"]))
    for network, smaller in parts:
        try:
            missing, _ = network.load_state_dict(smaller, strict=False)
        except RuntimeError as error:  # shapes that differ
            raise ValueError(f"--grow-from {path}: {str(error).splitlines()[-1].strip()}") from error
        new = {f"up.{network.size}", f"to_rgb.{network.size}", f"down.{network.size // 2}", f"from_rgb.{network.size}"}
        lost = [key for key in missing if ".".join(key.split(".")[:2]) not in new | {"fade"}]
        if lost:
            raise ValueError(f"--grow-from {path}: lacks {', '.join(lost)}")
    return file


def set_fade(state, settings):
    """Set how far the newest blocks are faded in at the step that comes: 0 at the first, 1 after --fade-steps."""
    fade = min(1.0, state.step / settings.fade_steps) if settings.fade_steps else 1.0
    for network in (state.generator, state.critic, state.ema):
        if network is not None and network.fade is not None:
            network.fade.fill_(fade)


def save_atomically(content, path):
    """torch.save under a temporary name, then rename: `path` is either whole or absent, also after kill -9."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"could not write {path} ({error}); the checkpoints before it are whole: make room and go on with "
            f"--resume {path.parent}"
        ) from error


def save_checkpoint(content, out, keep):
    """Write checkpoint_STEP.pt and generator_STEP.pt into the folder `out`, then drop all but the last `keep`.

    Returns the path of the checkpoint.
    """
    step, average = content["step"], content["ema"] or content["generator"]["state"]
    shared = {name: content[name] for name in ("format", "step", "settings", "made_by")}
    shared["generator"] = {"config": content["generator"]["config"], "state": average}
    save_atomically(shared, out / f"generator_{step:06d}.pt")
    save_atomically(content, out / f"checkpoint_{step:06d}.pt")
    for old in [path for path in list_checkpoints(out) if step_of(path) <= step][keep:]:
        old.unlink()
    return out / f"checkpoint_{step:06d}.pt"


def snapshot(value):
    """Return a copy of nested dicts and lists whose tensors lie in the CPU's memory and no longer change."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, list):
        return [snapshot(item) for item in value]
    return value


def list_checkpoints(folder):
    """Return the full checkpoints in a run's folder, the newest first."""
    return sorted(folder.glob("checkpoint_[0-9]*.pt"), key=step_of, reverse=True)


def newest_checkpoint(folder):
    """Return (path, file) of the newest whole checkpoint in a run's folder, or (None, None)."""
    for path in list_checkpoints(folder):
        try:
            return path, read_model_file(path)
        except ValueError as error:
            print(f"Passing over a torn checkpoint: {error}")
    return None, None


def find_resume(resume, out):
    """Return (path, file) of the checkpoint that --resume means, or (None, None) for a new run.

    Raises FileNotFoundError where there is none to go on from, ValueError where --out is taken.
    """
    taken = out and list_checkpoints(Path(out))
    if resume is None:
        if taken:
            raise ValueError(f"--out {out}: holds a run already; go on with --resume latest, or name another folder")
        return None, None
    if resume in ("latest", "auto"):
        runs = [Path(out)] if out else sorted(Path("runs").glob(NUMBERED), reverse=True)
    else:
        runs = [Path(resume)]
        if not runs[0].exists():
            raise FileNotFoundError(f"--resume {resume}: no such checkpoint or run folder")
        folder = runs[0].parent if runs[0].is_file() else runs[0]
        if taken and Path(out).resolve() != folder.resolve():
            raise ValueError(f"--out {out}: holds another run already; name a new folder to branch off into")
        if runs[0].is_file():
            file = read_model_file(resume)
            if "optim_g" not in file:
                raise ValueError(f"--resume {resume}: holds a generator alone; resume from a checkpoint_*.pt")
            newest = max(list_checkpoints(folder), key=step_of, default=runs[0])
            if (taken or not out) and step_of(newest) > file["step"]:
                raise ValueError(f"--resume {resume}: {newest.name} is newer; branch off with --out NEW_FOLDER")
            return runs[0], file
    for run in runs:
        path, file = newest_checkpoint(run)
        if file:
            return path, file
    if resume == "auto" and not taken:
        return None, None
    where = out or f"runs/{NUMBERED}" if resume in ("latest", "auto") else resume
    raise FileNotFoundError(f"--resume {resume}: no checkpoint in {where}; name a run's folder or a checkpoint_*.pt")


def new_run_folder(dataset_name, settings):
    """Create and return runs/NUMBER-NAME with the next free number."""
    Path("runs").mkdir(exist_ok=True)
    while True:
        number = 1 + max((int(p.name[:4]) for p in Path("runs").glob(NUMBERED)), default=0)
        folder = Path("runs") / f"{number:04d}-{dataset_name}-{settings.size}px-{settings.lipschitz}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:  # another run was faster
            continue


def open_run_folder(dataset_name, settings):
    """Return the run's folder, as a string; it is there then, and holds nothing half-written."""
    out = Path(settings.out or new_run_folder(dataset_name, settings))
    out.mkdir(parents=True, exist_ok=True)
    for left in out.glob(".*.tmp"):  # half-written by a process that was killed
        left.unlink()
    return str(out)


# ---- several processes ----------------------------------------------------------------------------------------
# torchrun starts one process for each GPU, a rank, and each does the same steps on its share of every batch. Rank 0
# alone decides, shows and writes. Without torchrun there is one rank, and nothing here does anything.


def under_torchrun():
    """Whether this process is one of the ranks that torchrun started, and has joined them."""
    return dist.is_available() and dist.is_initialized()


def rank():
    """Return this process's number: 0 .. number of ranks - 1."""
    return dist.get_rank() if under_torchrun() else 0


def join_ranks():
    """Join the other processes if torchrun started this one. Of ranks above 0 nothing but errors is seen from then on.

    Raises ValueError or dist.DistError where they cannot be reached.
    """
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        return
    # With CUDA both: tensors on the GPU travel by NCCL, and the small messages below, which are on the CPU, by gloo.
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends


def pick_rank_device(name):
    """Return the torch.device that the value of --device names; under torchrun the CPU or this rank's own GPU.

    Raises ValueError where the machine lacks that device.
    """
    if not under_torchrun():
        return pick_device(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device(name)
    if name != "cuda":
        raise ValueError(f"--device {name}: under torchrun each process has a GPU of its own; choose auto, cuda or cpu")
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= count:
        raise ValueError(
            f"--device cuda: no GPU for local rank {local}, this machine has {count}; start fewer processes with "
            "torchrun's --nproc-per-node, or use --device cpu"
        )
    return torch.device(name, local)


def share_of_batch(batch_size):
    """Return the slice of a batch that is this rank's: contiguous, of the same length on all ranks.

    Raises ValueError where the batch cannot be divided so.
    """
    ranks = dist.get_world_size() if under_torchrun() else 1
    if batch_size % ranks:
        raise ValueError(f"--batch-size {batch_size}: cannot be shared evenly by {ranks} processes; use a multiple")
    share = batch_size // ranks
    return slice(rank() * share, (rank() + 1) * share)


@contextlib.contextmanager
def ending_together(group=None):
    """A block at whose end all ranks wait for each other; where it fails on one or more, all end, and one tells why.

    The lowest rank that failed raises its error, all others SystemExit with the same status, once that rank has
    ended. Within the block nothing may be exchanged between the ranks.
    """
    if not under_torchrun():
        yield
        return
    error = status = None
    try:
        yield
    except (Exception, SystemExit) as caught:
        error = caught
        status = caught.code if isinstance(caught, SystemExit) else 1
        status = 2 if isinstance(caught, (ValueError, FileNotFoundError)) else status
    statuses = [None] * dist.get_world_size()
    dist.all_gather_object(statuses, status, group)
    failed = [number for number, code in enumerate(statuses) if code is not None]
    if not failed:
        return
    if rank() == failed[0]:
        raise error
    # torchrun kills all others as soon as one has ended with an error. So wait, in vain, until that rank's
    # connections close: then it has told why.
    with contextlib.suppress(RuntimeError):
        dist.all_gather_object(statuses, None, group)
    raise SystemExit(statuses[failed[0]])


def from_rank_0(function, *args):
    """Return function(*args) as it is on rank 0, which alone calls it. The result must be picklable."""
    with ending_together():
        result = [function(*args) if rank() == 0 else None]
    if under_torchrun():
        dist.broadcast_object_list(result, src=0)
    return result[0]


def read_settings_once(argv):
    """Return what read_settings does. Under torchrun rank 0 decides what to resume, and all read that file.

    Raises as read_settings does, and ValueError for a batch that the ranks cannot share.
    """
    if not under_torchrun():
        return read_settings(argv)

    def decide():
        settings, _, path = read_settings(argv)
        share_of_batch(settings.batch_size)
        return settings, path

    settings, path = from_rank_0(decide)
    with ending_together():
        return settings, read_model_file(path) if path else None, path


def open_data_once(settings):
    """Return the data set. Under torchrun one rank of each machine packs it, then the others find it packed.

    Raises as open_data does, and ValueError where a machine has other images than the first.
    """
    # Packing takes as long as it takes, so this wait has a limit of its own: torch's is half an hour. A rank that
    # dies meanwhile ends the wait at once, as its connections close.
    group = dist.new_group(backend="gloo", timeout=timedelta(days=7)) if under_torchrun() else None
    packs = not under_torchrun() or os.environ["LOCAL_RANK"] == "0"
    for turn in (True, False):
        with ending_together(group):
            if packs == turn:
                dataset = open_data(settings.data, settings.size, settings.crop, settings.split, settings.cache,
                                    settings.workers, quiet=rank() > 0)  # fmt: skip
    expected = from_rank_0(lambda: dataset.fingerprint)
    with ending_together():
        if dataset.fingerprint != expected:
            raise ValueError(f"--data {' '.join(dataset.paths)}: holds other images here than for rank 0")
    return dataset


class SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks, on each of them; the gradient of that is the sum of their gradients."""

    @staticmethod
    def forward(ctx, tensor):
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return SumOverRanks.apply(gradient)


def mean_over_ranks(tensor):
    """Return the mean of a tensor over all ranks; all must call it, with the same shape."""
    return SumOverRanks.apply(tensor) / dist.get_world_size() if under_torchrun() else tensor


class BatchNormOverRanks(nn.BatchNorm2d):
    """BatchNorm2d over the batches of all ranks together: (N, C, H, W) -> (N, C, H, W), N the same on all.

    torch's own nn.SyncBatchNorm takes no tensors on the CPU. In eval mode nothing is exchanged.
    """

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        values = x.float()  # (N, C, H, W)
        mean = mean_over_ranks(values.mean((0, 2, 3)))  # (C,)
        # Around the mean, so at the price of a second message: E[x^2] - E[x]^2 loses digits where the mean is large.
        centred = values - mean[:, None, None]  # (N, C, H, W)
        variance = mean_over_ranks(centred.square().mean((0, 2, 3)))  # (C,)
        with torch.no_grad():
            count = x.numel() // x.shape[1] * dist.get_world_size()  # numbers that each mean is over
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = torch.rsqrt(variance + self.eps) * self.weight  # (C,)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def spread_over_ranks(network):
    """Let the BatchNorms in `network` see the batches of all ranks. Returns a wrapper that averages its gradients.

    Its parameters and the names in its state dict stay the same.
    """
    if next(network.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
    else:
        for module in network.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = BatchNormOverRanks  # it has the same state, and only computes it otherwise
    wrapper = nn.parallel.DistributedDataParallel(network)
    # Every rank comes to the same buffers by itself, BatchNorm's from the same sums: to send rank 0's before each
    # forward would be for nothing. Set here, because newer versions of torch deprecate the argument of this name.
    wrapper.broadcast_buffers = False
    return wrapper


def agree_on_stop(signals):
    """Return the signal that ends the run after this step, whichever rank it reached; 0 if none did.

    signals: the numbers of those that reached this rank. The message is on the CPU, so it never waits for the GPU.
    """
    number = torch.tensor(signals[0] if signals else 0)
    if under_torchrun():
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def leave_ranks():
    """Wait until all ranks are done, and leave them.

    torchrun kills all others as soon as one has ended with a status that is not 0, as it is after a signal.
    """
    with ending_together():
        pass
    if under_torchrun():
        dist.destroy_process_group()


def is_lost_rank(error):
    """Whether a RuntimeError says that another rank is gone."""
    # What gloo throws in the midst of a message is a plain RuntimeError, with the place in its source.
    gloo = under_torchrun() and re.search("gloo|NCCL", str(error))
    return bool(gloo) or dist.is_available() and isinstance(error, dist.DistError)


# ---- one step -------------------------------------------------------------------------------------------------


def draw_noise(settings, step):
    """Return all random numbers of a step, drawn on the CPU from (seed, step), so that they are the same everywhere.

    z: (n_critic + 1, B, nz) latents, the last for the generator.  epsilon: (n_critic, B, 1, 1, 1) in [0, 1).
    flip: (n_critic, B, 1, 1, 1) bool.
    """
    random, n, b = seeded(settings.seed, 1, step), settings.n_critic, settings.batch_size
    return {
        "z": torch.randn(n + 1, b, settings.nz, generator=random),
        "epsilon": torch.rand(n, b, 1, 1, 1, generator=random),
        "flip": (torch.rand(n, b, 1, 1, 1, generator=random) < 0.5) & settings.flip,
    }


def critic_step(state, settings, real, z, epsilon):
    """Update the critic once. real: (B, 3, S, S) in [-1, 1]; z: (B, nz); epsilon: (B, 1, 1, 1).

    Returns (loss, Wasserstein estimate, gradient penalty, norm of the gradient), each a scalar on the device. Under
    torchrun B counts this rank's share of the batch, and all but the norm are about that share.
    """
    critic = state.ddp_critic or state.critic
    autocast = torch.autocast(real.device.type, torch.bfloat16, enabled=settings.precision == "bf16")
    with torch.no_grad(), autocast:
        fake = state.generator(z)  # (B, 3, S, S); without a graph, since only the critic learns here
    penalty = real.new_zeros(())
    if settings.lipschitz == "gp":
        # A backward pass of its own: the gradients add up, and the graphs are never in memory together. The ranks
        # exchange them after the other pass, since no bias has a part in the penalty, and DDP waits for all weights.
        with critic.no_sync() if state.ddp_critic else contextlib.nullcontext():
            with autocast:
                penalty = gradient_penalty(critic, real, fake, epsilon)
            (settings.gp * penalty).backward()
    with autocast:
        loss = critic_loss(critic(real), critic(fake))
    loss.backward()
    norm = gradient_norm(state.critic)
    state.optim_d.step()
    state.optim_d.zero_grad()  # now, not before the next one: they would lie about while the other network learns
    if settings.lipschitz == "clip":
        clip_weights(state.critic, settings.clip)
    loss, penalty = loss.detach(), penalty.detach()
    return loss + settings.gp * penalty, -loss, penalty, norm


def generator_step(state, settings, z):
    """Update the generator once. z: (B, nz). Returns (loss, images (B, 3, S, S), norm of the gradient)."""
    state.critic.requires_grad_(False)  # its weight gradients would be computed and thrown away
    with torch.autocast(z.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
        fake = (state.ddp_generator or state.generator)(z)  # (B, 3, S, S)
        loss = generator_loss(state.critic(fake))
    loss.backward()
    norm = gradient_norm(state.generator)
    state.optim_g.step()
    state.optim_g.zero_grad()
    state.critic.requires_grad_(True)
    return loss.detach(), fake.detach(), norm


def gradient_norm(network):
    """L2 norm of all gradients of a network, a scalar."""
    return torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])


@torch.no_grad()
def update_ema(ema, network, decay):
    """ema = decay * ema + (1 - decay) * network, for weights and BatchNorm's statistics; counters are copied."""
    ours, theirs = list(ema.state_dict().values()), list(network.state_dict().values())
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    average([t for t in ours if t.is_floating_point()], [t for t in theirs if t.is_floating_point()], None)
    for mine, other in zip(ours, theirs, strict=True):
        if not mine.is_floating_point():
            mine.copy_(other)


def updates_of(state, settings, device):
    """Return the functions that update the critic, (real, z, epsilon), and the generator, (z), once."""
    if settings.cuda_graphs:
        return capture_updates(state, settings, device)
    return partial(critic_step, state, settings), partial(generator_step, state, settings)


def send(tensor, device):
    """Return a tensor on `device`; from pinned memory a copy does not wait for what the GPU is doing."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def train_step(state, settings, dataset, device, updates=None):
    """Do one step. Returns (noted (6,), real, fake).

    noted: loss of the critic, of the generator, Wasserstein estimate, penalty, norms of the critic's and of the
    generator's gradient.
    updates: what updates_of returned, once for a run where it makes CUDA graphs.
    Under torchrun a rank does its share of the batch, and what it returns is about that share alone.
    """
    update_critic, update_generator = updates or updates_of(state, settings, device)
    mine = share_of_batch(settings.batch_size)
    noise = draw_noise(settings, state.step)  # of the whole batch, so that it is the same on any number of ranks
    noise = {name: values[:, mine] for name, values in noise.items()}
    noise = {name: send(values, device) for name, values in noise.items()}
    set_fade(state, settings)
    seen = state.step * settings.n_critic * settings.batch_size
    for i in range(settings.n_critic):
        indices = batch_indices(len(dataset), settings.seed, seen + i * settings.batch_size, settings.batch_size)
        real = dataset.batch(indices[mine], device)  # (B, 3, S, S)
        real = torch.where(noise["flip"][i], real.flip(3), real)
        loss_d, estimate, penalty, norm_d = update_critic(real, noise["z"][i], noise["epsilon"][i])
    loss_g, fake, norm_g = update_generator(noise["z"][-1])
    if state.ema:
        # Early on the average follows faster, or it would show the random start for 1 / (1 - ema) steps. A network
        # that was grown does not start at random, and brings its average along.
        warm_up = 1 if settings.grow_from else (1 + state.step) / (10 + state.step)
        update_ema(state.ema, state.generator, min(settings.ema, warm_up))
    state.step += 1
    return torch.stack([loss_d, loss_g, estimate, penalty, norm_d, norm_g]), real, fake


def capture_updates(state, settings, device):
    """Return critic_step and generator_step as CUDA graphs: one launch each instead of hundreds of small ones.

    The tensors of `state` are what the graphs work on from now on, so it has to be restored before, not after.
    """
    optimizers = (state.optim_d, state.critic), (state.optim_g, state.generator)
    for optimizer, network in optimizers:
        fresh = not optimizer.state
        for group in optimizer.param_groups:
            group["capturable"] = True
        if fresh:  # make the optimizer's tensors now: a step along a gradient of 0 changes no weight
            for parameter in network.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
        for values in optimizer.state.values():
            values["step"] = values["step"].to(device)
            for tensor in values.values() if fresh else ():
                tensor.zero_()
    tensors = [t for _, network in optimizers for t in network.state_dict().values()]
    tensors += [t for optimizer, _ in optimizers for values in optimizer.state.values() for t in values.values()]
    before = [tensor.clone() for tensor in tensors]

    b, size = settings.batch_size, settings.size
    real = torch.zeros(b, 3, size, size, device=device).to(memory_format=torch.channels_last)
    z, epsilon = torch.randn(b, settings.nz, device=device), torch.rand(b, 1, 1, 1, device=device)
    update_critic = capture(partial(critic_step, state, settings), real, z, epsilon)
    update_generator = capture(partial(generator_step, state, settings), z)
    for tensor, value in zip(tensors, before, strict=True):  # what the warm-up trained on is undone
        tensor.copy_(value)
    return update_critic, update_generator


def capture(function, *inputs):
    """Return a function that does what `function` does, as a CUDA graph. Called with tensors of the shapes of `inputs`.

    function: takes tensors, returns a tuple of tensors, and never waits for the GPU.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # kernels are chosen and workspaces made, which must not happen while capturing
            function(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function(*inputs)

    def replay(*given):
        for mine, value in zip(inputs, given, strict=True):
            mine.copy_(value)
        graph.replay()
        return tuple(result.clone() for result in results)  # the next replay writes over its results

    return replay


# ---- what one sees --------------------------------------------------------------------------------------------


def spread(images):
    """Mean over pixels of the standard deviation over the batch: (B, C, H, W) -> scalar, 0 if all are alike."""
    return images.float().std(dim=0, correction=0).mean()


def log_scalars(writer, state, settings, noted, real, fake, images_per_second):
    """Write the scalars of the steps since the last call. noted: (steps, 6) on the CPU, as train_step returns them.

    real, fake: (B, 3, S, S); under torchrun rank 0's share of the batch, which is enough to tell diversity.
    """
    loss_d, loss_g, estimate, penalty, norm_d, norm_g = noted.mean(dim=0).tolist()
    scalars = {
        "loss/critic": loss_d,
        "loss/generator": loss_g,
        "critic/wasserstein": estimate,
        "critic/gradient_norm": norm_d,
        "generator/gradient_norm": norm_g,
        # 1: the fakes differ from each other as the real images do.  0: mode collapse.
        "generator/diversity": spread(fake) / spread(real).clamp_min(1e-6),
        "speed/images_per_second": images_per_second,
    }
    if settings.lipschitz == "gp":
        scalars["critic/gradient_penalty"] = penalty
    else:
        weights = torch.cat([p.detach().flatten() for p in state.critic.parameters()])
        scalars["critic/clipped_share"] = (weights.abs() >= settings.clip).float().mean()
    for name, value in scalars.items():
        writer.add_scalar(name, value, state.step)


@torch.no_grad()
def draw_samples(state, settings, device):
    """Return the faces of seeds 0 .. SAMPLES-1 as (SAMPLES, 3, S, S) in [-1, 1] on the CPU."""
    network = state.ema or state.generator
    z = torch.stack([latent(seed, settings.nz) for seed in range(SAMPLES)]).to(device)  # (SAMPLES, nz)
    network.eval()
    fake = network(z).cpu()
    network.train(network is state.generator)
    return fake


def tile(images):
    """(N, 3, S, S) in [-1, 1] -> picture (rows*(S+2), 8*(S+2), 3) uint8; images that fill no row are left out.

    Not torchvision's make_grid, because importing torchvision takes 90 MB.
    """
    columns = min(8, len(images))
    images = to_uint8(images[: len(images) // columns * columns])
    images = torch.nn.functional.pad(images, (1, 1, 1, 1), value=255).unflatten(
        0, (-1, columns)
    )  # (rows, 8, 3, S+2, S+2)
    return images.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).numpy()  # (rows, S+2, 8, S+2, 3) before


def write_samples(writer, fake, real, step, out):
    """Write generated and real images, (N, 3, S, S) in [-1, 1], to TensorBoard, the generated also to samples.png."""
    grid = tile(fake)
    writer.add_image("samples/generated", grid, step, dataformats="HWC")
    writer.add_image("samples/real", tile(real), step, dataformats="HWC")
    temporary = out / ".samples.png.tmp"
    Image.fromarray(grid).save(temporary, format="PNG")
    os.replace(temporary, out / "samples.png")


def settings_table(settings):
    """Return the settings as a Markdown table."""
    return "| setting | value |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in vars(settings).items())


def format_time(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def dry_run(state, settings, device):
    """Print parameters, memory, disk and expected hours; the speed is measured on a few steps of random images."""
    noise = np.random.default_rng(0).integers(0, 256, (settings.batch_size, settings.size, settings.size, 3), np.uint8)

    class RandomImages:
        def __len__(self):
            return 1_000_000

        def batch(self, indices, device):
            return send(torch.from_numpy(noise[: len(indices)]).permute(0, 3, 1, 2), device) / 127.5 - 1

    updates = updates_of(state, settings, device)

    def seconds(steps):
        start = time.perf_counter()
        for _ in range(steps):
            noted, _, _ = train_step(state, settings, RandomImages(), device, updates)
        noted.cpu()  # waits for the device
        return (time.perf_counter() - start) / steps

    seconds(2)  # warm up
    per_step = seconds(3 if device.type == "cpu" else 50)
    if rank() > 0:
        return
    count = {name: sum(p.numel() for p in getattr(state, name).parameters()) for name in ("generator", "critic")}
    weights = 4 * sum(count.values())
    steps, kept = settings.steps, settings.steps // settings.checkpoint_every
    full = 3 * weights + 4 * count["generator"] * bool(settings.ema)
    images, pack_bytes = estimate_pack(settings.data, settings.size)
    print(f"parameters   generator {count['generator']:,}, critic {count['critic']:,}")
    if device.type == "cuda":
        print(f"memory       {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB on {torch.cuda.get_device_name()}, "
              "beside the images, which go there where they fill no more than half of what is free")  # fmt: skip
    else:
        print(f"memory       {(full + weights) / 1e9:.2f} GB for weights, gradients and optimizers, beside the batch's")
    print(f"disk         {pack_bytes / 1e9:.2f} GB for {images:,} packed images, "
          f"{(settings.keep + 1) * full / 1e9:.2f} GB for the last {settings.keep} checkpoints (+1 while "
          f"writing), {kept * 4 * count['generator'] / 1e9:.2f} GB for {kept} generators")  # fmt: skip
    print(f"expected     {per_step * steps / 3600:.1f} hours for {steps:,} steps at {1 / per_step:.2f} "
          f"steps/s, {settings.n_critic * settings.batch_size / per_step:.0f} images/s on {device}")  # fmt: skip


# ---- the loop -------------------------------------------------------------------------------------------------


def writes_aside(device):
    """Return whether files are written while training goes on, from a copy of the state.

    Not on a CPU, where steps are long beside the writing, the memory is shared, and the copy is a sixth of it. There
    a second thread that computes also gets OpenMP threads of its own, which made all later steps a quarter slower.
    """
    return device.type != "cpu"


def train(settings, checkpoint=None, checkpoint_path=None):
    """Train until step settings.steps, or until SIGINT or SIGTERM. Returns the exit status."""
    with ending_together():
        device = pick_rank_device(settings.device)
        if settings.cuda_graphs and (device.type != "cuda" or under_torchrun()):
            raise ValueError(f"--cuda-graphs: is for one NVIDIA GPU without torchrun; this process is on {device}")
    prepare(device)
    settings.precision = from_rank_0(resolve_precision, settings.precision, device)
    state = build_state(settings, device)
    if settings.dry_run:
        dry_run(state, settings, device)
        return 0

    dataset = open_data_once(settings)
    settings.data = dataset.paths  # so that a resume finds the same, also where none were given
    made_by = {
        "command": shlex.join(["python", *sys.argv]),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__},
        "data": {"name": dataset.name, "fingerprint": dataset.fingerprint, "images": len(dataset)},
    }
    history = []
    if checkpoint:
        before = checkpoint["made_by"]["data"]
        with ending_together():
            if before["fingerprint"] != dataset.fingerprint:
                raise ValueError(
                    f"--data {' '.join(settings.data)}: {len(dataset):,} images ({dataset.fingerprint}), but the run "
                    f"in {checkpoint_path} was trained on {before['images']:,} others ({before['name']}, "
                    f"{before['fingerprint']}); pass the same images, or start a new run with another --out"
                )
        made_by["command"] = history_of_commands(checkpoint, made_by["command"])
        restore(state, checkpoint)
        # What was noted since the last log, but for files from when other numbers were noted.
        history = [noted.to(device) for noted in checkpoint.get("history", []) if len(noted) == 6]
        checkpoint.clear()  # or its tensors would stay in memory for all of the run
        print(f"Going on from step {state.step:,} of {checkpoint_path}.")
    elif settings.grow_from:
        with ending_together():
            made_by["command"] = history_of_commands(grow(state, settings.grow_from), made_by["command"])
    settings.out = from_rank_0(open_run_folder, dataset.name, settings)
    out = Path(settings.out)
    if state.step >= settings.steps:
        print(f"Nothing to do: {out} is at step {state.step:,} of --steps {settings.steps:,}.")
        return 0
    print(
        f"Training {settings.size} px on {len(dataset):,} images ({dataset.name}), {settings.precision} on {device}, "
        f"into {out}\nWatch it with: tensorboard --logdir {out.parent}"
    )

    updates = updates_of(state, settings, device)
    if rank() == 0:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and needed only here

        # purge_step hides what a killed run had logged after its last checkpoint, and now comes again.
        writer = SummaryWriter(out, purge_step=state.step + 1 if checkpoint_path else None, flush_secs=10)
        writer.add_text("settings", settings_table(settings), state.step)

    stopped_by = []

    def stop(number, frame):
        """Leave a note: the step is finished and a checkpoint written first. A second Ctrl-C stops at once."""
        if stopped_by and number == signal.SIGINT:
            raise KeyboardInterrupt
        stopped_by.append(number)

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    background = ThreadPoolExecutor(1)  # writes images and checkpoints, in their order, while training goes on
    writing, saved = [], None

    def write(function, *args):
        """Call function(*args) while training goes on, or at once. What save_checkpoint returns becomes `saved`."""
        nonlocal saved
        if writes_aside(device):
            writing.append(background.submit(function, *args))
        else:
            saved = function(*args) or saved

    begin, begin_step = time.perf_counter(), state.step
    last_log, last_line = (begin, begin_step), 0.0
    no_bar = True if rank() > 0 else None  # None: where there is no terminal
    bar = tqdm(total=settings.steps, initial=state.step, unit="step", disable=no_bar, dynamic_ncols=True)
    try:
        is_last = False
        while not is_last:
            noted, real, fake = train_step(state, settings, dataset, device, updates)
            history.append(noted)
            bar.update()
            stop_signal = agree_on_stop(stopped_by)
            is_last = state.step == settings.steps or stop_signal > 0
            log_now = state.step % settings.log_every == 0
            save_now = state.step % settings.checkpoint_every == 0 or is_last
            sample_now = state.step % settings.sample_every == 0 or is_last
            if not (log_now or save_now or sample_now):
                continue
            # Of the whole batches, also for a checkpoint: each rank has noted the losses of its share alone.
            recent = mean_over_ranks(torch.stack(history))  # (steps since the last log, 6)
            history = list(recent)
            recent = recent.cpu()  # waits for the device
            weights = torch.nn.utils.get_total_norm([*state.generator.parameters(), *state.critic.parameters()])
            bad = (~recent.isfinite().all(dim=1)).nonzero()
            if len(bad) or not weights.isfinite():
                first = int(bad[0]) if len(bad) else len(history) - 1
                with ending_together():  # it has come on all ranks
                    raise FloatingPointError(
                        f"the {'loss is' if len(bad) else 'weights are'} not finite at step "
                        f"{state.step - len(history) + first + 1}; the last good checkpoint is "
                        f"{saved or checkpoint_path or 'none yet'}; start a new run with a lower --lr-d and "
                        "--lr-g, or --precision fp32"
                    )
            if log_now:
                history.clear()
            if rank() > 0:
                continue
            if log_now:
                now = time.perf_counter()
                speed = (state.step - last_log[1]) * settings.n_critic * settings.batch_size / (now - last_log[0])
                last_log = (now, state.step)
                log_scalars(writer, state, settings, recent, real, fake, speed)
                loss_d, loss_g = recent.mean(dim=0)[:2].tolist()
                bar.set_postfix_str(f"critic {loss_d:.3g}, generator {loss_g:.3g}, {speed:.0f} images/s")
                if bar.disable and now - last_line > 10:
                    last_line = now
                    left = (now - begin) / (state.step - begin_step) * (settings.steps - state.step)
                    print(f"step {state.step}/{settings.steps}  critic {loss_d:.4g}  generator {loss_g:.4g}  "
                          f"{speed:.0f} images/s  {format_time(left)} left", flush=True)  # fmt: skip
            if sample_now or save_now:
                for task in writing:  # one copy in memory at a time; raises what went wrong in writing the last
                    saved = task.result() or saved
                writing.clear()
            if sample_now:
                images = draw_samples(state, settings, device), real[:SAMPLES].cpu()
                write(write_samples, writer, *images, state.step, out)
            if save_now:
                write(writer.flush)  # what is logged must not be younger than this
                content = checkpoint_of(state, settings, made_by, history)
                content = snapshot(content) if writes_aside(device) else content
                write(save_checkpoint, content, out, settings.keep)
            if is_last:
                for task in writing:
                    saved = task.result() or saved
                writing.clear()
        with ending_together():  # wait for rank 0's last checkpoint, while a second signal still ends no rank
            pass
    finally:
        background.shutdown()
        bar.close()
        if rank() == 0:
            writer.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    took = format_time(time.perf_counter() - begin)
    if stop_signal and state.step < settings.steps:
        name = signal.Signals(stop_signal).name
        print(f"Stopped by {name} at step {state.step:,} after {took}; go on with: python Trainloop.py --resume {out}")
        return 128 + stop_signal
    print(f"Finished step {state.step:,} after {took}; faces, checkpoints and TensorBoard files are in {out}, "
          f"the newest faces in {out / 'samples.png'}")  # fmt: skip
    return 0


def main(argv=None):
    settings = None
    try:
        join_ranks()
        settings, *resume = read_settings_once(argv)
        status = train(settings, *resume)
        leave_ranks()
        return status
    except (ValueError, FileNotFoundError) as error:
        status = 2
        message = str(error)
    except (OSError, FloatingPointError) as error:
        status = 1
        message = str(error)
    except (MemoryError, RuntimeError) as error:  # torch reports either device's memory as RuntimeError
        status = 1
        reason = (str(error).splitlines() or ["no details"])[0]
        if is_out_of_memory(error):
            message = f"out of memory ({reason}); use a smaller --batch-size, or --ngf, --ndf and --size"
        elif is_lost_rank(error):
            # The ranks are not left here: that may wait for what was to be exchanged with the lost one.
            reason = re.sub(r"^\[\S+\] |\. .*", "", reason)  # without the place in gloo's source, and its advice
            out = settings and settings.out
            message = f"lost the other processes ({reason})" + (f"; go on with --resume {out}" if out else "")
        else:
            raise
    except KeyboardInterrupt:
        return 130
    print(f"Trainloop.py: error: {f'rank {rank()}: ' if rank() else ''}{message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    try:
        status = main()
    except SystemExit as ending:
        status = ending.code or 0
    if under_torchrun():  # it has not left the ranks, so it ends on an error, with threads of gloo's still running:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # the interpreter's own way out would abort now and then while it takes them down
    sys.exit(status)
