"""Which model is the best, and how did it get there? Figures of a run, and a table of distances to real faces."""

import argparse
import csv
import hashlib
import io
import json
import math
import os
import shlex
import sys
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from tqdm import tqdm

from checkpoints import load_generator, read_model_file, step_of
from command_line import is_out_of_memory
from Critic import Critic
from Dataset import SPLITS, add_data_flags, epoch_order, open_data
from device import add_device_flag, pick_device, prepare
from Generator import Generator, latent, to_uint8
from Interpolation import SEEDS, faces, write_film

BATCH = 64  # images in a batch of everything that is measured
FEWEST = 2048  # images below which a distance says more about their number than about the model
FACES = 1000  # images on which faces are counted, at most: the detector is the slowest part
MOVIE_FRAMES = 100  # checkpoints in the film of a run, at most
METRICS = {  # --features: the flag and the name of the Frechet and of the kernel distance
    "inception": {"fid": "FID", "kid": "KID x1000"},
    "mobilenet_v2": {"fd": "FD-MobileNetV2", "kd": "KD-MobileNetV2 x1000"},
}
CRITIC = "critic real - fake"
LINES = ("#e8710a", "#12b5cb", "#d01884", "#7cb342", "#425066", "#9334e6")
TERMS = """**Terms.** CelebA may be used for non-commercial research only, and so may what was learnt from it.

**Limits.** CelebA shows celebrities as press photographs do: mostly young, light-skinned, made up and smiling. A model
of it draws such people, and worse the rarer somebody's looks are there. Its faces belong to nobody, but one may
resemble somebody. Do not use them to pretend that a person exists, said or did something, to judge or recognise
people, or as a picture of what people look like."""


# ---- models ---------------------------------------------------------------------------------------------------


def list_models(folder):
    """Return the model files in a folder, by the last number in their names.

    Where a run has a checkpoint and a generator file of a step, it is the checkpoint: it also holds the critic.
    Raises FileNotFoundError where there is none.
    """
    files = {file.name: file for file in sorted(folder.glob("*.pt"), key=lambda file: (step_of(file), file.name))}
    if not files:
        raise FileNotFoundError(f"{folder}: no model files (*.pt) in it; name a run's folder or model files")
    for name in [name for name in files if name.startswith("checkpoint_")]:
        files.pop(name.replace("checkpoint_", "generator_", 1), None)
    return list(files.values())


def name_folders(folders):
    """Return {name: folder}, named by the last part of its path, or by as many of the last as tell them all apart."""
    folders = {folder.resolve(): folder for folder in folders}
    for depth in count(1):
        names = ["-".join(path.parts[-depth:]) for path in folders]
        if len(set(names)) == len(names):
            return dict(zip(names, folders.values(), strict=True))


def evenly(items, count):
    """Return at most `count` of a list's items, evenly spread, the last and (of two or more) the first too; 0: all."""
    if count == 0 or len(items) <= count:
        return items
    if count == 1:
        return items[-1:]
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]


def without_folders(words):
    """Return command-line words with paths outside the project cut to their names: a shared file tells no folders."""

    def cut(word):
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        return flag + equals + (Path(value).name if Path(value).is_absolute() or value.startswith("..") else value)

    return list(map(cut, words))


def generator_only(path):
    """Return the dict of a generator-only file for any model file, to share: the EMA weights where there are some."""
    file = read_model_file(path)
    settings, made_by = dict(file.get("settings") or {}), dict(file.get("made_by") or {})
    for key in ("out", "cache", "resume", "device", "workers"):  # they say where it was trained, not how
        settings.pop(key, None)
    if isinstance(settings.get("data"), list):
        settings["data"] = without_folders(settings["data"])
    if settings.get("grow_from"):
        (settings["grow_from"],) = without_folders([settings["grow_from"]])
    if "command" in made_by:
        lines = (shlex.join(without_folders(shlex.split(line))) for line in made_by["command"].splitlines())
        made_by["command"] = "\n".join(lines)
    state = file.get("ema") or file["generator"]["state"]
    return {
        "format": file["format"],
        "step": file.get("step"),
        "settings": settings,
        "generator": {
            "config": file["generator"]["config"],
            "state": {key: halved(tensor) for key, tensor in state.items()},
        },
        "made_by": made_by,
    }


def write_atomically(path, content):
    """Write bytes under a temporary name, then rename: `path` is never torn, and a good file survives an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def halved(tensor):
    """Return a float32 matrix or kernel as float16: half the file, and no pixel moves by more than a grey level.

    Vectors stay as they are: BatchNorm's statistics are among them, whose range is unbounded.
    """
    return tensor.half() if tensor.dtype == torch.float32 and tensor.dim() > 1 else tensor


def model_bytes(path):
    """Return the generator-only file for the model file `path` as bytes, after a check that it can be loaded."""
    load_generator(path)
    buffer = io.BytesIO()
    torch.save(generator_only(path), buffer)
    return buffer.getvalue()


# ---- figures --------------------------------------------------------------------------------------------------


def seed_faces(path, seeds, device):
    """Return the faces that a model gives for `seeds`: (len(seeds), size, size, 3) uint8 array."""
    generator = load_generator(path, device)
    z = torch.stack([latent(seed, generator.nz) for seed in seeds])  # (seeds, nz)
    return to_uint8(faces(generator, z)).permute(0, 2, 3, 1).cpu().numpy()


def label_of(path):
    """Return what is written above a model's faces: its step, or its name where the file tells none."""
    step = read_model_file(path).get("step")
    return path.stem if step is None else f"{step:,}"


def draw_grid(columns, labels, seeds):
    """Draw the report's figure 3: one row a seed, one column a model, its label above it.

    columns: a list of (len(seeds), S, S, 3) uint8 arrays, S may differ.  labels: a text for each of them.
    """
    cell, gap = max(96, max(column.shape[1] for column in columns)), 4
    font = ImageFont.load_default(max(14, cell // 8))
    left, top = int(max(font.getlength(str(seed)) for seed in seeds)) + 16, font.size * 2
    page = Image.new("RGB", (left + len(columns) * (cell + gap), top + len(seeds) * (cell + gap)), "white")
    draw = ImageDraw.Draw(page)
    draw.text((left - 8, top / 2), "seed", "#555", font.font_variant(size=12), anchor="rm")
    for x, (column, label) in enumerate(zip(columns, labels, strict=True)):
        while font.getlength(label) > cell and font.size > 8:
            font = font.font_variant(size=font.size - 1)
        draw.text((left + x * (cell + gap) + cell / 2, top / 2), label, "black", font, anchor="mm")
        for y, face in enumerate(column):
            face = Image.fromarray(face).resize((cell, cell), Image.Resampling.NEAREST)
            page.paste(face, (left + x * (cell + gap), top + y * (cell + gap)))
    for y, seed in enumerate(seeds):
        draw.text((left - 8, top + y * (cell + gap) + cell / 2), str(seed), "black", font, anchor="rm")
    return page


def movie_frame(column, label):
    """Return one frame of the film in which the faces emerge: (S, size, size, 3) uint8 -> (H, W, 3), H and W even."""
    scale = max(1, 96 // column.shape[1])  # small faces are shown larger
    column = column.repeat(scale, axis=1).repeat(scale, axis=2)  # (S, size * scale, size * scale, 3)
    across = math.ceil(math.sqrt(len(column)))
    rows = [np.hstack(column[i : i + across]) for i in range(0, len(column), across)]
    rows[-1] = np.pad(rows[-1], ((0, 0), (0, rows[0].shape[1] - rows[-1].shape[1]), (0, 0)), constant_values=255)
    image = Image.fromarray(np.vstack(rows))
    font = ImageFont.load_default(max(12, image.width // 16))
    page = Image.new("RGB", (image.width, image.height + font.size * 2), "white")
    page.paste(image, (0, font.size * 2))
    ImageDraw.Draw(page).text((page.width / 2, font.size), label, "black", font, anchor="mm")
    return np.asarray(page)


def draw_evolution(name, paths, args, device):
    """Write NAME_faces.png, at most --checkpoints of the models side by side, and NAME_faces.gif or .mp4, the film."""
    shown = evenly(paths, args.checkpoints)
    filmed = evenly(paths, MOVIE_FRAMES)
    pictures = {path: seed_faces(path, args.seeds, device) for path in {*shown, *filmed}}
    labels = {path: label_of(path) for path in pictures}
    write_picture(
        args.out / f"{name}_faces.png",
        draw_grid([pictures[path] for path in shown], [labels[path] for path in shown], args.seeds),
    )
    if len(filmed) > 1 and len({picture.shape for picture in pictures.values()}) == 1:
        frames = [movie_frame(pictures[path], f"step {labels[path]}") for path in filmed]
        frames += [frames[-1]] * args.fps  # the last face stays for another second
        film = args.out / f"{name}_faces.{args.movie}"
        write_film(film, frames, args.fps, evenly(frames, 8))
        print(f"wrote {film}")


def write_picture(path, image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())
    print(f"wrote {path}")


def read_scalar(run, tag):
    """Return the steps and values of a scalar in a run's TensorBoard files: two float64 arrays, empty without it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # slow to import

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})  # 0: all of them
    events.Reload()
    points = events.Scalars(tag) if tag in events.Tags()["scalars"] else []
    return np.array([p.step for p in points], float), np.array([p.value for p in points], float)


def smooth(values, weight=0.9):
    """Exponential moving average without the bias towards its start, as TensorBoard draws it: (N,) -> (N,)."""
    average, total, smoothed = 0.0, 0.0, np.empty(len(values))
    for i, value in enumerate(values):
        average, total = weight * average + (1 - weight) * value, weight * total + 1 - weight
        smoothed[i] = average / total
    return smoothed


def ticks(low, high, count=6):
    """Return about `count` round numbers within [low, high], spaced by 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    space = next(m * power for m in (1, 2, 5, 10) if (high - low) / (m * power) <= count)
    return np.arange(math.ceil(low / space), math.floor(high / space) + 1) * space


def draw_curves(curves, title):
    """Draw scalars of runs over the steps: the smoothed line over the faint raw one, a legend below.

    curves: {name: (steps, values)}, two float arrays of equal length, 1 or more.
    Single spikes may leave the picture: the axis holds all smoothed values and 98 % of the raw ones.
    """
    scale = 2  # drawn larger and reduced, so that lines and letters are smooth
    width, left, right, top, bottom = 960 * scale, 80 * scale, 930 * scale, 50 * scale, 440 * scale
    line = 22 * scale
    page = Image.new("RGB", (width, bottom + 64 * scale + len(curves) * line), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(15 * scale)

    smoothed = {name: smooth(values) for name, (_, values) in curves.items()}
    shown = [*smoothed.values(), *(np.percentile(values, [1, 99]) for _, values in curves.values())]
    low, high = min(s.min() for s in shown), max(s.max() for s in shown)
    margin = 0.05 * (high - low) or 0.5
    low, high = low - margin, high + margin
    first, last = min(s.min() for s, _ in curves.values()), max(s.max() for s, _ in curves.values())
    last = max(last, first + 1)

    def place(steps, values):
        x = left + (np.asarray(steps) - first) / (last - first) * (right - left)
        return list(zip(x, bottom - (np.asarray(values) - low) / (high - low) * (bottom - top), strict=True))

    for value in ticks(low, high):
        ((_, y),) = place([first], [value])
        draw.line([(left, y), (right, y)], "#e4e4e4", scale)
        draw.text((left - 8 * scale, y), f"{value:.6g}", "#444", font, anchor="rm")
    for step in ticks(first, last):
        ((x, _),) = place([step], [low])
        draw.line([(x, top), (x, bottom)], "#e4e4e4", scale)
        text = f"{step / 1e6:g}M" if last >= 2e6 else f"{step / 1000:g}k" if step and last >= 2000 else f"{step:g}"
        draw.text((x, bottom + 8 * scale), text, "#444", font, anchor="mt")

    plot = Image.new("RGB", page.size)  # the lines by themselves, to cut off what leaves the axes
    plot.paste(page)
    pen = ImageDraw.Draw(plot)
    colours = {name: LINES[i % len(LINES)] for i, name in enumerate(curves)}
    for name, (steps, values) in curves.items():
        faint = Image.blend(Image.new("RGB", (1, 1), colours[name]), Image.new("RGB", (1, 1), "white"), 0.55)
        pen.line(place(steps, values), faint.getpixel((0, 0)), scale)
    for name, (steps, _) in curves.items():
        pen.line(place(steps, smoothed[name]), colours[name], 2 * scale, joint="curve")
    box = (left, top, right, bottom)
    page.paste(plot.crop(box), box[:2])
    draw.line([(left, top), (left, bottom), (right, bottom)], "#444", scale)
    draw.text((left, 24 * scale), title, "black", font.font_variant(size=19 * scale), anchor="lm")
    draw.text(((left + right) / 2, bottom + 32 * scale), "step", "#444", font, anchor="mt")

    for i, name in enumerate(curves):
        y = bottom + 64 * scale + i * line
        draw.line([(left, y), (left + 24 * scale, y)], colours[name], 3 * scale)
        draw.text((left + 34 * scale, y), f"{name}   last {smoothed[name][-1]:.3g}", "black", font, anchor="lm")
    return page.resize((page.width // scale, page.height // scale), Image.Resampling.BOX)


# ---- distances ------------------------------------------------------------------------------------------------


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Frechet distance, squared as FID is, of two normal distributions (Heusel et al. 2017, equation 6).

    mu: (D,) means.  sigma: (D, D) covariances.  Computed in float64; returns a float, 0 or more.
    The trace of sqrt(sigma1 sigma2) is that of sqrt(A sigma2 A) with A = sqrt(sigma1): that matrix is
    symmetric, so its eigenvalues are real and exact, and no general matrix square root is needed.
    """
    mu1, sigma1, mu2, sigma2 = (x.double() for x in (mu1, sigma1, mu2, sigma2))
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T  # (D, D)
    trace = torch.linalg.eigvalsh(root @ sigma2 @ root).clamp_min(0).sqrt().sum()
    return max(0.0, ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace).item())


def kernel_distance(x, y):
    """Squared maximum mean discrepancy with the kernel (a.b / D + 1)**3, as KID is (Binkowski et al. 2018, eq. 4).

    x: (N, D) and y: (M, D) features.  Unbiased, so it may be negative, and over all pairs at once:
    the usual mean over random subsets estimates the same number with more noise.
    Raises ValueError for less than two of either.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"--samples: {len(x)} and {len(y)} images cannot be compared, take more")

    def kernel_sum(a, b):
        return sum(((part @ b.T / a.shape[1] + 1) ** 3).double().sum().item() for part in a.split(1024))

    def mean_of_pairs(a):  # without those of an image with itself
        itself = ((a.square().sum(1) / a.shape[1] + 1) ** 3).double().sum().item()
        return (kernel_sum(a, a) - itself) / (len(a) * (len(a) - 1))

    return mean_of_pairs(x) + mean_of_pairs(y) - 2 * kernel_sum(x, y) / (len(x) * len(y))


def moments(features):
    """Return mean (D,) and unbiased covariance (D, D) of (N, D) features, in float64."""
    features = features.double()
    return features.mean(0), features.T.cov()


class MobileNetFeatures(nn.Module):
    """torchvision's MobileNetV2 without its classifier: (N, 3, S, S) uint8 -> (N, 1280) features.

    Images are resized to 224 px (bilinear, antialiased) and normalised as for ImageNet.
    """

    def __init__(self, weights=None):
        super().__init__()
        from torchvision.models import mobilenet_v2

        self.layers = mobilenet_v2().features
        if weights is not None:
            self.layers.load_state_dict({k[9:]: v for k, v in weights.items() if k.startswith("features.")})
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def forward(self, images):
        x = nn.functional.interpolate(images.float() / 255, (224, 224), mode="bilinear", antialias=True)
        return self.layers((x - self.mean) / self.std).mean((2, 3))  # (N, 1280, 7, 7) -> (N, 1280)


def load_extractor(name, weights, device):
    """Return the network that turns (N, 3, S, S) uint8 images into (N, D) features, in eval mode.

    name: "inception", the network of FID with its own resize to 299 px, or "mobilenet_v2".
    weights: a file of its weights; None has its library download them.
    Raises ValueError or FileNotFoundError where the library or the weights cannot be had.
    """
    if weights and not Path(weights).is_file():
        raise FileNotFoundError(f"--weights {weights}: no such file")
    try:
        if name == "inception":
            from torchmetrics.image.fid import FrechetInceptionDistance

            network = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=weights).inception
        else:
            if weights:
                state = torch.load(weights, map_location="cpu", weights_only=True)
            else:
                from torchvision.models import MobileNet_V2_Weights

                state = MobileNet_V2_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
            network = MobileNetFeatures(state)
    except ImportError as error:
        raise ValueError(
            "--features inception: needs `pip install torchmetrics[image]`; or use --features mobilenet_v2"
        ) from error
    except OSError as error:
        raise ValueError(
            f"--features {name}: its weights could not be downloaded ({error}); pass them with --weights FILE"
            + (", or use --features mobilenet_v2" if name == "inception" else "")
        ) from error
    except Exception as error:  # torch raises many types for a torn or foreign file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"--weights {weights}: not the weights of {name} ({reason})") from error
    return network.to(device).eval().requires_grad_(False)


def weights_hash(network):
    """Return 16 hex digits that are the same for the same weights, wherever they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def real_images(dataset, indices):
    """Yield batches of real images: (B, 3, size, size) uint8."""
    for part in indices.split(BATCH):
        yield to_uint8(dataset.batch(part))


def generated_images(generator, z):
    """Yield batches of the images of latents z (N, nz): (B, 3, size, size) uint8."""
    for part in z.split(BATCH):
        yield to_uint8(faces(generator, part))


@torch.inference_mode()
def features_of(batches, count, extractor, device):
    """Return the features of all images in `batches`, about `count` / BATCH of them: (N, D) float32 on the CPU."""
    bar = tqdm(batches, total=math.ceil(count / BATCH), unit=" batches", disable=None, leave=False)
    return torch.cat([extractor(batch.to(device)).float().cpu() for batch in bar])


def real_features(dataset, indices, extractor, extractor_id, device):
    """Return the features of images `indices` of the data: (N, D) float32, kept beside its packed images."""
    chosen = hashlib.sha256(indices.numpy().tobytes()).hexdigest()[:8]
    key = f"{dataset.fingerprint}-{dataset.size}px-{dataset.crop}-{len(indices)}-{chosen}-{extractor_id}"
    file = dataset.cache_file.with_name(f"features-{key}.npy")
    if file.is_file():
        return torch.from_numpy(np.load(file))
    features = features_of(real_images(dataset, indices), len(indices), extractor, device)
    buffer = io.BytesIO()
    np.save(buffer, features.numpy())
    try:
        write_atomically(file, buffer.getvalue())
    except OSError as error:
        print(f"The features of the data are not kept for next time: {error}")
    return features


def compare(features, reference, names):
    """Return {name: value} of the two distances of (N, D) features to those of the reference, and the diversity.

    Diversity: root mean square distance of two images' features relative to that of two reference images. 1: as
    different from each other as real faces; 0: mode collapse. The mean square distance of all pairs is twice
    the trace of the covariance, so no pair has to be formed.
    """
    (mu, sigma), (mu_r, sigma_r) = moments(features), moments(reference)
    frechet, kernel = names
    return {
        frechet: frechet_distance(mu, sigma, mu_r, sigma_r),
        kernel: 1000 * kernel_distance(features, reference),
        "diversity": (sigma.trace() / sigma_r.trace()).sqrt().item(),
    }


@torch.no_grad()
def critic_gap(file, generator, dataset, indices, z, device):
    """Return mean(real) - mean(fake), the critic's own estimate of the distance, up to its Lipschitz constant.

    file: the dict of a checkpoint.  The images are those of `indices`, the fakes those of as many latents of z.
    """
    critic = Critic(**file["critic"]["config"])
    critic.load_state_dict(file["critic"]["state"])
    critic.to(device).train()  # BatchNorm judges a batch by its own statistics, as it did in training
    count = min(len(indices), len(z)) // BATCH * BATCH or min(len(indices), len(z))
    real = [critic(dataset.batch(part).to(device)).mean() for part in indices[:count].split(BATCH)]
    fake = [critic(faces(generator, part).clone()).mean() for part in z[:count].split(BATCH)]
    return (torch.stack(real).mean() - torch.stack(fake).mean()).item()


def held_out(file, dataset):
    """Return "yes", "no" or "unknown": whether the model of this file was trained without the dataset's images."""
    data, split = (file.get("made_by") or {}).get("data"), (file.get("settings") or {}).get("split")
    if isinstance(data, dict) and data.get("fingerprint") == dataset.fingerprint:
        return "no"
    return "yes" if split != dataset.split and "all" not in (split, dataset.split) else "unknown"


def load_face_detector(device):
    """Return a function (B, 3, S, S) uint8 -> list of B face counts, or None where its package is missing.

    MTCNN (Zhang et al. 2016) of facenet-pytorch, which brings its weights along. On images of 160 px, with
    its last threshold raised to 0.9, it finds exactly one face in nearly every CelebA image (the table's
    first row says in how many).
    """
    try:
        from facenet_pytorch import MTCNN
    except ImportError:
        print(
            "Faces are not counted: `pip install --no-deps facenet-pytorch` adds that "
            "(--no-deps, because it asks for an old torch but runs with this one)."
        )
        return None
    network = MTCNN(keep_all=True, min_face_size=40, thresholds=[0.6, 0.7, 0.9], device=device)

    def count(images):
        images = nn.functional.interpolate(images.float(), (160, 160), mode="bilinear", antialias=True)
        found, _ = network.detect(images.round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy())
        return [0 if boxes is None else len(boxes) for boxes in found]

    return count


def face_shares(batches, detector):
    """Return {column: share in %} of images with exactly one face, none, and several; {} without a detector."""
    if detector is None:
        return {}
    counts = np.array([count for batch in batches for count in detector(batch)])
    shares = {"one face %": counts == 1, "none %": counts == 0, "several %": counts > 1}
    return {column: 100 * hits.mean() for column, hits in shares.items()}


# ---- table ----------------------------------------------------------------------------------------------------


def choose_real(args, size):
    """Return two disjoint sets of real images, each a (dataset, indices): the reference, and the one for the floor.

    With --floor-split the floor comes from that split, else from the same one, which is shared between the two.
    Either has at most --samples images, in a fixed random order. Raises ValueError where they cannot be disjoint
    or are fewer than FEWEST (without --quick).
    """

    def open_split(split):
        return open_data(args.data, size, args.crop, split, args.cache, args.workers)

    reference = floor = open_split(args.split)
    order = epoch_order(len(reference), 0, 0)
    if args.floor_split:
        if args.floor_split == args.split or args.split == "all":
            raise ValueError(
                f"--floor-split {args.floor_split}: shares images with the reference (split {reference.split}); "
                "name two different splits of data that has some, or leave it out"
            )
        floor = open_split(args.floor_split)
        chosen = order[: args.samples], epoch_order(len(floor), 0, 0)[: args.samples]
    else:
        count = min(args.samples, len(order) // 2)
        chosen = order[:count], order[count:][: args.samples]
    if min(map(len, chosen)) < FEWEST and not args.quick:
        raise ValueError(
            f"--data: {len(chosen[0])} images as reference and {len(chosen[1])} for the floor, and fewer than {FEWEST} "
            "say little; take more data, another --split, a --floor-split, or --quick, which marks the numbers"
        )
    return (reference, chosen[0]), (floor, chosen[1])


def measure(paths, size, args, extractor, detector, device):
    """Return (protocol, rows) of models of one image size: how it was measured, and a dict of numbers for each.

    The first row compares real images with real ones: no model can be expected to get below it.
    """
    (reference, indices), (floor, floor_indices) = choose_real(args, size)
    extractor_id = f"{args.features}-{weights_hash(extractor)}"
    names = list(METRICS[args.features].values())
    target = real_features(reference, indices, extractor, extractor_id, device)
    protocol = {
        "size": size,
        "data": reference.name,
        "split": reference.split,
        "crop": reference.crop,
        "reference images": len(indices),
        "extractor": extractor_id,
        "resize": "299 px, TensorFlow's bilinear" if args.features == "inception" else "224 px, bilinear antialiased",
        "fingerprint": reference.fingerprint,
        "seed": args.seed,
        "quick": args.quick,
    }
    rows = [
        {
            "model": f"real images, split {floor.split}, others than the reference",
            "step": None,
            "N": len(floor_indices),
            **compare(real_features(floor, floor_indices, extractor, extractor_id, device), target, names),
            **face_shares(real_images(floor, floor_indices[:FACES]), detector),
        }
    ]
    for path in paths:
        file, generator = read_model_file(path), load_generator(path, device)
        generator = generator.to(memory_format=torch.channels_last)  # faster on a CPU
        z = torch.randn(args.samples, generator.nz, generator=torch.Generator().manual_seed(args.seed))  # (N, nz)
        row = {"model": str(path), "step": file.get("step"), "N": args.samples}
        row |= compare(
            features_of(generated_images(generator, z), len(z), extractor, device), target, names
        )  # fmt: skip
        if file.get("critic"):
            row[CRITIC] = critic_gap(file, generator, reference, indices, z, device)
            row["held out"] = held_out(file, reference)
        row |= face_shares(generated_images(generator, z[:FACES]), detector)
        rows.append(row)
        crop = (file.get("settings") or {}).get("crop", args.crop)
        if crop != args.crop:
            print(f"Note: {path} was trained with --crop {crop}, it is compared with {args.crop}.")
    return protocol, rows


def format_table(protocol, rows, detector):
    """Return the table of measure() as text, with all that its numbers depend on above it."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    mark = "*" if protocol["quick"] else ""

    def cell(row, column):
        value = row.get(column)
        return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3f}{mark}" if isinstance(
            value, float) else value  # fmt: skip

    cells = [columns] + [[cell(row, column) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    lines[1:1] = ["-" * len(lines[0])]
    head = [
        f"{protocol['size']} px: N images of each model (latents of seed {protocol['seed']}) against "
        f"{protocol['reference images']:,} of {protocol['data']}, split {protocol['split']}, crop {protocol['crop']} "
        f"(fingerprint {protocol['fingerprint']}),",
        f"features of {protocol['extractor']}, images resized to {protocol['resize']}"
        + (f"; faces counted on {FACES:,} of the N images at most" if detector else "")
        + ("; * --quick: too few images to be compared with other numbers" if mark else ""),
    ]
    return "\n".join(head + lines)


def write_csv(path, tables):
    """Write all rows, each with all that its numbers depend on, so that a row can be read by itself."""
    rows = [row | protocol for protocol, rows in tables for row in rows]
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, buffer.getvalue().encode())
    print(f"wrote {path}")


# ---- the best, and one to share -------------------------------------------------------------------------------


def choose_best(rows, metric):
    """Return the row of the model with the lowest `metric`; of the critic's, as in the report, the one nearest to 0.

    Raises ValueError where no model has it.
    """
    models = [row for row in rows[1:] if row.get(metric) is not None and math.isfinite(row[metric])]
    if not models:
        raise ValueError(f"--by: no model here has a finite {metric}; a critic is in full checkpoints only")
    return min(models, key=lambda row: abs(row[metric]) if metric == CRITIC else row[metric])


def keep_best(row, metric, protocol, floor, args):
    """Copy the model of `row` to --bests as generator_SIZE.pt, with a .json that says how it was chosen and a card.

    Raises ValueError, and leaves all as it is, where the model there is as good, or was measured in another way,
    unless --force.
    """
    target = args.bests / f"generator_{protocol['size']}.pt"
    note = target.with_suffix(".json")
    chosen = {"metric": metric, "value": row[metric], "N": row["N"], "protocol": protocol}
    if target.exists() and not args.force:
        try:
            old = json.loads(note.read_text(encoding="utf-8"))
            value = old["value"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(
                f"--bests: {target} is there, and nothing says how good it is; --force replaces it"
            ) from None
        if any(old.get(key) != chosen[key] for key in ("metric", "N", "protocol")):
            raise ValueError(
                f"--bests: {target} has {old.get('metric')} {value:.3f} measured in another way (see {note}); "
                "measure it beside the new one, or --force replaces it"
            )
        if choose_best([floor, {metric: value}, row], metric) is not row:
            raise ValueError(f"--bests: {target} stays, its {metric} is {value:.3f} against {row[metric]:.3f}")
    content = model_bytes(row["model"])
    args.bests.mkdir(parents=True, exist_ok=True)
    write_atomically(target, content)
    chosen |= {"sha256": hashlib.sha256(content).hexdigest(), "floor": floor.get(metric), "row": row}
    chosen["command"] = args.command
    write_atomically(note, (json.dumps(chosen, indent=2) + "\n").encode())
    card = model_card(generator_only(target), target, target, chosen["sha256"])
    write_atomically(target.with_suffix(".md"), card.encode())
    print(f"best by {metric}: {row['model']}, {row[metric]:.3f}; copied to {target}, and why to {note}")


def export(path, target, force=False):
    """Write a model to share: `target` (weights and settings), its .sha256 in sha256sum's format, a model card .md.

    Raises ValueError where `target` exists (without `force`), and FileNotFoundError where its folder does not.
    """
    if target.suffix != ".pt" or target.is_dir():
        raise ValueError(f"--export {target}: name a file that ends in .pt")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"--export {target}: there is no folder {target.parent}; make it first")
    if target.exists() and not force:
        raise ValueError(f"--export {target}: is there already; choose another name, or --force replaces it")
    content, file = model_bytes(path), generator_only(path)
    digest = hashlib.sha256(content).hexdigest()
    write_atomically(target, content)
    write_atomically(target.with_name(target.name + ".sha256"), f"{digest}  {target.name}\n".encode())
    write_atomically(target.with_suffix(".md"), model_card(file, path, target, digest).encode())
    print(f"wrote {target}, {target.name}.sha256 and {target.with_suffix('.md').name}")


def model_card(file, path, target, digest):
    """Return a short description of a generator-only file in Markdown: what it is, how it was made and is used."""
    config, made_by, note = file["generator"]["config"], file.get("made_by") or {}, path.with_suffix(".json")
    parameters = sum(p.numel() for p in Generator(**config).parameters())
    data = made_by.get("data")
    if isinstance(data, dict):
        data = f"{data.get('images', 0):,} images ({data.get('name')}, fingerprint {data.get('fingerprint')})"
    lines = [
        f"# {target.stem}",
        f"Generator of a Wasserstein GAN: {config['nz']} standard normal numbers -> a face of {config['size']} x "
        f"{config['size']} pixels. {parameters / 1e6:.1f} million parameters, step {file.get('step') or 0:,}.",
        "",
        f"- sha256: `{digest}`",
        f"- trained on: {data or 'unknown'}",
        "- made by: " + ", then ".join(f"`{line}`" for line in made_by.get("command", "unknown").splitlines()),
    ]
    if note.is_file():
        best = json.loads(note.read_text(encoding="utf-8"))
        lines += [f"- {best['metric']}: {best['value']:.3f} (N = {best['N']:,}; "
                  + ", ".join(f"{key} {value}" for key, value in best["protocol"].items()) + ")"]  # fmt: skip
    (where,) = without_folders([str(target)])
    lines += ["", f"Use it: `python Interpolation.py --model {where}`", "", "| setting | value |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in ((file.get("settings") or {}) | config).items()]
    lines += ["", TERMS]
    return "\n".join(lines) + "\n"


# ---- command --------------------------------------------------------------------------------------------------


def parse(argv=None):
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, formatter_class=argparse.ArgumentDefaultsHelpFormatter, description=__doc__
    )  # fmt: skip
    parser.add_argument("models", nargs="+", type=Path, help="folders of runs, and model files")
    parser.add_argument("--out", type=Path, default=Path("evaluation"), help="folder for figures and tables")
    parser.add_argument("--checkpoints", type=int, default=12, help="of a run at most so many, evenly spread; 0: all")
    add_device_flag(parser)
    figures = parser.add_argument_group("figures")
    figures.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="the faces that are followed")
    figures.add_argument("--movie", choices=["gif", "mp4"], default="gif", help="format in which the faces emerge")
    figures.add_argument("--fps", type=int, default=5, help="checkpoints a second in it")
    figures.add_argument("--tag", default="loss/critic", help="scalar of the runs that is plotted")
    figures.add_argument("--figures-only", action="store_true", help="measure nothing")
    table = parser.add_argument_group("table")
    add_data_flags(table)
    table.add_argument(
        "-n", "--samples", type=int, default=10_000, help="images of each model, and at most of the data"
    )
    table.add_argument("--floor-split", choices=[*SPLITS], help="take the real images of the first row from this "
                       "split; without it --split is shared between the two%(default).0s")  # fmt: skip
    table.add_argument("--features", choices=[*METRICS], default="inception", help="inception: FID and KID; "
                       "mobilenet_v2: FD and KD, where Inception cannot be had")  # fmt: skip
    table.add_argument(
        "--weights", metavar="FILE", help="weights of the extractor, else they are downloaded%(default).0s"
    )
    table.add_argument("--seed", type=int, default=0, help="chooses the latents that are measured")
    table.add_argument("--quick", action="store_true", help=f"allow fewer than {FEWEST} images, and mark the numbers")
    best = parser.add_argument_group("the best")
    best.add_argument(
        "--by", choices=["fid", "kid", "fd", "kd", "critic"], help="copy the best by this to --bests%(default).0s"
    )
    best.add_argument("--bests", type=Path, metavar="DIR", default=Path("bests"), help="folder of the best models")
    best.add_argument("--export", type=Path, metavar="FILE", help="only write the model named, of a run its newest, as "
                      "one file to share, with sha256 and model card%(default).0s")  # fmt: skip
    best.add_argument("--force", action="store_true", help="let --by and --export replace what is there")
    args = parser.parse_args(argv)
    args.command = shlex.join(
        ["python", "evaluate_models.py", *without_folders(sys.argv[1:] if argv is None else argv)]
    )
    return args


def check(args):
    """Raise ValueError or FileNotFoundError for flags that cannot be met, before anything is computed."""
    for path in args.models:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such model file or run folder")
    for seed in (*args.seeds, args.seed):
        latent(seed)  # refuses a seed out of range
    if not 1 <= args.fps <= 50:
        raise ValueError(f"--fps {args.fps}: choose 1 to 50")
    if args.checkpoints < 0:
        raise ValueError(f"--checkpoints {args.checkpoints}: 0 (all) or more")
    if args.samples < (2 if args.quick else FEWEST):
        raise ValueError(
            f"--samples {args.samples}: fewer than {FEWEST} images say little about a model; "
            "--quick allows 2 and more, and marks the numbers"
        )
    if args.by and args.figures_only:
        raise ValueError(f"--by {args.by}: nothing is measured with --figures-only; leave one of them out")
    if args.by not in (None, "critic", *METRICS[args.features]):
        raise ValueError(
            f"--by {args.by}: --features {args.features} measures {' and '.join(METRICS[args.features])}; choose one "
            "of them, critic, or other --features"
        )


def evaluate(args):
    """Do what the flags say: figures, table, best. Raises ValueError or OSError."""
    check(args)
    device = pick_device(args.device)
    prepare(device)
    # One group for each folder, and one for all model files that were named by themselves.
    folders = name_folders([path for path in args.models if path.is_dir()])
    groups = {name: list_models(folder) for name, folder in folders.items()}
    if files := [path for path in args.models if not path.is_dir()]:
        groups["models" if "models" not in folders else "single_models"] = files
    if args.export:
        if len(args.models) != 1:
            raise ValueError(f"--export {args.export}: name one model or run to share, not {len(args.models)}")
        (paths,) = groups.values()
        export(paths[-1], args.export, args.force)
        return
    extractor = None if args.figures_only else load_extractor(args.features, args.weights, device)

    args.out.mkdir(parents=True, exist_ok=True)
    for name, paths in groups.items():
        draw_evolution(name, paths, args, device)
    curves = {name: read_scalar(folder, args.tag) for name, folder in folders.items()}
    for name in [name for name, (steps, _) in curves.items() if not len(steps)]:
        print(f"{name}: no scalar {args.tag} in its TensorBoard files, so it is not in the plot")
        del curves[name]
    if curves:
        write_picture(args.out / f"{args.tag.replace('/', '_')}.png", draw_curves(curves, args.tag))
    if args.figures_only:
        return

    detector = load_face_detector(device)
    by_size = {}
    for name, paths in groups.items():
        for path in evenly(paths, args.checkpoints) if name in folders else paths:
            by_size.setdefault(read_model_file(path)["generator"]["config"]["size"], []).append(path)
    tables = [measure(paths, size, args, extractor, detector, device) for size, paths in by_size.items()]
    text = "\n\n".join(format_table(*table, detector) for table in tables)
    print(f"\n{text}\n")
    write_atomically(args.out / "models.txt", (text + "\n").encode())
    write_csv(args.out / "models.csv", tables)
    if args.by:
        metric = CRITIC if args.by == "critic" else METRICS[args.features][args.by]
        for protocol, rows in tables:
            keep_best(choose_best(rows, metric), metric, protocol, rows[0], args)


def main(argv=None):
    try:
        evaluate(parse(argv))
    except (ValueError, OSError) as error:
        print(f"evaluate_models.py: error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print("evaluate_models.py: error: out of memory; --device cpu may have more", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
