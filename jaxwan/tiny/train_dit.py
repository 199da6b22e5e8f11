"""Trains the bundled model's text encoder and denoisers: one base model over all noise levels, then two experts.

The base learns single pictures first: their steps see four times the samples, and shape needs no motion. The text
encoder trains with the base and is frozen before the experts go on from it, so that both share it. All is trained
on encoded clips (`latents`) with flow matching: x = (1 - sigma) x0 + sigma noise, and the target is noise - x0.
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
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxwan.config import TextEncoderConfig, TransformerConfig
from jaxwan.models.rope import rope_tables
from jaxwan.models.text_encoder import UMT5Encoder
from jaxwan.models.transformer import Context, WanTransformer
from jaxwan.pipelines.prompt import MAX_TOKENS, Tokenizer, fold_rows
from jaxwan.tiny.grammar import caption
from jaxwan.tiny.latents import Latents
from jaxwan.tiny.muon import Params, muon
from jaxwan.tiny.training import Phase, TrainState, make_step, module_with, parameters, start

DIT = TransformerConfig(
    num_attention_heads=4, attention_head_dim=32, ffn_dim=512, num_layers=8, text_dim=96, freq_dim=256
)
TEXT = TextEncoderConfig(vocab_size=320, d_model=96, d_kv=24, d_ff=256, num_layers=3, num_heads=4)

ROWS = 40  # tokens of a caption, and at least one row behind them
FLOW_SHIFT = 3.0
NO_CAPTION = 0.1  # share of samples that are shown the empty caption, for guidance
WEIGHT_DECAY = 0.01
AVERAGE = 0.9995
WARM_UP = 100
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


class Models(nnx.Module):
    """What is trained: the denoiser, and the text encoder where it is not frozen."""

    def __init__(self, *, text: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        self.transformer = WanTransformer(DIT, dtype=dtype, rngs=rngs)
        self.text_encoder = UMT5Encoder(TEXT, dtype=dtype, rngs=rngs) if text else None


class Captions(NamedTuple):
    """Tokens of captions, and which of them are real."""

    tokens: Int[np.ndarray, "n l"]
    mask: Bool[np.ndarray, "n l"]


# Steps


def make_phases(
    plans: Sequence[Plan], data: Callable[[str], "Data"], dtype: DTypeLike, *, scale: float = 1.0,
    frozen: Params | None = None,
) -> list[Phase]:  # fmt: skip
    """The phases, with `scale` times the planned steps. frozen: the text encoder's parameters, if it is not trained."""
    optimizer = make_optimizer()
    return [_make_phase(plan, round(scale * plan.steps), data, dtype, optimizer, frozen) for plan in plans]


def _make_phase(
    plan: Plan, steps: int, data: Callable[[str], "Data"], dtype: DTypeLike, optimizer: optax.GradientTransformation,
    frozen: Params | None,
) -> Phase:  # fmt: skip
    encoder = None if frozen is None else module_with(partial(UMT5Encoder, TEXT), frozen, dtype)

    def loss(
        params: Params,
        key: PRNGKeyArray,
        latents: Float[Array, "n t y x z"],
        rows: Int[Array, " b"],
        captions: Captions,
    ) -> Float[Array, ""]:
        models = module_with(partial(Models, text=encoder is None), params, dtype)
        x0 = latents[rows].astype(jnp.float32)
        drawing, noising = jax.random.split(key)
        sigmas = draw_sigmas(drawing, len(rows), plan.sigmas)
        context = embed_captions(models.transformer, encoder or models.text_encoder, captions)
        return flow_loss(models.transformer, context, x0, sigmas, jax.random.normal(noising, x0.shape)).mean()

    def rate(done: Float[Array, ""]) -> Float[Array, ""]:
        falling = (1 - done) / max(plan.falling, 1e-9)
        return plan.rate * jnp.minimum(jnp.minimum(falling, 1), (1 + done * steps) / WARM_UP)

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
    grid = dit.token_grid(noisy.shape[1:4])
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
    return dit.embed_context(rows, None, log_counts)


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
    if path.startswith(("transformer.blocks.", "text_encoder.layers.")):
        return 1
    return 0 if path.startswith("transformer.text_embedder.") else None


def initial_parameters(seed: int) -> Params:
    """Random parameters; what a layer adds to its input starts at zero, and the velocity too."""

    @jax.jit
    def draw(key: PRNGKeyArray) -> Params:
        return parameters(Models(text=True, dtype=jnp.float32, rngs=nnx.Rngs(key)))

    params = draw(jax.random.key(seed))
    for path in params:
        if path.startswith(("transformer.time_proj", "transformer.proj_out")) or path.endswith(
            ("scale_shift_table", "attn2.out.kernel", "position_bias")
        ):
            params[path] = jnp.zeros_like(params[path])
    queries = "text_encoder.layers.q.kernel"  # the encoder does not divide its logits
    return params | {queries: params[queries] * TEXT.d_kv**-0.5}


def abstract_state(*, text: bool) -> TrainState:
    """Shapes and dtypes of a state. text: of the base, which trains the text encoder too."""

    def begin() -> TrainState:
        return start(parameters(Models(text=text, dtype=jnp.float32, rngs=nnx.Rngs(0))), make_optimizer())

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
        captions = [np.where(empty[:, None], *pair) for pair in zip(self._empty, self._word(rows, rng), strict=True)]
        return self.latents, rows, Captions(*captions)

    def _word(self, rows: Int[np.ndarray, " n"], rng: np.random.Generator) -> Captions:
        """Captions of fewer than ROWS tokens: of the few that are longer, another wording is drawn."""
        texts = []
        for row in rows:
            shown = jax.tree.map(lambda x, row=row: x[row], self._attributes)
            text = caption(shown, int(rng.integers(1 << 62)))
            while len(self._tokenizer.backend.encode(text).ids) >= ROWS:
                text = caption(shown, int(rng.integers(1 << 62)))
            texts.append(text)
        return tokenize_captions(self._tokenizer, texts)


def tokenize_captions(tokenizer: Tokenizer, texts: Sequence[str]) -> Captions:
    """Tokens of texts that have fewer than ROWS."""
    ids = [encoding.ids for encoding in tokenizer.backend.encode_batch(list(texts))]
    tokens = np.full((len(ids), ROWS), tokenizer.pad_id, np.int32)
    mask = np.zeros((len(ids), ROWS), bool)
    for i, row in enumerate(ids):
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    return Captions(tokens, mask)
