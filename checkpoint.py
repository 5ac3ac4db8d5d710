"""Files: bundles (everything that sampling needs) and training checkpoints. Written beside and renamed; read without pickled code.

A bundle is a folder; each part that is there is a JSON config and its weights (half precision):

    config.json                                     sampling defaults and data: what `sample.py` starts from
    mmdit.json + mmdit.pt, vae.*, clip_l.*, clip_g.*, t5.*, clip_image.*
    clip_tokenizer/, t5_tokenizer/                  vocabulary and merges; unigram pieces
"""

import json
import os
import shutil
import tempfile
import warnings
from functools import cached_property
from pathlib import Path

import torch

from mmdit import MMDiT
from text_encoders import BPETokenizer, CLIPTextEncoder, T5Encoder, TextEncoders, TextSizes, UnigramTokenizer
from vae import AutoencoderKL

CLASSES = {"vae": AutoencoderKL, "clip_l": CLIPTextEncoder, "clip_g": CLIPTextEncoder, "t5": T5Encoder, "mmdit": MMDiT}
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


def write_json(path, value):
    write(path, lambda temporary: Path(temporary).write_text(json.dumps(value, indent=1) + "\n"))


def read_json(path):
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is not there") from None
    except ValueError:
        raise ValueError(f"{path} is no JSON file") from None


def save_checkpoint(path, state):
    """A dict of tensors, numbers, strings, lists and dicts to `path`."""
    write(path, lambda temporary: torch.save(state, temporary))


def load_checkpoint(path, device="cpu"):
    """What `save_checkpoint` wrote. A missing, truncated or foreign file, or one with code in it, is a ValueError."""
    if not Path(path).is_file():
        raise ValueError(f"{path} is not there" if not Path(path).exists() else f"{path} is no file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # foreign bytes make torch raise anything, from IndexError to UnpicklingError
        raise ValueError(f"{path} is no checkpoint of ours, or damaged ({(str(error) or repr(error)).splitlines()[0][:120]})") from None


# ---------------------------------------------------------------------------------------------------------------
# Bundles

def save_part(folder, name, module, config, dtype=torch.float16):
    """`load_part` rebuilds the module from its constructor's arguments, `config`."""
    state = {k: v.detach().to("cpu", dtype if v.is_floating_point() else v.dtype).clone() for k, v in module.state_dict().items()}
    save_checkpoint(Path(folder) / f"{name}.pt", state)
    write_json(Path(folder) / f"{name}.json", config)


@torch.inference_mode(False)  # parts are loaded when first used, perhaps by `generate`, and may be trained later
def load_part(folder, name, device="cpu", cls=None):
    """The module in float32, in eval mode and frozen; of class `cls` where CLASSES has no such part (evaluate.py's clip_image)."""
    cls = cls or CLASSES[name]
    config, state = read_json(Path(folder) / f"{name}.json"), load_checkpoint(Path(folder) / f"{name}.pt")
    try:
        module = cls(**config)
    except TypeError as error:
        raise ValueError(f"{folder}/{name}.json does not describe a {cls.__name__}: {error}") from None
    load_strictly(module, state, f"{folder}/{name}.pt")
    return module.to(device).eval().requires_grad_(False)


def load_strictly(module, state, source):
    """`module.load_state_dict(state)`; another architecture's weights are named in one line."""
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{source} holds no weights")
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(f"{source} is of another architecture: {len(missing)} weights missing {missing[:2]}, {len(unexpected)} unknown {unexpected[:2]}")
    for key, value in own.items():
        if value.shape != state[key].shape:
            raise ValueError(f"{source} is of another size: {key} is {tuple(state[key].shape)}, the model has {tuple(value.shape)}")
    module.load_state_dict(state)


class Bundle:
    """A trained SD3. Each part is loaded when first used and may be replaced by assignment: `bundle.mmdit = mine`."""

    def __init__(self, folder, device="cpu"):
        self.folder, self.device = Path(folder), device
        if not self.folder.is_dir():
            raise ValueError(f"{folder} is no bundle folder")
        self.config = read_json(self.folder / "config.json")
        known = self.config.keys() if isinstance(self.config, dict) else ()
        if lacking := [key for key in KEYS if key not in known]:
            raise ValueError(f"{folder}/config.json is no bundle's: it lacks {', '.join(lacking)}")

    mmdit = cached_property(lambda self: load_part(self.folder, "mmdit", self.device))
    vae = cached_property(lambda self: load_part(self.folder, "vae", self.device))

    @cached_property
    def text(self):
        parts = {name: load_part(self.folder, name, self.device) for name in ("clip_l", "clip_g", "t5")}
        return text_encoders(self.folder, self.config, parts)


def load_bundle(path, device="cpu"):
    """The bundle in a folder; nothing but its config is read yet."""
    return Bundle(path, device)


def save_bundle(bundle, path):
    """A copy of the bundle's folder at `path`, with the parts that were replaced since."""
    copy_parts(bundle.folder, path)
    for name in ("mmdit", "vae"):
        if name in vars(bundle):
            save_part(path, name, vars(bundle)[name], read_json(bundle.folder / f"{name}.json"))
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


def text_encoders(folder, config, parts):
    """The ensemble of loaded encoders {name: module} with the tokenizers of a bundle folder, every part of it or some."""
    widths = {name: read_json(Path(folder) / f"{name}.json")["width"] for name in ("clip_l", "clip_g", "t5")}
    sizes = TextSizes(**widths, clip_length=config["clip_length"], t5_length=config["t5_length"])
    clip, t5 = Path(folder) / "clip_tokenizer", Path(folder) / "t5_tokenizer"
    tokenizers = {"clip_l": BPETokenizer.from_folder(clip, sizes.clip_length), "clip_g": BPETokenizer.from_folder(clip, sizes.clip_length, pad=0),
                  "t5": UnigramTokenizer.from_folder(t5, sizes.t5_length)}
    return TextEncoders(**parts, tokenizers=tokenizers, sizes=sizes)
