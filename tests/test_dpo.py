"""dpo.py and the LoRA files of checkpoint.py."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import checkpoint
import dpo
from checkpoint import DiffusersLayout, apply_lora, load_bundle, read_lora
from mmdit import MMDiT

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
    with torch.no_grad():
        return model(*(torch.randn(shape, generator=g) for shape in ((2, 4, 8, 4), (2,), (2, 5, 32), (2, 20))))


def test_an_adapter_starts_at_zero_and_alone_trains():
    plain = mmdit()
    model = dpo.add_lora(mmdit(), 3)
    assert output(model).equal(output(plain))
    assert {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    linears = sum(type(module) is nn.Linear for module in plain.modules())
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
    model, layout = adapted(), DiffusersLayout("mmdit", 2)
    peer = diffusers.SD3Transformer2DModel(in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=128,
                                           pooled_projection_dim=20, pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,)).eval()
    plain = mmdit().state_dict()
    peer.load_state_dict({name: tensor for key, value in plain.items() for name, tensor in zip(layout.names(key), layout.split(key, value))})
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
                                          ({"metadata": {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 1, "transformer.r": 2})}}, 0.5)])
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
