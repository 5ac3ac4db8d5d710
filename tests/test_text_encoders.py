"""CLIP, T5, their tokenizers and the ensemble: parity with transformers and tokenizers on random weights and random text; Fig. 2a's layout; drop-out rates."""

import base64
import copy
import io
import json
import random
import sys
import unicodedata
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from text_encoders import (
    BPETokenizer,
    CharacterTable,
    CLIPTextEncoder,
    T5Denoiser,
    T5Encoder,
    TextEncoders,
    TextSizes,
    UnigramTokenizer,
    contrastive_loss,
    nmt_nfkc,
    span_corruption,
)

T5_SIZES = {"vocab_size": 99, "width": 32, "layers": 3, "heads": 4, "head_dim": 6, "mlp": 48}
CLIP_G = {"width": 1280, "layers": 32, "heads": 20, "mlp": 5120, "activation": "gelu", "projection": 1280}

PROMPTS = [
    "", " ", "a", "A Red circle, above a BLUE square!", "it's we'll they've I'm he'd you're don't", "rock'n'roll 'tis '90s", "100% of 3.14159 or 1,000,000 -- ok?",
    "café naïve Ångström ﬁancé e\u0301te\u0301", "ΟΔΥΣΣΕΥΣ İstanbul Straße ǅ", "北京的红色圆圈 これは赤い丸です 빨간 원", "дом на холме", "שלום עולם مرحبا بالعالم", "a 🐈‍⬛ and 👩‍👩‍👧‍👦 🇩🇪",
    "x² ½ Ⅷ ①", "zero\u200bwidth soft\u00adhyphen nbsp\u00a0here\u3000wide", "line\nbreak\ttab\r\nend\x0b\x0c\x1c\x1f\x85", "<|startoftext|>hi<|ENDOFTEXT|> <|endoftext|>!",
    "a </s> b<pad><extra_id_0>",
    "▁ underscore_ ▁▁x", "oil painting, (masterpiece:1.2), [8k], trending on artstation --ar 16:9", "https://example.com/a?b=c&d=e#f @user #tag", "..........", "“quoted” – dash — … !!!1",
    "pneumonoultramicroscopicsilicovolcanoconiosis", "a photo of a " + "very " * 200 + "big dog", "x" * 10_000]

REAL = (Path(__file__).parent / "prompts.txt").read_text("utf-8").splitlines()      # 200 as people write them

CAPTIONS = ["a red circle above a blue square", "Two green stars, left of the big triangle!", "it's a sign that says stop", "we'll see 12 crosses; they've gone"] * 50 + [
    "a sign that says cab", "a sign that says zoo", "a sign that says fox"]


def relative_error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def random_text(rng):
    """Assigned code points of all planes, whitespace and control characters, words of the vocabulary, special tokens."""
    def piece():
        if rng.random() < 0.4:
            return rng.choice(["red ", "Circle", " above", "'s", "'LL", "  ", "\x1c", "\x85", "▁", "e\u0301", "Σ", "İ", "12", "<|endoftext|>", "</s>", "<extra_id_3>"])
        c = chr(rng.randrange(rng.choice([128, 0x3000, 0x110000])))
        return c if unicodedata.category(c) not in ("Cs", "Cn") else "?"
    return "".join(piece() for _ in range(rng.randrange(40)))


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(0)
    return PROMPTS + REAL + [random_text(rng) for _ in range(2000)]


# ---------------------------------------------------------------- CLIP

@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_equals_transformers(activation):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(
        vocab_size=99, hidden_size=48, intermediate_size=80, projection_dim=20, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=16,
        hidden_act=activation, bos_token_id=97, eos_token_id=98, pad_token_id=0)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = CLIPTextEncoder(99, 16, 48, 3, 4, 80, activation, 20, eos=98)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    tokens = torch.randint(1, 97, (5, 13))
    for row, end in zip(tokens, (1, 4, 7, 11, 12)):
        row[end:] = 98 if end % 2 else 0                                      # both conventions of padding
        row[end] = 98
    with torch.no_grad():
        states, pooled = ours(tokens)
        expected = theirs(tokens, output_hidden_states=True)
    assert relative_error(states, expected.hidden_states[-2]) <= 1e-5
    assert relative_error(pooled, expected.text_embeds) <= 1e-5


def test_clip_is_causal_and_pools_at_the_first_end():
    model = CLIPTextEncoder(50, 8, 32, 2, 2, 64, projection=32, eos=49)
    tokens = torch.tensor([[48, 5, 6, 49, 49, 49, 49, 49]])
    other = torch.tensor([[48, 5, 6, 49, 7, 49, 8, 0]])
    assert torch.allclose(model(tokens)[1], model(other)[1], atol=1e-6)
    assert torch.allclose(model(tokens)[0][:, :4], model(other)[0][:, :4], atol=1e-6)
    assert not torch.allclose(model(tokens)[0][:, 4:], model(other)[0][:, 4:], atol=1e-3)


def test_contrastive_loss_is_cross_entropy_both_ways():
    images, texts, scale = torch.randn(6, 8), torch.randn(6, 8), torch.tensor(1.5)
    cosine = torch.nn.functional.cosine_similarity(images[:, None], texts[None], dim=2) * scale.exp()
    expected = -(cosine.log_softmax(1).diagonal() + cosine.log_softmax(0).diagonal()).mean() / 2
    assert torch.allclose(contrastive_loss(images, texts, scale), expected, atol=1e-6)
    assert contrastive_loss(images, images, torch.tensor(5.0)) < 1e-3


# ---------------------------------------------------------------- T5

def random_t5(transformers, name):
    theirs = getattr(transformers, name)(transformers.T5Config(
        vocab_size=99, d_model=32, d_kv=6, d_ff=48, num_layers=3, num_decoder_layers=2, num_heads=4, feed_forward_proj="gated-gelu", tie_word_embeddings=False)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return theirs


def test_t5_equals_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = random_t5(transformers, "T5EncoderModel")
    ours = T5Encoder(**T5_SIZES)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert ours.encoder.embed_tokens.weight is ours.shared.weight
    tokens = torch.randint(0, 99, (3, 150))                                   # beyond max_distance = 128; zeros are padding, not masked
    with torch.no_grad():
        assert relative_error(ours(tokens), theirs(tokens).last_hidden_state) <= 1e-5


def test_t5_denoiser_equals_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = random_t5(transformers, "T5ForConditionalGeneration")
    ours = T5Denoiser(T5Encoder(**T5_SIZES), layers=2)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    tokens, targets = torch.randint(1, 99, (3, 40)), torch.randint(1, 99, (3, 140))
    targets[0, 100:] = 0
    with torch.no_grad():
        assert relative_error(ours(tokens, targets), theirs(tokens, decoder_input_ids=targets).logits) <= 1e-5
        theirs.config.pad_token_id = theirs.config.decoder_start_token_id = 0
        expected = theirs(tokens, labels=targets.masked_fill(targets == 0, -100)).loss
        assert torch.allclose(ours.loss(tokens, targets), expected, rtol=1e-5)


def test_denoiser_trains_the_given_encoder():
    encoder = T5Encoder(**T5_SIZES)
    corrupted, targets = span_corruption(torch.randint(3, 80, (4, 12)), range(98, 90, -1), rate=0.3, mean_span=2)
    loss = T5Denoiser(encoder, layers=1).loss(corrupted, targets)
    assert abs(loss.item() - 4.6) < 1.5                                       # starts near ln 99
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in encoder.parameters())


def restore(corrupted, targets, sentinels):
    """The original row of a corrupted one and its targets."""
    spans, current = {}, None
    for token in targets:
        current = token if token in sentinels else current
        spans.setdefault(current, []).append(token)
    return [t for token in corrupted for t in (spans[token][1:] if token in sentinels else [token])]


@pytest.mark.parametrize("rate, mean_span", [(0.15, 3.0), (0.5, 1.0), (0.3, 2.0)])
def test_span_corruption_can_be_undone(rate, mean_span):
    sentinels = range(199, 99, -1)
    tokens = torch.zeros(64, 40, dtype=torch.long)
    for row in tokens:
        length = int(torch.randint(0, 40, ()))
        row[:length], row[length] = torch.randint(3, 100, (length,)), 1
    corrupted, targets = span_corruption(tokens, sentinels, rate, mean_span, generator=torch.Generator().manual_seed(0))
    again = span_corruption(tokens, sentinels, rate, mean_span, generator=torch.Generator().manual_seed(0))
    assert torch.equal(corrupted, again[0]) and torch.equal(targets, again[1])
    for original, row, target in zip(tokens.tolist(), corrupted.tolist(), targets.tolist()):
        row, target, n = [t for t in row if t], [t for t in target if t], original.index(1)
        assert row[-1] == target[-1] == 1 and target[-2] in sentinels
        assert restore(row, target[:-2], sentinels) == original[:n + 1]
        assert [t for t in row if t in sentinels] == [t for t in target[:-2] if t in sentinels] == list(sentinels[:sum(t in sentinels for t in row)])
        hidden = sum(t not in sentinels for t in target) - 1
        assert hidden == min(max(round(n * rate), 1), max(n - 1, 0))


def test_span_corruption_hides_every_place_alike_and_names_missing_sentinels():
    tokens = torch.arange(10, 18).repeat(4000, 1)
    corrupted, _ = span_corruption(tokens, [99, 98, 97], generator=torch.Generator().manual_seed(0))
    hidden = torch.tensor([[token not in row for token in range(10, 18)] for row in corrupted.tolist()]).float().mean(0)
    assert (hidden - 1 / 8).abs().max() < 0.03
    with pytest.raises(ValueError, match="8 tokens need 6 sentinels, the vocabulary has 3"):
        span_corruption(tokens, [99, 98, 97], rate=0.5, mean_span=1)


# ---------------------------------------------------------------- sizes

@pytest.mark.parametrize("sizes, count", [({}, 123_650_304), (CLIP_G, 694_659_840)])
def test_clip_has_the_released_parameter_count(sizes, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in CLIPTextEncoder(**sizes).parameters()) == count


def test_t5_xxl_has_the_released_parameter_count():
    with torch.device("meta"):
        assert sum(p.numel() for p in T5Encoder().parameters()) == 4_762_310_656


# ---------------------------------------------------------------- tokenizers

def test_bpe_equals_the_library(texts, tmp_path):
    pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    BPETokenizer.train(CAPTIONS, min_share=0.1).save(tmp_path)
    ours = BPETokenizer.from_folder(tmp_path)
    theirs = transformers.CLIPTokenizer(vocab=json.loads((tmp_path / "vocab.json").read_text()), merges=ours.merges)
    expected = torch.tensor([theirs(text, padding="max_length", truncation=True, max_length=77).input_ids for text in texts])
    assert torch.equal(ours(texts), expected)


def test_bpe_with_merges_inside_words_equals_the_library(texts):
    """CLIP's own merges are anywhere in a word and overlap; ours are not, so this vocabulary is trained by the library's rule."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    model.normalizer, model.pre_tokenizer = transformers.CLIPTokenizer()._tokenizer.normalizer, transformers.CLIPTokenizer()._tokenizer.pre_tokenizer
    model.train_from_iterator(CAPTIONS + PROMPTS[:-1] + ["banana aaaa aaa cassandra"] * 9, tokenizers.trainers.BpeTrainer(
        vocab_size=2000, end_of_word_suffix="</w>", initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    merges = [tuple(pair) for pair in json.loads(model.to_str())["model"]["merges"]]
    vocab = {entry: i for i, entry in enumerate(dict.fromkeys(BPETokenizer.entries(merges)))}
    assert len(merges) > 300
    ours, theirs = BPETokenizer(vocab, merges), transformers.CLIPTokenizer(vocab=vocab, merges=merges)
    assert [ours.ids(text) for text in texts] == [theirs(text).input_ids[1:-1] for text in texts]


def test_unigram_equals_the_library(texts, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    UnigramTokenizer.train(CAPTIONS, min_share=0.1).save(tmp_path)
    ours, theirs = UnigramTokenizer.from_folder(tmp_path), tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [ours.ids(text) + [1] for text in texts] == [theirs.encode(text).ids for text in texts]


def test_unigram_with_overlapping_pieces_equals_the_library(texts):
    """T5's pieces overlap, so the likeliest segmentation must be searched for; and its scores tie."""
    tokenizers = pytest.importorskip("tokenizers")
    config, rng = UnigramTokenizer.train(CAPTIONS, min_share=0.1).config, random.Random(1)
    known, words = {piece for piece, _ in config["model"]["vocab"]}, "".join("▁" + word for text in CAPTIONS[:4] + PROMPTS[:-1] for word in text.split())
    spans = [words[i:i + rng.randrange(2, 7)] for i in (rng.randrange(len(words)) for _ in range(600))]
    config["model"]["vocab"] += [[piece, -float(rng.randrange(2, 9))] for piece in dict.fromkeys(spans) if piece not in known and "▁" not in piece[1:]]
    ours, theirs = UnigramTokenizer(config), tokenizers.Tokenizer.from_str(json.dumps(config))
    assert [ours.ids(text) + [1] for text in texts] == [theirs.encode(text).ids for text in texts]


@pytest.fixture(scope="module")
def table():
    """T5's table of characters in base64: sentencepiece makes the same whenever it trains."""
    spm = pytest.importorskip("sentencepiece")
    from sentencepiece import sentencepiece_model_pb2
    written = io.BytesIO()
    spm.SentencePieceTrainer.train(sentence_iterator=iter(CAPTIONS * 5), model_writer=written, vocab_size=60, hard_vocab_limit=False, minloglevel=2)
    model = sentencepiece_model_pb2.ModelProto.FromString(written.getvalue())
    return base64.b64encode(model.normalizer_spec.precompiled_charsmap).decode()


def test_unigram_with_t5s_table_equals_the_libraries(texts, table, tmp_path):
    """As in the released tokenizer.json. Marks on characters fall differently for short and long clusters; both libraries, and every text."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    config = UnigramTokenizer.train(CAPTIONS + REAL, min_share=0.002).config
    config["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": table}
    (tmp_path / "tokenizer.json").write_text(json.dumps(config), encoding="utf-8")
    ours, theirs = UnigramTokenizer.from_folder(tmp_path), tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert [ours.ids(text) + [1] for text in texts] == [theirs.encode(text).ids for text in texts] == fast(texts).input_ids
    rng = random.Random(2)
    marks = ["".join(chr(rng.choice([rng.randrange(32, 592), rng.randrange(0x300, 0x370), rng.randrange(0x370, 0x3400)])) for _ in range(6)) for _ in range(2000)]
    marks = ["".join(c for c in text if unicodedata.category(c) != "Cn") for text in marks]
    assert [ours.normalize(text).split() for text in marks] == [theirs.normalizer.normalize_str(text).split() for text in marks]


def test_rules_come_near_the_table(table):
    differs = [text for text in PROMPTS if CharacterTable(table)(text).split() != nmt_nfkc(text).split()]
    assert all("\u200d" in text for text in differs), differs                 # newer tables keep the joiner of emoji


def test_damaged_tables_are_named():
    for bad, reason in (("", "damaged"), ("AAAA", "damaged"), ("x", "Invalid base64|padding"), (base64.b64encode(bytes(3)).decode(), "damaged")):
        with pytest.raises(ValueError, match=reason):
            CharacterTable(bad)


def test_tokens_are_cut_to_length_and_padded():
    bpe, unigram = BPETokenizer.train(CAPTIONS, length=6, min_share=0.1), UnigramTokenizer.train(CAPTIONS, length=4, min_share=0.1)
    red, circle = bpe.vocab["red</w>"], bpe.vocab["circle</w>"]
    bos, eos = bpe.vocab["<|startoftext|>"], bpe.vocab["<|endoftext|>"]
    assert bpe(["", "red circle", "red " * 9]).tolist() == [[bos] + [eos] * 5, [bos, red, circle] + [eos] * 3, [bos] + [red] * 4 + [eos]]
    assert BPETokenizer(bpe.vocab, bpe.merges, 6, pad=0)(["red"]).tolist() == [[bos, red, eos, 0, 0, 0]]
    red, circle = unigram.pieces["▁red"][0], unigram.pieces["▁circle"][0]
    assert unigram(["", "red circle", "red " * 9]).tolist() == [[1, 0, 0, 0], [red, circle, 1, 0], [red, red, red, 1]]
    assert bpe(["a"]).dtype == unigram(["a"]).dtype == torch.long
    with pytest.raises(ValueError, match="length of 2 tokens"):
        BPETokenizer(bpe.vocab, bpe.merges, 2)


def test_training_makes_frequent_words_one_token_and_spells_rare_ones():
    bpe, unigram = BPETokenizer.train(CAPTIONS, min_share=0.1), UnigramTokenizer.train(CAPTIONS, min_share=0.1)
    names, pieces = list(bpe.vocab), list(unigram.pieces)
    for word in ("red", "circle", "above", "triangle", "sign"):
        assert [names[i] for i in bpe.ids(word)] == [word + "</w>"] and [pieces[i] for i in unigram.ids(word)] == ["▁" + word]
    for word in ("cab", "zoo", "fox", "taxi", "x"):
        assert [names[i] for i in bpe.ids(word)] == [*word[:-1], word[-1] + "</w>"]
        assert [pieces[i] for i in unigram.ids(word + ".")] == ["▁", *word, "."]
    assert [names[i] for i in bpe.ids("bed")] == ["b", "ed</w>"]              # what pure byte pairs cannot avoid: it ends as "red" does
    assert unigram.sentinels == sorted(unigram.sentinels, reverse=True) and pieces[unigram.sentinels[0]] == "<extra_id_0>" and len(unigram.sentinels) == 16
    assert pieces[:3] == ["<pad>", "</s>", "<unk>"] and names[0] == "!" and names[256] == "!</w>" and names[-1] == "<|endoftext|>"


def test_training_does_not_depend_on_the_order_of_captions():
    shuffled = random.Random(0).sample(CAPTIONS, len(CAPTIONS))
    assert BPETokenizer.train(CAPTIONS).vocab == BPETokenizer.train(shuffled).vocab
    assert UnigramTokenizer.train(CAPTIONS).config == UnigramTokenizer.train(shuffled).config


def test_bad_tokenizer_files_are_named(tmp_path):
    BPETokenizer.train(CAPTIONS).save(tmp_path)
    with pytest.raises(ValueError, match="tokenizer.json is not there"):
        UnigramTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(ValueError, match="type BPE, T5's is Unigram"):
        UnigramTokenizer.from_folder(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nq zz\n")
    with pytest.raises(ValueError, match="lacks 1 .*'qzz'"):
        BPETokenizer.from_folder(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": ')
    with pytest.raises(ValueError, match="vocab.json is no JSON file"):
        BPETokenizer.from_folder(tmp_path)


# ---------------------------------------------------------------- the ensemble

@pytest.fixture(scope="module")
def ensemble():
    torch.manual_seed(0)
    bpe, unigram = BPETokenizer.train(CAPTIONS, length=10, min_share=0.1), UnigramTokenizer.train(CAPTIONS, length=12, min_share=0.1)
    clip = {"vocab_size": len(bpe.vocab), "length": 10, "layers": 2, "heads": 2, "mlp": 32, "eos": bpe.end}
    return TextEncoders(CLIPTextEncoder(width=16, projection=16, **clip), CLIPTextEncoder(width=24, projection=24, activation="gelu", **clip),
                        T5Encoder(len(unigram.pieces), 48, 2, 2, 8, 32), {"clip_l": bpe, "clip_g": BPETokenizer(bpe.vocab, bpe.merges, 10, pad=0), "t5": unigram},
                        TextSizes(16, 24, 48, clip_length=10, t5_length=12))


def test_ensemble_is_fig_2a(ensemble):
    prompts = ["a red circle", "two stars left of a sign that says cab"]
    context, pooled = ensemble.encode(prompts)
    with torch.no_grad():
        l, pooled_l = ensemble.clip_l(ensemble.tokenizers["clip_l"](prompts))
        g, pooled_g = ensemble.clip_g(ensemble.tokenizers["clip_g"](prompts))
        t5 = ensemble.t5(ensemble.tokenizers["t5"](prompts))
    assert torch.equal(pooled, torch.cat([pooled_l, pooled_g], dim=1))
    assert torch.equal(context, torch.cat([torch.cat([l, g, torch.zeros(2, 10, 8)], dim=2), t5], dim=1))
    assert context.dtype == torch.float32 and not context.requires_grad


@pytest.mark.parametrize("use", [(), ("clip_l",), ("clip_g",), ("t5",), ("clip_l", "clip_g"), ("clip_l", "t5")])
def test_any_subset_leaves_zeros_for_the_rest(ensemble, use):
    full_context, full_pooled = ensemble.encode(["a red circle"])
    only = TextEncoders(**{name: getattr(ensemble, name) for name in use}, tokenizers=ensemble.tokenizers, sizes=ensemble.sizes)
    for encoders in (ensemble, only):                                         # not used, and not even loaded
        context, pooled = encoders.encode(["a red circle"], use)
        for name, (rows, channels, part) in ensemble.sizes.shares().items():
            assert torch.equal(context[:, rows, channels], full_context[:, rows, channels] * (name in use))
            assert torch.equal(pooled[:, part], full_pooled[:, part] * (name in use))


def test_unknown_and_missing_encoders_are_named(ensemble):
    with pytest.raises(ValueError, match="'clip_h' is no text encoder, known are clip_l, clip_g, t5"):
        ensemble.encode(["a"], ("clip_h",))
    with pytest.raises(ValueError, match="t5 is not loaded, loaded are: clip_l"):
        TextEncoders(ensemble.clip_l, tokenizers=ensemble.tokenizers, sizes=ensemble.sizes).encode(["a"], ("clip_l", "t5"))
    with pytest.raises(ValueError, match="30 \\+ 24 channels do not fit into T5's 48"):
        TextEncoders(sizes=TextSizes(30, 24, 48))
    with pytest.raises(ValueError, match=r"t5 gives states of \(1, 12, 48\), the sizes say \(1, 13, 48\)"):
        TextEncoders(t5=ensemble.t5, tokenizers=ensemble.tokenizers, sizes=TextSizes(16, 24, 48, 10, 13)).encode(["a"], ("t5",))
    foreign = copy.copy(ensemble.tokenizers["clip_l"])
    foreign.end += 1
    with pytest.raises(ValueError, match="the tokenizer of clip_l is another model's"):
        TextEncoders(ensemble.clip_l, tokenizers={"clip_l": foreign}, sizes=ensemble.sizes).encode(["a"], ("clip_l",))


def test_odd_prompts_are_encoded(ensemble):
    context, pooled = ensemble.encode(PROMPTS + ["\ud800 lone surrogate"])
    assert context.isfinite().all() and pooled.isfinite().all()


def test_drop_takes_whole_shares_independently():
    encoders = TextEncoders(sizes=TextSizes(2, 3, 6, clip_length=2, t5_length=3))
    context, pooled = torch.ones(20_000, 5, 6), torch.ones(20_000, 5)
    generator = torch.Generator().manual_seed(0)
    dropped_context, dropped_pooled = encoders.drop(context, pooled, generator=generator)
    assert (context == 1).all() and (pooled == 1).all()                       # the cached tensors stay as they are
    shares = encoders.sizes.shares().values()
    gone = torch.stack([(dropped_context[:, rows, channels] == 0).flatten(1).all(1) for rows, channels, _ in shares], dim=1)
    expected_context, expected_pooled = context.clone(), pooled.clone()
    for k, (rows, channels, part) in enumerate(shares):
        expected_context[gone[:, k], rows, channels] = 0
        expected_pooled[gone[:, k], part] = 0
    assert torch.equal(dropped_context, expected_context) and torch.equal(dropped_pooled, expected_pooled)
    assert (gone.float().mean(0) - 0.464).abs().max() < 0.015                 # 4 standard deviations
    assert abs(gone.all(1).float().mean() - 0.1) < 0.01
    assert torch.equal(encoders.drop(context, pooled, generator=generator.manual_seed(0))[0], dropped_context)
    assert torch.equal(encoders.drop(context, pooled, p=0)[0], context) and not encoders.drop(context, pooled, p=1)[1].any()
