"""Train the Wasserstein GAN: python Trainloop.py --data img_align_celeba.zip

A step is --n-critic updates of the critic and one of the generator. Everything random in a step is a pure function
of (seed, step), so a run that is stopped and resumed equals one that never stopped.

On several GPUs, or machines: torchrun --nproc-per-node 8 Trainloop.py --data img_align_celeba.zip
"""

import contextlib
import copy
import os
import platform
import shlex
import signal
import sys
import time
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the imports below take seconds, in which Ctrl-C ends without a word

import numpy as np
import torch
from tqdm import tqdm

import distributed
from atomic_write import atomic_write
from checkpoints import NETWORKS, base_names, read_model_file
from command_line import UserError, run_command
from Dataset import estimate_pack, open_data
from device import prepare, resolve_precision
from Generator import latent, to_uint8
from run_folder import list_checkpoints, locked, new_run_folder, save_checkpoint, telling_what_is_kept
from training_state import OPTIMIZERS, build_state, content_of, read_settings, restore, take_over
from training_step import batches_of, train_step

SAMPLES = 32  # faces in a sample grid: cell i is the face of seed i


def spread(images):
    """Mean over pixels of the standard deviation over the batch: (B, C, H, W) -> scalar, 0 if all are alike."""
    return images.float().std(dim=0, correction=0).mean()


def mean_scalars(noted, state, out):
    """Return {name: mean} of what the last steps noted, over these and over all ranks.

    Raises FloatingPointError where one of them, or a weight, is not a finite number.
    """
    values = torch.stack([torch.stack(list(scalars.values())) for scalars in noted])  # (steps, names)
    values = distributed.mean_over_ranks(values).cpu()  # CPU-GPU sync point
    networks = filter(None, (state.generator, state.critic, state.projected, state.identity))
    weights = torch.nn.utils.get_total_norm([p for network in networks for p in network.parameters()])
    bad = (~values.isfinite().all(dim=1)).nonzero()
    if len(bad) or not weights.isfinite():
        step = state.step - len(noted) + 1 + int(bad[0]) if len(bad) else state.step
        raise FloatingPointError(
            f"the {'loss is' if len(bad) else 'weights are'} not finite at step {step}; the last good checkpoint is "
            f"{next(iter(list_checkpoints(out)), 'none yet')}; start a new run with a lower --lr-d and --lr-g, or "
            "--precision fp32"
        )
    return dict(zip(noted[0], values.mean(dim=0).tolist(), strict=True))


def log(writer, bar, state, settings, scalars, real, fake, speed):
    """Write scalars to TensorBoard and a line to the terminal. real, fake: (B, 3, S, S); speed: steps per second."""
    # 1: the fakes differ from each other as the real images do.  0: mode collapse.
    scalars["generator/diversity"] = (spread(fake) / spread(real).clamp_min(1e-6)).item()
    scalars["speed/images_per_second"] = speed * settings.batch_size * len(batches_of(state, settings))
    if settings.loss == "wgan" and state.critic:
        weights = torch.cat([p.detach().flatten() for p in state.critic.parameters()])
        scalars["critic/clipped_share"] = (weights.abs() >= settings.clip_value).float().mean().item()
    for name, value in scalars.items():
        writer.add_scalar(name, value, state.step)
    line = [f"{name[5:]} {scalars[name]:.3g}" for name in ("loss/critic", "loss/generator") if name in scalars]
    line = ", ".join([*line, f"{scalars['speed/images_per_second']:.0f} images/s"])
    bar.set_postfix_str(line)
    if bar.disable:
        left = bar.format_interval((settings.steps - state.step) / speed)
        print(f"step {state.step}/{settings.steps}  {line}, {left} left", flush=True)


@torch.no_grad()
def write_samples(writer, state, settings, real, out):
    """Write the faces of seeds 0 .. SAMPLES-1 and real images to TensorBoard, the faces also to samples.png."""
    from torchvision.utils import make_grid, save_image

    network = (state.ema or copy.deepcopy(state.generator)).eval()
    z = torch.stack([latent(seed, settings.nz) for seed in range(SAMPLES)]).to(real.device)  # (SAMPLES, nz)
    grids = {"generated": network(z), "real": real[:SAMPLES]}
    for name, images in grids.items():
        grids[name] = make_grid(to_uint8(images).cpu(), nrow=8, padding=2, pad_value=255)  # (3, H, W)
        writer.add_image(f"samples/{name}", grids[name], state.step)
    with atomic_write(out / "samples.png") as temporary:
        save_image(grids["generated"] / 255, temporary)


def dry_run(settings, device, begun):
    """Print parameters, memory, disk and the hours from step `begun` on, as a few steps of random images take them."""

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

    images, packed = estimate_pack(settings.data, settings.size)
    state = build_state(settings, device)
    state.step = settings.warmup_steps  # before it a step costs less
    seconds(2)  # warm up
    per_step = seconds(3 if device.type == "cpu" else 50)
    networks = {name: getattr(state, name) for name in NETWORKS if getattr(state, name)}
    count = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    slots = [slot for name in OPTIMIZERS if getattr(state, name) for slot in getattr(state, name).state.values()]
    slots += [network.state_dict() for network in (*networks.values(), state.ema) if network]
    full = sum(tensor.nbytes for slot in slots for tensor in slot.values())
    kept = settings.steps // settings.checkpoint_every
    print("parameters   " + ", ".join(f"{name} {number:,}" for name, number in count.items() if number))
    if device.type == "cuda":
        used, note = torch.cuda.max_memory_allocated(device), f"on {torch.cuda.get_device_name()}, beside the images"
    else:
        used, note = full + 4 * sum(count.values()), "for weights, gradients and optimizers, beside the batch's"
    print(f"memory       {used / 1e9:.2f} GB {note}")
    print(f"disk         {packed / 1e9:.2f} GB for {images:,} packed images, {(settings.keep + 1) * full / 1e9:.2f} GB "
          f"for the last {settings.keep} checkpoints (+1 while writing), {4e-9 * kept * count['generator']:.2f} GB for "
          f"{kept} generators")  # fmt: skip
    steps, speed = max(0, settings.steps - begun), len(batches_of(state, settings)) * settings.batch_size / per_step
    print(f"expected     {per_step * steps / 3600:.1f} hours for {steps:,} steps from step {begun:,} at "
          f"{1 / per_step:.2f} steps/s, {speed:.0f} images/s on {device}")  # fmt: skip


@contextlib.contextmanager
def noting_signals(out):
    """Give a list to which SIGINT, SIGTERM and SIGHUP add their numbers, so that the step is finished first.

    A second Ctrl-C raises KeyboardInterrupt at once.
    """
    noted = []

    def note(number, frame):
        if noted and number == signal.SIGINT:
            raise KeyboardInterrupt
        noted.append(number)
        text = (f"\n{signal.Signals(number).name}: finishing the step and writing a checkpoint into {out}; Ctrl-C now "
                "would lose all steps since the one before\n")  # fmt: skip
        with contextlib.suppress(OSError):  # not print, which a signal may have come into the midst of
            os.write(2, text.encode() if distributed.rank() == 0 else b"")

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores one
    handlers = {number: signal.signal(number, note) for number in heeded}
    try:
        yield noted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def describe_run(dataset, file):
    """Return what a model file says about its making: the commands of all runs that led to it, without folders.

    file: of the model that the run goes on from, or an empty dict.
    """
    command = shlex.join(["python", *base_names(sys.argv)])
    before = str((file.get("made_by") or {}).get("command", ""))
    return {
        "command": before if before.endswith(command) else f"{before}\n{command}".strip(),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__},
        "data": {"name": dataset.name, "fingerprint": dataset.fingerprint, "images": len(dataset)},
    }


def start(settings, device, dataset, checkpoint, path):
    """Return the State to train from, and what its files shall say about its making."""
    state = build_state(settings, device)
    if checkpoint:
        before = checkpoint["made_by"]["data"]
        if before["fingerprint"] != dataset.fingerprint:
            raise UserError(
                f"--data {' '.join(settings.data)}: {len(dataset):,} images ({dataset.fingerprint}), but the run in "
                f"{path} was trained on {before['images']:,} others ({before['name']}, {before['fingerprint']}); pass "
                "the same images, or start a new run with another --out"
            )
        restore(state, checkpoint)
        print(f"Going on from step {state.step:,} of {path}.")
    elif source := settings.grow_from or settings.start_from:
        checkpoint = read_model_file(source)
        take_over(state, checkpoint, source, settings.freeze_g)
    made_by = describe_run(dataset, checkpoint or {})
    if checkpoint:
        checkpoint.clear()  # or its tensors would stay in memory for all of the run
    return state, made_by


def train(settings, checkpoint=None, path=None):
    """Train until step settings.steps, or until a signal. Returns the exit status."""
    device = distributed.pick_rank_device(settings.device)
    prepare(device)
    settings.precision = distributed.from_rank_0(resolve_precision, settings.precision, device)
    distributed.share_of_batch(settings.batch_size)  # refuses one that the ranks cannot share
    if settings.dry_run:
        return dry_run(settings, device, begun=checkpoint["step"] if checkpoint else 0)
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and needed only here

    is_first = distributed.rank() == 0
    with contextlib.ExitStack() as stack:
        if settings.out and is_first:
            stack.enter_context(locked(Path(settings.out), is_new=not checkpoint))
        source = settings.data, settings.size, settings.crop, settings.split, settings.cache, settings.workers
        dataset = distributed.one_rank_first(partial(open_data, *source, quiet=not is_first))
        settings.data = dataset.paths  # so that a resume finds the same, also where none were given
        state, made_by = start(settings, device, dataset, checkpoint, path)
        if state.step >= settings.steps:
            print(f"Nothing to do: {settings.out} is at step {state.step:,} of --steps {settings.steps:,}.")
            return 0
        if settings.out is None:
            name = f"{dataset.name}-{settings.size}px-{settings.loss}"
            settings.out = str(distributed.from_rank_0(new_run_folder, name))
            if is_first:
                stack.enter_context(locked(Path(settings.out), is_new=True))
        out = Path(settings.out)
        print(f"Training {settings.size} px on {len(dataset):,} images ({dataset.name}), {settings.precision} on "
              f"{device}, into {out}\nWatch it with: tensorboard --logdir {out.parent}", flush=True)  # fmt: skip
        if is_first:
            stack.enter_context(telling_what_is_kept(out))
            # purge_step hides what a killed run had logged after its last checkpoint, and now comes again.
            writer = stack.enter_context(SummaryWriter(out, purge_step=state.step + 1, flush_secs=10))
            table = "".join(f"| {name} | {value} |\n" for name, value in vars(settings).items())
            writer.add_text("settings", f"| setting | value |\n|---|---|\n{table}", state.step)
        signals = stack.enter_context(noting_signals(out))
        bar = stack.enter_context(tqdm(total=settings.steps, initial=state.step, unit="step", dynamic_ncols=True,
                                       disable=None if is_first else True))  # fmt: skip
        noted, is_last = [], False
        begin = last_log = time.perf_counter()
        while not is_last:
            scalars, real, fake = train_step(state, settings, dataset, device)
            noted.append(scalars)
            bar.update()
            stop = distributed.agree_on_stop(signals)
            is_last = stop > 0 or state.step == settings.steps
            rhythms = settings.log_every, settings.sample_every, settings.checkpoint_every
            log_now, sample_now, save_now = (is_last or state.step % every == 0 for every in rhythms)
            if log_now or save_now:  # what is saved was checked and logged, so that a resume carries nothing over
                scalars, now = mean_scalars(noted, state, out), time.perf_counter()
                if is_first:
                    log(writer, bar, state, settings, scalars, real, fake, speed=len(noted) / (now - last_log))
                last_log = now
                noted.clear()
            if sample_now and is_first:
                write_samples(writer, state, settings, real, out)
            if save_now and is_first:
                writer.flush()  # what is logged must not be younger than this
                save_checkpoint(content_of(state, vars(settings), made_by), out, settings.keep)
        took = bar.format_interval(time.perf_counter() - begin)
    if stop and state.step < settings.steps:
        print(f"Stopped by {signal.Signals(stop).name} at step {state.step:,} after {took}; go on with: "
              f"python Trainloop.py --resume {out}")  # fmt: skip
        return 128 + stop
    print(f"Finished step {state.step:,} after {took}; faces, checkpoints and TensorBoard files are in {out}, "
          f"the newest faces in {out / 'samples.png'}")  # fmt: skip
    return 0


def train_command(argv):
    with distributed.joined_ranks():
        return train(*read_settings(argv))


def main(argv=None):
    return run_command(train_command, argv)


if __name__ == "__main__":
    sys.exit(main())
