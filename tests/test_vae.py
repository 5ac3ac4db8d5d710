"""vae.py: parity with diffusers, the released layout, normalisation, tiling, the losses."""

import os
import re
import subprocess
import sys
import tempfile

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from vae import AutoencoderKL, Downsample, PatchDiscriminator, Upsample, banded, hinge_loss, psnr, vae_loss

TINY = {"latent_channels": 4, "channels": 8, "multipliers": (1, 2, 2, 2), "blocks": 1, "groups": 4}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(*shape, seed=0):
    return torch.rand(*shape, generator=seeded(seed)) * 2 - 1


def diffusers_key(key):
    """A released key under diffusers' name (released_models.md, the VAE)."""
    key = key.replace("norm_out", "conv_norm_out").replace("nin_shortcut", "conv_shortcut")
    key = re.sub(r"down\.(\d)\.block\.", r"down_blocks.\1.resnets.", key)
    key = re.sub(r"down\.(\d)\.downsample\.", r"down_blocks.\1.downsamplers.0.", key)
    key = re.sub(r"up\.(\d)\.block\.", lambda m: f"up_blocks.{3 - int(m[1])}.resnets.", key)
    key = re.sub(r"up\.(\d)\.upsample\.", lambda m: f"up_blocks.{3 - int(m[1])}.upsamplers.0.", key)
    key = re.sub(r"mid\.block_(\d)", lambda m: f"mid_block.resnets.{int(m[1]) - 1}", key)
    key = key.replace("mid.attn_1.", "mid_block.attentions.0.").replace("attentions.0.norm", "attentions.0.group_norm")
    key = re.sub(r"attentions\.0\.([qkv])\.", r"attentions.0.to_\1.", key)
    return key.replace("attentions.0.proj_out", "attentions.0.to_out.0")


def diffusers_vae(widths):
    diffusers = pytest.importorskip("diffusers")
    blocks = len(widths)
    return diffusers.AutoencoderKL(
        block_out_channels=widths, latent_channels=16, layers_per_block=2, down_block_types=["DownEncoderBlock2D"] * blocks,
        up_block_types=["UpDecoderBlock2D"] * blocks, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609)


def test_same_as_diffusers():
    torch.manual_seed(0)
    ours, theirs = AutoencoderKL(channels=32), diffusers_vae((32, 64, 128, 128))
    with torch.no_grad():
        for p in ours.parameters():   # biases and norms that are not zero and one
            p.add_(0.1 * torch.randn_like(p) * p.std().clamp(min=0.5) if p.dim() == 1 else 0)
    theirs.load_state_dict({diffusers_key(k): v.flatten(1) if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", k) else v
                            for k, v in ours.state_dict().items()})
    x = images(2, 3, 48, 80)
    with torch.no_grad():
        posterior = theirs.encode(x).latent_dist
        mean, logvar = ours.encode(x)
        z = ours.to_latents(x, sample=False)
        pairs = [(mean, posterior.mean), (logvar, posterior.logvar), (z, (posterior.mean - 0.0609) * 1.5305),
                 (ours.decode(z), theirs.decode(z / 1.5305 + 0.0609).sample)]
    for a, b in pairs:
        assert a.shape == b.shape and (a - b).norm() / b.norm() < 1e-5


def test_released_size_and_keys():
    with torch.device("meta"):
        ours, theirs = AutoencoderKL(), diffusers_vae((128, 256, 512, 512))
    assert sum(p.numel() for p in ours.parameters()) == 83_819_683
    assert {diffusers_key(k) for k in ours.state_dict()} == set(theirs.state_dict())
    assert {"encoder.down.2.downsample.conv.weight", "encoder.down.1.block.0.nin_shortcut.bias", "encoder.mid.attn_1.proj_out.weight",
            "decoder.up.3.block.2.conv2.weight", "decoder.up.1.upsample.conv.weight", "decoder.norm_out.weight"} <= set(ours.state_dict())


@pytest.mark.parametrize("mean, std", [(0.3, 2.0), (torch.tensor([0.5, -1.0, 2.0, 0.0]), torch.tensor([0.5, 1.0, 3.0, 0.1]))])
def test_normalisation(mean, std):
    vae = AutoencoderKL(**TINY)
    vae.set_normalisation(mean, std)
    z = torch.randn(2, 4, 3, 5, dtype=torch.float64) * torch.as_tensor(std).view(-1, 1, 1) + torch.as_tensor(mean).view(-1, 1, 1)
    assert torch.allclose(vae.denormalise(vae.normalise(z)), z, rtol=0, atol=1e-12)
    assert torch.allclose(vae.normalise(z), (z - torch.as_tensor(mean).view(-1, 1, 1)) / torch.as_tensor(std).view(-1, 1, 1), atol=1e-5)
    again = AutoencoderKL(**vae.config)
    again.load_state_dict(vae.state_dict())
    x = images(1, 3, 16, 24)
    assert torch.equal(again.decode(again.to_latents(x, sample=False)), vae.decode(vae.to_latents(x, sample=False)))


def test_decode_inverts_the_normalisation_of_to_latents():
    vae, x = AutoencoderKL(**TINY), images(2, 3, 16, 24)
    assert torch.allclose(vae.decode(vae.to_latents(x, sample=False)), vae.decoder(vae.encode(x)[0]), atol=1e-5)


def test_samples_have_the_posteriors_mean_and_variance():
    vae, x = AutoencoderKL(**TINY, scale=1.0, shift=0.0), images(1, 3, 16, 16)
    with torch.no_grad():
        mean, logvar = vae.encode(x)
        z = vae.to_latents(x.expand(4000, -1, -1, -1), generator=seeded())
        assert torch.equal(vae.to_latents(x, generator=seeded(3)), vae.to_latents(x, generator=seeded(3)))
    assert torch.allclose(z.mean(0), mean[0], atol=0.1) and torch.allclose(z.var(0).log(), logvar[0], atol=0.15)


@pytest.mark.parametrize("unshuffle, levels", [(1, 4), (2, 3), (4, 2), (2, 2)])
def test_unshuffle_keeps_the_shapes(unshuffle, levels):
    vae = AutoencoderKL(**{**TINY, "multipliers": (1, 2, 2, 2)[:levels]}, unshuffle=unshuffle)
    f = unshuffle * 2 ** (levels - 1)
    x = images(2, 3, 32, 48)
    z = vae.to_latents(x)
    assert vae.factor == f and z.shape == (2, 4, 32 // f, 48 // f) and vae.decode(z).shape == x.shape


def test_attention_can_be_left_out():
    keys = AutoencoderKL(**TINY, attention=False).state_dict().keys()
    assert AutoencoderKL(**TINY).state_dict().keys() - keys == {k for k in AutoencoderKL(**TINY).state_dict() if "attn_1" in k} != set()


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="100 x 64 .* multiples of 8"):
        AutoencoderKL(**TINY).encode(images(1, 3, 64, 100))


def test_kl_and_reconstruction_terms():
    vae, x = AutoencoderKL(**TINY), images(2, 3, 16, 24)
    mean, logvar = vae.encode(x)
    kl = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).sum() / x.numel()
    loss, parts = vae_loss(vae, x, kl_weight=0.3, generator=seeded())
    recon = vae.decoder(mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=seeded()))
    assert torch.allclose(parts["kl"], kl) and torch.allclose(parts["l1"], (recon - x).abs().mean())
    assert torch.allclose(loss, parts["l1"] + parts["mse"] + 0.3 * kl) and torch.allclose(parts["mse"], (recon - x).square().mean())


def test_gradient_reaches_every_parameter():
    vae = AutoencoderKL(**TINY)
    vae_loss(vae, images(2, 3, 16, 24), kl_weight=1e-3)[0].backward()
    assert [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_perceptual_and_adversarial_terms():
    vae, discriminator, x = AutoencoderKL(**TINY), PatchDiscriminator(16), images(2, 3, 64, 64)
    loss, parts = vae_loss(vae, x, kl_weight=0.0, generator=seeded(), perceptual=lambda recon, images: (recon - images).abs().mean((1, 2, 3)))
    assert torch.allclose(parts["perceptual"], parts["l1"]) and torch.allclose(loss, 2 * parts["l1"] + parts["mse"])

    loss, parts = vae_loss(vae, x, kl_weight=0.0, generator=seeded(), discriminator=discriminator, gan_weight=0.5)
    recon = vae.decoder(vae.denormalise(vae.to_latents(x, generator=seeded())))
    last = vae.decoder.conv_out.weight
    gradient, = torch.autograd.grad((recon - x).abs().mean() + (recon - x).square().mean(), last, retain_graph=True)
    with_gan, = torch.autograd.grad(loss, last)
    assert torch.allclose(parts["gan"], -discriminator(recon).mean(), atol=1e-5)
    assert torch.allclose((with_gan - gradient).norm(), 0.5 * gradient.norm(), rtol=1e-2)   # the adaptive weight: half as large a pull


def test_discriminator_learns_to_tell_and_leaves_the_autoencoder_alone():
    torch.manual_seed(0)
    discriminator, real, fake = PatchDiscriminator(16), images(8, 3, 32, 32), images(8, 3, 32, 32, seed=1).mul(0.3).requires_grad_()
    assert discriminator(real).shape == (8, 1, 2, 2)
    assert 0.5 < hinge_loss(discriminator, real, fake) < 2
    optimizer = torch.optim.Adam(discriminator.parameters(), 1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        hinge_loss(discriminator, real, fake).backward()
        optimizer.step()
    assert hinge_loss(discriminator, real, fake) < 0.2 and fake.grad is None


def test_psnr():
    a = torch.zeros(2, 3, 4, 4)
    b = a + torch.tensor([0.2, 0.02])[:, None, None, None]   # a tenth and a hundredth of half the range: 20 and 40 dB
    assert torch.allclose(psnr(a, b), torch.tensor([20.0, 40.0]))


@pytest.mark.parametrize("size", [(3, 7), (17, 41)])
def test_upsampling_is_nearest_then_a_convolution(size):
    layer, x = Upsample(5).double(), torch.randn(2, 5, *size, dtype=torch.float64, requires_grad=True)

    def gradients(f):
        return f(x), *torch.autograd.grad(f(x).tanh().sum(), (x, *layer.parameters()))
    for ours, expected in zip(gradients(layer), gradients(lambda x: layer.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))):
        assert torch.allclose(ours, expected, atol=1e-12)


@pytest.mark.parametrize("height", [2, 6, 32, 50])
@pytest.mark.parametrize("width", [12, 300])
def test_bands_of_a_layer_leave_no_seam(height, width):
    x, conv = images(2, 3, height, width), torch.nn.Conv2d(3, 5, 3, padding=1)
    for layer in (conv, Upsample(3), Downsample(3)):
        with torch.no_grad():
            assert torch.allclose(torch.cat([*banded(layer, x.split(4, dim=2))], dim=2), layer(x), atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"unshuffle": 4, "multipliers": (1, 2), "attention": False}])
@pytest.mark.parametrize("size", [(128, 192), (72, 40)])
def test_tiled_is_whole(options, size):
    """Also where a picture's halves differ: every norm is the whole picture's."""
    torch.manual_seed(0)
    vae, x = AutoencoderKL(**{**TINY, **options}), images(2, 3, *size)
    x[..., :size[0] // 2, :] *= 0.01
    with torch.no_grad():
        z = vae.to_latents(x, sample=False)
        for tiled, whole in ((vae.encode_tiled(x, rows=8), z), (vae.decode_tiled(z, rows=8), vae.decode(z))):
            assert tiled.shape == whole.shape and (tiled - whole).norm() / whole.norm() < 1e-5
    with pytest.raises(ValueError, match="multiples of 8"):
        vae.encode_tiled(images(1, 3, 20, 16))
    with pytest.raises(ValueError, match="bands of 5 rows"):
        vae.encode_tiled(images(1, 3, 16, 16), rows=5)


@pytest.mark.slow
def test_tiled_decoding_of_1024_pixels_takes_a_third_of_the_memory():
    """In a process each, whose peak is then its own; released sizes. What is alive counts, not the holes that glibc keeps of freed memory."""
    code = """
import resource, sys, torch
from vae import AutoencoderKL
torch.manual_seed(0)
vae, z, before = AutoencoderKL().eval(), torch.randn(1, 16, 128, 128), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.inference_mode():
    y = getattr(vae, sys.argv[1])(z)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2 ** 20)
torch.save(y.clone(), sys.argv[2])
"""
    with tempfile.TemporaryDirectory() as folder:
        peaks = [float(subprocess.run([sys.executable, "-c", code, name, f"{folder}/{name}"], env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}, capture_output=True, text=True,
                                      check=True).stdout) for name in ("decode_tiled", "decode")]
        tiled, whole = (torch.load(f"{folder}/{name}") for name in ("decode_tiled", "decode"))
    print(f"peak of decoding 1024 pixels: in bands {peaks[0]:.2f} GiB, whole {peaks[1]:.2f} GiB; PSNR {psnr(tiled, whole).min():.0f} dB")
    assert peaks[0] <= peaks[1] / 3 and psnr(tiled, whole).min() > 80, (peaks, psnr(tiled, whole))


def test_overfits_eight_images():
    torch.manual_seed(0)
    vae = AutoencoderKL(channels=16, multipliers=(1, 2, 4), blocks=1, unshuffle=2, groups=8)
    coarse = images(8, 3, 4, 4)
    x = torch.nn.functional.interpolate(coarse, scale_factor=8)
    optimizer = torch.optim.AdamW(vae.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        vae_loss(vae, x)[0].backward()
        optimizer.step()
    assert psnr(vae.decode(vae.to_latents(x, sample=False)), x).min() > 24
