"""The images that are trained on: CelebA or any folder or zip of faces, or built-in drawn faces.

Every image is decoded and resized once, into a memory-mapped file, the pack. `python Dataset.py` shows some of them.
"""

import functools
import hashlib
import json
import os
import re
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the imports below take seconds, in which Ctrl-C ends without a word

import numpy as np
import torch
from PIL import Image

import image_files
from atomic_write import atomic_write, is_writable
from command_line import Parser, UserError, new_file, run_command
from drawn_faces import draw_face
from packs import pack, read_index
from settings import add_flags

DATA = Path(__file__).resolve().parent / "data"  # where --download puts CelebA
SPLITS = {"train": 0, "val": 1, "test": 2}  # the numbers in CelebA's list_eval_partition
PACK_VERSION = 2  # raise it when the bytes written for the same image change
DRAWN = [Path("drawn")]  # what --data drawn means
DRAWN_COUNT, DRAWN_SIDE = 4096, 128  # built-in faces, and the largest size in pixels they are stored at
KAGGLE = "https://www.kaggle.com/datasets/jessicali9530/celeba-dataset"


@dataclass
class PackedImages:
    """Square face images in memory-mapped bytes, as batches on any device. open_data makes it."""

    images: np.ndarray  # (N, S, S, 3) uint8; S is less than `size` where the original images are
    rows: np.ndarray  # (n,) those of the N that belong to the split
    size: int  # pixels, of a batch
    crop: str
    split: str
    name: str  # for people
    paths: list  # of strings, absolute, so that they hold in any folder; ["drawn"] for the drawn faces
    fingerprint: str  # hash of the names and contents of the chosen images, wherever they lie
    skipped: list  # images that could not be used, with the reason
    cache_file: Path  # the pack
    resident = None  # (n, S, S, 3) uint8 on the GPU
    sent = 0  # images that were copied to the GPU in batches

    def __len__(self):
        return len(self.rows)

    def batch(self, indices, device="cpu"):
        """Return images `indices`, a sequence or int64 tensor, as (B, 3, size, size) float32 in [-1, 1] on `device`."""
        device, chosen = torch.device(device), torch.as_tensor(indices)
        on_gpu = device.type == "cuda"
        if on_gpu and self.resident is None:
            self.sent += len(chosen)
            if self.sent > len(self):  # worth one copy of all, for as many were sent already
                self.sent, self.resident = 0, self.copy_to(device)
        is_there = on_gpu and self.resident is not None
        chosen = chosen if is_there else torch.from_numpy(self.images[self.rows[chosen.numpy()]])  # (B, S, S, 3)
        # From pinned memory a copy does not wait for what the GPU is doing.
        chosen = (chosen.pin_memory() if on_gpu else chosen).to(device, non_blocking=True)
        pixels = self.resident[chosen] if is_there else chosen
        images = pixels.permute(0, 3, 1, 2).float()  # (B, 3, S, S), in channels_last memory
        if images.shape[-1] != self.size:
            images = torch.nn.functional.interpolate(images, self.size, mode="bicubic", antialias=True).clamp_(0, 255)
        return images.div_(127.5).sub_(1)

    def copy_to(self, device):
        """Return all images on a GPU, so that no batch has to travel: (n, S, S, 3) uint8; None if they fill it."""
        if len(self) * self.images[0].nbytes > torch.cuda.mem_get_info(device)[0] / 2:
            return None
        resident = torch.empty((len(self), *self.images.shape[1:]), dtype=torch.uint8, device=device)
        for start in range(0, len(self), 4096):  # in parts, so that the host never holds a second copy
            part = self.images[self.rows[start : start + 4096]]
            resident[start : start + len(part)] = torch.from_numpy(part).to(device)
        return resident


def open_data(data, size=128, crop="center", split="all", cache=None, workers=None, quiet=False):
    """Return the PackedImages that the values of the data flags name, and pack them where that was not done yet.

    data: as choose_paths takes it.  size: pixels.  crop: a key of CROPS.  split: "all" or a key of SPLITS.
    cache: folder of the packs; by default that of the data, or the user's cache folder where it is read-only.
    workers: threads that decode.  quiet: print nothing.

    Raises UserError for what is missing, holds no images or too many broken ones, or has no such split.
    """
    paths = choose_paths(data, quiet)
    drawn = paths == DRAWN
    partition = {} if drawn or split == "all" else image_files.read_partition(paths)
    if split != "all" and not partition:
        raise UserError(f"--split {split}: no list_eval_partition.txt or .csv for {paths[0]}; add one or leave it out")
    name = "drawn" if drawn else re.sub(r"\W+", "-", paths[0].resolve().stem)[:40]
    sources = ["drawn", DRAWN_COUNT] if drawn else [image_files.describe_source(path) for path in paths]
    key = hashlib.sha256(json.dumps([PACK_VERSION, size, crop, sources]).encode()).hexdigest()[:16]
    beside = DATA if drawn else paths[0].resolve().parent
    own = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "facefusion")
    folders = [Path(cache)] if cache else [beside, own] if own.is_absolute() else [beside]  # a user may have no home
    files = [folder / f"{name}-{size}px-{crop}-{key}.u8" for folder in folders]
    for file in files:
        if index := read_index(file):
            break
    else:
        file = next((file for file in files if is_writable(file.parent)), None)
        if file is None:
            raise UserError(f"--cache {folders[0]}: cannot write there; choose another folder with --cache DIR")
        index = pack(file, *survey(paths, size, crop), workers, quiet)

    contents = [(name.rsplit("/", 1)[-1], checksum) for name, checksum in index["images"]]
    wanted = SPLITS.get(split)  # None for all, as without a partition all are
    rows = np.array([row for row, (name, _) in enumerate(contents) if partition.get(name) == wanted])
    if not len(rows):
        raise UserError(f"--split {split}: none of the {len(contents)} images in {paths[0]} belongs to it")
    lines = "\n".join(f"{name} {checksum}" for name, checksum in (contents[row] for row in rows))
    fingerprint = hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()[:16]
    images = np.memmap(file, np.uint8, "r", shape=(len(contents), index["side"], index["side"], 3))
    paths = [str(path) for path in paths]
    return PackedImages(images, rows, size, crop, split, name, paths, fingerprint, index["skipped"], file)


def choose_paths(data, quiet=False):
    """Return the absolute Paths that a value of --data means: zips, read in place, and folders, searched recursively.

    data: a list of them; ["drawn"], DRAWN; or None for CelebA from data/, else DRAWN. Raises UserError for a path where
    there is neither a file nor a folder, an empty one too.
    """
    paths = data or find_celeba()
    if paths is None and not quiet:
        print(f"No CelebA in {DATA}, so drawn faces are used; get it with `python Dataset.py --download`, or fetch "
              f"the zip from {KAGGLE} and pass it with --data.", flush=True)  # fmt: skip
    if paths is None or [str(path) for path in paths] == ["drawn"]:
        return DRAWN
    for path in paths:
        if not (os.path.isfile(path) or os.path.isdir(path)):
            raise UserError(f"--data {path}: no such file or folder; {image_files.EXPECTED}")
    return list(dict.fromkeys(Path(path).absolute() for path in paths))


def find_celeba():
    """Return the paths of a CelebA that --download, torchvision or a user put into a folder data, or None.

    data/ is looked for here and beside this script. Of several whole copies, "archive (1).zip", one is taken.
    """
    for root in (Path("data"), DATA):
        for pattern in ("img_align_celeba*.zip", "archive*.zip", "celeba-dataset*.zip", "img_align_celeba"):
            found = sorted(root.glob(pattern)) or sorted(root.glob(f"*/{pattern}"))
            whole = [path for path in found if not re.fullmatch(r"img_align_celeba_\w+", path.stem)]
            if found:
                return [min(whole, key=lambda path: len(path.name))] if whole else found
    return None


def estimate_pack(data, size):
    """Return (number of images, bytes of their pack) for a value of --data; raises UserError as open_data does."""
    found, side, _ = survey(choose_paths(data), size, crop="center")
    return len(found.members), len(found.members) * side * side * 3


def survey(paths, size, crop):
    """Return (images Found, side in pixels at which they are packed, function that loads one of them for `pack`)."""
    if paths == DRAWN:
        side = min(size, DRAWN_SIDE)
        found = image_files.Found("drawn", [image_files.Member(str(i), 0) for i in range(DRAWN_COUNT)])
        return found, side, lambda member, alone: (draw_face(int(member.name), side), int(member.name))
    # Pillow warns of images that are too large; they are left out by name instead.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    found = image_files.list_images(paths)
    side = min(size, image_files.native_side(found.members))
    return found, side, lambda member, alone: image_files.read_image(member, side, crop, alone)


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


def download():
    """Fetch CelebA (1.4 GB) into data/celeba, its MD5 sums checked. Raises UserError where Google Drive refuses."""
    from torchvision.datasets import CelebA

    try:
        CelebA(DATA, split="all", download=True)
    except Exception as error:  # gdown, requests and torchvision each raise their own types
        reason, place = image_files.reason_of(error), DATA / "archive.zip"
        by_hand = f"By hand: open {KAGGLE}, press Download, and put the file as {place}; it is read as it is"
        raise UserError(f"--download: Google Drive refused ({reason}). {by_hand}") from error


def show(argv=None):
    """Print what would be trained on, and write the report's figure 1, 3x5 random images of it."""
    parser = Parser("Show the images that Trainloop.py would train on: how many, how large, and 3x5 as a picture.")
    add_flags(parser, "data", "split", "crop", "cache", "workers", "size", "seed")
    out = new_file(".png", ".jpg", ".jpeg", ".webp")
    parser.add_argument("--out", type=out, default="dataset.png", help="the picture to write")
    parser.add_argument("--download", action="store_true", help="first fetch CelebA into data/celeba")
    args = parser.parse_args(argv)
    from torchvision.utils import save_image  # here, so that a training does without it

    if args.download:
        download()
    dataset = open_data(args.data, args.size, args.crop, args.split, args.cache, args.workers)
    print(
        f"{len(dataset):,} images ({dataset.name}, split {dataset.split}, crop {dataset.crop}, "
        f"{len(dataset.skipped)} left out), trained on at {args.size} px, stored at {dataset.images.shape[1]} px in "
        f"{image_files.printable(str(dataset.cache_file))} ({dataset.images.nbytes / 1e9:.2f} GB)"
    )
    images = dataset.batch(batch_indices(len(dataset), args.seed, 0, 15))  # (15, 3, size, size)
    with atomic_write(args.out) as file:
        save_image(images, file, nrow=5, padding=args.size // 8, pad_value=1, normalize=True, value_range=(-1, 1))
    print(f"3x5 of them: {args.out}")


def main(argv=None):
    return run_command(show, argv)


if __name__ == "__main__":
    sys.exit(main())
