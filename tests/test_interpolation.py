import sys
import weakref
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import Interpolation as ip
from checkpoints import load_generator
from command_line import UserError
from Generator import Generator, latent

NOT_ON_WINDOWS = pytest.mark.skipif(sys.platform == "win32", reason="there are no limits of file sizes")


def write_model(path, seed=0):
    torch.manual_seed(seed)
    generator = Generator(nz=16, ngf=8, size=32)
    file = {"config": generator.config, "state": generator.state_dict()}
    torch.save({"format": 1, "step": 0, "settings": {}, "generator": file, "made_by": {}}, path)
    return path


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model.pt")


@pytest.fixture
def generator(model):
    return load_generator(model)


def run(model, out, *flags):
    return ip.main(["--model", str(model), "--out", str(out), "--device", "cpu", *map(str, flags)])


def read(path):
    """Return the frames (F, H, W, 3) of an animation and their delays in ms."""
    with Image.open(path) as image:
        shown = [(np.asarray(x.convert("RGB")).astype(int), x.info["duration"]) for x in ImageSequence.Iterator(image)]
        return np.stack([frame for frame, _ in shown]), [delay for _, delay in shown]


def angles(vectors):
    unit = vectors.double() / vectors.double().norm(dim=1, keepdim=True)
    return 2 * torch.atan2((unit[1:] - unit[:-1]).norm(dim=1), (unit[1:] + unit[:-1]).norm(dim=1))


A, B = latent(147), latent(244)


@pytest.mark.parametrize("mode", ip.MODES.values())
@pytest.mark.parametrize("b", [B, A, 3 * A, -A, -2 * A, A + 1e-9, torch.zeros(100)])
def test_end_points_are_exact_whatever_the_vectors(mode, b):
    t = torch.linspace(0, 1, 21)[:, None]
    z = mode(A, b, t)
    assert z.dtype == torch.float32 and z.shape == (21, 100) and z.isfinite().all()
    assert torch.equal(z[0], A) and torch.equal(z[-1], b)
    assert torch.equal(mode(A, b, 0.0), A) and torch.equal(mode(A, b, 1.0), b)
    assert (z - ip.lerp(A, b, t)).norm(dim=1).max() < 1e-6 or b is B  # no turn is the shortest


def test_slerp_of_a_right_angle_and_lerp_are_those_of_the_formulas():
    a, b = torch.tensor([2.0, 0, 0]), torch.tensor([0, 2.0, 0])
    assert torch.allclose(ip.slerp(a, b, 1 / 3), torch.tensor([3**0.5, 1, 0]))
    z = ip.lerp(A, B, torch.linspace(0, 1, 41)[:, None])
    assert torch.allclose(z[10], 0.75 * A + 0.25 * B)
    assert angles(z).max() / angles(z).min() > 1.5 and z[20].norm() < 0.8 * A.norm()  # unlike slerp, see below
    assert torch.equal(ip.slerp(0 * A, B, 0.5), B / 2)
    for mode in ip.MODES.values():  # the report's latents had the shape (1, nz)
        assert torch.equal(mode(A[None], B[None], 0.3), mode(A, B, 0.3)[None])


@pytest.mark.parametrize("b", [B, A + 1e-3 * B, -A + 1e-3 * B])
def test_slerp_turns_at_constant_speed_the_short_way_and_norm_grows_evenly(b):
    t = torch.linspace(0, 1, 41, dtype=torch.float64)[:, None]
    z = ip.slerp(A.double(), b.double(), t)
    steps = angles(z)
    assert steps.max() / steps.min() < 1 + 1e-6
    assert steps.sum() == pytest.approx(angles(torch.stack([A, b])).item(), rel=1e-6)
    assert torch.allclose(z.norm(dim=1), ip.lerp(A.double().norm(), b.double().norm(), t[:, 0]), rtol=1e-9)


def test_path_goes_through_every_seed_and_back_to_the_first(generator):
    z = torch.stack([latent(s, 16) for s in (1, 2, 3)])
    closed = ip.path(z, np.arange(22) / 7)
    assert closed.shape == (22, 16)
    assert torch.equal(closed[[0, 7, 14, 21]], z[[0, 1, 2, 0]])
    assert torch.equal(closed[10], ip.slerp(z[1], z[2], 3 / 7))
    assert torch.equal(ip.path(z, [1.5], "lerp")[0], ip.lerp(z[1], z[2], 0.5))
    opened, positions = ip.route(generator, [1, 2, 3], 4, truncation=0.5)
    assert torch.equal(opened[[0, 4, 8]], 0.5 * z) and np.array_equal(positions, np.arange(9) / 4)


def test_ease_rests_at_each_seed(generator):
    eased = ip.route(generator, [1, 2, 3], 10, ease=True)[1]
    assert np.array_equal(eased[::10], [0, 1, 2])
    steps = np.diff(eased).reshape(2, 10)
    assert np.allclose(steps, steps[:, ::-1]) and np.allclose(steps[0], steps[1])
    assert (np.diff(steps[0, :5]) > 0).all() and steps[0, 0] < 0.3 * steps[0, 4]


@pytest.mark.parametrize("pace", ["latent", "perceptual"])
@pytest.mark.parametrize("seeds", [[1, 2], [1, 2, 3, 4]])
def test_seam_of_a_loop_is_a_step_like_the_others(generator, pace, seeds):
    z, _ = ip.route(generator, seeds, 12, pace=pace, loop=True)
    assert len(z) == 12 * len(seeds)
    steps = ip.step_sizes(generator, torch.cat([z, z[:1]]))
    assert 0 < steps[-1] <= steps[:-1].max() * (ip.EVEN if pace == "perceptual" else 1)


def test_step_sizes_are_root_mean_squares_across_batches(generator, monkeypatch):
    z = torch.stack([latent(s, 16) for s in range(7)])
    x = (ip.faces(generator, z) + 1) * 127.5
    expected = (x[1:] - x[:-1]).square().mean((1, 2, 3)).sqrt().numpy()
    monkeypatch.setattr(ip, "BATCH_ROWS", 3 * 32)
    assert np.allclose(ip.step_sizes(generator, z), expected, rtol=1e-4)


def test_perceptual_pace_inverts_a_known_arc_length_and_refuses_a_still_picture():
    positions, before, after = ip.perceptual_pace(lambda p: np.diff(p**3), np.linspace(0, 2, 101))
    assert np.allclose(positions, 2 * np.linspace(0, 1, 101) ** (1 / 3), atol=0.01)
    assert positions[0] == 0 and positions[-1] == 2 and before > 3.5 and after <= ip.EVEN
    with pytest.raises(UserError, match="never changes"):
        ip.perceptual_pace(lambda p: np.zeros(len(p) - 1), np.linspace(0, 1, 5))


@pytest.mark.parametrize("frames", [4, 40])
def test_perceptual_pace_evens_out_the_steps_of_real_pictures(generator, frames):
    ratios = []
    for pace in ("latent", "perceptual"):
        z, positions = ip.route(generator, [1, 2, 3], frames, mode="lerp", pace=pace)
        assert len(z) == 2 * frames + 1 and (np.diff(positions) > 0).all()
        steps = ip.step_sizes(generator, z)
        ratios.append(steps.max() / np.median(steps))
    assert ratios[1] <= ip.EVEN < 1.1 < ratios[0]


def test_film_shows_the_faces_side_by_side_enlarged_and_labelled(generator):
    z = torch.stack([latent(s, 16) for s in range(6)]).view(3, 2, 16)
    pictures = ip.faces(generator, z.flatten(0, 1)).view(3, 2, 3, 32, 32)
    frames = list(ip.film(generator, z, [["1 > 2", "3 > 4"]] * 3, scale=3))
    for frame, (left, right) in zip(frames, pictures, strict=True):
        assert frame.dtype == np.uint8 and frame.shape[1] == 2 * 3 * 32
        expected = (torch.cat([left, right], 2).permute(1, 2, 0).numpy() + 1) * 127.5
        for dy, dx in ((0, 0), (1, 2), (2, 1)):
            assert np.abs(frame[dy:96:3, dx::3] - expected).max() <= 0.51
        strip = frame[96:]
        assert len(strip) % 2 == 0 and strip.max() > 200 and (strip == 0).mean() > 0.5
        assert not np.array_equal(strip[:, :96], strip[:, 96:])
    below = next(ip.film(generator, z, axis=0))
    assert np.array_equal(below, np.concatenate(np.split(next(ip.film(generator, z)), 2, axis=1)))


def test_film_computes_faces_only_when_they_are_asked_for(generator, monkeypatch):
    batches, faces = [], ip.faces
    monkeypatch.setattr(ip, "faces", lambda g, z: batches.append(len(z)) or faces(g, z))
    next(ip.film(generator, torch.randn(10_000, 1, 16)))
    assert batches == [ip.BATCH_ROWS // 32]


@pytest.mark.parametrize("ending", ["gif", "mp4"])
def test_film_is_written_without_keeping_its_frames(tmp_path, ending):
    frames, living = [], []

    def film():
        for value in range(30):
            frame = np.full((24, 40, 3), value, np.uint8)
            frames.append(weakref.ref(frame))
            living.append(sum(frame() is not None for frame in frames))
            yield frame

    ip.write_film(tmp_path / f"film.{ending}", film(), 25, np.zeros((2, 24, 40, 3), np.uint8))
    assert len(living) == 30 and max(living) <= 3


def test_gif_is_close_to_its_frames_has_one_palette_and_nothing_still_flickers(tmp_path, generator):
    frames = np.stack(list(ip.film(generator, ip.route(generator, [1, 2, 3], 10)[0][:, None])))
    frames[:, :, :16] = frames[0, :, :16]
    ip.write_film(tmp_path / "film.gif", frames, 25, frames[::3])
    shown, _ = read(tmp_path / "film.gif")
    assert shown.shape == frames.shape and np.sqrt(np.square(shown - frames).mean()) < 4
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) <= 256
    assert (shown[:, :, :16] == shown[0, :, :16]).all() and (shown[9, :, 16:] != shown[0, :, 16:]).any()


@pytest.mark.parametrize("fps", [50, 30, 12.5, 7])
def test_gif_keeps_equal_frames_and_the_time_and_repeats_for_ever(tmp_path, fps):
    frames = [np.eye(32, dtype=np.uint8)[:, :, None].repeat(3, 2) * 255] * 40
    ip.write_film(tmp_path / "film.gif", frames, fps, frames[:1])
    _, delays = read(tmp_path / "film.gif")
    assert len(delays) == 40 and min(delays) >= 20
    assert max(delays) - min(delays) <= 10 and sum(delays) == pytest.approx(40_000 / fps, abs=10)
    with Image.open(tmp_path / "film.gif") as image:
        assert image.info["loop"] == 0


def test_mp4_plays_in_a_browser_and_pads_odd_sizes(tmp_path):
    frame = np.zeros((33, 41, 3), np.uint8)
    frame[:, 20:] = 200
    ip.write_film(tmp_path / "film.MP4", [frame] * 21, 30, [])
    with imageio.get_reader(tmp_path / "film.MP4", "FFMPEG") as video:
        about, shown = video.get_meta_data(), video.get_data(0).astype(int)
        assert about["codec"] == "h264" and about["pix_fmt"].startswith("yuv420p") and about["fps"] == 30
        assert about["size"] == (42, 34) and video.count_frames() == 21
    assert np.abs(shown[:33, :41] - frame).mean() < 3
    data = (tmp_path / "film.MP4").read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


def test_webp_keeps_the_pictures_and_the_time(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (7, 8, 10, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2)
    ip.write_film(tmp_path / "film.webp", frames, 30, [])
    shown, delays = read(tmp_path / "film.webp")
    assert len(shown) == 7 and np.abs(shown - frames).mean() < 20 and sum(delays) == pytest.approx(7000 / 30, abs=1)


def test_columns_are_the_morphs_that_each_would_be_alone(tmp_path, model, generator):
    flags = ["--seeds", 1, 2, 3, 4, "--columns", 2, "--frames", 6, "--loop"]
    assert run(model, tmp_path / "strip.PNG", *flags) == run(model, tmp_path / "row.gif", *flags) == 0
    alone = [np.concatenate(list(ip.film(generator, ip.route(generator, seeds, 6, loop=True)[0][:, None])), 1)
             for seeds in ([1, 2], [3, 4])]  # fmt: skip
    strip = np.asarray(Image.open(tmp_path / "strip.PNG")).astype(int)
    assert strip.shape == (64, 12 * 32, 3) and np.abs(strip - np.concatenate(alone)).max() <= 1
    assert read(tmp_path / "row.gif")[0].shape == (12, 32, 64, 3)


def test_label_names_the_seeds_between_which_each_frame_lies(tmp_path, model, monkeypatch):
    captions, film = [], ip.film
    monkeypatch.setattr(ip, "film", lambda g, z, texts, *rest: captions.append(texts) or film(g, z, texts, *rest))
    for more in ([], ["--loop"]):
        assert run(model, tmp_path / "x.gif", "--seeds", 1, 2, 3, "--frames", 2, "--label", "--scale", 4, *more) == 0
    assert [text for (text,) in captions[0]] == ["1 > 2"] * 2 + ["2 > 3"] * 3
    assert [text for (text,) in captions[2]] == ["1 > 2"] * 2 + ["2 > 3"] * 2 + ["3 > 1"] * 2


def test_random_seeds_are_printed_and_give_the_same_film_again(tmp_path, model, capsys):
    assert run(model, tmp_path / "a.gif", "--random", 3, "--frames", 3) == 0
    assert len(seeds := capsys.readouterr().out.split("seeds ")[1].split()) == 3
    assert run(model, tmp_path / "b.gif", "--seeds", *seeds, "--frames", 3) == 0
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()


def test_the_newest_model_is_that_of_the_highest_step_in_the_newest_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = ("0009-old/generator_1200000", "0010-new/generator_999000", "0010-new/generator_1000000",
             "0010-new/checkpoint_1000000", "0010-new/mine", "128px/generator_1300000")  # of --out 128px  # fmt: skip
    for seed, name in enumerate(names):
        Path("runs", name).parent.mkdir(parents=True, exist_ok=True)
        write_model(Path("runs", name + ".pt"), seed)
    Path("latest.pt").write_text("stray")
    whole = Path("runs/0010-new/generator_1000000.pt")
    Path("runs/0010-new/generator_1001000.pt").write_bytes(whole.read_bytes()[:5000])
    for name in ("runs/0010-new", "latest"):
        path, file, generator = ip.open_model(name)
        assert path == whole and torch.equal(generator.linear.weight, file["generator"]["state"]["linear.weight"])
        said = capsys.readouterr()
        assert said.err.count("passed over") == 1 and str(whole) in said.out
    Path("runs/0011-empty").mkdir()  # as Trainloop.py --resume latest, it does not go back to an older run
    (tmp_path / "runs/0012-packed.zip").touch()  # no run
    with pytest.raises(UserError, match="no model in .*0011-empty"):
        ip.open_model("latest")


def test_the_shipped_model_is_found_from_any_folder_and_the_film_lies_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ip.main(["--seeds", "1", "2", "--frames", "1", "--device", "cpu"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["morph.gif"]
    assert read("morph.gif")[0].shape == (2, 256, 256, 3)


REFUSED = [  # flags, and what the error must name
    ("--model latest", "Trainloop.py"), ("--model .", "download_model.py"), ("--model note.txt", "note.txt"),
    ("--seeds 5", "2 seeds"), ("--seeds 5 5", "5 follows itself"), ("--seeds 5 6 5 --loop", "--loop returns"),
    ("--seeds 5 -6", "--seeds: -6"), ("--seeds 1 2 --columns 2", "--columns 2"), ("--random 1", "--random: 1"),
    ("--frames -3", "--frames: -3"), ("--fps nan", "--fps: nan"), ("--fps 51", "at most 50"),
    ("--ease --pace perceptual", "choose one"), ("--device abacus", "--device abacus"), ("--label", "--scale"),
    ("--out .", "--out: ."), ("--out film.avi", ".gif, .mp4"), ("--out nowhere/film.gif", "--out: nowhere/film.gif"),
    ("--scale 64 --columns 100 --random 200", "too many pixels"), ("--frames 3000 --out x.png", "too many pixels"),
    ("--save-tuned x.pt", "--save-tuned x.pt"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "reason"), REFUSED)
def test_what_cannot_be_is_refused_in_one_line_before_a_face_is_computed(tmp_path, monkeypatch, capsys, flags, reason):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ip, "faces", lambda *_: pytest.fail("a face was computed"))
    monkeypatch.setattr(ip, "SHIPPED", write_model(tmp_path / "model.bin"))
    Path("note.txt").write_text("hello")
    assert ip.main(flags.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("Interpolation.py: error: ") and error.count("\n") == 1 and reason in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "note.txt"]


@pytest.mark.parametrize("ending", ["gif", "mp4", "webp", "png"])
@pytest.mark.parametrize("fault", ["diverged", pytest.param("full disk", marks=NOT_ON_WINDOWS)])
def test_what_goes_wrong_leaves_the_old_film_alone_and_is_named(tmp_path, monkeypatch, capsys, ending, fault):
    (film := tmp_path / f"film.{ending}").write_bytes(b"precious")
    if fault == "diverged":
        monkeypatch.setattr(Generator, "forward", lambda self, z: torch.full((len(z), 3, 32, 32), torch.nan))
        assert run(ip.SHIPPED, film) == 2
    else:
        import resource

        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, old[1]))
        try:
            assert run(ip.SHIPPED, film, "--frames", 5) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and (f"film.{ending}" if fault == "full disk" else fault) in error
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(film.name, b"precious")]
