"""Captions as tokens, as the bundled model's text encoder sees them in training."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxwan.pipelines.prompt import Tokenizer
from jaxwan.tiny.attributes import Attributes
from jaxwan.tiny.grammar import caption

ROWS = 40  # tokens of a caption, and at least one row behind them


class Captions(NamedTuple):
    """Tokens of captions, and which of them are real."""

    tokens: Int[np.ndarray, "n l"]
    mask: Bool[np.ndarray, "n l"]


def draw_captions(tokenizer: Tokenizer, attributes: Attributes, rng: np.random.Generator) -> Captions:
    """Captions of a batch of clips, worded at random, of fewer than ROWS tokens: of the few that are longer, another
    wording is drawn."""
    texts = []
    for row in range(len(attributes.two)):
        shown = jax.tree.map(lambda x, row=row: x[row], attributes)
        text = caption(shown, int(rng.integers(1 << 62)))
        while len(tokenizer.backend.encode(text).ids) >= ROWS:
            text = caption(shown, int(rng.integers(1 << 62)))
        texts.append(text)
    return tokenize_captions(tokenizer, texts)


def tokenize_captions(tokenizer: Tokenizer, texts: Sequence[str]) -> Captions:
    """Tokens of texts that have fewer than ROWS."""
    ids = [encoding.ids for encoding in tokenizer.backend.encode_batch(list(texts))]
    tokens = np.full((len(ids), ROWS), tokenizer.pad_id, np.int32)
    mask = np.zeros((len(ids), ROWS), bool)
    for i, row in enumerate(ids):
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    return Captions(tokens, mask)


def fold_rows(
    rows: Float[Array, "b l c"], mask: Bool[Array | np.ndarray, "b l"], length: int
) -> tuple[Float[Array, "b l c"], Float[Array, "b l"]]:
    """Context rows of L tokens that count as `length` of them, zero behind the mask, and the logarithm of each count.

    Attention sees the same: the first row behind the mask counts as all that would follow, the others not at all. The
    mask must leave one such row, unless L is `length`.
    """
    real = mask.sum(axis=1, keepdims=True)
    first_behind = jnp.arange(mask.shape[1]) == real
    counts = jnp.where(mask, 0.0, jnp.where(first_behind, jnp.log(length - real), -jnp.inf))
    return jnp.where(mask[..., None], rows, 0), counts.astype(jnp.float32)
