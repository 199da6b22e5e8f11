"""The encoders of texts and images as rings: layers spread over all devices of the mesh, whatever its axes are for.

`sharding/ring.py` as the DiT has it, on the same devices, all seen as stages (`in_line`): a text or an image is a
request of one branch and one step. Each device holds its share of the layers, and of the table of tokens a share of the
rows. Where they do not divide they are padded with zeros: layers that are exact identities, rows that no token has.

A program has SLOTS slots and runs as many ticks as those in use need. So one serves any number of texts, a warm-up
knows it without knowing which texts will be equal, and what one becomes cannot depend on how many are beside it.

A text is looked up in the tick in which it enters: a sum over all devices of 4 MB (umt5-xxl in bfloat16) beside the
work of a tick. Looking up all slots before the first tick would be one sum, but of no fewer bytes, and a second thing
to do beside the ring; and of images, whose patches are a product, the bits might depend on the number of slots.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.lax import dynamic_update_index_in_dim
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Shaped

from jaxwan.models.image_encoder import CLIPVisionEncoder
from jaxwan.models.layers import axes_of
from jaxwan.models.text_encoder import UMT5Encoder
from jaxwan.pipelines.dit import rows
from jaxwan.sharding.mesh import MeshSpec, in_line
from jaxwan.sharding.ring import RingState, Slot, Stage, make_ring, make_turns, state_specs
from jaxwan.sharding.rules import RULES
from jaxwan.sharding.turns import RingPlan, Turn

SLOTS = 8  # 34 MB of umt5-xxl's rows in bfloat16


class Pieces(NamedTuple):
    """A model's call, cut where the ring cuts it. `given` is one text or image, with a leading axis of 1.

    embed's `axis`: the mesh axis along which a table is split, or None outside of the ring.
    """

    embed: Callable[..., Array]  # (model, axis, *given) -> hidden [1, S, D]
    layers: Callable[..., Array]  # (model, hidden, *given) -> hidden
    finish: Callable[..., Array]  # (model, hidden) -> rows [1, S, D]


PIECES = {
    UMT5Encoder: Pieces(
        lambda model, axis, tokens, mask: model.embed(tokens, axis),
        lambda model, hidden, tokens, mask: model.run_layers(hidden, mask),
        lambda model, hidden: model.norm(hidden),
    ),
    CLIPVisionEncoder: Pieces(
        lambda model, axis, pixels: model.embed(pixels),
        lambda model, hidden, pixels: model.run_layers(hidden),
        lambda model, hidden: hidden,
    ),
}


@dataclass(frozen=True)
class EncoderRing:
    """An encoder on a mesh. What it makes of a text or an image does not depend on what else it is given."""

    run: Callable  # (weights, given, ticks) -> rows [stages, 1, SLOTS, S, D]; the truth is the first stage's
    plan: RingPlan
    weights: Any

    def __call__(self, *given: Shaped[np.ndarray, "b ..."]) -> Float[np.ndarray, "b s d"]:
        """float32, on the host, in groups of SLOTS."""
        groups = [[x[i : i + SLOTS] for x in given] for i in range(0, len(given[0]), SLOTS)]
        return np.concatenate([self._encode(*group) for group in groups])

    def _encode(self, *given: Shaped[np.ndarray, "b ..."]) -> Float[np.ndarray, "b s d"]:
        count = len(given[0])
        slots = tuple(np.pad(x, [(0, SLOTS - count)] + [(0, 0)] * (x.ndim - 1)) for x in given)
        made = self.run(self.weights, slots, np.int32(self.plan.ticks([1] * count)))
        return np.asarray(made.addressable_data(0))[0, 0, :count].astype(np.float32)

    def program(self, *given: jax.ShapeDtypeStruct) -> tuple[Callable, tuple]:
        """The jitted function and the shapes of its arguments; given: those of one text or image, no leading axis."""
        slots = tuple(x.update(shape=(SLOTS, *x.shape)) for x in given)
        return self.run, (self.weights, slots, jax.ShapeDtypeStruct((), np.int32))


def make_encoder_ring(model: type[nnx.Module], graph: Any, weights: Any, mesh: Mesh) -> EncoderRing:
    """The ring of a model of this structure; its weights as `placed` says, or their shapes."""
    return EncoderRing(_program(PIECES[model], graph, in_line(mesh)), _plan(mesh.size), weights)


def placed(state: nnx.State, mesh: Mesh) -> nnx.State:
    """Shapes, dtypes and shardings on a mesh of a model's parameters, padded where they do not divide."""
    line = in_line(mesh)

    def padded(leaf: Any, axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        parts = RULES.parts(line.shape, *axes)
        size = parts * -(-leaf.shape[0] // parts)  # what is split is the first axis
        return jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype, sharding=RULES.sharding(line, *axes))

    return _map(padded, state)


def share_of(state: nnx.State, devices: int) -> nnx.State:
    """Shapes and dtypes of what each of so many devices holds of a model's parameters."""
    sizes = asdict(MeshSpec(pp=devices))

    def own(leaf: Any, axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        size = -(-leaf.shape[0] // RULES.parts(sizes, *axes))
        return jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype)

    return _map(own, state)


def _map(f: Callable[[Any, tuple[str | None, ...]], Any], state: nnx.State) -> nnx.State:
    """What f makes of each parameter and of its axes, as `sharding.rules` names them, in the parameter's place."""
    return nnx.from_flat_state(
        [
            (path, p.replace(f(p.get_value(), ("layer",) * (path[0] == "layers") + axes_of(p))))
            for path, p in nnx.to_flat_state(state)
        ]
    )


def _plan(stages: int) -> RingPlan:
    return RingPlan(stages, (1,) * SLOTS)


@lru_cache(maxsize=8)
def _program(pieces: Pieces, graph: Any, line: Mesh) -> Callable:
    """The jitted ring of models of this structure, the same for all pipelines that have one on these devices."""
    turns = make_turns(_plan(line.size), [Turn(0, 1)] * SLOTS, slots=SLOTS, branches=1)
    turns = jax.tree.map(lambda x: np.asarray(x)[None, None], turns)  # of a rank, of a phase
    whole = RULES.spec(line)

    def embed_first(weights, given):
        return pieces.embed(nnx.merge(graph, weights), None, *(x[:1] for x in given))

    def run(weights, given, ticks):
        specs = _map(lambda _, axes: RULES.spec(line, *axes), weights)
        hidden = jax.eval_shape(embed_first, weights, given)
        carry = jnp.zeros((line.size, 1, SLOTS, *hidden.shape[1:]), hidden.dtype)
        state = RingState(jnp.zeros((1, 1, line.size, 1, *hidden.shape), hidden.dtype), (), carry)
        ring = make_ring(line, _stage(pieces, graph), specs, whole)
        return ring(weights, given, turns, state, jnp.int32(0), ticks).carry

    return jax.jit(run, out_shardings=NamedSharding(line, state_specs(line).carry))


def _stage(pieces: Pieces, graph: Any) -> Stage:
    def own(given: tuple, slot: Slot) -> list[Array]:
        return [x[None] for x in rows(given, slot.request)]

    def enter(weights: nnx.State, given: tuple, carry: Array, slot: Slot) -> Array:
        return pieces.embed(nnx.merge(graph, weights), RULES.row, *own(given, slot))

    def layers(weights: nnx.State, given: tuple, hidden: Array, held: tuple, slot: Slot) -> tuple[Array, tuple]:
        return pieces.layers(nnx.merge(graph, weights), hidden, *own(given, slot)), held

    def retire(weights: nnx.State, given: tuple, carry: Array, hidden: Array, slot: Slot) -> Array:
        made = pieces.finish(nnx.merge(graph, weights), hidden)[0]
        new = jnp.where(slot.active, made, rows(carry, slot.request))
        return dynamic_update_index_in_dim(carry, new, slot.request, 0)

    return Stage(enter, layers, retire)
