"""What tests compare with, and how."""

import jax
import numpy as np


def relative_error(actual, expected) -> float:
    """||actual - expected|| / ||expected|| in float64."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def plain_attention(q, k, v, bias=None):
    """softmax(q k^T / sqrt(K) + bias) v and the logarithm of the softmax's sum, head by head in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    bias = np.zeros(k.shape[:2]) if bias is None else np.asarray(bias, np.float64)
    out, lse = np.empty_like(q), np.empty(q.shape[:-1])
    for b, n in np.ndindex(q.shape[0], q.shape[2]):
        logits = q[b, :, n] @ k[b, :, n].T / np.sqrt(q.shape[-1]) + bias[b]
        top = logits.max(axis=1, keepdims=True)
        weights = np.exp(logits - top)
        out[b, :, n] = weights / weights.sum(axis=1, keepdims=True) @ v[b, :, n]
        lse[b, :, n] = top[:, 0] + np.log(weights.sum(axis=1))
    return out, lse


def exact_attention(q, k, v, *, bias=None):
    """`plain_attention` inside of programs, rounded once: sums over hundreds of rows that no compiler puts in order."""
    shape = jax.ShapeDtypeStruct(q.shape, q.dtype)
    return jax.pure_callback(lambda *x: plain_attention(*x)[0].astype(q.dtype), shape, q, k, v, bias)
