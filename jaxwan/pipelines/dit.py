"""The DiT in the ring: its weights, spread over the stages, and what a stage does to a video's micro-batches.

Latents are float32, channels last, `[T, H, W, Z]`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.lax import dynamic_index_in_dim, dynamic_update_index_in_dim
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxwan.config import TransformerConfig
from jaxwan.convert.diffusers import TRANSFORMER
from jaxwan.convert.files import TensorFiles
from jaxwan.convert.load import OnBytes, fill, flat_shapes, load_arrays, prove
from jaxwan.models.layers import abstract
from jaxwan.models.transformer import WanTransformer
from jaxwan.schedulers.table import SamplerState, Table, step, table_row
from jaxwan.sharding.collectives import gather
from jaxwan.sharding.ring import Slot, Stage
from jaxwan.sharding.rules import RULES

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
    channels: Float[Array, "*r t h w y"] | None = None  # mask and image latents beside the noisy ones (36 channels)
    first: Float[Array, "*r 1 h w z"] | None = None  # first latent frame (TI2V)
    has_first: Bool[np.ndarray, "*r"] | None = None  # whether the video has one; otherwise `first` is not looked at
    noise: Float[Array, "*r 8 t h w z"] | None = None  # fresh noise of `renoise`


class Carry(NamedTuple):
    """What a video's steps change; in the ring with a leading axis R of slots."""

    sampler: SamplerState  # each [T, H, W, Z]
    velocity: Float[Array, "*r t h w z"]  # of the latest evaluation; between the two branches, the cond one


class Weights(NamedTuple):
    """Parameters of all experts: blocks `[E, layers, …]`; all else `[E, …]`, whole on every device."""

    blocks: Any
    ends: Any


WEIGHT_AXES = Weights((None, "layer"), ())  # the leading axes of every parameter, as `sharding.rules` names them


def input_specs(mesh: Mesh) -> Inputs:
    """PartitionSpecs of what the ring's slots read: all of them by request, texts by branch too."""
    slots = Inputs(*[RULES.spec(mesh, "request")] * len(Inputs._fields))
    return slots._replace(text=RULES.spec(mesh, "request", "branch"))


def weight_specs(mesh: Mesh) -> Weights:
    """PartitionSpecs of the parameters."""
    return Weights(*(RULES.spec(mesh, *axes) for axes in WEIGHT_AXES))


# The weights


def abstract_weights(cfg: TransformerConfig, num_experts: int, stages: int, dtype: DTypeLike) -> tuple[Any, Weights]:
    """Structure of the DiT, and the shapes and dtypes of its parameters as the ring holds them.

    Layers are padded to `stages * ceil(layers / stages)`; the padding is all zeros, which is an identity layer.
    """
    model = nnx.merge(*abstract(WanTransformer, cfg, jnp.dtype(dtype)))
    graph, blocks, ends = nnx.split(model, nnx.PathContains("blocks"), ...)
    layers = stages * -(-cfg.num_layers // stages)

    def stacked(leaf, *lead):
        return jax.ShapeDtypeStruct((num_experts, *lead, *leaf.shape[len(lead) :]), leaf.dtype)

    return graph, Weights(
        jax.tree.map(lambda leaf: stacked(leaf, layers), blocks), jax.tree.map(lambda leaf: stacked(leaf), ends)
    )


def placed_weights(cfg: TransformerConfig, num_experts: int, mesh: Mesh, dtype: DTypeLike) -> Weights:
    """Shapes, dtypes and shardings of what `load_weights` makes."""
    _, shapes = abstract_weights(cfg, num_experts, num_stages(mesh), dtype)
    return Weights(
        *(shapes_at(RULES.sharding(mesh, *axes), part) for part, axes in zip(shapes, WEIGHT_AXES, strict=True))
    )


def load_weights(
    cfg: TransformerConfig, experts: Sequence[TensorFiles], mesh: Mesh, dtype: DTypeLike,
    progress: OnBytes | None = None,
) -> Weights:  # fmt: skip
    """The experts' parameters, each tensor written straight into the row of every device that holds its layer.

    Raises CheckpointError when a tensor is missing, extra or of another shape.
    """
    _, shapes = abstract_weights(cfg, len(experts), num_stages(mesh), dtype)
    targets = {}
    for part, axes in zip(shapes, WEIGHT_AXES, strict=True):
        targets |= {path: (leaf, RULES.sharding(mesh, *axes)) for path, leaf in flat_shapes(part).items()}
    one = {path: (cfg.num_layers, *leaf.shape[2:]) for path, leaf in flat_shapes(shapes.blocks).items()}
    one |= {path: leaf.shape[1:] for path, leaf in flat_shapes(shapes.ends).items()}
    sources = [
        ((i,), files, prove(one, files, TRANSFORMER, what=str(files.paths[0].parent)))
        for i, files in enumerate(experts)
    ]
    arrays = load_arrays(targets, sources, progress)
    return Weights(*(fill(part, arrays) for part in shapes))


def num_stages(mesh: Mesh) -> int:
    """Into how many stages the layers are cut."""
    return RULES.parts(mesh.shape, "layer")


def shapes_at(place: Sharding | None, tree: Any) -> Any:
    """Shapes and dtypes of a tree of arrays (or of their shapes), as of arrays that lie at `place`, or on the host."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


# The stages


def make_stage(cfg: TransformerConfig, graph: Any, latent_shape: tuple[int, ...]) -> Stage:
    """The DiT as the ring's three functions, for latents of `latent_shape` (T, H, W)."""
    grid = tuple(size // p for size, p in zip(latent_shape, cfg.patch_size, strict=True))

    def model(weights: Weights, inputs: Inputs, slot: Slot) -> tuple[WanTransformer, Array, Array]:
        """The module with this slot's expert in its ends and all experts' layers in one stack; expert; timesteps."""
        expert = inputs.controls.expert[slot.request, slot.step]
        ends = rows(weights.ends, expert)
        blocks = jax.tree.map(lambda p: p.reshape(-1, *p.shape[2:]), weights.blocks)
        return nnx.merge(graph, blocks, ends), expert, inputs.controls.timesteps[slot.request, slot.step][None]

    def enter(weights: Weights, inputs: Inputs, carry: Carry, slot: Slot) -> Array:
        x, own = rows(carry.sampler.x, slot.request), rows(inputs, slot.request)
        if own.first is not None and own.has_first is not None:
            x = jnp.concatenate([jnp.where(own.has_first, own.first, x[:1]), x[1:]])
        if own.channels is not None:
            x = jnp.concatenate([x, own.channels], axis=-1)
        return model(weights, inputs, slot)[0].embed_latents(x[None])

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
        predicted = dit.head(hidden, temb, grid)[0].astype(jnp.float32)
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
        stepped = jax.tree.map(lambda new, kept: jnp.where(slot.last, new, kept), stepped, old.sampler)
        new = jax.tree.map(lambda new, kept: jnp.where(slot.active, new, kept), Carry(stepped, velocity), old)
        return jax.tree.map(lambda all_, own: dynamic_update_index_in_dim(all_, own, slot.request, 0), carry, new)

    return Stage(enter, layers, retire)


def rows(tree: Any, index: Int[Array, ""]) -> Any:
    """Row `index` of every array."""
    return jax.tree.map(lambda x: dynamic_index_in_dim(x, index, keepdims=False), tree)


def guide(cond: Array, uncond: Array, guidance_scale: Array) -> Array:
    """Classifier-free guidance: uncond + g * (cond - uncond)."""
    return uncond + guidance_scale * (cond - uncond)


def num_tokens(cfg: TransformerConfig, latent_shape: tuple[int, ...]) -> int:
    """Tokens of latents `[T, H, W, …]`."""
    return int(np.prod(latent_shape[:3])) // int(np.prod(cfg.patch_size))
