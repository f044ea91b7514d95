import json
import math
import re

import pytest
import torch
from PIL import Image
from torch import nn

import Trainloop
from benchmark import CountFlops, main, matrix_peak, plain_images, plain_networks, plain_step
from Critic import gradient_penalty
from Dataset import batch_indices, draw_face, open_data

CPU = torch.device("cpu")
TINY = ["--size=32", "--ngf=8", "--ndf=8", "--batch-size=4", "--rounds=1", "--seconds=0.1", "--device=cpu"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Steps are tiny here: beside other work, threads would mostly wait for each other."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the children's
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Noise:
    """Eight random images, as a dataset for train_step."""

    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return 8

    def batch(self, indices, device):
        return self.images[indices] / 127.5 - 1


@pytest.mark.parametrize(("lipschitz", "norm"), [("clip", "batch"), ("gp", "layer")])
def test_both_ways_do_the_same_mathematics(lipschitz, norm):
    flags = "--size=32 --ngf=8 --ndf=8 --batch-size=4 --n-critic=1 --ema=0 --no-flip --precision=fp32 --clip=0.1"
    settings = Trainloop.read_settings([*flags.split(), f"--lipschitz={lipschitz}", f"--norm={norm}"])[0]
    state = Trainloop.build_state(settings, CPU)
    generator, critic, *optimizers = plain_networks(settings, CPU)
    for ours, plain in zip((state.optim_g, state.optim_d), optimizers, strict=True):
        for name in ("lr", "betas", "eps", "weight_decay", "amsgrad"):
            assert ours.param_groups[0][name] == plain.param_groups[0][name], name

    # Adam makes a whole step of a gradient that is nothing but rounding error (a bias before a norm has such), so
    # plain gradient descent takes its place where weights are compared.
    def descent(network):
        return torch.optim.SGD(network.parameters(), lr=1e-2)

    state.optim_g, state.optim_d = descent(state.generator), descent(state.critic)
    networks = (generator, critic, descent(generator), descent(critic))
    pairs = list(zip((generator, critic), (state.generator, state.critic), strict=True))
    start = [[p.detach().clone() for p in plain.parameters()] for plain, _ in pairs]
    for plain, ours in pairs:
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), ours.parameters(), strict=True))

    for step in range(3):
        noise = Trainloop.draw_noise(settings, step)
        real = Noise.images[batch_indices(8, settings.seed, step * 4, 4)] / 127.5 - 1
        losses = plain_step(networks, settings, real, noise["z"], noise["epsilon"][0])
        torch.testing.assert_close(
            torch.tensor(losses), Trainloop.train_step(state, settings, Noise(), CPU)[0][:2], rtol=1e-4, atol=1e-5
        )
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


def test_flops_of_a_step_are_those_counted_by_hand():
    images = torch.randn(2, 3, 16, 16)
    # 2 operations * batch * output pixels * channels in * channels out * taps
    first, second, head = 2 * 2 * 8 * 8 * 3 * 5 * 16, 2 * 2 * 4 * 4 * 5 * 7 * 16, 2 * 2 * 7 * 4 * 4
    network = nn.Sequential(
        nn.Conv2d(3, 5, 4, 2, 1, bias=False), nn.Conv2d(5, 7, 4, 2, 1), nn.Flatten(), nn.Linear(7 * 4 * 4, 1)
    )
    with CountFlops() as counter:
        network(images).sum().backward()
    forward = first + second + head
    assert counter.total == 3 * forward - first  # nobody asks for the images' gradient

    # The penalty: forward; the gradient of all layers' inputs; from that the gradients of all weights, and of all
    # incoming gradients but the head's, which is the constant 1.
    with CountFlops() as counter:
        gradient_penalty(network, images, images + 1, torch.rand(2, 1, 1, 1)).backward()
    assert counter.total == 4 * forward - head

    # A transposed convolution applies its taps at each pixel of its input.
    layer, x = nn.ConvTranspose2d(7, 5, 4, 2, 1), torch.randn(2, 7, 4, 4, requires_grad=True)
    with CountFlops() as counter:
        layer(x).sum().backward()
    assert counter.total == 3 * second


def test_matrix_peak_leaves_the_precision_of_products_as_it_was():
    before = torch.get_float32_matmul_precision()
    assert 1e8 < matrix_peak(CPU, "fp32") < 1e15
    assert torch.get_float32_matmul_precision() == before


def test_command_prints_a_table_and_writes_json(tmp_path, capfd):
    file = tmp_path / "new" / "numbers.json"
    assert main([*TINY, "--precision=fp32", f"--json={file}"]) == 0
    out, err = capfd.readouterr()
    assert "Traceback" not in err and "leaked" not in err
    result = json.loads(file.read_text())
    assert result["device"] and result["torch"] == str(torch.__version__) and result["precision"] == "fp32"
    assert [(row["size"], row["lipschitz"], row["batch"]) for row in result["rows"]] == [(32, "clip", 4), (32, "gp", 4)]
    for row in result["rows"]:
        assert 0 < row["ratio"] < math.inf
        assert 0 < row["peak_share"] < 1 and 0 < row["data_share"] < 1
        # with one round the ratio is that of the two speeds shown
        assert row["ratio"] == pytest.approx(row["ours_images_per_second"] / row["plain_images_per_second"])
    assert list(file.parent.iterdir()) == [file]

    about, _, *table = out.splitlines()
    assert re.search(r"; torch \S+; ours in fp32, .*; ngf 8, ndf 8; matrix peak [\d.,]+ TFLOP/s$", about)
    assert {line.count("|") for line in table} == {11} and len(table) == 4
    assert table[2].startswith("| 32 | clip | 4 | ") and table[3].startswith("| 32 | gp | 4 | ")


def test_what_does_not_fit_becomes_a_note_and_the_next_row_is_tried(tmp_path, capfd):
    file = tmp_path / "numbers.json"
    assert main([*TINY, "--ngf=1000000000", f"--json={file}"]) == 1  # 262 TB of weights
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    rows = json.loads(file.read_text())["rows"]
    assert [row["note"] for row in rows] == ["plain: out of memory"] * 2
    assert all(row["ratio"] is None for row in rows)
    assert "| 32 | gp | 4 | plain: out of memory | " in out and "matrix peak not measured" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--size 33", "--size"), ("--lipschitz none", "--lipschitz"), ("--precision fp8", "--precision"),
        ("--batch-size 0", "--batch-size 0"), ("--ngf 0", "--ngf 0"), ("--ndf 1 --size 128", "--ndf 1"),
        ("--rounds 0", "--rounds 0"), ("--seconds 0", "--seconds 0"), ("--seconds nan", "--seconds nan"),
        ("--device cuda:99", "--device cuda:99"), ("--json .", "--json ."), ("--json FILE/x.json", "--json .*x.json"),
    ],
)  # fmt: skip
def test_bad_flags_give_one_line(flags, message, tmp_path, capfd):
    (tmp_path / "file").touch()
    try:
        status = main(flags.replace("FILE", str(tmp_path / "file")).split())
    except SystemExit as error:  # argparse's own
        status = error.code
    out, err = capfd.readouterr()
    assert status == 2 and out == ""
    assert err.count("\n") == 1 and re.search(rf"error: .*{message}", err), err
