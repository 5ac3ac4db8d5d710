"""Several processes train as one does; a run that is killed ends as an undisturbed one; what the disk refuses."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import checkpoint
import distributed

SCRIPT = str(ROOT / "tests" / "tiny_train.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(processes, settings):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else [sys.executable]
    return [*start, SCRIPT, json.dumps(settings)]


def trained(folder, weights, processes=1, **settings):
    done = ended(folder, weights, processes, **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    return losses(folder)


def ended(folder, weights, processes=1, **settings):
    settings = {"stage": "pretrain", "out": str(folder), "weights": str(weights), **settings}
    return subprocess.run(command(processes, settings), env=ENVIRONMENT, capture_output=True, text=True)


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([row["loss"] for row in rows if "loss" in row], dtype=torch.float64)


def final(folder, part="mmdit"):
    return checkpoint.load_checkpoint(folder / f"{part}.pt")


def same(a, b):
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """20 steps in one process: (folder, losses)."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, trained(folder, tiny)


@pytest.mark.parametrize("processes, settings", [(2, {}), (2, {"grad_accum": 2}), (1, {"grad_accum": 4}), (2, {"sharding": "fsdp"}), (2, {"sharding": "fsdp", "grad_accum": 2}),
                                                 (1, {"checkpointing": True})])
def test_any_split_of_the_batch_gives_the_same_training(alone, tiny, tmp_path, processes, settings):
    folder, expected = alone
    found = trained(tmp_path, tiny, processes, **settings)
    assert len(found) == 20 and (found - expected).abs().max() < 1e-5
    for name, tensor in final(folder).items():
        torch.testing.assert_close(final(tmp_path)[name].float(), tensor.float(), atol=2e-3, rtol=0)       # stored in half precision
    assert len({json.dumps(row, sort_keys=True) for row in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())}) == 22       # rank 0 alone logs


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_processes_in_bf16(alone, tiny, tmp_path, sharding):
    found = trained(tmp_path, tiny, 2, sharding=sharding, precision="bf16", steps=4, lr_schedule="constant")
    difference = (found - alone[1][:4]).abs().max()
    assert 1e-6 < difference < 0.02                                               # not fp32, but like it


@pytest.mark.parametrize("stage", ["vae", "clip", "t5"])
def test_the_frozen_parts_too(tiny, tmp_path, stage):
    settings = dict(stage=stage, steps=8, seed=1)       # with seed 0 one rounding of the autoencoder grows to 1e-5
    one, two = (trained(tmp_path / str(n), tiny, n, **settings) for n in (1, 2))
    assert len(one) == 8 and (one - two).abs().max() < 1e-5
    if stage == "t5":
        assert (one - trained(tmp_path / "accumulated", tiny, 1, **settings, grad_accum=4)).abs().max() < 1e-5


# ---- killed at any moment

def killed_until_done(folder, weights, kills, processes=1, number=signal.SIGKILL, seed=0, **settings):
    """Runs a training and kills it `kills` times, each at a random moment in which it makes progress, then lets it end; -> how often it was killed in time."""
    settings = {"stage": "pretrain", "out": str(folder), "weights": str(weights), "resume": True, **settings}
    rng, hits = random.Random(seed), 0
    for _ in range(kills):
        before = (folder / "metrics.jsonl").read_text() if (folder / "metrics.jsonl").exists() else ""
        process = subprocess.Popen(command(processes, settings), env=ENVIRONMENT, stderr=subprocess.PIPE, start_new_session=True, text=True)
        deadline = time.time() + 60
        while process.poll() is None and time.time() < deadline:                  # the seconds that importing torch takes are not what is tested
            if (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").read_text() != before:
                break
            time.sleep(0.005)
        time.sleep(rng.random() * 0.6)
        if process.poll() is None:
            hits += 1
            os.killpg(process.pid, number)                                        # of its own session
        process.communicate()
    done = subprocess.run(command(processes, settings), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return hits


@pytest.mark.parametrize("kills, steps", [(3, 60), pytest.param(20, 500, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_to_the_bit_as_an_undisturbed_run(tiny, tmp_path, kills, steps):
    settings = dict(steps=steps, depth=1, checkpoint_every=5, eval_every=1000, batch_size=4, chunk=8)
    expected = trained(tmp_path / "a", tiny, **settings)
    hits = killed_until_done(tmp_path / "b", tiny, kills, **settings)
    assert hits >= kills // 2
    assert same(final(tmp_path / "a"), final(tmp_path / "b")) and losses(tmp_path / "b").equal(expected)
    assert not [path for path in (tmp_path / "b").iterdir() if path.name.startswith(".pretrain")]


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_processes_killed(tiny, tmp_path, sharding):
    settings = dict(steps=30, checkpoint_every=4, eval_every=1000, sharding=sharding)
    expected = trained(tmp_path / "a", tiny, 2, **settings)
    assert killed_until_done(tmp_path / "b", tiny, 1, 2, **settings) == 1
    assert same(final(tmp_path / "a"), final(tmp_path / "b")) and losses(tmp_path / "b").equal(expected)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_processes_then_one_then_two(alone, tiny, tmp_path, sharding):
    """A checkpoint is of no number of processes."""
    for processes, stop_at in ((2, 6), (1, 13)):
        done = ended(tmp_path, tiny, processes, sharding=sharding, resume=True, stop_at=stop_at)
        assert done.returncode == 1 and f"stopped at step {stop_at + 1}; the same command with --resume goes on" in done.stderr, done.stderr[-3000:]
    found = trained(tmp_path, tiny, 2, sharding=sharding, resume=True)
    assert len(found) == 20 and (found - alone[1]).abs().max() < 1e-5


# ---- stopped by a signal, refused by the disk

def test_a_gpu_of_its_own_for_each_process(monkeypatch):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError, match="--device cuda:0: under torchrun each process takes a GPU of its own"), distributed.processes("cuda:0", "ddp"):
        pass


@pytest.mark.parametrize("backend, error, stays", [("nccl", ValueError, True), ("nccl", SystemExit, False), ("gloo", ValueError, False)])
def test_a_process_that_fails_alone_does_not_wait_for_nccl(monkeypatch, backend, error, stays):
    """It would wait for the others, which wait for it."""
    monkeypatch.setattr(distributed.dist, "get_backend", lambda: backend)
    try:
        with pytest.raises(error), distributed.processes("cpu", "fsdp"):
            raise error
        assert distributed.dist.is_initialized() == stays
    finally:
        if distributed.dist.is_initialized():
            distributed.dist.destroy_process_group()


def test_sigterm_saves_and_resume_goes_on(tiny, tmp_path):
    """Sent to the whole group, the processes that read included, as torchrun does."""
    settings = dict(stage="vae", steps=60, batch_size=4, eval_every=1000, workers=1)
    trained(tmp_path / "a", tiny, **settings)
    settings |= {"out": str(tmp_path / "b"), "weights": str(tiny), "resume": True}
    process = subprocess.Popen(command(1, settings), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / "b" / "metrics.jsonl").exists() or not (tmp_path / "b" / "metrics.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 1 and "the same command with --resume goes on" in errors and "Traceback" not in errors
    (saved,) = (tmp_path / "b").glob("*.ckpt")
    assert 1 <= checkpoint.load_checkpoint(saved)["step"] < 60
    assert subprocess.run(command(1, settings), env=ENVIRONMENT, capture_output=True).returncode == 0
    assert same(final(tmp_path / "a", "vae"), final(tmp_path / "b", "vae"))


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    """A limit on the size of files stands in for the disk's end."""
    path, limits = tmp_path / "a.ckpt", resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoint.save_checkpoint(path, {"step": 1, "x": torch.zeros(1000)})
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(OSError, match="a.ckpt cannot be written: .*is the disk full"):
            checkpoint.save_checkpoint(path, {"step": 2, "x": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert checkpoint.load_checkpoint(path)["step"] == 1 and [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_resume_goes_on(alone, tiny, tmp_path, sharding):
    settings = dict(sharding=sharding, checkpoint_every=5, log_every=20)
    done = ended(tmp_path, tiny, full_at=8, **settings)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert re.fullmatch(r"tiny_train.py: .*pretrain-0000010.ckpt cannot be written: .*\(is the disk full\?\); the last good checkpoint is .*pretrain-0000005.ckpt, --resume goes on from it",
                        done.stderr.splitlines()[-1])
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith("ckpt") or path.name.startswith(".pre")] == ["pretrain-0000005.ckpt"]
    trained(tmp_path, tiny, resume=True, **settings)
    for name, tensor in final(alone[0]).items():
        torch.testing.assert_close(final(tmp_path)[name].float(), tensor.float(), atol=2e-3, rtol=0)


def test_a_disk_without_room_for_a_line_of_the_log(tiny, tmp_path):
    done = ended(tmp_path, tiny, full_at=8, checkpoint_every=5)
    assert done.returncode == 2 and re.fullmatch(r"tiny_train.py: .*File too large; the last good checkpoint is .*pretrain-0000005.ckpt, --resume goes on from it", done.stderr.splitlines()[-1])
