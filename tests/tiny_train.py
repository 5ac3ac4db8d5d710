"""train.py as a program of its own, for tests of several processes and of killed ones: `[torchrun] tiny_train.py '{"stage": ...}'`, validated on less data than an hour's training.

Besides train.py's settings: "stop_at", the step in which SIGTERM comes; "full_at", from which on no file may be longer than a line or two."""

import json
import os
import resource
import signal
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import optim
import train
from config import one_line_errors

torch.set_num_threads(1)
FIRST, LR_FACTOR = train.first, optim.lr_factor
TINY = train.TrainConfig(batch_size=8, steps=20, depth=2, text_width=32, resolution=32, latent_channels=4, chunk=16, reuse=2, workers=0, log_every=1, warmup=2, precision="fp32")


def happening(stop_at=None, full_at=None):
    """optim.lr_factor, which each optimizer asks in every step, with what is to happen in one."""
    def lr_factor(step, cfg):
        nonlocal stop_at
        if step == stop_at:
            stop_at = None  # a second signal would end it at once
            os.kill(os.getpid(), signal.SIGTERM)
        if step == full_at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        return LR_FACTOR(step, cfg)
    return lr_factor


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    optim.lr_factor = happening(**{name: settings.pop(name) for name in ("stop_at", "full_at") if name in settings})
    train.CONFIG = replace(TINY, **settings)
    train.first = lambda dataset, n, cfg: FIRST(dataset, min(n, 24), cfg)
    train.evaluate.geneval = lambda bundle, n: ({}, [])
    train.evaluate.validation_loss = lambda *arguments, **settings: [0.0] * 8
    train.generate = lambda bundle, prompts: torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    one_line_errors(train.main)
