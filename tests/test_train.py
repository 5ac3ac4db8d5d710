"""train.py: every stage from nothing to a bundle, on `shapes` and on a folder; resuming; what it refuses; the loop's parts."""

import inspect
import itertools
import json
import os
import re
import signal
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import checkpoint
import distributed
import flow
import optim
import pipeline
import plan
import runs
import sample
import train
from config import parse_config
from data import Sample
from flow import PAPER_FORMULATIONS, formulation, shift
from runs import plot
from sample import generate
from samplers import SAMPLERS
from train import DEFAULTS, FROM_NOTHING, TRAIN, TrainConfig

TINY = TrainConfig(batch_size=4, steps=3, depth=1, text_width=32, resolution=32, latent_channels=4, chunk=8, reuse=2, workers=0, log_every=1, warmup=2)
FLAGS = "--batch-size 4 --steps 2 --depth 1 --text-width 32 --resolution 32 --latent-channels 4 --chunk 8 --reuse 2 --workers 0".split()


@pytest.fixture
def run(monkeypatch):
    """run(stage=..., out=...) is train.py with tiny settings, and with less data for tokenizers and validation than an hour's training takes."""
    first, geneval = train.first, train.evaluate.geneval
    monkeypatch.setattr(train, "first", lambda dataset, n, cfg: first(dataset, min(n, 24), cfg))
    monkeypatch.setattr(train.evaluate, "geneval", lambda bundle, n: geneval(bundle, 1))
    for stage in DEFAULTS:
        monkeypatch.setitem(DEFAULTS, stage, {**DEFAULTS[stage], "steps": 3, "batch_size": 4})

    def main(**settings):
        monkeypatch.setattr(train, "CONFIG", replace(TINY, **settings), raising=False)
        train.main()
    return main


def rows(folder, stage):
    return [row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if row["stage"] == stage]


def weights(folder, name="mmdit"):
    return checkpoint.load_checkpoint(folder / f"{name}.pt")


def same(a, b):
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- end to end

def test_all_stages_on_shapes_give_a_bundle(run, cli, refused, tmp_path, capsys):
    out = tmp_path / "mine"
    run(stage="all", out=str(out))
    for stage in FROM_NOTHING:
        assert rows(out, stage)[-1] == {"stage": stage, "step": 3, "done": True} and (out / f"{stage}-loss.png").exists()
        losses = [row for row in rows(out, stage) if "loss" in row]
        assert [row["step"] for row in losses] == [1, 2, 3] and all(np.isfinite([row["loss"], row["grad_norm"]]).all() for row in losses)
    assert "psnr" in rows(out, "vae")[-2] and {"retrieval_l", "retrieval_g"} <= rows(out, "clip")[-2].keys() and {"val_loss", "val_told"} <= rows(out, "t5")[-2].keys()
    last, bins = rows(out, "pretrain")[-2], [row["loss_bins"] for row in rows(out, "pretrain") if "loss_bins" in row]
    assert len(last["val_levels"]) == 8 and last["val_loss"] == pytest.approx(np.mean(last["val_levels"][:-1])) and 0 <= last["overall"] <= 1
    assert all(len(b) == 8 for b in bins) and any(value for b in bins for value in b)
    assert Image.open(out / "grid-0000003.png").text["prompts"].count("\n") == 15
    assert not [path for path in out.iterdir() if path.suffix == ".ckpt" or path.name.startswith(".")]

    bundle = checkpoint.load_bundle(out)
    latents = bundle.vae.to_latents(torch.rand(1, 3, 32, 32), sample=False)
    assert latents.shape == (1, 4, 4, 4) and isinstance(bundle.vae.shift, list) and bundle.config["steps"] == 28
    assert generate(bundle, ["a red circle"], steps=2).shape == (1, 32, 32, 3)
    assert cli("sample.py", "--prompt", "a red circle", "--weights", out, "--out", tmp_path / "out.png")[0] == 0

    before = contents(out)
    for stage in ("all", "pretrain", "vae"):                                      # a finished run is not overwritten
        with pytest.raises(ValueError, match="mine holds a run of stage (vae|pretrain): --resume goes on with it, another --out starts afresh"):
            run(stage=stage, out=str(out), cfg=9.0)
    capsys.readouterr()
    run(stage="all", out=str(out), resume=True)
    assert capsys.readouterr().out.count("is done") == 4 and contents(out) == before


@pytest.fixture
def pictures(tmp_path):
    """12 captioned pictures of any size, one of which is no picture."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(12):
        Image.effect_noise((20 + 7 * i, 60 - 3 * i), 10 * i).convert("RGB").save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"noise of strength {i}, façade 🟦")
    (folder / "07.png").write_bytes(b"no picture")
    return folder


def test_each_stage_by_its_command_on_a_folder(cli, pictures, tmp_path):
    out = tmp_path / "mine"
    for stage in FROM_NOTHING:
        status, _, errors = cli("train.py", "--stage", stage, "--data", f"folder:{pictures}", "--out", out, *FLAGS)
        assert status == 0, errors
        named = [line for line in errors if "cannot identify image file" in line]
        assert "skipped, 1 in all:" in errors and len(named) == 1 and f"{pictures}/07.png" in named[0] or stage == "t5"       # which looks at no picture
    assert "val_loss" in rows(out, "t5")[-2] and "val_told" not in rows(out, "t5")[-2]        # there is no other caption to tell
    prompts = Image.open(out / "grid-0000002.png").text["prompts"].split("\n")
    assert len(prompts) == 11 and "noise of strength 7, façade 🟦" not in prompts
    assert cli("sample.py", "--prompt", prompts[0], "--weights", out, "--out", tmp_path / "out.png")[0] == 0


def test_a_folder_of_unreadable_pictures(cli, pictures, tmp_path):
    for path in pictures.glob("*.png"):
        path.write_bytes(b"no picture")
    status, _, errors = cli("train.py", "--stage", "vae", "--data", f"folder:{pictures}", "--out", tmp_path / "mine", *FLAGS)
    assert status == 2 and "100 pictures in a row cannot be read" in errors[-1] and "skipped, 12 in all:" in errors and not (tmp_path / "mine").exists()


# ---- resuming

def interrupt(monkeypatch, name, call, error):
    """train.<name> raises `error`, or the process gets that signal, the `call`-th time."""
    calls, function = itertools.count(1), getattr(train, name)

    def wrapped(*arguments, **options):
        if next(calls) == call:
            if not isinstance(error, signal.Signals):
                raise error
            os.kill(os.getpid(), error)
        return function(*arguments, **options)
    monkeypatch.setattr(train, name, wrapped)


@pytest.mark.parametrize("stage, name, part", [("vae", "vae_loss", "vae"), ("pretrain", "by_level", "mmdit")])
def test_a_resumed_run_ends_as_an_undisturbed_one(run, tiny, tmp_path, monkeypatch, stage, name, part):
    a, b, c = (tmp_path / letter for letter in "abc")
    settings = dict(stage=stage, weights=str(tiny), steps=6)
    run(out=str(a), **settings)
    with monkeypatch.context() as patch:                                          # Ctrl-C
        interrupt(patch, name, 3, signal.SIGINT)
        with pytest.raises(SystemExit, match="stopped at step 3; the same command with --resume goes on"):
            run(out=str(b), **settings)
    with pytest.raises(ValueError, match="b holds a run of stage"):
        run(out=str(b), **settings)
    run(out=str(b), resume=True, **settings)
    with monkeypatch.context() as patch:                                          # a crash, two steps after the last checkpoint
        interrupt(patch, name, 6, RuntimeError)
        with pytest.raises(RuntimeError):
            run(out=str(c), eval_every=3, **settings)
    with open(c / "metrics.jsonl", "a") as file:
        file.write('{"stage": "' + stage + '", "st')                              # in the middle of a line
    run(out=str(c), resume=True, eval_every=3, **settings)
    for other in (b, c):
        assert same(weights(a, part), weights(other, part))
        losses = [[(row["step"], row["loss"], row["grad_norm"]) for row in rows(folder, stage) if "loss" in row] for folder in (a, other)]
        assert losses[0] == losses[1]


# ---- refusals

@pytest.mark.parametrize("arguments, reason", [
    (["--data", "shape"], "unknown data 'shape'; known: shapes[:LEVEL], folder:DIR, imagenet:DIR"),
    (["--data", "shapes:hard"], "unknown level of shapes 'hard'"),
    (["--data", "folder:absent"], "absent is no folder"), (["--seed", str(2 ** 43)], "--seed is 8796093022208; at most 2^42"),
    (["--data", "folder:empty"], "empty holds no image with a caption"),
    (["--data", "fashion-mnist:empty"], "is not there"),
    (["--weights", "absent"], "absent is no bundle folder"),
    (["--stage", "pretran"], "unknown value 'pretran'; known: vae, clip, t5, pretrain, finetune, edit, all; did you mean pretrain?"),
    (["--bacth-size", "4"], "unknown flag --bacth-size; did you mean --batch-size?"),
    (["--resolution", "40"], "width is 40 pixels; it must be a multiple of 16"),
    (["--formulation", "rf/lognrm"], "unknown formulation 'rf/lognrm'"),
    (["--stage", "all", "--chunk", "128", "--data", "shapes:hard"], "unknown level of shapes 'hard'"), (["--stage", "vae", "--data", "shapesX"], "unknown data 'shapesX'"),
    (["--stage", "all", "--chunk", "128", "--data", "folder:empty", "--keep-resolution", "32"], "--keep-resolution is for shapes"), (["--threads", "-1"], "--threads is -1; the least is 0"),
    (["--muon-lr", "-0.02"], "--muon-lr is -0.02; the least is 0"), (["--ema-decay", "-1"], "--ema-decay is -1.0; it is a share"),
    (["--plan", "--buckets"], "--plan counts squares"),
    (["--clip-grad", "-1"], "--clip-grad is -1.0; the least is 0"), (["--text-dropout", "46.4"], "--text-dropout is 46.4; it is a share, in 0..1"), (["--shift", "150"], "--shift is 150"),
    (["--depth", "0"], "--depth is 0; the least is 1"), (["--steps", "-5"], "--steps is -5; the least is 1"),
    (["--chunk", "1"], "--chunk is 1; the least is 4"), (["--weight-sets", "4"], "known are 1, 2, 3"),
    (["--grad-accum", "3"], "--batch-size is 4: it cannot be split over 1 processes and 3 micro-batches"), (["--keep", "0"], "--keep is 0; the least is 1"),
    (["--stage", "clip", "--grad-accum", "2"], "--grad-accum is 2; stage clip"), (["--lr-schedule", "cosin"], "did you mean cosine?"),
    (["--sharding", "fdsp"], "did you mean fsdp?"), (["--sharding", "fsdp", "--compile"], "--compile goes with --sharding ddp"),
    (["--stage", "clip", "--sharding", "fsdp"], "--stage clip goes with --sharding ddp"), (["--ema-every", "0"], "--ema-every is 0; the least is 1"),
    (["--clip-length", "17"], "--clip-length is 17; the CLIPs of"),
    (["--device", "toaster"], "device 'toaster' cannot be used"), (["--plan", "--device", "toaster"], "device 'toaster' cannot be used"),
    (["--sharding", "fsdp", "--device", "cuda:99"], "device 'cuda:99' cannot be used"), (["--compile"], "--compile needs a C++ compiler: absent-compiler is not there")])
def test_bad_input_is_one_line_and_nothing_is_written(refused, tiny, tmp_path, monkeypatch, arguments, reason):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", "absent-compiler")
    (tmp_path / "empty").mkdir()
    flags = [*FLAGS, "--weights", tiny, *arguments]                               # the last of two wins
    assert reason in refused("train.py", *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"] and not list((tmp_path / "empty").iterdir())


def test_checkpoints_that_cannot_be_resumed_from(run, tiny, tmp_path):
    settings = dict(stage="pretrain", out=str(tmp_path), weights=str(tiny), resume=True)
    path = tmp_path / "pretrain-0000001.ckpt"
    for raw, reason in ((b"foreign", "pretrain-0000001.ckpt is no checkpoint of ours, or damaged"), (None, "pretrain-0000001.ckpt is no training checkpoint")):
        path.write_bytes(raw) if raw else checkpoint.save_checkpoint(path, {"step": 1})
        with pytest.raises(ValueError, match=reason):
            run(**settings)
    model = train.MMDiT(2, 4, context_dim=32, pooled_dim=20)
    checkpoint.save_checkpoint(path, {"step": 1, "model": model.state_dict(), "ema": model.state_dict(), "optimizers": []})
    with pytest.raises(ValueError, match="pretrain-0000001.ckpt is of another architecture"):
        run(**settings)


def test_frozen_parts_of_another_world_are_named(run, tiny, pictures, tmp_path, capsys):
    checkpoint.copy_parts(tiny, tmp_path / "start")
    checkpoint.write_json(tmp_path / "start" / "config.json", {**checkpoint.read_json(tiny / "config.json"), "data": "shapes"})
    run(stage="pretrain", weights=str(tmp_path / "start"), data=f"folder:{pictures}", out=str(tmp_path / "run"))
    assert "start: its autoencoder and text encoders have seen shapes alone; --stage all trains others" in capsys.readouterr().err


def test_t5_learns_from_long_captions(run, tmp_path):
    """More spans are hidden in them than T5's usual few sentinels name."""
    (tmp_path / "long").mkdir()
    for i in range(24):
        Image.new("RGB", (32, 32)).save(tmp_path / "long" / f"{i}.png")
        (tmp_path / "long" / f"{i}.txt").write_text(" ".join(f"word{(i + k) % 40}" for k in range(140)))
    run(stage="t5", data=f"folder:{tmp_path}/long", out=str(tmp_path / "mine"), t5_length=77)
    assert np.isfinite(rows(tmp_path / "mine", "t5")[-2]["val_loss"])


def test_fewer_steps_than_were_made_are_refused(run, quick, tiny, tmp_path, monkeypatch):
    settings = dict(stage="pretrain", out=str(tmp_path / "mine"), weights=str(tiny), steps=4)
    with monkeypatch.context() as patch:
        interrupt(patch, "by_level", 3, signal.SIGINT)
        with pytest.raises(SystemExit, match="stopped at step 3"):
            run(**settings)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="--steps is 2, .*pretrain-0000003.ckpt is further"):
        run(**{**settings, "steps": 2, "cfg": 9.0}, resume=True)
    with pytest.raises(ValueError, match="mine was begun with --depth 1, not 2"):
        run(**{**settings, "depth": 2}, resume=True)
    assert contents(tmp_path) == before


def test_nothing_is_lost_when_the_last_validation_is_stopped(run, tiny, tmp_path, monkeypatch):
    settings = dict(stage="pretrain", out=str(tmp_path), weights=str(tiny), steps=2)
    with monkeypatch.context() as patch:
        interrupt(patch, "drawn", 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt, match="the same command with --resume goes on"):
            run(**settings)
    trained = {name: x.half() for name, x in checkpoint.load_checkpoint(tmp_path / "pretrain-0000002.ckpt")["ema"].items()}
    bundle = checkpoint.load_bundle(tmp_path)                                     # which has no mmdit.pt yet
    sample.replace_mmdit(bundle, tmp_path / "pretrain-0000002.ckpt")
    assert generate(bundle, ["a red circle"], steps=1).shape == (1, 32, 32, 3)
    monkeypatch.setattr(train, "gradients", None)                                 # there is nothing left to train
    run(**settings, resume=True)
    assert same(trained, weights(tmp_path))


def test_a_loss_that_is_not_finite_ends_the_run(run, tiny, tmp_path):
    with pytest.raises(ValueError, match="the pretrain loss is .* at step [12]"):
        run(stage="pretrain", out=str(tmp_path / "mine"), weights=str(tiny), lr=1e30, warmup=1, clip_grad=1e30, max_bad_steps=0)
    assert not (tmp_path / "mine" / "mmdit.pt").exists()


# ---- the settings

@pytest.mark.parametrize("name", [field.name for field in fields(TrainConfig)])
def test_every_setting_is_used(name):
    source = inspect.getsource(train).split("STAGES")[2] + "".join(map(inspect.getsource, (pipeline, optim, distributed, runs, plan)))
    assert re.search(rf"\bcfg\.{name}\b", source), f"--{name} is accepted and dropped"


def test_settings_change_the_weights(run, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train.evaluate, "validation_loss", lambda *arguments, **settings: [0.0] * 8)
    monkeypatch.setattr(train.evaluate, "geneval", lambda *arguments: ({}, []))
    monkeypatch.setattr(train, "generate", lambda bundle, prompts: torch.zeros(1, 16, 16, 3, dtype=torch.uint8))

    def batches(dataset, n, cfg, start, rank, world):
        images = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(start))
        return itertools.repeat((images, [f"{cfg.synthetic_share} star"] * n, [Sample(np.zeros((32, 32, 3), np.uint8), "")]))

    monkeypatch.setattr(pipeline, "batches", batches)

    def trained(name, **change):
        run(stage="pretrain", out=str(tmp_path / name), weights=str(tiny), **change)
        return weights(tmp_path / name)

    plain = trained("plain")
    assert same(plain, trained("again"))
    changes = dict(seed=1, lr=2e-3, optimizer="adamw", muon_lr=0.01, warmup=1, decay=1.0, weight_decay=0.5, clip_grad=0.01, ema_decay=0.1, ema_every=2, lr_schedule="constant",
                   formulation="rf", shift=2.0, text_dropout=1.0,
                   synthetic_share=1.0, reuse=1, qk_norm=False, weight_sets=3, batch_size=2, chunk=4, init_from=str(tmp_path / "plain"))
    for name, value in changes.items():
        assert not same(plain, trained(name, **{name: value})), name
    assert checkpoint.read_json(tmp_path / "shift" / "config.json")["shift"] == 2.0 and checkpoint.read_json(tmp_path / "plain" / "config.json")["shift"] == DEFAULTS["pretrain"]["shift"]


@pytest.mark.parametrize("name", [name for name in PAPER_FORMULATIONS if not name.startswith("rf")])
def test_how_a_bundle_of_a_curved_path_is_sampled(name):
    """A perfect network of N(mean, 0.2^2): what `train.py` writes into config.json comes near the exact solution."""
    cfg = train.with_defaults(replace(TINY, formulation=name), "pretrain")
    settings, form = train.sampling_settings(cfg), flow.formulation(name)
    mean, noise = torch.tensor([[0.8, -1.2]]), torch.randn(64, 2, generator=torch.Generator().manual_seed(0))

    def velocity(z, t):
        a, b, da, db = (f(t)[:, None] for f in (form.a, form.b, form.da, form.db))
        x0 = mean + 0.04 * a / (0.04 * a ** 2 + b ** 2) * (z - a * mean)
        return da * x0 + db * (z - a * x0) / b

    def solution(t):
        return form.a(t) * mean + (0.04 * form.a(t) ** 2 + form.b(t) ** 2).sqrt() * noise

    ts = sample.time_grid(form, settings["schedule"], settings["steps"], cfg.shift, settings.get("t_last", 0.0))
    z = SAMPLERS[settings["sampler"]](velocity, solution(ts[0]), ts, path=form)
    assert (z - solution(ts[-1])).abs().max() < 0.012 and len(ts) == settings["steps"] + 1


def test_lr_factor():
    cfg = replace(TINY, steps=100, warmup=10, decay=0.4)
    factors = [optim.lr_factor(step, cfg) for step in range(100)]
    assert factors[0] == 0.1 and factors[9] == factors[60] == 1 and min(factors) > 0
    assert np.allclose(np.diff(factors)[:9], 0.1) and np.allclose(np.diff(factors)[60:], -1 / 40) and factors[-1] == pytest.approx(1 / 40)
    assert {optim.lr_factor(step, replace(cfg, warmup=0, decay=0.0)) for step in range(100)} == {1.0}


def test_learning_rate_schedules():
    cfg = replace(TINY, steps=100, warmup=10, decay=0.4)
    constant, linear, cosine = ([optim.lr_factor(step, replace(cfg, lr_schedule=name)) for step in range(100)] for name in ("constant", "linear", "cosine"))
    assert constant[:61] == linear[:61] and np.allclose(cosine[:61], linear[:61]) and set(constant[10:]) == {1.0}
    assert cosine[80] == pytest.approx(0.5) == linear[80] and cosine[70] > linear[70] and 0 < cosine[99] < linear[99]


def test_defaults_and_flags_agree(run, tmp_path, monkeypatch):
    """A flag wins over the stage's default; with stage all, steps are those of pretrain."""
    seen = []
    monkeypatch.setattr(train, "TRAIN", dict.fromkeys(TRAIN, seen.append))
    monkeypatch.setattr(train.Run, "finish", lambda run: None)
    run(stage="vae", out=str(tmp_path), steps=0, lr=5.0)
    run(stage="all", out=str(tmp_path), steps=7)
    assert (seen[0].steps, seen[0].lr, seen[0].muon_lr) == (3, 5.0, DEFAULTS["vae"]["muon_lr"])
    assert [(cfg.stage, cfg.steps) for cfg in seen[1:]] == [("vae", 3), ("clip", 3), ("t5", 3), ("pretrain", 7)]
    run(stage="clip", out=str(tmp_path), steps=0, optimizer="muon")
    assert seen[2].optimizer == "adamw" and seen[-1].optimizer == "muon" and seen[-1].muon_lr > 0


# ---- the loop

def test_by_level():
    t = torch.tensor([0.0, 0.1, 0.13, 0.5, 0.99, 1.0])
    assert train.by_level(torch.tensor([1.0, 3, 5, 7, 2, 4]), t) == [2.0, 5.0, None, None, 7.0, None, None, 3.0]


def test_mean_of_rows():
    assert runs.mean_of([{"a": 1.0, "b": [1.0, None, None]}, {"a": 2.0, "b": [3.0, 5.0, None]}]) == {"a": 1.5, "b": [2.0, 5.0, None]}


def fitted(folder, steps, record=None, validate=lambda module, step: {}, **settings):
    """train.fit on a linear module; `record` collects its weights at the beginning of each step."""
    cfg = replace(TINY, stage="vae", out=str(folder), steps=steps, warmup=1, decay=0.0, lr=0.1, optimizer="adamw", **settings)
    torch.manual_seed(0)

    def loss_of(module, batch, noise):
        if record is not None:
            record.append(module.weight.detach().clone())
        return (module(batch) + noise).square().mean(), {}

    def batches(start):
        return (torch.randn(4, 3, generator=torch.Generator().manual_seed(s)) for s in itertools.count(start, 4))

    return train.fit(cfg, torch.nn.Linear(3, 1), batches, lambda batch, generator: (batch, torch.randn(4, 1, generator=generator)), loss_of, validate)


def test_the_returned_weights_are_the_average(tmp_path):
    record = []
    fitted(tmp_path / "a", 9, record, ema_decay=0.6)
    average = record[0]
    for step, w in enumerate(record[1:], 1):                                      # the weights after `step` steps
        decay = min(0.6, (step + 1) / (step + 10))
        average = decay * average + (1 - decay) * w
    torch.testing.assert_close(fitted(tmp_path / "b", 8, ema_decay=0.6).weight, average)


def test_a_step_that_is_not_finite_is_skipped_counted_and_named(tmp_path, capsys, monkeypatch):
    record = []
    with monkeypatch.context() as patch:
        real, calls = train.gradients, itertools.count(1)

        def spoilt(network, columns, cfg):
            if next(calls) in (3, 4):
                columns = columns[0] * float("nan"), columns[1]
            return real(network, columns, cfg)

        patch.setattr(train, "gradients", spoilt)
        fitted(tmp_path / "a", 6, record)
        assert record[2].equal(record[3]) and record[3].equal(record[4]) and not record[4].equal(record[5])
        assert [row["bad_steps"] for row in rows(tmp_path / "a", "vae") if "bad_steps" in row] == [1, 2]
        assert "the vae loss is nan and its gradient nan at step 3: skipped (1 so far)" in capsys.readouterr().err
        calls = itertools.count(1)
        with pytest.raises(ValueError, match="the vae loss is nan .* at step 4, the 2. step that is not finite; the last good checkpoint is .*vae-0000002.ckpt"):
            fitted(tmp_path / "b", 6, max_bad_steps=1, checkpoint_every=2)


def test_newest_checkpoints_and_milestones_are_kept(tmp_path):
    class Stopped(Exception):
        pass

    def validate(module, step):
        if step == 9:
            raise Stopped
        return {}

    def kept(folder, **settings):
        with pytest.raises(Stopped):
            fitted(tmp_path / folder, 20, checkpoint_every=1, eval_every=9, validate=validate, **settings)
        return sorted(int(path.stem[-7:]) for path in (tmp_path / folder).glob("*.ckpt"))

    assert kept("a") == [7, 8] and kept("b", keep=3) == [6, 7, 8] and kept("c", keep=1, milestone_every=3) == [3, 6, 8]


def test_watching_records_each_block_and_changes_nothing(run, tiny, tmp_path):
    for name, every, again in (("off", 0, False), ("on", 2, False), ("again", 2, True)):
        run(stage="pretrain", out=str(tmp_path / name), weights=str(tiny), depth=2, steps=4, watch_every=every, checkpointing=again)
    seen = [row for row in rows(tmp_path / "on", "pretrain") if "entropies" in row]
    assert [row["step"] for row in seen] == [2, 4] and all(len(row["max_logits"]) == len(row["entropies"]) == 2 for row in seen)
    recomputed = [row for row in rows(tmp_path / "again", "pretrain") if "entropies" in row]
    assert all(np.allclose(a[name], b[name], rtol=1e-5) for a, b in zip(seen, recomputed) for name in ("entropies", "max_logits"))
    assert all(0 < e <= np.log(4 + 16 + 24) + 1e-4 for row in seen for e in row["entropies"])         # 4 image tokens, 16 + 24 of text
    assert same(weights(tmp_path / "off"), weights(tmp_path / "on")) and not any("entropies" in row for row in rows(tmp_path / "off", "pretrain"))


def test_tf32_and_checkpointing_reach_torch(run, tiny, tmp_path, monkeypatch):
    seen, forward = [], train.MMDiT.forward
    monkeypatch.setattr(train.MMDiT, "forward", lambda model, *inputs: seen.append(model.checkpointing) or forward(model, *inputs))
    for value in (True, False):
        run(stage="pretrain", out=str(tmp_path / str(value)), weights=str(tiny), tf32=value, checkpointing=value, steps=1)
        assert torch.backends.cuda.matmul.allow_tf32 is value and {*seen[1:]} == {value}      # the first is the count of FLOPs, always without
        seen.clear()


def test_gradients_are_clipped(tmp_path):
    fitted(tmp_path, 3, clip_grad=1e-12)
    norms = [row["grad_norm"] for row in rows(tmp_path, "vae") if "grad_norm" in row]
    assert len(norms) == 3 and min(norms) > 0.1                                   # what is logged is the norm before
    large, none = (fitted(tmp_path / name, 3, clip_grad=most).state_dict() for name, most in (("large", 1e9), ("none", 0.0)))
    assert same(large, none)


@pytest.mark.parametrize("name, factor", [("rf/lognorm(0.00,1.00)", 0.5), ("v/cos", 1.0)])
def test_smaller_batches_are_shifted_less_on_straight_paths(tiny, name, factor):
    form = formulation(name)
    draw, _ = train.flow_matching(replace(TINY, resolution=64, shift=1.0, formulation=name), checkpoint.load_bundle(tiny), form, None, 4)
    for side, alpha in ((8, 1.0), (4, factor)):
        t = draw((torch.zeros(4, 4, side, side),), torch.Generator().manual_seed(0))[2]
        generator = torch.Generator().manual_seed(0)
        checkpoint.load_bundle(tiny).text.kept(4, TINY.text_dropout, generator)
        torch.testing.assert_close(t, shift(form.sample_t(4, generator), alpha))


def test_muon_takes_hidden_weights_and_adamw_the_rest():
    vae = train.AutoencoderKL(4, channels=8, multipliers=(1, 2), blocks=1, unshuffle=4, attention=False, groups=4)
    muon, adamw = train.make_optimizers(vae, replace(TINY, lr=1e-3, muon_lr=0.02))
    names = {id(p): name for name, p in vae.named_parameters()}
    hidden = {names[id(p)] for p in muon.param_groups[0]["params"]}
    rest = {names[id(p)] for p in adamw.param_groups[0]["params"]}
    assert hidden | rest == {*names.values()} and not hidden & rest
    assert all(name.endswith("weight") and "conv_in" not in name and "conv_out" not in name for name in hidden) and "encoder.down.0.block.0.conv1.weight" in hidden
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    vae.decode(vae.to_latents(torch.rand(2, 3, 32, 32), sample=False)).square().mean().backward()
    for optimizer in (muon, adamw):
        optimizer.step()
    assert all(not before[name].equal(p) for name, p in vae.named_parameters() if p.grad.any())       # Muon's steps reach the kernels themselves
    assert len(train.make_optimizers(vae, replace(TINY, lr=1e-3, muon_lr=0.02, optimizer="adamw"))) == 1


def test_metrics_of_another_program_are_refused(tmp_path, refused):
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1}')
    for arguments in (["--plot", tmp_path], ["--out", tmp_path]):
        assert "metrics.jsonl is not what train.py writes" in refused("train.py", *FLAGS, *arguments)


def test_muon_is_torchs_in_float32():
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in ((64, 32), (32, 64), (64, 32))] for _ in range(2))
    muon, torchs = optim.Muon(ours, lr=0.02, weight_decay=0.5), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.5)
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = b.grad = torch.randn_like(a)
        muon.step()
        torchs.step()
    for a, b in zip(ours, theirs):
        assert (a - b).norm() < 0.02 * (b - 1).norm()                 # torch's is in bf16


def test_muons_updates_are_semi_orthogonal():
    for shape in ((2, 48, 96), (2, 96, 48)):
        values = torch.linalg.svdvals(optim.orthogonalized(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        assert 0.6 < values.min() and values.max() < 1.3


def test_plot_draws_runs_side_by_side(tmp_path, capsys):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"stage": "vae", "step": 1, "loss": 0.5}\n{"stage": "t5", "step": 1, "loss": 1.5}\n{"stage": "t5", "st')
    plot([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["t5-compared.png", "vae-compared.png"]
    with pytest.raises(ValueError, match="no run folder"):
        plot([str(tmp_path / "nothing")], tmp_path / "out")


def test_readme_commands_parse():
    """Every `python train.py ...` that the README and train.py itself show is a command line that is understood."""
    commands = re.findall(r"python train\.py([^\n#`]*)", (ROOT / "README.md").read_text() + inspect.getsource(train))
    assert len(commands) >= 4
    for command in commands:
        if "--help" in command:
            continue
        parse_config(TrainConfig, command.replace("SPEC", "shapes").split())


# ---- the stages that go on from a model

@pytest.fixture
def quick(monkeypatch):
    """Without validation's pictures and scores, on 24 samples."""
    monkeypatch.setattr(train, "held_out_batches", lambda dataset, bundle, cfg, most: pipeline.held_out_batches(dataset, bundle, cfg, 24))
    monkeypatch.setattr(train.evaluate, "geneval", lambda *arguments: ({}, []))
    monkeypatch.setattr(train.evaluate, "edits", lambda *arguments: ({}, []))
    monkeypatch.setattr(train, "generate", lambda bundle, prompts, **settings: torch.zeros(len(prompts), 32, 32, 3, dtype=torch.uint8))


def test_finetuning_at_twice_the_resolution(run, quick, tiny, tmp_path, monkeypatch):
    """Mixed aspect ratios, the shift of Eq. 23, the new positions, QK-norm where there was none: and from one setting, in the bundle."""
    alphas, validation_loss = [], train.evaluate.validation_loss
    monkeypatch.setattr(train.evaluate, "validation_loss", lambda *a, **k: alphas.append(k["alpha"]) or validation_loss(*a, **k))
    run(stage="pretrain", out=str(tmp_path / "start"), weights=str(tiny), steps=1, shift=1.5, qk_norm=False)
    sampled = {"sampler": "ancestral", "noise": 4.0, "t_last": 0.25, "steps": 2, "cfg": 1.25}
    checkpoint.write_json(tmp_path / "start" / "config.json", checkpoint.read_json(tmp_path / "start" / "config.json") | sampled)
    shifts, shift = set(), train.shift
    monkeypatch.setattr(train, "shift", lambda t, alpha: shifts.add(alpha) or shift(t, alpha))
    sizes, forward = set(), train.MMDiT.forward
    monkeypatch.setattr(train.MMDiT, "forward", lambda model, latents, *rest: sizes.add(tuple(latents.shape[2:])) or forward(model, latents, *rest))
    run(stage="finetune", out=str(tmp_path / "fine"), init_from=str(tmp_path / "start"), resolution=64, buckets=True, keep_resolution=32, steps=6)
    config, model = (checkpoint.read_json(tmp_path / "fine" / f"{name}.json") for name in ("config", "mmdit"))
    assert config["resolution"] == 64 and config["shift"] == 3.0 == alphas[-1] and alphas[0] == 1.0
    assert (model["base_size"], model["pos_embed_max_size"], model["qk_norm"], model["depth"]) == (4, 16, True, 1)
    sizes.remove((4, 4))                                                           # what it came from
    assert len(sizes) > 1 and sizes <= {(12, 6), (10, 6), (8, 8), (6, 10), (6, 12)}
    assert {1.5, 3.0} <= shifts
    assert config | sampled == config                                              # as its start
    scales = weights(tmp_path / "fine")["joint_blocks.0.x_block.attn.ln_q.weight"]
    assert (scales - 1).abs().max() > 0.1                                          # fitted, not 1
    bundle = checkpoint.load_bundle(tmp_path / "fine")
    assert generate(bundle, ["a red circle"], steps=1, width=96, height=48).shape == (1, 48, 96, 3)
    cfg = replace(TINY, stage="finetune", init_from=str(tmp_path / "start"), resolution=64)
    assert (train.inherited(cfg).shift, train.inherited(replace(cfg, shift=1.5)).shift, train.inherited(replace(cfg, resolution=128)).shift) == (3.0, 1.5, 6.0)


def test_finetuning_stopped_before_its_first_step_begins_again(run, quick, tiny, tmp_path, monkeypatch):
    """What it copied by then is its own."""
    settings = dict(stage="finetune", out=str(tmp_path / "fine"), init_from=str(tiny), resolution=64, base_resolution=32, steps=1)
    with monkeypatch.context() as patch:
        interrupt(patch, "validation_batches", 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(**settings)
    assert (tmp_path / "fine" / "vae.pt").exists()
    run(**settings)
    assert checkpoint.load_bundle(tmp_path / "fine").mmdit


def test_a_base_resolution_keeps_the_function_on_pictures_of_it(run, quick, tiny, tmp_path):
    """Positions go on outside those of the pretraining, instead of between them."""
    run(stage="finetune", out=str(tmp_path / "fine"), init_from=str(tiny), resolution=64, base_resolution=32, steps=1, lr=1e-12, optimizer="adamw")
    start, fine = (checkpoint.load_bundle(folder).mmdit for folder in (tiny, tmp_path / "fine"))
    config = checkpoint.read_json(tmp_path / "fine" / "mmdit.json")
    assert (config["base_size"], config["pos_embed_max_size"]) == (2, 16)
    inputs = [torch.randn(shape) for shape in ((2, 4, 4, 4), (2,), (2, 40, 32), (2, 20))]
    assert torch.allclose(fine(*inputs), start(*inputs), atol=1e-3)                                 # stored in half precision
    on = replace(TINY, init_from=str(tmp_path / "fine"), stage="edit", resolution=64)
    assert [train.inherited(replace(on, resolution=side)).base_resolution for side in (64, 128, 96)] == [32, 64, 48]      # as its start, or interpolated
    with pytest.raises(ValueError, match="17 pixels"):
        run(stage="finetune", out=str(tmp_path / "odd"), init_from=str(tiny), resolution=64, base_resolution=17)


def test_editing_starts_from_the_pretrained_function(run, quick, tiny, tmp_path):
    """With a learning rate of nearly nothing the model makes what its start makes, whatever picture lies beside; then it is trained to look at it."""
    run(stage="edit", out=str(tmp_path / "same"), init_from=str(tiny), steps=1, lr=1e-12, optimizer="adamw")
    start, same_ = (checkpoint.load_bundle(folder).mmdit for folder in (tiny, tmp_path / "same"))
    latents, *rest = (torch.randn(shape) for shape in ((2, 4, 4, 4), (2,), (2, 40, 32), (2, 20)))
    beside = torch.randn(2, 4, 4, 4)
    assert same_.x_embedder.proj.in_channels == 8 and sample.latent_channels(same_) == (4, 4)
    assert torch.allclose(same_(torch.cat([latents, beside], 1), *rest), start(latents, *rest), atol=1e-3)         # stored in half precision
    run(stage="edit", out=str(tmp_path / "edit"), init_from=str(tiny), steps=3, lr=0.01, ema_decay=0.1)
    trained = checkpoint.load_bundle(tmp_path / "edit")
    ones = [trained.mmdit(torch.cat([latents, x], 1), *rest) for x in (beside, torch.zeros_like(beside))]
    assert (ones[0] - ones[1]).abs().max() > 1e-3 and trained.config["image_cfg"] == 1.5
    picture = torch.rand(1, 3, 32, 32) * 2 - 1
    drawn = [generate(trained, ["make it red"], edit=edit, **scales) for edit, scales in ((picture, {}), (picture, {"image_cfg": 3.0}), (-picture, {}), (None, {}))]
    assert len({x.numpy().tobytes() for x in drawn}) == 4


def test_editing_triples_of_ones_own_and_resuming(run, quick, tiny, tmp_path, monkeypatch):
    rng, folder = np.random.default_rng(0), tmp_path / "triples"
    folder.mkdir()
    for i in range(8):
        for name in ("image", "edited"):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.{name}.png")
        (folder / f"{i}.txt").write_text(f"make it {i}")
    settings = dict(stage="edit", data=f"edits:{folder}", init_from=str(tiny), steps=4)
    run(out=str(tmp_path / "a"), **settings)
    with monkeypatch.context() as patch:
        interrupt(patch, "by_level", 2, signal.SIGINT)
        with pytest.raises(SystemExit, match="stopped at step 2"):
            run(out=str(tmp_path / "b"), **settings)
    run(out=str(tmp_path / "b"), resume=True, **settings)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert Image.open(tmp_path / "a" / "grid-0000004.png").text["prompts"].count("make it") == 8


def test_the_architecture_that_is_gone_on_from(tmp_path):
    """SD3.5-medium's second attention stays; the positions are of the new resolution; an edit's input is twice as wide."""
    checkpoint.write_json(tmp_path / "mmdit.json", {"depth": 2, "dual_attention_blocks": [0]})
    cfg = replace(TINY, init_from=str(tmp_path), depth=2, resolution=128)
    sizes = checkpoint.TextSizes(8, 12, 32, 16, 24)
    plain, fine, edits = (train.architecture(replace(cfg, stage=stage), sizes, 16) for stage in ("pretrain", "finetune", "edit"))
    assert fine == {**plain, "dual_attention_blocks": [0]} and (fine["base_size"], fine["pos_embed_max_size"]) == (8, 32)
    assert edits == {**fine, "in_channels": 32, "out_channels": 16}
    start, model = train.MMDiT(**fine), train.MMDiT(**edits)
    model.load_state_dict(train.grown(start.state_dict(), model))
    checkpoint.write_json(tmp_path / "mmdit.json", {"depth": 2, "base_size": 8, "pos_embed_max_size": 25})
    kept, apart = (train.architecture(replace(cfg, stage="finetune", base_resolution=base), sizes, 16) for base in (128, 64))     # a stored table serves as it is
    assert (kept["base_size"], kept["pos_embed_max_size"], apart["base_size"], apart["pos_embed_max_size"]) == (8, 25, 4, 32)


@pytest.mark.parametrize("arguments, reason", [
    (["--stage", "finetune"], "--stage finetune needs --init-from RUN"),
    (["--stage", "edit", "--init-from", "absent"], "absent is no bundle folder"),
    (["--stage", "edit", "--init-from", "TINY", "--data", "folder:x"], "--data folder:x is not what --stage edit learns from"),
    (["--data", "edits:x"], "--data edits:x is not what --stage pretrain learns from"),
    (["--stage", "finetune", "--init-from", "TINY", "--depth", "2"], "--depth is 2, that of"),
    (["--stage", "finetune", "--init-from", "TINY", "--depth=4"], "--depth is 4, that of"),       # train.py's default, but said
    (["--stage", "finetune", "--init-from", "TINY", "--weights", "weights/mini"], "--weights is weights/mini: --stage finetune takes the frozen parts of --init-from"),
    (["--stage", "finetune", "--init-from", "TINY", "--out", "OTHER"], "vae.pt is there and no run of stage finetune made it"),
    (["--stage", "finetune", "--init-from", "TINY", "--weights", "absent"], "--weights is absent: --stage finetune takes the frozen parts of --init-from"),
    (["--stage", "finetune", "--init-from", "TINY", "--out", "TINY"], "which would be overwritten"),
    (["--stage", "finetune", "--init-from", "TINY", "--no-qk-norm"], "is of another architecture")])
def test_stages_that_go_on_from_a_model_refuse(refused, tiny, tmp_path, monkeypatch, arguments, reason):
    monkeypatch.chdir(tmp_path)
    checkpoint.copy_parts(tiny, tmp_path / "other", ["vae"])
    flags = ["--batch-size", 4, "--steps", 1, "--resolution", 32, "--chunk", 8, "--workers", 0, "--text-width", 32]
    assert reason in refused("train.py", *flags, *({"TINY": tiny, "OTHER": "other"}.get(a, a) for a in arguments))


def test_fig_5_of_runs_with_and_without_qk_norm(tiny, tmp_path, cli):
    flags = {"weights": tiny, "runs": tmp_path / "runs", "out": tmp_path, "steps": 2, "batch-size": 2, "depth": 1, "watch-every": 1}
    status, lines, _ = cli("experiments/qk_norm.py", *(word for name, value in flags.items() for word in (f"--{name}", value)))
    assert status == 0 and [line.split(",")[0] for line in lines] == ["QK-norm: to the end", "without: to the end"]
    curves = checkpoint.read_json(tmp_path / "qk_norm.json")["without"]["curves"]
    assert [steps for steps, _ in curves.values()] == [[1, 2]] * 3 and (tmp_path / "qk_norm.png").exists()


@pytest.mark.slow
def test_the_controls_of_fig_6_differ_in_what_they_say(tiny, tmp_path, cli):
    status, lines, _ = cli("experiments/resolution.py", "--weights", tiny, "--runs", tmp_path / "runs", "--out", tmp_path, "--steps", 1, "--batch-size", 2, "--prompts", 1)
    runs = [line.split()[0] for line in lines]
    assert status == 0 and runs == ["main", "no-shift", "interpolated"]
    config, mmdit = ([checkpoint.read_json(tmp_path / "runs" / name / file) for name in runs] for file in ("config.json", "mmdit.json"))
    assert [c["shift"] for c in config] == [3, 1, 3]
    assert mmdit[0]["base_size"] == mmdit[1]["base_size"] != mmdit[2]["base_size"]
    assert {*checkpoint.read_json(tmp_path / "resolution.json")["no-shift"]} == {"128x128", "192x96", "160x96", "96x160", "64x64"}
    assert Image.open(tmp_path / "resolution-192x96.png").size == (6 * 194 - 2, 3 * 98 - 2)
