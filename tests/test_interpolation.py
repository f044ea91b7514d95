import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import Interpolation as ip
from checkpoints import load_generator
from command_line import UserError
from Generator import Generator, latent


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
        frames, delays = [], []
        for k in range(image.n_frames):
            image.seek(k)
            frames.append(np.asarray(image.convert("RGB")))
            delays.append(image.info["duration"])
    return np.stack(frames).astype(int), delays


def angles(vectors):
    unit = vectors.double() / vectors.double().norm(dim=1, keepdim=True)
    return 2 * torch.atan2((unit[1:] - unit[:-1]).norm(dim=1), (unit[1:] + unit[:-1]).norm(dim=1))


# ---- lerp and slerp ----

A, B = latent(147), latent(244)


@pytest.mark.parametrize("mode", ip.MODES.values())
@pytest.mark.parametrize("b", [B, A, 3 * A, -A, -2 * A, A + 1e-9, torch.zeros(100)])
def test_end_points_are_exact_whatever_the_vectors(mode, b):
    t = torch.linspace(0, 1, 21)[:, None]
    z = mode(A, b, t)
    assert z.dtype == torch.float32 and z.shape == (21, 100) and z.isfinite().all()
    assert torch.equal(z[0], A) and torch.equal(z[-1], b)
    assert torch.equal(mode(A, b, 0.0), A) and torch.equal(mode(A, b, 1.0), b)


def test_slerp_of_a_right_angle_and_lerp_are_those_of_the_formulas():
    a, b = torch.tensor([2.0, 0, 0]), torch.tensor([0, 2.0, 0])
    assert torch.allclose(ip.slerp(a, b, 1 / 3), torch.tensor([3**0.5, 1, 0]))
    assert torch.allclose(ip.lerp(A, B, 0.25), 0.75 * A + 0.25 * B)
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


def test_lerp_has_neither():
    z = ip.lerp(A, B, torch.linspace(0, 1, 41)[:, None])
    assert angles(z).max() / angles(z).min() > 1.5 and z[20].norm() < 0.8 * A.norm()


@pytest.mark.parametrize(("a", "b"), [(A, 2 * A), (A, -A), (0 * A, A), (A, 0 * A), (A[:1], -A[:1])])
def test_slerp_where_no_turn_is_the_shortest_is_lerp(a, b):
    t = torch.linspace(0, 1, 11)[:, None]
    assert torch.equal(ip.slerp(a, b, t), ip.lerp(a, b, t))


# ---- the path ----


def test_path_goes_through_every_seed_and_back_to_the_first():
    z = torch.stack([latent(s) for s in (1, 2, 3)])
    closed = ip.path(z, ip.latent_pace(transitions=3, frames=7))
    assert closed.shape == (22, 100)
    assert torch.equal(closed[[0, 7, 14, 21]], z[[0, 1, 2, 0]])
    assert torch.equal(closed[10], ip.slerp(z[1], z[2], 3 / 7))
    assert torch.equal(ip.path(z, [1.5], "lerp")[0], ip.lerp(z[1], z[2], 0.5))


def test_ease_rests_at_each_seed():
    even, eased = ip.latent_pace(2, 10), ip.latent_pace(2, 10, ease=True)
    assert np.array_equal(eased[::10], [0, 1, 2]) and np.array_equal(even, np.arange(21) / 10)
    steps = np.diff(eased).reshape(2, 10)
    assert np.allclose(steps, steps[:, ::-1]) and np.allclose(steps[0], steps[1])
    assert (np.diff(steps[0, :5]) > 0).all() and steps[0, 0] < 0.3 * steps[0, 4]


def test_open_film_ends_with_the_last_seed_and_truncation_scales(generator):
    z, positions = ip.route(generator, [1, 2, 3], 4, truncation=0.5)
    assert z.shape == (9, 16) and np.array_equal(positions, np.arange(9) / 4)
    assert torch.equal(z[[0, 4, 8]], 0.5 * torch.stack([latent(s, 16) for s in (1, 2, 3)]))


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


def test_perceptual_pace_inverts_a_known_arc_length():
    positions, before, after = ip.perceptual_pace(lambda p: np.diff(p**3), np.linspace(0, 2, 101))
    assert np.allclose(positions, 2 * np.linspace(0, 1, 101) ** (1 / 3), atol=0.01)
    assert positions[0] == 0 and positions[-1] == 2
    assert before > 3.5 and after <= ip.EVEN


@pytest.mark.parametrize("frames", [4, 40])
def test_perceptual_pace_evens_out_the_steps_of_real_pictures(generator, frames):
    ratios = []
    for pace in ("latent", "perceptual"):
        z, positions = ip.route(generator, [1, 2, 3], frames, mode="lerp", pace=pace)
        assert len(z) == 2 * frames + 1 and (np.diff(positions) > 0).all()
        steps = ip.step_sizes(generator, z)
        ratios.append(steps.max() / np.median(steps))
    assert ratios[1] <= ip.EVEN < 1.1 < ratios[0]


def test_perceptual_pace_of_a_still_picture_is_refused():
    with pytest.raises(UserError, match="never changes"):
        ip.perceptual_pace(lambda p: np.zeros(len(p) - 1), np.linspace(0, 1, 5))


# ---- the film ----


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
    batches = []
    faces = ip.faces
    monkeypatch.setattr(ip, "faces", lambda g, z: batches.append(len(z)) or faces(g, z))
    frames = ip.film(generator, torch.randn(10_000, 1, 16))
    next(frames)
    assert batches == [ip.BATCH_ROWS // 32]


def noise(count, height=24, width=40):
    """Frames whose left half never changes."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    frames[:, :, : width // 2] = frames[0, :, : width // 2]
    return list(frames)


@pytest.mark.parametrize("ending", ["gif", "mp4"])
def test_film_is_written_without_keeping_its_frames(tmp_path, ending):
    living, most = weakref.WeakSet(), 0

    class Frame(np.ndarray):
        __hash__ = object.__hash__

    def frames():
        nonlocal most
        for frame in noise(30):
            frame = frame.copy().view(Frame)
            living.add(frame)
            most = max(most, len(living))
            yield frame

    ip.write_film(tmp_path / f"film.{ending}", frames(), 25, noise(2))
    assert most <= 3


def test_gif_has_one_palette_and_nothing_still_flickers(tmp_path):
    ip.write_film(tmp_path / "film.gif", noise(12), 25, noise(12))
    frames, _ = read(tmp_path / "film.gif")
    assert len(frames) == 12 and len(np.unique(frames.reshape(-1, 3), axis=0)) <= 256
    assert (frames[:, :, :20] == frames[0, :, :20]).all() and (frames[1, :, 20:] != frames[0, :, 20:]).any()


def test_gif_is_close_to_its_frames(tmp_path, generator):
    z, _ = ip.route(generator, [1, 2, 3], 10)
    frames = list(ip.film(generator, z[:, None]))
    ip.write_film(tmp_path / "film.gif", frames, 25, frames[::3])
    assert np.sqrt(np.square(read(tmp_path / "film.gif")[0] - frames).mean()) < 4


@pytest.mark.parametrize("fps", [50, 30, 12.5, 7])
def test_gif_keeps_equal_frames_and_the_time_and_repeats_for_ever(tmp_path, fps):
    frames = [noise(1)[0]] * 40
    ip.write_film(tmp_path / "film.gif", frames, fps, frames[:1])
    _, delays = read(tmp_path / "film.gif")
    assert len(delays) == 40 and min(delays) >= 20
    assert max(delays) - min(delays) <= 10 and sum(delays) == pytest.approx(40_000 / fps, abs=10)
    with Image.open(tmp_path / "film.gif") as image:
        assert image.info["loop"] == 0


def test_mp4_plays_in_a_browser(tmp_path, model):
    import imageio.v2 as imageio

    assert run(model, tmp_path / "film.mp4", "--seeds", 1, 2, "--frames", 20, "--fps", 30) == 0
    with imageio.get_reader(tmp_path / "film.mp4") as video:
        about = video.get_meta_data()
        assert about["codec"] == "h264" and about["pix_fmt"].startswith("yuv420p") and about["fps"] == 30
        assert about["size"] == (32, 32) and video.count_frames() == 21
    data = (tmp_path / "film.mp4").read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


def test_mp4_pads_odd_sizes_and_keeps_the_pixels(tmp_path):
    import imageio.v2 as imageio

    frame = np.zeros((33, 41, 3), np.uint8)
    frame[:, 20:] = 200
    ip.write_film(tmp_path / "film.MP4", [frame] * 5, 25, [])
    with imageio.get_reader(tmp_path / "film.MP4", "FFMPEG") as video:
        shown = video.get_data(0).astype(int)
    assert shown.shape == (34, 42, 3) and np.abs(shown[:33, :41] - frame).mean() < 3


def test_webp_keeps_the_pictures_and_the_time(tmp_path):
    frames = [np.kron(frame, np.ones((4, 4, 1), np.uint8)) for frame in noise(7, 8, 10)]
    ip.write_film(tmp_path / "film.webp", frames, 30, [])
    shown, delays = read(tmp_path / "film.webp")
    assert len(shown) == 7 and np.abs(shown - frames).mean() < 20 and sum(delays) == pytest.approx(7000 / 30, abs=1)


def test_strip_shows_all_frames_from_left_to_right(tmp_path, model, generator):
    assert run(model, tmp_path / "strip.PNG", "--seeds", 1, 2, "--frames", 5) == 0
    z, _ = ip.route(generator, [1, 2], 5)
    expected = np.concatenate(list(ip.film(generator, z[:, None])), 1).astype(int)
    assert np.abs(np.asarray(Image.open(tmp_path / "strip.PNG")) - expected).max() <= 1


def test_columns_are_the_morphs_that_each_would_be_alone(tmp_path, model):
    shown = []
    for name, *seeds in (("both.png", 1, 2, 3, 4), ("first.png", 1, 2), ("second.png", 3, 4), ("row.gif", 1, 2, 3, 4)):
        flags = ["--columns", len(seeds) // 2, "--frames", 6, "--loop", "--pace", "perceptual"]
        assert run(model, tmp_path / name, "--seeds", *seeds, *flags) == 0
        shown.append(np.asarray(Image.open(tmp_path / name).convert("RGB")).astype(int))
    both, first, second, _ = shown
    assert both.shape == (64, 12 * 32, 3) and np.abs(both - np.concatenate([first, second])).max() <= 1
    assert read(tmp_path / "row.gif")[0].shape == (12, 32, 64, 3)


def test_label_names_the_seeds_between_which_each_frame_lies(tmp_path, model, monkeypatch):
    captions = []
    film = ip.film
    monkeypatch.setattr(ip, "film", lambda g, z, texts, *rest: captions.append(texts) or film(g, z, texts, *rest))
    flags = ["--seeds", 1, 2, 3, "--frames", 2, "--label", "--scale", 4]
    assert run(model, tmp_path / "open.gif", *flags) == 0 and run(model, tmp_path / "loop.gif", *flags, "--loop") == 0
    assert [text for (text,) in captions[0]] == ["1 > 2"] * 2 + ["2 > 3"] * 3
    assert [text for (text,) in captions[2]] == ["1 > 2"] * 2 + ["2 > 3"] * 2 + ["3 > 1"] * 2


def test_random_seeds_are_printed_and_give_the_same_film_again(tmp_path, model, capsys):
    assert run(model, tmp_path / "a.gif", "--random", 3, "--frames", 3) == 0
    seeds = capsys.readouterr().out.split("seeds ")[1].split()
    assert len(set(seeds)) == 3
    assert run(model, tmp_path / "b.gif", "--seeds", *seeds, "--frames", 3) == 0
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()


# ---- which model ----


def test_folder_gives_its_newest_model_and_passes_over_torn_ones(tmp_path, capsys):
    write_model(tmp_path / "generator_999000.pt", seed=1)
    write_model(tmp_path / "checkpoint_1000000.pt", seed=2)
    expected = load_generator(write_model(tmp_path / "generator_1000000.pt", seed=2))
    (tmp_path / "generator_1001000.pt").write_bytes((tmp_path / "generator_999000.pt").read_bytes()[:5000])
    assert torch.equal(ip.load_model(str(tmp_path)).linear.weight, expected.linear.weight)
    said = capsys.readouterr()
    assert "generator_1001000.pt" in said.err and "generator_1000000.pt" in said.out


def test_latest_is_the_newest_run_that_has_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # 128px: of --out runs/128px, so it has no number
    for seed, name in enumerate(("0009-old/generator_900000", "0010-new/generator_000100", "128px/generator_000300")):
        Path("runs", name).parent.mkdir(parents=True)
        write_model(Path("runs", name + ".pt"), seed)
    for name in ("0011-empty", "0012-torn"):
        Path("runs", name).mkdir()
    Path("runs/0012-torn/generator_000100.pt").write_bytes(b"torn")
    expected = load_generator("runs/0010-new/generator_000100.pt")
    assert torch.equal(ip.load_model("latest").linear.weight, expected.linear.weight)
    assert str(Path("runs/0010-new")) in capsys.readouterr().out


def test_the_shipped_model_is_found_from_any_folder_and_the_film_lies_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ip.main(["--seeds", "1", "2", "--frames", "1", "--device", "cpu"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["morph.gif"]
    assert read("morph.gif")[0].shape == (2, 128, 128, 3)


# ---- refusals ----


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--model", "latest"], "Trainloop.py"),
        (["--model", "."], "download_model.py"),
        (["--model", "nowhere.pt"], "nowhere.pt"),
        (["--model", __file__], "test_interpolation.py"),
        (["--seeds", "5"], "2 seeds"),
        (["--seeds", "5", "5"], "5 follows itself"),
        (["--seeds", "5", "6", "5", "--loop"], "--loop returns"),
        (["--random", "9", "--columns", "2"], "--columns 2"),
        (["--seeds", "1", "2", "--columns", "2"], "--columns 2"),
        (["--random", "1"], "--random 1"),
        (["--columns", "0"], "--columns 0"),
        (["--frames", "-3"], "--frames -3"),
        (["--fps", "nan"], "--fps nan"),
        (["--fps", "51"], "from 0.1 to 50"),
        (["--fps", "inf", "--out", "x.mp4"], "--fps inf"),
        (["--truncation", "0"], "--truncation 0"),
        (["--ease", "--pace", "perceptual"], "choose one"),
        (["--out", "."], "--out ."),
        (["--out", "film.avi"], ".gif, .mp4"),
        (["--out", "nowhere/film.gif"], "no folder nowhere"),
        (["--device", "abacus"], "--device abacus"),
        (["--seeds", "5", "-6"], "seed -6"),
        (["--seeds", "5", str(2**32)], "seed 4294967296"),
        (["--scale", "64", "--columns", "100", "--random", "200"], "too many pixels"),
        (["--frames", "3000", "--out", "x.png"], "too many pixels"),
        (["--label"], "--scale"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_before_a_face_is_computed(tmp_path, monkeypatch, capsys, flags, reason):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ip, "faces", lambda *_: pytest.fail("a face was computed"))
    monkeypatch.setattr(ip, "SHIPPED", write_model(tmp_path / "model.bin"))
    assert ip.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("Interpolation.py: error: ") and error.count("\n") == 1 and reason in error
    assert [path.name for path in tmp_path.iterdir()] == ["model.bin"]


@pytest.mark.parametrize("ending", ["gif", "mp4", "webp", "png"])
def test_diverged_model_leaves_the_old_film_alone(tmp_path, monkeypatch, capsys, ending):
    model = write_model(tmp_path / "model.pt")
    monkeypatch.setattr(Generator, "forward", lambda self, z: torch.full((len(z), 3, 32, 32), torch.nan))
    (tmp_path / f"film.{ending}").write_bytes(b"precious")
    assert run(model, tmp_path / f"film.{ending}") == 2
    assert "diverged" in capsys.readouterr().err
    assert (tmp_path / f"film.{ending}").read_bytes() == b"precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"film.{ending}", "model.pt"]
