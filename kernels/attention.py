"""Scaled dot-product attention: one public function, named implementations.

Reference (what every implementation computes): softmax(q k^T / sqrt(K) + bias) v per head, softmax in float32.
No implementation holds a queries x keys array beyond LOGITS_BYTES: cuDNN and the TPU's kernel stream over keys, the
XLA one maps over chunks of queries.

Keys that lie in several places are attended to part by part: `attention_with_lse` gives a part's output and what it
weighs, `merge` makes one of two parts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LOGITS_BYTES = 2**28  # XLA form: float32 logits of one chunk of queries, all heads

IMPLEMENTATIONS = ("cudnn", "tpu", "xla")


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
    it. implementation: "cudnn" (CUDA, 16-bit, no bias), "tpu" (TPUs, bfloat16 and float32, no bias, no gradient), "xla"
    (anywhere), None: without a bias cuDNN where it can run, and on TPUs "tpu" for heads of 64 or 128 in bfloat16, else
    XLA. A named one either runs or raises: ValueError for an unknown name or a bias it does not take, and the kernel's
    own error where it cannot run.
    """
    match _chosen(q, bias, implementation):
        case "cudnn":
            return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
        case "tpu":
            from jaxwan.kernels.attention_tpu import splash_attention

            return splash_attention(q, k, v)
    return _in_chunks(attend, q, k, v, bias)


class Attended(NamedTuple):
    """Attention over some of the keys. lse: log of the sum of exp(q k^T / sqrt(K) + bias) over them.

    A part without keys is out = 0, lse = -inf.
    """

    out: Float[Array, "b q n k"]
    lse: Float[Array, "b q n"]


def attention_with_lse(
    q: Float[Array, "b q n k"],
    k: Float[Array, "b s n k"],
    v: Float[Array, "b s n k"],
    *,
    bias: Float[Array, "b s"] | None = None,
    key_length: Int[Array, " b"] | None = None,
    implementation: str | None = None,
) -> Attended:
    """`attention` over some of the keys, out in q's dtype and lse in float32, for `merge`.

    Other arguments and errors are attention's. key_length: how many keys count, the first ones, from 0 to all; the
    others are finite and are not looked at. Where all keys are hidden, out is 0 and lse -inf. Not for training: cuDNN
    passes no gradient through lse, the TPU's kernel none at all.
    """
    match _chosen(q, bias, implementation):
        case "cudnn":
            return _none_is_nothing(_cudnn_with_lse(q, k, v, key_length), key_length)
        case "tpu":
            from jaxwan.kernels.attention_tpu import splash_attention_with_lse

            return _none_is_nothing(Attended(*splash_attention_with_lse(q, k, v, key_length)), key_length)
    return _in_chunks(attend_with_lse, q, k, v, _hiding(bias, key_length, k.shape[1]))


def merge(a: Attended, b: Attended) -> Attended:
    """Attention over the keys of `a` and `b`, which share none; out in lse's dtype, for one rounding after all merges.

    A part that saw nothing changes no bit of the other, so that `Attended` of zeros and -inf can begin a loop.
    """
    lse = jnp.logaddexp(a.lse, b.lse)
    total = jnp.where(jnp.isneginf(lse), 0, lse)  # both saw nothing: -inf less -inf would be NaN
    parts = [part.out.astype(lse.dtype) * jnp.exp(part.lse - total)[..., None] for part in (a, b)]
    return Attended(parts[0] + parts[1], lse)


def _chosen(q: Array, bias: Array | None, implementation: str | None) -> str:
    if implementation is None:
        fitting = {"cudnn": _cudnn_fits, "tpu": _tpu_fits} if bias is None else {}
        return next((name for name, fits in fitting.items() if fits(q)), "xla")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is unknown: choose one of {', '.join(IMPLEMENTATIONS)}")
    if implementation != "xla" and bias is not None:
        raise ValueError(f"implementation={implementation!r} takes no bias here: leave it out, or choose 'xla'")
    return implementation


def _cudnn_fits(q: Array) -> bool:
    sixteen_bit = q.dtype in (jnp.bfloat16, jnp.float16)
    fits = sixteen_bit and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    return fits and jax.default_backend() == "gpu"  # asked last: it starts the backend


def _tpu_fits(q: Array) -> bool:
    # float32 is asked for to be exact, and other widths are those of small models
    return q.dtype == jnp.bfloat16 and q.shape[-1] in (64, 128) and jax.default_backend() == "tpu"


def _cudnn_with_lse(q: Array, k: Array, v: Array, key_length: Array | None) -> Attended:
    # jax.nn's return_residual rounds lse to q's dtype: 3 % of a part's weight in bfloat16
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    lengths = {}
    if key_length is not None:
        key_length = key_length.astype(jnp.int32)
        all_queries = jnp.full_like(key_length, q.shape[1])
        lengths = dict(q_seqlen=all_queries, kv_seqlen=key_length, mask_type=MaskType.PADDING)
    made: Any = dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, return_residual=True, **lengths)
    return Attended(made[0], made[1].swapaxes(1, 2))  # lse is [b, n, q]


def _none_is_nothing(attended: Attended, key_length: Array | None) -> Attended:
    """`attended` with what no key means, whatever a kernel makes of a length of 0."""
    if key_length is None:
        return attended
    seen = (key_length > 0)[:, None, None]
    return Attended(jnp.where(seen[..., None], attended.out, 0), jnp.where(seen, attended.lse, -jnp.inf))


def _hiding(bias: Array | None, key_length: Array | None, keys: int) -> Array | None:
    """The bias that also hides the keys behind `key_length`."""
    if key_length is None:
        return bias
    counts = jnp.arange(keys) < key_length[:, None]
    return jnp.where(counts, jnp.float32(0) if bias is None else bias, -jnp.inf)


def attend(
    q: Float[Array, "b q n k"],
    k: Float[Array, "b s n k"],
    v: Float[Array, "b s n k"],
    bias: Float[Array, "b s"] | None = None,
) -> Float[Array, "b q n k"]:
    """The reference, with the whole queries x keys array: the oracle of the tests and one chunk of the XLA form."""
    return _mean(jax.nn.softmax(_logits(q, k, bias), axis=-1), v)


def attend_with_lse(
    q: Float[Array, "b q n k"],
    k: Float[Array, "b s n k"],
    v: Float[Array, "b s n k"],
    bias: Float[Array, "b s"] | None = None,
) -> Attended:
    """`attend` and its lse, the softmax being made from it."""
    logits = _logits(q, k, bias)
    lse = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.exp(logits - jnp.where(jnp.isneginf(lse), 0, lse)[..., None])  # all keys hidden: 0, not NaN
    return Attended(_mean(weights, v), lse.swapaxes(1, 2))


def _logits(q: Array, k: Array, bias: Array | None) -> Array:
    logits = jnp.einsum("bqnk,bsnk->bnqs", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return logits if bias is None else logits + bias[:, None, None]


def _mean(weights: Array, v: Array) -> Array:
    # heads first: with queries first, einsum makes v the left operand, and XLA turns the whole of the weights over
    return jnp.einsum("bnqs,bsnk->bnqk", weights.astype(v.dtype), v).swapaxes(1, 2)


def query_chunk(batch: int, queries: int, keys: int, heads: int) -> int:
    """Queries in a chunk so that its float32 logits stay within LOGITS_BYTES, chunks as even as can be.

    75,600 queries and keys, 40 heads: 12.1 MB of logits a query, so chunks of 22.
    """
    per_query = 4 * batch * heads * keys
    most = max(1, min(queries, LOGITS_BYTES // per_query))
    chunks = -(-queries // most)
    return -(-queries // chunks)


def _in_chunks(form: Callable[..., Any], q: Array, k: Array, v: Array, bias: Array | None) -> Any:
    """`form` over chunks of queries, one after the other; its outputs are [b, q, ...]."""
    b, s_q, n, d = q.shape
    chunk = query_chunk(b, s_q, k.shape[1], n)
    if chunk == s_q:
        return form(q, k, v, bias)
    chunks = -(-s_q // chunk)
    padded = jnp.pad(q, ((0, 0), (0, chunks * chunk - s_q), (0, 0), (0, 0)))
    parts = padded.reshape(b, chunks, chunk, n, d).swapaxes(0, 1)
    made = jax.lax.map(lambda part: form(part, k, v, bias), parts)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(b, chunks * chunk, *x.shape[3:])[:, :s_q], made)
