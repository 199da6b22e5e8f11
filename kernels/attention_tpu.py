"""Attention on TPUs: JAX's Pallas kernel "splash attention", which streams over keys.

Rows go into it in whole blocks: pads behind the queries are cut off again, pads behind the keys are in a segment of
their own, at which no query looks. Not measured yet: its numbers are checked in interpret mode on CPUs, its programs
compiled for TPUs v4 to v7x without one.
"""

from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask import FullMask, MultiHeadMask
from jaxtyping import Array, Float, Int

LANES = 128  # of a vector register: what blocks are multiples of
BLOCK = 1024  # most rows of 16 bits in one; twice as many exceed the 16 MiB of fast memory of a kernel on a TPU v5


def block_size(rows: int, itemsize: int) -> int:
    """Rows of a block: of a single one where they fit into it, else what pads least from half of the most on.

    75,600 rows of 16 bits are 74 blocks of 1024 with 176 pads, 9,450 are 15 of 640 with 150 (10 of 1024: 790).
    """
    most = 2 * BLOCK // itemsize
    if rows <= most:
        return -(-rows // LANES) * LANES
    return min(range(most, most // 2 - 1, -LANES), key=lambda size: -rows % size)


def splash_attention(
    q: Float[Array, "b q n k"], k: Float[Array, "b s n k"], v: Float[Array, "b s n k"]
) -> Float[Array, "b q n k"]:
    """softmax(q k^T / sqrt(K)) v, in q's dtype."""
    return _without_pads(_splash(q, k, v, None, with_lse=False), q)


def splash_attention_with_lse(
    q: Float[Array, "b q n k"], k: Float[Array, "b s n k"], v: Float[Array, "b s n k"],
    key_length: Int[Array, " b"] | None,
) -> tuple[Float[Array, "b q n k"], Float[Array, "b q n"]]:  # fmt: skip
    """The same and the logarithm of its sum, in float32. Where key_length is 0, neither means anything.

    The kernel writes the logarithms 128 times over: 20 KiB a query of 40 heads beside the outputs.
    """
    out, (lse,) = _splash(q, k, v, key_length, with_lse=True)
    return _without_pads(out, q), _without_pads(lse, q)


def _splash(q: Array, k: Array, v: Array, key_length: Array | None, *, with_lse: bool) -> Any:
    queries, keys, heads, width = q.shape[1], k.shape[1], *q.shape[2:]
    sizes = splash.BlockSizes(*(block_size(rows, q.dtype.itemsize) for rows in (queries, keys)))
    q = (q.astype(jnp.float32) * width**-0.5).astype(q.dtype)  # the kernel does not scale
    q, k, v = _heads_first(q, sizes.block_q), _heads_first(k, sizes.block_kv), _heads_first(v, sizes.block_kv)
    kernel = splash.make_splash_mha(
        MultiHeadMask([FullMask((q.shape[2], k.shape[2]))] * heads),
        block_sizes=sizes, save_residuals=with_lse, head_shards=1, q_seq_shards=1,
    )  # fmt: skip
    segments = None
    if key_length is not None or k.shape[2] > keys:
        counts = jnp.full(q.shape[0], keys) if key_length is None else key_length
        hidden = jnp.arange(k.shape[2]) >= counts[:, None]
        segments = splash.SegmentIds(jnp.zeros((q.shape[0], q.shape[2]), jnp.int32), hidden.astype(jnp.int32))
    # products of 16 bits are exact in float32, and asked for more, as by "highest", the compiler refuses
    with nullcontext() if q.dtype == jnp.float32 else jax.default_matmul_precision("default"):
        return jax.vmap(kernel)(q, k, v, segments)


def _heads_first(x: Array, block: int) -> Array:
    """[b, rows, n, k] as [b, n, rows, k], with zeros up to whole blocks."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0))).swapaxes(1, 2)


def _without_pads(x: Array, q: Array) -> Array:
    """[b, n, rows, ...] as [b, q, n, ...]."""
    return x[:, :, : q.shape[1]].swapaxes(1, 2)
