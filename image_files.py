"""Image files as people keep them, in folders and zips: which there are, and the pixels of each.

A member is one image: (name, folder, os.stat_result) or (name, ZipFile, ZipInfo).
"""

import io
import os
import re
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from command_line import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
PARTITION_LISTS = ("list_eval_partition.txt", "list_eval_partition.csv")
CROPS = {"center": Image.Resampling.BICUBIC, "squash": Image.Resampling.BILINEAR}
SMALLEST_SIDE = 32  # pixels; anything smaller is an icon, not a face
EXPECTED = (
    "expected a zip (img_align_celeba.zip, or Kaggle's archive.zip) or a folder such as "
    "celeba/img_align_celeba/000001.jpg, with images named " + ", ".join("*" + suffix for suffix in SUFFIXES)
)


def describe_source(path):
    """Return what tells that a zip or folder is unchanged: names, sizes, times. Nothing is read, so it is fast."""
    if path.is_file():
        return [path.name, path.stat().st_size, path.stat().st_mtime_ns]
    return [path.name, [[name, stat.st_size, stat.st_mtime_ns] for name, _, stat in list_folder(path)]]


def list_folder(folder, prefix=""):
    """Return the members of a folder and those within, in the order of their names."""
    members = []
    with os.scandir(folder / prefix) as entries:  # os.scandir, since a folder may hold 202,599 of them
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir():
                members += list_folder(folder, f"{prefix}{entry.name}/")
            elif entry.name.lower().endswith(SUFFIXES):
                members.append((prefix + entry.name, folder, entry.stat()))
    return members


def open_zip(path):
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise UserError(f"--data {path}: not a whole zip; download it again, or pass a folder") from None


def list_zip(path):
    """Return the members of a zip."""
    archive = open_zip(path)
    return [
        (info.filename, archive, info)
        for info in archive.infolist()
        if info.filename.lower().endswith(SUFFIXES) and not info.filename.startswith("__MACOSX")
    ]


def list_images(paths):
    """Return the members of all paths by name. Raises UserError where there are none."""
    members = [member for path in paths for member in (list_folder(path) if path.is_dir() else list_zip(path))]
    if not members:
        zips = " (it holds zips: name them instead)" if any(any(path.glob("*.zip")) for path in paths) else ""
        raise UserError(f"--data {' '.join(map(str, paths))}: no images found{zips}; {EXPECTED}")
    return sorted(members, key=lambda member: member[0])


def read_member(name, source, info):
    """Return the bytes of a member."""
    return (source / name).read_bytes() if isinstance(source, Path) else source.read(info)


def read_partition(paths):
    """Return {file name: 0, 1 or 2} from the list_eval_partition near the data or in a zip of it, {} without one."""
    folders = (folder for path in paths for folder in (path, path.resolve().parent, path.resolve().parent.parent))
    for file in (folder / name for folder in folders for name in PARTITION_LISTS):
        if file.is_file():
            return parse_partition(file.read_bytes(), file)
    for path in filter(Path.is_file, paths):
        archive = open_zip(path)
        for info in archive.infolist():
            if info.filename.rsplit("/", 1)[-1] in PARTITION_LISTS:
                try:
                    data = archive.read(info)
                except zipfile.BadZipFile as error:
                    raise UserError(
                        f"--data {path}: {info.filename} in it is damaged ({error}); download it again"
                    ) from None
                return parse_partition(data, f"{info.filename} in {path}")
    return {}


def parse_partition(data, place):
    """b'000001.jpg 0' (CelebA) or b'000001.jpg,0' (Kaggle, below a header) on each line -> {'000001.jpg': 0}."""
    rows = re.findall(r"^([^\s,]+)[,\t ]+([0-2])[\t ]*\r?$", data.decode(), re.MULTILINE)
    if not rows:
        raise UserError(f"{place}: no line of it is like '000001.jpg 0'")
    return {name: int(number) for name, number in rows}


def decode(data, size, crop):
    """Return the encoded image `data` as a (size, size, 3) uint8 array: upright, opaque, cropped, resized.

    Pillow's filters widen with the reduction, which is antialiasing. Raises for anything that is not a usable image.
    """
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if min(image.size) < SMALLEST_SIDE:
        raise ValueError(f"only {image.width}x{image.height} pixels")
    if crop == "center":
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))  # resize's own box would sample across its border
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB").resize((size, size), CROPS[crop]))


def native_side(members):
    """Return the largest shorter side, in pixels, among a few of the images: storing more would be invention."""
    sides = [SMALLEST_SIDE]
    for member in members[:: max(1, len(members) // 32)]:
        try:
            sides.append(min(Image.open(io.BytesIO(read_member(*member))).size))
        except Exception:  # counted when it is packed
            continue
    return max(sides)
