"""The settings of a training: each is declared once, with flag, default, help, bounds and what a resume may change."""

import argparse
import dataclasses
import math
import os

from augmentation import POLICIES
from checkpoints import read_model_file, weights_of
from command_line import Parser, UserError
from Critic import BLOCKS as CRITIC_BLOCKS
from Critic import NORMS
from Generator import BLOCKS, SIZES, check_parts, check_size
from run_folder import find_resume

CROPS = ("center", "squash")
SPLITS = ("train", "val", "test")
LOSSES = ("wgan-gp", "wgan")
PRESETS = {
    # What the report's published models were trained with.
    "report": {
        "size": 128, "crop": "squash", "split": "all", "flip": False, "nz": 100, "ngf": 128, "ndf": 128,
        "stem_norm": False, "norm": "batch", "blocks_g": "plain", "loss": "wgan", "clip_value": 0.01, "n_critic": 1,
        "batch_size": 32, "optimizer": "adam", "lr_g": 5e-5, "lr_d": 5e-5, "betas": [0.9, 0.999], "ema": 0.0,
        "reuse_fakes": False, "precision": "fp32", "steps": 3_924_000, "log_every": 50, "checkpoint_every": 6000,
    },
    # Something to look at after about five minutes on two CPU cores.
    "quick": {
        "size": 64, "ngf": 16, "ndf": 16, "batch_size": 16, "n_critic": 1, "lr_g": 4e-4, "lr_d": 8e-4, "ema": 0.99,
        "steps": 1500, "log_every": 25, "sample_every": 100, "checkpoint_every": 500,
    },
}  # fmt: skip


def checked(kind, low=None, above=None, below=None):
    """Return a type for argparse: a text that is not empty, or a number within bounds."""

    def parse(text):
        if kind is str:
            if not text:
                raise argparse.ArgumentTypeError(
                    "is empty; leave the flag out, or name something (is a variable not set?)"
                )
            return text
        value = kind(text)
        if not (low is None or value >= low) or not (above is None or value > above) or not value < (below or math.inf):
            bounds = {"at least": low, "above": above, "below": below}
            bounds = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
            raise argparse.ArgumentTypeError(f"{text}: must be {bounds or 'finite'}")
        return value

    parse.__name__ = "number" if kind is float else "whole number"  # what argparse calls it
    return parse


def setting(default, help, kind=None, group="training", resume="frozen", low=None, above=None, below=None, **flag):
    """Declare a field of Settings.

    kind: type of the value, or of each of a list, if the default does not tell it.
    resume: "frozen", a resumed run cannot change it; "free", it can, else goes on with it; "new", it is told anew.
    low, above, below: bounds of a number.  flag: more arguments of argparse.
    """
    kind = kind or type(default)
    flag = (
        {"action": argparse.BooleanOptionalAction}
        if kind is bool
        else flag | {"type": checked(kind, low, above, below)}
    )
    metadata = {"group": group, "resume": resume, "flag": flag | {"help": help}}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


# fmt: off
@dataclasses.dataclass
class Settings:
    preset: str = setting(None, "report: the report's recipe; quick: five minutes on a laptop's CPU; flags win over it",
        str, "start", "new", choices=list(PRESETS))
    resume: str = setting(None, "go on from a checkpoint or run folder; latest: the newest in --out or, without it, "
        "in runs/; auto: the same where there is one, else start", str, "start", "new", metavar="PATH|latest|auto")
    grow_from: str = setting(None, "checkpoint of half the --size: take its networks over, and grow each by a block",
        str, "start", metavar="PATH")
    start_from: str = setting(None, "model to adapt to other images: a new run from step 0 with its networks", str,
        "start", metavar="PATH")
    data: list = setting(None, "zips or folders of images, or 'drawn' for the built-in drawn faces; without it CelebA "
        "from data/, else drawn faces", str, "images", "free", nargs="+", metavar="PATH")
    split: str = setting("all", "part of CelebA's list_eval_partition", str, "images", choices=["all", *SPLITS])
    crop: str = setting("center", "center: cut the central square; squash: resize the whole image to one, as the "
        "report did", str, "images", choices=CROPS)
    cache: str = setting(None, "folder of the packed images, else they lie beside the data", str, "images", "free",
        metavar="DIR")
    workers: int = setting(os.cpu_count() or 1, "threads that decode images when packing", int, "images", "new", low=1)
    flip: bool = setting(True, "mirror half of the images", bool, "images")
    augment: list = setting([], "change all that a critic sees, real or not; some of " + ", ".join(POLICIES), str,
        "images", nargs="*", choices=POLICIES, metavar="POLICY")
    size: int = setting(128, "side of the images in pixels", int, "networks", choices=SIZES)
    nz: int = setting(100, "length of the latent vector", int, "networks", low=1, below=5000)
    ngf: int = setting(64, "width of the generator: its channels at 64x64", int, "networks", low=1, below=2000)
    ndf: int = setting(64, "width of the critic: its channels at 64x64", int, "networks", low=1, below=2000)
    blocks_g: str = setting("plain", "the generator's. plain: transposed convolutions, the report's; residual: two "
        "resized ones; modulated: the same, steered by the latent", str, "networks", choices=list(BLOCKS))
    blocks_d: str = setting("plain", "the critic's", str, "networks", choices=list(CRITIC_BLOCKS))
    stem_norm: bool = setting(True, "BatchNorm and ReLU after the generator's linear layer", bool, "networks")
    norm: str = setting("layer", "the critic's normalisation; batch only with --loss wgan", str, "networks",
        choices=NORMS)
    attention: int = setting(0, "resolution of a self-attention layer in both networks; 0: none", int, "networks",
        metavar="R")
    critic: str = setting("pixel", "projected: it sees features of a frozen, pretrained network (needs timm); both: "
        "that and the pixel critic", str, "networks", "free", choices=["pixel", "projected", "both"])
    projected_share: float = setting(0.5, "the projected critic's part of the generator's gradient with --critic both",
        resume="free", low=0, below=1.001)
    steps: int = setting(100_000, "total number of steps, those before a resume included", resume="free", low=1)
    batch_size: int = setting(32, "images in a batch, that of all processes together", low=1)
    n_critic: int = setting(1, "critic updates in a step", low=1)
    reuse_fakes: bool = setting(True, "the generator learns on the images of the last critic update, not on new ones")
    loss: str = setting("wgan-gp", "Wasserstein loss with a gradient penalty, or with clipped weights", choices=LOSSES)
    gp_weight: float = setting(10.0, "factor of the gradient penalty", low=0)
    clip_value: float = setting(0.01, "bound of the critic's weights with --loss wgan", above=0)
    optimizer: str = setting("adam", "for both networks", choices=["adam", "rmsprop"])
    betas: list = setting([0.0, 0.9], "Adam's decay rates", float, nargs=2, low=0, below=1)
    lr_g: float = setting(2e-4, "learning rate of the generator", above=0)
    lr_d: float = setting(4e-4, "learning rate of the critic", above=0)
    ema: float = setting(0.999, "decay of the moving average of the generator's weights; 0: none", low=0, below=1)
    fade_steps: int = setting(2000, "steps over which the blocks of --grow-from are faded in", low=0)
    precision: str = setting("auto", "auto: bf16 where the device is faster in it", choices=["auto", "fp32", "bf16"])
    seed: int = setting(0, "chooses initial weights, order of the images, latents and flips", low=0, below=2**32)
    out: str = setting(None, "the run's folder, else runs/ and the next number", str, "run", "new", metavar="DIR")
    device: str = setting("auto", "auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:N or mps", str, "run", "new")
    checkpoint_every: int = setting(6000, "steps between checkpoints; each keeps the generator", int, "run", "free",
        low=1)
    keep: int = setting(2, "full checkpoints kept; generators are all kept", int, "run", "free", low=1)
    log_every: int = setting(50, "steps between scalars", int, "run", "free", low=1)
    sample_every: int = setting(1000, "steps between sample grids", int, "run", "free", low=1)
    dry_run: bool = setting(False, "print parameters, memory, disk and expected hours, and stop", bool, "run", "new")
# fmt: on


FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
# Names of earlier versions, which old checkpoints hold and old commands may use.
RENAMED = {"lipschitz": "loss", "gp": "gp_weight", "clip": "clip_value", "blocks": "blocks_g"}
OLD_LOSSES = {"gp": "wgan-gp", "clip": "wgan"}


def flag(name):
    return "--" + name.replace("_", "-")


def add_flags(parser, *names):
    """Declare the flags of the named settings on an argparse parser or group."""
    defaults = vars(Settings())
    for name in names:
        parser.add_argument(flag(name), default=defaults[name], **FIELDS[name].metadata["flag"])


def parse(argv):
    """Return {name: value} of the settings that the flags in `argv` give. Raises UserError for one that cannot be."""
    parser = Parser("Train a Wasserstein GAN on faces. A step is one update of the generator.")
    groups = {}
    for name, field in FIELDS.items():
        group = field.metadata["group"]
        add_flags(groups.setdefault(group, parser.add_argument_group(group)), name)
    for old, new in RENAMED.items():
        options = FIELDS[new].metadata["flag"] | {"help": argparse.SUPPRESS}
        if new == "loss":
            options |= {"choices": [*OLD_LOSSES, *LOSSES]}
        parser.add_argument(flag(old), default=argparse.SUPPRESS, **options)
    silent = object()  # argparse leaves alone what a namespace already has, so what is no longer silent was given
    parsed = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(FIELDS, silent))))
    return renamed({name: value for name, value in parsed.items() if value is not silent})


def renamed(settings):
    """Return settings {name: value} under the names of this version; other names than settings' are dropped."""
    settings = dict(settings)
    if "blocks" in settings:  # was one for both networks
        settings.setdefault("blocks_d", settings["blocks"])
    for old, new in RENAMED.items():
        if old in settings:
            settings[new] = settings.pop(old)
    if settings.get("loss") in OLD_LOSSES:
        settings["loss"] = OLD_LOSSES[settings["loss"]]
    return {name: value for name, value in settings.items() if name in FIELDS}


def saved_settings(file, path):
    """Return {name: value} of the settings in a checkpoint, once they passed the checks of flags; raises UserError.

    A file from before a setting came was trained with what is its default now, but for reuse_fakes.
    """
    argv = []
    for name, value in renamed({"reuse_fakes": False} | (file.get("settings") or {})).items():
        if isinstance(value, bool):
            argv.append(flag(name) if value else f"--no-{flag(name)[2:]}")
        elif value is not None:
            argv += [flag(name), *(map(str, value) if isinstance(value, (list, tuple)) else [str(value)])]
    try:
        return parse(argv)
    except UserError as error:
        raise UserError(f"{path} holds settings that no run can have: {error}") from error


def read_settings(argv, check):
    """Return (Settings, checkpoint or None, its path or None): defaults < preset < checkpoint < given flags.

    Raises UserError for settings that are impossible or contradict the checkpoint.
    """
    given = parse(argv)
    asked = PRESETS.get(given.get("preset"), {}) | given
    path, checkpoint = find_resume(given.get("resume"), given.get("out"), check)
    saved = {}
    if checkpoint:
        saved = vars(Settings()) | saved_settings(checkpoint, path)
        saved = {name: value for name, value in saved.items() if FIELDS[name].metadata["resume"] != "new"}
        for name, value in asked.items():
            frozen = FIELDS[name].metadata["resume"] == "frozen" and (name, value) != ("precision", "auto")
            if frozen and saved[name] != value:
                raise UserError(
                    f"{flag(name)} {value}: the run in {path} was trained with {flag(name)} {saved[name]}; "
                    "leave the flag out to go on, or start a new run with another --out"
                )
    elif "grow_from" in asked or "start_from" in asked:
        asked |= settings_of_file(asked, "grow_from" if "grow_from" in asked else "start_from")
    free = {name: value for name, value in given.items() if FIELDS[name].metadata["resume"] != "frozen"}
    settings = Settings(**(asked | saved | free))
    settings.out = given.get("out") or (str(path.parent) if path else None)
    check_together(settings)
    return settings, checkpoint, path


def settings_of_file(given, source):
    """Return the settings that the file of --grow-from or --start-from decides: its architecture, grown or as it is.

    Raises UserError where a given flag contradicts them, or the file cannot be grown.
    """
    path = given[source]
    file = read_model_file(path)
    config = dict(file["generator"]["config"])
    config["blocks_g"] = config.pop("blocks", "plain")
    if file.get("critic"):
        config |= {"blocks_d": file["critic"]["config"]["blocks"], "ndf": file["critic"]["config"]["ndf"],
                   "norm": file["critic"]["config"]["norm"]}  # fmt: skip
    if source == "grow_from":
        if not file.get("critic"):
            raise UserError(f"--grow-from {path}: holds no critic; take a checkpoint_*.pt")
        if weights_of(file).get("fade", 1) < 1:
            raise UserError(f"--grow-from {path}: is itself still fading in; train it beyond its --fade-steps first")
        config["size"] *= 2
    config = {name: value for name, value in config.items() if name in FIELDS}
    for name, value in config.items():
        if given.get(name, value) != value:
            raise UserError(f"{flag(name)} {given[name]}: {flag(source)} {path} gives {flag(name)} {value}")
    return config


def check_together(settings):
    """Raise UserError, naming the flag, for settings that are possible by themselves but not together."""
    check_size("ngf", settings.ngf, settings.size)
    check_size("ndf", settings.ndf, settings.size)
    check_parts(settings.size, settings.blocks_g, settings.attention, bool(settings.grow_from))
    if settings.loss == "wgan-gp" and settings.norm == "batch":
        raise UserError(
            "--norm batch: the gradient penalty is about each image alone, and BatchNorm makes every score depend on "
            "the whole batch; use --norm layer or none, or --loss wgan"
        )
