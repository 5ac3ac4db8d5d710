"""dpo.py and the LoRA files of checkpoint.py."""

import dataclasses
import inspect
import itertools
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch import nn

import checkpoint
import data
import distributed
import dpo
import evaluate
import optim
import pipeline
import runs
import shapes
from checkpoint import apply_lora, load_bundle, read_lora
from config import parse_config
from flow import formulation
from layouts import DiffusersLayout
from mmdit import Linear, MMDiT
from sample import from_uint8

SIZES = dict(depth=2, in_channels=4, context_dim=32, pooled_dim=20, pos_embed_max_size=8, base_size=2, dual_attention_blocks=(0,))


def mmdit():
    """The same random weights at each call."""
    torch.manual_seed(0)
    model = MMDiT(**SIZES)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def adapted(rank=3, alpha=6.0):
    """An MM-DiT whose adapters do something."""
    model = dpo.add_lora(mmdit(), rank, alpha)
    for module in model.modules():
        if isinstance(module, dpo.LoRALinear):
            nn.init.normal_(module.lora_B, std=0.1)
    return model


def output(model):
    g = torch.Generator().manual_seed(1)
    return model(*(torch.randn(shape, generator=g) for shape in ((2, 4, 8, 4), (2,), (2, 5, 32), (2, 20)))).detach()


def test_an_adapter_starts_at_zero_and_alone_trains():
    plain = mmdit()
    model = dpo.add_lora(mmdit(), 3)
    assert output(model).equal(output(plain.requires_grad_(False)))              # torch takes other kernels for weights that want a gradient
    assert {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    linears = sum(type(module) is Linear for module in plain.modules())
    assert sum(isinstance(module, dpo.LoRALinear) for module in model.modules()) == linears      # all linear layers, as the paper has it
    assert {*plain.state_dict()} <= {*model.state_dict()}                         # the released names stay
    model(torch.randn(1, 4, 4, 4), torch.rand(1), torch.randn(1, 3, 32), torch.randn(1, 20)).square().sum().backward()
    assert model.joint_blocks[0]["x_block"].attn.qkv.lora_B.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="the rank is 0"):
        dpo.add_lora(plain, 0)


def test_merging_keeps_the_output_and_the_names():
    model = adapted()
    before = output(model)
    assert not before.allclose(output(mmdit()), atol=1e-3)
    dpo.merge_lora(model)
    assert torch.allclose(output(model), before, atol=1e-5)
    assert {*model.state_dict()} == {*MMDiT(**SIZES).state_dict()} and all(type(m) is not dpo.LoRALinear for m in model.modules())


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_saved_lora_applied_is_the_adapted_model(tmp_path, scale):
    """Through the file, with q, k and v apart and two norms' halves swapped as diffusers has them."""
    pytest.importorskip("safetensors")
    model = adapted()
    dpo.save_lora(tmp_path / "x.safetensors", model)
    for module in model.modules():
        if isinstance(module, dpo.LoRALinear):
            module.scale *= scale
    plain = mmdit()
    apply_lora(plain, "mmdit", read_lora(tmp_path / "x.safetensors"), scale)
    assert torch.allclose(output(plain), output(model), atol=1e-5)


def test_the_file_is_what_diffusers_understands(tmp_path):
    """Every layer is a linear of diffusers' model, and B A added to its weight there gives the adapted model's output."""
    diffusers = pytest.importorskip("diffusers")
    model = adapted()
    peer = diffusers.SD3Transformer2DModel(in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=128,
                                           pooled_projection_dim=20, pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,)).eval()
    plain = mmdit().state_dict()
    peer.load_state_dict(DiffusersLayout("mmdit", 2).laid_out(plain.items()))
    dpo.save_lora(tmp_path / "x.safetensors", model)
    tensors = checkpoint.read_safetensors(tmp_path / "x.safetensors")[0]
    linears = {name: module for name, module in peer.named_modules() if isinstance(module, nn.Linear)}
    assert {name.split(".lora_")[0].removeprefix("transformer.") for name in tensors} == {*linears}
    for name, linear in linears.items():
        linear.weight.data += tensors[f"transformer.{name}.lora_B.weight"] @ tensors[f"transformer.{name}.lora_A.weight"]
    g = torch.Generator().manual_seed(1)
    latents, t, context, pooled = (torch.randn(shape, generator=g) for shape in ((2, 4, 8, 4), (2,), (2, 5, 32), (2, 20)))
    with torch.no_grad():
        assert torch.allclose(peer(latents, context, pooled, 1000 * t).sample, output(model), atol=1e-4)


def lora_file(path, layer="transformer.transformer_blocks.1.attn.to_k", out=128, width=128, rank=2, extra=None, metadata=None):
    torch.manual_seed(3)
    tensors = {f"{layer}.lora_A.weight": torch.randn(rank, width), f"{layer}.lora_B.weight": torch.randn(out, rank)} | (extra or {})
    checkpoint.write_safetensors(path, tensors, metadata)
    return tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"]


@pytest.mark.parametrize("told, factor", [({}, 1.0), ({"extra": {"transformer.transformer_blocks.1.attn.to_k.alpha": torch.tensor(5.0)}}, 2.5),
                                          ({"metadata": {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 1, "transformer.r": 2})}}, 0.5),
                                          ({"metadata": {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 1, "transformer.use_rslora": True})}}, 0.5 ** 0.5)])
def test_rows_and_scale_of_one_layer(tmp_path, told, factor):
    """k is the middle third of our qkv; alpha / rank is in the file, as a tensor or in its header."""
    update = lora_file(tmp_path / "x.safetensors", **told)
    model = MMDiT(**SIZES)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    weight = model.joint_blocks[1]["x_block"].attn.qkv.weight.data
    apply_lora(model, "mmdit", read_lora(tmp_path / "x.safetensors"), 0.8)
    key = "joint_blocks.1.x_block.attn.qkv.weight"
    changed = model.state_dict()[key] - before[key]
    assert torch.allclose(changed[128:256], 0.8 * factor * update, atol=1e-5) and not changed[:128].any() and not changed[256:].any()
    assert all(value.equal(before[k]) for k, value in model.state_dict().items() if k != key)
    assert weight.equal(before[key])                                              # out of place: it may be a view of a file


def test_loras_of_other_models_are_named(tmp_path, tiny):
    path = tmp_path / "x.safetensors"

    def refused(reason, **options):
        lora_file(path, **options)
        with pytest.raises(ValueError, match=reason) as caught:
            apply_lora(MMDiT(**SIZES), "mmdit", read_lora(path), 1.0)
        assert "\n" not in str(caught.value)
    refused("the mmdit has no layer transformer_blocks.7.attn.to_k", layer="transformer.transformer_blocks.7.attn.to_k")
    refused("the LoRA is of another size: transformer_blocks.1.attn.to_k is 64 x 128, the model has 128 x 128", out=64)
    refused("is for unet.x, which is no layer of SD3's", layer="unet.x")
    refused("no LoRA in PEFT's layout: a.lora_down.weight is missing or unknown", extra={"a.lora_down.weight": torch.ones(1)})
    refused("its alpha cannot be used: it differs between the layers", metadata={"lora_adapter_metadata": json.dumps({"transformer.alpha_pattern": {"to_k": 3}})})
    checkpoint.write_safetensors(path, {"a": torch.ones(1)})
    with pytest.raises(ValueError, match="x.safetensors is no LoRA in PEFT's layout"):
        load_bundle(tiny, loras=[(path, 1.0)])


def test_lora_flag(cli, refused, tiny, tmp_path):
    """On the MM-DiT and on CLIP-L, at a scale; twice the half is the whole."""
    lora_file(tmp_path / "a.safetensors", "transformer.transformer_blocks.0.attn.to_k", 64, 64)
    lora_file(tmp_path / "b.safetensors", "text_encoder.text_model.encoder.layers.0.mlp.fc1", 16, 8)
    pictures = {}
    for name, flags in {"none": [], "a": ["a.safetensors"], "halves": ["a.safetensors:0.5", "a.safetensors:0.5"], "b": ["b.safetensors:2"], "zero": ["a.safetensors:0"]}.items():
        flags = [f for file in flags for f in ("--lora", tmp_path / file)]
        assert cli("sample.py", "--prompt", "a red circle", "--weights", tiny, "--out", tmp_path / "out.png", "--zoom", 1, *flags)[0] == 0
        pictures[name] = np.asarray(Image.open(tmp_path / "out.png")).astype(int)
    off = lambda a, b: abs(pictures[a] - pictures[b]).max()
    assert off("none", "zero") == 0 and off("a", "halves") <= 1 and off("none", "a") > 1 and off("none", "b") > 1      # grey levels
    assert "absent.safetensors is not there" in refused("sample.py", "--prompt", "x", "--weights", tiny, "--out", tmp_path / "out.png", "--lora", "absent.safetensors:0.8")


# ---- the loss

FORM = formulation("rf/lognorm(0.00,1.00)")


def pairs_of(n=4, dtype=torch.float32):
    g = torch.Generator().manual_seed(2)
    chosen, rejected, context, pooled, eps = (torch.randn(shape, generator=g, dtype=dtype) for shape in ((n, 4, 8, 4), (n, 4, 8, 4), (n, 5, 32), (n, 20), (n, 4, 8, 4)))
    return (chosen, rejected, context, pooled), dict(t=torch.rand(n, generator=g), eps=eps)


def reference_of(model):
    def reference(*inputs):
        with dpo.without_lora(model):
            return model(*inputs)
    return reference


def test_lora_off_is_the_base_to_the_bit():
    model, plain = adapted(), mmdit().requires_grad_(False)
    with dpo.without_lora(model):
        assert output(model).equal(output(plain))
    assert not output(model).equal(output(plain))


def test_dpo_starts_at_log_2_with_gradients_in_the_lora_alone():
    model = dpo.add_lora(mmdit(), 3)
    columns, drawn = pairs_of()
    loss = dpo.dpo_loss(model, reference_of(model), FORM, *columns, 5000.0, **drawn)
    assert loss.shape == (4,) and loss.equal(torch.full((4,), np.log(2), dtype=torch.float32))
    assert dpo.logged(*dpo.preference(model, reference_of(model), FORM, *columns, 5000.0, **drawn)) == {"accuracy": 0.5, "margin": 0.0, "drift": 0.0}
    loss.mean().backward()
    moved = {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"lora_B"}                                                    # A's gradient is B's transposed times something, and B is zero
    assert all(p.grad is None for name, p in model.named_parameters() if "lora" not in name)


def test_dpo_loss_is_the_formula_of_app_c():
    """By hand, from the velocities of two different models; the same t and eps for both pictures."""
    (chosen, rejected, context, pooled), drawn = pairs_of()
    model, plain, beta = adapted(), mmdit(), 30.0
    t = drawn["t"].view(-1, 1, 1, 1)

    def error(network, x0):
        with torch.no_grad():
            v = network((1 - t) * x0 + t * drawn["eps"], drawn["t"], context, pooled)
        return (v - (drawn["eps"] - x0)).square().mean((1, 2, 3))
    inside = -beta / 2 * (error(model, chosen) - error(plain, chosen) - (error(model, rejected) - error(plain, rejected)))
    found = dpo.dpo_loss(model, plain, FORM, chosen, rejected, context, pooled, beta, **drawn)
    assert torch.allclose(found, -torch.log(torch.sigmoid(inside)), atol=1e-5)
    swapped = dpo.preference(model, plain, FORM, rejected, chosen, context, pooled, beta, **drawn)[0]
    assert torch.allclose(swapped, -inside, atol=1e-4)
    one, two = (dpo.dpo_loss(model, plain, FORM, chosen, rejected, context, pooled, beta, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert one.equal(two) and not one.equal(found)


def test_the_gradient_of_dpo_loss_by_finite_differences():
    model = adapted().double()
    columns, drawn = pairs_of(2, torch.float64)
    weight = model.joint_blocks[1]["x_block"].attn.qkv.lora_A

    def loss():
        return dpo.dpo_loss(model, reference_of(model), FORM, *columns, 30.0, **drawn).mean()
    (gradient,) = torch.autograd.grad(loss(), weight)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = []
    for step in (1e-3, -1e-3):
        with torch.no_grad():
            weight.add_(direction, alpha=step)
            values.append(loss().item())
            weight.add_(direction, alpha=-step)
    assert (values[0] - values[1]) / 2e-3 == pytest.approx((gradient * direction).sum().item(), rel=2e-3)       # outputs are float32


def test_merged_is_unmerged_to_1e_6():
    model = adapted().double()
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in ((2, 4, 8, 4), (2,), (2, 5, 32), (2, 20))]
    with torch.no_grad():
        before = model(*inputs)
        assert (dpo.merge_lora(model)(*inputs) - before).abs().max() < 1e-6


# ---- dpo.py train

@pytest.fixture
def preferences(tmp_path):
    """A folder of 12 preferences: any dark picture over any bright one."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    with open(folder / "metadata.jsonl", "w") as file:
        for i in range(12):
            for name, low in (("good", 0), ("bad", 150)):
                Image.fromarray(rng.integers(low, low + 100, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}-{name}.png")
            file.write(json.dumps({"prompt": f"picture {i}", "chosen": f"{i}-good.png", "rejected": f"{i}-bad.png"}) + "\n")
    return folder


@pytest.fixture
def align(tiny, preferences, tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    monkeypatch.setattr(dpo, "generate", lambda bundle, prompts, **settings: torch.zeros(len(prompts), 16, 16, 3, dtype=torch.uint8))

    def run(name, **settings):
        torch.set_num_threads(1)
        cfg = dpo.DPOConfig(weights=str(tiny), pairs=str(preferences), out=str(tmp_path / name), rank=2, lr=0.02, warmup=1, batch_size=4, chunk=12, workers=0, log_every=1,
                            precision="fp32")
        dpo.train.begin(dataclasses.replace(cfg, **settings), dpo.run_dpo)
        return tmp_path / name, [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    return run


def test_training_starts_at_log_2_and_raises_the_margin(align, tiny):
    out, rows = align("dpo", steps=40, beta=500.0, eval_every=100)
    steps = [row for row in rows if "loss" in row]
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-6) and steps[0]["accuracy"] == 0.5 and steps[0]["drift"] == 0
    last = next(row for row in rows if "val_loss" in row)
    assert last["val_loss"] < 0.6 and last["val_margin"] > 0.1 and last["val_accuracy"] > 0.7 and last["val_drift"] > 0
    base, aligned = load_bundle(tiny), load_bundle(out)
    with_lora = load_bundle(tiny, loras=[(out / "lora.safetensors", 1.0)])
    inputs = [torch.randn(shape) for shape in ((2, 4, 4, 4), (2,), (2, 40, 32), (2, 20))]
    with torch.no_grad():
        outs = [bundle.mmdit(*inputs) for bundle in (base, aligned, with_lora)]
    assert torch.allclose(outs[1], outs[2], atol=2e-2) and (outs[0] - outs[1]).abs().max() > 0.1      # the merged weights are stored in half precision


def test_another_bundle_is_not_overwritten(align, tiny, tmp_path):
    checkpoint.copy_parts(tiny, tmp_path / "mine")
    before = {path: path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file()}
    for resume in (False, True):
        with pytest.raises(ValueError, match="clip_g.pt is there and no run of stage dpo made it"):
            align("mine", steps=1, resume=resume)
    assert before == {path: path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file()}


def test_latents_of_no_pairs_and_models_that_edit_are_refused(align, tiny, tmp_path):
    pipeline.precompute(data.PrecomputeConfig(data="shapes", weights=str(tiny), out=str(tmp_path / "latents"), samples=64, resolution=32, workers=0))
    with pytest.raises(ValueError, match="has 4 channels of latents a pair, not twice 4"):
        align("out", steps=1, pairs=f"latents:{tmp_path}/latents")
    edit = tmp_path / "edit"
    checkpoint.copy_parts(tiny, edit)
    config = checkpoint.read_json(edit / "mmdit.json") | {"in_channels": 8, "out_channels": 4}
    checkpoint.save_part(edit, "mmdit", MMDiT(**config), config)
    with pytest.raises(ValueError, match="edit edits pictures"):
        align("out", steps=1, weights=str(edit))
    assert not (tmp_path / "out").exists()


def test_pairs_of_every_size_are_validated_on(align, preferences):
    for path in sorted(preferences.glob("[0-3]-*.png")):
        Image.open(path).resize((16, 48)).save(path)
    seen = []
    plain = dpo.preference
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpo, "preference", lambda model, reference, form, chosen, *a: seen.append(tuple(chosen.shape)) or plain(model, reference, form, chosen, *a))
        align("dpo", steps=1, eval_every=1, buckets=True)
    assert seen[1:] == [(8, 4, 4, 4), (4, 4, 6, 2)] or seen[1:] == [(4, 4, 6, 2), (8, 4, 4, 4)]


def test_a_resumed_alignment_ends_as_an_undisturbed_one(align, tmp_path, monkeypatch, tiny):
    a, _ = align("a", steps=6)
    calls, real = itertools.count(1), dpo.logged

    def interrupted(*arguments):
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="stopped at step 3"):
        patch.setattr(dpo, "logged", interrupted)
        align("b", steps=6)
    saved = checkpoint.load_checkpoint(tmp_path / "b" / "dpo-0000003.ckpt")
    assert not [name for name in saved["model"] if "lora" not in name and name != "pos_embed"]       # the base is in no checkpoint
    with pytest.raises(ValueError, match="--resume goes on with it"):
        align("b", steps=6)
    with pytest.raises(ValueError, match="was begun with --alpha 0.0, not 3.0"):
        align("b", steps=6, resume=True, alpha=3.0)
    b, _ = align("b", steps=6, resume=True)
    ones, twos = (checkpoint.read_safetensors(folder / "lora.safetensors")[0] for folder in (a, b))
    assert ones.keys() == twos.keys() and all(ones[k].equal(twos[k]) for k in ones)


def test_preferences_as_latents_are_those_of_the_pictures(align, preferences, tiny, tmp_path):
    """Computed ahead by data.py, or as .npy files."""
    _, rows = align("pictures", steps=2)
    pipeline.precompute(data.PrecomputeConfig(data=f"pairs:{preferences}", weights=str(tiny), out=str(tmp_path / "latents"), resolution=32, workers=0))
    bundle, folder = load_bundle(tiny), tmp_path / "npy"
    folder.mkdir()
    for path in preferences.glob("*.png"):
        image = from_uint8(torch.from_numpy(np.array(Image.open(path)))[None])
        number, kind = path.stem.split("-")
        np.save(folder / f"{number}.{'chosen' if kind == 'good' else 'rejected'}.npy", bundle.vae.to_latents(image, sample=False)[0].detach().numpy())
        (folder / f"{number}.txt").write_text(f"picture {number}")
    for name in ("latents", "npy"):
        pairs = data.open_data(f"latents:{tmp_path}/latents" if name == "latents" else f"pairs:{folder}", 32, 32)
        assert len(pairs) == 12 and pairs[0].image.shape == (8, 4, 4)
        first = {pairs.captions(i)[0]: pairs[i].image for i in range(12)}
        pictures = data.open_data(f"pairs:{preferences}", 32, 32)
        for i in range(12):
            image = pipeline.to_tensor([pictures[i]])
            expected = bundle.vae.to_latents(image.unflatten(1, (2, 3))[0], sample=False).flatten(0, 1)
            assert torch.allclose(torch.from_numpy(np.array(first[pictures.captions(i)[0]])), expected, atol=1e-5)


@pytest.mark.parametrize("name", dpo.FLAGS)
def test_every_flag_of_train_is_used(name):
    source = "".join(map(inspect.getsource, (pipeline, optim, distributed, runs, dpo, dpo.train.fit, dpo.train.gradients, dpo.train.begin, dpo.train.carry_out)))
    assert re.search(rf"\bcfg\.{name}\b", source), f"--{name} is accepted and dropped"


# ---- dpo.py make-pairs

def test_a_better_picture_of_shapes_scores_more():
    a, b = shapes.Thing("red", 0.5, 1.5, "circle"), shapes.Thing("blue", 2.5, 1.5, "square")
    task = evaluate.Task("color attribution", "a red circle and a blue square", (a, b))
    right, wrong_color = shapes.Scene("white", (a, b)), shapes.Scene("white", (a, dpo.replace(b, color=a.color)))
    scenes = [right, wrong_color, shapes.Scene("white", (a,)), shapes.Scene("white", ())]
    pictures = [shapes.render(scene) for scene in scenes]
    scores = [dpo.shapes_score(task, picture) for picture in pictures]
    assert scores == sorted(scores, reverse=True) and scores[0] > 1.4 > 0.6 > scores[1] > scores[2] > scores[3]
    blurred = np.asarray(Image.fromarray(pictures[0]).resize((32, 32)).resize((64, 64), Image.Resampling.BILINEAR))
    assert dpo.shapes_score(task, blurred) < scores[0]
    sign = evaluate.Task("typography", "a sign that says cab", (shapes.Thing("", 0, 0, word="cab"),))
    cab, cob, xyz = (dpo.shapes_score(sign, shapes.render(shapes.Scene("white", (shapes.Thing("red", 2, 2.5, word=word),)))) for word in ("cab", "cob", "xyz"))
    assert cab > cob > xyz


def test_ranking():
    assert dpo.ranked([1, 5, 3, 4, 0, 3], 9, 0.5) == [(1, 4), (3, 0)]
    assert dpo.ranked([1, 5, 3, 4, 0, 3], 1, 0.5) == [(1, 4)] and dpo.ranked([1, 1.01], 1, 0.05) == [] and dpo.ranked([], 1, 0.05) == []


def drawing(bundle, prompts, seed=0, **settings):
    """Stands for `generate`: another noise for each seed."""
    shape = len(prompts), settings.get("height") or 32, settings.get("width") or 32, 3
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_make_pairs_by_a_program_goes_on_where_it_stopped(tiny, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(evaluate, "is_shapes", lambda config: True)
    monkeypatch.setattr(dpo, "generate", lambda *a, **k: calls.append(k["seed"]) or drawing(*a, **k))
    scores = iter([[0.1, 0.9, 0.5], [0.5, 0.5, 0.5], [0.9, 0.2, 0.1]])
    monkeypatch.setattr(dpo, "scores_of", lambda *a: next(scores))
    cfg = dpo.PairsConfig(weights=str(tiny), out=str(tmp_path / "pairs"), prompts=3, samples=3)
    dpo.make_pairs(cfg)
    rows = [json.loads(line) for line in (tmp_path / "pairs" / "metadata.jsonl").read_text().splitlines()]
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("00000-1.png", "00000-0.png"), ("00002-0.png", "00002-2.png")]
    assert len({*calls}) == 3 and min(calls) > 1_000_000 and "2 pairs of 3 prompts" in capsys.readouterr().out
    pairs = data.open_data(f"pairs:{tmp_path}/pairs", 32, 32)
    assert len(pairs) == 2 and pairs[0].image.shape == (32, 32, 6)
    chosen = np.asarray(Image.open(tmp_path / "pairs" / "00000-1.png"))
    assert (pairs[0].image[:, :, :3] == chosen).all()
    judged = (tmp_path / "pairs" / "judged.jsonl").read_text().splitlines(True)
    (tmp_path / "pairs" / "judged.jsonl").write_text("".join(judged[:2]))
    scores = iter([[0.9, 0.2, 0.1]])
    dpo.make_pairs(cfg)
    assert len(calls) == 4 and calls[3] == calls[2] and (tmp_path / "pairs" / "judged.jsonl").read_text().splitlines(True) == judged
    with pytest.raises(ValueError, match="was begun with other settings"):
        dpo.make_pairs(dpo.replace(cfg, samples=4))


@pytest.mark.parametrize("batch_size, calls", [(0, 3), (7, 2), (64, 1)])
def test_pictures_of_several_prompts_are_drawn_at_once(tiny, tmp_path, monkeypatch, batch_size, calls):
    drawn = []
    monkeypatch.setattr(evaluate, "is_shapes", lambda config: True)
    monkeypatch.setattr(dpo, "generate", lambda *a, **k: drawn.append((a[1], k["seed"])) or drawing(*a, **k))
    monkeypatch.setattr(dpo, "scores_of", lambda *a: [0.1, 0.9, 0.5])
    cfg = dpo.PairsConfig(weights=str(tiny), out=str(tmp_path), prompts=3, samples=3, batch_size=batch_size, categories="counting,position")
    with pytest.raises(ValueError, match="unknown category 'size'; known: single object, two objects, counting"):
        dpo.make_pairs(dpo.replace(cfg, categories="counting,size"))
    dpo.make_pairs(cfg)
    assert len(drawn) == calls and sum(len(prompts) for prompts, _ in drawn) == 9
    pairs = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [pair["chosen"] for pair in pairs] == [f"0000{n}-1.png" for n in range(3)]
    assert [any(word in pair["prompt"] for word in ("left of", "right of", "above", "below")) for pair in pairs] == [False, True, False]
    pictures = torch.cat([drawing(None, prompts, seed) for prompts, seed in drawn])       # the noise of `drawing` is of the call, that of `generate` of the picture
    assert (np.asarray(Image.open(tmp_path / "00001-1.png")) == pictures[4].numpy()).all()


def test_pairs_of_several_sizes_by_the_sampler_that_is_asked_for(tiny, tmp_path, monkeypatch):
    """Whatever the batch, an equal share of the prompts has each size."""
    samplers = []
    monkeypatch.setattr(evaluate, "is_shapes", lambda config: True)
    monkeypatch.setattr(dpo, "generate", lambda *a, **k: samplers.append(k["sampler"]) or drawing(*a, **k))
    monkeypatch.setattr(dpo, "scores_of", lambda *a: [0.1, 0.9])
    cfg = dpo.PairsConfig(weights=str(tiny), out=str(tmp_path), prompts=5, samples=2, batch_size=4, sizes="32x32, 48x16", sampler="heun")
    dpo.make_pairs(cfg)
    drawn = [Image.open(tmp_path / f"{n:05}-1.png").size for n in range(5)]
    assert drawn == [(32, 32)] * 3 + [(48, 16)] * 2 and {*samplers} == {"heun"}
    for size, reason in (("32", "--sizes is '32', not like"), ("32x32,", "not like"), ("40x32", "multiple of 16")):
        with pytest.raises(ValueError, match=reason):
            dpo.make_pairs(dpo.replace(cfg, out="absent", sizes=size))
    assert dpo.batches([*"abcde"], [1, 2], 1, 2) == [(1, ["b", "c"]), (2, ["d", "e"])]


def test_make_pairs_by_a_person(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dpo, "generate", drawing)
    (tmp_path / "prompts.txt").write_text("a fox\n\na hen\na cow\n")
    out = tmp_path / "pairs"
    cfg = dpo.PairsConfig(weights=str(tiny), out=str(out), prompts_file=str(tmp_path / "prompts.txt"), judge="person", samples=4)
    dpo.make_pairs(cfg)
    assert "fill in choices.txt" in capsys.readouterr().out and Image.open(out / "sheet-00000.png").size == (4 * 36, 3 * 64)
    text = (out / "choices.txt").read_text()
    assert "00001 - - a hen" in text
    with pytest.raises(ValueError, match="no line is filled in yet"):
        dpo.make_pairs(cfg)
    for wrong in ("00001 4 0 a hen", "00001 2 2 a hen", "00009 1 2", "00001 two 1"):
        (out / "choices.txt").write_text(wrong)
        with pytest.raises(ValueError, match="choices.txt line 1 is not"):
            dpo.make_pairs(cfg)
    (out / "choices.txt").write_text(text.replace("00001 - -", "00001 3 0"))
    dpo.make_pairs(cfg)
    assert json.loads((out / "metadata.jsonl").read_text()) == {"prompt": "a hen", "chosen": "00001-3.png", "rejected": "00001-0.png"}


def test_without_a_command_a_round_of_the_miniature(monkeypatch):
    begun = []
    monkeypatch.setattr(sys, "argv", ["dpo.py"])
    monkeypatch.setattr(dpo, "make_pairs", begun.append)
    monkeypatch.setattr(dpo.train, "begin", lambda cfg, run: begun.append((cfg, run)))
    dpo.main()
    pairs, (aligned, run) = begun
    assert aligned.pairs == pairs.out and aligned.weights == pairs.weights == "weights/mini" and run is dpo.run_dpo and aligned.resume


@pytest.mark.parametrize("arguments, reason", [
    (["trian"], "unknown command 'trian'; known: make-pairs, train, compare; did you mean train?"),
    (["train"], "--pairs is missing"),
    (["train", "--pairs", "absent"], "absent holds no prompt with two pictures"),
    (["train", "--pairs", "p.jsonl"], "p.jsonl line 1 is no JSON object with prompt, chosen, rejected"),
    (["train", "--pairs", "p.jsonl", "--rank", "0"], "--rank is 0; the least is 1"),
    (["train", "--pairs", "latents:absent", "--buckets"], "--buckets is for"),
    (["train", "--pairs", "p.jsonl", "--depth", "4"], "unknown flag --depth"),
    (["make-pairs", "--samples", "1"], "--samples is 1; the least is 2"),
    (["make-pairs"], "is of no `shapes`"), (["compare", "--base", "absent"], "absent is no bundle folder"), (["compare", "--judge", "person"], "unknown value 'person'"),
    (["make-pairs", "--judge", "clip", "--prompts-file", "p.jsonl"], "holds no clip_image"), (["make-pairs", "--judge", "person", "--prompts-file", "p.jsonl", "--steps", "2000"], "steps is 2000"),
    (["make-pairs", "--judge", "person", "--prompts-file", "p.jsonl", "--sampler", "eular"], "unknown sampler 'eular'"),
    (["make-pairs", "--judge", "detector", "--prompts-file", "p.jsonl"], "--judge detector knows what prompts of `shapes` want")])
def test_bad_input_is_one_line_and_nothing_is_written(refused, tiny, tmp_path, monkeypatch, arguments, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n')
    assert reason in refused("dpo.py", *arguments, *["--weights", tiny] * (arguments != ["trian"]))
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


# ---- dpo.py compare

def test_compare_counts_wins_and_diversity(tiny, tmp_path, monkeypatch, capsys):
    """A model whose pictures of one prompt are half as far apart, and always better than the base's."""
    def drawn(bundle, prompts, seed, **settings):
        noise = torch.randint(0, 100, (len(prompts), 16, 16, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        return noise // 2 + 100 if bundle.folder == tmp_path else noise
    monkeypatch.setattr(dpo, "generate", drawn)
    monkeypatch.setattr(evaluate, "is_shapes", lambda config: True)
    monkeypatch.setattr(dpo, "scores_of", lambda bundle, judge, task, images: images.float().mean((1, 2, 3)).div(100).tolist())
    checkpoint.copy_parts(tiny, tmp_path)
    dpo.compare(dpo.CompareConfig(weights=str(tmp_path), base=str(tiny), prompts=3, out=str(tmp_path / "numbers.json")))
    numbers = json.loads(capsys.readouterr().out)
    assert numbers == checkpoint.read_json(tmp_path / "numbers.json") and numbers["wins"] == numbers["decided"] == 1 and numbers["diversity"] == pytest.approx(0.5, abs=0.02)
    assert numbers["right"] == {str(tmp_path): 1.0, str(tiny): 0.0} and numbers["prompts"] == 3
    assert dpo.win_rate([1, 2, 3], [1.01, 1, 4], 0.05) == pytest.approx((0.5, 2 / 3))


@pytest.mark.parametrize("command", re.findall(r"python dpo\.py (\w[^\n#`]*)|dpo\.py (train --[^\n#`]*)", (ROOT / "README.md").read_text() + dpo.__doc__), ids=str)
def test_commands_that_are_shown_parse(command):
    name, *flags = (command[0] or command[1]).split()
    config = parse_config(*{"train": (dpo.DPOConfig, flags, "", dpo.FLAGS), "make-pairs": (dpo.PairsConfig, flags), "compare": (dpo.CompareConfig, flags)}[name])
    given = {word[2:].replace("-", "_"): value for word, value in zip(flags, flags[1:]) if word.startswith("--") and not value.startswith("--")}
    assert {key: type(getattr(config, key))(value) for key, value in given.items()} == {key: getattr(config, key) for key in given}


# ---- several processes

def in_processes(processes, settings):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else [sys.executable]
    done = subprocess.run([*start, str(ROOT / "tests" / "tiny_dpo.py"), json.dumps(settings)], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in open(f"{settings['out']}/metrics.jsonl")]
    return torch.tensor([[row["loss"], row["accuracy"]] for row in rows if "loss" in row]), checkpoint.read_safetensors(f"{settings['out']}/lora.safetensors")[0]


@pytest.mark.slow
def test_any_split_of_the_pairs_gives_the_same_alignment(tiny, preferences, tmp_path):
    pytest.importorskip("safetensors")
    settings = {"weights": str(tiny), "pairs": str(preferences)}
    alone, lora = in_processes(1, {**settings, "out": str(tmp_path / "alone")})
    assert alone[0, 0] == pytest.approx(np.log(2), abs=1e-6) and alone[-1, 0] < 0.6
    for processes, more in ((2, {"grad_accum": 2}), (2, {"sharding": "fsdp", "checkpointing": True})):
        found, other = in_processes(processes, {**settings, **more, "out": str(tmp_path / more.get("sharding", "ddp"))})
        assert (found - alone).abs().max() < 1e-4 and all(torch.allclose(other[name], lora[name], atol=1e-4) for name in lora)
