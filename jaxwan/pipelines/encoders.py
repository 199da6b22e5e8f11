"""What requests bring, encoded: texts, images, a video and noise become the entries of the denoising loop."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxwan.config import CHANNEL_MASK, ImageInput
from jaxwan.models.tiles import Coder, TiledCoder, Tiling, coder_for
from jaxwan.pipelines.axes import to_internal
from jaxwan.pipelines.checkpoint import Checkpoint
from jaxwan.pipelines.condition import initial_noise, make_controls, renoise_noise
from jaxwan.pipelines.denoise import Entry, begin
from jaxwan.pipelines.dit import RENOISINGS, Controls, Inputs
from jaxwan.pipelines.media import Clip, clip_pixels, crop_image, resize_image, to_unit_range
from jaxwan.pipelines.parts import Parts
from jaxwan.pipelines.progress import Progress
from jaxwan.pipelines.prompt import encode_prompts
from jaxwan.pipelines.request import Request
from jaxwan.schedulers.table import MAX_STEPS, SamplerState, Table, add_noise

Pause = Callable[[], object]


def prepare(
    checkpoint: Checkpoint, parts: Parts, requests: Sequence[Request], progress: Progress,
    encoders: "Encoders | None" = None,
) -> list[Entry]:  # fmt: skip
    """The entry of each request; what several share, such as a text or an image, is encoded once. encoders: where they
    have done a part of it already, or are to pause."""
    texts = list(dict.fromkeys(text for r in requests for rows, text in _branches(r) if rows is None))
    made: dict[str, np.ndarray] = {}
    with progress.phase("text", len(texts), "text") as update:
        if texts:
            assert parts.encode_text is not None and parts.tokenizer is not None
            length = requests[0].max_sequence_length
            rows = encode_prompts(parts.encode_text, parts.tokenizer, texts, length=length)
            made = dict(zip(texts, rows, strict=True))
            update(len(texts))
    encoders, entries, seen = encoders or Encoders(checkpoint, parts, requests[0].tiling), [], set()
    with progress.phase("encode", len({i for r in requests for i in _sources(r)}), "input") as update:
        for request in requests:
            text = np.stack([made[text] if rows is None else rows for rows, text in _branches(request)])
            entries.append(encoders.entry(request, text))
            update(len(_sources(request) - seen))
            seen |= _sources(request)
    return entries


def _branches(request: Request) -> list[tuple[np.ndarray | None, str]]:
    """(given rows, text) of each branch; given rows come first."""
    cond = request.prompt_embeds, request.prompt or ""
    return [cond, (request.negative_prompt_embeds, request.negative_prompt or "")][: 1 + request.guided]


def _sources(request: Request) -> set[int]:
    """Which images and video a request has."""
    return {id(x) for x in (request.image, request.last_image, request.video) if x is not None}


class Encoders:
    """The models before the loop but for texts; whatever comes as the same object again is encoded once.

    pause: called before each group of frames that the VAE encodes.
    """

    def __init__(
        self, checkpoint: Checkpoint, parts: Parts, tiling: Tiling | None = None, pause: Pause = lambda: None
    ):  # fmt: skip
        self.checkpoint, self.parts = checkpoint, parts
        self.coder, self._pause = coder_for(parts.coder, tiling), pause
        self._made: dict[tuple, Any] = {}

    def entry(self, request: Request, text: Float[np.ndarray, "g l c"]) -> Entry:
        """A video before its first step."""
        x = self.latents(request)
        images = self.images(request)
        noise = renoise_noise(request.table, request.seed, request.index, x.shape)
        return begin(x, Inputs(make_controls(request, images.get("has_first"), len(x)), text, **images, noise=noise))

    def code(self, request: Request) -> None:
        """Do the VAE's part of `entry`, which then does the rest."""
        size = request.height, request.width, request.fit
        if self.checkpoint.image_input is ImageInput.FIRST_FRAME:
            self._once(self._first, request.image, *size)
        elif self.checkpoint.image_input is not ImageInput.NONE:
            self._once(self._channels, request.image, request.last_image, request.num_frames, *size)
        if request.video is not None:
            self._once(self._video, request.video)

    def images(self, request: Request) -> dict[str, np.ndarray]:
        """The fields of `Inputs` that the request's images make, for a model that takes any."""
        kind, image, last = self.checkpoint.image_input, request.image, request.last_image
        frames, size = request.num_frames, (request.height, request.width, request.fit)
        if kind is ImageInput.NONE:
            return {}
        if kind is ImageInput.FIRST_FRAME:
            return {"first": self._once(self._first, image, *size), "has_first": np.array(image is not None)}
        made = {"channels": self._once(self._channels, image, last, frames, *size)}
        if self.parts.encode_image is not None:
            made["image"] = self._once(self._clip_rows, image, last, *size)
        return made

    def latents(self, request: Request) -> Float[np.ndarray, "t h w z"]:
        """At the noise level of the request's first step."""
        given, shape = request.latents, latent_shape(self.checkpoint, request)
        if given is None:
            assert request.seed is not None
            noise = initial_noise(request.seed, request.index, shape)
        else:
            noise = to_internal(given)
        if request.video is None:
            return noise
        clean = self._once(self._video, request.video)
        return np.asarray(add_noise(clean, noise, float(request.table.sigmas[0])))

    def _once(self, encode: Callable, *given: Any) -> Any:
        key = encode.__name__, *(x if isinstance(x, int | str) else id(x) for x in given)
        if key not in self._made:
            self._made[key] = encode(*given)
        return self._made[key]

    def _first(self, image: Any, height: int, width: int, fit: str) -> Float[np.ndarray, "1 h w z"]:
        """The clean first latent frame; zeros, not looked at, without an image."""
        if image is None:
            geometry = self.checkpoint.geometry
            return np.zeros((*geometry.latent_shape(1, height, width), geometry.z_dim), np.float32)
        return self.coder.encode(_resized(image, height, width, fit)[None, None])[0]

    def _channels(self, image: Any, last: Any, frames: int, *size: Any) -> Float[np.ndarray, "t h w y"]:
        last = None if last is None else _resized(last, *size)
        return image_channels(self.coder, _resized(image, *size), last, frames, self._pause)

    def _clip_rows(self, image: Any, last: Any, height: int, width: int, fit: str) -> Float[np.ndarray, "i e"]:
        """CLIP rows of the image, which it sees unresized, followed by the last image's; of a crop what is shown, and
        of a padded one no bars."""
        encode, processor = self.parts.encode_image, self.parts.image_processor
        assert encode is not None
        shown = [crop_image(i, height, width) if fit == "crop" else i for i in (image, last) if i is not None]
        return np.concatenate(encode(np.stack([clip_pixels(i, processor) for i in shown])))

    def _video(self, video: Clip) -> Float[np.ndarray, "t h w z"]:
        return encode_clip(self.coder, video, self._pause)


@dataclass(frozen=True)
class _Groups:
    """A clip as the VAE takes it, in [-1, 1]: its first frame, and then `step` at a time, as often as it is gone
    through."""

    clip: Clip
    step: int
    pause: Pause

    def __iter__(self) -> Iterator[Float[np.ndarray, "1 f h w 3"]]:
        for frames in self.clip.groups(self.step):
            self.pause()
            yield 2 * to_unit_range(frames)[None] - 1


def encode_clip(coder: Coder, clip: Clip, pause: Pause = lambda: None) -> Float[np.ndarray, "t h w z"]:
    """Normalised latents of frames that are read while they are encoded: the host has those of two steps at most. A
    tile goes through all frames before the next begins, so in tiles it has all of them, as bytes."""
    clip = clip.held() if isinstance(coder, TiledCoder) else clip
    return coder.encode_parts(_Groups(clip, coder.cfg.scale_factor_temporal, pause))[0]


def _resized(image: Any, height: int, width: int, fit: str) -> Float[np.ndarray, "h w 3"]:
    """Pixels in [-1, 1]."""
    return 2 * resize_image(image, height, width, fit=fit) - 1


@dataclass(frozen=True)
class _Paused:
    """Parts of a video, with a pause before each."""

    parts: Sequence[np.ndarray]
    pause: Pause

    def __iter__(self) -> Iterator[np.ndarray]:
        for part in self.parts:
            self.pause()
            yield part


def image_channels(
    coder: Coder, first: np.ndarray, last: np.ndarray | None, num_frames: int, pause: Pause = lambda: None
) -> Float[np.ndarray, "t h w y"]:
    """Mask and latents of a video that is known in its first (and last) frame and grey between; pixels in [-1, 1].

    The four mask channels of a latent frame stand for its four pixel frames; the first latent frame, which holds one
    pixel frame only, has all four set.
    Source: diffusers pipeline_wan_i2v.py:prepare_latents.
    """
    step = coder.cfg.scale_factor_temporal
    grey = np.broadcast_to(np.float32(0), (1, step, *first.shape))
    video = [first[None, None], *[grey] * ((num_frames - 1) // step)]
    if last is not None:
        video[-1] = np.concatenate([grey[:, 1:], last[None, None]], axis=1)
    latents = coder.encode_parts(_Paused(video, pause))[0]
    mask = np.zeros((*latents.shape[:3], CHANNEL_MASK), np.float32)
    mask[0] = 1
    if last is not None:
        mask[-1, ..., -1] = 1
    return np.concatenate([mask, latents], axis=-1)


# What they will be, before anything is encoded


def latent_shape(checkpoint: Checkpoint, request: Request) -> tuple[int, int, int, int]:
    """(T, H, W, Z) of a request's latents."""
    return *checkpoint.geometry.latent_shape(*request.size), checkpoint.geometry.z_dim


def abstract_entry(checkpoint: Checkpoint, request: Request) -> Entry:
    """Shapes of what `prepare` makes of a request; its controls are small, and real."""
    shapes = entry_shapes(
        checkpoint, request.size, branches=1 + request.guided, text_rows=request.max_sequence_length,
        last_image=request.last_image is not None, renoises=request.table.renoises,
    )  # fmt: skip
    has_first = None if shapes.inputs.has_first is None else np.array(request.image is not None)
    controls = make_controls(request, has_first, latent_shape(checkpoint, request)[0])
    return shapes._replace(done=np.zeros((), np.int32), inputs=shapes.inputs._replace(controls=controls))


def entry_shapes(
    checkpoint: Checkpoint, size: tuple[int, int, int], *, branches: int, text_rows: int, last_image: bool = False,
    renoises: bool = False,
) -> Entry:  # fmt: skip
    """Shapes of a video of `size` (num_frames, height, width), with what else decides on them."""
    shape, kind, encoder = checkpoint.geometry.latent_shape(*size), checkpoint.image_input, checkpoint.image_encoder
    x = jax.ShapeDtypeStruct((*shape, checkpoint.geometry.z_dim), np.float32)

    def array(*sizes: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    images, groups = {}, 1
    if kind is ImageInput.FIRST_FRAME:
        images, groups = {"first": array(1, *x.shape[1:]), "has_first": array(dtype=np.bool_)}, shape[0]
    elif kind is not ImageInput.NONE:
        images = {"channels": array(*shape, CHANNEL_MASK + x.shape[-1])}
        if encoder is not None:
            images["image"] = array((1 + last_image) * encoder.num_rows, encoder.hidden_size)
    table = Table(
        array(MAX_STEPS + 1), array(MAX_STEPS), array(MAX_STEPS, 6), array(MAX_STEPS, 5), array(dtype=np.int32)
    )
    controls = Controls(
        table, array(MAX_STEPS, groups), array(MAX_STEPS, dtype=np.int32), array(MAX_STEPS), array(dtype=np.bool_)
    )
    text = array(branches, text_rows, checkpoint.transformer.text_dim)
    noise = array(RENOISINGS, *x.shape) if renoises else None
    return Entry(SamplerState(x, x, x, x, x), array(dtype=np.int32), Inputs(controls, text, **images, noise=noise))
