"""Whole runs against diffusers' pipelines on the same checkpoints: latents after every step, and frames."""

from functools import partial
from unittest import mock

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanVideoToVideoPipeline,
)
from diffusers.schedulers import scheduling_flow_match_lcm
from runs import (
    IMAGE,
    LAST_IMAGE,
    NEGATIVES,
    PROMPTS,
    VIDEO,
    altered,
    assert_same_run,
    picture,
    run_diffusers,
    run_ours,
    unit_noise,
    video_to_video_loop,
)

from jaxwan.pipelines.condition import renoise_noise
from jaxwan.schedulers import make_table

# Two float32 implementations differ by 2e-6 to 1.4e-5 after 7 guided steps; most mistakes cost 5e-2 or more.
WHOLE_RUN = 1e-4

SMALL = dict(height=32, width=48, num_frames=5)
ONE = SMALL | dict(prompt=PROMPTS[0], negative_prompt=NEGATIVES[0], latents=unit_noise((1, 16, 2, 4, 6)))
TWO = SMALL | dict(prompt=PROMPTS, negative_prompt=NEGATIVES, latents=unit_noise((2, 16, 2, 4, 6)))
TI2V = ONE | dict(height=64, width=96, latents=unit_noise((1, 48, 2, 4, 6)), guidance_scale=4.0)


def test_text_to_video_with_two_experts_and_two_prompts_equals_diffusers(reference, pipeline):
    arguments = dict(
        prompt=PROMPTS, negative_prompt=NEGATIVES, height=48, width=32, num_frames=9, num_inference_steps=7,
        guidance_scale=4.0, guidance_scale_2=2.5, latents=unit_noise((2, 16, 3, 6, 4)),
    )  # fmt: skip
    ours, expected = run_ours(pipeline("t2v-A14B"), **arguments), run_diffusers(reference("t2v-A14B"), **arguments)
    assert_same_run(ours, expected, WHOLE_RUN)


def test_several_videos_of_a_prompt_equal_diffusers(reference, pipeline):
    arguments = TWO | dict(prompt=PROMPTS[0], num_inference_steps=5, guidance_scale=3.0, num_videos_per_prompt=2)
    arguments["negative_prompt"] = NEGATIVES[0]
    ours, expected = run_ours(pipeline("2.1-t2v"), **arguments), run_diffusers(reference("2.1-t2v"), **arguments)
    assert_same_run(ours, expected, WHOLE_RUN)


def test_guidance_scale_alone_decides_whether_guidance_runs(reference, pipeline):
    arguments = ONE | dict(num_inference_steps=4, guidance_scale=1.0, guidance_scale_2=5.0)
    ours, expected = run_ours(pipeline("t2v-A14B"), **arguments), run_diffusers(reference("t2v-A14B"), **arguments)
    assert_same_run(ours, expected, WHOLE_RUN)


def test_boundary_ratio_of_a_call_takes_the_place_of_the_checkpoints(reference, pipeline):
    arguments = ONE | dict(num_inference_steps=5, guidance_scale=4.0, guidance_scale_2=3.0)
    with altered(reference("t2v-A14B"), boundary_ratio=0.5) as pipe:
        expected = run_diffusers(pipe, **arguments)
    ours = run_ours(pipeline("t2v-A14B"), boundary_ratio=0.5, **arguments)
    assert_same_run(ours, expected, WHOLE_RUN)


FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True)
SAMPLERS = {
    "unipc1": lambda shift: UniPCMultistepScheduler(solver_order=1, flow_shift=shift, **FLOW),
    "unipc3": lambda shift: UniPCMultistepScheduler(solver_order=3, flow_shift=shift, **FLOW),
    "euler": lambda shift: FlowMatchEulerDiscreteScheduler(shift=shift),
    "dpm++2m": lambda shift: DPMSolverMultistepScheduler(flow_shift=shift, **FLOW),
}


@pytest.mark.parametrize(("sampler", "shift"), [("unipc1", 5.0), ("unipc3", 8.0), ("euler", None), ("dpm++2m", None)])
def test_samplers_equal_diffusers_schedulers(reference, pipeline, sampler, shift):
    arguments = ONE | dict(num_inference_steps=6, guidance_scale=4.0, guidance_scale_2=3.0)
    with altered(reference("t2v-A14B"), SAMPLERS[sampler](shift or 3.0)) as pipe:  # 3.0: the checkpoint's
        expected = run_diffusers(pipe, **arguments)
    ours = run_ours(pipeline("t2v-A14B"), sampler=sampler, flow_shift=shift, **arguments)
    assert_same_run(ours, expected, WHOLE_RUN)


def test_renoise_equals_diffusers_lcm_scheduler_with_the_same_noise(reference, pipeline):
    timesteps, arguments = [1000.0, 850.5, 600.0, 250.0], ONE | dict(guidance_scale=1.0)
    pipe = pipeline("t2v-A14B")
    ours = run_ours(pipe, sampler="renoise", timesteps=timesteps, seed=7, **arguments)
    table = make_table("renoise", None, 1.0, timesteps=timesteps)
    noise = renoise_noise(table, 7, 0, (2, 4, 6, 16)).transpose(0, 4, 1, 2, 3)
    scheduler = FlowMatchLCMScheduler(shift=1.0)
    scheduler.set_timesteps = partial(scheduler.set_timesteps, timesteps=timesteps)
    draws = (torch.from_numpy(n)[None] for n in noise)
    with (
        altered(reference("t2v-A14B"), scheduler) as reference_pipe,
        mock.patch.object(scheduling_flow_match_lcm, "randn_tensor", lambda *_, **__: next(draws)),
    ):
        expected = run_diffusers(reference_pipe, num_inference_steps=len(timesteps), **arguments)
    assert_same_run(ours, expected, WHOLE_RUN)


def test_a_preset_of_few_steps_equals_diffusers_euler_on_its_sigmas(reference, pipeline):
    ours = run_ours(pipeline("t2v-A14B"), preset="lightx2v-4step", **ONE)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)  # sigmas are shifted already
    given = partial(scheduler.set_timesteps, sigmas=[1.0, 0.9375, 2.5 / 3, 0.625])
    scheduler.set_timesteps = lambda num_inference_steps, device=None: given(device=device)
    with altered(reference("t2v-A14B"), scheduler) as pipe:
        expected = run_diffusers(pipe, num_inference_steps=4, guidance_scale=1.0, **ONE)
    assert_same_run(ours, expected, WHOLE_RUN)


def test_image_to_video_by_channels_equals_diffusers(reference, pipeline):
    # shift 3 and 4 steps give the timestep 900 = boundary_ratio * 1000, which is the high-noise expert's
    arguments = ONE | dict(image=IMAGE, num_inference_steps=4, guidance_scale=4.0, guidance_scale_2=2.5)
    ours, expected = run_ours(pipeline("i2v-A14B"), **arguments), run_diffusers(reference("i2v-A14B"), **arguments)
    assert 900 in ours.timesteps
    assert_same_run(ours, expected, WHOLE_RUN)


def test_images_and_last_images_of_their_own_equal_diffusers_prompt_by_prompt(reference, pipeline):
    arguments = dict(height=48, width=32, num_frames=9, num_inference_steps=5, guidance_scale=4.0, guidance_scale_2=2.5)
    latents = unit_noise((2, 16, 3, 6, 4))
    images, lasts = [IMAGE, picture(3, 64, 64)], [LAST_IMAGE, None]
    ours = run_ours(
        pipeline("i2v-A14B"), prompt=PROMPTS, negative_prompt=NEGATIVES, image=images, last_image=lasts,
        latents=latents, **arguments,
    )  # fmt: skip
    for i in range(2):
        expected = run_diffusers(
            reference("i2v-A14B"), prompt=PROMPTS[i], negative_prompt=NEGATIVES[i], image=images[i],
            last_image=lasts[i], latents=latents[i : i + 1], **arguments,
        )  # fmt: skip
        assert_same_run(ours.of_video(i), expected, WHOLE_RUN)


def test_image_to_video_with_clip_equals_diffusers(reference, pipeline):
    arguments = ONE | dict(image=IMAGE, num_inference_steps=5, guidance_scale=4.0)
    ours, expected = run_ours(pipeline("2.1-i2v"), **arguments), run_diffusers(reference("2.1-i2v"), **arguments)
    assert_same_run(ours, expected, WHOLE_RUN)


def test_first_and_last_frame_with_clip_equals_diffusers(reference, pipeline):
    arguments = ONE | dict(image=IMAGE, last_image=LAST_IMAGE, num_inference_steps=5, guidance_scale=4.0)
    ours, expected = run_ours(pipeline("2.1-flf2v"), **arguments), run_diffusers(reference("2.1-flf2v"), **arguments)
    assert_same_run(ours, expected, WHOLE_RUN)


def test_text_to_video_with_expanded_timesteps_equals_diffusers(reference, pipeline):
    arguments = TI2V | dict(num_inference_steps=5)
    ours, expected = run_ours(pipeline("ti2v-5B"), **arguments), run_diffusers(reference("ti2v-5B"), **arguments)
    assert_same_run(ours, expected, WHOLE_RUN)


def test_image_to_video_with_expanded_timesteps_equals_diffusers(reference, pipeline):
    arguments = TI2V | dict(image=IMAGE, num_inference_steps=5)
    ours = run_ours(pipeline("ti2v-5B"), **arguments)
    expected = run_diffusers(reference("ti2v-5B", cls=WanImageToVideoPipeline), **arguments)
    assert_same_run(ours, expected, WHOLE_RUN)


@pytest.mark.parametrize("sampler", [None, "euler"])
def test_video_to_video_equals_diffusers(reference, pipeline, sampler):
    arguments = TWO | dict(video=VIDEO[:5], num_inference_steps=7, strength=0.6, guidance_scale=4.0)
    pipe = reference("2.1-t2v", cls=WanVideoToVideoPipeline)
    del arguments["num_frames"]
    with altered(pipe, SAMPLERS[sampler](3.0) if sampler else None):
        expected = run_diffusers(pipe, **arguments)
    ours = run_ours(pipeline("2.1-t2v"), sampler=sampler, **arguments)
    assert len(ours.steps) == 4
    assert_same_run(ours, expected, WHOLE_RUN)


@pytest.mark.parametrize(("family", "sizes"), [("t2v-A14B", ONE | dict(guidance_scale_2=2.5)), ("ti2v-5B", TI2V)])
def test_video_to_video_equals_a_loop_over_diffusers_parts(reference, pipeline, family, sizes):
    arguments = sizes | dict(video=VIDEO, num_inference_steps=7, strength=0.8, guidance_scale=4.0)
    ours = run_ours(pipeline(family), **arguments)
    assert len(ours.steps) == 5
    assert_same_run(ours, video_to_video_loop(reference(family), **arguments), WHOLE_RUN)
