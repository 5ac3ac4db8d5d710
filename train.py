"""Training: one loop for every stage.

    python train.py                                             # the miniature's MM-DiT on `shapes`, its encoders from weights/mini
    python train.py --stage all --out runs/mine                 # a whole SD3 from nothing: autoencoder, CLIPs, T5, MM-DiT
    python train.py --stage all --data folder:pictures --out runs/mine
    python train.py --stage finetune --init-from runs/mine --resolution 128 --buckets --out runs/fine      # mixed aspect ratios (Sec. 5.3.2)
    python train.py --stage edit --init-from runs/mine --out runs/edit                      # edits by instruction (App. D)
    python train.py --data latents:runs/latents                 # computed ahead by data.py precompute
    python train.py --stage pretrain --out runs/mine --resume   # go on where it stopped, to the bit
    python train.py --plan --depth 24 --device cuda --processes 8 --memory 80 --peak 400   # what a run would take, allocating nothing
    torchrun --nproc_per_node 8 train.py --depth 24 --device cuda --grad-accum 2 [--sharding fsdp] --out runs/large

A run folder is a bundle that sample.py --weights takes, with metrics.jsonl, STAGE-loss.png, sample grids and, until the stage is done,
checkpoints to resume from. Sample i of step k, its noise, time and dropout depend on the seed, k and i alone, whatever the number of processes
and micro-batches: all draw for the whole batch and take their rows. Read on: optim.py, distributed.py, pipeline.py.
"""

from dataclasses import dataclass, replace

from config import check_least, flag, given, going_on, one_line_errors, parse_config

STAGES = ("vae", "clip", "t5", "pretrain", "finetune", "edit", "all")


@dataclass
class TrainConfig:
    stage: str = flag("pretrain", "what to train; all: each from vae to pretrain in turn; finetune (another --resolution), edit (by instruction): the MM-DiT of --init-from", "run",
                      choices=STAGES)
    data: str = flag("shapes", "shapes[:LEVEL] (autoencoder and text encoders take all), folder:DIR, imagenet:DIR, fashion-mnist:DIR, tar:DIR/{00000..00099}.tar, latents:DIR; "
                      "stage edit: shapes, edits:DIR, edits:FILE.jsonl", "run")
    out: str = flag("runs/miniature", "run folder", "run")
    weights: str = flag("weights/mini", "bundle whose frozen parts are used where the run folder has none", "run")
    init_from: str = flag("", "bundle whose weights and tokenizers the stage starts from", "run")
    resume: bool = flag(False, "go on from the run folder's checkpoint", "run")
    plot: tuple = flag((), "train nothing: draw this run folder's metrics, and others' beside them, into --out", "run")
    plan: bool = flag(False, "train nothing: print what the MM-DiT's training would take; refused if it cannot fit", "plan")
    processes: int = flag(1, "that would train", "plan")
    memory: float = flag(0.0, "that each may have; 0: the GPU's, or its share of this machine's", "plan", unit="GB")
    peak: float = flag(0.0, "that each reaches; 0: what products of matrices reach here", "plan", unit="TFLOP/s")
    seed: int = flag(0, "of weights, data, noise", "run")
    steps: int = flag(0, "optimizer steps of the stage; 0: its default (with stage all this, batch size and learning rates are those of pretrain)", "optimization")
    batch_size: int = flag(0, "samples a step, over all processes; 0: the stage's default", "optimization")
    grad_accum: int = flag(1, "micro-batches that a process's part of the batch is cut into: less memory, the same training", "optimization")
    lr: float = flag(0.0, "learning rate of AdamW; 0: the stage's default", "optimization")
    optimizer: str = flag("auto", "muon: on the hidden matrices, AdamW on the rest; adamw: on all; auto: muon; clip in auto and stage all: adamw", "optimization", choices=("auto", "muon", "adamw"))
    muon_lr: float = flag(0.0, "learning rate of Muon; 0: the stage's default", "optimization")
    warmup: int = flag(100, "steps of linear warm-up", "optimization")
    lr_schedule: str = flag("linear", "how the learning rate falls to zero over the last steps, or not", "optimization", choices=("constant", "linear", "cosine"))
    decay: float = flag(0.7, "last share of the steps, over which the learning rate falls to zero", "optimization")
    weight_decay: float = flag(0.0, "of all weights, a share of the learning rate a step", "optimization")
    clip_grad: float = flag(1.0, "largest norm of the gradient; 0: any", "optimization")
    ema_decay: float = flag(0.998, "of the averaged weights, a step; App. B.3's 0.99 every 100 steps is 0.9999 with --ema-every 100; less in the first 10 / (1 - it) steps", "optimization")
    ema_every: int = flag(1, "steps between updates of the averaged weights", "optimization")
    max_bad_steps: int = flag(10, "steps skipped for a loss or gradient that is not finite, before the run ends", "optimization")
    depth: int = flag(4, "of the MM-DiT: width 64 depth, depth heads", "model")
    qk_norm: bool = flag(True, "RMSNorm on Q and K; finetune and edit add it to a model without", "model")
    weight_sets: int = flag(2, "sets of weights a block: 2 is the paper's, 1 a DiT, 3 for CLIP, T5 and image", "model")
    attention: str = flag("sdpa", "torch's, or on CPUs what is faster; or ours, fused", "model", choices=("sdpa", "fused"))
    base_resolution: int = flag(0, "side of pictures that have the positions 0 to 16; larger ones' lie outside, as far apart; 0: resolution, or in proportion to the start's", "model", unit="pixels")
    latent_channels: int = flag(16, "of an autoencoder trained here", "model")
    text_width: int = flag(256, "of a T5 trained here; the CLIPs have 3/8 and 5/8 of it, 3 to 5 as the released 768 to 1280", "model")
    clip_length: int = flag(16, "tokens a prompt for the CLIPs", "model")
    t5_length: int = flag(24, "tokens a prompt for T5", "model")
    formulation: str = flag("rf/lognorm(0.00,1.00)", "path, prediction and density of t (flow.py)", "flow")
    shift: float = flag(0.0, "timestep shift alpha (Eq. 23), in training and sampling; 0: 3, or for finetune and edit the start's times sqrt(m / n) for m pixels after n; on curved paths 1", "flow")
    text_dropout: float = flag(0.464, "probability with which each text encoder is left out (App. B.3)", "flow")
    image_dropout: float = flag(0.1, "of stage edit: probability with which the picture to edit is left out", "flow")
    cfg: float = flag(0.0, "guidance scale of the sample grids, and the bundle's default; 0: 2.5, or for finetune and edit the start's", "flow")
    resolution: int = flag(64, "side of the pictures", "data", unit="pixels")
    filter: str = flag("", "which pictures, by columns of the metadata: \"aesthetic>5 and nsfw<0.2\"", "data")
    buckets: bool = flag(False, "keep aspect ratios: batches of sizes of about resolution^2 pixels (Sec. 5.3.2); for the MM-DiT", "data")
    upscale: bool = flag(False, "with buckets: take pictures smaller than their bucket too", "data")
    keep_resolution: int = flag(0, "of shapes: a third of the batches are squares of this side, so that finetuning does not forget them; 0: none", "data", unit="pixels")
    synthetic_share: float = flag(0.5, "share of synthetic captions, where there are two (Sec. 5.2.2)", "data")
    chunk: int = flag(16384, "samples that the frozen parts encode at once", "data")
    reuse: int = flag(6, "times an encoded sample is seen before fresh ones are encoded", "data")
    workers: int = flag(2, "processes that read or draw pictures", "data")
    kl_weight: float = flag(1e-6, "of the autoencoder's KL term", "autoencoder")
    eval_every: int = flag(2000, "steps between validations and grids", "log")
    checkpoint_every: int = flag(0, "steps between checkpoints; 0: as eval-every", "log")
    keep: int = flag(2, "newest checkpoints that are kept", "log")
    milestone_every: int = flag(0, "steps between checkpoints that are kept for good; 0: none", "log")
    watch_every: int = flag(0, "steps between records of each block's largest attention logit and entropy (Fig. 5); 0: never", "log")
    log_every: int = flag(50, "steps between lines of metrics.jsonl", "log")
    device: str = flag("cpu", "cpu, cuda, mps", "machine")
    precision: str = flag("auto", "of the activations in training, weights stay fp32; auto: bf16 on GPUs and on CPUs that multiply in it", "machine",
                          choices=("auto", "fp32", "bf16"))
    tf32: bool = flag(True, "products of fp32 matrices in TF32, on GPUs", "machine")
    checkpointing: bool = flag(False, "recompute each block of the MM-DiT in the backward pass: less memory, a third more FLOPs", "machine")
    sharding: str = flag("ddp", "each process has all weights, or a part (fsdp: FSDP2; the CLIPs always ddp)", "machine", choices=("ddp", "fsdp"))
    compile: bool = flag(False, "torch.compile the MM-DiT; needs a C++ compiler on CPUs", "machine")
    threads: int = flag(0, "CPU threads; 0: torch's choice", "machine")


# What a stage of the miniature takes unless a flag says otherwise; measured on 2 cores (README).
DEFAULTS = {"vae": dict(steps=12000, batch_size=16, lr=1e-3, muon_lr=0.02),
            "clip": dict(steps=1200, batch_size=128, lr=1e-3, optimizer="adamw", grad_accum=1, muon_lr=0.02, sharding="ddp"),
            "t5": dict(steps=250, batch_size=64, lr=1e-3, muon_lr=0.01),
            "pretrain": dict(steps=14000, batch_size=64, lr=1e-3, muon_lr=0.02, shift=3.0, cfg=2.5),
            "finetune": dict(steps=4000, batch_size=64, lr=5e-4, muon_lr=0.01),
            "edit": dict(steps=6000, batch_size=64, lr=5e-4, muon_lr=0.01)}

if __name__ == "__main__":
    CONFIG = parse_config(TrainConfig, description=__doc__)  # before the heavy imports: --help answers at once

import contextlib
import copy
import itertools
import math
import os
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import distributed
import evaluate
from data import Latents, open_data
from flow import RectifiedFlow, formulation, shift, shift_alpha
from layouts import arguments
from mmdit import MMDiT, fit_qk_norms, grown
from optim import make_optimizers, set_rates, update_average, whole
from pipeline import autocast, batches, caption_batches, check_fingerprint, conditioned_batches, first, held_out_batches, precision, report_skipped, some_captions
from plan import counted_step, plan
from runs import Meter, Run, due, plot
from sample import check_device, check_size, generate, grid, latent_channels, save_png, to_uint8
from text_encoders import (BPETokenizer, CLIPTextEncoder, T5Denoiser, T5Encoder, TextSizes, UnigramTokenizer, contrastive_loss,
                           span_corruption)
from vae import AutoencoderKL, psnr, vae_loss


# ---------------------------------------------------------------------------------------------------------------
# The loop

def place():
    return distributed.rank(), distributed.world()


@contextlib.contextmanager
def noted_signals():
    """SIGTERM, a cluster's preemption, and Ctrl-C are noted in the list that is yielded, and obeyed at the end of the step; a second one ends the process at once."""
    noted = []

    def note(number, frame):
        noted.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def watched(module, on):
    """Fig. 5: yields a list that gets (number of the block, largest logit, mean entropy in nats) of each attention while `on`."""
    seen, blocks = [], list(module.joint_blocks) if on else []

    def recording(number, attention):
        def attend(q, k, v):
            with torch.no_grad():
                logits = q.float() @ k.float().mT * q.shape[-1] ** -0.5
                p = logits.softmax(-1)
                seen.append((number, logits.max(), -torch.xlogy(p, p).sum(-1).mean()))
            return attention(q, k, v)
        return attend

    before = [block.attention for block in blocks]
    for number, block in enumerate(blocks):
        block.attention = recording(number, block.attention)
    try:
        yield seen
    finally:
        for block, attention in zip(blocks, before):
            block.attention = attention


def by_block(attentions, depth):
    """What `watched` saw in a step of the `depth` blocks; checkpointing runs each again, the last first."""
    blocks = [[(top.item(), entropy.item()) for number, top, entropy in attentions if number == i] for i in range(depth)]
    return {"max_logits": [max(top for top, _ in block) for block in blocks], "entropies": [np.mean([e for _, e in block]) for block in blocks]}


def gradients(network, columns, cfg):
    """Leaves the gradient of the batch's mean loss in the weights' .grad; -> this process's mean loss and [{name: number or list}] of each micro-batch."""
    losses, values = [], []
    for k in range(cfg.grad_accum):
        with distributed.synchronized(network, k == cfg.grad_accum - 1):
            with autocast(cfg):
                loss, parts = network(*(x[k::cfg.grad_accum] for x in columns))
            (loss / cfg.grad_accum).backward()
        losses.append(loss.item())
        values.append(parts)
    return float(np.mean(losses)), values


def timed(batches):
    """Yields (batch, seconds that it took to come)."""
    batches, begun = iter(batches), time.perf_counter()
    for batch in batches:
        yield batch, time.perf_counter() - begun
        begun = time.perf_counter()


def averaged_copy(module, cfg):
    """Of the module, for the averaged weights, in eval mode. Those not trained are shared; with FSDP it has storage on rank 0 alone."""
    averaged = copy.deepcopy(module, {id(p): p for p in module.parameters() if not p.requires_grad}).eval().requires_grad_(False)
    return averaged.to("meta" if cfg.sharding == "fsdp" and distributed.rank() else cfg.device)


def fit(cfg, module, data, draw, loss_of, validate, flops=0):
    """Train those weights of `module` that require a gradient and return its averaged copy, which shares the others (with FSDP whole on rank 0 alone).

    data(start) yields batches from sample `start` on; draw(batch, generator) -> the columns, tensors or lists, of this process's rows of a batch with their noise, drawn for all
    rows from the step's generator; loss_of(module, *columns of a micro-batch) -> (loss, {name: number or list});
    validate(averaged module, step) -> {name: number}, called on rank 0 every eval_every steps and at the end; flops: of a step, over all processes, where they are known."""
    run = Run(cfg)
    if cfg.sharding == "ddp":         # FSDP moves a block at a time, and keeps its part
        module.to(cfg.device)
    averaged = averaged_copy(module.train(), cfg)
    names = {name for name, p in module.named_parameters() if p.requires_grad}
    network = distributed.wrap(module, loss_of, cfg, precision(cfg))
    trained, copies = ([p for name, p in one.named_parameters() if name in names] for one in (module, averaged))
    averages = [p.detach().clone() for p in trained] if cfg.sharding == "fsdp" else copies
    optimizers = make_optimizers(module, cfg, precision(cfg))
    step, bad = run.load(module, averaged, averages, optimizers)
    run.start(step)

    def evaluated():
        if cfg.sharding == "fsdp":
            for p, average in zip(copies, averages):
                p.copy_(whole(average))
        if distributed.rank() == 0:
            with run.disk():
                values = validate(averaged, step)
            run.validated(step, values)
        distributed.barrier()

    meter = Meter(cfg, flops)
    bar = tqdm(total=cfg.steps, initial=step, desc=cfg.stage, unit="step", mininterval=1 if sys.stderr.isatty() else 30, disable=distributed.rank() > 0)
    with bar, noted_signals() as signals:
        for batch, waiting in timed(itertools.islice(data(step * cfg.batch_size), cfg.steps - step)):
            begun = time.perf_counter()
            set_rates(optimizers, step, cfg)
            columns = draw(batch, torch.Generator().manual_seed(cfg.seed * 1_000_003 + step))
            module.zero_grad(set_to_none=True)
            with watched(module, due(step + 1, cfg.watch_every) and isinstance(module, MMDiT)) as attentions:
                loss, values = gradients(network, columns, cfg)
            norm = distributed.clip_gradients(module, cfg.clip_grad or math.inf).item()
            loss, stopping = distributed.mean([loss, bool(signals)], cfg.device)   # the same in all processes: they stop at one step
            step += 1
            if finite := math.isfinite(loss) and math.isfinite(norm):
                for optimizer in optimizers:
                    optimizer.step()
                update_average(averages, trained, step, cfg)
            else:
                bad += 1
                run.skipped(step, bad, loss, norm)
            meter.add([{"loss": loss, "grad_norm": norm, **parts} for parts in values if finite], waiting + time.perf_counter() - begun, waiting)
            bar.update()
            if attentions:
                run.log(step, **by_block(attentions, len(module.joint_blocks)))
            if due(step, cfg.log_every):
                meter.report(run, step, optimizers[-1].param_groups[0]["lr"], bar)
            if due(step, cfg.eval_every) and step < cfg.steps and not stopping:
                evaluated()
            if due(step, cfg.checkpoint_every or cfg.eval_every) or due(step, cfg.milestone_every) or step == cfg.steps or stopping:
                run.save(step, module, averages, optimizers, bad=bad)
            if stopping:
                distributed.barrier()                                         # torchrun ends the others once one has ended: first rank 0 writes
                raise SystemExit(f"\nstopped at step {step}; the same command with --resume goes on" if distributed.rank() == 0 else 1)
    evaluated()
    return averaged


# ---------------------------------------------------------------------------------------------------------------
# Stage vae: the autoencoder (Sec. 5.2.1)

def open_split(cfg, split, frozen_parts=False):
    """The run's data. The frozen parts are trained on squares and, of `shapes`, on every level, all of which they serve; T5, as a reader of much that nobody drew, on any pair."""
    shapes = cfg.data.startswith("shapes")
    spec = cfg.data
    if shapes and frozen_parts:
        spec = "shapes:texts" if cfg.stage == "t5" else "shapes:all"
    elif shapes and cfg.stage == "edit":
        spec = cfg.data.replace("shapes", "shape-edits", 1)
    several = {} if frozen_parts or shapes and split == "val" else {"buckets": cfg.buckets, "upscale": cfg.upscale, "keep_resolution": cfg.keep_resolution}      # `shapes` are validated on squares
    return open_data(spec, cfg.resolution, cfg.resolution, split, cfg.seed, filter=cfg.filter, **several)


def start_from(cfg, name, module, changed=lambda state, module: state):
    """The weights of --init-from, changed for the module."""
    if cfg.init_from:
        state = checkpoint.checked_state(checkpoint.load_checkpoint(Path(cfg.init_from) / f"{name}.pt"), cfg.init_from)
        checkpoint.load_strictly(module, changed(state, module), cfg.init_from)


def train_vae(cfg):
    dataset, held_out = open_split(cfg, "train", True), open_split(cfg, "val", True)
    vae = AutoencoderKL(cfg.latent_channels, channels=48, multipliers=(1, 2), blocks=1, scale=1.0, shift=0.0, unshuffle=4, attention=False,
                        groups=8)
    start_from(cfg, "vae", vae)
    images = first(held_out, 256, cfg)[0].to(cfg.device)

    def draw(batch, generator):
        shape = cfg.batch_size, cfg.latent_channels, batch[0].shape[2] // 8, batch[0].shape[3] // 8
        return batch[0], distributed.own(torch.randn(shape, generator=generator))

    def loss_of(vae, images, noise):
        loss, parts = vae_loss(vae, images.to(cfg.device), kl_weight=cfg.kl_weight, noise=noise.to(cfg.device))
        return loss, {name: part.item() for name, part in parts.items()}

    @torch.no_grad()
    def validate(vae, step):
        recon = vae.decode(vae.to_latents(images, sample=False)).clamp(-1, 1)
        pairs = torch.stack([images[:24], recon[:24]], 1).flatten(0, 1)
        save_png(grid(to_uint8(pairs), columns=8), Path(cfg.out) / "vae.png", {"step": step})
        return {"psnr": psnr(recon, images).mean().item()}

    vae = fit(cfg, vae, lambda start: batches(dataset, cfg.batch_size, cfg, start, *place()), draw, loss_of, validate)
    if distributed.rank():
        return
    with torch.no_grad():
        latents = torch.cat([vae.encode(batch)[0] for batch in first(dataset, 2048, cfg)[0].to(cfg.device).split(256)])
    vae.set_normalisation(latents.mean((0, 2, 3)).cpu(), latents.std((0, 2, 3)).cpu())  # per channel
    checkpoint.save_part(cfg.out, "vae", vae, vae.config)


# ---------------------------------------------------------------------------------------------------------------
# Stage clip: both text towers against one image tower (Radford et al. 2021)

def texts(dataset):
    """What tokenizers are trained on."""
    return [text for captions in some_captions(dataset, 20000) for text in captions if text]


def train_clip(cfg):
    dataset, held_out = open_split(cfg, "train", True), open_split(cfg, "val", True)
    dataset.twins = True  # of shapes: hard negatives
    tokenizer = (BPETokenizer.from_folder(Path(cfg.init_from) / "clip_tokenizer", cfg.clip_length) if cfg.init_from
                 else BPETokenizer.train(texts(dataset), length=cfg.clip_length))
    tokenizer_g = BPETokenizer(tokenizer.vocab, tokenizer.merges, cfg.clip_length, pad=0)  # G pads with 0, L with the end token
    width_l, width_g = cfg.text_width * 3 // 8, cfg.text_width * 5 // 8
    common = dict(vocab_size=len(tokenizer.vocab), length=cfg.clip_length, layers=3, eos=tokenizer.end)
    configs = {"clip_l": dict(common, width=width_l, heads=width_l // math.gcd(width_l, 32), mlp=4 * width_l, activation="quick_gelu", projection=width_l),
               "clip_g": dict(common, width=width_g, heads=width_g // math.gcd(width_g, 32), mlp=4 * width_g, activation="gelu", projection=width_g),
               "clip_image": dict(resolution=cfg.resolution, patch_size=8, width=128, layers=4, heads=4, projection=width_l + width_g)}
    towers = torch.nn.ModuleDict({"clip_l": CLIPTextEncoder(**configs["clip_l"]), "clip_g": CLIPTextEncoder(**configs["clip_g"]),
                                  "clip_image": evaluate.CLIPImageEncoder(**configs["clip_image"])})
    for name, tower in towers.items():
        start_from(cfg, name, tower)

    def features(towers, images, texts):
        """Image features for L and for G, text features of L and of G: two pairs of (B, width)."""
        tokens_l, tokens_g = tokenizer(texts).to(cfg.device), tokenizer_g(texts).to(cfg.device)
        image = towers["clip_image"](images.to(cfg.device)).split([width_l, width_g], 1)
        return [(image[0], towers["clip_l"](tokens_l)[1]), (image[1], towers["clip_g"](tokens_g)[1])]

    def loss_of(towers, images, texts):
        """Every picture of the batch against every text of it, wherever they are."""
        pairs = features(towers, images, texts)
        scale = towers["clip_image"].logit_scale.clamp(max=math.log(100))
        losses = [contrastive_loss(distributed.gathered(i), distributed.gathered(t), scale) for i, t in pairs]
        return sum(losses), {"loss_l": losses[0].item(), "loss_g": losses[1].item()}

    plain = first(held_out, 1024, cfg)
    held_out.twins = True
    twins = first(held_out, 512, cfg) if cfg.data.startswith("shapes") else None

    @torch.no_grad()
    def retrieval(towers, pictures, ways):
        """(L's, G's) share of pictures that find their dense caption."""
        images, _, samples = pictures
        dense = [s.synthetic or s.original for s in samples]
        pairs = [features(towers, i, dense[256 * k:256 * (k + 1)]) for k, i in enumerate(images.split(256))]
        return [evaluate.retrieval(*(torch.cat([p[which][side] for p in pairs]).cpu() for side in (0, 1)), min(ways, len(images))) for which in (0, 1)]

    def validate(towers, step):
        """Also among twins alone, which differ in what belongs to what: 0.5 is a bag of words."""
        values = {"retrieval": retrieval(towers, plain, 64), **({"twins": retrieval(towers, twins, 2)} if twins else {})}
        return {f"{name}_{tower}": value for name, both in values.items() for tower, value in zip("lg", both)}

    towers = fit(cfg, towers, lambda start: batches(dataset, cfg.batch_size, cfg, start, *place()), lambda batch, generator: batch[:2], loss_of, validate)
    if distributed.rank():
        return
    checkpoint.write_folder(Path(cfg.out) / "clip_tokenizer", tokenizer.save)
    for name, config in configs.items():
        checkpoint.save_part(cfg.out, name, towers[name], config)


# ---------------------------------------------------------------------------------------------------------------
# Stage t5: masked spans, and one caption from the other (Raffel et al. 2020)

def turned(batch):
    """The pairs of captions, every other one the other way round."""
    return [pair[::-1] if i % 2 else pair for i, pair in enumerate(batch)]


def paired(batch):
    """Whether every scene has two captions."""
    return all(map(all, batch))


def train_t5(cfg):
    """Half of the batches are masked spans, half, where every scene has two captions, prefix language modelling (Raffel et al. 2020, Sec. 3.2): one caption from the other."""
    dataset, held_out = open_split(cfg, "train", True), open_split(cfg, "val", True)
    length = 2 * cfg.t5_length  # two captions a document
    tokenizer = (UnigramTokenizer.from_folder(Path(cfg.init_from) / "t5_tokenizer", length) if cfg.init_from
                 else UnigramTokenizer.train(texts(dataset), length, sentinels=max(16, length // 6 + 4)))      # one in six tokens begins a hidden span
    reader = UnigramTokenizer(tokenizer.config, cfg.t5_length)
    config = dict(vocab_size=len(tokenizer.pieces), width=cfg.text_width, layers=3, heads=cfg.text_width // 32, head_dim=32,
                  mlp=3 * cfg.text_width // 2, buckets=32, max_distance=64)
    encoder = T5Encoder(**config)
    start_from(cfg, "t5", encoder)
    model = T5Denoiser(encoder, layers=1)     # more would find out for themselves what belongs to what, and leave it out of the encoder's states

    def hidden(batch, generator):
        """Both captions of a scene: what is hidden in one can be told from the other, if the encoder knows what belongs to what."""
        tokens = tokenizer([" . ".join(filter(None, pair)) for pair in turned(batch)])
        return span_corruption(tokens, tokenizer.sentinels, rate=0.25, mean_span=1.5, generator=generator)

    def told(batch):
        """One caption, read as sampling reads it, and the other to write."""
        sources, targets = zip(*turned(batch))
        targets = tokenizer(targets)
        return reader(sources), targets[:, :(targets != 0).any(0).sum()]

    def draw(batch, generator):
        """Of the whole batch, for the loss is the mean over all its tokens: a row's weight is the batch's size over its number of tokens."""
        whole = paired(batch) and torch.rand((), generator=generator) < 0.5
        tokens, targets = told(batch) if whole else hidden(batch, generator)
        weights = torch.full((len(batch),), len(batch) / (targets != 0).sum())
        return distributed.own(tokens), distributed.own(targets), distributed.own(weights)

    def loss_of(model, tokens, targets, weights):
        tokens_a_row = (targets != 0).sum() / len(targets)
        return model.loss(tokens.to(cfg.device), targets.to(cfg.device)) * (weights[0] * tokens_a_row).item(), {}

    scenes = some_captions(held_out, 256)
    validation = {"val_loss": hidden(scenes, torch.Generator().manual_seed(0))} | ({"val_told": told(scenes)} if paired(scenes) else {})

    @torch.no_grad()
    def validate(model, step):
        return {name: model.loss(*(x.to(cfg.device) for x in tokens)).item() for name, tokens in validation.items()}

    model = fit(cfg, model, lambda start: caption_batches(dataset, cfg.batch_size, cfg, start), draw, loss_of, validate)
    if distributed.rank():
        return
    encoder = T5Encoder(**config)
    encoder.load_state_dict({k: v for k, v in model.state_dict().items() if k in encoder.state_dict()})
    checkpoint.write_folder(Path(cfg.out) / "t5_tokenizer", tokenizer.save)
    checkpoint.save_part(cfg.out, "t5", encoder, config)


# ---------------------------------------------------------------------------------------------------------------
# Stage pretrain: the MM-DiT (Sec. 4, 5.3), on what the frozen parts make of the data (App. E.1); finetune: at another resolution (Sec. 5.3.2); edit: App. D

OF_THE_MMDIT, FROM_A_MODEL = ("pretrain", "finetune", "edit"), ("finetune", "edit")


def inherited(cfg):
    """What finetune and edit take from --init-from: architecture, frozen parts, path; for the new resolution its positions, interpolated, and its shift, on straight paths times Eq. 23's alpha."""
    if not cfg.init_from:
        raise ValueError(f"--stage {cfg.stage} needs --init-from RUN, the bundle whose MM-DiT it goes on from")
    if Path(cfg.init_from).resolve() == Path(cfg.out).resolve():
        raise ValueError(f"--out {cfg.out} is --init-from, which would be overwritten")
    if Path(cfg.weights).resolve() != Path(cfg.init_from).resolve() and (given("weights") or cfg.weights != TrainConfig.weights):
        raise ValueError(f"--weights is {cfg.weights}: --stage {cfg.stage} takes the frozen parts of --init-from")
    bundle = checkpoint.load_bundle(cfg.init_from)
    if cfg.data == TrainConfig.data and not (data := bundle.config.get("data", cfg.data)).startswith("shapes"):
        raise ValueError(f"{cfg.init_from} was trained on {data}: --data says on what to go on")
    model = bundle.part("mmdit").arguments
    start = bundle.config | {name: model[name] for name in ("depth", "weight_sets")}
    taken = {name: start[name] for name in ("depth", "weight_sets", "clip_length", "t5_length", "formulation")}
    for name, value in taken.items():
        if getattr(cfg, name) != value and (given(name) or getattr(cfg, name) != getattr(TrainConfig, name)):
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}, that of {cfg.init_from} is {value}: --stage {cfg.stage} cannot change it")
    base = cfg.base_resolution or 16 * max(model["base_size"] * cfg.resolution // start["resolution"], 1)
    alpha = shift_alpha(cfg.resolution ** 2, start["resolution"] ** 2) if straight(start["formulation"]) else 1.0
    return replace(cfg, weights=cfg.init_from, base_resolution=base, shift=cfg.shift or start["shift"] * alpha, cfg=cfg.cfg or start["cfg"], **taken)


def start_config(cfg):
    """The arguments of the MM-DiT that finetune and edit go on from; of other stages, none."""
    return arguments(MMDiT, checkpoint.read_object(Path(cfg.init_from) / "mmdit.json")) if cfg.stage in FROM_A_MODEL else {}


def architecture(cfg, sizes, channels):
    """MMDiT's arguments. App. D: the picture to edit lies beside the latents, on the channels."""
    base, start = (cfg.base_resolution or cfg.resolution) // 16, start_config(cfg)
    most = start.get("pos_embed_max_size", 0)
    if base != start.get("base_size") or most < 3 * cfg.resolution // 16:      # else the start's table, a stored one in released weights, serves as it is
        most = cfg.resolution // 4
    more = {"dual_attention_blocks": start["dual_attention_blocks"]} if start.get("dual_attention_blocks") else {}
    more |= {"out_channels": channels} if cfg.stage == "edit" else {}
    return dict(depth=cfg.depth, in_channels=2 * channels if cfg.stage == "edit" else channels, context_dim=sizes.t5, pooled_dim=sizes.clip_l + sizes.clip_g,
                pos_embed_max_size=most, base_size=base, qk_norm=cfg.qk_norm, weight_sets=cfg.weight_sets, clip_length=cfg.clip_length, **more)


def add_qk_norms(cfg, model, latents, context, pooled, form):
    """To an MM-DiT that was trained without (Sec. 5.3.2): their scales are fitted to at most 64 validation samples."""
    if not cfg.qk_norm or start_config(cfg).get("qk_norm", True):
        return
    generator = torch.Generator().manual_seed(cfg.seed)
    few = min(max(2 ** 16 // latents[0, 0].numel(), 1), 64)                   # four of 1024 x 1024
    latents, context, pooled = (x[:few] for x in (latents, context, pooled))
    latents, source = latents.split(latent_channels(model), 1)
    t = shift(form.sample_t(len(latents), generator), cfg.shift)
    z = form.interpolate(latents, torch.randn(latents.shape, generator=generator), t)
    fit_qk_norms(model.to(cfg.device), *(x.to(cfg.device) for x in (torch.cat([form.input(z, t), source], 1), t, context, pooled)))


def fixed_edits(cfg, bundle, held_out, channels):
    """16 instructions for the sample grids, and the pictures (n, 3, H, W) in [-1, 1] that they are for."""
    if isinstance(held_out, Latents):
        items = [int(i) for i in held_out.groups[0][:16]]
        images, texts = torch.stack([torch.tensor(held_out[i].image) for i in items]), [held_out.captions(i)[0] for i in items]
    else:
        images, texts, samples = first(held_out, 16, cfg)
        if samples[0].image.dtype == np.uint8:
            return texts, images[:, 3:]
    with torch.no_grad():
        return texts, bundle.vae.decode(images[:, channels:].to(cfg.device)).clamp(-1, 1)


def fixed_prompts(cfg, held_out):
    """16 prompts for the sample grids."""
    if cfg.data.startswith("shapes"):
        return [evaluate.tasks(category, 3)[k].prompt for k in range(3) for category in evaluate.KINDS][:16]
    captions = [pair[0] for pair in some_captions(held_out, 256)] if isinstance(held_out, Latents) else first(held_out, 256, cfg)[1]
    return list(dict.fromkeys(captions))[:16]


def planned(cfg):
    """--plan: of the MM-DiT; with stage all its frozen parts do not exist yet."""
    if cfg.stage not in ("pretrain", "all"):
        raise ValueError(f"--plan is of the MM-DiT's training, --stage pretrain or all, not {cfg.stage}")
    if cfg.buckets or cfg.keep_resolution:
        raise ValueError("--plan counts squares of --resolution: it takes neither --buckets nor --keep-resolution")
    run = with_defaults(cfg, "pretrain")
    check(run, cfg.processes)
    if cfg.device.startswith("cuda") and not (cfg.peak and cfg.memory) and not torch.cuda.is_available():
        raise ValueError("--plan for cuda where no GPU is: say what one has by --memory GB, and --peak TFLOP/s")
    if not cfg.peak:
        check_device(cfg.device)
    parts = {name: Path(cfg.out if (Path(cfg.out) / f"{name}.json").exists() else cfg.weights) / f"{name}.pt" for name in ("vae", "clip_l", "clip_g", "t5") if cfg.stage == "pretrain"}
    configs = {name: checkpoint.read_json(path.with_suffix(".json")) for name, path in parts.items()}
    sizes = TextSizes(*(configs[name]["width"] for name in ("clip_l", "clip_g", "t5"))) if parts else TextSizes(cfg.text_width * 3 // 8, cfg.text_width * 5 // 8, cfg.text_width)
    plan(run, architecture(run, sizes, configs["vae"]["latent_channels"] if parts else cfg.latent_channels), parts.values())


def sampling_settings(cfg):
    """How the run's MM-DiT is sampled from: what the bundle's config.json records."""
    if cfg.stage == "finetune":
        start = checkpoint.read_object(Path(cfg.init_from) / "config.json")
        return {name: start[name] for name in ("steps", "sampler", "noise", "t_last", "schedule") if name in start}
    shown = {"image_cfg": 1.5} if cfg.stage == "edit" else {}
    if not straight(cfg.formulation):      # in t a step crosses from one end of a curved path to the other
        return {"steps": 28, "sampler": "dpmpp_2m", "schedule": "log-snr"} | shown
    if cfg.stage == "pretrain" and cfg.data.startswith("shapes"):    # late steps pull to the (shape, color) pairs of the training (RESULTS.md)
        return {"steps": 28, "sampler": "euler", "t_last": 0.4}
    return {"steps": 14, "sampler": "abm2"} | shown


def straight(name):
    """Whether a formulation's path is Eq. 13's: Eq. 23's shift is of that, and so are even steps in t."""
    return isinstance(formulation(name).path, RectifiedFlow)


def run_bundle(cfg, dataset):
    """The run folder as a bundle: frozen parts, those of --weights where it has none of its own, and how to sample from the MM-DiT to come."""
    if isinstance(dataset, Latents):
        check_fingerprint(dataset, [cfg.weights] if cfg.stage in FROM_A_MODEL else [cfg.out, cfg.weights], cfg.clip_length, cfg.t5_length)
    missing = [part for part in FROZEN if cfg.stage in FROM_A_MODEL or not any((Path(cfg.out) / f"{part}{end}").exists() for end in (".pt", "/"))]
    clip_l = Path(cfg.weights if "clip_l" in missing else cfg.out) / "clip_l.json"
    if clip_l.exists() and cfg.clip_length > (most := checkpoint.read_json(clip_l)["length"]):
        raise ValueError(f"--clip-length is {cfg.clip_length}; the CLIPs of {clip_l.parent} have positions for {most}")
    if cfg.stage in FROM_A_MODEL:
        Run(cfg).claim()                                # its copies are its own, should it be stopped before `fit`
    if missing and not distributed.rank():
        checkpoint.copy_parts(cfg.weights, cfg.out, missing)
        seen = str(checkpoint.read_object(Path(cfg.weights) / "config.json").get("data"))
        if "shapes" in seen and cfg.data.partition(":")[0] not in ("shapes", "shape-edits", "latents"):
            tqdm.write(f"{cfg.weights}: its autoencoder and text encoders have seen {seen} alone; --stage all trains others", file=sys.stderr)
    config = {"clip_length": cfg.clip_length, "t5_length": cfg.t5_length, "resolution": cfg.resolution, "formulation": cfg.formulation,
              "shift": cfg.shift, "cfg": cfg.cfg, "unconditional": "zeros", "data": cfg.data, **sampling_settings(cfg)}
    if not distributed.rank():
        checkpoint.write_json(Path(cfg.out) / "config.json", config)
    distributed.barrier()
    return checkpoint.load_bundle(cfg.out, cfg.device)


def train_mmdit(cfg):
    dataset, held_out = open_split(cfg, "train"), open_split(cfg, "val")
    bundle = run_bundle(cfg, dataset)
    form, channels = formulation(cfg.formulation), bundle.part("vae").config["latent_channels"]
    model_config = architecture(cfg, bundle.text.sizes, channels)
    if not distributed.rank():
        checkpoint.write_json(Path(cfg.out) / "mmdit.json", model_config)       # with it sample.py --mmdit takes a checkpoint before there is an mmdit.pt
    torch.manual_seed(cfg.seed)
    model = MMDiT(**model_config, attention=cfg.attention)
    start = start_config(cfg)
    kept = all(start.get(name) == model_config[name] for name in ("base_size", "pos_embed_max_size"))
    start_from(cfg, "mmdit", model, *[partial(grown, positions=kept)] * bool(start))
    model.checkpointing = cfg.checkpointing
    validation = validation_batches(cfg, held_out, bundle, model_config["in_channels"])
    add_qk_norms(cfg, model, *max(validation, key=lambda batch: len(batch[0])), form)
    draw, loss_of = flow_matching(cfg, bundle, form, torch.compile(model) if cfg.compile else model, channels)
    prompts, shown = fixed_edits(cfg, bundle, held_out, channels) if cfg.stage == "edit" else (fixed_prompts(cfg, held_out), None)

    def validate(model, step):
        alpha = cfg.shift if cfg.stage in FROM_A_MODEL else 1.0
        levels = np.average([evaluate.validation_loss(in_parts(cfg, model, form, latents[:, channels:]), form, latents[:, :channels], *text, alpha=alpha)
                             for latents, *text in validation], 0, [len(latents) for latents, *_ in validation]).tolist()
        bundle.mmdit = model
        save_png(grid(drawn(bundle, prompts, shown)), Path(cfg.out) / f"grid-{step:07}.png", {"step": step, "prompts": "\n".join(prompts)})
        checkpoint.save_part(cfg.out, "mmdit", model, model_config)
        scores = (evaluate.edits if cfg.stage == "edit" else evaluate.geneval)(bundle, 10)[0] if cfg.data.startswith("shapes") else {}
        return {"val_loss": float(np.mean(levels[:-1])), "val_levels": levels, **scores}

    flops = cfg.batch_size * counted_step(model_config, cfg, 1, cfg.resolution // 8, cfg.clip_length + cfg.t5_length, update=False).flops
    fit(cfg, model, lambda start: conditioned_batches(dataset, bundle, cfg, start, *place()), draw, loss_of, validate, flops)


def flow_matching(cfg, bundle, form, network, channels):
    """(draw, loss_of) of `fit`, for batches of latents (B, C, h, w), of stage edit (B, 2C, h, w) with the picture to edit, context and pooled."""
    def draw(batch, generator):
        kept = bundle.text.kept(cfg.batch_size, cfg.text_dropout, generator)
        size = batch[0].shape[2:]
        alpha = shift_alpha(math.prod(size), (cfg.resolution // 8) ** 2) if straight(cfg.formulation) else 1.0      # m: this batch's
        t = shift(form.sample_t(cfg.batch_size, generator), cfg.shift * alpha)
        noise = torch.randn(cfg.batch_size, channels, *size, generator=generator)
        seen = torch.rand(cfg.batch_size, generator=generator) >= cfg.image_dropout      # drawn last: other stages' numbers are the same without
        return *batch, *map(distributed.own, (kept, t, noise, seen))

    def loss_of(_, *columns):
        latents, context, pooled, kept, t, noise, seen = (x.to(cfg.device) for x in columns)
        context, pooled = bundle.text.drop(context, pooled, kept=kept)
        source = latents[:, channels:] * seen[:, None, None, None]

        def out(z, s):
            return network(torch.cat([form.input(z, s), source], 1), s, context, pooled).float()

        losses = form.loss(out, latents[:, :channels], t=t, eps=noise)
        return losses.mean(), {"loss_bins": by_level(losses.detach(), t)}
    return draw, loss_of


def validation_batches(cfg, held_out, bundle, in_channels):
    """[(latents, context, pooled)] of about 512 samples at most, one of each size of picture."""
    found = held_out_batches(held_out, bundle, cfg, 512)
    if found[0][0].shape[1] != in_channels:
        raise ValueError(f"{cfg.data} has {found[0][0].shape[1]} channels of latents a sample; --stage {cfg.stage} takes {in_channels}, of {2 if cfg.stage == 'edit' else 1} picture(s)")
    return found


def in_parts(cfg, model, form, source):
    """The network as `evaluate.validation_loss` calls it, which sees the batch in parts, so that validation takes no more memory than training."""
    few = cfg.batch_size // (distributed.world() * cfg.grad_accum)

    def out(z, t, *text):
        parts = ([x.to(cfg.device) for x in part] for part in zip(*(x.split(few) for x in (z, t, source, *text))))
        return torch.cat([model(torch.cat([form.input(z, t), source], 1), t, *c).cpu() for z, t, source, *c in parts])
    return out


def drawn(bundle, prompts, shown):
    """A picture of each prompt, or each of the pictures `shown` beside its edit."""
    if shown is None:
        return generate(bundle, prompts)
    return torch.stack([to_uint8(shown), generate(bundle, prompts, width=shown.shape[3], height=shown.shape[2], edit=shown)], 1).flatten(0, 1)


def by_level(losses, t, bins=8):
    """Mean loss in each of `bins` equal intervals of t; None where the batch has no t."""
    index = (t * bins).long().clamp(max=bins - 1)
    return [losses[index == k].mean().item() if (index == k).any() else None for k in range(bins)]


FROZEN = ("vae", "clip_l", "clip_g", "clip_image", "t5", "clip_tokenizer", "t5_tokenizer")
FROM_NOTHING = {"vae": train_vae, "clip": train_clip, "t5": train_t5, "pretrain": train_mmdit}     # in turn, stage all
TRAIN = {**FROM_NOTHING, "finetune": train_mmdit, "edit": train_mmdit}


def with_defaults(cfg, stage):
    """The settings of one stage of `cfg.stage`."""
    taken = {k: v for k, v in DEFAULTS[stage].items() if getattr(cfg, k) in (0, "auto") or (cfg.stage == "all" and stage != "pretrain")}
    if "shift" in taken and not straight(cfg.formulation):
        taken["shift"] = 1.0
    return replace(cfg, stage=stage, **taken)


def check(cfg, processes):
    """Refuses what cannot be trained by so many processes, before anything is written."""
    check_size(cfg.resolution, cfg.resolution)
    for side in cfg.keep_resolution, cfg.base_resolution:
        if side:
            check_size(side, side)
    formulation(cfg.formulation)
    check_least(cfg, steps=1, batch_size=1, depth=1, weight_sets=1, latent_channels=1, text_width=32, clip_length=3, t5_length=3, chunk=cfg.batch_size, reuse=1, workers=0,
                eval_every=1, log_every=1, seed=0, grad_accum=1, ema_every=1, max_bad_steps=0, checkpoint_every=0, keep=1, milestone_every=0, watch_every=0,
                processes=1, memory=0, peak=0, clip_grad=0, lr=0, muon_lr=0, weight_decay=0)
    if cfg.seed > 2 ** 42:
        raise ValueError(f"--seed is {cfg.seed}; at most 2^42 is taken")
    for name in "text_dropout", "image_dropout", "synthetic_share", "decay", "ema_decay":
        if not 0 <= getattr(cfg, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}; it is a share, in 0..1")
    if not 0 <= cfg.shift <= 100:
        raise ValueError(f"--shift is {cfg.shift}; it must be in 0..100; 0 is the default")
    if cfg.stage not in OF_THE_MMDIT and cfg.data.startswith("latents:"):
        raise ValueError(f"--stage {cfg.stage} needs pictures; {cfg.data} is for pretrain")
    kind = cfg.data.partition(":")[0]
    if kind == "pairs" or kind not in ("shapes", "latents") and (kind in ("edits", "shape-edits")) != (cfg.stage == "edit"):
        raise ValueError(f"--data {cfg.data} is not what --stage {cfg.stage} learns from: edits are for stage edit, which takes shapes[:LEVEL], edits:DIR, edits:FILE.jsonl, latents:DIR")
    if cfg.batch_size % (parts := processes * cfg.grad_accum):
        raise ValueError(f"--batch-size is {cfg.batch_size}: it cannot be split over {processes} processes and {cfg.grad_accum} micro-batches, {parts} parts")
    if cfg.stage == "clip" and cfg.grad_accum > 1:
        raise ValueError(f"--grad-accum is {cfg.grad_accum}; stage clip compares all of a batch with each other: for it 1 is all there is")
    if cfg.sharding == "fsdp" and (cfg.compile or cfg.stage == "clip"):        # FSDP takes no scalar, as CLIP's temperature is
        raise ValueError(f"{'--compile' if cfg.compile else '--stage clip'} goes with --sharding ddp")
    if cfg.compile and cfg.device == "cpu" and not shutil.which(compiler := os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")):
        raise ValueError(f"--compile needs a C++ compiler: {compiler} is not there; the environment's CXX names another")
    if cfg.weight_sets > 3:
        raise ValueError(f"--weight-sets is {cfg.weight_sets}; known are 1, 2, 3")


def main():
    cfg = CONFIG
    if cfg.plot:
        return plot(cfg.plot, cfg.out)
    begin(cfg, train)


def begin(cfg, train):
    """Sets up this machine, joins the other processes, and trains."""
    check_least(cfg, threads=0)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.plan:
        return planned(cfg)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.tf32
    with distributed.processes(cfg.device, cfg.sharding) as device:
        train(replace(cfg, device=device))


def train(cfg):
    runs = []
    for stage in FROM_NOTHING if cfg.stage == "all" else [cfg.stage]:
        own = with_defaults(cfg, stage)
        runs.append(Run(inherited(own) if stage in FROM_A_MODEL else own))
        check(runs[-1].cfg, distributed.world())
        runs[-1].check_folder()
    if len(runs) > 1 or cfg.data.startswith("shapes"):
        open_split(runs[-1].cfg, "train")               # what the last stage refuses it refuses now; the frozen parts take `shapes` of every level
    carry_out(runs, TRAIN)


@going_on("the same command with --resume goes on")
def carry_out(runs, functions):
    """One after the other, each by the function of its stage."""
    distributed.barrier()
    try:
        for run in runs:
            if run.cfg.resume and run.done():
                print(f"{run.cfg.out}: stage {run.cfg.stage} is done")
                continue
            torch.manual_seed(run.cfg.seed)
            functions[run.cfg.stage](run.cfg)
            distributed.barrier()
            run.finish()
            distributed.barrier()
    finally:
        report_skipped()


if __name__ == "__main__":
    one_line_errors(main)
