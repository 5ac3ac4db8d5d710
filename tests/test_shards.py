"""shards.py and the data sets of data.py on it: tar shards with every fault, filters, buckets, ImageNet; 10 million samples open at once."""

import io
import json
import math
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import shards
from data import Folder, ImageNet, Tar, Unreadable, open_data
from shards import bucket_sizes, expand, index_shard, nearest_buckets, parse_filter, read_index


def picture(color=(200, 30, 30), size=(40, 30), format="PNG", **options):
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, format, **options)
    return out.getvalue()


def write_tar(path, members):
    """members: (name, bytes)."""
    with tarfile.open(path, "w") as tar:
        for name, raw in members:
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return str(path)


def samples(start, n, **metadata):
    for i in range(start, start + n):
        yield f"{i:05}.png", picture((i % 256, i // 256, 7), (16, 16))
        yield f"{i:05}.txt", f"picture {i}".encode()
        yield f"{i:05}.json", json.dumps({"aesthetic": i / 10, **metadata}).encode()


def number(image):
    return int(image[0, 0, 0]) + 256 * int(image[0, 0, 1])


# ---- tar shards

def test_expand(tmp_path):
    assert expand("a.tar") == ["a.tar"] and expand("a/{098..101}.tar") == ["a/098.tar", "a/099.tar", "a/100.tar", "a/101.tar"]
    assert expand("{1..2}/{00..01}") == ["1/00", "1/01", "2/00", "2/01"]
    for name in ("b.tar", "a.tar", "c.txt"):
        (tmp_path / name).touch()
    assert expand(str(tmp_path)) == [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"]


def test_every_kind_of_member(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                                              # lies on its side
    write_tar(tmp_path / "0.tar", [
        ("x/000.jpg", picture(size=(40, 30), format="JPEG", exif=exif)), ("x/000.txt", b" a red box \n"),
        ("x/001.b.webp", b"ignored"), ("x/001.WEBP", picture(format="WEBP")), ("x/001.json", b'{"caption": "short", "synthetic": "long", "score": 0.5, "url": "u"}'),
        ("y/001.png", picture()), ("y/001.json", b'{"text": "other", "score": true}'), ("y/001.txt", "façade 🟦".encode()),
        ("./" + "long/" * 40 + "002.jpeg", picture(format="JPEG")), ("./" + "long/" * 40 + "002.txt", b"a long name")])
    data = Tar(f"{tmp_path}/0.tar", 32, 32)
    assert [data.captions(i) for i in range(len(data))] == [("a red box", ""), ("short", "long"), ("façade 🟦", ""), ("a long name", "")]
    assert all((data[i].original, data[i].synthetic) == data.captions(i) and data[i].image.shape == (32, 32, 3) for i in range(4)) and not data.skipped
    records, columns = read_index(f"{tmp_path}/0.tar")
    assert columns["width"].tolist() == [30, 40, 40, 40] and columns["height"].tolist() == [40, 30, 30, 30] and len(records) == 4
    assert columns.keys() == {"score", "width", "height"} and np.array_equal(columns["score"], np.array([math.nan, 0.5, 1, math.nan], np.float32), equal_nan=True)


def test_samples_of_many_shards_are_read_by_number(tmp_path):
    for k in range(3):
        write_tar(tmp_path / f"{k:02}.tar", samples(10 * k, 10))
    data = open_data(f"tar:{tmp_path}/{{00..02}}.tar", 16, 16)
    assert len(data) == 30 and [number(data[i].image) for i in range(30)] == list(range(30))
    val = open_data(f"tar:{tmp_path}/{{00..02}}.tar", 16, 16, "val")
    assert data.groups == [range(29)] and val.groups == [range(29, 30)]


def test_an_index_is_made_once_and_again_when_the_shard_changes(tmp_path, monkeypatch):
    shard, calls = write_tar(tmp_path / "0.tar", samples(0, 4)), []
    monkeypatch.setattr("data.index_shards", lambda missing: calls.append(missing) or shards.index_shards(missing))
    assert len(Tar(shard)) == len(Tar(shard)) == 4 and calls == [[shard]]
    index = tmp_path / "0.tar.index"
    for damage in (b"", b"{}\n", index.read_bytes()[:-1], b"\xff" + index.read_bytes()):
        index.write_bytes(damage)
        assert len(Tar(shard)) == 4
    assert len(calls) == 5
    write_tar(shard, samples(0, 6))
    shards.cached_index.cache_clear()
    assert len(Tar(shard)) == 6 and len(calls) == 6
    os.utime(shard, (2 ** 32, 2 ** 32))                                           # in the future
    assert len(Tar(shard)) == len(Tar(shard)) == 6 and len(calls) == 7


def test_faulty_samples_are_left_out_and_named(tmp_path):
    good = picture()
    write_tar(tmp_path / "0.tar", [
        ("0.png", good), ("0.txt", b"good"),
        ("1.png", good), ("1.txt", b""),                                         # zero bytes
        ("2.png", good), ("2.txt", b" \n"), ("2.json", b'{"caption": ""}'),
        ("3.png", good),
        ("4.txt", b"no picture here"),
        ("5.png", b"no picture at all"), ("5.txt", b"x"),
        ("6.png", b""), ("6.txt", b"x"),
        ("7.png", good), ("7.json", b"{broken"),
        ("8.png", good), ("8.json", b"[1]"),
        ("9.png", good), ("9.txt", b""), ("9.json", b'{"caption": "of the json"}'),
        ("a.png", good[:len(good) // 2]), ("a.txt", b"its pixels are cut off")])
    data = Tar(f"{tmp_path}/0.tar")
    assert [data.captions(i)[0] for i in range(len(data))] == ["good", "of the json", "its pixels are cut off"]
    whys = {name.rpartition("/")[2]: why for name, why in data.skipped.items()}
    assert whys.keys() == set("12345678") and whys["1"] == whys["2"] == whys["3"] == "no caption" and whys["4"] == "no picture"
    assert "cannot identify image file" in whys["5"] and "no object" in whys["8"]
    with pytest.raises(Unreadable, match=r"0.tar/a.png cannot be read \(image file is truncated"):
        data[2]


@pytest.mark.parametrize("cut, left", [(30000, 10), (28000, 9), (61440, 20), (61440 - 1100, 20), (61440 - 2100, 19), (100, 0)])
def test_a_truncated_tar_gives_what_is_whole(tmp_path, cut, left):
    """20 samples of 3 members of 1024 bytes each, the third of which is not needed, then zeros."""
    shard = write_tar(tmp_path / "0.tar", [*samples(0, 20)])
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:cut])
    if not left:
        with pytest.raises(ValueError, match="truncated header: nothing is read after byte 0"):
            Tar(shard)
        return
    data = Tar(shard, 16, 16)
    assert len(data) == left and "unexpected end of data" in data.skipped[shard]
    assert [number(data[i].image) for i in range(len(data))] == list(range(len(data)))


def test_a_damaged_header_ends_the_shard(tmp_path):
    shard = write_tar(tmp_path / "0.tar", samples(0, 20))
    raw = bytearray((tmp_path / "0.tar").read_bytes())
    middle = len(raw) // 3 // 512 * 512
    raw[middle:middle + 4096] = os.urandom(4096)
    (tmp_path / "0.tar").write_bytes(raw)
    data = Tar(shard, 16, 16)
    assert 3 <= len(data) <= 8 and list(data.skipped)[-1] == shard


def test_a_shard_that_changed_after_indexing_gives_unreadable_samples(tmp_path):
    shard = write_tar(tmp_path / "0.tar", samples(0, 6))
    data = Tar(shard, 16, 16)
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:2000])
    shards.cached_index.cache_clear()
    with pytest.raises(Unreadable, match="0.tar changed since its index was read"):
        data[5]
    (tmp_path / "0.tar").unlink()
    with pytest.raises(Unreadable, match="0.tar, sample 5 cannot be read"):
        data.captions(5)


@pytest.mark.parametrize("make, reason", [
    (lambda path: None, "0.tar is not there (1 of 1 shards are missing)"),
    (lambda path: path.write_bytes(b""), "holds no image with a caption; the first of 1 that were skipped: "),
    (lambda path: path.write_bytes(b"no tar file" * 200), "nothing is read after byte 0"),
    (lambda path: write_tar(path, [("0.txt", b"x")]), "0.tar/0; no picture")])
def test_shards_that_cannot_be_used(tmp_path, make, reason):
    make(tmp_path / "0.tar")
    with pytest.raises(ValueError) as error:
        Tar(f"{tmp_path}/0.tar")
    assert reason in str(error.value)


def test_folders_that_cannot_be_written_are_named(tmp_path, monkeypatch):
    shard = write_tar(tmp_path / "0.tar", samples(0, 2))

    def write(path, save):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("checkpoint.write", write)
    with pytest.raises(ValueError, match=r"0.tar.index cannot be written \(Permission denied\); a folder of symbolic links"):
        index_shard(shard)
    monkeypatch.undo()
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "0.tar").symlink_to(shard)
    assert len(Tar(f"{tmp_path}/links/0.tar")) == 2 and (tmp_path / "links" / "0.tar.index").exists() and not (tmp_path / "0.tar.index").exists()


TEN_MILLION = """
import re, sys, time
import data
began = time.process_time()                                                      # other work on the machine does not count
world = data.open_data(sys.argv[1], 64, 64, **eval(sys.argv[2]))
seconds = time.process_time() - began
assert "torch" not in sys.modules
print(len(world), sum(map(len, world.groups)), seconds, int(re.search("VmHWM: *(.*) kB", open("/proc/self/status").read().expandtabs(1))[1]) / 1000)
"""


@pytest.mark.parametrize("options", ["{}", "{'filter': 'aesthetic>5 and nsfw<0.2', 'buckets': True}"])
def test_ten_million_samples_open_in_5_seconds_and_200_megabytes(tmp_path, options):
    """1,000 shards of 10,000, all the same simulated index, beside sparse files of 500 MB."""
    rng, n = np.random.default_rng(0), 10_000
    records = np.zeros(n, shards.RECORD)
    records["image"], records["image_size"] = 50_000 * np.arange(n), 40_000
    columns = {"aesthetic": rng.uniform(0, 10, n), "nsfw": rng.uniform(0, 1, n), "width": rng.integers(64, 2000, n), "height": rng.integers(64, 2000, n)}
    with open(tmp_path / "0000.tar", "wb") as file:
        file.truncate(500_000_000)
    header = {"bytes": 500_000_000, "modified": os.stat(tmp_path / "0000.tar").st_mtime_ns, "samples": n, "columns": [*columns], "skipped": {}}
    index = json.dumps(header).encode() + b"\n" + records.tobytes() + b"".join(column.astype("<f4").tobytes() for column in columns.values())
    (tmp_path / "0000.tar.index").write_bytes(index)
    for k in range(1, 1000):
        os.link(tmp_path / "0000.tar", tmp_path / f"{k:04}.tar")
        (tmp_path / f"{k:04}.tar.index").write_bytes(index) if k < 20 else os.link(tmp_path / f"{k % 20:04}.tar.index", tmp_path / f"{k:04}.tar.index")
    done = subprocess.run([sys.executable, "-c", TEN_MILLION, f"tar:{tmp_path}/{{0000..0999}}.tar", options], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    total, chosen, seconds, megabytes = map(float, done.stdout.split())
    print(f"{seconds:.2f} s, {megabytes:.0f} MB")
    assert total == 1e7 and seconds < 5 and megabytes < 200
    kept = np.mean((columns["aesthetic"] > 5) & (columns["nsfw"] < 0.2)) if "aesthetic" in options else 1
    assert chosen == pytest.approx(kept * (1e7 - 4096), rel=0.01)


# ---- filters

ROW = {"aesthetic": 6.5, "nsfw": 0.1, "x.y": -2.0, "absent": math.nan}


@pytest.mark.parametrize("text, wanted", [
    ("aesthetic>5 and nsfw<0.2", True), ("aesthetic > 5 and nsfw >= 0.2", False), ("aesthetic<5 or nsfw<=.1", True), ("not aesthetic<5", True),
    ("nsfw>1 and aesthetic>5 or x.y==-2e0", True), ("nsfw>1 and (aesthetic>5 or x.y==-2)", False), ("x.y!=-2", False), ("not (not (x.y<0))", True),
    ("absent<1", False), ("absent>=1", False), ("absent!=1", False), ("not absent<1", True), ("or_>1 or x.y<1", None)])
def test_filters(text, wanted):
    names, test = parse_filter(text)
    if wanted is None:
        assert names == {"or_", "x.y"}
        return
    assert names <= ROW.keys() and test(ROW) == wanted
    columns = {name: np.array([value, math.nan], np.float32) for name, value in ROW.items()}
    assert test(columns)[0] == wanted


@pytest.mark.parametrize("text, reason", [
    ("", "the end stands where the name of a column should"), ("aesthetic", "the end stands where one of < <= > >= == != should"), ("aesthetic>", "the end stands where a number should"),
    ("aesthetic>nsfw", "nsfw stands where a number should"), ("a>1 b<2", "b stands where `and`, `or` or the end should"), ("(a>1", "the end stands where a closing parenthesis should"),
    ("a=1", "= stands where one of"), ("a>1 and", "the end stands where the name"), ("__import__('os').system('x')", "( stands where one of"), ("5>a", "5 stands where the name"),
    ("a>1; b<2", "; stands where"), ("a>nan", "nan stands where a number")])
def test_filters_that_cannot_be_read(text, reason):
    with pytest.raises(ValueError) as error:
        parse_filter(text)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_filters_choose_samples(tmp_path):
    write_tar(tmp_path / "0.tar", samples(0, 30))
    write_tar(tmp_path / "1.tar", [(name, raw) for name, raw in samples(30, 10) if not name.endswith("json")])   # without columns
    data = open_data(f"tar:{tmp_path}/{{0..1}}.tar", 16, 16, filter="aesthetic>=1 and aesthetic<2.05 and width==16")
    assert [group.tolist() for group in data.groups] == [list(range(10, 21))] and number(data[15].image) == 15
    for filter, reason in (("aesthetics>1", "no sample has the column 'aesthetics'; known: aesthetic, height, width"), ("aesthetic>99", "no picture is left of 38")):
        with pytest.raises(ValueError, match=reason):
            open_data(f"tar:{tmp_path}/{{0..1}}.tar", 16, 16, filter=filter)

    rows = [{"file_name": f"{i}.png", "text": str(i), "synthetic": f"number {i}", "score": i} for i in range(5)] + [{"file_name": "5.png", "text": "5"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = open_data(f"folder:{tmp_path}", filter="score>2")
    assert [folder.captions(i) for i in range(len(folder))] == [("3", "number 3"), ("4", "number 4")]
    with pytest.raises(ValueError, match="that --filter 'score>9' wants"):
        open_data(f"folder:{tmp_path}", filter="score>9")
    with pytest.raises(ValueError, match="no sample has the column 'scare'; known: score"):
        open_data(f"folder:{tmp_path}", filter="scare>9")
    (tmp_path / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match="has no metadata.jsonl"):
        open_data(f"folder:{tmp_path}", filter="score>2")
    with pytest.raises(ValueError, match="--filter is for folder, tar alone, not for shapes"):
        open_data("shapes", filter="score>2")


# ---- buckets

@pytest.mark.parametrize("side", [16, 48, 64, 256, 512, 1024])
def test_buckets_have_the_area_of_the_square(side):
    sizes = bucket_sizes(side)
    assert (side, side) in sizes and {(h, w) for w, h in sizes} == {*sizes} and len({*sizes}) == len(sizes)
    for width, height in sizes:
        assert width % 16 == height % 16 == 0 and min(width, height) >= 16 and max(width, height) <= 4.001 * min(width, height)
        assert abs(width * height - side * side) <= 8 * min(width, height)          # the longer side is the nearest multiple of 16


def test_pictures_go_to_the_bucket_of_their_aspect_ratio():
    sizes, rng = bucket_sizes(256), np.random.default_rng(0)
    widths, heights = rng.integers(100, 3000, (2, 500))
    chosen, any_size = nearest_buckets(sizes, widths, heights), nearest_buckets(sizes, widths, heights, upscale=True)
    aspects = np.log([w / h for w, h in sizes])
    for w, h, k, free in zip(widths, heights, chosen, any_size):
        assert abs(aspects[free] - np.log(w / h)) == pytest.approx(np.abs(aspects - np.log(w / h)).min())
        assert k == (free if w >= sizes[free][0] and h >= sizes[free][1] else -1)
    assert (chosen == -1).any() and (chosen >= 0).any()


def test_bucketed_pictures_keep_their_shape_and_are_not_enlarged(tmp_path):
    shapes = [(128, 32), (80, 60), (200, 200), (64, 64), (63, 64), (30, 500)]
    write_tar(tmp_path / "0.tar", [member for i, size in enumerate(shapes) for member in ((f"{i}.png", picture(size=size)), (f"{i}.txt", b"x"))])
    for i, size in enumerate(shapes):
        (tmp_path / f"{i}.png").write_bytes(picture(size=size))
        (tmp_path / f"{i}.txt").write_text("x")
    (tmp_path / "6.png").write_bytes(b"no picture")
    (tmp_path / "6.txt").write_text("x")
    for spec in (f"tar:{tmp_path}/0.tar", f"folder:{tmp_path}"):
        data = open_data(spec, 64, 64, buckets=True)
        assert sorted(int(i) for group in data.groups for i in group) == [0, 1, 2, 3] and "2" in data.skipped.values()
        assert [data[i].image.shape for i in range(4)] == [(32, 128, 3), (48, 80, 3), (64, 64, 3), (64, 64, 3)]
        larger = open_data(spec, 64, 64, buckets=True, upscale=True)
        assert sorted(int(i) for group in larger.groups for i in group) == [0, 1, 2, 3, 4, 5]
        for group in larger.groups:
            assert len({larger[int(i)].image.shape for i in group}) == 1
    assert str(tmp_path / "6.png") in data.skipped
    with pytest.raises(ValueError, match="--buckets is for shapes, folder, imagenet, tar, "):
        open_data("fashion-mnist:absent", buckets=True)


# ---- ImageNet

def imagenet(root, parts=("train", "val"), per_class=3):
    (root / "LOC_synset_mapping.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish\nn01484850 great white shark, white shark, man-eater\n")
    for part in parts:
        for k, synset in enumerate(("n01440764", "n01443537", "n09999999")):
            (root / part / synset).mkdir(parents=True)
            for i in range(per_class):
                (root / part / synset / f"{synset}_{i}.JPEG").write_bytes(picture((80 * k, 0, 0), (50, 40), "JPEG"))


def test_imagenet(tmp_path):
    imagenet(tmp_path)
    train, val = open_data(f"imagenet:{tmp_path}", 32, 16), open_data(f"imagenet:{tmp_path}", 32, 16, "val")
    assert [*train.skipped.values()] == 2 * ["no class of LOC_synset_mapping.txt"] and f"{tmp_path}/train/n09999999" in train.skipped
    assert len(train) == len(val) == 6 and "/train/" in train.items[0][0] and "/val/" in val.items[0][0]
    assert train[3].image.shape == (16, 32, 3) and train[3].original == "a photo of a goldfish" and train.captions(3) == ("a photo of a goldfish", "")
    drawn = {ImageNet(tmp_path, seed=seed).captions(i)[0] for seed in range(10) for i in range(3)}
    assert drawn == {"a photo of a tench", "a photo of a Tinca tinca"}
    assert [train.captions(i) for i in range(6)] == [ImageNet(tmp_path, 8, 8).captions(i) for i in range(6)]
    assert {train[i].image.shape for i in range(6)} == {(16, 32, 3)} and isinstance(train, Folder)


def test_imagenet_without_a_validation_folder(tmp_path):
    imagenet(tmp_path, (".",), per_class=20)
    train, val = ImageNet(tmp_path), ImageNet(tmp_path, split="val")
    assert (len(train), len(val)) == (38, 2) and not {*train.items} & {*val.items}


def test_imagenet_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match="holds no synset mapping"):
        ImageNet(tmp_path)
    (tmp_path / "synset_words.txt").write_text("n01440764 tench\n")
    with pytest.raises(ValueError, match="holds no picture in a folder that synset_words.txt names"):
        ImageNet(tmp_path)
    with pytest.raises(ValueError, match="--filter is for folder, tar alone, not for imagenet"):
        open_data(f"imagenet:{tmp_path}", filter="a>1")
