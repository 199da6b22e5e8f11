"""The UMT5 encoder that turns prompt tokens into the context of the Wan transformer.

It differs from T5 in one thing: every layer owns a relative position bias. From other transformers it differs in that
logits are not divided by sqrt(K), norms neither centre nor shift, and no layer has a bias vector.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxwan.config import TextEncoderConfig
from jaxwan.models.layers import Linear, RMSNorm, param, scan_layers, stack
from jaxwan.sharding.collectives import position, psum


class UMT5Encoder(nnx.Module):
    """Tokens -> last hidden state, everything in `dtype` but softmax and norm statistics, which are float32.

    Source: transformers models/umt5/modeling_umt5.py:UMT5EncoderModel; Wan2.2 wan/modules/t5.py:T5Encoder.
    """

    def __init__(self, cfg: TextEncoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.cfg = cfg
        self.embedding = param(jax.random.normal(rngs.params(), (cfg.vocab_size, cfg.d_model), dtype), ("row",))
        self.layers = stack(lambda rngs: _Layer(cfg, dtype=dtype, rngs=rngs), cfg.num_layers, rngs)
        self.norm = RMSNorm(cfg.d_model, cfg.layer_norm_epsilon, dtype=dtype)

    def __call__(
        self, tokens: Int[Array, "b l"], mask: Bool[Array, "b l"] | Int[Array, "b l"]
    ) -> Float[Array, "b l c"]:
        """Rows behind the mask are not attended to; what they hold themselves means nothing."""
        return self.norm(self.run_layers(self.embed(tokens), mask))

    def embed(self, tokens: Int[Array, "b l"], axis: str | None = None) -> Float[Array, "b l c"]:
        """Each token's row of the table.

        axis: inside shard_map, a mesh axis whose positions hold equal shares of the table's rows, in order. Each looks
        up what it has, and a sum with the zeros of the others is exact (`collectives.gather`).
        """
        table = self.embedding[...]
        if axis is None:
            return table[tokens]
        row = tokens - position(axis) * len(table)
        here = (row >= 0) & (row < len(table))
        return psum(jnp.where(here[..., None], table[jnp.where(here, row, 0)], 0), axis)

    def run_layers(
        self, x: Float[Array, "b l c"], mask: Bool[Array, "b l"] | Int[Array, "b l"]
    ) -> Float[Array, "b l c"]:
        """All layers, or those that this module has of them."""
        buckets = position_buckets(
            x.shape[1], self.cfg.relative_attention_num_buckets, self.cfg.relative_attention_max_distance
        )
        visible = mask.astype(bool)[:, None, None, :]
        return scan_layers(self.layers, x, lambda layer, x: layer(x, visible, buckets))


class _Layer(nnx.Module):
    def __init__(self, cfg: TextEncoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        def linear(d_in: int, d_out: int) -> Linear:
            return Linear(d_in, d_out, bias=False, dtype=dtype, rngs=rngs)

        inner = cfg.num_heads * cfg.d_kv  # need not be d_model
        self.cfg = cfg
        self.attention_norm = RMSNorm(cfg.d_model, cfg.layer_norm_epsilon, dtype=dtype)
        self.q, self.k, self.v = (linear(cfg.d_model, inner) for _ in range(3))
        self.o = linear(inner, cfg.d_model)
        self.position_bias = param(
            jax.random.normal(rngs.params(), (cfg.relative_attention_num_buckets, cfg.num_heads), dtype)
        )
        self.mlp_norm = RMSNorm(cfg.d_model, cfg.layer_norm_epsilon, dtype=dtype)
        self.gate, self.up = linear(cfg.d_model, cfg.d_ff), linear(cfg.d_model, cfg.d_ff)
        self.down = linear(cfg.d_ff, cfg.d_model)

    def __call__(self, x, visible, buckets):
        x = x + self._attention(self.attention_norm(x), visible, buckets)
        y = self.mlp_norm(x)
        return x + self.down(jax.nn.gelu(self.gate(y), approximate=True) * self.up(y))

    def _attention(self, x, visible, buckets):
        q_BLNK, k_BLNK, v_BLNK = (
            f(x).reshape(*x.shape[:-1], self.cfg.num_heads, self.cfg.d_kv) for f in (self.q, self.k, self.v)
        )
        # XLA's own: a bias for every pair of 512 positions is what kernels/attention.py does not take
        bias_1NLL = self.position_bias[...].T[:, buckets][None]
        y = jax.nn.dot_product_attention(q_BLNK, k_BLNK, v_BLNK, bias=bias_1NLL, mask=visible, scale=1.0)
        return self.o(y.reshape(*x.shape[:-1], -1))


def position_buckets(length: int, num_buckets: int, max_distance: int) -> Int[np.ndarray, "q k"]:
    """Bucket of the distance k - q, for each pair of positions; made on the host.

    Half of the buckets are for keys after the query. In each half the first half counts distances one by one, the
    others widen with the logarithm up to max_distance. With 32 and 128: distances 0-7 have buckets 0-7, and buckets
    8-15 begin at distances 8, 12, 16, 23, 32, 46, 64 and 91; the same plus 16 for keys after the query.
    Source: transformers models/umt5/modeling_umt5.py:UMT5Attention._relative_position_bucket.
    """
    position = np.arange(length)
    offset = position[None, :] - position[:, None]
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(offset)
    octaves = np.log(np.maximum(distance, exact) / exact) / math.log(max_distance / exact)
    wide = np.minimum(exact + (octaves * (half - exact)).astype(np.int32), half - 1)
    return (np.where(distance < exact, distance, wide) + half * (offset > 0)).astype(np.int32)
