"""Tab. 7: what the frozen parts cost an image, and so what computing latents and embeddings ahead saves (App. E.1).

    python experiments/frozen_parts.py                  # the miniature's, beside the paper's

Leaves experiments/results/frozen_parts.json. Memory is that of the weights in float32; time is processor time, as other work on the machine
does not count in it; storage is what `python data.py precompute` writes: latents and pooled vectors in float32, states in float16.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import flag, one_line_errors, parse_config  # noqa: E402

PAPER = {"vae": (0.14, 2.45, 65.5), "clip_l": (0.49, 0.45, 121.3), "clip_g": (2.78, 2.77, 202.2), "t5": (19.05, 17.46, 630.7)}   # GB, ms, kB


@dataclass
class Config:
    weights: str = flag("weights/mini", "bundle to measure", "what")
    images: int = flag(64, "pictures and captions at once", "what")
    repeats: int = flag(5, "the fastest of which counts", "what")
    out: str = flag("experiments/results", "folder for the figures", "what")


def stored_kilobytes(sizes, channels, resolution):
    """{part: kB} of an image: latents of resolution / 8, states of each encoder, pooled vectors of the CLIPs."""
    def text(tokens, width, pooled):
        return (2 * tokens * width + 4 * pooled) / 1000
    return {"vae": 4 * channels * (resolution // 8) ** 2 / 1000, "clip_l": text(sizes.clip_length, sizes.clip_l, sizes.clip_l),
            "clip_g": text(sizes.clip_length, sizes.clip_g, sizes.clip_g), "t5": text(sizes.t5_length, sizes.t5, 0)}


def main(cfg):
    import time

    import torch

    import checkpoint
    from data import Shapes
    from pipeline import to_tensor

    bundle, side = checkpoint.load_bundle(cfg.weights), checkpoint.load_bundle(cfg.weights).config["resolution"]
    world = [Shapes("all", side, side)[i] for i in range(cfg.images)]
    images, captions = to_tensor(world), [sample.synthetic for sample in world]
    parts = {"vae": bundle.vae, **{name: bundle.text.encoder(name)[0] for name in ("clip_l", "clip_g", "t5")}}
    stored = stored_kilobytes(bundle.text.sizes, bundle.vae.config["latent_channels"], side)
    rows = {}
    for name, module in parts.items():
        times = []
        for _ in range(cfg.repeats):
            begun = time.process_time()
            with torch.no_grad():
                bundle.vae.to_latents(images, sample=False) if name == "vae" else bundle.text.encode(captions, (name,))
            times.append(time.process_time() - begun)
        weights = module.encoder if name == "vae" else module
        rows[name] = {"GB": 4e-9 * sum(p.numel() for p in weights.parameters()), "ms": 1000 * min(times) / cfg.images, "kB": stored[name]}
    for name, row in rows.items():
        print(f"{name:7} {1000 * row['GB']:8.2f} MB {row['ms']:8.3f} ms {row['kB']:8.2f} kB    the paper's: {PAPER[name][0]} GB, {PAPER[name][1]} ms, {PAPER[name][2]} kB")
    checkpoint.write_json(Path(cfg.out) / "frozen_parts.json", {"resolution": side, "here": rows, "paper": {name: dict(zip(("GB", "ms", "kB"), row)) for name, row in PAPER.items()}})


if __name__ == "__main__":
    one_line_errors(lambda: main(parse_config(Config, description=__doc__)))
