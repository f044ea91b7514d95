"""The generator: a latent vector becomes a face. Also the one place that knows how a model file looks."""

import contextlib
import ctypes
import re
from pathlib import Path

import torch
from torch import nn

SIZES = (32, 64, 128, 256, 512)  # image sizes in pixels that the networks can be built for
FORMAT = 1  # version of the files that Trainloop.py writes
OUT_OF_MEMORY = "out of memory|enough memory|allocate memory|ALLOC_FAILED"  # CUDA, CPU, cuDNN and cuBLAS
STEM_WIDTH = 512  # channels of the 4x4 block, whatever ngf is (the report's slides)


def latent(seed, nz=100):
    """Return the latent vector that `seed` means: (nz,) float32, standard normal.

    It is drawn by a CPU generator of its own, so a seed is the same face on every device,
    and drawing it disturbs no other random number.

    Raises ValueError for a seed outside 0 .. 2**32 - 1 (torch's CPU generator reads 32 bits,
    so larger seeds would silently repeat smaller ones).
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed} is outside 0 .. {2**32 - 1}")
    return torch.randn(nz, generator=torch.Generator().manual_seed(seed))


def add_device_flag(parser):
    """Declare --device on an argparse parser or group; pick_device takes its value."""
    parser.add_argument("--device", default="auto", help="auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:N or mps")


def pick_device(name):
    """Return the torch.device that the value of --device names.

    Raises ValueError where the machine lacks that device.
    """
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d\d?)?", name):
        raise ValueError(f"--device {name}: unknown; choose auto, cpu, cuda, cuda:N or mps")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA GPUs; try --device auto")
    if device.type == "mps" and not has_mps:
        raise ValueError(f"--device {name}: no Apple GPU here; try --device auto")
    return device


def prepare(device):
    """Set this process up for many batches of the same shape on `device`."""
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # streams and graphs are made on the current one
        torch.backends.cudnn.benchmark = True  # shapes never change
    if device.type == "cpu":
        # glibc gives every large block that is freed back to the system, and pays for new pages at the next step.
        # Keeping them makes a training step 1.2 to 1.4 times as fast.
        with contextlib.suppress(OSError, AttributeError, TypeError):  # another libc than glibc
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large tensor
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


class Up(nn.Module):
    """Double the resolution: (N, c_in, R/2, R/2) -> (N, c_out, R, R)."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv = nn.ConvTranspose2d(c_in, c_out, kernel_size=4, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(c_out)

    def forward(self, x):
        return self.norm(self.conv(x)).relu_()


class ResidualUp(nn.Module):
    """Double the resolution without transposed convolutions: (N, c_in, R/2, R/2) -> (N, c_out, R, R).

    Nearest neighbours and two 3x3 convolutions beside a shortcut, as in the residual networks of Gulrajani et
    al. (2017, appendix F), with the activation last as in Up.
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


class Attention(nn.Module):
    """Self-attention of SAGAN (Zhang et al. 2019, section 3): (N, C, H, W) -> (N, C, H, W).

    `gate`, the paper's gamma, is learned and starts at 0, where the block is the identity. Keys and values are
    pooled to a quarter of the positions, as in the paper's own code. Written out, because the fused attention
    of torch has no second derivative, which the gradient penalty needs.
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


BLOCKS = {"plain": Up, "residual": ResidualUp}


class Generator(nn.Module):
    """The report's generator: (N, nz) latent vectors -> (N, nc, size, size) images in [-1, 1].

    Linear to 4x4x512, one block for each doubling of the resolution, convolution, Tanh.
    One rule gives the width at every resolution R: ngf * 64 / R, that is ngf*8 at 8x8 and ngf/2 at 128x128.
    A state-dict key names the resolution of its block (`up.64.conv.weight`), so that the blocks of a
    128 px model fit into a 256 px one by name.

    nz: length of the latent vector.  ngf: channels at 64x64.  nc: colour channels.  size: pixels, one of SIZES.
    stem_norm: BatchNorm and ReLU after the linear layer. The report's slides have both, its published
    code had neither.
    blocks: "plain", the report's transposed convolutions, or "residual".
    attention: the resolution at which self-attention follows the block, 0 for none.
    grown: the network was grown from one of half its size, whose to_rgb it keeps. The buffer `fade` blends the
    two (Karras et al. 2018, figure 2): 0 gives the smaller network's image with each pixel doubled, 1 its own.

    Raises ValueError for a size, width or resolution that cannot be built.
    """

    def __init__(self, nz=100, ngf=64, nc=3, size=128, stem_norm=True, blocks="plain", attention=0, grown=False):
        super().__init__()
        self.config = {"nz": nz, "ngf": ngf, "nc": nc, "size": size, "stem_norm": stem_norm, "blocks": blocks,
                       "attention": attention, "grown": grown}  # fmt: skip
        check_size("ngf", ngf, size)
        check_parts(size, blocks, attention, grown)
        if nz < 1:
            raise ValueError(f"--nz {nz}: the latent vector needs at least one number")
        self.nz, self.size = nz, size

        self.linear = nn.Linear(nz, STEM_WIDTH * 4 * 4)
        self.stem_norm = nn.BatchNorm2d(STEM_WIDTH) if stem_norm else None
        self.up = nn.ModuleDict()
        width = {4: STEM_WIDTH} | {r: ngf * 64 // r for r in (8, 16, *SIZES) if r <= size}  # resolution -> channels
        for resolution in list(width)[1:]:
            self.up[str(resolution)] = BLOCKS[blocks](width[resolution // 2], width[resolution])
        self.attention = nn.ModuleDict({str(attention): Attention(width[attention])} if attention else {})
        rgb_sizes = [size // 2, size] if grown else [size]
        self.to_rgb = nn.ModuleDict({str(r): nn.Conv2d(width[r], nc, kernel_size=3, padding=1) for r in rgb_sizes})
        self.register_buffer("fade", torch.ones(()) if grown else None)

    def forward(self, z):
        x = self.linear(z)  # (N, nz) -> (N, 512*4*4)
        x = x.view(-1, STEM_WIDTH, 4, 4)  # (N, 512, 4, 4)
        if self.stem_norm is not None:
            x = self.stem_norm(x).relu_()
        for resolution, block in self.up.items():
            before, x = x, block(x)  # (N, c, R/2, R/2) -> (N, ngf*64/R, R, R)
            if resolution in self.attention:
                x = self.attention[resolution](x)
        # Blend and Tanh in fp32, also under autocast: near -1 and 1 bf16 has no room for 256 grey levels.
        x = self.to_rgb[str(self.size)](x).float()  # (N, nc, size, size)
        if self.fade is not None:
            small = self.to_rgb[str(self.size // 2)](before).float()  # (N, nc, size/2, size/2)
            x = torch.lerp(upsample(small), x, self.fade)
        return x.tanh()

    @classmethod
    def load(cls, path, device="cpu"):
        """Return the generator in any file of this project or of the report, in eval mode.

        path: a checkpoint or a generator file written by Trainloop.py, which is built from the settings saved
        in it, or a file the report published. Where the file has EMA weights, those are taken. Nothing in the
        file is executed.

        Raises FileNotFoundError, or ValueError where the file is not such a model.
        """
        file = read_model_file(path)
        try:
            generator = cls(**file["generator"]["config"])
            generator.load_state_dict(file.get("ema") or file["generator"]["state"])
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            reason = str(error).rpartition("\n")[2].strip()  # torch lists what does not fit, a line each
            raise ValueError(f"{path} does not hold a generator that fits its own settings: {reason}") from error
        if not all(tensor.isfinite().all() for tensor in generator.state_dict().values()):
            raise ValueError(f"{path} holds weights that are not finite; its training has diverged")
        return generator.to(device).eval().requires_grad_(False)


def to_uint8(images):
    """(N, 3, S, S) in [-1, 1] -> uint8 0 .. 255, as a picture file would hold them."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def is_out_of_memory(error):
    """Whether an exception says that the CPU or GPU has too little memory; torch reports it as RuntimeError."""
    return isinstance(error, MemoryError) or re.search(OUT_OF_MEMORY, str(error)) is not None


def check_size(flag, width, size):
    """Raise ValueError unless networks of `size` pixels exist and --`flag` leaves them at least one channel."""
    if size not in SIZES:
        raise ValueError(f"--size {size}: choose one of {', '.join(map(str, SIZES))}")
    if width < 1 or width * 64 < size:
        raise ValueError(f"--{flag} {width}: too narrow for --size {size}, use at least {max(1, size // 64)}")


def check_parts(size, blocks, attention, grown):
    """Raise ValueError unless networks of `size` pixels can have these blocks, this attention, and be grown."""
    if blocks not in BLOCKS:
        raise ValueError(f"--blocks {blocks}: choose one of {', '.join(BLOCKS)}")
    resolutions = [r for r in (8, 16, *SIZES) if r < size]  # the critic has no features at `size` itself
    if attention not in (0, *resolutions):
        raise ValueError(f"--attention {attention}: choose 0 (none), {', '.join(map(str, resolutions))}")
    if grown and size == SIZES[0]:
        raise ValueError(f"--size {size}: the smallest size cannot be grown from another one")


def step_of(path):
    """Return the step in a model file's name, the last number there; -1 without one."""
    return int((re.findall(r"\d+", path.stem) or [-1])[-1])


def read_model_file(path):
    """Return the dict in a model file, with all tensors on the CPU; run nothing in it.

    Raises FileNotFoundError, or ValueError for a file that is torn or that neither this project nor the report wrote.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such model file")
    # The report's files are pickles of a class that was called as ours is. A bare module stands in for it.
    classes = [(nn.Module, "Generator.Generator"), nn.Linear, nn.ConvTranspose2d, nn.Conv2d, nn.BatchNorm2d]
    try:
        with torch.serialization.safe_globals(classes):
            file = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a torn or foreign file
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it names {named[1]}; nothing in it was run" if named else str(error).split(". ")[0].split("\n")[0]
        raise ValueError(f"{path} is not a whole model file ({reason or type(error).__name__})") from error
    if isinstance(file, nn.Module):
        return convert_report_file(file, path)
    if not isinstance(file, dict) or "generator" not in file or "format" not in file:
        raise ValueError(f"{path} is not a model file of this project: it has no generator")
    if file["format"] != FORMAT:
        raise ValueError(f"{path} has format {file['format']}, this version reads format {FORMAT}")
    return file


def convert_report_file(module, path):
    """Return the dict of a model file for `module`, which the report's code pickled whole and `path` held.

    The layers are the same under other names (linear, convT1 .. convT5, bn1 .. bn5, conv), and their numbers
    are taken as they are; `module` itself never runs. Its ngf is read from the layers, its step from the name.

    Raises ValueError where the layers are not those of the report's 128 px generator.
    """
    keys = {"linear": "linear", "conv": "to_rgb.128"}
    for i, resolution in enumerate((8, 16, 32, 64, 128), start=1):
        keys |= {f"convT{i}": f"up.{resolution}.conv", f"bn{i}": f"up.{resolution}.norm"}
    try:
        layers = module._modules
        if set(layers) != set(keys):
            raise ValueError(f"its layers are {', '.join(layers) or 'none'}")
        with torch.device("meta"):  # a plan without memory: it takes over the file's tensors below
            plan = Generator(layers["linear"].in_features, layers["convT4"].out_channels, stem_norm=False)
        state = {}
        for name, layer in layers.items():
            ours = plan.get_submodule(keys[name])
            if str(layer) != str(ours):  # kind, widths, kernel, stride, padding, bias, eps
                raise ValueError(f"its {name} is {layer}, not {ours}")
            tensors = {**layer._parameters, **layer._buffers}
            state |= {f"{keys[name]}.{key}": tensor for key, tensor in tensors.items() if tensor is not None}
        plan.load_state_dict(state, assign=True)  # checks that all are there, and their shapes
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = str(error).rpartition("\n")[2].strip()
        raise ValueError(f"{path} is a pickled module, but not the report's generator: {reason}") from error
    return {
        "format": FORMAT,
        "step": max(step_of(path), 0),
        "settings": plan.config | {"crop": "squash", "split": "all", "lipschitz": "clip", "norm": "batch"},
        "generator": {"config": plan.config, "state": dict(plan.state_dict())},
        "made_by": {"command": "the report's code, torch.save(model)", "data": "CelebA, img_align_celeba"},
    }
