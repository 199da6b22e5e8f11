"""Whole runs on both sides, with every step's latents: what the parity tests compare."""

from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np
import torch
from diffusers.pipelines.wan import pipeline_wan_video2video
from oracle import relative_error
from PIL import Image

PROMPTS = ["a red cat runs on the moon, slow motion video", "the dog of the blue tones"]
NEGATIVES = ["static video, <bright> tones of the background", "画面，静止，质量 ing ed"]


def picture(seed: int, height: int, width: int) -> Image.Image:
    """Smooth colours with some noise, of a size that no model wants."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)).resize((width, height))
    return Image.fromarray(np.clip(np.asarray(small) + rng.normal(0, 20, (height, width, 3)), 0, 255).astype(np.uint8))


IMAGE, LAST_IMAGE = picture(1, 50, 70), picture(2, 66, 41)
VIDEO = [picture(10 + i, 40, 60) for i in range(10)]


def unit_noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class Run(NamedTuple):
    steps: list[np.ndarray]  # latents after every step
    timesteps: list
    latents: np.ndarray
    frames: np.ndarray

    def of_video(self, i: int) -> "Run":
        """Video i of a batch, whose timesteps are all the same."""
        cut = slice(i, i + 1)
        return Run([x[cut] for x in self.steps], self.timesteps, self.latents[cut], self.frames[cut])


def run_ours(pipe, **arguments) -> Run:
    steps, shown = [], []

    def look(_, step, timestep, given):
        assert step == len(steps)
        steps.append(given["latents"])
        shown.append(timestep)

    result = pipe(callback_on_step_end=look, **arguments)
    assert result.latents.dtype == result.frames.dtype == np.float32
    return Run(steps, shown, result.latents, result.frames)


def run_diffusers(pipe, *, latents: np.ndarray, **arguments) -> Run:
    """diffusers' pipeline from the same noise; of video to video it is the noise that is mixed in."""
    steps, shown = [], []

    def look(_, step, timestep, given):
        steps.append(given["latents"].float().numpy())
        shown.append(float(timestep))
        return given

    noise = torch.from_numpy(latents)
    source = {} if "video" in arguments else {"latents": noise}
    with mock.patch.object(pipeline_wan_video2video, "randn_tensor", lambda *_, **__: noise):
        final = pipe(output_type="latent", callback_on_step_end=look, **source, **arguments).frames
    return Run(steps, shown, final.float().numpy(), decode(pipe, final))


@contextmanager
def altered(pipe, scheduler=None, **config):
    """diffusers' pipeline with another scheduler or configuration, which it cannot be given in a call."""
    own, before = pipe.scheduler, {key: pipe.config[key] for key in config}
    pipe.scheduler = scheduler or own
    pipe.register_to_config(**config)
    try:
        yield pipe
    finally:
        pipe.scheduler = own
        pipe.register_to_config(**before)


def latent_statistics(pipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation that normalise latents."""
    mean, std = (torch.tensor(pipe.vae.config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    return mean, std


@torch.no_grad()
def encode(pipe, pixels: torch.Tensor) -> torch.Tensor:
    """Normalised latents of a video (B, 3, F, H, W) in [-1, 1], by diffusers' VAE."""
    mean, std = latent_statistics(pipe)
    return (pipe.vae.encode(pixels).latent_dist.mode() - mean) / std


@torch.no_grad()
def decode(pipe, latents: torch.Tensor) -> np.ndarray:
    """Frames (B, F, H, W, 3) in [0, 1], as diffusers' pipelines end."""
    mean, std = latent_statistics(pipe)
    video = pipe.vae.decode(latents.float() * std + mean, return_dict=False)[0]
    return pipe.video_processor.postprocess_video(video, output_type="np")


@torch.no_grad()
def video_to_video_loop(pipe, *, video, prompt, negative_prompt, height, width, num_frames, num_inference_steps,
                        strength, guidance_scale, latents, guidance_scale_2=None) -> Run:  # fmt: skip
    """What diffusers' video-to-video pipeline does, for models it does not know: two experts, or the 2.2 VAE."""
    text, negative = pipe.encode_prompt(prompt, negative_prompt, max_sequence_length=512)
    clean = encode(pipe, pipe.video_processor.preprocess_video(video[:num_frames], height=height, width=width))
    scheduler, steps = pipe.scheduler, []
    scheduler.set_timesteps(num_inference_steps)
    skipped = num_inference_steps - int(num_inference_steps * strength)
    scheduler.set_begin_index(skipped)
    timesteps = scheduler.timesteps[skipped:]
    x = scheduler.add_noise(clean, torch.from_numpy(latents), timesteps[:1])
    for t in timesteps:
        low = pipe.config.boundary_ratio is not None and t < pipe.config.boundary_ratio * 1000
        model = pipe.transformer_2 if low else pipe.transformer
        shown = t.expand(len(x))
        if pipe.config.expand_timesteps:
            shown = t.float().expand(len(x), x.shape[2] * x.shape[3] * x.shape[4] // 4)
        cond, uncond = (model(x, shown, rows, return_dict=False)[0] for rows in (text, negative))
        scale = guidance_scale_2 if low else guidance_scale
        x = scheduler.step(uncond + scale * (cond - uncond), t, x, return_dict=False)[0]
        steps.append(x.numpy())
    return Run(steps, timesteps.tolist(), x.numpy(), decode(pipe, x))


def compilations(call) -> int:
    """Backend compilations during `call()`."""
    events = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        call()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return len(events)


def assert_same_run(ours: Run, expected: Run, tolerance: float) -> None:
    """The same timesteps, and latents after every step, last latents and frames within a relative error."""
    errors = [relative_error(a, e) for a, e in zip(ours.steps, expected.steps, strict=True)]
    errors += [relative_error(ours.latents, expected.latents), relative_error(ours.frames, expected.frames)]
    print("relative errors:", *(f"{error:.1e}" for error in errors))
    np.testing.assert_allclose(ours.timesteps, expected.timesteps, rtol=1e-6)
    assert max(errors) < tolerance, errors
    assert 0.1 < expected.frames.std() and 0.3 < expected.latents.std() < 10  # else the comparison would say little
