"""Trains the bundled model's denoisers: one base model over all noise levels, then two experts that go on from it.

The base learns single pictures first: their steps see four times the samples, and shape needs no motion. All is
trained on encoded clips (`latents`) with flow matching: x = (1 - sigma) x0 + sigma noise, and the target is
noise - x0. The text encoder (`train_text`) is trained before and stays as it is.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxwan.config import TransformerConfig
from jaxwan.models.rope import rope_tables
from jaxwan.models.text_encoder import UMT5Encoder
from jaxwan.models.transformer import Context, WanTransformer, token_grid
from jaxwan.pipelines.prompt import MAX_TOKENS, Tokenizer
from jaxwan.tiny.captions import Captions, draw_captions, fold_rows, tokenize_captions
from jaxwan.tiny.latents import Latents
from jaxwan.tiny.muon import Params, muon
from jaxwan.tiny.train_text import TEXT
from jaxwan.tiny.training import Phase, TrainState, make_rate, make_step, module_with, parameters, start

DIT = TransformerConfig(
    num_attention_heads=4, attention_head_dim=32, ffn_dim=512, num_layers=8, text_dim=96, freq_dim=256
)

FLOW_SHIFT = 3.0
NO_CAPTION = 0.1  # share of samples that are shown the empty caption, for guidance
WEIGHT_DECAY = 0.01
AVERAGE = 0.9995
HIGH, LOW = (0.85, 1.0), (0.0, 0.9)  # noise levels of the experts, which share the border at 0.875


class Plan(NamedTuple):
    """A phase: its steps, what it sees and how many a step, learning rate, share of steps in which that falls to 0."""

    name: str
    steps: int
    kind: str
    batch: int
    rate: float
    falling: float
    sigmas: tuple[float, float] = (0.0, 1.0)


BASE = (
    Plan("pictures", 5000, "pictures", 64, 3e-3, 0.0),
    Plan("clips", 20000, "clips", 16, 3e-3, 0.4),
)
EXPERT_PLANS = {
    "high": (Plan("high noise", 6000, "clips", 16, 2e-3, 1.0, HIGH),),
    "low": (Plan("low noise", 6000, "clips", 16, 2e-3, 1.0, LOW),),
}


# Steps


def make_phases(
    plans: Sequence[Plan], data: Callable[[str], "Data"], dtype: DTypeLike, encoder: Params, *, scale: float = 1.0
) -> list[Phase]:
    """The phases, with `scale` times the planned steps. encoder: the text encoder's parameters, which stay."""
    optimizer, text = make_optimizer(), module_with(partial(UMT5Encoder, TEXT), encoder, dtype)
    return [_make_phase(plan, round(scale * plan.steps), data, dtype, optimizer, text) for plan in plans]


def _make_phase(
    plan: Plan, steps: int, data: Callable[[str], "Data"], dtype: DTypeLike, optimizer: optax.GradientTransformation,
    encoder: UMT5Encoder,
) -> Phase:  # fmt: skip
    def loss(
        params: Params,
        key: PRNGKeyArray,
        latents: Float[Array, "n t y x z"],
        rows: Int[Array, " b"],
        captions: Captions,
    ) -> Float[Array, ""]:
        dit = module_with(partial(WanTransformer, DIT), params, dtype)
        x0 = latents[rows].astype(jnp.float32)
        drawing, noising = jax.random.split(key)
        sigmas = draw_sigmas(drawing, len(rows), plan.sigmas)
        context = embed_captions(dit, encoder, captions)
        return flow_loss(dit, context, x0, sigmas, jax.random.normal(noising, x0.shape)).mean()

    rate = make_rate(plan.rate, plan.falling, steps)
    compiled = make_step(loss, optimizer, rate, steps=steps, decay=AVERAGE)

    def step(state: TrainState, key: PRNGKeyArray, done: int) -> tuple[TrainState, Float[Array, ""]]:
        return compiled(state, key, done, *data(plan.kind).draw(int(state.step), plan.batch))

    return Phase(plan.name, steps, step)


def draw_sigmas(key: PRNGKeyArray, count: int, among: tuple[float, float]) -> Float[Array, " {count}"]:
    """Noise levels spread evenly over the sampler's own steps, one in each part; those of an expert's range only."""
    low, high = (level / (FLOW_SHIFT - (FLOW_SHIFT - 1) * level) for level in among)
    even = (jnp.arange(count) + jax.random.uniform(key, (count,))) / count
    u = low + even * (high - low)
    return FLOW_SHIFT * u / (1 + (FLOW_SHIFT - 1) * u)


def flow_loss(
    dit: WanTransformer, context: Context, x0: Float[Array, "b t y x z"], sigmas: Float[Array, " b"],
    noise: Float[Array, "b t y x z"],
) -> Float[Array, " b"]:  # fmt: skip
    """Mean squared error of the velocity, of each sample."""
    level = sigmas[:, None, None, None, None]
    velocity = predict(dit, (1 - level) * x0 + level * noise, sigmas, context)
    return ((velocity - (noise - x0)) ** 2).mean((1, 2, 3, 4))


def predict(
    dit: WanTransformer, noisy: Float[Array, "b t y x z"], sigmas: Float[Array, " b"], context: Context
) -> Float[Array, "b t y x z"]:
    """Velocity, float32, as `WanTransformer` gives it; gradients make each layer's insides anew, which is quicker."""
    grid = token_grid(dit.cfg, noisy.shape[1:])
    rope = rope_tables(grid, dit.cfg.attention_head_dim)
    temb, modulation = dit.embed_time(1000 * sigmas[:, None])
    graph, stacked = nnx.split(dit.blocks)

    @partial(jax.checkpoint, prevent_cse=False)
    def layer(x: Array, weights: nnx.State) -> tuple[Array, None]:
        return nnx.merge(graph, weights)(x, context, modulation, rope), None

    x, _ = jax.lax.scan(layer, dit.embed_latents(noisy), stacked)
    return dit.head(x, temb, grid).astype(jnp.float32)


def embed_captions(dit: WanTransformer, encoder: UMT5Encoder, captions: Captions) -> Context:
    """Context of captions: one row behind each stands for all that inference pads with."""
    rows = encoder(captions.tokens, captions.mask)
    rows, log_counts = fold_rows(rows, captions.mask, MAX_TOKENS)
    return dit.embed_context(rows, None)._replace(bias=log_counts)


def make_optimizer() -> optax.GradientTransformation:
    """Muon on the matrices of blocks, text layers and text projections; AdamW on all else, at half the rate."""
    by_muon = muon(
        _stacked_axes,
        scale=lambda inputs, outputs: 0.2 * max(inputs, outputs) ** 0.5,
        adam_rate=0.5,
        weight_decay=WEIGHT_DECAY,
        dtype=jnp.bfloat16,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), by_muon)


def _stacked_axes(path: str) -> int | None:
    if not path.endswith("kernel"):
        return None
    if path.startswith(("blocks.", "text_encoder.layers.")):
        return 1
    return 0 if path.startswith("text_embedder.") else None


def initial_parameters(seed: int) -> Params:
    """Random parameters; what a layer adds to its input starts at zero, and the velocity too."""

    @jax.jit
    def draw(key: PRNGKeyArray) -> Params:
        return parameters(WanTransformer(DIT, dtype=jnp.float32, rngs=nnx.Rngs(key)))

    params = draw(jax.random.key(seed))
    for path in params:
        if path.startswith(("time_proj", "proj_out")) or path.endswith(("scale_shift_table", "attn2.out.kernel")):
            params[path] = jnp.zeros_like(params[path])
    return params


def abstract_state() -> TrainState:
    """Shapes and dtypes of a state."""

    def begin() -> TrainState:
        return start(parameters(WanTransformer(DIT, dtype=jnp.float32, rngs=nnx.Rngs(0))), make_optimizer())

    return jax.eval_shape(begin)


# Data


class Data:
    """Encoded clips or pictures on the device, and captions drawn for them by step number."""

    def __init__(self, encoded: Latents, tokenizer: Tokenizer, seed: int = 0):
        self.latents = jnp.asarray(encoded.latents)
        self._attributes, self._tokenizer, self._seed = encoded.attributes, tokenizer, seed
        self._empty = tokenize_captions(tokenizer, [""])

    def draw(self, step: int, count: int) -> tuple[Float[Array, "n t y x z"], Int[np.ndarray, " b"], Captions]:
        """All latents, the rows of a step's samples and their captions, a few of them empty."""
        rng = np.random.default_rng((self._seed, step))
        rows = rng.choice(len(self.latents), count, replace=False).astype(np.int32)
        empty = rng.random(count) < NO_CAPTION
        worded = draw_captions(self._tokenizer, jax.tree.map(lambda x: x[rows], self._attributes), rng)
        captions = [np.where(empty[:, None], *pair) for pair in zip(self._empty, worded, strict=True)]
        return self.latents, rows, Captions(*captions)
