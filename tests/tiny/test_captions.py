"""Rows of a text that are alike, of which one counts for all."""

import jax.numpy as jnp
import numpy as np
from oracle import plain_attention, relative_error

from jaxwan.kernels.attention import attend
from jaxwan.tiny.captions import fold_rows


def test_folded_rows_and_their_counts():
    mask = jnp.array([[True, True, False, False, False], [False] * 5, [True] * 4 + [False]])
    rows, log_counts = fold_rows(jnp.ones((3, 5, 2)), mask, 512)
    np.testing.assert_array_equal(rows, np.repeat(mask[..., None], 2, axis=2))
    counts = [[1, 1, 510, 0, 0], [512, 0, 0, 0, 0], [1, 1, 1, 1, 508]]
    np.testing.assert_allclose(np.exp(log_counts), counts, rtol=1e-6)
    np.testing.assert_array_equal(fold_rows(rows, jnp.ones((3, 5), bool), 5)[1], np.zeros((3, 5)))


def test_attention_to_folded_rows_is_that_to_all_of_them():
    lengths = np.array([[3], [0], [15]])
    rng = np.random.default_rng(0)
    q, text = (jnp.asarray(rng.standard_normal((3, n, 2, 8), np.float32)) for n in (7, 512))
    text *= (np.arange(512) < lengths)[..., None, None]
    rows, log_counts = fold_rows(text[:, :16].reshape(3, 16, 16), jnp.arange(16) < lengths, 512)
    rows, text = rows.reshape(3, 16, 2, 8) + 0.5, text + 0.5  # the rows behind are alike, not nothing
    # logits below 16 are rounded to 5e-7 of a weight; sums over 512 rows in float32 would be the less exact side
    assert relative_error(attend(q, rows, rows, log_counts), plain_attention(q, text, text)[0]) < 1e-6
