"""data.py: samples and their two captions, folders of pictures, Fashion-MNIST, specs, couples of pictures."""

import gzip
import json
import re
import struct
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data import FashionMNIST, Folder, Sample, Shapes, Unreadable, open_data
from shapes import HELD_OUT_PAIRS, LEVELS, cell_side
from shards import bucket_sizes

# ---- samples


def test_captions_without_pictures_are_those_of_the_samples(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a dot")
    for dataset in (Shapes("all"), Folder(tmp_path)):
        assert all(dataset.captions(i) == (dataset[i].original, dataset[i].synthetic) for i in range(min(5, len(dataset))))


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


@pytest.mark.parametrize("kind", [2, 7])
def test_an_orientation_that_is_no_number_is_upright(tmp_path, kind):
    """EXIF's text or bytes."""
    exif = b"Exif\0\0" + struct.pack("<2sHIHHHI4sI", b"II", 42, 8, 1, 0x0112, kind, 2, b"6", 0)
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "a.txt").write_text("x")
    folder = Folder(tmp_path, 64, 64, buckets=True, upscale=True)
    assert folder[0].image.shape[1] > folder[0].image.shape[0]


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
        assert captions == {f"a photo of a {name}" for name in names}


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
    ("", "unknown data ''; known: shapes"), ("shape", "unknown data 'shape'"), ("shapes:hard", "unknown level of shapes 'hard'; known: lattice"),
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
    assert {*HELD_OUT_PAIRS} < {(t.shape, t.color) for i in range(1000) for t in texts.scene(i)[0].things}
    for spec in ("shapes:texts", "shape-edits:texts"):
        with pytest.raises(ValueError, match="no pictures"):
            open_data(spec)[0]
    assert isinstance(open_data(f"folder:{tmp_path}"), Folder)


# ---- two pictures and a text: edits (App. D), preferences (App. C)

def test_shapes_of_mixed_aspect_ratios():
    """Every item of a group has its bucket's size, from 1:2 to 2:1, and every level in turn."""
    world = open_data("shapes:all", 128, 128, buckets=True)
    assert world.sizes == [(96, 192), (96, 160), (128, 128), (160, 96), (192, 96)] and {cell_side(*size) for size in world.sizes} == {32}
    for k, group in enumerate(world.groups):
        assert len(group) == len(world)
        for item in group[:2]:
            assert world[item].image.shape == (*world.sizes[k][::-1], 3)
        assert {world.level(item) for item in group[:4]} == {*LEVELS}
    kept = open_data("shapes:signs", 128, 128, buckets=True, keep_resolution=64)
    assert kept.sizes == [*world.sizes, *world.sizes, *[(64, 64)] * 5] and len(kept.groups) == 15 and kept[kept.groups[14][3]].image.shape == (64, 64, 3)
    assert open_data("shapes", 128, 128, keep_resolution=64).sizes == [(128, 128), (128, 128), (64, 64)]
    with pytest.raises(ValueError, match="--keep-resolution is for shapes, shape-edits alone, not for folder"):
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


def test_what_belongs_together_is_in_one_split(tmp_path):
    """Captions of one picture, edits of one picture, preferences of one prompt."""
    def splits(spec, column):
        train, val = ({item[column] for item in open_data(f"{spec}:{tmp_path}", split=split).items} for split in ("train", "val"))
        assert len(train) == 38 and len(val) == 2 and not train & val
    for spec, line, column in (("folder", {"file_name": "{0}.png", "text": "{0} {1}"}, 0), ("edits", {"instruction": "{1}", "edited": "{0}-{1}.png", "image": "{0}.png"}, 1),
                               ("pairs", {"prompt": "{0}", "chosen": "{0}-{1}.png", "rejected": "{1}-{0}.png"}, 2)):
        rows = [{key: text.format(f"{i:02}", k) for key, text in line.items()} for i in range(40) for k in range(3)]
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        splits(spec, column)


def test_edits_in_a_folder_or_in_lines(triples):
    folder = open_data(f"edits:{triples}", 32, 32)
    assert len(folder) == 3 and folder.captions(1) == ("make it 1", "")
    assert (folder[1].image[:, :, :3] == np.asarray(Image.open(triples / "1.edited.png"))).all() and (folder[1].image[:, :, 3:] == np.asarray(Image.open(triples / "1.image.png"))).all()
    lines = [json.dumps({"instruction": f"make it {i}", "edited": f"{i}.edited.png", "image": f"{i}.image.png"}) for i in range(3)]
    (triples / "list.jsonl").write_text("\n".join(lines))
    listed = open_data(f"edits:{triples}/list.jsonl", 32, 32)
    with pytest.raises(ValueError, match="--filter is for folder, tar alone, not for edits"):
        open_data(f"edits:{triples}", 32, 32, filter="aesthetic>5")
    assert [listed.captions(i) for i in range(3)] == [folder.captions(i) for i in range(3)] and all((listed[i].image == folder[i].image).all() for i in range(3))
    (triples / "list.jsonl").write_text("\n".join([*lines[:2], lines[2].replace("make it 2", " ")]))
    listed = open_data(f"edits:{triples}/list.jsonl", 32, 32)
    assert len(listed) == 2 and listed.skipped == {str(triples / "2.edited.png"): "no text"}
    bucketed = open_data(f"edits:{triples}", 64, 64, buckets=True, upscale=True)
    assert bucketed[0].image.shape == (48, 80, 6) and bucketed[1].image.shape == (64, 64, 6) and sorted(map(len, bucketed.groups)) == [1, 2]


def test_couples_of_few_sizes_are_not_cropped(tmp_path):
    for i, size in enumerate([(128, 128), (192, 96), (96, 160), (64, 64)]):
        for name in ("chosen", "rejected"):
            Image.effect_noise(size, 50).convert("RGB").save(tmp_path / f"{i}.{name}.png")
        (tmp_path / f"{i}.txt").write_text("noise")
    pairs = open_data(f"pairs:{tmp_path}", 128, 128, buckets=True)
    assert sorted(pairs.sizes) == [(64, 64), (96, 160), (128, 128), (192, 96)] and sorted(group.tolist() for group in pairs.groups) == [[0], [1], [2], [3]]
    for i in range(4):
        assert (pairs[i].image[:, :, :3] == np.asarray(Image.open(tmp_path / f"{i}.chosen.png"))).all()
    assert open_data(f"pairs:{tmp_path}", 128, 128, buckets=True, upscale=True)[3].image.shape == (128, 128, 6)
    Image.new("RGB", (130, 128)).save(tmp_path / "0.chosen.png")
    assert open_data(f"pairs:{tmp_path}", 128, 128, buckets=True).sizes == bucket_sizes(128)


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
