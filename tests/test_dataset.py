import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import Dataset
from command_line import UserError
from Dataset import batch_indices, epoch_order, estimate_pack, find_celeba, main, open_data
from drawn_faces import draw_face

ROOT = Path(__file__).parent.parent


def jpeg(colour, size=(178, 218), mode="RGB"):
    data = io.BytesIO()
    Image.new(mode, size, colour).save(data, "JPEG", quality=95)
    return data.getvalue()


@pytest.fixture
def folder(tmp_path):
    """25 grey images, brighter by number, in a nested folder."""
    images = tmp_path / "celeba" / "img_align_celeba"
    images.mkdir(parents=True)
    for i in range(25):
        (images / f"{i:06d}.jpg").write_bytes(jpeg((i * 10, i * 10, i * 10)))
    return tmp_path / "celeba"


def make_zip(path, names, prefix="img_align_celeba/"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for i, name in enumerate(names):
            archive.writestr(prefix + name, jpeg((i * 10, 0, 0)))
    return path


def test_a_batch_is_images_in_range(folder):
    dataset = open_data([folder], size=32)
    assert len(dataset) == 25
    images = dataset.batch(torch.tensor([0, 7, 24]), "cpu")
    assert images.shape == (3, 3, 32, 32) and images.is_contiguous(memory_format=torch.channels_last)
    grey = torch.tensor([0, 70, 240]).view(3, 1, 1, 1) / 127.5 - 1
    torch.testing.assert_close(images, grey.expand(3, 3, 32, 32), atol=0.02, rtol=0, check_stride=False)
    assert torch.equal(dataset.batch([24, 7]), images[[2, 1]])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("size", [32, 256])
def test_batches_are_the_same_on_a_gpu_sent_or_resident(folder, size):
    dataset = open_data([folder], size)
    for _ in range(3):  # the third comes from the copy of all images
        images = dataset.batch(range(12), "cuda")
        assert images.is_cuda and images.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(images.cpu(), dataset.batch(range(12)), atol=1e-5, rtol=1e-5)
    assert dataset.resident.shape == dataset.images.shape


def test_zips_folders_and_parts_are_the_same_data(folder, tmp_path):
    files = sorted((folder / "img_align_celeba").iterdir())
    whole, parts = tmp_path / "kaggle.zip", [tmp_path / "part1.zip", tmp_path / "part2.zip"]
    for path, chosen, prefix in ((whole, files, "img_align_celeba/img_align_celeba/"),
                                 (parts[0], files[:10], ""), (parts[1], files[10:], "")):  # fmt: skip
        with zipfile.ZipFile(path, "w") as archive:
            for file in chosen:
                archive.write(file, prefix + file.name)
    sets = [open_data(paths, size=32) for paths in ([folder], [whole], parts, parts[::-1])]
    assert len({dataset.fingerprint for dataset in sets}) == 1
    assert all(np.array_equal(dataset.images, sets[0].images) for dataset in sets)


def test_pack_is_reused_and_rebuilt_when_a_file_changes(folder, tmp_path, capsys):
    first = open_data([folder], size=32)
    assert "Packing 25 images" in capsys.readouterr().out
    folder = folder.rename(tmp_path / "elsewhere").rename(tmp_path / "celeba")  # moved data keeps its pack
    assert open_data([folder], size=32).cache_file == first.cache_file and capsys.readouterr().out == ""
    assert open_data([folder], size=64).cache_file != first.cache_file
    (folder / "img_align_celeba" / "000000.jpg").write_bytes(jpeg((250, 250, 250)))
    third = open_data([folder], size=32)
    words = f"Older packs there take 0.00 GB; delete what no run needs: {first.cache_file.stem}"
    assert words in capsys.readouterr().out and first.cache_file.exists()  # a user's file is the user's to delete
    assert third.batch([0]).mean() > 0.9 and third.fingerprint != first.fingerprint
    (folder / "img_align_celeba" / "000025.jpg").write_bytes(jpeg((1, 2, 3)))
    assert len(open_data([folder], size=32)) == 26


INDEXES = [
    lambda index: "", lambda index: "[]", lambda index: '"seal"', lambda index: "[" * 100_000,
    lambda index: index | {"side": 16}, lambda index: index | {"images": [5, *index["images"][1:]]},
    lambda index: {key: index[key] for key in ("side", "images", "skipped")},
]  # fmt: skip


def test_a_pack_that_is_damaged_or_has_another_index_is_made_anew(folder):
    first = open_data([folder], size=32)
    pack, index = first.cache_file, first.cache_file.with_suffix(".json")
    good, images = index.read_text(), first.images.copy()
    for damage in (*INDEXES, lambda _: os.truncate(pack, 100), lambda _: pack.unlink(), lambda _: index.unlink()):
        damaged = damage(json.loads(good))
        if damaged is not None:
            index.write_text(damaged if isinstance(damaged, str) else json.dumps(damaged))
        again = open_data([folder], size=32)
        assert again.fingerprint == first.fingerprint and np.array_equal(again.images, images)


@pytest.mark.skipif(os.name == "nt", reason="no such signals and locks")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGKILL"])
def test_a_killed_packing_leaves_nothing_for_long(folder, name):
    code = f"""
import signal, time, Dataset
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup would have these tests ignore
Dataset.image_files.read_image = lambda *args: print("decoding", flush=True) or time.sleep(0.5)
Dataset.open_data([{str(folder)!r}], size=32, workers=1)"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        while "decoding" not in run.stdout.readline():
            pass
        (living,) = folder.parent.glob(".*.tmp-*")
        open_data([folder], size=32)  # another process packs meanwhile, and takes nothing of this one
        assert living.exists()
        run.send_signal(getattr(signal, name))
        assert run.wait(timeout=10) == {"SIGTERM": 143, "SIGHUP": 129, "SIGKILL": -9}[name]
    assert living.exists() == (name == "SIGKILL")
    open_data([folder], size=64)
    assert not list(folder.parent.glob(".*"))


def test_read_only_data_falls_back_to_the_users_cache(folder, tmp_path, monkeypatch):
    (tmp_path / "shared").mkdir()
    folder = folder.rename(tmp_path / "shared" / "celeba")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    folder.parent.chmod(0o555)
    try:
        assert open_data([folder], size=32).cache_file.parent == tmp_path / "home" / "facefusion"
    finally:
        folder.parent.chmod(0o755)


def test_a_full_disk_is_foreseen_or_named_and_leaves_nothing(folder, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: '.*celeba-32px-center-.*u8'"):
        open_data([folder], size=32)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(UserError, match="0.0 GB are free.*--cache DIR"):
        open_data([folder], size=32)
    assert [path.name for path in folder.parent.iterdir()] == ["celeba"]


def test_broken_and_tiny_images_are_named_and_left_out_unless_they_are_too_many(folder, capsys):
    images = folder / "img_align_celeba"
    (images / "text.jpg").write_text("this is not a picture")
    (images / "torn.jpg").write_bytes(jpeg((0, 0, 0))[:300])
    Image.new("L", (1, 1)).save(images / "tiny.png")
    with pytest.raises(UserError, match="3 of 28 images cannot be used, more than 5%.*text.jpg"):
        open_data([folder], size=32)
    assert [path.name for path in folder.parent.iterdir()] == ["celeba"]
    for i in range(25, 98):
        (images / f"{i:06d}.jpg").write_bytes(jpeg((9, 9, 9)))
    capsys.readouterr()
    dataset, out = open_data([folder], size=32), capsys.readouterr().out
    assert len(dataset) == 98 and len(dataset.skipped) == 3 and "Left out 3 of 101" in out
    assert all(name in out for name in ("text.jpg", "tiny.png (only 1x1 pixels)", "torn.jpg"))


def test_impossible_data_is_refused_with_what_was_expected(tmp_path):
    (tmp_path / "empty").mkdir()
    torn = make_zip(tmp_path / "torn.zip", ["1.jpg", "2.jpg"])
    torn.write_bytes(torn.read_bytes()[:-40])
    make_zip(tmp_path / "zips" / "inner.zip", ["1.jpg"])
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as archive:
        archive.write(tmp_path / "zips" / "inner.zip")
    for path, words in (("missing", "no such file or folder.*img_align_celeba/000001.jpg"),
                        ("empty", r"no images found.*\*\.webp"), ("torn.zip", "not a whole zip"),
                        ("zips", "1 .zip .*holds zips"), ("outer.zip", "unpack one that holds zips")):  # fmt: skip
        with pytest.raises(UserError, match=words) as caught:
            open_data([tmp_path / path], size=32)
        assert path in str(caught.value) and "\n" not in str(caught.value)
    for paths in ([""], [tmp_path, ""]):  # a shell variable that is not set
        with pytest.raises(UserError, match="--data : no such file or folder"):
            open_data(paths)


def test_every_epoch_has_every_image_once_in_its_own_order():
    batches = [batch_indices(10, 3, start, 4) for start in range(0, 40, 4)]  # batches cross the epochs' borders
    order = torch.cat(batches).view(4, 10)
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in order)
    assert len({tuple(epoch.tolist()) for epoch in order}) == 4
    assert torch.equal(batch_indices(10, 3, 17, 5), order.flatten()[17:22])  # needs nothing but the position
    assert sorted(batch_indices(3, 0, 0, 8).bincount().tolist()) == [2, 3, 3]  # fewer images than a batch has
    assert epoch_order(20, 1, 2).tolist() != epoch_order(20, 2, 2).tolist()
    code = "import torch; torch.manual_seed(9); from Dataset import epoch_order; print(epoch_order(20, 1, 2).tolist())"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert epoch_order(20, 1, 2).tolist() == eval(out)  # of neither the process nor the global random state


def test_drawn_faces_are_the_same_everywhere_and_all_different():
    faces = np.stack([draw_face(i, 32) for i in range(40)])
    assert np.array_equal(faces[7], draw_face(7, 32)) and len({face.tobytes() for face in faces}) == 40
    assert faces.std(axis=0).mean() > 30  # of 255: they vary
    # The same face at another size is the same picture.
    large = np.asarray(Image.fromarray(draw_face(7, 128)).resize((32, 32), Image.Resampling.BOX), float)
    assert np.abs(large - faces[7]).mean() < 6


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """The current folder, with no data in it nor beside the script; 20 faces are drawn there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Dataset, "DATA", tmp_path / "app" / "data")
    monkeypatch.setattr(Dataset, "DRAWN_COUNT", 20)
    return tmp_path


def test_without_celeba_faces_are_drawn_and_it_is_said(empty, capsys):
    dataset = open_data(None, size=32)
    assert dataset.name == "drawn" and len(dataset) == 20 and dataset.paths == ["drawn"]
    assert dataset.fingerprint == "2e88a88a775b8e3e"  # as ever: a run of an older version goes on
    line = capsys.readouterr().out.splitlines()[0]
    assert "No CelebA" in line and "--download" in line and "kaggle" in line
    (empty / "drawn").mkdir()
    (empty / "drawn" / "1.jpg").write_bytes(jpeg((9, 9, 9)))
    assert len(open_data(["./drawn"], size=32)) == 1 and len(open_data(["drawn"], size=32)) == 20


@pytest.mark.parametrize("root", ["data", "app/data"])
def test_celeba_is_found_once_here_and_beside_the_script(empty, root):
    for name in ("archive (1).zip", "archive(2).zip", "archive.zip"):  # a browser's names for further downloads
        make_zip(empty / root / name, [f"{i:03d}.jpg" for i in range(10)])
        assert [Path(path).name for path in find_celeba()] == [min(["archive (1).zip", name], key=len)]
    assert len(open_data(None, size=32)) == 10
    for name in ("img_align_celeba_val.zip", "img_align_celeba_train01.zip"):
        make_zip(empty / root / name, ["1.jpg"])
    assert len(find_celeba()) == 2  # parts, and all of them


def test_estimate_is_what_is_packed_and_nothing_is_larger_than_the_original(empty, folder):
    for data, size, side in ((["drawn"], 64, 64), (["drawn"], 256, 128), ([folder], 64, 64), ([folder], 256, 178)):
        dataset = open_data(data, size)
        assert estimate_pack(data, size) == (len(dataset), dataset.cache_file.stat().st_size)
        assert dataset.images.shape[1] == side and dataset.batch([0, 1]).shape == (2, 3, size, size)


REFUSED = [
    ("--size 0", "--size"), ("--size 4294967296", "--size"), ("--seed -1", "--seed"), ("--workers -1", "--workers: -1"),
    ("--out nowhere/a.png", "--out: nowhere/a.png"), ("--out a.foo", "--out: a.foo"), ("--data= ", "--data"),
    ("--split val", "--split val: no list_eval_partition"), ("--data drawn --split val", "--split val"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "words"), REFUSED)
def test_impossible_flags_are_refused_before_anything_is_packed(folder, empty, capsys, flags, words):
    assert main(["--data", str(folder), *flags.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Dataset.py: error: ") and words in err and err.count("\n") == 1
    assert not list(empty.rglob("*.u8"))


def test_script_writes_the_reports_grid(folder, tmp_path, capsys):
    assert main(["--data", str(folder), "--size", "32", "--out", str(tmp_path / "grid.png")]) == 0
    assert "25 images" in capsys.readouterr().out
    assert Image.open(tmp_path / "grid.png").size == (5 * 36 + 4, 3 * 36 + 4)


def test_download_says_what_to_do_by_hand_where_the_drive_refuses(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("Too many users have viewed or downloaded this file recently.\nmore")

    monkeypatch.setattr("torchvision.datasets.CelebA", refuse)
    with pytest.raises(UserError, match="Too many users.*kaggle.com.*archive.zip") as caught:
        Dataset.download()
    assert "\n" not in str(caught.value)
