"""pipeline.py: the order of samples, batches over processes and workers, latents on disk, faults of the loader, Alg. 1."""

import inspect
import itertools
import json
import os
import re
import shlex
import signal
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_shards import samples, write_tar

import checkpoint
import data
import pipeline
from config import parse_config
from data import Dataset, DedupConfig, Latents, PrecomputeConfig, Sample, Shapes, Unreadable, open_data
from experiments import frozen_parts
from pipeline import batches, caption_batches, conditioned_batches, duplicates, encoded_batches, keys, shuffled, turns
from text_encoders import TextSizes

CFG = SimpleNamespace(seed=3, workers=0, synthetic_share=0.5, batch_size=4, chunk=8, reuse=2, device="cpu", precision="fp32")


def cfg(**change):
    return SimpleNamespace(**{**vars(CFG), **change})


@pytest.fixture(autouse=True)
def nothing_skipped_before(monkeypatch):
    monkeypatch.setattr(pipeline, "SKIPPED", {})
    monkeypatch.setattr(pipeline, "replace", lambda c, **change: cfg(**{**vars(c), **change}))


def take(n, series):
    return list(itertools.islice(series, n))


# ---- order

@pytest.mark.parametrize("n, options", [(10, {}), (1, {}), (1000, dict(window=64, block=8)), (1003, dict(window=64, block=8)), (1024, dict(window=64, block=8)), (7, dict(window=64, block=8))])
def test_shuffled_epochs(n, options):
    order = take(4 * n, shuffled(0, n, 3, **options))
    epochs = [order[i:i + n] for i in range(0, 4 * n, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs) and (n == 1 or len({*map(tuple, epochs)}) == 4)
    for start in (0, 1, n // 2, n - 1, n, 2 * n + n // 3):
        assert take(n, shuffled(start, n, 3, **options)) == order[start:start + n]
    assert order != take(4 * n, shuffled(0, n, 4, **options)) or n == 1


def test_a_large_epoch_is_read_in_runs_of_neighbours_and_mixed_in_a_buffer():
    order = np.array(take(6400, shuffled(0, 6400, 0, window=640, block=32)))
    for window in order.reshape(10, 640):
        runs = np.split(np.sort(window), np.flatnonzero(np.diff(np.sort(window)) > 1) + 1)
        assert len(runs) <= 22 and np.abs(np.diff(window)).mean() > 600               # 20 blocks from everywhere, mixed
    assert np.abs(np.corrcoef(order, np.arange(6400))[0, 1]) < 0.2


def test_endless_data_is_taken_in_order():
    assert take(3, shuffled(5, 2 ** 31, 3)) == [5, 6, 7]


@pytest.mark.parametrize("lengths", [[10], [1, 1000], [500, 3, 77, 77, 1], [5] * 7])
def test_turns_are_fair_and_go_on_from_anywhere(lengths):
    some = take(3000, turns(lengths, 0))
    for group, length in enumerate(lengths):
        mine = [j for g, j in some if g == group]
        assert mine == list(range(len(mine)))                                         # every batch of a group, in order
        expected = 3000 * length / sum(lengths)
        assert abs(len(mine) - expected) <= 1 + len(lengths) * length / sum(lengths)
        places = [k for k, (g, _) in enumerate(some) if g == group]
        assert max(np.diff(places), default=0) <= sum(lengths) / length + len(lengths)        # nothing starves
    for start in (1, 2, 17, 999, 2900):
        assert take(50, turns(lengths, 0, start)) == some[start:start + 50]


def test_keys_split_over_processes_without_loss_or_duplicate():
    groups = [np.arange(0, 40), np.arange(100, 113), range(200, 203)]
    steps = take(70, keys(groups, 8, 5))
    for step, batch in enumerate(steps):
        assert [position for position, _, _ in batch] == list(range(8 * step, 8 * step + 8)) and len({group for _, group, _ in batch}) == 1
        assert all(item in groups[group] for _, group, item in batch)
    seen = Counter(item for batch in steps for _, _, item in batch)
    assert seen.keys() == {*range(40), *range(100, 113), *range(200, 203)} and max(seen.values()) - min(seen.values()) <= 4
    for world in (2, 4, 8):
        shares = [take(70, keys(groups, 8, 5, rank=rank, world=world)) for rank in range(world)]
        for step, batch in enumerate(steps):
            assert sorted(key for share in shares for key in share[step]) == batch
            assert all(len(share[step]) == 8 // world and share[step][0][1] == batch[0][1] for share in shares)       # one size in every process
    for start in (8, 80, 400):
        assert take(9, keys(groups, 8, 5, start)) == steps[start // 8:start // 8 + 9]
    for bad in (dict(start=4), dict(world=3)):
        with pytest.raises(ValueError, match="can neither start"):
            next(keys(groups, 8, 5, **bad))


# ---- batches

def test_batches_do_not_depend_on_workers_or_processes_or_on_where_they_start():
    world = Shapes("all", 16, 16)

    def some(start, n, workers=0, **share):
        return [(images, captions) for images, captions, _ in take(n, batches(world, 4, cfg(workers=workers), start, **share))]

    plain = some(0, 4)
    assert plain[0][0].shape == (4, 3, 16, 16) and plain[0][0].min() >= -1 and plain[0][0].max() <= 1
    for other in (some(0, 4, 2), plain[:2] + some(8, 2)):
        assert all(a.equal(b) and c == d for (a, c), (b, d) in zip(plain, other, strict=True))
    for rank in (0, 1):
        assert all(a[rank::2].equal(b) and c[rank::2] == d for (a, c), (b, d) in zip(plain, some(0, 4, rank=rank, world=2), strict=True))


def test_each_epoch_of_shards_has_every_sample_once_whatever_the_workers(tmp_path):
    for k in range(3):
        write_tar(tmp_path / f"{k}.tar", samples(6 * k, 6))
    shards = open_data(f"tar:{tmp_path}/{{0..2}}.tar", 16, 16)
    for workers in (0, 3):
        seen = [caption for _, captions, _ in take(6, batches(shards, 3, cfg(workers=workers))) for caption in captions]
        assert {*seen} == {f"picture {i}" for i in range(18)}
        assert [pair[0] for rows in take(6, caption_batches(shards, 3, cfg(workers=workers))) for pair in rows] == seen


def test_bucketed_batches_have_one_size_and_nothing_starves(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(30):
        size = [(64, 64), (128, 32), (40, 130), (80, 48)][min(i // 9, 3)]
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8)).save(tmp_path / f"{i:02}.png")
        (tmp_path / f"{i:02}.txt").write_text(str(i))
    folder = open_data(f"folder:{tmp_path}", 64, 64, buckets=True)
    some = take(24, batches(folder, 4, cfg()))
    shapes = Counter(tuple(images.shape) for images, *_ in some)
    assert shapes.keys() == {(4, 3, 64, 64), (4, 3, 32, 128), (4, 3, 128, 32), (4, 3, 48, 80)}
    assert {text for _, captions, _ in some for text in captions} == {str(i) for i in range(30) if i != 19}       # 19 is for validation
    for rank in (0, 1):
        for (images, *_), (half, *_) in zip(some, take(24, batches(folder, 4, cfg(), rank=rank, world=2))):
            assert images[rank::2].equal(half)


class Faulty(Dataset):
    """10 items of which some cannot be read; a signal's name among them is sent to each reader."""

    def __init__(self, bad=(), n=10):
        self.bad, self.n = {*bad}, n

    def __len__(self):
        return self.n

    def captions(self, item):
        return str(item), ""

    def __getitem__(self, item):
        if item in self.bad:
            raise Unreadable(f"item {item}", "torn")
        for name in self.bad & {"SIGINT", "SIGTERM", "SIGKILL"}:
            os.kill(os.getpid(), getattr(signal, name))
        return Sample(np.full((16, 16, 3), item, np.uint8), str(item))


def test_unreadable_samples_are_replaced_alike_everywhere_and_named_at_the_end(capsys):
    some = [captions for _, captions, _ in take(10, batches(Faulty({3, 7}), 4, cfg()))]
    assert all(len(captions) == 4 for captions in some) and {*itertools.chain(*some)} == {*"01245689"}
    assert pipeline.SKIPPED == {"item 3": "torn", "item 7": "torn"}
    pipeline.report_skipped()
    assert sorted(capsys.readouterr().err.splitlines()) == ["  item 3 (torn)", "  item 7 (torn)", "skipped, 2 in all:"] and not pipeline.SKIPPED
    halves = [[captions for _, captions, _ in take(10, batches(Faulty({3, 7}), 4, cfg(workers=rank), rank=rank, world=2))] for rank in (0, 1)]
    assert some == [[a[0], b[0], a[1], b[1]] for a, b in zip(*halves)]
    pipeline.SKIPPED.update({str(i): "x" for i in range(50)})
    pipeline.report_skipped()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "skipped, 52 in all:" and len(lines) == 22 and lines[-1] == "... and 32 more"


@pytest.mark.parametrize("workers", [0, 1])
def test_data_of_which_nothing_can_be_read(workers):
    with pytest.raises(ValueError, match=r"^100 pictures in a row cannot be read, one of them item \d \(torn\)$"):
        next(batches(Faulty(range(10)), 4, cfg(workers=workers)))


def test_a_worker_that_dies_is_one_line():
    with pytest.raises(ValueError, match=r"^a process that reads data died: DataLoader worker .*(killed by signal: Killed|exited unexpectedly).*fewer --workers") as error:
        take(3, batches(Faulty({"SIGKILL"}), 4, cfg(workers=1)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_worker_goes_on_when_a_signal_reaches_it(name):
    expected, found = ([captions for _, captions, _ in take(5, batches(Faulty(bad), 4, cfg(workers=1)))] for bad in ((), {name}))
    assert found == expected


def test_a_worker_leaves_the_group_where_nothing_tells_who_sent_a_signal(monkeypatch):
    monkeypatch.delattr(signal, "sigwaitinfo", raising=False)
    child = os.fork()
    if not child:
        try:
            pipeline.outlive_signals(0)
        finally:
            os._exit(os.getpgid(0) != os.getpid())
    assert os.waitpid(child, 0)[1] == 0


# ---- encoded while training

def test_encoded_batches_go_on_from_anywhere_and_split_over_processes(tiny):
    bundle, world, c = checkpoint.load_bundle(tiny), Shapes("all", 32, 32), cfg(chunk=13)

    def some(start, n, **share):
        return take(n, encoded_batches(world, bundle, c, start, **share))

    plain = some(0, 8)                                                            # chunks of 12 samples, each seen twice: 6 batches
    assert [tuple(map(len, batch)) for batch in plain] == [(4, 4, 4)] * 8 and {x.dtype for x in plain[0]} == {torch.float32}
    for start in (1, 2, 7):
        assert all(a.equal(b) for x, y in zip(plain[start:], some(4 * start, 8 - start), strict=True) for a, b in zip(x, y))
    for rank in (0, 1):
        for x, y in zip(plain, some(0, 8, rank=rank, world=2), strict=True):
            for a, b in zip(x, y):
                torch.testing.assert_close(a[rank::2], b, atol=1e-3, rtol=1e-3)       # other batches, other roundings
    first, again = ({tuple(x.flatten()[:5].tolist()) for latents, *_ in part for x in latents} for part in (plain[:3], plain[3:6]))
    assert first == again and len(first) == 12 and not plain[0][0].equal(plain[3][0])


def test_batches_of_one_shape_exchange_places():
    shapes = [(1,), (2,), (1,), (1,), (2,)]
    order = pipeline.exchanged(shapes, 6, torch.Generator().manual_seed(0))
    assert order.shape == (5, 6)
    for place in order.T.tolist():
        assert sorted(place) == list(range(5)) and all(shapes[k] == shapes[j] for k, j in enumerate(place))
    assert len({*map(tuple, order.T.tolist())}) > 1


def test_encoded_text_belongs_to_its_picture(tiny):
    """Latents and text of a sample, encoded alone, are found side by side."""
    bundle, world = checkpoint.load_bundle(tiny), Shapes("all", 32, 32)
    images, captions, _ = next(batches(world, 8, cfg()))
    latents, (context, pooled) = bundle.vae.to_latents(images, sample=False), bundle.text.encode(captions)
    for x, c, p in zip(*(torch.cat(column) for column in zip(*take(2, encoded_batches(world, bundle, cfg(), 0))))):
        row = (latents - x).flatten(1).norm(dim=1).argmin()
        torch.testing.assert_close(x, latents[row], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(c, context[row], atol=5e-3, rtol=5e-3)
        torch.testing.assert_close(p, pooled[row], atol=5e-3, rtol=5e-3)


# ---- latents on disk

@pytest.fixture
def shards_of_captions(tmp_path):
    """A tar of 30 pictures with two captions each, one of which has no pixels."""
    members = [(name, b"no picture" * 3 if name == "00011.png" else raw) for name, raw in samples(0, 30, synthetic="dense")]
    members = [(name, raw[:60] if name == "00017.png" else raw) for name, raw in members]      # its header is whole
    return "tar:" + write_tar(tmp_path / "0.tar", members)


def run_precompute(tiny, spec, out, **change):
    pipeline.precompute(PrecomputeConfig(**{**dict(data=spec, weights=str(tiny), out=str(out), resolution=32, shard=8, batch_size=3, workers=0, precision="fp32"), **change}))


def test_precomputed_is_what_training_would_have_encoded(tiny, shards_of_captions, tmp_path, capsys):
    out, bundle = tmp_path / "latents", checkpoint.load_bundle(tiny)
    run_precompute(tiny, shards_of_captions, out)
    printed = capsys.readouterr()
    assert "27 pictures in 4 shards" in printed.out and "skipped, 2 in all:" in printed.err and "00011" in printed.err and "0.tar/00017.png (image file is truncated)" in printed.err
    source, stored = open_data(shards_of_captions, 32, 32), open_data(f"latents:{out}", 32, 32)
    assert len(stored) == 27 and [*map(list, stored.groups)] == [[*range(19), *range(20, 27)]] and [*map(list, open_data(f"latents:{out}", 32, 32, "val").groups)] == [[19]]
    kept = [i for i in source.groups[0] if source.captions(i)[0] != "picture 17"]
    assert [stored.captions(i) for i in range(27)] == [source.captions(i) for i in kept]
    for i in (0, 8, 26):
        sample, picture = stored[i], source[kept[i]]
        latents = bundle.vae.to_latents(pipeline.to_tensor([picture]), sample=False)[0]
        torch.testing.assert_close(torch.tensor(sample.image), latents, atol=1e-4, rtol=1e-4)
        for embedded, text in ((sample.original, picture.original), (sample.synthetic, picture.synthetic)):
            _, context, pooled = pipeline.stack_latents([(sample.image, *embedded)])
            assert context.dtype == torch.float16 and pooled.dtype == torch.float32
            for a, b in zip((context, pooled), bundle.text.encode([text])):
                torch.testing.assert_close(a.float(), b, atol=5e-3, rtol=5e-3)
    texts = np.load(out / "00000" / "t5.npy", mmap_mode="r")
    assert texts.shape == (9, 24, 32) and texts.dtype == np.float16                # 8 original captions, one synthetic that they share
    assert np.load(out / "00000" / "clip.npy", mmap_mode="r").shape == (9, 16, 20)


def test_latents_mix_captions_and_split_over_processes(tiny, shards_of_captions, tmp_path):
    out, bundle = tmp_path / "latents", None
    run_precompute(tiny, shards_of_captions, out)
    stored = Latents(out, 32, 32)

    def some(n, start=0, **change):
        share = {name: change.pop(name) for name in ("rank", "world") if name in change}
        return take(n, conditioned_batches(stored, bundle, cfg(**change), start, **share))

    plain = some(13)
    assert [x.shape for x in plain[0]] == [(4, 4, 4, 4), (4, 40, 32), (4, 20)] and {x.dtype for x in plain[0]} == {torch.float32}
    for other in (some(13, workers=2), plain[:5] + some(8, 20)):
        assert all(a.equal(b) for x, y in zip(plain, other, strict=True) for a, b in zip(x, y))
    assert all(a[1::2].equal(b) for x, y in zip(plain, some(13, rank=1, world=2), strict=True) for a, b in zip(x, y))
    dense = some(1, synthetic_share=1.0)[0][2]
    assert (dense == dense[0]).all() and not (some(1, synthetic_share=0.0)[0][2] == dense).all(1).any()
    share = np.mean([(row == dense[0]).all() for _, _, pooled in plain for row in pooled])
    assert 0.25 < share < 0.75


def test_a_stopped_precomputation_goes_on(tiny, shards_of_captions, tmp_path, monkeypatch, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_precompute(tiny, shards_of_captions, whole)
    encode, calls = pipeline.encode_captions, itertools.count(1)

    def interrupted(*arguments):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return encode(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "encode_captions", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_precompute(tiny, shards_of_captions, stopped)
    assert sorted(path.name for path in stopped.iterdir()) == ["00000", "00001", "settings.json"]
    with pytest.raises(ValueError, match="holds no latents, or only a part"):
        Latents(stopped, 32, 32)
    with pytest.raises(ValueError, match=r"stopped was begun with other settings \(resolution 32\)"):
        run_precompute(tiny, shards_of_captions, stopped, resolution=48)
    before = (stopped / "00000" / "latents.npy").stat().st_mtime_ns
    run_precompute(tiny, shards_of_captions, stopped)
    assert (stopped / "00000" / "latents.npy").stat().st_mtime_ns == before
    files = {path.relative_to(whole): path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert files == {path.relative_to(stopped): path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    capsys.readouterr()
    run_precompute(tiny, shards_of_captions, stopped)
    assert capsys.readouterr().out == f"{stopped} is done\n"


def test_buckets_and_shapes_are_precomputed(tiny, tmp_path):
    for i in range(12):
        Image.effect_noise(((64, 64), (32, 128))[i % 3 == 0], 30).convert("RGB").save(tmp_path / f"{i:02}.png")
        (tmp_path / f"{i:02}.txt").write_text(f"noise {i}")
    run_precompute(tiny, f"folder:{tmp_path}", tmp_path / "latents", resolution=64, buckets=True, shard=3)
    stored = Latents(tmp_path / "latents", 64, 64)
    assert [stored[0].image.shape, stored[11].image.shape] == [(4, 16, 4), (4, 8, 8)] and [*map(list, stored.groups)] == [[*range(4)], [*range(4, 12)]]
    assert {latents.shape for latents, *_ in take(6, conditioned_batches(stored, None, cfg(batch_size=2)))} == {(2, 4, 16, 4), (2, 4, 8, 8)}
    run_precompute(tiny, "shapes:all", tmp_path / "drawn", samples=10)
    assert len(Latents(tmp_path / "drawn", 32, 32)) == 10


def test_buckets_of_few_pictures_are_held_out_in_their_turn(tiny, tmp_path):
    """17 high and 23 square ones; of the former one, and all two of a third bucket, cannot be read although their headers can."""
    for i in range(40):
        Image.effect_noise(((64, 64), (32, 128))[i < 17], 30).convert("RGB").save(tmp_path / f"{i:02}.png")
        (tmp_path / f"{i:02}.txt").write_text(f"noise {i}")
    for name, size in (("05", (32, 128)), *((f"{i:02}", (48, 80)) for i in range(40, 42))):      # the second in the middle of the series, and of its bucket all
        Image.effect_noise(size, 30).convert("RGB").save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.png").write_bytes((tmp_path / f"{name}.png").read_bytes()[:60])
        (tmp_path / f"{name}.txt").write_text("torn")
    run_precompute(tiny, f"folder:{tmp_path}", tmp_path / "latents", resolution=64, buckets=True, shard=4)
    train, val = ([set(group) for group in Latents(tmp_path / "latents", 64, 64, split).groups] for split in ("train", "val"))
    assert sum(map(len, train)) == 36 and sum(map(len, val)) == 1 and not set.union(*train) & set.union(*val)
    found = pipeline.held_out_batches(Latents(tmp_path / "latents", 64, 64), None, cfg(), 18)
    assert sorted(len(x) for x, *_ in found) == [8, 10] and all(len(x.flatten(1).unique(dim=0)) == len(x) for x, *_ in found)
    index = tmp_path / "latents" / "index.json"
    for text in ("{}", "[1]", "{"):
        index.write_text(text)
        with pytest.raises(ValueError, match="index.json is not what `python data.py precompute` wrote"):
            Latents(index.parent, 64, 64)
    for path in tmp_path.glob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match="none of the 8 pictures of a shard can be read"):
        run_precompute(tiny, f"folder:{tmp_path}", tmp_path / "none", resolution=64)


def test_what_a_worker_refuses_is_one_line(tiny, tmp_path):
    with pytest.raises(ValueError, match="^shapes:texts has no pictures"):
        run_precompute(tiny, "shapes:texts", tmp_path / "texts", samples=4, workers=1)


@pytest.mark.parametrize("arguments, reason", [
    (["--data", "shapes"], "shapes never ends: --samples says how many"), (["--data", "folder:absent"], "absent is no folder"), (["--samples", "-1"], "--samples is -1; the least is 0"),
    (["--data", "latents:absent"], "holds no latents"), (["--resolution", "40"], "must be a multiple of 16"), (["--shrad", "3"], "unknown flag --shrad; did you mean --shard?"),
    (["--samples", "4", "--weights", "absent"], "absent is no bundle folder"), (["--samples", "4", "--out", "file"], "file is there already and holds something else"),
    (["--samples", "4", "--out", "full"], "full is there already and holds something else"), (["--samples", "4", "--out", "file/below"], "Not a directory")])
def test_precompute_refuses_in_one_line(refused, tiny, tmp_path, monkeypatch, arguments, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    assert reason in refused("data.py", "precompute", "--weights", tiny, "--out", "new", "--workers", "0", *arguments)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "mine"]


def test_unknown_commands(refused, cli):
    assert "unknown command 'precomptue'; known: precompute, dedup" in refused("data.py", "precomptue")
    status, lines, _ = cli("data.py", "--help")
    assert status == 0 and any("dedup" in line for line in lines)


def test_a_full_disk_leaves_whole_shards(tiny, shards_of_captions, tmp_path, monkeypatch):
    save, calls = np.save, itertools.count(1)

    def full(*arguments):
        if next(calls) > 8:
            raise OSError(28, "No space left on device")
        save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(OSError, match="No space left"):
            run_precompute(tiny, shards_of_captions, tmp_path / "latents")
    assert sorted(path.name for path in (tmp_path / "latents").iterdir()) == ["00000", "settings.json"]
    run_precompute(tiny, shards_of_captions, tmp_path / "latents")
    assert len(Latents(tmp_path / "latents", 32, 32)) == 27


FLAGS = "--stage pretrain --batch-size 4 --steps 2 --depth 1 --resolution 32 --workers 0 --device cpu".split()


def test_training_from_latents_runs_no_encoder_until_it_is_validated(cli, refused, tiny, tmp_path, monkeypatch):
    run_precompute(tiny, "shapes:all", tmp_path / "latents", samples=40)
    arguments = ["--data", f"latents:{tmp_path}/latents", "--weights", tiny, *FLAGS]
    monkeypatch.setattr(pipeline, "encode_images", None)                          # not called
    monkeypatch.setattr(pipeline, "encode_captions", None)
    status, _, errors = cli("train.py", *arguments, "--out", tmp_path / "mine", "--clip-length", "16", "--t5-length", "24")
    assert status == 0, errors
    assert (tmp_path / "mine" / "mmdit.pt").exists() and (tmp_path / "mine" / "grid-0000002.png").exists()
    assert "--stage vae needs pictures" in refused("train.py", *arguments, "--stage", "vae", "--out", tmp_path / "no")
    assert "holds latents of pictures at --resolution 32, not 48 x 48" in refused("train.py", *arguments, "--resolution", "48", "--out", tmp_path / "no")
    assert "another tokens)" in refused("train.py", *arguments, "--out", tmp_path / "no", "--clip-length", "15")
    other = tmp_path / "other"
    checkpoint.copy_parts(tiny, other)
    state = checkpoint.load_checkpoint(other / "vae.pt")
    state["decoder.conv_out.bias"] += 1
    checkpoint.save_checkpoint(other / "vae.pt", state)
    assert "was made by other frozen parts than this run's (another vae)" in refused("train.py", *arguments, "--weights", other, "--out", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_fingerprint_is_of_contents_not_of_files(tiny, tmp_path):
    own = pipeline.fingerprint([tiny], 16, 24)
    checkpoint.copy_parts(tiny, tmp_path)
    for part in ("vae", "t5"):
        checkpoint.save_checkpoint(tmp_path / f"{part}.pt", checkpoint.load_checkpoint(tiny / f"{part}.pt"))
    assert pipeline.fingerprint([tmp_path], 16, 24) == own == pipeline.fingerprint([tmp_path / "absent", tiny], 16, 24)
    for part, file in (("t5_tokenizer", "t5_tokenizer/tokenizer.json"), ("clip_tokenizer", "clip_tokenizer/merges.txt")):
        (tmp_path / file).write_text((tmp_path / file).read_text() + "\n")
        assert [name for name, value in pipeline.fingerprint([tmp_path, tiny], 16, 24).items() if value != own[name]][-1] == part or part == "clip_tokenizer"
    with pytest.raises(ValueError, match="vae.json is not there"):
        pipeline.fingerprint([tmp_path / "absent"], 16, 24)


def test_stored_sizes_are_those_of_table_7():
    """App. E.1, at 256 x 256 pixels: what is stored here in float32 and in float16 is what the paper stores."""
    for part, size in frozen_parts.stored_kilobytes(TextSizes(), 16, 256).items():
        assert size == pytest.approx(frozen_parts.PAPER[part][2], abs=0.1)


def test_frozen_parts_are_measured(cli, tiny, tmp_path):
    status, lines, errors = cli("experiments/frozen_parts.py", "--weights", tiny, "--out", tmp_path, "--images", 2, "--repeats", 1)
    assert status == 0 and [line.split()[0] for line in lines] == ["vae", "clip_l", "clip_g", "t5"], errors
    assert {*checkpoint.read_json(tmp_path / "frozen_parts.json")["here"]} == {"vae", "clip_l", "clip_g", "t5"}


def test_some_captions_are_from_all_over():
    world = SimpleNamespace(groups=[range(100), range(200, 210)], captions=lambda i: (str(i), ""))
    assert [int(original) for original, _ in pipeline.some_captions(world, 11)] == [*range(0, 100, 10), 200]
    for items, n, found in ((range(10), 4, [0, 2, 5, 7]), (range(3), 5, range(3))):
        assert [*pipeline.spread(SimpleNamespace(groups=[items]), n)] == [found]


# ---- de-duplication

def algorithm_1(vectors, threshold):
    """Alg. 1 as it stands."""
    dups = set()
    for i in range(len(vectors)):
        found = [j for j in range(len(vectors)) if vectors[i] @ vectors[j] >= threshold]
        if i in dups:
            continue
        dups.update(j for j in found if j != i)
    return dups


@pytest.mark.parametrize("block", [1, 7, 256])
def test_duplicates_are_algorithm_1(block):
    for seed in range(5):
        vectors = torch.nn.functional.normalize(torch.randn(60, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
        of = duplicates(vectors, 0.8, block)
        assert {*torch.nonzero(of >= 0).flatten().tolist()} == algorithm_1(vectors, 0.8)
        for item, kept in enumerate(of.tolist()):
            assert kept < 0 or (of[kept] < 0 and kept < item and vectors[item] @ vectors[kept] >= 0.8)


def planted(n, d, pairs, seed=0, noise=0.3):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(n, d)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    places = rng.permutation(n)[:2 * pairs].reshape(-1, 2)
    near = rng.normal(size=(pairs, d)).astype(np.float32)
    vectors[places[:, 1]] = vectors[places[:, 0]] + noise * near / np.linalg.norm(near, axis=1, keepdims=True)
    return 3 * vectors, {frozenset(pair) for pair in places.tolist()}              # of any length


def test_dedup_reports_what_was_planted(cli, tmp_path):
    vectors, pairs = planted(3000, 64, 200)
    np.save(tmp_path / "x.npy", vectors.astype(np.float16))
    status, lines, _ = cli("data.py", "dedup", "--embeddings", tmp_path / "x.npy", "--out", tmp_path / "report.json", "--threshold", "0.9")
    report = json.loads((tmp_path / "report.json").read_text())
    assert status == 0 and "200 of 3000 items are duplicates (6.67%) of 200, the most of one are 1" in lines[0]
    assert {frozenset(group) for group in report["groups"]} == pairs and all(a < b for a, b in report["groups"])
    assert (report["vectors"], report["duplicates"], report["clusters"], report["threshold"]) == (3000, 200, 1, 0.9)


def test_clusters_are_searched_apart_and_exactly(tmp_path):
    rng = np.random.default_rng(0)
    centres = np.eye(8, 32, dtype=np.float32)
    vectors = np.repeat(centres, 50, 0) + 0.05 * rng.normal(size=(400, 32)).astype(np.float32)
    vectors[50:55] = vectors[0] + 0.001 * rng.normal(size=(5, 32)).astype(np.float32)
    np.save(tmp_path / "x.npy", vectors)
    pipeline.dedup(DedupConfig(str(tmp_path / "x.npy"), str(tmp_path / "r.json"), 0.999, clusters=8))
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["groups"] == [[0, 50, 51, 52, 53, 54]]
    of = pipeline.cluster(vectors, 8, 0)
    assert of.shape == (400,) and max(Counter(of.tolist()).values()) >= 50


@pytest.mark.parametrize("make, reason", [
    (lambda path: None, "No such file"), (lambda path: path.write_bytes(b"no array"), "is no .npy file"), (lambda path: np.save(path, np.zeros(3)), "holds no floating-point vectors"),
    (lambda path: np.save(path, np.ones((3, 2), int)), "holds no floating-point vectors"), (lambda path: np.save(path, np.zeros((0, 2))), "holds no floating-point vectors"),
    (lambda path: np.save(path, np.array([[1.0, 2], [0, 0]])), "embedding 1 is not finite, or zero"), (lambda path: np.save(path, np.array([[1.0, 2], [np.nan, 0]])), "embedding 1 is not"),
    (lambda path: np.save(path, np.array([{}])), "is no .npy file")])
def test_dedup_refuses_in_one_line(refused, tmp_path, make, reason):
    make(tmp_path / "x.npy")
    assert reason in refused("data.py", "dedup", "--embeddings", tmp_path / "x.npy", "--out", tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()


def test_dedup_refuses_numbers_out_of_range(refused, tmp_path):
    np.save(tmp_path / "x.npy", np.eye(3))
    for flags in (["--clusters", "4"], ["--clusters", "-1"], ["--threshold", "1.5"], ["--seed", "-1"]):
        assert "for 3 vectors there can be as many clusters" in refused("data.py", "dedup", "--embeddings", tmp_path / "x.npy", *flags)
    assert "File exists" in refused("data.py", "dedup", "--embeddings", tmp_path / "x.npy", "--out", tmp_path / "x.npy" / "r.json")


@pytest.mark.slow
def test_a_hundred_thousand_vectors_in_a_minute(tmp_path):
    vectors, pairs = planted(100_000, 512, 2000, noise=1.0)
    np.save(tmp_path / "x.npy", vectors)
    pipeline.dedup(DedupConfig(str(tmp_path / "x.npy"), str(tmp_path / "r.json")))
    report = json.loads((tmp_path / "r.json").read_text())
    assert {frozenset(group) for group in report["groups"]} == pairs and report["seconds"] < 60


def test_readme_commands_parse():
    """Every `python data.py COMMAND ...` that the README and data.py show is a command line that is understood."""
    commands = re.findall(r"^ *python data\.py (precompute|dedup)([^\n#`]*)", (ROOT / "README.md").read_text() + inspect.getsource(data), re.MULTILINE)
    assert len(commands) >= 3
    for command, flags in commands:
        parse_config(data.COMMANDS[command], shlex.split(flags))
