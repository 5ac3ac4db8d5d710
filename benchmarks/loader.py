"""How fast `latents:` feed training, against what its steps eat.

    python data.py precompute --samples 8192 --out runs/latents
    python benchmarks/loader.py --latents runs/latents            # benchmarks/results/loader.json

Each after a second of warm-up. The steps are those of the bundle's MM-DiT on one batch: forward, backward, update.
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from config import check_least, flag, one_line_errors, parse_config  # noqa: E402


@dataclass
class Config:
    latents: str = flag("runs/latents", "folder that data.py precompute wrote", "what")
    weights: str = flag("weights/mini", "bundle whose parts are used", "what")
    batch_size: int = flag(64, "samples a batch", "what")
    workers: int = flag(2, "processes that read", "what")
    seconds: float = flag(20.0, "for each", "what")
    threads: int = flag(2, "CPU threads", "what")
    out: str = flag("benchmarks/results", "folder for the figures", "what")


def rate(batches, batch_size, seconds):
    """Samples a second, after a second of warm-up."""
    begun, start, n = time.perf_counter(), None, 0
    for _ in batches:
        now = time.perf_counter()
        if start is not None:
            n += 1
        elif now - begun > 1:
            start = now
        if start is not None and now - start > seconds:
            return n * batch_size / (now - start)


def steps(bundle, cfg, batch):
    """Training steps on one batch, without end."""
    import torch

    from flow import formulation
    from optim import make_optimizers
    from pipeline import precision
    from train import gradients
    model, form = bundle.mmdit.train().requires_grad_(True), formulation(bundle.config["formulation"])
    optimizers = make_optimizers(model, cfg, precision(cfg))

    def loss_of(latents, context, pooled):
        out = lambda z, t: model(form.input(z, t), t, context, pooled).float()
        return form.loss(out, latents, t=torch.rand(len(latents)), eps=torch.randn_like(latents)).mean(), {}

    while True:
        model.zero_grad(set_to_none=True)
        gradients(loss_of, batch, cfg)
        for optimizer in optimizers:
            optimizer.step()
        yield


def main(cfg):
    import torch

    import checkpoint
    from data import open_data
    from pipeline import conditioned_batches, precision
    from train import TrainConfig
    check_least(cfg, threads=1)
    torch.set_num_threads(cfg.threads)
    bundle = checkpoint.load_bundle(cfg.weights)
    run = replace(TrainConfig(), stage="pretrain", batch_size=cfg.batch_size, workers=cfg.workers, lr=1e-3, muon_lr=0.01, steps=1000, device="cpu", resolution=bundle.config["resolution"])
    stored = open_data(f"latents:{cfg.latents}", run.resolution, run.resolution)
    rates = {"latents": rate(conditioned_batches(stored, bundle, run), cfg.batch_size, cfg.seconds)}
    batch = next(conditioned_batches(stored, bundle, replace(run, workers=0)))
    rates["training"] = rate(steps(bundle, run, batch), cfg.batch_size, cfg.seconds)
    for name, value in rates.items():
        print(f"{name:16} {value:8.0f} samples/s")
    checkpoint.write_json(Path(cfg.out) / "loader.json", {"config": vars(cfg), "precision": str(precision(run)), "samples a second": rates})


if __name__ == "__main__":
    one_line_errors(lambda: main(parse_config(Config, description=__doc__)))
