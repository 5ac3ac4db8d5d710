"""Data: captioned pictures (Sec. 5.2.2, 5.3.1).

`shapes` is the miniature's world, drawn from a scene description at any size: its pictures never run out, and
what a caption says can be checked by a program (evaluate.py). `folder:DIR` and `fashion-mnist:DIR` are real pictures.
Every data set here is indexed: `dataset[i]` -> Sample and `dataset.captions(i)` -> its (original, synthetic), functions of the seed and i alone.
"""

import gzip
import json
import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

# ---------------------------------------------------------------------------------------------------------------
# The world `shapes`: scenes. Lengths are in cells; a cell is a quarter of the picture's shorter side.

COLORS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220), "yellow": (245, 215, 40),
          "orange": (245, 130, 30), "purple": (140, 60, 190), "pink": (245, 130, 190), "cyan": (40, 200, 220)}
BACKGROUNDS = {"white": (250, 250, 250), "gray": (150, 150, 150), "black": (25, 25, 25), "beige": (228, 208, 168)}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LEVELS = ("lattice", "sizes", "jitter", "free")
RADII = {"small": 0.35, "medium": 0.42, "large": 0.46}
NUMBERS = ("zero", "a", "two", "three", "four")

# Never drawn in training, so that generalisation can be measured. Each shape and each color lacks one partner.
HELD_OUT_PAIRS = tuple((shape, list(COLORS)[(3 * i + 1) % 8]) for i, shape in enumerate(SHAPES))
HELD_OUT_WORDS = ("a", "x", "go", "up", "in", "hi", "cab", "cat", "sun", "red", "yes", "fox", "exit", "stop", "open", "taxi", "park",
                  "food", "wild", "quiz")


@dataclass(frozen=True)
class Thing:
    """One object of a scene: centre (x, y) from the top left corner, in cells. A sign has a word and no shape."""
    color: str
    x: float
    y: float
    shape: str = ""
    size: str = "medium"
    word: str = ""

    @property
    def half(self):
        """Half width and half height, in cells."""
        return (0.5 * len(self.word) - 0.04, 0.46) if self.word else (RADII[self.size],) * 2


@dataclass(frozen=True)
class Scene:
    background: str
    things: tuple[Thing, ...]
    columns: int = 4
    rows: int = 4


def cells(width, height):
    """(columns, rows) of a picture in pixels: 4 along the shorter side, more along the longer one."""
    short = min(width, height)
    return round(4 * width / short), round(4 * height / short)


def random_scene(rng, level="lattice", columns=4, rows=4, held_out=False):
    """A scene of the given level of difficulty; with `held_out`, of pairs and words that training never shows."""
    def attributes():
        while True:
            pair = SHAPES[rng.integers(8)], list(COLORS)[rng.integers(8)]
            if (pair in HELD_OUT_PAIRS) == held_out:
                return pair

    kind = rng.choice(["single", "group", "pair", "several", "sign"], p=[0.18, 0.22, 0.38, 0.10, 0.12])
    pairs = {"single": lambda: [attributes()],
             "group": lambda: [attributes()] * rng.integers(2, 5),
             "pair": lambda: distinct(attributes, 2),
             "several": lambda: distinct(attributes, rng.integers(3, 5)),
             "sign": lambda: [attributes()] * (rng.random() < 0.3)}[kind]()
    size = lambda: "medium" if level == "lattice" else ("small", "large")[rng.integers(2)]  # noqa: E731
    wanted = [Thing(color, 0, 0, shape, size()) for shape, color in pairs]
    if kind == "group" and rng.random() < 0.5:  # half of the groups are of one size
        wanted = [Thing(t.color, 0, 0, t.shape, wanted[0].size) for t in wanted]
    if kind == "sign":
        wanted = [Thing(attributes()[1], 0, 0, word=random_word(rng, held_out))] + wanted
    return Scene(list(BACKGROUNDS)[rng.integers(4)], place(rng, wanted, level, columns, rows), columns, rows)


def random_word(rng, held_out=False):
    """1 to 4 random letters, or one of the held-out words."""
    if held_out:
        return HELD_OUT_WORDS[rng.integers(len(HELD_OUT_WORDS))]
    while True:
        word = "".join(LETTERS[k] for k in rng.integers(26, size=rng.integers(1, 5)))
        if word not in HELD_OUT_WORDS:
            return word


def distinct(draw, n):
    """`n` different draws."""
    found = []
    while len(found) < n:
        new = draw()
        if new not in found:
            found.append(new)
    return found


def place(rng, things, level, columns, rows):
    """The things at places where no two touch: on cell centres (lattice, sizes), near them (jitter) or anywhere (free)."""
    while True:  # a fresh start whenever the things placed first leave no room
        placed = []
        for thing in things:
            for _ in range(50):
                moved = one_place(rng, thing, level, columns, rows)
                if not any(touching(moved, other) for other in placed):
                    placed.append(moved)
                    break
        if len(placed) == len(things):
            return tuple(placed)


def one_place(rng, thing, level, columns, rows):
    (hw, hh), width = thing.half, max(len(thing.word), 1)
    hw, hh = hw + 0.04, hh + 0.04  # a star's points reach beyond its radius
    if level == "free":
        x, y = rng.uniform(hw, columns - hw), rng.uniform(hh, rows - hh)
    else:
        x, y = rng.integers(columns - width + 1) + width / 2, rng.integers(rows) + 0.5
    if level == "jitter":
        x, y = np.clip(x + rng.uniform(-0.25, 0.25), hw, columns - hw), np.clip(y + rng.uniform(-0.25, 0.25), hh, rows - hh)
    return Thing(thing.color, float(x), float(y), thing.shape, thing.size, thing.word)


def touching(a, b, gap=0.09):
    return abs(a.x - b.x) < a.half[0] + b.half[0] + gap and abs(a.y - b.y) < a.half[1] + b.half[1] + gap


def twin(rng, scene):
    """A scene that differs in one respect: two things exchange places or colors, a group loses one, a single thing or word is another.
    What it shares with the scene is the bag of words, or nearly: a hard negative for CLIP (Yuksekgonul et al. 2023)."""
    things = list(scene.things)
    shapes = [k for k, t in enumerate(things) if t.shape]
    kinds = {(things[k].shape, things[k].color) for k in shapes}
    if len(kinds) > 1:
        i, j = distinct(lambda: shapes[rng.integers(len(shapes))], 2)
        a, b = things[i], things[j]
        recolored = replace(a, color=b.color), replace(b, color=a.color)
        exchanged = replace(a, shape=b.shape, color=b.color), replace(b, shape=a.shape, color=a.color)
        allowed = a.color != b.color and not any((t.shape, t.color) in HELD_OUT_PAIRS for t in recolored)
        things[i], things[j] = recolored if allowed and rng.random() < 0.5 else exchanged
    elif len(shapes) > 1:
        things.pop()
    else:
        t = things[0]
        things[0] = replace(t, word="".join(rng.permutation(list(t.word)))) if t.word else replace(t, color=other_color(rng, t))
        if things[0].word in HELD_OUT_WORDS:
            things[0] = t
    return replace(scene, things=tuple(things))


def other_color(rng, thing):
    return list(COLORS)[rng.choice([k for k, color in enumerate(COLORS) if color != thing.color and (thing.shape, color) not in HELD_OUT_PAIRS])]


def relation(a, b):
    """The word between a and b ('left of', 'right of', 'above', 'below') along the larger offset; None on a diagonal."""
    dx, dy = b.x - a.x, b.y - a.y
    if abs(abs(dx) - abs(dy)) < 0.25:
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


# ---------------------------------------------------------------------------------------------------------------
# Drawing

_angles = np.linspace(0, 2 * np.pi, 41)[:-1]
_star = np.where(np.arange(10) % 2, 0.5, 1.08)
OUTLINES = {  # unit radius, y down
    "square": [(-.86, -.86), (.86, -.86), (.86, .86), (-.86, .86)],
    "triangle": [(0, -1), (1, .85), (-1, .85)],
    "diamond": [(0, -1.05), (.75, 0), (0, 1.05), (-.75, 0)],
    "star": [(r * np.sin(k * np.pi / 5), -r * np.cos(k * np.pi / 5)) for k, r in enumerate(_star)],
    "cross": [(-.32, -1), (.32, -1), (.32, -.32), (1, -.32), (1, .32), (.32, .32), (.32, 1), (-.32, 1), (-.32, .32), (-1, .32),
              (-1, -.32), (-.32, -.32)],
    "heart": [(np.sin(a) ** 3, -(13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a)) / 16 - .08) for a in _angles],
}
SUPERSAMPLING = 4
_fonts = {}


def draw_shape(draw, shape, color, x, y, radius):
    """Fill `shape` with centre (x, y) and radius, in the pixels of `draw`."""
    if shape in ("circle", "ring"):
        box = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(box, outline=color, width=max(1, round(0.45 * radius)), fill=color if shape == "circle" else None)
    else:
        draw.polygon([(x + radius * px, y + radius * py) for px, py in OUTLINES[shape]], fill=color)


def ink(color):
    """The color of the letters on a board of `color`: whichever of black and white stands out."""
    return (255, 255, 255) if np.dot(COLORS[color], (0.3, 0.6, 0.1)) < 130 else (0, 0, 0)


def draw_sign(draw, sign, cell):
    """A board with a letter a cell, `cell` pixels wide each."""
    (hw, hh), size = sign.half, round(0.9 * cell)
    draw.rectangle([(sign.x - hw) * cell, (sign.y - hh) * cell, (sign.x + hw) * cell, (sign.y + hh) * cell], fill=COLORS[sign.color])
    font = _fonts.setdefault(size, ImageFont.load_default(size))  # Pillow's own, the same on every machine
    for k, letter in enumerate(sign.word.upper()):
        center = (sign.x + k - (len(sign.word) - 1) / 2) * cell, sign.y * cell
        draw.text(center, letter, fill=ink(sign.color), font=font, anchor="mm", stroke_width=cell // 40, stroke_fill=ink(sign.color))


def render(scene, width=64, height=64):
    """The scene as uint8 (height, width, 3), antialiased."""
    s = SUPERSAMPLING
    canvas = Image.new("RGB", (width * s, height * s), BACKGROUNDS[scene.background])
    draw, cell = ImageDraw.Draw(canvas), min(width, height) * s / 4
    for thing in scene.things:
        if thing.word:
            draw_sign(draw, thing, cell)
        else:
            draw_shape(draw, thing.shape, COLORS[thing.color], thing.x * cell, thing.y * cell, RADII[thing.size] * cell)
    return np.asarray(canvas.reduce(s))


# ---------------------------------------------------------------------------------------------------------------
# Captions: `original` is short and lossy, as alt-texts are; `synthetic` is dense and complete (Sec. 5.2.2)

def plural(shape):
    return shape + ("es" if shape == "cross" else "s")


def article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def listing(words):
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def named(thing, color=True):
    """'a red circle', 'a circle', 'a red sign that says cab'."""
    words = [thing.color] * color + [thing.shape or "sign that says " + thing.word]
    return article(" ".join(words))


def original_caption(scene, rng):
    """Colors may be left out and the background mostly is, but never an object."""
    things, color = scene.things, rng.random() < 0.5
    if len(things) > 1 and len({(t.shape, t.color, t.word) for t in things}) == 1:
        text = f"{NUMBERS[len(things)]} {things[0].color + ' ' if color else ''}{plural(things[0].shape)}"
    else:
        order = [things[k] for k in rng.permutation(len(things))]
        word = relation(*order) if len(order) == 2 and rng.random() < 0.75 else None
        names = [named(t, color) for t in order]
        text = f" {word} ".join(names) if word else listing(names)
    return text + (f" on {scene.background}" if rng.random() < 0.15 else "")


def where(thing, scene):
    """'top left', 'center', 'bottom': the ninth of the picture that holds the centre."""
    vertical = ("top", "", "bottom")[int(3 * thing.y / scene.rows)]
    horizontal = ("left", "", "right")[int(3 * thing.x / scene.columns)]
    return f"{vertical} {horizontal}".strip() or "center"


def synthetic_caption(scene):
    """Everything, in reading order: 'on white: red circle top left, blue square bottom'."""
    def described(t):
        size = "" if t.word or t.size == "medium" else t.size + " "
        return f"{size}{t.color} {t.shape or 'sign that says ' + t.word} {where(t, scene)}"
    things = sorted(scene.things, key=lambda t: (round(t.y), t.x))
    return f"on {scene.background}: " + ", ".join(map(described, things))


# ---------------------------------------------------------------------------------------------------------------
# Data sets

@dataclass(frozen=True)
class Sample:
    image: np.ndarray         # (H, W, 3) uint8
    original: str
    synthetic: str = ""       # "" where the source has one caption only

    def caption(self, rng, synthetic_share=0.5):
        """One of the captions: the synthetic one with probability `synthetic_share`, where there is one."""
        return self.synthetic if self.synthetic and rng.random() < synthetic_share else self.original


class Shapes:
    """The world above: as many scenes as one asks for, of one level or (`all`) of each in turn. No scene of another split
    is drawn from the same random numbers."""

    twins = False  # every scene at an odd index is the twin of the one before

    def __init__(self, level="lattice", width=64, height=64, split="train", seed=0):
        if level not in LEVELS + ("all",):
            raise ValueError(f"unknown level {level!r} of shapes; known: {', '.join(LEVELS)}, all")
        self.levels = LEVELS if level == "all" else (level,)
        self.width, self.height, self.seed = width, height, (seed, ("train", "val", "unseen").index(split))

    def __len__(self):
        return 2 ** 31

    def scene(self, index):
        if self.twins and index % 2:
            scene, rng = self.scene(index - 1)
            return twin(rng, scene), rng
        rng = np.random.default_rng((*self.seed, index))
        level = self.levels[(index // 2 if self.twins else index) % len(self.levels)]
        return random_scene(rng, level, *cells(self.width, self.height), held_out=self.seed[1] == 2), rng

    def captions(self, index):
        """(original, synthetic), without drawing."""
        scene, rng = self.scene(index)
        return original_caption(scene, rng), synthetic_caption(scene)

    def __getitem__(self, index):
        scene, rng = self.scene(index)
        return Sample(render(scene, self.width, self.height), original_caption(scene, rng), synthetic_caption(scene))


def fit(image, width, height):
    """A PIL image, upright and on white, scaled and centre-cropped to (height, width, 3) uint8."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB")
    scale = max(width / image.width, height / image.height)
    w, h = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    left, top = (w - width) // 2, (h - height) // 2
    return np.asarray(image.resize((w, h), Image.Resampling.LANCZOS).crop((left, top, left + width, top + height)))


class Folder:
    """Images of any size with captions: `name.txt` beside `name.png`, or lines {"file_name": ..., "text": ...} of metadata.jsonl.
    An unreadable image gives None; `skipped` names each."""

    SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}

    def __init__(self, folder, width=64, height=64, split="train", seed=0):
        root = Path(folder)
        if not root.is_dir():
            raise ValueError(f"{root} is no folder")
        self.width, self.height, self.skipped = width, height, {}
        pairs = sorted(self.pairs(root))
        if not pairs:
            raise ValueError(f"{root} holds no image with a caption (name.png + name.txt, or metadata.jsonl)")
        held_out = len(pairs) // 20  # every 20th picture is for validation
        self.items = [p for i, p in enumerate(pairs) if not held_out or (i % 20 == 19) == (split != "train")]

    def pairs(self, root):
        if (root / "metadata.jsonl").exists():
            for number, line in enumerate((root / "metadata.jsonl").read_bytes().splitlines(), 1):
                try:
                    row = json.loads(line)
                    yield root / row["file_name"], row["text"].strip()
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise ValueError(f"{root}/metadata.jsonl line {number} is no JSON object with file_name and text, both strings") from None
        else:
            for path in root.rglob("*"):
                if path.suffix.lower() in self.SUFFIXES and path.with_suffix(".txt").exists():
                    yield path, path.with_suffix(".txt").read_text("utf-8", errors="replace").strip()

    def __len__(self):
        return len(self.items)

    def captions(self, index):
        return self.items[index][1], ""

    def __getitem__(self, index):
        path, text = self.items[index]
        try:
            with Image.open(path) as image:
                return Sample(fit(image, self.width, self.height), text)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            self.skipped[str(path)] = str(error)
            return None


class FashionMNIST:
    """The idx files (`train-images-idx3-ubyte.gz` ...). Captions as the paper's for ImageNet (Sec. 5.1): "a photo of a <class name>",
    one of the class's names drawn at random."""

    NAMES = (("t-shirt", "top"), ("trouser", "pair of pants"), ("pullover", "sweater"), ("dress",), ("coat", "jacket"), ("sandal",), ("shirt",),
             ("sneaker",), ("bag", "handbag"), ("ankle boot", "boot"))

    def __init__(self, folder, width=64, height=64, split="train", seed=0):
        self.width, self.height, self.seed = width, height, seed
        stem = Path(folder) / ("train" if split == "train" else "t10k")
        self.images = self.idx(f"{stem}-images-idx3-ubyte", 3)
        self.labels = self.idx(f"{stem}-labels-idx1-ubyte", 1)
        if len(self.images) != len(self.labels):
            raise ValueError(f"{folder}: {len(self.images)} images but {len(self.labels)} labels")
        if self.labels.max(initial=0) >= len(self.NAMES):
            raise ValueError(f"{folder}: label {self.labels.max()}, but there are {len(self.NAMES)} classes")

    @staticmethod
    def idx(path, dimensions):
        """An array from an idx file, plain or gzipped: 2 zero bytes, type 8 (uint8), dimensions, sizes, data."""
        for candidate, opener in ((Path(path), open), (Path(path + ".gz"), gzip.open)):
            if candidate.exists():
                try:
                    with opener(candidate, "rb") as file:
                        raw = file.read()
                except (EOFError, zlib.error, gzip.BadGzipFile):
                    raw = b""
                head = 4 + 4 * dimensions
                shape = np.frombuffer(raw[4:head], ">i4").tolist() if raw[:4] == bytes((0, 0, 8, dimensions)) and len(raw) >= head else []
                if not shape or len(raw) != head + math.prod(shape):
                    raise ValueError(f"{candidate} is no idx file of {dimensions} dimensions, or truncated")
                return np.frombuffer(raw, np.uint8, offset=head).reshape(shape)
        raise ValueError(f"{path}[.gz] is not there")

    def __len__(self):
        return len(self.images)

    def captions(self, index):
        name = np.random.default_rng((self.seed, index)).choice(self.NAMES[self.labels[index]])
        return f"a photo of {article(str(name))}", ""

    def __getitem__(self, index):
        return Sample(fit(Image.fromarray(self.images[index]), self.width, self.height), *self.captions(index))


SOURCES = {"shapes": Shapes, "folder": Folder, "fashion-mnist": FashionMNIST}


def open_data(spec, width=64, height=64, split="train", seed=0):
    """The data set of a SPEC: `shapes[:LEVEL]`, `folder:DIR`, `fashion-mnist:DIR`. `split` is train or val (shapes also: unseen)."""
    name, _, argument = spec.partition(":")
    if name not in SOURCES:
        raise ValueError(f"unknown data {spec!r}; known: shapes[:LEVEL], folder:DIR, fashion-mnist:DIR")
    if name != "shapes" and not argument:
        raise ValueError(f"--data {name} needs a folder: {name}:DIR")
    return SOURCES[name](*[argument] * bool(argument), width=width, height=height, split=split, seed=seed)
