"""Text to pictures, from a bundle of trained weights.

    python sample.py --prompt "a red circle above a blue square"
    python sample.py --prompt "three green stars" --num 16 --out stars.png
    python sample.py --prompts-file prompts.txt --weights runs/mine --steps 50 --cfg 3 --trajectory steps.gif

`generate()` is what train.py, evaluate.py and the experiments use.
"""

import os
import sys
from dataclasses import asdict, dataclass

from config import flag, one_line_errors, parse_config


@dataclass
class SampleConfig:
    prompt: tuple = flag((), "what to draw", "text")
    prompts_file: str = flag("", "a text file with a prompt a line", "text")
    negative_prompt: str = flag("", "what to steer away from, instead of from no text at all", "text")
    encoders: str = flag("clip_l,clip_g,t5", "text encoders to use; the others' embeddings are zeros", "text")
    weights: str = flag("weights/mini", "a bundle folder", "weights")
    mmdit: str = flag("", "an MM-DiT checkpoint of train.py to use in place of the bundle's", "weights")
    steps: int = flag(0, "steps of the sampler; 0: the bundle's", "sampling")
    cfg: float = flag(-1.0, "guidance scale, 1 is none; -1: the bundle's", "sampling")
    shift: float = flag(0.0, "timestep shift alpha of Eq. 23; 0: the bundle's", "sampling")
    sampler: str = flag("", "ODE solver; empty: the bundle's (euler, heun, ...)", "sampling")
    seed: int = flag(0, "picture i is drawn from noise of seed + i", "sampling")
    width: int = flag(None, "width, a multiple of 16; the bundle's unless given", "picture", unit="pixels")
    height: int = flag(None, "height, a multiple of 16; the bundle's unless given", "picture", unit="pixels")
    num: int = flag(1, "pictures a prompt", "picture")
    out: str = flag("out.png", "file to write; several pictures make a grid", "picture")
    zoom: int = flag(1, "enlarge each pixel of the file to zoom x zoom", "picture")
    trajectory: str = flag("", "also write a GIF of the data estimate at each step", "picture")
    device: str = flag("cpu", "cpu, cuda, cuda:1, mps", "machine")
    dtype: str = flag("fp32", "precision of the MM-DiT", "machine", choices=("fp32", "bf16", "fp16"))


if __name__ == "__main__":
    CONFIG = parse_config(SampleConfig, description=__doc__)  # before the heavy imports: --help answers at once

import contextlib
import inspect
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from tqdm import tqdm

import checkpoint
from flow import formulation
from samplers import SAMPLERS, guided, parts, timesteps

MAX_PROMPT, MAX_SIDE = 2000, 4096
MAX_ROWS = 2048  # times x samples whose modulations are made ahead of sampling: 0.1 GB for the miniature


def check_prompts(prompts):
    """The prompts, or a ValueError about the first that cannot be used."""
    if not prompts:
        raise ValueError("no prompt: give --prompt \"...\" or --prompts-file")
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise ValueError(f"prompt {number} is empty")
        if len(prompt) > MAX_PROMPT:
            raise ValueError(f"prompt {number} has {len(prompt)} characters; at most {MAX_PROMPT} are taken")
    return list(prompts)


def check_size(width, height):
    for name, side in (("width", width), ("height", height)):
        if not 16 <= side <= MAX_SIDE or side % 16:
            raise ValueError(f"{name} is {side} pixels; it must be a multiple of 16 between 16 and {MAX_SIDE}")


def check_device(name):
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None


def guided_velocity(bundle, prompts, cfg, negative_prompt="", encoders=("clip_l", "clip_g", "t5"), dtype=torch.float32, ts=()):
    """velocity(z, t) of the bundle's MM-DiT for the prompts under guidance, text and no text in one batch. What the latents do not change is done once:
    the text's embedding, and for the times `ts` that are known before the modulations, of all of them in one product."""
    form, device = formulation(bundle.config["formulation"]), next(bundle.mmdit.parameters()).device
    context, pooled = (x.to(device, dtype) for x in bundle.text.encode(prompts, encoders))
    null_context, null_pooled = torch.zeros_like(context), torch.zeros_like(pooled)  # as in training (Sec. 5.1)
    if negative_prompt:
        null_context, null_pooled = (x.to(device, dtype).expand_as(y) for x, y in zip(bundle.text.encode([negative_prompt], encoders), (context, pooled)))

    def field(context, pooled):
        text, n = bundle.mmdit.context_embedder(context), len(pooled)
        early = torch.as_tensor(ts if len(ts) * n <= MAX_ROWS else (), device=device)
        table = bundle.mmdit.modulations(early.repeat_interleave(n), pooled.repeat(len(early), 1))
        known = {t: [m[i * n:(i + 1) * n] for m in table] for i, t in enumerate(early.tolist())}

        def velocity(z, t):
            modulations = known.get(float(t[0])) or bundle.mmdit.modulations(t, pooled)
            return form.velocity(bundle.mmdit.denoise(form.input(z, t).to(dtype), text, modulations).float(), z, t)
        return velocity

    if cfg == 1:
        return field(context, pooled)
    return guided(None, None, cfg, joint=field(torch.cat([context, null_context]), torch.cat([pooled, null_pooled])))


def initial_noise(bundle, n, seed, width, height):
    """(n, C, height / 8, width / 8), row i from the seed + i alone."""
    size = 1, bundle.mmdit.x_embedder.proj.in_channels, height // 8, width // 8
    noise = torch.cat([torch.randn(size, generator=torch.Generator().manual_seed(seed + i)) for i in range(n)])
    return noise.to(next(bundle.mmdit.parameters()).device)


@torch.inference_mode()
def generate(bundle, prompts, negative_prompt="", steps=0, cfg=-1.0, shift=0.0, sampler="", seed=0, width=None, height=None,
             encoders=("clip_l", "clip_g", "t5"), callback=None, dtype=torch.float32):
    """One picture a prompt: uint8 (B, H, W, 3) on the CPU. What is None, 0, -1 or empty is as the bundle's config says; a side of 0 is refused.

    Picture i starts from noise of seed + i, so it does not depend on the others. `callback(i, t, images)` is given the data
    estimate, decoded, before each step; it costs a decoding each time."""
    defaults = bundle.config
    steps, shift, sampler = steps or defaults["steps"], shift or defaults["shift"], sampler or defaults["sampler"]
    cfg = defaults["cfg"] if cfg < 0 else cfg
    width, height = (defaults["resolution"] if side is None else side for side in (width, height))
    check_size(width, height)
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; known: {', '.join(SAMPLERS)}")
    if abs(seed) > 2 ** 62:
        raise ValueError(f"seed is {seed}; at most 2^62 is taken")
    if not 1 <= steps <= 1000 or not 0 < shift <= 100:
        raise ValueError(f"steps is {steps} and shift {shift}; steps must be in 1..1000, shift above 0 and at most 100")

    form = formulation(defaults["formulation"])
    z = form.start(initial_noise(bundle, len(prompts), seed, width, height))
    ts = timesteps(steps, shift, form.t_max, form.t_min).to(z.device)
    velocity = guided_velocity(bundle, prompts, cfg, negative_prompt, encoders, dtype, ts)
    preview = callback and (lambda i, t, z, v: callback(i, float(t), to_uint8(bundle.vae.decode(parts(v, z, t, form)[0]))))
    options = {"path": form, "generator": torch.Generator().manual_seed(seed)}  # for the samplers that take them
    options = {k: v for k, v in options.items() if k in inspect.signature(SAMPLERS[sampler]).parameters}
    z = SAMPLERS[sampler](velocity, z, ts, callback=preview, **options)
    if not z.isfinite().all():
        raise ValueError(f"the sampler left finite numbers (guidance {cfg}, shift {shift}): no picture is written")
    return to_uint8(bundle.vae.decode(z))


def to_uint8(images):
    """(B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3) on the CPU."""
    return (images.permute(0, 2, 3, 1) * 127.5 + 127.5).round().clamp(0, 255).to("cpu", torch.uint8)


def from_uint8(images):
    """The inverse: uint8 (B, H, W, 3) -> (B, 3, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def grid(images, columns=0, gap=2):
    """uint8 (B, H, W, 3) -> one PIL image, `columns` a row (0: about square)."""
    b, h, w, _ = images.shape
    columns = columns or min(b, -int(-b ** 0.5 // 1))
    canvas = Image.new("RGB", (columns * (w + gap) - gap, -(-b // columns) * (h + gap) - gap), "white")
    for i, image in enumerate(images):
        canvas.paste(Image.fromarray(image.numpy()), (i % columns * (w + gap), i // columns * (h + gap)))
    return canvas


def save_png(image, path, texts):
    """The PNG carries `texts`, a dict, as text chunks."""
    info = PngImagePlugin.PngInfo()
    for key, value in texts.items():
        info.add_itxt(key, str(value))
    checkpoint.write(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=info))


def read_prompts(cfg):
    prompts = list(cfg.prompt)
    if cfg.prompts_file:
        prompts += [line.strip() for line in Path(cfg.prompts_file).read_text("utf-8").splitlines() if line.strip()]
    return check_prompts(prompts)


def main():
    cfg = CONFIG
    prompts, out = read_prompts(cfg), Path(cfg.out)
    if not 1 <= cfg.num <= 1024:
        raise ValueError(f"--num is {cfg.num}; it must be in 1..1024")
    if not 1 <= cfg.zoom <= 64:
        raise ValueError(f"--zoom is {cfg.zoom}; it must be in 1..64")
    for path in filter(None, (cfg.out, cfg.trajectory)):  # before the work, not after
        parent = Path(path).parent
        if not parent.is_dir() or not os.access(parent, os.W_OK) or Path(path).is_dir():
            raise ValueError(f"{path} cannot be written: " + ("it is a folder" if Path(path).is_dir() else f"{parent} is no folder or not writable"))
    check_device(cfg.device)
    bundle = checkpoint.load_bundle(cfg.weights, cfg.device)
    if cfg.mmdit:
        state = checkpoint.load_checkpoint(cfg.mmdit, cfg.device)
        checkpoint.load_strictly(bundle.mmdit, state.get("ema", state) if isinstance(state, dict) else state, cfg.mmdit)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[cfg.dtype]
    bundle.mmdit.to(dtype)
    wanted = [p for p in prompts for _ in range(cfg.num)]
    frames = []
    steps = cfg.steps or bundle.config["steps"]
    with tqdm(total=steps, desc="sampling", unit="step", disable=not sys.stderr.isatty()) if cfg.trajectory else contextlib.nullcontext() as bar:
        def preview(i, t, images):
            frames.append(grid(images))
            bar.update()
        images = generate(bundle, wanted, cfg.negative_prompt, cfg.steps, cfg.cfg, cfg.shift, cfg.sampler, cfg.seed, cfg.width, cfg.height,
                          tuple(filter(None, cfg.encoders.split(","))), preview if cfg.trajectory else None, dtype)
    picture = grid(images)
    larger = (picture.width * cfg.zoom, picture.height * cfg.zoom)
    used = {name: bundle.config[name] for name in ("steps", "cfg", "shift", "sampler") if getattr(cfg, name) == getattr(SampleConfig, name)}
    texts = {**asdict(cfg), **used, "prompt": "\n".join(prompts), "software": "nanoSD3"}
    save_png(picture.resize(larger, Image.Resampling.NEAREST), out, texts)
    if cfg.trajectory:
        frames.append(picture)
        checkpoint.write(cfg.trajectory, lambda temporary: frames[0].save(temporary, format="GIF", save_all=True, append_images=frames[1:], duration=100))
    print(f"wrote {out}")


if __name__ == "__main__":
    one_line_errors(main)
