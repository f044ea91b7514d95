"""From seeds to a film: a path through the latent space along which one face flows into the next."""

import contextlib
import errno
import io
import random
import signal
import sys
from functools import cache
from itertools import chain, pairwise
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the imports below take seconds, in which Ctrl-C ends without a word

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from atomic_write import atomic_write
from checkpoints import load_generator, read_model_file, step_of
from command_line import Parser, UserError, filled_path, new_file, run_command
from device import pick_device
from Generator import latent, to_uint8
from photos import crop_of, photo_names, tune_for, tuned_latents
from run_folder import newest_run
from settings import add_flags, checked

SHIPPED = Path(__file__).parent / "bests/generator_256.pt"
SEEDS = [2, 7, 43, 30]  # four different people of the shipped model, chosen by eye
BATCH_ROWS = 2048  # faces computed at once x their height, 16 at 128 px: more is hardly faster and takes memory
EVEN = 1.02  # the perceptual pace is even enough when the largest step is this many times the median


def lerp(a, b, t):
    """Linear interpolation (1 - t) a + t b, the report's: exactly a at t = 0 and b at t = 1; computed in float64.

    a, b: one vector each, (nz,) or (1, nz). t: a number, giving the shape of a, or (F, 1), giving (F, nz).
    """
    t = torch.as_tensor(t, dtype=torch.float64)
    return ((1 - t) * a.double() + t * b.double()).to(a.dtype)


def slerp(a, b, t):
    """Spherical linear interpolation (Shoemake 1985): turn from a to b at constant angular speed.

    Takes the shorter way round, while the norm goes linearly from |a| to |b|; exactly a at t = 0 and b at t = 1.
    Where no turn is the shortest (parallel, opposite or zero vectors) it is lerp, whose arguments and result it has.
    """
    t = torch.as_tensor(t, dtype=torch.float64)
    norm_a, norm_b = a.double().norm(), b.double().norm()
    u, v = a.double() / norm_a, b.double() / norm_b
    angle = 2 * torch.atan2((u - v).norm(), (u + v).norm())  # acos of the dot product is blind near 0 and pi
    if not 1e-6 < angle < torch.pi - 1e-6:  # NaN for a zero vector
        return lerp(a, b, t)
    norm = (1 - t) * norm_a + t * norm_b
    weight_a = torch.sin((1 - t) * angle) / torch.sin(angle) * (norm / norm_a)
    weight_b = torch.sin(t * angle) / torch.sin(angle) * (norm / norm_b)
    return (weight_a * a.double() + weight_b * b.double()).to(a.dtype)


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


def perceptual_pace(step_sizes, positions):
    """Move `positions` along their path, but for its ends, until each step changes the picture by the same amount.

    De Boor's iteration (1973): take the sizes of the present steps as the path's arc length, and divide that evenly.
    step_sizes: (S + 1,) positions -> (S,) distances between neighbouring pictures; UserError where all are 0.
    Returns the positions, and largest / median step before and after.
    """
    history = []
    for _ in range(9):  # hardly gets better after so many corrections
        steps = step_sizes(positions)
        if not steps.any():
            raise UserError("--pace perceptual: the picture never changes along this path; use --pace latent")
        history.append((steps.max() / max(np.median(steps), 1e-12), positions))
        if history[-1][0] <= EVEN:
            break
        arc = np.concatenate([[0], steps.cumsum()])  # (S + 1,)
        positions = np.interp(np.linspace(0, arc[-1], len(arc)), arc, positions)
    ratio, positions = min(history, key=lambda entry: entry[0])
    return positions, history[0][0], ratio


@torch.inference_mode()
def faces(generator, z):
    """Return the pictures of N latents on the generator's device, UserError if not finite: (N, nz) -> (N, 3, R, R)."""
    x = generator(z.to(next(generator.parameters()).device))
    if not x.isfinite().all():
        raise UserError("--model: its pictures hold numbers that are not finite; its training has diverged")
    return x


def step_sizes(generator, z):
    """Return the RMS change of the picture from each latent to the next, of 0 .. 255: (F, nz) -> (F - 1,) float64."""
    steps, last = [], []
    for batch in z.split(BATCH_ROWS // generator.size):
        x = torch.cat([*last, faces(generator, batch)])  # (b, 3, size, size), with the last one of those before
        steps.append((x[1:] - x[:-1]).square().mean((1, 2, 3)).sqrt())
        last = [x[-1:]]
    return torch.cat(steps).cpu().double().numpy() * 127.5


@cache
def caption(text, width):
    """Return `text` in white on black, (h, width, 3) uint8 with an even h. Raises UserError where it is wider."""
    font = ImageFont.load_default(max(10, width // 12))
    if font.getlength(text) > width:
        raise UserError(f'--label: "{text}" does not fit under a picture of {width} pixels; use a larger --scale')
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
        x = to_uint8(x).permute(0, 2, 3, 1).cpu().numpy().repeat(scale, 1).repeat(scale, 2)  # (b*C, h, w, 3)
        for k, tiles in enumerate(np.split(x, len(x) // z.shape[1]), start):
            if captions:
                strips = [caption(text, x.shape[2]) for text in captions[k]]
                tiles = np.concatenate([tiles, strips], axis=1)  # (C, h, w, 3)
            yield np.concatenate(tiles, axis)


def write_gif(file, frames, fps, sample):
    """Write an endless GIF of any length in constant memory, with one palette made from the frames in `sample`."""
    # Pillow's own films keep all frames in memory and merge equal ones. So each is saved as a picture, and joined.
    # No dithering: error diffusion flickers, an ordered pattern is coarser than the steps between 256 colours.
    with open(file, "wb") as gif:
        # Some 4096 pixels of each frame are enough to choose 256 colours from; the stride is odd to cross all columns.
        pixels = np.concatenate([frame.reshape(-1, 3)[:: len(frame[0]) * len(frame) // 4096 | 1] for frame in sample])
        palette = Image.fromarray(pixels[None]).quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2)
        for k, frame in enumerate(frames):
            # GIF counts in 1/100 s: round the moments, not the delays, and the film is as long as it should be.
            options = {"duration": 10 * (int((k + 1) * 100 / fps) - int(k * 100 / fps))} | ({} if k else {"loop": 0})
            image = Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
            image.save(picture := io.BytesIO(), "GIF", optimize=False, interlace=0, **options)
            data = picture.getbuffer()
            header = 13 + 3 * 2 ** (data[10] % 8 + 1) if k else 0  # GIF89a, section 18: with its palette
            gif.write(data[header:-1])  # the last byte ends the file
        gif.write(b";")


def write_mp4(file, frames, fps, sample):
    """Write H.264 in the colour format and with the index in front that browsers need, in constant memory."""
    import imageio.v2 as imageio

    options = {"codec": "libx264", "quality": 8, "pixelformat": "yuv420p", "macro_block_size": 2, "fps": fps}
    options |= {"output_params": ["-movflags", "+faststart"], "ffmpeg_log_level": "fatal"}
    with contextlib.suppress(OSError), imageio.get_writer(file, "FFMPEG", **options) as video:
        for count, frame in enumerate(frames, 1):  # noqa: B007
            height, width, _ = frame.shape  # both have to be even, and ffmpeg would blur the picture to make them so
            video.append_data(np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), "edge"))
    with contextlib.suppress(OSError, RuntimeError), imageio.get_reader(file, "FFMPEG") as video:
        if video.count_frames() == count:  # on a full disk ffmpeg fails without a word
            return
    raise OSError(errno.EIO, "ffmpeg could not write all frames; is there room?")


def write_webp(file, frames, fps, sample):
    """Write an endless WebP; keeps the frames in memory. Where some look the same, libwebp shows one for their time."""
    first, *rest = map(Image.fromarray, frames)
    first.save(file, save_all=True, append_images=rest, duration=1000 / fps, loop=0, quality=90)


def write_strip(file, frames, fps, sample):
    """Write a PNG with the frames from left to right."""
    Image.fromarray(np.concatenate(list(frames), 1)).save(file)


MODES = {"slerp": slerp, "lerp": lerp}
# ending: how it is written, and the largest side in pixels
WRITERS = {".gif": (write_gif, 65_535), ".mp4": (write_mp4, 8_192), ".webp": (write_webp, 16_383),
           ".png": (write_strip, 65_535)}  # fmt: skip


def write_film(out, frames, fps, sample):
    """Write frames, (H, W, 3) uint8 arrays, to the path `out` in the format of its ending, whole or not at all.

    fps: frames per second. sample: frames from all over the film, read only for the palette of a GIF.
    """
    with atomic_write(out) as temporary:
        WRITERS[out.suffix.lower()][0](temporary, frames, fps, sample)


def open_model(name, device="cpu"):
    """Return the model that --model names: its path, the dict in that file, and its Generator.

    name: a model file, a folder, of which it is the newest model, or "latest": the newest numbered folder in ./runs.
    In a folder a file that cannot be read is passed over, with a line on stderr. Raises UserError where none can be.
    """
    place = newest_run() if str(name) == "latest" else Path(name)
    files = sorted(place.glob("*.pt"), key=lambda file: (step_of(file), file.name), reverse=True)
    for path in [place] if place.is_file() else files:
        try:
            file = read_model_file(path)
            generator = load_generator(file, device, path).to(memory_format=torch.channels_last)  # faster
            if path != place:
                print(f"model: {path}")
            return path, file, generator
        except UserError as error:
            if path == place:
                raise
            print(f"passed over: {error}", file=sys.stderr)
    raise UserError(f"--model {name}: no model in {place}; train one (Trainloop.py) or get one (download_model.py)")


def pick_seeds(seeds, columns=1, loop=False):
    """Return the seeds of each morph, `columns` lists as long. Raises UserError where a morph could not move."""
    flag = "--seeds" if isinstance(seeds[0], int) else "--photos"
    length, rest = divmod(len(seeds), columns)
    if length < 2 or rest:
        raise UserError(f"{flag}: {len(seeds)} do not make --columns {columns} of as many, 2 {flag[2:]} or more each")
    morphs = [seeds[i : i + length] for i in range(0, len(seeds), length)]
    for seed, following in chain(*(pairwise(morph + morph[:1] * loop) for morph in morphs)):
        if seed == following:
            raise UserError(f"{flag}: {seed} follows itself; leave one out (--loop returns to the first by itself)")
    return morphs


def route(generator, seeds, frames, mode="slerp", pace="latent", loop=False, ease=False, truncation=1):
    """Return the latents of one morph and their positions on the path through `seeds`: (F, nz) and (F,) float64.

    seeds: numbers, or (nz,) latents. frames: steps from each to the next. The film ends with the last seed,
    F = (n - 1) * frames + 1, or with `loop` one step before it would show the first one again, F = n * frames.
    ease: slow at the seeds. truncation: factor of all latents.
    """
    z = truncation * torch.stack([latent(s, generator.nz) if isinstance(s, int) else s for s in seeds])  # (n, nz)
    positions = np.arange((len(seeds) - (not loop)) * frames + 1) / frames
    if ease:
        t = positions % 1
        positions = positions - t + t * t * (3 - 2 * t)
    if pace == "perceptual":
        positions, before, after = perceptual_pace(lambda p: step_sizes(generator, path(z, p, mode)), positions)
        print(f"largest / median step: {before:.2f} at latent pace, {after:.2f} at perceptual pace")
    positions = positions[:-1] if loop else positions
    return path(z, positions, mode), positions


def parse(argv):
    """Return the flags. Raises UserError for a value out of range, a file that cannot be, flags that exclude others."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", type=filled_path, help="a file, a folder of them, or latest: the newest run's; else the shipped one")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--seeds", type=checked(int, "[0, 4294967295]"), nargs="+", default=SEEDS, help="the faces")
    which.add_argument("--random", type=checked(int, "[2, 10000]"), metavar="N", help="N random ones; they are printed")
    which.add_argument("--photos", type=filled_path, nargs="+", help="two photos or more, or a model of --save-tuned")
    add("--save-tuned", type=new_file(".pt"), metavar="FILE.pt", help="keep the model that was tuned for --photos")
    add("--mode", choices=MODES, default="slerp", help="lerp is the report's; slerp keeps the norm")
    add("--frames", type=checked(int, "[1, 1000000]"), default=50, help="steps from each seed to the next")
    add("--pace", choices=["latent", "perceptual"], default="latent", help="what is even: steps, or changes to the eye")
    add("--ease", action="store_true", help="slow down at each seed")
    add("--loop", action="store_true", help="go on from the last seed to the first")
    add("--truncation", type=checked(float, "[0.01, 2]"), default=1.0, help="scale the latents towards 0: tamer faces")
    add("--columns", type=checked(int, "[1, 1000]"), default=1, help="share the seeds out to morphs side by side")
    add("--scale", type=checked(int, "[1, 64]"), default=1, help="draw each pixel as a square of this side")
    add("--label", action="store_true", help="write the seeds under the picture")
    add("--fps", type=checked(float, "[0.1, 240]"), default=25.0, help="frames per second; of a GIF at most 50")
    add("--out", type=new_file(*WRITERS), default="morph.gif", help=".gif, .mp4, .webp, or .png: a film strip")
    add_flags(parser, "device")
    args = parser.parse_args(argv)
    photos = args.photos or []
    if args.out.suffix.lower() == ".gif" and args.fps > 50:
        raise UserError(f"--fps {args.fps}: a GIF shows at most 50 frames a second; use less, or .mp4 or .webp")
    if args.ease and args.pace == "perceptual":
        raise UserError("--ease slows down at each seed, --pace perceptual never does: choose one of them")
    if photos and args.truncation != 1:
        raise UserError(f"--truncation {args.truncation}: would make other people of --photos; leave it out")
    if args.save_tuned and not photos:
        raise UserError(f"--save-tuned {args.save_tuned}: nothing is tuned without --photos; add them")
    if any(photo.suffix == ".pt" for photo in photos):
        if len(photos) > 1 or args.model or args.save_tuned:
            raise UserError("--photos: a tuned model stands alone, without other photos, --model and --save-tuned")
        args.model = photos[0]
    args.model = args.model or SHIPPED
    return args


def make_film(argv):
    """Make the film that the command line asks for. What cannot be drawn is refused before a face is computed."""
    args = parse(argv)
    path, file, generator = open_model(args.model, pick_device(args.device))
    found = tuned_latents(file, path) if args.photos == [args.model] else {}  # {name: latent}
    seeds = random.sample(range(1_000_000), args.random) if args.random else args.seeds
    seeds = list(found) or photo_names(args.photos) if args.photos else seeds
    morphs = pick_seeds(seeds, args.columns, args.loop)
    labels = [[f"{a} > {b}" for a, b in pairwise(morph + morph[:1] * args.loop)] for morph in morphs]

    side, ending = generator.size * args.scale, args.out.suffix.lower()
    axis = 0 if ending == ".png" else 1  # the morphs of a strip lie below each other
    count = len(labels[0]) * args.frames + (not args.loop)
    if max(side * args.columns, side * count * (ending == ".png")) > WRITERS[ending][1]:
        raise UserError(f"--out {args.out}: too many pixels; {ending} takes {WRITERS[ending][1]} in each direction")
    for label in chain(*labels) if args.label else ():
        caption(label, side)  # raises where it is too wide

    if args.photos and not found:
        photos = dict(zip(seeds, args.photos, strict=True))
        generator, found = tune_for(photos, generator, crop_of(file), args.save_tuned)
    options = args.frames, args.mode, args.pace, args.loop, args.ease, args.truncation
    ways = [route(generator, [found.get(seed, seed) for seed in morph], *options) for morph in morphs]
    z = torch.stack([latents for latents, _ in ways], dim=1)  # (F, C, nz)
    texts = ([names[min(int(k), len(names) - 1)] for k in at] for names, (_, at) in zip(labels, ways, strict=True))
    captions = list(zip(*texts, strict=True)) if args.label else None
    frames = tqdm(film(generator, z, captions, args.scale, axis), total=count, unit="frames", disable=None, leave=False)
    some = slice(None, None, count // 32 + 1)
    write_film(args.out, frames, args.fps, film(generator, z[some], captions and captions[some], args.scale, axis))
    shown = " | ".join(" ".join(map(str, morph)) for morph in morphs)
    print(f"{args.out}: {count} frames, {'photos' if args.photos else 'seeds'} {shown}")


def main(argv=None):
    return run_command(make_film, argv)


if __name__ == "__main__":
    sys.exit(main())
