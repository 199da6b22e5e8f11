"""Videos through the VAE in overlapping tiles, blended: less memory, and the result of Diffusers' `enable_tiling`.

Tiles follow from the size and the `Tiling` alone, whatever devices there are. A tile goes through the VAE with all its
frames, as a video of its own, before the device begins another: it holds the halos of one tile, not of the picture.
Devices take a tile each, by the same program: the last rows and columns of tiles, as thin as the picture leaves them,
lie in arrays as large as the others.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array, Float, UInt8

from jaxwan.config import VAEConfig
from jaxwan.kernels.blend import blend
from jaxwan.models.causal_conv import Formulation
from jaxwan.models.video_coder import Direction, FrameType, VideoCoder, VideoParts, cut_frames, fetched, to_8_bits
from jaxwan.sharding.ring import check_types
from jaxwan.sharding.space import AXIS, Filled, strip_mesh

SIDES = ("height", "width")


@dataclass(frozen=True)
class Tiling:
    """Tiles of so many pixels, which begin a stride after one another; defaults and meaning are Diffusers'.

    Tiles overlap by what they are longer than the stride. Pixels are counted as Diffusers counts them: those of the 2.2
    VAE's encoder are squares of 2 x 2, so that it sees tiles of twice the side; whether a video is cut into tiles at
    all is decided in pixels of the video.

    Raises ValueError for a stride that leaves gaps, or of which an overlap is the larger part.
    """

    tile_height: int = 256
    tile_width: int = 256
    stride_height: int = 192
    stride_width: int = 192

    def __post_init__(self):
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of pixels from 1")
        for side in SIDES:
            tile, stride = self._along(side)
            if not stride <= tile <= 2 * stride:
                wrong = "leaves gaps between" if stride > tile else "makes overlaps longer than itself with"
                raise ValueError(
                    f"stride_{side}={stride} {wrong} tiles of {tile}: it may be {-(-tile // 2)} to {tile} pixels"
                )

    def check(self, cfg: VAEConfig) -> None:
        """Raises ValueError for sides that are not of whole latents, with the nearest that are."""
        step = cfg.scale_factor_spatial
        wrong = []
        for name, value in asdict(self).items():
            if value % step:
                below = value // step * step
                near = f"nearest are {below} and {below + step}" if below else f"nearest is {step}"
                wrong.append(f"{name}={value} is no multiple of {step}, the pixels of a latent: {near}")
        if wrong:
            raise ValueError("; ".join(wrong))

    def cuts(self, height: int, width: int) -> bool:
        """Whether a video of so many pixels is coded in tiles; a smaller one is coded as a whole."""
        return height > self.tile_height or width > self.tile_width

    def layout(self, cfg: VAEConfig, direction: Direction, latent_size: tuple[int, int]) -> "Layout":
        """Where the tiles of a video of `latent_size` lie."""
        scale = cfg.scale_factor_spatial // (cfg.patch_size or 1 if direction == "encode" else 1)
        (tile_height, stride_height), (tile_width, stride_width) = (
            [pixels // scale for pixels in self._along(side)] for side in SIDES
        )
        return Layout(latent_size, (tile_height, tile_width), (stride_height, stride_width))

    def _along(self, side: str) -> tuple[int, int]:
        return getattr(self, f"tile_{side}"), getattr(self, f"stride_{side}")

    @classmethod
    def parse(cls, value: Any) -> "Tiling | None":
        """Read what `asdict` makes of one; a Tiling is itself, None is none. Raises ValueError for anything else."""
        names = [field.name for field in fields(cls)]
        if isinstance(value, Mapping) and set(value) <= set(names):
            return cls(**value)
        if isinstance(value, Tiling | None):
            return value
        raise ValueError(f"tiling={value!r:.80} is no jaxwan.Tiling, nor a dict of {', '.join(names)}")


@dataclass(frozen=True)
class Layout:
    """Tiles of a picture, in units of latents, and counted in reading order."""

    size: tuple[int, int]
    tile: tuple[int, int]
    stride: tuple[int, int]

    @property
    def counts(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        rows, columns = (-(-whole // step) for whole, step in zip(self.size, self.stride, strict=True))
        return rows, columns

    @property
    def largest(self) -> tuple[int, int]:
        """Rows and columns of the largest tile."""
        rows, columns = (min(*sides) for sides in zip(self.tile, self.size, strict=True))
        return rows, columns

    def spans(self, scale: int = 1) -> list[tuple[slice, slice]]:
        """Rows and columns of each tile, in pixels of which there are `scale` to a latent."""
        down, across = (
            [slice(start * scale, min(start + tile, whole) * scale) for start in range(0, whole, step)]
            for whole, tile, step in zip(self.size, self.tile, self.stride, strict=True)
        )
        return list(product(down, across))

    def rounds(self, devices: int) -> int:
        """How many tiles a device takes, one after the other."""
        return -(-math.prod(self.counts) // devices)


class TiledCoder:
    """A `VideoCoder` that codes in tiles what is larger than one, with the tiles spread over its devices.

    Results do not depend on the devices, and programs not on the number of frames: two that code and two that blend,
    for a video's first frame and for later ones. All tiles are done before the first frames come out; until then their
    frames stay on the devices. `implementation` is `kernels.blend`'s.

    Source: diffusers autoencoder_kl_wan.py:AutoencoderKLWan.tiled_encode, tiled_decode.
    """

    def __init__(self, coder: VideoCoder, tiling: Tiling, *, implementation: str | None = None):
        tiling.check(coder.cfg)
        self.coder, self.cfg, self.tiling, self.implementation = coder, coder.cfg, tiling, implementation
        self.mesh = coder.mesh or strip_mesh(list(jax.tree.leaves(coder.state)[0].sharding.device_set))

    def encode_chunks(self, pixels: Float[Array | np.ndarray, "b f h w 3"]) -> Iterator[Float[np.ndarray, "b 1 y x z"]]:
        """As `VideoCoder.encode_chunks`; the tiles' latents are blended."""
        whole = self.coder.encode_chunks(pixels)  # checks them, and codes what is taken from it
        cut = cut_frames(np.asarray(pixels), self.cfg.scale_factor_temporal)
        return self._code("encode", cut) if self.tiling.cuts(*pixels.shape[2:4]) else whole

    def encode(self, pixels: Float[Array | np.ndarray, "b f h w 3"]) -> Float[np.ndarray, "b t y x z"]:
        """The latents of `encode_chunks` as one array."""
        return np.concatenate(list(self.encode_chunks(pixels)), axis=1)

    def encode_parts(self, parts: VideoParts) -> Float[np.ndarray, "b t y x z"]:
        """As `VideoCoder.encode_parts`, of parts that are one frame, and then 4 each, and can be gone through again:
        that is done for every tile that a device takes."""
        if not self.tiling.cuts(*next(iter(parts)).shape[2:4]):
            return self.coder.encode_parts(parts)
        return np.concatenate(list(self._code("encode", parts)), axis=1)

    def decode_chunks(
        self, latents: Float[Array | np.ndarray, "b t y x z"], frame_type: FrameType = "float32"
    ) -> Iterator[Float[np.ndarray, "b f h w 3"] | UInt8[np.ndarray, "b f h w 3"]]:
        """As `VideoCoder.decode_chunks`; the tiles' frames are blended, and clamped after."""
        whole, scale = self.coder.decode_chunks(latents, frame_type), self.cfg.scale_factor_spatial
        cuts = self.tiling.cuts(*(side * scale for side in latents.shape[2:4]))
        return self._code("decode", cut_frames(np.asarray(latents), 1), frame_type) if cuts else whole

    def decode(self, latents: Float[Array | np.ndarray, "b t y x z"]) -> Float[np.ndarray, "b f h w 3"]:
        """The frames of `decode_chunks` as one array."""
        return np.concatenate(list(self.decode_chunks(latents)), axis=1)

    def _code(
        self, direction: Direction, chunks: VideoParts, frame_type: FrameType = "float32"
    ) -> Iterator[np.ndarray]:
        job, devices = self._job(direction, next(iter(chunks)).shape), self.mesh.size
        made: list[list[Array]] = []
        before: Array | None = None
        for number in range(job.layout.rounds(devices)):
            cache = None
            for i, chunk in enumerate(chunks):
                cache, part = job.code(self.coder.state, cache, *self._tiles(job, chunk, number * devices))
                if not number:
                    made.append([])
                made[i].append(part)
                if before is not None:
                    before.block_until_ready()  # or the tiles of all chunks would wait in memory
                before = part
        under_way: list[Any] = []  # devices blend while the host copies
        for parts in made:
            picture = job.join([jax.device_put(part, self._first) for part in parts])
            under_way.append(to_8_bits(picture) if frame_type == "uint8" else picture)
            parts.clear()
            if len(under_way) > 1:
                yield fetched(under_way.pop(0))
        yield fetched(under_way.pop())

    def _tiles(self, job: "_Job", x: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
        """A tile for each device, from tile `start` on, and how many latents each has down and across. Behind the last
        tile come some of one latent."""
        sides = (side * job.scale for side in job.layout.largest)
        tiles = np.zeros((self.mesh.size, *x.shape[:2], *sides, x.shape[-1]), np.float32)
        filled = np.ones((self.mesh.size, 2), np.int32)
        spans = job.layout.spans(job.scale)[start : start + self.mesh.size]
        for tile, units, (rows, columns) in zip(tiles, filled, spans, strict=False):
            part = x[:, :, rows, columns]
            tile[:, :, : part.shape[2], : part.shape[3]] = part
            units[:] = part.shape[2] // job.scale, part.shape[3] // job.scale
        return tiles, filled

    def programs(self, direction: Direction, shape: tuple[int, ...]) -> Iterator[tuple[str, Callable, tuple]]:
        """As `VideoCoder.programs`."""
        scale = 1 if direction == "encode" else self.cfg.scale_factor_spatial
        if not self.tiling.cuts(shape[2] * scale, shape[3] * scale):
            yield from self.coder.programs(direction, shape)
            return
        job, place = self._job(direction, shape), NamedSharding(self.mesh, PartitionSpec(AXIS))
        sides = tuple(side * job.scale for side in job.layout.largest)
        first, later = (
            jax.ShapeDtypeStruct((self.mesh.size, shape[0], n, *sides, shape[-1]), jnp.float32) for n in (1, job.step)
        )
        filled, rounds = jax.ShapeDtypeStruct((self.mesh.size, 2), jnp.int32), job.layout.rounds(self.mesh.size)
        cache, part = jax.eval_shape(job.code, self.coder.state, None, first, filled)
        cache = jax.tree.map(lambda leaf: leaf.update(sharding=place), cache)
        chunks = [("first frame", None, first, part)]
        if shape[1] > 1:
            _, part = jax.eval_shape(job.code, self.coder.state, cache, later, filled)
            chunks.insert(0, ("later frames", cache, later, part))
        for which, cache, tiles, part in chunks:
            yield f"VAE {direction} in tiles, {which}", job.code, (self.coder.state, cache, tiles, filled)
            rounds_of = ([part.update(sharding=self._first)] * rounds,)
            yield f"VAE {direction}, blending, {which}", job.join, rounds_of
            if direction == "decode":
                picture = jax.eval_shape(job.join, *rounds_of)
                yield f"8 bits, {which}", to_8_bits, (picture.update(sharding=self._first),)

    @property
    def _first(self) -> SingleDeviceSharding:
        return SingleDeviceSharding(self.mesh.devices.flat[0])

    def _job(self, direction: Direction, shape: tuple[int, ...]) -> "_Job":
        pixels, encodes = self.cfg.scale_factor_spatial, direction == "encode"
        scale, step = (pixels, self.cfg.scale_factor_temporal) if encodes else (1, 1)
        layout = self.tiling.layout(self.cfg, direction, (shape[2] // scale, shape[3] // scale))
        code = _coding(direction, self.coder.graph, self.coder.formulation, self.mesh, layout.largest)
        patch = None if encodes else self.cfg.patch_size or 1
        return _Job(layout, scale, step, code, _joining(layout, pixels // scale, patch, self.implementation))


Coder = VideoCoder | TiledCoder


def coder_for(coder: VideoCoder, tiling: Tiling | None) -> Coder:
    """What codes with this tiling; without one it is `coder`."""
    return coder if tiling is None else TiledCoder(coder, tiling)


class _Job(NamedTuple):
    """One direction, for one size of picture."""

    layout: Layout
    scale: int  # pixels of what comes in, to a latent
    step: int  # frames that come in at a time, after the first
    code: Callable  # (state, cache, [d, b, f, h, w, c], [d, 2]) -> (cache, what a tile on each device becomes)
    join: Callable  # what all rounds have become, one chunk of frames, to the picture


@lru_cache(maxsize=16)
def _coding(
    direction: Direction, graph: Any, formulation: Formulation | None, mesh: Mesh, whole: tuple[int, int]
) -> Callable:
    """A chunk of frames of a tile on every device, compiled; uses up the cache."""

    def run(state, cache, tile, filled):
        vae = nnx.merge(graph, state)
        chunk = vae.encode_chunk if direction == "encode" else vae.decode_chunk_unclamped
        space = Filled(filled[0], whole)
        made = chunk(jax.tree.map(lambda x: x[0], cache), tile[0], formulation=formulation, space=space)
        return jax.tree.map(lambda x: x[None], made)

    each = PartitionSpec(AXIS)  # a tile for each device
    specs = (PartitionSpec(), each, each, each)
    sharded = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=each, check_vma=check_types(mesh))
    return jax.jit(sharded, donate_argnums=1, out_shardings=NamedSharding(mesh, each))


@lru_cache(maxsize=64)
def _joining(layout: Layout, scale: int, patch: int | None, implementation: str | None) -> Callable:
    """All tiles, round after round, as one picture of `scale` pixels to a latent; compiled. patch: of frames, which are
    clamped; None for latents."""
    size, stride = (tuple(side * scale for side in sides) for sides in (layout.size, layout.stride))
    missing = [(0, (tile - side) * scale) for tile, side in zip(layout.tile, layout.largest, strict=True)]

    def join(rounds: list[Array]) -> Array:
        tiles = jnp.concatenate(rounds)[: math.prod(layout.counts)]
        tiles = jnp.pad(tiles, [(0, 0)] * 3 + [*missing, (0, 0)])
        tiles = tiles.reshape(*layout.counts, *tiles.shape[1:])
        picture = blend(tiles, size, stride, patch=patch or 1, implementation=implementation)
        return picture if patch is None else jnp.clip(picture, -1.0, 1.0)

    return jax.jit(join)
