"""Released SD3's layouts: what Stability's single file and diffusers' folder call the weights that ours hold, which architecture they are of, and what sampling starts with.

Names and shapes only; `checkpoint.py` reads and writes the files. Ours are Stability's names, behind PREFIXES in a file with all parts.
"""

import inspect
import itertools
import math
import re

import torch

from mmdit import HEAD_DIM

# ---------------------------------------------------------------------------------------------------------------
# Names

PREFIXES = {"mmdit": "model.diffusion_model.", "vae": "first_stage_model.", "clip_l": "text_encoders.clip_l.transformer.",
            "clip_g": "text_encoders.clip_g.transformer.", "t5": "text_encoders.t5xxl.transformer."}      # Stability's
FOLDERS = {"mmdit": "transformer", "vae": "vae", "clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5": "text_encoder_3"}      # diffusers'
IGNORED = re.compile(r"loss\.|(.*\.)?(position_ids|logit_scale)$")      # in some released files, of no use here
FOREIGN = {".lora_": "a LoRA, to be given by --lora", "lora_unet": "a LoRA of another kind", "double_blocks.": "FLUX", "input_blocks.": "Stable Diffusion 1, 2 or XL",
           "transformer_blocks.": "one file of a diffusers folder, which is to be given as a whole", "text_model.": "a text encoder, to be given by --clip-l or --clip-g",
           "DenseReluDense": "a text encoder, to be given by --t5"}      # a name in a file without an MM-DiT of ours, and what that file is


class Layout:
    """Ours, which is Stability's. T5's tied embedding counts once, as `shared`."""

    def names(self, key):
        """Our name of a weight -> the names in the file that hold it."""
        return [key.replace("encoder.embed_tokens", "shared")]

    def split(self, key, tensor):
        """Our weight -> the file's, in the order of `names`."""
        return [tensor]

    def join(self, key, tensors):
        """The inverse of `split`."""
        return tensors[0]

    def laid_out(self, weights):
        """(our name, tensor) pairs -> {the file's name: tensor}."""
        return {name: part for key, tensor in weights for name, part in zip(self.names(key), self.split(key, tensor))}


class DiffusersLayout(Layout):
    """`size`: blocks of the MM-DiT, levels of the autoencoder."""

    MMDIT = {"x_embedder": "pos_embed", "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
             "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1", "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
             "joint_blocks": "transformer_blocks", "final_layer.adaLN_modulation.1": "norm_out.linear", "final_layer.linear": "proj_out",
             "x_block.adaLN_modulation.1": "norm1.linear", "context_block.adaLN_modulation.1": "norm1_context.linear",
             "x_block.mlp.fc1": "ff.net.0.proj", "x_block.mlp.fc2": "ff.net.2", "context_block.mlp.fc1": "ff_context.net.0.proj", "context_block.mlp.fc2": "ff_context.net.2",
             "x_block.attn.ln_": "attn.norm_", "x_block.attn2.ln_": "attn2.norm_", "context_block.attn.ln_": "attn.norm_added_",
             "x_block.attn.proj": "attn.to_out.0", "x_block.attn2.proj": "attn2.to_out.0", "context_block.attn.proj": "attn.to_add_out",
             "x_block.attn.qkv": "attn.to_{}", "x_block.attn2.qkv": "attn2.to_{}", "context_block.attn.qkv": "attn.add_{}_proj"}
    VAE = {"norm_out": "conv_norm_out", "nin_shortcut": "conv_shortcut", ".block.": ".resnets.", "down.": "down_blocks.", "up.": "up_blocks.",
           "downsample.": "downsamplers.0.", "upsample.": "upsamplers.0.", "mid.block_1": "mid_block.resnets.0", "mid.block_2": "mid_block.resnets.1",
           "mid.attn_1.norm": "mid_block.attentions.0.group_norm", "mid.attn_1.proj_out": "mid_block.attentions.0.to_out.0", "mid.attn_1.": "mid_block.attentions.0.to_"}

    def __init__(self, part, size):
        self.part, self.size = part, size

    def names(self, key):
        if self.part == "vae":
            return [replaced(re.sub(r"up\.(\d+)", lambda match: f"up.{self.size - 1 - int(match[1])}", key), self.VAE)]
        if self.part == "mmdit":
            name = "pos_embed.pos_embed" if key == "pos_embed" else replaced(key, self.MMDIT)
            return [name.format(which) for which in "qkv"] if "{}" in name else [name]
        return super().names(key)

    def swapped(self, key):
        """Where diffusers has scale before shift."""
        return key.startswith(("final_layer.adaLN_modulation", f"joint_blocks.{self.size - 1}.context_block.adaLN_modulation"))

    def linear(self, key):
        """Where diffusers has a linear layer for a 1 x 1 convolution."""
        return self.part == "vae" and re.search(r"attn_1\.(q|k|v|proj_out)\.weight", key)

    def split(self, key, tensor):
        tensor = torch.cat(tensor.chunk(2)[::-1]) if self.swapped(key) else tensor.flatten(1) if self.linear(key) else tensor
        return tensor.chunk(len(self.names(key)))

    def join(self, key, tensors):
        tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        return torch.cat(tensor.chunk(2)[::-1]) if self.swapped(key) else tensor[..., None, None] if self.linear(key) else tensor


def replaced(text, table):
    for old, new in table.items():
        text = text.replace(old, new)
    return text


def count(template, names):
    """How many of template.format(0), template.format(1), ... are in `names`, up to the first that is not."""
    return next(i for i in itertools.count() if template.format(i) not in names)


# ---------------------------------------------------------------------------------------------------------------
# The architecture, read off the weights of a `checkpoint.Part`: a constructor's arguments

def mmdit_config(part):
    width, channels, patch, _ = part.shape("x_embedder.proj.weight", 4)
    depth = part.count("joint_blocks.{}.x_block.attn.proj.weight")
    if width != HEAD_DIM * depth:
        raise ValueError(f"{part.source}: the MM-DiT is {width} wide and {depth} blocks deep, not {HEAD_DIM} times as wide as deep")
    out = part.shape("final_layer.linear.weight", 2)[0] // patch ** 2
    return {"depth": depth, "in_channels": channels, "out_channels": None if out == channels else out, "patch_size": patch,
            "context_dim": part.shape("context_embedder.weight", 2)[1], "pooled_dim": part.shape("y_embedder.mlp.0.weight", 2)[1],
            "pos_embed_max_size": math.isqrt(part.shape("pos_embed", 3)[1]), "qk_norm": "joint_blocks.0.x_block.attn.ln_k.weight" in part,
            "dual_attention_blocks": [i for i in range(depth) if f"joint_blocks.{i}.x_block.attn2.proj.weight" in part]}


def vae_config(part):
    channels = part.shape("encoder.conv_in.weight", 4)[0]
    first = [f"encoder.down.{i}.block.0.conv1.weight" for i in range(part.count("encoder.down.{}.block.0.conv1.weight"))]
    return {"latent_channels": part.shape("decoder.conv_in.weight", 4)[1], "channels": channels, "multipliers": [part.shape(key, 4)[0] // channels for key in first],
            "blocks": part.count("encoder.down.0.block.{}.conv1.weight"), "attention": "encoder.mid.attn_1.q.weight" in part}


def clip_config(part):
    vocab, width = part.shape("text_model.embeddings.token_embedding.weight", 2)
    return {"vocab_size": vocab, "length": part.shape("text_model.embeddings.position_embedding.weight", 2)[0], "width": width,
            "layers": part.count("text_model.encoder.layers.{}.mlp.fc1.weight"), "heads": max(width // 64, 1),
            "mlp": part.shape("text_model.encoder.layers.0.mlp.fc1.weight", 2)[0], "activation": "quick_gelu" if part.name == "clip_l" else "gelu",
            "projection": part.shape("text_projection.weight", 2)[0], "eos": vocab - 1}


def t5_config(part):
    vocab, width = part.shape("shared.weight", 2)
    buckets, heads = part.shape("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 2)
    return {"vocab_size": vocab, "width": width, "layers": part.count("encoder.block.{}.layer.0.SelfAttention.q.weight"), "heads": heads,
            "head_dim": part.shape("encoder.block.0.layer.0.SelfAttention.q.weight", 2)[0] // heads,
            "mlp": part.shape("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 2)[0], "buckets": buckets}


CONFIGS = {"mmdit": mmdit_config, "vae": vae_config, "clip_l": clip_config, "clip_g": clip_config, "t5": t5_config}
CLIP_TOLD = {"heads": "num_attention_heads", "activation": "hidden_act"}
TOLD = {"mmdit": {}, "vae": {"groups": "norm_num_groups", "scale": "scaling_factor", "shift": "shift_factor"}, "clip_l": CLIP_TOLD, "clip_g": CLIP_TOLD,
        "t5": {"max_distance": "relative_attention_max_distance"}}      # what weights cannot tell, and the name in diffusers' JSON


def diffusers_config(part, bundle_config):
    """The JSON beside a part in a diffusers folder."""
    c = part.arguments
    if part.name == "mmdit":
        return {"_class_name": "SD3Transformer2DModel", "sample_size": bundle_config["resolution"] // 8, "patch_size": c["patch_size"], "in_channels": c["in_channels"],
                "out_channels": c["out_channels"] or c["in_channels"], "num_layers": c["depth"], "num_attention_heads": c["depth"], "attention_head_dim": HEAD_DIM,
                "joint_attention_dim": c["context_dim"], "caption_projection_dim": HEAD_DIM * c["depth"], "pooled_projection_dim": c["pooled_dim"],
                "pos_embed_max_size": c["pos_embed_max_size"], "dual_attention_layers": c["dual_attention_blocks"], "qk_norm": "rms_norm" if c["qk_norm"] else None}
    if part.name == "vae":
        levels = len(c["multipliers"])
        return {"_class_name": "AutoencoderKL", "block_out_channels": [c["channels"] * m for m in c["multipliers"]], "latent_channels": c["latent_channels"],
                "layers_per_block": c["blocks"], "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
                "use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": c["attention"], "norm_num_groups": c["groups"],
                "scaling_factor": c["scale"], "shift_factor": c["shift"], "sample_size": bundle_config["resolution"], "in_channels": 3, "out_channels": 3, "act_fn": "silu"}
    if part.name == "t5":
        return {"architectures": ["T5EncoderModel"], "model_type": "t5", "vocab_size": c["vocab_size"], "d_model": c["width"], "num_layers": c["layers"], "num_heads": c["heads"],
                "d_kv": c["head_dim"], "d_ff": c["mlp"], "relative_attention_num_buckets": c["buckets"], "relative_attention_max_distance": c["max_distance"],
                "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6, "tie_word_embeddings": False, "eos_token_id": 1, "pad_token_id": 0}
    return {"architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model", "vocab_size": c["vocab_size"], "max_position_embeddings": c["length"],
            "hidden_size": c["width"], "num_hidden_layers": c["layers"], "num_attention_heads": c["heads"], "intermediate_size": c["mlp"], "hidden_act": c["activation"],
            "projection_dim": c["projection"], "bos_token_id": c["eos"] - 1, "eos_token_id": c["eos"], "pad_token_id": 0 if part.name == "clip_g" else c["eos"]}


def arguments(cls, config):
    """A constructor's arguments, the defaults included, as JSON has them."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}
    return {name: list(value) if isinstance(value, (tuple, range)) else value for name, value in (defaults | config).items()}


# ---------------------------------------------------------------------------------------------------------------
# Sampling

# What sampling from released weights starts with (Stability's and diffusers' settings); bundles of ours record their own.
RELEASED = {"clip_length": 77, "t5_length": 256, "resolution": 1024, "formulation": "rf/lognorm(0.00,1.00)", "shift": 3.0, "sampler": "euler",
            "schedule": "released", "unconditional": "empty prompt"}
PRESETS = {"sd3-medium": {"steps": 28, "cfg": 5.0}, "sd3.5-medium": {"steps": 40, "cfg": 4.5}, "sd3.5-large": {"steps": 28, "cfg": 4.5}}


def preset(mmdit):
    """Sampling defaults of the released model that an MM-DiT's architecture is."""
    return RELEASED | PRESETS["sd3.5-medium" if mmdit["dual_attention_blocks"] else "sd3.5-large" if mmdit["qk_norm"] else "sd3-medium"]
