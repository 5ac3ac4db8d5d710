"""The world `shapes`, which the miniature learns: scenes, edits of them (App. D), pictures at any size, two captions (Sec. 5.2.2).

A scene is a description: its pictures never run out, and what a caption says of it can be checked by a program (evaluate.py).
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# ---------------------------------------------------------------------------------------------------------------
# Scenes. Lengths are in cells; a cell is a sixteenth of the picture, or nearly.

COLORS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220), "yellow": (245, 215, 40),
          "orange": (245, 130, 30), "purple": (140, 60, 190), "pink": (245, 130, 190), "cyan": (40, 200, 220)}
BACKGROUNDS = {"white": (250, 250, 250), "gray": (150, 150, 150), "black": (25, 25, 25), "beige": (228, 208, 168)}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LEVELS = ("lattice", "sizes", "jitter", "free")
KINDS = {"single": 0.15, "group": 0.2, "pair": 0.5, "several": 0.1, "sign": 0.05}  # of scenes: their shares
SIGNS = {"single": 0.1, "group": 0.2, "pair": 0.35, "several": 0.05, "sign": 0.3}  # where spelling is learned
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


ASPECTS = (3, 6), (3, 5), (4, 4), (5, 3), (6, 3)  # of about 16 whole cells, from 1:2 to 2:1


def cells(width, height):
    """(columns, rows) of a picture in pixels, about 16 in all: things are as large at every aspect ratio."""
    return max(1, round(4 * (width / height) ** 0.5)), max(1, round(4 * (height / width) ** 0.5))


def cell_side(width, height):
    """The side of a cell, in pixels."""
    columns, rows = cells(width, height)
    return min(width / columns, height / rows)


def random_scene(rng, level="lattice", columns=4, rows=4, held_out=False, kinds=KINDS):
    """A scene of the given level of difficulty. held_out: of pairs and words that no picture of the training has (True), of the others (False), or of any pairs (None).
    kinds: the share of each kind of scene."""
    def attributes():
        while True:
            pair = SHAPES[rng.integers(8)], list(COLORS)[rng.integers(8)]
            if held_out is None or (pair in HELD_OUT_PAIRS) == held_out:
                return pair

    kind = rng.choice(list(kinds), p=list(kinds.values()))
    pairs = {"single": lambda: [attributes()],
             "group": lambda: [attributes()] * rng.integers(2, 5),
             "pair": lambda: distinct(attributes, 2),
             "several": lambda: distinct(attributes, rng.integers(3, 5)),
             "sign": lambda: [attributes()] * (rng.random() < 0.3)}[kind]()
    wanted = [Thing(color, 0, 0, shape, random_size(rng, level)) for shape, color in pairs]
    if kind == "group" and rng.random() < 0.5:  # half of the groups are of one size
        wanted = [Thing(t.color, 0, 0, t.shape, wanted[0].size) for t in wanted]
    if kind == "sign":
        wanted = [Thing(attributes()[1], 0, 0, word=random_word(rng, held_out, min(columns, 4)))] + wanted
    return Scene(list(BACKGROUNDS)[rng.integers(4)], place(rng, wanted, level, columns, rows), columns, rows)


def random_size(rng, level):
    return "medium" if level == "lattice" else ("small", "large")[rng.integers(2)]


def random_word(rng, held_out=False, longest=4):
    """1 to `longest` random letters, or one of the held-out words."""
    if held_out:
        words = [word for word in HELD_OUT_WORDS if len(word) <= longest]
        return words[rng.integers(len(words))]
    while True:
        word = "".join(LETTERS[k] for k in rng.integers(26, size=rng.integers(1, longest + 1)))
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
            if moved := free_place(rng, thing, placed, level, columns, rows):
                placed.append(moved)
        if len(placed) == len(things):
            return tuple(placed)


def free_place(rng, thing, others, level, columns, rows, fits=lambda moved: True, attempts=50):
    """The thing where it touches none of the others and fits; or None."""
    for _ in range(attempts):
        moved = one_place(rng, thing, level, columns, rows)
        if not any(touching(moved, other) for other in others) and fits(moved):
            return moved


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
        mixed = "".join(rng.permutation(list(t.word)))
        things[0] = replace(t, color=other_color(rng, t)) if mixed == t.word or mixed in HELD_OUT_WORDS else replace(t, word=mixed)
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
# Edits of scenes (App. D): an instruction and what the scene then is. Each is made of a look, {(shape, color, word): [numbers of the things]}, or is None where it cannot be.

def looks(scene):
    found = {}
    for k, t in enumerate(scene.things):
        found.setdefault((t.shape, t.color, t.word), []).append(k)
    return found


def called(scene, look, members):
    """'the circle', 'the red circle' where there are others, 'the circles', 'the sign'."""
    shape, color, word = look
    noun = "sign" if word else plural(shape) if len(members) > 1 else shape
    alike = sum(other[0] == shape for other in looks(scene))
    return f"the {color} {noun}" if alike > 1 else f"the {noun}"


def changed(scene, members, **fields):
    return replace(scene, things=tuple(replace(t, **fields) if k in members else t for k, t in enumerate(scene.things)))


def recolor(rng, scene, look, members, level):
    color = other_color(rng, scene.things[members[0]])
    return f"make {called(scene, look, members)} {color}", changed(scene, members, color=color)


def exchange(rng, scene, look, members, level):
    shapes = [shape for shape in SHAPES if shape != look[0] and (shape, look[1]) not in HELD_OUT_PAIRS]
    shape = shapes[rng.integers(len(shapes))]
    return look[0] and (f"replace {called(scene, look, members)} with {article(shape) if len(members) == 1 else plural(shape)}", changed(scene, members, shape=shape))


def remove(rng, scene, look, members, level):
    left = tuple(t for k, t in enumerate(scene.things) if k not in members)
    return left and (f"remove {called(scene, look, members)}", replace(scene, things=left))


def add(rng, scene, look, members, level):
    color = list(COLORS)[rng.integers(8)]
    shapes = [shape for shape in SHAPES if (shape, color) not in HELD_OUT_PAIRS]
    size = random_size(rng, level)
    new = len(scene.things) < 4 and free_place(rng, Thing(color, 0, 0, shapes[rng.integers(len(shapes))], size), scene.things, level, scene.columns, scene.rows)
    return new and (f"add {named(new)} at the {where(new, scene)}", replace(scene, things=(*scene.things, new)))


def move(rng, scene, look, members, level):
    k, *more = members
    others, left = [t for j, t in enumerate(scene.things) if j != k], where(scene.things[k], scene)
    new = not more and free_place(rng, scene.things[k], others, level, scene.columns, scene.rows, fits=lambda moved: where(moved, scene) != left)
    return new and (f"move {called(scene, look, members)} to the {where(new, scene)}", changed(scene, members, x=new.x, y=new.y))


def respell(rng, scene, look, members, level):
    word = look[2] and "".join(LETTERS[k] for k in rng.integers(26, size=len(look[2])))
    return word not in ("", look[2], *HELD_OUT_WORDS) and (f"change the word to {word}", changed(scene, members, word=word))


EDITS = {"recolor": recolor, "replace": exchange, "remove": remove, "add": add, "move": move, "word": respell}


def edited(rng, scene, level="lattice"):
    """(kind, instruction, the scene after it): one thing, or all of one look, is changed, and nothing else."""
    while True:
        kind, found = list(EDITS)[rng.integers(len(EDITS))], looks(scene)
        look = list(found)[rng.integers(len(found))]
        if result := EDITS[kind](rng, scene, look, found[look], level):
            return kind, *result


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


@cache
def pillows_font(size):
    """The same on every machine."""
    return ImageFont.load_default(size)


def draw_sign(draw, sign, cell):
    """A board with a letter a cell, `cell` pixels wide each."""
    (hw, hh), size = sign.half, round(0.9 * cell)
    draw.rectangle([(sign.x - hw) * cell, (sign.y - hh) * cell, (sign.x + hw) * cell, (sign.y + hh) * cell], fill=COLORS[sign.color])
    font = pillows_font(size)
    for k, letter in enumerate(sign.word.upper()):
        center = (sign.x + k - (len(sign.word) - 1) / 2) * cell, sign.y * cell
        draw.text(center, letter, fill=ink(sign.color), font=font, anchor="mm", stroke_width=cell // 40, stroke_fill=ink(sign.color))


def render(scene, width=64, height=64):
    """The scene as uint8 (height, width, 3), antialiased."""
    s = SUPERSAMPLING
    canvas = Image.new("RGB", (width * s, height * s), BACKGROUNDS[scene.background])
    draw, cell = ImageDraw.Draw(canvas), cell_side(width, height) * s
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
    """Colors are left out three times of ten, how two things lie once, the background mostly, an object never."""
    things, color = scene.things, rng.random() < 0.7
    if len(things) > 1 and len({(t.shape, t.color, t.word) for t in things}) == 1:
        text = f"{NUMBERS[len(things)]} {things[0].color + ' ' if color else ''}{plural(things[0].shape)}"
    else:
        order = [things[k] for k in rng.permutation(len(things))]
        word = relation(*order) if len(order) == 2 and rng.random() < 0.9 else None
        names = [named(t, color) for t in order]
        text = f" {word} ".join(names) if word else listing(names)
    return text + (f" on {scene.background}" if rng.random() < 0.15 else "")


def where(thing, scene):
    """'top left', 'center', 'bottom': the ninth of the picture that holds the centre."""
    vertical = ("top", "", "bottom")[int(3 * thing.y / scene.rows)]
    horizontal = ("left", "", "right")[int(3 * thing.x / scene.columns)]
    return f"{vertical} {horizontal}".strip() or "center"


def synthetic_caption(scene, rng):
    """Everything, row by row (round() makes one of the lattice's middle rows); two things in either order, with their relation: 'on white: red circle top left, above blue square bottom'."""
    def described(t):
        size = "" if t.word or t.size == "medium" else t.size + " "
        return f"{size}{t.color} {t.shape or 'sign that says ' + t.word} {where(t, scene)}"
    things = sorted(scene.things, key=lambda t: (round(t.y), t.x))
    word = None
    if len(things) == 2 and all(t.shape for t in things):
        things = [things[k] for k in rng.permutation(2)]
        word = relation(*things)
    return f"on {scene.background}: " + (f", {word} " if word else ", ").join(map(described, things))
