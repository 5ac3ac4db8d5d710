"""The autoencoder: images to latents at an eighth of their side and back (Sec. 5.2.1, App. B.2).

Built as released with SD3 and under Stability's parameter names, so that its weights load with `strict=True`. Read top-down: blocks, encoder,
decoder, the autoencoder, then what trains it. Ours, and off by default: `unshuffle`, `attention=False`, normalisation per channel.

Shapes: B batch, C latent channels (16), D width of a level, H x W pixels, h x w latents (H/8 x W/8), N = h * w positions, r unshuffle.
"""

from collections import OrderedDict
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn


def conv3(d_in, d_out):
    return nn.Conv2d(d_in, d_out, 3, padding=1)


def group_norm(groups, d):
    return nn.GroupNorm(groups, d, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, d_in, d_out, groups):
        super().__init__()
        self.norm1 = group_norm(groups, d_in)
        self.conv1 = conv3(d_in, d_out)
        self.norm2 = group_norm(groups, d_out)
        self.conv2 = conv3(d_out, d_out)
        self.nin_shortcut = nn.Identity() if d_in == d_out else nn.Conv2d(d_in, d_out, 1)

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return self.nin_shortcut(x) + y


class AttnBlock(nn.Module):
    """One head over all positions."""

    def __init__(self, d, groups):
        super().__init__()
        self.norm = group_norm(groups, d)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(d, d, 1) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (f(y).flatten(2).mT[:, None].contiguous() for f in (self.q, self.k, self.v))   # (B, 1, N, D) each; strided, they would get the kernel of O(N^2) memory
        y = F.scaled_dot_product_attention(q, k, v)                                 # (B, 1, N, D)
        return x + self.proj_out(y[:, 0].mT.reshape(x.shape))                       # (B, D, h, w)


class Downsample(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.conv = nn.Conv2d(d, d, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))   # padded right and below only, as the released weights expect


class Upsample(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.conv = conv3(d, d)

    def forward(self, x):
        if x.device.type != "cpu" or x[:, 0].numel() < 1024:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        # Upsampled pixels are equal in fours: with their weights added first, four of nine products are left. Measured on CPUs, from 1024 positions on: up to twice as fast
        weight = F.avg_pool2d(F.pad(self.conv.weight.flip(2, 3), (1, 1, 1, 1)), 2, stride=1, divisor_override=1)      # (D, D, 4, 4)
        return F.conv_transpose2d(x, weight.transpose(0, 1), self.conv.bias, stride=2, padding=1)


def level(d_in, d_out, blocks, groups, **resample):
    """Residual blocks at one resolution, then the module in `resample` (named `downsample` or `upsample`), if any, to the next."""
    blocks = [ResnetBlock(d_in if i == 0 else d_out, d_out, groups) for i in range(blocks)]
    return nn.Sequential(OrderedDict(block=nn.Sequential(*blocks), **resample))


def middle(d, groups, attention):
    attn_1 = AttnBlock(d, groups) if attention else nn.Identity()
    return nn.Sequential(OrderedDict(block_1=ResnetBlock(d, d, groups), attn_1=attn_1, block_2=ResnetBlock(d, d, groups)))


class Encoder(nn.Module):
    def __init__(self, latent_channels, widths, blocks, unshuffle, attention, groups):
        super().__init__()
        self.unshuffle = unshuffle
        self.conv_in = conv3(3 * unshuffle**2, widths[0])
        self.down = nn.Sequential()
        for d_in, d in zip(widths[:1] + widths, widths):
            last = len(self.down) == len(widths) - 1
            self.down.append(level(d_in, d, blocks, groups, **({} if last else {"downsample": Downsample(d)})))
        self.mid = middle(widths[-1], groups, attention)
        self.norm_out = group_norm(groups, widths[-1])
        self.conv_out = conv3(widths[-1], 2 * latent_channels)

    def forward(self, images):
        x = F.pixel_unshuffle(images, self.unshuffle)    # (B, 3r^2, H/r, W/r)
        x = self.down(self.conv_in(x))                   # (B, D, h, w)
        x = self.mid(x)                                  # (B, D, h, w)
        return self.conv_out(F.silu(self.norm_out(x)))   # (B, 2C, h, w)


class Decoder(nn.Module):
    def __init__(self, latent_channels, widths, blocks, unshuffle, attention, groups):
        super().__init__()
        self.unshuffle = unshuffle
        self.conv_in = conv3(latent_channels, widths[-1])
        self.mid = middle(widths[-1], groups, attention)
        self.up = nn.ModuleList()                        # up[0] is the finest level, the last to run
        for d_in, d in zip(widths[1:] + widths[-1:], widths):
            self.up.append(level(d_in, d, blocks + 1, groups, **({"upsample": Upsample(d)} if len(self.up) else {})))
        self.norm_out = group_norm(groups, widths[0])
        self.conv_out = conv3(widths[0], 3 * unshuffle**2)

    def forward(self, z):
        x = self.mid(self.conv_in(z))                    # (B, D, h, w)
        for up in reversed(self.up):
            x = up(x)                                    # (B, D, H/r, W/r) at the end
        x = self.conv_out(F.silu(self.norm_out(x)))      # (B, 3r^2, H/r, W/r)
        return F.pixel_shuffle(x, self.unshuffle)        # (B, 3, H, W)


class AutoencoderKL(nn.Module):
    """The defaults are SD3's: 83.8 M parameters, f = 8.

    f = unshuffle * 2^(levels - 1), so two levels behind a pixel-unshuffle of 4 are f = 8 too, without a convolution at full resolution: the miniature.
    scale, shift: latents leave as (z - shift) * scale; one number, as released, or one for each of the C channels."""

    def __init__(self, latent_channels=16, channels=128, multipliers=(1, 2, 4, 4), blocks=2, scale=1.5305, shift=0.0609,
                 unshuffle=1, attention=True, groups=32):
        super().__init__()
        self.sizes = {"latent_channels": latent_channels, "channels": channels, "multipliers": list(multipliers), "blocks": blocks,
                      "unshuffle": unshuffle, "attention": attention, "groups": groups}
        for value in scale, shift:
            values = value if isinstance(value, (list, tuple)) else [value]
            if len(values) not in (1, latent_channels) or not all(isinstance(number, (int, float)) for number in values):
                raise ValueError(f"the latents' scale and shift are numbers, or {latent_channels} each, one a channel, not {value!r}")
        self.scale, self.shift = scale, shift
        self.factor = unshuffle * 2 ** (len(multipliers) - 1)
        widths = [channels * m for m in multipliers]
        self.encoder = Encoder(latent_channels, widths, blocks, unshuffle, attention, groups)
        self.decoder = Decoder(latent_channels, widths, blocks, unshuffle, attention, groups)

    @property
    def config(self):
        """`AutoencoderKL(**config)` rebuilds this model; a bundle stores it as JSON beside the weights."""
        return {**self.sizes, "scale": self.scale, "shift": self.shift}

    def set_normalisation(self, mean, std):
        """mean, std: numbers or (C,) tensors, of latents as they come from `encode`, over a data set."""
        self.shift = torch.as_tensor(mean).tolist()
        self.scale = (1 / torch.as_tensor(std)).tolist()

    def normalise(self, z):
        return (z - per_channel(self.shift, z)) * per_channel(self.scale, z)

    def denormalise(self, z):
        return z / per_channel(self.scale, z) + per_channel(self.shift, z)

    def check_sides(self, images):
        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(f"images are {width} x {height} (width x height), both sides must be multiples of {self.factor}")

    def encode(self, images):
        """images (B, 3, H, W) in [-1, 1] -> mean and log-variance of the latents before normalisation, each (B, C, h, w)."""
        self.check_sides(images)
        mean, logvar = self.encoder(images).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def to_latents(self, images, sample=True, generator=None):
        """images (B, 3, H, W) in [-1, 1] -> normalised latents (B, C, h, w): a sample of the posterior, or its mean."""
        mean, logvar = self.encode(images)
        return self.normalise(sample_gaussian(mean, logvar, generator) if sample else mean)

    def decode(self, latents):
        """normalised latents (B, C, h, w) -> images (B, 3, H, W) in about [-1, 1], not clamped."""
        return self.decoder(self.denormalise(latents))

    def encode_tiled(self, images, rows=32):
        """`to_latents(images, sample=False)` in less memory: `in_bands`."""
        self.check_sides(images)
        coder, x = self.encoder, F.pixel_unshuffle(images, self.encoder.unshuffle)
        return self.normalise(in_bands(coder, (coder.conv_in, coder.down, coder.mid), x, rows).chunk(2, dim=1)[0])

    def decode_tiled(self, latents, rows=32):
        """`decode(latents)` in less memory: `in_bands`."""
        coder, x = self.decoder, self.denormalise(latents)
        return F.pixel_shuffle(in_bands(coder, (coder.conv_in, coder.mid, *reversed(coder.up)), x, rows), coder.unshuffle)


def per_channel(value, like):
    return like.new_tensor(value).view(-1, 1, 1)   # (1, 1, 1) or (C, 1, 1)


def sample_gaussian(mean, logvar, generator=None, noise=None):
    if noise is None:
        noise = torch.randn(mean.shape, generator=generator, device=generator.device if generator else mean.device, dtype=mean.dtype).to(mean.device)
    return mean + (logvar / 2).exp() * noise


# Tiling. Tiles of the picture would each have norms of their own, and seams; bands of rows, layer by layer, with the norms of the whole are exact.

@torch.no_grad()
def in_bands(coder, layers, x, rows):
    """The layers, then the coder's last norm and convolution, one after another on all of x, which is a list of bands. Whole in memory are at most a residual block's
    input and what is between its convolutions, and never what an upsampling makes, four times its input: each reader makes its band anew. Without gradients."""
    if rows < 2 or rows % 2:
        raise ValueError(f"bands of {rows} rows: they must be even, or halving would take other rows of each")
    bands, made = list(x.split(rows, dim=2)), nn.Identity()
    for layer in flat(layers):
        if isinstance(layer, Upsample):
            made = layer
        elif isinstance(layer, ResnetBlock):
            bands = [part for band in resnet_in_bands(layer, made, bands) for part in band.split(rows, dim=2)]
            made = nn.Identity()
        elif isinstance(layer, AttnBlock):
            bands = list(layer(torch.cat(bands, dim=2)).split(rows, dim=2))      # sees all positions, of which there are few
        elif isinstance(layer, Downsample):
            bands = list(torch.cat([*banded(layer, bands)], dim=2).split(rows, dim=2))
        else:
            bands = list(banded(layer, bands))
    norm = whole_norm(coder.norm_out, bands)
    return torch.cat([*banded(lambda x: coder.conv_out(F.silu(norm(x))), bands)], dim=2)


def resnet_in_bands(block, made, xs):
    """The bands of block(made(x)); takes those of x."""
    norm1 = whole_norm(block.norm1, banded(made, xs))
    ys = list(banded(lambda x: block.conv1(F.silu(norm1(made(x)))), xs))
    norm2 = whole_norm(block.norm2, ys)
    return banded(lambda x, y: block.nin_shortcut(made(x)) + block.conv2(F.silu(norm2(y))), xs, ys, take=True)


def flat(layers):
    for layer in layers:
        yield from flat(layer) if isinstance(layer, nn.Sequential) else [layer]


def whole_norm(norm, bands):
    """The GroupNorm with the statistics of all the bands, for each of them."""
    vars_and_means, rows = zip(*((torch.stack(torch.var_mean(band.unflatten(1, (norm.num_groups, -1)).flatten(2), dim=2, correction=0)), band.shape[2]) for band in bands))
    var, mean = torch.stack(vars_and_means, dim=-1)                                                        # (B, groups, bands)
    share = mean.new_tensor(rows) / sum(rows)
    whole = (share * mean).sum(dim=-1)
    var = (share * (var + (mean - whole[..., None]).square())).sum(dim=-1)
    scale, mean = (s.repeat_interleave(len(norm.weight) // norm.num_groups, dim=1) for s in ((var + norm.eps).rsqrt(), whole))
    scale = scale * norm.weight                                                                            # (B, D)
    shift = norm.bias - mean * scale
    return lambda band: torch.addcmul(shift[:, :, None, None], band, scale[:, :, None, None])


def banded(layer, *xs, take=False):
    """The bands of layer(*xs), one after another. Of the bands above and below two rows are read (of twice as high bands four), and what they become is cut off: a
    convolution reaches one far. take: bands are let go once no longer needed."""
    for k, band in enumerate(xs[0]):
        halos = [2 * x[k].shape[2] // band.shape[2] for x in xs]
        near = [torch.cat([*(above[:, :, -halo:] for above in x[max(k - 1, 0):k]), x[k], *(below[:, :, :halo] for below in x[k + 1:k + 2])], dim=2) for x, halo in zip(xs, halos)]
        y = layer(*near)
        zoom = y.shape[2] / near[0].shape[2]                                                               # 1; 2 or 1/2 where the layer resamples
        top = round(2 * zoom) if k else 0
        yield y[:, :, top:top + round(band.shape[2] * zoom)].clone()                                      # lets go of the rows around
        if take and k:
            for x in xs:
                x[k - 1] = None


# Training: L1 + MSE + KL, and for photographs a perceptual and an adversarial term (Esser et al. 2021, Sec. 3.1; Rombach et al. 2022, App. G).

def vae_loss(vae, images, kl_weight=1e-6, generator=None, perceptual=None, discriminator=None, gan_weight=0.5, noise=None):
    """images (B, 3, H, W) in [-1, 1] and the noise (B, C, h, w) on the latents, or a generator of it -> loss, {name: part}, means over the batch.

    kl is summed over the latents and divided by the number of pixel values, which balances it with `l1` at any size as Rombach et al.'s sums do.
    perceptual: a callable (reconstructions, images) -> (B,), such as LPIPS; discriminator: see `hinge_loss`, trained beside."""
    mean, logvar = vae.encode(images)
    recon = vae.decoder(sample_gaussian(mean, logvar, generator, noise))                # (B, 3, H, W)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / images.numel()       # to N(0, I)
    parts = {"l1": F.l1_loss(recon, images), "mse": F.mse_loss(recon, images)}
    if perceptual:
        parts["perceptual"] = perceptual(recon, images).mean()
    loss = sum(parts.values())
    if discriminator:
        parts["gan"] = -discriminator(recon).mean()
        loss = loss + gan_weight * adaptive_weight(loss, parts["gan"], vae.decoder.conv_out.weight) * parts["gan"]
    parts["kl"] = kl
    return loss + kl_weight * kl, {name: part.detach() for name, part in parts.items()}


def adaptive_weight(reconstruction, adversarial, last):
    """Gives both losses gradients of one size at the decoder's last weight (Esser et al. 2021, Eq. 7)."""
    sizes = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)]
    return (sizes[0] / (sizes[1] + 1e-4)).clamp(max=1e4).detach()


class PatchDiscriminator(nn.Sequential):
    """images (B, 3, H, W) -> one logit for each patch (Isola et al. 2017), GroupNorm for their BatchNorm: a batch may then be split over processes."""

    def __init__(self, channels=64, layers=3):
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        modules = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (d_in, d) in enumerate(pairwise(widths), start=1):
            modules += [nn.Conv2d(d_in, d, 4, stride=2 if i < layers else 1, padding=1, bias=False), nn.GroupNorm(8, d), nn.LeakyReLU(0.2)]
        super().__init__(*modules, nn.Conv2d(widths[-1], 1, 4, padding=1))


def hinge_loss(discriminator, images, recon):
    """What the discriminator minimises; it sees the reconstructions as constants."""
    return 0.5 * (F.relu(1 - discriminator(images)).mean() + F.relu(1 + discriminator(recon.detach())).mean())


def psnr(a, b):
    """Two (B, 3, H, W) in [-1, 1] -> peak signal-to-noise ratio of each pair, (B,) in dB. Clamp a reconstruction first to score what is displayed."""
    return 10 * torch.log10(4 / (a - b).square().flatten(1).mean(dim=1))
