"""Alignment (App. C): so far the low-rank adapters (LoRA, Hu et al. 2021) that it trains."""

import torch
import torch.nn.functional as F
from torch import nn

import checkpoint


class LoRALinear(nn.Linear):
    """W x + b + (alpha / rank) B A x with W and b frozen. Its weight keeps its name, so the model's own state dict is still inside the adapted one's."""

    def __init__(self, linear, rank, alpha):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scale = linear.in_features, linear.out_features, alpha / rank
        self.weight, self.bias = linear.weight.requires_grad_(False), linear.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, self.in_features).to(self.weight) / self.in_features ** 0.5)
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, rank))      # the update starts at zero

    def forward(self, x):                                                     # (..., in) -> (..., out)
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def add_lora(module, rank, alpha=None):
    """Give every linear layer of the module, in place, an update of the rank (App. C: all of them, rank 128); only the updates train. alpha: by default the rank."""
    if rank < 1:
        raise ValueError(f"the rank is {rank}, it must be at least 1")
    module.requires_grad_(False)
    for name, linear in [*module.named_modules()]:
        if type(linear) is nn.Linear:
            module.set_submodule(name, LoRALinear(linear, rank, alpha or rank))
    return module


def merge_lora(module):
    """Undo `add_lora`, the updates added to the weights; in place."""
    for name, lora in [*module.named_modules()]:
        if isinstance(lora, LoRALinear):
            with torch.device("meta"):
                linear = nn.Linear(lora.in_features, lora.out_features)
            linear.weight, linear.bias = nn.Parameter((lora.weight + lora.scale * lora.lora_B @ lora.lora_A).detach(), requires_grad=False), lora.bias
            module.set_submodule(name, linear)
    return module


def save_lora(path, mmdit):
    """The adapters of an MM-DiT in diffusers' layout: for `sample.py --lora` and for `StableDiffusion3Pipeline.load_lora_weights`."""
    loras = {name: lora for name, lora in mmdit.named_modules() if isinstance(lora, LoRALinear)}
    checkpoint.save_lora(path, {name: (lora.lora_A.detach(), lora.scale * lora.lora_B.detach()) for name, lora in loras.items()}, len(mmdit.joint_blocks))
