"""The settings of a training: one declaration each for flag, default, help, bounds and what a resumed run may change."""

import argparse
import dataclasses
import math
import os

from augmentation import POLICIES
from checkpoints import find_resume, read_model_file, weights_of
from command_line import UserError, make_parser
from Critic import BLOCKS as CRITIC_BLOCKS
from Critic import NORMS
from Dataset import CROPS, SPLITS
from Generator import BLOCKS, SIZES, check_parts, check_size

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


def number(kind, low=None, above=None, below=None):
    """Return a type for argparse: an int or float within bounds."""

    def parse(text):
        value = kind(text)
        if not (low is None or value >= low) or not (above is None or value > above) or not value < (below or math.inf):
            bounds = [("at least", low), ("above", above), ("below", below)]
            bounds = " and ".join(f"{word} {bound}" for word, bound in bounds if bound is not None)
            raise argparse.ArgumentTypeError(f"{text}: must be {bounds or 'finite'}")
        return value

    parse.__name__ = "number" if kind is float else "whole number"  # what argparse calls it
    return parse


def text(value):
    """A type for argparse: not empty."""
    if not value:
        raise argparse.ArgumentTypeError("is empty; leave the flag out, or name something (is a variable not set?)")
    return value


def setting(
    default, help, group="training", free=False, saved=True, kind=None, low=None, above=None, below=None, **flag
):
    """Declare a field of Settings.

    free: a resumed run may change it.  saved: a resumed run goes on with it where it is not told otherwise.
    kind: type of the value, or of each of a list, if the default does not tell it.
    low, above, below: bounds of a number.  flag: more arguments of argparse.
    """
    kind = kind or (str if default is None else type(default))
    flag["type"] = text if kind is str else number(kind, low, above, below)
    if kind is bool:
        flag = {"action": argparse.BooleanOptionalAction}
    metadata = {"group": group, "free": free, "saved": saved, "flag": flag | {"help": help}}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Settings:
    preset: str | None = setting(None, "report: the report's recipe; quick: five minutes on a laptop's CPU; a flag beside "
        "it wins", "start", True, False, choices=list(PRESETS))  # fmt: skip
    resume: str | None = setting(None, "go on from a checkpoint or run folder; latest: the newest in --out or, without it, "
        "in runs/; auto: the same where there is one, else start", "start", True, False, metavar="PATH|latest|auto")  # fmt: skip
    grow_from: str | None = setting(None, "checkpoint of half the --size, whose networks are taken over and grown by one "
        "block each", "start", metavar="PATH")  # fmt: skip
    start_from: str | None = setting(None, "adapt a model to other images: a new run from step 0 whose networks start as "
        "those of this file", "start", metavar="PATH")  # fmt: skip
    data: list | None = setting(None, "zips or folders of images, or 'drawn' for the built-in drawn faces; without it "
        "CelebA from data/, else drawn faces", "images", True, kind=str, nargs="+", metavar="PATH")  # fmt: skip
    split: str = setting("all", "part of CelebA's list_eval_partition", "images", choices=["all", *SPLITS])
    crop: str = setting("center", "center: cut the central square; squash: resize all of the image to a square, as the "
        "report did", "images", choices=list(CROPS))  # fmt: skip
    cache: str | None = setting(None, "folder of the packed images, else they lie beside the data", "images", True,
                                metavar="DIR")  # fmt: skip
    workers: int = setting(os.cpu_count() or 1, "threads that decode images when packing", "images", True, False, low=1)
    flip: bool = setting(True, "mirror half of the images", "images")
    augment: list = setting([], f"change what a critic sees, real and generated alike: some of {', '.join(POLICIES)}; "
        "for small data", "images", kind=str, nargs="*", choices=POLICIES)  # fmt: skip
    size: int = setting(128, "side of the images in pixels", "networks", choices=SIZES)
    nz: int = setting(100, "length of the latent vector", "networks", low=1, below=4097)
    ngf: int = setting(64, "width of the generator: its channels at 64x64", "networks", low=1, below=4097)
    ndf: int = setting(64, "width of the critic: its channels at 64x64", "networks", low=1, below=4097)
    blocks_g: str = setting("plain", "the generator's blocks. plain: the report's transposed convolutions; residual: "
        "two resized convolutions; modulated: the same, steered by the latent", "networks", choices=list(BLOCKS))  # fmt: skip
    blocks_d: str = setting("plain", "the critic's blocks", "networks", choices=list(CRITIC_BLOCKS))
    stem_norm: bool = setting(True, "BatchNorm and ReLU after the generator's linear layer", "networks")
    norm: str = setting("layer", "normalisation in the critic; batch only with --loss wgan", "networks", choices=NORMS)
    attention: int = setting(
        0, "resolution of a self-attention layer in both networks; 0: none", "networks", metavar="R"
    )
    critic: str = setting("pixel", "projected: heads on the features of a frozen pretrained network (needs timm); both: "
        "that beside the pixel critic", "networks", True, choices=["pixel", "projected", "both"])  # fmt: skip
    projected_share: float = setting(0.5, "share of the projected critic in the generator's gradient with --critic both",
                                     free=True, low=0, below=1.001)  # fmt: skip
    steps: int = setting(100_000, "total number of steps, those before a resume included", free=True, low=1)
    batch_size: int = setting(32, "images in a batch, that of all processes together", low=1)
    n_critic: int = setting(1, "critic updates in a step", low=1)
    reuse_fakes: bool = setting(
        True, "let the generator learn on the images of the last critic update, not on new ones"
    )
    loss: str = setting("wgan-gp", "Wasserstein loss with a gradient penalty, or with clipped weights",
                        choices=["wgan-gp", "wgan"])  # fmt: skip
    gp_weight: float = setting(10.0, "factor of the gradient penalty", low=0)
    clip_value: float = setting(0.01, "bound of the critic's weights with --loss wgan", above=0)
    optimizer: str = setting("adam", "for both networks", choices=["adam", "rmsprop"])
    betas: list = setting([0.0, 0.9], "Adam's decay rates", kind=float, nargs=2, low=0, below=1)
    lr_g: float = setting(2e-4, "learning rate of the generator", above=0)
    lr_d: float = setting(4e-4, "learning rate of the critic", above=0)
    ema: float = setting(0.999, "decay of the moving average of the generator's weights; 0: none", low=0, below=1)
    fade_steps: int = setting(2000, "steps over which the blocks of --grow-from are faded in", low=0)
    precision: str = setting("auto", "auto: bf16 where the device is faster in it", choices=["auto", "fp32", "bf16"])
    seed: int = setting(0, "chooses initial weights, order of the images, latents and flips", low=0, below=2**32)
    out: str | None = setting(None, "the run's folder (default: runs/ and the next number)", "run", True, False,
                              metavar="DIR")  # fmt: skip
    device: str = setting("auto", "auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:N or mps", "run", True, False)
    checkpoint_every: int = setting(
        6000, "steps between checkpoints; each also keeps the generator", "run", True, low=1
    )
    keep: int = setting(2, "full checkpoints kept; generators are all kept", "run", True, low=1)
    log_every: int = setting(50, "steps between scalars", "run", True, low=1)
    sample_every: int = setting(1000, "steps between sample grids", "run", True, low=1)
    dry_run: bool = setting(False, "print parameters, memory, disk and expected hours, and stop", "run", True, False)


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
    parser = make_parser("Train a Wasserstein GAN on faces. A step is one update of the generator.")
    groups = {}
    for name, field in FIELDS.items():
        group = field.metadata["group"]
        add_flags(groups.setdefault(group, parser.add_argument_group(group)), name)
    for old, new in RENAMED.items():
        options = FIELDS[new].metadata["flag"] | {"help": argparse.SUPPRESS}
        if new == "loss":
            options |= {"choices": [*OLD_LOSSES, *OLD_LOSSES.values()]}
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


def check_saved(settings, path):
    """Return the settings in a checkpoint, having passed the same checks as flags. Raises UserError, naming `path`."""
    argv = []
    for name, value in renamed(settings).items():
        if isinstance(value, bool):
            argv.append(flag(name) if value else f"--no-{flag(name)[2:]}")
        elif value is not None:
            argv += [flag(name), *(map(str, value) if isinstance(value, (list, tuple)) else [str(value)])]
    try:
        return parse(argv)
    except UserError as error:
        raise UserError(f"{path} holds settings that no run can have: {error}") from error


def read_settings(argv=None):
    """Return (Settings, checkpoint or None, its path or None): defaults < preset < checkpoint < given flags.

    Raises UserError for settings that are impossible or contradict the checkpoint.
    """
    given = parse(argv)
    asked = PRESETS.get(given.get("preset"), {}) | given
    path, checkpoint = find_resume(given.get("resume"), given.get("out"))
    saved = {}
    if checkpoint:
        # A file from before a setting came was trained with what is its default now, but for reuse_fakes.
        saved = vars(Settings()) | {"reuse_fakes": False} | check_saved(checkpoint["settings"], path)
        saved = {name: value for name, value in saved.items() if FIELDS[name].metadata["saved"]}
        for name, value in asked.items():
            frozen = not FIELDS[name].metadata["free"] and (name, value) != ("precision", "auto")
            if frozen and saved[name] != value:
                raise UserError(
                    f"{flag(name)} {value}: the run in {path} was trained with {flag(name)} {saved[name]}; "
                    "leave the flag out to go on, or start a new run with another --out"
                )
    elif "grow_from" in asked or "start_from" in asked:
        asked |= settings_of_file(asked, "grow_from" if "grow_from" in asked else "start_from")
    free = {name: value for name, value in given.items() if FIELDS[name].metadata["free"]}
    settings = Settings(**(asked | saved | free))
    settings.out = given.get("out") or (str(path.parent) if path else None)
    check_together(settings)
    return settings, checkpoint, path


def settings_of_file(given, source):
    """Return the settings that the file of --grow-from or --start-from decides: its architecture, grown to twice its size.

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
