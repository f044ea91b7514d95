"""The critic, the Wasserstein losses it defines, and the two ways to keep it Lipschitz."""

import torch
from torch import nn

from Generator import SIZES, check_size

NORMS = ("batch", "layer", "none")


class Down(nn.Module):
    """Halve the resolution: (N, c_in, R, R) -> (N, c_out, R/2, R/2)."""

    def __init__(self, c_in, c_out, norm):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel_size=4, stride=2, padding=1, bias=norm == "none")
        # GroupNorm with one group is LayerNorm over (C, H, W): each image by itself, as the penalty needs it.
        self.norm = {"batch": nn.BatchNorm2d, "layer": lambda c: nn.GroupNorm(1, c), "none": nn.Identity}[norm](c_out)

    def forward(self, x):
        return nn.functional.leaky_relu(self.norm(self.conv(x)), 0.2, inplace=True)


class Critic(nn.Module):
    """The report's critic: (N, nc, size, size) images in [-1, 1] -> (N,) unbounded scores, higher for real ones.

    Convolutions halve the resolution down to 4x4, then one linear layer. The first of them has no norm.
    Width after the convolution that ends at resolution R: ndf * 64 / R, that is ndf at 64x64, ndf*16 at 4x4.
    A state-dict key names the resolution that enters its block (`from_rgb.128`, `down.64`).

    norm: "batch" (the report), "layer" (Gulrajani et al. 2017, section 4) or "none". BatchNorm lets the
    images of a batch see each other, so it must not be combined with the gradient penalty.

    Raises ValueError for a size, width or norm that cannot be built.
    """

    def __init__(self, ndf=64, nc=3, size=128, norm="layer"):
        super().__init__()
        self.config = {"ndf": ndf, "nc": nc, "size": size, "norm": norm}
        check_size("ndf", ndf, size)
        if norm not in NORMS:
            raise ValueError(f"--norm {norm}: choose one of {', '.join(NORMS)}")
        self.norm, self.size = norm, size

        width = ndf * 128 // size
        self.from_rgb = nn.ModuleDict(
            {str(size): nn.Conv2d(nc, width, kernel_size=4, stride=2, padding=1, bias=norm == "none")}
        )
        self.down = nn.ModuleDict()
        for resolution in (r for r in (*SIZES[::-1], 16, 8) if r < size):
            self.down[str(resolution)] = Down(width, ndf * 128 // resolution, norm)
            width = ndf * 128 // resolution
        self.head = nn.Linear(width * 4 * 4, 1)

    def forward(self, x):
        x = self.from_rgb[str(self.size)](x)  # (N, nc, size, size) -> (N, ndf*128/size, size/2, size/2)
        x = nn.functional.leaky_relu(x, 0.2, inplace=True)
        for block in self.down.values():
            x = block(x)  # (N, c, R, R) -> (N, ndf*128/R, R/2, R/2)
        # The loss is a small difference of large scores, so the last layer stays fp32 under autocast.
        with torch.autocast(x.device.type, enabled=False):
            return self.head(x.flatten(1).float()).squeeze(1)  # (N, ndf*16*4*4) -> (N,)


def critic_loss(real_scores, fake_scores):
    """Wasserstein loss of the critic (Arjovsky et al. 2017, algorithm 1): two (N,) tensors -> scalar to minimise.

    The critic shall give real images high and generated ones low scores, so it minimises fake - real.
    The report had the sign the wrong way round at first, real - fake, and got very bad results until its
    supervisor saw it (section 3.3.1): so minimised, it teaches the critic to score fakes above real images.
    With the right sign the loss is negative while the critic can tell the two apart, and -loss estimates
    the distance.
    """
    return fake_scores.mean() - real_scores.mean()


def generator_loss(fake_scores):
    """Wasserstein loss of the generator: (N,) scores of its images -> scalar to minimise."""
    return -fake_scores.mean()


def gradient_penalty(critic, real, fake, epsilon):
    """Mean of (||gradient of the score|| - 1)**2 at points between real and fake (Gulrajani et al. 2017, eq. 3).

    real, fake: (N, C, H, W).  epsilon: (N, 1, 1, 1) in [0, 1], the share of the real image in each mix.
    The norm is over all pixels and channels of one image, in fp32. Returns a scalar without the factor lambda.

    Raises ValueError for a critic with BatchNorm.
    """
    if any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)) for m in critic.modules()):
        raise ValueError(
            "--lipschitz gp cannot be combined with --norm batch: the penalty is about each image alone, and "
            "BatchNorm makes every score depend on the whole batch; use --norm layer or --norm none"
        )
    mix = torch.lerp(fake, real, epsilon).detach().requires_grad_()  # (N, C, H, W)
    (gradient,) = torch.autograd.grad(critic(mix).sum(), mix, create_graph=True)  # (N, C, H, W)
    norm = torch.linalg.vector_norm(gradient.flatten(1).float(), dim=1)  # (N, C*H*W) -> (N,)
    return (norm - 1).square().mean()


@torch.no_grad()
def clip_weights(critic, bound):
    """Clamp every parameter to [-bound, bound] in place: the report's Lipschitz constraint (Arjovsky et al. 2017)."""
    for parameter in critic.parameters():
        parameter.clamp_(-bound, bound)
