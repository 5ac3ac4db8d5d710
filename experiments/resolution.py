"""Fig. 6 in miniature: the same finetuning to 128 x 128 and ratios with the timestep shift and extended positions, without the one, and without the other.

    python experiments/resolution.py --compile     # three runs of 2,800 steps, then pictures of each; experiments/results/resolution.json, resolution-*.png

Same seed, batches and noise in training, same prompts and noise in the pictures, a row a run. A run whose folder is there goes on, or is taken as it is.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from config import flag, one_line_errors, parse_config  # noqa: E402

RUNS = {"main": ("--shift", "3", "--base-resolution", "64"), "no-shift": ("--shift", "1", "--base-resolution", "64"), "interpolated": ("--shift", "3")}
RECIPE = ("--data shapes:signs --buckets --resolution 128 --keep-resolution 64 --text-dropout 0.2 --synthetic-share 0.25 --cfg 2.5 "
          "--decay 0.4 --lr 1.2e-3 --muon-lr 0.025 --weight-decay 0.005 --checkpoint-every 500 --resume").split()
SIZES = (128, 128), (192, 96), (160, 96), (96, 160), (64, 64)


@dataclass
class Config:
    weights: str = flag("weights/mini", "bundle that the runs begin from", "what")
    runs: str = flag("runs/resolution", "folder for the three runs", "what")
    out: str = flag("experiments/results", "folder for the scores and pictures", "what")
    steps: int = flag(2800, "steps of each run", "training")
    batch_size: int = flag(64, "samples a step", "training")
    seed: int = flag(21, "of the runs", "training")
    compile: bool = flag(False, "train with torch.compile", "training")
    prompts: int = flag(20, "prompts a category and size", "sampling")


def trained(cfg, name):
    """The bundle of one run."""
    from checkpoint import load_bundle
    folder = Path(cfg.runs) / name
    flags = ["--weights", cfg.weights, "--init-from", cfg.weights, "--steps", str(cfg.steps), "--batch-size", str(cfg.batch_size), "--seed", str(cfg.seed), *["--compile"] * cfg.compile]
    if subprocess.run([sys.executable, ROOT / "train.py", "--stage", "finetune", "--out", folder, *flags, *RECIPE, *RUNS[name]]).returncode:
        raise ValueError(f"the run {folder} did not end")
    return load_bundle(folder)


def main(cfg):
    import torch

    from checkpoint import write_json
    from evaluate import CATEGORIES, geneval
    from sample import grid, save_png

    scores = {}
    pictures = {size: [] for size in SIZES}
    for name in RUNS:
        bundle = trained(cfg, name)
        scores[name] = {}
        for width, height in SIZES:
            scores[name][f"{width}x{height}"], results = geneval(bundle, cfg.prompts, width=width, height=height)
            pictures[width, height] += [image for _, image, _ in results[::cfg.prompts]]
        print(name, ", ".join(f"{size}: {100 * found['overall']:.1f} %" for size, found in scores[name].items()), flush=True)
    out = Path(cfg.out)
    write_json(out / "resolution.json", {"config": vars(cfg), **scores})
    for (width, height), images in pictures.items():
        save_png(grid(torch.stack(images), columns=len(CATEGORIES)), out / f"resolution-{width}x{height}.png", {"rows": ", ".join(RUNS)})


if __name__ == "__main__":
    one_line_errors(lambda: main(parse_config(Config, description=__doc__)))
