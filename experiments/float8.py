"""The MM-DiT of a bundle as a file of about a byte a weight, for `--mmdit` of `sample.py` and `evaluate.py`. The matrices of the blocks are in float8 (e4m3, a rounding error of 2.6 %);
that of the last layer, of 0.2 % of the weights, would add as much error near t = 1 as all of them. Positions are those of another bundle, the middle of its own.

    python experiments/float8.py --weights runs/fine --like weights/mini --out free.pt
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import flag, one_line_errors, parse_config  # noqa: E402


@dataclass
class Config:
    weights: str = flag("runs/fine", "bundle whose MM-DiT it is", "what")
    like: str = flag("weights/mini", "bundle that it is to be used with", "what")
    out: str = flag("free.pt", "file to write", "what")


def main(cfg):
    import torch

    import checkpoint

    part, like = (checkpoint.load_bundle(path).part("mmdit") for path in (cfg.weights, cfg.like))
    wanted = like.config["pos_embed_max_size"]
    if part.config["pos_embed_max_size"] < wanted or part.config | {"pos_embed_max_size": wanted} != like.config:
        raise ValueError(f"the MM-DiT of {cfg.weights} is of another architecture than that of {cfg.like}")
    tensors = {name: tensor.to(torch.float8_e4m3fn) if name.startswith("joint_blocks.") and tensor.ndim == 2 else tensor for name, tensor in part.tensors.items()}
    checkpoint.save_checkpoint(cfg.out, tensors | {"pos_embed": like.tensors["pos_embed"]})


if __name__ == "__main__":
    one_line_errors(lambda: main(parse_config(Config, description=__doc__)))
