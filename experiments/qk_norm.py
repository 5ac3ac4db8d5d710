"""Fig. 5 in miniature: the same training with and without QK-norm, at a learning rate that is too high without.

    python experiments/qk_norm.py                  # two runs of 1,000 steps; experiments/results/qk_norm.{json,png}

Watched in each block: the largest attention logit, and the mean entropy of the attention's rows in nats. The figure shows the highest logit and the lowest entropy
of all blocks. A run that is no longer finite ends where it is, and is drawn up to there.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from config import flag, one_line_errors, parse_config  # noqa: E402

RUNS = {"QK-norm": "--qk-norm", "without": "--no-qk-norm"}


@dataclass
class Config:
    weights: str = flag("weights/mini", "bundle whose frozen parts are used", "what")
    runs: str = flag("runs/qk-norm", "folder for the two runs", "what")
    out: str = flag("experiments/results", "folder for the figures", "what")
    steps: int = flag(1000, "steps of each run", "training")
    batch_size: int = flag(64, "samples a step", "training")
    depth: int = flag(4, "blocks of the MM-DiT", "training")
    lr: float = flag(0.02, "of AdamW", "training")
    muon_lr: float = flag(0.2, "of Muon", "training")
    watch_every: int = flag(10, "steps between two looks at the attention", "training")


def trained(cfg, name):
    """The lines of the metrics of one run."""
    from runs import read_metrics
    folder = Path(cfg.runs) / name.lower()
    if folder.exists():
        raise ValueError(f"{folder} is there: another --runs keeps it")
    settings = {k: getattr(cfg, k) for k in ("weights", "steps", "batch_size", "depth", "lr", "muon_lr", "watch_every")} | {"log_every": cfg.watch_every, "eval_every": cfg.steps}
    flags = [word for k, v in settings.items() for word in ("--" + k.replace("_", "-"), str(v))]
    subprocess.run([sys.executable, ROOT / "train.py", "--stage", "pretrain", "--out", folder, RUNS[name], *flags])
    lines = read_metrics(folder / "metrics.jsonl")
    if not lines:
        raise ValueError(f"the run {folder} did not begin")
    return lines


def curves(lines):
    """{name: [[steps], [values]]}: loss, the highest logit of all blocks, the lowest entropy."""
    def curve(key, of=lambda x: x):
        rows = [(line["step"], of(line[key])) for line in lines if line.get(key) is not None]
        return [list(column) for column in zip(*rows)]
    return {"loss": curve("loss"), "largest attention logit": curve("max_logits", max), "attention entropy, nats": curve("entropies", min)}


def draw(results, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    for name, run in results.items():
        for ax, (title, (steps, values)) in zip(axes, run["curves"].items()):
            ax.plot(steps, values, label=name)
            ax.set(title=title, xlabel="step", yscale="linear" if "entropy" in title else "log")
    axes[0].legend()
    figure.savefig(path, dpi=100)


def main(cfg):
    from checkpoint import write, write_json
    results = {}
    for name in RUNS:
        lines = trained(cfg, name)
        results[name] = {"ended": any("done" in line for line in lines), "skipped": sum("bad_steps" in line for line in lines), "curves": curves(lines)}
    out = Path(cfg.out)
    write_json(out / "qk_norm.json", {"config": vars(cfg), **results})
    write(out / "qk_norm.png", lambda temporary: draw(results, temporary))
    for name, run in results.items():
        print(f"{name}: {'to the end' if run['ended'] else 'ended early'}, {run['skipped']} steps skipped, " + ", ".join(f"{title} {values[-1]:.3g}" for title, (_, values) in run["curves"].items()))


if __name__ == "__main__":
    one_line_errors(lambda: main(parse_config(Config, description=__doc__)))
