"""mmdit.py against diffusers with the same random weights, against the paper's formulas, and its hand-written attention against the exact softmax."""

import inspect
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mmdit
from layouts import DiffusersLayout
from mmdit import MMDiT, embed_positions, embed_timestep, fused_attention

torch.set_num_threads(1)
SMALL = dict(depth=2, in_channels=4, context_dim=48, pooled_dim=24, pos_embed_max_size=12, base_size=4, clip_length=3)


def randomized(model, seed=0):
    """Every parameter random: zero-initialised gates would hide what stands behind them."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.08 + (0 if p.ndim > 1 else 0.5)
    return model


def inputs(model=SMALL, h=8, w=12, batch=2, tokens=5, seed=1):
    g = torch.Generator().manual_seed(seed)
    shapes = (batch, model['in_channels'], h, w), (batch, tokens, model['context_dim']), (batch, model['pooled_dim'])
    latents, context, pooled = (torch.randn(s, generator=g) for s in shapes)
    return latents, torch.rand(batch, generator=g), context, pooled


# ---------------------------------------------------------------- parity with diffusers

def diffusers_model(depth=2, qk_norm=True, dual_attention_blocks=(), in_channels=4, context_dim=48, pooled_dim=24, pos_embed_max_size=12, **_):
    diffusers = pytest.importorskip('diffusers')
    return diffusers.SD3Transformer2DModel(
        in_channels=in_channels, out_channels=in_channels, num_layers=depth, num_attention_heads=depth, joint_attention_dim=context_dim, caption_projection_dim=64 * depth,
        pooled_projection_dim=pooled_dim, pos_embed_max_size=pos_embed_max_size, qk_norm='rms_norm' if qk_norm else None, dual_attention_layers=tuple(dual_attention_blocks)).eval()


@pytest.mark.parametrize('options', [dict(), dict(qk_norm=False), dict(dual_attention_blocks=(0, 1)), dict(depth=3, dual_attention_blocks=(1,), attention='fused')], ids=str)
def test_parity_with_diffusers(options):
    options = SMALL | options
    model = randomized(MMDiT(**options)).eval()
    peer = diffusers_model(**options)
    peer.load_state_dict(DiffusersLayout('mmdit', options['depth']).laid_out(model.state_dict().items()), strict=True)
    latents, t, context, pooled = inputs()
    with torch.no_grad():
        ours, theirs = model(latents, t, context, pooled), peer(latents, context, pooled, 1000 * t).sample
    assert ours.shape == latents.shape
    assert (ours - theirs).norm() / theirs.norm() <= 1e-5


PRESETS = {'sd3-medium': (dict(depth=24, qk_norm=False), 2_028_328_000),
           'sd3.5-medium': (dict(depth=24, pos_embed_max_size=384, dual_attention_blocks=range(13)), 2_243_171_520),
           'sd3.5-large': (dict(depth=38), 8_056_627_520)}


@pytest.mark.parametrize('preset', PRESETS)
def test_released_sizes(preset):
    options, count = PRESETS[preset]
    with torch.device('meta'):
        model = MMDiT(**options)
        peer = diffusers_model(**dict(in_channels=16, context_dim=4096, pooled_dim=2048, pos_embed_max_size=192) | options)
    assert sum(p.numel() for p in model.parameters()) == count
    theirs = {k: v.shape for k, v in peer.state_dict().items()}
    assert {k: v.shape for k, v in DiffusersLayout('mmdit', options['depth']).laid_out(model.state_dict().items()).items()} == theirs


# ---------------------------------------------------------------- positions and time

@pytest.mark.parametrize('max_size, base_size', [(192, 64), (384, 64), (12, 4), (13, 4)])
def test_positions_are_the_papers_formula(max_size, base_size):
    """Sec. 5.3.2 as written, in pixels: ((p - (h_max - s) / 2) * 256 / S) tokens of 16 pixels; frequencies as diffusers computes them."""
    embeddings = pytest.importorskip('diffusers.models.embeddings')
    S, h_max, s = 16 * base_size, max_size, base_size
    grid = torch.tensor([(p - (h_max - s) / 2) * 256 / S for p in range(h_max)])
    width_first = torch.stack(torch.meshgrid(grid, grid, indexing='xy'))
    reference = embeddings.get_2d_sincos_pos_embed_from_grid(64, width_first).float()
    ours = embed_positions(max_size, base_size, 64)
    torch.testing.assert_close(ours.flatten(0, 1), reference, atol=1e-6, rtol=0)
    if (max_size - base_size) % 2 == 0:                         # the middle s x s tokens sit where a 256 x 256 pretraining has 0 .. 16
        start = (max_size - base_size) // 2
        base = embeddings.get_2d_sincos_pos_embed(64, base_size, base_size=16).float().unflatten(0, (base_size, base_size))
        torch.testing.assert_close(ours[start:start + s, start:start + s], base, atol=1e-6, rtol=0)


@pytest.mark.parametrize('h, w', [(1, 12), (12, 1), (4, 4), (3, 8), (5, 5), (12, 12)])
def test_positions_are_a_centre_crop(h, w):
    model = MMDiT(**SMALL)
    grid = embed_positions(12, 4, 128)
    rows, columns = (range((12 - n) // 2, (12 - n) // 2 + n) for n in (h, w))
    expected = torch.stack([grid[i, j] for i in rows for j in columns])
    torch.testing.assert_close(model.cropped_positions(h, w)[0], expected, atol=0, rtol=0)


@pytest.mark.parametrize('h, w, said', [(7, 8, '7 x 8.*patch size 2'), (8, 9, '8 x 9.*patch size 2'), (26, 8, '13 x 4.*12 x 12'), (8, 26, '4 x 13.*12 x 12')])
def test_bad_sizes_are_refused(h, w, said):
    with pytest.raises(ValueError, match=said):
        MMDiT(**SMALL)(*inputs(h=h, w=w))


def test_timestep_embedding():
    """cos before sin, 1000 t, float32 whatever t is: as the released models."""
    t = torch.tensor([0, 0.25, 0.9984])
    ours = embed_timestep(t)
    i = torch.arange(128)
    torch.testing.assert_close(ours[1], torch.cat([(250 * 10000 ** (-i / 128)).cos(), (250 * 10000 ** (-i / 128)).sin()]), atol=1e-4, rtol=0)
    assert (ours[0] == torch.cat([torch.ones(128), torch.zeros(128)])).all()
    assert embed_timestep(t.double()).dtype == torch.float32


# ---------------------------------------------------------------- the model

@pytest.mark.parametrize('weight_sets', [1, 2, 3])
def test_adaln_zero_and_gradients(weight_sets):
    """The output is zero at first; once the zeros are gone every parameter learns, save the one the released layout has in vain: the last block's text queries lead nowhere."""
    model = MMDiT(**SMALL, weight_sets=weight_sets)
    assert (model(*inputs()) == 0).all()
    randomized(model)(*inputs()).square().mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert silent == [f'joint_blocks.1.{name}.attn.ln_q.weight' for name in ('context_block', 'context_block_t5')[:weight_sets - 1]]


def test_weight_sets_share_as_they_say():
    sizes = [sum(p.numel() for p in MMDiT(**SMALL, weight_sets=n).joint_blocks[0].parameters()) for n in (1, 2, 3)]
    assert sizes[1] == 2 * sizes[0] and sizes[2] == 3 * sizes[0]
    # Three sets with equal text weights are two sets, and two sets with text weights equal to the image's are one, in all but the last block (whose text side is cut short).
    three, two, one = (randomized(MMDiT(**SMALL, weight_sets=n)) for n in (3, 2, 1))
    shared = two.state_dict()
    three.load_state_dict(shared | {k.replace('context_block', 'context_block_t5'): v for k, v in shared.items() if 'context_block' in k})
    torch.testing.assert_close(three(*inputs()), two(*inputs()))
    x = torch.randn(2, 11, 128)
    m = torch.randn(2, 6 * 128)
    for block in (one.joint_blocks[0], two.joint_blocks[0]):
        block['x_block'].load_state_dict(two.joint_blocks[0]['x_block'].state_dict())
    two.joint_blocks[0]['context_block'].load_state_dict(two.joint_blocks[0]['x_block'].state_dict())
    torch.testing.assert_close(torch.cat(two.joint_blocks[0]([x[:, :4], x[:, 4:]], [m, m]), dim=1), one.joint_blocks[0]([x], [m])[0])


def test_third_set_starts_at_clip_length():
    """A T5 token does not touch CLIP's weights in the first block: only the tokens from `clip_length` on go through `context_block_t5`."""
    model = randomized(MMDiT(**SMALL, weight_sets=3))
    seen = {}
    for name, stream in model.joint_blocks[0].items():
        stream.attn.qkv.register_forward_hook(lambda m, args, out, name=name: seen.update({name: args[0].shape[1]}))
    model(*inputs(h=8, w=12, tokens=5))
    assert seen == {'context_block': 3, 'context_block_t5': 2, 'x_block': 24}


def test_every_option_changes_something():
    """An option accepted and dropped is a bug: each one, changed alone, changes the parameters, the buffers, the output or what is computed."""
    def fingerprint(**options):
        options = SMALL | options
        torch.manual_seed(0)
        model = MMDiT(**options)
        state = {k: v.double().sum().item() for k, v in model.state_dict().items()}
        return state, model.joint_blocks[0].attention, model.context_splits
    changes = dict(depth=3, in_channels=8, out_channels=8, patch_size=4, context_dim=32, pooled_dim=32, pos_embed_max_size=16, qk_norm=False, weight_sets=1, dual_attention_blocks=(1,),
                   base_size=8, attention='fused')
    assert {*changes, 'clip_length'} == {*inspect.signature(MMDiT).parameters}
    for name, value in changes.items():
        assert fingerprint(**{name: value}) != fingerprint(), name
    assert fingerprint(weight_sets=3, clip_length=4) != fingerprint(weight_sets=3)


def test_every_input_matters():
    model = randomized(MMDiT(**SMALL))
    args = inputs()
    for i in range(4):
        changed = list(args)
        changed[i] = changed[i] * 0.5
        assert not torch.allclose(model(*changed), model(*args), rtol=1e-3), ('latents', 't', 'context', 'pooled')[i]


def test_out_channels():
    assert MMDiT(**SMALL, out_channels=7)(*inputs()).shape == (2, 7, 8, 12)


def test_samples_of_a_batch_do_not_mix():
    model = randomized(MMDiT(**SMALL))
    args = inputs(batch=3)
    torch.testing.assert_close(model(*args)[1:2], model(*(a[1:2] for a in args)))


def test_checkpointing_gives_the_same_gradients():
    def gradients(checkpointing):
        saved = []
        model = randomized(MMDiT(**SMALL)).train()
        model.checkpointing = checkpointing
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.numel()), x)[1], lambda x: x):
            loss = model(*inputs()).square().mean()
        loss.backward()
        return [p.grad for p in model.parameters()], sum(saved)
    plain, recomputed = gradients(False), gradients(True)
    torch.testing.assert_close(plain[0], recomputed[0])
    assert recomputed[1] < 0.5 * plain[1]


@pytest.mark.parametrize("shape", [(2, 64), (3, 17, 64), (1, 1, 64), (2, 0, 64)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_products_of_sampling_are_those_of_training(shape, dtype, tolerance):
    """Where no gradient is wanted another library may multiply, and apply the GELU itself."""
    linear = mmdit.Linear(64, 50).to(dtype)
    x = torch.randn(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]       # strided, as slices of tokens are
    wide = torch.nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
    for f, expected in ((linear, wide), (lambda x: mmdit.gelu(linear, x), torch.nn.functional.gelu(wide, approximate="tanh"))):
        trained = f(x)
        with torch.no_grad():
            sampled = f(x)
        assert trained.requires_grad and not sampled.requires_grad and sampled.dtype == dtype and sampled.shape == expected.shape
        assert (sampled - expected).norm() <= tolerance * expected.norm() and (trained - expected).norm() <= tolerance * expected.norm()


needs_onednn = pytest.mark.skipif(not mmdit.ONEDNN, reason="this CPU has no AVX512")


@needs_onednn
@pytest.mark.parametrize("shape", [(5, 64), (3, 17, 64)])
def test_gradients_of_onednns_product(shape):
    """First and second derivatives are those of torch's product."""
    def derivatives(f):
        g = torch.Generator().manual_seed(0)
        x, weight, bias, direction = (torch.randn(*size, generator=g).requires_grad_() for size in (shape, (50, 64), (50,), (*shape[:-1], 50)))
        first = torch.autograd.grad(f(x, weight, bias).tanh(), (x, weight, bias), direction, create_graph=True)
        return *first, *torch.autograd.grad(sum(gradient.square().sum() for gradient in first), (x, weight, bias, direction))

    for ours, theirs in zip(derivatives(mmdit.onednn_linear), derivatives(torch.nn.functional.linear)):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@needs_onednn
def test_onednns_product_is_a_whole_operator():
    """What torch asks of one, so that autograd and the compiler may rely on it; without a bias, and of frozen weights, too."""
    x, weight, bias = torch.randn(3, 5, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True), torch.randn(6, requires_grad=True)
    for args in (x, weight, bias), (x, weight, None), (x, weight.detach(), bias.detach()), (x.detach(), weight, bias):
        assert set(torch.library.opcheck(mmdit.onednn_linear, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("grad", [True, False])
def test_function_transforms(grad):
    """`torch.func`, as for exact divergences or per-sample gradients."""
    linear = mmdit.Linear(64, 50)
    x, direction = torch.randn(2, 5, 64)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(torch.func.jvp(linear, (x,), (direction,))[1], direction @ linear.weight.mT)
        torch.testing.assert_close(torch.func.vmap(linear)(x), linear(x))
        torch.testing.assert_close(torch.func.vjp(linear, x)[1](torch.ones(5, 50))[0], linear.weight.sum(0).expand(5, 64))


@needs_onednn
def test_where_onednn_multiplies(monkeypatch):
    calls = []
    monkeypatch.setattr(mmdit, "onednn", lambda x, weight, bias, activation="none": calls.append(activation) or x.new_zeros(*x.shape[:-1], len(weight)))
    mlp, x = mmdit.MLP(64), torch.randn(2, 64)
    mlp(x)
    assert calls == ["none", "none"]
    with torch.no_grad():
        mlp(x)
    assert calls[2:] == ["gelu", "none"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert mlp(x).dtype == torch.bfloat16
    mlp.double()(x.double())
    assert len(calls) == 4


def test_bfloat16():
    """The released weights come in half precision; so does `--precision bf16`. The clock stays in float32 either way."""
    args = inputs()
    for attention in 'sdpa', 'fused':
        model = randomized(MMDiT(**SMALL, attention=attention))
        exact = model(*args)
        with torch.autocast('cpu', torch.bfloat16):
            mixed = model(*args)
        half = model.bfloat16()(args[0].bfloat16(), args[1], args[2].bfloat16(), args[3].bfloat16())
        for out in mixed, half:
            assert out.dtype == torch.bfloat16
            assert (out - exact).norm() / exact.norm() < 0.03


# ---------------------------------------------------------------- attention

def exact_attention(q, k, v):
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


def qkv(queries, keys, dtype=torch.float64, channels=64, scale=1.0):
    g = torch.Generator().manual_seed(queries * 1000 + keys)
    return [(torch.randn(2, 3, n, channels, generator=g, dtype=torch.float64) * scale).to(dtype).requires_grad_() for n in (queries, keys, keys)]


@pytest.mark.parametrize('scale', [1.0, 12.0], ids=['usual', 'peaked'])       # peaked: logits in the thousands, the maximum moves between tiles
@pytest.mark.parametrize('queries, keys', [(1, 1), (7, 513), (256, 512), (257, 511), (600, 1100), (1100, 3)])
def test_fused_attention_is_exact(queries, keys, scale):
    q, k, v = qkv(queries, keys, scale=scale)
    ours, exact = fused_attention(q, k, v), exact_attention(q, k, v)
    torch.testing.assert_close(ours, exact, atol=1e-12 * scale, rtol=1e-12)
    grad = torch.randn_like(exact)
    for a, b in zip(torch.autograd.grad(ours, (q, k, v), grad), torch.autograd.grad(exact, (q, k, v), grad)):
        torch.testing.assert_close(a, b, atol=1e-11 * scale ** 2, rtol=1e-11)


def test_fused_attention_gradcheck(monkeypatch):
    """Tiles of 4 x 3, so that 9 queries and 7 keys make several, the last ones incomplete."""
    monkeypatch.setattr(mmdit.FusedAttention, 'QUERIES', 4)
    monkeypatch.setattr(mmdit.FusedAttention, 'KEYS', 3)
    assert torch.autograd.gradcheck(fused_attention, qkv(9, 7, channels=5))


@needs_onednn
@pytest.mark.parametrize("queries, keys, scale", [(600, 600, 1), (300, 385, 3), (0, 384, 1)])
def test_attention_by_onednn(queries, keys, scale, monkeypatch):
    """Where no gradients are wanted, on the strided heads that a block gives; else torch's kernel."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(queries, keys, torch.float32, scale=scale))
    calls, product = [], mmdit.onednn
    monkeypatch.setattr(mmdit, "onednn", lambda *args: calls.append(args) or product(*args))
    with torch.no_grad():
        with FlopCounterMode(display=False) as flops:
            ours = mmdit.attention(q, k, v)
    assert flops.get_total_flops() == 4 * 6 * queries * keys * 64
    torch.testing.assert_close(ours.double(), exact_attention(*(x.double() for x in (q, k, v))), atol=1e-5 * scale ** 2, rtol=1e-5)
    assert len(calls) == 2 * 6 * math.ceil(queries / 512) and ours.stride() == q.stride()
    mmdit.attention(q, k, v), torch.compile(mmdit.attention, backend="eager")(q.detach(), k.detach(), v.detach())
    assert len(calls) == 2 * 6 * math.ceil(queries / 512)


def test_fused_attention_takes_transposed_views_and_half_precision():
    q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(300, 700, torch.float32))
    exact = exact_attention(*(x.double() for x in (q, k, v)))
    torch.testing.assert_close(fused_attention(q, k, v).double(), exact, atol=1e-6, rtol=1e-5)
    out = fused_attention(*(x.bfloat16() for x in (q, k, v)))
    assert out.dtype == torch.bfloat16 and (out - exact).norm() / exact.norm() < 0.01


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Elements of the largest tensor that any operation inside makes."""
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def largest(attention, n):
    """(largest tensor made, elements saved for the backward pass) of one attention, forward and backward, with n tokens and one head."""
    saved = []
    q, k, v = (torch.randn(1, 1, n, 64, requires_grad=True) for _ in range(3))
    with LargestTensor() as mode, torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.numel()), x)[1], lambda x: x):
        attention(q, k, v).sum().backward()
    return mode.elements, sum(saved)


@pytest.mark.parametrize("f", [fused_attention, torch.nn.functional.scaled_dot_product_attention])
def test_flops_of_attention(f):
    """Two products forward, five backward: the scores anew and four gradients."""
    with FlopCounterMode(display=False) as flops:
        f(*qkv(300, 520, torch.float32)).sum().backward()
    assert flops.get_total_flops() == 7 * 2 * 6 * 300 * 520 * 64


def test_fused_attention_is_linear_in_memory():
    """No tensor of queries x keys exists at any time, in either direction, and only q, k, v, out and logsumexp are kept; the exact formula fails the same test."""
    for n in 2048, 4096:
        made, saved = largest(fused_attention, n)
        assert made == n * 64 and saved == n * (4 * 64 + 1)         # the largest is an input's size (a tile, 256 x 512, is no larger here)
    made, saved = largest(exact_attention, 2048)
    assert made == 2048 ** 2 and saved > 2048 ** 2


def test_fused_model_equals_sdpa_model():
    two = [randomized(MMDiT(**SMALL, attention=a)) for a in ('sdpa', 'fused')]
    torch.testing.assert_close(*(m(*inputs()) for m in two), atol=1e-5, rtol=1e-4)


# ---- from one MM-DiT to another (Sec. 5.3.2, App. D)

def random_mmdit(**sizes):
    torch.manual_seed(0)
    model = MMDiT(2, in_channels=4, context_dim=32, pooled_dim=20, **{"pos_embed_max_size": 16, "base_size": 4, **sizes}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def random_inputs(h=8, w=8, n=4, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, h, w, generator=g), torch.rand(n, generator=g), torch.randn(n, 5, 32, generator=g), torch.randn(n, 20, generator=g)


def test_a_finetuned_models_positions_are_interpolated_and_extended():
    """Twice the resolution: every other position is one of the smaller model's, and whatever the aspect ratio, the middle S x S pixels have 0 <= p < 16."""
    small, large = mmdit.embed_positions(16, 4, 128), mmdit.embed_positions(32, 8, 128)
    assert torch.allclose(large[::2, ::2], small, atol=1e-6)
    model = random_mmdit(pos_embed_max_size=32, base_size=8)
    expected = mmdit.embed_positions(8, 8, 128)
    for h, w in ((8, 8), (6, 12), (12, 6)):
        grid = model.cropped_positions(h, w).view(h, w, 128)
        inner = grid[max((h - 8) // 2, 0):, max((w - 8) // 2, 0):][:min(h, 8), :min(w, 8)]
        top, left = max((8 - h) // 2, 0), max((8 - w) // 2, 0)
        assert torch.allclose(inner, expected[top:top + min(h, 8), left:left + min(w, 8)], atol=1e-6)


def test_grown_keeps_the_function_with_more_input_channels():
    small = random_mmdit()
    torch.manual_seed(1)
    large = MMDiT(2, in_channels=8, out_channels=4, context_dim=32, pooled_dim=20, pos_embed_max_size=16, base_size=4).eval()
    large.load_state_dict(mmdit.grown(small.state_dict(), large))
    latents, *rest = random_inputs()
    with torch.no_grad():
        found = large(torch.cat([latents, torch.randn_like(latents)], 1), *rest)
        assert torch.allclose(found, small(latents, *rest), atol=1e-5) and found.abs().max() > 0.1
    assert large.x_embedder.proj.weight[:, 4:].eq(0).all()


def test_grown_takes_the_new_models_positions_and_refuses_the_rest():
    small, large = random_mmdit(), random_mmdit(pos_embed_max_size=32, base_size=8)
    grid = large.pos_embed.clone()
    large.load_state_dict(mmdit.grown(small.state_dict(), large))
    assert large.pos_embed.equal(grid) and large.final_layer.linear.weight.equal(small.final_layer.linear.weight)
    assert large(*random_inputs(16, 8)).shape == (4, 4, 16, 8)
    stored = {**small.state_dict(), "pos_embed": torch.randn(1, 256, 128)}
    assert mmdit.grown(stored, small, positions=True)["pos_embed"] is stored["pos_embed"]
    with pytest.raises(RuntimeError):
        large.load_state_dict(mmdit.grown(MMDiT(1, in_channels=4, context_dim=32, pooled_dim=20).state_dict(), large))


def test_qk_norms_that_are_added_hardly_change_the_function():
    plain = random_mmdit(qk_norm=False)
    normed = MMDiT(2, in_channels=4, context_dim=32, pooled_dim=20, pos_embed_max_size=16, base_size=4).eval()
    normed.load_state_dict(mmdit.grown(plain.state_dict(), normed))
    assert normed.joint_blocks[0]["x_block"].attn.ln_q.weight.eq(1).all()
    inputs = random_inputs(seed=2)
    with torch.no_grad():
        wanted, at_one = plain(*inputs), normed(*inputs)
        mmdit.fit_qk_norms(normed, *random_inputs(seed=3))
        fitted = normed(*inputs)
    assert (fitted - wanted).norm() < 0.5 * (at_one - wanted).norm() and (fitted - wanted).norm() < 0.2 * wanted.norm()
    x = torch.ones(1, 2, 3, 64)
    norm = normed.joint_blocks[0]["x_block"].attn.ln_q
    mmdit.fit_qk_norms(torch.nn.Sequential(norm), 3 * x)
    assert torch.allclose(norm(3 * x), 3 * x, atol=1e-5) and not norm._forward_pre_hooks
