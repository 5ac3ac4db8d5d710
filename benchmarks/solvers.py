"""How few evaluations of the guided velocity does a picture need? Every solver against the same ODE solved with 1000 Heun steps.

    python benchmarks/solvers.py                       # the shipped miniature: about an hour and a half on 2 cores
    python benchmarks/solvers.py --per-category 100    # success to a percent, error on the same pictures

Leaves benchmarks/results/solvers.json and solvers.png. Error: root mean square over all latents, relative to the reference's, and its median
over the pictures; flips: pictures off by more than 0.1, which a small error at a fork of the trajectories sent to another mode. Success: GenEval's six categories, exactly right.
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import flag, one_line_errors, parse_config


@dataclass
class Config:
    weights: str = flag("weights/mini", "bundle", "what")
    per_category: int = flag(11, "prompts of each of the six categories", "what")
    reference: int = flag(1000, "Heun steps of the reference", "what")
    evaluations: str = flag("4,6,8,10,14,20,28,50", "budgets, in evaluations of the guided velocity", "what")
    shifts: str = flag("1,2,3", "timestep shifts tried, and `adapted`: a grid fitted to 8 other pictures", "what")
    seed: int = flag(7, "of prompts and noise", "what")
    out: str = flag("benchmarks/results", "folder", "what")


COST = {"midpoint": 2, "heun": 2, "rk4": 4}  # evaluations a step, where not 1
SOLVERS = ("euler", "midpoint", "heun", "rk4", "ab2", "abm2", "dpmpp_2m")


def main(cfg):
    import torch
    with torch.no_grad():
        measure(cfg)


def measure(cfg):
    import numpy as np
    import torch

    import checkpoint
    import evaluate
    from flow import formulation
    from samplers import SAMPLERS, timesteps, timesteps_adapted
    from sample import guided_velocity, initial_noise, seeded, to_uint8

    bundle, out = checkpoint.load_bundle(cfg.weights), Path(cfg.out)
    form, side = formulation(bundle.config["formulation"]), bundle.config["resolution"]
    todo = [task for category in evaluate.CATEGORIES for task in evaluate.tasks(category, cfg.per_category, cfg.seed)]
    noise = form.start(initial_noise(bundle, seeded(cfg.seed, len(todo)), side, side))
    velocity = guided_velocity(bundle, [task.prompt for task in todo], bundle.config["cfg"])

    pilot = [task.prompt for category in evaluate.CATEGORIES for task in evaluate.tasks(category, 2, cfg.seed + 1)][:8]
    pilot_velocity, pilot_noise = guided_velocity(bundle, pilot, bundle.config["cfg"]), form.start(initial_noise(bundle, seeded(cfg.seed + 1000, len(pilot)), side, side))
    fine = timesteps(200, 2.0, form.t_max, form.t_min)

    @functools.cache
    def time_grid(name, steps, order):
        if name == "adapted":
            return timesteps_adapted(steps, pilot_velocity, pilot_noise, fine, order)
        return timesteps(steps, float(name), form.t_max, form.t_min)

    def success(z):
        images = to_uint8(torch.cat([bundle.vae.decode(part) for part in z.split(64)]))
        return float(np.mean([evaluate.judge(task, evaluate.detect(image.numpy())[1])[0] for task, image in zip(todo, images)]))

    reference = SAMPLERS["heun"](velocity, noise, timesteps(cfg.reference, 2.0, form.t_max, form.t_min))
    rows = [{"solver": "reference", "evaluations": 2 * cfg.reference, "grid": "2", "error": 0.0, "median": 0.0, "flips": 0, "success": success(reference)}]
    for solver in SOLVERS:
        for evaluations in map(int, cfg.evaluations.split(",")):
            steps = evaluations // COST.get(solver, 1)
            if steps * COST.get(solver, 1) != evaluations:
                continue
            options = {"path": form} if solver == "dpmpp_2m" else {}
            for name in (*cfg.shifts.split(","), "adapted"):
                z = SAMPLERS[solver](velocity, noise, time_grid(name, steps, 1 if solver == "euler" else 2), **options)
                off = (z - reference).flatten(1).square().mean(1).sqrt() / reference.square().mean().sqrt()
                rows.append({"solver": solver, "evaluations": evaluations, "grid": name, "error": off.square().mean().sqrt().item(),
                             "median": off.median().item(), "flips": int((off > 0.1).sum()), "success": success(z)})
                print("{solver:10} {evaluations:4} grid {grid:8} error {error:.4f} median {median:.4f} flips {flips:3} success {success:.3f}".format(**rows[-1]), flush=True)
                checkpoint.write_json(out / "solvers.json", {"weights": cfg.weights, "guidance": bundle.config["cfg"], "pictures": len(todo), "rows": rows})
    checkpoint.write(out / "solvers.png", lambda temporary: draw(rows, len(todo), temporary))


def draw(rows, pictures, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for solver in SOLVERS:
        budgets = sorted({r["evaluations"] for r in rows if r["solver"] == solver})
        best = [min((r for r in rows if (r["solver"], r["evaluations"]) == (solver, n)), key=lambda r: r["median"]) for n in budgets]
        for axis, key in zip(axes, ("median", "success")):
            axis.plot([r["evaluations"] for r in best], [r[key] for r in best], "o-", label=solver)
    ticks = sorted({r["evaluations"] for r in rows[1:]})
    for axis, label in zip(axes, ("median relative error, best grid", f"share exactly right of {pictures}")):
        axis.set(xscale="log", xlabel="evaluations of the guided velocity", ylabel=label)
        axis.set_xticks(ticks, labels=ticks)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, format="png")
    plt.close(figure)


if __name__ == "__main__":
    config = parse_config(Config, description=__doc__)
    one_line_errors(lambda: main(config))
