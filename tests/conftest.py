"""What several test files share: a tiny bundle of random weights, and the command lines run inside this process."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import data
from text_encoders import BPETokenizer, UnigramTokenizer
from vae import AutoencoderKL

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a bundle with every part, of random weights: whatever is sampled from it is noise, but noise that depends on all inputs."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    world = data.Shapes("all", 16, 16)
    texts = [text for i in range(50) for text in (world[i].original, world[i].synthetic)]
    bpe, unigram = BPETokenizer.train(texts, 16), UnigramTokenizer.train(texts, 24)
    checkpoint.write_folder(folder / "clip_tokenizer", bpe.save)
    checkpoint.write_folder(folder / "t5_tokenizer", unigram.save)
    clip = dict(vocab_size=len(bpe.vocab), length=16, layers=2, heads=2, mlp=16, eos=bpe.end)
    t5 = dict(vocab_size=len(unigram.pieces), width=32, layers=1, heads=2, head_dim=8, mlp=16)
    mmdit = dict(depth=1, in_channels=4, context_dim=32, pooled_dim=20, pos_embed_max_size=8, base_size=2, clip_length=16)
    vae = AutoencoderKL(4, channels=8, multipliers=(1, 2), blocks=1, unshuffle=4, attention=False, groups=4)
    parts = {"clip_l": dict(clip, width=8, projection=8), "clip_g": dict(clip, width=12, projection=12, activation="gelu"), "t5": t5, "mmdit": mmdit,
             "vae": vae.config}
    for name, config in parts.items():
        module = checkpoint.CLASSES[name](**config)
        with torch.no_grad():
            for p in module.parameters():  # what starts at zero, as adaLN-Zero does, would hide everything behind it
                p.add_(0.1 * torch.randn_like(p))
        checkpoint.save_part(folder, name, module, config)
    checkpoint.write_json(folder / "config.json", {"clip_length": 16, "t5_length": 24, "resolution": 32, "formulation": "rf/lognorm(0.00,1.00)", "shift": 1.0,
                                                   "steps": 3, "cfg": 2.0, "sampler": "euler"})
    return folder


@pytest.fixture
def cli(capsys, monkeypatch):
    """cli("sample.py", "--prompt", "x") -> (exit status, lines on stdout, lines on stderr), as a new process would give them, without the seconds that importing torch takes."""
    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capsys.readouterr()
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            status = 0
        except SystemExit as error:
            status = error.code
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()
    return run


@pytest.fixture
def refused(cli):
    """Asserts that a command line ends in one line on stderr and exit status 2; returns the line."""
    def run(script, *arguments):
        status, _, lines = cli(script, *arguments)
        assert status == 2 and len(lines) == 1 and lines[0].startswith(script), (status, lines)
        return lines[0]
    return run
