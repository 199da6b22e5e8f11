"""The bundled model's trainers on a model so small that it compiles in seconds."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from math import prod
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxwan.config import TextEncoderConfig, TransformerConfig, VAEConfig
from jaxwan.convert.diffusers import VAE as RULES
from jaxwan.convert.load import flat_shapes
from jaxwan.convert.save import save_arrays
from jaxwan.models.text_encoder import UMT5Encoder
from jaxwan.models.transformer import WanTransformer
from jaxwan.models.vae import VAE
from jaxwan.tiny import checkpoint, dit_quality, train_dit, train_text
from jaxwan.tiny.attributes import Attributes, Thing, combinations
from jaxwan.tiny.latents import Latents

DIT = TransformerConfig(
    num_attention_heads=2, attention_head_dim=12, ffn_dim=24, num_layers=2, text_dim=16, freq_dim=16
)
TEXT = TextEncoderConfig(vocab_size=320, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2)
VAE_CONFIG = VAEConfig(
    base_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1, latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16
)


@contextmanager
def small_models() -> Iterator[pytest.MonkeyPatch]:
    """Text encoder and denoisers are small inside."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (train_dit, dit_quality, checkpoint):
            patch.setattr(module, "DIT", DIT)
        for module in (train_text, train_dit, dit_quality, checkpoint):
            patch.setattr(module, "TEXT", TEXT)
        yield patch


def draw_parameters(name: str, seed: int = 0) -> dict[str, jax.Array]:
    """Random parameters of a "transformer" or a "text_encoder"; none is zero."""
    rng, drawn = np.random.default_rng(seed), {}
    make = partial(WanTransformer, train_dit.DIT) if name == "transformer" else partial(UMT5Encoder, train_text.TEXT)
    for path, p in flat_shapes(nnx.state(nnx.eval_shape(lambda: make(dtype=jnp.float32, rngs=nnx.Rngs(0))))).items():
        scale = p.shape[-2] ** -0.5 if path.endswith("kernel") else 0.2
        drawn[path] = jnp.asarray(scale * rng.normal(size=p.shape) + path.endswith("scale"), jnp.float32)
    return drawn


def write_vae(folder: Path, cfg: VAEConfig = VAE_CONFIG) -> None:
    """Write a random VAE, always the same one, as the trainer does but in float32."""
    rng, params = np.random.default_rng(0), {}
    for path, shape in flat_shapes(nnx.state(nnx.eval_shape(lambda: VAE(cfg, rngs=nnx.Rngs(0))))).items():
        scale = 0.1 if path.endswith("bias") else prod(shape.shape[:-1]) ** -0.5
        numbers = scale * rng.normal(size=shape.shape)
        params[path] = np.asarray(np.ones(shape.shape) if path.endswith("gamma") else numbers, np.float32)
    save_arrays(params, folder, RULES)
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan", **asdict(cfg)}))


def make_latents(count: int, shape: tuple[int, ...] = (2, 4, 6, 16)) -> Latents:
    """Noise in place of encoded clips, of all combinations in turn; every eighth clip shows two objects."""
    rng, table = np.random.default_rng(0), combinations()
    first, second = (table[(np.arange(count) * step + step) % len(table)] for step in (11, 7))
    things = [Thing(*rows.T[:3], *rng.integers(3, size=(2, count))) for rows in (first, second)]
    two, graded = np.arange(count) % 8 == 7, rng.random(count) < 0.5
    noise = rng.normal(size=(count, *shape)).astype(np.float16)
    return Latents(noise, Attributes(*things, two, first[:, 3], graded))
