"""dpo.py train as a program of its own, for tests of several processes: `[torchrun] tiny_dpo.py '{"pairs": ...}'`, without sample grids."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import dpo
import train
from config import one_line_errors

torch.set_num_threads(1)

if __name__ == "__main__":
    cfg = dpo.DPOConfig(**{**dict(rank=2, lr=1e-3, warmup=1, batch_size=4, chunk=12, workers=0, log_every=1, steps=6, beta=500.0, precision="fp32"), **json.loads(sys.argv[1])})
    dpo.generate = lambda bundle, prompts: torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    one_line_errors(lambda: train.begin(cfg, dpo.run_dpo))
