"""checkpoint.py: atomic writing, safe reading, bundles."""

import json
import pickle
import random
import stat
from pathlib import Path

import pytest
import torch
from torch import nn

import checkpoint
from checkpoint import load_bundle, load_checkpoint, load_part, load_strictly, save_bundle, save_checkpoint, save_part, write, write_folder
from mmdit import MMDiT

STATE = {"step": 3, "model": {"w": torch.arange(6.0).view(2, 3)}, "names": ["a", "b"], "rate": 0.5}


class Interrupted(Exception):
    pass


def interrupted(temporary):
    Path(temporary, "half").write_text("half") if Path(temporary).is_dir() else Path(temporary).write_text("half")
    raise Interrupted


# ---- writing

def test_write_replaces_all_or_nothing(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with pytest.raises(Interrupted):
        write(path, interrupted)
    assert list(path.parent.iterdir()) == []
    write(path, lambda temporary: Path(temporary).write_text("old"))
    with pytest.raises(Interrupted):
        write(path, interrupted)
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]
    write(path, lambda temporary: Path(temporary).write_text("new"))
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)        # readable for whom any new file is


def test_write_folder_replaces_all_or_nothing(tmp_path):
    path = tmp_path / "folder"
    write_folder(path, lambda new: (new / "a").write_text("old"))
    with pytest.raises(Interrupted):
        write_folder(path, interrupted)
    assert [p.name for p in path.iterdir()] == ["a"] and [p.name for p in tmp_path.iterdir()] == ["folder"]
    write_folder(path, lambda new: (new / "b").write_text("new"))
    assert [p.name for p in path.iterdir()] == ["b"] and [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_checkpoint_that_cannot_be_saved_leaves_the_old_one(tmp_path):
    path = tmp_path / "x.ckpt"
    save_checkpoint(path, STATE)
    before = path.read_bytes()
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        save_checkpoint(path, {**STATE, "cannot": lambda: None})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# ---- reading

def test_checkpoint_round_trip(tmp_path):
    save_checkpoint(tmp_path / "x.ckpt", STATE)
    loaded = load_checkpoint(tmp_path / "x.ckpt")
    assert loaded["model"]["w"].equal(STATE["model"]["w"]) and {k: v for k, v in loaded.items() if k != "model"} == {k: v for k, v in STATE.items() if k != "model"}


class Trap:
    """Unpickling this writes a file."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "code was executed")


@pytest.mark.parametrize("save", [pickle.dumps, None], ids=["pickle", "torch.save"])
def test_code_in_a_file_is_not_executed(tmp_path, save):
    path, trap = tmp_path / "x.ckpt", Trap(tmp_path / "executed")
    path.write_bytes(pickle.dumps(trap)) if save else torch.save({"w": trap}, path)
    with pytest.raises(ValueError, match="x.ckpt is no checkpoint of ours, or damaged"):
        load_checkpoint(path)
    assert not trap.path.exists()
    pickle.loads(pickle.dumps(trap))
    assert trap.path.exists()                                                     # the trap does work


def test_files_that_are_no_checkpoints(tmp_path):
    path = tmp_path / "x.ckpt"
    with pytest.raises(ValueError, match="x.ckpt is not there"):
        load_checkpoint(path)
    with pytest.raises(ValueError, match="is no file"):
        load_checkpoint(tmp_path)
    save_checkpoint(path, STATE)
    whole, rng = path.read_bytes(), random.Random(0)
    foreign = [b"", b"\n", b"a text file\n", b'{"json": 1}', b"\x89PNG\r\n\x1a\n" + bytes(100), pickle.dumps(object())[:-1], whole[:-1], whole[: len(whole) // 2], whole[:4]]
    for raw in foreign + [rng.randbytes(rng.randrange(1, 400)) for _ in range(100)] + [whole[:n] for n in range(5, len(whole), 97)]:
        path.write_bytes(raw)
        with pytest.raises(ValueError, match="x.ckpt is no checkpoint of ours, or damaged") as caught:
            load_checkpoint(path)
        assert len(str(caught.value).splitlines()) == 1


# ---- parts

SIZES = dict(depth=1, in_channels=4, context_dim=8, pooled_dim=4, pos_embed_max_size=4, base_size=2)


def test_part_round_trip(tmp_path):
    torch.manual_seed(0)
    model = MMDiT(**SIZES)
    nn.init.normal_(model.final_layer.linear.weight)
    save_part(tmp_path, "mmdit", model, SIZES, torch.float32)
    loaded = load_part(tmp_path, "mmdit")
    assert all(loaded.state_dict()[k].equal(v) for k, v in model.state_dict().items())
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    save_part(tmp_path, "mmdit", model, SIZES)                                    # half precision: half the file, float32 when loaded
    assert all(p.dtype == torch.float32 for p in load_part(tmp_path, "mmdit").parameters())
    torch.testing.assert_close(load_part(tmp_path, "mmdit").state_dict(), model.state_dict(), atol=1e-3, rtol=1e-3)


def test_part_loaded_while_sampling_can_be_trained(tmp_path):
    save_part(tmp_path, "mmdit", MMDiT(**SIZES), SIZES)
    with torch.inference_mode():
        model = load_part(tmp_path, "mmdit")
    model.requires_grad_(True).train()
    model(torch.ones(1, 4, 4, 4), torch.ones(1), torch.ones(1, 3, 8), torch.ones(1, 4)).sum().backward()
    assert model.final_layer.linear.weight.grad.abs().sum() >= 0 and model.final_layer.linear.bias.grad.abs().sum() > 0


def test_parts_of_other_models_are_named(tmp_path):
    save_part(tmp_path, "mmdit", MMDiT(**SIZES), SIZES)

    def refused(reason, **config):
        (tmp_path / "mmdit.json").write_text(json.dumps({**SIZES, **config}))
        with pytest.raises(ValueError, match=reason):
            load_part(tmp_path, "mmdit")

    refused("mmdit.pt is of another architecture: .* missing .*joint_blocks.0.context_block", depth=2)
    refused("mmdit.pt is of another size: context_embedder.weight is .64, 8., the model has .64, 16.", context_dim=16)
    refused("mmdit.pt: its config does not describe a MMDiT: .*colour", colour="red")
    (tmp_path / "mmdit.json").write_text("{")
    with pytest.raises(ValueError, match="mmdit.json is no JSON file"):
        load_part(tmp_path, "mmdit")
    (tmp_path / "mmdit.json").unlink()
    with pytest.raises(ValueError, match="mmdit.json is not there"):
        load_part(tmp_path, "mmdit")
    for state in ([1, 2], {"step": 1}, 5):
        with pytest.raises(ValueError, match="source holds no weights"):
            load_strictly(nn.Linear(2, 2), state, "source")


# ---- bundles

def test_bundle_loads_parts_when_used_and_copies_with_replacements(tiny, tmp_path):
    bundle = load_bundle(tiny)
    assert not {"mmdit", "vae", "text"} & {*vars(bundle)}
    bundle.config["steps"] = 7
    with torch.no_grad():
        bundle.mmdit.final_layer.linear.bias.fill_(0.25)
    save_bundle(bundle, tmp_path / "copy")
    copy = load_bundle(tmp_path / "copy")
    assert {p.name for p in copy.folder.iterdir()} == {p.name for p in tiny.iterdir()} and copy.config == bundle.config
    assert (copy.mmdit.final_layer.linear.bias == 0.25).all() and not (load_bundle(tiny).mmdit.final_layer.linear.bias == 0.25).any()
    assert copy.text.encode(["a red circle"])[0].equal(bundle.text.encode(["a red circle"])[0])
    assert copy.vae.decode(torch.ones(1, 4, 4, 4)).equal(bundle.vae.decode(torch.ones(1, 4, 4, 4)))
    assert bundle.vae.decoder.conv_out.weight.is_contiguous(memory_format=torch.channels_last)     # in memory, where it is faster on CPUs; in files as ever
    save_bundle(copy, tmp_path / "copy")                                          # onto itself
    assert all(tensor.is_contiguous() for tensor in torch.load(tmp_path / "copy" / "vae.pt", weights_only=True).values())
    assert (load_bundle(tmp_path / "copy").mmdit.final_layer.linear.bias == 0.25).all()


def test_a_bundle_without_an_mmdit_yet(refused, tiny, tmp_path):
    checkpoint.copy_parts(tiny, tmp_path, ("vae", "clip_l", "clip_g", "t5", "clip_tokenizer", "t5_tokenizer", "config"))
    assert "holds no mmdit: give it by --mmdit FILE" in refused("sample.py", "--prompt", "x", "--weights", tmp_path, "--out", tmp_path / "x.png")


def test_a_part_of_a_bundle_from_a_file(tiny, tmp_path):
    """The bundle's JSON says what differs from the defaults: the MM-DiT's out_channels are not there."""
    pytest.importorskip("safetensors")
    bundle = load_bundle(tiny)
    checkpoint.write_safetensors(tmp_path / "t5.safetensors", bundle.part("t5").tensors)
    again = load_bundle(tiny, files={"t5": tmp_path / "t5.safetensors"})
    assert "out_channels" not in again.part("mmdit").config
    assert all(a.equal(b) for a, b in zip(bundle.text.encode(["a star"]), again.text.encode(["a star"])))
    with torch.no_grad():
        again.mmdit.final_layer.linear.bias.fill_(0.25)
    save_bundle(again, tmp_path / "whole")
    whole = load_bundle(tmp_path / "whole")
    assert (whole.mmdit.final_layer.linear.bias == 0.25).all() and whole.text.encode(["a star"])[0].equal(bundle.text.encode(["a star"])[0])


def test_copy_parts_takes_what_it_is_asked_for(tiny, tmp_path):
    source = tmp_path / "source"
    save_bundle(load_bundle(tiny), source)
    for other in ("vae.ckpt", "vae.png", "vae-config.json", "metrics.jsonl"):
        (source / other).write_text("of the run, not of the part")
    checkpoint.copy_parts(source, tmp_path / "target", ["vae", "clip_tokenizer"])
    assert {p.name for p in (tmp_path / "target").iterdir()} == {"vae.pt", "vae.json", "clip_tokenizer"}
    with pytest.raises(ValueError, match="is no bundle folder"):
        checkpoint.copy_parts(tmp_path / "absent", tmp_path / "target")


@pytest.mark.parametrize("content, reason", [
    (None, "config.json is not there"), ("{", "config.json is no JSON file"), ("[1]", "is no bundle's: it lacks clip_length"), ('{"_class_name": "CLIP"}', "it lacks clip_length"),
    ('{"clip_length": 16, "t5_length": 24, "resolution": 32, "formulation": "rf", "shift": 1, "cfg": 2, "sampler": "euler"}', "it lacks steps$"),
    ('{"clip_length": 16, "t5_length": 24, "resolution": 32, "formulation": "rf", "shift": 1, "cfg": 2, "steps": 3, "sampler": "euler", "t_last": "low"}', "t_last is 'low', no number")])
def test_folders_that_are_no_bundles(tmp_path, content, reason):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=reason):
        load_bundle(tmp_path)
    with pytest.raises(ValueError, match="is no bundle folder"):
        load_bundle(tmp_path / "absent")


def test_a_part_whose_config_is_of_another_type(tiny, tmp_path):
    checkpoint.copy_parts(tiny, tmp_path / "b")
    checkpoint.write_json(tmp_path / "b" / "clip_l.json", checkpoint.read_json(tiny / "clip_l.json") | {"width": "8"})
    with pytest.raises(ValueError, match="width is '8', not of type int"):
        load_bundle(tmp_path / "b").text.encode(["a"])


def test_average_lies_between_two_at_the_positions_of_the_first(tiny, tmp_path, cli):
    other = tmp_path / "other"
    checkpoint.copy_parts(tiny, other)
    config = {**checkpoint.read_json(tiny / "mmdit.json"), "pos_embed_max_size": 12}
    model, before = MMDiT(**config), load_bundle(tiny).mmdit
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(dict(before.named_parameters())[name] + 1)
    save_part(other, "mmdit", model, config)
    command = "experiments/average.py", "--weights", tiny, "--other", other, "--out", tmp_path / "out"
    assert cli(*command, "--share", 0.25)[0] == 0
    after = load_bundle(tmp_path / "out").mmdit
    assert all(torch.allclose(p, q + 0.25, atol=2e-3) for p, q in zip(after.parameters(), before.parameters(), strict=True)) and after.pos_embed.equal(before.pos_embed)
    assert cli(*command, "--share", 2)[::2] == (2, ["average.py: --share is 2.0, not between -1 and 1"])
    config["qk_norm"] = not config.get("qk_norm")
    save_part(other, "mmdit", MMDiT(**config), config)
    assert "differ in architecture" in cli(*command)[2][-1]


def test_mmdit_in_float8_for_a_bundle_with_fewer_positions(cli, tiny, tmp_path):
    large, small = tmp_path / "large", tmp_path / "small.pt"
    checkpoint.copy_parts(tiny, large)
    config = {**checkpoint.read_json(tiny / "mmdit.json"), "pos_embed_max_size": 12}
    model = MMDiT(**config)
    save_part(large, "mmdit", model, config)
    assert cli("experiments/float8.py", "--weights", large, "--like", tiny, "--out", small)[0] == 0
    state, smaller = model.half().state_dict(), load_checkpoint(small)
    error = [(smaller[name].float() - state[name].float()).norm() / state[name].float().norm() for name in state if state[name].ndim == 2 and state[name].any()]
    assert 0 < max(error) < 0.05
    assert {name for name, tensor in smaller.items() if tensor.element_size() == 1} == {name for name in state if name.startswith("joint_blocks.") and state[name].ndim == 2}
    assert torch.equal(smaller["pos_embed"], state["pos_embed"].unflatten(1, (12, 12))[:, 2:10, 2:10].flatten(1, 2))
    assert cli("sample.py", "--prompt", "a red circle", "--weights", tiny, "--mmdit", small, "--out", tmp_path / "out.png")[0] == 0
    checkpoint.copy_parts(tiny, tmp_path / "world")
    checkpoint.write_json(tmp_path / "world" / "config.json", {**checkpoint.read_json(tiny / "config.json"), "data": "shapes"})
    assert cli("evaluate.py", "--weights", tmp_path / "world", "--mmdit", small, "--quick", "--prompts", 1, "--steps", 1)[0] == 0
    assert "absent.pt is not there" in cli("evaluate.py", "--weights", tmp_path / "world", "--mmdit", "absent.pt", "--quick")[2][-1]
    assert "another architecture" in cli("experiments/float8.py", "--weights", tiny, "--like", large, "--out", tmp_path / "none.pt")[2][-1]
