import pytest
import torch
from torch import nn

from Critic import NORMS, Critic, critic_loss, generator_loss, gradient_penalty
from Generator import SIZES


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("norm", NORMS)
def test_one_score_for_each_image(size, norm):
    scores = Critic(ndf=8, size=size, norm=norm)(torch.rand(2, 3, size, size) * 2 - 1)
    assert scores.shape == (2,) and scores.dtype == torch.float32


def test_widths_are_those_of_the_slides():
    critic = Critic(ndf=64, size=128, norm="batch")
    shapes = []
    for layer in (*critic.from_rgb.values(), *critic.down.values()):
        layer.register_forward_hook(lambda m, i, out: shapes.append(tuple(out.shape[1:])))
    critic(torch.zeros(1, 3, 128, 128))
    assert shapes == [(64, 64, 64), (128, 32, 32), (256, 16, 16), (512, 8, 8), (1024, 4, 4)]
    assert len([m for m in critic.modules() if isinstance(m, nn.BatchNorm2d)]) == 4  # on all but the first


@pytest.mark.parametrize("norm", NORMS)
def test_only_with_batchnorm_a_score_depends_on_the_other_images(norm):
    critic, images = Critic(ndf=8, size=32, norm=norm), torch.randn(4, 3, 32, 32)
    assert torch.allclose(critic(images)[:1], critic(images[:1]), atol=1e-5, rtol=1e-5) == (norm != "batch")


@pytest.mark.parametrize("parts", [{}, {"blocks": "residual"}, {"attention": 32}])
@pytest.mark.parametrize("norm", ["layer", "none"])
def test_a_grown_critic_starts_with_the_scores_of_the_smaller_one(parts, norm):
    small, large = Critic(ndf=16, size=64, norm=norm, **parts), Critic(16, 3, 128, norm, grown=True, **parts)
    missing, unexpected = large.load_state_dict(small.state_dict(), strict=False)
    assert not unexpected
    assert {".".join(key.split(".")[:2]) for key in missing} == {"fade", "from_rgb.128", "down.64"}
    images = torch.rand(4, 3, 128, 128) * 2 - 1
    halved = images.unflatten(3, (64, 2)).unflatten(2, (64, 2)).mean(dim=(3, 5))  # (4, 3, 64, 64)
    large.fade.fill_(0.0)
    torch.testing.assert_close(large(images), small(halved), atol=1e-5, rtol=1e-5)
    large.fade.fill_(1.0)
    whole = Critic(16, 3, 128, norm, **parts)
    whole.load_state_dict(large.state_dict(), strict=False)
    assert torch.equal(large(images), whole(images))


@pytest.mark.parametrize("blocks", ["plain", "residual"])
def test_a_grown_critic_takes_norms_that_give_fp32_under_autocast(blocks, monkeypatch):
    """As GroupNorm does on CUDA, but not on a CPU; lerp takes one type only."""
    monkeypatch.setattr(nn.GroupNorm, "forward", lambda self, x: x.float())
    critic, images = Critic(8, 3, 64, "layer", blocks, 16, grown=True), torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        scores = critic(images)
        penalty = gradient_penalty(critic, images, images + 1, torch.rand(2, 1, 1, 1))
    assert scores.isfinite().all() and penalty.isfinite()


@pytest.mark.parametrize("parts", [{"blocks": "residual"}, {"attention": 16}, {"grown": True}])
def test_the_penalty_of_every_network_agrees_with_finite_differences(parts, monkeypatch):
    """d penalty / d weight through two derivatives, against the penalty at weight +- step.

    In double precision, so that the step can be too small to take a pixel across LeakyReLU's kink.
    """
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.manual_seed(0)
    critic = Critic(ndf=4, size=64, norm="layer", **parts).double()
    for name, parameter in critic.named_parameters():
        if name.endswith("gate"):
            parameter.data.fill_(0.7)  # at 0 nothing would pass through the attention
    real, fake, epsilon = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64), torch.rand(2, 1, 1, 1)
    real, fake, epsilon = real.double(), fake.double(), epsilon.double()
    gradient_penalty(critic, real, fake, epsilon).backward()
    for name, parameter in critic.named_parameters():
        if not name.endswith(("conv1.weight", "query.weight", "from_rgb.64.weight", "gate")):
            continue
        direction = torch.randn_like(parameter)
        step, values = 1e-7, []
        for sign in (1, -1):
            parameter.data += sign * step * direction
            values.append(gradient_penalty(critic, real, fake, epsilon).item())
            parameter.data -= sign * step * direction
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx((parameter.grad * direction).sum().item(), rel=1e-3, abs=1e-6), name


def test_losses_have_the_right_sign():
    real, fake = torch.tensor([3.0, 5.0]), torch.tensor([1.0, -1.0])
    assert critic_loss(real, fake) == -4  # the critic does well: real images score higher
    assert generator_loss(fake) == 0
    assert generator_loss(fake + 1) < generator_loss(fake)  # the generator gains when its images score higher


@pytest.mark.parametrize("norm, penalty", [(0.0, 1), (1.0, 0), (2.0, 1), (4.0, 9)])
def test_penalty_of_a_linear_critic_is_exact(norm, penalty):
    critic = nn.Sequential(nn.Flatten(), nn.Linear(192, 1))  # its gradient is its weight
    critic[1].weight.data *= norm / critic[1].weight.norm()
    real, fake, epsilon = torch.randn(5, 3, 8, 8), torch.randn(5, 3, 8, 8), torch.rand(5, 1, 1, 1)
    assert gradient_penalty(critic, real, fake, epsilon).item() == pytest.approx(penalty, abs=1e-5)


def test_penalty_is_taken_between_real_and_fake():
    real, fake = torch.full((2, 1, 1, 1), 3.0), torch.zeros(2, 1, 1, 1)
    epsilon = torch.tensor([1.0, 1 / 3]).view(2, 1, 1, 1)  # x = 3 and x = 1
    penalty = gradient_penalty(lambda x: x.square() / 2, real, fake, epsilon)  # its gradient is x itself
    assert penalty.item() == pytest.approx(((3 - 1) ** 2 + 0) / 2)


def test_the_estimate_approaches_the_true_distance():
    """Two grey images that differ by 1 in each of n numbers are a Wasserstein-1 distance of sqrt(n) apart."""
    torch.manual_seed(0)
    critic = Critic(ndf=4, size=32, norm="none")
    optimizer = torch.optim.Adam(critic.parameters(), 2e-3, (0.0, 0.9))
    real, fake = torch.full((8, 3, 32, 32), 0.5), torch.full((8, 3, 32, 32), -0.5)
    distance = (3 * 32 * 32) ** 0.5  # 55.4
    for _ in range(150):
        loss = critic_loss(critic(real), critic(fake))
        penalty = gradient_penalty(critic, real, fake, torch.rand(8, 1, 1, 1))
        optimizer.zero_grad()
        (loss + 10 * penalty).backward()
        optimizer.step()
    # With slope s the critic minimises -s * distance + 10 * (s - 1)**2, so s = 1 + distance / 20.
    assert -loss.item() == pytest.approx(distance * (1 + distance / 20), rel=0.15)
