"""Image files as people keep them, in folders and zips: which there are, and the pixels of each.

A member is one of them: (name, folder, os.stat_result) or (name, ZipFile, ZipInfo).
"""

import contextlib
import os
import re
import threading
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from command_line import UserError

# All pictures that Pillow reads by itself: not those it starts another program for, nor films and measurements.
OTHERS = ("BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF")
KINDS = {suffix: kind for suffix, kind in Image.registered_extensions().items() if kind not in OTHERS}
FORMATS = sorted(set(KINDS.values()) & set(Image.OPEN))
SUFFIXES = tuple(suffix for suffix, kind in KINDS.items() if kind in (*FORMATS, "MPO"))  # MPO: JPEGs of phones
PARTITION_LISTS = ("list_eval_partition.txt", "list_eval_partition.csv")
CROPS = {"center": Image.Resampling.BICUBIC, "squash": Image.Resampling.BILINEAR}
SMALLEST_SIDE = 32  # pixels; anything smaller is an icon, not a face
MOST_BYTES, MOST_LIST_BYTES = 2**29, 2**26  # of an image's file, of a partition list
ZIP_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA,
               getattr(zipfile, "ZIP_ZSTANDARD", zipfile.ZIP_STORED)}  # fmt: skip
EXPECTED = (
    "expected a zip (img_align_celeba.zip, or Kaggle's archive.zip) or a folder such as "
    "celeba/img_align_celeba/000001.jpg, with images such as *.jpg, *.png or *.webp"
)


@dataclass
class Found:
    """What lies in folders and zips."""

    place: str  # for people
    members: list = field(default_factory=list)
    left_out: list = field(default_factory=list)  # of strings: an image's or folder's name, and why
    others: Counter = field(default_factory=Counter)  # files that are no images: how many of each ending


def describe_source(path):
    """Return what tells that a zip or folder is unchanged: names, sizes, times. Nothing is read, so it is fast."""
    if path.is_file():
        return [path.name, path.stat().st_size, path.stat().st_mtime_ns]
    found = Found(str(path))
    list_folder(path, found)
    return [path.name, [[name, stat.st_size, stat.st_mtime_ns] for name, _, stat in found.members]]


def list_images(paths):
    """Return the Found of all paths, by name. Raises UserError where there are no images."""
    found = Found(" ".join(map(str, paths)))
    for path in paths:
        (list_folder if path.is_dir() else list_zip)(path, found)
    if not found.members:
        zips = " (it holds zips: name them instead; unpack one that holds zips itself)" if found.others[".zip"] else ""
        raise UserError(f"--data {found.place}: no images found among {counts(found)}{zips}; {EXPECTED}")
    found.members.sort(key=lambda member: member[0])
    return found


def counts(found):
    """Return how many other files there are, as text by ending: '12 .heic, 1 .txt'."""
    return ", ".join(f"{count:,} {ending}" for ending, count in found.others.most_common(8)) or "no files"


def sort_in(name, found):
    """Return whether a file is an image by its name; count it if it is not. What Macs leave behind is neither."""
    base = name.rpartition("/")[2]
    if base.startswith("._") or "__MACOSX" in name.split("/"):
        return False
    is_image = base.lower().endswith(SUFFIXES)
    if not is_image and base not in PARTITION_LISTS:
        found.others[printable(os.path.splitext(base)[1].lower()) or "without an ending"] += 1
    return is_image


def list_folder(folder, found):
    """Add what is in a folder and those within to `found`. Links are followed, but into each folder only once."""
    todo = [""]
    seen = {(stat.st_dev, stat.st_ino) for stat in map(os.stat, folder.resolve().parents)}
    while todo:
        inner = todo.pop(0)
        try:
            stat = os.stat(folder / inner)
            if (stat.st_dev, stat.st_ino) in seen:
                found.left_out.append(f"{printable(inner)} (a link to a folder that is read already or holds it)")
                continue
            seen.add((stat.st_dev, stat.st_ino))
            with os.scandir(folder / inner) as entries:  # it is fast, for a folder may hold 202,599 of them
                entries = sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name))
        except OSError as error:
            found.left_out.append(f"{printable(inner)} ({error.strerror})")
            continue
        for entry in entries:
            name = inner + entry.name
            try:
                if entry.is_dir():
                    todo += [name + "/"] if entry.name != "__MACOSX" else []
                elif sort_in(name, found):
                    if entry.is_file():
                        found.members.append((name, folder, entry.stat()))
                    else:
                        kind = "a link to nothing" if entry.is_symlink() else "not a regular file"
                        found.left_out.append(f"{printable(name)} ({kind})")
            except OSError as error:
                found.left_out.append(f"{printable(name)} ({error.strerror})")


def list_zip(path, found):
    """Add what is in a zip to `found`."""
    archive = open_zip(path)
    infos = [info for info in archive.infolist() if not info.is_dir() and sort_in(info.filename, found)]
    found.members += [(info.filename, archive, info) for info in infos]


def open_zip(path):
    try:
        return zipfile.ZipFile(path)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # of many types, for a damaged list of members
        raise UserError(
            f"--data {path}: not a whole zip ({reason_of(error)}); download it again, or unpack it and pass the folder"
        ) from None


def open_member(name, source, info, most=MOST_BYTES):
    """Return (file open for reading, its size in bytes) of a member. Raises ValueError for what cannot be read."""
    size = info.st_size if isinstance(source, Path) else info.file_size
    if size > most:
        raise ValueError(f"{size / 1e6:,.0f} MB, more than {most / 1e6:,.0f} MB")
    if isinstance(source, Path):
        return open(source / name, "rb"), size
    if info.flag_bits & 1:
        raise ValueError("encrypted; unpack the zip and pass the folder")
    if info.compress_type not in ZIP_METHODS:
        method = zipfile.compressor_names.get(info.compress_type, info.compress_type)
        raise ValueError(f"packed by method {method}, which Python cannot read; unpack the zip and pass the folder")
    return source.open(info), size


def read_member(*member, most=MOST_BYTES):
    """Return the bytes of a member, and no more of them than it declares."""
    file, size = open_member(*member, most)
    with file:
        return file.read(size)


def printable(name):
    """Return a name that can be printed in one line: one that is not UTF-8, or has line ends, with escapes."""
    return name if name.isprintable() else ascii(name)[1:-1]


def reason_of(error):
    """Return one short line that says what an exception means to a user."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a format that is read"  # its own text is the address of an object
    return printable((str(error) or type(error).__name__).splitlines()[0][:120])


# ---- CelebA's split -------------------------------------------------------------------------------------------


def read_partition(paths):
    """Return {file name: 0, 1 or 2} from the list_eval_partition near the data or in a zip of it, {} without one."""
    folders = (folder for path in paths for folder in (path, path.resolve().parent, path.resolve().parent.parent))
    files = [folder / name for folder in folders for name in PARTITION_LISTS]
    lists = [(file.name, file.parent, file.stat()) for file in files if file.is_file()]
    for path in filter(Path.is_file, paths if not lists else ()):
        archive = open_zip(path)
        infos = [info for info in archive.infolist() if info.filename.rpartition("/")[2] in PARTITION_LISTS]
        lists += [(info.filename, archive, info) for info in infos]
    if not lists:
        return {}
    name, source, info = lists[0]
    try:
        return parse_partition(read_member(name, source, info, most=MOST_LIST_BYTES))
    except Exception as error:  # zipfile raises many types
        place = source / name if isinstance(source, Path) else f"{name} in {source.filename}"
        raise UserError(f"{place} cannot be read ({reason_of(error)}); put a good one, in UTF-8, beside it") from None


def parse_partition(data):
    """b'000001.jpg 0' (CelebA) or b'000001.jpg,0' (Kaggle, below a header) on each line -> {'000001.jpg': 0}."""
    text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    rows = re.findall(r"^([^\s,]+)[,\t ]+([0-2])[\t ]*\r?$", text, re.MULTILINE)
    if not rows:
        raise ValueError("no line of it is like '000001.jpg 0'")
    return {name: int(number) for name, number in rows}


# ---- pixels ---------------------------------------------------------------------------------------------------


class Budget:
    """An amount that threads share: who asks for more than is left waits, who asks for more than all, to be alone."""

    def __init__(self, total):
        self.total, self.held, self.changed = total, 0, threading.Condition()

    @contextlib.contextmanager
    def hold(self, amount):
        with self.changed:
            self.changed.wait_for(lambda: not self.held or self.held + amount <= self.total)
            self.held += amount
        try:
            yield
        finally:
            with self.changed:
                self.held -= amount
                self.changed.notify_all()


BYTES, PIXELS = Budget(MOST_BYTES), Budget(2**25)  # in flight, of files and of decoded images


def read_image(member, size, crop):
    """Return (pixels (size, size, 3) uint8, checksum of the file) of a member. Raises as decode does."""
    with BYTES.hold(member[2].st_size if isinstance(member[1], Path) else member[2].file_size):
        data = read_member(*member)
        return decode(data, size, crop), zlib.crc32(data)


def decode(data, size, crop):
    """Return the encoded image `data` as a (size, size, 3) uint8 array: upright, opaque, cropped, resized.

    Pillow's filters widen with the reduction, which is antialiasing. Raises for anything that is not a usable image.
    """
    image = Image.open(BytesIO(data), formats=FORMATS)  # of an animation, the first frame
    if min(image.size) < SMALLEST_SIDE:
        raise ValueError(f"only {image.width}x{image.height} pixels")
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels are too many")
    if image.format == "TIFF" and image.mode.startswith("I") and image.tag_v2.get(258) != (16,):
        raise ValueError(f"{image.tag_v2.get(258)} bits a pixel")
    with PIXELS.hold(image.width * image.height):
        image = ImageOps.exif_transpose(image)
        if crop == "center":
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))  # resize's own box would sample across its border
        if image.mode.startswith(("I", "F")):
            image = with_8_bits(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB").resize((size, size), CROPS[crop]))


def with_8_bits(image):
    """Return a grey image of 16 bits in 8; Pillow's own conversion would cut off all that is above 255."""
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"grey values of another kind than 8 or 16 bits, mode {image.mode}")
    return Image.fromarray((values >> 8).astype(np.uint8))


def native_side(members):
    """Return the largest shorter side, in pixels, among a few of the images: storing more would be invention."""
    sides = [SMALLEST_SIDE]
    for member in members[:: max(1, len(members) // 32)]:
        with contextlib.suppress(Exception):  # counted when it is packed
            file, _ = open_member(*member)
            with file:
                sides.append(min(Image.open(file, formats=FORMATS).size))
    return max(sides)
