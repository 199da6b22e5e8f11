"""WanPipeline: a checkpoint on a mesh, from prompts (and images or a video) to videos."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxwan.convert.lora import Lora
from jaxwan.models.tiles import Coder, Tiling, coder_for
from jaxwan.pipelines.arguments import Number, as_array, local_path, no_attribute, refuse_unknown, whole
from jaxwan.pipelines.axes import to_internal, to_public
from jaxwan.pipelines.call import make_job, with_prompt
from jaxwan.pipelines.checkpoint import Checkpoint, ensure_weights, open_checkpoint
from jaxwan.pipelines.compilation_cache import keep_compiled_programs
from jaxwan.pipelines.condition import choose_expert, frame_timesteps, to_float32
from jaxwan.pipelines.decode import decode_videos
from jaxwan.pipelines.denoise import Loop, begin
from jaxwan.pipelines.dit import Controls, Inputs
from jaxwan.pipelines.dry_run import stood_in
from jaxwan.pipelines.encoders import Encoders, encode_clip, prepare
from jaxwan.pipelines.load import check_numbers, check_use, load_parts, parse_dtype, place, tell_idle_stages
from jaxwan.pipelines.media import BackgroundWriter, check_writable
from jaxwan.pipelines.output import Output, Saving, as_pil, kept_type, numbered
from jaxwan.pipelines.parts import Parts, job_settings
from jaxwan.pipelines.plan import choose_mesh, fitting
from jaxwan.pipelines.progress import Progress
from jaxwan.pipelines.prompt import MAX_TOKENS, encode_prompts, lost_text
from jaxwan.pipelines.request import Job
from jaxwan.pipelines.snapshot import identity, load_entry, save_entry
from jaxwan.pipelines.sources import clips_of
from jaxwan.pipelines.steps import StepState, checked_latents
from jaxwan.pipelines.streams import DecodeStream, EncodeStream, Room
from jaxwan.pipelines.telling import warn
from jaxwan.pipelines.warmup import Warmup, compiling, job_programs
from jaxwan.schedulers.table import make_table
from jaxwan.sharding.mesh import MeshSpec, is_auto

_AT_THE_END = ("output_type", "save", "callback_on_step_end")  # arguments of a call that its job does not know
Callback = Callable[["WanPipeline", int, Any, dict[str, np.ndarray]], dict | None]
log = logging.getLogger(__name__)


class WanPipeline:
    """Text, image or video to video. Made by `from_pretrained`; a call keeps no state of its own here."""

    def __init__(self, checkpoint: Checkpoint, parts: Parts, *, progress: bool = True):
        self.checkpoint, self.parts, self.progress = checkpoint, parts, progress

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | Checkpoint | None = None,
        mesh: str | MeshSpec | None = None,
        dtype: Any = None,
        vae_dtype: Any = "float32",
        *,
        ulysses: int | None = None,
        vae_devices: int | None = None,
        variant: str | None = None,
        components: Mapping[str, str | Path] | None = None,
        loras: Sequence[Lora | str | Path] = (),
        warmup: Mapping[str, Any] | Job | None = None,
        check: bool = False,
        progress: bool = True,
        **unknown: Any,
    ) -> "WanPipeline":
        """Load a Diffusers-layout folder or hub id (or what `open_checkpoint` made) onto a mesh such as "pp=4".

        mesh None is one device, and "auto" the fastest one that fits the devices here, for the call that `warmup` says,
        else for one video of the model's own size (`plan_mesh`). Of its axes dp spreads videos, cfg=2 prompts and
        negative prompts, pp the layers, and results are the same; sp spreads the tokens of each frame and tp heads and
        MLP, and results are the same but for rounding. A pipeline with more ranks of dp than a call has videos leaves
        some idle. ulysses: how many of sp's devices trade tokens for heads, where that is not to be as many as can; 1
        is ring attention alone. dtype is the DiT's and text encoder's, "bfloat16", jnp.float32 or the like: bfloat16 by
        default on accelerators (with Diffusers' modules kept in float32), float32 on a CPU. variant: of the weights
        files, such as "fp16", and components: files for parts, {"vae": FILE}, both as `open_checkpoint` takes them.
        loras: files that are merged into the DiTs while they are read, [Lora("style.safetensors", strength=0.8)]
        (docs/checkpoints.md).

        vae_devices: how many devices of its own, behind the mesh's, the VAE has; None: it is on all of the mesh's. It
        splits every frame over its devices, which changes results by rounding alone. With its own it can work beside
        the mesh: call `decode` in another thread.

        warmup: the arguments of a call, `dict(prompt="…", num_frames=81)`, or what `make_job` made of them. The call is
        checked before anything heavy is read, and what it runs is compiled while the weights are. Calls of the same
        size, number of videos and inputs then compile nothing.

        check: read all weights once before, and refuse a converted folder whose files are not as they were written (its
        SHA256SUMS), and numbers that are infinite or none.

        progress: bars (or plain lines) of what takes long, now and in calls; False is silent.

        Raises ValueError or OSError before anything heavy is read; TypeError for an argument that a call does not have.

        Compiled programs are kept for later processes, in a folder that `keep_compiled_programs` names.
        """
        known = "model mesh dtype vae_dtype ulysses vae_devices variant components loras warmup check progress"
        refuse_unknown(unknown, tuple(known.split()))
        own = 0 if vae_devices is None else whole("vae_devices", vae_devices, 1)
        ulysses = None if ulysses is None else whole("ulysses", ulysses, 1)
        spec = None if is_auto(mesh) and ulysses is None else MeshSpec.parse(mesh, ulysses)
        dtype = parse_dtype("dtype", dtype)
        vae_dtype = parse_dtype("vae_dtype", vae_dtype)
        checkpoint = open_checkpoint(model, variant, components, loras)
        if not isinstance(warmup, Mapping | Job | None):
            raise ValueError(f"warmup={warmup!r:.40} is no call's arguments, such as dict(num_frames=81)")
        job = warmup
        if not isinstance(warmup, Job | None):
            call = {name: value for name, value in warmup.items() if name not in _AT_THE_END}
            job = make_job(checkpoint, False, **with_prompt(checkpoint, call))
        if spec is None:
            video = make_job(checkpoint, False, **stood_in(checkpoint, {})) if job is None else job
            plan = choose_mesh(checkpoint, video, dtype=dtype, vae_dtype=vae_dtype, vae_devices=vae_devices)
            spec = fitting(plan).mesh
            log.info("mesh auto: %s", plan.why.splitlines()[0])
        place(checkpoint, spec, job, own)
        tell_idle_stages(spec, checkpoint)
        keep_compiled_programs()
        ensure_weights(checkpoint)
        if check:
            check_numbers(checkpoint, progress=progress)
        vae_dtype = vae_dtype or "float32"
        parts = load_parts(checkpoint, spec, dtype, vae_dtype, job, vae_devices=own, progress=progress)
        return cls(checkpoint, parts, progress=progress)

    def __getattr__(self, name: str) -> Any:
        raise no_attribute(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("checkpoint", "parts", "progress"):
            raise no_attribute(name)
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        denoiser, mesh = self.parts.denoiser, self.mesh
        kind, own = denoiser.mesh.devices.flat[0].device_kind, self.vae_devices
        own = f", VAE on {own} more" if own else ""
        return f"WanPipeline({self.checkpoint.name}, {denoiser.dtype}, mesh {mesh}, {mesh.num_devices} x {kind}{own})"

    @property
    def mesh(self) -> MeshSpec:
        """What it was loaded onto."""
        denoiser = self.parts.denoiser
        return MeshSpec(**denoiser.mesh.shape, ulysses=denoiser.ulysses)

    @property
    def vae_devices(self) -> int:
        """How many devices of its own the VAE has; 0 where it is on the mesh's."""
        coding = self.parts.coder.mesh
        apart = coding is not None and coding.devices.flat[0] != self.parts.denoiser.mesh.devices.flat[0]
        return coding.size if coding is not None and apart else 0

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
        fit: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        fps: Number | None = None,
        num_inference_steps: int | Sequence[int | None] | None = None,
        guidance_scale: Number | Sequence[Number | None] | None = None,
        guidance_scale_2: Number | Sequence[Number | None] | None = None,
        boundary_ratio: Number | None = None,
        preset: str | None = None,
        flow_shift: Number | Sequence[Number | None] | None = None,
        sampler: str | Sequence[str | None] | None = None,
        sigma_schedule: str | Sequence[str | None] | None = None,
        timesteps: Sequence[Number] | np.ndarray | None = None,
        seed: int | Sequence[int | None] | None = None,
        latents: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        num_videos_per_prompt: int = 1,
        index: int = 0,
        max_sequence_length: int = MAX_TOKENS,
        tiling: Tiling | Mapping[str, int] | None = None,
        output_type: str | None = None,
        save: Any = None,
        callback_on_step_end: Callback | None = None,
        **unknown: Any,
    ) -> Output:
        """Generate; names and meanings are Diffusers' where it has the argument. What is left out is the checkpoint's.

        prompt, negative_prompt: a text, or one a prompt.
        image, last_image: first and last frame: a path, PIL image or array (H, W, 3), uint8 or float in [0, 1]; or one
            a prompt. video, strength: source of video to video, a path, list of PIL images or array (F, H, W, 3), or
            one a prompt, and how far to go from it, (0, 1].
        fit: how an image or video of another shape is brought to the size: "stretch", the default, "crop" its middle,
            or "pad" it with black.
        height, width, num_frames, fps: of the video, in pixels and frames; num_frames is 4k+1.
        preset: where what is left out of sampling, guidance and negative prompt comes from: "diffusers", the default
            (the checkpoint), "official" (Wan's own repositories), "lightx2v-4step", "fastwan-3step",
            "self-forcing-4step" (weights distilled for few steps).
        num_inference_steps, sampler, sigma_schedule, flow_shift, timesteps (of samplers "renoise" and "euler"):
            docs/samplers.md.
        guidance_scale: of the high-noise expert (or the only one). guidance_scale_2: of the low-noise expert.
        boundary_ratio: where the low-noise expert takes over, in timesteps / 1000.
        seed: of the noise; drawn when left out, and in the output's `seeds`. num_videos_per_prompt: their noise is that
            of (seed, index) with index from `index` on.
        latents: unit noise to start from, (B, C, T, h, w), or a .npy file. prompt_embeds, negative_prompt_embeds:
            (B, 512, C). Arrays may be torch tensors too.
        max_sequence_length: rows of each text, 1 to 512, that the model attends to: 512 in training, fewer are quicker
            in small models and another result; longer prompts lose their end.
        tiling: a `jaxwan.Tiling` codes frames in overlapping tiles, for less memory, and is another result: that of
            Diffusers' `enable_tiling`. None, the default, is exact.
        output_type: "np" (frames as float32, the default), "uint8" (frames as bytes, a quarter of the memory), "pil" or
            "latent" (no frames, and without `save` nothing is decoded).
        save: where the videos are written, as mp4, webm, gif or png, while they are decoded: a path or one a video, or
            a dict of the arguments of `Output.save`. The output's `paths` say where they are; it has frames, and the
            memory that they take, if an output_type asks for them.
        callback_on_step_end: (pipe, step, timestep, {"latents": …}) is called after every step, and may return a dict
            of other latents to go on with; timestep is a list (one a video, the last one for finished videos) where
            schedules differ. `prepare_encode` and what follows it let you drive the steps yourself.

        Raises ValueError or OSError in a sentence, before anything is computed; TypeError for another argument.
        """
        kept_type(output_type, save)
        if not (callback_on_step_end is None or callable(callback_on_step_end)):
            raise ValueError(f"callback_on_step_end={callback_on_step_end!r:.40} is no function")
        job = make_job(
            self.checkpoint, prompt=prompt, negative_prompt=negative_prompt, image=image, last_image=last_image,
            video=video, strength=strength, fit=fit, height=height, width=width, num_frames=num_frames, fps=fps,
            num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, guidance_scale_2=guidance_scale_2,
            boundary_ratio=boundary_ratio, preset=preset, flow_shift=flow_shift, sampler=sampler,
            sigma_schedule=sigma_schedule, timesteps=timesteps, seed=seed,
            latents=latents, prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds,
            num_videos_per_prompt=num_videos_per_prompt, index=index,
            max_sequence_length=max_sequence_length, tiling=tiling, **unknown,
        )  # fmt: skip
        tell(job)
        return self.run(job, output_type=output_type, save=save, callback_on_step_end=callback_on_step_end)

    def run(
        self, job: Job, *, output_type: str | None = None, save: Any = None,
        callback_on_step_end: Callback | None = None,
    ) -> Output:  # fmt: skip
        """Generate a checked job (`make_job`), whose notes are the caller's to tell."""
        kept = kept_type(output_type, save)
        if save is not None:
            Saving.parse(save).paths(job.settings(), job.size[0])
        check_use(self.mesh, self.checkpoint, job, loaded=True)
        progress = Progress(visible=self.progress)
        state = self._prepare(job, progress)
        state = self._advance(state, int(state.num_steps.max()), progress, callback_on_step_end)
        latents = state.results
        if not np.isfinite(latents).all():
            warn("the model computed NaN or infinity: is the checkpoint damaged, or its dtype too narrow for it?")
        output = Output(latents, latents, job.requests[0].fps, state.settings, progress.seconds)
        return output if kept == "latent" and save is None else self._decoded(output, progress, kept, save)

    def warmup(
        self, prompt: str | Sequence[str] | None = None, *, output_type: str | None = None, save: Any = None,
        **call: Any,
    ) -> Warmup:  # fmt: skip
        """Compile all that a call with these arguments runs, several programs at a time, and compute nothing.

        What counts is what a program depends on: size, number of videos and of text rows, whether any is guided or
        renoises, whether images or a video come. A server gives stand-ins for the rest:

            pipe.warmup(height=480, width=832, num_frames=81, guidance_scale=5.0)
            pipe.warmup([""] * 4, image=np.zeros((480, 832, 3), np.uint8))

        Calls of the same kind then compile nothing, and neither does a second warm-up. Raises as a call does.
        """
        decode = kept_type(output_type, save) != "latent" or save is not None
        job = make_job(self.checkpoint, False, **with_prompt(self.checkpoint, {"prompt": prompt} | call))
        check_use(self.mesh, self.checkpoint, job, loaded=True)
        start = time.perf_counter()
        programs = list(job_programs(self.checkpoint, self.parts, job, decode=decode))
        phases, seconds = Progress(visible=self.progress), {}
        with compiling(programs, phases) as finished, phases.phase("compile", len(programs), "program") as update:
            for name, took, _ in finished:
                seconds[name] = took
                update(1)
        return Warmup(time.perf_counter() - start, seconds)

    # The parts on their own

    def encode_prompt(self, prompts: str | Sequence[str]) -> np.ndarray:
        """Context rows (B, 512, C), float32, of one prompt or several: cleaned, zero behind each prompt's end.

        Of one that is longer than 512 tokens the end is lost, with a warning. Raises ValueError for a checkpoint
        without a text encoder.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if self.parts.encode_text is None or self.parts.tokenizer is None:
            raise ValueError(f"{self.checkpoint.name} has no text encoder: encode prompts with another pipeline")
        for text in texts:
            if lost := lost_text(self.parts.tokenizer, text):
                warn(f"the prompt is longer than {MAX_TOKENS} tokens, its end is not read: {lost!r}")
        return encode_prompts(self.parts.encode_text, self.parts.tokenizer, texts)

    def encode(
        self, frames: Any, *, num_frames: int | None = None, height: int | None = None, width: int | None = None,
        fit: str | None = None, tiling: Tiling | Mapping[str, int] | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Normalised latents (B, C, T, h, w) of frames (B, F, H, W, 3), uint8 or float in [0, 1]; or (1, C, T, h, w) of
        one video as a call takes it, such as a file, which is read while it is encoded.

        num_frames, height, width: what of each video, and in which size; by default all of it as it is. fit, tiling: as
        in a call.

        Raises ValueError for another rank, sizes that do not fit the VAE or a tiling that does not, or values outside
        the range; OSError as a call does.
        """
        coder = self._coder(Tiling.parse(tiling))
        clips = clips_of(self.parts.coder.geometry, frames, num_frames, height, width, fit)
        return to_public(np.stack([encode_clip(coder, clip) for clip in clips]))

    def decode(
        self, latents: Any, *, tiling: Tiling | Mapping[str, int] | None = None, output_type: str | None = None,
        save: Any = None,
    ) -> Any:  # fmt: skip
        """Frames (B, F, H, W, 3) of normalised latents (B, C, T, h, w); of an Output of latents, one that has frames
        too. Arguments as in a call; an Output knows its own tiling, and takes none, and alone can be saved.

        Raises ValueError for another shape, OSError for what cannot be written.
        """
        kept = kept_type(output_type, save)
        if kept == "latent" and save is None:
            raise ValueError("output_type='latent' decodes nothing: choose np, uint8 or pil")
        progress, tiling = Progress(visible=self.progress), Tiling.parse(tiling)
        if isinstance(latents, Output):
            if tiling is not None:
                raise ValueError("an Output is decoded with the tiling of its call: say it there, or give its .latents")
            progress.seconds |= latents.seconds
            return self._decoded(latents, progress, kept, save)
        if save is not None:
            raise ValueError("latents alone do not say how fast they are shown: decode an Output, or use save_video")
        checked = self._checked(latents)
        return self._frames(checked, progress, [tiling] * len(checked), kept)

    def encode_stream(self, *, device_memory: int | str | None = None) -> EncodeStream:
        """`encode` for videos that come in parts: call it with the next frames, which gives their latents.

            stream = pipe.encode_stream()
            parts = [stream(frames[:, :17]), stream(frames[:, 17:])]  # 1 + 4k frames, then 4k in every call

        However the frames are divided, the latents are those of `encode`. As many streams as memory has room for may be
        under way, each with the state that one call leaves to its next, until it is closed (`stream.close()`) or
        dropped.

        device_memory: of a device, as `dry_run` takes it; None: what JAX took of a present accelerator's. Where it is
        known, the first call of a stream raises MemoryError if its state has no room beside the weights and the states
        of the pipeline's other streams; what else runs on the device is not counted.
        """
        return EncodeStream(self.parts.coder.encode_stream(), self._room, device_memory)

    def decode_stream(self, *, device_memory: int | str | None = None) -> DecodeStream:
        """`decode` for latents that come in parts, as `encode_stream` is `encode` for frames."""
        return DecodeStream(self.parts.coder.decode_stream(), self._room, device_memory, self._checked)

    @cached_property
    def _room(self) -> Room:
        return Room(self.parts)

    def _decoded(self, output: Output, progress: Progress, kept: str, save: Any) -> Output:
        """An Output of latents with the frames that are kept and the files that are written, and what that took."""
        writers, geometry = None, self.checkpoint.geometry
        if save is not None:
            writers = Saving.parse(save).writers(output, geometry.pixel_shape(*output.latents.shape[2:])[0])
        frames = self._frames(output.latents, progress, _tilings(output.settings), kept, writers)
        paths = tuple(writer.path for writer in writers or ())
        return replace(output, frames=frames, seconds=progress.seconds, paths=paths)

    def _frames(
        self, latents: np.ndarray, progress: Progress, tilings: Sequence[Tiling | None], kept: str = "np",
        writers: Sequence[BackgroundWriter] | None = None,
    ) -> Any:  # fmt: skip
        """What is kept of the decoded frames: for "latent" the latents, as they are."""
        coders, geometry = {tiling: self._coder(tiling) for tiling in tilings}, self.checkpoint.geometry
        of_each, frame_type = [coders[tiling] for tiling in tilings], "float32" if kept == "np" else "uint8"
        keep = kept != "latent"
        frames = decode_videos(of_each, geometry, latents, progress, frame_type, keep=keep, writers=writers)
        if frames is None:
            return latents
        return [as_pil(video) for video in frames] if kept == "pil" else frames

    def _coder(self, tiling: Tiling | None) -> Coder:
        return coder_for(self.parts.coder, tiling)

    def _checked(self, latents: Any) -> np.ndarray:
        array, channels = as_array(latents, "latents").astype(np.float32), self.checkpoint.geometry.z_dim
        if array.ndim != 5 or array.shape[1] != channels or 0 in array.shape:
            raise ValueError(f"latents have shape {array.shape}, expected (B, {channels}, T, h, w)")
        return array

    def predict(
        self, latents: Any, timestep: Any, prompt_embeds: Any, image: Any = None,
        last_image: Any = None,
    ) -> np.ndarray:  # fmt: skip
        """Velocity (B, C, T, h, w) of one model evaluation, exactly as in the loop, without guidance.

        timestep: a number, [B], [B, T] (latent frames) or [B, S] (tokens); the expert is chosen by each sample's
        largest. For TI2V an image is mixed in as the first frame, whose timestep is 0.
        """
        latents = self._checked(latents)
        x = to_internal(latents)
        count, frames, geometry = len(x), x.shape[1], self.checkpoint.geometry
        embeds = as_array(prompt_embeds, "prompt_embeds").astype(np.float32)
        blank = make_job(
            self.checkpoint, prompt_embeds=embeds, image=image, last_image=last_image, seed=0, latents=latents,
            max_sequence_length=embeds.shape[1] if embeds.ndim == 3 else MAX_TOKENS,
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
        return to_public(loop.velocities())

    # Step by step

    def prepare_encode(
        self, prompt: str | Sequence[str] | None = None, negative_prompt: str | Sequence[str | None] | None = None,
        **call: Any,
    ) -> StepState:  # fmt: skip
        """The videos of a call before their first step: arguments checked, texts, images and noise made.

        Arguments and errors are a call's, but for what a call does at its end. `advance` then takes steps in the ring,
        as a call does; `denoise_step` and `step_scheduler` are the halves of one step; `post_decode` makes frames.
        """
        for name in _AT_THE_END:
            if name in call:
                raise TypeError(f"{name} is an argument of a call, and none of prepare_encode: it makes no output")
        job = make_job(self.checkpoint, prompt=prompt, negative_prompt=negative_prompt, **call)
        tell(job)
        return self._prepare(job, Progress(visible=self.progress))

    def advance(
        self, state: StepState, num_steps: int | None = None, *, callback_on_step_end: Callback | None = None
    ) -> StepState:
        """Every video `num_steps` steps further, or to its end. However the steps are divided into calls of this, and
        whatever videos are there, the latents have the same bits."""
        most = int((state.num_steps - state.steps_done).max())
        count = most if num_steps is None else min(whole("num_steps", num_steps, 0), most)
        return self._advance(state, count, Progress(visible=self.progress), callback_on_step_end)

    def denoise_step(self, state: StepState) -> np.ndarray:
        """Velocity (B, C, T, h, w) of each video's next step, with guidance; zeros for videos that are done."""
        loop = Loop(self.parts.denoiser, state.entries)
        loop.advance()
        return to_public(loop.velocities())

    def step_scheduler(self, state: StepState, velocity: Any) -> StepState:
        """After a step of each video's sampler along `velocity` (B, C, T, h, w), as `denoise_step` gives it; videos
        that are done stay as they are. Within 2e-5 of `advance`, which computes both in one program."""
        return state.stepped(velocity)

    def post_decode(self, state: StepState) -> np.ndarray:
        """Frames (B, F, H, W, 3) in [0, 1] of the latents as they are, given first frames put back in."""
        return self._frames(state.results, Progress(visible=self.progress), _tilings(state.settings))

    def save_state(self, state: StepState, path: str | Path, *, overwrite: bool = True) -> list[Path]:
        """Write each video with all that its steps need to a .safetensors file; several go beside `path`, as those of
        `Output.save` do. `load_state` reads them, in other processes, on any mesh. Returns where they are.

        Raises ValueError for another suffix, OSError where nothing can be written, or, with `overwrite=False`, where a
        file is already.
        """
        if Path(path).suffix != ".safetensors":
            raise ValueError(f"a state is saved as .safetensors, not as {path}")
        paths, model = [check_writable(p, overwrite) for p in numbered(path, state.settings)], self._identity
        for target, entry, settings in zip(paths, state.entries, state.settings, strict=True):
            save_entry(target, entry, settings, self.checkpoint, model)
        return paths

    def load_state(self, *paths: str | Path | Sequence[str | Path]) -> StepState:
        """The videos that `save_state` wrote, by their paths or lists of them, to go on with.

        Raises OSError for a file that cannot be read, ValueError for one of another model, and where the files' sizes
        differ.
        """
        files = [file for path in paths for file in ([path] if isinstance(path, str | Path) else path)]
        loaded = [load_entry(local_path(file, "state"), self.checkpoint, self._identity) for file in files]
        return StepState.join(*(StepState((entry,), (settings,)) for entry, settings in loaded))

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return identity(self.checkpoint, self.parts.denoiser.dtype)

    def _prepare(self, job: Job, progress: Progress) -> StepState:
        return StepState(
            tuple(prepare(self.checkpoint, self.parts, job.requests, progress)),
            job_settings(self.checkpoint, self.parts, job),
        )

    def _advance(self, state: StepState, count: int, progress: Progress, callback: Callback | None) -> StepState:
        with progress.phase("denoise", count, "step") as update:
            loop = Loop(self.parts.denoiser, state.entries)
            for _ in range(count):
                loop.advance()
                update(1)
                if callback is not None:
                    state = self._call_back(callback, loop, state)
            return state.after([loop.entry(video) for video in range(len(state))])

    def _call_back(self, callback: Callback, loop: Loop, state: StepState) -> StepState:
        """The loop goes on with the latents that the callback returns, if those are others."""
        schedules = [entry.inputs.controls.table.timesteps for entry in state.entries]
        shown = [float(row[done - 1]) for row, done in zip(schedules, loop.done, strict=True)]
        alike = all(np.array_equal(row, schedules[0]) for row in schedules) and len(set(loop.done)) == 1
        latents = to_public(loop.latents())
        given = {"latents": latents.copy()}
        returned = callback(self, max(loop.done) - 1, shown[0] if alike else shown, given)
        returned = {} if returned is None else returned
        if not isinstance(returned, dict):
            raise ValueError(f"callback_on_step_end returned a {type(returned).__name__}: it may return a dict or None")
        others = sorted(str(key) for key in returned if key != "latents")
        if others:
            raise ValueError(f"callback_on_step_end returned {', '.join(others)}: it can change nothing but latents")
        if "latents" not in returned:
            return state
        new = checked_latents(returned["latents"], latents.shape, "latents that callback_on_step_end returned")
        changed = [not np.array_equal(a, b) for a, b in zip(new, latents, strict=True)]
        if any(changed):
            loop.replace({video: to_internal(new[video]) for video in range(len(new)) if changed[video]})
        return state.after(state.entries, changed)


# Small pure functions


def tell(job: Job) -> None:
    """Log what was decided, and warn of what is likely a mistake."""
    for note in job.decided:
        log.info(note)
    for warning in job.warnings:
        warn(warning)


def _tilings(settings: Sequence[Mapping[str, Any]]) -> list[Tiling | None]:
    """Each video's, as its call had it."""
    return [Tiling.parse(made["call"].get("tiling")) for made in settings]


def _per_sample(timestep: Any, count: int, frames: int, tokens: int) -> np.ndarray:
    """[B, Q] timesteps from a number, [B], [B, T] or [B, S]."""
    t = as_array(timestep, "timestep").astype(np.float64)
    if t.ndim < 2:
        t = np.broadcast_to(t, (count,))[:, None] if t.shape in ((), (count,)) else t
    if t.shape not in ((count, 1), (count, frames), (count, tokens)):
        raise ValueError(
            f"timestep has shape {t.shape}, expected a number, ({count},), ({count}, {frames}) or ({count}, {tokens})"
        )
    return t
