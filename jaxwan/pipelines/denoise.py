"""Denoising: the DiT as the stages of the ring, and the loop that drives it.

One executable serves all requests of a shape: solvers, step counts, guidance, experts and timesteps are rows of
`Controls`, indexed by what the ring says each device holds. Latents are float32, channels last, `[R, T, H, W, Z]`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec, Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxwan.config import TransformerConfig
from jaxwan.convert.diffusers import TRANSFORMER
from jaxwan.convert.files import TensorFiles
from jaxwan.convert.load import OnBytes, fill, flat_shapes, load_arrays, prove
from jaxwan.models.transformer import WanTransformer
from jaxwan.schedulers.table import SamplerState, Table, init_state, step, table_row
from jaxwan.sharding.mesh import sharding, spec
from jaxwan.sharding.ring import RingState, Slot, Stage, Turns, make_ring
from jaxwan.sharding.turns import RingPlan

RENOISINGS = 8  # noise rows of a request: `renoise` takes at most nine steps, and the last needs none


class Controls(NamedTuple):
    """What each request does in each of its steps."""

    table: Table
    timesteps: Float[np.ndarray, "r n q"]  # Q = 1, or T where latent frames have timesteps of their own
    expert: Int[np.ndarray, "r n"]
    guidance: Float[np.ndarray, "r n"]
    guided: Bool[np.ndarray, " r"]  # False: the cond velocity alone counts


class Inputs(NamedTuple):
    """Everything the loop reads and never changes, replicated over the mesh."""

    controls: Controls
    text: Float[Array, "r g l c"]  # G = 2: cond, uncond
    image: Float[Array, "r i e"] | None  # CLIP rows (Wan2.1 image to video)
    channels: Float[Array, "r t h w y"] | None  # mask and image latents beside the noisy ones (36-channel models)
    first: Float[Array, "r 1 h w z"] | None  # first latent frame (TI2V)
    has_first: Bool[np.ndarray, " r"] | None  # whether the request has one; otherwise `first` is not looked at
    noise: Float[Array, "r 8 t h w z"]  # fresh noise of `renoise`, zeros elsewhere


class Carry(NamedTuple):
    """What the loop changes."""

    sampler: SamplerState  # each [R, T, H, W, Z]
    velocity: Float[Array, "*p r t h w z"]  # of the latest evaluation; between the two branches, the cond one


class Weights(NamedTuple):
    """Parameters of all experts: blocks `[E, layers, …]`, their layers over pp; all else `[E, …]`, replicated."""

    blocks: Any
    ends: Any


WEIGHT_AXES = Weights((None, "pp"), ())  # mesh axes of the leading axes of every parameter


# The weights


def abstract_weights(cfg: TransformerConfig, num_experts: int, stages: int, dtype: DTypeLike) -> tuple[Any, Weights]:
    """Structure of the DiT, and the shapes and dtypes of its parameters as the ring holds them.

    Layers are padded to `stages * ceil(layers / stages)`; the padding is all zeros, which is an identity layer.
    """
    abstract = nnx.eval_shape(lambda: WanTransformer(cfg, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, blocks, ends = nnx.split(abstract, nnx.PathContains("blocks"), ...)
    layers = stages * -(-cfg.num_layers // stages)

    def stacked(leaf, *lead):
        return jax.ShapeDtypeStruct((num_experts, *lead, *leaf.shape[len(lead) :]), leaf.dtype)

    return graph, Weights(
        jax.tree.map(lambda leaf: stacked(leaf, layers), blocks), jax.tree.map(lambda leaf: stacked(leaf), ends)
    )


def placed_weights(cfg: TransformerConfig, num_experts: int, mesh: Mesh, dtype: DTypeLike) -> Weights:
    """Shapes, dtypes and shardings of what `load_weights` makes."""
    _, abstract = abstract_weights(cfg, num_experts, mesh.shape["pp"], dtype)
    return Weights(*(shapes_at(sharding(mesh, *axes), part) for part, axes in zip(abstract, WEIGHT_AXES, strict=True)))


def load_weights(
    cfg: TransformerConfig, experts: Sequence[TensorFiles], mesh: Mesh, dtype: DTypeLike,
    progress: OnBytes | None = None,
) -> Weights:  # fmt: skip
    """The experts' parameters, each tensor written straight into the row of the stage that holds its layer.

    Raises CheckpointError when a tensor is missing, extra or of another shape.
    """
    _, abstract = abstract_weights(cfg, len(experts), mesh.shape["pp"], dtype)
    targets = {}
    for part, axes in zip(abstract, WEIGHT_AXES, strict=True):
        targets |= {path: (leaf, sharding(mesh, *axes)) for path, leaf in flat_shapes(part).items()}
    one = {path: (cfg.num_layers, *leaf.shape[2:]) for path, leaf in flat_shapes(abstract.blocks).items()}
    one |= {path: leaf.shape[1:] for path, leaf in flat_shapes(abstract.ends).items()}
    sources = [
        ((i,), files, prove(one, files, TRANSFORMER, what=str(files.paths[0].parent)))
        for i, files in enumerate(experts)
    ]
    arrays = load_arrays(targets, sources, progress)
    return Weights(*(fill(part, arrays) for part in abstract))


# The stages


def make_stage(cfg: TransformerConfig, graph: Any, plan: RingPlan, latent_shape: tuple[int, int, int]) -> Stage:
    """The DiT as the ring's three functions, for latents of `latent_shape` (T, H, W)."""
    grid = tuple(size // p for size, p in zip(latent_shape, cfg.patch_size, strict=True))

    def model(weights: Weights, inputs: Inputs, slot: Slot) -> tuple[WanTransformer, Array, Array]:
        """The module with this slot's expert in its ends and all experts' layers in one stack; expert; timesteps."""
        expert = inputs.controls.expert[slot.request, slot.step]
        ends = jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, expert, keepdims=False), weights.ends)
        blocks = jax.tree.map(lambda p: p.reshape(-1, *p.shape[2:]), weights.blocks)
        return nnx.merge(graph, blocks, ends), expert, inputs.controls.timesteps[slot.request, slot.step][None]

    def enter(weights: Weights, inputs: Inputs, carry: Carry, slot: Slot) -> Array:
        x = carry.sampler.x[slot.request][None]
        if inputs.first is not None and inputs.has_first is not None:
            kept = jnp.where(inputs.has_first[slot.request], inputs.first[slot.request][None], x[:, :1])
            x = jnp.concatenate([kept, x[:, 1:]], axis=1)
        if inputs.channels is not None:
            x = jnp.concatenate([x, inputs.channels[slot.request][None]], axis=-1)
        return model(weights, inputs, slot)[0].embed_latents(x)

    def layers(weights: Weights, inputs: Inputs, hidden: Array, held: tuple, slot: Slot) -> tuple[Array, tuple]:
        dit, expert, timesteps = model(weights, inputs, slot)
        own = jax.tree.leaves(weights.blocks)[0].shape[1]
        rows = expert * own + jnp.arange(own)
        _, modulation = dit.embed_time(timesteps)
        text = inputs.text[slot.request, slot.branch][None]
        context = dit.embed_context(text, None if inputs.image is None else inputs.image[slot.request][None])
        return dit.run_blocks(hidden, rows, context, modulation, grid), held

    def retire(weights: Weights, inputs: Inputs, carry: Carry, hidden: Array, slot: Slot) -> Carry:
        dit, _, timesteps = model(weights, inputs, slot)
        temb, _ = dit.embed_time(timesteps)
        velocity = dit.head(hidden, temb, grid)[0].astype(jnp.float32)
        r, last = slot.request, slot.branch == plan.branches - 1
        if plan.branches == 2:
            guided = guide(carry.velocity[r], velocity, inputs.controls.guidance[r, slot.step])
            combined = jnp.where(inputs.controls.guided[r], guided, carry.velocity[r])
            velocity = jnp.where(last, combined, velocity)
        old = jax.tree.map(lambda x: x[r], carry)
        noise = inputs.noise[r, jnp.minimum(slot.step, RENOISINGS - 1)]
        new = step(table_row(inputs.controls.table, r, slot.step), old.sampler, velocity, noise)
        new = jax.tree.map(lambda n, o: jnp.where(last, n, o), new, old.sampler)
        return jax.tree.map(
            lambda rows, n, o: rows.at[r].set(jnp.where(slot.active, n, o)), carry, Carry(new, velocity), old
        )

    return Stage(enter, layers, retire)


def guide(cond: Array, uncond: Array, guidance_scale: Array) -> Array:
    """Classifier-free guidance: uncond + g * (cond - uncond)."""
    return uncond + guidance_scale * (cond - uncond)


# The loop


@dataclass
class Denoiser:
    """The DiT on a mesh, with the executables made for it so far (one a shape: requests, branches, size)."""

    cfg: TransformerConfig
    weights: Weights
    mesh: Mesh
    dtype: jnp.dtype
    _made: dict = field(default_factory=dict, repr=False)

    def plan(self, requests: int, branches: int) -> RingPlan:
        """The ring's arithmetic for so many requests."""
        return RingPlan(self.mesh.shape["pp"], requests, branches)

    def start(self, latents: Float[np.ndarray, "r t h w z"], inputs: Inputs) -> "Loop":
        """The loop over `latents`, at the noise level of each request's first row; nothing has run yet."""
        plan = self.plan(*inputs.text.shape[:2])
        begin, run = self._ring(plan, latents.shape)
        steps = np.asarray(inputs.controls.table.num_steps, np.int32)
        everywhere = sharding(self.mesh)
        turns = Turns(np.zeros_like(steps), steps, np.zeros_like(steps))
        inputs, turns = jax.device_put((to_float32(inputs), turns), everywhere)
        state = begin(jax.device_put(latents, everywhere))
        return Loop(plan, steps, lambda s, ticks: run(self.weights, inputs, turns, s, ticks), state)

    def programs(self, latents: jax.ShapeDtypeStruct, inputs: Inputs) -> Iterator[tuple[str, Callable, tuple]]:
        """(name, jitted function, arguments) of all that `start` and its loop compile; of arrays the shapes suffice."""
        plan, everywhere = self.plan(*inputs.text.shape[:2]), sharding(self.mesh)
        begin, run = self._ring(plan, latents.shape)
        steps = jax.ShapeDtypeStruct((plan.slots,), np.int32)
        latents, inputs, turns = shapes_at(everywhere, (latents, to_float32(inputs), Turns(steps, steps, steps)))
        state = jax.tree.map(shapes_at, _state_shardings(self.mesh), jax.eval_shape(begin, latents))
        yield "ring", run, (self.weights, inputs, turns, state, jax.ShapeDtypeStruct((), np.int32))
        yield "the ring's first state", begin, (latents,)

    def _ring(self, plan: RingPlan, shape: tuple[int, ...]) -> tuple[Callable, Callable]:
        if (plan, shape) not in self._made:
            self._made[plan, shape] = make_program(self.cfg, self.mesh, plan, shape, self.dtype)
        return self._made[plan, shape]


def make_program(
    cfg: TransformerConfig, mesh: Mesh, plan: RingPlan, shape: tuple[int, ...], dtype: DTypeLike
) -> tuple[Callable, Callable]:
    """(begin, run): latents `[R, T, H, W, Z]` of `shape` to the ring's first state, and the ring itself."""
    graph, _ = abstract_weights(cfg, 1, plan.stages, dtype)
    specs = Weights(*(spec(mesh, *axes) for axes in WEIGHT_AXES))

    def begin(latents):
        rows = jnp.broadcast_to(latents, (plan.stages, *latents.shape))
        hidden = jnp.zeros((plan.stages, 1, num_tokens(cfg, shape), cfg.dim), dtype)
        return RingState(jnp.int32(0), hidden, (), Carry(init_state(rows), jnp.zeros_like(rows)))

    stage = make_stage(cfg, graph, plan, (shape[1], shape[2], shape[3]))
    return jax.jit(begin, out_shardings=_state_shardings(mesh)), make_ring(mesh, plan, stage, specs, PartitionSpec())


def _state_shardings(mesh: Mesh) -> RingState:
    position = sharding(mesh, "pp")
    return RingState(sharding(mesh), position, (), Carry(SamplerState(*[position] * 5), position))


def num_tokens(cfg: TransformerConfig, shape: tuple[int, ...]) -> int:
    """Tokens of latents `[R, T, H, W, Z]`."""
    return int(np.prod(shape[1:4])) // int(np.prod(cfg.patch_size))


class Loop:
    """A denoising run in progress: advance it round by round and look at it in between."""

    def __init__(self, plan: RingPlan, num_steps: np.ndarray, run: Callable, state: RingState):
        self.plan, self.num_steps, self._run, self._state, self.ticks = plan, num_steps, run, state, 0

    @property
    def rounds(self) -> int:
        """Steps of the longest request."""
        return int(self.num_steps.max())

    def advance(self, rounds: int) -> None:
        """Run until every request has finished step `rounds - 1` (or all its steps), and wait for it."""
        until = min(self.plan.ticks_of_round(rounds - 1), self.plan.ticks(self.num_steps.tolist()))
        self._state = jax.block_until_ready(self._run(self._state, np.int32(until - self.ticks)))
        self.ticks = until

    def latents(self) -> np.ndarray:
        """x of all requests `[R, T, H, W, Z]`, float32, on the host."""
        return _truth(self._state.carry.sampler.x)

    def velocity(self) -> np.ndarray:
        """The velocity of each request's latest step, guided."""
        return _truth(self._state.carry.velocity)


def _truth(array: Array) -> np.ndarray:
    """Row 0 of an array with a leading pp axis: stage 0's."""
    return np.asarray(array.addressable_data(0))[0]


def to_float32(tree: Any) -> Any:
    """Host float64 arrays as float32; the rest unchanged."""
    return jax.tree.map(lambda x: x.astype(np.float32) if getattr(x, "dtype", None) == np.float64 else x, tree)


def shapes_at(place: Sharding, tree: Any) -> Any:
    """Shapes and dtypes of a tree of arrays (or of their shapes), as of arrays that lie at `place`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)
