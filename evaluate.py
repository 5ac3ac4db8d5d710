"""Evaluation: validation loss per noise level, CLIP score, FID on CLIP features, the six GenEval categories and typography on `shapes`.
(Sec. 5.1, 5.3.3)

    python evaluate.py                                   # the shipped miniature: 100 prompts a category, level lattice
    python evaluate.py --weights runs/mine --prompts 20 --level free
"""

import itertools
import json
import math
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm

import checkpoint
import shapes
from config import check_least, flag, one_line_errors, parse_config
from data import ShapeEdits, Shapes
from flow import shift
from pipeline import to_tensor
from sample import check_device, from_uint8, generate, grid, latent_channels, replace_mmdit, save_png, to_uint8
from text_encoders import CLIPLayer
from vae import psnr

# ---------------------------------------------------------------------------------------------------------------
# CLIP's image tower (Radford et al. 2021), with the names of the released checkpoints


class CLIPImageEncoder(nn.Module):
    """Images (B, 3, S, S) in [-1, 1], resized to `resolution`, -> embeddings (B, projection), not normalised. Released weights want CLIP's own mean and std, which are not applied here."""

    def __init__(self, resolution=224, patch_size=14, width=1024, layers=24, heads=16, projection=768):
        super().__init__()
        self.resolution = resolution
        body = self.vision_model = nn.Module()
        body.embeddings = nn.Module()
        body.embeddings.class_embedding = nn.Parameter(0.02 * torch.randn(width))
        body.embeddings.patch_embedding = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        body.embeddings.position_embedding = nn.Embedding((resolution // patch_size) ** 2 + 1, width)
        nn.init.normal_(body.embeddings.position_embedding.weight, std=0.02)
        body.pre_layrnorm = nn.LayerNorm(width)  # the released name, misspelt
        body.encoder = nn.Module()
        body.encoder.layers = nn.ModuleList(CLIPLayer(width, heads, 4 * width, "quick_gelu", causal=False) for _ in range(layers))
        body.post_layernorm = nn.LayerNorm(width)
        self.visual_projection = nn.Linear(width, projection, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images):
        body, size = self.vision_model, (self.resolution, self.resolution)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        x = body.embeddings.patch_embedding(images).flatten(2).transpose(1, 2)                  # (B, N, D)
        x = torch.cat([body.embeddings.class_embedding.expand(len(x), 1, -1), x], 1)            # (B, 1 + N, D)
        x = body.pre_layrnorm(x + body.embeddings.position_embedding.weight)
        for layer in body.encoder.layers:
            x = layer(x)
        return self.visual_projection(body.post_layernorm(x[:, 0]))                             # (B, P)


def clip_score(image_features, text_features):
    """Mean cosine between matching rows of two (N, P) tensors, in [-1, 1] (Hessel et al. 2021, without the factor 2.5)."""
    return F.cosine_similarity(image_features, text_features).mean().item()


def retrieval(image_features, text_features, ways=64):
    """Share of images that rank their own text first among `ways` texts; the rows are taken in groups of `ways`."""
    image, text = (F.normalize(f[: len(f) // ways * ways].unflatten(0, (-1, ways)), dim=-1) for f in (image_features, text_features))
    best = (image @ text.mT).argmax(-1)                                                         # (groups, ways)
    return (best == torch.arange(ways, device=best.device)).float().mean().item()


def frechet_distance(a, b):
    """Frechet distance between Gaussians fitted to two feature sets (N, P), (M, P) (Heusel et al. 2017); FID when the features are CLIP's.
    tr sqrt(S_a S_b) is the sum of the singular values of sqrt(S_a) sqrt(S_b)."""
    def root(x):
        values, vectors = torch.linalg.eigh(torch.cov(x.T))
        return vectors * values.clamp(min=0).sqrt() @ vectors.mT
    a, b = a.double(), b.double()
    ra, rb = root(a), root(b)
    cross = torch.linalg.svdvals(ra @ rb).sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + ra.square().sum() + rb.square().sum() - 2 * cross).item()


# ---------------------------------------------------------------------------------------------------------------
# The validation loss of Sec. 5.3.3


@torch.no_grad()
def validation_loss(network, formulation, latents, context, pooled, levels=8, seed=0, alpha=1.0):
    """One loss a level, at t equally spaced in (0, 1], then shifted by alpha (Eq. 23); the paper averages over all but the last, t = 1. The noise depends on the seed alone."""
    generator, losses = torch.Generator().manual_seed(seed), []
    for t in shift(torch.linspace(0, 1, levels + 1)[1:], alpha):
        eps = torch.randn(latents.shape, generator=generator)
        t = t.clamp(formulation.t_min, formulation.t_max).expand(len(latents))
        loss = formulation.loss(lambda z, s: network(z, s, context, pooled), latents, t=t, eps=eps)
        losses.append(loss.mean().item())
    return losses


# ---------------------------------------------------------------------------------------------------------------
# The detector of `shapes`: what a picture shows, by program. Tested on true renders (tests/test_evaluate.py).

PALETTE = np.array(list(shapes.COLORS.values()), float)
GROUNDS = np.array(list(shapes.BACKGROUNDS.values()), float)


def detect(image):
    """uint8 (H, W, 3) -> (background name, list of shapes.Thing), lengths in cells. What has no clear shape or color is given
    shape '?' or color '?': a blob counts as an object, but never as the right one."""
    pixels = image.astype(float)
    ground = np.median(pixels.reshape(-1, 3), 0)
    cell = shapes.cell_side(image.shape[1], image.shape[0])
    distance = np.sqrt(((pixels - ground) ** 2).sum(-1))
    around = np.lib.stride_tricks.sliding_window_view(np.pad(distance, 1), (3, 3)).max((2, 3))
    things = []
    for mask in components(distance > 50):
        board = sign(pixels, mask, cell)
        things += [board] if board else []
        for part in [] if board else components(mask & (distance > 0.6 * around)):  # the half-covered pixels between two neighbours join nothing
            if part.sum() > 0.03 * cell ** 2 and distance[part].max() > 75:  # smaller or fainter is a blemish, not an object
                board = part.any(1)[:, None] & part.any(0) & (distance > 0.5 * np.median(distance[part]))  # of a sign, the ink may be lost
                things.append(sign(pixels, board, cell) or shape(pixels, part, ground, distance, cell))
    boards = [t for t in things if t.word]  # counters of letters are not things of their own
    things = [t for t in things if t.word or not any(abs(t.x - b.x) < b.half[0] and abs(t.y - b.y) < b.half[1] for b in boards)]
    return list(shapes.BACKGROUNDS)[nearest(ground, GROUNDS)[0]], things


def shows(scene, background, things, tolerance=0.2, loose=()):
    """Are background and things just those of the scene: attributes, words, sizes and places (to `tolerance` cells, but for `loose` things, whose ninth of the picture counts)?"""
    def there(t, w):
        return shapes.where(t, scene) == shapes.where(w, scene) if w in loose else abs(t.x - w.x) < tolerance and abs(t.y - w.y) < tolerance

    left = list(things)
    for w in scene.things:
        fits = [t for t in left if (t.shape, t.color, t.word) == (w.shape, w.color, w.word) and w.size in (t.size, "medium") and there(t, w)]
        if not fits:
            return False
        left.remove(fits[0])
    return not left and background == scene.background


def components(mask):
    """The connected components (4 neighbours) of a boolean array, each as a boolean array of the same shape."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # every pixel takes the largest label around it until nothing changes
        padded = np.pad(labels, 1)
        grown = np.where(mask, np.maximum.reduce([padded[1:-1, 1:-1], padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2],
                                                  padded[1:-1, 2:]]), 0)
        if (grown == labels).all():
            return [labels == k for k in np.unique(labels) if k]
        labels = grown


def nearest(color, palette):
    """(index, Euclidean distance in 8-bit RGB) of the palette's nearest entry."""
    distances = np.sqrt(((palette - color) ** 2).sum(-1))
    return int(distances.argmin()), distances.min()


def palette_name(color, tolerance=60):
    index, distance = nearest(color, PALETTE)
    return list(shapes.COLORS)[index] if distance < tolerance else "?"


def coverage(pixels, ground, color):
    """How far each pixel lies on the way from `ground` to `color`, in [0, 1]: the antialiased mask of a flat shape."""
    direction = color - ground
    return np.clip((pixels - ground) @ direction / (direction @ direction), 0, 1)


@lru_cache(None)
def template_moments(name):
    """(area, centre x, centre y) of a shape of unit radius about its origin."""
    size = 200
    alpha = template(name, size / 2, size / 2, size / 2 / 1.1, size, size, 1)
    ys, xs = np.mgrid[:size, :size] + 0.5
    area = alpha.sum()
    return tuple(m / (size / 2.2) for m in (area / (size / 2.2), (alpha * xs).sum() / area - size / 2, (alpha * ys).sum() / area - size / 2))


def template(name, x, y, radius, width, height, s=shapes.SUPERSAMPLING):
    """The antialiased mask (height, width) of a shape."""
    canvas = Image.new("L", (width * s, height * s))
    shapes.draw_shape(ImageDraw.Draw(canvas), name, 255, x * s, y * s, radius * s)
    return np.asarray(canvas.reduce(s) if s > 1 else canvas) / 255


def shape(pixels, mask, ground, distance, cell, least=0.8):
    """The Thing in a component: color of its core, and the shape whose template of equal area and centre overlaps most.
    Overlap = sum of minima / sum of maxima of the two masks; below `least` the shape is '?'."""
    core = mask & (distance >= 0.8 * np.quantile(distance[mask], 0.9))
    color = np.median(pixels[core], 0)
    ys, xs = np.nonzero(mask)
    top, bottom, left, right = max(ys.min() - 2, 0), ys.max() + 3, max(xs.min() - 2, 0), xs.max() + 3
    near = np.pad(mask, 1)  # the component and the antialiased rim around it
    near = near[1:-1, 1:-1] | near[:-2, 1:-1] | near[2:, 1:-1] | near[1:-1, :-2] | near[1:-1, 2:]
    alpha = (coverage(pixels, ground, color) * near)[top:bottom, left:right]
    height, width = alpha.shape
    area = alpha.sum()
    ys, xs = np.mgrid[:height, :width] + 0.5
    x, y = (alpha * xs).sum() / area, (alpha * ys).sum() / area

    def fitted(name):
        unit_area, cx, cy = template_moments(name)
        radius = math.sqrt(area / unit_area)
        other = template(name, x - cx * radius, y - cy * radius, radius, width, height)
        return np.minimum(alpha, other).sum() / np.maximum(alpha, other).sum(), radius

    overlap, radius, name = max((*fitted(name), name) for name in shapes.SHAPES)
    size = min(shapes.RADII, key=lambda k: abs(shapes.RADII[k] - radius / cell))
    return shapes.Thing(palette_name(color), (x + left) / cell, (y + top) / cell, name if overlap > least else "?", size)


def sign(pixels, mask, cell):
    """The sign in a component, or None: a board a cell high and a whole number of cells wide, with ink on it."""
    ys, xs = np.nonzero(mask)
    top, bottom, left, right = ys.min(), ys.max() + 1, xs.min(), xs.max() + 1
    height, letters = (bottom - top) / cell, round((right - left) / cell + 0.08)
    if not (0.8 < height < 1.1 and 1 <= letters <= 4 and abs(right - left - (letters - 0.08) * cell) < 0.25 * cell):
        return None
    full = mask[top:bottom, left:right]
    edges = full[1] | full[2], full[-2] | full[-3], full[:, 1] | full[:, 2], full[:, -2] | full[:, -3]
    if min(edge.mean() for edge in edges) < 0.8 or not full[[1, 1, -2, -2], [1, -2, 1, -2]].all():  # four straight edges, four corners
        return None
    board = pixels[top:bottom, left:right]
    color = palette_name(np.median(np.concatenate([board[1:3].reshape(-1, 3), board[-3:-1].reshape(-1, 3)]), 0))  # where no ink is
    if color == "?":
        return None
    alpha = coverage(board, np.array(shapes.COLORS[color], float), np.array(shapes.ink(color), float))
    margin = round(0.15 * cell)
    if alpha[margin:-margin, margin:-margin].mean() < 0.04:
        return None
    word = "".join(read_letter(alpha, k, letters, cell) for k in range(letters))
    return shapes.Thing(color, (left + right) / 2 / cell, (top + bottom) / 2 / cell, word=word)


@lru_cache(None)
def letter_template(letter, cell):
    """The ink (cell, cell) of a letter in the middle of its cell, with a margin of 2 pixels."""
    size, s = cell + 4, shapes.SUPERSAMPLING
    canvas = Image.new("RGB", (size * s, size * s))
    shapes.draw_sign(ImageDraw.Draw(canvas), shapes.Thing("blue", size / cell / 2, size / cell / 2, word=letter), cell * s)
    return coverage(np.asarray(canvas.reduce(s), float), np.array(shapes.COLORS["blue"], float), np.array(shapes.ink("blue"), float))


def read_letter(alpha, k, letters, cell):
    """The letter whose ink fits best in the k-th cell of a board, over shifts of up to 2 pixels."""
    height, width = alpha.shape
    size = round(cell)
    cx, cy = (k + 0.5) / letters * width, height / 2
    reach = round(0.38 * size)
    window = np.pad(alpha, size)[round(cy) - reach + size:round(cy) + reach + size, round(cx) - reach + size:round(cx) + reach + size]

    def error(letter, dx, dy):
        middle = (size + 4) // 2
        ink = letter_template(letter, size)[middle + dy - reach:middle + dy + reach, middle + dx - reach:middle + dx + reach]
        return ((ink - window) ** 2).sum()

    return min((error(letter, dx, dy), letter) for letter in shapes.LETTERS for dx in (-2, -1, 0, 1, 2) for dy in (-1, 0, 1))[1]


# ---------------------------------------------------------------------------------------------------------------
# GenEval's six categories (Ghosh et al. 2023) on `shapes`, and typography

CATEGORIES = ("single object", "two objects", "counting", "colors", "position", "color attribution")
KINDS = (*CATEGORIES, "typography")      # of prompts


@dataclass(frozen=True)
class Task:
    """A prompt and what its picture must show: each wanted thing (any color where color is ''), and how the first two lie."""
    category: str
    prompt: str
    wanted: tuple[shapes.Thing, ...]
    relation: str = ""


def tasks(category, n, seed=0, unseen=False):
    """`n` prompts of one of KINDS, with (shape, color) pairs and words seen in training, or only unseen ones."""
    rng = np.random.default_rng((seed, KINDS.index(category), unseen))
    return [task(category, rng, unseen) for _ in range(n)]


def task(category, rng, unseen):
    def pick(color=True):
        while True:
            shape, name = shapes.SHAPES[rng.integers(8)], list(shapes.COLORS)[rng.integers(8)]
            if ((shape, name) in shapes.HELD_OUT_PAIRS) == unseen:
                return shapes.Thing(name if color else "", 0, 0, shape)

    def two(color):
        a, b = pick(color), pick(color)
        return (a, b) if a.shape != b.shape else two(color)

    if category == "typography":
        word = shapes.random_word(rng, held_out=unseen)
        return Task(category, f"a sign that says {word}", (shapes.Thing("", 0, 0, word=word),))
    if category in ("single object", "colors"):
        things = (pick(category == "colors" or unseen),)
        return Task(category, shapes.named(things[0], bool(things[0].color)), things)
    if category == "counting":
        count, thing = int(rng.integers(2, 5)), pick()
        return Task(category, f"{shapes.NUMBERS[count]} {thing.color} {shapes.plural(thing.shape)}", (thing,) * count)
    things = two(category == "color attribution" or unseen)
    names = [shapes.named(t, bool(t.color)) for t in things]
    if category == "position":
        word = ("left of", "right of", "above", "below")[rng.integers(4)]
        return Task(category, f" {word} ".join(names), things, word)
    return Task(category, " and ".join(names), things)


def judge(task, things):
    """(exact, geneval): is the picture of `things` just what the task wants, and does it pass by GenEval's own rule,
    which forgives further objects except in counting?"""
    matches = assign(task.wanted, things)
    if matches is None:
        return False, False
    right = not task.relation or related(matches[0], matches[1], task.relation)
    exact = len(things) == len(task.wanted)
    return right and exact, right and (exact or task.category != "counting")


def assign(wanted, things):
    """A different thing for each wanted one, or None. Wanted things are alike or differ in shape, so first come serves all."""
    left, found = list(things), []
    for w in wanted:
        fits = [t for t in left if t.shape == w.shape and t.word == w.word and w.color in ("", t.color)]
        if not fits:
            return None
        found.append(fits[0])
        left.remove(fits[0])
    return found


def related(a, b, word, threshold=0.5):
    """GenEval's rule: the centres differ in the named direction by more than a threshold (here half a cell)."""
    return {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}[word] > threshold


def starts(n, batch_size):
    """Where the batches of n pictures begin; a bar on a terminal."""
    return tqdm(range(0, n, batch_size), "drawing", leave=False, unit="batch", disable=not sys.stderr.isatty())


def geneval(bundle, n, seed=0, unseen=False, categories=CATEGORIES, batch_size=128, **settings):
    """({category: exact success, ..., 'overall': mean, 'geneval': mean by GenEval's rule}, [(task, image, success), ...]) over n prompts a category."""
    todo = [t for category in categories for t in tasks(category, n, seed, unseen)]
    results = []
    for start in starts(len(todo), batch_size):
        part = todo[start:start + batch_size]
        images = generate(bundle, [t.prompt for t in part], seed=seed * 100_000 + start, **settings)
        results += [(t, image, judge(t, detect(image.numpy())[1])) for t, image in zip(part, images)]
    scores = {c: float(np.mean([exact for t, _, (exact, _) in results if t.category == c])) for c in categories}
    scores["overall"] = float(np.mean(list(scores.values())))
    scores["geneval"] = float(np.mean([loose for _, _, (_, loose) in results]))
    return scores, results


def typography(bundle, n, seed=0, unseen=False, **settings):
    """{'letters': share of letters read back in their place, 'words': share of whole words}, over n signs."""
    _, results = geneval(bundle, n, seed, unseen, categories=("typography",), **settings)
    right = total = 0
    for t, image, _ in results:
        word = t.wanted[0].word
        read = next((thing.word for thing in detect(image.numpy())[1] if thing.word), "")
        right += sum(a == b for a, b in zip(word, read))
        total += len(word)
    return {"letters": right / total, "words": float(np.mean([exact for *_, (exact, _) in results]))}


# ---------------------------------------------------------------------------------------------------------------
# Edits of held-out scenes (App. D)

def edit_right(kind, before, after, background, things):
    """Does a picture show the edited scene: what was touched as the instruction says, all else where and as it was?"""
    touched = [t for t in after.things if t not in before.things]
    return shows(after, background, things, loose=touched if kind in ("add", "move") else ())


def edits(bundle, n, level="lattice", seed=0, batch_size=64, width=None, height=None, **settings):
    """({kind of edit: share that is right, 'edits': their mean}, [(instruction, picture, its edit, right), ...]) over n held-out edits a kind."""
    size = {name: side or bundle.config["resolution"] for name, side in (("width", width), ("height", height))}
    world = ShapeEdits(level, **size, split="val", seed=seed)
    left, todo = dict.fromkeys(shapes.EDITS, n), []
    for i in itertools.count():
        before, kind, instruction, after = world.edit(i)
        if left[kind]:
            left[kind] -= 1
            todo.append((before, kind, instruction, after))
        if not any(left.values()):
            break
    results, right = [], {kind: [] for kind in shapes.EDITS}
    for start in starts(len(todo), batch_size):
        part = todo[start:start + batch_size]
        pictures = torch.from_numpy(np.stack([shapes.render(before, **size) for before, *_ in part]))
        images = generate(bundle, [instruction for _, _, instruction, _ in part], seed=seed * 100_000 + start, edit=from_uint8(pictures), **size, **settings)
        for (before, kind, instruction, after), picture, image in zip(part, pictures, images):
            right[kind].append(edit_right(kind, before, after, *detect(image.numpy())))
            results.append((instruction, picture, image, right[kind][-1]))
    scores = {kind: float(np.mean(values)) for kind, values in right.items()}
    return {**scores, "edits": float(np.mean(list(scores.values())))}, results


# ---------------------------------------------------------------------------------------------------------------
# The frozen parts, on held-out scenes


def held_out(level, n, width, height):
    """(scenes, images (N, 3, H, W) in [-1, 1], synthetic captions) of the validation split of shapes."""
    world = Shapes(level, width, height, split="val")
    samples = [world[i] for i in range(n)]
    return [world.scene(i)[0] for i in range(n)], to_tensor(samples), [sample.synthetic for sample in samples]


@torch.inference_mode()
def autoencoder(bundle, level, n=256):
    """{'psnr': mean dB, 'detector': share of reconstructions that the detector reads just as the scene}."""
    scenes, images, _ = held_out(level, n, *[bundle.config["resolution"]] * 2)
    recon = torch.cat([bundle.vae.decode(bundle.vae.to_latents(batch.to(bundle.device), sample=False)).clamp(-1, 1).cpu() for batch in images.split(64)])
    right = [shows(scene, *detect(image.numpy())) for scene, image in zip(scenes, to_uint8(recon))]
    return {"psnr": psnr(recon, images).mean().item(), "detector": float(np.mean(right))}


@lru_cache(1)
def image_tower(folder, device):
    return checkpoint.load_part(folder, "clip_image", device, CLIPImageEncoder)


@torch.inference_mode()
def clip_features(bundle, images, captions):
    """Of both towers side by side: image features and text features (N, widths of L and G), each half normalised."""
    tower = image_tower(bundle.folder, bundle.device)
    _, pooled = bundle.text.encode(captions, ("clip_l", "clip_g"))
    halves = [bundle.text.sizes.clip_l, bundle.text.sizes.clip_g]
    image = torch.cat([tower(batch.to(bundle.device)).cpu() for batch in images.split(256)])
    return tuple(torch.cat([F.normalize(half, dim=1) for half in x.split(halves, 1)], 1) for x in (image, pooled.cpu()))


def clip_and_fid(bundle, level, n=512, seed=0, **settings):
    """{'retrieval': 64-way on true pictures, 'clip_score': of samples, 'clip_score_real': of true pictures, 'fid': of samples against true pictures, both of held-out captions}."""
    _, images, captions = held_out(level, n, *(settings.get(side) or bundle.config["resolution"] for side in ("width", "height")))
    real, text = clip_features(bundle, images, captions)
    samples = torch.cat([generate(bundle, captions[i:i + 128], seed=seed + i, **settings) for i in starts(n, 128)])
    fake, _ = clip_features(bundle, from_uint8(samples), captions)
    return {"retrieval": retrieval(real, text), "clip_score": clip_score(fake, text), "clip_score_real": clip_score(real, text),
            "fid": frechet_distance(real, fake)}


# ---------------------------------------------------------------------------------------------------------------

def is_shapes(config):
    """Does a bundle's config say that the MM-DiT knows the world that a program can judge?"""
    return str(config.get("data", "")).startswith(("shapes", "shape-edits"))


@dataclass
class EvaluateConfig:
    weights: str = flag("weights/mini", "a bundle folder", "what")
    mmdit: str = flag("", "an MM-DiT checkpoint of train.py to use in place of the bundle's", "what")
    level: str = flag("lattice", "level of shapes for the frozen parts, CLIP score and FID", "what", choices=shapes.LEVELS)
    prompts: int = flag(100, "prompts a category", "what")
    seed: int = flag(0, "of prompts and noise", "what")
    quick: bool = flag(False, "the six categories only", "what")
    out: str = flag("", "folder for the scores (JSON) and a grid of each category (PNG)", "what")
    steps: int = flag(0, "steps of the sampler; 0: the bundle's", "sampling")
    cfg: float = flag(-1.0, "guidance scale; -1: the bundle's", "sampling")
    shift: float = flag(0.0, "timestep shift; 0: the bundle's", "sampling")
    t_last: float = flag(-1.0, "where the last step begins; -1: the bundle's", "sampling")
    sampler: str = flag("", "solver; empty: the bundle's", "sampling")
    noise: float = flag(-1.0, "of stochastic samplers; -1: the bundle's with its own sampler, 1 with another", "sampling")
    width: int = flag(0, "of the samples; 0: the bundle's", "sampling", unit="pixels")
    height: int = flag(0, "likewise", "sampling", unit="pixels")
    device: str = flag("cpu", "cpu, cuda, mps", "machine")


def evaluate_edits(bundle, cfg, sampling):
    """Of a model that `train.py --stage edit` made: its edits alone."""
    scores, results = edits(bundle, cfg.prompts, cfg.level, cfg.seed, **sampling)
    print(json.dumps(scores, indent=1))
    if cfg.out:
        shown = [x for _, picture, image, _ in results[:48] for x in (picture, image)]
        save_png(grid(torch.stack(shown), columns=12), Path(cfg.out) / "edits.png", {"prompts": "\n".join(instruction for instruction, *_ in results[:48])})
        checkpoint.write_json(Path(cfg.out) / "scores.json", scores)


def main():
    cfg = parse_config(EvaluateConfig, description=__doc__)
    check_least(cfg, prompts=1, seed=0)
    check_device(cfg.device)
    if cfg.out:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)        # before the work, not after
    bundle = checkpoint.load_bundle(cfg.weights, cfg.device)
    if not is_shapes(bundle.config):
        raise ValueError(f"{cfg.weights} was trained on {bundle.config.get('data', 'other pictures')}; what is counted here are the things of `shapes`")
    if cfg.mmdit:
        replace_mmdit(bundle, cfg.mmdit)
    sampling = {name: getattr(cfg, name) for name in ("steps", "cfg", "shift", "t_last", "sampler", "noise")} | {name: getattr(cfg, name) or None for name in ("width", "height")}
    if latent_channels(bundle.mmdit)[1]:
        return evaluate_edits(bundle, cfg, sampling)
    if not cfg.quick and not (bundle.folder / "clip_image.json").exists():
        raise ValueError(f"{cfg.weights} holds no clip_image, which sees the pictures for CLIP's score: --quick does without")
    scores = {}

    def keep():
        if cfg.out:
            checkpoint.write_json(Path(cfg.out) / "scores.json", scores)
    for name, unseen in (("seen pairs", False), ("unseen pairs", True)):
        scores[name], results = geneval(bundle, cfg.prompts, cfg.seed, unseen, **sampling)
        print(name, json.dumps(scores[name], indent=1))
        if cfg.out:
            for category in CATEGORIES:
                shown = [image for t, image, _ in results if t.category == category][:32]
                save_png(grid(torch.stack(shown), columns=8), Path(cfg.out) / f"{name}-{category}.png".replace(" ", "-"), {"category": category})
        keep()
    if not cfg.quick:
        scores["typography"] = {name: typography(bundle, cfg.prompts, cfg.seed, unseen, **sampling) for name, unseen in
                                (("random letters", False), ("unseen words", True))}
        keep()
        scores["autoencoder"] = autoencoder(bundle, cfg.level)
        scores["clip"] = clip_and_fid(bundle, cfg.level, seed=cfg.seed, **sampling)
        print(json.dumps({name: scores[name] for name in ("typography", "autoencoder", "clip")}, indent=1))
        keep()


if __name__ == "__main__":
    one_line_errors(main)
