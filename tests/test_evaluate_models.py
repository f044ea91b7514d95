import csv
import hashlib
import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoints
import evaluate_models as ev
import metrics
import pictures
from command_line import UserError
from Critic import Critic
from Generator import Generator, to_uint8


def write_model(path, step, seed=0, critic=False, ema_shift=0.0, **changes):
    """Write a small model file as Trainloop.py does; `ema_shift` makes the EMA weights differ from the raw ones."""
    torch.manual_seed(seed)
    generator = Generator(nz=16, ngf=8, size=32)
    state = generator.state_dict()
    settings = {"crop": "center", "split": "all", "data": ["/home/me/a.zip", "data/b.zip"], "out": "/home/me"}
    command = "python Trainloop.py --data c.zip --out=1"
    made_by = {"command": command, "data": {"name": "none", "fingerprint": "0", "images": 1}}
    file = {"format": 1, "step": step, "settings": settings, "made_by": made_by}
    file["generator"] = {"config": generator.config, "state": state}
    if critic:
        network = Critic(ndf=8, size=32)
        file["critic"] = {"config": network.config, "state": network.state_dict()}
        file["ema"] = {k: v + ema_shift if v.is_floating_point() else v for k, v in state.items()}
    torch.save(file | changes, path)
    return path


def test_smoothing_keeps_a_constant_and_starts_at_the_first_value():
    assert pictures.smooth(np.full(50, -2.0)) == pytest.approx(np.full(50, -2.0))
    assert pictures.smooth(np.array([5.0, 0.0]), 0.9) == pytest.approx([5.0, 0.1 * 0.9 * 5 / (0.1 * 0.9 + 0.1)])


def test_a_runs_curve_is_read_whole_and_plotted_where_matplotlib_is(tmp_path, monkeypatch, capsys):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        for step in range(10_500):  # more than TensorBoard keeps by default
            writer.add_scalar("loss/critic", -step / 1000, step)
        writer.add_scalar("loss/critic", float("nan"), 10_500)
    steps, values = pictures.read_scalar(tmp_path, "loss/critic")
    assert len(steps) == 10_500 and values == pytest.approx(-steps / 1000)
    assert len(pictures.read_scalar(tmp_path, "nothing")[0]) == 0
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    pictures.plot_curves({"a": tmp_path}, "loss/critic", tmp_path / "a.png")
    assert "pip install matplotlib" in capsys.readouterr().out and not (tmp_path / "a.png").exists()
    monkeypatch.undo()
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    pictures.plot_curves({"a": tmp_path}, "loss/critic", tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").width == 960


def test_models_are_listed_by_step_checkpoints_before_generators_and_runs_told_apart(tmp_path):
    for name in ("generator_1000000", "generator_006000", "generator_012000", "checkpoint_1000000"):
        (tmp_path / f"{name}.pt").touch()
    names = [path.stem for path in checkpoints.list_models(tmp_path)]
    assert names == ["generator_006000", "generator_012000", "checkpoint_1000000"]
    others = ["face", "generator_128", "mine_20240101"]  # numbers that are no steps
    for name in others:
        (tmp_path / f"{name}.pt").touch()
    assert [path.stem for path in checkpoints.list_models(tmp_path)] == [*others, *names]
    assert pictures.evenly(list(range(100)), 4) == [0, 33, 66, 99] and pictures.evenly([1, 2], 0) == [1, 2]
    assert pictures.evenly([1, 2, 3], 1) == [3]
    a, b, c = Path("a/run"), Path("b/run"), Path("c")
    assert ev.name_folders([a, c, a]) == {"run": a, "c": c}
    assert ev.name_folders([a, b]) == {"a-run": a, "b-run": b}


def test_pictures_of_a_run_show_the_seeds_at_each_step(tmp_path, monkeypatch):
    run, out, reads = tmp_path / "0001-a", tmp_path / "out", []
    run.mkdir()
    for step in (10, 20, 30):
        write_model(run / f"generator_{step:06d}.pt", step, seed=step)
    monkeypatch.setattr(ev, "read_model_file", lambda path: reads.append(path) or checkpoints.read_model_file(path))
    assert ev.main([str(run), "--figures-only", "--out", str(out), "--seeds", "3", "4", "--fps", "2"]) == 0
    assert len(reads) == 3  # each file once
    grid = np.asarray(Image.open(out / "0001-a_faces.png"))
    generator = checkpoints.load_generator(run / "generator_000020.pt")
    face = pictures.seed_faces(generator, [3, 4])[1].permute(1, 2, 0).numpy()  # (32, 32, 3)
    cell = np.asarray(Image.fromarray(face).resize((96, 96), 0))
    assert (grid[-98:-2, -196:-100] == cell).all()  # second row, second of three columns
    assert Image.open(out / "0001-a_faces.gif").n_frames == 3 + 2
    assert not (out / "loss_critic.png").exists()  # no TensorBoard files there


QUICK = ["--data", "drawn", "--quick", "-n", "40", "--features", "mobilenet_v2", "--device", "cpu", "--cache", "cache"]


class Means(torch.nn.Module):
    """A fast extractor: the mean colours of a 4x4 grid."""

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1)  # (N, 48)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Return a function that runs the whole command on a few drawn faces with a fast extractor, and gives its table."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("Dataset.DRAWN_COUNT", 80)
    monkeypatch.setattr(metrics, "load_face_detector", lambda device: None)
    monkeypatch.setattr(metrics, "load_extractor", lambda *_: Means())

    def run(*argv):
        status = ev.main([*map(str, argv), *QUICK])
        with open("evaluation/models.csv", newline="") as file:
            return status, list(csv.DictReader(file))

    return run


def test_the_table_has_the_floor_first_and_says_how_each_number_came(table, tmp_path, capsys):
    models = write_model(tmp_path / "checkpoint_000005.pt", 5, critic=True), write_model(tmp_path / "a.pt", None)
    status, (floor, row, other) = table(*models)
    text = capsys.readouterr().out
    assert status == 0 and "real images" in floor["model"] and row["step"] == "5" and other["step"] == ""
    assert float(floor["FD-MobileNetV2"]) < float(row["FD-MobileNetV2"])
    assert row["N"] == "40" and row["crop"] == "center" and row["split"] == "all" and row["quick"] == "True"
    assert row["reference images"] == "40" and "224 px" in row["resize"] and row["extractor"][:13] == "mobilenet_v2-"
    assert np.isfinite(float(row[ev.CRITIC])) and floor[ev.CRITIC] == other[ev.CRITIC] == ""
    assert row["held out"] == other["held out"] == "unknown"
    assert "FID" not in text and "split all, crop center" in text and "fingerprint" in text
    assert f"{float(row['FD-MobileNetV2']):.3f}*" in text  # --quick marks it
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix not in (".u8", ".json")]


@pytest.mark.parametrize(
    ("settings", "fingerprint", "expected"),
    [
        ({"split": "train"}, "other", "yes"), ({"split": "all"}, "other", "unknown"), ({"split": "val"}, "same", "no"),
        ({"split": "train", "grow_from": "x.pt"}, "other", "unknown"),  # nothing tells what that one has seen
    ],
)  # fmt: skip
def test_held_out_is_claimed_only_of_what_is_known(settings, fingerprint, expected):
    data = SimpleNamespace(split="val", fingerprint="same")
    assert ev.held_out({"settings": settings, "made_by": {"data": {"fingerprint": fingerprint}}}, data) == expected


def test_the_best_is_the_lowest_and_for_the_critic_the_nearest_to_zero():
    rows = [{"FID": 0.0, ev.CRITIC: None}, {"FID": 9.0, ev.CRITIC: -3.0}, {"FID": 7.0, ev.CRITIC: 6.1},
            {"FID": float("nan"), ev.CRITIC: 2.0}]  # fmt: skip
    assert ev.choose_best(rows, "FID")["FID"] == 7.0  # never the floor, never NaN
    assert ev.choose_best(rows, ev.CRITIC)[ev.CRITIC] == 2.0
    assert ev.choose_best(rows[:1], "FID") is None


def test_the_best_is_kept_with_its_reason_and_not_overwritten_silently(table, tmp_path, capsys):
    models = [write_model(tmp_path / f"checkpoint_{i:06d}.pt", i, i, True, ema_shift=0.01 * i) for i in (1, 2, 3)]
    status, rows = table(*models, "--by", "fd")
    distances = [float(row["FD-MobileNetV2"]) for row in rows[1:]]
    best, worst = models[int(np.argmin(distances))], models[int(np.argmax(distances))]
    kept, note = tmp_path / "bests/generator_32.pt", json.loads((tmp_path / "bests/generator_32.json").read_text())
    assert status == 0 and note["metric"] == "FD-MobileNetV2" and note["value"] == pytest.approx(min(distances))
    assert note["N"] == 40 and note["protocol"]["quick"] and "--by fd" in note["command"]
    assert note["sha256"] == hashlib.sha256(kept.read_bytes()).hexdigest()
    file, ema = torch.load(kept, weights_only=True), torch.load(best, weights_only=True)["ema"]
    assert set(file) == {"format", "step", "settings", "generator", "made_by"}
    for key in ema:
        torch.testing.assert_close(file["generator"]["state"][key].to(ema[key].dtype), ema[key], rtol=1e-3, atol=1e-6)

    before = kept.read_bytes()
    assert table(worst, "--by", "fd")[0] == 2 and "stays" in capsys.readouterr().err
    assert table(worst, "--by", "fd", "--seed", 1)[0] == 2 and "another way" in capsys.readouterr().err
    text = kept.with_suffix(".json").read_text()
    torn = text.replace(note["sha256"], "0" * 64)  # what a kill leaves
    wrong = [text.replace('"N"', '"n"'), text.replace('"metric": "', '"metric": "' + 99 * "9")]
    for spoiled in (torn, "[" * 100_000, "\udca5" + text, "[]", *wrong):
        kept.with_suffix(".json").write_text(spoiled, errors="surrogateescape")
        assert table(worst, "--by", "fd")[0] == 2 and "generator_32.json: damaged" in capsys.readouterr().err
    kept.with_suffix(".json").unlink()
    assert table(worst, "--by", "fd")[0] == 2 and kept.read_bytes() == before
    assert table(worst, "--by", "fd", "--force")[0] == 0
    assert json.loads(kept.with_suffix(".json").read_text())["row"]["model"] == str(worst)
    assert table(best, "--by", "fd")[0] == 0  # a better one replaces it
    assert json.loads(kept.with_suffix(".json").read_text())["row"]["model"] == str(best)


def test_export_writes_a_generator_a_sum_and_a_card_or_nothing(tmp_path, capsys):
    model = write_model(tmp_path / "checkpoint_000005.pt", 5, critic=True, ema_shift=0.5)
    note, target = model.with_suffix(".json"), tmp_path / "face.pt"
    for spoiled in (b"\xa5{}", b"{", b"[{}]", b"[" * 100_000, b'{"metric": "F", "value": [1], "N": 2, "protocol": {}}'):
        note.write_bytes(spoiled)
        assert ev.main([str(model), "--export", str(target)]) == 2
        assert f"{note}: damaged" in capsys.readouterr().err and not [*tmp_path.glob("*face*")]
    note.write_text('{"metric": "F", "value": 1.5, "N": 2000, "protocol": {"size": 32}}')
    assert ev.main([str(model), "--export", str(target)]) == 0
    digest, name = (tmp_path / "face.pt.sha256").read_text().split()
    card = (tmp_path / "face.md").read_text()
    assert name == "face.pt" and digest == hashlib.sha256(target.read_bytes()).hexdigest() and digest in card
    assert "F: 1.500 (N 2,000, size 32)" in card and "/home" not in card
    z = torch.randn(2, 16)
    faces = [to_uint8(checkpoints.load_generator(path)(z)).int() for path in (target, model)]
    assert (faces[0] - faces[1]).abs().max() <= 1  # half precision
    assert target.stat().st_size < 0.6 * sum(t.nbytes for t in checkpoints.load_generator(model).state_dict().values())
    file = torch.load(target, weights_only=True)
    assert "critic" not in file and file["settings"]["data"] == ["a.zip", "b.zip"] and "out" not in file["settings"]
    assert file["made_by"]["command"] == "python Trainloop.py --data c.zip --out=1"
    before, whole = target.read_bytes(), model.read_bytes()
    assert ev.main([str(model), "--export", str(target)]) == 2 and "--force" in capsys.readouterr().err
    assert ev.main([str(model), "--export", str(model), "--force"]) == 2  # it would lose the critic
    assert target.read_bytes() == before and model.read_bytes() == whole


def test_odd_settings_are_exported_as_they_are_or_refused_by_name(tmp_path, capsys):
    odd = {"settings": {"size": 1j, 5: [2]}, "made_by": {"command": ["a"]}}
    assert ev.main([str(write_model(tmp_path / "a.pt", 5, **odd)), "--export", str(tmp_path / "b.pt")]) == 0
    assert torch.load(tmp_path / "b.pt", weights_only=True)["settings"] == odd["settings"]
    for odd in ({"settings": 3}, {"made_by": []}, {"step": "x"}):
        assert (
            ev.main([str(write_model(tmp_path / "a.pt", **({"step": 5} | odd))), "--export", str(tmp_path / "c.pt")])
            == 2
        )
        assert f"a.pt is damaged: its {next(iter(odd))}" in capsys.readouterr().err and not [*tmp_path.glob("*c.*")]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("nothing.pt", "nothing.pt"), ("empty", "empty"), ("torn.pt --figures-only", "torn.pt"), ("''", "models: the"),
        ("a.pt -n 2047", "--samples 2047"), ("a.pt --by fid --features mobilenet_v2", "--by fid"),
        ("a.pt --features mobilenet_v2 --weights none.pth", "--weights none.pth"),
        ("a.pt --features mobilenet_v2 --weights a.pt", "--weights a.pt"), ("a.pt --fps 0", "--fps: 0"),
        ("a.pt --seeds -1 --figures-only", "--seeds: -1"), ("a.pt --figures-only --by critic", "--by critic"),
        ("a.pt --split val --floor-split val", "--floor-split val: shares"), ("a.pt --export empty", "--export: empty"),
        ("a.pt --export no/b.pt", "--export: no"), ("a.pt a.pt --export b.pt", "--export b.pt"),
        ("a.pt --out ''", "--out: the path is empty"), ("a.pt --bests=", "--bests: the path is empty"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line_before_anything_is_written(flags, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "a.pt", 1)
    (tmp_path / "torn.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:1000])
    (tmp_path / "empty").mkdir()
    assert ev.main(shlex.split(flags)) == 2
    error = capsys.readouterr().err
    assert error.startswith("evaluate_models.py: error: ") and named in error and error.count("\n") == 1
    assert not any(path.is_file() for path in tmp_path.rglob("*") if path.name not in ("a.pt", "torn.pt"))


def test_too_little_data_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("Dataset.DRAWN_COUNT", 50)
    base = [str(tmp_path), "--data", "drawn", "--cache", str(tmp_path)]
    with pytest.raises(UserError, match="25 images as reference and 25"):
        ev.choose_real(ev.parse(base), 32)
    (_, reference), (_, floor) = ev.choose_real(ev.parse([*base, "--quick"]), 32)
    assert not set(reference.tolist()) & set(floor.tolist()) and len(reference) == len(floor) == 25
