"""All that a training changes, how it is built, saved and restored."""

import copy
import dataclasses

import torch
from torch import nn

from checkpoints import FORMAT, weights_of
from command_line import UserError
from Critic import Critic
from distributed import is_distributed, wrap
from Generator import Generator
from settings import Settings, saved_settings

HEADS = {"lr": 2e-4, "betas": (0.0, 0.99)}  # Adam of the projected critic's heads (Sauer et al. 2021)
NETWORKS = ("generator", "critic", "projected")
OPTIMIZERS = ("optim_g", "optim_d", "optim_p")


@dataclasses.dataclass
class State:
    """All that training changes."""

    generator: Generator
    ema: Generator | None
    critic: Critic | None
    projected: nn.Module | None
    optim_g: torch.optim.Optimizer
    optim_d: torch.optim.Optimizer | None
    optim_p: torch.optim.Optimizer | None
    step: int = 0
    # The networks again, wrapped to average their gradients over the ranks, where there are several. What is saved are
    # the networks themselves: so a file does not tell how many ranks wrote it.
    ddp: dict = dataclasses.field(default_factory=dict)


def build_state(settings, device):
    """Return the State of step 0. The initial weights depend on the seed alone, not on the device."""
    torch.manual_seed(settings.seed)
    s, grown = settings, bool(settings.grow_from)
    generator = Generator(s.nz, s.ngf, 3, s.size, s.stem_norm, s.blocks_g, s.attention, grown)
    critic = projected = None
    if s.critic != "projected":
        critic = Critic(s.ndf, 3, s.size, s.norm, s.blocks_d, s.attention, grown)
    if s.critic != "pixel":
        from ProjectedCritic import ProjectedCritic  # needs packages that nothing else needs

        projected = ProjectedCritic(s.size)
    for network in filter(None, (generator, critic, projected)):
        network.to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(generator).eval().requires_grad_(False) if s.ema else None
    fused = torch.device(device).type in ("cpu", "cuda")

    def optimizer(network, lr):
        if network and s.optimizer == "rmsprop":
            return torch.optim.RMSprop(network.parameters(), lr, foreach=True)
        return network and torch.optim.Adam(network.parameters(), lr, tuple(s.betas), fused=fused)

    heads = projected and torch.optim.Adam(projected.heads.parameters(), **HEADS, fused=fused)
    state = State(generator, ema, critic, projected, optimizer(generator, s.lr_g), optimizer(critic, s.lr_d), heads)
    if is_distributed():
        state.ddp = {name: wrap(getattr(state, name)) for name in ("generator", "critic") if getattr(state, name)}
        state.ddp |= {"heads": wrap(projected.heads)} if projected else {}
    return state


def check_checkpoint(file, path):
    """Raise UserError unless a run can go on from the dict of a model file: all parts there, of the right shapes."""
    settings = Settings(**saved_settings(file, path))
    if "optim_g" not in file:
        raise UserError(f"{path} holds a generator alone; resume from a checkpoint_*.pt")
    with torch.device("meta"):  # a plan without memory
        plan = build_state(dataclasses.replace(settings, critic="pixel", device="cpu"), "meta")
        for optimizer in (plan.optim_g, plan.optim_d):
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()  # makes its state
    made_by = {"command": "", "data": {"name": "", "fingerprint": "", "images": 0}}
    plan = content_of(plan, {}, made_by)

    def parts(content):
        wanted = {"step": content["step"], "rng": content["rng"]["torch"], "command": content["made_by"]["command"]}
        wanted |= {"data": content["made_by"]["data"], "ema": content["ema"]}
        for network, optimizer in (("generator", "optim_g"), ("critic", "optim_d")):
            if file[network]:
                wanted |= {network: content[network]["state"], optimizer: content[optimizer]["state"]}
        return wanted

    try:
        found = parts(file)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: it lacks {error}") from error
    check_like(found, parts(plan), path)


def content_of(state, settings, made_by):
    """Return a full checkpoint of a Trainloop.State as a dict of plain tensors and plain types.

    settings: a dict.  made_by: a dict about command, versions and data.
    """
    content = {"format": FORMAT, "step": state.step, "settings": settings, "made_by": made_by}
    for name in NETWORKS:
        network = getattr(state, name)
        content[name] = network and {"config": network.config, "state": network.state_dict()}
    for name in ("ema", *OPTIMIZERS):
        part = getattr(state, name)
        content[name] = part and part.state_dict()
    return content | {"rng": {"torch": torch.get_rng_state()}}


def restore(state, file):
    """Load a full checkpoint into a Trainloop.State. A critic that came to the run later starts fresh."""
    for name in NETWORKS:
        if getattr(state, name) and file.get(name):
            getattr(state, name).load_state_dict(file[name]["state"])
    if state.ema:
        state.ema.load_state_dict(file["ema"])
    for name in OPTIMIZERS:
        optimizer = getattr(state, name)
        if optimizer and file.get(name):  # rates and switches are those of the settings
            optimizer.load_state_dict(optimizer.state_dict() | {"state": file[name]["state"]})
    torch.set_rng_state(file["rng"]["torch"])
    state.step = file["step"]


def take_over(state, file, path, grown=()):
    """Load the networks of a model file into the new State of --start-from, or of --grow-from.

    grown: parts, such as "up.256", that the file's networks cannot have and that stay new.
    Raises UserError where the networks do not fit.
    """
    raw, average = file["generator"]["state"], weights_of(file)
    parts = [(state.generator, raw), (state.ema, average), (state.critic, (file.get("critic") or {}).get("state"))]
    for network, weights in parts:
        if network is None or weights is None:
            continue
        try:
            missing, _ = network.load_state_dict(weights, strict=False)
        except RuntimeError as error:  # shapes that differ
            raise UserError(f"{path} does not fit: {str(error).splitlines()[-1].strip()}") from error
        lost = [key for key in missing if ".".join(key.split(".")[:2]) not in (*grown, "fade")]
        if lost:
            raise UserError(f"{path} does not fit: it lacks {', '.join(lost)}")


def check_like(value, example, where):
    """Raise UserError unless `value`, from a file, is built as `example` is: keys, types, shapes. where: its name."""
    if isinstance(example, dict):
        wrong = not isinstance(value, dict) or value.keys() != example.keys()
        parts = [] if wrong else [(value[key], example[key], f"{where}.{key}") for key in example]
    elif isinstance(example, (list, tuple)):
        wrong = not isinstance(value, (list, tuple)) or len(value) != len(example)
        parts = [] if wrong else [(v, e, f"{where}.{i}") for i, (v, e) in enumerate(zip(value, example, strict=True))]
    elif isinstance(example, torch.Tensor):
        wrong = not isinstance(value, torch.Tensor) or (value.shape, value.dtype) != (example.shape, example.dtype)
        wrong, parts = wrong or value.layout != torch.strided, []
    else:
        number = (int, float) if isinstance(example, float) else type(example)
        wrong, parts = not isinstance(value, number) or isinstance(value, bool) != isinstance(example, bool), []
    if wrong:
        raise UserError(f"{where} is not what a run of these settings has")
    for part in parts:
        check_like(*part)
