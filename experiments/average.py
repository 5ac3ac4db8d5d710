"""The MM-DiT between two that share a start, by averaging their weights (Wortsman et al. 2022): each keeps some of what the other has forgotten.

    python experiments/average.py --weights SPELLS --other BEFORE --share 0.3 --out runs/average

Writes a bundle: the weights (1 - share) times those of --weights and share times those of --other, all else from --weights, the table of positions too. A share of -s / (1 - s) undoes one of s.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import flag, one_line_errors, parse_config  # noqa: E402


@dataclass
class Config:
    weights: str = flag("weights/mini", "bundle to begin with", "what")
    other: str = flag("", "bundle whose MM-DiT has its architecture", "what")
    share: float = flag(0.3, "of --other, -1 to 1; below 0 leads away from it", "what")
    out: str = flag("runs/average", "bundle to write", "what")


def main(cfg):
    import checkpoint

    if not -1 <= cfg.share <= 1:
        raise ValueError(f"--share is {cfg.share}, not between -1 and 1")
    one, other = (checkpoint.load_bundle(path) for path in (cfg.weights, cfg.other))
    ours, theirs = (bundle.part("mmdit") for bundle in (one, other))
    if ours.config | {"pos_embed_max_size": 0} != theirs.config | {"pos_embed_max_size": 0}:
        raise ValueError(f"the MM-DiTs of {cfg.weights} and {cfg.other} differ in architecture")
    weights = other.mmdit.state_dict() | {"pos_embed": one.mmdit.pos_embed}             # which is not learned
    one.mmdit.load_state_dict({name: value.lerp(weights[name], cfg.share) for name, value in one.mmdit.state_dict().items()})
    checkpoint.save_bundle(one, cfg.out)


if __name__ == "__main__":
    one_line_errors(lambda: main(parse_config(Config, description=__doc__)))
