"""CLIP models whose gradients are told where to point."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from convert.clip import load_clip
from jaxstyle import weights
from jaxstyle.errors import UserError
from jaxstyle.features import clip_text
from jaxstyle.stylegan2 import Generator
from tests.train.test_clip_heads import HEAD
from train import clip_gradients, clip_heads, nada, nada_losses


def save_heads(folder, n=10, size=64, styles=("photo", "cel")):
    """A folder as train.heads writes it, of noise about flat colors."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for style, level in zip(styles, (90, 200, 30), strict=False):
        pictures = level + rng.integers(-20, 20, (n, size, size, 3))
        np.save(folder / f"{style}.npy", pictures.astype(np.uint8))
    np.save(folder / "labels.npy", np.zeros((n, size, size), np.uint8))
    lines = [json.dumps(HEAD | {"male": i % 2}) for i in range(n)]
    (folder / "heads.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return clip_text.load_tokenizer()


def tiny(tokenizer):
    options = clip_heads.Options(data=(), size=16, width=32, vision_layers=1)
    module = clip_heads.make_module(options, tokenizer)
    return module, module.init_params(key=jax.random.key(0))


def tiny_generator(size):
    generator = Generator(
        size=size, channels=(8,) * (size.bit_length() - 2), mapping_depth=1, w_dim=16
    )
    return generator, generator.init_params(key=jax.random.key(0))


def tiny_batch(tokenizer, module, count=4):
    """Grey pictures; the drawings are red on the left, x on the way has begun there."""
    rng = np.random.default_rng(0)
    heads = []
    for i in range(count):
        photo = 110 + rng.integers(-30, 30, (32, 32, 3))
        cel = photo.copy()
        cel[:, :16, 0] += 90
        drawings = {"photo": photo.astype(np.uint8), "cel": cel.astype(np.uint8)}
        facts = clip_heads.facts(HEAD | {"male": i % 2})
        heads.append(clip_gradients.Head(facts, np.zeros((32, 32)), drawings))
    slope = np.zeros((32, 32, 3), np.float16)
    slope[:, :16, 0] = 6**0.5
    examples = []
    for head in heads:
        photo = head.drawings["photo"]
        picture = clip_gradients.values(photo) + 0.1 * rng.normal(size=photo.shape)
        examples.append(
            clip_gradients.Example(
                photo, np.float16(picture), slope, 0.5, np.zeros((4, 8)), head, "cel"
            )
        )
    drawn = clip_gradients.Drawn(-1, examples)
    transform = clip_gradients.Transform(tokenizer, module)
    batch = transform.rows(drawn, range(count), np.random.default_rng(0))
    return {name: x[None] for name, x in batch.items()}


def test_gradients_are_compared_by_means_over_squares():
    a, b = np.random.default_rng(0).normal(size=(2, 3, 8, 8, 3)).astype(np.float32)
    own = clip_gradients.alignment(a, a, 4)
    np.testing.assert_allclose(own, 1, rtol=1e-5)
    np.testing.assert_allclose(clip_gradients.alignment(a, -2 * a, 1), -1, rtol=1e-5)
    found = clip_gradients.alignment(a, b, 4)
    for i in range(3):
        c, d = (
            np.array(
                [
                    x[i, y : y + 4, z : z + 4].mean((0, 1))
                    for y in (0, 4)
                    for z in (0, 4)
                ]
            )
            for x in (a, b)
        )
        wanted = (c * d).sum() / np.linalg.norm(c) / np.linalg.norm(d)
        np.testing.assert_allclose(found[i], wanted, rtol=1e-4)
    # What differs within a square does not count.
    checks = np.indices((8, 8)).sum(0) % 2 - 0.5
    found = clip_gradients.alignment(a + 50 * checks[None, :, :, None], a, 4)
    np.testing.assert_allclose(found, 1, rtol=1e-3)
    assert np.isfinite(clip_gradients.alignment(a, np.zeros_like(a), 1)).all()
    # A square larger than the pictures is the whole of them.
    found = clip_gradients.alignment(a, b, 16)
    np.testing.assert_allclose(found, clip_gradients.alignment(a, b, 8), rtol=1e-6)


def test_drawings_are_told_from_others_by_the_direction():
    wanted = jnp.tile(jnp.eye(4)[:1], (3, 1))
    source = jnp.zeros((3, 4)).at[jnp.arange(3), 1 + jnp.arange(3)].set(1.0)
    truth, wrong = source + wanted, source - wanted
    told = clip_gradients.told_apart(source, source, truth, wanted)
    # Other heads' drawings have the direction in part, x has none.
    other, here = np.exp(15 / 3**0.5), 1
    best = np.exp(15)
    np.testing.assert_allclose(told, np.log1p((2 * other + here) / best), rtol=1e-4)
    assert clip_gradients.told_apart(source, truth, wrong, wanted) > 15


def test_the_gradient_learns_where_to_point(tokenizer):
    module, params = tiny(tokenizer)
    batch = clip_gradients.floats(tiny_batch(tokenizer, module))
    boxes = nada_losses.crop_boxes(jax.random.key(0), 4 * clip_gradients.CROPS)
    options = clip_gradients.Options(data=())
    tx = optax.adam(2e-3)

    @jax.jit
    def step(params, opt_state):
        def loss(params):
            found = clip_gradients.losses(
                {"a": module}, {"a": params}, batch, boxes, None, {}
            )
            return clip_gradients.total(options, found), found

        grads, found = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, found

    opt_state, first = tx.init(params), None
    for _ in range(40):
        params, opt_state, found = step(params, opt_state)
        first = first or found
    assert found["squares_16"] > max(first["squares_16"] + 0.2, 0.6)
    assert found["pixels"] > first["pixels"] + 0.1
    assert found["truth"] < first["truth"] - 0.2

    assert found["weights"] == found["generator"] == 0

    # The cosine is that of NADA's own loss: a step along the slope lowers it.
    batch = {name: x[0] for name, x in batch.items() if x.ndim > 1}

    def nada_loss(x):
        def embed(y):
            return module.apply({"params": params}, y, method="embed")

        texts = [
            module.apply(
                {"params": params}, batch[n].reshape(-1, 22), method="encode_text"
            )
            for n in ("before", "after")
        ]
        wanted = nada_losses.direction(*map(clip_gradients.normalise, texts))
        before, after = (
            embed(clip_gradients.views(y, boxes, 16)) for y in (batch["source"], x)
        )
        return nada_losses.directional(before, after, wanted)

    here = nada_loss(batch["picture"])
    assert nada_loss(batch["picture"] + 0.05 * batch["slope"]) < here - 0.01
    assert nada_loss(batch["picture"] - 0.05 * batch["slope"]) > here


def test_examples_know_the_way_to_the_drawing(tmp_path):
    model, params = weights.load("heads")
    generator, base = model["generator"], params["generator"]
    folder = save_heads(tmp_path / "heads", n=4)
    heads, held = clip_gradients.read_heads([folder], 2)
    assert len(heads) == len(held) == 2
    digests = {clip_gradients.digest(x, ()) for x in (heads, held, heads[:1], heads)}
    assert len(digests) == 3
    codes = np.tile(np.float32(base["w_avg"]), (2, generator.num_ws, 1))
    make = clip_gradients.Changes(
        heads, generator, base, codes, np.random.default_rng(0)
    )
    photo, drawing = (
        np.stack([clip_gradients.values(h.drawings[n]) for h in heads])
        for n in ("photo", "cel")
    )
    # Of no change at all the way is that from the photo; the source may be either.
    found = make.examples(np.arange(2), ["cel", "cel"], np.zeros_like(photo))
    assert all(0 < x.length < 1 for x in found)
    slope = np.stack([x.slope for x in found]).astype(np.float32)
    np.testing.assert_allclose(np.square(slope).mean((1, 2, 3)), 1, rtol=1e-2)
    assert (slope * (drawing - photo)).mean() > 0
    for example, own, inverted in zip(found, photo, make.inverted, strict=True):
        shown = clip_gradients.values(example.source)
        assert min(abs(shown - x).max() for x in (own, inverted.clip(-1, 1))) < 0.01
        np.testing.assert_allclose(example.picture, shown, atol=1e-3)
    # A step down the slope comes nearer.
    judge, values = weights.load("lpips_alexnet")

    def distance(x):
        large = [clip_gradients.judge_size(jnp.asarray(y)) for y in (x, drawing)]
        return np.asarray(judge["lpips"].apply({"params": values["lpips"]}, *large))

    np.testing.assert_array_less(distance(photo + 0.01 * slope), distance(photo))
    # Generators that have not moved change nothing; one that has does.
    redder = dict(base["synthesis"])
    bias = redder["rgb_64"]["bias"] + np.float32([0.3, 0, 0])
    redder["rgb_64"] = redder["rgb_64"] | {"bias": bias}
    same = make.drawn(base, "cel", 5)
    moved = make.drawn(base | {"synthesis": redder}, "cel", 5)
    assert len(same) == len(moved) == 2
    for examples, wanted in ((same, 0.0), (moved, 0.3)):
        for x in examples:
            change = np.float32(x.picture) - clip_gradients.values(x.source)
            red = change[..., 0].mean()
            assert 0.59 * wanted - 0.01 <= red <= 1.41 * wanted + 0.01
            assert abs(change[..., 1:]).max() < 0.01
    mixed = make.mixes(6)
    assert {x.style for x in mixed} == {"cel"} and len(mixed) == 6
    with pytest.raises(UserError, match="one to the style paint"):
        make.drawn(base, "paint", 1)


def test_gradients_of_weights_are_those_of_the_pictures():
    generator, base = tiny_generator(16)
    rng = np.random.default_rng(0)
    synthesis = [
        jax.tree.map(lambda x, k=k: jnp.asarray((1 + 0.05 * k) * x), base["synthesis"])
        for k in range(2)
    ]
    still = {name: x for name, x in base.items() if name != "synthesis"}
    ways = {
        "base": still,
        "synthesis": jax.tree.map(lambda *x: jnp.stack(x), *synthesis),
    }
    codes = rng.normal(size=(2, 2, generator.num_ws, generator.w_dim))
    batch = {
        "generator": jnp.array([1, 0]),
        "code": jnp.asarray(codes, jnp.float32),
        "mirrored": jnp.array([[False, True], [False, False]]),
    }
    slopes = jnp.asarray(rng.normal(size=(2, 2, 16, 16, 3)), jnp.float32)
    found = clip_gradients.pull(generator, ways, batch, slopes)
    for group, number in enumerate((1, 0)):

        def drawn(synthesis, group=group):
            x, _ = generator.apply(
                {"params": {**still, "synthesis": synthesis}},
                batch["code"][group],
                space="w_plus",
                noise="none",
            )
            # A mirrored picture's slope is mirrored as well.
            x = jnp.stack([x[0], x[1][:, ::-1] if group == 0 else x[1]])
            return jnp.sum(x * slopes[group])

        wanted = jax.grad(drawn)(synthesis[number])
        jax.tree.map(
            lambda a, b, group=group: np.testing.assert_allclose(
                a[group], b, rtol=1e-3, atol=1e-4 * np.abs(b).max() + 1e-6
            ),
            found,
            wanted,
        )


def test_weights_are_compared_array_by_array():
    rng = np.random.default_rng(0)
    wanted = {"a": rng.normal(size=(2, 3, 4)), "b": rng.normal(size=(2, 5))}
    wanted = jax.tree.map(jnp.float32, wanted)
    # The length of an array's gradient does not matter, as it does not to Adam.
    scaled = {"a": 1000 * wanted["a"], "b": 0.01 * wanted["b"]}
    align = clip_gradients.weights_alignment
    np.testing.assert_allclose(align(scaled, wanted), 1, rtol=1e-5)
    shares = [
        np.sqrt(x[0].size) * np.linalg.norm(x.reshape(2, -1), axis=1)
        for x in (wanted["a"], wanted["b"])
    ]
    half = align({"a": wanted["a"], "b": -wanted["b"]}, wanted)
    np.testing.assert_allclose(
        half, (shares[0] - shares[1]) / sum(shares), rtol=1e-4, atol=1e-6
    )
    assert np.isfinite(align(jax.tree.map(jnp.zeros_like, wanted), wanted)).all()


def test_groups_are_of_one_generator(tokenizer):
    module, _ = tiny(tokenizer)
    sets = [
        clip_gradients.Drawn(n, range(10 * n, 10 * n + k)) for n, k in ((0, 5), (1, 1))
    ]
    groups = clip_gradients.Groups(sets, 3, ["heads"])
    assert len(groups) == 6

    class Seen(clip_gradients.Transform):
        def rows(self, drawn, places, rng):
            return drawn, places

    transform = Seen(tokenizer, module)
    for index in range(6):
        drawn, places = transform(groups[index], np.random.default_rng(index))
        assert drawn == sets[index // 5] and places[0] == index % 5
        assert len(places) == 3
        assert len(set(places)) == (3 if index < 5 else 1)


def test_the_gradient_of_weights_learns(tokenizer):
    module, params = tiny(tokenizer)
    generator, base = tiny_generator(32)
    ways = {
        "base": {name: x for name, x in base.items() if name != "synthesis"},
        "synthesis": jax.tree.map(lambda x: jnp.asarray(x)[None], base["synthesis"]),
    }
    batch = dict(tiny_batch(tokenizer, module))
    rng = np.random.default_rng(1)
    shape = (1, 4, generator.num_ws, generator.w_dim)
    batch["code"] = np.float32(rng.normal(size=shape))
    batch = clip_gradients.floats(batch)
    boxes = nada_losses.crop_boxes(jax.random.key(0), 4 * clip_gradients.CROPS)
    tx = optax.adam(2e-3)

    @jax.jit
    def step(params, opt_state, number):
        def loss(params):
            found = clip_gradients.losses(
                {"a": module},
                {"a": params},
                batch | {"generator": number},
                boxes,
                generator,
                ways,
            )
            return found["generator"], found

        grads, found = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, found

    opt_state, first = tx.init(params), None
    # Mixes have none.
    assert step(params, opt_state, jnp.array([-1]))[2]["generator"] == 0
    for _ in range(12):
        params, opt_state, found = step(params, opt_state, jnp.array([0]))
        first = first or found
    np.testing.assert_allclose(found["generator"], 1 - found["weights"], rtol=1e-5)
    assert found["weights"] > first["weights"] + 0.2


def test_runs_it_takes(tmp_path, tokenizer):
    module, _ = weights.load("heads")
    base = weights.load("heads")[1]["generator"]

    def run(name, **metadata):
        folder = tmp_path / name
        weights.save(
            folder,
            {"generator": module["generator"]},
            {"generator": base},
            metadata=metadata,
        )
        return folder

    assert clip_gradients.style_of(run("a", target="a pencil drawing")) == "pencil"
    assert clip_gradients.style_of(run("b", target="an oil painting")) == "paint"
    for name, target in (("c", "a zebra"), ("p", "a photo")):
        other = run(name, target=target, scheme="nada")
        with pytest.raises(UserError, match=f"went to '{target}'.*cartoon"):
            list(clip_gradients.generators([other], base))
    with pytest.raises(UserError, match="holds no checkpoints"):
        list(
            clip_gradients.generators(
                [run("n", target="a cartoon", scheme="nada")], base
            )
        )
    for other in (run("d", scheme="jojo"), run("e", scheme="nada", styles=["a", "b"])):
        with pytest.raises(UserError, match="is no run of train.nada with one"):
            list(clip_gradients.generators([other], base))


@pytest.mark.slow
def test_a_short_training_after_a_run_of_nada(tmp_path, capsys):
    heads = save_heads(tmp_path / "heads", styles=("photo", "cel", "pencil"))
    followed = tmp_path / "nada"
    args = "--source photo --target cartoon --steps 2 --save-every 1 --keep 2 --batch 2"
    nada.main(
        [
            *args.split(),
            "--sample-every",
            "0",
            "--out",
            str(followed),
            "--mesh-data",
            "1",
        ]
    )
    base = weights.load("heads")[1]["generator"]
    assert [s for _, s in clip_gradients.generators([followed], base)] == ["cel"] * 2
    other = base | {"mapping": jax.tree.map(lambda x: x + 1, base["mapping"])}
    with pytest.raises(UserError, match="began with another generator"):
        list(clip_gradients.generators([followed], other))
    out = tmp_path / "run"
    args = f"--data {heads} --held-out 4 --batch 2 --together 2 --mixes 6 --drawn 3"
    args += " --mesh-data 1"
    args += f" --runs {followed} --steps 2 --log-every 1 --validate-every 1 --out"
    clip_gradients.main([*args.split(), str(out)])
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert {"pixels", "weights", "truth", "here", "val_loss"} <= lines[-1].keys()
    assert all(np.isfinite(x) for x in lines[-1].values())
    for number in (1, 2):
        assert load_clip(out / f"model-{number}").module.image_size == 64
    # One of its models goes on alone.
    more = ["--weights", str(out / "model-2"), "--lr", "0"]
    clip_gradients.main([*args.split(), str(tmp_path / "more"), *more])
    capsys.readouterr()
    for wrong, message in (
        (["--held-out", "12"], "--held-out is 12"),
        (["--held-out", "1"], "must be at least 2"),
        (["--drawn", "0"], "--drawn is 0"),
        (["--weights", "lpips_alexnet"], "--weights is lpips_alexnet"),
        (["--runs", str(out)], "no run of train.nada"),
        (["--data", str(tmp_path)], "heads.jsonl cannot be read"),
    ):
        with pytest.raises(SystemExit):
            clip_gradients.main([*args.split(), str(tmp_path / "x"), *wrong])
        assert message in capsys.readouterr().err
