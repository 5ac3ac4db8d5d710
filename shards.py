"""Pictures by the million (Sec. 5.3.1, 5.3.2): tar shards read through an index, filters by metadata, buckets of aspect ratios.

Shards have the WebDataset layout, as CC12M is shipped: the members of one name are a sample, `x.jpg` with `x.txt` or `x.json`. An index beside
each shard says where its samples lie, how large their pictures are and what columns of numbers their .json has. So any sample is one read away
and nothing is unpacked; order, resuming and splitting over processes are as for any other data set. numpy and Pillow alone: 10 million samples' indices open
in a second (tests/test_shards.py).
"""

import itertools
import json
import math
import os
import re
import struct
import tarfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache

import numpy as np
from PIL import Image
from PIL.ContainerIO import ContainerIO
from tqdm import tqdm

PICTURE_ERRORS = OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError    # what Pillow raises on foreign bytes


def reason(error):
    """What is wrong, without the address of the file object that Pillow adds."""
    return re.sub(r" <.*>$", "", str(error))


RECORD = np.dtype([("image", "<u8"), ("text", "<u8"), ("meta", "<u8"), ("image_size", "<u4"), ("text_size", "<u4"), ("meta_size", "<u4")])
# where a sample's picture, .txt and .json lie, in bytes from the tar's start, and how long they are


# ---------------------------------------------------------------------------------------------------------------
# Tar shards

def expand(pattern):
    """'a/{00000..00099}.tar' -> the 100 names; a folder -> those of its .tar files."""
    if os.path.isdir(pattern):
        return sorted(entry.path for entry in os.scandir(pattern) if entry.name.endswith(".tar"))
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    names = [f"{pattern[:match.start()]}{k:0{len(first)}}{pattern[match.end():]}" for k in range(int(first), int(last) + 1)]
    return [full for name in names for full in expand(name)]


def captions_of(text, meta):
    """(original, synthetic) from the bytes of a sample's .txt and .json, either of which may be empty; ValueError where there is no caption."""
    fields = json.loads(meta) if meta else {}
    if not isinstance(fields, dict):
        raise ValueError("its .json is no object")
    caption, other, synthetic = (value.strip() if isinstance(value := fields.get(name), str) else "" for name in ("caption", "text", "synthetic"))
    original = text.decode("utf-8", "replace").strip() or caption or other or synthetic
    if not original:
        raise ValueError("no caption")
    return original, synthetic


def numbers(metadata):
    """What of a sample's metadata can be filtered by: {name: number}."""
    return {name: float(value) for name, value in metadata.items() if isinstance(value, (int, float))}


def upright_size(picture):
    """(width, height) of an open picture as it is to be seen; reads no pixels. (Pillow would, to look for a PNG's orientation.)"""
    turned = picture.format != "PNG" and picture.getexif().get(0x0112) in (5, 6, 7, 8)
    return picture.size[::-1] if turned else picture.size


def read_at(file, start, size):
    file.seek(int(start))
    return file.read(int(size))


def members(file, shard, skipped):
    """The entries of an open tar that are files; where the tar is cut off or damaged they end, and `skipped` says so."""
    place = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.offset_data + member.size > os.fstat(file.fileno()).st_size:
                    raise tarfile.ReadError("unexpected end of data")
                place = tar.offset
                if member.isfile():
                    yield member
            if read_at(file, tar.offset, 512) != bytes(512):    # a whole tar ends in zeros
                raise tarfile.ReadError("damaged, or unexpected end of data")
    except tarfile.TarError as error:
        skipped[shard] = f"{error}: nothing is read after byte {place}"


def described(file, parts):
    """(RECORD, {column: number}) of a sample's members, a dict by suffix; ValueError or Pillow's errors where it cannot be used."""
    image, text, meta = (next((parts[kind] for kind in kinds if kind in parts), None) for kinds in (("jpg", "jpeg", "png", "webp"), ("txt",), ("json",)))
    if image is None:
        raise ValueError("no picture")
    raw = [read_at(file, part.offset_data, part.size) if part else b"" for part in (text, meta)]
    captions_of(*raw)
    with Image.open(ContainerIO(file, image.offset_data, image.size)) as picture:
        width, height = upright_size(picture)
    places = [part.offset_data if part else 0 for part in (image, text, meta)]
    sizes = [part.size if part else 0 for part in (image, text, meta)]
    return (*places, *sizes), {**numbers(json.loads(raw[1] or b"{}")), "width": width, "height": height}


def index_shard(shard):
    """Writes SHARD.index: a line of JSON, a RECORD for each sample, then the columns that can be filtered by, float32, one after the other."""
    from checkpoint import write       # which imports torch: only where there is something to write
    records, rows, skipped, tar = [], [], {}, os.stat(shard)
    with open(shard, "rb") as file:
        for key, group in itertools.groupby(members(file, shard, skipped), lambda member: re.sub(r"\.[^/]*$", "", member.name)):
            try:
                record, row = described(file, {member.name[len(key) + 1:].lower(): member for member in group})
                records.append(record)
                rows.append(row)
            except (*PICTURE_ERRORS, OverflowError, RecursionError) as error:
                skipped[f"{shard}/{key}"] = reason(error)
    columns = sorted({name for row in rows for name in row})
    header = {"bytes": tar.st_size, "modified": tar.st_mtime_ns, "samples": len(records), "columns": columns, "skipped": skipped}

    def save(temporary):
        with open(temporary, "wb") as out:
            out.write(json.dumps(header).encode() + b"\n")
            out.write(np.array(records, RECORD).tobytes())
            for name in columns:
                out.write(np.array([row.get(name, math.nan) for row in rows], "<f4").tobytes())
    try:
        write(f"{shard}.index", save)
    except OSError as error:
        raise ValueError(f"{shard}.index cannot be written ({error.strerror}); a folder of symbolic links to the shards that can be written to will do") from None


def index_shards(shards):
    """Indexes shards, each by one process; every header is read, once and for all."""
    try:
        with ProcessPoolExecutor(min(len(shards), os.cpu_count())) as pool:
            for _ in tqdm(pool.map(index_shard, shards), "index", len(shards), unit="shard", delay=2):
                pass
    except BrokenProcessPool:
        raise ValueError("a process that indexes shards died (out of memory?); the indices that are whole stay") from None


def read_header(shard):
    """The header of SHARD.index, and as "start" the place of its first RECORD; None where there is no index, or one that is damaged or of another shard."""
    try:
        with open(f"{shard}.index", "rb") as file:
            header = json.loads(file.readline())
            header["start"], index, tar = file.tell(), os.fstat(file.fileno()), os.stat(shard)
        size = header["start"] + header["samples"] * (RECORD.itemsize + 4 * len(header["columns"]))
        return header if (header["bytes"], header["modified"], size) == (tar.st_size, tar.st_mtime_ns, index.st_size) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_index(shard):
    """(records (n,), {name: column (n,)}) of SHARD.index, by memory map."""
    header = read_header(shard)
    if header is None:
        raise ValueError(f"{shard} changed since its index was read")
    start, n = header["start"], header["samples"]
    if n == 0:
        return np.zeros(0, RECORD), {}
    whole = np.memmap(f"{shard}.index", np.uint8, "r")
    records, columns = np.split(whole[start:], [n * RECORD.itemsize])
    return records.view(RECORD), dict(zip(header["columns"], columns.view("<f4").reshape(-1, n)))


cached_index = lru_cache(256)(read_index)


# ---------------------------------------------------------------------------------------------------------------
# Filters

COMPARISONS = {"<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal, "==": np.equal, "!=": np.not_equal}
NUMBER, COLUMN = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", r"[A-Za-z_][\w.]*"


def parse_filter(text):
    """'aesthetic>5 and nsfw<0.2' -> (names of the columns, test); test({name: number or array}) is true for what is wanted.

    Columns are compared with numbers; `and`, `or`, `not` and parentheses join the comparisons. Where a sample lacks a column (NaN), its comparison is false."""
    tokens, names = [*re.findall(rf"{NUMBER}|{COLUMN}|[<>=!]=|\S", text), ""], set()

    def take(wanted):
        return tokens.pop(0) if re.fullmatch(wanted, tokens[0]) else None

    def expect(wanted, what):
        token = take(wanted)
        if token is None:
            raise ValueError(f"--filter {text!r}: {tokens[0] or 'the end'} stands where {what} should")
        return token

    def joined(word, part, combine):
        parts = [part()]
        while take(word):
            parts.append(part())
        return lambda columns: combine.reduce([test(columns) for test in parts])

    def either():
        return joined("or", both, np.logical_or)

    def both():
        return joined("and", one, np.logical_and)

    def one():
        if take("not"):
            test = one()
            return lambda columns: np.logical_not(test(columns))
        if take(r"\("):
            test = either()
            expect(r"\)", "a closing parenthesis")
            return test
        name = expect(COLUMN, "the name of a column")
        compare = COMPARISONS[expect("|".join(COMPARISONS), f"one of {' '.join(COMPARISONS)}")]
        value = float(expect(NUMBER, "a number"))
        names.add(name)
        return lambda columns: compare(columns[name], value) & ~np.isnan(columns[name])

    test = either()
    expect("", "`and`, `or` or the end")
    return names, test


def check_columns(wanted, known):
    """Refuses a filter by a column that no sample has."""
    if unknown := sorted(wanted - known):
        raise ValueError(f"--filter: no sample has the column {unknown[0]!r}; known: {', '.join(sorted(known)) or 'none'}")


# ---------------------------------------------------------------------------------------------------------------
# Buckets of aspect ratios

def bucket_sizes(side):
    """(width, height) of each bucket, from the highest to the widest: multiples of 16 with width * height ~ side^2, from 1:4 to 4:1."""
    pairs = [(short, 16 * round(side * side / short / 16)) for short in range(16 * -(-side // 32), side + 1, 16)]
    return sorted({*pairs, *(pair[::-1] for pair in pairs)}, key=lambda pair: pair[0] / pair[1])


def nearest_buckets(sizes, widths, heights, upscale=False):
    """The bucket of the nearest aspect ratio for pictures of widths x heights pixels, two (n,); -1 where it is larger than the picture, unless `upscale`."""
    aspects = np.log([width / height for width, height in sizes])
    nearest = np.searchsorted((aspects[1:] + aspects[:-1]) / 2, np.log(widths / heights))
    fits = (np.array(sizes)[nearest] <= np.stack([widths, heights], 1)).all(1)
    return np.where(fits | upscale, nearest, -1).astype(np.int16)
