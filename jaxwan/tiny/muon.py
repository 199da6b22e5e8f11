"""Muon: an optimizer for matrices, whose steps have all their singular values near 1."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Int

Params = dict[str, Array]  # dotted path -> parameter
Scale = Callable[[int, int], float]  # inputs, outputs of a matrix -> factor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ROUNDS = 5


class _State(NamedTuple):
    momentum: optax.Updates
    count: Int[Array, ""]


def muon(
    matrices: Callable[[str], int | None],
    *,
    scale: Scale,
    adam_rate: float = 1.0,
    weight_decay: float = 0.0,
    momentum: float = 0.95,
    dtype: DTypeLike = jnp.float32,
) -> optax.GradientTransformation:
    """Muon for matrices and AdamW for all other parameters, made for a learning rate of 1 and of `adam_rate`.

    matrices: for a parameter's path the number of leading axes that stack matrices, None where it is no matrix; the
    last axis is a matrix's outputs, all others are its inputs. scale: of an update. dtype: in which matrices are
    multiplied that are not much longer than wide.
    Moves matrices as `optax.contrib.muon` does, and is several times faster where they are long.
    Source: Keller Jordan's Muon, with Nesterov momentum.
    """

    def update(grads: optax.Updates, state: _State, params: Any = None) -> tuple[optax.Updates, _State]:
        count = state.count + 1
        mean = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state.momentum, grads)
        now, ahead = 1 - momentum**count, 1 - momentum ** (count + 1)
        nesterov = jax.tree.map(lambda m, g: momentum * m / ahead + (1 - momentum) * g / now, mean, grads)
        steps = jax.tree.map_with_path(lambda at, m: _step(m, matrices(at[0].key) or 0, scale, dtype), nesterov)
        return steps, _State(mean, count)

    def begin(params: optax.Params) -> _State:
        return _State(jax.tree.map(jnp.zeros_like, params), jnp.zeros((), jnp.int32))

    by_muon = optax.chain(
        optax.GradientTransformation(begin, update), optax.add_decayed_weights(weight_decay), optax.scale(-1.0)
    )
    by_adam = optax.adamw(adam_rate, weight_decay=weight_decay)
    return optax.partition(
        {"muon": by_muon, "adam": by_adam},
        lambda params: {path: "adam" if matrices(path) is None else "muon" for path in params},
    )


def _step(gradient: Array, stacked: int, scale: Scale, dtype: DTypeLike) -> Array:
    """The gradient's matrices with their singular values moved near 1, scaled."""
    x = gradient.reshape(*gradient.shape[:stacked], -1, gradient.shape[-1])
    inputs, outputs = x.shape[-2:]
    x = x.mT if inputs < outputs else x
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-8)
    x = _rounds_of_long(x) if x.shape[-2] >= 2 * x.shape[-1] else _rounds(x, dtype)
    return scale(inputs, outputs) * (x.mT if inputs < outputs else x).reshape(gradient.shape)


def _rounds(x: Array, dtype: DTypeLike) -> Array:
    """Newton-Schulz: in each round x p with the polynomial p = a + b g + c g g of g = x.T x."""

    def times(x: Array, y: Array) -> Array:
        return jnp.matmul(x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32)

    a, b, c = NEWTON_SCHULZ
    for _ in range(ROUNDS):
        gram = times(x.mT, x)
        x = a * x + times(x, b * gram + c * times(gram, gram))
    return x


def _rounds_of_long(x: Array) -> Array:
    """The same, multiplying x twice in all instead of twice a round.

    Polynomials of g commute, so that the next round's g is p g p. In float32 only: where x has no rank, the rounding
    of g grows twelvefold a round.
    """
    a, b, c = NEWTON_SCHULZ
    gram = x.mT @ x
    eye = product = jnp.eye(gram.shape[-1])
    for _ in range(ROUNDS):
        p = a * eye + b * gram + c * gram @ gram
        gram, product = p @ gram @ p, product @ p
    return x @ product
