"""data.py: the world `shapes`, its captions, what training never sees, folders of pictures, Fashion-MNIST."""

import gzip
import json
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import data
from data import (BACKGROUNDS, COLORS, HELD_OUT_PAIRS, HELD_OUT_WORDS, LEVELS, SHAPES, FashionMNIST, Folder, Sample, Scene, Shapes, Thing, Unreadable, open_data,
                  relation, render)

SIZES = [(64, 64), (128, 64), (64, 96)]


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
        points = np.array(data.OUTLINES.get(thing.shape, [(-1, -1), (1, 1)])) * data.RADII[thing.size]
        (left, top), (right, bottom) = points.min(0), points.max(0)
    return thing.x + left, thing.y + top, thing.x + right, thing.y + bottom


@pytest.mark.parametrize("width, height", SIZES)
@pytest.mark.parametrize("level", LEVELS)
def test_things_lie_inside_the_picture_and_do_not_touch(level, width, height):
    for scene in scenes(300, level, width, height):
        assert (scene.columns, scene.rows) == (4 * width // min(width, height), 4 * height // min(width, height))
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
        assert scene.background == other.background and len(before) - len(after) in (0, 1)
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
    assert len(changes) == 4 and min(changes.values()) > 40 and sum(changes.values()) > 540, changes


def test_captions_without_pictures_are_those_of_the_samples(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a dot")
    for dataset in (Shapes("all"), Folder(tmp_path)):
        assert all(dataset.captions(i) == (dataset[i].original, dataset[i].synthetic) for i in range(min(5, len(dataset))))


def test_levels_are_what_they_say():
    shapes = {level: [t for s in scenes(200, level) for t in s.things if t.shape] for level in LEVELS}
    on_lattice = {level: all(t.x % 1 == t.y % 1 == 0.5 for t in things) for level, things in shapes.items()}
    assert on_lattice == {"lattice": True, "sizes": True, "jitter": False, "free": False}
    assert {t.size for t in shapes["lattice"]} == {"medium"} and all({t.size for t in shapes[level]} == {"small", "large"} for level in LEVELS[1:])
    offsets = [max(abs(t.x % 1 - 0.5), abs(t.y % 1 - 0.5)) for t in shapes["jitter"]]
    assert max(offsets) <= 0.25 and max(max(abs(t.x % 1 - 0.5), abs(t.y % 1 - 0.5)) for t in shapes["free"]) > 0.4


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
        text = data.original_caption(scene, rng)
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
        text = data.synthetic_caption(scene, rng)
        ground, described = re.fullmatch(r"on (\w+): (.+)", text).groups()
        first, *second = parts = re.split(", left of |, right of |, above |, below |, ", described)
        said = Counter(item.fullmatch(part).groups("") for part in parts)
        shapes = {t.shape: t for t in scene.things if t.shape}
        if len(shapes) == len(parts) == 2:
            word = described[len(first) + 2:-len(second[0])].strip() or None
            assert word == data.relation(*(shapes[item.fullmatch(part)[3]] for part in parts)), text
            words[word] += 1
        assert ground == scene.background
        assert said == Counter(("" if t.word or t.size == "medium" else t.size, t.color, t.shape, t.word, place(t, scene)) for t in scene.things), text
    assert min(words[word] for word in ("left of", "right of", "above", "below")) > 0.15 * words.total()      # told from either thing


def test_relation_words_are_true():
    seen = set()
    for i in range(3000):
        scene, rng = Shapes("all", 128, 64).scene(i)
        text = data.original_caption(scene, rng)
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
    assert data.plural("cross") == "crosses" and data.plural("star") == "stars"
    assert data.article("orange ring") == "an orange ring" and data.listing(["a", "b", "c"]) == "a, b and c"


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_caption_mix(share):
    rng = np.random.default_rng(0)
    drawn = Counter(Sample(None, "short", "long").caption(rng, share) for _ in range(2000))
    assert abs(drawn["long"] / 2000 - share) < 0.04
    assert Sample(None, "only").caption(rng, share) == "only"


# ---- folders

def save(path, color, size=(20, 30), text=None):
    Image.new("RGBA" if len(color) == 4 else "RGB", size, color).save(path)
    if text is not None:
        path.with_suffix(".txt").write_text(text, encoding="utf-8")


def test_folder_of_any_sizes(tmp_path):
    (tmp_path / "deep").mkdir()
    save(tmp_path / "a.png", (255, 0, 0), (20, 30), "  red \n")
    save(tmp_path / "b.jpg", (0, 0, 255), (300, 10), "blue 🟦")
    save(tmp_path / "c.png", (0, 0, 0, 0), (8, 8), "nothing on white")
    save(tmp_path / "d.webp", (0, 255, 0), (1, 1), "one pixel")
    save(tmp_path / "deep" / "E.PNG", (9, 9, 9), (64, 48), "dark")
    save(tmp_path / "no-caption.png", (1, 2, 3))
    folder = Folder(tmp_path, 48, 32)
    samples = [folder[i] for i in range(len(folder))]
    assert [s.original for s in samples] == ["red", "blue 🟦", "nothing on white", "one pixel", "dark"]
    assert all(s.image.shape == (32, 48, 3) and s.image.dtype == np.uint8 and s.synthetic == "" for s in samples)
    means = [s.image.reshape(-1, 3).mean(0).round().tolist() for s in samples]
    assert means[0] == [255, 0, 0] and means[2] == [255, 255, 255] and means[3][1] > 245 and means[4] == [9, 9, 9]
    assert np.abs(np.array(means[1]) - (0, 0, 255)).max() < 4


def test_pictures_without_a_caption_are_left_out_and_named(tmp_path):
    for name, text in (("a", ""), ("b", " \n"), ("c", "a caption")):
        save(tmp_path / f"{name}.png", (1, 2, 3), text=text)
    assert Folder(tmp_path).skipped == {f"{tmp_path}/{name}.png": "no caption" for name in "ab"} and len(Folder(tmp_path)) == 1
    rows = [{"file_name": f"{i}.png", "text": text, "synthetic": other} for i, (text, other) in enumerate((("", ""), ("", "dense"), ("short", "dense")))]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = Folder(tmp_path)
    assert [folder.captions(i) for i in range(len(folder))] == [("dense", "dense"), ("short", "dense")] and [*folder.skipped] == [f"{tmp_path}/0.png"]


def test_folder_crops_the_centre_and_keeps_the_aspect(tmp_path):
    image = np.zeros((40, 120, 3), np.uint8)
    image[:, 40:80] = 255
    Image.fromarray(image).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("the middle third")
    assert (Folder(tmp_path, 40, 40)[0].image[:, 2:-2] == 255).all()


def test_folder_turns_photos_upright(tmp_path):
    image = Image.new("RGB", (40, 40), "white")
    image.paste("black", (0, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6                                                              # to be turned by 90 degrees clockwise: what is above comes to the right
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    (tmp_path / "a.txt").write_text("x")
    shown = Folder(tmp_path, 40, 40)[0].image
    assert shown[:, 25:].mean() < 5 and shown[:, :15].mean() > 250


def test_folder_with_metadata(tmp_path):
    (tmp_path / "images").mkdir()
    save(tmp_path / "images" / "1.png", (255, 0, 0), text="not this one")
    rows = [{"file_name": "images/1.png", "text": "line\u2028separator", "more": 1}, {"file_name": "images/2.png", "text": "absent"}]
    (tmp_path / "metadata.jsonl").write_bytes("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    folder = Folder(tmp_path)
    assert folder[0].original == "line\u2028separator"
    with pytest.raises(Unreadable, match="images/2.png cannot be read .*No such file"):
        folder[1]


@pytest.mark.parametrize("damage", [lambda raw: raw[:len(raw) // 2], lambda raw: b"", lambda raw: b"no image at all", lambda raw: raw[:60] + bytes(40) + raw[100:]])
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp"])
def test_unreadable_image_gives_no_sample_and_is_named(tmp_path, suffix, damage):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    for name in ("bad", "good"):
        noise.save(tmp_path / f"{name}.{suffix}")
        (tmp_path / f"{name}.txt").write_text("x")
    bad = tmp_path / f"bad.{suffix}"
    bad.write_bytes(damage(bad.read_bytes()))
    folder = Folder(tmp_path)
    assert isinstance(folder[1], Sample)
    try:                                                                          # a decoder may forgive a hole in the middle, no other damage
        folder[0]
        assert len(bad.read_bytes()) == len((tmp_path / f"good.{suffix}").read_bytes())
    except Unreadable as error:
        assert error.name == str(bad) and error.why


def test_folder_keeps_every_20th_picture_for_validation(tmp_path):
    for i in range(45):
        save(tmp_path / f"{i:02}.png", (i, i, i), (2, 2), str(i))
    train, val = ([text for _, text, _ in Folder(tmp_path, split=split).items] for split in ("train", "val"))
    assert val == ["19", "39"] and len(train) == 43 and not {*train} & {*val}
    for path in list(tmp_path.glob("*.png"))[12:]:
        path.unlink()
    assert len(Folder(tmp_path).items) == len(Folder(tmp_path, split="val").items) == 12      # too few to spare one


@pytest.mark.parametrize("line", ["not json", "[1, 2]", '{"file_name": "a.png"}', '{"file_name": 1, "text": "x"}', '{"file_name": "a.png", "text": 5}', "\udcff", ""])
def test_bad_metadata_names_its_line(tmp_path, line):
    good = json.dumps({"file_name": "a.png", "text": "x"}).encode()
    (tmp_path / "metadata.jsonl").write_bytes(good + b"\n" + line.encode("utf-8", "surrogateescape") + b"\n" + good)
    with pytest.raises(ValueError, match="metadata.jsonl line 2 is no JSON object"):
        Folder(tmp_path)


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        Folder(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no image with a caption"):
        Folder(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no image with a caption"):
        Folder(tmp_path)


# ---- Fashion-MNIST

def write_idx(folder, images, labels, stem="train", pack=False):
    for array, name in ((images, "images-idx3-ubyte"), (labels, "labels-idx1-ubyte")):
        raw = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">i4").tobytes() + array.tobytes()
        path = folder / f"{stem}-{name}"
        gzip.open(f"{path}.gz", "wb").write(raw) if pack else path.write_bytes(raw)


PICTURES = np.random.default_rng(0).integers(0, 256, (200, 28, 28), dtype=np.uint8)
LABELS = (np.arange(200) % 10).astype(np.uint8)


@pytest.mark.parametrize("pack", [False, True])
def test_fashion_mnist(tmp_path, pack):
    write_idx(tmp_path, PICTURES, LABELS, pack=pack)
    write_idx(tmp_path, PICTURES[:5], LABELS[:5], "t10k", pack)
    train, val = FashionMNIST(tmp_path, 28, 28), FashionMNIST(tmp_path, 64, 32, split="val")
    assert len(train) == 200 and len(val) == 5 and val[0].image.shape == (32, 64, 3)
    assert (train[7].image == PICTURES[7][..., None]).all() and train[7].synthetic == ""
    assert [train[i].original for i in range(200)] == [train[i].original for i in range(200)]
    for label, names in enumerate(FashionMNIST.NAMES):
        captions = {train[i].original for i in range(200) if LABELS[i] == label}
        assert captions == {f"a photo of {'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names}


def test_fashion_mnist_files_that_cannot_be_used(tmp_path):
    def refused(reason):
        with pytest.raises(ValueError, match=reason):
            FashionMNIST(tmp_path)

    refused(r"train-images-idx3-ubyte\[.gz\] is not there")
    write_idx(tmp_path, PICTURES, LABELS[:-1])
    refused("200 images but 199 labels")
    write_idx(tmp_path, PICTURES, LABELS + np.uint8(7))
    refused("label 16, but there are 10 classes")
    write_idx(tmp_path, PICTURES, LABELS)
    images = tmp_path / "train-images-idx3-ubyte"
    raw = images.read_bytes()
    for foreign in (raw[:-1], raw + b"x", raw[:9], b"", b"PNG", raw[:3] + b"\1" + raw[4:]):
        images.write_bytes(foreign)
        refused("train-images-idx3-ubyte is no idx file of 3 dimensions, or truncated")
    images.unlink()
    for foreign in (gzip.compress(raw)[:-100], gzip.compress(raw[:-1]), raw, b"", gzip.compress(raw)[:40] + bytes(400) + gzip.compress(raw)[440:]):
        images.with_name(images.name + ".gz").write_bytes(foreign)
        refused("train-images-idx3-ubyte.gz is no idx file of 3 dimensions, or truncated")


# ---- open_data

@pytest.mark.parametrize("spec, reason", [
    ("", "unknown data ''; known: shapes"), ("shape", "unknown data 'shape'"), ("shapes:hard", "unknown level 'hard' of shapes; known: lattice"),
    ("folder", "needs a folder: folder:DIR"), ("fashion-mnist:", "needs a folder"), ("folder:/no/such/place", "is no folder"),
    ("fashion-mnist:/no/such/place", "is not there")])
def test_bad_specs_say_why(spec, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        open_data(spec)


def test_specs(tmp_path):
    save(tmp_path / "a.png", (1, 1, 1), text="x")
    assert open_data("shapes", 32, 16).levels == ("lattice",) and open_data("shapes:all").levels == LEVELS
    assert open_data("shapes:free", 32, 16)[3].image.shape == (16, 32, 3)
    signs = open_data("shapes:signs")
    assert signs.levels == ("lattice",) and 260 < sum(any(t.word for t in signs.scene(i)[0].things) for i in range(1000)) < 340
    texts = open_data("shapes:texts")
    assert set(data.HELD_OUT_PAIRS) < {(t.shape, t.color) for i in range(1000) for t in texts.scene(i)[0].things}
    for spec in ("shapes:texts", "shape-edits:texts"):
        with pytest.raises(ValueError, match="no pictures"):
            open_data(spec)[0]
    assert isinstance(open_data(f"folder:{tmp_path}"), Folder)


# ---- two pictures and a text: edits (App. D), preferences (App. C)

def test_edits_change_what_they_say_and_nothing_else():
    """Kind by kind; no pair and no word that training must not show."""
    world = open_data("shape-edits:all", 96, 64)
    kinds = Counter()
    for i in range(300):
        before, kind, instruction, after = world.edit(i)
        kinds[kind] += 1
        assert (before.background, before.columns, before.rows) == (after.background, after.columns, after.rows) == (before.background, 6, 4)
        kept = [t for t in before.things if t in after.things]
        gone, new = [t for t in before.things if t not in kept], [t for t in after.things if t not in kept]
        assert bool(gone) == (kind != "add") and bool(new) == (kind != "remove") and len({(t.shape, t.color, t.word) for t in gone or new}) == 1
        assert not any((t.shape, t.color) in HELD_OUT_PAIRS or t.word in HELD_OUT_WORDS for t in after.things)
        differ = {name for a, b in zip(gone, new) for name in ("color", "shape", "x", "y", "word", "size") if getattr(a, name) != getattr(b, name)}
        assert differ <= {"recolor": {"color"}, "replace": {"shape"}, "move": {"x", "y"}, "word": {"word"}}.get(kind, set())
        words = instruction.split()
        said = {"recolor": lambda: words[-1] == new[0].color, "replace": lambda: new[0].shape in instruction, "word": lambda: words[-1] == new[0].word,
                "add": lambda: data.named(new[0]) in instruction and instruction.endswith(data.where(new[0], after)),
                "move": lambda: instruction.endswith("to the " + data.where(new[0], after)), "remove": lambda: words[0] == "remove"}
        assert said[kind](), instruction
        for t in gone:                                                             # what is meant can be told from the others
            alike = [o for o in before.things if o.shape == t.shape and (t.color not in words[:-1] or o.color == t.color)]
            assert kind == "word" or {(o.shape, o.color) for o in alike} == {(t.shape, t.color)}, (instruction, before)
    assert {*kinds} == {*data.EDITS}
    sample = world[5]
    before, _, instruction, after = world.edit(5)
    assert sample.original == instruction == world.captions(5)[0] and sample.image.shape == (64, 96, 6)
    assert (sample.image[:, :, :3] == data.render(after, 96, 64)).all() and (sample.image[:, :, 3:] == data.render(before, 96, 64)).all()


def test_shapes_of_mixed_aspect_ratios():
    """Every item of a group has its bucket's size, from 1:2 to 2:1, and every level in turn."""
    world = open_data("shapes:all", 128, 128, buckets=True)
    assert world.sizes == [(96, 176), (112, 144), (128, 128), (144, 112), (176, 96)]
    for k, group in enumerate(world.groups):
        assert len(group) == len(world)
        for item in group[:2]:
            assert world[item].image.shape == (*world.sizes[k][::-1], 3)
        assert {world.level(item) for item in group[:4]} == {*LEVELS}
    kept = open_data("shapes:signs", 128, 128, buckets=True, keep_resolution=64)
    assert kept.sizes == [*world.sizes, (64, 64), (64, 64)] and len(kept.groups) == 7 and kept[kept.groups[6][3]].image.shape == (64, 64, 3)
    with pytest.raises(ValueError, match="--keep-resolution is for shapes alone, not for folder"):
        open_data("folder:absent", keep_resolution=64)


@pytest.fixture
def triples(tmp_path):
    """Three edits as files side by side, whose first is twice as wide as high."""
    rng = np.random.default_rng(0)
    for i in range(3):
        for name in ("image", "edited"):
            Image.fromarray(rng.integers(0, 256, (32, 64 if i == 0 else 32, 3), dtype=np.uint8)).save(tmp_path / f"{i}.{name}.png")
        (tmp_path / f"{i}.txt").write_text(f"make it {i}\n")
    return tmp_path


def test_edits_in_a_folder_or_in_lines(triples):
    folder = open_data(f"edits:{triples}", 32, 32)
    assert len(folder) == 3 and folder.captions(1) == ("make it 1", "")
    assert (folder[1].image[:, :, :3] == np.asarray(Image.open(triples / "1.edited.png"))).all() and (folder[1].image[:, :, 3:] == np.asarray(Image.open(triples / "1.image.png"))).all()
    lines = [json.dumps({"instruction": f"make it {i}", "edited": f"{i}.edited.png", "image": f"{i}.image.png"}) for i in range(3)]
    (triples / "list.jsonl").write_text("\n".join(lines))
    listed = open_data(f"edits:{triples}/list.jsonl", 32, 32)
    assert [listed.captions(i) for i in range(3)] == [folder.captions(i) for i in range(3)] and all((listed[i].image == folder[i].image).all() for i in range(3))
    bucketed = open_data(f"edits:{triples}", 64, 64, buckets=True, upscale=True)
    assert bucketed[0].image.shape == (48, 80, 6) and bucketed[1].image.shape == (64, 64, 6) and sorted(map(len, bucketed.groups)) == [1, 2]


def test_couples_that_do_not_fit_are_refused(triples):
    np.save(triples / "0.edited.npy", np.zeros((16, 4, 4), np.float32))
    (triples / "0.edited.png").unlink()
    with pytest.raises(Unreadable, match="0.image.png cannot be read .it is .*uint8 beside .*float32"):
        open_data(f"edits:{triples}", 32, 32)[0]
    np.save(triples / "0.image.npy", np.zeros((16, 4, 4), np.float32))
    (triples / "0.image.png").unlink()
    assert open_data(f"edits:{triples}", 32, 32)[0].image.shape == (32, 4, 4)
    with pytest.raises(Unreadable, match="for pictures of 64 x 64 pixels"):
        open_data(f"edits:{triples}", 64, 64)[0]
    (triples / "1.edited.png").write_bytes(b"no picture")
    with pytest.raises(Unreadable, match="1.edited.png"):
        open_data(f"edits:{triples}", 32, 32)[1]
    (triples / "bad.jsonl").write_text('{"instruction": "x", "image": "a.png"}')
    with pytest.raises(ValueError, match="bad.jsonl line 1 is no JSON object with instruction, edited, image, all strings"):
        open_data(f"edits:{triples}/bad.jsonl")
