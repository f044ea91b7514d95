"""The images that are trained on: CelebA or any folder or zip of faces, or built-in drawn faces.

Every image is decoded and resized once, into a memory-mapped file of raw bytes; after that a start takes
no time and a batch is a copy. `python Dataset.py` shows what would be trained on.
"""

import argparse
import functools
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import time
import uuid
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SPLITS = {"train": 0, "val": 1, "test": 2}  # the numbers in CelebA's list_eval_partition
CROPS = {"center": Image.Resampling.BICUBIC, "squash": Image.Resampling.BILINEAR}
SMALLEST_SIDE = 32  # pixels; anything smaller is an icon, not a face
MOST_BROKEN = 0.05  # share of unreadable images above which the data itself is wrong
CACHE_VERSION = 1  # raise it when the bytes written for the same image change
DRAWN_COUNT, DRAWN_SIDE = 4096, 128  # built-in faces, and the largest size in pixels they are stored at
HOW_TO_GET_CELEBA = (
    "get CelebA with `python Dataset.py --download`, or fetch the zip from "
    "https://www.kaggle.com/datasets/jessicali9530/celeba-dataset and pass it with --data"
)
EXPECTED = (
    "expected a zip (img_align_celeba.zip, or Kaggle's archive.zip) or a folder such as "
    "celeba/img_align_celeba/000001.jpg, with images named " + ", ".join("*" + suffix for suffix in SUFFIXES)
)


def add_data_flags(parser):
    """Declare the flags that choose images on an argparse parser or group; open_data takes their values."""
    # "%(default).0s" prints nothing: it keeps argparse from adding "(default: None)".
    parser.add_argument(
        "--data", nargs="+", metavar="PATH", help="zips or folders of images, or 'drawn' for the built-in drawn faces; "
        "without it CelebA is looked for in data/, and faces are drawn if it is not there%(default).0s"
    )  # fmt: skip
    parser.add_argument("--split", default="all", choices=["all", *SPLITS], help="part of CelebA's list_eval_partition")
    parser.add_argument(
        "--crop", default="center", choices=list(CROPS),
        help="center: cut the central square; squash: resize all of the image to a square, as the report did"
    )  # fmt: skip
    parser.add_argument(
        "--cache", metavar="DIR", help="folder of the packed images (default: beside the data)%(default).0s"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="threads that decode images when packing")


def choose_paths(data, quiet=False):
    """Return the paths that the value of --data means: itself, else CelebA from data/, else the drawn faces."""
    paths = data or find_celeba()
    if paths is None and not quiet:
        print(f"No CelebA in data/, so drawn faces are used; {HOW_TO_GET_CELEBA}.")
    return absolute(paths or ["drawn"])


def absolute(paths):
    """Return absolute Paths, so that a checkpoint's hold in any folder; the drawn faces' name stays as it is."""
    return [Path("drawn")] if is_drawn(paths) else [Path(path).absolute() for path in paths]


def open_data(data, size=128, crop="center", split="all", cache=None, workers=None, quiet=False):
    """Return the CelebADataset that the data flags name; without --data CelebA from data/, else drawn faces."""
    return CelebADataset(choose_paths(data, quiet), size, crop, split, cache, workers, quiet)


def find_celeba(root="data"):
    """Return the list of paths of a CelebA that --download, torchvision or a user put into `root`, or None."""
    root = Path(root)
    for pattern in ("img_align_celeba*.zip", "archive*.zip", "celeba-dataset*.zip", "img_align_celeba"):
        found = sorted(root.glob(pattern)) or sorted(root.glob(f"*/{pattern}"))
        if found:
            return [str(path) for path in found]
    return None


class CelebADataset(torch.utils.data.Dataset):
    """Square face images in memory-mapped bytes; item i is a (3, size, size) float32 tensor in [-1, 1].

    paths: zips, read in place, and folders, searched recursively; or ["drawn"] for the built-in drawn faces.
    size: pixels.  crop: a key of CROPS.  split: "all" or a key of SPLITS.
    cache: folder of the packed images; by default the data's own, or the user's cache folder if that is read-only.
    workers: threads that decode.  quiet: print nothing.

    Attributes: paths, size, crop, split; name (for people); fingerprint (hash of the names and contents of the
    images chosen, independent of where they lie); skipped (images that could not be used); cache_file.

    Raises FileNotFoundError for a missing path, ValueError where no images, or too many broken ones, are found.
    """

    def __init__(self, paths, size=128, crop="center", split="all", cache=None, workers=None, quiet=False):
        if crop not in CROPS:
            raise ValueError(f"--crop {crop}: choose one of {', '.join(CROPS)}")
        if split != "all" and split not in SPLITS:
            raise ValueError(f"--split {split}: choose one of all, {', '.join(SPLITS)}")
        paths = absolute([paths] if isinstance(paths, (str, Path)) else paths)
        self.paths = [str(path) for path in paths]
        drawn = is_drawn(paths)
        self.size, self.crop, self.split = size, crop, "all" if drawn else split
        self.name = "drawn" if drawn else re.sub(r"\W+", "-", paths[0].resolve().stem)

        sources = ["drawn", DRAWN_COUNT] if drawn else [describe_source(path) for path in paths]
        key = hashlib.sha256(json.dumps([CACHE_VERSION, size, crop, sources]).encode()).hexdigest()[:16]
        file_name = f"{self.name}-{size}px-{crop}-{key}"
        folders = cache_folders(paths, cache)
        packs = ((file, read_index(file)) for file in (folder / (file_name + ".json") for folder in folders))
        index_file, index = next((found for found in packs if found[1]), (None, None))
        if index is None:
            index_file, index = pack(paths, size, crop, folders, file_name, workers, quiet)
        self.cache_file = index_file.with_suffix(".u8")
        self.skipped = index["skipped"]
        self.images = np.memmap(self.cache_file, np.uint8, "r", shape=tuple(index["shape"]))  # (N, S, S, 3)

        self.rows = np.arange(len(self.images))
        if self.split != "all":
            partition = read_partition(paths) or index["partition"]
            if not partition:
                raise ValueError(f"--split {split}: no list_eval_partition.txt or .csv beside {paths[0]}")
            chosen = [partition.get(name.rsplit("/", 1)[-1]) == SPLITS[split] for name, _ in index["images"]]
            self.rows = np.flatnonzero(chosen)
            if not len(self.rows):
                raise ValueError(f"--split {split}: none of the {len(self.images)} images in {paths[0]} belongs to it")
        contents = (index["images"][row] for row in self.rows)
        contents = "\n".join(f"{name.rsplit('/', 1)[-1]} {checksum}" for name, checksum in contents)
        self.fingerprint = hashlib.sha256(contents.encode()).hexdigest()[:16]
        self.resident = None

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.batch([range(len(self))[i]])[0]

    def to(self, device):
        """Copy all images into the memory of `device`, so that no batch has to travel; returns self."""
        self.resident = torch.empty((len(self), *self.images.shape[1:]), dtype=torch.uint8, device=device)
        for start in range(0, len(self), 4096):  # in parts, so that the host never holds a second copy
            part = self.images[self.rows[start : start + 4096]]
            self.resident[start : start + len(part)] = torch.from_numpy(part).to(device)
        return self

    def pixels(self, indices):
        """Return images `indices` (a sequence or int64 tensor) as (B, 3, S, S) uint8, in channels_last memory.

        S is the stored size, which is less than `size` where the original images are smaller than that.
        """
        indices = torch.as_tensor(indices)
        if self.resident is not None:
            if self.resident.is_cuda:
                indices = indices.pin_memory()  # or the copy would wait until the GPU has done all that came before
            return self.resident[indices.to(self.resident.device, non_blocking=True)].permute(0, 3, 1, 2)
        return torch.from_numpy(self.images[self.rows[indices.numpy()]]).permute(0, 3, 1, 2)

    def batch(self, indices):
        """Return images `indices` as (B, 3, size, size) float32 in [-1, 1]."""
        return to_range(self.pixels(indices), self.size)


def to_range(pixels, size):
    """(B, 3, S, S) uint8 -> (B, 3, size, size) float32 in [-1, 1], on the same device."""
    images = pixels.float()
    if images.shape[-1] != size:
        images = torch.nn.functional.interpolate(images, size, mode="bicubic", antialias=True).clamp_(0, 255)
    return images.div_(127.5).sub_(1)


# ---- order ----------------------------------------------------------------------------------------------------


def seeded(*numbers):
    """Return a CPU torch.Generator whose stream is a pure function of the given non-negative integers."""
    # torch's CPU generator reads only 32 bits of its seed, so the numbers are hashed into them.
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


@functools.lru_cache(maxsize=2)
def epoch_order(count, seed, epoch):
    """Return the order of `count` images in an epoch, every image once: (count,) int64."""
    return torch.randperm(count, generator=seeded(seed, 0, epoch))


def batch_indices(count, seed, start, batch_size):
    """Return images number start .. start + batch_size - 1 of the endless row of shuffled epochs: (batch_size,) int64.

    A batch may reach into the next epoch, so every batch has the same shape and nothing but `start` needs saving.
    """
    parts = []
    while batch_size:
        epoch, offset = divmod(start, count)
        parts.append(epoch_order(count, seed, epoch)[offset : offset + batch_size])
        start, batch_size = start + len(parts[-1]), batch_size - len(parts[-1])
    return torch.cat(parts)


# ---- packing --------------------------------------------------------------------------------------------------


def describe_source(path):
    """Return what tells that a zip or folder is unchanged: names, sizes, times. Nothing is read, so it is fast."""
    if path.is_file():
        return [path.name, path.stat().st_size, path.stat().st_mtime_ns]
    if path.is_dir():
        stats = ((name, entry.stat()) for name, entry in walk_images(path))
        return [path.name, [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]]
    raise FileNotFoundError(f"--data {path}: no such file or folder; {EXPECTED}")


def walk_images(folder, prefix=""):
    """Yield (name relative to the first `folder`, os.DirEntry) of all images in it, in the order of their names."""
    with os.scandir(folder) as entries:  # os.scandir, since a folder may hold 202,599 of them
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir():
                yield from walk_images(entry.path, f"{prefix}{entry.name}/")
            elif entry.name.lower().endswith(SUFFIXES):
                yield prefix + entry.name, entry


def cache_folders(paths, cache):
    """Return the folders where packed images may lie, the preferred one first."""
    if cache is not None:
        return [Path(cache)]
    beside = Path("data") if is_drawn(paths) else paths[0].resolve().parent
    return [beside, Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "facefusion"]


def list_members(paths):
    """Return (name, path, zip or None) of all images, by name, and the partition list found inside a zip."""
    members, partition = [], {}
    for path in paths:
        if path.is_dir():
            members += [(name, path, None) for name, _ in walk_images(path)]
            continue
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile:
            raise ValueError(f"--data {path}: not a whole zip; download it again, or pass a folder") from None
        for name in archive.namelist():
            if name.lower().endswith(SUFFIXES) and not name.startswith("__MACOSX"):
                members.append((name, path, archive))
            elif Path(name).stem == "list_eval_partition":
                try:
                    partition = parse_partition(archive.read(name).decode())
                except zipfile.BadZipFile as error:
                    raise ValueError(f"--data {path}: {name} in it is damaged ({error}); download it again") from None
    return sorted(members, key=lambda member: member[0]), partition


def read_partition(paths):
    """Return {file name: 0, 1 or 2} from the list_eval_partition.txt or .csv near the data, or {} if there is none."""
    for folder in (f for path in paths for f in (path, path.resolve().parent, path.resolve().parent.parent)):
        for file in (folder / "list_eval_partition.txt", folder / "list_eval_partition.csv"):
            if file.is_file():
                return parse_partition(file.read_text())
    return {}


def parse_partition(text):
    """'000001.jpg 0' (CelebA) or '000001.jpg,0' (Kaggle, below a header) on each line -> {'000001.jpg': 0}."""
    rows = (re.split(r"[,\s]+", line.strip()) for line in text.splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}


def decode(data, size, crop):
    """Return the encoded image `data` as a (size, size, 3) uint8 array: upright, opaque, cropped, resized.

    Pillow's filters widen with the reduction, which is antialiasing. Raises for anything that is not a usable image.
    """
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if min(image.size) < SMALLEST_SIDE:
        raise ValueError(f"only {image.width}x{image.height} pixels")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if crop == "center":
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))  # resize's own box would sample across its border
    return np.asarray(image.resize((size, size), CROPS[crop]))


def native_side(members):
    """Return the largest shorter side, in pixels, among a few of the images: storing more would be invention."""
    sides = [SMALLEST_SIDE]
    for member in members[:: max(1, len(members) // 32)]:
        try:
            sides.append(min(Image.open(io.BytesIO(read_member(member))).size))
        except Exception:  # counted when it is packed
            continue
    return max(sides)


def read_member(member):
    """Return the bytes of one image."""
    name, path, archive = member
    return archive.read(name) if archive else (path / name).read_bytes()


def survey(paths, size):
    """Return what packing would store: (name, path, zip or None) of each image, a zip's partition list, side in pixels.

    The pack takes len(images) * side * side * 3 bytes. Raises ValueError where there are no images.
    """
    if is_drawn(paths):
        return [(str(i), None, None) for i in range(DRAWN_COUNT)], {}, min(size, DRAWN_SIDE)
    members, partition = list_members(paths)
    if not members:
        zips = " (it holds zips: name them instead)" if any(any(p.glob("*.zip")) for p in paths) else ""
        raise ValueError(f"--data {' '.join(map(str, paths))}: no images found{zips}; {EXPECTED}")
    return members, partition, min(size, native_side(members))


def is_drawn(paths):
    return [str(path) for path in paths] == ["drawn"]


def pack(paths, size, crop, folders, file_name, workers, quiet):
    """Decode all images into FILE_NAME.u8 and FILE_NAME.json in the first folder that can be written.

    Returns the .json's path and content. Both are written under a temporary name and renamed, the .json last. Two
    processes that pack at once write the same bytes, and the later one replaces the earlier one's file.
    """
    folder = next((f for f in folders if is_writable(f)), None)
    if folder is None:
        raise ValueError(f"--cache {folders[0]}: cannot write there; choose another folder with --cache DIR")
    members, partition, side = survey(paths, size)
    need, free = len(members) * side * side * 3, shutil.disk_usage(folder).free
    if not quiet:
        print(f"Packing {len(members):,} images at {side} px once into {folder} ({need / 1e9:.2f} GB) ...", flush=True)
    if need > free:
        raise ValueError(
            f"--cache {folder}: packing needs {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            "choose another disk with --cache DIR or a smaller --size"
        )

    def load(member):
        try:
            if is_drawn(paths):
                return draw_face(int(member[0]), side), member[0]
            data = read_member(member)
            return decode(data, side, crop), zlib.crc32(data)
        except Exception as error:  # Pillow and zipfile raise many types; each of them means one unusable image
            return None, f"{member[0]} ({error})"

    for old in folder.glob(file_name + ".tmp-*"):  # what a killed process left; a living one writes all the time
        if time.time() - old.stat().st_mtime > 600:
            old.unlink(missing_ok=True)
    # A name of its own: two machines that share the folder may have the same process number.
    temporary = folder / f"{file_name}.tmp-{uuid.uuid4().hex}"
    images, skipped = [], []
    try:
        with (
            open(temporary, "wb") as file,
            ThreadPoolExecutor(workers or os.cpu_count()) as pool,
            tqdm(total=len(members), unit=" images", disable=True if quiet else None, leave=False) as bar,
        ):
            for start in range(0, len(members), 256):  # in parts: memory stays flat however many images there are
                part = members[start : start + 256]
                for member, (pixels, note) in zip(part, pool.map(load, part), strict=True):
                    if pixels is None:
                        skipped.append(note)
                    else:
                        file.write(pixels)
                        images.append((member[0], note))
                bar.update(len(part))
            file.flush()
            os.fsync(file.fileno())
        if skipped and not quiet:
            more = f"; and {len(skipped) - 10} more, listed in {file_name}.json" if len(skipped) > 10 else ""
            print(
                f"Left out {len(skipped)} of {len(members)} images that cannot be used: {'; '.join(skipped[:10])}{more}"
            )
        if len(skipped) > MOST_BROKEN * len(members):
            raise ValueError(
                f"--data {' '.join(map(str, paths))}: {len(skipped)} of {len(members)} images cannot be used, more "
                f"than {MOST_BROKEN:.0%}; the first is {skipped[0]}; download the data again"
            )
        index = {
            "sources": [str(path.resolve()) for path in paths],
            "shape": [len(images), side, side, 3],
            "partition": partition,
            "skipped": skipped,
            "images": images,
        }
        index_file = folder / (file_name + ".json")
        replace(temporary, index_file.with_suffix(".u8"))
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(index, file)
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, index_file)
    finally:
        temporary.unlink(missing_ok=True)
    remove_outdated(index_file, index["sources"])
    return index_file, index


def read_index(file):
    """Return the index of the pack that `file` describes, or None unless both are there and whole."""
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        whole = file.with_suffix(".u8").stat().st_size == np.prod(index["shape"], dtype=np.int64)
    except (OSError, ValueError, KeyError):
        return None
    return index if whole else None


def replace(temporary, target):
    """Rename atomically. Windows refuses that while another process has the same content open: then keep that."""
    try:
        os.replace(temporary, target)
    except PermissionError:
        if not target.is_file():
            raise


def is_writable(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not folder.stat().st_mode & 0o222:  # marked read-only: root could write all the same, but should not
            return False
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def remove_outdated(index_file, sources):
    """Delete packs of the same sources, size and crop from before these changed: they could never be used again."""
    prefix = index_file.stem.rsplit("-", 1)[0]
    for old in index_file.parent.glob(f"{prefix}-{'?' * 16}.json"):
        try:
            if old != index_file and (index := read_index(old)) and index["sources"] == sources:
                old.unlink()
                old.with_suffix(".u8").unlink()
        except OSError:  # another process has it open (Windows) or was faster
            continue


# ---- drawn faces ----------------------------------------------------------------------------------------------


def draw_face(index, size):
    """Draw face number `index`: (size, size, 3) uint8, the same on every machine.

    Soft-edged ellipses over each other, with a light from one side; pose, proportions and colours vary.
    """
    random = np.random.RandomState(index)  # its stream is frozen by NumPy's policy, unlike default_rng's

    def draw(low, high, count=None):
        values = random.uniform(low, high, count)
        return float(values) if count is None else values  # Python floats keep the pictures in float32

    axis = (np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1
    pixel_x, pixel_y = np.meshgrid(axis, axis)  # (size, size), -1 .. 1, y downwards

    skin = np.array([0.98, 0.80, 0.69]) * (1 - draw(0, 0.65) * np.array([0.75, 0.95, 1.05]))
    hair = [(0.09, 0.07, 0.06), (0.30, 0.18, 0.10), (0.55, 0.33, 0.15), (0.87, 0.70, 0.40), (0.55, 0.55, 0.56),
            (0.62, 0.22, 0.10)][random.randint(6)] * draw(0.8, 1.15, 3)  # fmt: skip
    iris = [(0.25, 0.45, 0.65), (0.30, 0.20, 0.12), (0.30, 0.45, 0.28)][random.randint(3)]
    top, bottom = draw(0.1, 0.95, 3), draw(0.1, 0.95, 3)
    canvas = [(a + (b - a) * (pixel_y + 1) / 2).astype(np.float32) for a, b in zip(top, bottom, strict=True)]

    roll, yaw, scale = draw(-0.2, 0.2), draw(-1, 1), draw(0.88, 1.08)
    cosine, sine = float(np.cos(roll)), float(np.sin(roll))
    shift_x, shift_y = draw(-0.08, 0.08), draw(-0.02, 0.1)
    x = ((pixel_x - shift_x) * cosine + (pixel_y - shift_y) * sine) / scale
    y = (-(pixel_x - shift_x) * sine + (pixel_y - shift_y) * cosine) / scale
    light = 1 + draw(-0.3, 0.3) * x - draw(0, 0.2) * y  # (size, size)

    def ellipse(centre_x, centre_y, radius_x, radius_y, sharpness=1.0):
        distance = np.sqrt(((x - centre_x) / radius_x) ** 2 + ((y - centre_y) / radius_y) ** 2)
        return np.clip((1 - distance) * min(radius_x, radius_y) * size / 2 * sharpness + 0.5, 0, 1)

    def paint(mask, colour, shade=1.0):
        for channel in range(3):
            canvas[channel] += (shade * float(colour[channel]) - canvas[channel]) * mask

    width, height = draw(0.46, 0.56), draw(0.62, 0.72)  # half the face
    turn = yaw * 0.12  # how far the features sit beside the middle of the head
    length = draw(0.0, 0.9)  # of the hair
    for centre in (-0.42, 0.42) if length > 0.3 else ():
        paint(ellipse(centre, 0.25 * length + 0.1, 0.3, 0.45 + 0.5 * length), hair, light * 0.8)
    paint(ellipse(0, -0.15, width * 1.28, height * 1.22), hair, light * 0.85)
    paint(ellipse(0, 0.72, 0.22, 0.4), skin, light * 0.72)  # neck
    paint(ellipse(0, 1.28, draw(0.75, 1.0), 0.45), draw(0.05, 0.9, 3), light)  # clothes
    for side in (-1, 1):
        paint(ellipse(side * width * 0.98 - turn * 0.4, 0.05, 0.09, 0.15), skin, light * 0.85)  # ears
    paint(ellipse(0, 0, width, height), skin, light)
    for side in (-1, 1):
        paint(ellipse(turn + side * 0.27, 0.22, 0.15, 0.12, 0.15) * draw(0.1, 0.5), skin * [1.0, 0.72, 0.70], light)

    fringe, parting = draw(0.30, 0.62), draw(-0.35, 0.35)
    above = np.clip((-fringe + 0.25 * (x - parting) ** 2 * draw(0.2, 1.5) - y) * size / 2 + 0.5, 0, 1)
    paint(above * ellipse(0, -0.05, width * 1.08, height * 1.12), hair, light)

    open_eye, eye_y, gap = draw(0.045, 0.085), draw(-0.12, -0.03), draw(0.20, 0.26)
    gaze, brow_tilt, brow = draw(-0.03, 0.03), draw(-0.15, 0.15), draw(0.018, 0.04)
    for side in (-1, 1):
        eye_x = turn + side * gap
        paint(ellipse(eye_x, eye_y, 0.15, open_eye + 0.05, 0.4) * 0.35, skin * 0.5, light)  # socket
        eye = ellipse(eye_x, eye_y, 0.115, open_eye)
        paint(eye, (0.95, 0.94, 0.92), light)
        paint(eye * ellipse(eye_x + gaze, eye_y, 0.06, 0.06), iris)
        paint(eye * ellipse(eye_x + gaze, eye_y, 0.028, 0.028), (0.02, 0.02, 0.02))
        paint(ellipse(eye_x + gaze + 0.018, eye_y - 0.02, 0.014, 0.014), (1, 1, 1))
        arch = y + side * brow_tilt * (x - eye_x) + 0.9 * (x - eye_x) ** 2
        mask = np.clip((brow - np.abs(arch - eye_y + 0.17)) * size / 2 + 0.5, 0, 1)
        paint(mask * np.clip((0.14 - np.abs(x - eye_x)) * size / 4 + 0.5, 0, 1), np.asarray(hair) * 0.7)

    nose = draw(0.06, 0.10)
    paint(ellipse(turn * 1.2 + 0.03, 0.1, 0.05, 0.17, 0.3) * 0.35, skin * 0.7, light)
    paint(ellipse(turn * 1.3, 0.22, nose, 0.045, 0.6) * 0.55, skin * 0.68, light)

    smile, mouth, lips = draw(-0.8, 3.0), draw(0.13, 0.21), draw(0.03, 0.055)
    lip_colour = skin * [0.85, 0.52, 0.52] + draw(0, 0.12) * np.array([1, 0, 0.1])
    bend = y - 0.42 + smile * ((x - turn) ** 2 - mouth**2 / 2)  # 0 along the line between the lips
    across = np.clip(1 - ((x - turn) / mouth) ** 2, 0, None)
    paint(np.clip((lips * np.sqrt(across) - np.abs(bend)) * size / 2 + 0.5, 0, 1) * (across > 0), lip_colour, light)
    teeth = draw(-0.02, 0.03)
    if teeth > 0:
        paint(np.clip((teeth * across - np.abs(bend)) * size / 2 + 0.5, 0, 1) * (across > 0.2), (0.96, 0.95, 0.92))
    return (np.clip(np.stack(canvas, axis=2), 0, 1) * 255).round().astype(np.uint8)


# ---- command --------------------------------------------------------------------------------------------------


def download(root="data"):
    """Fetch CelebA (1.4 GB) into root/celeba with torchvision's downloader, which checks the MD5 sums.

    Raises ValueError, saying what to fetch by hand, where Google Drive refuses.
    """
    from torchvision.datasets import CelebA

    try:
        CelebA(root, split="all", download=True)
    except Exception as error:  # gdown, requests and torchvision each raise their own types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"--download: Google Drive refused ({reason}). By hand: open "
            "https://www.kaggle.com/datasets/jessicali9530/celeba-dataset, press Download, and put the file as "
            f"{Path(root) / 'archive.zip'}; it is read as it is"
        ) from error


def main(argv=None):
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Show the images that Trainloop.py would train on: how many, how large, and 3x5 of them as a PNG."
    )  # fmt: skip
    add_data_flags(parser)
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    parser.add_argument("--seed", type=int, default=0, help="chooses the 15 images that are shown")
    parser.add_argument("--out", default="dataset.png", help="the picture to write")
    parser.add_argument("--download", action="store_true", help="first fetch CelebA into data/celeba")
    args = parser.parse_args(argv)
    try:
        if args.download:
            download()
        dataset = open_data(args.data, args.size, args.crop, args.split, args.cache, args.workers)
        show(dataset, args.seed, args.out)
    except (ValueError, OSError) as error:
        print(f"Dataset.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def show(dataset, seed, out):
    """Print what `dataset` holds and write the report's figure 1, 3x5 random images, to the file `out`."""
    from torchvision.utils import save_image

    stored = dataset.images.shape[1]
    print(
        f"{len(dataset):,} images ({dataset.name}, split {dataset.split}, crop {dataset.crop}, "
        f"{len(dataset.skipped)} left out), trained on at {dataset.size} px, stored at {stored} px in "
        f"{dataset.cache_file} ({dataset.images.nbytes / 1e9:.2f} GB)"
    )
    images = dataset.batch(batch_indices(len(dataset), seed, 0, 15))  # (15, 3, size, size)
    save_image(images, out, nrow=5, padding=dataset.size // 8, pad_value=1, normalize=True, value_range=(-1, 1))
    print(f"3x5 of them: {out}")


if __name__ == "__main__":
    sys.exit(main())
