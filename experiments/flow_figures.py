"""The pictures of Sec. 3: densities of t (Fig. 11), weightings over log-SNR, and the paths of a 2-D data set, straight and curved.

    python experiments/flow_figures.py            # a minute; experiments/results/flow_figures.{json,png}

The paths are those of the exact network (the posterior mean, in closed form), so they show the formulation alone: the conditional paths from one noise
to one data point are straight for rf and EDM, the same arcs of ellipses for cos and linear; the marginal paths bend for all. Their lengths and the distance between their ends are in the JSON.
"""
import json
import math
import sys
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parent.parent))
from checkpoint import write, write_json
from flow import formulation
from samplers import sample_dpmpp_2m, timesteps_log_snr

OUT = Path(__file__).parent / "results" / "flow_figures"
DENSITIES = {                                                           # Fig. 11
    "logit-normal": ("rf/lognorm(-1.00,1.00)", "rf/lognorm(0.00,0.60)", "rf/lognorm(0.00,1.00)", "rf/lognorm(0.50,0.60)", "rf/lognorm(1.00,1.00)"),
    "mode with heavy tails": ("rf/mode(-1.00)", "rf/mode(-0.54)", "rf/mode(0.83)", "rf/mode(1.29)", "rf/mode(1.75)"),
    "CosMap and uniform": ("rf", "rf/cosmap"),
}
WEIGHTS = ("rf", "rf/lognorm(0.00,1.00)", "rf/mode(1.29)", "rf/cosmap", "eps/linear", "v/linear", "eps/cos", "v/cos", "edm(-1.20,1.20)", "edm(0.00,0.60)")
PATHS = ("rf", "v/cos", "eps/linear", "edm(-1.20,1.20)")


def rounded(x):
    return [float(f"{value:.4g}") for value in x.tolist()]


def two_moons(n, generator):
    """(n, 2): the data, mean 0 and variance 1."""
    angle = math.pi * torch.rand(n, generator=generator)
    side = (torch.arange(n) % 2)[:, None]
    upper, lower = torch.stack([angle.cos(), angle.sin()], 1), torch.stack([1 - angle.cos(), 0.5 - angle.sin()], 1)
    x = torch.where(side == 0, upper, lower)
    return (x - x.mean(0)) / x.std(0)


def exact_network(f, data):
    """E[target | z] when the data set is all there is: Eq. 6, summed exactly."""
    def network(z, t):
        a, b = f.a(t[:1]), f.b(t[:1])
        off = (z[:, None] - a * data) / b                               # (B, data, 2): the noise, were it that point
        x0 = (-off.square().sum(-1) / 2).softmax(1) @ data
        return f.target(x0, (z - a * x0) / b, t)
    return network


def draw_densities(axes, numbers):
    t = torch.linspace(0.005, 0.995, 199, dtype=torch.float64)
    for ax, (title, names) in zip(axes, DENSITIES.items(), strict=True):
        for name in names:
            f = formulation(name)
            numbers[name] = rounded(f.density(t))
            ax.plot(t, f.density(t), label=name.removeprefix("rf/"))
        ax.set(title=f"densities: {title}", xlabel="t", ylabel="$\\pi(t)$", xlim=(0, 1), ylim=(0, 4))
        ax.legend(fontsize=7)


def draw_weights(ax, numbers):
    """w over lambda, scaled so that w sech(lambda / 2) peaks at 1: constants do not matter, and many w grow without bound. v/cos lies on rf."""
    for name in WEIGHTS:
        f = formulation(name)
        t = timesteps_log_snr(200, f, limit=10).double()[1:-1]
        lam, w = f.log_snr(t), f.weight(t)
        w = w / (w / torch.cosh(lam / 2)).max()
        numbers[name] = {"log-SNR": rounded(lam), "weight": rounded(w)}
        rf = name.startswith("rf")
        ax.semilogy(lam, w, label=name, linestyle="-" if rf else "--", linewidth=3 if name == "rf" else 1.3, alpha=0.5 if name == "rf" else 1)
    ax.set(title="weightings $w$ over log-SNR (scaled)", xlabel="$\\lambda$  (noise $\\leftarrow$   $\\rightarrow$ data)", ylabel="w", ylim=(1e-4, 1e3))
    ax.legend(fontsize=6, ncol=2)


def draw_paths(axes, numbers):
    generator = torch.Generator().manual_seed(0)
    data, noise = two_moons(400, generator), torch.randn(24, 2, generator=generator)
    for ax, name in zip(axes, PATHS, strict=True):
        f = formulation(name)
        network = exact_network(f, data)

        def velocity(z, t, f=f, network=network):
            return f.velocity(network(z, t), z, t)
        ts, track = timesteps_log_snr(200, f), []
        end = sample_dpmpp_2m(velocity, f.start(noise), ts, lambda i, t, z, v, track=track: track.append(z), path=f)
        track = torch.stack([*track, end])
        conditional = torch.stack([f.interpolate(data[:24], noise, t) for t in ts])
        length = track.diff(dim=0).norm(dim=-1).sum() / (track[0] - end).norm(dim=-1).sum()
        numbers[name] = {"length / distance between the ends": float(length), "nearest data point": float(torch.cdist(end, data).amin(1).mean())}

        ax.plot(*conditional[:, :10].unbind(-1), color="tab:blue", linewidth=1, alpha=0.6)
        ax.plot(*track.unbind(-1), color="tab:orange", linewidth=1)
        ax.scatter(*data.T, s=2, color="black", zorder=3)
        ax.scatter(*end.T, s=8, color="tab:red", zorder=4)
        ax.set(title=f"{name}: length {float(length):.2f} x straight", xlim=(-3.5, 3.5), ylim=(-3.5, 3.5), aspect="equal")
    axes[0].set_xlabel("blue: $z_t$ of a pair ($x_0$, $\\epsilon$); orange: the ODE; red: its ends")


def main():
    figure = plt.figure(figsize=(16, 8), layout="constrained")
    axes = figure.subplots(2, 4)
    numbers = {"densities": {}, "weights": {}, "paths": {}}
    draw_densities(axes[0, :3], numbers["densities"])
    draw_weights(axes[0, 3], numbers["weights"])
    draw_paths(axes[1], numbers["paths"])
    OUT.parent.mkdir(exist_ok=True)
    write(OUT.with_suffix(".png"), lambda temporary: figure.savefig(temporary, dpi=90))
    write_json(OUT.with_suffix(".json"), numbers)
    print(json.dumps(numbers["paths"], indent=1), f"\nwritten: {OUT}.png, {OUT}.json")


if __name__ == "__main__":
    main()
