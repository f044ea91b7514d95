"""What people have: pictures of all kinds, folders and zips as they come."""

import io
import os
import sys
import threading
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from test_dataset import jpeg, make_zip

import image_files
from command_line import UserError
from Dataset import open_data
from image_files import Member, read_image

GREY = Image.fromarray(np.arange(64 * 64).reshape(64, 64).astype(np.uint8))
COLOUR = Image.merge("RGB", [GREY, GREY.transpose(Image.Transpose.ROTATE_90), GREY])
DEEP = np.asarray(GREY).astype(np.uint16) * 257  # the same in 16 bits


def decoded(image, size=64, crop="center", kind="PNG", **options):
    """Return the pixels that are read of an image, or array, saved in a file of some kind."""
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return read_image(Member("x", file.tell(), open=lambda: io.BytesIO(file.getvalue())), size, crop)[0]


@pytest.fixture
def good(tmp_path):
    """A folder of 45 good images in nested folders whose names have spaces and umlauts."""
    for i in range(45):
        place = tmp_path / "Meine Fotos" / "Müller & Söhne" / f"{i % 3}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"Bild {i}.jpg").write_bytes(jpeg((i * 5, 0, 0), (40, 40)))
    return tmp_path / "Meine Fotos"


def test_center_cuts_the_square_and_squash_keeps_everything():
    image = np.zeros((218, 178, 3), np.uint8)
    image[:20] = image[-20:] = 255  # exactly what the central square leaves out
    assert decoded(image).max() == 0
    squashed = decoded(image, crop="squash")
    assert squashed[0].min() == 255 and squashed[32].max() == 0


def test_resizing_is_antialiased_and_cutting_does_not_blur():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255  # become even grey; without antialiasing they would leave moire
    for crop in ("center", "squash"):
        assert np.abs(decoded(stripes, 32, crop)[4:-4, 4:-4] - 127.5).max() < 6
    assert set(np.unique(decoded(stripes[:64, :65]))) == {0, 255}  # sides that differ by an odd number


TWINS = [
    ("PNG", DEEP, GREY), ("TIFF", DEEP // 257 * 256 + 255, GREY), ("PPM", DEEP, GREY), ("PNG", GREY, GREY),
    ("PNG", GREY.convert("1"), GREY.convert("1")), ("GIF", COLOUR.quantize(32), COLOUR.quantize(32)),
    ("TIFF", COLOUR.convert("CMYK"), COLOUR.convert("CMYK")),
    ("WEBP", Image.merge("RGBA", [*COLOUR.split(), Image.new("L", (64, 64), 255)]), COLOUR),
    ("PNG", Image.merge("LA", [GREY, Image.new("L", (64, 64), 0)]), Image.new("L", (64, 64), "white")),
    ("PNG", Image.new("RGBA", (64, 64), (0, 0, 0, 0)), Image.new("L", (64, 64), "white")),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "image", "twin"), TWINS)
def test_modes_equal_their_8_bit_twins(kind, image, twin):
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(decoded(image, kind=kind, **options), np.asarray(twin.convert("RGB")))


def test_a_turned_photo_is_upright_and_an_animation_its_first_frame():
    image, exif = Image.new("RGB", (64, 64), "black"), Image.Exif()
    image.paste("white", (0, 0, 64, 32))  # white on top
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise, so the white half is on the right
    turned = decoded(image, 32, kind="JPEG", exif=exif)
    assert turned[16, 28].min() > 200 and turned[16, 3].max() < 50
    for kind in ("WEBP", "GIF", "PNG"):
        red = decoded(Image.new("RGB", (64, 64), "red"), kind=kind, save_all=True, append_images=[image])
        assert red.mean((0, 1)) == pytest.approx([255, 0, 0], abs=5)


def test_what_cannot_be_used_is_left_out_by_name_without_being_read_whole(good, capsys):
    Image.fromarray(DEEP.astype(np.float32)).save(good / "float.tif")
    with open(good / "hole.jpg", "wb") as file:
        file.truncate(5 * 2**30)
    Image.fromarray(DEEP.astype(np.int32)).save(good / "int.tif")
    COLOUR.save(good / "postscript.jpg", "EPS")  # for which Pillow would start another program
    Image.new("1", (13_300, 13_300)).save(good / "wide.png")
    with pytest.raises(UserError, match="5 of 50 images cannot be used"):
        open_data([good], 32)
    out = capsys.readouterr().out
    for words in (
        "float.tif (grey",
        "hole.jpg (5,369 MB",
        "int.tif ((32,) bits",
        "script.jpg (not an image",
        "wide.png",
    ):
        assert words in out


def test_all_endings_that_pillow_reads_are_read_and_others_counted(good, capsys):
    kinds = ("AVIF", "BMP", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
    endings = {ending: kind for ending, kind in Image.registered_extensions().items() if kind in kinds}
    endings = {ending: kind for ending, kind in endings.items() if ending not in (".pfm", ".jpc")}  # other contents
    for ending, kind in (endings | {".TIF": "TIFF"}).items():
        GREY.save(good / f"a{ending}", kind)
    for name in ("a.heic", "b.HEIC", "notes.txt", "list_eval_partition.csv", "film.mpg", "README"):
        (good / name).write_text("nothing")
    assert len(open_data([good], 32)) == 45 + len(endings) + 1
    assert "end in: 2 .heic, 1 " in capsys.readouterr().out


def test_what_macs_leave_behind_is_passed_over(good, tmp_path):
    (good / "__MACOSX").mkdir()
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive:
        for file in list(good.rglob("*.jpg")):
            for left in (file.with_name(f"._{file.name}"), good / "__MACOSX" / file.name):
                left.write_bytes(b"no image")
                archive.write(left, f"faces/__MACOSX/{left.name}")
            archive.write(file, f"faces/{file.name}")
    for path in (good, tmp_path / "faces.zip"):
        dataset = open_data([path], 32)
        assert len(dataset) == 45 and not dataset.skipped


@pytest.mark.skipif(os.name == "nt", reason="no such files")
def test_links_and_pipes_are_left_out_by_name(good, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "linked.jpg").write_bytes(jpeg((9, 9, 9)))
    (good / "good link").symlink_to(tmp_path / "other")
    (good / "dangling.jpg").symlink_to("nowhere.jpg")
    (good / "self.jpg").symlink_to("self.jpg")
    (good / "Müller & Söhne" / "cycle").symlink_to(good)
    (good / "up").symlink_to(tmp_path)
    os.mkfifo(good / "pipe.jpg")
    dataset, cycle = open_data([good], 32), "a link to a folder that is read already or holds it"
    assert len(dataset) == 46 and sorted(dataset.skipped) == [
        f"Müller & Söhne/cycle ({cycle})", "dangling.jpg (a link to nothing)", "pipe.jpg (not a regular file)",
        f"self.jpg ({os.strerror(40)})", f"up ({cycle})",
    ]  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="such a name cannot be given here")
def test_a_name_that_is_not_utf8_is_as_good_as_any_and_a_user_needs_no_home(good, capsys, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does where there is no home
    monkeypatch.setattr(Path, "home", lambda: 1 / 0)
    for name, data in ((b"M\xfcller.jpg", jpeg((9, 9, 9))), (b"kaputt\xff.jpg", b"")):
        Path(os.fsdecode(os.fsencode(good) + b"/" + name)).write_bytes(data)
    dataset = open_data([good], 32)
    capsys.readouterr().out.encode()
    assert len(dataset) == 46 and dataset.skipped == [r"kaputt\udcff.jpg (not an image of a format that is read)"]
    assert open_data([good], 32).fingerprint == dataset.fingerprint


@pytest.mark.parametrize("limit", ["LARGE_PIXELS", "LARGE_BYTES"])
def test_large_images_are_decoded_one_at_a_time_by_one_thread(good, tmp_path, monkeypatch, limit):
    expected, threads, transpose = open_data([good], 32), set(), ImageOps.exif_transpose

    def watched(*args, **options):
        threads.add(threading.current_thread())
        return transpose(*args, **options)

    monkeypatch.setattr(image_files, limit, 100)
    monkeypatch.setattr(ImageOps, "exif_transpose", watched)
    dataset = open_data([good], 32, cache=tmp_path / "again")
    assert threads == {threading.main_thread()} and np.array_equal(dataset.images, expected.images)


def spoil(path, offsets, value):
    """Set two bytes in each header of a zip's first member: (in its own header, in the list at the end)."""
    data = bytearray(path.read_bytes())
    for magic, offset in zip((b"PK\3\4", b"PK\1\2"), offsets, strict=True):
        start = data.index(magic) + offset
        data[start : start + 2] = value
    path.write_bytes(data)


@pytest.mark.parametrize("split", ["all", "train"])
@pytest.mark.parametrize(
    ("offsets", "value", "words"),
    [((6, 8), b"\1\0", "encrypted.*unpack the zip and pass the folder"), ((14, 16), b"xx", "CRC|crc"),
     ((8, 10), b"\x09\0", "method; unpack the zip and pass the folder"), ((8, 10), b"\x62\0", "method; unpack the")],
)  # fmt: skip
def test_members_that_python_cannot_read_are_named(tmp_path, split, offsets, value, words):
    path, first = tmp_path / "faces.zip", "one.jpg" if split == "all" else "list_eval_partition.csv in "
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(first.split(" ")[0], jpeg(0, (40, 40), "L"))
        archive.writestr("two.jpg", jpeg(0, (40, 40), "L"))
    spoil(path, offsets, value)
    with pytest.raises(UserError, match=words) as caught:
        open_data([path], 32, split=split)
    message = str(caught.value)
    assert first in message and str(path) in message
    assert len(message) < 500 + len(str(path)) and "\n" not in message


def test_a_member_larger_than_it_says_is_not_unpacked_whole(tmp_path):
    path = tmp_path / "faces.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.jpg", b"\0" * 10**8)
        for i in range(25):
            archive.writestr(f"{i}.jpg", jpeg(i, (40, 40), "L"), zipfile.ZIP_BZIP2)
    spoil(path, (22, 24), b"\xff\0")
    spoil(path, (24, 26), b"\0\0")  # 255 bytes
    tracemalloc.start()
    assert len(open_data([path], 32).skipped) == 1
    assert tracemalloc.get_traced_memory()[1] < 5e7
    tracemalloc.stop()


ROWS = "\n".join(f"{i:03d}.jpg {0 if i < 6 else 1 if i < 9 else 2}" for i in range(10))
LISTS = [
    ("txt", ROWS.encode()), ("csv", b"image_id,partition\n" + ROWS.replace(" ", ",").encode()),
    ("txt", ROWS.replace("\n", "\r\n").encode("utf-16")), ("csv", ROWS.encode("utf-8-sig")),  # of Windows
]  # fmt: skip


def with_list(path, place, name, content):
    """Make a zip of ten images, with a partition list in it or beside it."""
    make_zip(path, [f"{i:03d}.jpg" for i in range(10)])
    if place == "beside":
        (path.parent / name).write_bytes(content)
    else:
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize(("ending", "content"), LISTS)
@pytest.mark.parametrize("place", ["beside", "inside"])
def test_splits_follow_the_partition_list(tmp_path, place, ending, content):
    path = with_list(tmp_path / "archive.zip", place, f"list_eval_partition.{ending}", content)
    sizes = [len(open_data([path], size=32, split=split)) for split in ("all", "train", "val", "test")]
    assert sizes == [10, 6, 3, 1]
    reds = open_data([path], size=32, split="val").batch(range(3))[:, 0].mean((1, 2))
    torch.testing.assert_close(reds, torch.tensor([60.0, 70, 80]) / 127.5 - 1, atol=0.03, rtol=0)


NO_LISTS = [b"", b"\xff\xfe1", b"\n" * 10**7, b"nothing", "000001.jpg 0".encode("utf-16-le"), b"\n" * 10**8]


@pytest.mark.parametrize("place", ["beside", "inside"])
def test_a_partition_list_that_is_none_or_huge_is_named(tmp_path, place):
    for content in NO_LISTS:
        path = with_list(tmp_path / "faces.zip", place, "list_eval_partition.txt", content)
        words = " MB, more than" if len(content) == 10**8 else ""
        with pytest.raises(UserError, match=f"list_eval_partition.txt .*cannot be read .*{words}") as caught:
            open_data([path], 32, split="train")
        assert (place == "inside") == (f"in {path} cannot" in str(caught.value))
