"""From data sets to training steps: order and batches, latents and text embeddings computed ahead (App. E.1), de-duplication (App. E.2, Alg. 1).

Step k takes the samples k B, ..., k B + B - 1 of an endless series. Sample s of it, its size and its caption depend on the seed and s alone: not on the
number of processes (`rank` of `world` takes every world-th sample of a batch), not on worker processes, nor on where a run was stopped.
"""

import contextlib
import copy
import hashlib
import heapq
import itertools
import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

import checkpoint
from config import check_least, going_on
from data import LATENT_ARRAYS, Latents, Unreadable, open_data
from mmdit import linear
from sample import check_device, check_size, from_uint8


# ---------------------------------------------------------------------------------------------------------------
# Order

def shuffled(start, n, seed, window=2 ** 14, block=2 ** 8):
    """Positions start, start + 1, ... of an endless series of shuffled epochs over n items.

    Up to a window of items are mixed fully. Of more, blocks of neighbours, which lie side by side in a shard, are shuffled and each window's worth of
    blocks is mixed: what a shuffle buffer does to a stream, but any position is reached at once."""
    if n >= 2 ** 31:  # endless data needs no shuffling
        yield from itertools.count(start)
    for epoch in itertools.count(start // n):
        rng = np.random.default_rng((seed, 3, epoch))
        turn, blocks = rng.integers(n), np.append(rng.permutation(n // block), n // block)      # the last one is shorter; `turn` makes it another each time
        first, skip = divmod(max(start - epoch * n, 0), window)
        for number in range(first, -(-n // window)):
            rows = blocks[number * window // block:(number + 1) * window // block, None] * block + np.arange(block)
            items = np.random.default_rng((seed, 4, epoch, number)).permutation(rows[rows < n])
            yield from ((items + turn) % n)[skip:].tolist()
            skip = 0


def turns(lengths, seed, start=0):
    """Yields (group, its how many-th batch) for steps start, start + 1, ...: each group at even intervals in proportion to its length, so none starves."""
    shares, offsets = np.array(lengths) / sum(lengths), np.random.default_rng((seed, 5)).random(len(lengths))
    begin = max(start - len(lengths), 0)
    past = np.maximum(np.ceil(begin * shares - offsets), 0).astype(int).tolist()    # batches that are due before step `begin`: no more than `start`

    def due(group):
        for j in itertools.count(past[group]):
            yield (j + offsets[group]) / shares[group], group, j

    yield from ((group, j) for _, group, j in itertools.islice(heapq.merge(*map(due, range(len(lengths)))), start - sum(past), None))


def keys(groups, batch_size, seed, start=0, rank=0, world=1):
    """Yields for each step from sample `start` on this process's [(position in the series, group, item)]: a batch is of one group, the same in every process."""
    if start % batch_size or batch_size % world:
        raise ValueError(f"a batch is {batch_size} samples: it can neither start at sample {start} nor be split over {world} processes unless they divide")
    series = {}
    for step, (group, turn) in enumerate(turns([*map(len, groups)], seed, start // batch_size), start // batch_size):
        if group not in series:
            series[group] = shuffled(turn * batch_size, len(groups[group]), seed)
        batch = enumerate(itertools.islice(series[group], batch_size), step * batch_size)
        yield [(position, group, int(groups[group][item])) for position, item in batch][rank::world]


# ---------------------------------------------------------------------------------------------------------------
# Batches, read ahead by worker processes

SKIPPED = {}  # name of what could not be used: why


def report_skipped(most=20):
    """Says on stderr what had to be left out since it last did: how many, and `most` names."""
    if SKIPPED:
        more = [f"... and {len(SKIPPED) - most} more"] * (len(SKIPPED) > most)
        tqdm.write("\n".join([f"skipped, {len(SKIPPED)} in all:", *(f"  {name} ({why})" for name, why in itertools.islice(SKIPPED.items(), most)), *more]), file=sys.stderr)
        SKIPPED.clear()


class NothingReadable(ValueError):
    """In a group of pictures."""


class Reader:
    """key -> (read(dataset, item, rng), {what was skipped: why}), for the worker processes. In place of an unreadable item comes another of its group, drawn
    from the seed and the position; (None, ...) after `attempts`."""

    def __init__(self, dataset, read, seed, attempts=100):
        self.dataset, self.read, self.seed, self.attempts = dataset, read, seed, attempts

    def __getitem__(self, key):
        position, group, item = key
        rng, skipped = np.random.default_rng((self.seed, 7, position)), {}
        for _ in range(self.attempts):
            try:
                return self.read(self.dataset, item, rng), skipped
            except Unreadable as error:
                skipped[error.name] = error.why
                items = self.dataset.groups[group]
                item = int(items[rng.integers(len(items))])
        return None, skipped


def collate(stack, rows):
    """Reader's rows -> (stack(what was read), {what was skipped: why}); (None, ...) where nothing could be read."""
    read, skipped = zip(*rows)
    skipped = {name: why for found in skipped for name, why in found.items()}
    return None if any(row is None for row in read) else stack(read), skipped


@contextlib.contextmanager
def dead_workers_named():
    """A worker process that refuses or dies is one line; what it read is read again after --resume."""
    try:
        yield
    except NothingReadable:
        raise
    except ValueError as error:                         # before what was said torch puts the worker's traceback
        raise ValueError(str(error).rpartition("ValueError: ")[2].strip()) from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ValueError(f"a process that reads data died: {checkpoint.first_line(error)} (out of memory? fewer --workers take less, 0 is none)") from None


def outlive_signals(worker):
    """A cluster's preemption or Ctrl-C may reach the processes that read, too: they go on until the one that trains has saved and ends them. macOS does not tell
    who sent SIGTERM; there they outlive one to the whole group, torchrun's, by leaving it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=obey_parent, daemon=True).start()
    elif hasattr(os, "setpgid"):
        os.setpgid(0, 0)


def obey_parent():
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def loaders(cfg):
    """The DataLoader's settings of the processes that read."""
    return dict(num_workers=cfg.workers, worker_init_fn=outlive_signals, prefetch_factor=4 if cfg.workers else None)


def loaded(dataset, read, cfg, batch_size, start=0, rank=0, world=1, stack=list):
    """Yields stack(read(dataset, item, rng) of this process's samples of a batch), for each batch from sample `start` on."""
    SKIPPED.update(dataset.skipped)
    order = keys(dataset.groups, batch_size, cfg.seed, start, rank, world)
    loader = DataLoader(Reader(dataset, read, cfg.seed), batch_sampler=order, collate_fn=partial(collate, stack), **loaders(cfg))
    with dead_workers_named():
        for batch, skipped in loader:
            SKIPPED.update(skipped)
            if batch is None:
                raise NothingReadable(f"100 pictures in a row cannot be read, one of them {next(iter(skipped))} ({skipped[next(iter(skipped))]})")
            yield batch


def read_picture(dataset, item, rng, share):
    sample = dataset[item]
    return sample.caption(rng, share), sample


def read_captions(dataset, item, rng):
    return dataset.captions(item)


def read_latents(dataset, item, rng, share):
    sample = dataset[item]
    return sample.image, *sample.caption(rng, share)


def batches(dataset, batch_size, cfg, start=0, rank=0, world=1):
    """Yields (images (B, 3, H, W) in [-1, 1], captions, samples) from sample `start` on."""
    for rows in loaded(dataset, partial(read_picture, share=cfg.synthetic_share), cfg, batch_size, start, rank, world):
        captions, samples = zip(*rows)
        yield to_tensor(samples), list(captions), samples


def caption_batches(dataset, batch_size, cfg, start=0):
    """Yields lists of (original, synthetic) captions: `batches` without pictures."""
    yield from loaded(dataset, read_captions, cfg, batch_size, start)


def to_tensor(samples):
    """Samples -> (B, 3, H, W) in [-1, 1], or (B, 6, H, W) of two pictures each; latents as they are."""
    images = torch.from_numpy(np.stack([s.image for s in samples]))
    return from_uint8(images) if images.dtype == torch.uint8 else images


def count(dataset):
    """How many items there are to train on."""
    return sum(map(len, dataset.groups))


def first(dataset, n, cfg):
    """The first n samples at most, as `batches` yields them: for validation."""
    return next(batches(dataset, min(n, count(dataset)), replace(cfg, workers=0)))


def some_captions(dataset, n):
    """(original, synthetic) of n items at most, to train tokenizers on and for validation: from all over, as neighbours may be of one class."""
    return [dataset.captions(int(item)) for item in itertools.islice(itertools.chain(*spread(dataset, n)), n)]


def spread(dataset, n):
    """Of each group its share of n items, rounded up, from all over it."""
    total = count(dataset)
    for items in dataset.groups:
        share = min(-(-n * len(items) // total), len(items))
        yield items if share == len(items) else [items[i * len(items) // share] for i in range(share)]


def pieces(items, size):
    return [items[i:i + size] for i in range(0, len(items), size)]


# ---------------------------------------------------------------------------------------------------------------
# What the frozen parts make of pictures and captions, text in half precision (App. E.1)

def precision(cfg):
    """The type to multiply in, bf16 where asked for; auto: where it pays. CPUs with AVX512-BF16 or AMX multiply matrices 4 times as fast in bf16, others far more slowly."""
    kind = cfg.device.split(":")[0]
    pays = kind == "cuda" or kind == "cpu" and any(getattr(torch.cpu, "get_capabilities", dict)().get(name) for name in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if cfg.precision == "bf16" or cfg.precision == "auto" and pays else torch.float32


def autocast(cfg):
    return torch.autocast(cfg.device.split(":")[0], torch.bfloat16, enabled=precision(cfg) is torch.bfloat16)


@torch.no_grad()
def encode_images(bundle, images, cfg):
    """(B, 3, H, W) in [-1, 1] -> normalised latents (B, C, h, w), the posterior's mean; of two pictures a sample, (B, 6, H, W) -> (B, 2C, h, w)."""
    pictures = images.unflatten(1, (-1, 3)).flatten(0, 1)
    few = min(max(2 ** 22 // pictures[0, 0].numel(), 1), 64)                  # four of 1024 x 1024: a GPU has room for what the autoencoder makes of them
    return torch.cat([bundle.vae.to_latents(part.to(cfg.device), sample=False).cpu() for part in pictures.split(few)]).unflatten(0, (len(images), -1)).flatten(1, 2)


def latents_of(bundle, samples, images, cfg):
    """Of samples and their `to_tensor`: encoded, where they are not latents already."""
    return encode_images(bundle, images, cfg) if samples[0].image.dtype == np.uint8 else images


@torch.no_grad()
def encode_captions(bundle, captions, cfg):
    """-> context (n, L, D) float16, pooled (n, P) float32."""
    with autocast(cfg):
        rows = [(context.half().cpu(), pooled.float().cpu()) for context, pooled in map(bundle.text.encode, pieces(captions, 256))]
    context, pooled = zip(*rows)
    return torch.cat(context), torch.cat(pooled)


def encoded_batches(dataset, bundle, cfg, start, rank=0, world=1):
    """Yields (latents, context, pooled), each picture encoded once and then seen `reuse` times.

    A chunk of batches is encoded at once. In each pass over it, place i of a batch takes place i of another batch, different for each i: places are mixed
    alike in one process that has all of them and in many that have some."""
    steps = cfg.chunk // cfg.batch_size
    chunk = steps * cfg.batch_size
    for number in itertools.count(start // (chunk * cfg.reuse)):
        latents, captions = [], []
        for images, texts, samples in itertools.islice(batches(dataset, cfg.batch_size, cfg, number * chunk, rank, world), steps):
            latents.append(latents_of(bundle, samples, images, cfg))
            captions.append(texts)
        unique = {text: row for row, text in enumerate(dict.fromkeys(itertools.chain(*captions)))}  # captions that repeat are encoded once
        context, pooled = encode_captions(bundle, list(unique), cfg)
        for again in range(number * cfg.reuse, (number + 1) * cfg.reuse):
            order = exchanged([x.shape for x in latents], cfg.batch_size, torch.Generator().manual_seed(cfg.seed * 1_000_003 + again))[:, rank::world].tolist()
            for k, taken in enumerate(order):
                if again * chunk + k * cfg.batch_size >= start:
                    text = [unique[captions[j][i]] for i, j in enumerate(taken)]
                    yield torch.stack([latents[j][i] for i, j in enumerate(taken)]), context[text].float(), pooled[text]


def exchanged(shapes, batch_size, generator):
    """(steps, B): which batch's place i is seen at step k in place i. Batches of one shape exchange places, so each is seen once."""
    order = torch.empty(len(shapes), batch_size, dtype=torch.long)
    for shape in dict.fromkeys(shapes):
        alike = torch.tensor([k for k, other in enumerate(shapes) if other == shape])
        order[alike] = alike[torch.rand(len(alike), batch_size, generator=generator).argsort(0)]
    return order


def stack_latents(rows):
    """[(latents, CLIPs' states, T5's states, pooled)] -> latents, context as in Fig. 2a, the CLIPs' states padded with zeros and T5's behind them, pooled."""
    latents, clip, t5, pooled = (torch.from_numpy(np.stack(column)) for column in zip(*rows))
    return latents, torch.cat([F.pad(clip, (0, t5.shape[2] - clip.shape[2])), t5], 1), pooled


def conditioned_batches(dataset, bundle, cfg, start=0, rank=0, world=1):
    """Yields (latents (B, C, h, w), context (B, L, D), pooled (B, P)), float32, from sample `start` on: read where they were computed ahead, else encoded."""
    if not isinstance(dataset, Latents):
        return (yield from encoded_batches(dataset, bundle, cfg, start, rank, world))
    for latents, context, pooled in loaded(dataset, partial(read_latents, share=cfg.synthetic_share), cfg, cfg.batch_size, start, rank, world, stack_latents):
        yield latents, context.float(), pooled


def held_out_batches(dataset, bundle, cfg, most):
    """A batch of each group, its share of `most` samples rounded up, as `conditioned_batches` has it; no sample is there twice, but in place of unreadable ones."""
    total, found, refused = count(dataset), [], None
    for items in dataset.groups:
        one, n = copy.copy(dataset), min(-(-most * len(items) // total), len(items))
        one.groups = [items]
        try:
            found.append(next(conditioned_batches(one, bundle, replace(cfg, workers=0, batch_size=n, chunk=n))))
        except NothingReadable as error:
            refused = error
    if not found:
        raise refused
    return found


# ---------------------------------------------------------------------------------------------------------------
# Latents and embeddings on disk

def fingerprint(folders, clip_length, t5_length):
    """{part: hash} of what makes latents and embeddings: configs and weights of VAE and encoders, tokenizers, each from the first folder that has it."""
    prints = {"tokens": f"{clip_length} + {t5_length} a prompt"}

    def find(name):
        return next((path for path in (Path(folder) / name for folder in folders) if path.exists()), Path(folders[-1]) / name)

    for part in ("vae", "clip_l", "clip_g", "t5"):
        digest = hashlib.sha256(json.dumps(checkpoint.read_json(find(f"{part}.json")), sort_keys=True).encode())
        for name, tensor in sorted(checkpoint.load_checkpoint(find(f"{part}.pt")).items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
        prints[part] = digest.hexdigest()[:16]
    for part in ("clip_tokenizer", "t5_tokenizer"):
        files = sorted(find(part).iterdir())
        prints[part] = hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()[:16]
    return prints


def check_fingerprint(latents, *arguments):
    """Refuses latents that other frozen parts made than those that `fingerprint` finds."""
    own, made_by = fingerprint(*arguments), latents.about["fingerprint"]
    if other := sorted(part for part in own if own[part] != made_by.get(part)):
        raise ValueError(f"{latents.folder} was made by other frozen parts than this run's (another {', '.join(other)}): train with "
                         "those that made it, or precompute it again")


def read_sample(dataset, item, rng):
    return dataset[item]


@going_on("the same command goes on where it stopped")
def precompute(cfg):
    """The command `python data.py precompute`: what Latents reads. Each shard is a folder, renamed when it is whole; index.json comes last."""
    check_size(cfg.resolution, cfg.resolution)
    check_device(cfg.device)
    check_least(cfg, samples=0, seed=0, shard=1, batch_size=1, workers=0)
    dataset = open_data(cfg.data, cfg.resolution, cfg.resolution, "train", cfg.seed, filter=cfg.filter, buckets=cfg.buckets, upscale=cfg.upscale)
    if isinstance(dataset, Latents):
        raise ValueError(f"{cfg.data} has been computed already")
    total = count(dataset)
    if not cfg.samples and total >= 2 ** 31:
        raise ValueError(f"{cfg.data} never ends: --samples says how many pictures to take")
    plan = [(group, piece) for group, items in enumerate(spread(dataset, cfg.samples or total)) for piece in pieces(items, cfg.shard)]
    bundle, out = checkpoint.load_bundle(cfg.weights, cfg.device), Path(cfg.out)
    settings = {name: value for name, value in asdict(cfg).items() if name not in ("weights", "out", "batch_size", "workers", "device")}
    claim(out, {**settings, "fingerprint": fingerprint([cfg.weights], bundle.config["clip_length"], bundle.config["t5_length"])})
    if (out / "index.json").exists():
        print(f"{out} is done")
        return
    left, skipped = [number for number in range(len(plan)) if not shard_folder(out, number).exists()], {**dataset.skipped}
    order = ([(item, plan[number][0], int(item)) for item in part] for number in left for part in pieces(plan[number][1], cfg.batch_size))
    read = iter(DataLoader(Reader(dataset, read_sample, cfg.seed, attempts=1), batch_sampler=order, collate_fn=list, **loaders(cfg)))
    total = sum(len(piece) for _, piece in plan)
    with tqdm(total=total, initial=total - sum(len(plan[number][1]) for number in left), desc="precompute", unit="picture") as bar, dead_workers_named():
        for number in left:
            rows = itertools.islice(read, -(-len(plan[number][1]) // cfg.batch_size))
            skipped |= write_shard(shard_folder(out, number), bundle, rows, cfg, bar)
    finish(out, [shard_folder(out, number) for number in range(len(plan))], skipped)


def shard_folder(out, number):
    return out / f"{number:05}"


def claim(out, settings):
    """Makes `out` the folder of these settings, or refuses what is there already and was made by others."""
    if not (out / "settings.json").exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} is there already and holds something else: another --out is needed")
        checkpoint.write_json(out / "settings.json", settings)
    there = checkpoint.read_json(out / "settings.json")
    if other := [f"{name} {there.get(name)!r}" for name, value in settings.items() if there.get(name) != value]:
        raise ValueError(f"{out} was begun with other settings ({', '.join(other)[:300]}): another --out is needed")


def write_shard(folder, bundle, batches, cfg, bar):
    """Encodes one shard's samples, lists of Reader's rows, and writes it whole; -> {what was skipped: why}. Of a rest, such as a bucket's only picture, nothing may be readable: no shard then."""
    latents, captions, skipped = [], [], {}
    for rows in batches:
        samples = [sample for sample, _ in rows if sample is not None]
        skipped.update(item for _, found in rows for item in found.items())
        if samples:
            latents.append(latents_of(bundle, samples, to_tensor(samples), cfg))
            captions += [(sample.original, sample.synthetic) for sample in samples]
        bar.update(len(rows))
    if not captions:
        if len(skipped) >= cfg.shard:
            raise ValueError(f"none of the {len(skipped)} pictures of a shard can be read, the first is {next(iter(skipped.items()))}")
        return skipped
    unique = {text: row for row, text in enumerate(dict.fromkeys(text for pair in captions for text in pair if text))}
    context, pooled = encode_captions(bundle, list(unique), cfg)
    sizes = bundle.text.sizes
    text = np.array([[unique.get(caption, -1) for caption in pair] for pair in captions], np.int32)
    arrays = torch.cat(latents), text, context[:, :sizes.clip_length, :sizes.clip_l + sizes.clip_g], context[:, sizes.clip_length:], pooled

    def save(temporary):
        for name, array in zip(LATENT_ARRAYS, arrays):
            np.save(temporary / f"{name}.npy", np.asarray(array))
        checkpoint.write_json(temporary / "shard.json", {"captions": list(unique), "skipped": skipped})
    checkpoint.write_folder(folder, save)
    return skipped


def finish(out, shards, skipped):
    """All shards that there can be are whole: writes index.json, which Latents looks for, and says what was made and what was left out."""
    made = {shard: np.load(shard / "latents.npy", mmap_mode="r").shape for shard in shards if shard.exists()}
    skipped = {**skipped, **{name: why for shard in made for name, why in checkpoint.read_json(shard / "shard.json")["skipped"].items()}}
    if not made:
        raise ValueError(f"none of {len(skipped)} pictures can be read, the first is {next(iter(skipped.items()), '')}")
    sizes = [(n, size) for n, _, *size in (made.get(shard, (0, 0, 0, 0)) for shard in shards)]
    checkpoint.write_json(out / "index.json", {**checkpoint.read_json(out / "settings.json"), "shards": sizes, "skipped": skipped})
    pictures, size = sum(n for n, *_ in made.values()), sum(file.stat().st_size for shard in made for file in shard.iterdir())
    print(f"{out}: {pictures} pictures in {len(made)} shards, {size / pictures / 1000:.1f} kB each")
    SKIPPED.update(skipped)
    report_skipped()


# ---------------------------------------------------------------------------------------------------------------
# De-duplication (App. E.2): clusters by k-means, Alg. 1 in each

def duplicates(vectors, threshold, block=512):
    """Alg. 1 on the unit vectors (n, D) of a cluster: for each item the one that made it a duplicate, (n,), or -1.

    Items are taken in order; one that is no duplicate itself makes duplicates of all others whose cosine similarity reaches the threshold. Items before it
    need no look: a similar one that is no duplicate would have made it one."""
    of = torch.full((len(vectors),), -1)
    for start in range(0, len(vectors), block):
        rows = start + torch.nonzero(of[start:start + block] < 0).flatten()
        cosine = linear(vectors[rows], vectors[start:])                          # (rows, n - start): the range search
        cosine[torch.arange(len(rows)), rows - start] = -torch.inf               # of itself no item is a duplicate
        hits = torch.nonzero(cosine.amax(1) >= threshold).flatten()
        for item, row in zip(rows[hits].tolist(), cosine[hits]):
            if of[item] < 0:
                found = item + torch.nonzero(row[item - start:] >= threshold).flatten()
                of[found[of[found] < 0]] = item
    return of


def unit(vectors, first=0):
    """float32 vectors (n, D) of length 1; ValueError names one that has no direction. `first`: the row number of the first, for that."""
    vectors = torch.from_numpy(np.array(vectors, np.float32))
    norms = vectors.norm(dim=1, keepdim=True)
    if (bad := torch.nonzero(~(norms.isfinite() & (norms > 0)).flatten())).numel():
        raise ValueError(f"embedding {first + bad[0].item()} is not finite, or zero")
    return vectors / norms


def cluster(embeddings, k, seed, rounds=10, per_cluster=256):
    """The cluster of each vector (n,), by k-means on the sphere; the centres are fitted to `per_cluster` vectors each."""
    rng = np.random.default_rng(seed)
    sample = unit(embeddings[np.sort(rng.choice(len(embeddings), min(per_cluster * k, len(embeddings)), replace=False))])
    centres = sample[torch.from_numpy(rng.choice(len(sample), k, replace=False))]

    def nearest(vectors):
        return torch.cat([(part @ centres.T).argmax(1) for part in vectors.split(4096)])

    for _ in range(rounds):
        sums = torch.zeros_like(centres).index_add_(0, nearest(sample), sample)
        centres = torch.where(sums.any(1, keepdim=True), F.normalize(sums), centres)         # an empty cluster stays where it is
    return torch.cat([nearest(unit(embeddings[i:i + 2 ** 16], i)) for i in range(0, len(embeddings), 2 ** 16)])


def dedup(cfg):
    """The command `python data.py dedup`: writes a report with the groups of duplicates, the item to keep first in each."""
    begun = time.time()
    check_least(cfg, threads=0)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    try:
        embeddings = np.load(cfg.embeddings, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError):
        raise ValueError(f"{cfg.embeddings} is no .npy file, or truncated") from None
    if not isinstance(embeddings, np.ndarray) or embeddings.ndim != 2 or embeddings.dtype.kind != "f" or not embeddings.size:
        raise ValueError(f"{cfg.embeddings} holds no floating-point vectors (N, D), N and D at least 1")
    k = cfg.clusters or -(-len(embeddings) // 100_000)
    if not 1 <= k <= len(embeddings) or not -1 < cfg.threshold <= 1 or cfg.seed < 0:
        raise ValueError(f"--clusters {k}, --threshold {cfg.threshold}, --seed {cfg.seed}: for {len(embeddings)} vectors there can be as many clusters, "
                         "a cosine similarity is in (-1, 1], a seed is at least 0")
    clusters = cluster(embeddings, k, cfg.seed) if k > 1 else torch.zeros(len(embeddings), dtype=torch.long)
    order, groups = clusters.argsort(stable=True), {}
    for members in tqdm(order.split(clusters.bincount(minlength=k).tolist()), "dedup", unit="cluster", delay=2):
        of = duplicates(unit(embeddings[members.numpy()]), cfg.threshold)
        for item in torch.nonzero(of >= 0).flatten().tolist():
            groups.setdefault(members[of[item]].item(), []).append(members[item].item())
    found = sum(map(len, groups.values()))
    report = {"embeddings": cfg.embeddings, "vectors": len(embeddings), "threshold": cfg.threshold, "clusters": k, "duplicates": found, "share": found / len(embeddings),
              "seconds": round(time.time() - begun, 1), "groups": sorted(([kept, *others] for kept, others in groups.items()), key=lambda group: (-len(group), group))}
    checkpoint.write_lines(cfg.out, [report])
    print(f"{cfg.out}: {found} of {len(embeddings)} items are duplicates ({found / len(embeddings):.2%}) of {len(groups)}, the most of one are "
          f"{max(map(len, groups.values()), default=0)}; {report['seconds']} s")
