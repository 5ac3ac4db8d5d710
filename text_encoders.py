"""The frozen text encoders of Stable Diffusion 3 (Sec. 4, Fig. 2a, App. B.2): CLIP-L, CLIP-G, T5, and the ensemble that makes c_vec and c_ctxt of them.

Read top-down: CLIP's text tower and loss, T5's encoder and pre-training, the two tokenizers, the ensemble. Modules are named as in the released checkpoints,
which load with `strict=True`; sizes default to CLIP-L's and T5 v1.1-XXL's. Beyond the paper: both tokenizers can be trained on captions, for the miniature.

Axes: B batch, L text tokens, M tokens of a decoder's target, D width, H heads.
"""

import base64
import itertools
import json
import math
import re
import string
import unicodedata
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from config import read_json
from mmdit import Linear, gelu


def split_heads(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)                       # (B, L, D) -> (B, H, L, D/H)


def merge_heads(x):
    return x.transpose(1, 2).flatten(2)                                       # (B, H, L, D/H) -> (B, L, D)


def attention(q, k, v, bias=None):
    """The formula itself, O(L^2) memory: for texts, short as they are, training is twice as fast as with torch's kernel (bf16, 2 cores)."""
    scores = q @ k.mT                                                         # (B, H, L, M)
    return (scores if bias is None else scores + bias).softmax(dim=-1) @ v


# ---------------------------------------------------------------- CLIP (Radford et al. 2021)

ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}      # CLIP-L, CLIP-G


class CLIPAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        if width % heads:
            raise ValueError(f"{width} channels do not divide into {heads} heads")
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(width, width) for _ in range(4))

    def forward(self, x, causal):
        q, k, v = (split_heads(proj(x), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))      # (B, H, L, D/H)
        bias = x.new_full((x.shape[1], x.shape[1]), -math.inf).triu(1) if causal else None                    # (L, L)
        return self.out_proj(merge_heads(attention(q * q.shape[-1]**-0.5, k, v, bias)))                       # (B, L, D)


class CLIPLayer(nn.Module):
    """One layer of either tower: causal for text, not for images."""

    def __init__(self, width, heads, mlp, activation, causal=True):
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn = CLIPAttention(width, heads)
        self.mlp = nn.ModuleDict({"fc1": Linear(width, mlp), "fc2": Linear(mlp, width)})
        self.activation, self.causal = ACTIVATIONS[activation], causal

    def forward(self, x):                                                     # (B, L, D)
        x = x + self.self_attn(self.layer_norm1(x), self.causal)
        return x + self.mlp.fc2(self.activation(self.mlp.fc1(self.layer_norm2(x))))


class CLIPTextEncoder(nn.Module):
    """Tokens (B, L), L <= length -> the penultimate layer's states without final LayerNorm (B, L, width), and the pooled vector (B, projection).

    CLIP-L is the default; CLIP-G: width=1280, layers=32, heads=20, mlp=5120, activation="gelu", projection=1280."""

    def __init__(self, vocab_size=49408, length=77, width=768, layers=12, heads=12, mlp=3072, activation="quick_gelu", projection=768, eos=49407):
        super().__init__()
        self.eos = eos
        self.text_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({"token_embedding": nn.Embedding(vocab_size, width), "position_embedding": nn.Embedding(length, width)}),
            "encoder": nn.ModuleDict({"layers": nn.ModuleList(CLIPLayer(width, heads, mlp, activation) for _ in range(layers))}),
            "final_layer_norm": nn.LayerNorm(width)})
        self.text_projection = Linear(width, projection, bias=False)
        self.init_weights(width, layers)

    def init_weights(self, width, layers):
        """As CLIP's own code does it."""
        std = {"token_embedding": 0.02, "position_embedding": 0.01, "q_proj": width**-0.5, "k_proj": width**-0.5, "v_proj": width**-0.5,
               "out_proj": (2 * width * layers)**-0.5, "fc1": (2 * width)**-0.5, "fc2": (2 * width * layers)**-0.5, "text_projection": width**-0.5}
        for name, module in self.named_modules():
            if (leaf := name.split(".")[-1]) in std:
                nn.init.normal_(module.weight, std=std[leaf])
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens):
        embeddings, layers = self.text_model.embeddings, self.text_model.encoder.layers
        x = embeddings.token_embedding(tokens) + embeddings.position_embedding.weight[:tokens.shape[1]]      # (B, L, D)
        for layer in layers[:-1]:
            x = layer(x)
        last = self.text_model.final_layer_norm(layers[-1](x))                # (B, L, D)
        first_eos = (tokens == self.eos).int().argmax(dim=1)                  # CLIP-L pads with EOS: only the first one ends the prompt
        return x, self.text_projection(last[torch.arange(len(last)), first_eos])


def contrastive_loss(image_features, text_features, logit_scale):
    """CLIP's symmetric cross-entropy: of the B images and B texts, (B, D) each, find every one's partner. logit_scale is the log of 1 / temperature."""
    image_features, text_features = F.normalize(image_features, dim=1), F.normalize(text_features, dim=1)
    logits = logit_scale.exp() * image_features @ text_features.T             # (B, B)
    partner = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, partner) + F.cross_entropy(logits.T, partner)) / 2


# ---------------------------------------------------------------- T5 v1.1 (Raffel et al. 2020)

class T5Norm(nn.Module):
    """RMS norm, in float32 whatever x is."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=1e-6).to(x.dtype)


class T5Attention(nn.Module):
    """Self-attention, or cross-attention to `context`. No 1/sqrt(d): the initialisation of q makes up for it."""

    def __init__(self, width, heads, head_dim):
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.q, self.k, self.v = (Linear(width, inner, bias=False) for _ in range(3))
        self.o = Linear(inner, width, bias=False)
        for linear, std in ((self.q, (width * head_dim)**-0.5), (self.k, width**-0.5), (self.v, width**-0.5), (self.o, inner**-0.5)):
            nn.init.normal_(linear.weight, std=std)

    def forward(self, x, context=None, bias=None):                            # (B, L, D), (B, M, D), (H, L, M)
        context = x if context is None else context
        q, k, v = (split_heads(y, self.heads) for y in (self.q(x), self.k(context), self.v(context)))
        return self.o(merge_heads(attention(q, k, v, bias)))


class T5MLP(nn.Module):
    def __init__(self, width, mlp):
        super().__init__()
        self.wi_0, self.wi_1, self.wo = (Linear(*sides, bias=False) for sides in ((width, mlp), (width, mlp), (mlp, width)))
        for linear in self.children():
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def forward(self, x):
        return self.wo(gelu(self.wi_0, x) * self.wi_1(x))


class T5Block(nn.Module):
    """An encoder's block, or with `cross` a decoder's."""

    def __init__(self, width, heads, head_dim, mlp, cross):
        super().__init__()
        parts = [("SelfAttention", T5Attention(width, heads, head_dim))]
        parts += [("EncDecAttention", T5Attention(width, heads, head_dim))] * cross
        parts += [("DenseReluDense", T5MLP(width, mlp))]
        self.layer = nn.ModuleList(nn.ModuleDict({name: part, "layer_norm": T5Norm(width)}) for name, part in parts)

    def forward(self, x, bias, context):                                      # (B, L, D), (H, L, L), (B, M, D) or None
        attention, *cross, mlp = self.layer
        x = x + attention.SelfAttention(attention.layer_norm(x), bias=bias)
        for part in cross:
            x = x + part.EncDecAttention(part.layer_norm(x), context)
        return x + mlp.DenseReluDense(mlp.layer_norm(x))


def relative_buckets(length, buckets, max_distance, causal):
    """(L, L): the bucket of every (query, key) by their distance: one each for small ones, logarithmic up to max_distance; half are for keys ahead unless causal."""
    distance = torch.arange(length)[:, None] - torch.arange(length)           # > 0: the key is behind
    buckets = buckets if causal else buckets // 2
    ahead = 0 if causal else buckets * (distance < 0)
    distance = distance.clamp(min=0) if causal else distance.abs()
    exact = buckets // 2
    far = exact + (torch.log(distance.float() / exact) / math.log(max_distance / exact) * (buckets - exact)).long()
    return ahead + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))


class T5Stack(nn.Module):
    """The encoder; or with `decoder` the decoder, which sees no token ahead and attends to the encoder's states `context`."""

    def __init__(self, embed_tokens, layers, heads, head_dim, mlp, buckets, max_distance, decoder=False):
        super().__init__()
        self.buckets, self.max_distance, self.decoder, width = buckets, max_distance, decoder, embed_tokens.embedding_dim
        self.embed_tokens = embed_tokens
        self.block = nn.ModuleList(T5Block(width, heads, head_dim, mlp, cross=decoder) for _ in range(layers))
        self.block[0].layer[0].SelfAttention.relative_attention_bias = nn.Embedding(buckets, heads)      # one table serves every block
        nn.init.normal_(self.block[0].layer[0].SelfAttention.relative_attention_bias.weight, std=2.0)     # with T5's width^-0.5 a small encoder stays a bag of words
        self.final_layer_norm = T5Norm(width)

    def forward(self, tokens, context=None):
        L = tokens.shape[1]
        table = self.block[0].layer[0].SelfAttention.relative_attention_bias
        bias = table(relative_buckets(L, self.buckets, self.max_distance, self.decoder).to(tokens.device)).permute(2, 0, 1)      # (H, L, L)
        if self.decoder:
            bias = bias.masked_fill(torch.ones(L, L, dtype=torch.bool, device=tokens.device).triu(1), -math.inf)
        x = self.embed_tokens(tokens)                                         # (B, L, D)
        for block in self.block:
            x = block(x, bias, context)
        return self.final_layer_norm(x)


class T5Encoder(nn.Module):
    """Tokens (B, L) -> states (B, L, width). Padding is not masked, as in the released SD3. In half precision use bfloat16: XXL overflows float16."""

    def __init__(self, vocab_size=32128, width=4096, layers=24, heads=64, head_dim=64, mlp=10240, buckets=32, max_distance=128):
        super().__init__()
        self.sizes = {"heads": heads, "head_dim": head_dim, "mlp": mlp, "buckets": buckets, "max_distance": max_distance}
        self.shared = nn.Embedding(vocab_size, width)
        self.encoder = T5Stack(self.shared, layers, **self.sizes)

    def forward(self, tokens):
        return self.encoder(tokens)


class T5Denoiser(nn.Module):
    """The given encoder with a decoder of `layers` layers, to pre-train it: the decoder writes what `span_corruption` took out, or another text of the same. The decoder is thrown away after."""

    def __init__(self, encoder, layers):
        super().__init__()
        self.shared, self.encoder = encoder.shared, encoder.encoder
        self.decoder = T5Stack(self.shared, layers, **encoder.sizes, decoder=True)
        self.lm_head = Linear(self.shared.embedding_dim, self.shared.num_embeddings, bias=False)
        nn.init.normal_(self.lm_head.weight, std=self.shared.embedding_dim**-0.5)

    def forward(self, tokens, decoder_tokens):                                # (B, L), (B, M)
        return self.lm_head(self.decoder(decoder_tokens, self.encoder(tokens)))      # (B, M, vocabulary)

    def loss(self, tokens, targets, pad=0):
        """Cross-entropy of each target token, given the ones before it; padding counts for nothing. The decoder starts from `pad`."""
        logits = self(tokens, F.pad(targets[:, :-1], (1, 0), value=pad))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=pad)


def span_corruption(tokens, sentinels, rate=0.15, mean_span=3.0, pad=0, eos=1, generator=None):
    """Hides about `rate` of each row's tokens, in spans of about `mean_span` (Raffel et al. 2020, Sec. 3.1.4): (B, L) -> corrupted (B, L'), targets (B, M), padded.

    A span is replaced by the next sentinel; the target lists each sentinel with what it stands for, closed by one sentinel more: "a <0> circle", "<0> red <1>".
    Spans are rolled to a random place, since in captions as short as ours T5's own rule, which begins with an intact span, would only ever hide the end."""
    def parts(total, count):                                                  # `total` cut at random into `count` positive lengths
        cuts = sorted(1 + c for c in torch.randperm(total - 1, generator=generator)[:count - 1].tolist())
        return [b - a for a, b in itertools.pairwise([0, *cuts, total])]

    corrupted, targets = [], []
    for row in tokens.tolist():
        row, source, target, used = [token for token in row if token not in (pad, eos)], [], [], iter(sentinels)
        hidden = min(max(round(len(row) * rate), 1), len(row) - 1)
        mask = [False] * len(row)
        if hidden > 0:
            spans = min(max(round(hidden / mean_span), 1), len(row) - hidden)
            if spans + 2 > len(sentinels):                                    # rolling may cut one span in two, and one sentinel closes
                raise ValueError(f"{spans} spans in a row of {len(row)} tokens need {spans + 2} sentinels, the vocabulary has {len(sentinels)}")
            lengths = zip(parts(len(row) - hidden, spans), parts(hidden, spans))
            mask = [bit for kept, gone in lengths for bit in [False] * kept + [True] * gone]
            shift = int(torch.randint(len(row), (), generator=generator))
            mask = mask[shift:] + mask[:shift]
        for gone, span in itertools.groupby(zip(row, mask), key=lambda pair: pair[1]):
            span = [token for token, _ in span]
            if gone:
                span = [next(used), *span]
                target += span
            source += span[:1] if gone else span
        corrupted.append(torch.tensor([*source, eos]))
        targets.append(torch.tensor([*target, next(used), eos]))
    return tuple(nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad).to(tokens.device) for rows in (corrupted, targets))


# ---------------------------------------------------------------- tokenizers

def frequent(rows, min_share):
    """{word: in how many rows} of the words that at least `min_share` of the rows (lists of words) contain, the most frequent first."""
    rows = list(map(set, rows))
    counts = Counter(itertools.chain(*rows))
    return {word: count for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count >= min_share * len(rows)}


class Tokenizer:
    """What both have in common: B strings -> (B, length) ids: `begin`, the text cut to what fits, `end`, then `pad`. `special` are the tokens that a text may name, {"</s>": 1}."""

    def __init__(self, length, begin, end, pad, special):
        if length < 3:
            raise ValueError(f"a length of {length} tokens leaves no room for a text, the least is 3")
        self.length, self.begin, self.end, self.pad, self.special, self.cache = length, begin, end, pad, special, {}

    def __call__(self, texts):
        room = self.length - len(self.begin) - 1
        rows = [[*self.begin, *self.ids(text)[:room], self.end] for text in texts]
        return torch.tensor([row + [self.pad] * (self.length - len(row)) for row in rows])

    def ids(self, text):
        ids = []
        for part in re.split("(" + "|".join(map(re.escape, self.special)) + ")", text):
            ids += [self.special[part]] if part in self.special else itertools.chain(*map(self.cached_ids, self.words(part)))
        return ids

    def cached_ids(self, word):
        if word not in self.cache:
            self.cache[word] = self.word_ids(word)
        return self.cache[word]


def byte_characters():
    """{byte: a visible character}, in the order of CLIP's vocabulary: the printable bytes as they are, then the others."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


class BPETokenizer(Tokenizer):
    """CLIP's byte-pair encoding: <|startoftext|>, the tokens, <|endoftext|>, then `pad`: an id, by default the end's as in CLIP-L; CLIP-G has 0."""

    SPECIAL = "<|startoftext|>", "<|endoftext|>"
    SPACES = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")      # Unicode's; re's \s has \x1c-\x1f as well
    WORDS = re.compile("'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^ a-z0-9]+")      # CLIP's, over `kinds` of characters: letters, one digit, anything else
    BYTES = byte_characters()

    def __init__(self, vocab, merges, length=77, pad=None):
        unknown = [entry for entry in self.entries(merges) if entry not in vocab]
        if unknown:
            raise ValueError(f"the vocabulary of {len(vocab)} entries lacks {len(unknown)} that the {len(merges)} merges need, the first is {unknown[0]!r}")
        start, end = (vocab[token] for token in self.SPECIAL)
        super().__init__(length, [start], end, end if pad is None else pad, {token: vocab[token] for token in self.SPECIAL})
        self.vocab, self.merges, self.rank = vocab, merges, {pair: i for i, pair in enumerate(merges)}

    @classmethod
    def entries(cls, merges):
        """The vocabulary in CLIP's order: bytes, bytes that end a word, merges, special tokens."""
        letters = list(cls.BYTES.values())
        return [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), *cls.SPECIAL]

    @classmethod
    def from_folder(cls, folder, length=77, pad=None):
        folder = Path(folder)
        if not (folder / "merges.txt").exists() and (folder / "tokenizer.json").exists():      # as newer versions of transformers save it
            try:
                model = read_json(folder / "tokenizer.json")["model"]
                vocab, merges = model["vocab"], [tuple(pair.split() if isinstance(pair, str) else pair) for pair in model["merges"]]
            except (KeyError, TypeError):
                raise ValueError(f"{folder}/tokenizer.json is not that of a BPE tokenizer, which CLIP's is") from None
            return cls(vocab, merges, length, pad)
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        vocab = read_json(folder / "vocab.json")
        if not isinstance(vocab, dict):
            raise ValueError(f"{folder}/vocab.json is no vocabulary")
        return cls(vocab, merges, length, pad)

    def save(self, folder):
        (Path(folder) / "vocab.json").write_text(json.dumps(self.vocab, ensure_ascii=False), encoding="utf-8")
        (Path(folder) / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, self.merges)]) + "\n", encoding="utf-8")

    @classmethod
    def train(cls, texts, length=77, min_share=2e-3):
        """Merges the words that at least `min_share` of the texts contain, up to CLIP's number of merges; rarer words stay spelled letter by letter.

        A merge is always at a word's end, where CLIP's are anywhere: so the merges of "red" touch no rare word but those that end like it, as "bed" does."""
        words = {cls.symbols(word): count for word, count in frequent(map(cls.words, texts), min_share).items()}
        merges = []
        while len(merges) < 48894:
            pairs = Counter()
            for word, count in words.items():
                if len(word) > 1:
                    pairs[word[-2:]] += count
            if not pairs:
                break
            pair = max(sorted(pairs), key=pairs.get)
            merges.append(pair)
            words = {cls.merge(word, pair): count for word, count in words.items()}
        return cls({entry: i for i, entry in enumerate(cls.entries(merges))}, merges, length)

    @classmethod
    def words(cls, text):
        """Cleaned, lower-cased and cut into words. Lower case goes by the character: a final sigma is as any other."""
        text = "".join(c.lower() for c in cls.SPACES.sub(" ", unicodedata.normalize("NFC", text)))
        kinds = "".join(c if c.isascii() else {"L": "a", "N": "0"}.get(unicodedata.category(c)[0], "?") for c in text)
        return [text[match.start():match.end()] for match in cls.WORDS.finditer(kinds)]

    @classmethod
    def symbols(cls, word):
        """"red" -> ("r", "e", "d</w>")"""
        *head, last = (cls.BYTES[byte] for byte in word.encode("utf-8", "replace"))
        return *head, last + "</w>"

    @staticmethod
    def merge(symbols, pair):
        merged = []
        for symbol in symbols:
            if merged and (merged[-1], symbol) == pair:
                merged[-1] += symbol
            else:
                merged.append(symbol)
        return tuple(merged)

    def word_ids(self, word):
        symbols = self.symbols(word)
        while pairs := set(itertools.pairwise(symbols)) & self.rank.keys():
            symbols = self.merge(symbols, min(pairs, key=self.rank.get))
        return [self.vocab[symbol] for symbol in symbols]


NMT = dict.fromkeys([*range(1, 9), 11, *range(14, 32), 127, 143, 159]) | dict.fromkeys(
    [9, 10, 12, 13, 0x1680, *range(0x200b, 0x2010), 0x2028, 0x2029, 0x2581, 0xfeff, 0xfffd], " ")      # dropped; a space


def nmt_nfkc(text):
    """The rules that T5's table of characters was made by."""
    return unicodedata.normalize("NFKC", text.translate(NMT))


class CharacterTable:
    """T5's table itself, `precompiled_charsmap` in base64: a trie of UTF-8 bytes (a double array of 32-bit units), then the strings that its keys become.

    Applied as the tokenizers library does, which in 1 % of strings of random Unicode differs from `nmt_nfkc`: a character with its combining marks of fewer than
    6 bytes together becomes what the shortest key in front of it does (and the rest is lost); of longer ones each character goes by itself."""

    BEFORE = re.compile("[\u0600-\u0605\u06dd\u070f\u0890\u0891\u08e2\u0d4e\U000110bd\U000110cd\U000111c2\U000111c3\U0001193f\U00011941\U00011a3a\U00011a84-\U00011a89\U00011d46\U00011f02]")
    AFTER = re.compile("[\u200c\u200d\u0e33\u0eb3\uff9e\uff9f]")            # beside all marks but these of Myanmar's and Tai Tham's:
    APART = re.compile("[\u102b\u102c\u1038\u1062-\u1064\u1067-\u106d\u1083\u1087-\u108c\u108f\u109a-\u109c\u1a61\u1a63\u1a64\uaa7b\uaa7d]")

    def __init__(self, encoded):
        blob = base64.b64decode(encoded)
        end = 4 + int.from_bytes(blob[:4], "little")
        self.units, self.strings = array("I", blob[4:end]), blob[end:]
        if not self.units or not self.strings:
            raise ValueError(f"tokenizer.json: its precompiled_charsmap of {len(blob)} bytes is damaged")

    def find(self, chunk):
        """What the shortest key that the chunk starts with becomes; None without any."""
        place = self.offset(self.units[0])
        for byte in chunk.encode("utf-8", "surrogatepass"):
            place ^= byte
            unit = self.units[place] if place < len(self.units) else 0
            if unit & 0x800000ff != byte:                                     # no key goes on like this
                return None
            place ^= self.offset(unit)
            if unit >> 8 & 1:                                                 # a key ends here; its value is the next unit
                start = self.units[place] & 0x7fffffff
                return self.strings[start:self.strings.index(0, start)].decode()
        return None

    @staticmethod
    def offset(unit):
        return unit >> 10 << ((unit & 1 << 9) >> 6)

    @classmethod
    def joined(cls, a, b):
        """Whether two neighbouring characters are one cluster (Unicode Annex 29, as far as it matters to clusters of fewer than 6 bytes)."""
        if any(unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") and not cls.BEFORE.match(c) and not cls.AFTER.match(c) for c in (a, b)):
            return False
        return bool(cls.BEFORE.match(a) or cls.AFTER.match(b) or unicodedata.category(b)[0] == "M" and not cls.APART.match(b))

    @classmethod
    def clusters(cls, text):
        """The text cut into characters with the marks on them."""
        cuts = [i for i in range(len(text)) if i == 0 or not cls.joined(text[i - 1], text[i])]
        return [text[start:end] for start, end in itertools.pairwise([*cuts, len(text)])]

    def __call__(self, text):
        out = []
        for cluster in self.clusters(text):
            whole = self.find(cluster) if len(cluster.encode("utf-8", "surrogatepass")) < 6 else None
            out += [whole] if whole is not None else [c if (new := self.find(c)) is None else new for c in cluster]
        return "".join(out)


class UnigramTokenizer(Tokenizer):
    """T5's unigram language model (Kudo 2018), the likeliest segmentation of each word: the tokens, </s>, then <pad>.

    `config` is the content of a Hugging Face `tokenizer.json`. `sentinels` are the ids of <extra_id_0>, <extra_id_1>, ..."""

    def __init__(self, config, length=77):
        model = config.get("model", {})
        if model.get("type") != "Unigram":
            raise ValueError(f"tokenizer.json holds a model of type {model.get('type')}, T5's is Unigram")
        self.pieces = {piece: (i, score) for i, (piece, score) in enumerate(model["vocab"])}
        special = {token["content"]: token["id"] for token in config["added_tokens"]}
        super().__init__(length, [], special["</s>"], special["<pad>"], special)
        normalizer = config.get("normalizer") or {}
        tables = [step["precompiled_charsmap"] for step in normalizer.get("normalizers", [normalizer]) if step.get("type") == "Precompiled"]
        self.normalize = CharacterTable(tables[0]) if tables else nmt_nfkc
        self.config, self.unk = config, model["unk_id"]
        self.unk_score = min(score for _, score in model["vocab"]) - 10       # sentencepiece's penalty
        self.longest = max(map(len, self.pieces))
        self.sentinels = sorted((i for token, i in special.items() if token.startswith("<extra_id_")), reverse=True)

    @classmethod
    def from_folder(cls, folder, length=77):
        try:
            return cls(read_json(Path(folder) / "tokenizer.json"), length)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder}/tokenizer.json is no tokenizer of T5's: {error!r}") from None

    def save(self, folder):
        (Path(folder) / "tokenizer.json").write_text(json.dumps(self.config, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def train(cls, texts, length=77, min_share=2e-3, sentinels=16):
        """A piece for each word that at least `min_share` of the texts contain, one for each character: so rarer words come out letter by letter (after a frequent one
        that they may begin with: "▁a" in "axe")."""
        rows = [[word.rstrip(string.punctuation) for word in cls.cut(nmt_nfkc(text))] for text in texts]
        counts = {word: count for word, count in frequent(rows, min_share).items() if len(word) > 1}
        total = sum(counts.values())
        words = [[word, math.log(count / total)] for word, count in counts.items()]
        letters = {"▁", *string.ascii_letters, *string.digits, *string.punctuation, *"".join(itertools.chain(*rows))}
        rare = min((score for _, score in words), default=0) - 1              # a letter costs more than any word
        first, last = ["<pad>", "</s>", "<unk>"], [f"<extra_id_{i}>" for i in reversed(range(sentinels))]
        vocab = [*([token, 0.0] for token in first), *words, *([letter, rare] for letter in sorted(letters)), *([token, 0.0] for token in last)]
        space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
        return cls({
            "version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
                             for i, (token, _) in enumerate(vocab) if token in first + last],
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Nmt"}, {"type": "NFKC"}]},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, space]},
            "post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
                               "pair": [], "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}},
            "decoder": space, "model": {"type": "Unigram", "unk_id": 2, "vocab": vocab, "byte_fallback": False}}, length)

    @staticmethod
    def cut(text):
        return ["▁" + word for word in text.split()]

    def words(self, text):
        """Normalised, cut at whitespace, "▁" before each word."""
        return self.cut(self.normalize(text))

    def word_ids(self, word):
        """Viterbi: best[i] = (score, start of the last piece, its id) of the likeliest segmentation of word[:i]."""
        best = [(0.0, 0, None)] + [(-math.inf, 0, None)] * len(word)
        for start in range(len(word)):
            for end in range(start + 1, min(start + self.longest, len(word)) + 1):
                unknown = (self.unk, self.unk_score) if end == start + 1 else (None, -math.inf)
                i, score = self.pieces.get(word[start:end], unknown)
                if best[start][0] + score > best[end][0]:
                    best[end] = best[start][0] + score, start, i
        ids, end = [], len(word)
        while end:
            _, end, i = best[end]
            if not (i == self.unk and ids[-1:] == [self.unk]):                # neighbouring unknowns are one
                ids.append(i)
        return ids[::-1]


# ---------------------------------------------------------------- the ensemble (Fig. 2a)

@dataclass
class TextSizes:
    """Channels of the three encoders (CLIP's pooled vectors have as many) and tokens of a prompt. Known even where an encoder is not loaded."""
    clip_l: int = 768
    clip_g: int = 1280
    t5: int = 4096
    clip_length: int = 77
    t5_length: int = 77

    def shares(self):
        """Each encoder's place in Fig. 2a: (rows of the context, channels of the context, channels of the pooled vector)."""
        clips, clip_rows = self.clip_l + self.clip_g, slice(0, self.clip_length)
        return {"clip_l": (clip_rows, slice(0, self.clip_l), slice(0, self.clip_l)),
                "clip_g": (clip_rows, slice(self.clip_l, clips), slice(self.clip_l, clips)),
                "t5": (slice(self.clip_length, self.clip_length + self.t5_length), slice(0, self.t5), slice(0, 0))}


class TextEncoders(nn.Module):
    """The three encoders, any of which may be None (not loaded), and `tokenizers` by the same names.

    load(name) -> (encoder, tokenizer) is called for one that is None when it is first used; with keep=False it is let go again after each use."""

    def __init__(self, clip_l=None, clip_g=None, t5=None, tokenizers=None, sizes=None, load=None, keep=True):
        super().__init__()
        self.clip_l, self.clip_g, self.t5, self.tokenizers, self.sizes = clip_l, clip_g, t5, tokenizers or {}, sizes or TextSizes()
        self.load, self.keep = load, keep
        if self.sizes.clip_l + self.sizes.clip_g > self.sizes.t5:
            raise ValueError(f"the CLIPs' {self.sizes.clip_l} + {self.sizes.clip_g} channels do not fit into T5's {self.sizes.t5}")

    def encoder(self, name):
        """(encoder, tokenizer) of that name, loaded now unless it was."""
        if getattr(self, name) is None:
            if not self.load:
                loaded = ", ".join(n for n in self.sizes.shares() if getattr(self, n) is not None)
                raise ValueError(f"the text encoder {name} is not loaded, loaded are: {loaded or 'none'}")
            encoder, self.tokenizers[name] = self.load(name)
            if not self.keep:
                return encoder, self.tokenizers[name]
            setattr(self, name, encoder)
        return getattr(self, name), self.tokenizers[name]

    @torch.no_grad()
    def encode(self, prompts, use=("clip_l", "clip_g", "t5")):
        """B prompts -> context c_ctxt (B, clip_length + t5_length, t5 width), pooled c_vec (B, clip_l + clip_g widths), float32; zeros for any encoder not in `use`."""
        s, shares = self.sizes, self.sizes.shares()
        context = torch.zeros(len(prompts), s.clip_length + s.t5_length, s.t5)
        pooled = torch.zeros(len(prompts), s.clip_l + s.clip_g)
        for name in use:
            if name not in shares:
                raise ValueError(f"{name!r} is no text encoder, known are {', '.join(shares)}")
            rows, channels, part = shares[name]
            encoder, tokenizer = self.encoder(name)
            tokens, embedding = tokenizer(prompts), next(encoder.parameters())
            if tokens.max() >= len(embedding) or name != "t5" and tokenizer.end != encoder.eos:
                raise ValueError(f"the tokenizer of {name} is another model's: the encoder has {len(embedding)} tokens")
            context, pooled, states = context.to(embedding.device), pooled.to(embedding.device), encoder(tokens.to(embedding.device))
            if name != "t5":
                states, pooled[:, part] = states
            if states.shape != (place := context[:, rows, channels]).shape:
                raise ValueError(f"{name} gives states of {tuple(states.shape)}, the sizes say {tuple(place.shape)}")
            place.copy_(states)
            del encoder                                                       # before the next is loaded: with keep=False it was the last reference
        return context, pooled

    def kept(self, n, p=0.464, generator=None):
        """(n, 3): which encoders' shares n samples keep."""
        return torch.stack([torch.rand(n, generator=generator, device=generator.device if generator else None) >= p for _ in self.sizes.shares()], 1)

    def drop(self, context, pooled, p=0.464, generator=None, kept=None):
        """Each encoder's share becomes zeros with probability p, independently for each sample; 0.464^3 = 10 % are left without any text (App. B.3). Or as `kept` says."""
        context, pooled = context.clone(), pooled.clone()
        kept = self.kept(len(context), p, generator) if kept is None else kept
        for (rows, channels, part), keep in zip(self.sizes.shares().values(), kept.to(context.device).unbind(1)):
            context[:, rows, channels] *= keep[:, None, None]
            pooled[:, part] *= keep[:, None]
        return context, pooled
