"""Videos that come in parts: each part encoded or decoded when it comes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import jax
import numpy as np
from jaxtyping import Float

from jaxwan.models.causal_conv import Cache
from jaxwan.models.video_coder import Stream, cut_frames
from jaxwan.pipelines.axes import to_internal, to_public
from jaxwan.pipelines.dry_run import bytes_text, memory_fraction, parse_memory, present_memory
from jaxwan.pipelines.media import checked_frames, to_unit_range
from jaxwan.pipelines.parts import Parts
from jaxwan.pipelines.vae_memory import HALOS, coding_bytes


class StreamBytes(NamedTuple):
    """Bytes of a stream on the first of the VAE's devices, on which every stream is."""

    state: int  # lives from call to call
    step: int  # what a step holds beside it


class Room:
    """The open streams of a pipeline, and whether a device has room for another: beside the weights for the states of
    all, and for a step of one. What else runs there, such as a call, is not counted."""

    def __init__(self, parts: Parts):
        self._parts = parts
        self._open: WeakKeyDictionary[OpenStream, StreamBytes] = WeakKeyDictionary()

    def admit(self, stream: "OpenStream", taken: StreamBytes, memory: int | str | None) -> None:
        """Count a stream that begins. memory: a device's, as `dry_run` takes it; None: a present accelerator's.

        Raises MemoryError where it would not fit.
        """
        device = _first_device(self._parts)
        stated = parse_memory(memory)
        room = present_memory(device) if stated is None else int(stated * memory_fraction())
        others = [one for other, one in self._open.items() if other is not stream]
        states, weights = sum(one.state for one in others), weight_bytes(self._parts, device)
        needed = weights + states + taken.state + max(one.step for one in [*others, taken])
        if room is not None and needed > room:
            beside = f"{len(others)} open stream{'s' * (len(others) != 1)} of {bytes_text(states)} and " * bool(others)
            free = ": close one, by stream.close() or by dropping it" if others else ""
            raise MemoryError(
                f"a stream of {bytes_text(taken.state)} beside {beside}{bytes_text(weights)} of weights needs "
                f"{bytes_text(needed)} of a device, steps included, and it has {bytes_text(room)}{free}"
            )
        self._open[stream] = taken

    def leave(self, stream: "OpenStream") -> None:
        """A stream has no state any more. Those that are dropped leave by themselves."""
        self._open.pop(stream, None)


class OpenStream:
    """What streams of both directions have in common; made by `WanPipeline`."""

    def __init__(self, stream: Stream, room: Room, device_memory: int | str | None):
        parse_memory(device_memory)  # raises
        self._stream, self._room, self._memory, self._closed = stream, room, device_memory, False

    @property
    def state(self) -> Cache | None:
        """All that a call leaves to the next one, which uses it up: a pytree of arrays, None before the first."""
        return self._stream.cache

    def close(self) -> None:
        """Give up the state, and its memory. Dropping the stream does so too."""
        self._closed, self._stream.cache = True, None
        self._room.leave(self)

    @contextmanager
    def _closed_by_errors(self) -> Iterator[None]:
        """A call that ends in the middle leaves a state between two of its steps, with which nothing can go on."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _begin(self, shape: tuple[int, ...]) -> None:
        """Check what a call gives, and in the first call that there is room."""
        if self._closed:
            raise ValueError("this stream is closed: open another one")
        self._stream.check(shape)
        if self.state is None:
            self._room.admit(self, stream_bytes(self._stream, shape), self._memory)


class EncodeStream(OpenStream):
    """Videos to normalised latents, in as many calls as their frames come in. Made by `WanPipeline.encode_stream`."""

    def __call__(self, frames: Any) -> Float[np.ndarray, "b z t h w"]:
        """Latents of the next frames (B, F, H, W, 3), uint8 or float in [0, 1]: 4k+1 in the first call, then 4k.

        Raises ValueError for other numbers, for another batch or size than in the first call, and as `encode` does;
        MemoryError in the first call where there is no room for its state.
        """
        pixels = checked_frames(frames)
        self._begin(pixels.shape)
        groups = cut_frames(pixels, self._stream.step, first=self.state is None)
        with self._closed_by_errors():
            made = self._stream.parts(2 * to_unit_range(group) - 1 for group in groups)
            return to_public(np.concatenate(list(made), axis=1))


class DecodeStream(OpenStream):
    """Latents to videos, in as many calls as they come in. Made by `WanPipeline.decode_stream`."""

    def __init__(
        self, stream: Stream, room: Room, device_memory: int | str | None, checked: Callable[[Any], np.ndarray]
    ):
        super().__init__(stream, room, device_memory)
        self._checked = checked

    def __call__(self, latents: Any) -> Float[np.ndarray, "b f y x 3"]:
        """Frames in [0, 1] of the next normalised latents (B, C, T, h, w): 4T, and 3 fewer in the first call.

        Raises ValueError for another batch or size than in the first call, and as `decode` does; MemoryError in the
        first call where there is no room for its state.
        """
        z = to_internal(self._checked(latents))
        self._begin(z.shape)
        with self._closed_by_errors():
            return self._stream(z) * 0.5 + 0.5


# Bytes


def stream_bytes(stream: Stream, shape: tuple[int, ...]) -> StreamBytes:
    """Of a stream of what comes in this shape; of a frame that is split, its strip."""
    coder, scale, space = stream.coder, stream.stride, stream.space(shape)
    height, width = (side // scale for side in shape[2:4])
    if space is not None:
        height, width = space.strip((1, 1, height, width))[2:4]
    dtype = jax.tree.leaves(coder.state)[0].dtype
    buffers = coding_bytes(coder.cfg, stream.direction, (height, width), dtype, split=space is not None)
    state = shape[0] * buffers.pop(HALOS)
    return StreamBytes(state, shape[0] * sum(buffers.values()))


def _first_device(parts: Parts) -> jax.Device:
    """Of the VAE's."""
    leaf = jax.tree.leaves(parts.coder.state)[0]
    return leaf.sharding.mesh.devices.flat[0] if hasattr(leaf.sharding, "mesh") else next(iter(leaf.devices()))


def weight_bytes(parts: Parts, device: jax.Device) -> int:
    """Bytes of all parameters on a device."""
    leaves = jax.tree.leaves((parts.denoiser.weights, parts.states()))
    return sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards if shard.device == device)
