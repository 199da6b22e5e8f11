"""What the VAE takes of a device's memory beside its weights: the dry run's account of it."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh
from jax.typing import DTypeLike

from jaxwan.config import VAEConfig
from jaxwan.models.layers import abstract
from jaxwan.models.vae import VAE
from jaxwan.models.video_coder import Direction, frame_space
from jaxwan.pipelines.checkpoint import Checkpoint
from jaxwan.pipelines.request import Job
from jaxwan.sharding.space import AXIS


def decode_bytes(checkpoint: Checkpoint, job: Job, dtype: np.dtype, devices: int) -> dict[str, int]:
    """One step of four frames: the convolutions' halos, exactly, and an operation's input and result where the step's
    arrays are largest, one of them in float32 as norms compute. Of a device's strip, or a tile, XLA holds more at once,
    with the pixels around it and without."""
    frames, height, width = checkpoint.geometry.latent_shape(*job.size)
    tiling, kept = job.requests[0].tiling, {}
    if tiling is not None and tiling.cuts(*job.size[1:]):
        layout = tiling.layout(checkpoint.vae, "decode", (height, width))
        height, width = layout.largest
        pixels = layout.rounds(devices) * height * width * checkpoint.geometry.spatial**2
        kept = {"frames of tiles, until they are blended": 12 * job.size[0] * pixels}
    elif (space := frame_space(AbstractMesh((devices,), (AXIS,)), height, width)) is None:
        devices = 1
    else:
        _, frames, height, width = space.strip((1, frames, height, width))
    split = devices > 1 or bool(kept)
    return {
        **coding_bytes(checkpoint.vae, "decode", (height, width), dtype, split=split),
        "latents": 4 * frames * height * width * checkpoint.vae.z_dim,
    } | kept


HALOS = "halos of the causal convolutions"


def coding_bytes(
    cfg: VAEConfig, direction: Direction, size: tuple[int, int], dtype: DTypeLike, *, split: bool
) -> dict[str, int]:
    """Named buffers of a step on one device that codes so many latents down and across, of a split frame its strip;
    `HALOS` are what stays from step to step."""
    dtype = jnp.dtype(dtype)
    halos, largest = _step_sizes(cfg, direction, *size, dtype)
    if split:
        return {HALOS: halos, "five arrays of the step's largest size": 5 * dtype.itemsize * largest}
    return {HALOS: halos, "two arrays of the step's largest size": (dtype.itemsize + 4) * largest}


@cache
def _step_sizes(cfg: VAEConfig, direction: Direction, height: int, width: int, dtype: np.dtype) -> tuple[int, int]:
    """Bytes of the halos that stay from step to step, and elements of the largest array in one."""
    graph, state = abstract(VAE, cfg, dtype)
    encodes, scale = direction == "encode", cfg.scale_factor_spatial
    first, later = (
        jax.ShapeDtypeStruct(
            (1, n, height * scale, width * scale, 3) if encodes else (1, 1, height, width, cfg.z_dim), jnp.float32
        )
        for n in (1, cfg.scale_factor_temporal)
    )

    def step(state, cache, given):
        vae = nnx.merge(graph, state)
        code = vae.encode_chunk if encodes else vae.decode_chunk
        return code(cache, given, formulation="direct")  # as on accelerators

    halos, _ = jax.eval_shape(lambda s, x: step(s, None, x), state, first)
    return tree_bytes(halos), largest_array(step, state, halos, later)


def largest_array(function: Callable, *arguments: Any) -> int:
    """Elements of the largest array that a function computes, from its jaxpr."""
    sizes = [0]

    def visit(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            sizes.extend(v.aval.size for v in equation.outvars if hasattr(v.aval, "dtype"))
            for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")):
                if hasattr(value, "jaxpr"):
                    visit(value.jaxpr)

    visit(jax.make_jaxpr(function)(*arguments).jaxpr)
    return max(sizes)


def tree_bytes(tree: Any) -> int:
    """Bytes of all leaves of a tree of arrays or their shapes."""
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
