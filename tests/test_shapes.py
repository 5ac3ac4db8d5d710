"""shapes.py: scenes, what training never sees, pictures, captions, edits."""

import re
from collections import Counter

import numpy as np
import pytest

import shapes
from data import Shapes, open_data
from shapes import BACKGROUNDS, COLORS, HELD_OUT_PAIRS, HELD_OUT_WORDS, LEVELS, SHAPES, Scene, Thing, relation, render

SIZES = [(64, 64), (128, 64), (64, 96), (48, 96)]


def scenes(n, level="all", width=64, height=64, split="train", seed=0):
    world = Shapes(level, width, height, split, seed)
    return [world.scene(i)[0] for i in range(n)]


# ---- scenes

def test_a_sample_is_a_function_of_seed_split_and_index():
    a, b = Shapes("all", 32, 32), Shapes("all", 32, 32)
    later = [b[i] for i in reversed(range(8))][::-1]
    for i in range(8):
        assert (a[i].image == later[i].image).all() and (a[i].original, a[i].synthetic) == (later[i].original, later[i].synthetic)
    assert scenes(20) != scenes(20, seed=1) and scenes(20) != scenes(20, split="val")
    assert len({*scenes(200)}) > 190


def extent(thing):
    """Left, top, right, bottom in cells, from the outline itself."""
    if thing.word:
        (left, top), (right, bottom) = (-thing.half[0], -thing.half[1]), thing.half
    else:
        points = np.array(shapes.OUTLINES.get(thing.shape, [(-1, -1), (1, 1)])) * shapes.RADII[thing.size]
        (left, top), (right, bottom) = points.min(0), points.max(0)
    return thing.x + left, thing.y + top, thing.x + right, thing.y + bottom


@pytest.mark.parametrize("width, height", SIZES)
@pytest.mark.parametrize("level", LEVELS)
def test_things_lie_inside_the_picture_and_do_not_touch(level, width, height):
    for scene in scenes(300, level, width, height):
        assert (scene.columns, scene.rows) == {(64, 64): (4, 4), (128, 64): (6, 3), (64, 96): (3, 5), (48, 96): (3, 6)}[width, height]
        boxes = [extent(t) for t in scene.things]
        assert 1 <= len(boxes) <= 4
        for i, (left, top, right, bottom) in enumerate(boxes):
            assert min(left, top) > 0 and right < scene.columns and bottom < scene.rows, scene
            for l, t, r, b in boxes[:i]:
                assert max(l - right, left - r, t - bottom, top - b) > 0, scene


def test_a_twin_differs_in_one_respect_and_shows_nothing_held_out():
    world = Shapes("all")
    world.twins = True
    changes = Counter()
    for i in range(0, 1200, 2):
        scene, other = world.scene(i)[0], world.scene(i + 1)[0]
        before, after = scene.things, other.things
        assert scene != other and scene.background == other.background and len(before) - len(after) in (0, 1)
        assert not any((t.shape, t.color) in HELD_OUT_PAIRS or t.word in HELD_OUT_WORDS for t in after)
        assert all((a.x, a.y, a.size) == (b.x, b.y, b.size) for a, b in zip(before, after))
        changed = [(a, b) for a, b in zip(before, after) if a != b]
        if len(before) != len(after):
            assert len({(t.shape, t.color) for t in before}) == 1 and not changed
            changes["fewer"] += 1
        elif len(changed) == 2:
            (a, c), (b, d) = changed
            assert (c.color, d.color) == (b.color, a.color) and (c.shape, d.shape) in ((a.shape, b.shape), (b.shape, a.shape))
            changes["colors" if (c.shape, d.shape) == (a.shape, b.shape) else "places"] += 1
        elif changed:
            (a, b), = changed
            assert (a.word and sorted(a.word) == sorted(b.word)) or a.color != b.color
            changes["another"] += 1
    assert len(changes) == 4 and min(changes.values()) > 40 and sum(changes.values()) == 600, changes


def test_levels_are_what_they_say():
    by_level = {level: [t for s in scenes(200, level) for t in s.things if t.shape] for level in LEVELS}
    on_lattice = {level: all(t.x % 1 == t.y % 1 == 0.5 for t in things) for level, things in by_level.items()}
    assert on_lattice == {"lattice": True, "sizes": True, "jitter": False, "free": False}
    assert {t.size for t in by_level["lattice"]} == {"medium"} and all({t.size for t in by_level[level]} == {"small", "large"} for level in LEVELS[1:])
    offsets = [max(abs(t.x % 1 - 0.5), abs(t.y % 1 - 0.5)) for t in by_level["jitter"]]
    assert max(offsets) <= 0.25 and max(max(abs(t.x % 1 - 0.5), abs(t.y % 1 - 0.5)) for t in by_level["free"]) > 0.4


def test_everything_occurs():
    world = scenes(2000)
    things = [t for s in world for t in s.things]
    assert {s.background for s in world} == {*BACKGROUNDS} and {t.color for t in things} == {*COLORS}
    assert {t.shape for t in things if not t.word} == {*SHAPES} and {len(t.word) for t in things} == {0, 1, 2, 3, 4}
    assert len({(t.shape, t.color) for t in things if not t.word}) == 8 * 8 - len(HELD_OUT_PAIRS)
    assert {len(s.things) for s in world} == {1, 2, 3, 4}


# ---- what training never sees

def test_held_out_pairs_take_each_shape_and_color_once():
    assert len(HELD_OUT_PAIRS) == len({shape for shape, _ in HELD_OUT_PAIRS}) == len({color for _, color in HELD_OUT_PAIRS}) == 8
    assert {len(word) for word in HELD_OUT_WORDS} == {1, 2, 3, 4}


@pytest.mark.parametrize("split", ["train", "val", "unseen"])
def test_held_out_pairs_and_words(split):
    things = [t for s in scenes(4000, split=split) for t in s.things]
    pairs, words = {(t.shape, t.color) for t in things if not t.word}, {t.word for t in things if t.word}
    if split == "unseen":
        assert pairs == {*HELD_OUT_PAIRS} and words == {*HELD_OUT_WORDS}
    else:
        assert not pairs & {*HELD_OUT_PAIRS} and not words & {*HELD_OUT_WORDS} and len(words) > 100


# ---- pictures

def halved(image):
    return image.reshape(image.shape[0] // 2, 2, image.shape[1] // 2, 2, 3).mean((1, 3))


@pytest.mark.parametrize("width, height", SIZES)
def test_pictures_scale_with_their_size(width, height):
    for scene in scenes(12, width=width, height=height):
        small, large = render(scene, width, height), render(scene, 2 * width, 2 * height)
        assert small.shape == (height, width, 3) and small.dtype == np.uint8
        difference = np.abs(small - halved(large))
        assert difference.mean() < 1.5 and np.median(difference) == 0, scene


def test_pictures_show_the_named_colors_and_smooth_edges():
    for shape in SHAPES:
        image = render(Scene("white", (Thing("blue", 2, 2, shape),)), 128, 128)
        colors = Counter(map(tuple, image.reshape(-1, 3).tolist()))
        assert {color for color, _ in colors.most_common(2)} == {BACKGROUNDS["white"], COLORS["blue"]}
        assert len(colors) > (2 if shape in ("square", "cross") else 8)          # the others' edges are slanted
        covered = np.argwhere((image != BACKGROUNDS["white"]).any(-1))
        assert (covered.min(0) >= 47).all() and (covered.max(0) <= 81).all()      # within half a cell of 32 pixels, and a pixel, of the centre


# ---- captions

NAMES = "|".join(SHAPES)
ITEM = rf"(an?|two|three|four) (?:({'|'.join(COLORS)}) )?(?:({NAMES})(?:s|es)?|sign that says ([a-z]+))"
BETWEEN = "(, | and | left of | right of | above | below )"
NUMBER = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}


def test_original_captions_lose_colors_but_no_object():
    texts = []
    for i in range(2000):
        scene, rng = Shapes("all").scene(i)
        text = shapes.original_caption(scene, rng)
        match = re.fullmatch(rf"{ITEM}(?:{BETWEEN}{ITEM})*(?: on ({'|'.join(BACKGROUNDS)}))?", text)
        assert match and (match[10] or scene.background) == scene.background, text
        items = [item.groups() for item in re.finditer(ITEM, text)]
        colored = items[0][1] is not None
        named = Counter()
        for number, color, shape, word in items:
            named[color or "", shape or "", word or ""] += NUMBER[number]
        assert named == Counter((t.color if colored else "", t.shape, t.word) for t in scene.things), (text, scene)
        assert all(bool(re.match("an [aeiou]|a [^aeiou]", part)) for part in re.findall(r"\ban? \w+", re.sub("says [a-z]+", "", text))), text
        texts.append((text, colored, bool(match[10])))
    assert 0.65 < np.mean([colored for _, colored, _ in texts]) < 0.75 and 0.1 < np.mean([ground for *_, ground in texts]) < 0.2


def test_synthetic_captions_are_complete():
    item = re.compile(rf"(?:(small|large) )?({'|'.join(COLORS)}) (?:({NAMES})|sign that says ([a-z]+)) (center|(?:top|bottom)? ?(?:left|right)?)")

    def place(t, s):
        across = "left" if t.x < s.columns / 3 else "right" if t.x > 2 * s.columns / 3 else ""
        down = "top" if t.y < s.rows / 3 else "bottom" if t.y > 2 * s.rows / 3 else ""
        return " ".join(filter(None, (down, across))) or "center"

    rng, words = np.random.default_rng(0), Counter()
    for scene in scenes(1500) + scenes(300, width=128) + scenes(300, split="unseen"):
        text = shapes.synthetic_caption(scene, rng)
        ground, described = re.fullmatch(r"on (\w+): (.+)", text).groups()
        first, *second = parts = re.split(", left of |, right of |, above |, below |, ", described)
        said = Counter(item.fullmatch(part).groups("") for part in parts)
        by_name = {t.shape: t for t in scene.things if t.shape}
        if len(by_name) == len(parts) == 2:
            word = described[len(first) + 2:-len(second[0])].strip() or None
            assert word == shapes.relation(*(by_name[item.fullmatch(part)[3]] for part in parts)), text
            words[word] += 1
        assert ground == scene.background
        assert said == Counter(("" if t.word or t.size == "medium" else t.size, t.color, t.shape, t.word, place(t, scene)) for t in scene.things), text
    assert min(words[word] for word in ("left of", "right of", "above", "below")) > 0.15 * words.total()      # told from either thing


def test_relation_words_are_true():
    seen = set()
    for i in range(3000):
        scene, rng = Shapes("all", 128, 64).scene(i)
        text = shapes.original_caption(scene, rng)
        word = re.search("left of|right of|above|below", re.sub("says [a-z]+", "says x", text))
        if word and len({t.shape for t in scene.things}) == 2:
            first, second = sorted(scene.things, key=lambda t: text.index(t.shape or "sign that says " + t.word))
            dx, dy = second.x - first.x, second.y - first.y
            assert {"left of": dx > abs(dy), "right of": -dx > abs(dy), "above": dy > abs(dx), "below": -dy > abs(dx)}[word[0]], (text, scene)
            seen.add(word[0])
    assert len(seen) == 4


def test_pairs_are_mostly_told_with_colors_and_how_they_lie():
    world = Shapes()
    said = Counter()
    for i in range(600):
        things, original = world.scene(i)[0].things, world.captions(i)[0]
        if len(things) != 2 or things[0].shape == things[1].shape and things[0].color == things[1].color:
            continue
        a, b = things
        said["pairs"] += 1
        told = re.search(" left of | right of | above | below ", original)
        assert bool(told) <= bool(relation(a, b)) and world[i].original == original
        said[bool(told)] += 1
        said["colors"] += a.color in original and b.color in original
    assert 270 < said["pairs"] < 350 and 0.6 < said[True] / said["pairs"] < 0.85 and 0.6 < said["colors"] / said["pairs"] < 0.8


def test_relation_is_none_on_a_diagonal_and_turns_with_its_arguments():
    a, right, down, diagonal = Thing("red", 1, 1), Thing("red", 3, 1.5), Thing("red", 1, 2), Thing("red", 2, 2.1)
    assert (relation(a, right), relation(right, a), relation(a, down), relation(down, a)) == ("left of", "right of", "above", "below")
    assert relation(a, diagonal) is None


def test_plurals_and_articles():
    assert shapes.plural("cross") == "crosses" and shapes.plural("star") == "stars"
    assert shapes.article("orange ring") == "an orange ring" and shapes.listing(["a", "b", "c"]) == "a, b and c"


# ---- edits (App. D)

def test_edits_change_what_they_say_and_nothing_else():
    """Kind by kind; no pair and no word that training must not show."""
    world = open_data("shape-edits:all", 96, 64)
    kinds = Counter()
    for i in range(300):
        before, kind, instruction, after = world.edit(i)
        kinds[kind] += 1
        assert (before.background, before.columns, before.rows) == (after.background, after.columns, after.rows) == (before.background, 5, 3)
        kept = [t for t in before.things if t in after.things]
        gone, new = [t for t in before.things if t not in kept], [t for t in after.things if t not in kept]
        assert bool(gone) == (kind != "add") and bool(new) == (kind != "remove") and len({(t.shape, t.color, t.word) for t in gone or new}) == 1
        assert not any((t.shape, t.color) in HELD_OUT_PAIRS or t.word in HELD_OUT_WORDS for t in after.things)
        differ = {name for a, b in zip(gone, new) for name in ("color", "shape", "x", "y", "word", "size") if getattr(a, name) != getattr(b, name)}
        assert differ <= {"recolor": {"color"}, "replace": {"shape"}, "move": {"x", "y"}, "word": {"word"}}.get(kind, set())
        words = instruction.split()
        said = {"recolor": lambda: words[-1] == new[0].color, "replace": lambda: new[0].shape in instruction, "word": lambda: words[-1] == new[0].word,
                "add": lambda: shapes.named(new[0]) in instruction and instruction.endswith(shapes.where(new[0], after)),
                "move": lambda: instruction.endswith("to the " + shapes.where(new[0], after)), "remove": lambda: words[0] == "remove"}
        assert said[kind](), instruction
        for t in gone:                                                             # what is meant can be told from the others
            alike = [o for o in before.things if o.shape == t.shape and (t.color not in words[:-1] or o.color == t.color)]
            assert kind == "word" or {(o.shape, o.color) for o in alike} == {(t.shape, t.color)}, (instruction, before)
    assert {*kinds} == {*shapes.EDITS}
    sample = world[5]
    before, _, instruction, after = world.edit(5)
    assert sample.original == instruction == world.captions(5)[0] and sample.image.shape == (64, 96, 6)
    assert (sample.image[:, :, :3] == shapes.render(after, 96, 64)).all() and (sample.image[:, :, 3:] == shapes.render(before, 96, 64)).all()
