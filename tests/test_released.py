"""Released SD3 weights: parity with diffusers' pipeline, layouts and their round trips, strict loading, malformed files, the command line."""

import json
import pickle
import random
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
from diffusers.loaders import single_file_utils  # noqa: E402
from released import VARIANTS, pipeline  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import checkpoint  # noqa: E402
import layouts  # noqa: E402
import sample  # noqa: E402
from checkpoint import load_bundle, read_safetensors  # noqa: E402
from mmdit import MMDiT  # noqa: E402
from sample import generate, initial_noise, seeded  # noqa: E402
from text_encoders import CLIPTextEncoder, T5Encoder  # noqa: E402
from vae import AutoencoderKL  # noqa: E402

PROMPTS = ["a red circle above a green star", "it's a sign that says stop"]
SETTINGS = dict(steps=2, width=64, height=32)


@pytest.fixture(scope="session")
def pipes():
    return {variant: pipeline(variant) for variant in VARIANTS}


@pytest.fixture(scope="session")
def folder(pipes, tmp_path_factory):
    """SD3.5-medium as `save_pretrained` writes it."""
    path = tmp_path_factory.mktemp("released") / "diffusers"
    pipes["sd3.5-medium"].save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def single(folder):
    """The same in one file in Stability's layout, in the types that Stability uses: fp16, T5 in float8, CLIP in bf16."""
    path = folder.parent / "sd3.safetensors"
    checkpoint.export_stability(load_bundle(folder), path)
    tensors, metadata = read_safetensors(path)
    def of_type(name):
        return torch.float8_e4m3fn if ".t5xxl." in name else torch.bfloat16 if ".clip_" in name else torch.float16
    save_file({name: tensor.to(of_type(name)).contiguous() for name, tensor in tensors.items()}, folder.parent / "mixed.safetensors", metadata)
    return folder.parent / "mixed.safetensors"


def same_bytes(a, b):
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and a[key].shape == b[key].shape
                                        and a[key].flatten().contiguous().view(torch.uint8).equal(b[key].flatten().contiguous().view(torch.uint8)) for key in a)


def tensors_of(folder):
    """All tensors of a diffusers folder by part and name."""
    return {f"{sub.name}/{name}": tensor for sub in folder.iterdir() if sub.is_dir() for file in sub.glob("*.safetensors") for name, tensor in load_file(file).items()}


# ---- parity with diffusers' pipeline

@pytest.mark.parametrize("variant", VARIANTS)
def test_pictures_are_those_of_diffusers(pipes, variant, tmp_path, monkeypatch):
    pipes[variant].save_pretrained(tmp_path / "sd3")
    bundle = load_bundle(tmp_path / "sd3")
    steps, cfg = {"sd3-medium": (28, 5.0), "sd3.5-medium": (40, 4.5), "sd3.5-large": (28, 4.5)}[variant]
    assert (bundle.config["steps"], bundle.config["cfg"], bundle.config["shift"], bundle.config["schedule"], bundle.config["unconditional"]) == (steps, cfg, 3.0, "released", "empty prompt")
    monkeypatch.setattr(sample, "to_uint8", lambda images: images)
    ours = generate(bundle, PROMPTS, steps=8, cfg=5.0, width=96, height=64)
    theirs = pipes[variant](PROMPTS, num_inference_steps=8, guidance_scale=5.0, width=96, height=64, latents=initial_noise(bundle, seeded(0, 2), 96, 64), output_type="pt").images
    assert ours.shape == (2, 3, 64, 96) and (ours[0] - ours[1]).abs().max() > 0.1
    assert ((ours / 2 + 0.5).clamp(0, 1) - theirs).abs().max() <= 1e-3


def test_embeddings_are_those_of_diffusers(pipes, folder):
    bundle = load_bundle(folder)
    context, _, pooled, _ = pipes["sd3.5-medium"].encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
    ours = bundle.text.encode(PROMPTS)
    for a, b in zip(ours, (context, pooled)):
        assert a.shape == b.shape and (a - b).norm() / b.norm() <= 1e-5


def test_without_t5_as_diffusers_without_it(pipes, folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "sd3")
    shutil.rmtree(tmp_path / "sd3" / "text_encoder_3")
    bundle, pipe = load_bundle(tmp_path / "sd3"), pipes["sd3.5-medium"]
    pipe = diffusers.StableDiffusion3Pipeline(**{**pipe.components, "text_encoder_3": None, "tokenizer_3": None})
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(sample, "to_uint8", lambda images: images)
    ours = generate(bundle, PROMPTS, encoders=("clip_l", "clip_g"), steps=3, cfg=5.0, width=64, height=64)
    theirs = pipe(PROMPTS, num_inference_steps=3, guidance_scale=5.0, width=64, height=64, latents=initial_noise(bundle, seeded(0, 2), 64, 64), output_type="pt").images
    assert ((ours / 2 + 0.5).clamp(0, 1) - theirs).abs().max() <= 1e-3
    with pytest.raises(ValueError, match="holds no t5: give it by --t5 FILE, or name only clip_l, clip_g in --encoders"):
        generate(bundle, PROMPTS, **SETTINGS)


def test_tiled_autoencoder_is_diffusers_whole(pipes, folder):
    bundle, theirs = load_bundle(folder), pipes["sd3.5-medium"].vae
    latents, images = torch.randn(2, 16, 20, 12), torch.rand(2, 3, 160, 96) * 2 - 1
    with torch.no_grad():
        pairs = [(bundle.vae.decode_tiled(latents, 8), theirs.decode(latents / 1.5305 + 0.0609).sample),
                 (bundle.vae.encode_tiled(images, 8), (theirs.encode(images).latent_dist.mean - 0.0609) * 1.5305)]
    for a, b in pairs:
        assert a.shape == b.shape and (a - b).norm() / b.norm() <= 1e-5


# ---- layouts

def test_round_trips_return_the_same_bytes(single, tmp_path):
    """Stability -> diffusers -> bundle -> Stability, by the command line's own functions, in mixed types."""
    checkpoint.export_diffusers(load_bundle(single, tokenizers=single.parent / "diffusers"), tmp_path / "folder")
    checkpoint.export_bundle(load_bundle(tmp_path / "folder"), tmp_path / "bundle")
    checkpoint.export_stability(load_bundle(tmp_path / "bundle"), tmp_path / "again.safetensors")
    checkpoint.export_diffusers(load_bundle(tmp_path / "bundle"), tmp_path / "folder2")
    there, back = read_safetensors(single)[0], read_safetensors(tmp_path / "again.safetensors")[0]
    assert {tensor.dtype for tensor in there.values()} == {torch.float16, torch.bfloat16, torch.float8_e4m3fn}
    assert same_bytes(there, back) and same_bytes(tensors_of(tmp_path / "folder"), tensors_of(tmp_path / "folder2"))
    assert load_bundle(single).config == load_bundle(tmp_path / "again.safetensors").config == load_bundle(tmp_path / "folder").config == load_bundle(tmp_path / "bundle").config


def test_our_folder_has_the_bytes_and_names_of_diffusers(folder, tmp_path):
    checkpoint.export_diffusers(load_bundle(folder), tmp_path / "folder")
    assert same_bytes(tensors_of(folder), tensors_of(tmp_path / "folder"))


def test_diffusers_loads_our_folder(pipes, single, tmp_path, monkeypatch):
    """Sharded, with an index. The pipeline draws what the original one draws."""
    monkeypatch.setattr(checkpoint, "SHARD", 200_000)
    whole = load_bundle(single.parent / "diffusers")
    checkpoint.export_diffusers(whole, tmp_path / "folder")
    assert len([*(tmp_path / "folder" / "transformer").glob("*.safetensors")]) > 3 and (tmp_path / "folder/text_encoder_3/model.safetensors.index.json").is_file()
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "folder")
    pipe.set_progress_bar_config(disable=True)
    settings = dict(num_inference_steps=2, width=64, height=64, latents=initial_noise(whole, seeded(0, 2), 64, 64), output_type="pt")
    assert (pipe(PROMPTS, **settings).images - pipes["sd3.5-medium"](PROMPTS, **settings).images).abs().max() <= 1e-5
    again = load_bundle(tmp_path / "folder")
    assert generate(again, PROMPTS, **SETTINGS).equal(generate(whole, PROMPTS, **SETTINGS))


def test_diffusers_converts_our_single_file(pipes, folder, tmp_path):
    """By the functions behind `from_single_file`, whose configs are on the network."""
    checkpoint.export_stability(load_bundle(folder), tmp_path / "sd3.safetensors")
    pipe, tensors = pipes["sd3.5-medium"], load_file(tmp_path / "sd3.safetensors")
    clips = {name: single_file_utils.convert_ldm_clip_checkpoint(dict(tensors), f"text_encoders.{name}.transformer.") for name in ("clip_l", "clip_g")}
    mmdit = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers({k: v for k, v in tensors.items() if k.startswith("model.")})
    vae = single_file_utils.convert_ldm_vae_checkpoint(dict(tensors), dict(pipe.vae.config))
    t5 = single_file_utils.convert_sd3_t5_checkpoint_to_diffusers(tensors)
    for theirs, model in ((mmdit, pipe.transformer), (vae, pipe.vae), (clips["clip_l"], pipe.text_encoder), (clips["clip_g"], pipe.text_encoder_2), (t5, pipe.text_encoder_3)):
        wanted = model.state_dict()
        assert same_bytes({key: theirs[key] for key in wanted}, wanted) and theirs.keys() - wanted.keys() <= {"encoder.embed_tokens.weight"}


SIZES = {"sd3-medium": (dict(depth=24, qk_norm=False), 2_028_328_000), "sd3.5-medium": (dict(depth=24, pos_embed_max_size=384, dual_attention_blocks=[*range(13)]), 2_243_171_520),
         "sd3.5-large": (dict(depth=38), 8_056_627_520)}


@pytest.mark.parametrize("preset", SIZES)
def test_architecture_is_read_off_the_released_sizes(preset):
    """On the meta device: the config is found again from names and shapes alone, in both layouts; names and shapes in diffusers' are its own model's."""
    config, parameters = SIZES[preset]
    with torch.device("meta"):
        state = MMDiT(**config).state_dict()
        theirs = diffusers.SD3Transformer2DModel(
            in_channels=16, out_channels=16, num_layers=config["depth"], num_attention_heads=config["depth"], joint_attention_dim=4096, caption_projection_dim=64 * config["depth"],
            pooled_projection_dim=2048, pos_embed_max_size=config.get("pos_embed_max_size", 192), qk_norm="rms_norm" if config.get("qk_norm", True) else None,
            dual_attention_layers=tuple(config.get("dual_attention_blocks", ())))
    part = checkpoint.Part("mmdit", "meta", state)
    assert layouts.arguments(MMDiT, part.config) == layouts.arguments(MMDiT, config) and sum(p.numel() for p in part.skeleton().parameters()) == parameters
    assert layouts.preset(part.config) == layouts.RELEASED | layouts.PRESETS[preset]
    laid_out = checkpoint.laid_out(part, layouts.DiffusersLayout("mmdit", config["depth"]))
    assert {name: tensor.shape for name, tensor in laid_out.items()} == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert checkpoint.Part("mmdit", "meta", laid_out, layouts.DiffusersLayout("mmdit", config["depth"])).config == part.config


CLIP_G = dict(width=1280, layers=32, heads=20, mlp=5120, activation="gelu", projection=1280)


@pytest.mark.parametrize("name, cls, config, parameters", [("vae", AutoencoderKL, {}, 83_819_683), ("clip_l", CLIPTextEncoder, {}, 123_650_304),
                                                           ("clip_g", CLIPTextEncoder, CLIP_G, 694_659_840), ("t5", T5Encoder, {}, 4_762_310_656)])
def test_other_parts_are_read_off_the_released_sizes(name, cls, config, parameters):
    import transformers
    with torch.device("meta"):
        part = checkpoint.Part(name, "meta", cls(**config).state_dict())
        ours = layouts.arguments(cls, part.config)
        assert ours == layouts.arguments(cls, config) and sum(p.numel() for p in part.skeleton().parameters()) == parameters
        told = layouts.diffusers_config(part, {"resolution": 1024})
        if name == "vae":
            theirs = diffusers.AutoencoderKL.from_config(told)
        else:
            kind = transformers.T5EncoderModel if name == "t5" else transformers.CLIPTextModelWithProjection
            theirs = kind(kind.config_class(**told))
    laid_out = checkpoint.laid_out(part, layouts.DiffusersLayout(name, 4))
    wanted = {key: tensor.shape for key, tensor in theirs.state_dict().items() if key != "encoder.embed_tokens.weight"}
    assert {key: tensor.shape for key, tensor in laid_out.items()} == wanted


def test_sampling_defaults_of_a_foreign_folder_and_bad_ones(folder, tmp_path):
    """The shift is the scheduler's; what a file says about sampling is checked before it is used."""
    shutil.copytree(folder, tmp_path / "sd3")
    (tmp_path / "sd3/scheduler/scheduler_config.json").write_text('{"shift": 1.5}')
    assert load_bundle(tmp_path / "sd3").config == load_bundle(folder).config | {"shift": 1.5}
    for change, reason in (({"steps": "all"}, "steps is 'all', not of type int"), ({"t5_length": 10 ** 9}, "t5_length is 1000000000 tokens; it must be in 3..512"), ({"shift": None}, "shift is None")):
        (tmp_path / "sd3/config.json").write_text(json.dumps(load_bundle(folder).config | change))
        with pytest.raises(ValueError, match=reason):
            load_bundle(tmp_path / "sd3")
    with pytest.raises(ValueError, match="t5_length is 2 tokens"):
        load_bundle(folder, t5_length=2)


def test_what_a_layout_has_no_place_for_is_refused(tiny, tmp_path):
    """The miniature's autoencoder is none that others can build."""
    for export in (checkpoint.export_stability, checkpoint.export_diffusers):
        with pytest.raises(ValueError, match="the layout has no place for vae's"):
            export(load_bundle(tiny), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- loading

def test_weights_are_views_of_the_file_and_parts_are_loaded_when_used(single, monkeypatch):
    loaded = []
    monkeypatch.setattr(checkpoint.Part, "module", (lambda plain: lambda self, *args: (loaded.append(self.name), plain(self, *args))[1])(checkpoint.Part.module))
    bundle = load_bundle(single, tokenizers=single.parent / "diffusers", dtype=torch.float16)
    assert loaded == []
    assert bundle.mmdit.x_embedder.proj.weight.data_ptr() == bundle.parts["mmdit"].tensors["x_embedder.proj.weight"].data_ptr()
    generate(bundle, PROMPTS, encoders=("clip_l", "clip_g"), **SETTINGS)
    assert loaded == ["mmdit", "clip_l", "clip_g", "vae"]                         # T5 never
    assert bundle.text.encoder("clip_g")[0].text_projection.weight.dtype == torch.float16
    assert {p.dtype for p in bundle.text.encoder("t5")[0].parameters()} == {torch.bfloat16}      # fp16 overflows T5's feed-forward
    assert {p.dtype for p in bundle.vae.parameters()} == {torch.float32}


def test_offload_lets_go_of_every_part_and_changes_nothing(single, monkeypatch):
    alive = set()

    def tracked(self, *args):
        module = plain(self, *args)
        alive.add(self.name)
        sizes.append(len(alive))
        import weakref
        weakref.finalize(module, alive.discard, self.name)
        return module
    plain, sizes = checkpoint.Part.module, []
    monkeypatch.setattr(checkpoint.Part, "module", tracked)
    kept = load_bundle(single, tokenizers=single.parent / "diffusers")
    images = generate(kept, PROMPTS, **SETTINGS)
    assert sizes == [1, 2, 3, 4, 5]
    del kept
    sizes.clear(), alive.clear()
    bundle = load_bundle(single, tokenizers=single.parent / "diffusers", offload=True)
    assert generate(bundle, PROMPTS, **SETTINGS).equal(images) and sizes == [1] * 5 and not alive
    assert generate(bundle, PROMPTS, **SETTINGS).equal(images)                    # and again


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(single, dtype):
    images = [generate(load_bundle(single, tokenizers=single.parent / "diffusers", dtype=t), PROMPTS, **SETTINGS).float() for t in (torch.float32, dtype)]
    assert (images[0] - images[1]).abs().mean() < 3


def test_encoders_in_files_of_their_own(cli, single, tmp_path):
    tensors, metadata = read_safetensors(single)
    files = {}
    for i, (name, prefix) in enumerate(layouts.PREFIXES.items()):
        own = {(key.removeprefix(prefix) if i % 2 else key): tensor for key, tensor in tensors.items() if key.startswith(prefix)}      # with the prefix or without
        save_file(own, tmp_path / f"{name}.safetensors", metadata if name == "mmdit" else None)
        files[name] = tmp_path / f"{name}.safetensors"
    settings = dict(tokenizers=single.parent / "diffusers")
    whole, apart = load_bundle(single, **settings), load_bundle(files.pop("mmdit"), files=files, **settings)
    assert generate(whole, PROMPTS, **SETTINGS).equal(generate(apart, PROMPTS, **SETTINGS))
    flags = ["sample.py", "--prompt", PROMPTS[0], "--width", 64, "--height", 32, "--steps", 2, "--tokenizers", settings["tokenizers"]]
    own = [word for name, file in files.items() for word in ("--" + name.replace("_", "-"), file)]
    assert cli(*flags, "--weights", single, "--out", tmp_path / "a.png")[::2] == (0, [])
    assert cli(*flags, "--weights", tmp_path / "mmdit.safetensors", *own, "--out", tmp_path / "b.png")[::2] == (0, [])
    assert np.array_equal(*(np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png")))
    with pytest.raises(ValueError, match="the MM-DiT takes 192 channels of CLIP's and 256 of T5's, the encoders have {'clip_l': 128, 'clip_g': 128, 't5': 256}"):
        load_bundle(tmp_path / "mmdit.safetensors", files={**files, "clip_l": files["clip_g"]})
    bare = {key.removeprefix(layouts.PREFIXES["mmdit"]): tensor for key, tensor in tensors.items() if key.startswith(layouts.PREFIXES["mmdit"])}
    save_file(bare, tmp_path / "bare.safetensors")
    assert load_bundle(tmp_path / "bare.safetensors").parts.keys() == {"mmdit"}


def test_liberties_of_the_released_files(single, tmp_path):
    """position_ids, logit_scale, loss.*; one of T5's two names for its embedding; CLIP-L's projection, absent or there."""
    tensors, metadata = read_safetensors(single)
    clip, t5 = layouts.PREFIXES["clip_l"], layouts.PREFIXES["t5"]
    assert clip + "text_projection.weight" in tensors and t5 + "shared.weight" in tensors and t5 + "encoder.embed_tokens.weight" in tensors
    extra = {clip + "text_model.embeddings.position_ids": torch.arange(77)[None], "text_encoders.clip_l.logit_scale": torch.ones(()), "loss.logvar": torch.ones(3)}
    for gone in ("shared.weight", "encoder.embed_tokens.weight"):
        save_file({key: tensor for key, tensor in (tensors | extra).items() if key != t5 + gone}, tmp_path / "x.safetensors")
        assert load_bundle(tmp_path / "x.safetensors").load("t5").shared.weight.equal(tensors[t5 + "shared.weight"].float())
    save_file({key: tensor for key, tensor in tensors.items() if key != clip + "text_projection.weight"}, tmp_path / "x.safetensors", metadata)
    bundle = load_bundle(tmp_path / "x.safetensors", tokenizers=single.parent / "diffusers")
    assert bundle.load("clip_l").text_projection.weight.equal(torch.eye(64))
    checkpoint.export_diffusers(bundle, tmp_path / "folder")
    checkpoint.export_stability(load_bundle(tmp_path / "folder"), tmp_path / "y.safetensors")
    assert same_bytes(read_safetensors(tmp_path / "x.safetensors")[0], read_safetensors(tmp_path / "y.safetensors")[0])


# ---- what is refused, each in one line

def changed(single, path, change):
    tensors, metadata = read_safetensors(single)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, path, metadata)
    return path


QKV = "model.diffusion_model.joint_blocks.1.x_block.attn.qkv.weight"


@pytest.mark.parametrize("change, reason", [
    (lambda t: t.pop(QKV), "x.safetensors is of another architecture: 1 weights missing ['joint_blocks.1.x_block.attn.qkv.weight'], 0 unknown"),
    (lambda t: t.update({"model.diffusion_model.extra": torch.ones(1)}), "0 weights missing [], 1 unknown ['extra']"),
    (lambda t: t.update({QKV: t[QKV][:-1].clone()}), "is of another size: joint_blocks.1.x_block.attn.qkv.weight is (383, 128), the model has (384, 128)"),
    (lambda t: t.update({QKV: t[QKV].to(torch.int8)}), "joint_blocks.1.x_block.attn.qkv.weight is of type torch.int8; weights are floating-point numbers of one type"),
    (lambda t: t.pop("first_stage_model.encoder.conv_in.weight"), "is of another architecture: encoder.conv_in.weight is missing"),
    (lambda t: t.update({"model.diffusion_model.x_embedder.proj.weight": torch.ones(64, 16, 2, 2)}), "the MM-DiT is 64 wide and 2 blocks deep"),
    (lambda t: t.update({"model.diffusion_model.pos_embed": torch.ones(16)}), "pos_embed is (16,), it should have 3 sides"),
    (lambda t: t.update({"model.diffusion_model.x_embedder.proj.weight": torch.ones(2 ** 40, 0, 2, 2)}), "x_embedder.proj.weight is (1099511627776, 0, 2, 2)"),
    (lambda t: t.update({"conditioner.x": torch.ones(1)}), "1 tensors that belong to no part of SD3: ['conditioner.x']")])
def test_strict_loading(single, tmp_path, change, reason):
    path = changed(single, tmp_path / "x.safetensors", change)
    with pytest.raises(ValueError) as caught:
        load_bundle(path).load("mmdit")
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("names, kind", [
    (["model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.transformer.text_model.x"], "Stable Diffusion 1, 2 or XL"),
    (["double_blocks.0.img_attn.qkv.weight"], "FLUX"), (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], "FLUX"),
    (["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"], "a LoRA, to be given by --lora"), (["lora_unet_x.lora_down.weight"], "a LoRA"),
    (["transformer_blocks.0.attn.to_q.weight"], "one file of a diffusers folder"), (["text_model.embeddings.token_embedding.weight"], "to be given by --clip-l or --clip-g"),
    (["encoder.block.0.layer.1.DenseReluDense.wo.weight"], "to be given by --t5"), (["a"], "not known (1 tensors, ['a'])")])
def test_files_of_other_models_are_named(refused, tmp_path, names, kind):
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "x.safetensors")
    line = refused("sample.py", "--prompt", "x", "--weights", tmp_path / "x.safetensors", "--out", tmp_path / "out.png")
    assert "x.safetensors holds no MM-DiT of SD3; it is " in line and kind in line


class Trap:
    """Unpickling this writes a file."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "code was executed")


def header(raw, change):
    """A safetensors file's bytes with its JSON header changed."""
    size = int.from_bytes(raw[:8], "little")
    text = json.dumps(change(json.loads(raw[8:8 + size]))).encode()
    return len(text).to_bytes(8, "little") + text + raw[8 + size:]


def damages(raw, trap):
    """Some 200 ways to spoil a file."""
    rng, size = random.Random(0), int.from_bytes(raw[:8], "little")
    yield from (b"", b"\n", b"{}", raw[:7], raw[:8], pickle.dumps(trap), b"PK\x03\x04" + raw[:1000], b"\x89PNG\r\n" + bytes(99))
    yield from ((n).to_bytes(8, "little") + raw[8:] for n in (0, 1, size - 1, size + 1, len(raw), 2 ** 31, 2 ** 40, 2 ** 63, 2 ** 64 - 1))
    yield from (raw[:rng.randrange(8, len(raw))] for _ in range(40))
    yield raw + b"\0"
    tensors = range(raw.index(b'}"', 8), 8 + size)  # past the metadata, where a flip may make another valid recorded setting
    for _ in range(110):
        at = rng.choice(tensors)
        yield raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1:]

    def entry(**new):
        return header(raw, lambda h: {**h, QKV: {**h[QKV], **new}})
    yield from (entry(dtype=dtype) for dtype in ("F64", "F8_E4M3", "I64", "BOOL", "C64", "X", 5, None))
    yield from (entry(shape=shape) for shape in ([2 ** 62, 2 ** 62], [2 ** 40, 128], [-384, 128], [384.5, 128], "big", [], [384], [128, 384], [384, 128, 1], [384, 0], None, [10 ** 30]))
    yield from (entry(data_offsets=offsets) for offsets in ([0, 2 ** 60], [2 ** 63, 2 ** 64], [5, 1], [-1, 3], [0, 0], [0], "x", None))
    yield from (header(raw, change) for change in (lambda h: [h], lambda h: 5, lambda h: {}, lambda h: {k: 1 for k in h}, lambda h: {**h, "__metadata__": {"nanosd3": 5}},
                                                   lambda h: {**h, "__metadata__": {"nanosd3": "{"}}, lambda h: {**h, "__metadata__": {"nanosd3": "[1]"}},
                                                   lambda h: {**h, "x" * 10 ** 6: h[QKV]}, lambda h: {k.replace("1", "99999999"): v for k, v in h.items()}))


def test_200_malformed_files(single, tmp_path):
    """Each is refused in one line, with no code executed and no memory taken."""
    path, trap, raw = tmp_path / "x.safetensors", Trap(tmp_path / "executed"), single.read_bytes()
    told, memory = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for bad in damages(raw, trap):
        path.write_bytes(bad)
        with pytest.raises((ValueError, OSError)) as refusal:
            bundle = load_bundle(path)
            for name in checkpoint.CLASSES:
                bundle.load(name)
        told += 1
        assert len(" ".join(str(refusal.value).split())) < 700, str(refusal.value)[:900]
    assert told >= 200
    assert not trap.path.exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300_000      # kilobytes


def test_the_header_of_a_huge_file_is_not_believed(tmp_path):
    text = json.dumps({"a": {"dtype": "F32", "shape": [2 ** 34], "data_offsets": [0, 2 ** 36]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    with pytest.raises(ValueError, match="x.safetensors is no safetensors file, or damaged"):
        read_safetensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("weight_map", [{"a": "../secret.safetensors"}, {"a": "/etc/passwd"}, {"a": "sub/x.safetensors"}, {"a": "x.bin"}, {"a": 5}, {"a": None}, [], "x", None,
                                        {"a": "absent.safetensors"}, {"a": "model.safetensors"}])
def test_indexes_that_lead_elsewhere(folder, tmp_path, weight_map):
    shutil.copytree(folder, tmp_path / "sd3")
    save_file({"a": torch.ones(1)}, tmp_path / "sd3" / "secret.safetensors")
    (tmp_path / "sd3/text_encoder_3/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="does not map weights to files of its own folder|absent.safetensors is not there|is of another architecture") as caught:
        load_bundle(tmp_path / "sd3")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file, content, reason", [
    ("model_index.json", {"_class_name": "FluxPipeline"}, "is a FluxPipeline, not a StableDiffusion3Pipeline"), ("text_encoder/config.json", {"hidden_act": "gelu"}, "num_attention_heads is None"),
    ("text_encoder/config.json", {"hidden_act": "gelu", "num_attention_heads": 7}, "does not describe a CLIPTextEncoder: 64 channels do not divide into 7 heads"),
    ("text_encoder/config.json", {"hidden_act": "relu", "num_attention_heads": 1}, "does not describe a CLIPTextEncoder: 'relu'"),
    ("vae/config.json", {"norm_num_groups": "32"}, "norm_num_groups is '32', not of type int"), ("vae/config.json", None, "config.json is no JSON file")])
def test_configs_that_cannot_be_used(folder, tmp_path, file, content, reason):
    shutil.copytree(folder, tmp_path / "sd3")
    (tmp_path / "sd3" / file).write_text(json.dumps(content) if content else "{")
    with pytest.raises(ValueError) as caught:
        load_bundle(tmp_path / "sd3").load("clip_l")
    assert reason in str(caught.value)


def test_without_the_package(single, refused, tmp_path, monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "needs the package safetensors: pip install -r requirements-weights.txt" in refused("sample.py", "--prompt", "x", "--weights", single, "--out", tmp_path / "x.png")


# ---- the command lines

def test_sample_from_the_command_line(cli, single, folder, tmp_path):
    flags = ["--prompt", PROMPTS[0], "--width", 64, "--height", 32, "--steps", 2]
    assert cli("sample.py", *flags, "--weights", folder, "--out", tmp_path / "a.png")[::2] == (0, [])
    assert cli("sample.py", *flags, "--weights", single, "--tokenizers", folder, "--out", tmp_path / "b.png", "--dtype", "bf16", "--offload", "--t5-length", 20)[::2] == (0, [])
    status, _, said = cli("sample.py", *flags, "--weights", single, "--out", tmp_path / "c.png")
    assert status == 2 and "no merges.txt for clip_l in" in said[0] and "give its folder by --tokenizers DIR" in said[0]


def test_a_picture_to_start_from_and_a_mask(cli, single, folder, tmp_path):
    before = np.random.default_rng(0).integers(256, size=(32, 64, 3), dtype=np.uint8)
    Image.fromarray(before).save(tmp_path / "init.png")
    Image.fromarray(np.pad(np.full((16, 64), 255, np.uint8), ((16, 0), (0, 0)))).save(tmp_path / "mask.png")
    flags = ["sample.py", "--prompt", PROMPTS[0], "--weights", single, "--tokenizers", folder, "--steps", 4, "--init-image", tmp_path / "init.png"]
    assert cli(*flags, "--mask", tmp_path / "mask.png", "--out", tmp_path / "a.png")[::2] == (0, [])
    after = np.asarray(Image.open(tmp_path / "a.png"))
    assert (after[:16] == before[:16]).all() and (after[16:] != before[16:]).any()
    for name, strength in (("b.png", 0.25), ("c.png", 1.0)):
        assert cli(*flags, "--strength", strength, "--out", tmp_path / name)[::2] == (0, [])
    assert not np.array_equal(*(np.asarray(Image.open(tmp_path / name)) for name in ("b.png", "c.png")))


def test_export_from_the_command_line(cli, refused, single, folder, tmp_path):
    assert cli("checkpoint.py", "export", "--format", "diffusers", "--tokenizers", folder, single, tmp_path / "out")[::2] == (0, [])
    assert cli("checkpoint.py", "export", "--format", "stability", tmp_path / "out", tmp_path / "out.safetensors")[::2] == (0, [])
    assert same_bytes(read_safetensors(single)[0], read_safetensors(tmp_path / "out.safetensors")[0])
    assert "out is already there" in refused("checkpoint.py", "export", "--format", "bundle", single, tmp_path / "out")
    assert "unknown value 'onnx'; known: stability" in refused("checkpoint.py", "export", "--format", "onnx", single, tmp_path / "x")


def test_training_goes_on_from_released_weights(cli, folder, tmp_path):
    """As README says: exported as a bundle, then finetuned on pictures, here to fewer pixels."""
    out, pictures = tmp_path / "bundle", tmp_path / "pictures"
    pictures.mkdir()
    for i in range(4):
        Image.effect_noise((64, 64), 50).convert("RGB").save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text("noise")
    assert cli("checkpoint.py", "export", "--format", "bundle", folder, out)[0] == 0
    status, _, errors = cli("train.py", "--stage", "finetune", "--init-from", out, "--data", f"folder:{pictures}", "--resolution", 64, "--steps", 1, "--batch-size", 2, "--chunk", 2,
                            "--workers", 0, "--out", tmp_path / "run")
    assert status == 0, errors
    start, tuned = load_bundle(out), load_bundle(tmp_path / "run")
    assert tuned.config["schedule"] == "released" and tuned.config["shift"] == pytest.approx(3 * 64 / start.config["resolution"])
    assert tuned.part("mmdit").config["dual_attention_blocks"] == start.part("mmdit").config["dual_attention_blocks"]
    assert generate(tuned, ["noise"], steps=1, width=64, height=64).shape == (1, 64, 64, 3)


# ---- the real sizes, one block each

@pytest.mark.slow
@pytest.mark.parametrize("depth, dual", [(24, False), (24, True), (38, False)])
def test_one_block_at_the_real_size(depth, dual):
    from diffusers.models.attention import JointTransformerBlock

    from mmdit import JointBlock, Stream, attention
    width, qk_norm = 64 * depth, dual or depth == 38
    block = JointBlock({"context_block": Stream(width, qk_norm), "x_block": Stream(width, qk_norm, dual=dual)}, attention).eval()
    theirs = JointTransformerBlock(width, depth, 64, qk_norm="rms_norm" if qk_norm else None, use_dual_attention=dual).eval()
    state = layouts.DiffusersLayout("mmdit", 99).laid_out(("joint_blocks.0." + key, value) for key, value in block.state_dict().items())
    theirs.load_state_dict({name.removeprefix("transformer_blocks.0."): tensor for name, tensor in state.items()}, strict=True)
    x, text, c = torch.randn(2, 6 * 5, width), torch.randn(2, 77 + 77, width), torch.randn(2, width)
    with torch.no_grad():
        ms = [stream.adaLN_modulation(torch.nn.functional.silu(c)) for stream in block.values()]
        ours, (text_out, x_out) = block([text, x], ms), theirs(x, text, c)
    for a, b in zip(ours, (text_out, x_out)):
        assert (a - b).norm() / b.norm() <= 1e-5


@pytest.mark.slow
def test_encoders_and_autoencoder_at_the_real_width(tmp_path):
    import transformers
    tokens = torch.randint(3, 49405, (2, 77))
    tokens[:, 40:] = 49407
    for name, config in (("clip_l", {}), ("clip_g", CLIP_G)):
        torch.manual_seed(0)
        ours = CLIPTextEncoder(**config | {"layers": 2}).eval()
        told = layouts.diffusers_config(checkpoint.Part(name, "here", ours.state_dict()), {})
        theirs = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**told)).eval()
        theirs.load_state_dict(ours.state_dict(), strict=True)
        with torch.no_grad():
            (states, pooled), expected = ours(tokens), theirs(tokens, output_hidden_states=True)
        assert (states - expected.hidden_states[-2]).norm() / states.norm() <= 1e-5 and (pooled - expected.text_embeds).norm() / pooled.norm() <= 1e-5
    ours = T5Encoder(vocab_size=1000, layers=1).eval()
    theirs = transformers.T5EncoderModel(transformers.T5Config(**layouts.diffusers_config(checkpoint.Part("t5", "here", ours.state_dict()), {}))).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    with torch.no_grad():
        a, b = ours(tokens % 1000), theirs(tokens % 1000).last_hidden_state
    assert (a - b).norm() / b.norm() <= 1e-5
    torch.manual_seed(0)
    ours = AutoencoderKL().eval()
    for p in ours.parameters():  # torch's own initialisation lets signals fade, and both decoders are then 1e-5 from float64's picture
        if p.ndim > 1:
            torch.nn.init.kaiming_normal_(p)
    part = checkpoint.Part("vae", "here", ours.state_dict())
    theirs = diffusers.AutoencoderKL.from_config(layouts.diffusers_config(part, {"resolution": 1024})).eval()
    theirs.load_state_dict(checkpoint.laid_out(part, layouts.DiffusersLayout("vae", 4)), strict=True)
    images = torch.rand(2, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        z = ours.to_latents(images, sample=False)
        assert ((theirs.encode(images).latent_dist.mean - 0.0609) * 1.5305 - z).norm() / z.norm() <= 1e-5
        assert (theirs.decode(z / 1.5305 + 0.0609).sample - ours.decode(z)).norm() / ours.decode(z).norm() <= 1e-5
