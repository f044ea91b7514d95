import json
import re

import pytest
import torch
from PIL import Image

from benchmark import main, plain_images, plain_networks, plain_step
from Dataset import batch_indices, open_data
from drawn_faces import draw_face
from settings import Settings
from training_state import build_state
from training_step import draw_noise, train_step

CPU = torch.device("cpu")
TINY = ["--size=32", "--ngf=8", "--ndf=8", "--batch-size=4", "--rounds=1", "--seconds=0.1", "--device=cpu"]


class Noise:
    """Eight random images, as a dataset for train_step."""

    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def __len__(self):
        return 8

    def batch(self, indices, device):
        return self.images[indices].to(device)


@pytest.mark.parametrize(("loss", "norm"), [("wgan", "batch"), ("wgan-gp", "layer")])
def test_both_ways_do_the_same_mathematics(loss, norm):
    # With plain blocks it takes the most steps until a rounding crosses a ReLU and grows.
    shared = {"size": 32, "ngf": 8, "ndf": 8, "batch_size": 4, "precision": "fp32", "blocks_g": "plain"}
    settings = Settings(loss=loss, norm=norm, clip_value=0.1, ema=0.0, flip=False, lr_g=0.01, **shared)
    state = build_state(settings, CPU)
    generator, critic, *optimizers = plain_networks(settings, CPU)
    for ours, plain in zip((state.optim_g, state.optim_d), optimizers, strict=True):
        for name in ("lr", "betas", "eps", "weight_decay", "amsgrad"):
            assert ours.param_groups[0][name] == plain.param_groups[0][name], name

    # Adam makes a whole step of a gradient that is nothing but rounding error (a bias before a norm has such), so
    # plain gradient descent takes its place where weights are compared.
    descent = [torch.optim.SGD(n.parameters(), 0.01) for n in (state.generator, state.critic, generator, critic)]
    state.optim_g, state.optim_d, *descent = descent
    networks = (generator, critic, *descent)
    pairs = list(zip((generator, critic), (state.generator, state.critic), strict=True))
    start = [[p.detach().clone() for p in plain.parameters()] for plain, _ in pairs]
    for plain, ours in pairs:
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), ours.parameters(), strict=True))

    for step in range(3):
        noise = draw_noise(settings, step)
        real = Noise().batch(batch_indices(8, settings.seed, step * 4, 4), CPU)
        losses = plain_step(networks, settings, real, noise["z"], noise["epsilon"][0])
        scalars = train_step(state, settings, Noise(), CPU)[0]
        ours = [scalars["loss/critic"].item(), scalars["loss/generator"].item()]
        assert ours == pytest.approx(losses, rel=1e-4, abs=1e-5)
    for (plain, ours), before in zip(pairs, start, strict=True):
        for (name, a), b, c in zip(plain.named_parameters(), ours.parameters(), before, strict=True):
            assert (a - b).abs().max() <= 1e-6 + 1e-4 * (a - c).abs().max(), name
        assert max((a - c).abs().max() for a, c in zip(plain.parameters(), before, strict=True)) > 1e-4


def test_both_ways_see_the_same_images(tmp_path):
    (tmp_path / "faces").mkdir()
    for i in range(2):
        Image.fromarray(draw_face(i, 218)[:, 20:198]).save(tmp_path / "faces" / f"{i}.jpg")
    plain = plain_images(tmp_path, 32)
    ours = open_data([tmp_path / "faces"], 32, "squash", quiet=True).batch([0, 1])
    torch.testing.assert_close(torch.stack([plain[i][0] for i in range(2)]), ours)


def no_memory(*args):
    raise MemoryError


def test_command_prints_a_table_and_writes_json_and_what_does_not_fit_becomes_a_note(tmp_path, monkeypatch, capfd):
    file = tmp_path / "numbers.json"
    assert main([*TINY, "--precision=fp32", "--lipschitz=gp", f"--json={file}"]) == 0
    out, err = capfd.readouterr()
    assert "Traceback" not in err and "leaked" not in err
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["size"], row["loss"], row["batch"]) == (32, "wgan-gp", 4)
    assert row["ratio"] == pytest.approx(row["ours_images_per_second"] / row["plain_images_per_second"])  # of one round
    assert 0 < row["ours_data_share"] < 1 and row["plain_memory_gb"] > 0.05 and list(tmp_path.iterdir()) == [file]
    about, _, *table = out.splitlines()
    assert re.search(r"cores; torch \S+; ngf 8; ndf 8; batch_size 4; precision fp32$", about)
    assert (
        len(table) == 3 and {line.count("|") for line in table} == {11} and table[2].startswith("| 32 | wgan-gp | 4 ")
    )
    monkeypatch.setattr("benchmark.plain_way", no_memory)
    assert main([*TINY, "--losses=wgan", f"--json={file}"]) == 1
    rows = json.loads(file.read_text())["rows"]
    assert [row["note"] for row in rows] == ["plain: out of memory"] and rows[0]["ratio"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--size 33", "--size"), ("--losses none", "--losses"), ("--precision fp8", "--precision"),
        ("--batch-size 0", "--batch-size: 0"), ("--ndf 1 --size 128", "--ndf 1"), ("--rounds 0", "--rounds: 0"),
        ("--seconds nan", "--seconds: nan"), ("--device cuda:99", "--device cuda:99"), ("--json .", "--json: ."),
        ("--json=", "--json: the path is empty"), ("--json FILE/x.json", "--json: .*x.json"),
    ],
)  # fmt: skip
def test_bad_flags_give_one_line(flags, message, tmp_path, capfd):
    (tmp_path / "file").touch()
    assert main(flags.replace("FILE", str(tmp_path / "file")).split()) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and re.search(rf"error: .*{message}", err), err
