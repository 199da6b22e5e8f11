"""The DiT in the ring: its weights, spread over the mesh, and what a stage does to a video's micro-batches.

Latents are float32, channels last: `[T, H, W, Z]` outside of the ring, and inside the patches that tokens are made of,
`[T, W, P]`: W = hw of a frame's tokens, or this device's share of them, P = |patch| Z. What a sampler does to them
looks at no neighbours.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.lax import dynamic_index_in_dim, dynamic_update_index_in_dim
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxwan.config import TransformerConfig
from jaxwan.convert.detect import rules_of
from jaxwan.convert.files import TensorFiles
from jaxwan.convert.load import OnBytes, fill, flat_shapes, load_arrays, prove
from jaxwan.models.layers import abstract, axes_of
from jaxwan.models.transformer import Parallel, WanTransformer, from_patches, to_patches, token_grid
from jaxwan.schedulers.table import SamplerState, Table, step, table_row
from jaxwan.sharding.collectives import gather
from jaxwan.sharding.ring import Slot, Stage
from jaxwan.sharding.rules import RULES
from jaxwan.sharding.sequence import TokenSplit

RENOISINGS = 8  # noise rows of a video: `renoise` takes at most nine steps, and the last needs none


class Controls(NamedTuple):
    """What a video does in each of its steps."""

    table: Table
    timesteps: Float[np.ndarray, "*r n q"]  # Q = 1, or T where latent frames have timesteps of their own
    expert: Int[np.ndarray, "*r n"]
    guidance: Float[np.ndarray, "*r n"]
    guided: Bool[np.ndarray, "*r"]  # False: the cond velocity alone counts


class Inputs(NamedTuple):
    """All that a video's steps read and never change; in the ring with a leading axis R of slots."""

    controls: Controls
    text: Float[Array, "*r g l c"]  # G = 2: cond, uncond; each rank of the mesh axis cfg has one of them
    image: Float[Array, "*r i e"] | None = None  # CLIP rows (Wan2.1 image to video)
    channels: Float[Array, "..."] | None = None  # mask and image latents beside the noisy ones (36 channels)
    first: Float[Array, "..."] | None = None  # first latent frame alone (TI2V)
    has_first: Bool[np.ndarray, "*r"] | None = None  # whether the video has one; otherwise `first` is not looked at
    noise: Float[Array, "..."] | None = None  # 8 times fresh noise, of `renoise`


class Carry(NamedTuple):
    """What a video's steps change; in the ring with a leading axis R of slots."""

    sampler: SamplerState  # each as latents are
    velocity: Float[Array, "..."]  # of the latest evaluation; between the two branches, the cond one
    fault: Int[Array, "..."]  # 0, or which step computed what is not finite, first of all (`Fault`)


class Fault(NamedTuple):
    """Where numbers were not finite first: in a step, in what. Carried as a number, above 0."""

    step: int
    what: str

    @classmethod
    def parse(cls, number: int) -> "Fault | None":
        """None for 0."""
        step, what = divmod(number - 1, len(_MAY_FAIL))
        return cls(step, _MAY_FAIL[what]) if number > 0 else None


_MAY_FAIL = "latents", "velocity"  # before the step; predicted in it


def first_fault(x: Float[Array, "..."], velocity: Float[Array, "..."], slot: Slot) -> Int[Array, ""]:
    """The number of a `Fault` in this step, or 0; of what this device has of the numbers."""
    number = 1 + len(_MAY_FAIL) * slot.step
    velocity_fails = jnp.where(jnp.isfinite(velocity).all(), 0, number + 1)
    return jnp.where(jnp.isfinite(x).all(), velocity_fails, number)


def fresh(sampler: SamplerState) -> Carry:
    """What a video begins with in its slot."""
    return Carry(sampler, jnp.zeros_like(sampler.x), jnp.int32(0))


class Weights(NamedTuple):
    """Parameters of all experts: blocks `[E, layers, …]`; all else `[E, …]`, whole on every device."""

    blocks: Any
    ends: Any


def input_specs(mesh: Mesh) -> Inputs:
    """PartitionSpecs of what the ring's slots read: all of them by request, texts by branch too, latents by token."""
    slots = Inputs(*[RULES.spec(mesh, "request")] * len(Inputs._fields))
    latents = RULES.spec(mesh, "request", None, "token")
    return slots._replace(
        text=RULES.spec(mesh, "request", "branch"), channels=latents, first=latents,
        noise=RULES.spec(mesh, "request", None, None, "token"),
    )  # fmt: skip


# Latents as tokens


def split_on(
    mesh: Mesh, cfg: TransformerConfig, latent_shape: tuple[int, ...], ulysses: int | None = None
) -> TokenSplit:
    """How the tokens of latents (T, H, W, …) are split on a mesh. ulysses None: as many as can be (`most_ulysses`)."""
    t, h, w = token_grid(cfg, latent_shape)
    ways = RULES.parts(mesh.shape, "token")
    return TokenSplit(RULES.token, ways, ulysses or most_ulysses(cfg, mesh.shape), t, h * w)


def most_ulysses(cfg: TransformerConfig, sizes: Mapping[str, int]) -> int:
    """How many devices can trade tokens for heads on a mesh of these sizes: what divides both."""
    return math.gcd(RULES.parts(sizes, "token"), cfg.num_attention_heads // RULES.parts(sizes, "head"))


def parallel_on(mesh: Mesh, split: TokenSplit) -> Parallel:
    """What the DiT's layers are told of the mesh."""
    heads = RULES.head if RULES.parts(mesh.shape, "head") > 1 else None
    return Parallel(heads, split if split.ways > 1 else None)


def as_tokens(x: Float[Array, "*n t h w z"], cfg: TransformerConfig) -> Float[Array, "*n t s p"]:
    """Latents as the patches of their tokens."""
    *lead, t, h, w, z = x.shape
    return to_patches(x.reshape(-1, t, h, w, z), cfg.patch_size).reshape(*lead, t, -1, math.prod(cfg.patch_size) * z)


def as_latents(x: Float[np.ndarray, "t s p"], cfg: TransformerConfig, latent_shape: tuple[int, ...]) -> np.ndarray:
    """Inverse of `as_tokens` for one video of latents (T, H, W, …); pads at the end of a frame fall away."""
    t, h, w = token_grid(cfg, latent_shape)
    return from_patches(x[:, : h * w].reshape(1, t * h * w, -1), (t, h, w), cfg.patch_size)[0]


# The weights


def abstract_weights(
    cfg: TransformerConfig, num_experts: int, stages: int, dtype: DTypeLike, parallel: Parallel | None = None
) -> tuple[Any, Weights]:
    """Structure of the DiT, and the shapes and dtypes of its parameters as the ring holds them, of all devices.

    Layers are padded to `stages * ceil(layers / stages)`; the padding is all zeros, which is an identity layer.
    """
    static = {} if parallel is None else {"parallel": parallel}
    model = nnx.merge(*abstract(WanTransformer, cfg, jnp.dtype(dtype), **static))
    graph, blocks, ends = nnx.split(model, nnx.PathContains("blocks"), ...)
    layers = stages * -(-cfg.num_layers // stages)

    def stacked(leaf, *lead):
        return jax.ShapeDtypeStruct((num_experts, *lead, *leaf.shape[len(lead) :]), leaf.dtype)

    return graph, Weights(
        jax.tree.map(lambda leaf: stacked(leaf, layers), blocks), jax.tree.map(lambda leaf: stacked(leaf), ends)
    )


def map_axes(f: Callable[..., Any], weights: Weights) -> Weights:
    """What f makes of the axes of each parameter, as `sharding.rules` names them, in the parameter's place."""

    def named(part: Any, *lead: str | None) -> Any:
        return jax.tree.map(
            lambda p: p.replace(f(*lead, *axes_of(p))), part, is_leaf=lambda p: isinstance(p, nnx.Variable)
        )

    return Weights(named(weights.blocks, None, "layer"), named(weights.ends, None))


def placed_weights(cfg: TransformerConfig, num_experts: int, mesh: Mesh, dtype: DTypeLike) -> Weights:
    """Shapes, dtypes and shardings of what `load_weights` makes."""
    _, shapes = abstract_weights(cfg, num_experts, num_stages(mesh), dtype)
    return jax.tree.map(
        lambda shape, spec: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(mesh, spec)),
        shapes, map_axes(partial(RULES.spec, mesh), shapes),
    )  # fmt: skip


def load_weights(
    cfg: TransformerConfig, experts: Sequence[TensorFiles], mesh: Mesh, dtype: DTypeLike,
    progress: OnBytes | None = None,
) -> Weights:  # fmt: skip
    """The experts' parameters, each tensor written straight into the row of every device that holds its layer.

    Raises CheckpointError when a tensor is missing, extra or of another shape.
    """
    placed = placed_weights(cfg, len(experts), mesh, dtype)
    shapes = [flat_shapes(part) for part in placed]
    one = {path: (cfg.num_layers, *leaf.shape[2:]) for path, leaf in shapes[0].items()}
    one |= {path: leaf.shape[1:] for path, leaf in shapes[1].items()}
    sources = [
        ((i,), files, prove(one, files, rules_of("transformer", cfg, files.shapes), what=str(files.paths[0].parent)))
        for i, files in enumerate(experts)
    ]
    targets = {path: (leaf, leaf.sharding) for part in shapes for path, leaf in part.items()}
    arrays = load_arrays(targets, sources, progress)
    return Weights(*(fill(part, arrays) for part in placed))


def num_stages(mesh: Mesh) -> int:
    """Into how many stages the layers are cut."""
    return RULES.parts(mesh.shape, "layer")


def layers_per_stage(layers: int, stages: int) -> list[int]:
    """How many layers each stage has: all as many but for the last ones, which may have none."""
    full = -(-layers // stages)
    return [min(full, max(0, layers - stage * full)) for stage in range(stages)]


def shapes_at(place: Sharding | None, tree: Any) -> Any:
    """Shapes and dtypes of a tree of arrays (or of their shapes), as of arrays that lie at `place`, or on the host."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


# The stages


def make_stage(cfg: TransformerConfig, graph: Any, latent_shape: tuple[int, ...], split: TokenSplit) -> Stage:
    """The DiT as the ring's three functions, for latents of `latent_shape` (T, H, W) whose tokens are split so."""
    grid = token_grid(cfg, latent_shape)

    def model(weights: Weights, inputs: Inputs, slot: Slot) -> tuple[WanTransformer, Array, Array]:
        """The module with this slot's expert in its ends and all experts' layers in one stack; expert; timesteps."""
        expert = inputs.controls.expert[slot.request, slot.step]
        ends = rows(weights.ends, expert)
        blocks = jax.tree.map(lambda p: p.reshape(-1, *p.shape[2:]), weights.blocks)
        timesteps = inputs.controls.timesteps[slot.request, slot.step]
        if len(timesteps) > grid[0]:  # one a token
            timesteps = split.own(timesteps.reshape(grid[0], -1, 1)).reshape(-1)
        return nnx.merge(graph, blocks, ends), expert, timesteps[None]

    def enter(weights: Weights, inputs: Inputs, carry: Carry, slot: Slot) -> Array:
        x, own = rows(carry.sampler.x, slot.request), rows(inputs, slot.request)
        if own.first is not None and own.has_first is not None:
            x = jnp.concatenate([jnp.where(own.has_first, own.first, x[:1]), x[1:]])
        if own.channels is not None:
            x = beside(x, own.channels)
        return model(weights, inputs, slot)[0].embed_patches(x.reshape(1, -1, x.shape[-1]))

    def beside(*parts: Array) -> Array:
        """Patches [T, W, |patch| Z] of more channels: all of them at each place within a patch."""
        places = math.prod(cfg.patch_size)
        joined = jnp.concatenate([x.reshape(*x.shape[:2], places, -1) for x in parts], axis=-1)
        return joined.reshape(*joined.shape[:2], -1)

    def layers(weights: Weights, inputs: Inputs, hidden: Array, held: tuple, slot: Slot) -> tuple[Array, tuple]:
        dit, expert, timesteps = model(weights, inputs, slot)
        stage = jax.tree.leaves(weights.blocks)[0].shape[1]
        _, modulation = dit.embed_time(timesteps)
        text, image = inputs.text[slot.request, slot.branch][None], rows(inputs.image, slot.request)
        context = dit.embed_context(text, None if image is None else image[None])
        return dit.run_blocks(hidden, expert * stage + jnp.arange(stage), context, modulation, grid), held

    def retire(weights: Weights, inputs: Inputs, carry: Carry, hidden: Array, slot: Slot) -> Carry:
        dit, _, timesteps = model(weights, inputs, slot)
        temb, _ = dit.embed_time(timesteps)
        predicted = dit.head_patches(hidden, temb).reshape(carry.velocity.shape[1:]).astype(jnp.float32)
        controls, old = inputs.controls, rows(carry, slot.request)
        scale, guided = controls.guidance[slot.request, slot.step], controls.guided[slot.request]
        velocity, both = predicted, gather(predicted, RULES.branch)
        if len(both) == 2:  # of this tick, from the ranks of cfg
            cond, uncond = both
            velocity = jnp.where(guided, guide(cond, uncond, scale), cond)
        elif inputs.text.shape[1] == 2:  # one tick after the other
            cond = jnp.where(slot.branch == 0, predicted, old.velocity)
            velocity = jnp.where(guided, guide(old.velocity, predicted, scale), cond)
            velocity = jnp.where(slot.last, velocity, predicted)
        noise = 0.0 if inputs.noise is None else inputs.noise[slot.request, jnp.minimum(slot.step, RENOISINGS - 1)]
        stepped = step(table_row(controls.table, slot.request, slot.step), old.sampler, velocity, noise)
        fault = jnp.where(old.fault > 0, old.fault, first_fault(old.sampler.x, velocity, slot))
        stepped, fault = jax.tree.map(
            lambda new, kept: jnp.where(slot.last, new, kept), (stepped, fault), (old.sampler, old.fault)
        )
        new = jax.tree.map(lambda new, kept: jnp.where(slot.active, new, kept), Carry(stepped, velocity, fault), old)
        return jax.tree.map(lambda all_, own: dynamic_update_index_in_dim(all_, own, slot.request, 0), carry, new)

    return Stage(enter, layers, retire)


def rows(tree: Any, index: Int[Array, ""]) -> Any:
    """Row `index` of every array."""
    return jax.tree.map(lambda x: dynamic_index_in_dim(x, index, keepdims=False), tree)


def guide(cond: Array, uncond: Array, guidance_scale: Array) -> Array:
    """Classifier-free guidance: uncond + g * (cond - uncond)."""
    return uncond + guidance_scale * (cond - uncond)
