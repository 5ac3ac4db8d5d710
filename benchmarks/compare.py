"""Ours beside diffusers' (and transformers', lucidrains') in one process: the same weights, the same inputs, outputs checked equal (the optimizer step has none) before anything is timed.

    python benchmarks/compare.py                     # every row, about an hour on 2 cores
    python benchmarks/compare.py --rows "train,sample" --repeats 5

The candidates of a row run in turns, so that what else the machine does meets them alike. A ratio is the median over the rounds of a peer's time
over ours: above 1, ours is faster. Floor: the row's operations at the machine's peak; beside it, where ours spends its time. Peak memory: what the
resident set grows by in one call (Linux). Leaves benchmarks/results/compare.json and .png; rows that are not measured anew stay in them.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import check_least, flag, one_line_errors, parse_config


@dataclass
class Config:
    rows: str = flag("", "only rows whose names hold one of these words, apart by commas", "what")
    repeats: int = flag(11, "rounds; a row stops after --seconds", "what")
    seconds: float = flag(60.0, "longest time for a row", "what")
    compile: bool = flag(False, "also compiled forms, of both, in training rows; needs a C++ compiler on CPUs", "what")
    threads: int = flag(2, "CPU threads", "machine")
    out: str = flag("benchmarks/results", "folder", "what")


if __name__ == "__main__":
    CONFIG = parse_config(Config, description=__doc__)

import copy
import ctypes
import gc
import importlib.metadata
import importlib.util
import os
import platform
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import layouts
from mmdit import Linear, MMDiT, attention, fused_attention, plain_attention
from sample import guided_velocity
from samplers import sample_euler, timesteps
from text_encoders import CLIPTextEncoder, T5Encoder
from vae import AutoencoderKL

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
CONTEXT, POOLED, TOKENS = 256, 256, 40  # the miniature's text: channels, pooled channels, tokens


# ---------------------------------------------------------------------------------------------------------------
# The same weights for both: random, of trained magnitude, nothing zero, nothing near the denormals

def randomized(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if p.ndim > 1:
            p.data = torch.randn(p.shape, generator=generator) * (0.3 if "adaLN" in name else 1) / p[0].numel() ** 0.5
        else:
            p.data = torch.randn(p.shape, generator=generator) * 0.02 + (1 if name.endswith("weight") else 0)
    return module.eval()


def given(peer, ours, layout):
    """The peer with our weights, under the names of its layout."""
    state = layout.laid_out(ours.state_dict().items())
    if "encoder.embed_tokens.weight" in peer.state_dict():  # of a T5 of transformers, which names its table twice
        state["encoder.embed_tokens.weight"] = state["shared.weight"]
    peer.load_state_dict(state, strict=True)
    return peer.eval()


def both_mmdits(depth, side):
    """Ours and diffusers' SD3Transformer2DModel for latents of side x side."""
    from diffusers import SD3Transformer2DModel
    ours = randomized(MMDiT(depth, context_dim=CONTEXT, pooled_dim=POOLED, pos_embed_max_size=side, base_size=side // 2))
    peer = SD3Transformer2DModel(sample_size=side, num_layers=depth, num_attention_heads=depth, joint_attention_dim=CONTEXT, caption_projection_dim=64 * depth,
                                 pooled_projection_dim=POOLED, pos_embed_max_size=side, qk_norm="rms_norm", in_channels=16, out_channels=16)
    return ours, given(peer, ours, layouts.DiffusersLayout("mmdit", depth))


def mmdit_inputs(side, batch):
    generator = torch.Generator().manual_seed(1)
    randn = partial(torch.randn, generator=generator)
    return randn(batch, 16, side, side), torch.rand(batch, generator=generator), randn(batch, TOKENS, CONTEXT), randn(batch, POOLED)


# ---------------------------------------------------------------------------------------------------------------
# Rows: each makes {candidate: function without arguments}, ours first; what they return is compared

SIZES = ((4, 8, 64), (4, 16, 32), (8, 32, 4), (12, 64, 1))  # depth, side of the latents (16, 64, 256, 1024 tokens), batch


def forward_row(depth, side, batch, compiled=False):
    ours, peer = both_mmdits(depth, side)
    latents, t, context, pooled = mmdit_inputs(side, batch)

    def run(model, *args):
        with torch.inference_mode():
            out = model(*args)
        return out if torch.is_tensor(out) else out.sample
    return {"ours": lambda: run(ours, latents, t, context, pooled), "diffusers": lambda: run(peer, latents, context, pooled, 1000 * t)}


def train_row(depth, side, batch, compiled=False, checkpointing=False):
    """Forward and backward; returns a gradient."""
    ours, peer = both_mmdits(depth, side)
    latents, t, context, pooled = mmdit_inputs(side, batch)
    ours.train(), peer.train()
    ours.checkpointing = checkpointing
    if checkpointing:
        peer.enable_gradient_checkpointing()

    def run(model, parameter, network, *args):
        model.zero_grad(set_to_none=False)      # memory is then that of the activations, as in each micro-batch but the first
        out = network(*args)
        (out if torch.is_tensor(out) else out[0]).square().mean().backward()
        return parameter.grad
    mine = partial(run, ours, ours.x_embedder.proj.weight)
    theirs = partial(run, peer, peer.pos_embed.proj.weight)
    row = {"ours": lambda: mine(ours, latents, t, context, pooled), "diffusers": lambda: theirs(peer, latents, context, pooled, 1000 * t)}
    if compiled:
        fast, peer_fast = torch.compile(ours), torch.compile(peer)
        row |= {"ours compiled": lambda: mine(fast, latents, t, context, pooled), "diffusers compiled": lambda: theirs(peer_fast, latents, context, pooled, 1000 * t)}
    return row


def sample_row(depth, side, batch, compiled=False):
    """28 Euler steps on the released grid, guidance 5, from embedded text to latents."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    ours, peer = both_mmdits(depth, side)
    latents, _, context, pooled = mmdit_inputs(side, batch)
    bundle = SimpleNamespace(mmdit=ours, config={"formulation": "rf"}, text=SimpleNamespace(encode=lambda prompts, use: (context, pooled)))
    vae = SimpleNamespace(config=SimpleNamespace(block_out_channels=[0] * 4))
    pipeline = StableDiffusion3Pipeline(peer, FlowMatchEulerDiscreteScheduler(shift=3.0), None, *[None] * 6)
    pipeline.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
    pipeline.set_progress_bar_config(disable=True)

    @torch.inference_mode()
    def mine():
        ts = timesteps(28, 3.0, schedule="released")
        return sample_euler(guided_velocity(bundle, [*map(str, range(batch))], 5.0, ts=ts), latents, ts)

    def theirs():
        zeros = {"negative_prompt_embeds": torch.zeros_like(context), "negative_pooled_prompt_embeds": torch.zeros_like(pooled)}
        return pipeline(prompt_embeds=context, pooled_prompt_embeds=pooled, **zeros, latents=latents, height=8 * side, width=8 * side, num_inference_steps=28,
                        guidance_scale=5.0, output_type="latent").images
    return {"ours": mine, "diffusers": theirs}


def vae_row(what, pixels, compiled=False):
    """SD3's autoencoder at its real size."""
    from diffusers import AutoencoderKL as Peer
    ours = randomized(AutoencoderKL()).to(memory_format=torch.channels_last)  # as `checkpoint.Bundle` loads it
    peer = Peer(block_out_channels=(128, 256, 512, 512), latent_channels=16, layers_per_block=2, down_block_types=["DownEncoderBlock2D"] * 4,
                up_block_types=["UpDecoderBlock2D"] * 4, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609)
    given(peer, ours, layouts.DiffusersLayout("vae", 4))
    images, latents = torch.rand(1, 3, pixels, pixels) * 2 - 1, torch.randn(1, 16, pixels // 8, pixels // 8)
    scale, shift = 1.5305, 0.0609

    def guarded(f, x):
        with torch.inference_mode():
            return f(x)
    if what == "encode":
        return {"ours": lambda: guarded(lambda x: ours.to_latents(x, sample=False), images),
                "diffusers": lambda: guarded(lambda x: (peer.encode(x).latent_dist.mode() - shift) * scale, images)}
    return {"ours": lambda: guarded(ours.decode, latents), "diffusers": lambda: guarded(lambda z: peer.decode(z / scale + shift).sample, latents)}


def tiled_row(compiled=False):
    """A picture of 1024 x 1024 decoded in bands of rows, beside the whole; for the memory."""
    ours = randomized(AutoencoderKL())
    latents = torch.randn(1, 16, 128, 128)
    return {"tiled": lambda: no_grad(ours.decode_tiled, latents), "whole": lambda: no_grad(ours.decode, latents)}


def no_grad(f, *args):
    with torch.inference_mode():
        return f(*args)


def text_row(which, compiled=False):
    """16 prompts of 77 tokens through CLIP-L, or through a T5 of base size."""
    import transformers
    if which == "CLIP-L":
        ours = randomized(CLIPTextEncoder())
        peer = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12,
                                                                                  projection_dim=768, eos_token_id=49407, bos_token_id=49406))
        read = lambda: no_grad(lambda: peer(tokens, output_hidden_states=True).hidden_states[-2])
    else:
        ours = randomized(T5Encoder(width=768, layers=12, heads=12, mlp=2048))
        peer = transformers.T5EncoderModel(transformers.T5Config(d_model=768, num_layers=12, num_heads=12, d_ff=2048, feed_forward_proj="gated-gelu"))
        read = lambda: no_grad(lambda: peer(tokens)[0])
    given(peer, ours, layouts.Layout())
    tokens = torch.randint(3, 30000, (16, 77), generator=torch.Generator().manual_seed(0))
    tokens[:, -1] = 49407 if which == "CLIP-L" else 1
    mine = lambda: no_grad(ours, tokens)
    return {"ours": (lambda: mine()[0]) if which == "CLIP-L" else mine, "transformers": read}


def optimizer_row(depth, compiled=False):
    """A step of AdamW and of the averaged weights; returns an averaged weight."""
    from diffusers.training_utils import EMAModel
    ours, peer = (both_mmdits(depth, 32))
    averaged = copy.deepcopy(ours)
    for module in (ours, peer):
        for p in module.parameters():
            p.grad = torch.full_like(p, 1e-3)
    options = dict(lr=1e-4, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.0)
    fused, plain = torch.optim.AdamW(ours.parameters(), fused=True, **options), torch.optim.AdamW(peer.parameters(), **options)
    ema = EMAModel(peer.parameters(), decay=0.99, min_decay=0.99)

    def mine():
        fused.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(ours.parameters()), 0.01)
        return averaged.x_embedder.proj.weight

    def theirs():
        plain.step()
        ema.step(peer.parameters())
        return ema.shadow_params[[name for name, _ in peer.named_parameters()].index("pos_embed.proj.weight")]
    return {"ours": mine, "diffusers": theirs}


def attention_row(tokens, backward, compiled=False):
    q, k, v = (torch.randn(1, 8, tokens, 64, generator=torch.Generator().manual_seed(i), requires_grad=backward) for i in range(3))

    def run(f):
        if not backward:
            return no_grad(f, q, k, v)
        q.grad = k.grad = v.grad = None
        f(q, k, v).sum().backward()
        return v.grad
    row = {"fused_attention": lambda: run(fused_attention), "scaled_dot_product_attention": lambda: run(F.scaled_dot_product_attention), "naive": lambda: run(plain_attention)}
    return row if backward else {**row, "attention in sampling": lambda: run(attention)}


def lucidrains_row(compiled=False):
    """One block of the package `mmdit` at width 512 beside one of ours. It has no SD3 layout, so no weights in common: only the time is compared."""
    try:
        file = importlib.metadata.distribution("mmdit").locate_file("mmdit/mmdit_pytorch.py")  # our own mmdit.py hides the package
    except importlib.metadata.PackageNotFoundError:
        raise ImportError("the package mmdit is not installed") from None
    spec = importlib.util.spec_from_file_location("lucidrains", file)
    lucidrains = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lucidrains)
    ours = randomized(MMDiT(8, context_dim=CONTEXT, pooled_dim=POOLED)).joint_blocks[0]
    peer = lucidrains.MMDiTBlock(dim_text=512, dim_image=512, dim_cond=512, dim_head=64, heads=8, qk_rmsnorm=True)
    text, image, c = torch.randn(4, TOKENS, 512), torch.randn(4, 256, 512), torch.randn(4, 512)
    modulate = [stream.adaLN_modulation for stream in ours.values()]
    return {"ours": lambda: no_grad(lambda: ours([text, image], [m(c) for m in modulate])),
            "lucidrains": lambda: no_grad(lambda: peer(text_tokens=text, image_tokens=image, time_cond=c))}


ROWS = {**{f"forward depth {d}, {(s // 2) ** 2} tokens x {b}": partial(forward_row, d, s, b) for d, s, b in SIZES},
        **{f"train depth {d}, {(s // 2) ** 2} tokens x {b}": partial(train_row, d, s, b) for d, s, b in SIZES},
        "train depth 12, 1024 tokens x 1, checkpointing": partial(train_row, 12, 64, 1, checkpointing=True),
        **{f"sample 28 steps, depth {d}, {8 * s} pixels x {b}": partial(sample_row, d, s, b) for d, s, b in ((4, 8, 1), (4, 8, 16), (8, 32, 1))},
        **{f"vae {what} {pixels} pixels": partial(vae_row, what, pixels) for what in ("encode", "decode") for pixels in (64, 256, 512)},
        "vae tiled decode 1024 pixels": tiled_row,
        **{f"text {which} x 16": partial(text_row, which) for which in ("CLIP-L", "T5")},
        "optimizer and EMA depth 8": partial(optimizer_row, 8),
        **{f"attention {n} tokens{', backward' * backward}": partial(attention_row, n, backward) for n in (256, 1024, 2048, 4096, 8192) for backward in (False, True)},
        "block of lucidrains' mmdit": lucidrains_row}
NEAR = ("tiled", "block")  # rows whose candidates are not the same function


# ---------------------------------------------------------------------------------------------------------------
# Measuring

def peak_gflops(n=2048, seconds=2.0):
    """{library: the machine's fp32 matrix product, n x n, the best of `seconds`}: of torch's `@` and of what `mmdit.Linear` calls."""
    x, layer, best = torch.randn(n, n), Linear(n, n), {}
    for library, product in (("torch", lambda: x @ x), ("ours", lambda: layer(x))):
        begun = time.perf_counter()
        while time.perf_counter() - begun < seconds:
            start = time.perf_counter()
            no_grad(product)
            best[library] = max(best.get(library, 0.0), 2 * n ** 3 / (time.perf_counter() - start) / 1e9)
    return best


def memory(run):
    """Bytes by which the resident set grows at most during run(), or None where the system does not tell."""
    if platform.system() != "Linux":
        return None
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    libc.mallopt(M_MMAP_THRESHOLD, 64 << 10)        # a tensor is then a mapping of its own, given back when freed: holes of freed memory don't count
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    status = lambda key: next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    before = status("VmRSS")
    run()
    libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)        # what glibc itself comes to; else the timing would pay for pages
    libc.mallopt(M_TRIM_THRESHOLD, 64 << 20)
    return max(status("VmHWM") - before, 0)


def measure(candidates, repeats, seconds):
    """{candidate: [time of each round]}, candidates in turns, after one round to warm up."""
    times, begun = {name: [] for name in candidates}, time.perf_counter()
    for run in candidates.values():
        run()
    while len(times[next(iter(times))]) < repeats and (time.perf_counter() - begun < seconds or len(times[next(iter(times))]) < 3):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


def profile(run):
    """{kernel: its share of the time in kernels}, of one call, those above 2 %."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run()
    times = {event.key.removeprefix("aten::"): event.self_cpu_time_total for event in profiler.key_averages()}
    total = sum(times.values())
    return {kernel: time / total for kernel, time in sorted(times.items(), key=lambda item: -item[1]) if time > 0.02 * total}


def compare(name, cfg, peak):
    """A row of the table."""
    candidates = ROWS[name](compiled=cfg.compile)
    first, *others = candidates
    with FlopCounterMode(display=False) as counter:
        result = candidates[first]().clone() if not name.startswith(NEAR[1]) else candidates[first]()
    flops = counter.get_total_flops()
    if not any(word in name for word in NEAR) and "optimizer" not in name:
        for other in others:
            if (off := difference(candidates[other](), result)) > 1e-3:
                raise ValueError(f"{name}: {other} differs from {first} by {off:.2g}")
    peaks = {candidate: memory(run) for candidate, run in candidates.items()}
    times = measure(candidates, cfg.repeats, cfg.seconds)
    floor = flops / 1e9 / peak
    row = {"row": name, "gflop": flops / 1e9, "rounds": len(times[first]), "floor": floor, "profile": profile(candidates[first]), "candidates": {}}
    for candidate in candidates:
        ratios = np.array(times[candidate]) / np.array(times[first])
        seconds = float(np.median(times[candidate]))
        row["candidates"][candidate] = {"seconds": seconds, "ratio": float(np.median(ratios)), "low": float(np.quantile(ratios, 0.25)),
                                        "high": float(np.quantile(ratios, 0.75)), "peak_share": floor / seconds, "bytes": peaks[candidate]}
    return row


def printed(row):
    lines = [f"{row['row']:45} floor {1e3 * row['floor']:.1f} ms; {', '.join(f'{kernel} {100 * share:.0f} %' for kernel, share in row['profile'].items())}"]
    for candidate, c in row["candidates"].items():
        size = "" if c["bytes"] is None else f"{c['bytes'] / 2 ** 20:8.0f} MiB"
        lines.append(f"{row['row']:45} {candidate:30} {1e3 * c['seconds']:9.1f} ms  {c['ratio']:5.2f} ({c['low']:.2f} - {c['high']:.2f})  "
                     f"{row['gflop'] / c['seconds']:6.0f} GFLOP/s {100 * c['peak_share']:4.0f} % {size}")
    return "\n".join(lines)


def draw(rows, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    pairs = [(row["row"], candidate, c) for row in rows for candidate, c in list(row["candidates"].items())[1:]]
    figure, axis = plt.subplots(figsize=(9, 0.28 * len(pairs) + 1))
    axis.barh([f"{name}: {candidate}" for name, candidate, _ in pairs], [c["ratio"] for *_, c in pairs],
              xerr=np.array([[c["ratio"] - c["low"], c["high"] - c["ratio"]] for *_, c in pairs]).T)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.margins(y=0.01)
    axis.invert_yaxis()
    axis.tick_params(labelsize=6)
    axis.set_xlabel("time of the peer over ours")
    figure.tight_layout()
    figure.savefig(path, format="png", dpi=150, bbox_inches="tight")
    plt.close(figure)


def main():
    cfg = CONFIG
    check_least(cfg, threads=1)
    torch.set_num_threads(cfg.threads)
    words = list(filter(None, cfg.rows.split(",")))
    chosen = [name for name in ROWS if not words or any(word.strip() in name for word in words)]
    if not chosen:
        raise ValueError(f"no row is named like {cfg.rows}; there are: {'; '.join(ROWS)}")
    peaks = peak_gflops()
    peak = max(peaks.values())
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}: matrix product {peaks['torch']:.0f} GFLOP/s, ours {peaks['ours']:.0f}", flush=True)
    path, rows = Path(cfg.out) / "compare.json", {}
    if path.exists():
        rows = {row["row"]: row for row in checkpoint.read_object(path)["rows"]}
    for name in chosen:
        try:
            rows[name] = compare(name, cfg, peak)
        except ImportError as error:
            print(f"{name}: skipped, {error}; requirements-dev.txt names what to install")
            continue
        print(printed(rows[name]), flush=True)
        result = {"peak_gflops": peaks, "torch": torch.__version__, "threads": torch.get_num_threads(), "rows": [rows[name] for name in ROWS if name in rows]}
        checkpoint.write_json(path, result)
    checkpoint.write(Path(cfg.out) / "compare.png", lambda temporary: draw([rows[name] for name in ROWS if name in rows], temporary))


if __name__ == "__main__":
    one_line_errors(main)
