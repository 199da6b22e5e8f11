"""Whole videos through the VAE, as a loop over chunks, on one device or with frames split over several.

Each direction has exactly two programs, for a video's first frame and for later ones, and coding chunk by chunk gives
what coding the whole video would. Videos come from the host and go there.
"""

from collections.abc import Callable, Iterable, Iterator
from copy import copy
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, SingleDeviceSharding
from jaxtyping import Array, Bool, Float, UInt8

from jaxwan.geometry import Geometry
from jaxwan.models.causal_conv import Cache, Formulation
from jaxwan.models.vae import VAE
from jaxwan.sharding.space import Space

Direction = Literal["encode", "decode"]
FrameType = Literal["float32", "uint8"]
VideoParts = Iterable[np.ndarray]  # of a video, [B, F, H, W, C] with numbers of frames of their own
# Latent pixels: frames whose longer side has fewer are not split, as strips would be little else than neighbours' edges
WHOLE = 16


class VideoCoder:
    """Whole videos through one VAE, chunk by chunk: two compiled programs per direction, frame size and batch.

    Programs do not depend on the number of frames. The cache is donated from chunk to chunk, so a video has one alive.
    mesh: a `strip_mesh` of several devices, each of which codes a strip of every frame along its longer side, but of
    frames too small to split (`WHOLE`), which the first one codes; the result is that of one device but for rounding.
    The VAE's parameters are then on all of them. `formulation` overrides the platform's choice of convolution.
    """

    def __init__(self, vae: VAE, *, mesh: Mesh | None = None, formulation: Formulation | None = None):
        self.cfg, self.mesh = vae.cfg, mesh
        self.geometry = Geometry(vae.cfg.scale_factor_temporal, vae.cfg.scale_factor_spatial, patch=(1, 1, 1))
        self.graph, self.state = nnx.split(vae)
        self.formulation: Formulation | None = formulation
        self._encode, self._decode = _programs(self.graph, formulation)

    def holding(self, state: nnx.State) -> "VideoCoder":
        """The same programs with other parameters."""
        other = copy(self)
        other.state = state
        return other

    # Videos

    def encode_stream(self) -> "Stream":
        """Frames in [-1, 1] to normalised latents, in several calls: of 4k+1 frames, and then of 4k each."""
        return Stream(self, "encode")

    def decode_stream(self, frame_type: FrameType = "float32") -> "Stream":
        """Normalised latents to frames in [-1, 1], or in 8 bits, in several calls: the very first latent frame is one
        frame, each of the others 4."""
        return Stream(self, "decode", frame_type)

    def encode_chunks(self, pixels: Float[Array | np.ndarray, "b f h w 3"]) -> Iterator[Float[np.ndarray, "b 1 y x z"]]:
        """Normalised latents of a video in [-1, 1], a latent frame at a time: of its first frame, then of 4 each.

        Raises ValueError when f is not 4k+1, or h or w no multiple of the VAE's stride.
        """
        return self.encode_stream().chunks(pixels)

    def encode(self, pixels: Float[Array | np.ndarray, "b f h w 3"]) -> Float[np.ndarray, "b t y x z"]:
        """The latents of `encode_chunks` as one array."""
        return self.encode_stream()(pixels)

    def encode_parts(self, parts: VideoParts) -> Float[np.ndarray, "b t y x z"]:
        """The latents of a video in [-1, 1] that comes in parts, of 4k+1 frames and then of 4k each. A part is asked
        for when the devices are at work on what came before, and not kept.

        Raises ValueError as `encode_chunks` does, for each part when it comes.
        """
        return np.concatenate(list(self.encode_stream().parts(parts)), axis=1)

    def decode_chunks(
        self, latents: Float[Array | np.ndarray, "b t y x z"], frame_type: FrameType = "float32"
    ) -> Iterator[Float[np.ndarray, "b f h w 3"] | UInt8[np.ndarray, "b f h w 3"]]:
        """The frames of each latent frame in turn: one for the first, 4 for each of the others. In [-1, 1], or in 8
        bits, which the devices make of the same numbers (`to_8_bits`).

        Raises ValueError for latents of another number of channels, or none at all, and where 8 bits are to hold NaN.
        """
        return self.decode_stream(frame_type).chunks(latents)

    def decode(self, latents: Float[Array | np.ndarray, "b t y x z"]) -> Float[np.ndarray, "b f h w 3"]:
        """The video, in [-1, 1], of normalised latents: 4 (t - 1) + 1 frames."""
        return self.decode_stream()(latents)

    # Chunks

    def encode_chunk(
        self, cache: Cache | None, pixels: Float[Array | np.ndarray, "b f h w 3"], space: Space | None = None
    ) -> tuple[Cache, Float[Array, "b t y x z"]]:
        """`VAE.encode_chunk`, compiled; uses up `cache`. With a space, of frames that it split."""
        return self._encode(self._state(space), cache, pixels, space)

    def decode_chunk(
        self, cache: Cache | None, latents: Float[Array | np.ndarray, "b t y x z"], space: Space | None = None
    ) -> tuple[Cache, Float[Array, "b f h w 3"]]:
        """`VAE.decode_chunk`, compiled; uses up `cache`. With a space, of latents that it split."""
        return self._decode(self._state(space), cache, latents, space)

    def _state(self, space: Space | None) -> nnx.State:
        """The parameters on the devices that code such frames."""
        return _on_first(self.state, self.mesh) if space is None else self.state

    def programs(self, direction: Direction, shape: tuple[int, ...]) -> Iterator[tuple[str, Callable, tuple]]:
        """(name, jitted function, arguments) of all that coding a host array of `shape` compiles.

        direction: "encode" for frames [B, F, H, W, 3], "decode" for latents [B, T, H, W, Z].
        """
        function = self._encode if direction == "encode" else self._decode
        stream = Stream(self, direction)
        space = stream.space(shape)
        state = self._state(space)
        place = jax.tree.leaves(state)[0].sharding if space is None else space.sharding

        def frames(count: int) -> jax.ShapeDtypeStruct:
            part = (shape[0], count, *shape[2:])
            if space is None:
                return jax.ShapeDtypeStruct(part, jnp.float32)
            return jax.ShapeDtypeStruct(space.padded(part), jnp.float32, sharding=place)

        def made(cache: Any, count: int) -> Any:
            shapes = jax.eval_shape(partial(function, space=space), state, cache, frames(count))
            return jax.tree.map(lambda leaf: leaf.update(sharding=place), shapes)

        cache, coded = made(None, 1)
        chunks = [("first frame", None, 1, coded)]
        if shape[1] > 1:
            chunks.insert(0, ("later frames", cache, stream.step, made(cache, stream.step)[1]))
        for which, cache, count, coded in chunks:
            yield f"VAE {direction}, {which}", function, (state, cache, frames(count), space)
            if direction == "decode":
                yield f"8 bits, {which}", to_8_bits, (coded, space)


class Stream:
    """Videos of one size through a VAE, in as many calls as they come in.

    However they are cut into calls, the same programs run, and the results have the same bits. `cache` is all that a
    call leaves to the next, which uses it up; None before the first. Streams know nothing of each other.
    """

    def __init__(self, coder: VideoCoder, direction: Direction, frame_type: FrameType = "float32"):
        self.cache: Cache | None = None
        self.coder, self.direction = coder, direction
        self._frame_type: FrameType = frame_type
        self._size: tuple[int, ...] | None = None  # [B, H, W, C] of what was given
        # frames of what is given to a latent one, and pixels
        self.step, self.stride = (coder.geometry.temporal, coder.geometry.spatial) if self._encodes else (1, 1)

    @property
    def _encodes(self) -> bool:
        return self.direction == "encode"

    def __call__(self, given: Float[Array | np.ndarray, "b f h w c"]) -> Float[np.ndarray, "b g y x o"]:
        """What the next frames, or latents, are coded to.

        Raises ValueError for another size than before, for numbers of frames other than 4k+1 in the first call and 4k
        in those that follow, and for what `VideoCoder.encode_chunks` and `decode_chunks` refuse.
        """
        return np.concatenate(list(self.chunks(given)), axis=1)

    def chunks(self, given: Float[Array | np.ndarray, "b f h w c"]) -> Iterator[Float[np.ndarray, "b g y x o"]]:
        """The same, chunk by chunk, each fetched when the next one is under way: devices compute while the host copies.

        The call is made as these are taken; the next call is to come after the last.
        """
        self.check(given.shape)
        return self.parts([np.asarray(given)])

    def parts(self, given: VideoParts) -> Iterator[Float[np.ndarray, "b g y x o"]]:
        """`chunks` of what comes in parts, of which the first is a first call's, and so on."""
        code = self.coder.encode_chunk if self._encodes else self.coder.decode_chunk
        under_way, space = [], None
        for part in given:
            self.check(part.shape)
            self._size = (part.shape[0], *part.shape[2:])
            space = self.space(part.shape)
            for chunk in cut_frames(part, self.step, first=self.cache is None):
                self.cache, coded = code(self.cache, chunk if space is None else space.split(chunk), space)
                under_way.append(to_8_bits(coded, space) if self._frame_type == "uint8" else coded)
                if len(under_way) > 1:
                    yield fetched(under_way.pop(0), space)
        yield fetched(under_way.pop(), space)

    def space(self, shape: tuple[int, ...]) -> Space | None:
        """How what is given in this shape is split over devices; None on one."""
        if self.coder.mesh is None:
            return None
        return frame_space(self.coder.mesh, shape[2] // self.stride, shape[3] // self.stride)

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises what a call with frames of this shape would."""
        size, cfg, geometry = (shape[0], *shape[2:]), self.coder.cfg, self.coder.geometry
        if self.cache is not None and self._size not in (None, size):  # None: the cache of another stream
            raise ValueError(f"this stream goes on with {self._size} (B, H, W, C), and not with {size}")
        if not self._encodes and shape[-1] != cfg.z_dim:
            raise ValueError(f"latents have {shape[-1]} channels, and this VAE's have {cfg.z_dim}")
        if self._encodes:
            geometry.check_size(1 if self.cache is not None else shape[1], *shape[2:4])
            if self.cache is not None:
                geometry.check_more_frames(shape[1])
        if 0 in shape:
            raise ValueError(f"nothing is to be coded in shape {shape}")


def cut_frames(x: np.ndarray, step: int, *, first: bool = True) -> list[np.ndarray]:
    """Frames [B, F, H, W, C] as a VAE takes them: `step` at a time, after the `first` one of a video."""
    return [x[:, :1]] * first + [x[:, start : start + step] for start in range(first, x.shape[1], step)]


def frame_space(mesh: Mesh | AbstractMesh, height: int, width: int) -> Space | None:
    """How frames of so many latent pixels are split: along their longer side; None for those that one device codes."""
    if mesh.size == 1 or max(height, width) < WHOLE:
        return None
    return Space(mesh, *((2, height) if height > width else (3, width)))


def _on_first(state: nnx.State, mesh: Mesh | None) -> nnx.State:
    """Parameters, or their shapes, as the first device of a mesh has them."""
    if mesh is None or mesh.size == 1:
        return state
    first = mesh.devices.flat[0]

    def own(x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return x.update(sharding=SingleDeviceSharding(first))
        return next(shard.data for shard in x.addressable_shards if shard.device == first)

    return jax.tree.map(own, state)


@lru_cache(maxsize=8)
def _programs(graph: Any, formulation: Formulation | None) -> tuple[Callable, Callable]:
    """The jitted chunks of a VAE of this structure, encode and decode: the same for all its coders, on any devices."""

    def encode(state, cache, pixels, space):
        return spread(VAE.encode_chunk, space)(state, cache, pixels)

    def decode(state, cache, latents, space):
        return spread(VAE.decode_chunk, space)(state, cache, latents)

    def spread(method, space):
        def code(state, cache, given):
            return method(nnx.merge(graph, state), cache, given, formulation=formulation, space=space)

        return code if space is None else space.spread(code)

    jit = partial(jax.jit, donate_argnums=1, static_argnames="space")
    return jit(encode), jit(decode)


# Frames in 8 bits


class In8Bits(NamedTuple):
    """Frames that are still on the devices, and whether the VAE computed NaN for any pixel of them."""

    frames: UInt8[Array, "b f h w 3"]
    damaged: Bool[Array, ""]


@partial(jax.jit, static_argnames="space")
def to_8_bits(frames: Float[Array, "b f h w 3"], space: Space | None = None) -> In8Bits:
    """Frames in [-1, 1] as 0 to 255, where they are: a quarter of what the host would fetch.

    A program of its own, so that frames in float32 and in 8 bits come of the same numbers, and a step at a time like
    NumPy's rounding of the former (half to even), for the same bytes. Of frames that a space splits, too.
    """
    in_unit_range = frames * 0.5 + 0.5
    picture = frames if space is None else space.picture(frames)
    return In8Bits(jnp.round(in_unit_range * 255).astype(jnp.uint8), jnp.isnan(picture).any())


def fetched(made: Array | In8Bits, space: Space | None = None) -> np.ndarray:
    """What devices made, on the host. Raises ValueError for NaN in 8 bits."""
    if isinstance(made, In8Bits):
        if made.damaged:
            raise ValueError("the VAE computed NaN, of which there are no frames: are latents or weights damaged?")
        made = made.frames
    return np.asarray(made) if space is None else space.join(made)
