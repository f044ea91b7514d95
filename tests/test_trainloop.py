import contextlib
import functools
import operator
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import training_step
import Trainloop
from checkpoints import load_generator, read_model_file
from command_line import UserError, run_command
from drawn_faces import draw_face
from Generator import Generator
from run_folder import list_checkpoints, telling_what_is_kept
from training_state import build_state, check_checkpoint, read_settings, take_over
from training_step import critic_step, draw_noise, generator_step, set_fade, train_step, update_ema
from Trainloop import main

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TINY = ["--size=32", "--ngf=8", "--ndf=8", "--batch-size=4", "--n-critic=2", "--device=cpu"]
TINY += ["--log-every=2", "--sample-every=3"]


@pytest.fixture(scope="session")
def faces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "faces"
    folder.mkdir()
    for i in range(30):
        Image.fromarray(draw_face(i, 32)).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture
def tiny(faces, tmp_path, monkeypatch):
    """Run Trainloop.main in an empty folder with small networks."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: main([*TINY, "--data", str(faces), *map(str, args)])


def go_on(*args):
    return main(["--device=cpu", *map(str, args)])


@pytest.fixture
def error(capsys):
    """Return the one line that a command ended with, since the last call."""

    def line():
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and err.startswith("Trainloop.py: error: ") and "Traceback" not in err, err
        return err

    return line


def assert_only_heads_learn(critic, images, scores):
    """The (3,) scores of a projected critic give the images a gradient, and of the weights the heads' alone."""
    assert scores.shape == (3,) and scores.dtype == torch.float32
    scores.sum().backward()
    assert images.grad.abs().sum() > 0
    learning = {name for name, p in critic.named_parameters() if p.grad is not None}
    assert learning and all(name.startswith("heads.") for name in learning)
    assert not any(p.requires_grad for p in critic.frozen[0].parameters())


class Noise:
    """A data set of 10 images of random pixels."""

    images = torch.rand(10, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def __len__(self):
        return 10

    def batch(self, indices, device):
        return self.images[indices]


def settings_of(*args):
    return read_settings([*TINY, "--precision", "fp32", *args])[0]


def equal(a, b):
    """Exact equality of nested dicts and lists of tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def assert_equal_files(one, other, also=()):
    """All that is trained is the same in two checkpoints, bit for bit."""
    one, other = read_model_file(one), read_model_file(other)
    for key in ("generator", "critic", "ema", "optim_g", "optim_d", "rng", "step", *also):
        assert equal(one[key], other[key]), key


def scalars(folder, tag="loss/critic"):
    events = EventAccumulator(str(folder)).Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def image_steps(folder):
    return [event.step for event in EventAccumulator(str(folder)).Reload().Images("samples/generated")]


# ---- settings -------------------------------------------------------------------------------------------------


def test_report_preset_is_the_published_recipe():
    settings = read_settings(["--preset", "report", "--out", "nowhere"])[0]
    assert (settings.crop, settings.split, settings.flip, settings.augment) == ("squash", "all", False, [])
    assert (settings.loss, settings.clip_value, settings.n_critic, settings.critic) == ("wgan", 0.01, 1, "pixel")
    assert (settings.batch_size, settings.optimizer, settings.betas) == (32, "adam", [0.9, 0.999])
    assert (settings.lr_g, settings.lr_d, settings.precision, settings.stem_norm) == (5e-5, 5e-5, "fp32", False)
    state = build_state(settings, "meta")
    assert sum(p.numel() for p in state.generator.parameters()) == 20_362_819
    assert sum(p.numel() for p in state.critic.parameters()) == 44_611_073
    assert state.ema is None


def test_a_flag_beside_a_preset_wins_and_old_names_still_count():
    old = ["--lipschitz", "gp", "--norm", "layer", "--gp", "5", "--clip", "0.5", "--blocks", "residual"]
    settings, _, _ = read_settings(["--batch-size", "7", "--preset", "report", "--flip", *old])
    assert (settings.batch_size, settings.flip, settings.ngf) == (7, True, 128)
    assert (settings.loss, settings.gp_weight, settings.clip_value) == ("wgan-gp", 5.0, 0.5)
    assert (settings.blocks_g, settings.blocks_d) == ("residual", "residual")
    with pytest.raises(ValueError, match="--blocks.*modulated"):  # the critic has no such blocks
        read_settings(["--blocks", "modulated"])


@pytest.mark.parametrize("flags, words", [
    ("--loss wgan-gp --norm batch", "--norm batch.*whole batch"), ("--lr-d nan", "--lr-d.*nan"),
    ("--ema 1", r"--ema.*\[0, 1\)"), ("--betas 0 1", "--betas.*1.0"), ("--seed 4294967296", "--seed.*4294967296"),
    ("--nz 200000", "--nz.*200000"), ("--attention 32", "--attention 32"),
    ("--resume nowhere", "--resume nowhere"), ("--resume latest", "--resume latest: no checkpoint .* runs"),
    ("--data nowhere", "--data .*nowhere"), ("--device cuda:99", "--device cuda:99"),
    ("--data drawn --split train", "--split train: no list"),
    ("--data=", "--data.*empty"), ("--out=", "--out.*empty"), ("--resume=", "--resume.*empty"),
    ("--cache=", "--cache.*empty"), ("--grow-from=", "--grow-from.*empty"),
    ("--freeze-g 16", "--freeze-g 16: .*--grow-from"), ("--skip 5", "--skip 5"),
])  # fmt: skip
def test_impossible_settings_are_one_line_and_status_2(flags, words, monkeypatch, tmp_path, error):
    monkeypatch.chdir(tmp_path)
    assert main([*TINY, *flags.split()]) == 2
    assert re.search(words, error())
    assert not list(tmp_path.iterdir())


# ---- one step -------------------------------------------------------------------------------------------------


def test_first_weights_are_a_function_of_the_seed_and_noise_of_seed_and_step():
    settings = settings_of()
    first = draw_noise(settings, 5)
    assert equal(first, draw_noise(settings, 5))
    for other in (draw_noise(settings, 6), draw_noise(settings_of("--seed", "1"), 5)):
        assert not equal(first["z"], other["z"])
    noise = [draw_noise(settings, step) for step in range(200)]
    z, flips = (torch.cat([n[name].flatten() for n in noise]).float() for name in ("z", "flip"))
    assert z.mean().abs() < 0.02 and (z.std() - 1).abs() < 0.02 and 0.4 < flips.mean() < 0.6
    assert not draw_noise(settings_of("--no-flip"), 1)["flip"].any()
    states = [build_state(settings, CPU).generator.state_dict() for _ in range(2)]  # whatever was drawn before
    assert equal(*states)


@pytest.mark.parametrize("flags", ["--loss wgan --norm batch", "--optimizer rmsprop --loss wgan"])
def test_weights_are_clipped_after_a_step(flags):
    settings = settings_of(*flags.split())
    state = build_state(settings, CPU)
    critic_step(state, settings, torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32), None)
    assert max(p.abs().max().item() for p in state.critic.parameters()) <= 0.01 + 1e-9


def test_critic_learns_to_rank_and_generator_to_please():
    """Against a fixed other player each network improves its own score, and the other's weights stay: right signs."""
    settings = settings_of("--lr-d", "0.001", "--lr-g", "0.001", "--gp-weight", "1")
    state = build_state(settings, CPU)
    z, epsilon, real = torch.randn(8, 100), torch.rand(8, 1, 1, 1), torch.rand(8, 3, 32, 32)
    before = [p.clone() for p in state.generator.parameters()]
    fake = state.generator(z).detach()
    estimates = [critic_step(state, settings, real, fake, epsilon)["critic/wasserstein"].item() for _ in range(12)]
    assert estimates[-1] > estimates[0] + 1
    assert equal(before, list(state.generator.parameters()))
    before, losses = [p.clone() for p in state.critic.parameters()], []
    for _ in range(12):
        fake = state.generator(z)
        images = fake.detach().requires_grad_()
        loss = -state.critic(images).mean()
        losses.append(generator_step(state, settings, fake, images, [(loss, 1.0)])["loss/generator"].item())
    assert losses[-1] < losses[0]
    assert equal(before, list(state.critic.parameters()))
    assert all(p.grad is None for p in state.critic.parameters())


def test_a_step_is_n_critic_updates_and_one_of_the_generator():
    settings = settings_of("--n-critic", "3")
    state = build_state(settings, CPU)
    for _ in range(2):
        train_step(state, settings, Noise(), CPU)
    updates = [{int(s["step"]) for s in optimizer.state.values()} for optimizer in (state.optim_d, state.optim_g)]
    assert state.step == 2 and updates == [{6}, {2}]


def test_ema_follows_weights_and_statistics_and_copies_counters():
    ema, network = Generator(ngf=8, size=32), Generator(ngf=8, size=32)
    network(torch.randn(4, 100))  # changes BatchNorm's statistics and counter
    expected = {
        key: torch.lerp(other, mine, 0.9) if mine.is_floating_point() else other.clone()
        for (key, mine), other in zip(ema.state_dict().items(), network.state_dict().values(), strict=True)
    }
    update_ema(ema, network, 0.9)
    for key, value in ema.state_dict().items():
        torch.testing.assert_close(value, expected[key])
    assert ema.stem_norm.num_batches_tracked == 1


# ---- growing, and starting from another model -----------------------------------------------------------------


def test_growing_takes_over_the_smaller_networks_and_fades_the_new_blocks_in(tiny, tmp_path, error):
    assert tiny("--steps", 3, "--out", "small", "--attention", 16) == 0
    small = "small/checkpoint_000003.pt"
    settings = settings_of("--grow-from", small, "--size", "64", "--fade-steps", "4")
    assert (settings.size, settings.ngf, settings.attention) == (64, 8, 16)  # the architecture is the file's
    state, file = build_state(settings, CPU), read_model_file(small)
    take_over(state, file, small)
    z = torch.randn(2, 100)
    set_fade(state, settings)
    enlarged = torch.nn.functional.interpolate(load_generator(small)(z).atanh(), scale_factor=2, mode="bilinear").tanh()
    torch.testing.assert_close(state.ema(z), enlarged, rtol=0, atol=1e-6)  # two networks need not sum in one order
    assert equal(state.critic.head.state_dict()["weight"], file["critic"]["state"]["head.weight"])
    random = state.ema.up["64"].conv.weight.clone()
    train_step(state, settings, type("Larger", (Noise,), {"images": torch.rand(10, 3, 64, 64)})(), CPU)
    # the average soon forgets what the new blocks were at random: nine tenths of it in the first step
    learnt = torch.lerp(random, state.generator.up["64"].conv.weight, 0.9)
    torch.testing.assert_close(state.ema.up["64"].conv.weight, learnt)
    assert read_settings(["--preset", "quick", "--grow-from", small])[0].ngf == 8  # a preset's architecture yields

    grow = ["--grow-from", small, "--size", "64", "--fade-steps", 4, "--out", "large", "--checkpoint-every", 1]
    assert tiny(*grow, "--steps", 7, "--keep", 9) == 0
    for step, fade in ((1, 0.0), (2, 0.25), (4, 0.75), (5, 1.0), (7, 1.0)):  # as it was in the step before
        file = read_model_file(tmp_path / f"large/checkpoint_{step:06d}.pt")
        assert file["critic"]["state"]["fade"].item() == fade
    assert go_on("--grow-from", "large/checkpoint_000002.pt", "--steps", 1) == 2
    assert "still fading" in error()
    (tmp_path / small).unlink()  # a resume has no need of it
    assert go_on("--resume", "large/checkpoint_000002.pt", "--steps", 7, "--out", "parts") == 0
    assert_equal_files("large/checkpoint_000007.pt", "parts/checkpoint_000007.pt")


def test_a_run_of_an_earlier_version_goes_on_to_fade_its_grown_generator_in():
    settings = settings_of("--size=64", "--fade-steps=4")
    settings.grow_from = "small.pt"  # and no skip, as in what earlier versions saved
    state = build_state(settings, CPU)
    state.step = 1
    set_fade(state, settings)
    assert [network.fade.item() for network in (state.generator, state.critic, state.ema)] == [0.25] * 3


def test_freeze_g_trains_the_larger_blocks_alone_beside_the_average_of_the_others(tiny, tmp_path):
    assert tiny("--steps", 3, "--out", "small") == 0
    grow = ["--grow-from", "small/checkpoint_000003.pt", "--size", 64, "--freeze-g", 32]
    assert tiny(*grow, "--sample-every", 1, "--ema", 0, "--steps", 2, "--out", "large") == 0
    assert go_on("--resume", "large", "--steps", 4) == 0
    small, large = read_model_file("small/checkpoint_000003.pt"), read_model_file("large/checkpoint_000004.pt")
    state = large["generator"]["state"]
    assert equal(small["ema"], {key: state[key] for key in small["ema"]})
    assert state["to_rgb.64.weight"].count_nonzero() and state["up.64.norm.running_mean"].count_nonzero()
    assert len(large["optim_g"]["state"]) == 5  # convolution, scale and shift; weight and bias of to_rgb
    assert tiny("--start-from", "small/generator_000003.pt", "--freeze-g", 16, "--steps", 1, "--out", "other") == 0
    state = read_model_file("other/checkpoint_000001.pt")["generator"]["state"]
    changed = {key.rpartition(".")[0] for key in small["ema"] if not equal(small["ema"][key], state[key])}
    assert changed == {"up.32.conv", "up.32.norm", "to_rgb.32"}


def test_warmup_trains_the_critics_alone(tiny, tmp_path):
    assert tiny("--steps", 3, "--warmup-steps", 2, "--checkpoint-every", 1, "--keep", 3, "--out", "run") == 0
    one, two, three = (read_model_file(f"run/checkpoint_00000{step}.pt") for step in (1, 2, 3))
    key = "linear.weight"
    assert equal(one["generator"]["state"][key], two["generator"]["state"][key])
    assert not equal(two["generator"]["state"][key], three["generator"]["state"][key])
    assert not equal(one["critic"]["state"], two["critic"]["state"])
    assert one["optim_g"]["state"] == {} == two["optim_g"]["state"]
    for name, file in (("ours", one), ("earlier", one | {"optim_g": three["optim_g"]})):  # whose Adam has a state there
        Path(name).mkdir()
        torch.save(file, f"{name}/checkpoint_000001.pt")
        assert go_on("--resume", name, "--steps", 3) == 0
    assert equal(read_model_file("ours/checkpoint_000003.pt")["generator"], three["generator"])
    with pytest.raises(UserError, match="optim_g is not what its settings make"):  # once it has learnt, it has one
        check_checkpoint(three | {"optim_g": one["optim_g"]}, "x.pt")


def test_a_file_tells_all_commands_that_made_it_without_their_folders(tiny, tmp_path, monkeypatch):
    def run(call, *args):
        monkeypatch.setattr(sys, "argv", ["/home/me/Trainloop.py", call, "--data=/home/me/faces", "../other.pt"])
        return args

    assert tiny(*run("1", "--steps", 1, "--out", "small")) == 0
    grow = ["--steps", 1, "--out", "large", "--grow-from", "small/checkpoint_000001.pt", "--size", 64]
    assert tiny(*run("2", *grow)) == 0
    for steps in (2, 3):
        assert go_on(*run("3", "--resume", "large", "--steps", steps)) == 0
    command = read_model_file(tmp_path / "large/generator_000003.pt")["made_by"]["command"]
    assert command.splitlines() == [f"python Trainloop.py {i} --data=faces other.pt" for i in "123"]


def test_two_networks_without_optimizers_are_enough_to_grow_and_a_generator_to_start_from(tiny, tmp_path):
    assert tiny("--steps", 1, "--out", "small") == 0
    file = read_model_file(tmp_path / "small/checkpoint_000001.pt")
    torch.save({name: file[name] for name in ("format", "generator", "critic")}, tmp_path / "two.pt")
    assert tiny("--grow-from", "two.pt", "--size", 64, "--steps", 1, "--out", "large") == 0
    assert go_on("--start-from", "small/generator_000001.pt", "--data", "drawn", "--cache", "cache", "--batch-size", 4,
                 "--steps", 1, "--lr-g", 1e-9, "--out", "adapted", "--ndf", 8, "--chroma-size", 16) == 0  # fmt: skip
    adapted = read_model_file(tmp_path / "adapted/checkpoint_000001.pt")
    assert adapted["settings"]["augment"] == ["color", "translation"]
    assert adapted["step"] == 1 and adapted["generator"]["config"] == file["generator"]["config"] | {"chroma_size": 16}
    with pytest.raises(UserError, match="--chroma-size 8: .* gives --chroma-size 16"):
        read_settings(["--start-from", "adapted/generator_000001.pt", "--chroma-size", "8"])
    del (damaged := file["ema"].copy())["linear.bias"]
    torch.save(file | {"ema": damaged}, tmp_path / "damaged.pt")
    with pytest.raises(UserError, match="damaged.pt: ema .*linear.bias"):  # or the average would stay random there
        read_settings(["--start-from", "damaged.pt"])
    weights = [key for key in file["ema"] if key.endswith("weight")]
    assert all((adapted["ema"][key] - file["ema"][key]).abs().max() < 1e-6 for key in weights)


def test_what_cannot_be_grown_is_refused_in_one_line(tiny, error, capsys):
    assert tiny("--steps", 1, "--out", "small") == 0
    capsys.readouterr()
    for flags, words in (
        ("--grow-from small/generator_000001.pt --size 64", "holds no pixel critic"),
        ("--grow-from small/checkpoint_000001.pt", "--size 32.*--size 64"),
        ("--grow-from small/checkpoint_000001.pt --size 64 --ngf 16", "--ngf 16.*--ngf 8"),
        ("--start-from small/checkpoint_000001.pt --size 64", "--size 64.*--size 32"),
        ("--grow-from nowhere.pt", "nowhere.pt"),
    ):
        assert tiny("--steps", 1, "--out", "large", *flags.split()) == 2
        assert re.search(words, error())


# ---- checkpoints and resume -----------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [
    "--precision fp32", "--precision bf16 --norm none", "--preset report --size 32 --ngf 8 --ndf 8 --batch-size 4",
    "--optimizer rmsprop --loss wgan --ema 0", "--blocks-g residual --attention 16 --augment color cutout",
])  # fmt: skip
def test_2n_steps_equal_n_resume_n_bit_for_bit(tiny, tmp_path, flags):
    flags = flags.split()
    assert tiny(*flags, "--steps", 8, "--out", "whole", "--checkpoint-every", 100) == 0
    assert tiny(*flags, "--steps", 5, "--out", "parts", "--checkpoint-every", 100) == 0  # 5: between two logs
    assert go_on("--resume", "parts", "--steps", 8) == 0  # settings come from the checkpoint
    assert_equal_files("whole/checkpoint_000008.pt", "parts/checkpoint_000008.pt")
    for tag in ("critic/wasserstein", "generator/diversity"):
        one, other = scalars("whole", tag), scalars("parts", tag)
        assert list(one) == [2, 4, 6, 8] and list(other) == [2, 4, 5, 6, 8]  # 5: the end of the first part
        assert [other[step] for step in (2, 4, 8)] == [one[step] for step in (2, 4, 8)]
    assert image_steps("whole") == [3, 6, 8] and image_steps("parts") == [3, 5, 6, 8]
    assert (tmp_path / "whole/samples.png").read_bytes() == (tmp_path / "parts/samples.png").read_bytes()


def test_a_run_of_the_first_version_goes_on_as_it_would_have_then(tmp_path, monkeypatch):
    """Its files are of the first version, with other names for settings; so are the numbers that it came to."""
    monkeypatch.chdir(tmp_path)
    with tarfile.open(ROOT / "tests/data/old_run.tar.xz") as archive:
        archive.extractall(tmp_path / "run", filter="data")
    old = load_generator("run/generator_000003.pt")
    assert equal(old.state_dict(), load_generator("run/checkpoint_000003.pt").state_dict())
    assert go_on("--resume", "run", "--steps", 6, "--cache", "cache", "--blocks", "plain", "--gp", 10) == 0
    file = read_model_file("run/checkpoint_000006.pt")
    assert file["settings"]["loss"] == "wgan-gp"
    generator, critic = file["generator"]["state"], file["critic"]["state"]
    numbers = [*generator["linear.weight"].flatten()[1:3], *generator["stem_norm.running_var"][:2]]
    numbers_then = [0.5363145, -0.8233524, 0.5751522, 0.6720077, -0.0335638, 0.0354122]
    assert [float(x) for x in (*numbers, *critic["head.weight"].flatten()[:2])] == pytest.approx(numbers_then, rel=1e-3)
    assert go_on("--resume", "run", "--steps", 7, "--blocks", "residual") == 2


def test_a_checkpoint_is_plain_and_complete_and_a_generator_file_tells_no_folders(tiny, tmp_path):
    assert tiny("--steps", 1, "--out", "run") == 0
    file, small = (torch.load(f"run/{kind}_000001.pt", weights_only=True) for kind in ("checkpoint", "generator"))
    assert {"format", "step", "settings", "generator", "critic", "ema", "optim_g", "optim_d", "rng"} <= set(file)
    assert file["step"] == 1 and file["settings"]["n_critic"] == 2
    assert {"command", "versions", "data"} <= set(file["made_by"])
    assert equal(small["generator"]["state"], file["ema"]) and "critic" not in small
    assert small["settings"]["data"] == ["faces"] and str(tmp_path) not in str(small | {"generator": None})
    loaded = [load_generator(f"run/{kind}_000001.pt").state_dict() for kind in ("checkpoint", "generator")]
    assert equal(*loaded)


def test_all_generators_but_only_the_last_checkpoints_are_kept(tiny, tmp_path):
    assert tiny("--steps", 9, "--out", "run", "--checkpoint-every", 2, "--keep", 2) == 0
    names = [f"checkpoint_{i:06d}.pt" for i in (8, 9)] + [f"generator_{i:06d}.pt" for i in (2, 4, 6, 8, 9)]
    assert sorted(path.name for path in (tmp_path / "run").glob("*.pt")) == names


def test_runs_are_numbered_and_latest_is_the_newest_or_none(tiny, tmp_path, error, capsys):
    for flags in ([], ["--seed", 1], ["--seed", 2, "--out", "runs/64px"]):  # this one has no number
        assert tiny("--steps", 1, *flags) == 0
    names = ["0001-faces-32px-wgan-gp", "0002-faces-32px-wgan-gp", "64px"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == names
    assert go_on("--resume", "latest", "--steps", 2) == 0
    assert (tmp_path / "runs" / names[1] / "checkpoint_000002.pt").is_file()
    (tmp_path / "runs/0003-other").mkdir()  # a run that has no checkpoint yet: an older one is not the latest
    capsys.readouterr()
    assert go_on("--resume", "latest", "--steps", 3) == 2
    assert "0003-other" in error()


def test_auto_starts_goes_on_and_ends_as_a_requeued_job_needs(tiny, capsys, error):
    command = ["--out", "run", "--resume", "auto", "--precision", "auto"]
    assert tiny(*command, "--steps", 2) == 0
    assert tiny(*command, "--steps", 4) == 0
    assert "Going on from step 2" in capsys.readouterr().out
    assert tiny(*command, "--steps", 4) == 0
    assert "Nothing to do" in capsys.readouterr().out
    assert tiny("--steps", 5, "--out", "run") == 2  # is not overwritten
    assert "--resume latest" in error()


def test_settings_that_contradict_the_checkpoint_are_refused_naming_both(tiny, faces, tmp_path, capsys, error):
    assert tiny("--steps", 2, "--out", "run") == 0
    capsys.readouterr()
    other, moved = tmp_path / "other", tmp_path / "moved"
    for folder in (other, moved):
        shutil.copytree(faces, folder)
    (other / "000.png").unlink()
    for flags, words in (
        ("--lr-g 0.5", "--lr-g 0.5.*--lr-g 0.0002"), ("--seed 3", "--seed 3.*--seed 0"),
        ("--ngf 16", "--ngf 16.*--ngf 8"), ("--batch-size 8", "--batch-size 8.*--batch-size 4"),
        ("--preset report", "--size 128.*--size 32"), (f"--data {other}", "29 images.*30 others"),
    ):  # fmt: skip
        assert go_on("--resume", "run", "--steps", 3, *flags.split()) == 2
        assert re.search(words, error())
    assert go_on("--resume", "run", "--steps", 3, "--data", moved) == 0


def test_going_back_to_an_older_checkpoint_needs_a_new_folder(tiny, tmp_path, capsys):
    assert tiny("--steps", 4, "--out", "run", "--checkpoint-every", 2) == 0
    back = ["--resume", "run/checkpoint_000002.pt", "--steps", 3]
    assert go_on(*back) == 2 and "checkpoint_000004.pt" in capsys.readouterr().err
    assert go_on(*back, "--out", "branch") == 0 and (tmp_path / "branch/checkpoint_000003.pt").is_file()
    assert go_on("--resume", "branch", "--steps", 9, "--out", "run") == 2
    assert "--out run: holds another run" in capsys.readouterr().err


SPOILED = [
    (["settings"], [1]), (["settings", "ema"], {}), (["settings", "lr_g"], "fast"), (["settings", "seed"], 0.5),
    (["settings", "batch_size"], None), (["settings", "data", 0], 7), (["settings", "nz"], 200_000),
    (["settings", "steps"], -3), (["settings", "cache"], ""), (["settings", "norm"], "batch"), (["settings", "ngf"], 9),
    (["made_by"], None), (["made_by", "command"], [1]), (["made_by", "data", "fingerprint"], None), (["step"], 1.5),
    (["step"], None), (["step"], -1),
    (["generator", "state"], None), (["generator", "state", "linear.bias"], None), (["critic", "state"], {}),
    (["critic", "state", "head.weight"], torch.zeros(3)), (["ema"], None), (["ema", "linear.bias"], 3),
    (["ema", "linear.bias"], torch.full((8192,), float("nan"))),
    (["optim_g", "state", 3], None), (["optim_d", "state"], []),
    (["optim_d", "state", 3, "exp_avg"], None), (["optim_g", "state", 2, "exp_avg_sq"], torch.zeros(4).to_sparse()),
]  # fmt: skip


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tiny, tmp_path, capsys, error):
    assert tiny("--steps", 4, "--out", "run", "--checkpoint-every", 2) == 0
    newest = tmp_path / "run/checkpoint_000004.pt"
    whole = newest.read_bytes()
    for (*keys, last), value in SPOILED:
        newest.write_bytes(whole)
        file = torch.load(newest, weights_only=True)
        part = functools.reduce(operator.getitem, keys, file)
        part.__delitem__(last) if value is None else part.__setitem__(last, value)
        torch.save(file, newest)
        with pytest.raises(ValueError, match="checkpoint_000004.pt") as caught:
            check_checkpoint(read_model_file(newest), newest)
        assert type(caught.value).__name__ == "UserError" and "\n" not in str(caught.value), (keys, last)
    middle = len(whole) // 2
    for damaged in (whole[:1000], whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]):
        newest.write_bytes(damaged)  # torn, and with one bit of the weights turned over
        capsys.readouterr()
        assert go_on("--resume", "run", "--steps", 3, "--out", "elsewhere") == 0
        out = capsys.readouterr().out
        assert "damaged checkpoint" in out and "Going on from step 2" in out
        shutil.rmtree("elsewhere")
    (tmp_path / "run/checkpoint_000002.pt").unlink()
    assert tiny("--steps", 1, "--out", "run", "--resume", "auto") == 2  # and does not start anew
    assert "no checkpoint" in error()


def test_an_error_of_a_training_is_not_taken_for_what_it_arose_from(tmp_path):
    with pytest.raises(RuntimeError, match="out of memory"), telling_what_is_kept(tmp_path):
        try:
            raise KeyError("of a cache")
        except KeyError:
            raise RuntimeError("CUDA out of memory")  # noqa: B904


@pytest.mark.parametrize("which", ["checkpoint_000004.pt", "checkpoint_000002.pt", "samples.png"])
def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(tiny, tmp_path, monkeypatch, error, capsys, which):
    real_replace = os.replace

    def full(source, target):
        if Path(target).name == which:
            raise OSError(28, "No space left on device")
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert tiny("--steps", 6, "--out", "run", "--checkpoint-every", 2, "--sample-every", 5) == 1
    line = error()
    assert f"{which}: No space left" in line
    kept = {"checkpoint_000004.pt": "--resume run from step 2", "checkpoint_000002.pt": "no checkpoint is there yet"}
    assert kept.get(which, "--resume run from step 4") in line
    assert {path.name for path in (tmp_path / "run").glob(".*")} == {".lock", ".owner"}
    monkeypatch.setattr(os, "replace", real_replace)
    assert tiny("--resume", "auto", "--out", "run", "--steps", 7) == 0


def test_a_non_finite_loss_stops_with_its_step_and_keeps_the_checkpoint(tiny, tmp_path, monkeypatch, error):
    real_step = training_step.critic_step

    def poisoned(state, *args):
        noted = real_step(state, *args)
        return {name: value * float("nan") for name, value in noted.items()} if state.step == 4 else noted

    monkeypatch.setattr(training_step, "critic_step", poisoned)
    assert tiny("--steps", 20, "--out", "run", "--checkpoint-every", 3, "--log-every", 10) == 1
    assert re.search("at step 5;.*checkpoint_000003.pt.*--lr-d", error())
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint_000003.pt"]
    assert tiny("--lr-g", 1e39, "--steps", 3, "--out", "diverged", "--checkpoint-every", 1) == 1
    assert "weights are not finite at step 1;" in error()
    assert not list((tmp_path / "diverged").glob("*.pt"))


@pytest.mark.parametrize("raised", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
    RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ValueError("not enough values to unpack"),  # a fault of the program, which keeps its traceback
])  # fmt: skip
def test_out_of_memory_names_the_batch_size(error, raised):
    def command(argv):
        raise raised

    command.__module__ = Trainloop.__name__
    if type(raised) is ValueError:
        with pytest.raises(ValueError, match="not enough values"):
            run_command(command)
    else:
        assert run_command(command) == 1
        assert "--batch-size" in error()


def test_dry_run_tells_numbers_and_writes_nothing(tiny, tmp_path, capsys):
    assert tiny("--dry-run", "--steps", 100_000_000) == 0
    out = capsys.readouterr().out
    assert re.search(r"generator 1,\d{3},\d{3}, critic \d+,\d{3}\n", out) and "for 30 packed images" in out
    assert float(re.search(r"expected +([\d.]+) hours", out)[1]) > 100
    assert list(tmp_path.iterdir()) == []
    assert tiny("--steps", 2, "--out", "run") == 0
    size = (tmp_path / "run/checkpoint_000002.pt").stat().st_size
    assert go_on("--resume", "run", "--steps", 5, "--keep", 999, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "hours for 3 steps from step 2" in out
    assert float(re.search(r"([\d.]+) GB for the last 999", out)[1]) == pytest.approx(size * 1000 / 1e9, rel=0.05)


# ---- the real command -----------------------------------------------------------------------------------------


STARTED = []


@pytest.fixture(autouse=True)
def no_run_left():
    yield
    for run in STARTED:
        run.kill()
    STARTED.clear()


def start(faces, tmp_path, *args):
    command = [sys.executable, str(ROOT / "Trainloop.py"), *TINY, "--data", str(faces), *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    STARTED.append(subprocess.Popen(command, cwd=tmp_path, **pipes))
    return STARTED[-1]


def wait_for(condition, run, seconds=120):
    end = time.time() + seconds
    while not condition() and run.poll() is None and time.time() < end:
        time.sleep(0.02)
    assert condition(), run.communicate()[0]


posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")


@posix
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_ends_in_a_checkpoint_and_a_second_training_is_refused(faces, tmp_path, name):
    number = getattr(signal, name)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL if name == "SIGHUP" else signal.SIG_IGN)  # as nohup does
    run = start(faces, tmp_path, "--steps", 10**6, "--out", "run", "--checkpoint-every", 5)
    signal.signal(signal.SIGHUP, before)
    wait_for(lambda: list(tmp_path.glob("run/checkpoint_*.pt")), run)
    if name == "SIGHUP":
        second = start(faces, tmp_path, "--out", "run", "--resume", "auto").communicate(timeout=240)[0]
        assert f"--out run: process {run.pid} on" in second and "Traceback" not in second
    else:
        run.send_signal(signal.SIGHUP)
        time.sleep(1)
    run.send_signal(number)
    out = run.communicate(timeout=240)[0]
    assert run.returncode == 128 + number and "--resume run" in out and "Traceback" not in out
    assert f"{name}: finishing the step" in out
    step = read_model_file(list_checkpoints(tmp_path / "run")[0])["step"]
    assert f"at step {step:,}" in out


@posix
def test_a_second_ctrl_c_ends_at_once(faces, tmp_path):
    run = start(faces, tmp_path, "--steps", 10**6, "--out", "run", "--checkpoint-every", 1)
    wait_for(lambda: list(tmp_path.glob("run/checkpoint_*.pt")), run)
    run.send_signal(signal.SIGINT)
    time.sleep(0.001)
    with contextlib.suppress(ProcessLookupError):
        run.send_signal(signal.SIGINT)
    out = run.communicate(timeout=240)[0]
    assert run.returncode == 130 and "Traceback" not in out and "could not" not in out, out


@posix
@pytest.mark.parametrize("every", [1, 6000])
def test_kill_9_loses_no_checkpoint_and_no_step_is_logged_twice(faces, tiny, tmp_path, every):
    """Checkpoints after every step keep the process in torch.save most of the time; kill it there, or before any."""
    run = start(faces, tmp_path, "--steps", 10**6, "--out", "run", "--checkpoint-every", every)
    enough = "run/samples.png" if every > 1 else "run/generator_000005.pt"
    wait_for(lambda: list(tmp_path.glob(enough)) and (every > 1 or list(tmp_path.glob("run/.*.tmp-*"))), run)
    run.kill()
    run.wait()
    time.sleep(1)  # the order of TensorBoard's files is by the seconds in their names
    step = max((read_model_file(path)["step"] for path in list_checkpoints(tmp_path / "run")), default=0)
    assert (step >= 3) == (every == 1)
    assert tiny("--out", "run", "--resume", "auto", "--steps", step + 2, "--checkpoint-every", 1) == 0
    assert not list(tmp_path.glob("run/.*.tmp-*"))
    assert list(scalars("run")) == list(range(1, step + 3))  # every save is logged: no gap and no double


@posix
def test_nobody_needs_to_read_what_training_says(faces, tmp_path):
    run = start(faces, tmp_path, "--steps", 9, "--out", "run")
    run.stdout.close()  # as `| head -1` does, and a terminal that goes away
    assert run.wait(120) == 0
    assert (tmp_path / "run/checkpoint_000009.pt").is_file()


@posix
def test_a_limit_of_file_sizes_is_one_line(faces, tmp_path):
    flags = ["--size", "32", "--data", str(faces)]
    assert subprocess.run([sys.executable, str(ROOT / "Dataset.py"), *flags], cwd=tmp_path).returncode == 0
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))"
    code = f"{limit}; import sys; sys.path.insert(0, {str(ROOT)!r}); import Trainloop; sys.exit(Trainloop.main())"
    command = [sys.executable, "-c", code, *TINY, *flags, "--out", "run", "--steps", "9"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "File too large" in done.stderr and "start again" in done.stderr


def test_the_real_command_trains_on_drawn_faces_in_an_empty_folder(tmp_path):
    command = [sys.executable, str(ROOT / "Trainloop.py"), *TINY, "--steps", "3", "--cache", "cache"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "No CelebA" in run.stdout and "Finished step 3" in run.stdout
    folder = next((tmp_path / "runs").iterdir())
    assert Image.open(folder / "samples.png").size == (8 * 34 + 2, 4 * 34 + 2)
    events = EventAccumulator(str(folder)).Reload()
    expected = """critic/gradient_norm critic/gradient_penalty critic/wasserstein generator/diversity
        generator/gradient_norm loss/critic loss/generator speed/images_per_second"""
    assert sorted(events.Tags()["scalars"]) == expected.split()
    assert set(events.Tags()["images"]) == {"samples/generated", "samples/real"}
    assert b"batch_size" in events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0]


def test_diversity_is_zero_when_all_images_are_alike():
    same = torch.rand(1, 3, 8, 8).expand(6, 3, 8, 8)
    assert Trainloop.spread(same) < 1e-6 and Trainloop.spread(torch.rand(6, 3, 8, 8)) > 0.2
    assert Trainloop.spread(same[:1]) == 0  # one image: no spread, and no NaN


@pytest.mark.parametrize("has_amx", [False, True])
def test_precision_auto_is_bf16_with_matrix_units(monkeypatch, has_amx):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": has_amx}, raising=False)
    assert Trainloop.resolve_precision("auto", CPU) == ("bf16" if has_amx else "fp32")
    assert Trainloop.resolve_precision("fp32", CPU) == "fp32"
