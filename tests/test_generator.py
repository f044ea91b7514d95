import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from Generator import BLOCKS, SIZES, Attention, Generator, coarsen_chroma, latent, to_uint8


@pytest.mark.parametrize("parts", [{"size": size} for size in SIZES] + [
    {"blocks": "nearest"}, {"blocks": "residual"}, {"blocks": "modulated"}, {"attention": 16},
    {"blocks": "residual", "grown": True},
])  # fmt: skip
def test_shape_range_and_config(parts):
    generator = Generator(**{"nz": 10, "ngf": 8, "size": 64} | parts)
    images, size = generator(100 * torch.randn(2, 10)), parts.get("size", 64)
    assert images.shape == (2, 3, size, size) and images.dtype == torch.float32
    assert images.abs().max() <= 1 and images.std() > 0
    Generator(**generator.config).load_state_dict(generator.state_dict())  # the config says all that a network needs


def test_widths_are_those_of_the_slides():
    generator = Generator(nz=100, ngf=64, size=128)
    shapes = {}
    generator.linear.register_forward_hook(lambda m, i, out: shapes.update({4: (out.shape[1] // 16, 4, 4)}))
    for resolution, block in generator.up.items():
        block.register_forward_hook(lambda m, i, out, r=int(resolution): shapes.update({r: tuple(out.shape[1:])}))
    generator(torch.randn(1, 100))
    assert shapes == {
        4: (512, 4, 4), 8: (512, 8, 8), 16: (256, 16, 16), 32: (128, 32, 32), 64: (64, 64, 64), 128: (32, 128, 128)
    }  # fmt: skip


def test_stem_norm_is_batchnorm_and_relu():
    """The parameter count cannot see a ReLU, so look at what enters the first block."""
    for stem_norm in (True, False):
        seen = []
        generator = Generator(nz=10, ngf=8, size=32, stem_norm=stem_norm)
        generator.up["8"].register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        generator(torch.randn(16, 10))
        assert (seen[0].min() >= 0) == stem_norm


def test_attention_is_the_identity_at_first_then_sees_all_positions():
    layer, x = Attention(16), torch.randn(2, 16, 8, 8)
    assert torch.equal(layer(x), x)
    layer.gate.data.fill_(1.0)
    other = x.clone()
    other[:, :, 7, 7] += 5  # one corner
    assert not torch.allclose(layer(x)[:, :, 0, 0], layer(other)[:, :, 0, 0])  # seen in the opposite one


def test_attention_weighs_the_values_by_the_softmax_of_query_times_key():
    """By hand: with a zero query all pooled positions weigh the same, so each sees the mean of the pooled values."""
    layer, x = Attention(16), torch.randn(2, 16, 4, 4)
    layer.gate.data.fill_(0.5)
    layer.query.weight.data.zero_()
    values = nn.functional.max_pool2d(layer.value(x), 2).mean(dim=(2, 3), keepdim=True)  # (2, 8, 1, 1)
    torch.testing.assert_close(layer(x), x + 0.5 * layer.out(values).expand_as(x))


def test_a_generator_with_skip_starts_as_the_enlarged_smaller_one_and_adds_what_the_larger_blocks_draw():
    small, large = Generator(ngf=8, size=64).eval(), Generator(ngf=8, size=256, skip=64).eval()
    missing, unexpected = large.load_state_dict(small.state_dict(), strict=False)
    assert not unexpected and {key.split(".")[1] for key in missing} == {"128", "256"}
    z = torch.randn(3, 100)
    image = nn.functional.interpolate(small(z).atanh(), scale_factor=2, mode="bilinear")  # (3, 3, 128, 128)
    image = nn.functional.interpolate(image, scale_factor=2, mode="bilinear")  # (3, 3, 256, 256), before the Tanh
    torch.testing.assert_close(large(z), image.tanh(), rtol=0, atol=1e-5)
    large.to_rgb["128"].bias.data.fill_(0.5)  # a colour is nothing that the smaller image could not show
    torch.testing.assert_close(large(z), image.tanh(), rtol=0, atol=1e-5)
    nn.init.normal_(large.to_rgb["256"].weight)
    assert not torch.allclose(large(z), image.tanh(), rtol=0, atol=1e-5)


def test_coarse_chroma_is_that_of_jpegs_half_resolution_and_leaves_grey_alone():
    torch.manual_seed(0)
    grey = torch.rand(2, 1, 32, 32).expand(2, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(coarsen_chroma(grey, 16), grey)
    pixels = (torch.rand(32, 32, 3) * 100 + 78).round()  # nothing near 0 and 255, where values would be clamped
    image = (pixels / 127.5 - 1).permute(2, 0, 1)[None]  # (1, 3, 32, 32)
    ours = coarsen_chroma(image, 16)
    y, cb, cr = Image.fromarray(pixels.numpy().astype(np.uint8)).convert("YCbCr").split()
    smooth = [c.reduce(2).resize((32, 32), Image.Resampling.BILINEAR) for c in (cb, cr)]
    theirs = np.asarray(Image.merge("YCbCr", (y, *smooth)).convert("RGB"))
    assert np.abs(np.asarray(to_uint8(ours)[0].permute(1, 2, 0)).astype(int) - theirs).max() <= 3
    generator = Generator(ngf=8, size=64).eval()
    soft = Generator(ngf=8, size=64, chroma_size=32).eval()
    soft.load_state_dict(generator.state_dict())
    z = torch.randn(2, 100)
    assert torch.equal(soft(z), coarsen_chroma(generator(z), 32)) and soft(z).abs().max() <= 1
    assert not torch.allclose(soft(z), generator(z))


@pytest.mark.parametrize("parts", [{}] + [{"blocks": blocks} for blocks in BLOCKS] + [{"attention": 32}])
def test_a_grown_generator_starts_as_the_enlarged_smaller_one_and_ends_as_itself(parts):
    small, large = Generator(ngf=16, size=64, **parts), Generator(ngf=16, size=128, grown=True, **parts)
    missing, unexpected = large.load_state_dict(small.state_dict(), strict=False)
    assert not unexpected and {key.split(".")[1] for key in missing if key != "fade"} == {"128"}
    z = torch.randn(3, 100)
    for mode in (False, True):  # BatchNorm of the running statistics, and of the batch
        small.train(mode), large.train(mode)
        large.fade.fill_(0.0)
        expected = small(z).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)  # (3, 3, 128, 128)
        assert torch.equal(large(z), expected)
        large.fade.fill_(1.0)
        whole = Generator(ngf=16, size=128, **parts).train(mode)
        whole.load_state_dict(large.state_dict(), strict=False)
        assert torch.equal(large(z), whole(z))


def test_impossible_networks_are_refused():
    for arguments, word in (({"attention": 128}, "--attention 128"), ({"attention": 5}, "--attention 5"),
                            ({"size": 32, "grown": True}, "--size 32"), ({"size": 100}, "--size 100"),
                            ({"skip": 128}, "--skip 128"), ({"chroma_size": 128}, "--chroma-size 128"),
                            ({"ngf": 0}, "--ngf 0"), ({"ngf": 4, "size": 512}, "--ngf 4")):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            Generator(**arguments)


def test_a_seed_is_the_same_latent_in_every_process_and_whatever_was_drawn_before():
    code = "import torch; torch.manual_seed(5); torch.rand(3); import Generator; print(Generator.latent(147).tolist())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    latent(3)
    assert torch.equal(torch.rand(1), expected)  # it leaves the global random numbers alone
    assert str(latent(147).tolist()) == other.strip()
    assert latent(147).shape == (100,) and latent(147).dtype == torch.float32
    assert not torch.equal(latent(147), latent(148))
    # A seed means a face for ever: these numbers must never change.
    assert latent(0)[:3].tolist() == pytest.approx([-1.1258398294448853, -1.152360200881958, -0.2505785822868347])
    with pytest.raises(ValueError, match="4294967296"):
        latent(2**32)


def test_importing_the_scripts_builds_nothing_and_draws_nothing(tmp_path):
    code = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
before = torch.get_rng_state()
torch.nn.Module.__init__ = None  # building any network would now fail
import Generator, Critic, Dataset, Trainloop, Interpolation, evaluate_models, download_model
assert torch.equal(before, torch.get_rng_state())
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert not list(tmp_path.iterdir())
