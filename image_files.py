"""Image files as people keep them, in folders and zips: which there are, and the pixels of each."""

import contextlib
import os
import re
import zipfile
import zlib
from collections import Counter, namedtuple
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from command_line import UserError

# All pictures that Pillow reads by itself: not those it starts another program for, nor films and measurements.
OTHERS = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
KINDS = Image.registered_extensions()
FORMATS = sorted(set(KINDS.values()) & set(Image.OPEN) - OTHERS, key=lambda kind: (kind not in ("JPEG", "PNG"), kind))
SUFFIXES = tuple(suffix for suffix, kind in KINDS.items() if kind in (*FORMATS, "MPO"))  # MPO: JPEGs of phones
PARTITION_LISTS = ("list_eval_partition.txt", "list_eval_partition.csv")
CROPS = {"center": Image.Resampling.BICUBIC, "squash": Image.Resampling.BILINEAR}
SMALLEST_SIDE = 32  # pixels; anything smaller is an icon, not a face
MOST_BYTES, MOST_LIST_BYTES = 2**29, 2**26  # of an image's file, of a partition list
LARGE_BYTES, LARGE_PIXELS = 2**25, 12_500_000  # a photograph of 12 megapixels is not large yet
EXPECTED = "expected a zip (Kaggle's archive.zip) or a folder of *.jpg, *.png or *.webp (img_align_celeba/000001.jpg)"

# A file: its path in a folder or zip, the bytes it is said to have, nanoseconds of its last change (None in a zip), and
# a function that opens it to be read.
Member = namedtuple("Member", ["name", "size", "time", "open"], defaults=[None, None])


@dataclass
class Found:
    """What lies in folders and zips."""

    place: str  # for people
    members: list = field(default_factory=list)  # the images
    left_out: list = field(default_factory=list)  # of strings: an image's or folder's name, and why
    others: Counter = field(default_factory=Counter)  # files that are no images: how many of each ending


def describe_source(path):
    """Return what tells that a zip or folder is unchanged: names, sizes, times. Nothing is read, so it is fast."""
    if path.is_file():
        return [path.name, path.stat().st_size, path.stat().st_mtime_ns]
    list_folder(path, found := Found(str(path)))
    return [path.name, [(member.name, member.size, member.time) for member in found.members]]


def list_images(paths):
    """Return the Found of all paths, by name. Raises UserError where there are no images."""
    found = Found(" ".join(map(str, paths)))
    for path in paths:
        if path.is_dir():
            list_folder(path, found)
        else:
            found.members += [member for member in zip_members(path) if is_image(member.name, found)]
    if not found.members:
        among = f" among {counts(found)}" if found.others else ""
        zips = " (it holds zips: name them instead; unpack one that holds zips itself)" if found.others[".zip"] else ""
        raise UserError(f"--data {found.place}: no images found{among}{zips}; {EXPECTED}")
    found.members.sort(key=lambda member: member.name)
    return found


def counts(found):
    """Return how many other files there are, as text by ending: '12 .heic, 1 .txt'."""
    return ", ".join(f"{count:,} {ending}" for ending, count in found.others.most_common(8))


def is_image(name, found):
    """Return whether a file is an image by its name; count it if it is not. What Macs leave behind is neither."""
    base = name.rpartition("/")[2]
    if base.startswith("._") or "__MACOSX" in name.split("/"):
        return False
    known = base.lower().endswith(SUFFIXES)
    if not known and base not in PARTITION_LISTS:
        found.others[printable(os.path.splitext(base)[1].lower()) or "without an ending"] += 1
    return known


def list_folder(folder, found):
    """Add what is in a folder and those within to `found`. Links are followed, but into each folder only once."""
    seen = {(stat.st_dev, stat.st_ino) for stat in map(os.stat, folder.resolve().parents)}
    todo = [("", folder)]
    for name, entry in todo:  # which grows meanwhile: one level after the other
        try:
            if entry.is_dir():
                stat = os.stat(entry)  # on Windows entry.stat() lacks what tells folders apart
                if (stat.st_dev, stat.st_ino) in seen:
                    raise ValueError("a link to a folder that is read already or holds it")
                seen.add((stat.st_dev, stat.st_ino))
                with os.scandir(entry) as entries:  # it is fast, for a folder may hold 202,599 of them
                    inner = sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name))
                todo += [(f"{name}/{entry.name}" if name else entry.name, entry) for entry in inner]
            elif is_image(name, found):
                if not entry.is_file():
                    raise ValueError("a link to nothing" if entry.is_symlink() else "not a regular file")
                stat = entry.stat()
                found.members.append(Member(name, stat.st_size, stat.st_mtime_ns, partial(open, entry.path, "rb")))
        except (OSError, ValueError) as error:
            found.left_out.append(f"{printable(name)} ({reason_of(error)})")


def zip_members(path):
    """Return the Members of a zip. Raises UserError unless it is whole."""
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # of many types, for a damaged list of members
        raise UserError(
            f"--data {path}: not a whole zip ({reason_of(error)}); download it again, or unpack it and pass the folder"
        ) from None
    infos = [info for info in archive.infolist() if not info.is_dir()]
    return [Member(info.filename, info.file_size, open=partial(archive.open, info)) for info in infos]


def open_member(member, most=MOST_BYTES):
    """Return a member opened for reading. Raises ValueError for one of too many bytes, or that Python cannot read."""
    if member.size > most:
        raise ValueError(f"{member.size / 1e6:,.0f} MB, more than {most / 1e6:,.0f} MB")
    try:
        return member.open()
    except RuntimeError:
        raise ValueError("encrypted, or packed by an unknown method; unpack the zip and pass the folder") from None


def printable(name):
    """Return a name that can be printed in one line: one that is not UTF-8, or has line ends, with escapes."""
    return name if name.isprintable() else ascii(name)[1:-1]


def reason_of(error):
    """Return one short line that says what an exception means to a user."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a format that is read"  # its own text is the address of an object
    text = (getattr(error, "strerror", None) or str(error)).strip() or type(error).__name__
    return printable(text.splitlines()[0][:120])


def read_partition(paths):
    """Return {file name: 0, 1 or 2} from the list_eval_partition near the data or in a zip of it, {} without one.

    Its lines are '000001.jpg 0' (CelebA) or, below a header, '000001.jpg,0' (Kaggle).
    """
    folders = [folder for path in paths for folder in (path, *path.resolve().parents[:2])]
    files = [file for folder in folders for name in PARTITION_LISTS if (file := folder / name).is_file()]
    lists = [Member(str(file), file.stat().st_size, open=partial(open, file, "rb")) for file in files]
    for path in filter(Path.is_file, () if lists else paths):
        members = [member for member in zip_members(path) if member.name.rpartition("/")[2] in PARTITION_LISTS]
        lists += [member._replace(name=f"{member.name} in {path}") for member in members]
    if not lists:
        return {}
    try:
        with open_member(lists[0], MOST_LIST_BYTES) as file:
            data = file.read(lists[0].size)
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        rows = re.findall(r"^([^\s,]+)[,\t ]+([0-2])[\t ]*\r?$", text, re.MULTILINE)
        if not rows:
            raise ValueError("no line of it is like '000001.jpg 0'")
    except Exception as error:  # zipfile raises many types
        place = printable(lists[0].name)
        raise UserError(f"{place} cannot be read ({reason_of(error)}); put a good one, in UTF-8, beside it") from None
    return {name: int(number) for name, number in rows}


def read_image(member, size, crop, alone=True):
    """Return (pixels, checksum of its file) of a member: (size, size, 3) uint8, upright, opaque, cropped, resized.

    Pillow's filters widen with the reduction, which is antialiasing. Returns None for a large image unless `alone`:
    only one is decoded at a time, for the sake of memory. Raises any exception for what is no usable image.
    """
    if member.size > LARGE_BYTES and not alone:
        return None
    with open_member(member) as file:
        data = file.read(member.size)  # no more than it is said to have
    image = Image.open(BytesIO(data), formats=FORMATS)  # of an animation, the first frame
    width, height = image.size
    if min(width, height) < SMALLEST_SIDE:
        raise ValueError(f"only {width}x{height} pixels")
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{width}x{height} pixels are too many")
    if width * height > LARGE_PIXELS and not alone:
        return None
    if image.format == "TIFF" and image.mode.startswith("I") and image.tag_v2.get(258) != (16,):
        raise ValueError(f"{image.tag_v2.get(258)} bits a pixel")
    ImageOps.exif_transpose(image, in_place=True)
    if crop == "center" and width != height:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))  # resize's own box would sample across its border
    if image.mode.startswith(("I", "F")):  # Pillow's own conversion would cut off all that is above 255
        values = np.asarray(image)
        if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"grey values of another kind than 8 or 16 bits, mode {image.mode}")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")  # of a large image no copy is to spare
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.asarray(image.convert("RGB").resize((size, size), CROPS[crop]))
    return pixels, zlib.crc32(data)


def native_side(members):
    """Return the largest shorter side, in pixels, among a few of the images: storing more would be invention."""
    sides = [SMALLEST_SIDE]
    for member in members[:: max(1, len(members) // 32)]:
        with contextlib.suppress(Exception), open_member(member) as file:  # counted when it is packed
            sides.append(min(Image.open(file, formats=FORMATS).size))
    return max(sides)
