"""How fast this code trains beside the report's own way, on the machine at hand: python benchmark.py

Both ways train the same networks on the same JPEGs with the same losses and optimizers, in alternation, so that
whatever else the machine does meets both alike. Prints the table that the README shows; its column `data` is the time
that getting a batch takes beside that of a step: what a step waits where nothing overlaps it.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from command_line import is_out_of_memory
from Critic import Critic, critic_loss, generator_loss, gradient_penalty
from Dataset import batch_indices, draw_face, is_writable, open_data
from device import pick_device, prepare, resolve_precision
from Generator import SIZES, Generator, check_size
from settings import add_flags

# Trainloop is imported where it is needed: what it may set up in a process must not reach the plain way's.

FACES = 256  # JPEGs; few, since what a JPEG costs does not depend on how many there are
COLUMNS = ("size", "lipschitz", "batch", "plain images/s", "ours images/s", "ratio", "plain GB", "ours GB",
           "of the matrix peak", "data")  # fmt: skip


# ---- the report's way -----------------------------------------------------------------------------------------


def plain_networks(settings, device):
    """Return (generator, critic, optim_g, optim_d): fp32, default memory format, torch's default Adam."""
    torch.manual_seed(settings.seed)
    generator = Generator(settings.nz, settings.ngf, 3, settings.size, settings.stem_norm).to(device)
    critic = Critic(settings.ndf, 3, settings.size, settings.norm).to(device)
    optim_g = torch.optim.Adam(generator.parameters(), lr=settings.lr_g, betas=tuple(settings.betas))
    optim_d = torch.optim.Adam(critic.parameters(), lr=settings.lr_d, betas=tuple(settings.betas))
    return generator, critic, optim_g, optim_d


def plain_images(folder, size):
    """Return a torchvision dataset of the JPEGs in the folders in `folder`; item i is ((3, size, size), label)."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import Compose, Normalize, Resize, ToTensor

    return ImageFolder(folder, Compose([Resize((size, size)), ToTensor(), Normalize((0.5,) * 3, (0.5,) * 3)]))


def plain_step(networks, settings, real, z, epsilon):
    """Update the critic once, then the generator once. Returns both losses as floats.

    real: (B, 3, S, S) in [-1, 1]; z: (2, B, nz), for the critic's and the generator's turn; epsilon: (B, 1, 1, 1).
    """
    generator, critic, optim_g, optim_d = networks

    fake = generator(z[0]).detach()  # (B, 3, S, S); a graph is built, and dropped here
    loss_d = critic_loss(critic(real), critic(fake))
    if settings.lipschitz == "gp":
        loss_d = loss_d + settings.gp * gradient_penalty(critic, real, fake, epsilon)
    optim_d.zero_grad()
    loss_d.backward()
    optim_d.step()
    if settings.lipschitz == "clip":
        for parameter in critic.parameters():
            parameter.data.clamp_(-settings.clip, settings.clip)

    loss_g = generator_loss(critic(generator(z[1])))
    optim_g.zero_grad()
    loss_g.backward()  # also through the critic's weights, whose gradients nobody uses
    optim_g.step()
    return loss_d.item(), loss_g.item()  # waits for the device


def plain_way(settings, folder, device):
    """Return (step, load): functions that do one step and that bring one batch to the device."""
    networks = plain_networks(settings, device)
    images = plain_images(folder, settings.size)
    loader = torch.utils.data.DataLoader(images, settings.batch_size, shuffle=True, drop_last=True)

    def endless():
        while True:
            yield from loader

    batches = endless()

    def load():
        return next(batches)[0].to(device)

    def step():
        z = torch.randn(2, settings.batch_size, settings.nz, device=device)
        epsilon = torch.rand(settings.batch_size, 1, 1, 1, device=device)
        return plain_step(networks, settings, load(), z, epsilon)

    return step, load


# ---- our way --------------------------------------------------------------------------------------------------


def our_way(settings, folder, device):
    """Return (step, load) as plain_way does, of the training that Trainloop.py does."""
    import Trainloop

    prepare(device)
    state = Trainloop.build_state(settings, device)
    dataset = open_data([folder / "faces"], settings.size, settings.crop, cache=folder, quiet=True)

    def load():
        indices = batch_indices(len(dataset), settings.seed, 0, settings.batch_size)
        return dataset.batch(indices, device)

    return lambda: Trainloop.train_step(state, settings, dataset, device)[0], load


def settings_of(args, size, lipschitz, device):
    """Return Trainloop's settings for one row, for both ways: its defaults, and what the report did otherwise.

    Raises ValueError for settings that are impossible.
    """
    import Trainloop

    flags = {"size": size, "ngf": args.ngf, "ndf": args.ndf, "batch-size": args.batch_size, "lipschitz": lipschitz,
             "precision": args.precision, "device": args.device, "crop": "squash", "n-critic": 1, "ema": 0}  # fmt: skip
    flags |= {"norm": "batch"} if lipschitz == "clip" else {}
    settings = Trainloop.read_settings(["--no-flip", *(f"--{name}={value}" for name, value in flags.items())])[0]
    settings.precision = resolve_precision(settings.precision, device)
    check_size("ngf", settings.ngf, size)
    check_size("ndf", settings.ndf, size)
    return settings


# ---- measuring, each way in a process of its own --------------------------------------------------------------


class CountFlops(TorchDispatchMode):
    """Counts in `total` what convolutions and matrix products do while it is active: 2 per multiply and add.

    With the formulas of torch's FlopCounterMode; that class itself cannot run a gradient penalty, since its book
    of modules hangs hooks on tensors that torch.autograd.grad does not allow them on.
    """

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in flop_registry:
            self.total += flop_registry[function.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def seconds_of(function, count, device):
    """Return the seconds that `count` calls take until the device has done them all."""
    synchronize = torch.get_device_module(device).synchronize
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        function()
    synchronize()
    return time.perf_counter() - start


def matrix_peak(device, precision):
    """Return the floating-point operations per second of large matrix products, the best of several."""
    n = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # TF32, which cuDNN may take for fp32 convolutions, too
    best = min(seconds_of(lambda: a @ b, 1, device) for _ in range(5))
    torch.set_float32_matmul_precision(before)
    return 2 * n**3 / best


def peak_memory(device):
    """Return the most bytes this process ever used: allocated on a CUDA GPU, else resident; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def work(pipe, way, settings, folder, device):
    """Build one way and do what the parent asks for over `pipe`, until it ends this process."""

    def warm_up(seconds):
        """Return how many steps take about `seconds`."""
        seconds_of(step, 1, device)  # the first one allocates and chooses algorithms
        count, end = 0, time.perf_counter() + seconds
        while count == 0 or time.perf_counter() < end:
            seconds_of(step, 1, device)
            count += 1
        return count

    def report(count):
        """Return {name: value} of what is measured once, the memory first, before the rest needs some."""
        facts = {"memory": peak_memory(device)}
        if way == "ours":
            facts["load_seconds"] = seconds_of(load, count, device) / count
            with CountFlops() as counter:
                step()
            facts["flops"] = counter.total
            facts["peak"] = matrix_peak(device, settings.precision)
        return facts

    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # the parent's stop: end, but tidy up
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)
        step, load = {"plain": plain_way, "ours": our_way}[way](settings, folder, device)
        tasks = {"warm_up": warm_up, "block": lambda count: seconds_of(step, count, device), "report": report}
        pipe.send((True, None))
        while True:
            task, value = pipe.recv()
            pipe.send((True, tasks[task](value)))
    except (EOFError, ConnectionError):  # the parent has gone
        return
    except Exception as error:  # whatever it is, it becomes a note in the table
        if is_out_of_memory(error):
            pipe.send((False, "out of memory"))
        else:
            reason = (str(error).strip().splitlines() or ["no details"])[0]
            pipe.send((False, f"{type(error).__name__}: {reason}"))
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is ending already


class Worker:
    """The process of one way. Raises RuntimeError with a one-line reason whenever it fails."""

    def __init__(self, way, *args):
        context = multiprocessing.get_context("spawn")
        self.way = way
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, way, *args), daemon=True)
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the child inherits it: Ctrl-C is the parent's to answer
        try:
            self.process.start()
        finally:
            signal.signal(signal.SIGINT, before)
            theirs.close()  # else a dead child would leave recv waiting

    def answer(self):
        try:
            done, value = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(10)
            raise RuntimeError(
                f"{self.way}: its process died (exit {self.process.exitcode}; perhaps out of memory)"
            ) from None
        if not done:
            raise RuntimeError(f"{self.way}: {value}")
        return value

    def ask(self, task, value):
        with contextlib.suppress(OSError):  # it died; what it last said, if anything, is still there to read
            self.pipe.send((task, value))
        return self.answer()

    def stop(self):
        self.process.terminate()
        self.process.join(10)
        self.process.kill()
        self.process.join()
        self.pipe.close()


def measure(settings, folder, device, rounds, seconds):
    """Return one row: its settings and what both ways measured, or a note on why they could not be."""
    row = {"size": settings.size, "lipschitz": settings.lipschitz, "batch": settings.batch_size, "ratio": None}
    workers = []
    try:
        for way in ("plain", "ours"):
            workers.append(Worker(way, settings, folder, device))
            workers[-1].answer()  # it is built; at any time one of them works and the other waits
        counts = [worker.ask("warm_up", seconds) for worker in workers]
        speeds = []  # (plain, ours) images/s of each round
        for _ in range(rounds):
            pair = []
            for i, worker in enumerate(workers):
                took = worker.ask("block", counts[i])
                pair.append(counts[i] * settings.batch_size / took)
                counts[i] = max(1, round(counts[i] * seconds / took))
            speeds.append(pair)
        plain, ours = (worker.ask("report", count) for worker, count in zip(workers, counts, strict=True))
    except RuntimeError as error:
        return row | {"note": str(error)}
    finally:
        for worker in workers:
            worker.stop()
    speed = [statistics.median(column) for column in zip(*speeds, strict=True)]
    steps_per_second = speed[1] / settings.batch_size
    return row | {
        "plain_images_per_second": speed[0],
        "ours_images_per_second": speed[1],
        "ratio": statistics.median(b / a for a, b in speeds),
        "plain_memory_gb": plain["memory"] and plain["memory"] / 1e9,
        "ours_memory_gb": ours["memory"] and ours["memory"] / 1e9,
        "tflops": ours["flops"] * steps_per_second / 1e12,
        "peak_tflops": ours["peak"] / 1e12,
        "data_share": ours["load_seconds"] * steps_per_second,
    }


# ---- command --------------------------------------------------------------------------------------------------


def device_name(device):
    """Return what people call the device: the GPU's name, or the CPU's with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    name = f"{model[1] if model else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    return name if device.type == "cpu" else f"Apple GPU beside {name}"


def format_table(result):
    """Return the line about the machine and the Markdown table of `result`, which is what --json writes."""

    def number(value):
        return "" if value is None else f"{value:,.{max(0, 2 - int(math.log10(max(value, 1))))}f}"  # 1.23, 12.3, 123

    peak = number(result["peak_tflops"]) + " TFLOP/s" if result["peak_tflops"] else "not measured"
    lines = [
        f"{result['device']}; torch {result['torch']}; ours in {result['precision']}, plain in fp32; "
        f"ngf {result['ngf']}, ndf {result['ndf']}; matrix peak {peak}",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|" + "---|" * len(COLUMNS),
    ]
    for row in result["rows"]:
        cells = [str(row["size"]), row["lipschitz"], str(row["batch"])]
        if "note" in row:
            cells += [row["note"].replace("|", "/")] + [""] * (len(COLUMNS) - 4)
        else:
            names = ("plain_images_per_second", "ours_images_per_second", "ratio", "plain_memory_gb", "ours_memory_gb")
            cells += [number(row[name]) for name in names] + [f"{row['peak_share']:.0%}", f"{row['data_share']:.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(argv):
    import Trainloop

    defaults = Trainloop.read_settings([])[0]
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Compare the speed of this training with the report's own way of training, in alternation."
    )  # fmt: skip
    add = parser.add_argument
    add("--size", type=int, nargs="+", choices=SIZES,
        help="sides of the images in pixels (default: 64 128, and 256 on a GPU)%(default).0s")  # fmt: skip
    add("--ngf", type=int, default=defaults.ngf, help="width of the generator: its channels at 64x64")
    add("--ndf", type=int, default=defaults.ndf, help="width of the critic: its channels at 64x64")
    add("--batch-size", type=int, default=defaults.batch_size, help="images in a batch")
    add("--lipschitz", nargs="+", choices=["clip", "gp"], default=["clip", "gp"],
        help="weight clipping (and batch norm), gradient penalty (default: both)%(default).0s")  # fmt: skip
    add("--precision", choices=["auto", "fp32", "bf16"], default=defaults.precision,
        help="of ours; auto: bf16 where the device has it")  # fmt: skip
    add("--rounds", type=int, default=5, help="pairs of blocks, one of each way")
    add("--seconds", type=float, default=3.0, help="length of a block")
    add("--json", type=Path, metavar="FILE", help="also write the numbers there%(default).0s")
    add_flags(parser, "device")
    return parser.parse_args(argv)


def compare(args):
    """Measure all rows, print the table, write the JSON. Returns the exit status; raises ValueError or OSError."""
    device = pick_device(args.device)
    for name in ("rounds", "seconds"):
        if not 0 < getattr(args, name) < math.inf:
            raise ValueError(f"--{name} {getattr(args, name)}: must be a number above 0")
    if args.json and (args.json.is_dir() or not is_writable(args.json.absolute().parent)):
        raise ValueError(f"--json {args.json}: cannot write there; name a file in a folder that can be written")
    sizes = args.size or ([64, 128] if device.type == "cpu" else [64, 128, 256])
    tasks = [settings_of(args, size, lipschitz, device) for size in sizes for lipschitz in args.lipschitz]

    rows = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        faces = Path(folder) / "faces"
        faces.mkdir()
        for i in range(max(FACES, args.batch_size)):  # 178x218 pixels and about 7 kB, as CelebA has them
            face = Image.fromarray(draw_face(i, 109)).resize((218, 218)).crop((20, 0, 198, 218))
            face.save(faces / f"{i:06d}.jpg", quality=90)
        for settings in tasks:
            print(f"{settings.size} px, {settings.lipschitz} ...", file=sys.stderr, flush=True)
            rows.append(measure(settings, Path(folder), device, args.rounds, args.seconds))

    # One peak for all rows: the best that was seen.
    peak = max((row["peak_tflops"] for row in rows if "note" not in row), default=None)
    for row in rows:
        if "note" not in row:
            row["peak_share"] = row["tflops"] / peak
    result = {"device": device_name(device), "torch": str(torch.__version__), "precision": tasks[0].precision}
    result |= {"ngf": args.ngf, "ndf": args.ndf, "peak_tflops": peak, "rows": rows}
    print(format_table(result))
    if args.json:
        temporary = args.json.with_name(f".{args.json.name}.tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, args.json)
    return 0 if peak else 1


def main(argv=None):
    try:
        return compare(parse(argv))
    except (ValueError, OSError) as error:
        print(f"benchmark.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
