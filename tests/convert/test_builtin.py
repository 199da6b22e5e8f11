"""The built-in checkpoint: made once, whole or not at all, and one that diffusers itself loads and runs."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from flax import nnx
from oracle import relative_error
from transformers import UMT5EncoderModel

from jaxwan.convert import builtin
from jaxwan.convert.builtin import VERSION, builtin_checkpoint
from jaxwan.convert.diffusers import TEXT_ENCODER, TRANSFORMER, VAE
from jaxwan.convert.files import TensorFiles
from jaxwan.convert.load import load_module
from jaxwan.models.text_encoder import UMT5Encoder
from jaxwan.models.transformer import WanTransformer
from jaxwan.models.vae import VAE as VAEModule
from jaxwan.pipelines.checkpoint import read_checkpoint
from jaxwan.pipelines.prompt import load_tokenizer, tokenize

torch.set_num_threads(1)  # models so small gain nothing from threads, and wait for them where cores are shared

FORWARD = 2e-5  # as for every text encoder and DiT: float32 in another order
PROMPTS = ("A cat walks slowly on the grass; the moon is red.", "", "日本 x_y {42}~`\\", "unblurred  goldfishes ▁of")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return builtin_checkpoint(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def pipe(folder):
    pipe = WanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# The folder


def test_it_is_recognised_as_the_two_expert_text_to_video_model(folder):
    checkpoint = read_checkpoint(folder)
    assert checkpoint.variant.name == "Wan2.2-T2V-A14B"
    assert (checkpoint.num_experts, checkpoint.boundary_ratio) == (2, 0.875)
    defaults = checkpoint.defaults
    assert (defaults.height, defaults.width, defaults.num_frames, defaults.fps) == (64, 96, 9, 8)
    assert defaults.guidance_scale > 1 and defaults.num_inference_steps <= 6
    checkpoint.geometry.check_size(defaults.num_frames, defaults.height, defaults.width)


def test_a_changed_recipe_needs_a_new_version(folder):
    """Caches keep the folder of a version for ever. The digest is of all but the numbers of the tensors."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(str(path.relative_to(folder)).encode())
        if path.suffix == ".safetensors":
            content = sorted(TensorFiles((path,)).shapes.items())
        else:
            content = json.loads(path.read_text())
        if path.name == "tokenizer.json":
            content = content["model"]["vocab"]  # around it, other releases of tokenizers may write other defaults
        digest.update(json.dumps(content, sort_keys=True).encode())
    assert (VERSION, digest.hexdigest()[:16]) == (1, "961dcb054f5679e5")


def test_it_is_made_once(folder):
    before = (folder / "model_index.json").stat().st_mtime_ns
    assert builtin_checkpoint(folder.parent) == folder
    assert (folder / "model_index.json").stat().st_mtime_ns == before
    assert os.listdir(folder.parent) == [folder.name]  # and no temporary folder stays


def test_two_made_apart_hold_the_same_numbers(folder, tmp_path):
    other = builtin_checkpoint(tmp_path)
    for path in folder.rglob("*.safetensors"):
        assert path.read_bytes() == (other / path.relative_to(folder)).read_bytes()


def test_the_two_experts_differ(folder):
    high, low = (TensorFiles.find(folder / name) for name in ("transformer", "transformer_2"))
    assert not np.array_equal(high.read("proj_out.weight"), low.read("proj_out.weight"))


def test_the_slower_of_two_makers_takes_the_folder_of_the_quicker(tmp_path, monkeypatch):
    write = builtin._write

    def overtaken(folder):
        write(folder)
        monkeypatch.setattr(builtin, "_write", write)
        (builtin_checkpoint(tmp_path) / "made by the other").touch()

    monkeypatch.setattr(builtin, "_write", overtaken)
    folder = builtin_checkpoint(tmp_path)
    assert (folder / "made by the other").is_file() and os.listdir(tmp_path) == [folder.name]


def test_nothing_half_made_stays_when_making_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(builtin, "_write_tokenizer", lambda folder: (folder / "x" / "y").write_text(""))
    with pytest.raises(OSError, match="built-in checkpoint cannot be written"):
        builtin_checkpoint(tmp_path)
    assert os.listdir(tmp_path) == []


def test_an_unwritable_cache_is_named_with_the_remedy(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be written to .*/file/cache/random.* set XDG_CACHE_HOME"):
        builtin_checkpoint(tmp_path / "file" / "cache")


@pytest.mark.parametrize(
    "value, expected",
    [
        ("/somewhere", "/somewhere/jaxwan"),
        ("not/absolute", "/home/a/.cache/jaxwan"),
        ("", "/home/a/.cache/jaxwan"),
        (None, "/home/a/.cache/jaxwan"),
    ],
)
def test_the_cache_folder_follows_the_xdg_specification(monkeypatch, value, expected):
    monkeypatch.setenv("HOME", "/home/a")
    if value is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert builtin.cache_folder() == Path(expected)


def test_it_is_made_without_torch_and_before_any_device_is_touched(tmp_path):
    script = (
        "import sys; sys.modules.update(torch=None, diffusers=None)\n"
        "from pathlib import Path\n"
        "from jaxwan.convert.builtin import builtin_checkpoint\n"
        "builtin_checkpoint(Path(sys.argv[1]))\n"
        "import jax; jax.config.update('jax_num_cpu_devices', 3); print(len(jax.devices('cpu')))\n"
    )  # the update raises once JAX is initialised
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr


# As checkpoints go


@pytest.mark.parametrize("name, cls", [("transformer", WanTransformer3DModel), ("transformer_2", WanTransformer3DModel),
                                       ("vae", AutoencoderKLWan), ("text_encoder", UMT5EncoderModel)])  # fmt: skip
def test_diffusers_and_transformers_miss_nothing_and_leave_nothing(folder, name, cls):
    _, info = cls.from_pretrained(folder / name, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info


def test_our_rule_tables_read_it_completely(folder):
    c = read_checkpoint(folder)
    for name, make, rules in (
        ("transformer", lambda: WanTransformer(c.transformer, dtype=jnp.float32, rngs=nnx.Rngs(0)), TRANSFORMER),
        ("transformer_2", lambda: WanTransformer(c.transformer, dtype=jnp.float32, rngs=nnx.Rngs(0)), TRANSFORMER),
        ("vae", lambda: VAEModule(c.vae, rngs=nnx.Rngs(0)), VAE),
    ):
        placed = []
        files = TensorFiles.find(folder / name)
        load_module(make, files, rules, progress=placed.append)
        assert len(placed) == len(files.shapes)


def test_token_ids_equal_transformers(folder, pipe):
    ours = load_tokenizer(folder / "tokenizer")
    for prompt in PROMPTS:
        theirs = pipe.tokenizer(prompt, padding="max_length", max_length=512, truncation=True)
        ids, mask = tokenize(ours, prompt)
        assert (ids.tolist(), mask.astype(int).tolist()) == (theirs.input_ids, theirs.attention_mask)
        assert ids.max() < pipe.text_encoder.config.vocab_size


def test_printable_ascii_has_no_unknown_token(folder):
    ids, mask = tokenize(load_tokenizer(folder / "tokenizer"), " ".join(map(chr, range(32, 127))))
    assert 2 not in ids[mask]


def test_text_embeddings_equal_transformers(folder, pipe):
    tokens, mask = tokenize(load_tokenizer(folder / "tokenizer"), PROMPTS[0], 64)
    cfg = read_checkpoint(folder).text_encoder
    model = load_module(
        lambda: UMT5Encoder(cfg, dtype=jnp.float32, rngs=nnx.Rngs(0)), TensorFiles.find(folder / "text_encoder"),
        TEXT_ENCODER,
    )  # fmt: skip
    actual = model(jnp.asarray(tokens)[None], jnp.asarray(mask)[None])[0, mask]
    with torch.no_grad():
        expected = pipe.text_encoder(torch.tensor(tokens)[None].long(), torch.tensor(mask)[None]).last_hidden_state
    assert relative_error(actual, expected[0, torch.tensor(mask)]) <= FORWARD


def test_diffusers_runs_it_and_its_frames_are_neither_flat_nor_saturated(pipe):
    videos = [
        pipe(prompt, height=64, width=96, num_frames=9, num_inference_steps=5, guidance_scale=3.0, guidance_scale_2=2.0,
             generator=torch.Generator().manual_seed(0), output_type="np").frames[0]
        for prompt in PROMPTS[:2]
    ]  # fmt: skip
    for video in videos:
        assert video.shape == (9, 64, 96, 3)
        assert video.std() > 0.15 and ((video == 0) | (video == 1)).mean() < 0.2
    assert np.abs(videos[0] - videos[1]).mean() > 1e-3  # the prompt counts
