"""From seeds to a film: a path through the latent space along which one face flows into the next."""

import argparse
import os
import random
import sys
from functools import cache
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import GifImagePlugin, Image, ImageDraw, ImageFont
from tqdm import tqdm

from checkpoints import load_generator, step_of
from command_line import is_out_of_memory
from device import add_device_flag, pick_device
from Generator import latent, to_uint8

SHIPPED = Path("bests/generator_128.pt")
RUNS = Path("runs")  # where --model latest looks
SEEDS = [48, 108, 91, 53]  # four different people of the shipped model, chosen by eye
BATCH_ROWS = 2048  # faces computed at once x their height, 16 at 128 px: more is hardly faster and takes memory
EVEN = 1.02  # the perceptual pace is even enough when the largest step is this many times the median
ROUNDS = 8  # and gives up after so many corrections


def lerp(a, b, t):
    """Linear interpolation (1 - t) a + t b, the report's: exactly a at t = 0 and b at t = 1.

    a, b: one vector each, (nz,) or (1, nz). t: a number, giving the shape of a, or (F, 1), giving (F, nz).
    Computed in float64 and returned in the type of a.
    """
    t = torch.as_tensor(t, dtype=torch.float64)
    return ((1 - t) * a.double() + t * b.double()).to(a.dtype)


def slerp(a, b, t):
    """Spherical linear interpolation (Shoemake 1985): turn from a to b at constant angular speed.

    Takes the shorter way round, while the norm goes linearly from |a| to |b|; exactly a at t = 0 and b at t = 1.
    Vectors without an angle between them (parallel, or one is zero) are interpolated by lerp. Between opposite
    vectors every way round is as short: the one taken leads past the axis on which a is smallest.
    Arguments and result are those of lerp.
    """
    t = torch.as_tensor(t, dtype=torch.float64)
    norm_a, norm_b = a.double().norm(), b.double().norm()
    if norm_a == 0 or norm_b == 0 or a.numel() == 1:
        return lerp(a, b, t)
    u, v = a.double() / norm_a, b.double() / norm_b
    angle = 2 * torch.atan2((u - v).norm(), (u + v).norm())  # acos of the dot product is blind near 0 and pi
    if angle < 1e-6:
        return lerp(a, b, t)
    if angle > torch.pi - 1e-6:
        axis = torch.zeros_like(u)
        axis.view(-1)[u.abs().argmin()] = 1
        side = axis - (axis * u).sum() * u
        middle = (side / side.norm() * (norm_a + norm_b) / 2).to(a.dtype)
        first, second = slerp(a, middle, (2 * t).clamp(max=1)), slerp(middle, b, (2 * t - 1).clamp(min=0))
        return torch.where(t < 0.5, first, second)
    norm = (1 - t) * norm_a + t * norm_b
    weight_a = torch.sin((1 - t) * angle) / torch.sin(angle) * (norm / norm_a)
    weight_b = torch.sin(t * angle) / torch.sin(angle) * (norm / norm_b)
    return (weight_a * a.double() + weight_b * b.double()).to(a.dtype)


MODES = {"slerp": slerp, "lerp": lerp}


def path(latents, positions, mode="slerp"):
    """Return the latent vectors at `positions` of the closed path through `latents`: (n, nz), (F,) -> (F, nz).

    Position i is latent i, i + t lies t of the way on to the next one, and n is the first latent again.
    """
    positions = torch.as_tensor(positions, dtype=torch.float64)
    result = latents.new_empty(len(positions), latents.shape[1])  # (F, nz)
    for i in range(len(latents) + 1):
        here = positions.floor() == i
        t = (positions[here] - i)[:, None]  # (f, 1)
        result[here] = MODES[mode](latents[i % len(latents)], latents[(i + 1) % len(latents)], t)
    return result


def latent_pace(transitions, frames, ease=False):
    """Return positions on a path with `frames` even steps for each transition, both ends included: (S + 1,) float64.

    ease: slow down towards each seed and speed up after it (smoothstep, 3t^2 - 2t^3).
    """
    positions = np.arange(transitions * frames + 1) / frames
    t = positions % 1
    return positions - t + t * t * (3 - 2 * t) if ease else positions


def perceptual_pace(step_sizes, positions):
    """Move `positions` along their path until each step changes the picture by the same amount.

    The ends stay. Equidistribution by de Boor's iteration (1973): take the sizes of the present steps as the
    path's arc length, and divide that evenly.

    step_sizes: (S + 1,) positions -> (S,) distances between neighbouring pictures.
    Returns the positions, and largest / median step before and after.
    Raises ValueError where the picture never changes.
    """
    history = []
    for _ in range(ROUNDS + 1):
        steps = step_sizes(positions)
        if not steps.any():
            raise ValueError("--pace perceptual: the picture never changes along this path; use --pace latent")
        history.append((steps.max() / max(np.median(steps), 1e-12), positions))
        if history[-1][0] <= EVEN:
            break
        arc = np.concatenate([[0], steps.cumsum()])  # (S + 1,)
        positions = np.interp(np.linspace(0, arc[-1], len(arc)), arc, positions)
    ratio, positions = min(history, key=lambda entry: entry[0])
    return positions, history[0][0], ratio


@torch.inference_mode()
def faces(generator, z):
    """Return the pictures of a batch of latents: (N, nz) on the CPU -> (N, 3, size, size) on the generator's device.

    Raises ValueError where they are not finite.
    """
    x = generator(z.to(next(generator.parameters()).device))
    if not x.isfinite().all():
        raise ValueError("--model: its pictures hold numbers that are not finite; its training has diverged")
    return x


def step_sizes(generator, z):
    """Return how much the picture changes from each latent to the next: (F, nz) -> (F - 1,) float64.

    The measure is the root mean square difference of all values of a picture, on the scale 0 .. 255.
    """
    steps, last = [], None
    for batch in z.split(BATCH_ROWS // generator.size):
        x = faces(generator, batch)  # (b, 3, size, size)
        x = x if last is None else torch.cat([last, x])
        steps.append((x[1:] - x[:-1]).square().mean((1, 2, 3)).sqrt())
        last = x[-1:]
    return torch.cat(steps).cpu().double().numpy() * 127.5


@cache
def caption(text, width):
    """Return `text` in white on black as an (h, width, 3) uint8 array with an even h.

    Raises ValueError where the text is wider than the picture.
    """
    font = ImageFont.load_default(max(10, width // 12))
    if font.getlength(text) > width:
        raise ValueError(f'--label: "{text}" does not fit under a picture of {width} pixels; use a larger --scale')
    strip = Image.new("RGB", (width, font.size * 3 // 4 * 2))
    ImageDraw.Draw(strip).text((width / 2, strip.height / 2), text, fill="white", font=font, anchor="mm")
    return np.asarray(strip)


def film(generator, z, captions=None, scale=1, axis=1):
    """Yield the frames of C morphs that run at the same time, each an (H, W, 3) uint8 array.

    z: (F, C, nz) latents. captions: F lists of C texts to write under the pictures, or None.
    scale: each pixel becomes scale x scale. axis: 1 for morphs side by side, 0 for one below the other.
    """
    at_once = max(1, BATCH_ROWS // generator.size // z.shape[1])
    for start in range(0, len(z), at_once):
        x = faces(generator, z[start : start + at_once].flatten(0, 1))  # (b*C, 3, size, size)
        x = to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()  # (b*C, size, size, 3)
        x = x.repeat(scale, axis=1).repeat(scale, axis=2)
        for k, tiles in enumerate(np.split(x, len(x) // z.shape[1]), start):
            if captions:
                strips = [caption(text, x.shape[2]) for text in captions[k]]
                tiles = np.concatenate([tiles, strips], axis=1)  # (C, h, w, 3)
            yield np.concatenate(tiles, axis)


def write_gif(file, frames, fps, sample):
    """Write an endless GIF of any length in constant memory, with one palette made from the frames in `sample`."""
    # Image.save would keep all frames in memory, give each its own palette and merge those that are equal.
    # No dithering: error diffusion flickers, an ordered pattern is coarser than the steps between 256 colours.
    with open(file, "wb") as gif:
        # Some 4096 pixels of each frame are enough to choose 256 colours from; the stride is odd to cross all columns.
        pixels = np.concatenate([frame.reshape(-1, 3)[:: len(frame[0]) * len(frame) // 4096 | 1] for frame in sample])
        palette = Image.fromarray(pixels[None]).quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2)
        for k, frame in enumerate(frames):
            image = Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
            if k == 0:
                gif.writelines(GifImagePlugin.getheader(image, info={"loop": 0})[0])
            # GIF counts in 1/100 s: round the moments, not the delays, and the film is as long as it should be.
            delay = int((k + 1) * 100 / fps) - int(k * 100 / fps)
            gif.writelines(GifImagePlugin.getdata(image, duration=delay * 10))
        gif.write(b";")


def write_mp4(file, frames, fps, sample):
    """Write H.264 in the colour format and with the index in front that browsers need, in constant memory."""
    import imageio.v2 as imageio

    options = {"codec": "libx264", "quality": 8, "pixelformat": "yuv420p", "macro_block_size": 2}
    with imageio.get_writer(file, fps=fps, output_params=["-movflags", "+faststart"], **options) as video:
        for frame in frames:
            height, width, _ = frame.shape  # both have to be even, and ffmpeg would blur the picture to make them so
            video.append_data(np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), "edge"))


def write_webp(file, frames, fps, sample):
    """Write an endless WebP; keeps the frames in memory. Where some look the same, libwebp shows one for their time."""
    first, *rest = map(Image.fromarray, frames)
    first.save(file, save_all=True, append_images=rest, duration=1000 / fps, loop=0, quality=90)


def write_strip(file, frames, fps, sample):
    """Write a PNG with the frames from left to right."""
    Image.fromarray(np.concatenate(list(frames), 1)).save(file)


# ending: how it is written, the largest side in pixels, the largest fps (a GIF's delay is 2/100 s or more)
WRITERS = {
    ".gif": (write_gif, 65_535, 50),
    ".mp4": (write_mp4, 8_192, 240),
    ".webp": (write_webp, 16_383, 240),
    ".png": (write_strip, 65_535, 240),
}


def check_out(out):
    """Raise ValueError or FileNotFoundError unless a film can be written to the path `out`."""
    if out.is_dir():
        raise ValueError(f"--out {out}: is a folder; name a file in it, such as {out / 'morph.gif'}")
    if out.suffix.lower() not in WRITERS:
        raise ValueError(f"--out {out}: unknown ending; choose one of {', '.join(WRITERS)}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {out.parent}; make it first")


def write_film(out, frames, fps, sample):
    """Write frames to the path `out` in the format of its ending; a file that is there is replaced when all is well.

    frames: iterable of (H, W, 3) uint8 arrays. fps: frames per second.
    sample: iterable of frames from all over the film, read only for the palette of a GIF.
    """
    temporary = out.with_name(f".{out.stem}.{os.getpid()}{out.suffix.lower()}")
    try:
        WRITERS[out.suffix.lower()][0](temporary, frames, fps, sample)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def load_model(name, device="cpu"):
    """Return the Generator that --model names: a model file, a folder (its newest model), or "latest".

    "latest" is the newest model in the numbered folders under runs/, looked for from the newest run on. In folders
    a file that cannot be read is passed over, with a line on stderr. Raises FileNotFoundError or ValueError.
    """
    if name == "latest":
        folders = sorted(RUNS.glob("[0-9][0-9][0-9][0-9]-*/"), reverse=True)
    elif Path(name).is_dir():
        folders = [Path(name)]
    elif Path(name).exists():
        return load_generator(name, device)
    else:
        folders = []
    newest = [sorted(folder.glob("*.pt"), key=lambda file: (step_of(file), file.name))[::-1] for folder in folders]
    for file in chain(*newest):
        try:
            generator = load_generator(file, device)
        except ValueError as error:
            print(f"passed over: {error}", file=sys.stderr)
        else:
            print(f"model: {file}")
            return generator
    raise FileNotFoundError(
        f"--model {name}: no model there that can be read; train one (python Trainloop.py) "
        "or get the report's (python download_model.py)"
    )


def pick_seeds(seeds, count=None, columns=1, loop=False):
    """Return the seeds of each morph: `columns` lists of the same length, in the order given.

    count: draw this many at random instead of taking `seeds`.
    Raises ValueError where they make no morph: fewer than two, a seed that follows itself, uneven columns.
    """
    if count is not None and not 2 <= count <= 10_000:
        raise ValueError(f"--random {count}: choose from 2 to 10000")
    if count is not None:
        seeds = random.sample(range(1_000_000), count)
    length = len(seeds) // max(columns, 1)
    if length < 2 or length * columns != len(seeds):
        raise ValueError(
            f"--columns {columns}: {len(seeds)} seeds do not make {columns} equally long morphs of 2 seeds or more"
            if columns != 1
            else f"--seeds {seeds[0]}: a morph needs 2 seeds or more"
        )
    morphs = [seeds[i : i + length] for i in range(0, len(seeds), length)]
    for morph in morphs:
        for seed, following in pairwise(morph + morph[:1] if loop else morph):
            latent(seed, 1), latent(following, 1)  # raises for a seed that does not exist
            if seed == following:
                hint = "; --loop returns to the first by itself" if loop else ""
                raise ValueError(f"--seeds: {seed} follows itself, so nothing would move there{hint}")
    return morphs


def route(generator, seeds, frames, mode="slerp", pace="latent", loop=False, ease=False, truncation=1):
    """Return the latents of one morph and their positions on the path through `seeds`: (F, nz) and (F,) float64.

    frames: steps from each seed to the next. The film ends with the last seed, F = (n - 1) * frames + 1, or with
    `loop` one step before it would show the first one again, F = n * frames. truncation: factor of all latents.
    """
    z = truncation * torch.stack([latent(seed, generator.nz) for seed in seeds])  # (n, nz)
    positions = latent_pace(len(seeds) - (not loop), frames, ease)
    if pace == "perceptual":
        positions, before, after = perceptual_pace(lambda p: step_sizes(generator, path(z, p, mode)), positions)
        print(f"largest / median step: {before:.2f} at latent pace, {after:.2f} at perceptual pace")
    if loop:
        positions = positions[:-1]
    return path(z, positions, mode), positions


def make_film(args):
    """Make the film that the command line asks for. Raises ValueError or OSError, for bad flags before it starts."""
    check_out(args.out)
    ending = args.out.suffix.lower()
    _, largest_side, largest_fps = WRITERS[ending]
    for flag, low, high in (
        ("frames", 1, 1_000_000),
        ("fps", 0.1, largest_fps),
        ("scale", 1, 64),
        ("columns", 1, 1_000),
        ("truncation", 0.01, 2),
    ):
        value = getattr(args, flag)
        if not low <= value <= high:
            raise ValueError(f"--{flag} {value}: choose from {low} to {high}{f' for {ending}' * (flag == 'fps')}")
    if args.ease and args.pace == "perceptual":
        raise ValueError("--ease slows down at each seed, --pace perceptual never does: choose one of them")
    morphs = pick_seeds(args.seeds, args.random, args.columns, args.loop)
    generator = load_model(args.model, pick_device(args.device))

    stops = len(morphs[0])
    count = (stops - (not args.loop)) * args.frames + (not args.loop)
    width, height = generator.size * args.scale * args.columns, generator.size * args.scale
    width, height = (height * count, width) if ending == ".png" else (width, height)
    if max(width, height) > largest_side:
        raise ValueError(f"--out {args.out}: {width}x{height} pixels are too many for {ending}, at most {largest_side}")
    if args.label:
        for seed, following in [pair for morph in morphs for pair in pairwise(morph + morph[:1])]:
            caption(f"{seed} > {following}", generator.size * args.scale)  # raises where it is too wide

    generator = generator.to(memory_format=torch.channels_last)  # twice as fast on a CPU
    z, captions = [], []
    for morph in morphs:
        latents, positions = route(
            generator, morph, args.frames, args.mode, args.pace, args.loop, args.ease, args.truncation
        )
        starts = np.minimum(positions.astype(int), stops - 1 - (not args.loop))
        z.append(latents)
        captions.append([f"{morph[i]} > {morph[(i + 1) % stops]}" for i in starts])
    z = torch.stack(z, dim=1)  # (F, C, nz)
    captions = list(zip(*captions, strict=True)) if args.label else None
    axis = 0 if ending == ".png" else 1

    frames = tqdm(
        film(generator, z, captions, args.scale, axis), total=len(z), unit="frames", disable=None, leave=False
    )
    some = slice(None, None, len(z) // 32 + 1)
    write_film(args.out, frames, args.fps, film(generator, z[some], captions and captions[some], args.scale, axis))
    print(f"{args.out}: {len(z)} frames, seeds {' | '.join(' '.join(map(str, morph)) for morph in morphs)}")


def main(argv=None):
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--model", default=str(SHIPPED), help="a generator, a checkpoint, a folder of them, or latest: the newest run's"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--seeds", type=int, nargs="+", metavar="SEED", default=SEEDS, help="the faces, two or more")
    which.add_argument("--random", type=int, metavar="N", help="take N random seeds; they are printed%(default).0s")
    parser.add_argument("--mode", choices=MODES, default="slerp", help="lerp is the report's; slerp keeps the norm")
    parser.add_argument("--frames", type=int, default=50, help="steps from each seed to the next")
    parser.add_argument(
        "--pace",
        choices=["latent", "perceptual"],
        default="latent",
        help="even steps from seed to seed, or (perceptual) the same steps spread over the whole path so that "
        "each changes the picture by the same amount",
    )
    parser.add_argument("--ease", action="store_true", help="slow down at each seed")
    parser.add_argument("--loop", action="store_true", help="go on from the last seed to the first")
    parser.add_argument("--truncation", type=float, default=1.0, help="scale the latents towards 0: tamer faces")
    parser.add_argument("--columns", type=int, default=1, help="share the seeds out to so many morphs side by side")
    parser.add_argument("--scale", type=int, default=1, help="draw each pixel as a square of this side")
    parser.add_argument("--label", action="store_true", help="write the seeds under the picture")
    parser.add_argument("--fps", type=float, default=25.0, help="frames per second")
    parser.add_argument("--out", type=Path, default=Path("morph.gif"), help=".gif, .mp4, .webp, or .png: a film strip")
    add_device_flag(parser)
    args = parser.parse_args(argv)
    try:
        make_film(args)
    except (ValueError, OSError) as error:
        print(f"Interpolation.py: error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print("Interpolation.py: error: out of memory; --device cpu may have more", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
