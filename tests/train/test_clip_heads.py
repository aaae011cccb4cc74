"""The small CLIP of drawn heads: true captions, their words alone, a short training."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from convert.clip import load_clip
from jaxstyle import weights
from jaxstyle.errors import UserError
from jaxstyle.features import clip_text
from train import clip_heads, nada, nada_losses, nada_text

HEAD = {
    "male": 0.9,
    "age": 0.8,
    "melanin": 0.1,
    "hair": [0.6, 0.6, 0.6],
    "hair_line": "round",
    "hair_length": 0.0,
    "beard": 0.5,
    "targets": {"mouthSmileLeft": 0.6},
}


@pytest.fixture(scope="module")
def tokenizer():
    return clip_text.load_tokenizer()


def facts(style="pencil", **changes):
    found = clip_heads.facts(HEAD | changes)
    found[0] = clip_heads.VALUES["style"].index(style)
    return found


def said(found):
    """All that is true, in words of `VALUES`."""
    pairs = zip(clip_heads.VALUES.items(), found, strict=True)
    return {name: values[i] for (name, values), i in pairs if i >= 0}


def test_facts_are_those_of_the_head():
    assert said(facts()) == {
        "style": "pencil",
        "sex": "man",
        "age": "old",
        "hair": "grey",
        "length": "short",
        "beard": "beard",
        "mood": "smiling",
        "skin": "pale",
    }
    bald = said(facts(hair_line="none", male=0.5, age=0.5, targets={}, beard=0.0))
    assert bald == {"style": "pencil", "length": "none", "skin": "pale"}
    colours = [said(facts(hair=c))["hair"] for c in clip_heads.HAIR.tolist()]
    assert colours == ["black", "brown", "brown", "blond", "red", "grey"]


def test_captions():
    rng = np.random.default_rng(1)
    everything = said(facts())
    sentences = {clip_heads.caption(everything, rng) for _ in range(100)}
    wanted = "of a smiling old man with short grey hair and a beard and pale skin"
    assert f"a pencil drawing {wanted}" in sentences
    assert f"sketch {wanted}" in sentences
    assert clip_heads.caption({"sex": "man", "age": "old"}, rng) == "an old man"
    styles = {clip_heads.caption({"style": "cel"}, rng) for _ in range(50)}
    assert {"a cartoon", "cartoon of a person"} <= styles
    drawn = [clip_heads.chosen(facts(), rng) for _ in range(300)]
    assert all(one.items() <= everything.items() for one in drawn)
    assert 0.8 < np.mean(["style" in one for one in drawn]) < 0.91


def test_every_word_of_a_caption_is_one_token_and_others_are_refused(tokenizer):
    module = clip_heads.make_module(clip_heads.Options(data=()), tokenizer)
    assert all(
        tokenizer.convert_ids_to_tokens(t).endswith("</w>")
        for t in module.token_ids[:-2]
    )
    rng = np.random.default_rng(0)
    styles = clip_heads.VALUES["style"]
    texts = [clip_heads.caption(said(facts(s)), rng) for s in styles for _ in range(20)]
    texts += nada_text.needed(
        "a photo", "pencil drawing", templates=clip_heads.TEMPLATES
    )
    assert clip_text.tokenize(tokenizer, texts, module).max() == module.vocab_size - 1
    for text, word in (("a photo of one man", "one"), ("a zebra", "ze")):
        with pytest.raises(UserError, match=f"not learned the word '{word}.*beard"):
            clip_text.tokenize(tokenizer, [text], module)


def test_captions_true_of_a_picture():
    true = np.stack([facts(), facts("cel", male=0.0)])
    captions = [{"style": "cel"}, {"age": "old"}, {"style": "pencil", "sex": "woman"}]
    table = clip_heads.is_true(
        jnp.stack([clip_heads.claims(one) for one in captions]), jnp.asarray(true)
    )
    assert table.tolist() == [[False, True, False], [True, True, False]]


def test_contrastive_loss_shares_what_is_true():
    logits = jnp.array([[2.0, 2.0, -30.0], [2.0, 2.0, -30.0], [-30.0, -30.0, 5.0]])
    true = logits > 0
    loss = clip_heads.contrastive_loss(logits, true)
    np.testing.assert_allclose(loss, np.log(2) * 2 / 3, rtol=1e-6)
    plain = clip_heads.contrastive_loss(logits, jnp.eye(3, dtype=bool))
    np.testing.assert_allclose(plain, loss, rtol=1e-6)
    assert clip_heads.contrastive_loss(-logits, true) > 10


def test_contrastive_loss_of_pictures_between_two_styles():
    # The best there is, for any shares: the captions' probabilities are the shares.
    true = jnp.array([[0.75, 0.25], [0.25, 0.75]])
    best = clip_heads.contrastive_loss(jnp.log(true), true)
    slope = jax.grad(clip_heads.contrastive_loss)(jnp.log(true), true)
    np.testing.assert_allclose(slope, 0, atol=1e-7)
    np.testing.assert_allclose(best, -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))


def test_mixed_pictures():
    one, other = np.random.default_rng(0).integers(64, 192, (2, 32, 32, 3), np.uint8)

    def mixed(one, other, *shares):
        of_other = np.reshape(np.float32(shares), (3, 1, 1))
        return clip_heads.mixed((one, other), np.stack([1 - of_other, of_other]))

    for shares, wanted in (((0, 0, 0), one), ((1, 1, 1), other)):
        found = mixed(one, other, *shares)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, wanted)
    grey = np.repeat(other[..., :1], 3, -1)
    found = mixed(one, grey, 1, 0, 0)
    luma = np.asarray(Image.fromarray(one).convert("L"))
    np.testing.assert_array_equal(found, np.repeat(luma[..., None], 3, -1))
    # Areas from one picture, lines from the other.
    flat = np.full((32, 32, 3), 100, np.uint8)
    lines = flat + 40 * (np.arange(32) % 2)[:, None].astype(np.uint8)
    coarse, fine = mixed(flat, lines, 0, 1, 0), mixed(flat, lines, 0, 0, 1)
    assert np.ptp(coarse[:, 8:-8]) <= 6 and 115 < coarse[:, 8:-8].mean() < 125
    assert np.ptp(fine[:, 8:-8]) >= 34 and 95 < fine[:, 8:-8].mean() < 105


def test_shares_of_an_area_and_of_what_is_around():
    # Background above, skin, eyes below: a part each.
    labels = np.repeat(np.repeat(np.uint8([0, 1, 3]), [6, 6, 4])[:, None], 16, 1)
    rng, sizes, parts = np.random.default_rng(0), [], 0
    styles, count, together, ends = np.array([3, 0, 4]), np.zeros(3), [], []
    for _ in range(600):
        shares = clip_heads.drawn_shares(styles, labels, rng)
        assert shares.shape == (3, 3, 16, 16) and 0 <= shares.min() <= shares.max() <= 1
        np.testing.assert_allclose(shares.sum(0), 1)
        areas = [part != part[0, 0] for part in shares.reshape(-1, 16, 16)]
        areas = [area for area in areas if area.any()] or areas[:1]
        assert all((area == areas[0]).all() for area in areas)
        has = shares.any((2, 3))
        assert (has.sum(0) == 2).all()
        count += has.sum(1)
        together.append((has[:, 0] == has[:, 2]).all())
        ends.append(shares[has[:, 0]][0, 0, 0, 0])
        sizes.append(np.mean(areas[0]))
        rows = areas[0][[5, 6, 11, 12]]
        whole = (rows == rows[:, :1]).all() and len(np.unique(areas[0][:6])) == 1
        parts += whole and (rows[1] == rows[2]).all() and areas[0].any()
    assert min(sizes) == 0 and max(sizes) > 0.6 and 0.1 < np.mean(sizes) < 0.6
    assert parts > 120  # those of parts that are not all or nothing
    # The first and the photo in most, and not the same two in all bands.
    assert count[0] > 1.2 * count[2] and count[1] > 1.2 * count[2]
    assert 0.2 < np.mean(together) < 0.8
    assert np.mean(np.abs(np.array(ends) - 0.5) > 0.25) > 0.6


def test_whom_a_style_is_mixed_with():
    rng, styles = np.random.default_rng(0), np.array([3, 0, 1, 4])
    found = np.bincount([clip_heads.partner(styles, 0, rng) for _ in range(600)])
    assert found[0] == 0 and 340 < found[1] < 460 and found[2:].min() > 60
    of_photo = [clip_heads.partner(styles[[1, 0, 2]], 0, rng) for _ in range(100)]
    assert set(of_photo) == {1, 2}
    assert {clip_heads.partner(styles, 2, rng) for _ in range(100)} == {0, 1, 3}


def test_turned_hues(tokenizer):
    picture = np.random.default_rng(0).integers(64, 192, (8, 8, 3), np.uint8)
    np.testing.assert_array_equal(clip_heads.turned(picture, 0.0), picture)
    third = clip_heads.turned(picture, 2 * np.pi / 3).astype(int)
    luma = [np.asarray(x) @ [0.299, 0.587, 0.114] for x in (picture, third)]
    np.testing.assert_allclose(*luma, atol=1)
    # A third of the circle: red becomes green (or blue), but for the brightness.
    colors = [x - x.mean(-1, keepdims=True) for x in (picture.astype(float), third)]
    shifted = [np.roll(colors[0], shift, -1) for shift in (1, 2)]
    assert min(np.abs(colors[1] - x).max() for x in shifted) <= 1
    grey = np.repeat(picture[..., :1], 3, -1)
    np.testing.assert_array_equal(clip_heads.turned(grey, 1.0), grey)
    # Nothing is said of colors then.
    module = clip_heads.make_module(clip_heads.Options(data=(), size=8), tokenizer)
    item = picture[None], facts("photo")[None], np.zeros((8, 8), np.uint8)
    made = clip_heads.make_transform(tokenizer, module, 0.0, turn=1.0)(
        item, np.random.default_rng(0)
    )
    names = list(clip_heads.WORDS)
    for kept, row in zip(made["facts"].T, item[1][0], strict=True):
        name = names.pop(0)
        assert (kept == (-1 if name in ("hair", "skin") else row)).all()


def test_of_a_crop_only_the_style_is_said(tokenizer):
    module = clip_heads.make_module(clip_heads.Options(data=(), size=32), tokenizer)
    ramp = np.broadcast_to(np.arange(32, dtype=np.uint8), (32, 32))
    pictures = np.repeat(np.stack([ramp, 255 - ramp])[..., None], 3, -1)
    labels = np.broadcast_to(np.arange(32, dtype=np.uint8)[:, None] // 8, (32, 32))
    item = pictures, np.stack([facts("photo"), facts("pencil")]), labels
    rng = np.random.default_rng(0)
    make = clip_heads.make_transform(tokenizer, module, 0.0, mix=0.5, crop=1.0)
    for made in (make(item, rng) for _ in range(50)):
        assert (made["facts"][:, 1:] == -1).all() and (made["facts"][:, 0] >= 0).all()
        assert made["image"].shape == (32, 32, 3)
        assert (made["claims"][1:] == -1).all() and made["claims"][0] >= 0
    sides = []
    for _ in range(2000):
        top, left, side = clip_heads.square(32, rng)
        assert min(top, left) >= 0 and max(top, left) + side <= 32
        sides.append(side)
    assert min(sides) == 8 and max(sides) == 32 and abs(np.median(sides) - 16) <= 1
    # A crop of the ramp has less of it.
    plain = clip_heads.make_transform(tokenizer, module, 0.0, crop=1.0)
    ranges = [np.ptp(plain(item, rng)["image"].mean((0, 2))) for _ in range(50)]
    assert min(ranges) < 0.4 * max(ranges)


def test_captions_of_a_mixed_picture_tell_of_both(tokenizer):
    module = clip_heads.make_module(clip_heads.Options(data=(), size=16), tokenizer)
    pictures = np.stack([np.full((16, 16, 3), x, np.uint8) for x in (0, 200)])
    labels = np.arange(256, dtype=np.uint8).reshape(16, 16) // 64
    item = pictures, np.stack([facts("photo"), facts("pencil")]), labels
    styles, rng = clip_heads.VALUES["style"], np.random.default_rng(0)
    plain = clip_heads.make_transform(tokenizer, module, 0.0)(item, rng)
    assert plain["shares"].tolist() == [1, 0, 0, 0, 0]
    assert (plain["facts"][0] == item[1][0]).all()
    make = clip_heads.make_transform(tokenizer, module, 0.0, 1.0)
    some = [make(item, rng) for _ in range(200)]
    assert all((one["facts"][:2] == item[1]).all() for one in some)
    assert all(one["facts"].shape == (5, len(clip_heads.WORDS)) for one in some)
    np.testing.assert_allclose([one["shares"].sum() for one in some], 1, rtol=1e-6)
    assert all((one["shares"][2:] == 0).all() for one in some)
    of_pencil = [one["claims"][0] == styles.index("pencil") for one in some]
    assert 0.3 < np.mean(of_pencil) < 0.6  # of six in seven captions, half


@pytest.mark.parametrize(
    ("weights", "share"), [((1, 1, 1), 1.4 / 3), ((0, 0, 1), 0.8), ((3, 1, 0), 0.25)]
)
def test_what_counts_of_a_mixed_picture(tokenizer, monkeypatch, weights, share):
    module = clip_heads.make_module(clip_heads.Options(data=(), size=16), tokenizer)
    bands = np.array([0.2, 0.4, 0.8])[:, None, None] * np.ones((3, 16, 16))
    shares = np.stack([1 - bands, bands])
    monkeypatch.setattr(clip_heads, "drawn_shares", lambda *_: shares)
    pictures = np.zeros((2, 16, 16, 3), np.uint8)
    item = pictures, np.stack([facts("photo"), facts("pencil")]), pictures[0, ..., 0]
    make = clip_heads.make_transform(tokenizer, module, 0, 1.0, mix_weights=weights)
    found = make(item, np.random.default_rng(0))["shares"]
    np.testing.assert_allclose(found[:2], [1 - share, share], rtol=1e-6)
    # Of a crop counts what is in it.
    bands[:, :4], bands[:, 4:] = 0, 1
    shares[:] = 1 - bands, bands
    make = clip_heads.make_transform(
        tokenizer, module, 0, 1.0, crop=1.0, mix_weights=weights
    )
    monkeypatch.setattr(clip_heads, "square", lambda *_: (2, 5, 4))
    found = make(item, np.random.default_rng(0))["shares"]
    np.testing.assert_allclose(found[:2], 0.5, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 3])
def test_attacked_pictures_raise_the_loss_and_stay_near(steps):
    image, wanted = jax.random.normal(jax.random.key(0), (2, 5, 4, 4, 3))
    slope = np.asarray(wanted).reshape(5, -1)

    def loss(x):
        return jnp.mean(jnp.sum(x * wanted, (1, 2, 3)))

    found = clip_heads.attacked(loss, image, 0.3, steps, jax.random.key(1))
    change = np.asarray(found - image).reshape(5, -1)
    # Of a linear loss the farthest that the ball allows is along the gradient; from an
    # orthogonal start one step comes to 0.93 of it, three to 0.97.
    best = 0.3 * np.linalg.norm(slope, axis=1)
    rise = np.sum(change * slope, 1)
    np.testing.assert_array_less(np.linalg.norm(change, axis=1), 0.3 + 1e-5)
    np.testing.assert_array_less(0.9 * best, rise)


def test_what_was_not_learned_is_forgotten(tokenizer):
    module = clip_heads.make_module(clip_heads.Options(data=(), width=32), tokenizer)
    params = module.init_params(key=jax.random.key(0))
    shares = {"style": 0.9, "sex": 0.5, "skin": 0.7, "hair": 0.4, "mood": 0.8}
    small, kept, templates = clip_heads.forgetting(tokenizer, module, params, shares)
    assert small.vocab_size == len(kept["text"]["token_embedding"]) < module.vocab_size
    assert templates[0] == "{}" and "{} of a person with dark skin" in templates
    judges = [
        clip_text.Judge("", m, p, templates=tuple(clip_heads.TEMPLATES))
        for m, p in ((module, params), (small, kept))
    ]
    texts = ["a sketch of a smiling person with pale skin", *templates[1:3]]
    texts = [text.replace("{}", "poster") for text in texts]
    before, after = (judge.encode_texts(texts) for judge in judges)
    np.testing.assert_allclose(before, after, rtol=1e-5)
    for text in ("a photo of a woman", "red hair", "no beard"):
        judges[0].encode_texts([text])
        with pytest.raises(UserError, match="not learned"):
            judges[1].encode_texts([text])


def save_heads(folder, n=12, size=16):
    """A folder as train.heads writes it, of flat pictures."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for style, level in (("photo", 90), ("pencil", 220)):
        shape = n, size, size, 3
        pictures = level + rng.integers(-9, 9, shape)
        np.save(folder / f"{style}.npy", pictures.astype(np.uint8))
    np.save(folder / "labels.npy", np.zeros(shape[:3], np.uint8))
    lines = [json.dumps(HEAD | {"male": i % 2}) for i in range(n)]
    (folder / "heads.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.slow
def test_a_short_training(tmp_path, capsys, tokenizer):
    heads, out = save_heads(tmp_path / "heads"), tmp_path / "run"
    args = f"--data {heads} --out {out} --held-out 4 --size 16 --width 32 --batch 8"
    args += " --vision-layers 1 --text-layers 1 --steps 2 --log-every 1 --lr 1e-2"
    clip_heads.main([*args.split(), "--mesh-data", "1"])
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and np.isfinite(lines[-1]["loss"])
    assert {"style", "words", "word/sex", "retrieval", "val_loss"} <= lines[-1].keys()
    judge = load_clip(out / "model")
    assert judge.templates[0] == "{}"
    assert set(judge.templates) <= set(clip_heads.TEMPLATES)
    anchors = nada_losses.anchors(judge, "a person", "a face")
    assert np.isfinite(anchors["direction"]).all()
    # It goes on from these towers, on pictures that deceive them.
    more = ["--weights", str(out), "--adversary", "0.5", "--lr", "0", "--mix", "0.5"]
    more += ["--turn", "0.5", "--out"]
    clip_heads.main([*args.split(), *more, str(tmp_path / "more"), "--mesh-data", "1"])
    own, same = (weights.load(tmp_path / n)[1]["clip"] for n in ("run", "more"))
    jax.tree.map(np.testing.assert_array_equal, own, same)
    # Or from a model that has forgotten words, which begin anew.
    few = {"data": (), "size": 16, "width": 32, "vision_layers": 1, "text_layers": 1}
    module = clip_heads.make_module(clip_heads.Options(**few), tokenizer)
    params = clip_heads.first_params(out / "model", module, jax.random.key(1))
    kept = np.isin(module.token_ids, judge.module.token_ids)
    assert 0 < kept.sum() < len(kept)
    table = params["text"]["token_embedding"]
    np.testing.assert_array_equal(
        table[kept], np.float32(judge.params["text"]["token_embedding"])
    )
    assert np.abs(table[~kept]).min(-1).max() > 0
    with pytest.raises(UserError, match="not learned"):
        nada_losses.anchors(judge, "a person", "a zebra")
    with pytest.raises(UserError, match="no {}"):
        nada_text.templates_of(judge, ["a man"])
    capsys.readouterr()
    for wrong, message in (
        (["--held-out", "12"], "--held-out is 12"),
        (["--data", str(tmp_path)], "heads.jsonl cannot be read"),
        (["--held-out", "1"], "must be at least 2"),
        (["--adversary", "-1"], "--adversary is -1"),
        (["--mix", "2"], "--mix is 2"),
        (["--turn", "-1"], "--turn is -1"),
        (["--crop", "2"], "--crop is 2"),
        (["--mix-weights", "0", "0", "0"], "--mix-weights is 0 0 0"),
        (["--mix-weights", "1", "-1", "0"], "--mix-weights is 1 -1 0"),
        (["--weights", str(out), "--width", "64"], "of the same sizes"),
    ):
        with pytest.raises(SystemExit):
            clip_heads.main([*args.split(), *wrong, "--out", str(tmp_path / "x")])
        assert message in capsys.readouterr().err


def test_the_folder_it_asks_for(tmp_path):
    heads = save_heads(tmp_path / "heads")
    source = clip_heads.Heads([heads], 4)
    (pictures, true, labels), (_, first, _) = source[1], source[0]
    assert pictures.shape == (2, 16, 16, 3) and labels.shape == (16, 16)
    assert [said(row)["style"] for row in true] == ["pencil", "photo"]
    assert said(first[0])["style"] == "photo"
    np.testing.assert_array_equal(pictures[1], source[0][0][0])
    assert len(source) == 16 and len(clip_heads.Heads([heads], 4, train=False)) == 8
    (heads / "labels.npy").unlink()
    with pytest.raises(UserError, match="has no labels.npy"):
        clip_heads.Heads([heads], 4)
    (heads / "heads.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="heads.jsonl cannot be read"):
        clip_heads.Heads([heads], 4)


@pytest.mark.parametrize(
    "model",
    (
        nada.SMALL_CLIP,
        "clip_heads_cartoon",
        *(f"clip_heads_cartoon_{n}" for n in (2, 3, 4)),
    ),
)
def test_what_ships_refuses_what_it_has_not_learned(model):
    folder = weights.ASSETS / model
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 4e6
    judge = load_clip(model)
    named = weights.read_config(model)["metadata"]["named"]
    for name, share in named.items():
        words = [w for v in clip_heads.WORDS[name].values() for w in v]
        if share < clip_heads.needed_share(len(clip_heads.WORDS[name])):
            with pytest.raises(UserError, match="not learned"):
                judge.encode_texts(words)
        else:
            judge.encode_texts(words)
    nada_losses.anchors(judge, "a photo", "a pencil drawing")
