"""Does a model trained on Fashion-MNIST draw what it is asked for? A classifier trained on the real pictures judges.

    apt-get install dataset-fashion-mnist       # Debian; or the four idx files from anywhere
    python train.py --stage all --data fashion-mnist:/usr/share/datasets/fashion-mnist --out runs/fashion --steps 900
    python experiments/fashion_mnist.py --data /usr/share/datasets/fashion-mnist --weights runs/fashion

Leaves experiments/results/fashion_mnist.json and fashion_mnist.png, a row a class.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import check_least, flag, one_line_errors, parse_config  # noqa: E402


@dataclass
class Config:
    data: str = flag("/usr/share/datasets/fashion-mnist", "folder with the idx files", "what")
    weights: str = flag("runs/fashion", "bundle to judge", "what")
    samples: int = flag(500, "pictures, in equal parts of the ten classes", "what")
    epochs: int = flag(2, "of the classifier over the 60,000 training pictures", "what")
    seed: int = flag(0, "of the classifier and the samples", "what")
    out: str = flag("experiments/results", "folder for the figures", "what")


def main(cfg):
    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch import nn

    import checkpoint
    from data import FashionMNIST
    from sample import generate, grid, save_png

    check_least(cfg, samples=10, epochs=1)
    torch.manual_seed(cfg.seed)
    net = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                        nn.Flatten(), nn.Linear(64 * 7 * 7, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10))

    def tensors(split):
        real = FashionMNIST(cfg.data, split=split)
        return torch.from_numpy(np.array(real.images)).float()[:, None] / 255, torch.from_numpy(np.array(real.labels)).long()

    images, labels = tensors("train")
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    for _ in range(cfg.epochs):
        for rows in torch.randperm(len(images)).split(128):
            optimizer.zero_grad()
            F.cross_entropy(net(images[rows]), labels[rows]).backward()
            optimizer.step()
    net.eval()

    with torch.no_grad():
        test_images, test_labels = tensors("val")
        real_accuracy = (net(test_images).argmax(1) == test_labels).float().mean().item()
        wanted = torch.arange(10).repeat_interleave(cfg.samples // 10)
        prompts = [f"a photo of a {FashionMNIST.NAMES[k][i % len(FashionMNIST.NAMES[k])]}" for i, k in enumerate(wanted.tolist())]
        bundle = checkpoint.load_bundle(cfg.weights)
        samples = torch.cat([generate(bundle, prompts[i:i + 100], seed=cfg.seed + i) for i in range(0, len(prompts), 100)])
        gray = samples.float().mean(-1)[:, None] / 255
        guesses = net(F.interpolate(gray, (28, 28), mode="bicubic", antialias=True)).argmax(1)
    agree = (guesses == wanted).float()
    result = {"agreement": agree.mean().item(), "by class": {FashionMNIST.NAMES[k][0]: agree[wanted == k].mean().item() for k in range(10)},
              "classifier on real test pictures": real_accuracy, "samples": len(samples), "weights": cfg.weights}
    print(result)
    out = Path(cfg.out)
    checkpoint.write_json(out / "fashion_mnist.json", result)
    rows = torch.cat([samples[wanted == k][:12] for k in range(10)])
    save_png(grid(rows, columns=12), out / "fashion_mnist.png", {"weights": cfg.weights})


if __name__ == "__main__":
    config = parse_config(Config, description=__doc__)
    one_line_errors(lambda: main(config))
