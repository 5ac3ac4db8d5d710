"""evaluate.py: the detector on true and on false pictures, GenEval's categories, distances on features, CLIP's image tower, the validation loss."""

import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

import checkpoint
import evaluate
import shapes
from data import ShapeEdits, Shapes
from evaluate import CATEGORIES, KINDS, CLIPImageEncoder, Task, detect, judge, shows, tasks
from flow import formulation
from shapes import COLORS, HELD_OUT_PAIRS, HELD_OUT_WORDS, LEVELS, SHAPES, Scene, Thing, render

# ---- the detector on true pictures


@pytest.mark.parametrize("level, n, width", [*((level, 300, 64) for level in LEVELS), ("all", 60, 128)])
def test_detector_reads_true_pictures(level, n, width):
    world = Shapes(level, width, 64, split="unseen")
    assert np.mean([shows(world.scene(i)[0], *detect(world[i].image)) for i in range(n)]) >= 0.995


@pytest.mark.parametrize("size", [32, 128])
def test_detector_reads_other_sizes(size):
    world = Shapes("all", size, size, split="val")
    right = [shows(world.scene(i)[0], *detect(world[i].image)) for i in range(40)]
    assert np.mean(right) >= (0.97 if size > 64 else 0.6)                       # letters of 8 pixels are hard to tell


def test_detector_forgives_what_an_autoencoder_does():
    world, rng = Shapes("lattice", split="val"), np.random.default_rng(0)

    def worn(image):
        soft = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.4)), float)
        return (soft + rng.normal(0, 4, soft.shape)).clip(0, 255).astype(np.uint8)

    assert np.mean([shows(world.scene(i)[0], *detect(worn(world[i].image))) for i in range(80)]) >= 0.97


def test_every_letter_is_read():
    for word in ("abcd", "efgh", "ijkl", "mnop", "qrst", "uvwx", "yz"):
        for color in ("red", "yellow"):                                           # white ink and black ink
            things = detect(render(Scene("gray", (Thing(color, 2, 1.5, word=word),)), 64, 64))[1]
            assert [(t.word, t.color) for t in things] == [(word, color)]


@pytest.mark.parametrize("wrong", [
    dict(background="black"), dict(things=()), dict(things=(Thing("red", 0.5, 0.5, "circle"),)),
    dict(things=(Thing("red", 0.5, 0.5, "circle"), Thing("blue", 2.5, 1.5, "heart"))),                                      # color
    dict(things=(Thing("red", 0.5, 0.5, "circle"), Thing("green", 2.5, 1.5, "star"))),                                      # shape
    dict(things=(Thing("red", 0.5, 0.5, "circle"), Thing("green", 2.5, 2.5, "heart"))),                                     # place
    dict(things=(Thing("red", 0.5, 0.5, "circle", "small"), Thing("green", 2.5, 1.5, "heart"))),                            # too much said: see below
    dict(things=(Thing("red", 0.5, 0.5, "circle"), Thing("green", 2.5, 1.5, "heart"), Thing("pink", 0.5, 2.5, "ring")))])   # one more
def test_shows_tells_each_kind_of_error(wrong):
    things = Thing("red", 0.5, 0.5, "circle"), Thing("green", 2.5, 1.5, "heart")
    image = render(Scene("white", things), 64, 64)
    assert shows(Scene("white", things), *detect(image))
    assert not shows(Scene(**{"background": "white", "things": things, **wrong}), *detect(image))


# ---- the detector on false pictures

WHITE = shapes.BACKGROUNDS["white"]


def names(image):
    return [(t.shape, t.color) for t in detect(np.asarray(image))[1]]


def drawn(draw):
    """A picture of 64 x 64 drawn on a canvas four times as large."""
    canvas = Image.new("RGB", (256, 256), WHITE)
    draw(ImageDraw.Draw(canvas))
    return canvas.reduce(4)


@pytest.mark.parametrize("shape", SHAPES)
def test_blurred_and_halved_shapes_are_not_accepted(shape):
    image = render(Scene("white", (Thing("blue", 2, 2, shape),)), 64, 64)
    half = image.copy()
    half[:, 32:] = WHITE
    for false in (Image.fromarray(image).filter(ImageFilter.GaussianBlur(3)), half):
        found = names(false)
        assert len(found) == 1 and "?" in found[0], found


def test_noise_is_not_accepted():
    rng = np.random.default_rng(0)
    for size in (4, 8, 16, 64):
        for _ in range(10):
            found = names(Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).resize((64, 64), Image.Resampling.BICUBIC))
            assert all("?" in pair for pair in found), found


BLUE = COLORS["blue"]


@pytest.mark.parametrize("draw, answer", [
    (lambda d: None, []),
    (lambda d: d.ellipse((70, 100, 186, 156), fill=BLUE), [("?", "blue")]),
    (lambda d: d.rectangle((60, 110, 196, 150), fill=BLUE), [("?", "blue")]),
    (lambda d: d.rectangle((66, 66, 190, 126), fill=BLUE), [("?", "blue")]),                                                # a board with no ink on it
    (lambda d: d.polygon([(90, 90), (110, 90), (110, 150), (160, 150), (160, 170), (90, 170)], fill=BLUE), [("?", "blue")]),
    (lambda d: (d.ellipse((80, 100, 130, 150), fill=BLUE), d.ellipse((125, 100, 175, 150), fill=BLUE)), [("?", "blue")]),   # two that touch
    (lambda d: d.ellipse((100, 100, 150, 150), fill=(120, 120, 60)), [("circle", "?")]),
    (lambda d: (d.ellipse((100, 100, 150, 150), fill=BLUE), d.pieslice((100, 100, 150, 150), 0, 180, fill=COLORS["red"])), [("circle", "?")])])
def test_what_is_no_shape_or_no_color_is_said_to_be_so(draw, answer):
    assert names(drawn(draw)) == answer


# ---- the categories

RED, BLUE_SQUARE, GREEN = Thing("red", 0.5, 0.5, "circle"), Thing("blue", 0.5, 2.5, "square"), Thing("green", 3, 3, "star")
WANTED = {"circle": Thing("", 0, 0, "circle"), "square": Thing("", 0, 0, "square"), "red circle": Thing("red", 0, 0, "circle"), "blue square": Thing("blue", 0, 0, "square")}
OTHER = Thing("pink", 0.5, 0.5, "circle")


@pytest.mark.parametrize("category, wanted, relation, things, answer", [
    ("single object", ["circle"], "", [RED], (True, True)),
    ("single object", ["circle"], "", [OTHER], (True, True)),                                          # any color
    ("single object", ["circle"], "", [], (False, False)),
    ("single object", ["circle"], "", [BLUE_SQUARE], (False, False)),
    ("single object", ["circle"], "", [RED, GREEN], (False, True)),                                    # GenEval forgives one more
    ("colors", ["red circle"], "", [RED], (True, True)),
    ("colors", ["red circle"], "", [OTHER], (False, False)),
    ("two objects", ["circle", "square"], "", [BLUE_SQUARE, OTHER], (True, True)),
    ("two objects", ["circle", "square"], "", [RED], (False, False)),
    ("two objects", ["circle", "square"], "", [RED, RED], (False, False)),
    ("two objects", ["circle", "square"], "", [RED, BLUE_SQUARE, GREEN], (False, True)),
    ("color attribution", ["red circle", "blue square"], "", [RED, BLUE_SQUARE], (True, True)),
    ("color attribution", ["red circle", "blue square"], "", [Thing("blue", 0.5, 0.5, "circle"), Thing("red", 2, 2, "square")], (False, False)),     # swapped
    ("counting", ["red circle"] * 2, "", [RED, Thing("red", 2, 2, "circle")], (True, True)),
    ("counting", ["red circle"] * 2, "", [RED], (False, False)),
    ("counting", ["red circle"] * 2, "", [RED] * 3, (False, False)),                                   # not in counting
    ("position", ["circle", "square"], "above", [RED, BLUE_SQUARE], (True, True)),
    ("position", ["circle", "square"], "below", [RED, BLUE_SQUARE], (False, False)),
    ("position", ["circle", "square"], "left of", [RED, BLUE_SQUARE], (False, False)),
    ("position", ["square", "circle"], "below", [RED, BLUE_SQUARE], (True, True)),
    ("position", ["circle", "square"], "above", [RED, Thing("blue", 0.5, 0.9, "square")], (False, False)),      # by less than half a cell
    ("position", ["circle", "square"], "above", [RED, BLUE_SQUARE, GREEN], (False, True))])
def test_judge(category, wanted, relation, things, answer):
    assert judge(Task(category, "", tuple(WANTED[name] for name in wanted), relation), things) == answer


@pytest.mark.parametrize("word", ["left of", "right of", "above", "below"])
def test_related_agrees_with_the_captions(word):
    a = Thing("red", 2, 2)
    for b in (Thing("red", 4, 2), Thing("red", 0, 2), Thing("red", 2, 4), Thing("red", 2, 0)):
        assert evaluate.related(a, b, word) == (shapes.relation(a, b) == word)


def test_judge_of_signs():
    task = Task("typography", "", (Thing("", 0, 0, word="cab"),))
    assert judge(task, [Thing("red", 2, 2, word="cab")]) == (True, True) and judge(task, [Thing("red", 2, 2, word="cat")]) == (False, False)


@pytest.mark.parametrize("category", KINDS)
def test_tasks(category):
    for unseen in (False, True):
        todo = tasks(category, 100, seed=3, unseen=unseen)
        assert todo == tasks(category, 100, seed=3, unseen=unseen) and todo != tasks(category, 100, seed=4, unseen=unseen)
        for task in todo:
            for t in task.wanted:
                if t.word:
                    assert (t.word in HELD_OUT_WORDS) == unseen and t.word in task.prompt.split()
                else:
                    assert not t.color and not unseen or ((t.shape, t.color) in HELD_OUT_PAIRS) == unseen
                    assert t.shape in task.prompt and t.color in task.prompt
            assert len(task.wanted) == {"two objects": 2, "position": 2, "color attribution": 2}.get(category, len(task.wanted) if category == "counting" else 1)
            assert bool(task.relation) == (category == "position") and task.relation in task.prompt
    assert tasks(category, 100) != tasks(category, 100, unseen=True)
    if category == "counting":
        assert {len(t.wanted) for t in tasks(category, 100)} == {2, 3, 4}


def picture_of(task):
    """The picture that a perfect model would draw."""
    centres = {"left of": [(.5, .5), (2.5, .5)], "right of": [(2.5, .5), (.5, .5)], "above": [(.5, .5), (.5, 2.5)], "below": [(.5, 2.5), (.5, .5)]}
    places = centres.get(task.relation, [(.5, .5), (2.5, .5), (.5, 2.5), (2.5, 2.5)])
    things = [Thing(t.color or "cyan", x if t.shape else 2, y if t.shape else 1.5, t.shape, word=t.word) for t, (x, y) in zip(task.wanted, places)]
    return torch.from_numpy(render(Scene("beige", tuple(things)), 64, 64).copy())


def test_geneval_and_typography_count_right(monkeypatch):
    perfect = {t.prompt: t for category in KINDS for t in tasks(category, 10, 5)}
    asked = []

    def generate(bundle, prompts, seed, wrong=(), **settings):
        asked.extend(prompts)
        return torch.stack([torch.full((64, 64, 3), 250, dtype=torch.uint8) if perfect[p].category in wrong else picture_of(perfect[p]) for p in prompts])

    monkeypatch.setattr(evaluate, "generate", generate)
    scores, results = evaluate.geneval(None, 10, 5, batch_size=7)
    assert scores == dict.fromkeys((*CATEGORIES, "overall", "geneval"), 1.0) and asked == [t.prompt for t, *_ in results] and len(results) == 60
    scores, _ = evaluate.geneval(None, 10, 5, wrong=("colors", "position"))
    assert scores["colors"] == scores["position"] == 0 and scores["counting"] == 1 and scores["overall"] == pytest.approx(4 / 6)
    assert evaluate.typography(None, 10, 5) == {"letters": 1.0, "words": 1.0}
    assert evaluate.typography(None, 10, 5, wrong=("typography",)) == {"letters": 0.0, "words": 0.0}


def test_the_command_takes_other_sizes(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "is_shapes", lambda config: True)
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--weights", str(tiny), "--quick", "--prompts", "2", "--steps", "1", "--width", "48", "--height", "32", "--out", str(tmp_path)])
    evaluate.main()
    assert {"seen pairs", "unseen pairs"} == checkpoint.read_object(tmp_path / "scores.json").keys() and '"overall"' in capsys.readouterr().out
    with Image.open(tmp_path / "unseen-pairs-two-objects.png") as drawn:
        assert drawn.size == (8 * 48 + 7 * 2, 32)


def test_models_of_other_data_are_refused(refused, tiny, tmp_path):
    checkpoint.copy_parts(tiny, tmp_path)
    checkpoint.write_json(tmp_path / "config.json", {**checkpoint.read_json(tiny / "config.json"), "data": "folder:photos"})
    assert "was trained on folder:photos; what is counted here are the things of `shapes`" in refused("evaluate.py", "--weights", tmp_path)
    assert "was trained on other pictures" in refused("evaluate.py", "--weights", tiny)
    flags = "--init-from", tmp_path, "--steps", 1, "--resolution", 32, "--workers", 0, "--out", tmp_path / "out"
    assert "was trained on folder:photos: --data says on what to go on" in refused("train.py", "--stage", "finetune", *flags)


def test_no_prompts_are_refused(refused, tiny):
    assert "--prompts is 0; the least is 1" in refused("evaluate.py", "--weights", tiny, "--prompts", 0)


def test_autoencoder_score_of_the_identity_and_of_gray():
    same = SimpleNamespace(config={"resolution": 64}, device="cpu", vae=SimpleNamespace(to_latents=lambda x, sample: x, decode=lambda z: z))
    assert evaluate.autoencoder(same, "lattice", 20) == {"psnr": math.inf, "detector": 1.0}
    same.vae.decode = torch.zeros_like
    gray = evaluate.autoencoder(same, "lattice", 20)
    assert 3 < gray["psnr"] < 15 and gray["detector"] == 0


# ---- distances on features

def gaussian(n=4000, p=6, seed=0):
    """Samples whose mean is 0 and whose covariance is the identity, exactly."""
    x = torch.randn(n, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T


def test_frechet_distance_of_gaussians():
    x = gaussian()
    shift = torch.arange(6.0).double()
    a, b = torch.diag(torch.arange(1.0, 7)).double(), torch.linalg.qr(x[:6])[0]                    # a scaling, a rotation
    assert abs(evaluate.frechet_distance(x, x.flip(0))) < 1e-9
    assert evaluate.frechet_distance(x, x + shift) == pytest.approx(shift.square().sum().item(), rel=1e-9)
    assert evaluate.frechet_distance(x, 3 * x) == pytest.approx(6 * (3 - 1) ** 2, rel=1e-9)
    assert evaluate.frechet_distance(x, gaussian(3000, seed=2)) == pytest.approx(0, abs=1e-9)         # other samples, another number, the same Gaussian
    assert evaluate.frechet_distance(x @ a, x + shift) == pytest.approx(sum((k - 1) ** 2 for k in range(1, 7)) + 55, rel=1e-9)
    mixed = x @ a @ b                                                             # covariance b^T a^2 b: tr sqrt(S) is that of a
    assert evaluate.frechet_distance(mixed, x) == pytest.approx(55, rel=1e-9) and evaluate.frechet_distance(x, mixed) == pytest.approx(55, rel=1e-9)


def test_frechet_distance_of_fewer_samples_than_features():
    x = torch.randn(10, 40, generator=torch.Generator().manual_seed(0))
    assert abs(evaluate.frechet_distance(x, x)) < 1e-6 and evaluate.frechet_distance(x, x + 1) == pytest.approx(40, rel=1e-6)


def test_clip_score_is_the_mean_cosine():
    image, text = torch.tensor([[1.0, 0], [0, 5], [2, 2]]), torch.tensor([[3.0, 0], [1, 0], [0, 1]])
    assert evaluate.clip_score(image, text) == pytest.approx((1 + 0 + math.sqrt(0.5)) / 3)


def test_retrieval():
    features = torch.eye(8)
    assert evaluate.retrieval(features, 5 * features, ways=8) == evaluate.retrieval(features, features, ways=4) == 1
    assert evaluate.retrieval(features, features.roll(1, 0), ways=8) == 0
    swapped = features[[1, 0, 2, 3, 4, 5, 6, 7]]
    assert evaluate.retrieval(features, swapped, ways=8) == 0.75
    assert evaluate.retrieval(features.roll(4, 0) + 0.1 * features, features, ways=4) == 1           # the better text is no candidate, it is of another group
    assert evaluate.retrieval(torch.eye(11), torch.eye(11), ways=4) == 1                            # the last, incomplete group is left out


def test_clip_features_and_fid_of_a_bundle(tiny, tmp_path):
    """Through every module of a real bundle; its weights are random, so only the bounds are known."""
    config = dict(resolution=32, patch_size=8, width=16, layers=1, heads=2, projection=20)
    checkpoint.save_bundle(checkpoint.load_bundle(tiny), tmp_path)
    checkpoint.save_part(tmp_path, "clip_image", CLIPImageEncoder(**config), config)
    bundle = checkpoint.load_bundle(tmp_path)
    scores = evaluate.clip_and_fid(bundle, "lattice", n=64)
    assert scores.keys() == {"retrieval", "clip_score", "clip_score_real", "fid"}
    assert 0 <= scores["retrieval"] < 0.2 and abs(scores["clip_score"]) < 1 and scores["fid"] > 1e-3
    other = evaluate.clip_and_fid(bundle, "lattice", n=64, steps=1)
    assert other["fid"] != scores["fid"] and other["clip_score_real"] == scores["clip_score_real"]
    wide = evaluate.clip_and_fid(bundle, "lattice", n=64, steps=1, width=64, height=32)      # beside true pictures of that size
    assert wide["clip_score_real"] != scores["clip_score_real"]


# ---- CLIP's image tower

def test_clip_image_tower_equals_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(hidden_size=32, intermediate_size=128, projection_dim=24, num_hidden_layers=2, num_attention_heads=4, image_size=48,
                                           patch_size=8, hidden_act="quick_gelu")
    theirs = transformers.CLIPVisionModelWithProjection(config).eval()
    ours = CLIPImageEncoder(48, 8, 32, 2, 4, 24).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert missing == ["logit_scale"] and all("position_ids" in key for key in unexpected)
    images = torch.randn(3, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images).image_embeds, atol=1e-5, rtol=1e-5)


def test_clip_image_tower_takes_any_size():
    tower = CLIPImageEncoder(32, 8, 16, 1, 2, 4)
    image = torch.rand(1, 3, 1, 1).expand(1, 3, 96, 48)
    torch.testing.assert_close(tower(image), tower(image[..., :32, :32]), atol=1e-4, rtol=1e-4)


# ---- the validation loss

def test_validation_loss_of_known_networks():
    form, x0 = formulation("rf/lognorm(0.00,1.00)"), torch.zeros(64, 4, 8, 8)
    seen = []

    def exact(z, t, context, pooled):                                             # x0 = 0: z = t eps, v = eps
        seen.append(t[0].item())
        assert (t == t[0]).all() and context == "context" and pooled == "pooled"
        return z / t[:, None, None, None]

    losses = evaluate.validation_loss(exact, form, x0, "context", "pooled")
    assert seen == pytest.approx([k / 8 for k in range(1, 9)]) and losses == pytest.approx([0] * 8, abs=1e-9)
    off = evaluate.validation_loss(lambda *a: exact(*a) + 0.5, form, x0, "context", "pooled")
    assert off == pytest.approx([0.25] * 8, rel=1e-5)
    # a network that answers 0 is wrong by |eps - x0|^2 = 1 + x0^2 on average
    zero = evaluate.validation_loss(lambda z, *_: torch.zeros_like(z), form, x0 + 2, None, None, levels=4)
    assert len(zero) == 4 and zero == pytest.approx([5] * 4, rel=0.05)
    assert zero == evaluate.validation_loss(lambda z, *_: torch.zeros_like(z), form, x0 + 2, None, None, levels=4)
    assert zero != evaluate.validation_loss(lambda z, *_: torch.zeros_like(z), form, x0 + 2, None, None, levels=4, seed=1)


def test_validation_loss_stays_in_the_range_of_the_formulation():
    losses = evaluate.validation_loss(lambda z, t, *_: z, formulation("edm(-1.20,1.20)"), torch.randn(4, 4, 4, 4), None, None)
    assert all(map(math.isfinite, losses)) and Counter(map(type, losses)) == {float: 8}


def test_edits_are_judged_by_what_changed_and_what_did_not():
    """Of every kind, level lattice: the true picture is right; the picture before, and one with a bystander moved, are wrong."""
    world = ShapeEdits("lattice", 64, 64, split="val")
    seen = Counter()
    for i in range(60):
        before, kind, _, after = world.edit(i)
        seen[kind] += 1
        assert evaluate.edit_right(kind, before, after, *detect(render(after))), (kind, before, after)
        assert not evaluate.edit_right(kind, before, after, *detect(render(before))), (kind, before, after)
    assert len(seen) >= 5
    star, ring = Thing("red", 0.5, 0.5, "star"), Thing("blue", 3.5, 3.5, "ring")
    scene = Scene("white", (star, ring))
    moved = Scene("white", (replace(star, x=1.5, y=1.5), ring))
    elsewhere = Scene("white", (replace(star, x=2.5, y=1.5), ring))           # in the middle ninth, too
    wrong = Scene("white", (replace(star, x=1.5, y=1.5), replace(ring, x=2.5)))
    assert evaluate.edit_right("move", scene, moved, *detect(render(elsewhere))) and not evaluate.edit_right("move", scene, moved, *detect(render(wrong)))


def test_edits_counts_right(monkeypatch):
    """A model that makes the true picture for recolor and remove, and changes nothing else."""
    world = ShapeEdits("lattice", 64, 64, split="val")
    true = {}
    for before, kind, instruction, after in map(world.edit, range(500)):
        true.setdefault(instruction, []).append((before, after if kind in ("recolor", "remove") else before))

    def drawn(bundle, prompts, seed, edit, width, height):
        pictures = ((edit + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
        return torch.stack([next(torch.tensor(render(after)) for before, after in true[prompt] if (render(before) == picture.numpy()).all()) for prompt, picture in zip(prompts, pictures)])
    monkeypatch.setattr(evaluate, "generate", drawn)
    scores, results = evaluate.edits(SimpleNamespace(config={"resolution": 64}), 3)
    assert len(results) == 18 and scores == {"recolor": 1, "replace": 0, "remove": 1, "add": 0, "move": 0, "word": 0, "edits": pytest.approx(1 / 3)}
