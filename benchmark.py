"""How fast this code trains beside the report's own way, on the machine at hand: python benchmark.py

Both train the same networks on the same JPEGs in turns, each in a process of its own: so whatever else the machine does
meets both alike, and neither sets anything up for the other. `data_share`: time of a batch's way beside that of a step.
"""

import json
import multiprocessing
import os
import platform
import re
import signal
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from torchvision import datasets, transforms

from atomic_write import atomic_write
from command_line import Parser, is_out_of_memory, new_file, run_command
from Critic import Critic, critic_loss, generator_loss, gradient_penalty
from Dataset import batch_indices, open_data
from device import pick_device, prepare, resolve_precision
from drawn_faces import draw_face
from Generator import SIZES, Generator
from settings import OLD_LOSSES, Settings, add_flags, check_together, checked
from training_state import build_state
from training_step import train_step

NORMS = {"wgan": "batch", "wgan-gp": "layer"}  # of the critic, by its loss
BUILT = []  # what the one way of this process consists of: step, load


def plain_networks(settings, device):
    """Return (generator, critic, optim_g, optim_d): fp32, default memory format, torch's default Adam."""
    torch.manual_seed(settings.seed)
    generator = Generator(settings.nz, settings.ngf, 3, settings.size, settings.stem_norm, settings.blocks_g).to(device)
    critic = Critic(settings.ndf, 3, settings.size, settings.norm).to(device)
    optim_g = torch.optim.Adam(generator.parameters(), lr=settings.lr_g, betas=tuple(settings.betas))
    optim_d = torch.optim.Adam(critic.parameters(), lr=settings.lr_d, betas=tuple(settings.betas))
    return generator, critic, optim_g, optim_d


def plain_images(folder, size):
    """Return a torchvision dataset of the JPEGs in the folders in `folder`; item i is ((3, size, size), label)."""
    steps = [transforms.Resize((size, size)), transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
    return datasets.ImageFolder(folder, transforms.Compose(steps))


def plain_step(networks, settings, real, z, epsilon):
    """Update the critic once, then the generator once. Returns both losses as floats.

    real: (B, 3, S, S) in [-1, 1]; z: (2, B, nz), for the critic's and the generator's turn; epsilon: (B, 1, 1, 1).
    """
    generator, critic, optim_g, optim_d = networks
    fake = generator(z[0]).detach()  # (B, 3, S, S); a graph is built, and dropped here
    loss_d = critic_loss(critic(real), critic(fake))
    if settings.loss == "wgan-gp":
        loss_d = loss_d + settings.gp_weight * gradient_penalty(critic, real, fake, epsilon)
    optim_d.zero_grad()
    loss_d.backward()
    optim_d.step()
    if settings.loss == "wgan":
        for parameter in critic.parameters():
            parameter.data.clamp_(-settings.clip_value, settings.clip_value)
    loss_g = generator_loss(critic(generator(z[1])))
    optim_g.zero_grad()
    loss_g.backward()  # also through the critic's weights, whose gradients nobody uses
    optim_g.step()
    return loss_d.item(), loss_g.item()  # waits for the device


def plain_way(settings, folder, device):
    """Return (step, load): functions that do one step and that bring one batch to the device."""
    networks, images, size = plain_networks(settings, device), plain_images(folder, settings.size), settings.batch_size
    loader = torch.utils.data.DataLoader(images, size, shuffle=True, drop_last=True)
    batches = (batch.to(device) for _ in iter(int, 1) for batch, _ in loader)  # for ever

    def step():
        z, epsilon = torch.randn(2, size, settings.nz, device=device), torch.rand(size, 1, 1, 1, device=device)
        return plain_step(networks, settings, next(batches), z, epsilon)

    return step, lambda: next(batches)


def our_way(settings, folder, device):
    """Return (step, load) as plain_way does, of the training that Trainloop.py does."""
    prepare(device)
    state = build_state(settings, device)
    data = open_data([folder / "faces"], settings.size, settings.crop, cache=folder, quiet=True)
    first = batch_indices(len(data), settings.seed, 0, settings.batch_size)
    return lambda: train_step(state, settings, data, device), lambda: data.batch(first, device)


def seconds_of(function, count, device):
    """Return the seconds that `count` calls take until the device has done them all."""
    synchronize = torch.get_device_module(device).synchronize
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        function()
    synchronize()
    return time.perf_counter() - start


def turn(build, settings, folder, device, seconds):
    """Train in one way for some seconds, after a fifth of them to warm up. Returns a dict of what was measured."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    step, load = BUILT[:] = BUILT or build(settings, folder, device)
    took = min(seconds_of(step, 1, device) for _ in range(2))  # the first one ever also chooses algorithms
    for part in (0.2, 1):
        count = max(1, round(part * seconds / took))
        took = seconds_of(step, count, device) / count
    memory = torch.cuda.max_memory_allocated()  # 0 without a GPU
    if device.type != "cuda" and os.name != "nt":
        import resource  # not on Windows

        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    data = seconds_of(load, count, device) / count
    return {"images_per_second": settings.batch_size / took, "memory_gb": memory / 1e9, "data_share": data / took}


def measure(settings, folder, device, rounds, seconds):
    """Return one row: its settings and the medians of what both ways measured, or a note on why they could not be."""
    row = {"size": settings.size, "loss": settings.loss, "batch": settings.batch_size, "ratio": None}
    turns, spawn = {"plain": [], "ours": []}, multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as plain, ProcessPoolExecutor(1, spawn) as ours:
        for way, build, pool in [("plain", plain_way, plain), ("ours", our_way, ours)] * rounds:
            try:
                turns[way].append(pool.submit(turn, build, settings, folder, device, seconds).result())
            except (MemoryError, RuntimeError) as error:  # also that the process died
                reason = "out of memory" if is_out_of_memory(error) else str(error).splitlines()[0]
                return row | {"note": f"{way}: {reason}"}
    for key in turns["ours"][0]:
        row |= {f"{way}_{key}": statistics.median(facts[key] for facts in turns[way]) for way in turns}
    pairs = zip(turns["ours"], turns["plain"], strict=True)
    return row | {"ratio": statistics.median(a["images_per_second"] / b["images_per_second"] for a, b in pairs)}


def format_table(rows):
    """Return the rows as a Markdown table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([row.get(key, "") for key in columns] for row in rows)]
    texts = [[f"{x:,.{2 if x < 100 else 0}f}" if isinstance(x, float) else str(x) for x in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in texts)


def compare(argv=None):
    """Measure all rows, print the table, write the JSON. Returns the exit status: 1 where nothing could be measured."""
    parser = Parser("Compare the speed of this training with the report's own way of training, in turns.")
    add = parser.add_argument
    add("--sizes", "--size", type=int, nargs="+", choices=SIZES, help="default: 64 128, on a GPU also 256")
    add("--losses", "--lipschitz", type=lambda name: OLD_LOSSES.get(name, name), nargs="+", choices=[*NORMS],
        default=[*NORMS], help="wgan: clipped weights and batch norm; wgan-gp: gradient penalty")  # fmt: skip
    add("--rounds", type=checked(int, "[1, inf)"), default=5, help="turns of each way")
    add("--seconds", type=checked(float, "(0, inf)"), default=3.0, help="length of a turn, after as long a warm-up")
    add("--json", type=new_file(), metavar="FILE", help="also write the numbers there")
    add_flags(parser, "ngf", "ndf", "batch_size", "precision", "device")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    shared = {"ngf": args.ngf, "ndf": args.ndf, "batch_size": args.batch_size}
    shared["precision"], tasks = resolve_precision(args.precision, device), []
    sizes = args.sizes or [64, 128, 256][: 2 if device.type == "cpu" else 3]
    as_report = {"crop": "squash", "flip": False, "ema": 0.0}
    for size, loss in ((size, loss) for size in sizes for loss in args.losses):
        tasks.append(Settings(size=size, loss=loss, norm=NORMS[loss], **shared, **as_report))
        check_together(tasks[-1])
    rows = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        (faces := Path(folder) / "faces").mkdir()
        for i in range(max(256, args.batch_size)):  # 178x218 pixels and about 7 kB, as CelebA has them
            face = Image.fromarray(draw_face(i, 109)).resize((218, 218)).crop((20, 0, 198, 218))
            face.save(faces / f"{i:06d}.jpg", quality=90)
        for settings in tasks:
            print(f"{settings.size} px, {settings.loss} ...", file=sys.stderr, flush=True)
            rows.append(measure(settings, Path(folder), device, args.rounds, args.seconds))
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    name = re.findall("model name.*: (.+)", info) or [platform.machine()]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{name[0]}, {os.cpu_count()} cores"
    about = {"device": name, "torch": str(torch.__version__)} | shared
    print("; ".join(f"{key} {value}" for key, value in about.items()), format_table(rows), sep="\n\n")
    if args.json:
        with atomic_write(args.json) as temporary:
            temporary.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    return int(all("note" in row for row in rows))


def main(argv=None):
    return run_command(compare, argv)


if __name__ == "__main__":
    sys.exit(main())
