"""Files: bundles (everything that sampling needs), released SD3 weights, training checkpoints. Written beside and renamed; read without pickled code.

    python checkpoint.py export --format diffusers sd3_medium_incl_clips.safetensors OUT        # --format stability | diffusers | bundle

A bundle is a folder; each part that is there is a JSON config and its weights (half precision when trained here):

    config.json                                     sampling defaults and data: what `sample.py` starts from
    mmdit.json + mmdit.pt, vae.*, clip_l.*, clip_g.*, t5.*, clip_image.*
    clip_tokenizer/, t5_tokenizer/                  vocabulary and merges; unigram pieces

Released weights are one safetensors file (Stability's layout, whose names are ours behind PREFIXES) or a folder of them (diffusers' layout). All
layouts are read as a `Bundle` of `Part`s. Safetensors files are memory-mapped: a tensor is a view of the file, and costs memory when it is used.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import tempfile
import warnings
from functools import cached_property, partial
from pathlib import Path

import torch

from config import Parser, one_line_errors, one_of, read_json
from layouts import CONFIGS, FOLDERS, FOREIGN, IGNORED, PREFIXES, PRESETS, RELEASED, TOLD, DiffusersLayout, Layout, arguments, count, diffusers_config, preset
from mmdit import MMDiT
from text_encoders import BPETokenizer, CLIPTextEncoder, T5Encoder, TextEncoders, TextSizes, UnigramTokenizer
from vae import AutoencoderKL

CLASSES = {"vae": AutoencoderKL, "clip_l": CLIPTextEncoder, "clip_g": CLIPTextEncoder, "t5": T5Encoder, "mmdit": MMDiT}
ENCODERS = "clip_l", "clip_g", "t5"
KEYS = "clip_length", "t5_length", "resolution", "formulation", "shift", "steps", "cfg", "sampler"     # that config.json has


# ---------------------------------------------------------------------------------------------------------------
# Atomic writing, safe reading

def write(path, save):
    """`save(temporary path)`, then rename: `path` holds the old file or the whole new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    try:
        save(temporary)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp gives 0600
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_folder(path, save):
    """`save(temporary folder)`, then rename, in place of any older folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        save(new)
        if path.exists():
            path.rename(Path(temporary) / "old")
        new.rename(path)


def write_text(path, text):
    write(path, lambda temporary: Path(temporary).write_text(text))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_lines(path, values):
    """A line of JSON each."""
    write_text(path, "".join(json.dumps(value) + "\n" for value in values))


def read_object(path):
    """A JSON file that holds a dict."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def save_checkpoint(path, state):
    """A dict of tensors, numbers, strings, lists and dicts to `path`. A full disk is an OSError; an older file is then as it was."""
    def save(temporary):
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    try:
        write(path, save)
    except (OSError, RuntimeError) as error:  # torch's writer makes a RuntimeError of it
        raise OSError(f"{path} cannot be written: {first_line(error)} (is the disk full?)") from None


def load_checkpoint(path, mmap=False):
    """What `save_checkpoint` wrote. A missing, truncated or foreign file, or one with code in it, is a ValueError."""
    if not Path(path).is_file():
        raise ValueError(f"{path} is not there" if not Path(path).exists() else f"{path} is no file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # foreign bytes make torch raise anything, from IndexError to UnpicklingError
        raise ValueError(f"{path} is no checkpoint of ours, or damaged ({first_line(error)})") from None


def first_line(error):
    return (str(error).strip() or repr(error)).splitlines()[0][:120]


def safetensors(path):
    """The optional library, for reading or writing `path`."""
    try:
        import safetensors.torch
        return safetensors
    except ImportError:
        raise ImportError(f"{path} needs the package safetensors: pip install -r requirements-weights.txt") from None


@torch.inference_mode(False)
def read_safetensors(path):
    """({name: tensor}, {name: text}) of a file: tensors are views of the mapped file, nothing is read yet. A foreign or damaged file is a ValueError."""
    if not Path(path).is_file():
        raise ValueError(f"{path} is not there")
    library = safetensors(path)
    try:
        with library.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except OSError:
        raise
    except Exception as error:  # SafetensorError, and what torch raises about dtypes that it does not know
        raise ValueError(f"{path} is no safetensors file, or damaged ({first_line(error)}); pickled weights are not read") from None


def write_safetensors(path, tensors, metadata=None):
    write(path, lambda temporary: safetensors(path).torch.save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})}))


# ---------------------------------------------------------------------------------------------------------------
# Parts

class Part:
    """A network on disk: its constructor's arguments `config`, and its weights by our names, in the file's dtypes."""

    def __init__(self, name, source, tensors, layout=None):
        self.name, self.source, self.cls, self.layout = name, source, CLASSES[name], layout or Layout()
        self.tensors = completed(name, {key: tensor for key, tensor in tensors.items() if not IGNORED.match(key)})
        self.config = CONFIGS[name](self)

    @property
    def arguments(self):
        """All of its constructor's arguments: `config`, and the defaults of those that it leaves out."""
        for name, default in arguments(self.cls, {}).items():
            if isinstance(default, (int, str)) and name in self.config:
                check_type(self.config[name], type(default), f"{self.source}: {name}")
        return arguments(self.cls, self.config)

    def __contains__(self, key):
        return self.layout.names(key)[0] in self.tensors

    def count(self, template):
        return count(template, self)

    def shape(self, key, sides):
        """The shape of the (first) tensor that holds a weight."""
        name = self.layout.names(key)[0]
        if name not in self.tensors:
            raise ValueError(f"{self.source} is of another architecture: {name} is missing")
        shape = tuple(self.tensors[name].shape)
        if len(shape) != sides or 0 in shape:
            raise ValueError(f"{self.source} is of another architecture: {name} is {shape}, it should have {sides} sides")
        return shape

    def replace(self, tensors, source):
        """Other weights of the same architecture, by our names."""
        self.tensors, self.source, self.layout = completed(self.name, checked_state(tensors, source)), source, Layout()

    def skeleton(self):
        """The network without memory, on torch's meta device, when its weights are all there and no others."""
        try:
            with torch.device("meta"):
                module = self.cls(**self.config)
        except (TypeError, ValueError, LookupError, RuntimeError, ZeroDivisionError) as error:
            raise ValueError(f"{self.source}: its config does not describe a {self.cls.__name__}: {first_line(error)}") from None
        check_names({name for key in module.state_dict() for name in self.layout.names(key)}, self.tensors, self.source)
        return module

    def items(self):
        """(our name, tensor) one by one, each of the network's shape."""
        for key, own in self.skeleton().state_dict().items():
            parts = [self.tensors[name] for name in self.layout.names(key)]
            if not parts[0].is_floating_point() or {part.dtype for part in parts} != {parts[0].dtype}:
                raise ValueError(f"{self.source}: {key} is of type {', '.join(str(part.dtype) for part in parts)}; weights are floating-point numbers of one type")
            if {part.shape for part in parts} != {part.shape for part in self.layout.split(key, own)}:
                raise ValueError(f"{self.source} is of another size: {key} is {' + '.join(str(tuple(p.shape)) for p in parts)}, the model has {tuple(own.shape)}")
            yield key, self.layout.join(key, parts)

    @torch.inference_mode(False)  # parts are loaded when first used, perhaps by `generate`, and may be trained later
    def module(self, device="cpu", dtype=torch.float32):
        """The network in `dtype`, in eval mode and frozen. Weights are read one by one; those that are of this dtype and device stay views of the file."""
        module = self.skeleton()
        module.load_state_dict({key: tensor.to(device, dtype) for key, tensor in self.items()}, assign=True)
        return module.eval().requires_grad_(False)


class BundlePart(Part):
    """A part of a bundle's folder, nothing of which is read before it is needed; of class `cls` where CLASSES has no such part (evaluate.py's clip_image)."""

    def __init__(self, folder, name, cls=None):
        self.name, self.source, self.cls, self.layout = name, f"{folder}/{name}.pt", cls or CLASSES[name], Layout()
        self.json = Path(folder) / f"{name}.json"

    config = cached_property(lambda self: read_object(self.json))
    tensors = cached_property(lambda self: completed(self.name, checked_state(load_checkpoint(self.source, mmap=True), self.source)))


def completed(name, tensors):
    """A part's tensors with T5's tied embedding once, and with the projection that CLIP-L's files may leave out: the identity."""
    tensors = dict(tensors)
    if name == "t5" and "encoder.embed_tokens.weight" in tensors:
        tied = tensors.pop("encoder.embed_tokens.weight")
        tensors.setdefault("shared.weight", tied)
    if name == "clip_l" and "text_projection.weight" not in tensors and "text_model.final_layer_norm.weight" in tensors:
        norm = tensors["text_model.final_layer_norm.weight"]
        tensors["text_projection.weight"] = torch.eye(norm.numel(), dtype=norm.dtype)
    return tensors


def load_part(folder, name, device="cpu", cls=None):
    """A bundle's part as a module in float32, in eval mode and frozen."""
    return BundlePart(folder, name, cls).module(device)


def save_part(folder, name, module, config, dtype=torch.float16):
    """`load_part` rebuilds the module from its constructor's arguments, `config`."""
    state = {k: v.detach().to("cpu", dtype if v.is_floating_point() else v.dtype).clone(memory_format=torch.contiguous_format) for k, v in module.state_dict().items()}
    save_checkpoint(Path(folder) / f"{name}.pt", state)
    write_json(Path(folder) / f"{name}.json", config)


def checked_state(state, source):
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{source} holds no weights")
    return state


def check_names(wanted, there, source):
    missing, unexpected = ([name[:100] for name in sorted(names)] for names in (wanted - there.keys(), there.keys() - wanted))
    if missing or unexpected:
        raise ValueError(f"{source} is of another architecture: {len(missing)} weights missing {missing[:2]}, {len(unexpected)} unknown {unexpected[:2]}")


def load_strictly(module, state, source):
    """`module.load_state_dict(state)`; another architecture's weights are named in one line."""
    own = module.state_dict()
    check_names(own.keys(), checked_state(state, source), source)
    for key, value in own.items():
        if value.shape != state[key].shape:
            raise ValueError(f"{source} is of another size: {key} is {tuple(state[key].shape)}, the model has {tuple(value.shape)}")
    module.load_state_dict(state)


# ---------------------------------------------------------------------------------------------------------------
# Bundles

class Bundle:
    """A trained SD3, of any layout. Each part is loaded when first used, may be let go (`release`) and may be replaced by assignment: `bundle.mmdit = mine`.

    parts: {name: Part}; config: what sampling starts from. dtype: of the MM-DiT and the text encoders. offload: no part stays longer than it is needed.
    tokenizers: the folder to look for them in. loras: (file, scale) pairs, added to the weights whenever they are loaded."""

    def __init__(self, folder, parts, config, device="cpu", dtype=torch.float32, offload=False, tokenizers=None, loras=()):
        self.folder, self.parts, self.config, self.device, self.dtype, self.offload = Path(folder), parts, config, device, dtype, offload
        self.tokenizers, self.loras = Path(tokenizers or folder), [(read_lora(path), scale) for path, scale in loras]

    def part(self, name):
        if name not in self.parts:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{self.folder} holds no {name}: give it by {flag} FILE" + (f", or name only {', '.join(e for e in ENCODERS if e in self.parts)} in --encoders"
                                                                                         if name in ENCODERS else ""))
        return self.parts[name]

    def load(self, name):
        """A part as a module. float16 overflows in T5's feed-forward, which gets bfloat16; the autoencoder, small, stays in float32."""
        part = self.part(name)
        if name == "mmdit":
            check_fit(self.parts)
        dtype = torch.float32 if name == "vae" else torch.bfloat16 if (name, self.dtype) == ("t5", torch.float16) else self.dtype
        module = part.module(self.device, dtype)
        if name == "vae" and str(self.device) == "cpu":
            module.to(memory_format=torch.channels_last)                      # from 256 pixels on a tenth faster
        for lora, scale in self.loras:
            apply_lora(module, name, lora, scale)
        return module

    mmdit = cached_property(lambda self: self.load("mmdit"))
    vae = cached_property(lambda self: self.load("vae"))
    text = cached_property(lambda self: TextEncoders(sizes=self.text_sizes(), load=lambda name: (self.tokenizer(name), self.load(name))[::-1], keep=not self.offload))

    def release(self, name):
        """Under `offload`: let go of a part until it is used again. One that was assigned is lost."""
        if self.offload:
            vars(self).pop(name, None)

    def text_sizes(self):
        """Channels of each encoder; of those that are not here, what the MM-DiT leaves for them."""
        found = {name: self.parts[name].arguments for name in ENCODERS if name in self.parts}
        widths = {name: own["width"] for name, own in found.items()}
        for name, own in found.items():
            if name != "t5" and own["length"] < self.config["clip_length"]:
                raise ValueError(f"{self.folder}: clip_length is {self.config['clip_length']} tokens, its {name} has positions for {own['length']}")
        if len(widths) < len(ENCODERS):
            mmdit = self.part("mmdit").arguments
            widths.setdefault("t5", mmdit["context_dim"])
            widths.setdefault("clip_l", mmdit["pooled_dim"] - widths.get("clip_g", 0))
            widths.setdefault("clip_g", mmdit["pooled_dim"] - widths["clip_l"])
        return TextSizes(**widths, clip_length=self.config["clip_length"], t5_length=self.config["t5_length"])

    def tokenizer_folder(self, name):
        """Where a tokenizer's files are: under the name that bundles or diffusers give their folder, or in the folder itself."""
        ours, theirs, file = ("t5_tokenizer", "tokenizer_3", "tokenizer.json") if name == "t5" else ("clip_tokenizer", "tokenizer", "merges.txt")
        for place in (f"{ours}/{file}", f"{theirs}/{file}", f"{theirs}/tokenizer.json", file):
            if (self.tokenizers / place).is_file():
                return (self.tokenizers / place).parent
        raise ValueError(f"no {file} for {name} in {self.tokenizers}, its {ours} or its {theirs}: give its folder by --tokenizers DIR")

    def tokenizer(self, name):
        folder = self.tokenizer_folder(name)
        if name == "t5":
            return UnigramTokenizer.from_folder(folder, self.config["t5_length"])
        return BPETokenizer.from_folder(folder, self.config["clip_length"], pad=0 if name == "clip_g" else None)


def load_bundle(path, device="cpu", files=None, t5_length=0, **options):
    """The SD3 in a bundle's folder, a diffusers folder or a file of Stability's; of weights only names and shapes are read yet.

    files: {part: a safetensors file of its own}; t5_length: tokens that T5 sees, 0 as recorded; options: Bundle's."""
    path, files = Path(path), {name: file for name, file in (files or {}).items() if file}
    read = read_stability if path.is_file() else read_diffusers if (path / "model_index.json").is_file() else read_bundle
    parts, config = read(path)
    for name, file in files.items():
        tensors, _ = read_safetensors(file)
        parts[name] = Part(name, file, with_prefix(tensors, PREFIXES[name]) or tensors)
    if "mmdit" in parts and (files or read != read_bundle):
        check_fit(parts)
    config["t5_length"] = t5_length or config["t5_length"]
    checked_config(config, path)
    options["tokenizers"] = options.get("tokenizers") or (path.parent if path.is_file() else path)
    return Bundle(path, parts, config, device, **options)


def read_bundle(folder):
    """-> {name: part}, config; as the other two readers."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no bundle folder")
    parts = {name: BundlePart(folder, name) for name in CLASSES if any((folder / f"{name}{end}").exists() for end in (".json", ".pt"))}
    return parts, checked_config(read_json(folder / "config.json"), f"{folder}/config.json")


def check_type(value, kind, what):
    if not isinstance(value, (kind, int) if kind is float else kind):
        raise ValueError(f"{what} is {value!r}, not of type {kind.__name__}")


def checked_config(config, source):
    """Sampling defaults, if each is there and of the presets' type."""
    if lacking := [key for key in KEYS if not isinstance(config, dict) or key not in config]:
        raise ValueError(f"{source} is no bundle's: it lacks {', '.join(lacking)}")
    for key in KEYS:
        check_type(config[key], type((RELEASED | PRESETS["sd3-medium"])[key]), f"{source}: {key}")
        if key.endswith("_length") and not 3 <= config[key] <= 512:
            raise ValueError(f"{source}: {key} is {config[key]} tokens; it must be in 3..512")
    for key in ("t_last", "image_cfg", "noise"):
        if not isinstance(config.get(key, 0.0), (int, float)):
            raise ValueError(f"{source}: {key} is {config[key]!r}, no number")
    return config


def with_prefix(tensors, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def read_stability(path):
    tensors, metadata = read_safetensors(path)
    owned = {name: with_prefix(tensors, prefix) for name, prefix in PREFIXES.items()}
    strays = [name for name in tensors if not name.startswith(tuple(PREFIXES.values())) and not IGNORED.match(name)]
    if "x_embedder.proj.weight" in tensors:  # the MM-DiT alone, without its prefix
        owned, strays = {"mmdit": tensors}, []
    if "x_embedder.proj.weight" not in owned["mmdit"]:
        kind = next((kind for mark, kind in FOREIGN.items() if any(mark in name for name in tensors)), f"not known ({len(tensors)} tensors, {sorted(tensors)[:1]})")
        raise ValueError(f"{path} holds no MM-DiT of SD3; it is {kind}")
    if strays:
        raise ValueError(f"{path} has {len(strays)} tensors that belong to no part of SD3: {strays[:2]}")
    parts = {name: Part(name, path, own) for name, own in owned.items() if own}
    return parts, json_config(metadata["nanosd3"], path) if "nanosd3" in metadata else preset(parts["mmdit"].config)


def json_config(text, source):
    """The config that we write into the header of a file of ours."""
    try:
        return checked_config(json.loads(text), source)
    except json.JSONDecodeError:
        raise ValueError(f"{source}: the config in its header is no JSON") from None


def read_diffusers(folder):
    kind = read_object(folder / "model_index.json").get("_class_name")
    if not str(kind).startswith("StableDiffusion3"):
        raise ValueError(f"{folder} is a {kind}, not a StableDiffusion3Pipeline")
    parts = {name: diffusers_part(folder / sub, name) for name, sub in FOLDERS.items() if (folder / sub).is_dir()}
    if "mmdit" not in parts:
        raise ValueError(f"{folder}/transformer is not there")
    if (folder / "config.json").is_file():  # written here
        return parts, checked_config(read_json(folder / "config.json"), f"{folder}/config.json")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    shift = {key: value for key, value in (read_object(scheduler) if scheduler.is_file() else {}).items() if key == "shift"}
    return parts, preset(parts["mmdit"].config) | shift


def diffusers_part(folder, name):
    tensors = read_shards(folder)
    block = {"mmdit": "transformer_blocks.{}.attn.to_q.weight", "vae": "encoder.down_blocks.{}.resnets.0.conv1.weight"}
    part = Part(name, folder, tensors, DiffusersLayout(name, count(block[name], tensors) if name in block else 0))
    told = read_object(folder / "config.json")
    for ours, theirs in TOLD[name].items():
        kind = type(arguments(part.cls, {})[ours])
        if not isinstance(told.get(theirs), (kind, int)):
            raise ValueError(f"{folder}/config.json: {theirs} is {told.get(theirs)!r}, not of type {kind.__name__}")
        part.config[ours] = told[theirs]
    return part


def read_shards(folder):
    """All tensors of a diffusers part: one file, or those that an index lists; half precision where there is nothing else."""
    for name, variant in itertools.product(("diffusion_pytorch_model", "model"), ("", ".fp16")):
        index, single = folder / f"{name}.safetensors.index{variant}.json", folder / f"{name}{variant}.safetensors"
        if index.is_file():
            weight_map = read_object(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) and re.fullmatch(r"[\w.-]+\.safetensors", file) for file in weight_map.values()):
                raise ValueError(f"{index} does not map weights to files of its own folder")
            tensors = {}
            for file in sorted({*weight_map.values()}):
                tensors |= read_safetensors(folder / file)[0]
            check_names(weight_map.keys(), tensors, index)
            return tensors
        if single.is_file():
            return read_safetensors(single)[0]
    raise ValueError(f"{folder} holds no safetensors weights")


def check_fit(parts):
    """Refuse encoders and an autoencoder that the MM-DiT was not trained with."""
    mmdit, widths = parts["mmdit"].arguments, {name: parts[name].arguments["width"] for name in ENCODERS if name in parts}
    clips = [widths[name] for name in ("clip_l", "clip_g") if name in widths]
    if len(clips) == 2 and sum(clips) != mmdit["pooled_dim"] or sum(clips) > mmdit["pooled_dim"] or widths.get("t5", mmdit["context_dim"]) != mmdit["context_dim"]:
        raise ValueError(f"the MM-DiT takes {mmdit['pooled_dim']} channels of CLIP's and {mmdit['context_dim']} of T5's, the encoders have {widths}")
    if "vae" in parts and (latents := parts["vae"].arguments["latent_channels"]) != (made := mmdit["out_channels"] or mmdit["in_channels"]):
        raise ValueError(f"the MM-DiT makes latents of {made} channels, the autoencoder {latents}")


def save_bundle(bundle, path):
    """A bundle's folder at `path`, with the MM-DiT and the autoencoder as they are now."""
    if all(isinstance(part, BundlePart) for part in bundle.parts.values()):
        copy_parts(bundle.folder, path)
    else:
        fill_bundle(bundle, Path(path))
    for name in ("mmdit", "vae"):
        if name in vars(bundle):
            save_part(path, name, vars(bundle)[name], bundle.part(name).config)
    write_json(Path(path) / "config.json", bundle.config)


def copy_parts(source, target, names=(*CLASSES, "clip_image", "clip_tokenizer", "t5_tokenizer", "config")):
    """Copy the named parts of a bundle that are there."""
    if not Path(source).is_dir():
        raise ValueError(f"{source} is no bundle folder")
    for file in sorted(Path(source).iterdir()):
        if file.stem in names and file.suffix in ("", ".json", ".pt") and file.resolve().parent != Path(target).resolve():
            if file.is_dir():
                write_folder(Path(target) / file.name, lambda temporary: shutil.copytree(file, temporary, dirs_exist_ok=True))
            else:
                write(Path(target) / file.name, lambda temporary: shutil.copyfile(file, temporary))


# ---------------------------------------------------------------------------------------------------------------
# Export: the same bytes in another layout

SHARD = 5_000_000_000      # bytes of a file in a diffusers folder, as there


def laid_out(part, layout):
    """{the layout's name: tensor} of a part. What the layout has no place for is refused: a config that would be read back as another."""
    told = TOLD[part.name] if isinstance(layout, DiffusersLayout) else {}
    ours, back = part.arguments, arguments(part.cls, CONFIGS[part.name](part))
    for key in ours.keys() - {"base_size", "attention", "clip_length"}:  # which only make what is stored, choose a kernel, or matter to three sets of weights
        if isinstance(ours[key], list) and key in told or ours[key] != back[key] and key not in told:
            raise ValueError(f"the layout has no place for {part.name}'s {key} = {ours[key]}; a reader would take it for {back[key]}")
    return layout.laid_out(part.items())


def export_stability(bundle, path):
    """One file. Released ones have T5's tied embedding under both names, and no projection for CLIP-L where it is the identity."""
    tensors = {}
    for name, part in bundle.parts.items():
        own = laid_out(part, Layout())
        if name == "t5":
            own["encoder.embed_tokens.weight"] = own["shared.weight"].clone()   # safetensors refuses to write one memory twice
        if name == "clip_l" and (own["text_projection.weight"].float() == torch.eye(part.config["width"])).all():
            del own["text_projection.weight"]
        tensors |= {PREFIXES[name] + key: tensor for key, tensor in own.items()}
    write_safetensors(path, tensors, {"nanosd3": json.dumps(bundle.config)})


def export_diffusers(bundle, path):
    """A folder that `StableDiffusion3Pipeline.from_pretrained` loads."""
    write_folder(path, partial(fill_diffusers, bundle))


def fill_diffusers(bundle, folder):
    index = {"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.29.0", "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
             **{sub: [None, None] for sub in FOLDERS.values()}, **dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3"), [None, None])}
    for name, part in bundle.parts.items():
        config, sub = diffusers_config(part, bundle.config), folder / FOLDERS[name]
        tensors = laid_out(part, DiffusersLayout(name, part.config["depth"] if name == "mmdit" else len(part.config["multipliers"]) if name == "vae" else 0))
        write_shards(sub, "model" if name in ENCODERS else "diffusion_pytorch_model", tensors)
        write_json(sub / "config.json", config)
        index[FOLDERS[name]] = ["transformers", config["architectures"][0]] if name in ENCODERS else ["diffusers", config["_class_name"]]
        if name in ENCODERS:
            tokenizer = FOLDERS[name].replace("text_encoder", "tokenizer")
            index[tokenizer] = ["transformers", export_tokenizer(bundle, name, folder / tokenizer)]
    write_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": bundle.config["shift"]})
    write_json(folder / "model_index.json", index)
    write_json(folder / "config.json", bundle.config)  # for us: diffusers has no place for it


def write_shards(folder, name, tensors):
    """One file, or several of at most SHARD bytes with an index."""
    shards, room = [{}], SHARD
    for key, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards, room = [*shards, {}], SHARD
        shards[-1][key], room = tensor, room - tensor.nbytes
    if len(shards) == 1:
        return write_safetensors(folder / f"{name}.safetensors", tensors)
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"{name}-{i:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    write_json(folder / f"{name}.safetensors.index.json", {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": weight_map})


def export_tokenizer(bundle, name, folder):
    """Writes it as transformers reads it; returns transformers' class."""
    tokenizer = bundle.tokenizer(name)
    write_folder(folder, tokenizer.save)
    if name == "t5":
        config = {"tokenizer_class": "T5TokenizerFast", "model_max_length": 512, "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "extra_ids": len(tokenizer.sentinels)}
    else:
        bos, eos = tokenizer.SPECIAL
        pad = next(entry for entry, i in tokenizer.vocab.items() if i == tokenizer.pad)
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": bundle.config["clip_length"], "bos_token": bos, "eos_token": eos, "unk_token": eos, "pad_token": pad}
    write_json(folder / "tokenizer_config.json", config)
    return config["tokenizer_class"]


def export_bundle(bundle, path):
    """A bundle's folder."""
    write_folder(path, partial(fill_bundle, bundle))


def fill_bundle(bundle, folder):
    for name, part in bundle.parts.items():
        save_checkpoint(folder / f"{name}.pt", dict(part.items()))
        write_json(folder / f"{name}.json", part.config)
        if name in ENCODERS:
            write_folder(folder / ("t5_tokenizer" if name == "t5" else "clip_tokenizer"), bundle.tokenizer(name).save)
    write_json(folder / "config.json", bundle.config)


EXPORTS = {"stability": export_stability, "diffusers": export_diffusers, "bundle": export_bundle}


# ---------------------------------------------------------------------------------------------------------------
# LoRA files in the layout of diffusers and PEFT: for each linear layer, by its diffusers name, A (rank, in) and B (out, rank)

LORA_PREFIXES = {"mmdit": "transformer.", "clip_l": "text_encoder.", "clip_g": "text_encoder_2."}


def read_lora(path):
    """{part: {layer: its update B A (out, in), as (A, B), the file's own scale included in B}}"""
    tensors, metadata = read_safetensors(path)
    loras = {name: {} for name in LORA_PREFIXES}
    layers = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
    known = {layer + end for layer in layers for end in (".lora_A.weight", ".lora_B.weight")}
    strays = sorted(known - tensors.keys() | {key for key in tensors.keys() - known if key.removesuffix(".alpha") not in layers})
    if strays or not layers:
        raise ValueError(f"{path} is no LoRA in PEFT's layout" + (f": {strays[0]} is missing or unknown" if strays else ""))
    for layer in layers:
        a, b = (tensors[f"{layer}.lora_{which}.weight"].float() for which in "AB")
        name = next((name for name, prefix in LORA_PREFIXES.items() if layer.startswith(prefix)), None)
        if name is None:
            raise ValueError(f"{path} is for {layer}, which is no layer of SD3's")
        if min(a.ndim, b.ndim) < 2 or not 0 < len(a) == b.shape[1]:
            raise ValueError(f"{path}: {layer} has A {tuple(a.shape)} and B {tuple(b.shape)}, which do not multiply to an update")
        loras[name][layer.removeprefix(LORA_PREFIXES[name])] = a, b * lora_scale(tensors.get(f"{layer}.alpha"), metadata, LORA_PREFIXES[name], len(a), path)
    return loras


def lora_scale(alpha, metadata, prefix, rank, path):
    """alpha / rank, alpha being a layer's own, or else what PEFT's settings in the header say, or else the rank; "rslora" divides by the rank's root."""
    try:
        settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        if settings.get(prefix + "alpha_pattern"):
            raise ValueError("it differs between the layers")
        if alpha is None:
            alpha = settings.get(prefix + "lora_alpha", rank)
        return float(alpha) / (rank ** 0.5 if settings.get(prefix + "use_rslora") else rank)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: its alpha cannot be used: {first_line(error)}") from None


@torch.inference_mode(False)
def apply_lora(module, name, loras, scale):
    """Add scale * B A to the weights of part `name`, out of place: they may be views of a file."""
    lora, layout = loras.get(name, {}), DiffusersLayout("mmdit", len(module.joint_blocks)) if name == "mmdit" else Layout()
    weights = {key: weight.detach() for key, weight in module.named_parameters() if key.endswith(".weight")}
    unknown = lora.keys() - {file_name.removesuffix(".weight") for key in weights for file_name in layout.names(key)}
    if unknown:
        raise ValueError(f"the LoRA is of another model: the {name} has no layer {min(unknown)}")
    for key, weight in weights.items():
        layers = [file_name.removesuffix(".weight") for file_name in layout.names(key)]
        if lora.keys() & layers:
            updates = [update(lora.get(layer), rows, layer) for layer, rows in zip(layers, layout.split(key, weight))]
            module.get_parameter(key).data = (weight + scale * layout.join(key, updates)).to(weight.dtype)


def update(factors, weight, layer):
    """B A in the shape of `weight`; zeros without factors."""
    if factors is None:
        return torch.zeros(weight.shape, device=weight.device)
    a, b = (factor.to(weight.device).flatten(1) for factor in factors)
    if (b.shape[0], a.shape[1]) != weight.flatten(1).shape:
        raise ValueError(f"the LoRA is of another size: {layer} is {b.shape[0]} x {a.shape[1]}, the model has {' x '.join(map(str, weight.shape))}")
    return (b @ a).view(weight.shape)


def save_lora(path, factors, depth):
    """Write updates of an MM-DiT: {our name of a linear layer: (A (rank, in), B (out, rank))}; the weight's update is B A."""
    layout, tensors = DiffusersLayout("mmdit", depth), {}
    for key, (a, b) in factors.items():
        for layer, rows in zip(layout.names(key), layout.split(key, b)):
            tensors |= {f"transformer.{layer}.lora_A.weight": a.clone(), f"transformer.{layer}.lora_B.weight": rows.contiguous()}
    write(path, lambda temporary: Path(temporary).write_bytes(in_safetensors(tensors)))


def in_safetensors(tensors):
    """The bytes of a safetensors file of float32 tensors, without the library, which alignment is not to need: length of the header, header, numbers, all little-endian."""
    header, numbers = {"__metadata__": {"format": "pt"}}, bytearray()
    for name, tensor in tensors.items():
        raw = tensor.float().cpu().numpy().astype("<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(numbers), len(numbers) + len(raw)]}
        numbers += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + bytes(numbers)


# ---------------------------------------------------------------------------------------------------------------
# The command line

def main():
    parser = Parser(prog="checkpoint.py", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    export = parser.add_subparsers(dest="command", required=True).add_parser("export", allow_abbrev=False, help="write a model in another layout, every tensor's bytes as they are")
    export.add_argument("--format", required=True, type=one_of(EXPORTS), metavar="{" + ",".join(EXPORTS) + "}")
    for name in ("vae", *ENCODERS):
        export.add_argument("--" + name.replace("_", "-"), metavar="FILE", help=f"{name} in a safetensors file of its own")
    export.add_argument("--tokenizers", metavar="DIR", help="folder of vocab.json, merges.txt (CLIP) and tokenizer.json (T5), if they are not beside the weights")
    export.add_argument("input", metavar="IN", help="a bundle's folder, a diffusers folder, a file of Stability's")
    export.add_argument("output", metavar="OUT")
    args = parser.parse_args()
    if Path(args.output).exists():
        raise ValueError(f"{args.output} is already there")
    bundle = load_bundle(args.input, files={name: getattr(args, name) for name in ("vae", *ENCODERS)}, tokenizers=args.tokenizers)
    EXPORTS[args.format](bundle, args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    one_line_errors(main)
