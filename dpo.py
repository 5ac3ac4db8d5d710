"""Alignment with preferences (App. C): Diffusion-DPO (Wallace et al. 2023) on low-rank adapters (LoRA, Hu et al. 2021) of all linear layers.

    python dpo.py                                                          # both of the following, with their defaults
    python dpo.py make-pairs --out runs/pairs                              # the miniature draws, a program judges: what `dpo.py train` learns from
    python dpo.py train --pairs runs/pairs --beta 300 --steps 400 --out runs/dpo      # then: python sample.py --weights runs/dpo --prompt "..."
    python dpo.py compare --weights runs/dpo --base weights/mini           # wins against the base, diversity
    python dpo.py train --pairs preferences.jsonl --weights BUNDLE --out runs/dpo --resume
    python dpo.py make-pairs --prompts-file prompts.txt --judge person --out runs/pairs      # draws contact sheets; once choices.txt is filled in, the same command again
    torchrun --nproc_per_node 8 dpo.py train --pairs latents:runs/latents --weights BUNDLE --device cuda --out runs/dpo

Preferences are lines {"prompt": ..., "chosen": file, "rejected": file} of a jsonl file, or files x.txt, x.chosen.png, x.rejected.png of a folder; pictures, or
latents (.npy); or what `data.py precompute --data pairs:...` made of either. The run folder is a bundle with the LoRA merged in; lora.safetensors, in diffusers'
layout, is the LoRA alone. The loop, and what a stopped or a distributed run can rely on, are train.py's.
"""

import contextlib
import copy
import dataclasses
import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm

import checkpoint
import distributed
import evaluate
import train
from config import check_least, flag, going_on, one_line_errors, parse_config, subcommand, unknown
from data import Latents, open_data
from flow import formulation, shift
from mmdit import Linear
from pipeline import check_fingerprint, claim, conditioned_batches, held_out_batches
from runs import Run, read_lines
from sample import check_device, check_prompts, check_size, from_uint8, generate, grid, latent_channels, prompts_of, save_png, settled
from train import TrainConfig

# ---------------------------------------------------------------------------------------------------------------
# LoRA


class LoRALinear(Linear):
    """W x + b + (alpha / rank) B A x with W and b frozen. Its weight keeps its name, so the model's own state dict is still inside the adapted one's."""

    on = True           # False: the layer as it was (`without_lora`)

    def __init__(self, linear, rank, alpha):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scale = linear.in_features, linear.out_features, alpha / rank
        self.weight, self.bias = linear.weight.requires_grad_(False), linear.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, self.in_features).to(self.weight) / self.in_features ** 0.5)
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, rank))      # the update starts at zero

    def forward(self, x):                                                     # (..., in) -> (..., out)
        y = super().forward(x)
        return y + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B) if self.on else y


def add_lora(module, rank, alpha=None):
    """Give every `Linear` of the module, in place, an update of the rank (App. C: all of them, rank 128); only the updates train. alpha: by default the rank."""
    if rank < 1:
        raise ValueError(f"the rank is {rank}, it must be at least 1")
    module.requires_grad_(False)
    for name, linear in [*module.named_modules()]:
        if type(linear) is Linear:
            module.set_submodule(name, LoRALinear(linear, rank, alpha or rank))
    return module


@contextlib.contextmanager
def without_lora(module):
    """The module as it was before `add_lora`, frozen, to the bit: DPO's reference, without a second copy of the weights."""
    loras = [lora for lora in module.modules() if isinstance(lora, LoRALinear)]
    for lora in loras:
        lora.on = False
    try:
        yield
    finally:
        for lora in loras:
            lora.on = True


def merge_lora(module):
    """Undo `add_lora`, the updates added to the weights; in place."""
    for name, lora in [*module.named_modules()]:
        if isinstance(lora, LoRALinear):
            with torch.device("meta"):
                linear = Linear(lora.in_features, lora.out_features)
            linear.weight, linear.bias = nn.Parameter((lora.weight + lora.scale * lora.lora_B @ lora.lora_A).detach(), requires_grad=False), lora.bias
            module.set_submodule(name, linear)
    return module


def save_lora(path, mmdit):
    """The adapters of an MM-DiT in diffusers' layout: for `sample.py --lora` and for `StableDiffusion3Pipeline.load_lora_weights`."""
    loras = {name: lora for name, lora in mmdit.named_modules() if isinstance(lora, LoRALinear)}
    checkpoint.save_lora(path, {name: (lora.lora_A.detach(), lora.scale * lora.lora_B.detach()) for name, lora in loras.items()}, len(mmdit.joint_blocks))


# ---------------------------------------------------------------------------------------------------------------
# The loss

def preference(model, reference, formulation, chosen, rejected, context, pooled, beta, t=None, eps=None, generator=None):
    """-> (margin, drift), both (B,): how much more the model prefers the chosen latents (B, C, h, w) than the reference does, the argument of the log-sigmoid in App. C's loss, and the
    mean squared difference of their outputs.

    model, reference: (latents, t, context, pooled) -> output. Both pictures of a pair get the same t (B,) and eps, drawn unless given. Squared errors are means, not sums, over C h w."""
    if t is None:
        t = formulation.sample_t(len(chosen), generator, chosen.device)
    if eps is None:
        eps = torch.randn(chosen.shape, generator=generator).to(chosen)
    x0, t, eps, context, pooled = torch.cat([chosen, rejected]), *(torch.cat([x, x]) for x in (t, eps, context, pooled))
    z = formulation.input(formulation.interpolate(x0, eps, t), t)
    out = model(z, t, context, pooled).float()
    base = reference(z, t, context, pooled).float().detach()                  # not under no_grad, where another kernel may attend: a rounding error times beta
    won, lost = (formulation.loss(lambda *_: out, x0, t, eps) - formulation.loss(lambda *_: base, x0, t, eps)).chunk(2)      # (B,) each
    drift = (out - base).detach().square().flatten(1).mean(1).unflatten(0, (2, -1)).mean(0)
    return -beta / 2 * (won - lost), drift


def dpo_loss(model, reference, formulation, chosen, rejected, context, pooled, beta, t=None, eps=None, generator=None):
    """(B,): App. C's loss of each pair, log 2 where the model is the reference; arguments as of `preference`."""
    return -F.logsigmoid(preference(model, reference, formulation, chosen, rejected, context, pooled, beta, t, eps, generator)[0])


def logged(margin, drift):
    """{name: number} of a batch: the implicit accuracy is the share of pairs whose chosen picture the model prefers more than the reference does; a tie is half a pair."""
    return {"accuracy": (margin.sign() / 2 + 0.5).mean().item(), "margin": margin.mean().item(), "drift": drift.mean().item()}


# ---------------------------------------------------------------------------------------------------------------
# dpo.py train

def again(name, default):
    """train.py's flag with another default."""
    return dataclasses.field(default=default, metadata=TrainConfig.__dataclass_fields__[name].metadata)


@dataclass
class DPOConfig(TrainConfig):
    """What is not in FLAGS is the bundle's (`run_dpo`), or else train.py's default."""
    stage: str = again("stage", "dpo")
    pairs: str = flag("", "preferences: a jsonl file, a folder, latents:DIR", "run")
    weights: str = flag("weights/mini", "bundle that is aligned", "run")
    out: str = again("out", "runs/dpo")
    steps: int = flag(2000, "optimizer steps; App. C: 4000 of the model of 2B weights, 2000 of 8B", "optimization")
    batch_size: int = flag(32, "pairs a step, over all processes", "optimization")
    lr: float = flag(1e-4, "learning rate of AdamW", "optimization")
    ema_decay: float = again("ema_decay", 0.99)
    beta: float = flag(2000.0, "strength of the loss: the larger, the nearer to the reference the model stays (Wallace et al. take 2000 to 5000)", "optimization")
    rank: int = flag(128, "of the LoRA", "model")
    optimizer: str = again("optimizer", "adamw")
    alpha: float = flag(0.0, "the LoRA's update is multiplied with alpha / rank; 0: the rank", "model")
    chunk: int = again("chunk", 1024)
    eval_every: int = again("eval_every", 500)


FLAGS = ("pairs", "weights", "out", "resume", "seed", "steps", "batch_size", "grad_accum", "lr", "warmup", "lr_schedule", "decay", "weight_decay", "clip_grad", "ema_decay", "ema_every",
         "max_bad_steps", "beta", "rank", "alpha", "buckets", "upscale", "chunk", "reuse", "workers", "eval_every", "checkpoint_every", "keep", "milestone_every", "log_every", "device",
         "precision", "tf32", "checkpointing", "sharding", "threads")


def open_pairs(cfg, split):
    name, _, folder = cfg.pairs.partition(":")
    spec = cfg.pairs if name == "latents" and folder else f"pairs:{cfg.pairs}"
    return open_data(spec, cfg.resolution, cfg.resolution, split, cfg.seed, buckets=cfg.buckets, upscale=cfg.upscale)


def comparison(cfg):
    """-> noise_for(latents, n, generator): t and eps of n pairs; compared(model, *columns of pairs with their noise): `preference` of the model over itself without its LoRA."""
    form = formulation(cfg.formulation)

    def noise_for(latents, n, generator):
        return shift(form.sample_t(n, generator), cfg.shift), torch.randn(n, latents.shape[1] // 2, *latents.shape[2:], generator=generator)

    def compared(model, latents, *columns):
        def reference(*inputs):
            with without_lora(model):
                return model(*inputs)
        chosen, rejected, context, pooled, t, eps = (x.to(cfg.device) for x in (*latents.chunk(2, 1), *columns))
        return preference(model, reference, form, chosen, rejected, context, pooled, cfg.beta, t, eps)
    return noise_for, compared


def align(cfg):
    """The stage: `train.fit` on the LoRA."""
    dataset, held_out = open_pairs(cfg, "train"), open_pairs(cfg, "val")
    bundle, out = checkpoint.load_bundle(cfg.weights, cfg.device), Path(cfg.out)
    if isinstance(dataset, Latents):
        check_fingerprint(dataset, [cfg.weights], cfg.clip_length, cfg.t5_length)
    made, shown = latent_channels(bundle.mmdit)
    if shown:
        raise ValueError(f"{cfg.weights} edits pictures: a LoRA is of models that draw them")
    torch.manual_seed(cfg.seed)
    bundle.mmdit = add_lora(bundle.mmdit, cfg.rank, cfg.alpha)
    bundle.mmdit.checkpointing = cfg.checkpointing
    noise_for, compared = comparison(cfg)

    def draw(batch, generator):
        return *batch, *map(distributed.own, noise_for(batch[0], cfg.batch_size, generator))

    def loss_of(model, *columns):
        margin, drift = compared(model, *columns)
        return -F.logsigmoid(margin).mean(), logged(margin.detach(), drift)

    generator = torch.Generator().manual_seed(0)
    validation = [(*batch, *noise_for(batch[0], len(batch[0]), generator)) for batch in held_out_batches(held_out, bundle, cfg, 256)]
    if validation[0][0].shape[1] != 2 * made:
        raise ValueError(f"{cfg.pairs} has {validation[0][0].shape[1]} channels of latents a pair, not twice {made}: `python data.py precompute --data pairs:...` makes them")
    prompts = train.fixed_prompts(cfg, held_out)
    ours = isinstance(bundle.part("mmdit"), checkpoint.BundlePart)          # released weights get their LoRA alone
    Run(cfg).claim()
    if ours and not distributed.rank():
        checkpoint.copy_parts(cfg.weights, out, (*train.FROZEN, "config"))

    @torch.no_grad()
    def validate(model, step):
        margin, drift = (torch.cat(rows) for rows in zip(*(compared(model, *columns) for batch in validation for columns in zip(*(x.split(16) for x in batch)))))
        bundle.mmdit = model
        save_png(grid(generate(bundle, prompts)), out / f"grid-{step:07}.png", {"step": step, "prompts": "\n".join(prompts)})
        save_lora(out / "lora.safetensors", model)
        if ours:
            checkpoint.save_part(out, "mmdit", merge_lora(copy.deepcopy(model)), bundle.part("mmdit").config)
        scores = evaluate.geneval(bundle, 10)[0] if cfg.data.startswith("shapes") else {}
        return {"val_loss": -F.logsigmoid(margin).mean().item(), **{f"val_{name}": value for name, value in logged(margin, drift).items()}, **scores}

    train.fit(cfg, bundle.mmdit, lambda start: conditioned_batches(dataset, bundle, cfg, start, *train.place()), draw, loss_of, validate)


def check(cfg):
    """Refuses what cannot be trained, before anything is written."""
    if not cfg.pairs:
        raise ValueError("--pairs is missing: a jsonl file or a folder of preferences, which `python dpo.py make-pairs` makes")
    check_least(cfg, rank=1, alpha=0, lr=1e-12, beta=1e-6)
    if Path(cfg.out).resolve() == Path(cfg.weights).resolve():
        raise ValueError(f"--out {cfg.out} is the bundle that is aligned, which would be overwritten")
    train.check(cfg, distributed.world())


def run_dpo(cfg):
    config = checkpoint.load_bundle(cfg.weights).config
    cfg = replace(cfg, data="shapes" if evaluate.is_shapes(config) else "", **{name: config[name] for name in ("resolution", "clip_length", "t5_length", "formulation", "shift")})
    check(cfg)
    run = Run(cfg)
    run.check_folder()
    train.carry_out([run], {"dpo": align})


# ---------------------------------------------------------------------------------------------------------------
# dpo.py make-pairs: several pictures a prompt, ranked

@dataclass
class PairsConfig:
    weights: str = flag("weights/mini", "bundle that draws", "run")
    out: str = flag("runs/pairs", "folder to write, then --pairs DIR; the same command goes on where it stopped", "run")
    judge: str = flag("auto", "who ranks: the detector of `shapes`, CLIP's score, a person (contact sheets and choices.txt); auto: the detector where it can", "run",
                      choices=("auto", "detector", "clip", "person"))
    prompts_file: str = flag("", "a text file with a prompt a line; empty: prompts of `shapes`", "prompts")
    prompts: int = flag(350, "prompts of `shapes`, an equal share of each category and of signs", "prompts")
    samples: int = flag(8, "pictures a prompt", "prompts")
    per_prompt: int = flag(1, "pairs a prompt at most: best and worst, second best and second worst, ...", "prompts")
    categories: str = flag("", "of `shapes`, which prompts, by commas: \"counting,position\"; empty: all, signs too", "prompts")
    seed: int = flag(0, "of prompts and noise; evaluate.py draws others, though of few words some come again", "prompts")
    steps: int = flag(0, "steps of the sampler; 0: the bundle's", "sampling")
    cfg: float = flag(-1.0, "guidance scale; -1: the bundle's", "sampling")
    sampler: str = flag("", "of samplers.SAMPLERS; empty: the bundle's. Noise on the way leaves traces in few steps, which alignment would learn: then euler", "sampling")
    sizes: str = flag("", "of the pictures, \"128x128,192x96\": an equal share of the prompts each; empty: the bundle's", "sampling")
    batch_size: int = flag(0, "pictures drawn at once, of whole prompts; 0: those of one prompt", "sampling")
    device: str = flag("cpu", "cpu, cuda, mps", "machine")


APART = {"detector": 0.05, "clip": 0.01}    # scores of a pair differ by so much at least


def likeness(wanted, thing):
    """Of a thing to a wanted one, in [0, 1]: shape, then color; of signs, the letters in their places."""
    if wanted.word or thing.word:
        return sum(a == b for a, b in zip(wanted.word, thing.word)) / max(len(wanted.word), len(thing.word))
    right = wanted.color in ("", thing.color)
    return (0.75 if thing.shape == wanted.shape else 0.0) + 0.25 * right


def crispness(image):
    """Share of pixels of a color that `shapes` draws in."""
    flat = np.concatenate([evaluate.PALETTE, evaluate.GROUNDS, [[0, 0, 0], [255, 255, 255]]])
    return float((np.abs(image[:, :, None].astype(float) - flat).max(3).min(2) < 24).mean())


def shapes_score(task, image):
    """How good a picture uint8 (H, W, 3) of `shapes` is: 1 if it is exactly right, up to 0.5 more for the wanted things alike, less 0.1 for each other one, and a tenth of the crispness."""
    things = evaluate.detect(image)[1]
    left, alike = list(things), 0.0
    for wanted in task.wanted[:len(things)]:
        nearest = max(left, key=lambda thing: likeness(wanted, thing))
        alike += likeness(wanted, nearest)
        left.remove(nearest)
    return evaluate.judge(task, things)[0] + 0.5 * alike / len(task.wanted) - 0.1 * len(left) + 0.1 * crispness(image)


def scores_of(bundle, judge, task, images):
    """uint8 (n, H, W, 3) -> n numbers, the more the better."""
    if judge == "detector":
        return [shapes_score(task, image) for image in images.numpy()]
    pictures, texts = evaluate.clip_features(bundle, from_uint8(images), [task.prompt] * len(images))
    return F.cosine_similarity(pictures, texts).tolist()


def ranked(scores, most, apart):
    """[(better, worse)] of the scores' places: best and worst, second best and second worst, ..., as long as they are `apart`."""
    order = np.argsort(-np.array(scores), kind="stable").tolist()
    return [(a, b) for a, b in zip(order[:len(order) // 2], order[::-1]) if scores[a] - scores[b] >= apart][:most]


def picture_name(number, k):
    return f"{number:05}-{k}.png"


def contact_sheet(out, numbers, tasks, samples):
    """sheet-NUMBER.png: for each prompt its pictures, numbered from 0."""
    rows = [[Image.open(out / picture_name(number, k)) for k in range(samples)] for number in numbers]
    width, height = (max(image.size[axis] for row in rows for image in row) for axis in (0, 1))
    side = max(width, 32)
    sheet = Image.new("RGB", (samples * (side + 4), len(rows) * (height + 32)), "white")
    draw = ImageDraw.Draw(sheet)
    for y, (number, row) in zip(range(0, sheet.height, height + 32), zip(numbers, rows)):
        draw.text((2, y + 1), f"{number:05}  {tasks[number].prompt}", fill="black")
        for k, image in enumerate(row):
            draw.text((k * (side + 4) + 2, y + 14), str(k), fill="black")
            sheet.paste(image, (k * (side + 4), y + 28))
    save_png(sheet, out / f"sheet-{numbers[0]:05}.png", {})


def ask(out, tasks, samples):
    """Contact sheets, and choices.txt to be filled in."""
    for first in range(0, len(tasks), 12):
        contact_sheet(out, range(first, min(first + 12, len(tasks))), tasks, samples)
    lines = ["# prompt, best picture, worst picture: put numbers of sheet-*.png for the two dashes; lines with dashes are left out", *(f"{n:05} - - {task.prompt}" for n, task in enumerate(tasks))]
    checkpoint.write_text(out / "choices.txt", "\n".join(lines) + "\n")
    print(f"{out}: look at sheet-*.png, fill in choices.txt, then run the same command again")


def read_choices(path, tasks, samples):
    """{number of the prompt: (best, worst)}"""
    chosen = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        fields = line.split(maxsplit=3)
        if len(fields) >= 3 and "-" in fields[1:3]:
            continue
        good = len(fields) >= 3 and all(field.isdecimal() for field in fields[:3]) and int(fields[0]) < len(tasks) and max(map(int, fields[1:3])) < samples and int(fields[1]) != int(fields[2])
        if not good:
            raise ValueError(f"{path} line {number} is not: a prompt's number, then those of two of its {samples} pictures, or dashes")
        chosen[int(fields[0])] = int(fields[1]), int(fields[2])
    if not chosen:
        raise ValueError(f"{path}: no line is filled in yet; {path.parent}/sheet-*.png show what to choose from")
    return chosen


def tasks_of(cfg, bundle, seed):
    """The prompts: evaluate.Task, without anything `wanted` where no program can judge."""
    if cfg.prompts_file:
        return [evaluate.Task("", prompt, ()) for prompt in check_prompts(prompts_of(cfg.prompts_file))]
    if not evaluate.is_shapes(bundle.config):
        raise ValueError(f"{cfg.weights} is of no `shapes`, for which prompts can be made up: give --prompts-file FILE")
    categories = cfg.categories.split(",") if cfg.categories else evaluate.KINDS
    for strange in {*categories} - {*evaluate.KINDS}:
        raise unknown("category", strange, evaluate.KINDS)
    columns = [evaluate.tasks(category, -(-cfg.prompts // len(categories)), seed) for category in categories]
    return [task for row in zip(*columns) for task in row][:cfg.prompts]


def sizes_of(text):
    """[(width, height)], None for what the bundle says."""
    if not text:
        return [(None, None)]
    found = [re.fullmatch(r"(\d+)x(\d+)", size.strip()) for size in text.split(",")]
    if None in found:
        raise ValueError(f"--sizes is {text!r}, not like 128x128,192x96")
    sizes = [tuple(map(int, size.groups())) for size in found]
    for size in sizes:
        check_size(*size)
    return sizes


def batches(tasks, sizes, start, most):
    """[(size, tasks)] from the task of number `start` on: an equal run of the tasks has each size, and a batch `most` tasks of one."""
    found, ends = [], [-(-len(tasks) * (k + 1) // len(sizes)) for k in range(len(sizes))]
    for size, begin, end in zip(sizes, [0, *ends], ends):
        found += [(size, tasks[k:min(k + most, end)]) for k in range(max(start, begin), end, most)]
    return found


def judge_of(cfg, bundle, tasks):
    judge = cfg.judge if cfg.judge != "auto" else "detector" if tasks[0].wanted else "clip"
    if judge == "detector" and not tasks[0].wanted:
        raise ValueError("--judge detector knows what prompts of `shapes` want, not those of --prompts-file: take another")
    if judge == "clip" and not (bundle.folder / "clip_image.json").exists():
        raise ValueError(f"{bundle.folder} holds no clip_image, by which --judge clip sees pictures")
    return judge


@going_on("the same command goes on where it stopped")
def make_pairs(cfg):
    """Writes OUT/metadata.jsonl and the pictures that it names; judged.jsonl, a line a prompt, is what a stopped run goes on from."""
    check_least(cfg, prompts=1, samples=2, per_prompt=1, seed=0, steps=0, batch_size=0)
    check_device(cfg.device)
    bundle, out = checkpoint.load_bundle(cfg.weights, cfg.device), Path(cfg.out)
    todo, sizes = tasks_of(cfg, bundle, 1000 + cfg.seed), sizes_of(cfg.sizes)
    judge = judge_of(cfg, bundle, todo)
    settled(bundle.config, cfg.steps, cfg.cfg, 0, cfg.sampler, -1, -1, -1)      # refuses before the folder is claimed
    claim(out, {name: value for name, value in dataclasses.asdict(cfg).items() if name not in ("out", "device", "batch_size")})
    done = read_lines(out / "judged.jsonl")
    parts = batches(todo, sizes, len(done), max(cfg.batch_size // cfg.samples, 1))
    for (width, height), part in tqdm(parts, "pairs", unit="batch", disable=not sys.stderr.isatty()):
        start = len(done)
        prompts, seed = [task.prompt for task in part for _ in range(cfg.samples)], (1000 + cfg.seed) * 1_000_003 + start * cfg.samples
        for task, images in zip(part, generate(bundle, prompts, seed=seed, steps=cfg.steps, cfg=cfg.cfg, sampler=cfg.sampler, width=width, height=height).split(cfg.samples)):
            scores = [] if judge == "person" else scores_of(bundle, judge, task, images)
            pairs = ranked(scores, cfg.per_prompt, APART.get(judge))
            for k in range(cfg.samples) if judge == "person" else {k for pair in pairs for k in pair}:
                save_png(Image.fromarray(images[k].numpy()), out / picture_name(len(done), k), {"prompt": task.prompt})
            done.append({"prompt": task.prompt, "scores": scores, "pairs": pairs})
        checkpoint.write_lines(out / "judged.jsonl", done)
    if judge == "person":
        if not (out / "choices.txt").exists():
            return ask(out, todo, cfg.samples)
        choices = read_choices(out / "choices.txt", todo, cfg.samples)
        done = [{**row, "pairs": [choices[number]] if number in choices else []} for number, row in enumerate(done)]
    finish(out, done)


def finish(out, rows):
    pairs = [{"prompt": row["prompt"], "chosen": picture_name(number, a), "rejected": picture_name(number, b)} for number, row in enumerate(rows) for a, b in row["pairs"]]
    if not pairs:
        raise ValueError(f"of none of {len(rows)} prompts one picture is better than another: more --samples may help")
    checkpoint.write_lines(out / "metadata.jsonl", pairs)
    print(f"{out}: {len(pairs)} pairs of {len(rows)} prompts")


# ---------------------------------------------------------------------------------------------------------------
# dpo.py compare: a model against its base, on other draws of prompts than evaluate.py's and make-pairs' (of few words some come again)

@dataclass
class CompareConfig:
    weights: str = flag("runs/dpo", "bundle after alignment", "run")
    base: str = flag("weights/mini", "bundle before", "run")
    judge: str = flag("auto", "who compares: the detector of `shapes`, CLIP's score by the base's CLIPs; auto: the detector where it can", "run", choices=("auto", "detector", "clip"))
    out: str = flag("", "JSON file for the numbers", "run")
    prompts_file: str = flag("", "a text file with a prompt a line; empty: prompts of `shapes`", "prompts")
    prompts: int = flag(140, "prompts of `shapes`, an equal share of each category and of signs", "prompts")
    categories: str = flag("", "of `shapes`, which prompts, by commas; empty: all, signs too", "prompts")
    samples: int = flag(4, "pictures a prompt of each model, from the same noise", "prompts")
    seed: int = flag(0, "of prompts and noise", "prompts")
    steps: int = flag(0, "steps of the sampler; 0: the bundle's", "sampling")
    cfg: float = flag(-1.0, "guidance scale; -1: the bundle's", "sampling")
    device: str = flag("cpu", "cpu, cuda, mps", "machine")


def diversity(images):
    """uint8 (n, H, W, 3) of one prompt -> the mean distance of two of them, root mean square of grey levels."""
    return torch.pdist(images.flatten(1).float()).div(images[0].numel() ** 0.5).mean().item()


def win_rate(ours, theirs, apart):
    """(share of pairs of scores that the first wins, share that is decided); what is not `apart` is half a win."""
    difference = np.subtract(ours, theirs)
    decided = np.abs(difference) >= apart
    return float(np.where(decided, difference > 0, 0.5).mean()), float(decided.mean())


def compare(cfg):
    """Prints {'wins': share of pictures that beat the base's from the same noise, 'decided': share that either wins, 'diversity': of a prompt's pictures, over the base's; 'right':
    {model: share exactly right}, of `shapes`}."""
    check_least(cfg, prompts=1, samples=2, seed=0, steps=0)
    check_device(cfg.device)
    after, before = (checkpoint.load_bundle(path, cfg.device) for path in (cfg.weights, cfg.base))
    todo = tasks_of(cfg, before, 2000 + cfg.seed)
    judge, rows = judge_of(cfg, before, todo), []
    for number, task in enumerate(tqdm(todo, "compare", unit="prompt", disable=not sys.stderr.isatty())):
        seed = (2000 + cfg.seed) * 1_000_003 + number * cfg.samples
        both = [generate(bundle, [task.prompt] * cfg.samples, seed=seed, steps=cfg.steps, cfg=cfg.cfg) for bundle in (after, before)]
        rows.append([(scores_of(before, judge, task, images), diversity(images)) for images in both])
    (ours, spread), (theirs, spread_before) = (zip(*column) for column in zip(*rows))
    wins, decided = win_rate(ours, theirs, APART[judge])
    numbers = {"prompts": len(todo), "judge": judge, "wins": wins, "decided": decided, "diversity": float(np.mean(spread) / np.mean(spread_before))}
    if judge == "detector":
        numbers["right"] = {cfg.weights: float((np.array(ours) > 1).mean()), cfg.base: float((np.array(theirs) > 1).mean())}
    print(json.dumps(numbers, indent=1))
    if cfg.out:
        checkpoint.write_json(cfg.out, numbers)


# ---------------------------------------------------------------------------------------------------------------

def main():
    if len(sys.argv) == 1:
        print(f"python dpo.py make-pairs, then python dpo.py train --pairs {PairsConfig.out}")
        make_pairs(PairsConfig())
        return train.begin(replace(DPOConfig(), pairs=PairsConfig.out, resume=True), run_dpo)
    command = subcommand(("make-pairs", "train", "compare"), __doc__)
    if command == "train":
        train.begin(parse_config(DPOConfig, sys.argv[2:], __doc__, FLAGS), run_dpo)
    elif command == "make-pairs":
        make_pairs(parse_config(PairsConfig, sys.argv[2:], __doc__))
    else:
        compare(parse_config(CompareConfig, sys.argv[2:], __doc__))


if __name__ == "__main__":
    one_line_errors(main)
