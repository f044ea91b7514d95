"""The generator: a latent vector becomes a face."""

import torch
from torch import nn

from command_line import UserError

SIZES = (32, 64, 128, 256, 512)  # image sizes in pixels that the networks can be built for
STEM_WIDTH = 512  # channels of the 4x4 block, whatever ngf is (the report's slides)


def latent(seed, nz=100):
    """Return the latent vector that `seed` means: (nz,) float32, standard normal.

    It is drawn by a CPU generator of its own: the same face on every device, and no other random number is disturbed.
    Raises UserError for a seed outside 0 .. 2**32 - 1: torch reads 32 bits, so larger ones would repeat smaller ones.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"seed {seed} is outside 0 .. {2**32 - 1}")
    return torch.randn(nz, generator=torch.Generator().manual_seed(seed))


class Up(nn.Module):
    """Double the resolution: (N, c_in, R/2, R/2) -> (N, c_out, R, R)."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv = nn.ConvTranspose2d(c_in, c_out, kernel_size=4, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(c_out)

    def forward(self, x):
        return self.norm(self.conv(x)).relu_()


class NearestUp(Up):
    """Up by nearest neighbours and a convolution, which leave no checkerboard (Odena et al. 2016)."""

    def __init__(self, c_in, c_out):
        super().__init__(c_in, c_out)
        self.conv = nn.Conv2d(c_in, c_out, kernel_size=3, padding=1, bias=False)

    def forward(self, x):
        return super().forward(upsample(x))


class ResidualUp(nn.Module):
    """Double the resolution: (N, c_in, R/2, R/2) -> (N, c_out, R, R), by nearest neighbours and two convolutions.

    They lie beside a shortcut, as in Gulrajani et al. (2017, appendix F), but with the activation last as in Up.
    """

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, kernel_size=3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(c_out)
        self.shortcut = nn.Conv2d(c_in, c_out, kernel_size=1)

    def forward(self, x):
        y = self.norm1(self.conv1(upsample(x))).relu_()  # (N, c_out, R, R)
        y = self.norm2(self.conv2(y))
        return (y + upsample(self.shortcut(x))).relu_()


class ModulatedNorm(nn.Module):
    """BatchNorm whose scale and shift come from the latent vector: (N, C, H, W), (N, nz) -> (N, C, H, W).

    Self-modulation (Chen et al. 2019, equation 2), which starts near the identity.
    """

    def __init__(self, channels, nz):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.affine = nn.Linear(nz, 2 * channels)
        nn.init.normal_(self.affine.weight, std=0.02)
        nn.init.zeros_(self.affine.bias)

    def forward(self, x, z):
        scale, shift = self.affine(z)[:, :, None, None].to(x.dtype).chunk(2, dim=1)  # (N, C, 1, 1) each
        return torch.addcmul(shift, self.norm(x), 1 + scale)


class ModulatedUp(ResidualUp):
    """ResidualUp, the latent vector in hand: (N, c_in, R/2, R/2), (N, nz) -> (N, c_out, R, R).

    It has ModulatedNorm, and its first convolution at the lower resolution, a quarter of the cost.
    """

    def __init__(self, c_in, c_out, nz):
        super().__init__(c_in, c_out)
        self.norm1, self.norm2 = ModulatedNorm(c_out, nz), ModulatedNorm(c_out, nz)

    def forward(self, x, z):
        y = self.norm1(self.conv1(x), z).relu_()  # (N, c_out, R/2, R/2)
        y = self.norm2(self.conv2(upsample(y)), z)  # (N, c_out, R, R)
        return (y + upsample(self.shortcut(x))).relu_()


class Attention(nn.Module):
    """Self-attention of SAGAN (Zhang et al. 2019, section 3): (N, C, H, W) -> (N, C, H, W).

    `gate`, the paper's gamma, is learned and starts at 0, where the block is the identity. Keys and values are pooled,
    as in the paper's own code. torch's fused attention has no second derivative, which the gradient penalty needs.
    """

    def __init__(self, channels):
        super().__init__()
        inner, half = max(1, channels // 8), max(1, channels // 2)
        self.query = nn.Conv2d(channels, inner, kernel_size=1, bias=False)
        self.key = nn.Conv2d(channels, inner, kernel_size=1, bias=False)
        self.value = nn.Conv2d(channels, half, kernel_size=1, bias=False)
        self.out = nn.Conv2d(half, channels, kernel_size=1, bias=False)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        query = self.query(x).flatten(2)  # (N, C/8, H*W)
        key = nn.functional.max_pool2d(self.key(x), 2).flatten(2)  # (N, C/8, H*W/4)
        value = nn.functional.max_pool2d(self.value(x), 2).flatten(2)  # (N, C/2, H*W/4)
        weights = (query.transpose(1, 2) @ key).softmax(dim=2)  # (N, H*W, H*W/4)
        seen = (value @ weights.transpose(1, 2)).unflatten(2, x.shape[2:])  # (N, C/2, H, W)
        return x + self.gate * self.out(seen)


def upsample(x):
    """Double height and width by repeating pixels: (N, C, H, W) -> (N, C, 2H, 2W)."""
    return nn.functional.interpolate(x, scale_factor=2, mode="nearest")


BLOCKS = {"plain": Up, "nearest": NearestUp, "residual": ResidualUp, "modulated": ModulatedUp}


class Generator(nn.Module):
    """The report's generator: (N, nz) latent vectors -> (N, nc, size, size) images in [-1, 1].

    Linear to 4x4x512, one block for each doubling of the resolution, convolution, Tanh. The width at resolution R is
    ngf * 64 / R: ngf*8 at 8x8, ngf/2 at 128x128. A state-dict key names the resolution of its block, as in
    `up.64.conv.weight`, so that the blocks of a 128 px model fit into a 256 px one by name.

    nz: length of the latent vector.  ngf: channels at 64x64.  nc: colour channels.  size: pixels, one of SIZES.
    stem_norm: BatchNorm and ReLU after the linear layer; the report's slides have both, its published code neither.
    blocks: one of BLOCKS; the report's, as in older files, which do not name them.
    attention: the resolution at which self-attention follows the block, 0 for none.
    skip: each resolution from this one on adds to the image before it, enlarged, what that cannot show, as in a
    Laplacian pyramid (Denton et al. 2015). All but the first start at zero, so that a grown network starts with the
    image of the smaller one, and its colours stay. 0: the image is that of the last resolution alone.
    grown: as earlier versions grew it, from a network of half the size. The buffer `fade` blends the two images (Karras
    et al. 2018, figure 2): 0 gives the smaller one with each pixel doubled, 1 its own.
    chroma_size: the resolution of the image's colours, 0 for its own; see coarsen_chroma.

    Raises UserError for a size, width or resolution that cannot be built.
    """

    def __init__(
        self, nz=100, ngf=64, nc=3, size=128, stem_norm=True, blocks="plain", attention=0, grown=False, skip=0,
        chroma_size=0,
    ):  # fmt: skip
        super().__init__()
        self.config = {"nz": nz, "ngf": ngf, "nc": nc, "size": size, "stem_norm": stem_norm, "blocks": blocks,
                       "attention": attention, "grown": grown, "skip": skip, "chroma_size": chroma_size}  # fmt: skip
        check_shape("--ngf", ngf, size, attention, grown, skip, chroma_size)
        self.nz, self.size, self.modulated, self.chroma_size = nz, size, blocks == "modulated", chroma_size

        self.linear = nn.Linear(nz, STEM_WIDTH * 4 * 4)
        self.stem_norm = nn.BatchNorm2d(STEM_WIDTH) if stem_norm else None
        self.up = nn.ModuleDict()
        width = {4: STEM_WIDTH} | {r: ngf * 64 // r for r in (8, 16, *SIZES) if r <= size}  # resolution -> channels
        for resolution in list(width)[1:]:
            channels = width[resolution // 2], width[resolution]
            self.up[str(resolution)] = ModulatedUp(*channels, nz) if self.modulated else BLOCKS[blocks](*channels)
        self.attention = nn.ModuleDict({str(attention): Attention(width[attention])} if attention else {})
        first = skip or (size // 2 if grown else size)
        rgb_sizes = [r for r in width if r >= first]
        self.to_rgb = nn.ModuleDict({str(r): nn.Conv2d(width[r], nc, kernel_size=3, padding=1) for r in rgb_sizes})
        for resolution in rgb_sizes[1:] if skip else []:
            nn.init.zeros_(self.to_rgb[str(resolution)].weight)
            nn.init.zeros_(self.to_rgb[str(resolution)].bias)
        self.register_buffer("fade", torch.ones(()) if grown else None)

    def forward(self, z):
        x = self.linear(z)  # (N, nz) -> (N, 512*4*4)
        x = x.view(-1, STEM_WIDTH, 4, 4)  # (N, 512, 4, 4)
        if self.stem_norm is not None:
            x = self.stem_norm(x).relu_()
        image = None
        for resolution, block in self.up.items():
            x = block(x, z) if self.modulated else block(x)  # (N, c, R/2, R/2) -> (N, ngf*64/R, R, R)
            if resolution in self.attention:
                x = self.attention[resolution](x)
            if resolution in self.to_rgb:
                # Sum, blend and Tanh in fp32, also under autocast: near -1 and 1 bf16 has no room for 256 grey levels.
                small, image = image, self.to_rgb[resolution](x).float()  # (N, nc, R/2, R/2), (N, nc, R, R)
                if small is not None and self.fade is None:
                    small = small - nn.functional.avg_pool2d(image, 2)
                    image = image + nn.functional.interpolate(small, scale_factor=2, mode="bilinear")
                elif small is not None:
                    image = torch.lerp(upsample(small), image, self.fade)
        image = image.tanh()  # (N, nc, size, size)
        return coarsen_chroma(image, self.chroma_size) if self.chroma_size else image


def coarsen_chroma(image, size):
    """Hold the chroma at `size` pixels and the luma at all: (N, 3, S, S) in [-1, 1] -> the same.

    Most photographs have been through that, as JPEG's chroma subsampling (ITU-T T.81), and have no finer colours, where
    a network leaves coloured noise.
    """
    luma = (image * image.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)  # (N, 1, S, S)
    chroma = nn.functional.avg_pool2d(image - luma, image.shape[-1] // size)  # (N, 3, size, size)
    chroma = nn.functional.interpolate(chroma, image.shape[2:], mode="bilinear")  # (N, 3, S, S)
    return (luma + chroma).clamp(-1, 1)


def to_uint8(images):
    """(N, 3, S, S) in [-1, 1] -> uint8, as a picture file would hold them."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def check_shape(flag, width, size, attention, grown, skip=0, chroma_size=0):
    """Raise UserError unless a network of `size` pixels can have these resolutions and this width, and be grown."""
    if size not in SIZES:
        raise UserError(f"--size {size}: choose one of {', '.join(map(str, SIZES))}")
    if width < 1 or width * 64 < size:
        raise UserError(f"{flag} {width}: too narrow for --size {size}, use at least {max(1, size // 64)}")
    resolutions = [r for r in (8, 16, *SIZES) if r < size]  # the critic has no features at `size` itself
    for name, value in (("--attention", attention), ("--skip", skip), ("--chroma-size", chroma_size)):
        if value not in (0, *resolutions):
            raise UserError(f"{name} {value}: choose 0 (none), {', '.join(map(str, resolutions))}")
    if grown and size == SIZES[0]:
        raise UserError(f"--size {size}: the smallest size cannot be grown from another one")
