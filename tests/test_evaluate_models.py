import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate_models as ev
from checkpoints import load_generator
from Critic import Critic
from Dataset import draw_face
from Generator import Generator


def write_model(path, step, seed=0, critic=False, size=32, ema_shift=0.0):
    """Write a small model file as Trainloop.py does; `ema_shift` makes the EMA weights differ from the raw ones."""
    torch.manual_seed(seed)
    generator = Generator(nz=16, ngf=8, size=size)
    state = generator.state_dict()
    file = {
        "format": 1,
        "step": step,
        "settings": {
            "size": size,
            "crop": "center",
            "split": "all",
            "nz": 16,
            "data": ["/home/me/a.zip", "data/b.zip"],
        },
        "generator": {"config": generator.config, "state": state},
        "made_by": {
            "command": "python /home/me/Trainloop.py --out ../runs/1",
            "data": {"name": "none", "fingerprint": "0", "images": 1},
        },
    }
    if critic:
        network = Critic(ndf=8, size=size)
        file["critic"] = {"config": network.config, "state": network.state_dict()}
        file["ema"] = {k: v + ema_shift if v.is_floating_point() else v for k, v in state.items()}
    torch.save(file, path)
    return path


def gaussian(count, dim, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


# ---- distances ----


def test_frechet_distance_of_gaussians_has_its_closed_form():
    mu1, mu2 = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([3.0, 1.0, -2.0])
    variances1, variances2 = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 4.0, 1.0])
    expected = 9 + 16 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2  # |mu1 - mu2|^2 + sum of (sigma1 - sigma2)^2
    assert ev.frechet_distance(mu1, variances1.diag(), mu2, variances2.diag()) == pytest.approx(expected, abs=1e-9)


def test_frechet_distance_of_matrices_that_do_not_commute_agrees_with_the_general_square_root():
    a, b = gaussian(50, 6, 1).double(), gaussian(50, 6, 2).double() @ gaussian(6, 6, 3).double()
    (mu1, sigma1), (mu2, sigma2) = ev.moments(a), ev.moments(b)
    trace = torch.linalg.eigvals(sigma1 @ sigma2).sqrt().real.sum()
    expected = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace
    assert not torch.allclose(sigma1 @ sigma2, sigma2 @ sigma1)
    assert ev.frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected.item(), rel=1e-9)
    swapped = ev.frechet_distance(mu2, sigma2, mu1, sigma1)
    assert swapped == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_of_a_set_with_itself_is_zero_even_if_its_covariance_is_singular():
    for count in (20, 500):  # 20 images cannot fill 64 dimensions
        mu, sigma = ev.moments(gaussian(count, 64))
        assert ev.frechet_distance(mu, sigma, mu, sigma) < 1e-6


def test_distances_and_diversity_follow_blur_noise_and_collapse():
    torch.manual_seed(0)
    extractor = ev.MobileNetFeatures().eval()
    images = torch.from_numpy(np.stack([draw_face(i, 32) for i in range(12)])).permute(0, 3, 1, 2)  # (12, 3, 32, 32)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    pool = torch.nn.functional.avg_pool2d

    def measured(images):
        features = ev.features_of([images.clamp(0, 255).byte()], len(images), extractor, "cpu")
        return ev.compare(features[:, ::20], reference, ("F", "K"))  # 64 of the 1280 features: faster

    reference = ev.features_of([images], len(images), extractor, "cpu")[:, ::20]
    same = measured(images.float())
    noisy = [measured(images + sigma * noise)["F"] for sigma in (10, 40)]
    blurred = [measured(pool(images.float(), k, 1, k // 2, count_include_pad=False))["F"] for k in (3, 7)]
    scale = ev.moments(reference)[1].trace().item()
    assert same["F"] < 1e-6 * scale and same["diversity"] == pytest.approx(1)
    assert 1e-3 * scale < noisy[0] < noisy[1]
    assert 1e-3 * scale < blurred[0] < blurred[1]
    assert measured(images[:1].float().repeat(12, 1, 1, 1))["diversity"] < 1e-3


def test_kernel_distance_is_the_unbiased_estimate_over_all_pairs():
    x, y = gaussian(7, 3, 1), gaussian(5, 3, 2) + 1

    def kernel(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    within = [np.mean([kernel(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j]) for s in (x, y)]
    between = np.mean([kernel(a, b) for a in x for b in y])
    assert ev.kernel_distance(x, y) == pytest.approx(sum(within) - 2 * between, rel=1e-5)


def test_kernel_distance_does_not_depend_on_the_number_of_images():
    means = [
        np.mean([ev.kernel_distance(gaussian(n, 4, s), gaussian(n, 4, 1000 + s)) for s in range(200)]) for n in (8, 64)
    ]
    assert abs(means[0]) < 0.15 and abs(means[1]) < 0.05  # both estimate 0: a biased one gives about 2 / n more


def test_torchmetrics_gives_the_same_distances_for_the_same_features():
    image = pytest.importorskip("torchmetrics.image", reason="needs torchmetrics[image]")

    class Pixels(torch.nn.Module):
        num_features = 12

        def forward(self, images):
            return images[:, :, ::2, ::2].flatten(1).float() / 64  # (N, 3, 4, 4) -> (N, 12)

    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 255, (100, 3, 4, 4), generator=generator, dtype=torch.uint8)
    fake = torch.randint(0, 180, (100, 3, 4, 4), generator=generator, dtype=torch.uint8)
    ours = ev.compare(Pixels()(fake), Pixels()(real), ("F", "K"))
    fid = image.fid.FrechetInceptionDistance(feature=Pixels())
    kid = image.kid.KernelInceptionDistance(feature=Pixels(), subsets=1, subset_size=100)
    for metric in (fid, kid):
        metric.update(real, real=True)
        metric.update(fake, real=False)
    assert ours["F"] == pytest.approx(fid.compute().item(), rel=1e-4)
    assert ours["K"] == pytest.approx(1000 * kid.compute()[0].item(), rel=1e-3)


def test_diversity_is_the_ratio_of_the_root_mean_square_pairwise_distances():
    x, y = gaussian(40, 5, 1) * 3, gaussian(30, 5, 2)
    ratio = torch.pdist(x).square().mean().sqrt() / torch.pdist(y).square().mean().sqrt()
    assert ev.compare(x, y, ("F", "K"))["diversity"] == pytest.approx(ratio.item(), rel=1e-5)


# ---- figures ----


def test_smoothing_keeps_a_constant_and_starts_at_the_first_value():
    assert ev.smooth(np.full(50, -2.0)) == pytest.approx(np.full(50, -2.0))
    assert ev.smooth(np.array([5.0, 0.0]), 0.9) == pytest.approx([5.0, 0.1 * 0.9 * 5 / (0.1 * 0.9 + 0.1)])


@pytest.mark.parametrize("low, high", [(-2.31, -1.6), (0, 486282), (-1e-4, 3e-4), (17, 1017)])
def test_ticks_are_round_and_inside(low, high):
    marks = ev.ticks(low, high)
    assert 3 <= len(marks) <= 7 and low <= marks[0] and marks[-1] <= high
    mantissa = np.diff(marks)[0] / 10 ** np.floor(np.log10(np.diff(marks)[0] * 1.0001))
    assert np.abs(mantissa - np.array([1, 2, 5])).min() < 1e-6


def test_curves_lie_where_the_axes_say():
    rising = np.linspace(0, 1, 100)
    page = np.asarray(ev.draw_curves({"a": (rising * 1e4, rising), "b": (rising * 1e4, 1 - rising)}, "t")).astype(int)
    plot = page[52:438, 84:928]
    for colour, low_end in ((ev.LINES[0], 0), (ev.LINES[1], -1)):
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        rows, columns = np.nonzero(np.abs(plot - rgb).sum(2) < 30)
        rows = rows[np.argsort(columns, kind="stable")]
        assert (rows[0] > rows[-1]) == (low_end == 0)  # a rises from the left, b falls


def test_read_scalar_reads_all_points_of_a_run(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        for step in range(10_500):  # more than TensorBoard keeps by default
            writer.add_scalar("loss/critic", -step / 1000, step)
    steps, values = ev.read_scalar(tmp_path, "loss/critic")
    assert len(steps) == 10_500 and values == pytest.approx(-steps / 1000)
    assert len(ev.read_scalar(tmp_path, "nothing")[0]) == 0


def test_a_run_is_read_by_step_with_the_checkpoint_before_the_generator_file(tmp_path):
    for name in ("generator_1000000", "generator_006000", "generator_012000", "checkpoint_1000000"):
        (tmp_path / f"{name}.pt").touch()
    names = [path.stem for path in ev.list_models(tmp_path)]
    assert names == ["generator_006000", "generator_012000", "checkpoint_1000000"]
    (tmp_path / "face.pt").touch()  # as --export names one
    (tmp_path / "face_006000.pt").touch()
    assert [path.stem for path in ev.list_models(tmp_path)] == ["face", "face_006000", *names]
    assert ev.evenly(list(range(100)), 4) == [0, 33, 66, 99] and ev.evenly([1, 2], 0) == [1, 2]
    assert ev.evenly([1, 2, 3], 1) == [3]


def test_folders_of_the_same_name_are_told_apart():
    a, b, c = Path("a/run"), Path("b/run"), Path("c")
    assert ev.name_folders([a, c, a]) == {"run": a, "c": c}
    assert list(ev.name_folders([a, b, c]).values()) == [a, b, c]
    assert list(ev.name_folders([a, b]))[1] == "b-run"


def test_a_shared_file_tells_no_folders():
    words = ["--data=/home/me/x.zip", "/home/me/y z.zip", "../a.zip", "--size", "64", "--lr-g=1e-4", "runs/1"]
    assert ev.without_folders(words) == ["--data=x.zip", "y z.zip", "a.zip", "--size", "64", "--lr-g=1e-4", "runs/1"]


def test_figures_of_a_run_show_the_seeds_at_each_step(tmp_path, monkeypatch):
    run = tmp_path / "0001-a"
    run.mkdir()
    for step in (10, 20, 30):
        write_model(run / f"generator_{step:06d}.pt", step, seed=step)
    out = tmp_path / "out"
    assert ev.main([str(run), "--figures-only", "--out", str(out), "--seeds", "3", "4", "--fps", "2"]) == 0
    grid = np.asarray(Image.open(out / "0001-a_faces.png"))
    faces = ev.seed_faces(run / "generator_000020.pt", [3, 4], "cpu")  # (2, 32, 32, 3)
    cell = np.asarray(Image.fromarray(faces[1]).resize((96, 96), 0))
    left = grid.shape[1] - 3 * 100 + 100
    assert (grid[-100:-4, left : left + 96] == cell).all()  # second row, second column
    assert Image.open(out / "0001-a_faces.gif").n_frames == 3 + 2
    assert not (out / "loss_critic.png").exists()  # no TensorBoard files there


# ---- table, best, export ----

QUICK = ["--data", "drawn", "--quick", "-n", "40", "--features", "mobilenet_v2", "--device", "cpu"]


class Means(torch.nn.Module):
    """A fast extractor: the mean colours of a 4x4 grid, times a weight."""

    def __init__(self, weight=1.0):
        super().__init__()
        self.register_buffer("weight", torch.tensor(weight))

    def forward(self, images):
        return self.weight * torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1)  # (N, 48)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Return a function that runs the whole command on a few drawn faces with a fast extractor, and gives its table."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("Dataset.DRAWN_COUNT", 80)
    monkeypatch.setattr(ev, "load_face_detector", lambda device: None)

    def run(*argv, weight=1.0):
        monkeypatch.setattr(ev, "load_extractor", lambda *_: Means(weight))
        status = ev.main([*map(str, argv), *QUICK, "--cache", "cache"])
        with open("evaluation/models.csv", newline="") as file:
            return status, list(csv.DictReader(file))

    return run


def test_the_table_has_the_floor_first_and_says_how_each_number_came(table, tmp_path, capsys):
    model = write_model(tmp_path / "checkpoint_000005.pt", 5, critic=True)
    status, (floor, row) = table(model)
    text = capsys.readouterr().out
    assert status == 0 and "real images" in floor["model"] and row["step"] == "5"
    assert float(floor["FD-MobileNetV2"]) < float(row["FD-MobileNetV2"])
    assert row["N"] == "40" and row["crop"] == "center" and row["split"] == "all" and row["quick"] == "True"
    assert row["reference images"] == "40" and "224 px" in row["resize"] and row["extractor"][:13] == "mobilenet_v2-"
    assert np.isfinite(float(row[ev.CRITIC])) and row["held out"] == "unknown" and floor[ev.CRITIC] == ""
    assert "FID" not in text and "split all, crop center" in text and "fingerprint" in text
    assert f"{float(row['FD-MobileNetV2']):.3f}*" in text  # --quick marks it


def test_cached_features_are_used_and_other_weights_are_other_features(table, tmp_path):
    model = write_model(tmp_path / "a.pt", 5)
    _, first = table(model)
    files = sorted((tmp_path / "cache").glob("features-*.npy"))
    for file in files:
        np.save(file, np.load(file) + 100)
    _, second = table(model)
    assert float(second[1]["FD-MobileNetV2"]) > float(first[1]["FD-MobileNetV2"]) + 1000
    _, other = table(model, weight=2.0)
    assert len(files) == 2 and len(list((tmp_path / "cache").glob("features-*.npy"))) == 4
    assert float(other[1]["FD-MobileNetV2"]) == pytest.approx(4 * float(first[1]["FD-MobileNetV2"]), rel=1e-3)


def test_mobilenet_takes_its_weights_from_a_file(tmp_path):
    from torchvision.models import mobilenet_v2

    network = mobilenet_v2().eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    extractor = ev.load_extractor("mobilenet_v2", str(tmp_path / "weights.pth"), "cpu")
    images = torch.randint(0, 255, (2, 3, 224, 224), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (images / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        expected = network.features(normalised).mean((2, 3))
        assert (extractor(images) - expected).norm() < 1e-4 * expected.norm()
    again = ev.load_extractor("mobilenet_v2", str(tmp_path / "weights.pth"), "cpu")
    assert ev.weights_hash(again) == ev.weights_hash(extractor) != ev.weights_hash(ev.MobileNetFeatures())


def test_the_critic_gap_is_real_minus_fake():
    class Images:
        def batch(self, indices):
            return torch.full((len(indices), 3, 32, 32), 0.5)

    torch.manual_seed(0)
    critic, generator = Critic(ndf=8, size=32), Generator(nz=16, ngf=8, size=32).eval()
    z = gaussian(8, 16)
    file = {"critic": {"config": critic.config, "state": critic.state_dict()}}
    gap = ev.critic_gap(file, generator, Images(), torch.arange(8), z, "cpu")
    with torch.no_grad():
        expected = critic(Images().batch(range(8))).mean() - critic(generator(z)).mean()
    assert gap == pytest.approx(expected.item(), abs=1e-5)


def test_the_best_is_the_lowest_and_for_the_critic_the_nearest_to_zero():
    rows = [{"FID": 0.0, ev.CRITIC: None}, {"FID": 9.0, ev.CRITIC: -3.0}, {"FID": 7.0, ev.CRITIC: 6.1},
            {"FID": float("nan"), ev.CRITIC: 2.0}]  # fmt: skip
    assert ev.choose_best(rows, "FID")["FID"] == 7.0  # never the floor, never NaN
    assert ev.choose_best(rows, ev.CRITIC)[ev.CRITIC] == 2.0
    with pytest.raises(ValueError, match="--by"):
        ev.choose_best(rows[:1], "FID")


def test_the_best_is_kept_with_its_reason_and_not_overwritten_silently(table, tmp_path, capsys):
    models = [write_model(tmp_path / f"checkpoint_{i:06d}.pt", i, i, True, ema_shift=0.01 * i) for i in (1, 2, 3)]
    status, rows = table(*models, "--by", "fd")
    distances = [float(row["FD-MobileNetV2"]) for row in rows[1:]]
    best, worst = models[int(np.argmin(distances))], models[int(np.argmax(distances))]
    kept, note = tmp_path / "bests/generator_32.pt", json.loads((tmp_path / "bests/generator_32.json").read_text())
    assert status == 0 and note["metric"] == "FD-MobileNetV2" and note["value"] == pytest.approx(min(distances))
    assert note["N"] == 40 and note["protocol"]["quick"] and "--by fd" in note["command"]
    assert note["sha256"] == hashlib.sha256(kept.read_bytes()).hexdigest()
    file = torch.load(kept, weights_only=True)
    assert set(file) == {"format", "step", "settings", "generator", "made_by"}
    ema = torch.load(best, weights_only=True)["ema"]
    for key in ema:
        torch.testing.assert_close(file["generator"]["state"][key].to(ema[key].dtype), ema[key], rtol=1e-3, atol=1e-6)

    before = kept.read_bytes()
    assert table(worst, "--by", "fd")[0] == 2 and "stays" in capsys.readouterr().err
    assert table(worst, "--by", "fd", "--seed", 1)[0] == 2 and "another way" in capsys.readouterr().err
    kept.with_suffix(".json").unlink()
    assert table(worst, "--by", "fd")[0] == 2 and kept.read_bytes() == before
    assert table(worst, "--by", "fd", "--force")[0] == 0
    assert json.loads(kept.with_suffix(".json").read_text())["row"]["model"] == str(worst)
    assert table(best, "--by", "fd")[0] == 0  # a better one replaces it
    assert json.loads(kept.with_suffix(".json").read_text())["row"]["model"] == str(best)


def test_export_writes_a_generator_a_sum_and_a_card(tmp_path, capsys):
    model = write_model(tmp_path / "checkpoint_000005.pt", 5, critic=True, ema_shift=0.5)
    target = tmp_path / "face.pt"
    assert ev.main([str(model), "--export", str(target)]) == 0
    digest, name = (tmp_path / "face.pt.sha256").read_text().split()
    assert name == "face.pt" and digest == hashlib.sha256(target.read_bytes()).hexdigest()
    assert digest in (tmp_path / "face.md").read_text()
    z = gaussian(2, 16)
    faces = [ev.to_uint8(load_generator(path)(z)).int() for path in (target, model)]
    assert (faces[0] - faces[1]).abs().max() <= 1  # half precision
    assert target.stat().st_size < 0.6 * sum(t.nbytes for t in load_generator(model).state_dict().values())
    file = torch.load(target, weights_only=True)
    assert "critic" not in file and file["settings"]["data"] == ["a.zip", "data/b.zip"]
    assert (
        file["made_by"]["command"] == "python Trainloop.py --out 1"
        and "/home" not in (tmp_path / "face.md").read_text()
    )
    before = target.read_bytes()
    assert ev.main([str(model), "--export", str(target)]) == 2 and "--force" in capsys.readouterr().err
    assert target.read_bytes() == before


@pytest.mark.parametrize(
    "argv, named",
    [
        (["nothing.pt"], "nothing.pt"),
        (["empty"], "empty"),
        (["torn.pt", "--figures-only"], "torn.pt"),
        (["a.pt", "-n", "2047"], "--samples 2047"),
        (["a.pt", "--by", "fid", "--features", "mobilenet_v2"], "--by fid"),
        (["a.pt", "--by", "fd"], "--by fd"),
        (["a.pt", "--features", "mobilenet_v2", "--weights", "none.pth"], "--weights none.pth"),
        (["a.pt", "--features", "mobilenet_v2", "--weights", "a.pt"], "--weights a.pt"),
        (["a.pt", "--seeds", "-1"], "seed -1"),
        (["a.pt", "--figures-only", "--by", "critic"], "--by critic"),
        (["a.pt", "a.pt", "--export", "b.pt"], "--export b.pt"),
        (["a.pt", "--export", "no/b.pt"], "--export no"),
        (["a.pt", "--export", "empty"], "--export empty"),
        (["a.pt", "--fps", "0"], "--fps 0"),
    ],
)
def test_bad_input_is_refused_in_one_line_before_anything_is_written(argv, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "a.pt", 1)
    (tmp_path / "torn.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:1000])
    (tmp_path / "empty").mkdir()
    assert ev.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("evaluate_models.py: error: ") and named in error and error.count("\n") == 1
    assert not any(path.is_file() for path in tmp_path.rglob("*") if path.name not in ("a.pt", "torn.pt"))


def test_too_little_data_and_overlapping_splits_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("Dataset.DRAWN_COUNT", 50)
    base = ["a.pt", "--data", "drawn", "--cache", str(tmp_path)]
    with pytest.raises(ValueError, match="25 images as reference and 25"):
        ev.choose_real(ev.parse(base), 32)
    with pytest.raises(ValueError, match="--floor-split train: shares"):
        ev.choose_real(ev.parse([*base, "--quick", "--floor-split", "train"]), 32)
    (_, reference), (_, floor) = ev.choose_real(ev.parse([*base, "--quick"]), 32)
    assert not set(reference.tolist()) & set(floor.tolist()) and len(reference) == len(floor) == 25


def test_face_shares_count_one_none_and_several():
    shares = ev.face_shares([None, None], lambda batch: [1, 0, 2, 1])
    assert shares == {"one face %": 50.0, "none %": 25.0, "several %": 25.0}
    assert ev.face_shares([None], None) == {}
