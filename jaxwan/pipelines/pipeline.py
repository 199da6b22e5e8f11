"""WanPipeline: a checkpoint on a mesh, from prompts (and images or a video) to videos."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxwan.pipelines.arguments import Number, refuse_unknown
from jaxwan.pipelines.axes import to_internal, to_public
from jaxwan.pipelines.call import make_job, with_prompt
from jaxwan.pipelines.checkpoint import Checkpoint, open_checkpoint, with_weights
from jaxwan.pipelines.compilation_cache import keep_compiled_programs
from jaxwan.pipelines.condition import choose_expert, frame_timesteps, to_float32
from jaxwan.pipelines.decode import decode_videos
from jaxwan.pipelines.denoise import Entry, Loop, begin
from jaxwan.pipelines.dit import Controls, Inputs
from jaxwan.pipelines.encoders import Encoders, encode_video, prepare
from jaxwan.pipelines.load import load_parts, parse_dtype, place
from jaxwan.pipelines.media import load_video, to_unit_range
from jaxwan.pipelines.output import Output
from jaxwan.pipelines.parts import Parts
from jaxwan.pipelines.progress import Progress
from jaxwan.pipelines.prompt import encode_prompts
from jaxwan.pipelines.request import Job, Request
from jaxwan.pipelines.warmup import Warmup, compiling, job_programs
from jaxwan.schedulers.table import make_table
from jaxwan.sharding.mesh import MeshSpec

OUTPUT_TYPES = ("np", "latent", "pil")
Callback = Callable[["WanPipeline", int, Any, dict[str, np.ndarray]], dict | None]
log = logging.getLogger(__name__)


class WanPipeline:
    """Text, image or video to video. Made by `from_pretrained`; a call keeps no state of its own here."""

    def __init__(self, checkpoint: Checkpoint, parts: Parts, *, progress: bool = True):
        self.checkpoint, self.parts, self.progress = checkpoint, parts, progress

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | Checkpoint,
        mesh: str | MeshSpec | None = None,
        dtype: Any = None,
        vae_dtype: Any = "float32",
        *,
        warmup: Mapping[str, Any] | Job | None = None,
        progress: bool = True,
        **unknown: Any,
    ) -> "WanPipeline":
        """Load a Diffusers-layout folder or hub id (or what `open_checkpoint` made) onto a mesh such as "pp=4".

        mesh None is one device. dtype is the DiT's and text encoder's, "bfloat16", jnp.float32 or the like: bfloat16
        by default on accelerators (with Diffusers' modules kept in float32), float32 on a CPU.

        warmup: the arguments of a call, `dict(prompt="…", num_frames=81)`, or what `make_job` made of them. The call is
        checked before anything heavy is read, and what it runs is compiled while the weights are. Calls of the same
        size, number of videos and inputs then compile nothing.

        progress: bars (or plain lines) of what takes long, now and in calls; False is silent.

        Raises ValueError or OSError before anything heavy is read; TypeError for an argument that a call does not have.

        Compiled programs are kept for later processes, in a folder that `keep_compiled_programs` names.
        """
        refuse_unknown(unknown, ("model", "mesh", "dtype", "vae_dtype", "warmup", "progress"))
        spec, dtype, vae_dtype = MeshSpec.parse(mesh), parse_dtype("dtype", dtype), parse_dtype("vae_dtype", vae_dtype)
        checkpoint = open_checkpoint(model)
        if not isinstance(warmup, Mapping | Job | None):
            raise ValueError(f"warmup={warmup!r:.40} is no call's arguments, such as dict(num_frames=81)")
        job = warmup if isinstance(warmup, Job | None) else make_job(checkpoint, **with_prompt(warmup))
        place(checkpoint, spec)
        keep_compiled_programs()
        checkpoint = with_weights(checkpoint)
        parts = load_parts(checkpoint, spec, dtype, vae_dtype or "float32", job, progress=progress)
        return cls(checkpoint, parts, progress=progress)

    def __repr__(self) -> str:
        denoiser = self.parts.denoiser
        mesh = MeshSpec(**denoiser.mesh.shape)
        kind = denoiser.mesh.devices.flat[0].device_kind
        return f"WanPipeline({self.checkpoint.name}, {denoiser.dtype}, mesh {mesh}, {mesh.num_devices} x {kind})"

    @property
    def seconds(self) -> dict[str, float]:
        """What loading took, by phase."""
        return dict(self.parts.seconds)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str | None] | None = None,
        *,
        image: Any = None,
        last_image: Any = None,
        video: Any = None,
        strength: Number | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        fps: Number | None = None,
        num_inference_steps: int | Sequence[int | None] | None = None,
        guidance_scale: Number | Sequence[Number | None] | None = None,
        guidance_scale_2: Number | Sequence[Number | None] | None = None,
        boundary_ratio: Number | None = None,
        flow_shift: Number | Sequence[Number | None] | None = None,
        sampler: str | Sequence[str | None] | None = None,
        timesteps: Sequence[Number] | np.ndarray | None = None,
        seed: int | Sequence[int | None] | None = None,
        latents: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        num_videos_per_prompt: int = 1,
        video_index: int = 0,
        output_type: str = "np",
        callback_on_step_end: Callback | None = None,
        **unknown: Any,
    ) -> Output:
        """Generate; names and meanings are Diffusers' where it has the argument. What is left out is the checkpoint's.

        prompt, negative_prompt: a text, or one a prompt.
        image, last_image: first and last frame: a path, PIL image or array (H, W, 3), uint8 or float in [0, 1]; or one
            a prompt. video, strength: source of video to video, and how far to go from it, (0, 1].
        height, width, num_frames, fps: of the video, in pixels and frames; num_frames is 4k+1.
        num_inference_steps, sampler, flow_shift, timesteps (of sampler "renoise"): docs/samplers.md.
        guidance_scale: of the high-noise expert (or the only one). guidance_scale_2: of the low-noise expert.
        boundary_ratio: where the low-noise expert takes over, in timesteps / 1000.
        seed: of the noise; drawn when left out, and in the output's `seeds`. num_videos_per_prompt: their noise is that
            of (seed, index) with index from `video_index` on.
        latents: unit noise to start from, (B, C, T, h, w). prompt_embeds, negative_prompt_embeds: (B, 512, C).
        output_type: "np" (frames as float32), "pil" or "latent" (nothing is decoded).
        callback_on_step_end: (pipe, step, timestep, {"latents": …}) looks on after every step; timestep is a list (one
            a video, the last one for finished videos) where schedules differ.

        Raises ValueError or OSError in a sentence, before anything is computed; TypeError for another argument.
        """
        check_output_type(output_type)
        if not (callback_on_step_end is None or callable(callback_on_step_end)):
            raise ValueError(f"callback_on_step_end={callback_on_step_end!r:.40} is no function")
        job = make_job(
            self.checkpoint, prompt=prompt, negative_prompt=negative_prompt, image=image, last_image=last_image,
            video=video, strength=strength, height=height, width=width, num_frames=num_frames, fps=fps,
            num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, guidance_scale_2=guidance_scale_2,
            boundary_ratio=boundary_ratio, flow_shift=flow_shift, sampler=sampler, timesteps=timesteps, seed=seed,
            latents=latents, prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds,
            num_videos_per_prompt=num_videos_per_prompt, video_index=video_index, **unknown,
        )  # fmt: skip
        for note in job.notes:
            log.info(note)
        return self.run(job, output_type=output_type, callback_on_step_end=callback_on_step_end)

    def run(self, job: Job, *, output_type: str = "np", callback_on_step_end: Callback | None = None) -> Output:
        """Generate a checked job (`make_job`), whose notes are the caller's to tell."""
        check_output_type(output_type)
        progress = Progress(visible=self.progress)
        entries = prepare(self.checkpoint, self.parts, job.requests, progress)
        latents = self._denoise(job.requests, entries, progress, callback_on_step_end)
        frames = latents if output_type == "latent" else self._decode(latents, progress)
        if output_type == "pil":
            frames = [_to_pil(video) for video in frames]
        return Output(frames, latents, job.requests[0].fps, self._settings(job), progress.seconds)

    def _settings(self, job: Job) -> tuple[dict[str, Any], ...]:
        """What made each video: the call's settings, the model and its numbers."""
        vae_dtype = jax.tree.leaves(self.parts.coder.state)[0].dtype
        made_by = {"model": self.checkpoint.name, "dtype": str(self.parts.denoiser.dtype), "vae_dtype": str(vae_dtype)}
        return tuple(made_by | settings for settings in job.settings())

    def warmup(self, prompt: str | Sequence[str] | None = None, *, output_type: str = "np", **call: Any) -> Warmup:
        """Compile all that a call with these arguments runs, several programs at a time, and compute nothing.

        What counts is what a program depends on: size, number of videos, whether any is guided, whether images or a
        video come. A server gives stand-ins for the rest:

            pipe.warmup(height=480, width=832, num_frames=81, guidance_scale=5.0)
            pipe.warmup([""] * 4, image=np.zeros((480, 832, 3), np.uint8))

        Calls of the same kind then compile nothing, and neither does a second warm-up. Raises as a call does.
        """
        check_output_type(output_type)
        job = make_job(self.checkpoint, **with_prompt({"prompt": prompt} | call))
        start = time.perf_counter()
        programs = list(job_programs(self.checkpoint, self.parts, job, decode=output_type != "latent"))
        phases, seconds = Progress(visible=self.progress), {}
        with compiling(programs, phases) as finished, phases.phase("compile", len(programs), "program") as update:
            for name, took in finished:
                seconds[name] = took
                update(1)
        return Warmup(time.perf_counter() - start, seconds)

    # The parts on their own

    def encode_prompt(self, prompts: str | Sequence[str]) -> np.ndarray:
        """Context rows (B, 512, C), float32, of one prompt or several: cleaned, zero behind each prompt's end."""
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        assert self.parts.encode_text is not None and self.parts.tokenizer is not None
        return encode_prompts(self.parts.encode_text, self.parts.tokenizer, texts)

    def encode(self, frames: ArrayLike) -> np.ndarray:
        """Normalised latents (B, C, T, h, w) of frames (B, F, H, W, 3), uint8 or float in [0, 1].

        Raises ValueError for another rank, sizes that do not fit the VAE, or values outside the range.
        """
        pixels = np.asarray(frames)
        if pixels.ndim != 5 or pixels.shape[-1] != 3 or not len(pixels):
            raise ValueError(f"frames have shape {pixels.shape}, expected (B, F, H, W, 3)")
        videos = [2 * to_unit_range(load_video(video)[0]) - 1 for video in pixels]
        return to_public(np.concatenate([encode_video(self.parts.coder, video[None]) for video in videos]))

    def decode(self, latents: Any) -> Any:
        """Frames (B, F, H, W, 3) in [0, 1] of normalised latents (B, C, T, h, w); of an Output of latents, one that has
        its frames too. ValueError for another shape."""
        if isinstance(latents, Output):
            return replace(latents, frames=self.decode(latents.latents))
        return self._decode(self._checked(latents), Progress(visible=False))

    def _decode(self, latents: np.ndarray, progress: Progress) -> np.ndarray:
        return decode_videos(self.parts.coder, self.checkpoint.geometry, latents, progress)

    def _checked(self, latents: ArrayLike) -> np.ndarray:
        array, channels = np.asarray(latents, np.float32), self.checkpoint.geometry.z_dim
        if array.ndim != 5 or array.shape[1] != channels or 0 in array.shape:
            raise ValueError(f"latents have shape {array.shape}, expected (B, {channels}, T, h, w)")
        return array

    def predict(
        self, latents: ArrayLike, timestep: ArrayLike, prompt_embeds: ArrayLike, image: Any = None,
        last_image: Any = None,
    ) -> np.ndarray:  # fmt: skip
        """Velocity (B, C, T, h, w) of one model evaluation, exactly as in the loop, without guidance.

        timestep: a number, [B], [B, T] (latent frames) or [B, S] (tokens); the expert is chosen by each sample's
        largest. For TI2V an image is mixed in as the first frame, whose timestep is 0.
        """
        latents = self._checked(latents)
        x = to_internal(latents)
        count, frames, geometry = len(x), x.shape[1], self.checkpoint.geometry
        embeds = np.asarray(prompt_embeds, np.float32)
        blank = make_job(
            self.checkpoint, prompt_embeds=embeds, image=image, last_image=last_image, seed=0, latents=latents,
            **dict(zip(("num_frames", "height", "width"), geometry.pixel_shape(*x.shape[1:4]), strict=True)),
        )  # fmt: skip
        encoders, table, entries = Encoders(self.checkpoint, self.parts), make_table("euler", 1, 1.0), []
        given = _per_sample(timestep, count, frames, geometry.num_tokens(*blank.size))
        for request, latent, text, shown in zip(blank.requests, x, embeds, given, strict=True):
            images = encoders.images(request)
            timesteps = shown[None]  # of one step
            if len(shown) == 1:
                timesteps = frame_timesteps(shown, images.get("has_first"), frames)
            elif images.get("has_first"):
                timesteps = np.where(np.arange(len(shown)) < len(shown) // frames, 0, timesteps)
            expert = choose_expert(shown.max(keepdims=True), request.boundary_ratio)
            controls = to_float32(Controls(table, timesteps, expert, np.ones(1), np.array(False)))
            entries.append(begin(latent, Inputs(controls, text[None], **images)))
        loop = Loop(self.parts.denoiser, entries)
        loop.advance()
        return to_public(np.stack([np.asarray(loop.read(slot).velocity) for slot in range(count)]))

    def _denoise(
        self, requests: Sequence[Request], entries: Sequence[Entry], progress: Progress, callback: Callback | None
    ) -> np.ndarray:
        """All steps; the public (B, C, T, h, w)."""
        loop = Loop(self.parts.denoiser, entries)
        with progress.phase("denoise", loop.rounds, "step") as update:
            for _ in range(loop.rounds):
                loop.advance()
                update(1)
                if callback is not None:
                    self._look_on(callback, loop, requests)
        return to_public(np.stack([loop.entry(slot).latents for slot in range(len(entries))]))

    def _look_on(self, callback: Callback, loop: Loop, requests: Sequence[Request]) -> None:
        shown = [float(r.table.timesteps[done - 1]) for r, done in zip(requests, loop.done, strict=True)]
        alike = all((r.table.timesteps == requests[0].table.timesteps).all() for r in requests)
        given = {"latents": to_public(loop.latents())}
        returned = callback(self, max(loop.done) - 1, shown[0] if alike else shown, given)
        if returned and any(returned[key] is not given.get(key) for key in returned):
            raise ValueError("callback_on_step_end may look on but not change: it returned other latents")


# Small pure functions


def check_output_type(value: str) -> None:
    """Raises ValueError for an output_type that is not offered."""
    if value not in OUTPUT_TYPES:
        raise ValueError(f"output_type={value!r} is not one of {', '.join(OUTPUT_TYPES)}")


def _per_sample(timestep: ArrayLike, count: int, frames: int, tokens: int) -> np.ndarray:
    """[B, Q] timesteps from a number, [B], [B, T] or [B, S]."""
    t = np.asarray(timestep, np.float64)
    if t.ndim < 2:
        t = np.broadcast_to(t, (count,))[:, None] if t.shape in ((), (count,)) else t
    if t.shape not in ((count, 1), (count, frames), (count, tokens)):
        raise ValueError(
            f"timestep has shape {t.shape}, expected a number, ({count},), ({count}, {frames}) or ({count}, {tokens})"
        )
    return t


def _to_pil(video: np.ndarray) -> list:
    from PIL import Image

    return [Image.fromarray(frame) for frame in (video * 255).round().astype(np.uint8)]
