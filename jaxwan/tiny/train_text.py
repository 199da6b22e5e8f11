"""Trains the bundled model's text encoder: every row that it makes of a caption is to tell what the clip shows.

The published models take a text encoder that knows its language. This one learns its grammar before any picture is
drawn: a linear layer reads colours, shapes, motions and the background off each row, and is thrown away afterwards.
A denoiser that is trained together with its text encoder learns the grammar many times more slowly, because most of
its loss does not depend on the caption.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxwan.config import TextEncoderConfig
from jaxwan.models.text_encoder import UMT5Encoder
from jaxwan.pipelines.prompt import Tokenizer
from jaxwan.tiny.attributes import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    READ,
    SHAPES,
    SIZES,
    SPEEDS,
    Attributes,
    draw_attributes,
)
from jaxwan.tiny.captions import Captions, draw_captions, tokenize_captions
from jaxwan.tiny.muon import Params
from jaxwan.tiny.scoring import make_cases
from jaxwan.tiny.training import Phase, TrainState, make_rate, make_step, module_with, parameters, start

TEXT = TextEncoderConfig(vocab_size=320, d_model=96, d_kv=24, d_ff=256, num_layers=3, num_heads=4)

STEPS = 1500
BATCH = 256  # captions a step
RATE, FALLING = 3e-3, 0.4
AVERAGE = 0.998
JUDGED = 256  # captions of clips that training sees, and as many of held-out ones

# Values of what is said of each object; behind them come the background's, whether it is graded, and whether there
# are two objects.
_OF_THINGS = {"colour": len(COLOURS), "shape": len(SHAPES), "motion": len(MOTIONS), "size": len(SIZES),
              "speed": len(SPEEDS)}  # fmt: skip
NUM_LABELS = sum(_OF_THINGS.values()) + len(BACKGROUNDS) + 2


class Teller(nnx.Module):
    """The text encoder, and what reads labels off its rows."""

    def __init__(self, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.text_encoder = UMT5Encoder(TEXT, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(TEXT.d_model, NUM_LABELS, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, captions: Captions) -> Float[Array, "n l k"]:
        """Logits of the labels, float32, read off every row."""
        return self.head(self.text_encoder(captions.tokens, captions.mask).astype(jnp.float32))


def make_phase(
    tokenizer: Tokenizer, dtype: DTypeLike, optimizer: optax.GradientTransformation, *, scale: float = 1.0,
    seed: int = 0,
) -> Phase:  # fmt: skip
    """The training, with `scale` times the planned steps, each on captions of its own."""
    steps = round(scale * STEPS)

    def loss(params: Params, key: PRNGKeyArray, captions: Captions, wanted: Float[Array, "n k"]) -> Float[Array, ""]:
        logits = module_with(Teller, params, dtype)(captions)
        errors = optax.sigmoid_binary_cross_entropy(logits, wanted[:, None]).sum(-1)
        return (errors * captions.mask).sum() / captions.mask.sum()

    compiled = make_step(loss, optimizer, make_rate(RATE, FALLING, steps), steps=steps, decay=AVERAGE)

    def step(state: TrainState, key: PRNGKeyArray, done: int) -> tuple[TrainState, Float[Array, ""]]:
        number = int(state.step)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), number), BATCH)
        shown = jax.tree.map(np.asarray, _draw(keys))
        given = draw_captions(tokenizer, shown, np.random.default_rng((seed, number)))
        return compiled(state, key, done, given, labels(shown))

    return Phase("captions", steps, step)


_draw = jax.jit(jax.vmap(draw_attributes))


def labels(shown: Attributes) -> Float[np.ndarray, "n k"]:
    """What a batch of clips shows as ones and zeros; of two objects both, whichever is which."""
    columns = []
    for name, count in _OF_THINGS.items():
        first, second = (np.eye(count, dtype=np.float32)[getattr(t, name)] for t in (shown.first, shown.second))
        columns.append(np.maximum(first, second * shown.two[:, None]))
    columns.append(np.eye(len(BACKGROUNDS), dtype=np.float32)[shown.background])
    columns.append(np.stack([shown.graded, shown.two], axis=1).astype(np.float32))
    return np.concatenate(columns, axis=1)


def make_report(tokenizer: Tokenizer, dtype: DTypeLike) -> Callable[[Params], dict[str, float]]:
    """Measures, for parameters, how often the likeliest colour, shape, motion and background of a row are right, of
    clips with one object that training sees and of held-out ones."""
    cases = {"seen": [], "held out": []}
    for case in make_cases(2 * JUDGED, seed=1):
        cases["held out" if case.held_out else "seen"].append(case)
    judged = {
        kind: (np.stack([case.row for case in own]), tokenize_captions(tokenizer, [case.caption for case in own]))
        for kind, own in cases.items()
    }

    @jax.jit
    def logits(params: Params, given: Captions) -> Float[Array, "n l k"]:
        return module_with(Teller, params, dtype)(given)

    def report(params: Params) -> dict[str, float]:
        return {
            f"{kind} {name}": round(float(share), 4)
            for kind, (rows, given) in judged.items()
            for name, share in zip(READ, right(np.asarray(logits(params, given)), rows, given.mask), strict=True)
        }

    return report


def right(
    logits: Float[np.ndarray, "n l k"], rows: Int[np.ndarray, "n 4"], mask: Bool[np.ndarray, "n l"]
) -> Float[np.ndarray, " 4"]:
    """Share of the real rows off which each of READ is read right."""
    spans = dict(zip((*_OF_THINGS, "background"), np.cumsum((0, *_OF_THINGS.values())), strict=True))
    counts = _OF_THINGS | {"background": len(BACKGROUNDS)}
    read = [logits[..., spans[name] : spans[name] + counts[name]].argmax(-1) for name in READ]
    return np.array([(r == wanted[:, None])[mask].mean() for r, wanted in zip(read, rows.T, strict=True)])


def initial_parameters(seed: int) -> Params:
    """Random parameters; attention starts without a sense of distance, and with logits of order 1."""

    @jax.jit
    def draw(key: PRNGKeyArray) -> Params:
        return parameters(Teller(dtype=jnp.float32, rngs=nnx.Rngs(key)))

    params = draw(jax.random.key(seed))
    queries, bias = "text_encoder.layers.q.kernel", "text_encoder.layers.position_bias"
    scaled = params[queries] * TEXT.d_kv**-0.5  # the encoder does not divide its logits
    return params | {queries: scaled, bias: jnp.zeros_like(params[bias])}


def abstract_state(optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes and dtypes of a state."""
    return jax.eval_shape(lambda: start(parameters(Teller(dtype=jnp.float32, rngs=nnx.Rngs(0))), optimizer))
