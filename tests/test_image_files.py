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


def encoded(image, kind="PNG", **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def decode(data, size, crop):
    return read_image(Member("x", len(data), open=lambda: io.BytesIO(data)), size, crop)[0]


@pytest.fixture
def good(tmp_path):
    """A folder of 45 good images in nested folders whose names have spaces and umlauts."""
    for i in range(45):
        place = tmp_path / "Meine Fotos" / "Müller & Söhne" / f"{i % 3}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"Bild {i}.jpg").write_bytes(jpeg((i * 5, 0, 0), (40, 40)))
    return tmp_path / "Meine Fotos"


GREY = Image.fromarray(np.arange(64 * 64).reshape(64, 64).astype(np.uint8))
COLOUR = Image.merge("RGB", [GREY, GREY.transpose(Image.Transpose.ROTATE_90), GREY])


def test_center_cuts_the_square_and_squash_keeps_everything():
    image = np.zeros((218, 178, 3), np.uint8)
    image[:20] = image[-20:] = 255  # exactly what the central square leaves out
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    assert decode(data.getvalue(), 64, "center").max() == 0
    squashed = decode(data.getvalue(), 64, "squash")
    assert squashed[0].min() == 255 and squashed[32].max() == 0


def test_center_does_not_blur_where_sides_differ_by_an_odd_number():
    stripes = np.zeros((65, 64, 3), np.uint8)
    stripes[::2] = 255
    data = io.BytesIO()
    Image.fromarray(stripes).save(data, "PNG")
    assert set(np.unique(decode(data.getvalue(), 64, "center"))) == {0, 255}


def test_resizing_is_antialiased():
    """One-pixel stripes become even grey; without antialiasing they would leave moire."""
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    data = io.BytesIO()
    Image.fromarray(stripes).save(data, "PNG")
    for crop in ("center", "squash"):
        inner = decode(data.getvalue(), 32, crop)[4:-4, 4:-4].astype(float)
        assert abs(inner - 127.5).max() < 6


def test_peoples_own_photos():
    """Grey, transparent and rotated images are usable: transparency becomes white, EXIF turns are undone."""
    assert decode(jpeg(100, (40, 40), "PNG", "L"), 32, "center").shape == (32, 32, 3)
    assert decode(jpeg((0, 0, 0, 0), (40, 40), "PNG", "RGBA"), 32, "center").min() == 255
    image = Image.new("RGB", (64, 64), "black")
    image.paste("white", (0, 0, 64, 32))  # white on top
    exif, data = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise, so the white half is on the right
    image.save(data, "JPEG", exif=exif)
    turned = decode(data.getvalue(), 32, "center")
    assert turned[16, 28].min() > 200 and turned[16, 3].max() < 50


@pytest.mark.parametrize(
    ("image", "twin", "kind"),
    [
        (Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257), GREY, "PNG"),
        (Image.fromarray(np.asarray(GREY).astype(np.uint16) * 256 + 255), GREY, "TIFF"),
        (Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257), GREY, "PPM"),
        (GREY.convert("1"), GREY.convert("1").convert("RGB"), "PNG"),
        (COLOUR.quantize(32), COLOUR.quantize(32).convert("RGB"), "GIF"),
        (COLOUR.convert("CMYK"), COLOUR.convert("CMYK").convert("RGB"), "TIFF"),
        (Image.merge("RGBA", [*COLOUR.split(), Image.new("L", (64, 64), 255)]), COLOUR, "WEBP"),
        (Image.merge("LA", [GREY, Image.new("L", (64, 64), 0)]), Image.new("RGB", (64, 64), "white"), "PNG"),
    ],
)
def test_modes_equal_their_8_bit_twins(image, twin, kind):
    lossless = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(decode(encoded(image, kind, **lossless), 64, "center"), np.asarray(twin.convert("RGB")))


def test_more_bits_than_16_are_left_out(good):
    Image.fromarray(np.asarray(GREY).astype(np.float32)).save(good / "float.tif")
    Image.fromarray(np.asarray(GREY).astype(np.int32)).save(good / "int.tif")
    assert [entry.split(" ")[0] for entry in open_data([good], 32).skipped] == ["float.tif", "int.tif"]


def test_an_animation_is_its_first_frame():
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    for kind in ("WEBP", "GIF", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert decode(data, 32, "center").mean((0, 1)) == pytest.approx([255, 0, 0], abs=5)


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
    (good.parent / "phone").mkdir()
    (good.parent / "phone" / "a.heic").write_text("nothing")
    with pytest.raises(UserError, match="no images found among 1 .heic"):
        open_data([good.parent / "phone"], 32)


def test_postscript_under_another_name_is_not_run(good):
    (good / "a.jpg").write_bytes(encoded(COLOUR, "EPS"))
    assert open_data([good], 32).skipped == ["a.jpg (not an image of a format that is read)"]


def test_what_macs_leave_behind_is_passed_over(good, tmp_path):
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive:
        for file in list(good.rglob("*.jpg")):
            (good / "__MACOSX").mkdir(exist_ok=True)
            for left in (file.with_name(f"._{file.name}"), good / "__MACOSX" / file.name):
                left.write_bytes(b"no image")
                archive.write(left, f"faces/__MACOSX/{left.name}")
            archive.write(file, f"faces/{file.name}")
    for path in (good, tmp_path / "faces.zip"):
        dataset = open_data([path], 32)
        assert len(dataset) == 45 and not dataset.skipped


@pytest.mark.skipif(os.name == "nt", reason="no such files")
def test_links_and_pipes_are_left_out_by_name(good, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "linked.jpg").write_bytes(jpeg((9, 9, 9)))
    (tmp_path / "beside.jpg").write_bytes(jpeg((9, 9, 9)))
    (good / "good link").symlink_to(tmp_path / "other")
    (good / "dangling.jpg").symlink_to("nowhere.jpg")
    (good / "self.jpg").symlink_to("self.jpg")
    (good / "Müller & Söhne" / "cycle").symlink_to(good)
    (good / "up").symlink_to(tmp_path)
    os.mkfifo(good / "pipe.jpg")
    dataset = open_data([good], 32)
    assert len(dataset) == 46 and len(dataset.skipped) == 5
    out = capsys.readouterr().out
    assert all(name in out for name in ("dangling.jpg", "self.jpg", "Söhne/cycle (", "up (", "pipe.jpg (not a regular"))


@pytest.mark.skipif(sys.platform != "linux", reason="such a name cannot be given here")
def test_a_name_that_is_not_utf8_is_as_good_as_any(good, capsys):
    for name, data in ((b"M\xfcller.jpg", jpeg((9, 9, 9))), (b"kaputt\xff.jpg", b"")):
        Path(os.fsdecode(os.fsencode(good) + b"/" + name)).write_bytes(data)
    dataset = open_data([good], 32)
    capsys.readouterr().out.encode()
    assert len(dataset) == 46 and dataset.skipped == [r"kaputt\udcff.jpg (not an image of a format that is read)"]
    assert open_data([good], 32).fingerprint == dataset.fingerprint


def test_empty_paths_are_refused(good):
    for data in ([""], [good, ""]):
        with pytest.raises(UserError, match="--data : no such file or folder"):
            open_data(data)


def test_a_user_without_a_home_needs_none(good, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does where there is none
    monkeypatch.setattr(Path, "home", lambda: 1 / 0)
    assert len(open_data([good], 32)) == 45


def test_what_is_too_large_is_left_out_without_being_read(good, tmp_path):
    with open(good / "hole.jpg", "wb") as file:
        file.truncate(5 * 2**30)
    Image.new("1", (13_300, 13_300)).save(good / "wide.png")
    names = [entry.split(" (")[0] for entry in open_data([good], 32).skipped]
    assert names == ["hole.jpg", "wide.png"]


@pytest.mark.parametrize("limit", ["LARGE_PIXELS", "LARGE_BYTES"])
def test_large_images_are_decoded_one_at_a_time_by_one_thread(good, tmp_path, monkeypatch, limit):
    expected, threads, transpose = open_data([good], 32), set(), ImageOps.exif_transpose
    monkeypatch.setattr(image_files, limit, 100)
    monkeypatch.setattr(
        ImageOps, "exif_transpose", lambda *a, **b: threads.add(threading.current_thread()) or transpose(*a, **b)
    )
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
    [((6, 8), b"\1\0", "encrypted"), ((8, 10), b"\x09\0", "method"), ((8, 10), b"\x62\0", "method"),
     ((14, 16), b"xx", "CRC|crc")],
)  # fmt: skip
def test_members_that_python_cannot_read_are_named(tmp_path, split, offsets, value, words):
    path = tmp_path / "faces.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("list_eval_partition.csv" if split == "train" else "one.jpg", jpeg(0, (40, 40), mode="L"))
        archive.writestr("two.jpg", jpeg(0, (40, 40), mode="L"))
    spoil(path, offsets, value)
    with pytest.raises(UserError, match=words) as caught:
        open_data([path], 32, split=split)
    message = str(caught.value)
    assert ("list_eval_partition.csv in" if split == "train" else "one.jpg") in message and str(path) in message
    assert len(message) < 500 + len(str(path)) and "\n" not in message
    if value != b"xx":
        assert "unpack the zip and pass the folder" in message


def test_a_zip_of_nothing_but_zips_is_answered_with_a_hint(tmp_path):
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as archive:
        archive.writestr("inner.zip", make_zip(tmp_path / "inner.zip", ["1.jpg"]).read_bytes())
    with pytest.raises(UserError, match="1 .zip.*unpack one that holds zips"):
        open_data([tmp_path / "outer.zip"], 32)


@pytest.mark.parametrize("kind", ["txt", "csv"])
@pytest.mark.parametrize("place", ["beside", "inside the zip"])
def test_splits_follow_the_partition_list(tmp_path, kind, place):
    path = make_zip(tmp_path / "archive.zip", [f"{i:03d}.jpg" for i in range(10)])
    rows = [(f"{i:03d}.jpg", 0 if i < 6 else 1 if i < 9 else 2) for i in range(10)]
    text = "\n".join(f"{n} {s}" for n, s in rows)
    if kind == "csv":
        text = "image_id,partition\n" + "\n".join(f"{n},{s}" for n, s in rows)
    if place == "beside":
        (tmp_path / f"list_eval_partition.{kind}").write_text(text)
    else:
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(f"list_eval_partition.{kind}", text)
    sizes = {split: len(open_data([path], size=32, split=split)) for split in ("all", "train", "val", "test")}
    assert sizes == {"all": 10, "train": 6, "val": 3, "test": 1}
    reds = open_data([path], size=32, split="val").batch(range(3))[:, 0].mean((1, 2))
    torch.testing.assert_close(reds, torch.tensor([60.0, 70, 80]) / 127.5 - 1, atol=0.03, rtol=0)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_a_partition_list_from_windows_is_read(tmp_path, encoding):
    path = make_zip(tmp_path / "faces.zip", [f"{i:03d}.jpg" for i in range(5)])
    lines = "\r\n".join(f"{i:03d}.jpg {i % 2}" for i in range(5))
    (tmp_path / "list_eval_partition.txt").write_bytes(lines.encode(encoding))
    assert len(open_data([path], 32, split="train")) == 3


@pytest.mark.parametrize("data", [b"", b"\xff\xfe1", b"\n" * 10**7, b"nothing", "000001.jpg 0".encode("utf-16-le")])
def test_a_partition_list_that_is_none_is_named(tmp_path, data):
    path = make_zip(tmp_path / "faces.zip", ["000001.jpg"])
    (tmp_path / "list_eval_partition.txt").write_bytes(data)
    with pytest.raises(UserError, match=r"list_eval_partition.txt cannot be read \("):
        open_data([path], 32, split="train")


def test_a_huge_partition_list_in_a_zip_is_not_read(tmp_path):
    path = make_zip(tmp_path / "faces.zip", ["1.jpg"])
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("list_eval_partition.txt", b"\n" * 10**8)
    with pytest.raises(UserError, match="list_eval_partition.txt in .*faces.zip cannot be read .100 MB"):
        open_data([path], 32, split="val")


def test_a_member_larger_than_it_says_is_not_unpacked_whole(tmp_path):
    path = tmp_path / "faces.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.jpg", b"\0" * 10**8)
        for i in range(25):
            archive.writestr(f"{i}.jpg", jpeg(i, (40, 40), mode="L"), zipfile.ZIP_BZIP2)
    spoil(path, (22, 24), b"\xff\0")
    spoil(path, (24, 26), b"\0\0")  # 255 bytes
    tracemalloc.start()
    assert len(open_data([path], 32).skipped) == 1
    assert tracemalloc.get_traced_memory()[1] < 5e7
    tracemalloc.stop()
