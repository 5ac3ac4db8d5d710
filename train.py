"""Training: one loop for every stage.

    python train.py                                             # the miniature's MM-DiT on `shapes`, its encoders from weights/mini
    python train.py --stage all --out runs/mine                 # a whole SD3 from nothing: autoencoder, CLIPs, T5, MM-DiT
    python train.py --stage all --data folder:pictures --out runs/mine
    python train.py --data latents:runs/latents                 # computed ahead by data.py precompute
    python train.py --stage pretrain --out runs/mine --resume   # go on where it stopped

A run folder is a bundle that sample.py --weights takes, with metrics.jsonl, STAGE-loss.png, sample grids and, until the stage is done,
a checkpoint to resume from. Step k's samples, noise and times depend on the seed and k alone (pipeline.py).
"""

from dataclasses import asdict, dataclass, replace

from config import flag, one_line_errors, parse_config

STAGES = ("vae", "clip", "t5", "pretrain", "all")


@dataclass
class TrainConfig:
    stage: str = flag("pretrain", "what to train; all: each in turn", "run", choices=STAGES)
    data: str = flag("shapes", "shapes[:LEVEL], folder:DIR, imagenet:DIR, fashion-mnist:DIR, tar:DIR/{00000..00099}.tar, latents:DIR", "run")
    out: str = flag("runs/miniature", "run folder", "run")
    weights: str = flag("weights/mini", "bundle whose frozen parts are used where the run folder has none", "run")
    init_from: str = flag("", "bundle whose MM-DiT pretraining starts from", "run")
    resume: bool = flag(False, "go on from the run folder's checkpoint", "run")
    seed: int = flag(0, "of weights, data, noise", "run")
    steps: int = flag(0, "optimizer steps of the stage; 0: its default (with stage all: of pretrain)", "optimization")
    batch_size: int = flag(0, "samples a step; 0: the stage's default", "optimization")
    lr: float = flag(0.0, "learning rate of AdamW; 0: the stage's default", "optimization")
    muon_lr: float = flag(0.0, "learning rate of Muon on the hidden matrices; 0: the stage's default, -1: AdamW for all", "optimization")
    warmup: int = flag(100, "steps of linear warm-up", "optimization")
    decay: float = flag(0.7, "last share of the steps, over which the learning rate falls linearly to zero", "optimization")
    weight_decay: float = flag(0.0, "of AdamW", "optimization")
    clip_grad: float = flag(1.0, "largest norm of the gradient", "optimization")
    ema_decay: float = flag(0.998, "of the averaged weights, a step", "optimization")
    depth: int = flag(4, "of the MM-DiT: width 64 depth, depth heads", "model")
    qk_norm: bool = flag(True, "RMSNorm on Q and K", "model")
    weight_sets: int = flag(2, "sets of weights a block: 2 is the paper's, 1 a DiT, 3 for CLIP, T5 and image", "model")
    attention: str = flag("sdpa", "torch's or our fused attention", "model", choices=("sdpa", "fused"))
    latent_channels: int = flag(16, "of the autoencoder", "model")
    text_width: int = flag(256, "of T5; the CLIPs have 3/8 and 5/8 of it, as the released ones have less than half each", "model")
    clip_length: int = flag(16, "tokens a prompt for the CLIPs", "model")
    t5_length: int = flag(24, "tokens a prompt for T5", "model")
    formulation: str = flag("rf/lognorm(0.00,1.00)", "path, prediction and density of t (flow.py)", "flow")
    shift: float = flag(2.0, "timestep shift alpha (Eq. 23), in training and sampling", "flow")
    text_dropout: float = flag(0.464, "probability with which each text encoder is left out (App. B.3)", "flow")
    cfg: float = flag(4.0, "guidance scale of the sample grids, and the bundle's default", "flow")
    resolution: int = flag(64, "side of the pictures", "data", unit="pixels")
    filter: str = flag("", "which pictures, by columns of the metadata: \"aesthetic>5 and nsfw<0.2\"", "data")
    buckets: bool = flag(False, "keep aspect ratios: batches of sizes of about resolution^2 pixels (Sec. 5.3.2); for the MM-DiT", "data")
    upscale: bool = flag(False, "with buckets: take pictures smaller than their bucket too", "data")
    synthetic_share: float = flag(0.5, "share of synthetic captions, where there are two (Sec. 5.2.2)", "data")
    chunk: int = flag(16384, "samples that the frozen parts encode at once", "data")
    reuse: int = flag(6, "times an encoded sample is seen before fresh ones are encoded", "data")
    workers: int = flag(2, "processes that read or draw pictures", "data")
    kl_weight: float = flag(1e-6, "of the autoencoder's KL term", "autoencoder")
    eval_every: int = flag(2000, "steps between validations, grids and checkpoints", "log")
    log_every: int = flag(50, "steps between lines of metrics.jsonl", "log")
    device: str = flag("cpu", "cpu, cuda, mps", "machine")
    precision: str = flag("auto", "of the activations in training, weights stay fp32; auto: bf16 on GPUs and on CPUs that multiply in it", "machine",
                          choices=("auto", "fp32", "bf16"))
    compile: bool = flag(False, "torch.compile the MM-DiT; needs a C++ compiler on CPUs", "machine")
    threads: int = flag(0, "CPU threads; 0: torch's choice", "machine")


# What a stage of the miniature takes unless a flag says otherwise; measured on 2 cores (README).
DEFAULTS = {"vae": dict(steps=12000, batch_size=16, lr=1e-3, muon_lr=0.02),
            "clip": dict(steps=1200, batch_size=128, lr=1e-3, muon_lr=-1.0),
            "t5": dict(steps=4000, batch_size=32, lr=1e-3, muon_lr=-1.0),
            "pretrain": dict(steps=14000, batch_size=64, lr=1e-3, muon_lr=0.02)}

if __name__ == "__main__":
    CONFIG = parse_config(TrainConfig, description=__doc__)  # before the heavy imports: --help answers at once

import copy
import json
import math
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import evaluate
from data import Latents, open_data
from flow import formulation, shift
from mmdit import MMDiT
from pipeline import autocast, batches, caption_batches, check_fingerprint, conditioned_batches, count, first, first_captions, precision, report_skipped
from sample import check_device, check_size, generate, grid, save_png, to_uint8
from text_encoders import (BPETokenizer, CLIPTextEncoder, T5Denoiser, T5Encoder, UnigramTokenizer, contrastive_loss,
                           span_corruption)
from vae import AutoencoderKL, psnr, vae_loss


# ---------------------------------------------------------------------------------------------------------------
# Optimization

def orthogonalized(matrices, steps=5):
    """(n, rows, columns) -> the nearest semi-orthogonal matrices, roughly: singular values in about 0.7 to 1.2, by the quintic Newton-Schulz iteration of Muon."""
    x = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum whose every update is orthogonalised (Jordan et al. 2024): for hidden matrices, and for convolutions as matrices (out, in * 9).

    torch.optim.Muon computes in bf16 whatever the machine, 40 times slower than fp32 on CPUs without it, and one matrix at a time; here those of one shape go together."""

    def __init__(self, parameters, lr, momentum=0.95, dtype=torch.float32):
        super().__init__(parameters, dict(lr=lr, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        (group,) = self.param_groups
        alike = {}
        for p in group["params"]:
            buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
            buffer.lerp_(p.grad, 1 - group["momentum"])
            alike.setdefault(p.flatten(1).shape, []).append((p, p.grad.lerp(buffer, group["momentum"]).flatten(1)))
        for (rows, columns), pairs in alike.items():
            updates = orthogonalized(torch.stack([update for _, update in pairs]).to(self.dtype))
            for (p, _), update in zip(pairs, updates):
                p.add_(update.view_as(p), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def make_optimizers(module, cfg):
    """[AdamW] or, where the stage takes Muon, [Muon on hidden weights, AdamW on the rest]: embeddings, inputs, outputs, modulations, norms, biases."""
    rest = ("embed", "shared", "adaLN", "final_layer", "conv_in", "conv_out", "lm_head", "projection", "logit_scale")
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    hidden = [p for name, p in parameters.items() if cfg.muon_lr > 0 and p.ndim >= 2 and not any(word in name for word in rest)]
    others = [p for p in parameters.values() if not any(p is h for h in hidden)]
    adamw = torch.optim.AdamW(others, lr=cfg.lr, betas=(0.9, 0.95), eps=1e-15, weight_decay=cfg.weight_decay, fused=True)  # eps: Sec. 5.3.2
    return [Muon(hidden, cfg.muon_lr, dtype=precision(cfg)), adamw] if hidden else [adamw]


def lr_factor(step, cfg):
    """Linear warm-up, constant, linear decay to zero over the last `decay` of the steps; in (0, 1]."""
    left = (cfg.steps - step) / max(cfg.steps * cfg.decay, 1)
    return min((step + 1) / max(cfg.warmup, 1), left, 1.0)


class Run:
    """The files of a stage in a run folder: metrics.jsonl, STAGE-loss.png and the checkpoint."""

    def __init__(self, cfg):
        self.cfg, self.folder = cfg, Path(cfg.out)
        self.checkpoint, self.metrics = self.folder / f"{cfg.stage}.ckpt", self.folder / "metrics.jsonl"

    def refuse_to_overwrite(self):
        if not self.cfg.resume and (self.checkpoint.exists() or self.done()):
            raise ValueError(f"{self.folder} holds a run of stage {self.cfg.stage}: --resume goes on with it, another --out starts afresh")

    def start(self):
        """The state to resume from, or None for a fresh stage."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = checkpoint.load_checkpoint(self.checkpoint) if self.checkpoint.exists() else None
        if state is not None and not (isinstance(state, dict) and {"step", "model", "ema", "optimizers"} <= state.keys()):
            raise ValueError(f"{self.checkpoint} is no training checkpoint")
        done = state["step"] if state else 0
        kept = [row for row in self.rows() if row["stage"] != self.cfg.stage or row["step"] <= done]
        checkpoint.write(self.metrics, lambda temporary: Path(temporary).write_text("".join(json.dumps(row) + "\n" for row in kept)))
        checkpoint.write_json(self.folder / f"{self.cfg.stage}-config.json", asdict(self.cfg))
        return state

    def done(self):
        return any(row["stage"] == self.cfg.stage and row.get("done") for row in self.rows())

    def finish(self):
        """The stage's part is written: the checkpoint has served."""
        self.log(self.cfg.steps, done=True)
        self.checkpoint.unlink(missing_ok=True)

    def rows(self):
        lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]  # a killed run may leave half a line

    def log(self, step, **values):
        with open(self.metrics, "a") as file:
            file.write(json.dumps({"stage": self.cfg.stage, "step": step, **values}) + "\n")

    def plot(self):
        """STAGE-loss.png: the training loss and every validation figure over the steps of this stage."""
        rows = [row for row in self.rows() if row["stage"] == self.cfg.stage]
        names = sorted({k for row in rows for k, v in row.items() if isinstance(v, float) and k not in ("lr", "rate", "grad_norm")})
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        figure, axes = plt.subplots(1, max(len(names), 1), figsize=(4 * max(len(names), 1), 3), squeeze=False)
        for axis, name in zip(axes[0], names):
            axis.plot([row["step"] for row in rows if name in row], [row[name] for row in rows if name in row])
            axis.set(title=name, xlabel="step")
            axis.grid(alpha=0.3)
        figure.tight_layout()
        checkpoint.write(self.folder / f"{self.cfg.stage}-loss.png", lambda temporary: figure.savefig(temporary, format="png"))
        plt.close(figure)


def fit(cfg, module, data, loss_of, validate):
    """Train `module` and return its averaged copy.

    data(start) yields batches from sample `start` on; loss_of(module, batch, generator) -> (loss, {name: number or list});
    validate(averaged module, step) -> {name: number}, called every eval_every steps and at the end."""
    run = Run(cfg)
    state = run.start()
    module.to(cfg.device).train()
    averaged = copy.deepcopy(module).eval().requires_grad_(False)
    optimizers = make_optimizers(module, cfg)
    base_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    step = 0
    if state:
        step = state["step"]
        checkpoint.load_strictly(module, state["model"], run.checkpoint)
        checkpoint.load_strictly(averaged, state["ema"], run.checkpoint)
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)

    def save():
        checkpoint.save_checkpoint(run.checkpoint, {"step": step, "model": module.state_dict(), "ema": averaged.state_dict(),
                                                    "optimizers": [o.state_dict() for o in optimizers], "config": asdict(cfg)})

    def evaluated():
        values = validate(averaged, step)
        run.log(step, **values)
        run.plot()
        tqdm.write(f"{cfg.stage} step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items() if isinstance(v, float)), file=sys.stderr)

    recent, begun, seen = [], time.time(), 0
    bar = tqdm(total=cfg.steps, initial=step, desc=cfg.stage, unit="step", mininterval=1 if sys.stderr.isatty() else 30)
    try:
        for batch in data(step * cfg.batch_size):
            if step >= cfg.steps:
                break
            for optimizer, rate in zip(optimizers, base_rates):
                optimizer.param_groups[0]["lr"] = rate * lr_factor(step, cfg)
            generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
            with autocast(cfg):
                loss, values = loss_of(module, batch, generator)
            module.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(module.parameters(), cfg.clip_grad)
            if not (loss.isfinite() and norm.isfinite()):
                raise ValueError(f"the {cfg.stage} loss is {loss.item()} and its gradient {norm.item()} at step {step}; the last good checkpoint is "
                                 f"{run.checkpoint} (a smaller --lr may help)")
            for optimizer in optimizers:
                optimizer.step()
            step += 1
            decay = min(cfg.ema_decay, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(averaged.parameters()), [p.detach() for p in module.parameters()], 1 - decay)
            recent.append({"loss": loss.item(), "grad_norm": norm.item(), **values})
            seen += cfg.batch_size
            bar.update()
            if step % cfg.log_every == 0:
                run.log(step, **mean_of(recent), lr=optimizers[-1].param_groups[0]["lr"], rate=seen / (time.time() - begun))
                bar.set_postfix(loss=f"{np.mean([r['loss'] for r in recent]):.4f}")
                recent = []
            if step % cfg.eval_every == 0 and step < cfg.steps:
                evaluated()
                save()
    except KeyboardInterrupt:
        save()
        raise SystemExit(f"\nstopped at step {step}; the same command with --resume goes on") from None
    bar.close()
    evaluated()
    return averaged


def mean_of(rows):
    """The mean of each number, or of each place of a list of which some are None, over the rows."""
    def mean(values):
        if isinstance(values[0], list):
            return [mean(column) for column in zip(*values)]
        there = [v for v in values if v is not None]
        return round(float(np.mean(there)), 5) if there else None
    return {key: mean([row[key] for row in rows]) for key in rows[0]}


# ---------------------------------------------------------------------------------------------------------------
# Stage vae: the autoencoder (Sec. 5.2.1)

def open_split(cfg, split, frozen_parts=False):
    """The run's data. The frozen parts are trained on squares and, of `shapes`, on every level, all of which they serve."""
    spec = "shapes:all" if frozen_parts and cfg.data.startswith("shapes") else cfg.data
    several = {} if frozen_parts else {"buckets": cfg.buckets, "upscale": cfg.upscale}
    return open_data(spec, cfg.resolution, cfg.resolution, split, cfg.seed, filter=cfg.filter, **several)


def train_vae(cfg):
    dataset, held_out = open_split(cfg, "train", True), open_split(cfg, "val", True)
    vae = AutoencoderKL(cfg.latent_channels, channels=48, multipliers=(1, 2), blocks=1, scale=1.0, shift=0.0, unshuffle=4, attention=False,
                        groups=8)
    images = first(held_out, 256, cfg)[0].to(cfg.device)

    def loss_of(vae, batch, generator):
        loss, parts = vae_loss(vae, batch[0].to(cfg.device), kl_weight=cfg.kl_weight, generator=generator)
        return loss, {name: part.item() for name, part in parts.items()}

    @torch.no_grad()
    def validate(vae, step):
        recon = vae.decode(vae.to_latents(images, sample=False)).clamp(-1, 1)
        pairs = torch.stack([images[:24], recon[:24]], 1).flatten(0, 1)
        save_png(grid(to_uint8(pairs), columns=8), Path(cfg.out) / "vae.png", {"step": step})
        return {"psnr": psnr(recon, images).mean().item()}

    vae = fit(cfg, vae, lambda start: batches(dataset, cfg.batch_size, cfg, start), loss_of, validate)
    with torch.no_grad():
        latents = torch.cat([vae.encode(batch)[0] for batch in first(dataset, 2048, cfg)[0].to(cfg.device).split(256)])
    vae.set_normalisation(latents.mean((0, 2, 3)).cpu(), latents.std((0, 2, 3)).cpu())  # per channel
    checkpoint.save_part(cfg.out, "vae", vae, vae.config)


# ---------------------------------------------------------------------------------------------------------------
# Stage clip: both text towers against one image tower (Radford et al. 2021)

def texts(dataset):
    """What tokenizers are trained on."""
    return [text for captions in first_captions(dataset, 20000) for text in captions if text]


def train_clip(cfg):
    dataset, held_out = open_split(cfg, "train", True), open_split(cfg, "val", True)
    dataset.twins = True  # of shapes: hard negatives
    tokenizer = BPETokenizer.train(texts(dataset), length=cfg.clip_length)
    tokenizer_g = BPETokenizer(tokenizer.vocab, tokenizer.merges, cfg.clip_length, pad=0)  # G pads with 0, L with the end token
    width_l, width_g = cfg.text_width * 3 // 8, cfg.text_width * 5 // 8
    common = dict(vocab_size=len(tokenizer.vocab), length=cfg.clip_length, layers=3, eos=tokenizer.end)
    configs = {"clip_l": dict(common, width=width_l, heads=width_l // math.gcd(width_l, 32), mlp=4 * width_l, activation="quick_gelu", projection=width_l),
               "clip_g": dict(common, width=width_g, heads=width_g // math.gcd(width_g, 32), mlp=4 * width_g, activation="gelu", projection=width_g),
               "clip_image": dict(resolution=cfg.resolution, patch_size=8, width=128, layers=4, heads=4, projection=width_l + width_g)}
    towers = torch.nn.ModuleDict({"clip_l": CLIPTextEncoder(**configs["clip_l"]), "clip_g": CLIPTextEncoder(**configs["clip_g"]),
                                  "clip_image": evaluate.CLIPImageEncoder(**configs["clip_image"])})

    def features(towers, images, texts):
        """Image features for L and for G, text features of L and of G: two pairs of (B, width)."""
        tokens_l, tokens_g = tokenizer(texts).to(cfg.device), tokenizer_g(texts).to(cfg.device)
        image = towers["clip_image"](images.to(cfg.device)).split([width_l, width_g], 1)
        return [(image[0], towers["clip_l"](tokens_l)[1]), (image[1], towers["clip_g"](tokens_g)[1])]

    def loss_of(towers, batch, generator):
        scale = towers["clip_image"].logit_scale.clamp(max=math.log(100))
        losses = [contrastive_loss(i, t, scale) for i, t in features(towers, batch[0], batch[1])]
        return sum(losses), {"loss_l": losses[0].item(), "loss_g": losses[1].item()}

    images, _, samples = first(held_out, 1024, cfg)
    dense = [s.synthetic or s.original for s in samples]

    @torch.no_grad()
    def validate(towers, step):
        pairs = [features(towers, i, dense[k:k + 256]) for k, i in zip(range(0, 1024, 256), images.split(256))]
        l, g = ([torch.cat([p[which][side] for p in pairs]).cpu() for side in (0, 1)] for which in (0, 1))
        ways = min(64, len(images))
        return {"retrieval_l": evaluate.retrieval(*l, ways), "retrieval_g": evaluate.retrieval(*g, ways)}

    towers = fit(cfg, towers, lambda start: batches(dataset, cfg.batch_size, cfg, start), loss_of, validate)
    checkpoint.write_folder(Path(cfg.out) / "clip_tokenizer", tokenizer.save)
    for name, config in configs.items():
        checkpoint.save_part(cfg.out, name, towers[name], config)


# ---------------------------------------------------------------------------------------------------------------
# Stage t5: masked spans, denoised (Raffel et al. 2020)

def train_t5(cfg):
    dataset, held_out = open_split(cfg, "train", True), open_split(cfg, "val", True)
    tokenizer = UnigramTokenizer.train(texts(dataset), length=2 * cfg.t5_length)
    config = dict(vocab_size=len(tokenizer.pieces), width=cfg.text_width, layers=3, heads=cfg.text_width // 32, head_dim=32,
                  mlp=3 * cfg.text_width // 2, buckets=32, max_distance=64)
    model = T5Denoiser(T5Encoder(**config), layers=2)

    def document(captions, flip):
        """Both captions of a scene: what is hidden in one can be told from the other, if the encoder knows what belongs to what."""
        return " . ".join(filter(None, captions[::-1] if flip else captions))

    def loss_of(model, batch, generator):
        tokens = tokenizer([document(captions, i % 2) for i, captions in enumerate(batch)])
        corrupted, targets = span_corruption(tokens, tokenizer.sentinels, rate=0.25, mean_span=1.5, generator=generator)
        return model.loss(corrupted.to(cfg.device), targets.to(cfg.device)), {}

    validation = first_captions(held_out, 256)

    @torch.no_grad()
    def validate(model, step):
        return {"val_loss": loss_of(model, validation, torch.Generator().manual_seed(0))[0].item()}

    model = fit(cfg, model, lambda start: caption_batches(dataset, cfg.batch_size, cfg, start), loss_of, validate)
    encoder = T5Encoder(**config)
    encoder.load_state_dict({k: v for k, v in model.state_dict().items() if k in encoder.state_dict()})
    checkpoint.write_folder(Path(cfg.out) / "t5_tokenizer", tokenizer.save)
    checkpoint.save_part(cfg.out, "t5", encoder, config)


# ---------------------------------------------------------------------------------------------------------------
# Stage pretrain: the MM-DiT (Sec. 4, 5.3), on what the frozen parts make of the data (App. E.1)

def fixed_prompts(cfg, held_out):
    """16 prompts for the sample grids."""
    if cfg.data.startswith("shapes"):
        return [evaluate.tasks(category, 3)[k].prompt for k in range(3) for category in (*evaluate.CATEGORIES, "typography")][:16]
    captions = [pair[0] for pair in first_captions(held_out, 256)] if isinstance(held_out, Latents) else first(held_out, 256, cfg)[1]
    return list(dict.fromkeys(captions))[:16]


def train_mmdit(cfg):
    dataset, held_out = open_split(cfg, "train"), open_split(cfg, "val")
    if isinstance(dataset, Latents):
        check_fingerprint(dataset, [cfg.out, cfg.weights], cfg.clip_length, cfg.t5_length)
    missing = [part for part in FROZEN if not any((Path(cfg.out) / f"{part}{end}").exists() for end in (".pt", "/"))]
    clip_l = Path(cfg.weights if "clip_l" in missing else cfg.out) / "clip_l.json"
    if clip_l.exists() and cfg.clip_length > (most := checkpoint.read_json(clip_l)["length"]):
        raise ValueError(f"--clip-length is {cfg.clip_length}; the CLIPs of {clip_l.parent} have positions for {most}")
    if missing:
        checkpoint.copy_parts(cfg.weights, cfg.out, missing)
    config = {"clip_length": cfg.clip_length, "t5_length": cfg.t5_length, "resolution": cfg.resolution, "formulation": cfg.formulation,
              "shift": cfg.shift, "steps": 28, "cfg": cfg.cfg, "sampler": "euler", "unconditional": "zeros", "data": cfg.data}
    checkpoint.write_json(Path(cfg.out) / "config.json", config)
    bundle = checkpoint.load_bundle(cfg.out, cfg.device)
    sizes, form = bundle.text.sizes, formulation(cfg.formulation)
    patches = cfg.resolution // 16
    model_config = dict(depth=cfg.depth, in_channels=bundle.part("vae").config["latent_channels"], context_dim=sizes.t5, pooled_dim=sizes.clip_l + sizes.clip_g,
                        pos_embed_max_size=4 * patches, base_size=patches, qk_norm=cfg.qk_norm, weight_sets=cfg.weight_sets,
                        clip_length=cfg.clip_length)
    torch.manual_seed(cfg.seed)
    model = MMDiT(**model_config, attention=cfg.attention)
    if cfg.init_from:
        checkpoint.load_strictly(model, checkpoint.load_checkpoint(Path(cfg.init_from) / "mmdit.pt"), cfg.init_from)

    network = torch.compile(model) if cfg.compile else model

    def loss_of(_, batch, generator):
        latents, context, pooled = (x.to(cfg.device) for x in batch)
        context, pooled = bundle.text.drop(context, pooled, cfg.text_dropout, generator)
        t = shift(form.sample_t(len(latents), generator, cfg.device), cfg.shift)

        def out(z, s):
            return network(form.input(z, s), s, context, pooled).float()

        losses = form.loss(out, latents, t=t, generator=generator)
        return losses.mean(), {"loss_bins": by_level(losses.detach(), t)}

    n = min(512, count(held_out))
    validation = next(conditioned_batches(held_out, bundle, replace(cfg, workers=0, batch_size=n, chunk=n)))
    prompts = fixed_prompts(cfg, held_out)

    def validate(model, step):
        levels = evaluate.validation_loss(lambda z, t, *c: model(form.input(z, t), t, *c), form, *(x.to(cfg.device) for x in validation))
        bundle.mmdit = model
        save_png(grid(generate(bundle, prompts)), Path(cfg.out) / f"grid-{step:07}.png", {"step": step, "prompts": "\n".join(prompts)})
        checkpoint.save_part(cfg.out, "mmdit", model, model_config)
        scores = evaluate.geneval(bundle, 10)[0] if cfg.data.startswith("shapes") else {}
        return {"val_loss": float(np.mean(levels[:-1])), "val_levels": levels, **scores}

    fit(cfg, model, lambda start: conditioned_batches(dataset, bundle, cfg, start), loss_of, validate)


def by_level(losses, t, bins=8):
    """Mean loss in each of `bins` equal intervals of t; None where the batch has no t."""
    index = (t * bins).long().clamp(max=bins - 1)
    return [losses[index == k].mean().item() if (index == k).any() else None for k in range(bins)]


FROZEN = ("vae", "clip_l", "clip_g", "clip_image", "t5", "clip_tokenizer", "t5_tokenizer")
TRAIN = {"vae": train_vae, "clip": train_clip, "t5": train_t5, "pretrain": train_mmdit}


def check(cfg):
    """Refuses what cannot be trained, before anything is written."""
    check_size(cfg.resolution, cfg.resolution)
    check_device(cfg.device)
    formulation(cfg.formulation)
    least = {"steps": 1, "batch_size": 1, "depth": 1, "weight_sets": 1, "latent_channels": 1, "text_width": 32, "clip_length": 3, "t5_length": 3,
             "chunk": cfg.batch_size, "reuse": 1, "workers": 0, "eval_every": 1, "log_every": 1, "seed": 0, "threads": 0}
    for name, value in least.items():
        if getattr(cfg, name) < value:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}; the least is {value}")
    if cfg.stage != "pretrain" and cfg.data.startswith("latents:"):
        raise ValueError(f"--stage {cfg.stage} needs pictures; {cfg.data} is for pretrain")
    if cfg.weight_sets > 3:
        raise ValueError(f"--weight-sets is {cfg.weight_sets}; known are 1, 2, 3")


def main():
    cfg = CONFIG
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    runs = []
    for stage in TRAIN if cfg.stage == "all" else [cfg.stage]:
        own = {k: v for k, v in DEFAULTS[stage].items() if not getattr(cfg, k) or (cfg.stage == "all" and stage != "pretrain")}
        runs.append(Run(replace(cfg, stage=stage, **own)))
        check(runs[-1].cfg)
        runs[-1].refuse_to_overwrite()
    try:
        for run in runs:
            if cfg.resume and run.done():
                print(f"{cfg.out}: stage {run.cfg.stage} is done")
                continue
            torch.manual_seed(cfg.seed)
            TRAIN[run.cfg.stage](run.cfg)
            run.finish()
    finally:
        report_skipped()


if __name__ == "__main__":
    one_line_errors(main)
