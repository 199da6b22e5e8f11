"""Captions as tokens, as the bundled model's text encoder sees them in training."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int

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
