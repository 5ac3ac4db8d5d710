"""MM-DiT, the backbone of Stable Diffusion 3 (Sec. 4, Fig. 2): text and image tokens, each with weights of their own, in one joint attention.

Read top-down: positions and time (the inputs), attention, one stream, one block, the model. Modules are named as in Stability's released checkpoints, which load with `strict=True`.
Beyond the paper: the second, image-only attention of SD3.5-medium (`dual_attention_blocks`).

Axes: B batch, C latent channels, h x w latent size, p patch size, N image tokens, L text tokens, T tokens of all streams, D = 64 * depth width, H = depth heads.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry, register_flop_formula

HEAD_DIM = 64       # Sec. 4: width 64 * depth, depth heads


# ---------------------------------------------------------------- positions and time

def frequencies(x, dim):
    """Angles of the sinusoidal embeddings: (N,) -> (N, dim/2), wavelengths geometric from 2 pi to 10000 * 2 pi, in the precision of x."""
    return x[:, None] * torch.exp(torch.arange(dim // 2, dtype=x.dtype, device=x.device) * (-math.log(10000) / (dim // 2)))


def embed_timestep(t, dim=256):
    """(B,) in [0, 1] -> (B, dim). Always in float32: bf16 would round 998.4 to 1000."""
    angles = frequencies(1000 * t.float(), dim)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def embed_positions(max_size, base_size, dim):
    """The paper's position grid for varying aspect ratios (Sec. 5.3.2), before its centre crop: (max_size, max_size, dim).

    Both sides in tokens: base_size is s = S/16. The middle s x s tokens get the positions 0 <= p < 16 of a 256 x 256 pretraining, the others go on outside."""
    grid = (torch.arange(max_size, dtype=torch.float64) - (max_size - base_size) / 2) * 16 / base_size
    angles = frequencies(grid, dim // 2)                                      # (max, dim/4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)                     # (max, dim/2)
    shape = max_size, max_size, dim // 2
    return torch.cat([axis[None, :].expand(shape), axis[:, None].expand(shape)], dim=2).float()      # width first, as released


# ---------------------------------------------------------------- products

ONEDNN = torch.backends.cpu.get_cpu_capability() == 'AVX512' and hasattr(torch.ops.mkldnn, '_linear_pointwise')


def by_onednn(x):
    """Whether oneDNN shall multiply. Of itself torch has it do so in bf16 alone, and in fp32 calls MKL, which on AMD's CPUs with AVX512 takes 1.1 to 2.2 times as long.
    `torch.func` cannot see through it."""
    return (ONEDNN and x.device.type == 'cpu' and x.dtype in (torch.float32, torch.bfloat16)
            and not (torch.is_autocast_enabled('cpu') or torch._C._are_functorch_transforms_active()))


def traced():
    """Whether gradients are wanted or a compiler looks on, which know `onednn_linear` alone."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def onednn(x, weight, bias, activation='none'):
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], 'tanh')


@torch.library.custom_op('nanosd3::onednn_linear', mutates_args=())
def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b by oneDNN, with the gradients that torch does not know: (..., I), (O, I), (O,) or None -> (..., O)."""
    return onednn(x, weight, bias)


@onednn_linear.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], len(weight))


def gradients(ctx, grad):
    x, weight = ctx.saved_tensors
    rows, wanted = grad.flatten(0, -2), ctx.needs_input_grad
    return (onednn_linear(grad, weight.mT, None) if wanted[0] else None,
            onednn_linear(rows.mT, x.flatten(0, -2).mT, None) if wanted[1] else None,
            rows.sum(0) if wanted[2] else None)


onednn_linear.register_autograd(gradients, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2]))
PRODUCTS = [torch.ops.nanosd3.onednn_linear, *([torch.ops.mkldnn._linear_pointwise] if ONEDNN else [])]
register_flop_formula(PRODUCTS)(lambda x, weight, *_, **__: 2 * math.prod(x) * weight[0])       # of shapes
aten = torch.ops.aten
flop_registry.update({aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
                      aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[aten._scaled_dot_product_flash_attention_backward],
                      aten.baddbmm_: flop_registry[aten.baddbmm]})


def linear(x, weight, bias=None):
    """x W^T + b by whichever library is faster: (..., I), (O, I), (O,) or None -> (..., O)."""
    if not by_onednn(x):
        return F.linear(x, weight, bias)
    return (onednn_linear if traced() else onednn)(x, weight, bias)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


def gelu(layer, x):
    """GELU(layer(x)), in sampling by oneDNN while the product is still in the cache: by itself it takes a third of a product's time."""
    if type(layer) is Linear and by_onednn(x) and not traced():
        return onednn(x, layer.weight, layer.bias, 'gelu')
    return F.gelu(layer(x), approximate='tanh')


# ---------------------------------------------------------------- attention

def tiles(n, size):
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def product(a, b, tile):
    """a @ b written into a corner of `tile`: asking the system for a tile's memory anew takes up to a third of the time, measured on 2 cores."""
    return torch.bmm(a, b, out=tile[:, :a.shape[1], :b.shape[2]])


class FusedAttention(torch.autograd.Function):
    """Exact softmax attention in O(N) memory, after FlashAttention (Dao et al. 2022): scores exist one tile of queries x keys at a time, in either direction."""

    QUERIES, KEYS = 256, 512        # tile; measured on 2 cores, within 8 % between 128 and 512 either way

    @staticmethod
    def tile(q, k):
        return q.new_empty(len(q), min(q.shape[1], FusedAttention.QUERIES), min(k.shape[1], FusedAttention.KEYS))

    @staticmethod
    def forward(ctx, q, k, v):                                                # (G, N, 64)
        out, lse = torch.empty_like(q), q.new_empty(*q.shape[:2], 1)
        scale, scores = q.shape[-1] ** -0.5, FusedAttention.tile(q, k)
        for i in tiles(q.shape[1], FusedAttention.QUERIES):
            qi = q[:, i] * scale
            # Of the keys so far: maximum score, sum and weighted sum of v under exp(score - top)
            top, total, acc = torch.full_like(lse[:, i], -math.inf), torch.zeros_like(lse[:, i]), torch.zeros_like(qi)
            for j in tiles(k.shape[1], FusedAttention.KEYS):
                s = product(qi, k[:, j].mT, scores)
                new = s.amax(-1, keepdim=True).maximum(top)
                s.sub_(new).exp_()
                decay = top.sub_(new).exp_()
                total.mul_(decay).add_(s.sum(-1, keepdim=True))
                acc.mul_(decay).baddbmm_(s, v[:, j])
                top = new
            out[:, i], lse[:, i] = acc.div_(total), top + total.log()
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        scale, scores, dscores = q.shape[-1] ** -0.5, FusedAttention.tile(q, k), FusedAttention.tile(q, k)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        delta = (grad * out).sum(-1, keepdim=True)                            # = sum over keys of p * dp
        for i in tiles(q.shape[1], FusedAttention.QUERIES):
            qi = q[:, i] * scale
            for j in tiles(k.shape[1], FusedAttention.KEYS):
                p = product(qi, k[:, j].mT, scores).sub_(lse[:, i]).exp_()    # the softmax itself, from its saved normaliser
                dv[:, j].baddbmm_(p.mT, grad[:, i])
                ds = product(grad[:, i], v[:, j].mT, dscores).sub_(delta[:, i]).mul_(p)                # gradient of the scores
                dq[:, i].baddbmm_(ds, k[:, j])
                dk[:, j].baddbmm_(ds.mT, qi)
        return dq.mul_(scale), dk, dv


def fused_attention(q, k, v):
    """softmax(q k^T / 8) v by hand: (B, H, N, 64) -> (B, H, N, 64), O(N) memory. Keys may be of another number than queries. Sums are kept in float32 at least."""
    with torch.autocast(q.device.type, enabled=False):
        out = FusedAttention.apply(*(x.flatten(0, 1).to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v)))
    return out.to(v.dtype).unflatten(0, q.shape[:2])


def plain_attention(q, k, v):
    """The formula itself, O(N^2) memory."""
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v


def onednn_attention(q, k, v):
    """By oneDNN, one head and 512 queries at a time: (B, H, N, 64) -> (B, H, N, 64), O(N) memory, no gradients. torch's kernel, by MKL, takes up to 1.7 times as long (`by_onednn`)."""
    out, scale = torch.empty_like(q), q.shape[-1] ** -0.5
    for head in itertools.product(*map(range, q.shape[:2])):
        keys, values = k[head].contiguous(), v[head].mT.contiguous()
        for i in tiles(q.shape[2], 512):
            scores = onednn(q[head][i] * scale, keys, None)
            out[head][i] = onednn(scores.softmax(-1), values, None)
    return out


def attention(q, k, v):
    """What is fastest, torch's kernel but for two cases on CPUs; ours by hand where torch has none: (B, H, N, 64) -> (B, H, N, 64)."""
    if not hasattr(F, 'scaled_dot_product_attention'):
        return fused_attention(q, k, v)
    if k.shape[2] >= 384 and q.dtype == torch.float32 and by_onednn(q) and not traced():
        return onednn_attention(q, k, v)
    if q.device.type == 'cpu' and k.shape[2] <= 128 and torch.is_grad_enabled():
        return plain_attention(q, k, v)       # training the miniature: at 56 tokens in bf16 the kernel's backward takes 5 times as long, measured on 2 cores
    return F.scaled_dot_product_attention(q, k, v)


ATTENTIONS = {'sdpa': attention, 'fused': fused_attention}


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)       # torch's kernel wants one dtype, which autocast does not give


class SelfAttention(nn.Module):
    """The weights of one stream around the joint attention: in (QKV, their optional RMSNorm, Sec. 5.3.2) and out."""

    def __init__(self, width, qk_norm, project=True):
        super().__init__()
        self.qkv = Linear(width, 3 * width)
        self.ln_q = RMSNorm(HEAD_DIM, eps=1e-6) if qk_norm else nn.Identity()
        self.ln_k = RMSNorm(HEAD_DIM, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = Linear(width, width) if project else None

    def heads(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, -1, HEAD_DIM)).unbind(2)       # (B, N, D) -> 3 of (B, N, H, 64)
        return self.ln_q(q), self.ln_k(k), v


# ---------------------------------------------------------------- the block

def norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x, shift, scale):
    return torch.addcmul(shift, x, 1 + scale)


def modulation(width, vectors):
    """adaLN's linear: (B, D) -> (B, vectors * D). Its SiLU is applied once for all blocks, in `MMDiT.modulations`; it holds place 0 for the released names."""
    return nn.Sequential(nn.Identity(), Linear(width, vectors * width))


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(gelu(self.fc1, x))


class Stream(nn.Module):
    """One column of Fig. 2b, before and after the joint attention. The text of the last block only gives Q, K and V (`qkv_only`)."""

    def __init__(self, width, qk_norm, qkv_only=False, dual=False):
        super().__init__()
        self.vectors = 2 if qkv_only else 9 if dual else 6
        self.adaLN_modulation = modulation(width, self.vectors)
        self.attn = SelfAttention(width, qk_norm, project=not qkv_only)
        self.attn2 = SelfAttention(width, qk_norm) if dual else None
        self.mlp = None if qkv_only else MLP(width)

    def before(self, x, m):
        """(B, N, D), modulation (B, vectors * D) -> q, k, v (B, N, H, 64) for the joint attention, and the modulation left for `after`."""
        shift, scale, *rest = m[:, None].chunk(self.vectors, dim=2)           # each (B, 1, D)
        q, k, v = self.attn.heads(modulate(norm(x), shift, scale))
        return (q if rest else q[:, :0], k, v), rest                          # a stream that ends here asks nothing

    def after(self, x, y, rest, attend):
        """The stream x and what it attended to, y, both (B, N, D) -> (B, N, D)."""
        gate, shift_mlp, scale_mlp, gate_mlp, *dual = rest
        out = x.addcmul(gate, self.attn.proj(y))
        if self.attn2:                                                        # SD3.5-medium: image tokens once more, among themselves
            shift2, scale2, gate2 = dual
            y2 = attend(*self.attn2.heads(modulate(norm(x), shift2, scale2)))
            out = out.addcmul(gate2, self.attn2.proj(y2))
        return out.addcmul(gate_mlp, self.mlp(modulate(norm(out), shift_mlp, scale_mlp)))


class JointBlock(nn.ModuleDict):
    """Fig. 2b: streams by name, text first, image (`x_block`) last, each with weights of its own; they meet in the attention."""

    def __init__(self, streams, attention):
        super().__init__(streams)
        self.attention = attention

    def attend(self, q, k, v):
        y = self.attention(*(x.transpose(1, 2) for x in (q, k, v)))           # (B, T, H, 64) -> (B, H, T, 64)
        return y.transpose(1, 2).flatten(2)                                   # (B, T, D)

    def forward(self, xs, ms):
        """One (B, N, D) a stream; one modulation a stream, or the vector c (B, D) to make them of -> the streams (B, N, D), without those that end here."""
        if torch.is_tensor(ms):
            ms = [stream.adaLN_modulation(ms) for stream in self.values()]
        qkv, rests = zip(*(stream.before(x, m) for stream, x, m in zip(self.values(), xs, ms)))
        y = self.attend(*(torch.cat(parts, dim=1) for parts in zip(*qkv)))    # (B, T, D)
        ys = y.split([q.shape[1] for q, _, _ in qkv], dim=1)
        return [stream.after(x, y, rest, self.attend) for stream, x, y, rest in zip(self.values(), xs, ys, rests) if rest]


# ---------------------------------------------------------------- the model

class PatchEmbed(nn.Module):
    def __init__(self, patch_size, in_channels, width):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).mT.contiguous()                        # (B, C, h, w) -> (B, N, D); else every sum to come keeps the transposed strides


class VectorEmbed(nn.Module):
    def __init__(self, dim, width):
        super().__init__()
        self.mlp = nn.Sequential(Linear(dim, width), nn.SiLU(), Linear(width, width))

    def forward(self, x):
        return self.mlp(x)                                                    # (B, dim) -> (B, D)


class FinalLayer(nn.Module):
    def __init__(self, width, out_dim):
        super().__init__()
        self.adaLN_modulation = modulation(width, 2)
        self.linear = Linear(width, out_dim)

    def forward(self, x, m):
        return self.linear(modulate(norm(x), *m[:, None].chunk(2, dim=2)))


class MMDiT(nn.Module):
    """The network of Fig. 2a. `depth` sets its size.

    weight_sets: 2 is the paper's MM-DiT (text, image); 1 shares one set, which is a DiT on the concatenated sequence; 3 gives CLIP's tokens, the first `clip_length` of the context, and T5's
    a set each (Sec. 5.2.3). base_size: tokens a side at the resolution S that positions are made for, S/16. attention: 'sdpa' is torch's, 'fused' ours."""

    checkpointing = False           # recompute each block in the backward pass instead of keeping its activations

    def __init__(self, depth, in_channels=16, out_channels=None, patch_size=2, context_dim=4096, pooled_dim=2048, pos_embed_max_size=192, qk_norm=True, weight_sets=2,
                 dual_attention_blocks=(), base_size=64, attention='sdpa', clip_length=77):
        super().__init__()
        width = HEAD_DIM * depth
        self.patch_size = patch_size
        self.context_splits = [clip_length] if weight_sets == 3 else []
        self.x_embedder = PatchEmbed(patch_size, in_channels, width)
        self.t_embedder = VectorEmbed(256, width)
        self.y_embedder = VectorEmbed(pooled_dim, width)
        self.context_embedder = Linear(context_dim, width)
        self.register_buffer('pos_embed', embed_positions(pos_embed_max_size, base_size, width).flatten(0, 1)[None])
        texts = {1: [], 2: ['context_block'], 3: ['context_block', 'context_block_t5']}[weight_sets]
        self.joint_blocks = nn.ModuleList(
            JointBlock({**{name: Stream(width, qk_norm, qkv_only=i == depth - 1) for name in texts},
                        'x_block': Stream(width, qk_norm, dual=i in dual_attention_blocks)}, ATTENTIONS[attention])
            for i in range(depth))
        self.final_layer = FinalLayer(width, patch_size ** 2 * (out_channels or in_channels))
        self.initialize()

    def initialize(self):
        """As DiT, with adaLN-Zero: every block starts as the identity and the output as zero."""
        for name, p in self.named_parameters():
            if name.endswith('bias') or 'adaLN_modulation' in name or name == 'final_layer.linear.weight':
                nn.init.zeros_(p)
            elif name.startswith(('t_embedder', 'y_embedder')):
                nn.init.normal_(p, std=0.02)
            elif p.ndim > 1:                                                  # RMSNorm's scales stay 1
                nn.init.xavier_uniform_(p.flatten(1))                         # the patch embedding as the linear it is

    def cropped_positions(self, h, w):
        """The middle h x w of the stored grid: (1, h * w, D)."""
        size = math.isqrt(self.pos_embed.shape[1])
        if max(h, w) > size:
            raise ValueError(f'latents are {h} x {w} patches, positions exist for {size} x {size}: build MMDiT with a larger pos_embed_max_size')
        top, left = (size - h) // 2, (size - w) // 2
        return self.pos_embed.unflatten(1, (size, size))[:, top:top + h, left:left + w].flatten(1, 2)

    def forward(self, latents, t, context, pooled):
        """(B, C, h, w), (B,) in [0, 1], (B, L, context_dim), (B, pooled_dim) -> (B, out_channels, h, w)"""
        return self.denoise(latents, self.context_embedder(context), self.conditioning(t, pooled))

    def conditioning(self, t, pooled):
        """(B,), (B, pooled_dim) -> c (B, D); every modulation starts with it."""
        return F.silu(self.t_embedder(embed_timestep(t).to(pooled.dtype)) + self.y_embedder(pooled))

    def modulations(self, t, pooled):
        """(B,), (B, pooled_dim) -> what adaLN does in each stream of each block, then in the final layer: a list of (B, vectors * D). No latents: a sampler may ask for all its steps at once."""
        c = self.conditioning(t, pooled)
        return [layer.adaLN_modulation(c) for layer in (*(stream for block in self.joint_blocks for stream in block.values()), self.final_layer)]

    def denoise(self, latents, text, modulations):
        """`forward` with its text embedded. `modulations`: all of them, or the vector c (B, D) of which each block then makes its own, since FSDP gathers a block's weights for its forward alone."""
        known = not torch.is_tensor(modulations)
        p = self.patch_size
        h, w = latents.shape[2] // p, latents.shape[3] // p
        if (h * p, w * p) != latents.shape[2:]:
            raise ValueError(f'latents are {latents.shape[2]} x {latents.shape[3]}, both sides must be multiples of the patch size {p}')
        x = self.x_embedder(latents) + self.cropped_positions(h, w)           # (B, N, D)
        xs = [*text.tensor_split(self.context_splits, dim=1), x]              # one (B, ., D) a stream
        streams = len(self.joint_blocks[0])
        if streams == 1:
            xs = [torch.cat(xs, dim=1)]
        for i, block in enumerate(self.joint_blocks):
            ms = modulations[i * streams:(i + 1) * streams] if known else modulations
            xs = checkpoint(block, xs, ms, use_reentrant=False) if self.checkpointing and self.training else block(xs, ms)
        m = modulations[-1] if known else self.final_layer.adaLN_modulation(modulations)
        x = self.final_layer(xs[-1][:, -h * w:], m)                           # (B, N, p * p * C)
        return x.unflatten(2, (p, p, -1)).unflatten(1, (h, w)).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)       # (B, C, h, w)


# ---------------------------------------------------------------- from one MM-DiT to another

def grown(state, model, positions=False):
    """The weights `state` of an MM-DiT as those of `model`, which may have another position grid (unless `positions` are kept), QK-norm in addition (Sec. 5.3.2), or more input
    channels (App. D: they begin with zero weights, so the function is kept). What else differs is left as it is, for the loader to refuse."""
    own = model.state_dict()
    added = {name: value for name, value in own.items() if name.endswith(('.ln_q.weight', '.ln_k.weight')) and name not in state}
    state = {**state, **added} if positions else {**state, **added, 'pos_embed': own['pos_embed']}
    weight, wanted = state.get('x_embedder.proj.weight'), own['x_embedder.proj.weight'].shape[1]
    if weight is not None and weight.shape[1] < wanted:
        state['x_embedder.proj.weight'] = F.pad(weight, (0, 0, 0, 0, 0, wanted - weight.shape[1]))
    return state


@torch.no_grad()
def fit_qk_norms(model, *inputs):
    """Set the scales of the QK-norms to what changes q and k least, by least squares on one batch of forward's inputs: a model pretrained without them then starts near its function."""
    def fit(norm, heads):
        (x,) = heads                                                          # (B, N, H, 64)
        unit = F.rms_norm(x, norm.normalized_shape, eps=norm.eps)
        norm.weight.copy_((x * unit).sum((0, 1, 2)) / unit.square().sum((0, 1, 2)).clamp(min=1e-12))

    hooks = [norm.register_forward_pre_hook(fit) for norm in model.modules() if isinstance(norm, RMSNorm)]      # each sees what those before it, already set, let through
    model(*inputs)
    for hook in hooks:
        hook.remove()
