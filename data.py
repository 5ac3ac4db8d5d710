"""Data: captioned pictures (Sec. 5.2.2, 5.3.1, App. E).

    python data.py precompute --data folder:pictures --out runs/latents       # then: python train.py --data latents:runs/latents
    python data.py precompute --data "tar:cc12m/{00000..01241}.tar" --filter "aesthetic>5" --buckets --resolution 256 --weights BUNDLE --out DIR
    python data.py dedup --embeddings sscd.npy --out duplicates.json

The data set `shapes` is the miniature's world (shapes.py); the others are real pictures. Every data set is indexed: `dataset[i]` and
`dataset.captions(i)` are functions of the seed and i alone; order, batches and what is computed ahead are in pipeline.py. Nothing here imports torch but to write a file.
"""

import gzip
import io
import itertools
import json
import math
import os
import re
import sys
import zlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from config import flag, one_line_errors, parse_config, subcommand, unknown
from shapes import ASPECTS, KINDS, LEVELS, SIGNS, cells, edited, original_caption, random_scene, render, synthetic_caption, twin
from shards import (PICTURE_ERRORS, bucket_sizes, cached_index, captions_of, check_columns, expand, index_shards, nearest_buckets, numbers, parse_filter,
                    read_at, read_header, read_index, reason, upright_size)

# ---------------------------------------------------------------------------------------------------------------
# Data sets

@dataclass(frozen=True)
class Sample:
    image: np.ndarray         # (H, W, 3) uint8; of Latents: (C, h, w) float32
    original: str             # of Latents: the caption's embeddings
    synthetic: str = ""       # "" where the source has one caption only

    def caption(self, rng, synthetic_share=0.5):
        """One of the captions: the synthetic one with probability `synthetic_share`, where there is one."""
        return self.synthetic if self.synthetic and rng.random() < synthetic_share else self.original


class Unreadable(ValueError):
    """A sample that cannot be read: its name, and why."""

    def __init__(self, name, why):
        super().__init__(f"{name} cannot be read ({why})")
        self.name, self.why = str(name), str(why)


class Dataset:
    """`dataset[i]` -> Sample, or raises Unreadable; `dataset.captions(i)` -> its (original, synthetic) without the picture.

    `groups`: for each size of picture, the items to train on; `skipped`: {name: why} of what was found unusable on opening."""

    options = ()      # those of open_data that it takes
    skipped = cached_property(lambda self: {})
    groups = cached_property(lambda self: [range(len(self))])


class Shapes(Dataset):
    """The world of shapes.py: as many scenes as one asks for, of one level or (`all`) of each in turn; or (`signs`) lattices of which three in ten have a sign;
    or (`texts`) `all` in words only, of any (shape, color) pair.
    No scene of another split is drawn from the same random numbers."""

    options = "buckets", "keep_resolution"
    twins = False  # every scene at an odd index is the twin of the one before

    def __init__(self, level="lattice", width=64, height=64, split="train", seed=0, buckets=False, keep_resolution=0):
        levels = {level: (level,) for level in LEVELS} | {"all": LEVELS, "signs": ("lattice",), "texts": LEVELS}
        if level not in levels:
            raise unknown("level of shapes", level, levels)
        self.levels, self.held_out = levels[level], None if level == "texts" else split == "unseen"
        self.kinds = SIGNS if level == "signs" else KINDS
        self.seed = seed, ("train", "val", "unseen").index(split)
        self.sizes = [(16 * round(width * columns / 64), 16 * round(width * rows / 64)) for columns, rows in ASPECTS] if buckets else [(width, height)]
        if keep_resolution:
            self.sizes = self.sizes * 2 + [(keep_resolution, keep_resolution)] * len(self.sizes)

    def __len__(self):
        return 2 ** 31

    @cached_property
    def groups(self):
        """A scene of n sizes has one of them by its number."""
        n = len(self.sizes)
        return [range(k, n * len(self), n) for k in range(n)]

    def size(self, index):
        return self.sizes[index % len(self.sizes)]

    def scene(self, index):
        if self.twins and index % 2:
            scene, rng = self.scene(index - 1)
            return twin(rng, scene), rng
        rng = np.random.default_rng((*self.seed, index))
        return random_scene(rng, self.level(index), *cells(*self.size(index)), self.held_out, self.kinds), rng

    def level(self, index):
        return self.levels[(index // 2 if self.twins else index) // len(self.sizes) % len(self.levels)]

    def captions(self, index):
        """(original, synthetic), without drawing."""
        return self.tell(*self.scene(index))

    def tell(self, scene, rng):
        return original_caption(scene, rng), synthetic_caption(scene, rng)

    def draw(self, scene, index):
        if self.held_out is None:
            raise ValueError("shapes:texts has no pictures, it is for --stage t5")
        return render(scene, *self.size(index))

    def __getitem__(self, index):
        scene, rng = self.scene(index)
        return Sample(self.draw(scene, index), *self.tell(scene, rng))


class ShapeEdits(Shapes):
    """Scenes edited: samples as those of Edits below, without end."""

    def edit(self, index):
        """(scene, kind of the edit, instruction, edited scene)."""
        scene, rng = self.scene(index)
        return scene, *edited(rng, scene, self.level(index))

    def captions(self, index):
        return self.edit(index)[2], ""

    def __getitem__(self, index):
        scene, _, instruction, after = self.edit(index)
        return Sample(np.concatenate([self.draw(s, index) for s in (after, scene)], 2), instruction)


def upright(image):
    """A PIL image as RGB, as its EXIF says turned, and on white where it is transparent."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def fit(image, width, height):
    """A PIL image, upright, scaled and centre-cropped to (height, width, 3) uint8."""
    image = upright(image)
    scale = max(width / image.width, height / image.height)
    w, h = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    left, top = (w - width) // 2, (h - height) // 2
    return np.asarray(image.resize((w, h), Image.Resampling.LANCZOS).crop((left, top, left + width, top + height)))


class Pictures(Dataset):
    """Pictures of many sizes, each cropped to width x height or, with `buckets`, to the bucket of its aspect ratio."""

    options = "filter", "buckets", "upscale"

    def __init__(self, width, height, seed, buckets, upscale):
        if buckets and width != height:
            raise ValueError(f"buckets have the area of a square, the size is {width} x {height}")
        self.sizes, self.bucket = bucket_sizes(width) if buckets else [(width, height)], None
        self.seed, self.upscale = seed, upscale

    def arrange(self, bucket, part):
        """Trains on the range `part` of the items, in groups by bucket: (n,) numbers of self.sizes, or negative for an item that is left out."""
        self.bucket = bucket
        groups = [np.flatnonzero(bucket[part.start:part.stop] == k).astype(np.uint32) + np.uint32(part.start) for k in range(len(self.sizes))]
        self.groups = [group for group in groups if len(group)]
        if small := np.count_nonzero(bucket == -1):
            self.skipped["pictures smaller than their bucket (--upscale takes them)"] = str(small)
        if not self.groups:
            raise ValueError(f"no picture is left of {len(part)}: {small} are too small (--upscale takes them), the others are not what --filter wants")

    def cropped(self, file, index, name, captions):
        """The Sample of an open file."""
        try:
            with Image.open(file) as image:
                return Sample(fit(image, *self.sizes[0 if self.bucket is None else self.bucket[index]]), *captions)
        except PICTURE_ERRORS as error:
            raise Unreadable(name, reason(error)) from None


class Folder(Pictures):
    """Images of any size with captions: `name.txt` beside `name.png`, or lines {"file_name": ..., "text": ...} of metadata.jsonl, where
    "synthetic" may be a second caption and numbers are columns to filter by."""

    SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}

    def __init__(self, folder, width=64, height=64, split="train", seed=0, filter="", buckets=False, upscale=False):
        super().__init__(width, height, seed, buckets, upscale)
        if not Path(folder).is_dir():
            raise ValueError(f"{folder} is no folder")
        self.items = self.find(Path(folder), split, filter)
        if buckets:
            self.arrange(self.in_buckets(*self.measured()), range(len(self.items)))

    def find(self, root, split, filter):
        """Sorted (path, original, synthetic) of the split."""
        jsonl = root / "metadata.jsonl"
        if filter and not jsonl.exists():
            raise ValueError(f"{root} has no metadata.jsonl with columns for --filter {filter!r}")
        found = sorted(self.listed(jsonl, filter) if jsonl.exists() else self.beside(root))
        self.skipped.update({path: "no caption" for path, original, synthetic in found if not original + synthetic})
        found = [(path, original or synthetic, synthetic) for path, original, synthetic in found if original + synthetic]
        if not found:
            raise ValueError(f"{root} holds no image with a caption (name.png + name.txt, or metadata.jsonl)" + f" that --filter {filter!r} wants" * bool(filter))
        return every_20th(found, split)

    def beside(self, root):
        for path in root.rglob("*"):
            if path.suffix.lower() in self.SUFFIXES and path.with_suffix(".txt").exists():
                yield str(path), path.with_suffix(".txt").read_text("utf-8", errors="replace").strip(), ""

    def listed(self, jsonl, filter):
        rows = []
        for number, line in enumerate(jsonl.read_bytes().splitlines(), 1):
            try:
                row = json.loads(line)
                rows.append((str(jsonl.parent / row["file_name"]), row["text"].strip(), row.get("synthetic", "").strip(), numbers(row)))
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
                raise ValueError(f"{jsonl} line {number} is no JSON object with file_name and text, both strings") from None
        known = {name for *_, columns in rows for name in columns}
        wanted, test = parse_filter(filter) if filter else ((), lambda columns: True)
        check_columns({*wanted}, known)
        return [row[:3] for row in rows if test({name: row[3].get(name, math.nan) for name in wanted})]

    def measure(self, path):
        with Image.open(path) as image:
            return upright_size(image)

    def measured(self):
        """((n, 2) widths and heights, (n,) whether they could be read) of the pictures' headers."""
        sizes = np.ones((len(self.items), 2))
        readable = np.ones(len(self.items), bool)
        for i, (path, *_) in enumerate(tqdm(self.items, "sizes", unit="picture", delay=2)):
            try:
                sizes[i] = self.measure(path)
            except PICTURE_ERRORS as error:
                self.skipped[path], readable[i] = reason(error), False
        return sizes, readable

    def in_buckets(self, sizes, readable):
        """(n,) numbers of self.sizes, for what `measured` found; -2 where it could read nothing."""
        return np.where(readable, nearest_buckets(self.sizes, *sizes.T, self.upscale), -2)

    def __len__(self):
        return len(self.items)

    def captions(self, index):
        return self.items[index][1:]

    def __getitem__(self, index):
        path = self.items[index][0]
        return self.cropped(path, index, path, self.captions(index))


def every_20th(items, split, column=0):
    """The split of a list of tuples: those with every 20th entry of `column` are for validation, so that what has two captions is in one split; of fewer than 20 entries, all are for both."""
    number = {entry: i for i, entry in enumerate(dict.fromkeys(item[column] for item in items))}
    return [item for item in items if len(number) < 20 or (number[item[column]] % 20 == 19) == (split != "train")]


def photo_of(names, seed):
    """The paper's caption for classes, "a photo of a <class name>", with one of the class's names drawn at random (Sec. 5.1)."""
    return f"a photo of a {np.random.default_rng(seed).choice(names)}"


class Couples(Folder):
    """Two pictures of one size and a text, by the names KEYS: lines {"TEXT": ..., "FIRST": file, "SECOND": file} of a jsonl file or of DIR/metadata.jsonl, the files' paths as seen from
    there; or in DIR name.txt, name.FIRST.png and name.SECOND.png. A file may also be latents, name.npy: (C, h, w), normalised, of just the wanted size.

    dataset[i].image has both, side by side on the channels: (H, W, 6) uint8, or (2C, h, w) float32 of latents."""

    KEYS = "text", "first", "second"
    SPLIT_BY = 0                            # of (first, second, text)
    SUFFIXES = {*Folder.SUFFIXES, ".npy"}
    options = "buckets", "upscale"

    def __init__(self, path, width=64, height=64, split="train", seed=0, buckets=False, upscale=False):
        Pictures.__init__(self, width, height, seed, buckets, upscale)
        path = Path(path)
        jsonl = path / "metadata.jsonl" if path.is_dir() else path
        found = sorted(self.listed(jsonl) if jsonl.exists() else self.beside(path))
        self.skipped.update({first: "no text" for first, _, text in found if not text})
        found = [row for row in found if row[2]]
        if not found:
            text, *files = self.KEYS
            raise ValueError(f"{path} holds no {text} with two pictures (lines of {', '.join(self.KEYS)}, or files name.txt, name.{files[0]}.png, name.{files[1]}.png)")
        self.items = every_20th(found, split, self.SPLIT_BY)
        if buckets:
            self.arrange(self.in_buckets(*self.measured()), range(len(self.items)))

    def in_buckets(self, sizes, readable, most=16):
        """Pictures of few sizes, of whole tokens and no larger than the buckets, as those that a model drew, keep them."""
        own, bucket = np.unique(sizes[readable], axis=0, return_inverse=True)
        if self.upscale or len(own) > most or (own % 16).any() or own.prod(1).max(initial=0) > 9 / 8 * max(map(math.prod, self.sizes)):
            return super().in_buckets(sizes, readable)
        self.sizes, found = [*map(tuple, own.astype(int).tolist())], np.full(len(sizes), -2)
        found[readable] = bucket.ravel()
        return found

    def listed(self, jsonl):
        """(first, second, text) of each line."""
        for number, line in enumerate(jsonl.read_bytes().splitlines(), 1):
            try:
                text, first, second = (json.loads(line)[key] for key in self.KEYS)
                yield str(jsonl.parent / first), str(jsonl.parent / second), text.strip()
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{jsonl} line {number} is no JSON object with {', '.join(self.KEYS)}, all strings") from None

    def beside(self, root):
        for path in root.rglob("*.txt"):
            files = [next((str(file) for suffix in sorted(self.SUFFIXES) if (file := path.with_suffix(f".{key}{suffix}")).exists()), None) for key in self.KEYS[1:]]
            if all(files):
                yield *files, path.read_text("utf-8", errors="replace").strip()

    def measure(self, path):
        if not path.endswith(".npy"):
            return super().measure(path)
        _, h, w = latent_file(path).shape
        return 8 * w, 8 * h

    def captions(self, index):
        return self.items[index][2], ""

    def __getitem__(self, index):
        *paths, text = self.items[index]
        width, height = self.sizes[0 if self.bucket is None else self.bucket[index]]
        both = [latent_file(path) if path.endswith(".npy") else self.cropped(path, index, path, ("",)).image for path in paths]
        for path, x in zip(paths, both):
            if x.shape != both[0].shape or x.ndim != 3 or x.dtype != both[0].dtype or x.dtype != np.uint8 and x.shape[1:] != (height // 8, width // 8):
                raise Unreadable(path, f"it is {x.shape} {x.dtype} beside {both[0].shape} {both[0].dtype}, for pictures of {width} x {height} pixels")
        return Sample(np.concatenate(both, 2 if both[0].dtype == np.uint8 else 0), text)


def latent_file(path):
    try:
        return np.load(path).astype(np.float32)
    except (OSError, ValueError) as error:
        raise Unreadable(path, reason(error)) from None


class Pairs(Couples):
    """What is preferred over what for a prompt (App. C)."""
    KEYS = "prompt", "chosen", "rejected"
    SPLIT_BY = 2


class Edits(Couples):
    """What an instruction makes of a picture (App. D)."""
    KEYS = "instruction", "edited", "image"
    SPLIT_BY = 1


class ImageNet(Folder):
    """Class folders `n01440764/*.JPEG` in DIR/train and DIR/val, or in DIR alone; DIR holds the synset mapping, lines `n01440764 tench, Tinca tinca`."""

    options = "buckets", "upscale"

    def find(self, root, split, filter):
        """(path, number of the class) of the split."""
        mapping = next(iter(sorted(root.glob("*synset*.txt"))), None)
        if mapping is None:
            raise ValueError(f"{root} holds no synset mapping (LOC_synset_mapping.txt: lines `n01440764 tench, Tinca tinca`)")
        classes = re.findall(r"^(n\d+)\s+(\S.*?)\s*$", mapping.read_text("utf-8", errors="replace"), re.MULTILINE)
        self.names, number = [names.split(", ") for _, names in classes], {synset: k for k, (synset, _) in enumerate(classes)}

        def pictures(folder):
            synsets = sorted(path for path in folder.glob("n[0-9]*") if path.is_dir())
            self.skipped.update({str(path): f"no class of {mapping.name}" for path in synsets if path.name not in number})
            return [(entry.path, number[path.name]) for path in synsets if path.name in number
                    for entry in sorted(os.scandir(path), key=lambda entry: entry.name) if Path(entry.name).suffix.lower() in self.SUFFIXES]

        train, val = pictures(root / "train"), pictures(root / "val")
        found = (train if split == "train" else val) if train and val else every_20th(train or pictures(root), split)
        if not found:
            raise ValueError(f"{root} holds no picture in a folder that {mapping.name} names")
        return found

    def captions(self, index):
        return photo_of(self.names[self.items[index][1]], (self.seed, index)), ""


class FashionMNIST(Dataset):
    """The idx files (`train-images-idx3-ubyte.gz` ...). Captions as the paper's for ImageNet."""

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
        return photo_of(self.NAMES[self.labels[index]], (self.seed, index)), ""

    def __getitem__(self, index):
        return Sample(fit(Image.fromarray(self.images[index]), self.width, self.height), *self.captions(index))


class Tar(Pictures):
    """`DIR/{00000..00099}.tar`: samples are members of one name: .jpg, .jpeg, .png or .webp with .txt or .json ("caption" or "text", "synthetic"; numbers
    are columns to filter by). The last 20th, 4096 at most, is for validation. What cannot be used, such as a shard's end that is cut off, is in `skipped`."""

    def __init__(self, pattern, width=64, height=64, split="train", seed=0, filter="", buckets=False, upscale=False):
        super().__init__(width, height, seed, buckets, upscale)
        self.shards = expand(pattern)
        if absent := [shard for shard in self.shards if not os.path.isfile(shard)]:
            raise ValueError(f"{absent[0]} is not there ({len(absent)} of {len(self.shards)} shards are missing)")
        if not self.shards:
            raise ValueError(f"{pattern} names no shard")
        headers = [read_header(shard) for shard in self.shards]
        if None in headers:
            index_shards([shard for shard, header in zip(self.shards, headers) if header is None])
            headers = [header or read_header(shard) for shard, header in zip(self.shards, headers)]
        if None in headers:
            raise ValueError(f"{self.shards[headers.index(None)]} changes while it is read")
        for header in headers:
            self.skipped.update(header["skipped"])
        self.ends = np.cumsum([header["samples"] for header in headers])
        if not len(self):
            raise ValueError(f"{pattern} holds no image with a caption; the first of {len(self.skipped)} that were skipped: {'; '.join(next(iter(self.skipped.items()), ()))}")
        part = held_out_end(len(self), split)
        if filter or buckets:
            self.arrange(self.chosen(filter, {name for header in headers for name in header["columns"]}), part)
        else:
            self.groups = [part]

    def chosen(self, filter, known):
        """The bucket of each sample; -2 for those that the filter does not want."""
        wanted, test = parse_filter(filter) if filter else ((), None)
        check_columns({*wanted}, known)
        bucket = np.zeros(len(self), np.int16)
        for shard, end in zip(self.shards, self.ends):
            records, columns = read_index(shard)
            mine, absent = bucket[end - len(records):end], np.full(len(records), np.nan, np.float32)
            if len(self.sizes) > 1 and len(records):
                mine[:] = nearest_buckets(self.sizes, columns["width"], columns["height"], self.upscale)
            if wanted:
                mine[~test({name: columns.get(name, absent) for name in wanted})] = -2
        return bucket

    def __len__(self):
        return int(self.ends[-1])

    def read(self, index, *parts):
        """(name of a sample's picture, its captions, bytes of each of the other parts)."""
        number = int(np.searchsorted(self.ends, index, "right"))
        shard = self.shards[number]
        try:
            record = cached_index(shard)[0][index - int(self.ends[number])]     # counted from the shard's end
            with open(shard, "rb") as file:
                name = read_at(file, record["image"] - 512, 100).rstrip(b"\0").decode("utf-8", "replace")    # the tar's header of the member
                text, meta, *others = (read_at(file, record[part], record[part + "_size"]) for part in ("text", "meta", *parts))
            return f"{shard}/{name}", captions_of(text, meta), *others
        except (OSError, ValueError) as error:                                  # the shard is not what it was
            raise Unreadable(f"{shard}, sample {index}", reason(error)) from None

    def captions(self, index):
        return self.read(index)[1]

    def __getitem__(self, index):
        name, captions, image = self.read(index, "image")
        return self.cropped(io.BytesIO(image), index, name, captions)


def held_out_end(n, split):
    """The range of n items that a split trains on: validation has the last 20th, 4096 at most; of fewer than 20, all are for both."""
    held_out = min(n // 20, 4096)
    return range(n) if n < 20 else range(n - held_out) if split == "train" else range(n - held_out, n)


# ---------------------------------------------------------------------------------------------------------------
# Latents and text embeddings computed ahead (App. E.1)

class Latents(Dataset):
    """What `python data.py precompute` wrote: shards of latents (n, C, h, w) float32, and for each different caption in them the CLIPs' states (clip tokens,
    clip width) and T5's (tokens, width), both float16, and the pooled vector, float32; read by memory map. `captions(i)` is text, dataset[i] a Sample
    of latents and, for each caption, (CLIPs' states, T5's states, pooled)."""

    def __init__(self, folder, width=64, height=64, split="train", seed=0):
        self.folder = Path(folder)
        if not (self.folder / "index.json").is_file():
            raise ValueError(f"{folder} holds no latents, or only a part: `python data.py precompute --out {folder} ...` makes them, and goes on where it stopped")
        try:
            self.about = json.loads((self.folder / "index.json").read_text())
            resolution, self.skipped, _ = (self.about[name] for name in ("resolution", "skipped", "fingerprint"))
            sizes = [(int(n), size) for n, size in self.about["shards"]]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{folder}/index.json is not what `python data.py precompute` wrote") from None
        if not width == height == resolution:
            raise ValueError(f"{folder} holds latents of pictures at --resolution {resolution}, not {width} x {height}")
        self.ends = np.cumsum([n for n, _ in sizes])
        self.groups, start, apart = [], 0, max(len(self) // 4096, 20)
        for _, shards in itertools.groupby((shard for shard in sizes if shard[0]), lambda shard: shard[1]):   # shards of one size lie side by side
            rows = np.arange(start, start + sum(samples for samples, _ in shards), dtype=np.uint32)
            part = rows if len(self) < 20 else rows[(rows % apart == apart - 1) == (split != "train")]    # from all over: neighbours may be of one class
            if len(part):
                self.groups.append(part)
            start += len(rows)

    def __len__(self):
        return int(self.ends[-1])

    def place(self, index):
        """(the shard's number, the row in it)."""
        number = int(np.searchsorted(self.ends, index, "right"))
        return number, index - int(self.ends[number])

    def captions(self, index):
        number, row = self.place(index)
        texts = read_texts(self.folder / f"{number:05}")
        return tuple(texts[k] if k >= 0 else "" for k in read_arrays(self.folder / f"{number:05}")["text"][row])

    def __getitem__(self, index):
        number, row = self.place(index)
        arrays = read_arrays(self.folder / f"{number:05}")
        texts = [tuple(arrays[name][k] for name in ("clip", "t5", "pooled")) if k >= 0 else "" for k in arrays["text"][row]]
        return Sample(arrays["latents"][row], *texts)              # views: what is not looked at is not read


LATENT_ARRAYS = ("latents", "text", "clip", "t5", "pooled")


@lru_cache(256)
def read_arrays(shard):
    try:
        return {name: np.load(shard / f"{name}.npy", mmap_mode="r") for name in LATENT_ARRAYS}
    except (OSError, ValueError) as error:
        raise Unreadable(shard, error) from None


@lru_cache(16)
def read_texts(shard):
    return json.loads((shard / "shard.json").read_text("utf-8"))["captions"]


# ---------------------------------------------------------------------------------------------------------------

SOURCES = {"shapes": Shapes, "folder": Folder, "imagenet": ImageNet, "fashion-mnist": FashionMNIST, "tar": Tar, "latents": Latents, "shape-edits": ShapeEdits, "edits": Edits,
           "pairs": Pairs}
SPECS = "shapes[:LEVEL], folder:DIR, imagenet:DIR, fashion-mnist:DIR, tar:DIR/{00000..00099}.tar, latents:DIR"
COUPLES = "shape-edits[:LEVEL], edits:DIR|FILE.jsonl, pairs:DIR|FILE.jsonl"


def open_data(spec, width=64, height=64, split="train", seed=0, **options):
    """The data set of a SPEC. `split` is train or val (shapes also: unseen); options: filter, buckets, upscale, where the pictures have many sizes; of shapes, buckets
    and keep_resolution, the side of squares that are a third of the samples."""
    name, _, argument = spec.partition(":")
    if name not in SOURCES:
        raise unknown("data", name, [*f"{SPECS}, {COUPLES}".split(", ")])
    if not issubclass(SOURCES[name], Shapes) and not argument:
        raise ValueError(f"--data {name} needs a folder: {name}:DIR")
    options = {key: value for key, value in options.items() if value}
    if refused := [key for key in options if key not in SOURCES[name].options]:
        raise ValueError(f"--{refused[0].replace('_', '-')} is for {', '.join(other for other in SOURCES if refused[0] in SOURCES[other].options)} alone, not for {name}")
    return SOURCES[name](*[argument] * bool(argument), width=width, height=height, split=split, seed=seed, **options)


@dataclass
class PrecomputeConfig:
    data: str = flag("shapes", f"{SPECS}, {COUPLES}", "run")
    weights: str = flag("weights/mini", "bundle whose VAE and text encoders are used", "run")
    out: str = flag("runs/latents", "folder to write, then --data latents:DIR; the same command goes on where it stopped", "run")
    samples: int = flag(0, "pictures to take; 0: all, of data that ends", "data")
    resolution: int = flag(64, "side of the pictures", "data", unit="pixels")
    filter: str = flag("", "which pictures, by columns of the metadata: \"aesthetic>5 and nsfw<0.2\"", "data")
    buckets: bool = flag(False, "keep aspect ratios: sizes of about resolution^2 pixels", "data")
    upscale: bool = flag(False, "with buckets: take pictures smaller than their bucket too", "data")
    seed: int = flag(0, "of `shapes` and of names of classes", "data")
    shard: int = flag(2048, "pictures a shard", "data")
    batch_size: int = flag(64, "pictures encoded at once", "machine")
    workers: int = flag(2, "processes that read or draw pictures", "machine")
    device: str = flag("cpu", "cpu, cuda, mps", "machine")
    precision: str = flag("auto", "of the text encoders; auto: bf16 on GPUs and on CPUs that multiply in it", "machine", choices=("auto", "fp32", "bf16"))


@dataclass
class DedupConfig:
    embeddings: str = flag("", "a .npy file (N, D), a vector an item: of SSCD in the paper", "run")
    out: str = flag("duplicates.json", "the report to write", "run")
    threshold: float = flag(0.5, "cosine similarity from which two items are duplicates", "run")
    clusters: int = flag(0, "clusters within which duplicates are looked for; 0: one for each 100,000 vectors (the paper has 16,000)", "run")
    seed: int = flag(0, "of the clustering", "run")
    threads: int = flag(0, "CPU threads; 0: torch's choice", "machine")


COMMANDS = {"precompute": PrecomputeConfig, "dedup": DedupConfig}


def main():
    command = subcommand(COMMANDS, __doc__)
    cfg = parse_config(COMMANDS[command], sys.argv[2:], __doc__)
    import pipeline
    {"precompute": pipeline.precompute, "dedup": pipeline.dedup}[command](cfg)


if __name__ == "__main__":
    one_line_errors(main)
