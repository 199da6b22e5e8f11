"""Blending the tiles of a decoded chunk, by implementation."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

from jaxwan.bench.item import TERA, Item
from jaxwan.bench.measure import card_log, compiled, memory, random_input, seconds_of
from jaxwan.bench.presets import Preset
from jaxwan.bench.report import Row
from jaxwan.kernels.blend import blend
from jaxwan.models.tiles import Tiling

FRAMES = 4  # of a latent frame
SMALL_TILES = Tiling(32, 32, 24, 24)  # for videos that are no larger than Diffusers' tiles


def measure_blend(item: Item) -> Iterator[Row]:
    """After the result was compared with XLA's: as fast as memory can be read and written."""
    tiles, size, stride = chunk_of_tiles(item.preset)
    patch = item.preset.vae.patch_size or 1
    call = partial(blend, size=size, stride=stride, patch=patch)
    executable, took = compiled(jax.jit(partial(call, implementation=item.form)), tiles)
    made, expected = executable(tiles), jax.jit(call)(tiles)
    error = float(jnp.linalg.norm(made - expected) / jnp.linalg.norm(expected))
    if not error < 1e-5:
        raise RuntimeError(f"wrong result: relative error {error:.3g} against XLA's")
    with card_log() as card:
        seconds = seconds_of(lambda: executable(tiles), item.runs)
    shape = "x".join(map(str, tiles.shape))
    speed = (tiles.nbytes + made.nbytes) / TERA / sorted(seconds)[len(seconds) // 2]
    yield item.row(
        seconds=seconds, compile_seconds=took, memory=memory(executable),
        details={"tiles": shape, "relative error": error, "TB/s read and written": speed} | card,
    )  # fmt: skip


def chunk_of_tiles(preset: Preset) -> tuple[jax.Array, tuple[int, int], tuple[int, int]]:
    """Random tiles [i, j, 1, f, h, w, 3] of a preset's size, the size and the stride, in pixels."""
    _, height, width = preset.size
    tiling = Tiling() if Tiling().cuts(height, width) else SMALL_TILES
    stride = tiling.stride_height, tiling.stride_width
    counts = (-(-side // step) for side, step in zip((height, width), stride, strict=True))
    tiles = random_input(6, *counts, 1, FRAMES, tiling.tile_height, tiling.tile_width, 3, dtype=jnp.float32)
    return jnp.tanh(tiles), (height, width), stride
