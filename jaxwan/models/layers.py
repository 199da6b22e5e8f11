"""The layers every model here is built of: parameters declared once, with their dtype.

Parameters are created by `nnx.Rngs` (random models for tests and training) or abstractly under
`nnx.eval_shape`; a checkpoint fills them by path (`jaxwan.convert`).
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxwan.sharding.collectives import pmean, psum


def param(value: Array, axes: tuple[str | None, ...] = ()) -> nnx.Param:
    """A parameter, and what its axes count where a mesh may split them, as `sharding.rules` names it.

    Placement is the loader's business.
    """
    return nnx.Param(value, axes=axes)


def axes_of(parameter: nnx.Variable) -> tuple[str | None, ...]:
    """The `axes` that a parameter was declared with, but for those of a stack of layers, which come first."""
    return parameter.get_metadata().get("axes", ())


def fan_in_normal(shape: tuple[int, ...], dtype: DTypeLike, rngs: nnx.Rngs) -> Array:
    """A random kernel [..., out] of variance 1 / fan-in.

    Drawn flat and in few sizes: every shape of random numbers is a program of its own, slow to compile.
    """
    size = math.prod(shape)
    drawn = jax.random.normal(rngs.params(), (1 << (size - 1).bit_length(),), jnp.float32)
    return (drawn[:size].reshape(shape) * math.prod(shape[:-1]) ** -0.5).astype(dtype)


class Linear(nnx.Module):
    """`x @ kernel + bias`, computed in x's dtype.

    axes: what the kernel's count where a mesh may split them (`param`). sum_over: the mesh axis over which x and the
    kernel's rows are split: products are summed over it before the bias is added.
    precision: for modules that stay in float32 in a bfloat16 model: TF32 would undo what they are kept for. The
    product is an attribute, in whose place the training of small models puts one with gradients of its own.
    """

    def __init__(self, d_in: int, d_out: int, *, bias: bool = True, dtype: DTypeLike, rngs: nnx.Rngs,
                 axes: tuple[str | None, ...] = (), sum_over: str | None = None,
                 precision: jax.lax.Precision | None = None):  # fmt: skip
        self.kernel = param(jax.random.normal(rngs.params(), (d_in, d_out), dtype) * d_in**-0.5, axes)
        self.bias = param(jnp.zeros(d_out, dtype), axes[1:]) if bias else None
        self.sum_over, self.precision, self.product = sum_over, precision, jnp.matmul

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        kernel, bias = self.kernel[...].astype(x.dtype), None if self.bias is None else self.bias[...].astype(x.dtype)
        y = self.product(x, kernel) if self.precision is None else jnp.matmul(x, kernel, precision=self.precision)
        y = psum(y, self.sum_over)
        return y if bias is None else y + bias


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis, computed in float32 and returned in float32; callers cast."""

    def __init__(self, dim: int, eps: float, *, affine: bool, dtype: DTypeLike = jnp.float32):
        self.scale = param(jnp.ones(dim, dtype)) if affine else None
        self.bias = param(jnp.zeros(dim, dtype)) if affine else None
        self.eps = eps

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        y = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + self.eps)
        if self.scale is None or self.bias is None:
            return y
        return y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)


class RMSNorm(nnx.Module):
    """`x / rms(x) * scale` over the last axis; statistics in float32, result in x's dtype.

    axes: what the last axis counts (`param`). mean_over: the mesh axis over which it is split.
    """

    def __init__(self, dim: int, eps: float, *, dtype: DTypeLike, axes: tuple[str | None, ...] = (),
                 mean_over: str | None = None):  # fmt: skip
        self.scale = param(jnp.ones(dim, dtype), axes)
        self.eps, self.mean_over = eps, mean_over

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        x32 = x.astype(jnp.float32)
        mean_square = pmean((x32 * x32).mean(-1, keepdims=True), self.mean_over)
        y = x32 * jax.lax.rsqrt(mean_square + self.eps)
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


@lru_cache(maxsize=64)
def abstract(model: Callable[..., nnx.Module], cfg: Any, dtype: np.dtype, **static: Any) -> tuple[Any, nnx.State]:
    """Structure of a model of a configuration (and what else it is made with), and shapes and dtypes of its parameters.

    Kept, because several ask for the same, and even without numbers a model takes a tenth of a second to build.
    """
    return nnx.split(nnx.eval_shape(lambda: model(cfg, dtype=dtype, rngs=nnx.Rngs(0), **static)))


def stack(make, num_layers: int, rngs: nnx.Rngs):
    """`num_layers` modules `make(rngs)` as one, each parameter with a leading layer axis; run it with `scan_layers`."""
    return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(num_layers))


def scan_layers(stacked, x, body):
    """`x = body(layer, x)` for each layer of a stacked module, as one `lax.scan`."""
    graph, state = nnx.split(stacked)
    return jax.lax.scan(lambda x, layer: (body(nnx.merge(graph, layer), x), None), x, state)[0]
