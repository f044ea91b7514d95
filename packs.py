"""A pack: all images of a data set, decoded and resized to one size, as raw bytes in a file with an index beside it."""

import contextlib
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from atomic_write import atomic_write
from command_line import UserError
from image_files import counts, printable, reason_of

MOST_BROKEN = 0.05  # share of unreadable images above which the data itself is wrong


def read_index(file):
    """Return the index of the pack `file`, or None unless both are there and whole.

    It is a dict: side, in pixels; images, a list of [name, checksum] in the order of the pack; skipped, a list of
    strings, images that could not be used.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        index = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))  # which may hold anything
        whole = index.pop("seal") == seal(index)
        if whole and file.stat().st_size == len(index["images"]) * index["side"] ** 2 * 3:
            return index
    return None


def seal(index):
    """Return a hash of all that an index says: what another hand has written is no index."""
    return hashlib.sha256(json.dumps(index).encode()).hexdigest()


def pack(file, found, side, load, workers=None, quiet=False):
    """Write all images Found into `file`, (N, side, side, 3) uint8, and its index; return the index.

    load: called with a member and whether it may be a large one, returns ((side, side, 3) uint8, checksum), None for a
    large one that may not be, or raises where it cannot be used.
    Raises UserError where the disk is too small or too many images cannot be used.
    """
    members, folder = found.members, file.parent
    need, free = len(members) * side * side * 3, shutil.disk_usage(folder).free

    def tell(text):
        if not quiet:
            print(text, flush=True)

    def try_to_load(member, alone=False):
        """Return (pixels, checksum), or (None, which image cannot be used and why), or None as `load` does."""
        try:
            return load(member, alone)
        except MemoryError:
            raise
        except Exception as error:  # Pillow and zipfile raise many types; each of them means one unusable image
            return None, f"{printable(member.name)} ({reason_of(error)})"

    tell(f"Packing {len(members):,} images at {side} px once into {printable(str(folder))} ({need / 1e9:.2f} GB) ...")
    if need > free:
        raise UserError(
            f"--cache {folder}: packing needs {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            "choose another disk with --cache DIR or a smaller --size"
        )
    images, skipped = [], []
    with atomic_write(file) as temporary:
        with (
            open(temporary, "wb") as output,
            contextlib.ExitStack() as ending,
            tqdm(total=len(members), unit=" images", disable=quiet or None, leave=False) as bar,
        ):
            pool = ThreadPoolExecutor(workers or os.cpu_count())
            ending.callback(pool.shutdown, cancel_futures=True)  # an error or a signal does not wait for the others
            for start in range(0, len(members), 256):  # in parts: memory stays flat however many images there are
                part = members[start : start + 256]
                for member, loaded in zip(part, pool.map(try_to_load, part), strict=True):
                    # A large one always in this thread, as each keeps memory.
                    pixels, note = loaded or try_to_load(member, alone=True)
                    if pixels is None:
                        skipped.append(note)
                    else:
                        output.write(pixels)
                        images.append((member.name, note))
                bar.update(len(part))
        missing = found.left_out + skipped
        if missing:
            more = f"; and {len(missing) - 10} more, listed in {file.stem}.json" if len(missing) > 10 else ""
            tell(f"Left out {len(missing)} of {len(members) + len(found.left_out)} images that cannot be used: "
                 f"{'; '.join(missing[:10])}{more}")  # fmt: skip
        if found.others:
            tell(f"Not read, for what their names end in: {counts(found)}")
        if len(skipped) > MOST_BROKEN * len(members):
            advice = "" if "unpack" in skipped[0] else "; download the data again"
            raise UserError(
                f"--data {found.place}: {len(skipped)} of {len(members)} images cannot be used, more than "
                f"{MOST_BROKEN:.0%}; the first is {skipped[0]}{advice}"
            )
    index = {"side": side, "skipped": missing, "images": images}
    with atomic_write(file.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(index | {"seal": seal(index)}), encoding="utf-8")
    # Made of other states of the same data, with the same size and crop.
    older = [old for old in folder.glob(f"{file.stem.rpartition('-')[0]}-{'?' * 16}.u8") if old != file]
    if older:
        total, names = sum(old.stat().st_size for old in older) / 1e9, ", ".join(old.stem for old in older)
        tell(f"Older packs there take {total:.2f} GB; delete what no run needs: {names}")
    return index
