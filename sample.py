"""Text to pictures, from a bundle of trained weights.

    python sample.py --prompt "a red circle above a blue square"
    python sample.py --prompt "three green stars" --num 16 --out stars.png
    python sample.py --prompts-file prompts.txt --weights runs/mine --steps 50 --cfg 3 --trajectory steps.gif
    python sample.py --prompt "a red star" --init-image out.png --strength 0.7 --mask hole.png
    python sample.py --prompt "make the circle blue" --edit-image out.png --weights runs/edit
    python sample.py --prompt "a fox in the snow" --weights sd3_medium_incl_clips_t5xxlfp8.safetensors --tokenizers DIR --dtype bf16 --offload

`generate()` is what train.py, evaluate.py and the experiments use.
"""

import os
import sys
from dataclasses import asdict, dataclass

from config import flag, one_line_errors, parse_config, unknown


@dataclass
class SampleConfig:
    prompt: tuple = flag((), "what to draw", "text")
    prompts_file: str = flag("", "a text file with a prompt a line", "text")
    negative_prompt: str = flag("", "what to steer away from, instead of from no text at all", "text")
    encoders: str = flag("clip_l,clip_g,t5", "text encoders to use; the others' embeddings are zeros", "text")
    t5_length: int = flag(0, "length of T5's part of the context; 0: the bundle's", "text", unit="tokens")
    tokenizers: str = flag("", "folder of vocab.json and merges.txt (CLIP) and tokenizer.json (T5); empty: beside the weights", "text")
    weights: str = flag("weights/mini", "a bundle folder, a safetensors file of Stability's, a diffusers folder", "weights")
    mmdit: str = flag("", "an MM-DiT checkpoint of train.py to use in place of the bundle's", "weights")
    vae: str = flag("", "a safetensors file with the autoencoder, where --weights has none", "weights")
    clip_l: str = flag("", "the same for CLIP-L", "weights")
    clip_g: str = flag("", "the same for CLIP-G", "weights")
    t5: str = flag("", "the same for T5", "weights")
    lora: tuple = flag((), "a LoRA in diffusers' layout, FILE or FILE:SCALE", "weights")
    steps: int = flag(0, "steps of the sampler; 0: the bundle's", "sampling")
    cfg: float = flag(-1.0, "guidance scale, 1 is none; -1: the bundle's", "sampling")
    shift: float = flag(0.0, "timestep shift alpha of Eq. 23, of t or, on curved paths, of the share of the log-SNR range that is left; 0: the bundle's", "sampling")
    t_last: float = flag(-1.0, "noise level from which the last step goes to the picture at once; -1: the bundle's", "sampling")
    sampler: str = flag("", "solver; empty: the bundle's (euler, heun, ancestral, ...)", "sampling")
    noise: float = flag(-1.0, "of the samplers ancestral and sde, how much is fresh on the way: 0 none, 1 as in DDPM; -1: the bundle's with its own sampler, 1 with another", "sampling")
    seed: int = flag(0, "picture i is drawn from noise of seed + i", "sampling")
    width: int = flag(None, "width, a multiple of 16; the bundle's unless given", "picture", unit="pixels")
    height: int = flag(None, "height, a multiple of 16; the bundle's unless given", "picture", unit="pixels")
    num: int = flag(1, "pictures a prompt", "picture")
    init_image: str = flag("", "picture to start from; its size is the default of --width and --height", "picture")
    strength: float = flag(-1.0, "how much of --init-image is drawn anew, above 0 (nothing) to 1 (all); -1: 0.6", "picture")
    edit_image: str = flag("", "picture to edit, the prompt being the instruction (App. D); for a model of train.py --stage edit; its size as of --init-image", "picture")
    image_cfg: float = flag(-1.0, "guidance scale towards --edit-image, 1 is none; --cfg is then that of the instruction; -1: the bundle's", "sampling")
    mask: str = flag("", "picture that is white where --init-image is to be redrawn, black where it stays", "picture")
    out: str = flag("out.png", "file to write; several pictures make a grid", "picture")
    zoom: int = flag(1, "enlarge each pixel of the file to zoom x zoom", "picture")
    trajectory: str = flag("", "also write a GIF of the data estimate at each step", "picture")
    device: str = flag("cpu", "cpu, cuda, cuda:1, mps", "machine")
    dtype: str = flag("fp32", "precision of the MM-DiT and the text encoders (T5 never in fp16, which it overflows)", "machine", choices=("fp32", "bf16", "fp16"))
    offload: bool = flag(False, "load each part only while it is needed: less memory, slower", "machine")
    tiled: bool = flag(False, "the autoencoder works in bands of rows: the same picture, a third of its memory, slower", "machine")


if __name__ == "__main__":
    CONFIG = parse_config(SampleConfig, description=__doc__)  # before the heavy imports: --help answers at once

import inspect
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from tqdm import tqdm

import checkpoint
from data import upright
from flow import formulation
from samplers import SAMPLERS, guided, guided_edit, keeping, parts, randn, start_from, timesteps, timesteps_log_snr
from shards import PICTURE_ERRORS, reason

MAX_PROMPT, MAX_SIDE = 2000, 4096
MAX_AHEAD = 2 ** 26  # numbers of modulations that are made ahead of sampling, of all times and samples


def check_prompts(prompts, what="prompt"):
    """The prompts, or a ValueError about the first that cannot be used."""
    if not prompts:
        raise ValueError("no prompt: give --prompt \"...\" or --prompts-file")
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise ValueError(f"{what} {number} is empty")
        if len(prompt) > MAX_PROMPT:
            raise ValueError(f"{what} {number} has {len(prompt)} characters; at most {MAX_PROMPT} are taken")
        if re.search("[\ud800-\udfff]", prompt):      # what Python makes of bytes that are not UTF-8
            raise ValueError(f"{what} {number} is not written in UTF-8")
    return list(prompts)


def check_size(width, height):
    for name, side in (("width", width), ("height", height)):
        if not 16 <= side <= MAX_SIDE or side % 16:
            raise ValueError(f"{name} is {side} pixels; it must be a multiple of 16 between 16 and {MAX_SIDE}")


def check_start(n, init, mask, strength, edit, width, height):
    """Refuses pictures to start from, masks and pictures to edit that do not suit n pictures of this size."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}, it must be above 0 and at most 1")
    if mask is not None and init is None:
        raise ValueError("a mask needs the picture that it belongs to")
    for what, side, wanted in (("picture to start from", init, (3, height, width)), ("mask", mask, (height, width))):
        if side is not None and side.shape != wanted:
            raise ValueError(f"the {what} is {tuple(side.shape)}, it must be {wanted} to draw {width} x {height} pixels")
    if edit is not None and edit.shape != (n, 3, height, width):
        raise ValueError(f"the pictures to edit are {tuple(edit.shape)}, they must be {(n, 3, height, width)} for {n} prompts and {width} x {height} pixels")


def check_device(name):
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {checkpoint.first_line(error)}") from None


def latent_channels(mmdit):
    """(channels of the latents that it makes, those of the picture to edit that it is shown beside them)."""
    made = mmdit.final_layer.linear.out_features // mmdit.patch_size ** 2
    return made, mmdit.x_embedder.proj.in_channels - made


def guided_velocity(bundle, prompts, cfg, negative_prompt="", encoders=("clip_l", "clip_g", "t5"), ts=(), source=None, image_cfg=1.0):
    """velocity(z, t) of the bundle's MM-DiT for the prompts under guidance, text and no text in one batch. source (B, C, h, w): latents of pictures to edit.

    No text is what it was in training: zeros (Sec. 5.1) or, for released weights, the empty prompt. What the latents do not change is done once:
    the text's embedding and, of the times `ts` that are known before, all modulations in one product."""
    guides = cfg != 1 or source is not None and image_cfg != 1
    from_text = guides and (negative_prompt or bundle.config.get("unconditional") == "empty prompt")
    texts = [*prompts, *[negative_prompt] * bool(from_text)]
    each = list(dict.fromkeys(texts))                                         # several pictures of one prompt: it is read once
    context, pooled = (x[[each.index(text) for text in texts]] for x in bundle.text.encode(each, encoders))
    form, like = formulation(bundle.config["formulation"]), next(bundle.mmdit.parameters())
    context, pooled = context.to(like), pooled.to(like)
    null_context, null_pooled = torch.zeros_like(context), torch.zeros_like(pooled)
    if from_text:
        context, pooled, null_context, null_pooled = context[:-1], pooled[:-1], context[-1:].expand_as(context[:-1]), pooled[-1:].expand_as(pooled[:-1])

    a_row = sum(p.numel() for name, p in bundle.mmdit.named_parameters() if name.endswith("adaLN_modulation.1.bias"))
    extra = latent_channels(bundle.mmdit)[1]
    if source is not None and not extra:
        raise ValueError("this MM-DiT draws and does not edit: --edit-image is for one that `python train.py --stage edit` made")

    def field(context, pooled, source=None):
        text, n = bundle.mmdit.context_embedder(context), len(pooled)
        early = torch.as_tensor(ts if len(ts) * n * a_row <= MAX_AHEAD else (), device=like.device)
        table = bundle.mmdit.modulations(early.repeat_interleave(n), pooled.repeat(len(early), 1))
        known = {t: [m[i * n:(i + 1) * n] for m in table] for i, t in enumerate(early.tolist())}

        def velocity(z, t):
            modulations = known.get(float(t[0])) or bundle.mmdit.modulations(t, pooled)
            shown = form.input(z, t)
            if extra:
                shown = torch.cat([shown, z.new_zeros(len(z), extra, *z.shape[2:]) if source is None else source], 1)      # zeros: no picture, as in training
            return form.velocity(bundle.mmdit.denoise(shown.to(like.dtype), text, modulations).float(), z, t)
        return velocity

    if not guides:
        return field(context, pooled, source)
    if source is not None:
        texts, pools = torch.cat([context, null_context, null_context]), torch.cat([pooled, null_pooled, null_pooled])
        return guided_edit(field(texts, pools, torch.cat([source, source, torch.zeros_like(source)])), image_cfg, cfg)
    return guided(None, None, cfg, joint=field(torch.cat([context, null_context]), torch.cat([pooled, null_pooled])))


def initial_noise(bundle, generators, width, height):
    """(n, C, height / 8, width / 8), a row of each of n generators."""
    noise = randn((len(generators), latent_channels(bundle.mmdit)[0], height // 8, width // 8), generators)
    return noise.to(next(bundle.mmdit.parameters()).device)


def seeded(seed, n):
    """A generator a picture."""
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


SETTLED = "steps", "cfg", "shift", "sampler", "image_cfg", "t_last", "noise"


def options_of(sampler):
    """The names of a sampler's parameters, of which not every one has path, generator, noise."""
    return inspect.signature(SAMPLERS[sampler]).parameters.keys()


def settled(config, steps, cfg, shift, sampler, image_cfg, t_last, noise):
    """The settings SETTLED of `generate`, from the bundle's config where they are 0, -1 or empty."""
    steps, shift, sampler = steps or config["steps"], shift or config["shift"], sampler or config["sampler"]
    if sampler not in SAMPLERS:
        raise unknown("sampler", sampler, SAMPLERS)
    if not 1 <= steps <= 1000 or not 0 < shift <= 100:
        raise ValueError(f"steps is {steps} and shift {shift}; steps must be in 1..1000, shift above 0 and at most 100")
    cfg = config["cfg"] if cfg < 0 else cfg
    image_cfg = config.get("image_cfg", 1.0) if image_cfg < 0 else image_cfg
    if t_last > 0 and sampler == "bs23":
        raise ValueError("the sampler bs23 finds its own steps: t_last is for the others")
    t_last = 0.0 if sampler == "bs23" else config.get("t_last", 0.0) if t_last < 0 else t_last
    stochastic = [name for name in SAMPLERS if "noise" in options_of(name)]
    if noise >= 0 and sampler not in stochastic:
        raise ValueError(f"the sampler {sampler} draws no noise on the way: noise is for {', '.join(stochastic)}")
    usual = config.get("noise", 1.0) if sampler == config["sampler"] else 1.0          # noise is another thing to each of them
    noise = 0.0 if sampler not in stochastic else usual if noise < 0 else noise
    return steps, cfg, shift, sampler, image_cfg, t_last, noise


def time_grid(form, schedule, steps, shift, t_last):
    """(steps + 1,): even in the log-SNR (schedule "log-snr": what `train.py` writes where paths are curved) or in t, as `samplers.timesteps` has it."""
    if schedule != "log-snr":
        return timesteps(steps, shift, form.t_max, form.t_min, schedule, t_last)
    if t_last > 0:
        raise ValueError(f"t_last is {t_last}, which is of grids that are even in t; this one is even in the log-SNR")
    return timesteps_log_snr(steps, form, shift)


def coder(bundle, tiled):
    """(images -> latents, latents -> images); the autoencoder is loaded at the first call."""
    def encode(images):
        images = images.to(bundle.device)
        return bundle.vae.encode_tiled(images) if tiled else bundle.vae.to_latents(images, sample=False)

    def decode(z):
        few = max(2 ** 20 // (64 * z[0, 0].numel()), 1)                       # as many as make a million pixels
        return torch.cat([bundle.vae.decode_tiled(part) if tiled else bundle.vae.decode(part) for part in z.split(few)])
    return encode, decode


@torch.inference_mode()
def generate(bundle, prompts, negative_prompt="", steps=0, cfg=-1.0, shift=0.0, sampler="", seed=0, width=None, height=None,
             encoders=("clip_l", "clip_g", "t5"), callback=None, init=None, strength=0.6, mask=None, edit=None, image_cfg=-1.0, t_last=-1.0, tiled=False, noise=-1.0,
             progress=False):
    """One picture a prompt: uint8 (B, H, W, 3) on the CPU. What is None, 0, -1 or empty is as the bundle's config says; a side of 0 is refused.

    Picture i starts from noise of seed + i, so it does not depend on the others (but for bs23, whose steps suit all). `callback(i, t, images)` is given the data
    estimate, decoded, before each step; it costs a decoding each time. init, an image (3, H, W) in [-1, 1], is the picture to start from: noised to
    t = strength, and redrawn from there on. mask (H, W): 1 where that may be, 0 where every pixel stays. edit, images (B, 3, H, W) in [-1, 1]: the pictures
    that the prompts, then instructions, are to change; cfg is the instructions' guidance, image_cfg the pictures'. tiled: the autoencoder works in
    bands, to the same pictures in less memory. progress: a bar on a terminal."""
    config = bundle.config
    steps, cfg, shift, sampler, image_cfg, t_last, noise = settled(config, steps, cfg, shift, sampler, image_cfg, t_last, noise)
    width, height = (config["resolution"] if side is None else side for side in (width, height))
    check_size(width, height)
    check_start(len(prompts), init, mask, strength, edit, width, height)
    if abs(seed) > 2 ** 62:
        raise ValueError(f"seed is {seed}; at most 2^62 is taken")

    if init is not None and strength <= t_last:
        t_last = 0.0                              # begun below it, one step would be all
    form = formulation(config["formulation"])
    ts = time_grid(form, config.get("schedule", "uniform"), steps, shift, t_last)
    encode, decode = coder(bundle, tiled)
    source = None if edit is None else encode(edit)
    velocity = guided_velocity(bundle, prompts, cfg, negative_prompt, encoders, ts, source, image_cfg)   # first: an encoder may be let go before the MM-DiT is loaded
    generators = seeded(seed, len(prompts))
    eps = initial_noise(bundle, generators, width, height)
    z = form.start(eps)
    if init is not None:
        x0 = encode(init[None])
        z, ts = start_from(x0, eps, ts, strength, form)
        if len(ts) < 2:
            raise ValueError(f"a strength of {strength} leaves nothing to draw: the path ends at t = {form.t_min}")
        if mask is not None:
            velocity = keeping(velocity, x0, eps, F.max_pool2d(mask[None, None].to(eps), bundle.vae.factor), form)
    bundle.release("vae")
    options = {name: value for name, value in {"path": form, "generator": generators, "noise": noise}.items() if name in options_of(sampler)}
    with tqdm(total=len(ts) - 1, desc="sampling", unit="step", disable=not (progress and sys.stderr.isatty())) as bar:
        def begun(i, t, z, v):
            bar.update()
            if callback:
                callback(i, float(t), to_uint8(decode(parts(v, z, t, form)[0])))
        z = SAMPLERS[sampler](velocity, z, ts.to(z.device), callback=begun, **options)
    bundle.release("mmdit")
    if not z.isfinite().all():
        raise ValueError(f"the sampler left finite numbers (guidance {cfg}, shift {shift}): no picture is written")
    images = decode(z)
    if not images.isfinite().all():
        raise ValueError("the autoencoder made numbers that are not finite: no picture is written")
    bundle.release("vae")
    if mask is not None:
        images = torch.where(mask.to(images.device) > 0, images, init.to(images.device))
    return to_uint8(images)


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
        info.add_itxt(key, str(value).encode("utf-8", "backslashreplace").decode())     # a path may be of other bytes
    checkpoint.write(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=info))


def open_picture(path):
    try:
        image = Image.open(path)
        return upright(image)
    except PICTURE_ERRORS as error:
        if getattr(error, "errno", None):             # of the file system, which names the file
            raise
        raise ValueError(f"{path} is no picture that can be read: {reason(error)}") from None


def read_init(cfg):
    """What `generate` needs to know of --init-image, --mask, --edit-image, --width and --height."""
    if cfg.mask and not cfg.init_image:
        raise ValueError("--mask needs the --init-image that it belongs to")
    if cfg.image_cfg >= 0 and not cfg.edit_image:
        raise ValueError("--image-cfg needs the --edit-image that it leads towards")
    if cfg.init_image and cfg.edit_image:
        raise ValueError("--init-image and --edit-image are two ways to start from a picture: give one of them")
    if cfg.strength != -1 and not cfg.init_image:
        raise ValueError("--strength is of the --init-image, how much of which is drawn anew")
    if not cfg.init_image and not cfg.edit_image:
        return {"width": cfg.width, "height": cfg.height}
    with open_picture(cfg.init_image or cfg.edit_image) as image:
        size = image.width if cfg.width is None else cfg.width, image.height if cfg.height is None else cfg.height
        check_size(*size)
        pixels = torch.from_numpy(np.array(image.resize(size, Image.Resampling.LANCZOS)))
    given = {"strength": 0.6 if cfg.strength == -1 else cfg.strength, "width": size[0], "height": size[1], "init" if cfg.init_image else "edit": from_uint8(pixels[None])[0]}
    if cfg.mask:
        with open_picture(cfg.mask) as image:
            given["mask"] = torch.from_numpy(np.array(image.convert("L").resize(size, Image.Resampling.NEAREST)) > 127).float()
    return given


def read_lora_flags(cfg):
    """FILE:SCALE -> (file, scale); 1 where none is given."""
    for text in cfg.lora:
        file, _, scale = text.rpartition(":")
        try:
            yield (file, float(scale)) if file else (text, 1.0)
        except ValueError:
            yield text, 1.0


def prompts_of(path):
    """The lines of a text file, but for blank ones."""
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from None
    return [line.strip() for line in lines if line.strip()]


def read_prompts(cfg):
    prompts = list(cfg.prompt)
    if cfg.prompts_file:
        prompts += prompts_of(cfg.prompts_file)
    if cfg.negative_prompt:
        check_prompts([cfg.negative_prompt], "negative prompt")
    return check_prompts(prompts)


def replace_mmdit(bundle, path):
    """By that of a checkpoint of train.py, with its EMA, or of weights alone."""
    state = checkpoint.load_checkpoint(path)
    state = state if isinstance(state, dict) else {"ema": state}
    mine = bundle.config["formulation"]
    config = state.get("config", {})
    trained = str(config.get("formulation", mine)) if isinstance(config, dict) else mine
    if trained != mine and not (trained.startswith("rf") and mine.startswith("rf")):      # rf's densities are of training alone
        raise ValueError(f"{path} was trained as {trained}, which the bundle, {mine}, does not sample")
    bundle.part("mmdit").replace(state.get("ema", state), path)


def main():
    cfg = CONFIG
    prompts, out = read_prompts(cfg), Path(cfg.out)
    if not 1 <= cfg.num <= 1024:
        raise ValueError(f"--num is {cfg.num}; it must be in 1..1024")
    if not 1 <= cfg.zoom <= 64:
        raise ValueError(f"--zoom is {cfg.zoom}; it must be in 1..64")
    for path in (cfg.out, *filter(None, [cfg.trajectory])):  # before the work, not after
        parent = Path(path).parent
        if not parent.is_dir() or not os.access(parent, os.W_OK) or Path(path).is_dir():
            raise ValueError(f"{path} cannot be written: " + ("it is a folder" if Path(path).is_dir() else f"{parent} is no folder or not writable"))
    for path, kind in (cfg.out, "PNG"), (cfg.trajectory, "GIF"):
        if Image.registered_extensions().get(Path(path).suffix.lower(), kind) != kind:
            raise ValueError(f"{path}: what is written there is a {kind}")
    check_device(cfg.device)
    start = read_init(cfg)
    files = {name: getattr(cfg, name) for name in ("vae", *checkpoint.ENCODERS)}
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[cfg.dtype]
    bundle = checkpoint.load_bundle(cfg.weights, cfg.device, files, cfg.t5_length, dtype=dtype, offload=cfg.offload, tokenizers=cfg.tokenizers, loras=read_lora_flags(cfg))
    if cfg.mmdit:
        replace_mmdit(bundle, cfg.mmdit)
    wanted = [p for p in prompts for _ in range(cfg.num)]
    if cfg.edit_image:
        start["edit"] = start["edit"].expand(len(wanted), -1, -1, -1)
    frames = []
    used = dict(zip(SETTLED, settled(bundle.config, *(getattr(cfg, name) for name in SETTLED))))
    images = generate(bundle, wanted, cfg.negative_prompt, cfg.steps, cfg.cfg, cfg.shift, cfg.sampler, cfg.seed,
                      encoders=tuple(filter(None, cfg.encoders.split(","))), callback=(lambda i, t, images: frames.append(grid(images))) if cfg.trajectory else None,
                      image_cfg=cfg.image_cfg, t_last=cfg.t_last, tiled=cfg.tiled, noise=cfg.noise, progress=True, **start)
    picture = grid(images)
    larger = (picture.width * cfg.zoom, picture.height * cfg.zoom)
    used |= {"strength": start.get("strength", ""), "t5_length": bundle.config["t5_length"], "width": images.shape[2], "height": images.shape[1]}
    texts = {**asdict(cfg), **used, "prompt": "\n".join(prompts), "software": "nanoSD3"}
    save_png(picture.resize(larger, Image.Resampling.NEAREST), out, texts)
    if cfg.trajectory:
        frames.append(picture)
        checkpoint.write(cfg.trajectory, lambda temporary: frames[0].save(temporary, format="GIF", save_all=True, append_images=frames[1:], duration=100))
    print(f"wrote {out}")


if __name__ == "__main__":
    one_line_errors(main)
