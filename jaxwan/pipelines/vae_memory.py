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


def vae_bytes(direction: Direction, checkpoint: Checkpoint, job: Job, dtype: np.dtype, devices: int) -> dict[str, int]:
    """What a device holds while a job's videos go one way through the VAE, in tiles or strips where they do."""
    cfg, decodes = checkpoint.vae, direction == "decode"
    latent, kept = checkpoint.geometry.latent_shape(*job.size), {}
    frames, height, width = latent
    tiling, space = job.requests[0].tiling, None
    if tiling is not None and tiling.cuts(*job.size[1:]):
        layout = tiling.layout(cfg, direction, (height, width))
        height, width = layout.largest
        tiles = layout.rounds(devices) * height * width
        made = 3 * job.size[0] * checkpoint.geometry.spatial**2 if decodes else cfg.z_dim * frames
        kept = {f"{'frames' if decodes else 'latents'} of tiles, until they are blended": 4 * tiles * made}
    elif (space := frame_space(AbstractMesh((devices,), (AXIS,)), height, width)) is not None:
        _, frames, height, width = space.strip((1, frames, height, width))
    return {
        **coding_bytes(cfg, direction, (height, width), dtype, split=space is not None),
        "latents": 4 * frames * height * width * cfg.z_dim,
    } | kept


HALOS = "halos of the causal convolutions"
_NAMES = ("three", "four", "five", "six")


def coding_bytes(
    cfg: VAEConfig, direction: Direction, size: tuple[int, int], dtype: DTypeLike, *, split: bool
) -> dict[str, int]:
    """Named buffers of a step of four frames on one device that codes so many latents down and across, of a split frame
    its strip. `HALOS` are what stays from step to step, exactly.

    On top comes what XLA holds of arrays as large as the step's largest, as it was found in compiled programs
    (`tests/aot`): decoding, an operation's input and its result, one of them in float32 as norms compute; of strips
    more, with the pixels around them and without.
    """
    dtype = jnp.dtype(dtype)
    halos, largest = _step_sizes(cfg, direction, *size, dtype)
    if split:
        held = "six" if dtype.itemsize == 2 and not cfg.is_residual else "five"
    elif direction == "decode":
        held = "two"
    else:
        held = "four" if cfg.is_residual else "three"  # with the shortcut around a level's blocks
    sizes = {"two": dtype.itemsize + 4} | {name: n * dtype.itemsize for n, name in enumerate(_NAMES, 3)}
    return {HALOS: halos, f"{held} arrays of the step's largest size": sizes[held] * largest}


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
