"""The generator's second stage: it draws an image anew at twice its size, as photographs look there."""

from torch import nn
from torch.nn.functional import avg_pool2d, interpolate, leaky_relu


class Residual(nn.Module):
    """Two convolutions beside the identity, without norms (Lim et al. 2017, section 3.1): (N, C, R, R) -> the same."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        nn.init.normal_(self.conv2.weight, std=0.02)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x):
        return x + self.conv2(leaky_relu(self.conv1(leaky_relu(x, 0.2)), 0.2))


class Refiner(nn.Module):
    """(N, nc, R, R) images in [-1, 1] -> (N, nc, 2R, 2R), which may go a little beyond; it starts as an enlargement.

    A U-Net (Ronneberger et al. 2015) on three resolutions, and a sub-pixel convolution (Shi et al. 2016) that draws the
    detail. It sees nothing but the image, so it can learn from photographs and their own reductions, pair by pair
    (Ledig et al. 2017, "SRGAN"), and mends as a second stage what the first has drawn (Zhang et al. 2017, "StackGAN").

    width: channels at R.  R: a multiple of 4.
    """

    def __init__(self, nc=3, width=32):
        super().__init__()
        half, c1, c2, c4 = max(1, width // 2), width, 2 * width, 4 * width
        self.enter = nn.Sequential(nn.Conv2d(nc, c1, kernel_size=3, padding=1), Residual(c1))
        self.down2 = nn.Sequential(nn.Conv2d(c1, c2, kernel_size=4, stride=2, padding=1), Residual(c2))
        self.down4 = nn.Sequential(nn.Conv2d(c2, c4, kernel_size=4, stride=2, padding=1), Residual(c4), Residual(c4))
        self.narrow2, self.join2 = nn.Conv2d(c4, c2, kernel_size=1), Residual(c2)
        self.narrow1, self.join1 = nn.Conv2d(c2, c1, kernel_size=1), Residual(c1)
        self.enlarge = nn.Sequential(
            nn.Conv2d(c1, 4 * half, kernel_size=3, padding=1), nn.PixelShuffle(2), Residual(half)
        )
        self.to_rgb = nn.Conv2d(half, nc, kernel_size=3, padding=1)
        nn.init.zeros_(self.to_rgb.weight)
        nn.init.zeros_(self.to_rgb.bias)

    def forward(self, small):
        x1 = self.enter(small)  # (N, nc, R, R) -> (N, C, R, R)
        x2 = self.down2(x1)  # (N, 2C, R/2, R/2)
        x4 = self.down4(x2)  # (N, 4C, R/4, R/4)
        x2 = self.join2(x2 + interpolate(self.narrow2(x4), scale_factor=2))
        x1 = self.join1(x1 + interpolate(self.narrow1(x2), scale_factor=2))
        return add_detail(small, self.to_rgb(self.enlarge(x1)).float())  # (N, nc, 2R, 2R)


def add_detail(small, detail):
    """Enlarge an image, and add to it what it cannot show of another: (N, nc, R, R), (N, nc, 2R, 2R) -> the latter."""
    return detail + interpolate(small - avg_pool2d(detail, 2), scale_factor=2, mode="bilinear")
