"""Optimizers, the learning rate over the steps, and the averaged weights (Sec. 5.3.2, App. B.3)."""

import math

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


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

    torch.optim.Muon computes in bf16 whatever the machine, 40 times slower than fp32 on CPUs without it, and one matrix at a time; here those of one shape go together.
    Of weights that FSDP shards, every process orthogonalises the whole update and keeps its own rows."""

    def __init__(self, parameters, lr, momentum=0.95, weight_decay=0.0, dtype=torch.float32):
        super().__init__(parameters, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        (group,) = self.param_groups
        alike = {}
        for p in group["params"]:
            alike.setdefault((p.shape[0], math.prod(p.shape[1:])), []).append(p)
        for (rows, columns), parameters in alike.items():
            updates = orthogonalized(torch.stack([self.update(p, group["momentum"]) for p in parameters]).to(self.dtype))
            for p, update in zip(parameters, updates):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(sharded_like(p, update.view(p.shape).to(p.dtype)), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)

    def update(self, p, momentum):
        """-> the whole gradient of p with Nesterov's momentum, as a matrix."""
        if "momentum" not in self.state[p]:
            self.state[p]["momentum"] = torch.zeros_like(p)
        buffer = self.state[p]["momentum"]
        buffer.lerp_(p.grad, 1 - momentum)
        return whole(p.grad.lerp(buffer, momentum)).flatten(1)


def whole(x):
    """A tensor of which FSDP gave each process a part, gathered; any other as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def sharded_like(p, x):
    return distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None) if isinstance(p, DTensor) else x


def local(tensors):
    """What this process holds of each."""
    return [x.detach().to_local() if isinstance(x, DTensor) else x.detach() for x in tensors]


def make_optimizers(module, cfg, dtype=torch.float32):
    """[AdamW] or, where the stage takes Muon, [Muon on hidden weights, AdamW on the rest]: embeddings, inputs, outputs, modulations, norms, biases."""
    rest = ("embed", "shared", "relative", "adaLN", "final_layer", "conv_in", "conv_out", "lm_head", "projection", "logit_scale")
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    hidden = {name: p for name, p in parameters.items() if cfg.optimizer != "adamw" and p.ndim >= 2 and not any(word in name for word in rest)}
    others = [p for name, p in parameters.items() if name not in hidden]
    adamw = torch.optim.AdamW(others, lr=cfg.lr, betas=(0.9, 0.95), eps=1e-15, weight_decay=cfg.weight_decay, fused=True)  # eps: Sec. 5.3.2
    return [Muon(list(hidden.values()), cfg.muon_lr, weight_decay=cfg.weight_decay, dtype=dtype), adamw] if hidden else [adamw]


def lr_factor(step, cfg):
    """Linear warm-up, constant, then over the last `decay` of the steps down to zero, by a line or half a cosine; in (0, 1]."""
    left = min((cfg.steps - step) / max(cfg.steps * cfg.decay, 1), 1.0)
    left = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[cfg.lr_schedule]
    return min((step + 1) / max(cfg.warmup, 1), left)


def set_rates(optimizers, step, cfg):
    """Learning rate and weight decay in `step`, by this run's settings, whatever checkpoint was loaded."""
    for optimizer in optimizers:
        optimizer.param_groups[0].update(lr=optimizer.defaults["lr"] * lr_factor(step, cfg), weight_decay=cfg.weight_decay)


def update_average(averages, parameters, step, cfg):
    """After `step` steps, every `ema_every`-th: averages <- d averages + (1 - d) parameters, with ema_decay a step, less at the start."""
    if step % cfg.ema_every == 0:
        decay = min(cfg.ema_decay, (step + 1) / (step + 10)) ** cfg.ema_every
        torch._foreach_lerp_(local(averages), local(parameters), 1 - decay)
