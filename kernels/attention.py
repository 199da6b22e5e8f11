"""Scaled dot-product attention: one public function, named implementations.

Reference (what every implementation computes): softmax(q k^T / sqrt(K) + bias) v per head, softmax in float32.
No implementation holds a queries x keys array beyond LOGITS_BYTES: cuDNN streams over keys, the XLA one maps over
chunks of queries.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LOGITS_BYTES = 2**28  # XLA form: float32 logits of one chunk of queries, all heads

IMPLEMENTATIONS = ("cudnn", "xla")


def attention(
    q: Float[Array, "b q n k"],
    k: Float[Array, "b s n k"],
    v: Float[Array, "b s n k"],
    *,
    bias: Float[Array, "b s"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "b q n k"]:
    """softmax(q k^T / sqrt(K) + bias) v, in q's dtype.

    bias: float32, one number a key, for all queries and heads; log(n) makes one key count as n equal ones, -inf hides
    it. implementation: "cudnn" (CUDA, 16-bit, no bias), "xla" (anywhere), None: cuDNN where it can run, else XLA. A
    named one either runs or raises: ValueError for an unknown name or a bias it does not take, and cuDNN's own error
    where it is missing.
    """
    if implementation is None:
        implementation = "cudnn" if bias is None and _cudnn_fits(q) else "xla"
    if implementation == "cudnn":
        if bias is not None:
            raise ValueError("implementation='cudnn' takes no bias here: leave it out, or choose 'xla'")
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    if implementation == "xla":
        return _attention_xla(q, k, v, bias)
    raise ValueError(f"implementation={implementation!r} is unknown: choose one of {', '.join(IMPLEMENTATIONS)}")


def _cudnn_fits(q: Array) -> bool:
    sixteen_bit = q.dtype in (jnp.bfloat16, jnp.float16)
    fits = sixteen_bit and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    return fits and jax.default_backend() == "gpu"  # asked last: it starts the backend


def attend(
    q: Float[Array, "b q n k"],
    k: Float[Array, "b s n k"],
    v: Float[Array, "b s n k"],
    bias: Float[Array, "b s"] | None = None,
) -> Float[Array, "b q n k"]:
    """The reference, with the whole queries x keys array: the oracle of the tests and one chunk of the XLA form."""
    logits = jnp.einsum("bqnk,bsnk->bnqs", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if bias is not None:
        logits += bias[:, None, None]
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bnqs,bsnk->bqnk", weights, v)


def query_chunk(batch: int, queries: int, keys: int, heads: int) -> int:
    """Queries in a chunk so that its float32 logits stay within LOGITS_BYTES, chunks as even as can be.

    75,600 queries and keys, 40 heads: 12.1 MB of logits a query, so chunks of 22.
    """
    per_query = 4 * batch * heads * keys
    most = max(1, min(queries, LOGITS_BYTES // per_query))
    chunks = -(-queries // most)
    return -(-queries // chunks)


def _attention_xla(q: Array, k: Array, v: Array, bias: Array | None) -> Array:
    b, s_q, n, d = q.shape
    chunk = query_chunk(b, s_q, k.shape[1], n)
    if chunk == s_q:
        return attend(q, k, v, bias)
    chunks = -(-s_q // chunk)
    padded = jnp.pad(q, ((0, 0), (0, chunks * chunk - s_q), (0, 0), (0, 0)))
    parts = padded.reshape(b, chunks, chunk, n, d).swapaxes(0, 1)
    out = jax.lax.map(lambda part: attend(part, k, v, bias), parts)
    return out.swapaxes(0, 1).reshape(b, chunks * chunk, n, d)[:, :s_q]
