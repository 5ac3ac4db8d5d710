"""train.py as a program of its own, for tests of several processes and of killed ones: `[torchrun] tiny_train.py '{"stage": ...}'`, validated on less data than an hour's training."""

import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import train
from config import one_line_errors

torch.set_num_threads(1)
FIRST = train.first
TINY = train.TrainConfig(batch_size=8, steps=20, depth=2, text_width=32, resolution=32, latent_channels=4, chunk=16, reuse=2, workers=0, log_every=1, warmup=2, precision="fp32")

if __name__ == "__main__":
    train.CONFIG = replace(TINY, **json.loads(sys.argv[1]))
    train.first = lambda dataset, n, cfg: FIRST(dataset, min(n, 24), cfg)
    train.evaluate.geneval = lambda bundle, n: ({}, [])
    train.evaluate.validation_loss = lambda *arguments, **settings: [0.0] * 8
    train.generate = lambda bundle, prompts: torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    one_line_errors(train.main)
