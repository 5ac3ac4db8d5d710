"""The MM-DiT of a bundle as a file of a byte a weight, for `sample.py --mmdit`: matrices in float8 (e4m3, a rounding error of 2.6 %), the table of positions cropped to that of another bundle.

    python experiments/float8.py --weights runs/fine --like weights/mini --out wide.pt
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
    out: str = flag("wide.pt", "file to write", "what")


def main(cfg):
    import torch

    import checkpoint

    part, like = (checkpoint.load_bundle(path).part("mmdit") for path in (cfg.weights, cfg.like))
    tensors = {name: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 else tensor for name, tensor in part.tensors.items()}
    side, wanted = part.config["pos_embed_max_size"], like.config["pos_embed_max_size"]
    if side < wanted or part.config | {"pos_embed_max_size": wanted} != like.config:
        raise ValueError(f"the MM-DiT of {cfg.weights} is of another architecture than that of {cfg.like}")
    inner = slice((side - wanted) // 2, (side + wanted) // 2)
    tensors["pos_embed"] = tensors["pos_embed"].unflatten(1, (side, side))[:, inner, inner].flatten(1, 2).clone()
    checkpoint.save_checkpoint(cfg.out, tensors)


if __name__ == "__main__":
    one_line_errors(lambda: main(parse_config(Config, description=__doc__)))
