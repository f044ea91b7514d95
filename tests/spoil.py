"""Good files damaged or made odd, as a random number generator says: what tests/fuzz.py feeds to the commands."""

import math
import os
import re
import shlex

import torch
from PIL import Image

JSON = [None, True, False, -1, 0, 1, 0.5, 7, 32, 2**31, 2**63, 10**30, 200_000, 1e308, math.nan, -math.inf, "", "x",
        "\n", "cpu", "../x", "é", "9" * 5000, [], {}, [1], [[]], {"x": 1}, [None, "x"], "pixel"]  # fmt: skip
ODD = [*JSON, 1j, b"x", (1, 2), {1: 2}, torch.zeros(0), torch.zeros(3), torch.full((4, 4), math.nan), torch.tensor(5),
       torch.zeros(2, 2).to_sparse(), torch.zeros(3, dtype=torch.bfloat16), torch.zeros(()).expand(10**6, 10**6),
       torch.zeros(2, device="meta")]  # fmt: skip
VALUES = shlex.split("""x -1 0 1 2 3 32 64 2147483648 1e400 nan inf 1e-320 0x10 é "'" .. /dev/null /proc/self/mem faces
    whole.pt run no/where.png x.pt x.gif x.PNG http://x cuda:99 mps cpu latest auto train drawn all quick report""")
VALUES += ["", "a\nb", "y" * 300]
SPOILT = [b"", b"\n<!DOCTYPE html><title>Google Drive - Quota exceeded</title>", b"[" * 100_000, b"[{}]", b"null", b"1",
          b"PK\5\6" + 18 * b"\0", b"\x89PNG\r\n\x1a\n", b"version https://git-lfs.github.com/spec/v1\n"]  # fmt: skip
MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16", "F"]
ENDINGS = "png jpg jpeg JPE jfif webp gif bmp tif tiff tga ppm pcx ico jp2 avif dib sgi im icns qoi"  # noqa: SIM905


class Called:
    """Pickled, this is a call of `function` that is made by whoever unpickles it."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def damage_fields(rand, tree, odd):
    """Change one to three fields somewhere in nested dicts and lists, and say which."""
    done = ""
    for _ in range(rand.choice([1, 1, 2, 3])):
        node = tree
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = rand.choice(keys)
            if not isinstance(node[key], (dict, list)) or not node[key] or rand.random() < 0.3:
                break
            node = node[key]
        act, value = rand.choice(["replace", "replace", "delete", "rename", "swap"]), node[key]
        done += f", {act} {key}"
        if act in ("delete", "rename") and len(keys) > 1:
            del node[key]
            if act == "rename" and isinstance(node, dict):
                node[rand.choice(["renamed", "module.x", 5])] = value
        else:
            node[key] = node[rand.choice(keys)] if act == "swap" else rand.choice(odd)
    return done


def damage_bytes(rand, data):
    """Return bytes with one to three damages: flips, cuts, zeros, repeats, and numbers in the headers of a zip."""
    data = bytearray(data)
    for _ in range(rand.choice([1, 1, 2, 3])):
        at, length = rand.randrange(len(data)), rand.choice([1, 2, 4, 100, 5000])
        headers = [found.start() for found in re.finditer(rb"PK(?:\x01\x02|\x03\x04|\x05\x06)", bytes(data))]
        act = rand.choice(["flip", "set", "cut", "zeros", "insert", "drop", "garbage head", *["header"] * 3])
        if act == "header" and headers:
            at, length = rand.choice(headers) + 4 + rand.randrange(42), rand.choice([1, 2, 4])
        if act == "flip":
            data[at] ^= 1 << rand.randrange(8)
        elif act == "cut":
            del data[at + 1 :]
        elif act == "drop":
            del data[at : at + min(length, len(data) - 1)]
        elif act == "insert":
            data[at:at] = data[:length]
        else:
            at = 0 if act == "garbage head" else at
            data[at : at + length] = bytes(length) if act == "zeros" else rand.randbytes(length)
    return bytes(data)


def spoil(rand, path):
    """Damage a file's bytes, or put something else in its place, and say which."""
    content, good = rand.choice(SPOILT), path.read_bytes()
    if rand.random() < 0.8 and good:
        content = damage_bytes(rand, good)
    path.write_bytes(content)
    first = next((i for i, (a, b) in enumerate(zip(content, good)) if a != b), len(content))  # noqa: B905
    return f", {path.name} from byte {first} of {len(good)}, now {len(content)}"


def draw_picture(rand, path):
    """Write a picture of any kind to a file of any name in the folder `path`, or what only looks like one; say what."""
    name = rand.choice(["x", "._x", "ä ö", "new\nline", "\udcff", "y" * 240, "x.y", "__MACOSX"])
    path = path / f"{name}.{rand.choice(ENDINGS)}"
    act = rand.choice(["picture"] * 6 + ["spoilt", "fifo", "link", "loop", "folder", "sparse", "text"])
    if act in ("picture", "spoilt"):
        sides = rand.choice([(1, 1), (40, 33), (3, 4000), (178, 218), (64, 64), (3600, 3600), (13300, 13300)])
        mode = rand.choice(MODES if max(sides) < 9000 else ["1", "L", "RGBA"])
        frame = Image.effect_noise((64, 64), 80).convert("RGB").resize(sides) if max(sides) < 9000 else None
        image = Image.new(mode, sides) if frame is None or mode in ("I;16", "LAB") else frame.convert(mode)
        kind = Image.registered_extensions().get(f".{rand.choice(ENDINGS).lower()}", "PNG")
        try:
            image.save(path, kind)
        except (OSError, ValueError, KeyError):  # a mode that this format does not have
            image.convert("RGB").save(path, "PNG")
        if act == "spoilt":
            spoil(rand, path)
    elif act == "fifo":
        os.mkfifo(path)
    elif act in ("link", "loop"):
        path.symlink_to(path.parent if act == "loop" else "nowhere")
    elif act == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"no picture")
        os.truncate(path, 5 * 10**9 if act == "sparse" else 10)
    return f"{act} {path.name!a}"
