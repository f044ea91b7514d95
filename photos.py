"""From photographs to latents: find the face, align it as CelebA's are, and bend a copy of the generator to fit.

A latent has some 100 numbers, which is too few for a person: the nearest face that a generator knows is somebody else.
So the generator is tuned around the latents found (pivotal tuning, Roich et al. 2021), for all photos together.
"""

import copy
import io
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional
from tqdm import tqdm

from atomic_write import atomic_write
from checkpoints import FORMAT
from command_line import UserError
from Generator import latent

MOST_PIXELS = 100_000_000  # of a photo; Pillow decodes it whole, at 3 bytes a pixel
DETECTION_SIDE = 1280  # pixels to which a larger photo is reduced before the face is looked for
# CelebA's eyes are at (69, 111) and (108, 111) of 178x218 pixels. MTCNN sees them one pixel to the right and below
# (mean of 40 images).
EYES = ((70, 112), (109, 112))
CUTS = {"center": (0, 20, 178, 178), "squash": (0, 0, 178, 218)}  # left, top, width, height: what --crop takes of them
SEARCH = 512  # seeds among which each photo's starts are looked for
STARTS = 4
INVERT_STEPS, INVERT_RATE = 100, 0.05  # of Adam on the latents
TUNE_STEPS, TUNE_RATE = 300, 1e-3  # and on the weights
AT_ONCE = 4  # photos in a step; with more of them there are more steps
SPHERE = 0.02  # weight of a latent's distance from the sphere |z|^2 = nz, near which normal vectors lie


# ---- from a photo to a face -----------------------------------------------------------------------------------


def read_photo(path):
    """Return a photo as an upright, opaque RGB image.

    Raises UserError for anything but a whole picture of at most MOST_PIXELS.
    """
    if not Path(path).is_file():
        raise UserError(f"--photos {path}: no such file")
    try:
        with Image.open(path) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError("too many pixels")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip to 8
                image = Image.fromarray((np.asarray(image) / 257).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:  # Pillow raises many types for a damaged or foreign file
        raise UserError(f"--photos {path}: cannot be read; save it as a JPEG of 100 megapixels at most") from error


@cache
def detector():
    """Return MTCNN (Zhang et al. 2016), which finds faces and eyes and brings its weights; UserError without it."""
    try:
        from facenet_pytorch import MTCNN
    except ImportError:
        raise UserError("--photos needs a face detector: pip install --no-deps facenet-pytorch") from None
    return MTCNN(keep_all=True, min_face_size=32, thresholds=[0.6, 0.7, 0.9], device="cpu")


def find_eyes(image, name="photo"):
    """Return both eyes of the largest face in an RGB image, the picture's left one first: (2, 2) float64, in pixels.

    Raises UserError where there is no face; says so where there are more.
    """
    network = detector()
    scale = min(1, DETECTION_SIDE / max(image.size))
    small = image.resize([max(1, round(side * scale)) for side in image.size], reducing_gap=2)
    try:
        boxes, _, points = network.detect(small, landmarks=True)  # the largest face first
    except (ValueError, RuntimeError):  # it fails on pictures smaller than its smallest window
        boxes = None
    if boxes is None:
        raise UserError(f"--photos {name}: no face found; it should look at the camera and be 32 pixels wide or more")
    if len(boxes) > 1:
        print(f"{name}: {len(boxes)} faces; the largest is taken")
    return np.asarray(points[0][:2], dtype=np.float64) / scale


def align(image, eyes, size, crop="center"):
    """Return the face in an RGB image as CelebA's are aligned and then cropped: (3, size, size) float32 in [-1, 1].

    A similarity takes the eyes to EYES in 178x218 pixels. What lies outside the photo repeats its border.
    """
    left, right = (complex(*eye) for eye in EYES)  # as complex numbers: one factor turns and scales
    first, second = (complex(*eye) for eye in eyes)
    factor = (second - first) / (right - left)
    column, row, width, height = CUTS[crop]
    fine = max(1, int(np.ceil(abs(factor) * height / size)))  # samples per pixel each way, against aliasing
    at = (np.arange(size * fine) + 0.5) / (size * fine)  # (S * fine,) in 0 .. 1
    at = column + at * width + 1j * (row + at * height)[:, None]  # (S * fine, S * fine) in pixels of CelebA
    where = first + factor * (at - left)  # and in those of the photo
    grid = np.stack([where.real / image.width, where.imag / image.height], axis=-1) * 2 - 1
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()  # (1, 3, H, W)
    x = functional.grid_sample(x, torch.from_numpy(grid)[None].float(), padding_mode="border", align_corners=False)
    return functional.avg_pool2d(x, fine)[0] / 127.5 - 1  # (3, S * fine, S * fine) -> (3, S, S)


def read_face(path, size, crop="center"):
    """Return the aligned face in a photo: (3, size, size) float32 in [-1, 1]. Raises UserError where there is none."""
    return align(image := read_photo(path), find_eyes(image, Path(path).name), size, crop)


# ---- from a face to a latent ----------------------------------------------------------------------------------


def distance(x, y):
    """Return how unlike pictures are: (N, 3, S, S) twice -> (N,).

    The mean square of the pixels, and on four scales the mean difference of pixels and of their gradients. With
    features of EfficientNet-Lite0 the inverted face was a little more alike, at three times the time.
    """
    total = (x - y).square().mean((1, 2, 3))
    for _ in range(4):
        for a, b in ((x, y), (x.diff(dim=2), y.diff(dim=2)), (x.diff(dim=3), y.diff(dim=3))):
            total = total + (a - b).abs().mean((1, 2, 3)) / 8
        x, y = functional.avg_pool2d(x, 2), functional.avg_pool2d(y, 2)
    return total


def ssim(x, y):
    """Return the structural similarity of pictures in [-1, 1], 1 for equal ones: (N, 3, S, S) twice -> (N,).

    Wang et al. 2004: Gaussian windows of 11 pixels with sigma 1.5; mean over windows and colours.
    """
    bell = torch.exp(-((torch.arange(11.0, device=x.device) - 5) ** 2) / (2 * 1.5**2))
    window = (bell[:, None] * bell / bell.sum() ** 2).expand(3, 1, 11, 11)
    mx, my, xx, yy, xy = (functional.conv2d(a, window, groups=3) for a in (x, y, x * x, y * y, x * y))
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # the values' range is 2
    alike = (2 * mx * my + c1) * (2 * (xy - mx * my) + c2)  # (N, 3, S - 10, S - 10)
    return (alike / ((mx**2 + my**2 + c1) * (xx - mx**2 + yy - my**2 + c2))).mean((1, 2, 3))


def bar(steps, desc):
    """Count through `steps` with a progress bar on stderr, where that is a terminal."""
    return tqdm(steps, desc=desc, disable=None, leave=False)


def invert(generator, faces, progress=bar):
    """Return the latents whose pictures are most like `faces`: (N, 3, size, size) in [-1, 1] -> (N, nz).

    The seeds nearest to each face are led closer by Adam, and the best one of them is taken.
    """
    pool = torch.stack([latent(seed, generator.nz) for seed in range(SEARCH)]).to(faces.device)  # (SEARCH, nz)
    with torch.no_grad():
        known = torch.cat([generator(part) for part in pool.split(16)])  # (SEARCH, 3, S, S)
    best, parts = [], faces.split(AT_ONCE)
    for step in progress(range(INVERT_STEPS * len(parts)), desc="latents"):
        part, k = parts[step // INVERT_STEPS], step % INVERT_STEPS
        if k == 0:
            with torch.no_grad():
                near = torch.stack([distance(known, face.expand_as(known)) for face in part[:, None]])  # (n, SEARCH)
            z = pool[near.topk(STARTS, largest=False).indices].flatten(0, 1).requires_grad_()  # (n * STARTS, nz)
            adam, target = torch.optim.Adam([z], betas=(0.9, 0.99)), part.repeat_interleave(STARTS, dim=0)
        adam.param_groups[0]["lr"] = INVERT_RATE * min(1, 2 - 2 * k / INVERT_STEPS)
        adam.zero_grad()
        loss = distance(generator(z), target) + SPHERE * (z.norm(dim=1) / generator.nz**0.5 - 1).square()
        loss.sum().backward()
        adam.step()
        if k == INVERT_STEPS - 1:
            best.append(z.detach().unflatten(0, (-1, STARTS))[range(len(part)), loss.view(-1, STARTS).argmin(1)])
    return torch.cat(best)


def tune(generator, z, faces, progress=bar):
    """Return a copy of `generator` that draws `faces` at z, (N, nz) and (N, 3, size, size): Roich et al. 2021, 3.2.

    Without their term that holds the space around: with it the middle of a film fell back to faces as the generator
    drew them before, without it the film is of these people all the way.
    """
    tuned = copy.deepcopy(generator).requires_grad_(True)
    adam = torch.optim.Adam(tuned.parameters(), betas=(0.9, 0.99))
    steps = TUNE_STEPS * -(-len(z) // AT_ONCE)
    for step in progress(range(steps), desc="tuning"):
        adam.param_groups[0]["lr"] = TUNE_RATE * min(1, (step + 1) / 10, 2 - 2 * step / steps)
        batch = torch.arange(step * AT_ONCE, step * AT_ONCE + min(AT_ONCE, len(z))) % len(z)
        adam.zero_grad()
        distance(tuned(z[batch]), faces[batch]).sum().backward()
        adam.step()
    return tuned.requires_grad_(False)


def fit(generator, faces, progress=bar):
    """Return a tuned copy of `generator`, the latents of `faces` in it, and how well it fits each of them.

    faces: a list of (3, size, size). Returns the Generator, (N, nz) on the CPU, and N lines of text.
    """
    faces = torch.stack(faces).to(next(generator.parameters()).device)
    z = invert(generator, faces, progress)
    tuned = tune(generator, z, faces, progress)
    lines = []
    with torch.no_grad():
        for one, face in zip(z[:, None], faces[:, None], strict=True):
            x = torch.cat([generator(one), tuned(one)])  # (2, 3, S, S)
            (a, b), (c, d) = (x - face).square().mean((1, 2, 3)).sqrt() * 127.5, ssim(x, face.expand_as(x))
            lines.append(f"error {a:.1f} of 255, SSIM {c:.2f}; tuned {b:.1f} of 255, SSIM {d:.2f}")
    return tuned, z.cpu(), lines


# ---- for the scripts ------------------------------------------------------------------------------------------


def crop_of(file):
    """Return the crop of the images that the model of a file's dict was trained with; "center" if it does not say."""
    return "squash" if (file.get("settings") or {}).get("crop") == "squash" else "center"


def photo_names(paths):
    """Return a name for each photo, one and the same for the same file."""
    stems = {path.resolve(): path.stem for path in paths}
    unique = len(set(stems.values())) == len(stems)
    return [path.stem if unique else f"{path.stem}-{list(stems).index(path.resolve()) + 1}" for path in paths]


def tuned_latents(file, path):
    """Return {name: (nz,) latent} of the photos for which the model in the dict `file` of `path` was tuned.

    Raises UserError where it was not tuned for any.
    """
    try:
        names, z = file["photos"]["names"], file["photos"]["latents"]
        return dict(zip(map(str, names), z.float().reshape(-1, file["generator"]["config"]["nz"]), strict=True))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"--photos {path}: not tuned for photos; --save-tuned writes such a model") from error


def tune_for(photos, generator, crop, save=None):
    """Return the generator tuned for photos, {name: path}, and {name: (nz,) latent}; write both to the path `save`.

    Raises UserError for a photo without a face.
    """
    tuned, z, lines = fit(generator, [read_face(path, generator.size, crop) for path in photos.values()])
    print(*(f"{name}: {line}" for name, line in zip(photos, lines, strict=True)), sep="\n")
    if save:
        state = {key: value.cpu() for key, value in tuned.state_dict().items()}
        made = {"settings": {"crop": crop}, "made_by": {"command": "Interpolation.py --save-tuned"}}
        file = {"format": FORMAT, "step": 0, "generator": {"config": tuned.config, "state": state}} | made
        torch.save(file | {"photos": {"names": list(photos), "latents": z}}, buffer := io.BytesIO())
        with atomic_write(save) as temporary:  # torch.save itself would hide that the disk is full
            temporary.write_bytes(buffer.getbuffer())
    return tuned, dict(zip(photos, z, strict=True))
