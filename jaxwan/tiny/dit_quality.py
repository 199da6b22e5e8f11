"""What a denoiser in training has learnt: its loss by noise level, whether it heeds each attribute of a caption, and
clips it makes, read as the evaluation reads them."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxwan.models.text_encoder import UMT5Encoder
from jaxwan.models.transformer import WanTransformer
from jaxwan.models.vae import VAE
from jaxwan.models.video_coder import VideoCoder
from jaxwan.pipelines.media import save_image
from jaxwan.pipelines.prompt import Tokenizer
from jaxwan.tiny.attributes import READ, Attributes, combinations, row_of
from jaxwan.tiny.captions import ROWS, Captions, tokenize_captions
from jaxwan.tiny.grammar import caption
from jaxwan.tiny.latents import Latents
from jaxwan.tiny.muon import Params
from jaxwan.tiny.reader import read
from jaxwan.tiny.scoring import make_cases, marks_of
from jaxwan.tiny.tokenizer import SPECIAL
from jaxwan.tiny.train_dit import DIT, FLOW_SHIFT, embed_captions, flow_loss, predict
from jaxwan.tiny.train_text import TEXT
from jaxwan.tiny.training import module_with

BINS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.97)
SWAPPED_AT = (0.8, 0.9)
SAMPLES, STEPS, GUIDANCE = 32, 20, 4.0
BATCH = 16  # clips at a time; counts of clips are multiples of it
STRIP = 5  # frames of a clip on the picture
END = SPECIAL.index("</s>")


class Judge:
    """Judges a denoiser's parameters on clips or pictures that training never sees. encoder: the text encoder's."""

    def __init__(
        self, encoded: Latents, tokenizer: Tokenizer, encoder: Params, vae: VAE, folder: Path, *, count: int = 64
    ):
        self._encoder = encoder
        alone = np.flatnonzero(~encoded.attributes.two)[:count]
        self._x0 = jnp.asarray(encoded.latents[alone], jnp.float32)
        shown = [jax.tree.map(lambda x, i=i: x[i], encoded.attributes) for i in alone]
        self._tokenize = partial(tokenize_captions, tokenizer)
        wordings = {"": shown} | {name: [_swapped(s, name, i) for i, s in enumerate(shown)] for name in READ}
        self._captions = {
            name: self._tokenize([caption(s, i, plain=True) for i, s in enumerate(row)])
            for name, row in wordings.items()
        }
        self._cases = make_cases(SAMPLES, seed=1)
        self._coder, self._folder = VideoCoder(vae), folder

    def losses(self, params: Params, levels: Sequence[float] = BINS) -> dict[float, float]:
        """Mean loss at noise levels, under the clips' own captions."""
        return {level: float(_loss(params, self._encoder, self._x0, level, self._captions[""])) for level in levels}

    def gaps(self, params: Params) -> dict[str, float]:
        """By how much the loss grows, in per cent, when a caption names another value of one attribute."""
        right = self.losses(params, SWAPPED_AT)
        return {
            f"{name}@{level}": round(
                100 * (float(_loss(params, self._encoder, self._x0, level, self._captions[name])) / right[level] - 1), 1
            )
            for level in SWAPPED_AT
            for name in READ
        }

    def samples(self, params: Params, name: str) -> dict[str, float]:
        """Share of each attribute that is read right off clips made for captions; the clips go to `<name>.png`."""
        captions = self._tokenize([case.caption for case in self._cases])
        noise = jax.random.normal(jax.random.key(7), (SAMPLES, *self._x0.shape[1:]))
        latents = [
            np.asarray(_sample(params, self._encoder, noise[i : i + BATCH], _slice(captions, i)))
            for i in range(0, SAMPLES, BATCH)
        ]
        frames = [(np.asarray(self._coder.decode(z[None])[0]) + 1) / 2 for part in latents for z in part]
        marks = [marks_of(case, read(clip)) for case, clip in zip(self._cases, frames, strict=True)]
        self._folder.mkdir(parents=True, exist_ok=True)
        save_image(_page(frames), self._folder / f"{name}.png")
        return {f"read {name}": float(np.mean([mark[name] for mark in marks])) for name in READ}


def _slice(captions: Captions, start: int) -> Captions:
    return Captions(*(x[start : start + BATCH] for x in captions))


def _swapped(shown: Attributes, name: str, seed: int) -> Attributes:
    """The same clip with another value of one attribute, such that training could have seen it."""
    own, column = row_of(shown), READ.index(name)
    others = np.delete(own, column)
    table = combinations()
    rows = table[(np.delete(table, column, axis=1) == others).all(axis=1) & (table[:, column] != own[column])]
    row = rows[seed % len(rows)]
    first = shown.first._replace(colour=row[0], shape=row[1], motion=row[2])
    return shown._replace(first=first, background=row[3])


@jax.jit
def _loss(
    params: Params, encoder: Params, x0: Float[Array, "b t y x z"], level: Float[Array, ""], captions: Captions
) -> Float[Array, ""]:
    dit, text = _models(params, encoder)
    noise = jax.random.normal(jax.random.key(3), x0.shape)

    def part(rows):
        x0, noise, captions = rows
        context = embed_captions(dit, text, captions)
        return flow_loss(dit, context, x0, jnp.full(len(x0), level), noise)

    parts = jax.tree.map(lambda x: jnp.asarray(x).reshape(-1, BATCH, *x.shape[1:]), (x0, noise, captions))
    return jax.lax.map(part, parts).mean()


@jax.jit
def _sample(
    params: Params, encoder: Params, noise: Float[Array, "b t y x z"], captions: Captions
) -> Float[Array, "b t y x z"]:
    """Latents after Euler steps with guidance."""
    dit, text = _models(params, encoder)
    empty = Captions(jnp.zeros_like(captions.tokens).at[:, 0].set(END), captions.mask & (np.arange(ROWS) == 0))
    contexts = [embed_captions(dit, text, c) for c in (captions, empty)]
    even = np.linspace(1, 0, STEPS + 1, dtype=np.float32)
    sigmas = FLOW_SHIFT * even / (1 + (FLOW_SHIFT - 1) * even)

    def step(x: Array, ends: tuple[Array, Array]) -> tuple[Array, None]:
        level = jnp.full(len(x), ends[0])
        cond, uncond = (predict(dit, x, level, context) for context in contexts)
        return x + (ends[1] - ends[0]) * (uncond + GUIDANCE * (cond - uncond)), None

    return jax.lax.scan(step, noise, (sigmas[:-1], sigmas[1:]))[0]


def _models(params: Params, encoder: Params) -> tuple[WanTransformer, UMT5Encoder]:
    """The denoiser and the text encoder, in bfloat16."""
    made = (partial(WanTransformer, DIT), params), (partial(UMT5Encoder, TEXT), encoder)
    dit, text = (module_with(make, given, jnp.bfloat16) for make, given in made)
    return dit, text


def _page(frames: Sequence[Float[np.ndarray, "f h w 3"]]) -> Float[np.ndarray, "y x 3"]:
    """Clips as strips of a few frames, in two columns."""
    strips = [np.concatenate(clip[:: max(1, len(clip) // (STRIP - 1))], axis=1) for clip in frames]
    half = len(strips) // 2
    return np.concatenate([np.concatenate(column, axis=0) for column in (strips[:half], strips[half:])], axis=1)
