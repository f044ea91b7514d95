"""Several ranks against one process. All of it runs on the CPU, with gloo."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from test_trainloop import ROOT, TINY, equal, faces, image_steps, main, scalars, wait_for  # noqa: F401 - a fixture

import Trainloop
from checkpoints import read_model_file
from Critic import Critic, gradient_penalty

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="Windows has neither these signals nor ps"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
]
TRAIN = [str(ROOT / "Trainloop.py"), *TINY, "--precision=fp32", "--lr-g=1e-4", "--lr-d=1e-4"]
GP, CLIP = ["--lipschitz=gp"], ["--lipschitz=clip", "--norm=batch"]  # CLIP: BatchNorm in both networks


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
        out = run.communicate(timeout=120)[0]
    finally:
        run.kill()
    assert run.returncode == status, out
    return out


def errors(out):
    return re.findall("^Trainloop.py: error: .*", out, re.MULTILINE)


def children(pid):
    """Return the process ids of a process's children, in the order they were started."""
    table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    return sorted(int(line.split()[0]) for line in table.splitlines() if int(line.split()[1]) == pid)


def weights(folder, step):
    """Return every number of the networks in a checkpoint, BatchNorm's statistics among them, by its name."""
    file = read_model_file(folder / f"checkpoint_{step:06d}.pt")
    networks = {"generator": file["generator"]["state"], "critic": file["critic"]["state"], "ema": file["ema"]}
    return {f"{network}.{name}": t for network, state in networks.items() for name, t in state.items()}


def assert_same_training(one, other, step):
    """Weights and statistics agree to a tenth of what one step changes (--lr-g and --lr-d: 1e-4)."""
    one, other = weights(one, step), weights(other, step)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.fixture(scope="module", params=[GP, CLIP], ids=["gp", "clip"])
def runs(request, faces, tmp_path_factory):  # noqa: F811
    """Return (folder of ten steps in one process, folder of the same on two ranks, the flags of both)."""
    folder = tmp_path_factory.mktemp("ddp")
    flags = [*request.param, f"--data={faces}", "--steps=10", "--checkpoint-every=5"]
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

    Adam divides a gradient by its own size, so where that is near nothing rounding alone moves a weight: by 4e-6 in
    these five steps. With the gradient penalty one more step or two brings a pixel to the other side of a ReLU, and
    that is no longer rounding; it happens in one process, too, if the first weights are multiplied by 1 + 6e-8.
    """
    single, double, flags = runs
    assert_same_training(single, double, step=5)
    if flags[0] in CLIP:
        assert_same_training(single, double, step=10)
    for tag in ("loss/critic", "loss/generator", "critic/wasserstein", "critic/gradient_norm",
                "generator/gradient_norm"):  # fmt: skip
        one, other = scalars(single, tag), scalars(double, tag)
        assert list(one) == list(other) == [2, 4, 6, 8, 10]
        assert [other[step] for step in (2, 4)] == pytest.approx([one[step] for step in (2, 4)], rel=1e-4, abs=1e-6)
        assert list(other.values()) == pytest.approx(list(one.values()), rel=2e-2, abs=1e-6)


def test_only_rank_0_writes(runs):
    single, double, _ = runs
    assert len(list(double.glob("events.*"))) == 1
    kinds = [sorted(re.sub(r"events.*", "events", path.name) for path in run.iterdir()) for run in (single, double)]
    assert kinds[0] == kinds[1]
    assert image_steps(double) == image_steps(single) == [3, 6, 9, 10]


def test_a_run_goes_on_with_another_number_of_ranks(runs):
    """From step 5, between two logs: what was noted of the losses since the first is that of the whole batch."""
    single, double, flags = runs
    if flags[0] in GP:
        pytest.skip("enough with one of them, and this one stays comparable for longer")
    kept = single / "checkpoint_000005.pt", double / "checkpoint_000005.pt"
    history, other = (read_model_file(path)["history"] for path in kept)
    assert len(history) == 1
    torch.testing.assert_close(history, other)
    one, two = single.parent / "one", single.parent / "two"
    assert main([*TRAIN[1:], *flags, f"--resume={kept[1]}", f"--out={one}"]) == 0
    out = end(two_ranks(single.parent, *flags, f"--resume={kept[0]}", f"--out={two}")[0])
    assert "Going on from step 5" in out
    assert_same_training(single, one, step=10)
    assert_same_training(single, two, step=10)
    assert list(scalars(two).values()) == pytest.approx(list(scalars(single).values())[2:], rel=1e-3, abs=1e-6)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(faces, tmp_path):  # noqa: F811
    ranks = two_ranks(tmp_path, f"--data={faces}", "--steps=5000", "--checkpoint-every=5", "--out=run")
    wait_for(lambda: list(tmp_path.glob("run/checkpoint_*.pt")), ranks[0])
    ranks[1].send_signal(signal.SIGTERM)
    out = [end(run, 128 + signal.SIGTERM) for run in ranks]
    step = Trainloop.newest_checkpoint(tmp_path / "run")[1]["step"]
    assert f"Stopped by SIGTERM at step {step:,} " in out[0] and "--resume run" in out[0]
    assert out[1] == "" and "rror" not in out[0]


def test_a_killed_rank_ends_the_run_with_a_message(faces, tmp_path):  # noqa: F811
    run = torchrun(tmp_path, f"--data={faces}", "--steps=5000", "--checkpoint-every=5", "--out=run")
    wait_for(lambda: list(tmp_path.glob("run/checkpoint_*.pt")), run)
    killed = time.monotonic()
    os.kill(children(run.pid)[0], signal.SIGKILL)
    out = end(run, 1)
    assert time.monotonic() - killed < 30
    (line,) = errors(out)
    assert re.search(r"rank 1: lost the other processes \(\w.+\); go on with --resume run$", line)
    assert Trainloop.newest_checkpoint(tmp_path / "run")[1]


def test_what_fails_on_all_ranks_is_one_line(faces, tmp_path):  # noqa: F811
    """Rank 0 tells why, and the others wait for it; so torchrun, which ends all after the first, cannot be faster."""
    for flags, status, words in (
        (["--batch-size=5"], 2, "--batch-size 5: .* 2 processes"),
        (["--lr-g=1e39", "--checkpoint-every=1", "--steps=3"], 1, "weights are not finite at step 1;"),
    ):
        out = [end(run, status) for run in two_ranks(tmp_path, f"--data={faces}", "--out=run", *flags)]
        (line,) = errors(out[0])
        assert re.search(words, line) and "Traceback" not in out[0]
        assert out[1] == ""
    assert not list(tmp_path.glob("run/*.pt"))


def test_every_rank_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(Trainloop, "under_torchrun", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [str(Trainloop.pick_rank_device(name)) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    with pytest.raises(ValueError, match="--device cuda:0: under torchrun"):
        Trainloop.pick_rank_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="no GPU for local rank 2, this machine has 2; .*--nproc-per-node"):
        Trainloop.pick_rank_device("auto")


def test_the_gradient_penalty_refuses_synchronised_batchnorm_too():
    critic = torch.nn.SyncBatchNorm.convert_sync_batchnorm(Critic(8, 3, 32, "batch"))
    with pytest.raises(ValueError, match="--norm batch"):
        gradient_penalty(critic, None, None, None)


def test_batchnorm_over_one_rank_is_batchnorm(monkeypatch):
    """Output, gradients, statistics and counter; in eval mode no process group is needed."""
    monkeypatch.setattr(Trainloop.dist, "get_world_size", lambda: 1)
    ours, theirs = Trainloop.BatchNormOverRanks(5), torch.nn.BatchNorm2d(5)
    x = torch.randn(4, 5, 6, 6) * 3 + 20  # far from 0, where E[x^2] - E[x]^2 would lose digits
    for _ in range(2):
        results = []
        for norm in (ours, theirs):
            copy = x.clone().requires_grad_()
            y = norm(copy)
            y.sin().sum().backward()
            results.append([y, copy.grad, norm.weight.grad, norm.bias.grad])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    assert equal(ours.eval()(x), torch.nn.functional.batch_norm(x, **{k: v for k, v in ours.named_buffers() if v.dim()},
                                                                weight=ours.weight, bias=ours.bias))  # fmt: skip
