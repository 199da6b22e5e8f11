"""What a request brings to the loop: its noise, its image or video as latents, and its steps as rows of `Controls`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, UInt32

from jaxwan.config import ImageInput
from jaxwan.models.vae import VideoCoder
from jaxwan.pipelines.checkpoint import CHANNEL_MASK, Checkpoint
from jaxwan.pipelines.denoise import RENOISINGS, Controls
from jaxwan.pipelines.media import resize_image
from jaxwan.pipelines.request import Request
from jaxwan.schedulers.sigmas import NUM_TRAIN_TIMESTEPS
from jaxwan.schedulers.table import Table, stack_tables

INITIAL = 0  # noise streams of a video: where it starts, then one a step
RENOISE = 1


class Conditioning(NamedTuple):
    """Image input of R videos; what the model does not take is None. Fields as in denoise.Inputs."""

    image: Float[Array, "r i e"] | None = None
    channels: Float[np.ndarray, "r t h w y"] | None = None
    first: Float[np.ndarray, "r 1 h w z"] | None = None
    has_first: np.ndarray | None = None


def encode_images(
    kind: ImageInput,
    coder: VideoCoder,
    images: Sequence[Any],
    last_images: Sequence[Any],
    size: tuple[int, int, int],
) -> Conditioning:
    """Latent conditioning of the images (None where a video has none) for videos of `size` (num_frames, height, width).

    CLIP rows are not made here: they see the image unresized.
    """
    num_frames, height, width = size

    def pixels(image: Any) -> np.ndarray | None:
        return None if image is None else 2 * resize_image(image, height, width) - 1

    if kind is ImageInput.NONE:
        return Conditioning()
    if kind is ImageInput.FIRST_FRAME:
        rows = once_each(lambda image: _first_frame(coder, pixels(image), height, width), images)
        return Conditioning(first=np.stack(rows), has_first=np.array([image is not None for image in images]))

    def channels(image: Any, last: Any) -> np.ndarray:
        return image_channels(coder, 2 * resize_image(image, height, width) - 1, pixels(last), num_frames)

    return Conditioning(channels=np.stack(once_each(channels, images, last_images)))


def abstract_conditioning(checkpoint: Checkpoint, requests: Sequence[Request], shape: tuple[int, ...]) -> Conditioning:
    """What the images of requests become, for latents of `shape` (T, H, W, Z): shapes, but for `has_first`."""

    def array(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((len(requests), *sizes), np.float32)

    if checkpoint.image_input is ImageInput.NONE:
        return Conditioning()
    if checkpoint.image_input is ImageInput.FIRST_FRAME:
        return Conditioning(first=array(1, *shape[1:]), has_first=np.array([r.image is not None for r in requests]))
    made = Conditioning(channels=array(*shape[:3], CHANNEL_MASK + shape[3]))
    encoder = checkpoint.image_encoder
    if encoder is None:
        return made
    images = 1 + (requests[0].last_image is not None)
    return made._replace(image=array(images * encoder.num_rows, encoder.hidden_size))


def once_each(encode: Callable, *columns: Sequence[Any]) -> list:
    """`encode` of every row of objects; rows of the same objects, such as one image for all prompts, share a result."""
    made: dict[tuple[int, ...], np.ndarray] = {}
    for row in zip(*columns, strict=True):
        if tuple(map(id, row)) not in made:
            made[tuple(map(id, row))] = encode(*row)
    return [made[tuple(map(id, row))] for row in zip(*columns, strict=True)]


def image_channels(
    coder: VideoCoder, first: np.ndarray, last: np.ndarray | None, num_frames: int
) -> Float[np.ndarray, "t h w y"]:
    """Mask and latents of a video that is known in its first (and last) frame and grey between; pixels in [-1, 1].

    The four mask channels of a latent frame stand for its four pixel frames; the first latent frame, which holds one
    pixel frame only, has all four set.
    Source: diffusers pipeline_wan_i2v.py:prepare_latents.
    """
    video = np.zeros((1, num_frames, *first.shape), np.float32)
    video[0, 0] = first
    if last is not None:
        video[0, -1] = last
    latents = encode_video(coder, video)[0]
    mask = np.zeros((*latents.shape[:3], CHANNEL_MASK), np.float32)
    mask[0] = 1
    if last is not None:
        mask[-1, ..., -1] = 1
    return np.concatenate([mask, latents], axis=-1)


def _first_frame(coder: VideoCoder, pixels: np.ndarray | None, height: int, width: int) -> np.ndarray:
    """The clean first latent frame [1, H, W, Z] of an image; zeros, not looked at, without one."""
    if pixels is None:
        stride = coder.cfg.scale_factor_spatial
        return np.zeros((1, height // stride, width // stride, coder.cfg.z_dim), np.float32)
    return encode_video(coder, pixels[None, None])[0]


def encode_video(coder: VideoCoder, pixels: Float[np.ndarray, "b f h w 3"]) -> Float[np.ndarray, "b t y x z"]:
    """`VideoCoder.encode`, joined on the host, where that takes no program for each number of frames."""
    return np.concatenate([np.asarray(latent) for latent in list(coder.encode_chunks(pixels))], axis=1)


def make_controls(requests: Sequence[Request], conditioning: Conditioning, latent_frames: int) -> Controls:
    """The steps of every request."""
    table = stack_tables([r.table for r in requests])
    expert = np.stack([choose_expert(r.table.timesteps, r.boundary_ratio) for r in requests])
    guidance = np.array([[r.guidance_scale, r.guidance_scale_2] for r in requests])
    return Controls(
        table=table,
        timesteps=frame_timesteps(table.timesteps, conditioning.has_first, latent_frames),
        expert=expert,
        guidance=np.take_along_axis(guidance, expert, axis=1),
        guided=np.array([r.guided for r in requests]),
    )


def choose_expert(timesteps: np.ndarray, boundary_ratio: float | None) -> np.ndarray:
    """0 (high noise) at or above the boundary, 1 (low noise) below it; without a boundary always 0."""
    if boundary_ratio is None:
        return np.zeros(timesteps.shape, np.int32)
    return (timesteps < boundary_ratio * NUM_TRAIN_TIMESTEPS).astype(np.int32)


def frame_timesteps(timesteps: np.ndarray, has_first: np.ndarray | None, latent_frames: int) -> np.ndarray:
    """Timesteps `[R, N]` as the model takes them, `[R, N, Q]`: of TI2V one a latent frame, 0 where it is given."""
    if has_first is None:
        return timesteps[..., None]
    per_frame = np.repeat(timesteps[..., None], latent_frames, axis=-1)
    per_frame[has_first, :, 0] = 0
    return per_frame


def initial_noise(seed: int, index: int, shape: tuple[int, ...]) -> np.ndarray:
    """Unit noise of video `index` of a prompt, time first: a function of (seed, index) alone."""
    return np.asarray(_normal(_words(seed), np.uint32(index), np.uint32(INITIAL), shape))


def renoise_noise(table: Table, seed: int, index: int, shape: tuple[int, ...]) -> np.ndarray:
    """The noise of every step that adds some, `[8, …]`: a function of (seed, index, step); zeros for other samplers."""
    noise = np.zeros((RENOISINGS, *shape), np.float32)
    for step in np.flatnonzero(table.predictor[:, 4]):
        noise[step] = _normal(_words(seed), np.uint32(index), np.uint32(RENOISE + step), shape)
    return noise


def noise_program(shape: tuple[int, ...]) -> tuple[str, Callable, tuple]:
    """(name, jitted function, arguments) of what draws noise of a shape."""
    return "noise", _normal, (_words(0), np.uint32(0), np.uint32(INITIAL), shape)


def _words(seed: int) -> UInt32[np.ndarray, "2"]:
    """A 64-bit seed as threefry's key."""
    return np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)


@partial(jax.jit, static_argnums=3)
def _normal(words: Array, index: Array, stream: Array, shape: tuple[int, ...]) -> Array:
    """Drawn in a program of its own: fused into another one, the last bit of a few values would differ."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(words, impl="threefry2x32"), index), stream)
    return jax.random.normal(key, shape, jax.numpy.float32)
