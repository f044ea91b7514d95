"""The critic, the Wasserstein losses it defines, and the two ways to keep it Lipschitz."""

from functools import partial

import torch
from torch import nn

from Generator import SIZES, Attention, check_shape

# GroupNorm with one group is LayerNorm over (C, H, W): each image by itself, as the gradient penalty needs it.
NORMS = {"batch": nn.BatchNorm2d, "layer": partial(nn.GroupNorm, 1), "none": nn.Identity}  # of a number of channels


def leaky(x):
    return nn.functional.leaky_relu(x, 0.2, inplace=True)


class Down(nn.Module):
    """Halve the resolution: (N, c_in, R, R) -> (N, c_out, R/2, R/2)."""

    def __init__(self, c_in, c_out, norm):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel_size=4, stride=2, padding=1, bias=norm == "none")
        self.norm = NORMS[norm](c_out)

    def forward(self, x):
        return leaky(self.norm(self.conv(x)))


class ResidualDown(nn.Module):
    """Halve the resolution: (N, c_in, R, R) -> (N, c_out, R/2, R/2); the counterpart of Generator.ResidualUp."""

    def __init__(self, c_in, c_out, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_in, kernel_size=3, padding=1, bias=norm == "none")
        self.norm1 = NORMS[norm](c_in)
        self.conv2 = nn.Conv2d(c_in, c_out, kernel_size=3, padding=1, bias=norm == "none")
        self.norm2 = NORMS[norm](c_out)
        self.shortcut = nn.Conv2d(c_in, c_out, kernel_size=1)

    def forward(self, x):
        y = leaky(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))  # (N, c_out, R, R)
        halve = nn.functional.avg_pool2d
        return leaky(halve(y, 2) + self.shortcut(halve(x, 2)))  # (N, c_out, R/2, R/2)


BLOCKS = {"plain": Down, "residual": ResidualDown}


class Critic(nn.Module):
    """The report's critic: (N, nc, size, size) images in [-1, 1] -> (N,) unbounded scores, higher for real ones.

    Convolutions halve the resolution down to 4x4, then one linear layer. The first of them has no norm.
    Width after the convolution that ends at resolution R: ndf * 64 / R, that is ndf at 64x64, ndf*16 at 4x4.
    A state-dict key names the resolution that enters its block (`from_rgb.128`, `down.64`).

    norm: "batch" (the report), "layer" (Gulrajani et al. 2017, section 4) or "none". BatchNorm lets the
    images of a batch see each other, so it must not be combined with the gradient penalty.
    blocks: one of BLOCKS.  attention, grown: as in the generator; attention comes before the block of its resolution,
    and `fade` blends the features that the smaller critic sees in the halved image with those of the new block.

    Raises UserError for a size, width, norm or resolution that cannot be built.
    """

    def __init__(self, ndf=64, nc=3, size=128, norm="layer", blocks="plain", attention=0, grown=False):
        super().__init__()
        self.config = {"ndf": ndf, "nc": nc, "size": size, "norm": norm, "blocks": blocks, "attention": attention,
                       "grown": grown}  # fmt: skip
        check_shape("--ndf", ndf, size, attention, grown)
        self.size = size

        def from_rgb(resolution):
            return nn.Conv2d(nc, width[resolution // 2], kernel_size=4, stride=2, padding=1, bias=norm == "none")

        width = {r: ndf * 64 // r for r in (*SIZES[::-1], 16, 8, 4) if r < size}  # resolution -> channels
        self.from_rgb = nn.ModuleDict({str(r): from_rgb(r) for r in ([size // 2, size] if grown else [size])})
        self.down = nn.ModuleDict()
        for resolution in list(width)[:-1]:
            self.down[str(resolution)] = BLOCKS[blocks](width[resolution], width[resolution // 2], norm)
        self.attention = nn.ModuleDict({str(attention): Attention(width[attention])} if attention else {})
        self.head = nn.Linear(width[4] * 4 * 4, 1)
        self.register_buffer("fade", torch.ones(()) if grown else None)

    def forward(self, images):
        x = leaky(self.from_rgb[str(self.size)](images))  # (N, nc, size, size) -> (N, ndf*128/size, size/2, size/2)
        for resolution, block in self.down.items():
            if resolution in self.attention:
                x = self.attention[resolution](x)
            x = block(x)  # (N, c, R, R) -> (N, ndf*128/R, R/2, R/2)
            if self.fade is not None and 2 * int(resolution) == self.size:
                small = nn.functional.avg_pool2d(images, 2)  # (N, nc, size/2, size/2)
                small = leaky(self.from_rgb[resolution](small))  # (N, ndf*256/size, size/4, size/4)
                # Under autocast a convolution gives bf16, but on CUDA a GroupNorm gives fp32.
                x = torch.lerp(small.to(x.dtype), x, self.fade.to(x.dtype))
        # The loss is a small difference of large scores, so the last layer stays fp32 under autocast.
        with torch.autocast(x.device.type, enabled=False):
            return self.head(x.flatten(1).float()).squeeze(1)  # (N, ndf*16*4*4) -> (N,)


def critic_loss(real_scores, fake_scores):
    """Wasserstein loss of the critic (Arjovsky et al. 2017, algorithm 1): two (N,) tensors -> scalar to minimise.

    The critic shall give real images high and generated ones low scores, so it minimises fake - real. The report had
    the sign the wrong way round at first, and got very bad results until its supervisor saw it (section 3.3.1).
    The loss is negative while the critic can tell the two apart, and -loss estimates the distance.
    """
    return fake_scores.mean() - real_scores.mean()


def generator_loss(fake_scores):
    """Wasserstein loss of the generator: (N,) scores of its images -> scalar to minimise."""
    return -fake_scores.mean()


def gradient_penalty(critic, real, fake, epsilon):
    """Mean of (||gradient of the score|| - 1)**2 at points between real and fake (Gulrajani et al. 2017, eq. 3).

    real, fake: (N, C, H, W).  epsilon: (N, 1, 1, 1) in [0, 1], the share of the real image in each mix.
    The norm is over all pixels and channels of one image, in fp32. Returns a scalar without the factor lambda.
    It is about each image alone, so the critic must not have BatchNorm.
    """
    mix = torch.lerp(fake, real, epsilon).detach().requires_grad_()  # (N, C, H, W)
    score = critic(mix).sum()
    with torch.autocast(mix.device.type, enabled=False):  # each layer's gradient in the type of its forward pass
        (gradient,) = torch.autograd.grad(score, mix, create_graph=True)  # (N, C, H, W)
    norm = torch.linalg.vector_norm(gradient.flatten(1).float(), dim=1)  # (N, C*H*W) -> (N,)
    return (norm - 1).square().mean()


@torch.no_grad()
def clip_weights(critic, bound):
    """Clamp every parameter to [-bound, bound] in place: the report's Lipschitz constraint (Arjovsky et al. 2017)."""
    for parameter in critic.parameters():
        parameter.clamp_(-bound, bound)
