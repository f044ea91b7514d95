"""Train the Wasserstein GAN: python Trainloop.py --data img_align_celeba.zip

A step is one update of the generator, preceded by --n-critic updates of the critic. Everything random in a
step is a pure function of (seed, step), so a run that is stopped and resumed equals one that never stopped.

On several GPUs, or machines: torchrun --nproc-per-node 8 Trainloop.py --data img_align_celeba.zip
"""

import contextlib
import platform
import shlex
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from atomic_write import atomic_write
from augmentation import NUMBERS, augment
from checkpoints import read_model_file
from command_line import UserError, run_command
from Critic import clip_weights, critic_loss, generator_loss, gradient_penalty
from Dataset import batch_indices, estimate_pack, open_data, seeded
from device import prepare, resolve_precision
from distributed import (
    agree_on_stop,
    from_rank_0,
    init,
    leave,
    mean_over_ranks,
    one_rank_first,
    pick_rank_device,
    rank,
    share_of_batch,
)
from Generator import latent, to_uint8
from run_folder import locked, new_run_folder, save_checkpoint
from settings import read_settings
from training_state import build_state, check_checkpoint, content_of, restore, take_over

SAMPLES = 32  # faces in a sample grid: cell i is the face of seed i


# ---- one step -------------------------------------------------------------------------------------------------


def draw_noise(settings, step):
    """Return all random numbers of a step, drawn on the CPU from (seed, step), so that they are the same everywhere.

    z: (n_critic + 1, B, nz) latents, the last for the generator.  epsilon: (n_critic, B, 1, 1, 1) in [0, 1).
    flip: (n_critic, B, 1, 1, 1) bool.  augment: (n_critic + 1, B, 2, NUMBERS) in [0, 1), for fake and real images.
    """
    random, n, b = seeded(settings.seed, 1, step), settings.n_critic, settings.batch_size
    return {
        "z": torch.randn(n + 1, b, settings.nz, generator=random),
        "epsilon": torch.rand(n, b, 1, 1, 1, generator=random),
        "flip": (torch.rand(n, b, 1, 1, 1, generator=random) < 0.5) & settings.flip,
        "augment": torch.rand(n + 1, b, 2, NUMBERS, generator=random),
    }


def critic_step(state, settings, real, fake, epsilon):
    """Update the pixel critic once. real, fake: (B, 3, S, S) without a graph; epsilon: (B, 1, 1, 1).

    Returns its scalars by their names in TensorBoard, on the device. Under torchrun all but the norm are about this
    rank's share of the batch.
    """
    critic = state.ddp.get("critic", state.critic)
    penalty = real.new_zeros(())
    if settings.loss == "wgan-gp":
        # A backward pass of its own: the gradients add up, and the graphs are never in memory together. The ranks
        # exchange them after the other pass, since no bias has a part in the penalty, and DDP waits for all weights.
        with critic.no_sync() if state.ddp else contextlib.nullcontext():
            with autocast(settings, real.device):
                penalty = gradient_penalty(critic, real, fake, epsilon)
            (settings.gp_weight * penalty).backward()
    with autocast(settings, real.device):
        loss = critic_loss(critic(real), critic(fake))
    loss.backward()
    norm = finish_update(state.optim_d)
    if settings.loss == "wgan":
        clip_weights(state.critic, settings.clip_value)
    loss, penalty = loss.detach(), penalty.detach()
    scalars = {"loss/critic": loss + settings.gp_weight * penalty, "critic/wasserstein": -loss}
    scalars |= {"critic/gradient_penalty": penalty} if settings.loss == "wgan-gp" else {}
    return scalars | {"critic/gradient_norm": norm}


def projected_step(state, settings, real, fake):
    """Update the projected critic's heads once. real, fake: features without a graph, lists of (B, C, R, R)."""
    heads = state.ddp.get("heads", state.projected.heads)
    with autocast(settings, real[0].device):
        loss = critic_loss(heads(real), heads(fake))
    loss.backward()
    return {"projected/wasserstein": -loss.detach(), "projected/gradient_norm": finish_update(state.optim_p)}


def generator_step(state, settings, fake, images, losses):
    """Update the generator once, along the gradients of the critics' losses at its images.

    fake: (B, 3, S, S) with the generator's graph.  images: the same numbers, where the graphs of the losses end.
    losses: one for each critic. Two gradients are brought to the same norm, that of the first, and mixed.
    """
    gradients = [torch.autograd.grad(loss, images, retain_graph=True)[0] for loss in losses]  # (B, 3, S, S) each
    gradient = gradients[0]
    if len(gradients) == 2:
        first, second = (mean_over_ranks(g.float().square().sum()).sqrt() for g in gradients)
        gradient = torch.lerp(gradient, gradients[1] * (first / second.clamp_min(1e-30)), settings.projected_share)
    fake.backward(gradient)
    return {"loss/generator": losses[0].detach(), "generator/gradient_norm": finish_update(state.optim_g)}


def finish_update(optimizer):
    """Step along the gradients and free them. Returns their L2 norm, a scalar."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    optimizer.step()
    optimizer.zero_grad()
    return norm


def autocast(settings, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")


@torch.no_grad()
def update_ema(ema, network, decay):
    """ema = decay * ema + (1 - decay) * network, for weights and BatchNorm's statistics; counters are copied."""
    ours, theirs = list(ema.state_dict().values()), list(network.state_dict().values())
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    average([t for t in ours if t.is_floating_point()], [t for t in theirs if t.is_floating_point()], None)
    for mine, other in zip(ours, theirs, strict=True):
        if not mine.is_floating_point():
            mine.copy_(other)


def set_fade(state, settings):
    """Set how far the newest blocks are faded in at the step that comes: 0 at the first, 1 after --fade-steps."""
    fade = min(1.0, state.step / settings.fade_steps) if settings.fade_steps else 1.0
    for network in filter(None, (state.generator, state.critic, state.ema)):
        if network.fade is not None:
            network.fade.fill_(fade)


def train_step(state, settings, dataset, device):
    """Do one step. Returns (scalars by their names in TensorBoard, real, fake), the images (B, 3, S, S) in [-1, 1].

    Under torchrun a rank does its share of the batch, and what it returns is about that share alone.
    """
    share, last = share_of_batch(settings.batch_size), settings.n_critic - 1
    noise = draw_noise(settings, state.step)  # of the whole batch, so that it is the same on any number of ranks
    noise = {name: values[:, share].to(device, non_blocking=True) for name, values in noise.items()}
    set_fade(state, settings)
    generator = state.ddp.get("generator", state.generator)

    def generate(z, numbers):
        """Return (B, 3, S, S) images with the generator's graph, without, and these as the critics see them."""
        with autocast(settings, device):
            fake = generator(z)  # (B, 3, S, S)
        images = fake.detach().requires_grad_()
        return fake, images, augment(images, settings.augment, numbers[:, 0])

    for i in range(settings.n_critic):
        start = (state.step * settings.n_critic + i) * settings.batch_size
        indices = batch_indices(len(dataset), settings.seed, start, settings.batch_size)
        real = dataset.batch(indices[share], device)  # (B, 3, S, S)
        real = torch.where(noise["flip"][i], real.flip(3), real)
        seen_real = augment(real, settings.augment, noise["augment"][i][:, 1])
        with torch.set_grad_enabled(settings.reuse_fakes and i == last):
            fake, images, seen = generate(noise["z"][i], noise["augment"][i])
        scalars = critic_step(state, settings, seen_real, seen.detach(), noise["epsilon"][i]) if state.critic else {}
    if not settings.reuse_fakes:
        fake, images, seen = generate(noise["z"][-1], noise["augment"][-1])

    losses = []
    with autocast(settings, device), frozen(state.critic, state.projected and state.projected.heads):
        if state.critic:
            losses.append(generator_loss(state.critic(seen)))
        if state.projected:
            features = state.projected.features(seen)
            with torch.no_grad():
                real_features = state.projected.features(seen_real)
    if state.projected:
        scalars |= projected_step(state, settings, real_features, [feature.detach() for feature in features])
        with autocast(settings, device), frozen(state.projected.heads):
            losses.append(generator_loss(state.projected.heads(features)))
    scalars |= generator_step(state, settings, fake, images, losses)
    if state.ema:
        # Early on the average follows faster, or it would show the random start for 1 / (1 - ema) steps. A network
        # that was grown or taken over does not start at random, and brings its average along.
        begun = settings.grow_from or settings.start_from
        update_ema(state.ema, state.generator, min(settings.ema, 1 if begun else (1 + state.step) / (10 + state.step)))
    state.step += 1
    return scalars, real, images.detach()


@contextlib.contextmanager
def frozen(*networks):
    """Within this block the networks' weights get no gradients, which would be computed and thrown away."""
    parameters = [p for network in networks if network is not None for p in network.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    yield
    for parameter in parameters:
        parameter.requires_grad_(True)


# ---- what one sees --------------------------------------------------------------------------------------------


def spread(images):
    """Mean over pixels of the standard deviation over the batch: (B, C, H, W) -> scalar, 0 if all are alike."""
    return images.float().std(dim=0, correction=0).mean()


def mean_scalars(noted):
    """Return {name: mean} of a list of scalars by name, over its steps and over all ranks."""
    names = list(noted[0])
    values = torch.stack([torch.stack([scalars[name] for name in names]) for scalars in noted])  # (steps, names)
    return dict(zip(names, mean_over_ranks(values.mean(dim=0)).tolist(), strict=True))


def check_finite(state, scalars, before, out):
    """Raise FloatingPointError where a loss, or a weight, is no longer a finite number. before: the last good step."""
    weights = torch.nn.utils.get_total_norm(list(state.generator.parameters()))
    if not all(np.isfinite(value) for value in scalars.values()) or not weights.isfinite():
        raise FloatingPointError(
            f"the losses or weights are not finite any more between steps {before} and {state.step}; {out} keeps the "
            "checkpoints before; start a new run with a lower --lr-d and --lr-g, or --precision fp32"
        )


@torch.no_grad()
def write_samples(writer, state, settings, real, out):
    """Write the faces of seeds 0 .. SAMPLES-1 and real images to TensorBoard, the faces also to samples.png."""
    network = state.ema or state.generator
    z = torch.stack([latent(seed, settings.nz) for seed in range(SAMPLES)]).to(real.device)  # (SAMPLES, nz)
    network.eval()
    grids = {"generated": network(z), "real": real[:SAMPLES]}
    network.train(network is state.generator)
    for name, images in grids.items():
        grid = make_grid(to_uint8(images).cpu(), nrow=8, padding=2, pad_value=255)  # (3, H, W)
        writer.add_image(f"samples/{name}", grid, state.step)
        if name == "generated":
            with atomic_write(out / "samples.png") as temporary:
                save_image(grid / 255, temporary)


def dry_run(state, settings, device):
    """Print parameters, memory, disk and expected hours; the speed is measured on a few steps of random images."""

    class RandomImages:
        def __len__(self):
            return 1_000_000

        def batch(self, indices, device):
            images = torch.rand(len(indices), settings.size, settings.size, 3, device=device)
            return images.permute(0, 3, 1, 2) * 2 - 1

    def seconds(steps):
        start = time.perf_counter()
        for _ in range(steps):
            scalars, _, _ = train_step(state, settings, RandomImages(), device)
        scalars["loss/generator"].cpu()  # waits for the device
        return (time.perf_counter() - start) / steps

    seconds(2)  # warm up
    per_step = seconds(3 if device.type == "cpu" else 50)
    count = {name: sum(p.numel() for p in getattr(state, name).parameters()) for name in ("generator", "critic")
             if getattr(state, name)}  # fmt: skip
    weights = 4 * sum(count.values())
    steps, kept = settings.steps, settings.steps // settings.checkpoint_every
    full = 3 * weights + 4 * count["generator"] * bool(settings.ema)
    images, packed = estimate_pack(settings.data, settings.size)
    print("parameters   " + ", ".join(f"{name} {number:,}" for name, number in count.items()))
    if device.type == "cuda":
        print(f"memory       {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB on {torch.cuda.get_device_name()}, "
              "beside the images, which go there where they fill no more than half of what is free")  # fmt: skip
    else:
        print(f"memory       {(full + weights) / 1e9:.2f} GB for weights, gradients and optimizers, beside the batch's")
    print(f"disk         {packed / 1e9:.2f} GB for {images:,} packed images, {(settings.keep + 1) * full / 1e9:.2f} GB "
          f"for the last {settings.keep} checkpoints (+1 while writing), {kept * 4 * count['generator'] / 1e9:.2f} GB "
          f"for {kept} generators")  # fmt: skip
    print(f"expected     {per_step * steps / 3600:.1f} hours for {steps:,} steps at {1 / per_step:.2f} "
          f"steps/s, {settings.n_critic * settings.batch_size / per_step:.0f} images/s on {device}")  # fmt: skip


# ---- the loop -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def noting_signals():
    """Give a list to which SIGINT, SIGTERM and SIGHUP add their numbers, so that the step is finished first.

    A second Ctrl-C raises KeyboardInterrupt at once.
    """
    noted = []

    def note(number, frame):
        if noted and number == signal.SIGINT:
            raise KeyboardInterrupt
        noted.append(number)
        print(f"{signal.Signals(number).name}: finishing the step and writing a checkpoint; Ctrl-C again would lose "
              "all since the last one.", flush=True)  # fmt: skip

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    handlers = {number: signal.signal(number, note) for number in numbers}
    try:
        yield noted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def describe_run(dataset, checkpoint=None):
    """Return what a model file says about its making; the commands of all runs that led to it, a line each."""
    command = shlex.join(["python", Path(sys.argv[0]).name, *(Path(word).name or word for word in sys.argv[1:])])
    before = ((checkpoint or {}).get("made_by") or {}).get("command", "")
    return {
        "command": before if before.endswith(command) else f"{before}\n{command}".strip(),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__},
        "data": {"name": dataset.name, "fingerprint": dataset.fingerprint, "images": len(dataset)},
    }


def start(settings, device, dataset, checkpoint, checkpoint_path):
    """Return the State to train from, and what its files shall say about its making."""
    state = build_state(settings, device)
    source = settings.grow_from or settings.start_from
    if checkpoint:
        before = checkpoint["made_by"]["data"]
        if before["fingerprint"] != dataset.fingerprint:
            raise UserError(
                f"--data {' '.join(dataset.paths)}: {len(dataset):,} images ({dataset.fingerprint}), but the run in "
                f"{checkpoint_path} was trained on {before['images']:,} others ({before['name']}, "
                f"{before['fingerprint']}); pass the same images, or start a new run with another --out"
            )
        restore(state, checkpoint)
        print(f"Going on from step {state.step:,} of {checkpoint_path}.")
    elif source:
        checkpoint = read_model_file(source)
        new = ("up.{0}", "to_rgb.{0}", "from_rgb.{0}", "down.{1}") if settings.grow_from else ()
        take_over(state, checkpoint, source, [part.format(settings.size, settings.size // 2) for part in new])
    return state, describe_run(dataset, checkpoint)


def train(settings, checkpoint, checkpoint_path):
    """Train until step settings.steps, or until a signal. Returns the exit status."""
    device = pick_rank_device(settings.device)
    prepare(device)
    settings.precision = from_rank_0(resolve_precision, settings.precision, device)
    share_of_batch(settings.batch_size)  # refuses one that the ranks cannot share
    if settings.dry_run:
        return dry_run(build_state(settings, device), settings, device)
    dataset = one_rank_first(lambda: open_data(settings.data, settings.size, settings.crop, settings.split,
                                               settings.cache, settings.workers, quiet=rank() > 0))  # fmt: skip
    settings.data = dataset.paths  # so that a resume finds the same, also where none were given
    state, made_by = start(settings, device, dataset, checkpoint, checkpoint_path)
    checkpoint = None  # or its tensors would stay in memory for all of the run
    if state.step >= settings.steps:
        print(f"Nothing to do: {settings.out} is at step {state.step:,} of --steps {settings.steps:,}.")
        return 0
    name = f"{dataset.name}-{settings.size}px-{settings.loss}"
    out = Path(settings.out or from_rank_0(new_run_folder, name))
    out.mkdir(parents=True, exist_ok=True)
    settings.out = str(out)
    with contextlib.ExitStack() as stack:
        if rank() == 0:
            stack.enter_context(locked(out))
            # purge_step hides what a killed run had logged after its last checkpoint, and now comes again.
            writer = stack.enter_context(SummaryWriter(out, purge_step=state.step + 1, flush_secs=10))
            writer.add_text("settings", settings_table(settings), state.step)
        print(
            f"Training {settings.size} px on {len(dataset):,} images ({dataset.name}), {settings.precision} on "
            f"{device}, into {out}\nWatch it with: tensorboard --logdir {out.parent}"
        )
        signals = stack.enter_context(noting_signals())
        bar = stack.enter_context(tqdm(total=settings.steps, initial=state.step, unit="step", dynamic_ncols=True,
                                       disable=True if rank() > 0 else None))  # fmt: skip
        begin, noted = time.perf_counter(), []
        last = (begin, state.step)
        while True:
            scalars, real, fake = train_step(state, settings, dataset, device)
            noted.append(scalars)
            bar.update()
            stop = agree_on_stop(signals)
            done = bool(stop) or state.step == settings.steps

            def due(every, done=done):
                return done or state.step % every == 0

            if due(settings.log_every) or due(settings.checkpoint_every):  # what is saved is checked, and logged
                scalars = mean_scalars(noted)  # CPU-GPU sync point
                check_finite(state, scalars, last[1], out)
                noted.clear()
                now = time.perf_counter()
                speed = (state.step - last[1]) * settings.n_critic * settings.batch_size / (now - last[0])
                last = (now, state.step)
                if rank() == 0:
                    log(writer, bar, state, settings, scalars, real, fake, speed)
            if rank() == 0 and due(settings.sample_every):
                write_samples(writer, state, settings, real, out)
            if rank() == 0 and due(settings.checkpoint_every):
                writer.flush()  # what is logged must not be younger than this
                save_checkpoint(content_of(state, vars(settings), made_by), out, settings.keep)
            if done:
                break
    took = time.strftime("%H:%M:%S", time.gmtime(time.perf_counter() - begin))
    if stop and state.step < settings.steps:
        print(f"Stopped by {signal.Signals(stop).name} at step {state.step:,} after {took}; go on with: "
              f"python Trainloop.py --resume {out}")  # fmt: skip
        return 128 + stop
    print(f"Finished step {state.step:,} after {took}; faces, checkpoints and TensorBoard files are in {out}, "
          f"the newest faces in {out / 'samples.png'}")  # fmt: skip
    return 0


def log(writer, bar, state, settings, scalars, real, fake, speed):
    """Write scalars to TensorBoard and a line to the terminal. real, fake: (B, 3, S, S); speed: images per second."""
    # 1: the fakes differ from each other as the real images do.  0: mode collapse.
    scalars["generator/diversity"] = (spread(fake) / spread(real).clamp_min(1e-6)).item()
    scalars["speed/images_per_second"] = speed
    if settings.loss == "wgan" and state.critic:
        weights = torch.cat([p.detach().flatten() for p in state.critic.parameters()])
        scalars["critic/clipped_share"] = (weights.abs() >= settings.clip_value).float().mean().item()
    for name, value in scalars.items():
        writer.add_scalar(name, value, state.step)
    line = ", ".join(f"{name.rpartition('/')[2]} {scalars[name]:.3g}" for name in ("loss/critic", "loss/generator")
                     if name in scalars) + f", {speed:.0f} images/s"  # fmt: skip
    bar.set_postfix_str(line)
    if bar.disable:
        print(f"step {state.step}/{settings.steps}  {line}", flush=True)


def settings_table(settings):
    """Return the settings as a Markdown table."""
    return "| setting | value |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in vars(settings).items())


def run(argv):
    init()
    settings, checkpoint, path = read_settings(argv, check_checkpoint)
    status = train(settings, checkpoint, path)
    leave()
    return status


def main(argv=None):
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
