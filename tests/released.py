"""A tiny SD3 of random weights as diffusers builds and saves it, for the tests of what is released."""

import json

import diffusers
import torch
import transformers
from tokenizers import Tokenizer

from text_encoders import BPETokenizer, UnigramTokenizer

CAPTIONS = ["a red circle above a blue square", "Two green stars, left of the big triangle!", "it's a sign that says stop", "we'll see 12 crosses; they've gone"] * 50
VARIANTS = {"sd3-medium": {"qk_norm": None}, "sd3.5-medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}, "sd3.5-large": {"qk_norm": "rms_norm"}}


def clip(width, activation, vocab, pad):
    return transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=2 * width, projection_dim=width, num_hidden_layers=2, num_attention_heads=width // 64,
        max_position_embeddings=77, hidden_act=activation, bos_token_id=vocab - 2, eos_token_id=vocab - 1, pad_token_id=pad))


def pipeline(variant="sd3.5-medium", seed=0):
    """diffusers' pipeline with every kind of part, each weight random."""
    torch.manual_seed(seed)
    bpe, unigram = BPETokenizer.train(CAPTIONS, min_share=0.1), UnigramTokenizer.train(CAPTIONS, min_share=0.1)
    vocab = len(bpe.vocab)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=16, out_channels=16, num_layers=2, num_attention_heads=2, joint_attention_dim=256, caption_projection_dim=128, pooled_projection_dim=192,
        pos_embed_max_size=16, **VARIANTS[variant])
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 64, 64), latent_channels=16, layers_per_block=1, down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609)
    t5 = transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=len(unigram.pieces), d_model=256, d_kv=16, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu", tie_word_embeddings=False))
    parts = {"transformer": transformer, "vae": vae, "text_encoder": clip(64, "quick_gelu", vocab, vocab - 1), "text_encoder_2": clip(128, "gelu", vocab, 0), "text_encoder_3": t5}
    for name, part in parts.items():
        for p in part.eval().parameters():
            with torch.no_grad():
                p.add_((0.02 if name == "vae" else 0.1) * torch.randn_like(p))
    merges, start, end = list(bpe.merges), *bpe.SPECIAL
    clip_l, clip_g = (transformers.CLIPTokenizer(vocab=bpe.vocab, merges=merges, pad_token=pad, bos_token=start, eos_token=end, unk_token=end, model_max_length=77) for pad in (end, "!"))
    t5_tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(unigram.config)), eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    pipe = diffusers.StableDiffusion3Pipeline(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), tokenizer=clip_l, tokenizer_2=clip_g, tokenizer_3=t5_tokenizer, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe
