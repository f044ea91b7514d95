import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import Interpolation
import photos
from checkpoints import load_generator
from command_line import UserError
from Generator import Generator, latent, to_uint8

SHIPPED = Path(__file__).parent.parent / "bests" / "generator_128.pt"
EYES = np.array([[430.0, 300.0], [520.0, 330.0]])  # on a slant, off-centre


@pytest.fixture(scope="session")
def face():
    """A generated face, 128 px, for the detector."""
    generator = load_generator(SHIPPED)
    return Image.fromarray(to_uint8(generator(latent(2)[None]))[0].permute(1, 2, 0).numpy())


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """A small model's path, and inversion and tuning in a few steps."""
    for name, value in {"SEARCH": 16, "STARTS": 2, "INVERT_STEPS": 4, "TUNE_STEPS": 60}.items():
        monkeypatch.setattr(photos, name, value)
    torch.manual_seed(0)
    generator = Generator(nz=16, ngf=8, size=32)
    file = {"config": generator.config, "state": generator.state_dict()}
    file = {"format": 1, "step": 7, "settings": {"crop": "squash"}, "generator": file, "made_by": {}}
    torch.save(file, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def paste(face, path, at=(500, 120), side=300, size=(1000, 700), copies=1, **options):
    image = Image.new("RGB", size, (60, 110, 90))
    for k in range(copies):
        image.paste(face.resize((side - 60 * k,) * 2, Image.Resampling.BICUBIC), (at[0] - 450 * k, at[1]))
    image.save(path, **options)
    return path


def run(*flags):
    return Interpolation.main([*map(str, flags), "--device", "cpu"])


def needs_detector():
    return pytest.importorskip("facenet_pytorch", reason="needs facenet-pytorch")


# ---- reading ----


def test_photos_are_upright_opaque_and_of_8_bits(tmp_path):
    ramp = np.linspace(0, 255, 64 * 96).reshape(64, 96).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    grey = np.asarray(photos.read_photo(tmp_path / "grey.png"))
    assert (grey == ramp[..., None]).all() and (np.asarray(photos.read_photo(tmp_path / "grey16.png")) == grey).all()
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(photos.read_photo(tmp_path / "clear.png")).min() == 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    Image.fromarray(ramp).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    assert photos.read_photo(tmp_path / "turned.jpg").size == (64, 96)


@pytest.mark.parametrize("kind", ["text", "cut", "huge", "folder", "pipe", "missing"])
def test_what_is_no_photo_is_refused_by_name(tmp_path, kind, monkeypatch):
    path = tmp_path / "x.jpg"
    if kind == "text":
        path.write_text("not a picture")
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "missing":
        Image.new("RGB", (200, 200), "red").save(path)
        monkeypatch.setattr(photos, "MOST_PIXELS", 200 * 200 - (kind == "huge"))
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="--photos .*x.jpg: "):
        photos.read_photo(path)


# ---- aligning ----


@pytest.mark.parametrize("size, crop", [(32, "center"), (128, "center"), (128, "squash"), (512, "center")])
def test_the_eyes_come_to_where_celeba_has_them(size, crop):
    image = np.zeros((700, 1000, 3), np.uint8)
    rows, columns = np.mgrid[:700, :1000] + 0.5
    for eye, channel in zip(EYES, (0, 1), strict=True):
        image[..., channel] = 255 * np.exp(-((columns - eye[0]) ** 2 + (rows - eye[1]) ** 2) / 400)
    x = (photos.align(Image.fromarray(image), EYES, size, crop) + 1) / 2
    assert x.shape == (3, size, size)
    at, (top, height) = (torch.arange(size) + 0.5) / size, {"center": (20, 178), "squash": (0, 218)}[crop]
    for channel, column in enumerate((70, 109)):  # of 178x218 pixels, all or the central square of them
        weight = x[channel] / x[channel].sum()
        assert (weight.sum(0) @ at).item() * 178 == pytest.approx(column, abs=0.5)
        assert top + (weight.sum(1) @ at).item() * height == pytest.approx(112, abs=0.5)


def test_outside_the_photo_its_border_goes_on():
    x = photos.align(Image.new("RGB", (120, 90), "white"), [(40, 40), (80, 40)], 64)
    assert (x > 0.99).all()


def test_a_face_is_found_off_centre_and_the_largest_of_two(tmp_path, face, capsys):
    needs_detector()
    x = photos.read_face(paste(face, tmp_path / "one.jpg"), 128)
    photo = photos.read_photo(tmp_path / "one.jpg")
    eyes = photos.find_eyes(photo)
    assert eyes == pytest.approx(photos.find_eyes(face.resize((300, 300))) + (500, 120), abs=8)  # 65 px apart
    assert torch.equal(x, photos.align(photo, eyes, 128)) and not capsys.readouterr().out
    y = photos.read_face(paste(face, tmp_path / "two.jpg", copies=2), 128)
    assert "two.jpg: 2 faces; the largest is taken" in capsys.readouterr().out
    assert photos.ssim(x[None], y[None]) > 0.9


# ---- fitting ----


def test_ssim_is_1_for_equal_pictures_and_falls_with_noise():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    noise = torch.randn(2, 3, 32, 32, generator=generator)
    assert torch.allclose(photos.ssim(x, x), torch.ones(2))
    assert (photos.ssim(x, x + 0.1 * noise) > photos.ssim(x, x + noise)).all()
    # Two constant pictures: only the term of the means is left.
    a, b = torch.full((1, 3, 16, 16), -0.5), torch.full((1, 3, 16, 16), 0.5)
    assert photos.ssim(a, b).item() == pytest.approx((-0.5 + 4e-4) / (0.5 + 4e-4), abs=1e-3)


def test_inversion_finds_a_seed_and_tuning_leaves_the_old_generator_alone(quick):
    generator = load_generator(quick)
    before = {key: value.clone() for key, value in generator.state_dict().items()}
    faces = torch.cat([generator(latent(3, 16)[None]), torch.zeros(5, 3, 32, 32)])  # more than fit into a step
    z = photos.invert(generator, faces)
    assert z.shape == (6, 16) and photos.distance(generator(z[:1]), faces[:1]) < 0.05
    tuned = photos.tune(generator, z, faces)
    assert (photos.distance(tuned(z), faces) < photos.distance(generator(z), faces)).sum() >= 5
    assert all(torch.equal(value, before[key]) for key, value in generator.state_dict().items())
    assert not any(parameter.requires_grad for parameter in tuned.parameters())


# ---- the command ----


def test_photos_become_a_film_and_a_tuned_model_that_makes_the_same(tmp_path, quick, face, capsys):
    needs_detector()
    a, b = paste(face, tmp_path / "anna.jpg"), paste(face.rotate(5), tmp_path / "bert.png", at=(100, 300))
    flags = ["--frames", 8]
    assert run("--model", quick, "--photos", a, b, a, "--save-tuned", tmp_path / "t.pt", "--out", tmp_path / "1.png",
               *flags) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "anna: error" in out and "bert: error" in out and "SSIM" in out and "17 frames, photos anna bert anna" in out
    assert run("--photos", tmp_path / "t.pt", "--out", tmp_path / "2.png", *flags) == 0
    first, second = (np.asarray(Image.open(tmp_path / f"{k}.png")).astype(int) for k in (1, 2))
    assert second.shape == (32, 9 * 32, 3) and abs(first[:, : 9 * 32] - second).max() <= 1
    assert run("--model", tmp_path / "t.pt", "--seeds", 1, 2, "--frames", 1, "--out", tmp_path / "3.png") == 0
    assert torch.load(tmp_path / "t.pt", weights_only=True)["settings"] == {"crop": "squash"}
    capsys.readouterr()
    for more in (["--model", quick], ["--save-tuned", tmp_path / "u.pt"], [a]):  # none of which would have a meaning
        assert run("--photos", tmp_path / "t.pt", *more) == 2
        assert "stands alone" in capsys.readouterr().err and not (tmp_path / "u.pt").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["anna.jpg", "blank.png"], "blank.png: no face found"),
        (["anna.jpg", "text.jpg"], "text.jpg: cannot be read"),
        (["anna.jpg", "gone.jpg"], "gone.jpg: no such file"),
        (["anna.jpg", "anna.jpg"], "anna follows itself"),
        (["anna.jpg"], "2 photos or more"),
        (["anna.jpg", "blank.png", "--truncation", "0.5"], "--truncation 0.5"),
        (["anna.jpg", "blank.png", "--save-tuned", "t.gif"], "--save-tuned: t.gif"),
    ],
)
def test_photos_that_make_no_film_are_one_line_and_leave_no_file(
    tmp_path, quick, face, capsys, monkeypatch, flags, words
):
    needs_detector()
    monkeypatch.chdir(tmp_path)
    paste(face, "anna.jpg")
    Image.new("RGB", (500, 400), "grey").save("blank.png")
    Path("text.jpg").write_text("not a picture")
    before = sorted(os.listdir())
    assert run("--model", quick, "--photos", *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error and sorted(os.listdir()) == before


def test_a_model_that_was_not_tuned_holds_no_photos(quick, capsys):
    assert run("--photos", quick) == 2 and "model.pt: not tuned for photos" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="there are no limits of file sizes")
def test_full_disk_names_the_tuned_model_and_leaves_nothing(tmp_path, quick, monkeypatch):
    import resource

    monkeypatch.setattr(photos, "read_face", lambda *_: torch.zeros(3, 32, 32))
    before, old = os.listdir(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        with pytest.raises(OSError, match="t.pt"):
            photos.tune_for({"a": "a.jpg", "b": "b.jpg"}, load_generator(quick), "center", tmp_path / "t.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert os.listdir(tmp_path) == before


def test_without_the_detector_one_line_says_how_to_get_it(tmp_path, quick, face, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    photos.detector.cache_clear()
    assert run("--model", quick, "--photos", paste(face, tmp_path / "a.jpg"), paste(face, tmp_path / "b.jpg")) == 2
    assert "pip install --no-deps facenet-pytorch" in capsys.readouterr().err
