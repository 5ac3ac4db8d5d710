"""sample.py: generate(), the command line, and what it answers to bad input."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import checkpoint
import evaluate
import sample
import shapes
from checkpoint import load_bundle
from config import one_line_errors
from sample import SampleConfig, check_prompts, generate, grid, guided_velocity, to_uint8
from samplers import SAMPLERS, randn, timesteps

A, B = "a red circle above a blue square", "three green stars"


@pytest.fixture(scope="module")
def bundle(tiny):
    return load_bundle(tiny)


def differ(a, b):
    return (a.int() - b.int()).abs().max().item()


# ---- generate()

def test_pictures_depend_on_prompt_and_seed_alone(bundle):
    both = generate(bundle, [A, B], seed=5)
    assert both.shape == (2, 32, 32, 3) and both.dtype == torch.uint8
    assert both.equal(generate(bundle, [A, B], seed=5))
    assert differ(both[1:], generate(bundle, [B], seed=6)) <= 1                   # picture i starts from seed + i, whatever is beside it
    assert differ(both[:1], generate(bundle, [B], seed=5)) > 1 and differ(both[:1], generate(bundle, [A], seed=6)) > 1
    other = load_bundle(bundle.folder)                                            # and not on what was drawn before
    torch.randn(3)
    assert both.equal(generate(other, [A, B], seed=5))


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_what_is_done_ahead_changes_nothing(bundle, cfg, monkeypatch):
    """Modulations of all times in one product, of none, or of too many to keep: the same velocity, that of the whole network under guidance."""
    z, ts = torch.randn(2, 4, 4, 4), timesteps(5)
    fields = [guided_velocity(bundle, [A, B], cfg), guided_velocity(bundle, [A, B], cfg, ts=ts)]
    monkeypatch.setattr(sample, "MAX_AHEAD", 1)
    fields.append(guided_velocity(bundle, [A, B], cfg, ts=ts))
    context, pooled = bundle.text.encode([A, B])
    for t in (ts[2].expand(2), torch.full((2,), 0.123)):
        v, v_0 = (bundle.mmdit(z, t, x * context, x * pooled) for x in (1, 0))
        for field in fields:
            torch.testing.assert_close(field(z, t), v_0 + cfg * (v - v_0), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("width, height", [(32, 32), (64, 32), (16, 48)])
def test_sizes(bundle, width, height):
    assert generate(bundle, [A], width=width, height=height).shape == (1, height, width, 3)


@pytest.mark.parametrize("side", [0, -16, 8, 17, 100_000])
def test_sizes_that_cannot_be_drawn(bundle, side):
    for sides in ({"width": side}, {"height": side}):
        with pytest.raises(ValueError, match=f"{list(sides)[0]} is {side} pixels; it must be a multiple of 16"):
            generate(bundle, [A], **sides)


def test_larger_than_the_positions(bundle):
    with pytest.raises(ValueError, match="positions exist for 8 x 8"):
        generate(bundle, [A], width=256)


@pytest.mark.parametrize("change", [dict(steps=4), dict(cfg=4.0), dict(shift=3.0), dict(sampler="heun"), dict(t_last=0.5), dict(negative_prompt=B), dict(encoders=("clip_l", "clip_g")),
                                    dict(encoders=("t5",)), dict(encoders=())])
def test_every_setting_changes_the_picture(bundle, change):
    assert differ(generate(bundle, [A]), generate(bundle, [A], **change)) > 1


def test_settings_default_to_the_bundles(bundle, monkeypatch):
    explicit = generate(bundle, [A], steps=3, cfg=2.0, shift=1.0, sampler="euler", width=32, height=32)
    assert generate(bundle, [A]).equal(explicit)
    assert generate(bundle, [A], sampler="ancestral").equal(generate(bundle, [A], sampler="ancestral", noise=1.0))
    for name, value in {"noise": 0.0, "sampler": "ancestral"}.items():
        monkeypatch.setitem(bundle.config, name, value)
    assert generate(bundle, [A]).equal(generate(bundle, [A], sampler="ddim")) and generate(bundle, [A], sampler="euler").equal(explicit)
    assert generate(bundle, [A], sampler="sde").equal(generate(bundle, [A], sampler="sde", noise=1.0))       # to which noise is another thing
    monkeypatch.setitem(bundle.config, "t_last", 0.5)
    assert generate(bundle, [A], sampler="bs23").equal(generate(bundle, [A], sampler="bs23", t_last=0.0))


def test_guidance(bundle):
    plain = generate(bundle, [A], cfg=1.0)
    assert plain.equal(generate(bundle, [A], cfg=1.0, negative_prompt=B))         # scale 1 looks at the prompt alone
    assert differ(plain, generate(bundle, [A], cfg=3.0, negative_prompt=A)) <= 1  # away from itself is nowhere
    assert differ(generate(bundle, [A, B], cfg=0.0)[:1], generate(bundle, [B, A], cfg=0.0)[:1]) <= 1      # scale 0 looks at no prompt


def test_missing_encoders_are_zeros(bundle, monkeypatch):
    context, pooled = bundle.text.encode([A], ("t5",))
    assert context.any() and not pooled.any()
    used = generate(bundle, [A], encoders=("t5",))
    monkeypatch.setattr(bundle.text, "encode", lambda prompts, use: (context, pooled))
    assert used.equal(generate(bundle, [A]))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_is_deterministic_and_knows_its_path(bundle, sampler, monkeypatch):
    monkeypatch.setitem(bundle.config, "formulation", "v/cos")
    one = generate(bundle, [A], steps=60, sampler=sampler)
    torch.manual_seed(1)
    assert one.equal(generate(bundle, [A], steps=60, sampler=sampler))
    if sampler not in ("sde", "ancestral", "euler"):                              # all others come to what the finest Euler does
        fine = generate(bundle, [A], steps=1000)
        assert (generate(bundle, [A], steps=400, sampler=sampler).float() - fine.float()).abs().mean() < 2


@pytest.mark.parametrize("name", ["sde", "ancestral"])
def test_noise_on_the_way_is_new_and_each_pictures_own(bundle, monkeypatch, name):
    both = generate(bundle, [A, B], seed=5, steps=4, sampler=name)
    assert differ(both[1:], generate(bundle, [B], seed=6, steps=4, sampler=name)) <= 1
    seen = []

    def sampler(velocity, z, ts, callback=None, generator=None):
        seen.extend([z, randn(z.shape, generator)])
        return z
    monkeypatch.setitem(SAMPLERS, name, sampler)
    generate(bundle, [A], sampler=name)
    assert (seen[0] - seen[1]).abs().max() > 0.1


def test_tiled_is_the_same_picture(bundle, monkeypatch):
    init = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for given in ({}, {"init": init}):
        whole = generate(bundle, [A], **given)
        with monkeypatch.context() as patch:
            for name in ("decode", "to_latents"):
                patch.setattr(bundle.vae, name, None)
            assert differ(generate(bundle, [A], tiled=True, **given), whole) <= 1


def test_callback_sees_the_data_estimate_at_every_step(bundle):
    seen = []
    image = generate(bundle, [A, B], steps=4, callback=lambda i, t, images: seen.append((i, t, images)))
    assert [i for i, *_ in seen] == [0, 1, 2, 3] and [t for _, t, _ in seen] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert all(images.shape == image.shape and images.dtype == torch.uint8 for *_, images in seen)
    assert differ(seen[-1][2], image) <= 1                                        # Euler's last step lands on its estimate
    assert generate(bundle, [A, B], steps=4).equal(image)


@pytest.mark.parametrize("bad, reason", [(dict(sampler="eulr"), "unknown sampler 'eulr'; known: euler, "), (dict(steps=1001), "steps is 1001"), (dict(shift=-1.0), "shift -1.0"),
                                         (dict(seed=2 ** 70), "at most 2"), (dict(encoders=("clip",)), "'clip' is no text encoder, known are clip_l"),
                                         (dict(cfg=1e38), "left finite numbers"), (dict(noise=1.0), "euler draws no noise on the way: noise is for sde, ancestral"),
                                         (dict(sampler="bs23", t_last=0.3), "bs23 finds its own steps")])
def test_settings_that_cannot_be_used(bundle, bad, reason):
    with pytest.raises(ValueError, match=reason):
        generate(bundle, [A], **bad)


# ---- from a picture

def picture(width=32, height=32):
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return torch.stack([rows, columns, -rows])


def test_strength_says_how_much_is_drawn_anew(bundle):
    init = picture()
    kept = to_uint8(bundle.vae.decode(bundle.vae.to_latents(init[None], sample=False)))
    def distance(**settings):
        return (generate(bundle, [A], steps=20, init=init, **settings).float() - kept.float()).abs().mean().item()
    near, middle, far = (distance(strength=s) for s in (0.05, 0.5, 1.0))
    assert near < middle < far
    assert generate(bundle, [A], steps=20, init=init, strength=1.0).equal(generate(bundle, [A], steps=20))      # all anew: the picture is not looked at
    assert not generate(bundle, [A], init=init, strength=0.7).equal(generate(bundle, [A], init=-init, strength=0.7))
    below, small = (generate(bundle, [A], steps=20, init=init, strength=0.3, t_last=t) for t in (0.5, 0.0))        # begun below t_last, its steps are small
    assert below.equal(small)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_inpainting_leaves_every_other_pixel(bundle, sampler, monkeypatch):
    """And the latents there arrive at the picture's by the solver itself, whichever it is: what is pasted fits what is drawn."""
    init, mask = picture(), torch.zeros(32, 32)
    mask[8:24, 16:] = 1
    seen = []
    decode = bundle.vae.decode
    monkeypatch.setattr(bundle.vae, "decode", lambda z: (seen.append(z), decode(z))[1])
    image = generate(bundle, [A, B], steps=4, sampler=sampler, init=init, mask=mask, strength=1.0)
    outside, inside = mask == 0, mask == 1
    assert image[:, outside].equal(to_uint8(init[None])[:, outside].expand(2, -1, -1)) and differ(image[:, inside], to_uint8(init[None])[:, inside]) > 10
    x0 = bundle.vae.to_latents(init[None], sample=False)
    assert torch.allclose(seen[-1][:, :, 0], x0.expand(2, -1, -1, -1)[:, :, 0], atol=1e-4) and not torch.allclose(seen[-1][:, :, 1:3, 2:], x0[:, :, 1:3, 2:].expand(2, -1, -1, -1), atol=0.1)


@pytest.mark.parametrize("settings, reason", [
    (dict(init=picture(48, 32)), r"the picture to start from is \(3, 32, 48\), it must be \(3, 32, 32\) to draw 32 x 32"),
    (dict(init=picture(), mask=torch.ones(16, 16)), r"the mask is \(16, 16\)"), (dict(init=picture(), strength=0.0), "strength is 0.0"), (dict(init=picture(), strength=1.5), "strength is 1.5"),
    (dict(mask=torch.ones(32, 32)), "a mask needs the picture")])
def test_pictures_that_cannot_be_started_from(bundle, settings, reason):
    with pytest.raises(ValueError, match=reason):
        generate(bundle, [A], **settings)


def test_a_strength_below_the_end_of_a_path(bundle, monkeypatch):
    monkeypatch.setitem(bundle.config, "formulation", "eps/linear")
    with pytest.raises(ValueError, match="a strength of 1e-06 leaves nothing to draw: the path ends at t = 1e-05"):
        generate(bundle, [A], init=picture(), strength=1e-6)


def test_init_image_and_mask_from_the_command_line(cli, refused, tiny, tmp_path):
    Image.fromarray(to_uint8(picture(48, 32)[None])[0].numpy()).save(tmp_path / "init.png")
    Image.fromarray(np.pad(np.full((16, 48), 255, np.uint8), ((16, 0), (0, 0)))).save(tmp_path / "mask.png")
    out, flags = tmp_path / "out.png", ["sample.py", "--prompt", A, "--weights", tiny, "--out", tmp_path / "out.png", "--init-image"]
    assert cli(*flags, tmp_path / "init.png", "--mask", tmp_path / "mask.png")[::2] == (0, [])
    drawn, init = np.asarray(Image.open(out)), np.asarray(Image.open(tmp_path / "init.png"))
    assert drawn.shape == (32, 48, 3) and (drawn[:16] == init[:16]).all() and (drawn[16:] != init[16:]).any()      # the picture's own size
    assert cli(*flags, tmp_path / "init.png", "--width", 32, "--height", 64)[0] == 0 and Image.open(out).size == (32, 64)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "half.png").write_bytes((tmp_path / "init.png").read_bytes()[:-60])
    Image.new("RGB", (33, 32)).save(tmp_path / "odd.png")
    assert all(f"{name}.png is no picture" in refused(*flags, tmp_path / f"{name}.png") for name in ("text", "half")) and "absent.png" in refused(*flags, tmp_path / "absent.png")
    assert "width is 33 pixels; it must be a multiple of 16" in refused(*flags, tmp_path / "odd.png")
    assert "--mask needs the --init-image" in refused(*flags[:-1], "--mask", tmp_path / "mask.png")
    assert "--strength is of the --init-image" in refused(*flags[:-1], "--strength", 0.6)
    turned, clear = Image.Exif(), Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    turned[0x0112] = 6
    Image.open(tmp_path / "init.png").save(tmp_path / "turned.jpg", exif=turned)
    clear.save(tmp_path / "clear.png")
    assert sample.open_picture(tmp_path / "turned.jpg").size == (32, 48) and sample.open_picture(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_prompts_that_cannot_be_used():
    for prompts, reason in (([], "no prompt"), (["caf\udce9"], "prompt 1 is not written in UTF-8"), (["x", " \n"], "prompt 2 is empty"), (["x" * 2001], "prompt 1 has 2001 characters; at most 2000")):
        with pytest.raises(ValueError, match=reason):
            check_prompts(prompts)
    assert check_prompts(["x" * 2000]) == ["x" * 2000]


def test_grid():
    images = torch.stack([torch.full((4, 6, 3), i, dtype=torch.uint8) for i in range(5)])
    assert grid(images[:1]).size == (6, 4) and grid(images).size == (3 * 6 + 4, 2 * 4 + 2) and grid(images, columns=1).size == (6, 5 * 4 + 4 * 2)
    pixels = np.asarray(grid(images))
    assert pixels[0, 0, 0] == 0 and pixels[0, 8, 0] == 1 and pixels[6, 0, 0] == 3 and pixels[5, 0, 0] == pixels[9, 21, 0] == 255


# ---- the command line

def test_png_carries_prompt_seed_and_settings(cli, tiny, tmp_path, bundle):
    out = tmp_path / "out.png"
    status, said, errors = cli("sample.py", "--prompt", A, "--prompt", B, "--seed", 7, "--weights", tiny, "--out", out, "--zoom", 2, "--cfg", 3)
    assert (status, said, errors) == (0, [f"wrote {out}"], [])
    image = Image.open(out)
    assert image.size == (2 * (32 + 2 + 32), 64) and list(tmp_path.iterdir()) == [out]
    assert image.text["prompt"] == f"{A}\n{B}" and image.text["seed"] == "7" and image.text["steps"] == "3" and float(image.text["cfg"]) == 3
    said = {"shift": "1.0", "sampler": "euler", "t_last": "0.0", "width": "32", "height": "32"}                                             # by the bundle
    assert {name: image.text[name] for name in said} == said
    assert (np.asarray(image)[::2, ::2][:, :32] == generate(bundle, [A, B], cfg=3.0, seed=7)[0].numpy()).all()


@pytest.mark.parametrize("error, status", [(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2), (MemoryError(), 2), (RuntimeError("a defect"), None)])
def test_too_little_memory_is_one_line_and_defects_are_none(capsys, error, status):
    def main():
        raise error
    with pytest.raises(SystemExit if status else RuntimeError) as ended:
        one_line_errors(main)
    assert getattr(ended.value, "code", None) == status and len(capsys.readouterr().err.splitlines()) == (1 if status else 0)


def test_a_bar_on_a_terminal_alone(cli, tiny, tmp_path, monkeypatch):
    command = "sample.py", "--prompt", A, "--weights", tiny, "--out", tmp_path / "out.png"
    assert cli(*command)[2] == []
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda stream: True)
    assert "3/3" in cli(*command)[2][-1]


def test_no_picture_of_what_is_not_finite(bundle, monkeypatch):
    monkeypatch.setattr(bundle.vae, "decode", lambda z: z.new_full((len(z), 3, 32, 32), torch.nan))
    with pytest.raises(ValueError, match="not finite: no picture is written"):
        generate(bundle, [A])


def test_emoji_and_right_to_left_prompts(cli, tiny, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\ufeffדמות של עיגול אדום\n\n  دائرة حمراء 🔴👩‍👩‍👧‍👦\n\u202e🟦\n", encoding="utf-8")
    out = tmp_path / "out.png"
    assert cli("sample.py", "--prompt", "🔴 над 🟦", "--prompts-file", prompts, "--weights", tiny, "--out", out)[::2] == (0, [])
    assert Image.open(out).text["prompt"] == "🔴 над 🟦\nדמות של עיגול אדום\nدائرة حمراء 🔴👩‍👩‍👧‍👦\n\u202e🟦" and Image.open(out).size == (66, 66)


def test_num_trajectory_encoders_and_precision(cli, tiny, tmp_path):
    out, gif = tmp_path / "out.png", tmp_path / "steps.gif"
    status, _, errors = cli("sample.py", "--prompt", A, "--num", 3, "--trajectory", gif, "--encoders", "t5", "--dtype", "bf16", "--weights", tiny, "--out", out, "--width", 48)
    assert (status, errors) == (0, []) and Image.open(out).size == (48 * 2 + 2, 32 * 2 + 2) and Image.open(gif).n_frames in (3, 4)       # Pillow joins frames that are alike
    assert {*tmp_path.iterdir()} == {out, gif}


def test_another_mmdit_of_the_same_architecture(cli, tiny, tmp_path, bundle):
    other, out = tmp_path / "pretrain.ckpt", tmp_path / "out.png"
    checkpoint.save_checkpoint(other, {"step": 1, "ema": {k: 0 * v for k, v in bundle.mmdit.state_dict().items()}})
    assert cli("sample.py", "--prompt", A, "--weights", tiny, "--mmdit", other, "--out", out)[0] == 0
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))   # the velocity is zero: noise stays noise
    assert np.abs(np.asarray(Image.open(out), float) - (bundle.vae.decode(noise)[0].permute(1, 2, 0).numpy() * 127.5 + 127.5).clip(0, 255)).max() <= 1


@pytest.mark.parametrize("arguments, reason", [
    ([], "no prompt"),
    (["--prompt", ""], "prompt 1 is empty"),
    (["--prompt", " \t "], "prompt 1 is empty"),
    (["--prompt", "x" * 10_000], "prompt 1 has 10000 characters; at most 2000"),
    (["--prompt", A, "--negative-prompt", "x" * 10_000], "negative prompt 1 has 10000 characters"),
    (["--prompts-file", "absent.txt"], "absent.txt"),
    (["--prompt", A, "--width", "0"], "width is 0 pixels; it must be a multiple of 16 between 16 and 4096"),
    (["--prompt", A, "--height", "17"], "height is 17 pixels"),
    (["--prompt", A, "--width", "100000"], "width is 100000 pixels"),
    (["--prompt", A, "--width", "4096"], "positions exist for"),
    (["--prompt", A, "--width", "wide"], "--width: invalid int value: 'wide'"),
    (["--prompt", A, "--cfg", "nan"], "--cfg: invalid float value: 'nan'"),
    (["--prompt", A, "--num", "0"], "--num is 0"),
    (["--prompt", A, "--zoom", "0"], "--zoom is 0"),
    (["--prompt", A, "--wdith", "64"], "unknown flag --wdith; did you mean --width?"),
    (["--prompt", A, "--xyzzy=1"], "unknown flag --xyzzy"),
    (["--prompt", A, "--dtype", "fp61"], "unknown value 'fp61'; known: fp32, bf16, fp16; did you mean fp16?"),
    (["--prompt", A, "--encoders", "clip_l,t6"], "'t6' is no text encoder, known are clip_l, clip_g, t5"),
    (["--prompt", A, "--sampler", "eular"], "unknown sampler 'eular'; known: euler"),
    (["--prompt", A, "--device", "toaster"], "device 'toaster' cannot be used"),
    (["--prompt", A, "--mmdit", "absent.ckpt"], "absent.ckpt is not there"),
    (["--prompt", A, "--out", "absent/out.png"], "absent/out.png cannot be written: absent is no folder"),
    (["--prompt", A, "--out", "."], "it is a folder"),
    (["--prompt", A, "--out", ""], "it is a folder"),
    (["--prompt", A, "--out", "file/out.png"], "file/out.png cannot be written"),
    (["--prompt", A, "--trajectory", "absent/x.gif"], "absent/x.gif cannot be written"),
    (["--prompt", A, "--out", "out.jpg"], "out.jpg: what is written there is a PNG"), (["--prompt", A, "--trajectory", "out.png"], "out.png: what is written there is a GIF"),
    (["--prompt", A, "--device", "meta"], "device 'meta' cannot be used"),
    (["--prompts-file", "latin.txt"], "latin.txt is no text in UTF-8"),
    (["--prompt", A, "--weights", "absent"], "absent is no bundle folder"),
    (["--prompt", A, "--weights", "file"], "file is no safetensors file, or damaged"),
    (["--prompt", A, "--weights", "."], "config.json is not there")])
def test_bad_input_is_one_line_and_nothing_is_written(refused, tiny, tmp_path, monkeypatch, arguments, reason):
    monkeypatch.chdir(tmp_path)
    for name in ("file", "out.png"):
        (tmp_path / name).write_text("was here before")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert reason in refused("sample.py", *([] if "--weights" in arguments else ["--weights", tiny]), *arguments)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"was here before", "out.png": b"was here before", "latin.txt": b"caf\xe9"}


@pytest.mark.parametrize("part, damage, reason", [
    ("mmdit.pt", lambda raw: raw[: len(raw) // 2], "mmdit.pt is no checkpoint of ours, or damaged"),
    ("vae.pt", lambda raw: b"\x89PNG foreign", "vae.pt is no checkpoint of ours, or damaged"),
    ("t5.pt", lambda raw: b"", "t5.pt is no checkpoint of ours, or damaged"),
    ("clip_g.pt", None, "clip_g.pt is not there"),
    ("mmdit.json", lambda raw: raw.replace(b'"depth": 1', b'"depth": 2'), "mmdit.pt is of another architecture"),
    ("mmdit.json", lambda raw: raw.replace(b'"context_dim": 32', b'"context_dim": 48'), "the MM-DiT takes 20 channels of CLIP's and 48 of T5's, the encoders have"),
    ("vae.json", lambda raw: raw.replace(b'"latent_channels": 4', b'"latent_channels": 8'), "the MM-DiT makes latents of 4 channels, the autoencoder 8"),
    ("vae.json", lambda raw: json.dumps(json.loads(raw) | {"scale": "x"}).encode(), "scale and shift are numbers, or 4 each"),
    ("vae.json", lambda raw: json.dumps(json.loads(raw) | {"shift": [0.1, 0.2]}).encode(), "scale and shift are numbers, or 4 each"),
    ("clip_l.json", lambda raw: b"[]", "clip_l.json holds no JSON object"),
    ("clip_l.json", lambda raw: b"{}", "the CLIPs' 768 + 12 channels do not fit into T5's 32"),
    ("t5.json", lambda raw: raw.replace(b'"layers": 1', b'"layers": 0'), "t5.pt: its config does not describe a T5Encoder"),
    ("config.json", lambda raw: raw.replace(b'"clip_length": 16', b'"clip_length": 32'), "clip_length is 32 tokens, its clip_l has positions for 16"),
    ("config.json", lambda raw: raw.replace(b"rf/", b"fr/"), "unknown formulation 'fr/lognorm(0.00,1.00)'"),
    ("clip_tokenizer/vocab.json", lambda raw: raw[:100], "vocab.json is no JSON file"),
    ("t5_tokenizer/tokenizer.json", None, "tokenizer.json")])
def test_damaged_weights_are_named_and_nothing_is_written(refused, bundle, tmp_path, part, damage, reason):
    checkpoint.save_bundle(bundle, tmp_path / "bundle")
    path = tmp_path / "bundle" / part
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    assert reason in refused("sample.py", "--prompt", A, "--weights", tmp_path / "bundle", "--out", tmp_path / "out.png")
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_weights_of_another_model(refused, tiny, tmp_path):
    checkpoint.save_checkpoint(tmp_path / "other.ckpt", {"weight": torch.ones(3)})
    assert "other.ckpt is of another architecture" in refused("sample.py", "--prompt", A, "--weights", tiny, "--mmdit", tmp_path / "other.ckpt", "--out", tmp_path / "x.png")
    checkpoint.save_checkpoint(tmp_path / "other.ckpt", {"ema": {}, "config": {"formulation": "v/cos"}})
    assert "other.ckpt was trained as v/cos, which the bundle, rf/lognorm(0.00,1.00), does not sample" in refused(
        "sample.py", "--prompt", A, "--weights", tiny, "--mmdit", tmp_path / "other.ckpt", "--out", tmp_path / "x.png")
    checkpoint.save_checkpoint(tmp_path / "other.ckpt", [1, 2])
    assert "other.ckpt holds no weights" in refused("sample.py", "--prompt", A, "--weights", tiny, "--mmdit", tmp_path / "other.ckpt", "--out", tmp_path / "x.png")


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs a folder in which nobody can write")
def test_a_folder_in_which_nobody_can_write(refused, tiny):
    assert "/proc" in refused("sample.py", "--prompt", A, "--weights", tiny, "--out", "/proc/out.png")


def test_help_is_grouped_and_shows_defaults(cli):
    status, said, _ = cli("sample.py", "--help")
    text = "\n".join(said)
    assert status == 0 and all(f"{group}:" in text for group in ("text", "weights", "sampling", "picture", "machine")) and "(default: weights/mini)" in text and "[pixels]" in text
    assert all(f"--{name.replace('_', '-')}" in text for name in SampleConfig.__dataclass_fields__)


# ---- true processes

def process(*arguments):
    return subprocess.run([sys.executable, ROOT / "sample.py", *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)


def test_process_that_is_refused(tmp_path):
    run = process("--promt", A)
    assert (run.returncode, run.stdout, run.stderr) == (2, "", "sample.py: unknown flag --promt; did you mean --prompt?\n")


def test_process_without_weights(tmp_path):
    run = process("--prompt", A, "--weights", tmp_path / "absent", "--out", tmp_path / "out.png")
    assert (run.returncode, run.stdout, run.stderr) == (2, "", f"sample.py: {tmp_path}/absent is no bundle folder\n") and not list(tmp_path.iterdir())


def test_process_that_samples(tiny, tmp_path):
    run = process("--prompt", "🔴 مربع", "--weights", tiny, "--out", tmp_path / "out.png")
    assert (run.returncode, run.stderr) == (0, "") and Image.open(tmp_path / "out.png").text["prompt"] == "🔴 مربع"


@pytest.mark.skipif(not (ROOT / "weights" / "mini" / "mmdit.pt").exists(), reason="weights/mini is not there")
def test_the_command_of_the_readme_draws_what_it_says(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert f'python sample.py --prompt "{A}"' in (ROOT / "README.md").read_text()
    assert cli("sample.py", "--prompt", A, "--out", tmp_path / "out.png")[0] == 0
    task = evaluate.Task("position", A, (shapes.Thing("red", 0, 0, "circle"), shapes.Thing("blue", 0, 0, "square")), "above")
    things = evaluate.detect(np.asarray(Image.open(tmp_path / "out.png")))[1]
    assert evaluate.judge(task, things) == (True, True), things
    pictures = generate(load_bundle("weights/mini"), [A] * 16)
    assert sum(evaluate.judge(task, evaluate.detect(x.numpy())[1])[0] for x in pictures) >= 14      # 16 where it was trained


@pytest.mark.skipif(not (ROOT / "weights" / "mini" / "mmdit.pt").exists(), reason="weights/mini is not there")
def test_the_command_of_the_readme_for_wide_pictures(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    command, prompt = "sample.py --width 192 --height 96 --prompt", "an orange triangle below a green circle"
    assert f'python {command} "{prompt}"' in (ROOT / "README.md").read_text()
    assert cli(*command.split(), prompt, "--out", tmp_path / "out.png")[0] == 0 and Image.open(tmp_path / "out.png").size == (192, 96)
    tasks = evaluate.tasks("colors", 16)
    pictures = generate(load_bundle("weights/mini"), [task.prompt for task in tasks], width=192, height=96)
    assert sum(evaluate.judge(task, evaluate.detect(x.numpy())[1])[0] for task, x in zip(tasks, pictures)) >= 14


@pytest.mark.skipif(not (ROOT / "weights" / "free.pt").exists(), reason="weights/free.pt is not there")
def test_the_mmdit_of_the_level_free(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = "sample.py --mmdit weights/free.pt --width 128 --height 128"
    assert f"python {command} " in (ROOT / "README.md").read_text()
    tasks = evaluate.tasks("colors", 16)
    (tmp_path / "prompts.txt").write_text("\n".join(task.prompt for task in tasks))
    assert cli(*command.split(), "--prompts-file", tmp_path / "prompts.txt", "--out", tmp_path / "out.png")[0] == 0
    picture = np.asarray(Image.open(tmp_path / "out.png"))
    pictures = [picture[130 * i:130 * i + 128, 130 * j:130 * j + 128] for i in range(4) for j in range(4)]                    # 2 pixels apart
    assert sum(evaluate.judge(task, evaluate.detect(x)[1])[0] for task, x in zip(tasks, pictures)) >= 12


def test_edit_image_from_the_command_line(cli, refused, tiny, tmp_path):
    """With an MM-DiT that is shown a picture beside the noise: the picture, and both scales, matter; one that is not refuses."""
    folder, picture = tmp_path / "edit", tmp_path / "in.png"
    checkpoint.copy_parts(tiny, folder)
    torch.manual_seed(0)
    config = {**checkpoint.read_json(tiny / "mmdit.json"), "in_channels": 8, "out_channels": 4}
    model = checkpoint.MMDiT(**config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    checkpoint.save_part(folder, "mmdit", model, config)
    Image.effect_noise((48, 32), 90).convert("RGB").save(picture)

    def drawn(*flags):
        status, _, errors = cli("sample.py", "--prompt", "make it red", "--weights", folder, "--out", tmp_path / "out.png", *flags)
        assert status == 0, errors
        return np.asarray(Image.open(tmp_path / "out.png"))
    plain, image, more = drawn("--edit-image", picture), drawn("--edit-image", picture, "--image-cfg", 4), drawn("--edit-image", picture, "--cfg", 5)
    by_text, from_text = (drawn("--edit-image", picture, "--cfg", 1, "--image-cfg", 3, *flags) for flags in ((), ("--negative-prompt", "make it blue")))
    assert (by_text != from_text).any()                                           # the picture alone guides: away from what the text says
    assert plain.shape == (32, 48, 3) and len({x.tobytes() for x in (plain, image, more)}) == 3
    assert (drawn("--edit-image", picture, "--num", 2)[:, :48] == plain).mean() > 0.99
    assert drawn().shape == (32, 32, 3)                                           # no picture: as in training without it
    flags = "--prompt", "make it red", "--out", tmp_path / "out.png", "--edit-image", picture
    assert "this MM-DiT draws and does not edit" in refused("sample.py", *flags, "--weights", tiny)
    assert "--image-cfg needs the --edit-image" in refused("sample.py", *flags[:-2], "--weights", folder, "--image-cfg", 2)
    assert "give one of them" in refused("sample.py", *flags, "--weights", folder, "--init-image", picture)
    assert "--mask needs the --init-image" in refused("sample.py", *flags, "--weights", folder, "--mask", picture)
