"""Differentiable augmentation of what a critic sees, real and generated alike (Zhao et al. 2020)."""

import torch
from torch.nn.functional import pad

POLICIES = ("color", "translation", "cutout")
NUMBERS = 7  # random numbers that one image takes, whatever the policies are


def augment(images, policies, random):
    """Return images changed at random, each in its own way: (N, C, S, S) -> (N, C, S, S), with gradients.

    color: brightness by up to 0.5, saturation by a factor of 0 to 2, contrast of 0.5 to 1.5.
    translation: by up to an eighth of the side, zeros come in.  cutout: a square of half the side becomes zero.

    policies: some of POLICIES.  random: (N, NUMBERS) in [0, 1).
    """
    size = images.shape[2]
    random = random[:, :, None, None, None]  # (N, NUMBERS, 1, 1, 1)
    if "color" in policies:
        images = images + random[:, 0] - 0.5
        grey = images.mean(dim=1, keepdim=True)  # (N, 1, S, S)
        images = torch.lerp(grey, images, 2 * random[:, 1])
        level = images.mean(dim=(1, 2, 3), keepdim=True)  # (N, 1, 1, 1)
        images = torch.lerp(level, images, random[:, 2] + 0.5)
    pixel = torch.arange(size, device=images.device)  # (S,)
    if "translation" in policies:
        border = size // 8
        shift = (random[:, 3:5, 0, 0, 0] * (2 * border + 1)).long()  # (N, 2)
        rows, columns = (pixel + shift[:, :, None]).unbind(1)  # (N, S) each
        number = torch.arange(len(images), device=images.device)[:, None, None]
        padded = pad(images, (border,) * 4).permute(0, 2, 3, 1)  # (N, S + 2 border, S + 2 border, C)
        images = padded[number, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # (N, C, S, S)
    if "cutout" in policies:
        centre = (random[:, 5:7, 0, 0, 0] * size).long()  # (N, 2)
        rows, columns = ((pixel - centre[:, :, None] + size // 4) // (size // 2) == 0).unbind(1)  # (N, S) each
        images = images * ~(rows[:, None, :, None] & columns[:, None, None, :])
    return images
