import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import Trainloop
from checkpoints import load_generator, read_model_file
from Dataset import draw_face
from Generator import Generator
from Trainloop import (
    build_state,
    checkpoint_of,
    critic_step,
    draw_noise,
    generator_step,
    main,
    read_settings,
    resolve_precision,
    train_step,
    update_ema,
)

ROOT = Path(__file__).parent.parent
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
    """Run Trainloop.main in an empty folder with small networks; returns (call, folder)."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: main([*TINY, "--data", str(faces), *map(str, args)])


class Noise:
    """A data set of 10 images of random pixels."""

    def __len__(self):
        return 10

    def batch(self, indices, device):
        everything = torch.randint(0, 256, (10, 3, 32, 32), generator=torch.Generator().manual_seed(0))
        return everything[torch.as_tensor(indices)].float() / 127.5 - 1


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


def scalars(folder, tag="loss/critic"):
    events = EventAccumulator(str(folder)).Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def image_steps(folder):
    return [event.step for event in EventAccumulator(str(folder)).Reload().Images("samples/generated")]


# ---- settings -------------------------------------------------------------------------------------------------


def test_report_preset_is_the_published_recipe(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    settings, _, _ = read_settings(["--preset", "report"])
    expected = {
        "size": 128, "crop": "squash", "split": "all", "flip": False, "nz": 100, "ngf": 128, "ndf": 128,
        "stem_norm": False, "norm": "batch", "lipschitz": "clip", "clip": 0.01, "n_critic": 1, "batch_size": 32,
        "optimizer": "adam", "lr_g": 5e-5, "lr_d": 5e-5, "betas": [0.9, 0.999], "ema": 0.0, "precision": "fp32",
        "log_every": 50, "checkpoint_every": 6000,
    }  # fmt: skip
    assert {name: getattr(settings, name) for name in expected} == expected
    state = build_state(settings, torch.device("cpu"))
    assert sum(p.numel() for p in state.generator.parameters()) == 20_362_819
    assert sum(p.numel() for p in state.critic.parameters()) == 44_611_073
    assert state.ema is None


def test_a_flag_beside_a_preset_wins(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    settings, _, _ = read_settings(["--batch-size", "7", "--preset", "report", "--flip"])
    assert (settings.batch_size, settings.flip, settings.ngf) == (7, True, 128)


@pytest.mark.parametrize("flags, words", [
    ("--lipschitz gp --norm batch", "--norm batch.*whole batch"), ("--batch-size 0", "--batch-size 0"),
    ("--lr-g -1", "--lr-g -1"), ("--lr-d nan", "--lr-d nan"), ("--ema 1", "--ema 1"), ("--betas 0 1", "--betas 0.0 1"),
    ("--resume nowhere", "--resume nowhere"), ("--resume latest", "--resume latest: no checkpoint in runs"),
    ("--data nowhere", "--data .*nowhere"), ("--device cuda:99", "--device cuda:99"), ("--seed -1", "seed -1"),
    ("--seed 4294967296", "seed 4294967296"), ("--gp nan", "--gp nan"), ("--lr-d inf", "--lr-d inf"),
])  # fmt: skip
def test_impossible_settings_are_one_line_and_status_2(flags, words, monkeypatch, tmp_path, capsys):
    import re

    monkeypatch.chdir(tmp_path)
    assert main([*TINY, *flags.split()]) == 2
    err = capsys.readouterr().err
    assert re.search(words, err) and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


# ---- one step -------------------------------------------------------------------------------------------------


def test_noise_is_a_pure_function_of_seed_and_step():
    settings = settings_of()
    assert equal(draw_noise(settings, 5), draw_noise(settings, 5))
    assert not equal(draw_noise(settings, 5)["z"], draw_noise(settings, 6)["z"])
    assert not equal(draw_noise(settings, 5)["z"], draw_noise(settings_of("--seed", "1"), 5)["z"])
    z = torch.cat([draw_noise(settings, step)["z"].flatten() for step in range(50)])
    assert z.mean().abs() < 0.02 and (z.std() - 1).abs() < 0.02
    flips = torch.cat([draw_noise(settings, step)["flip"].flatten() for step in range(200)]).float()
    assert 0.4 < flips.mean() < 0.6
    assert not draw_noise(settings_of("--no-flip"), 1)["flip"].any()


@pytest.mark.parametrize("flags", ["--lipschitz clip --norm batch", "--optimizer rmsprop --lipschitz clip"])
def test_weights_are_clipped_after_a_step(flags):
    settings = settings_of(*flags.split())
    state = build_state(settings, torch.device("cpu"))
    critic_step(state, settings, torch.rand(4, 3, 32, 32), torch.randn(4, 100), None)
    assert max(p.abs().max().item() for p in state.critic.parameters()) <= 0.01 + 1e-9


def test_critic_learns_to_rank_and_generator_to_please():
    """Against a fixed other player each network improves its own score: the signs are right."""
    settings = settings_of("--lr-d", "0.001", "--lr-g", "0.001", "--gp", "1")
    state = build_state(settings, torch.device("cpu"))
    z, epsilon = torch.randn(8, 100), torch.rand(8, 1, 1, 1)
    real = torch.rand(8, 3, 32, 32)
    estimates = [critic_step(state, settings, real, z, epsilon)[1].item() for _ in range(12)]
    assert estimates[-1] > estimates[0] + 1
    critic_before = [p.clone() for p in state.critic.parameters()]
    losses = [generator_step(state, settings, z)[0].item() for _ in range(12)]
    assert losses[-1] < losses[0]
    assert equal(critic_before, list(state.critic.parameters()))  # the generator's step leaves the critic alone
    assert all(p.requires_grad for p in state.critic.parameters())


def test_critic_step_leaves_the_generators_weights_alone():
    settings = settings_of()
    state = build_state(settings, torch.device("cpu"))
    before = [p.clone() for p in state.generator.parameters()]
    critic_step(state, settings, torch.rand(4, 3, 32, 32), torch.randn(4, 100), torch.rand(4, 1, 1, 1))
    assert equal(before, list(state.generator.parameters()))
    assert all(p.grad is None for p in state.generator.parameters())


def test_a_step_is_n_critic_updates_and_one_of_the_generator():
    settings = settings_of("--n-critic", "3")
    state = build_state(settings, torch.device("cpu"))

    class Grey:
        def __len__(self):
            return 10

        def batch(self, indices, device):
            return torch.full((len(indices), 3, 32, 32), 99 / 127.5 - 1)

    train_step(state, settings, Grey(), torch.device("cpu"))
    train_step(state, settings, Grey(), torch.device("cpu"))
    assert state.step == 2
    assert {int(s["step"]) for s in state.optim_d.state.values()} == {6}
    assert {int(s["step"]) for s in state.optim_g.state.values()} == {2}


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


def test_same_initial_weights_whatever_was_drawn_before():
    settings = settings_of()
    torch.rand(5)
    first = build_state(settings, torch.device("cpu"))
    torch.rand(3)
    assert equal(first.generator.state_dict(), build_state(settings, torch.device("cpu")).generator.state_dict())


# ---- growing --------------------------------------------------------------------------------------------------


def test_growing_takes_over_the_smaller_networks_and_fades_the_new_blocks_in(tiny, tmp_path, capsys):
    assert tiny("--steps", 3, "--out", "small", "--attention", 16) == 0
    small = "small/checkpoint_000003.pt"
    settings = settings_of("--grow-from", small, "--size", "64", "--fade-steps", "4")
    assert (settings.size, settings.ngf, settings.attention) == (64, 8, 16)  # the architecture is the file's
    state = build_state(settings, torch.device("cpu"))
    Trainloop.grow(state, small)
    z = torch.randn(2, 100)
    Trainloop.set_fade(state, settings)
    enlarged = load_generator(small)(z).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert torch.equal(state.ema(z), enlarged)
    assert equal(state.critic.head.state_dict()["weight"], read_model_file(small)["critic"]["state"]["head.weight"])
    train_step(state, settings, Noise(), torch.device("cpu"))
    file = read_model_file(small)["ema"]  # the average stays what it was, but for 1 - settings.ema
    assert (state.ema.linear.weight - file["linear.weight"]).abs().max() < 1e-6
    assert read_settings(["--preset", "quick", "--grow-from", small])[0].ngf == 8  # a preset's architecture yields

    grow = ["--grow-from", small, "--size", "64", "--fade-steps", 4, "--out", "large", "--checkpoint-every", 1]
    assert tiny(*grow, "--steps", 7, "--keep", 9) == 0
    for step, fade in ((1, 0.0), (2, 0.25), (4, 0.75), (5, 1.0), (7, 1.0)):  # as it was in the step before
        file = read_model_file(tmp_path / f"large/checkpoint_{step:06d}.pt")
        parts = file["generator"]["state"], file["critic"]["state"], file["ema"]
        assert [part["fade"].item() for part in parts] == [fade] * 3
    assert main(["--grow-from", "large/checkpoint_000002.pt", "--steps", "1", "--device", "cpu"]) == 2
    assert "still fading" in capsys.readouterr().err
    (tmp_path / small).unlink()  # a resume has no need of it
    assert main(["--resume", "large", "--steps", "8", "--device", "cpu"]) == 0


def test_a_file_tells_all_commands_that_made_it(tiny, tmp_path, monkeypatch):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["Trainloop.py", *map(str, args)])
        assert tiny(*args[2:]) == 0

    run("call", "1", "--steps", 1, "--out", "small")
    run("call", "2", "--steps", 1, "--out", "large", "--grow-from", "small/checkpoint_000001.pt", "--size", 64)
    for steps in (2, 3):
        monkeypatch.setattr(sys, "argv", ["Trainloop.py", "call", "3"])
        assert main(["--resume", "large", "--device", "cpu", "--steps", str(steps)]) == 0
    command = read_model_file(tmp_path / "large/generator_000003.pt")["made_by"]["command"]
    assert [line.split()[3] for line in command.splitlines()] == ["1", "2", "3"]


def test_growing_and_a_resume_in_the_middle_of_it_equal_growing(tiny, tmp_path):
    assert tiny("--steps", 1, "--out", "small") == 0
    grow = ["--grow-from", "small/checkpoint_000001.pt", "--size", "64", "--fade-steps", 5]
    assert tiny(*grow, "--steps", 6, "--out", "whole") == 0
    assert tiny(*grow, "--steps", 3, "--out", "parts") == 0
    assert main(["--resume", "parts", "--steps", "6", "--device", "cpu"]) == 0
    whole, parts = (read_model_file(tmp_path / run / "checkpoint_000006.pt") for run in ("whole", "parts"))
    for key in ("generator", "critic", "ema", "optim_g", "optim_d"):
        assert equal(whole[key], parts[key]), key


def test_two_networks_without_optimizers_are_enough_to_grow(tiny, tmp_path):
    assert tiny("--steps", 1, "--out", "small") == 0
    file = read_model_file(tmp_path / "small/checkpoint_000001.pt")
    torch.save({name: file[name] for name in ("format", "generator", "critic")}, tmp_path / "two.pt")
    assert tiny("--grow-from", "two.pt", "--size", 64, "--steps", 1, "--out", "large") == 0


@pytest.mark.parametrize("flags, words", [
    ("--grow-from small/generator_000001.pt --size 64", "holds no critic"),
    ("--grow-from small/checkpoint_000001.pt --size 128", "--size 128.*--size 32.*--size 64"),
    ("--grow-from small/checkpoint_000001.pt --size 64 --ngf 16", "--ngf 16.*--ngf 8"),
    ("--grow-from small/checkpoint_000001.pt --size 64 --fade-steps -1", "--fade-steps -1"),
    ("--grow-from nowhere.pt", "nowhere.pt"),
    ("--attention 32", "--attention 32"),
])  # fmt: skip
def test_what_cannot_be_grown_is_refused_in_one_line(tiny, flags, words, capsys):
    import re

    assert tiny("--steps", 1, "--out", "small") == 0
    capsys.readouterr()
    assert tiny("--steps", 1, "--out", "large", *flags.split()) == 2
    err = capsys.readouterr().err
    assert re.search(words, err) and err.count("\n") == 1


# ---- checkpoints and resume -----------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [
    "--precision fp32", "--precision bf16 --norm none", "--preset report --size 32 --ngf 8 --ndf 8 --batch-size 4",
    "--optimizer rmsprop --lipschitz clip --ema 0", "--blocks residual --attention 16",
])  # fmt: skip
def test_2n_steps_equal_n_resume_n_bit_for_bit(tiny, tmp_path, flags):
    flags = flags.split()
    assert tiny(*flags, "--steps", 8, "--out", "whole", "--checkpoint-every", 100) == 0
    assert tiny(*flags, "--steps", 5, "--out", "parts", "--checkpoint-every", 100) == 0  # 5: between two logs
    assert main(["--resume", "parts", "--steps", "8", "--device", "cpu"]) == 0  # settings come from the checkpoint
    whole, parts = (read_model_file(tmp_path / run / "checkpoint_000008.pt") for run in ("whole", "parts"))
    for key in ("generator", "critic", "ema", "optim_g", "optim_d", "rng", "step", "history"):
        assert equal(whole[key], parts[key]), key
    for tag in ("loss/critic", "loss/generator", "critic/wasserstein", "generator/diversity"):
        assert scalars("whole", tag) == scalars("parts", tag)
    assert image_steps("whole") == [3, 6, 8]
    assert image_steps("parts") == [3, 5, 6, 8]  # 5: the end of the first part
    assert (tmp_path / "whole/samples.png").read_bytes() == (tmp_path / "parts/samples.png").read_bytes()


def test_training_goes_on_while_a_checkpoint_of_its_own_step_is_written(tiny, tmp_path, monkeypatch):
    assert tiny("--steps", 2, "--out", "short") == 0
    real_save, real_step, written, steps = torch.save, Trainloop.train_step, threading.Event(), []

    def slow_save(content, file):
        if "optim_g" in content and content["step"] == 2:
            assert written.wait(60)  # until training has done two more steps
        real_save(content, file)

    def step(state, *args):
        result = real_step(state, *args)
        steps.append(state.step)
        if state.step == 4:
            written.set()
        return result

    monkeypatch.setattr(torch, "save", slow_save)
    monkeypatch.setattr(Trainloop, "writes_aside", lambda device: True)
    monkeypatch.setattr(Trainloop, "train_step", step)
    assert tiny("--steps", 5, "--out", "long", "--checkpoint-every", 2, "--keep", 9, "--sample-every", 9) == 0
    short, long = (read_model_file(tmp_path / run / "checkpoint_000002.pt") for run in ("short", "long"))
    for key in ("generator", "critic", "ema", "optim_g", "optim_d", "history"):
        assert equal(short[key], long[key]), key


@pytest.mark.parametrize("flags", ["", "--lipschitz clip --norm batch"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_capturing_leaves_the_state_as_it_was_and_trains_alike(flags, steps_before, monkeypatch):
    """There is no GPU to capture on in a test, so `capture` is replaced by its warm-up alone."""

    def warm_up(function, *inputs):
        for _ in range(3):
            function(*inputs)
        return function

    monkeypatch.setattr(Trainloop, "capture", warm_up)
    settings, device, images = settings_of(*flags.split()), torch.device("cpu"), Noise()
    states = [build_state(settings, device) for _ in range(2)]
    for state in states:
        for _ in range(steps_before):
            train_step(state, settings, images, device)
    updates = Trainloop.capture_updates(states[1], settings, device)
    for _ in range(3):
        train_step(states[0], settings, images, device)
        train_step(states[1], settings, images, device, updates)
    for name in ("generator", "critic", "ema"):
        assert equal(getattr(states[0], name).state_dict(), getattr(states[1], name).state_dict()), name
    for name in ("optim_g", "optim_d"):
        assert equal(*(getattr(state, name).state_dict()["state"] for state in states)), name


@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("flags", ["", "--lipschitz clip --norm batch"])
def test_the_fast_step_is_the_plain_step(flags, precise, monkeypatch):
    """Same seeds, 50 steps: the loop's own step against one written plainly, without any of its means.

    Sums in another order differ by rounding, and Adam takes a whole step along a gradient that is nothing but
    rounding, so with a penalty two fp32 runs are far apart after a dozen steps. Double precision shows that there
    is nothing else between them.
    """
    if precise:
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    number, tolerance = (torch.float64, 1e-7) if precise else (torch.float32, 1e-2)
    real_noise = Trainloop.draw_noise

    def noise_of(settings, step):
        return {k: v.to(number) if v.is_floating_point() else v for k, v in real_noise(settings, step).items()}

    monkeypatch.setattr(Trainloop, "draw_noise", noise_of)
    settings, device = settings_of(*flags.split(), "--n-critic", "1"), torch.device("cpu")
    state, other = build_state(settings, device), build_state(settings, device)
    for network in (state.generator, state.critic, state.ema, other.generator, other.critic):
        network.to(number)
    g = other.generator.to(memory_format=torch.contiguous_format)
    d = other.critic.to(memory_format=torch.contiguous_format)
    optim_g = torch.optim.Adam(g.parameters(), settings.lr_g, tuple(settings.betas), foreach=False)
    optim_d = torch.optim.Adam(d.parameters(), settings.lr_d, tuple(settings.betas), foreach=False)
    images = Noise()
    for step in range(50 if precise else 5):
        losses, real, _ = train_step(state, settings, images, device)
        noise = noise_of(settings, step)
        fake = g(noise["z"][0])
        estimate = d(real).mean() - d(fake.detach()).mean()
        loss_d = -estimate
        if settings.lipschitz == "gp":
            mix = noise["epsilon"][0] * real + (1 - noise["epsilon"][0]) * fake.detach()
            mix.requires_grad_()
            slope = torch.autograd.grad(d(mix), mix, torch.ones(len(mix), dtype=number), create_graph=True)[0]
            loss_d = loss_d + 10 * ((slope.square().sum(dim=(1, 2, 3)).sqrt() - 1) ** 2).mean()
        optim_d.zero_grad()
        loss_d.backward()
        optim_d.step()
        if settings.lipschitz == "clip":
            for parameter in d.parameters():
                parameter.data.clamp_(-settings.clip, settings.clip)
        loss_g = -d(g(noise["z"][1])).mean()
        optim_g.zero_grad()
        loss_g.backward()
        optim_g.step()
        expected = torch.stack([loss_d, loss_g, estimate]).detach()
        torch.testing.assert_close(losses[:3], expected, rtol=tolerance, atol=tolerance)
    for mine, plain in ((state.generator, g), (state.critic, d)):
        a, b = (torch.cat([p.detach().flatten() for p in network.parameters()]) for network in (mine, plain))
        assert (a - b).norm() < tolerance * b.norm()


def test_a_checkpoint_is_plain_and_complete(tiny, tmp_path):
    assert tiny("--steps", 1, "--out", "run") == 0
    file = torch.load(tmp_path / "run/checkpoint_000001.pt", weights_only=True)
    assert {"format", "step", "settings", "generator", "critic", "ema", "optim_g", "optim_d", "rng"} <= set(file)
    assert file["step"] == 1 and file["settings"]["n_critic"] == 2
    assert {"command", "versions", "data"} <= set(file["made_by"])
    small = torch.load(tmp_path / "run/generator_000001.pt", weights_only=True)
    assert equal(small["generator"]["state"], file["ema"]) and "critic" not in small
    z = torch.randn(2, 100)
    loads = [load_generator(tmp_path / f"run/{kind}_000001.pt")(z) for kind in ("checkpoint", "generator")]
    assert torch.equal(*loads)


def test_all_generators_but_only_the_last_checkpoints_are_kept(tiny, tmp_path):
    assert tiny("--steps", 9, "--out", "run", "--checkpoint-every", 2, "--keep", 2) == 0
    names = sorted(p.name for p in (tmp_path / "run").glob("*.pt"))
    assert names == ["checkpoint_000008.pt", "checkpoint_000009.pt"] + [
        f"generator_{i:06d}.pt" for i in (2, 4, 6, 8, 9)
    ]


def test_runs_are_numbered_and_latest_is_the_newest(tiny, tmp_path):
    assert tiny("--steps", 1) == 0 and tiny("--steps", 1, "--seed", 1) == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["0001-faces-32px-gp", "0002-faces-32px-gp"]
    assert tiny("--steps", 1, "--seed", 2, "--out", "runs/64px") == 0  # has no number, so it is not in the order
    assert main(["--resume", "latest", "--steps", "2", "--device", "cpu"]) == 0
    assert (tmp_path / "runs/0002-faces-32px-gp/checkpoint_000002.pt").is_file()


def test_auto_starts_goes_on_and_ends_as_a_requeued_job_needs(tiny, tmp_path, capsys):
    command = ["--out", "run", "--resume", "auto", "--precision", "auto"]
    assert tiny(*command, "--steps", 2) == 0
    assert tiny(*command, "--steps", 4) == 0
    assert "Going on from step 2" in capsys.readouterr().out
    assert tiny(*command, "--steps", 4) == 0
    assert "Nothing to do" in capsys.readouterr().out


def test_on_a_cpu_no_second_thread_computes(tiny, monkeypatch):
    """It would bring OpenMP threads of its own, and slow down all steps after it."""
    threads = []
    for name in ("write_samples", "save_checkpoint"):
        real = getattr(Trainloop, name)
        monkeypatch.setattr(
            Trainloop, name, lambda *args, real=real: (threads.append(threading.current_thread()), real(*args))[1]
        )
    assert tiny("--steps", 2, "--sample-every", 1) == 0
    assert threads == [threading.main_thread()] * 3


def test_a_run_goes_on_from_a_file_that_noted_fewer_numbers(tiny, tmp_path):
    assert tiny("--steps", 3, "--log-every", 2, "--out", "run") == 0
    path = tmp_path / "run/checkpoint_000003.pt"
    file = torch.load(path, weights_only=True)
    assert file["history"].shape == (1, 6)
    torch.save(file | {"history": file["history"][:, :4]}, path)
    assert main(["--resume", "run", "--steps", "4", "--device", "cpu"]) == 0


def test_settings_that_contradict_the_checkpoint_are_refused_naming_both(tiny, faces, tmp_path, capsys):
    assert tiny("--steps", 2, "--out", "run") == 0
    for flags, words in (
        ("--lr-g 0.5", ("--lr-g 0.5", "--lr-g 0.0002")),
        ("--ngf 16", ("--ngf 16", "--ngf 8")),
        ("--seed 3", ("--seed 3", "--seed 0")),
        ("--preset report", ("--size 128", "--size 32")),
    ):
        assert main(["--resume", "run", "--steps", "3", "--device", "cpu", *flags.split()]) == 2
        err = capsys.readouterr().err
        assert all(word in err for word in words) and err.count("\n") == 1
    other = tmp_path / "other"
    shutil.copytree(faces, other)
    (other / "000.png").unlink()
    assert main(["--resume", "run", "--steps", "3", "--device", "cpu", "--data", str(other)]) == 2
    assert "29 images" in (err := capsys.readouterr().err) and "30 others" in err
    moved = tmp_path / "moved"
    shutil.copytree(faces, moved)
    assert main(["--resume", "run", "--steps", "3", "--device", "cpu", "--data", str(moved)]) == 0


def test_a_file_from_before_a_setting_was_there_has_its_default(tiny, tmp_path, capsys):
    assert tiny("--steps", 1, "--out", "run") == 0
    path = tmp_path / "run/checkpoint_000001.pt"
    file = read_model_file(path)
    for name in ("blocks", "attention", "grow_from", "fade_steps", "cuda_graphs"):
        del file["settings"][name]
    for network in ("generator", "critic"):
        for name in ("blocks", "attention", "grown"):
            del file[network]["config"][name]
    torch.save(file, path)
    assert main(["--resume", "run", "--steps", "2", "--device", "cpu", "--blocks", "residual"]) == 2
    assert "--blocks residual" in (err := capsys.readouterr().err) and "--blocks plain" in err
    assert main(["--resume", "run", "--steps", "2", "--device", "cpu"]) == 0


def test_a_folder_that_holds_a_run_is_not_overwritten(tiny, capsys):
    assert tiny("--steps", 1, "--out", "run") == 0
    assert tiny("--steps", 1, "--out", "run") == 2
    assert "--resume latest" in capsys.readouterr().err


def test_going_back_to_an_older_checkpoint_needs_a_new_folder(tiny, tmp_path, capsys):
    assert tiny("--steps", 4, "--out", "run", "--checkpoint-every", 2) == 0
    assert main(["--resume", "run/checkpoint_000002.pt", "--steps", "3", "--device", "cpu"]) == 2
    assert "checkpoint_000004.pt" in capsys.readouterr().err
    assert main(["--resume", "run/checkpoint_000002.pt", "--steps", "3", "--device", "cpu", "--out", "branch"]) == 0
    assert (tmp_path / "branch/checkpoint_000003.pt").is_file()
    assert main(["--resume", "branch", "--steps", "9", "--device", "cpu", "--out", "run"]) == 2
    assert "--out run: holds another run" in capsys.readouterr().err


def test_a_torn_checkpoint_is_passed_over(tiny, tmp_path, capsys):
    assert tiny("--steps", 4, "--out", "run", "--checkpoint-every", 2) == 0
    torn = tmp_path / "run/checkpoint_000004.pt"
    torn.write_bytes(torn.read_bytes()[:1000])
    assert main(["--resume", "run", "--steps", "6", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "torn" in out and "Going on from step 2" in out


def test_auto_does_not_start_anew_where_no_checkpoint_can_be_read(tiny, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoint_000004.pt").write_bytes(b"torn")
    assert tiny("--steps", 1, "--out", "run", "--resume", "auto") == 2
    assert "no checkpoint" in capsys.readouterr().err


def test_a_full_disk_keeps_the_last_checkpoint(tiny, tmp_path, monkeypatch, capsys):
    real_save = torch.save

    def full(content, file):
        if content["step"] == 4:
            file.write(b"x" * 1000)
            raise OSError(28, "No space left on device")
        real_save(content, file)

    monkeypatch.setattr(torch, "save", full)
    assert tiny("--steps", 6, "--out", "run", "--checkpoint-every", 2) == 1
    assert "No space left" in (err := capsys.readouterr().err) and err.count("\n") == 1
    assert [p.name for p in (tmp_path / "run").glob("*_000004.pt")] == [] and not list((tmp_path / "run").glob(".*"))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert main(["--resume", "run", "--steps", "3", "--device", "cpu"]) == 0


def test_a_non_finite_loss_stops_with_its_step_and_keeps_the_checkpoint(tiny, tmp_path, monkeypatch, capsys):
    real_step = Trainloop.critic_step

    def poisoned(state, settings, real, z, epsilon):
        loss, *rest = real_step(state, settings, real, z, epsilon)
        return (loss * float("nan") if state.step == 4 else loss, *rest)

    monkeypatch.setattr(Trainloop, "critic_step", poisoned)
    assert tiny("--steps", 20, "--out", "run", "--checkpoint-every", 3, "--log-every", 10) == 1
    err = capsys.readouterr().err
    assert "at step 5;" in err and "checkpoint_000003.pt" in err and "--lr-d" in err and err.count("\n") == 1
    assert Trainloop.newest_checkpoint(tmp_path / "run")[1]["step"] == 3


def test_a_checkpoint_never_holds_weights_that_are_not_finite(tiny, tmp_path, capsys):
    assert tiny("--lr-g", 1e39, "--steps", 3, "--out", "run", "--checkpoint-every", 1) == 1
    assert "weights are not finite at step 1;" in (err := capsys.readouterr().err) and err.count("\n") == 1
    assert not list((tmp_path / "run").glob("*.pt"))


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
    RuntimeError("CUDA error: out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
])  # fmt: skip
def test_out_of_memory_names_the_batch_size(tiny, monkeypatch, capsys, error):
    def full(*args):
        raise error

    monkeypatch.setattr(Trainloop, "critic_step", full)
    assert tiny("--steps", 2) == 1
    assert "--batch-size" in (err := capsys.readouterr().err) and err.count("\n") == 1


def test_dry_run_prints_and_writes_nothing(tiny, tmp_path, capsys):
    assert tiny("--dry-run") == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("parameters", "memory", "disk", "hours"))
    assert list(tmp_path.iterdir()) == []


# ---- the real command -----------------------------------------------------------------------------------------


def start(faces, tmp_path, *args):
    command = [sys.executable, str(ROOT / "Trainloop.py"), *TINY, "--data", str(faces), *map(str, args)]
    return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition, run, seconds=120):
    end = time.time() + seconds
    while not condition() and run.poll() is None and time.time() < end:
        time.sleep(0.02)
    assert condition(), run.communicate()[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_a_signal_ends_in_a_checkpoint(faces, tmp_path, number):
    run = start(faces, tmp_path, "--steps", 10**6, "--out", "run", "--checkpoint-every", 5)
    wait_for(lambda: list(tmp_path.glob("run/checkpoint_*.pt")), run)
    run.send_signal(number)
    out = run.communicate(timeout=60)[0]
    assert run.returncode == 128 + number and "--resume run" in out and "Traceback" not in out
    path, file = Trainloop.newest_checkpoint(tmp_path / "run")
    assert f"at step {file['step']:,}" in out


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_kill_9_in_a_checkpoint_loses_nothing_before_it(faces, tmp_path, monkeypatch):
    """Checkpoints after every step keep the process inside torch.save most of the time; kill it there."""
    run = start(faces, tmp_path, "--steps", 10**6, "--out", "run", "--checkpoint-every", 1)
    wait_for(lambda: len(list(tmp_path.glob("run/generator_*.pt"))) > 4 and list(tmp_path.glob("run/.*.tmp")), run)
    run.kill()
    run.wait()
    time.sleep(1)  # the order of TensorBoard's files is by the seconds in their names
    path, file = Trainloop.newest_checkpoint(tmp_path / "run")
    step = file["step"]
    assert step >= 3
    monkeypatch.chdir(tmp_path)
    assert main(["--resume", "run", "--steps", str(step + 2), "--device", "cpu", "--checkpoint-every", "1"]) == 0
    assert not list(tmp_path.glob("run/.*.tmp"))
    steps = list(scalars("run"))
    assert steps == sorted(set(steps)) and steps == list(range(2, step + 3, 2))  # no gap and no double


def test_the_real_command_trains_on_drawn_faces_in_an_empty_folder(tmp_path):
    command = [sys.executable, str(ROOT / "Trainloop.py"), *TINY, "--steps", "3"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "No CelebA" in run.stdout and "Finished step 3" in run.stdout
    folder = next((tmp_path / "runs").iterdir())
    assert Image.open(folder / "samples.png").size == (8 * 34, 4 * 34)
    events = EventAccumulator(str(folder)).Reload()
    expected = {"loss/critic", "loss/generator", "critic/wasserstein", "critic/gradient_penalty",
                "critic/gradient_norm", "generator/gradient_norm", "generator/diversity",
                "speed/images_per_second"}  # fmt: skip
    assert set(events.Tags()["scalars"]) == expected
    assert set(events.Tags()["images"]) == {"samples/generated", "samples/real"}
    assert b"batch_size" in events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0]


def test_a_tile_shows_image_i_in_cell_i():
    images = torch.linspace(-1, 1, 17).view(17, 1, 1, 1).expand(17, 3, 5, 5)
    picture = Trainloop.tile(images)
    assert picture.shape == (2 * 7, 8 * 7, 3)  # the 17th fills no row
    cells = picture.reshape(2, 7, 8, 7, 3)
    for i in range(16):
        assert (cells[i // 8, 1:6, i % 8, 1:6] == round(255 * i / 16)).all()
    assert (cells[:, 0] == 255).all()
    assert Trainloop.tile(images[:3]).shape == (7, 3 * 7, 3)  # a small batch


def test_diversity_is_zero_when_all_images_are_alike():
    same = torch.rand(1, 3, 8, 8).expand(6, 3, 8, 8)
    assert Trainloop.spread(same) < 1e-6
    assert Trainloop.spread(torch.rand(6, 3, 8, 8)) > 0.2
    assert Trainloop.spread(same[:1]) == 0  # one image: no spread, and no NaN


def test_precision_auto_is_fp32_without_matrix_units(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False}, raising=False)
    assert resolve_precision("auto", cpu) == "fp32"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert resolve_precision("auto", cpu) == "bf16"
    assert resolve_precision("fp32", cpu) == "fp32"


def test_checkpoint_holds_plain_types_only(faces):
    settings = settings_of()
    content = checkpoint_of(build_state(settings, torch.device("cpu")), settings, {"command": "x"})

    def plain(value):
        if isinstance(value, dict):
            return all(map(plain, value.values()))
        if isinstance(value, list | tuple):
            return all(map(plain, value))
        return value is None or type(value) in (torch.Tensor, int, float, str, bool)

    assert plain(content)
