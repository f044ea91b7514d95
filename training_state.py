"""All that a training changes: how it is built, saved in a checkpoint, checked when it is read, and restored."""

import copy
import dataclasses
from functools import partial

import torch
from torch import nn

from checkpoints import FORMAT, NETWORKS, check_like, check_network, read_model_file, weights_of
from command_line import UserError
from Critic import Critic
from distributed import normalise_over_ranks
from FrechetLoss import FrechetLoss, load_networks
from Generator import Generator
from IdentityCritic import FaceNetwork, IdentityCritic
from ProjectedCritic import ProjectedCritic, load_frozen_network
from run_folder import find_resume
from settings import HEADS_BETAS, Settings, combine, parse, saved_settings

OPTIMIZERS = ("optim_g", "optim_d", "optim_p", "optim_i")
PARTS = (*NETWORKS, "ema", *OPTIMIZERS)  # of a State, by their names in a checkpoint
MADE_BY = {"command": "", "data": {"name": "", "fingerprint": "", "images": 0}}  # what a resume reads of it


@dataclasses.dataclass
class State:
    """All that training changes."""

    generator: Generator
    ema: Generator | None
    critic: Critic | None
    projected: nn.Module | None
    identity: nn.Module | None
    frechet: nn.Module | None
    optim_g: torch.optim.Optimizer
    optim_d: torch.optim.Optimizer | None
    optim_p: torch.optim.Optimizer | None
    optim_i: torch.optim.Optimizer | None
    step: int = 0


def build_state(settings, device):
    """Return the State of step 0. The initial weights depend on the seed alone, not on the device.

    On the device "meta" it is a plan without memory.
    """
    torch.manual_seed(settings.seed)
    s, grown, is_plan = settings, bool(settings.grow_from), torch.device(device).type == "meta"
    place = partial(nn.Module.to, device=device, memory_format=torch.channels_last)
    lerped = grown and not s.skip  # as earlier versions grew it
    generator = Generator(s.nz, s.ngf, 3, s.size, s.stem_norm, s.blocks_g, s.attention, lerped, s.skip, s.chroma_size)
    critic = projected = identity = frechet = None
    if s.critic != "projected":
        critic = Critic(s.ndf, 3, s.size, s.norm, s.blocks_d, s.attention, grown)
    if s.critic != "pixel":
        frozen = None if is_plan else place(load_frozen_network())
        projected = ProjectedCritic(s.seen_size or s.size, frozen, s.even_scales)
    if s.identity_share:
        identity = IdentityCritic(None if is_plan else place(FaceNetwork()))
    if s.frechet_share:
        frechet = FrechetLoss(() if is_plan else map(place, load_networks())).to(device)
    for network in filter(None, (generator, critic, projected, identity)):
        place(network)
        normalise_over_ranks(network)
    if s.freeze_g:
        generator.requires_grad_(False).eval()  # with statistics of a batch its image would be another one
        for blocks in (generator.up, generator.attention, generator.to_rgb):
            for resolution, block in blocks.items():
                if int(resolution) > s.freeze_g:
                    block.requires_grad_(True).train()
    ema = copy.deepcopy(generator).eval().requires_grad_(False) if s.ema else None
    fused = torch.device(device).type in ("cpu", "cuda")

    def optimizer(network, lr):
        parameters = [p for p in network.parameters() if p.requires_grad] if network else []
        if network and s.optimizer == "rmsprop":
            return torch.optim.RMSprop(parameters, lr, foreach=True)
        return network and torch.optim.Adam(parameters, lr, tuple(s.betas), fused=fused)

    optimizers = [optimizer(generator, s.lr_g), optimizer(critic, s.lr_d)]
    for network in (projected, identity):
        adam = network and torch.optim.Adam(network.heads.parameters(), s.lr_heads, HEADS_BETAS, fused=fused)
        optimizers.append(adam)
    return State(generator, ema, critic, projected, identity, frechet, *optimizers)


def content_of(state, settings, made_by):
    """Return a full checkpoint as a dict of plain tensors and plain types.

    settings: a dict.  made_by: a dict about command, versions and data.
    """
    content = {"format": FORMAT, "step": state.step, "settings": settings, "made_by": made_by}
    for name in PARTS:
        part = getattr(state, name)
        content[name] = part and part.state_dict()
        if part and name in NETWORKS:
            content[name] = {"config": part.config, "state": content[name]}
    return content | {"rng": {"torch": torch.get_rng_state()}}  # for earlier versions: no step draws from it


def check_checkpoint(file, path):
    """Raise UserError unless a run can go on from the dict of a model file: all parts there, of the right shapes."""
    if type(file.get("step")) is not int or file["step"] < 0:
        raise UserError(f"{path} is damaged: its step is no number of steps")
    if "optim_g" not in file:
        raise UserError(f"{path} holds a generator alone; resume from a checkpoint_*.pt")
    settings = Settings(**saved_settings(file.get("settings"), path))
    absent = {"projected": ["critic", "optim_d"], "pixel": ["projected", "optim_p"]}.get(settings.critic, [])
    absent += [] if settings.identity_share else ["identity", "optim_i"]
    absent += [] if settings.frechet_share else ["frechet"]
    with torch.device("meta"):
        plan = build_state(dataclasses.replace(settings, critic="both", identity_share=0.5, frechet_share=0.1), "meta")
        for optimizer in (getattr(plan, name) for name in OPTIMIZERS):
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()  # makes its state
    plan = content_of(plan, {}, MADE_BY)
    for name in (*PARTS, "made_by"):
        value, example = file.get(name), plan[name]
        if name in absent and value is None:
            continue
        if isinstance(value, dict) and name == "made_by":  # which tells of other things, too
            value = {key: value.get(key) for key in MADE_BY}
        if isinstance(value, dict) and "state" in example:  # all else there follows from the settings
            value, example = value.get("state"), example["state"]
        if name == "optim_g" and value == {} and file["step"] <= settings.warmup_steps:
            continue  # the generator has not learnt yet; an earlier version's Adam has a state there
        check_like(value, example, f"{path}: {name}")


def restore(state, file):
    """Load a full checkpoint into a State. A critic that came to the run later starts fresh."""
    for name in PARTS:
        part, saved = getattr(state, name), file.get(name)
        if part and saved and name in OPTIMIZERS:  # rates and switches are those of the settings
            part.load_state_dict(part.state_dict() | {"state": saved["state"]})
        elif part and saved:
            part.load_state_dict(saved["state"] if name in NETWORKS else saved)
    state.step = file["step"]


def read_settings(argv=None):
    """Return (Settings, checkpoint or None, its path or None) of a command line.

    Raises UserError for settings that are impossible or contradict the checkpoint they go on from.
    """
    given = parse(argv)
    path, file = find_resume(given.get("resume"), given.get("out"), check_checkpoint)
    if file:
        return combine(given, path, saved_settings(file["settings"], path)), file, path
    source = given.get("grow_from") or given.get("start_from")
    return combine(given, architecture=source and architecture_of(source, given)), None, None


def architecture_of(path, given):
    """Return the settings that the file of --start-from decides, or of --grow-from: its own at twice the size.

    given: {name: value} of the flags.
    """
    file, grows = read_model_file(path), "grow_from" in given
    for name, kind in zip(NETWORKS, (Generator, Critic, ProjectedCritic, IdentityCritic, FrechetLoss), strict=True):
        if file.get(name):
            check_network(kind, file[name], f"{path}: {name}")
    check_network(Generator, file["generator"] | {"state": weights_of(file)}, f"{path}: ema")
    ours, theirs = file["generator"]["config"], (file.get("critic") or {}).get("config")
    config = (theirs or {}) | ours | {"blocks_g": ours.get("blocks", "plain")}
    config |= {"blocks_d": theirs.get("blocks", "plain")} if theirs else {}
    if grows and not theirs and given.get("critic") != "projected":
        raise UserError(f"--grow-from {path}: holds no pixel critic; take a checkpoint_*.pt, or --critic projected")
    if grows and any(file[name]["state"].get("fade", 1) < 1 for name in NETWORKS if file.get(name)):
        raise UserError(f"--grow-from {path}: is itself still fading in; train it beyond its --fade-steps first")
    if grows:
        config["skip"] = config.get("skip") or config["size"]
        config["size"] *= 2
    names = ["size", "skip", "nz", "ngf", "ndf", "blocks_g", "blocks_d", "stem_norm", "norm", "attention"]
    if config.get("chroma_size"):  # else the flag may add it, which has no weights
        names.append("chroma_size")
    return {name: config[name] for name in names if name in config}


def take_over(state, file, path, freeze_g=0):
    """Load the networks of a model file into a new State, whose blocks of a larger size stay new.

    freeze_g: as the setting; what stays as it is shall be the file's average. Raises UserError where the networks do
    not fit.
    """
    states = {name: file[name]["state"] for name in NETWORKS if file.get(name)} | {"ema": weights_of(file)}
    if freeze_g:
        states["generator"] = states["ema"]
    if state.projected and "projected" in states and file["projected"]["config"] != state.projected.config:
        del states["projected"]  # it grows with the images
    for name, weights in states.items():
        try:
            if network := getattr(state, name):
                network.load_state_dict(weights, strict=False)
        except RuntimeError as error:  # shapes that differ
            raise UserError(f"{path} does not fit: {str(error).splitlines()[-1].strip()}") from error
