"""The loop driven by hand: the same latents as a call's, at any division of its steps, with edits between them."""

import numpy as np
import pytest
import torch
from diffusers import WanPipeline as Reference
from oracle import relative_error
from runs import IMAGE, NEGATIVES, PROMPTS, compilations, run_ours, unit_noise

from jaxwan.pipelines.denoise import Loop
from jaxwan.pipelines.pipeline import WanPipeline
from jaxwan.pipelines.steps import StepState

pytestmark = pytest.mark.usefixtures("optimised_ring")

# the sampler and guidance in a program of their own are rounded elsewhere; the velocity itself has the ring's bits
APART = 2e-5

CALL = dict(
    prompt=[PROMPTS[0], "a moon", PROMPTS[1]], negative_prompt=[*NEGATIVES, "slow"], num_inference_steps=[4, 6, 3],
    guidance_scale=[4.0, 1.0, 2.5], guidance_scale_2=[3.0, 1.5, 2.0], sampler=["unipc", "euler", "dpm++2m"],
    flow_shift=[3.0, 5.0, 8.0], seed=[1, 2, 3], height=32, width=48, num_frames=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def pipe(folder):
    return WanPipeline.from_pretrained(folder("t2v-A14B"), progress=False)


@pytest.fixture(scope="module")
def called(pipe):
    """The call whose steps the tests drive."""
    return run_ours(pipe, **CALL)


def test_any_division_into_segments_has_the_bits_of_a_call(pipe, called):
    state = pipe.prepare_encode(**CALL)
    assert not state.done.any() and state.num_steps.tolist() == [4, 6, 3] and len(state) == 3
    for steps, done in ((1, [1, 1, 1]), (2, [3, 3, 3]), (0, [3, 3, 3]), (None, [4, 6, 3])):
        state = pipe.advance(state, steps)
        assert state.steps_done.tolist() == done
        if max(done):
            np.testing.assert_array_equal(state.latents, called.steps[max(done) - 1])
    assert state.done.all() and "steps done 4/4, 6/6, 3/3" in repr(state)
    np.testing.assert_array_equal(pipe.post_decode(state), called.frames)
    again = pipe.advance(state, 5)  # nothing is left to do
    np.testing.assert_array_equal(again.latents, state.latents)


def test_the_halves_of_a_step_agree_with_the_ring(pipe, called):
    state, errors = pipe.prepare_encode(**CALL), []
    for k, expected in enumerate(called.steps):
        assert state.timesteps[1] == called.timesteps[k][1]
        before = state
        velocity = pipe.denoise_step(state)
        state = pipe.step_scheduler(state, velocity)
        errors.append(relative_error(state.latents, expected))
        for i in np.flatnonzero(before.done):
            assert not velocity[i].any()
            np.testing.assert_array_equal(state.latents[i], before.latents[i])
    print("relative errors:", *errors)
    assert state.done.all() and max(errors) < APART
    assert (state.timesteps == 0).all() and (state.sigmas == 0).all()


def test_the_velocity_is_that_of_the_model(pipe):
    """With guidance, of each video's own expert; then one Euler step is what its name says."""
    call = CALL | dict(sampler="euler")
    state = pipe.advance(pipe.prepare_encode(**call), 1)
    velocity, x = pipe.denoise_step(state), state.latents
    rows = pipe.encode_prompt([*CALL["prompt"], *CALL["negative_prompt"]])
    cond, uncond = (pipe.predict(x, state.timesteps, texts) for texts in (rows[:3], rows[3:]))
    low = state.timesteps < 875
    for i, (high_scale, low_scale) in enumerate(zip(CALL["guidance_scale"], CALL["guidance_scale_2"], strict=True)):
        scale = low_scale if low[i] else high_scale
        expected = uncond[i] + np.float32(scale) * (cond[i] - uncond[i]) if high_scale > 1 else cond[i]
        assert relative_error(velocity[i], expected) < APART
    after = pipe.step_scheduler(state, velocity)
    width = (after.sigmas - state.sigmas)[:, None, None, None, None]
    assert (width < 0).all() and relative_error(after.latents, x + width * velocity) < APART
    of_torch = pipe.step_scheduler(state.replace(latents=torch.tensor(x)), torch.tensor(velocity, requires_grad=True))
    np.testing.assert_array_equal(of_torch.latents, after.latents)


def test_videos_of_different_states_go_on_together_with_the_bits_that_they_have_alone(pipe):
    """At other steps, with another sampler, guidance and number of steps; one of them is done already."""
    size = {key: CALL[key] for key in ("height", "width", "num_frames")}
    calls = [
        dict(prompt="x", seed=1, num_inference_steps=5, guidance_scale=3.0),
        dict(prompt="a moon", seed=2, num_inference_steps=3, guidance_scale=1.0, sampler="dpm++2m"),
        dict(prompt="y", seed=3, sampler="renoise", timesteps=[900, 500, 100], guidance_scale=1.0),
        dict(prompt="z", seed=4, num_inference_steps=2, guidance_scale=2.0),
    ]
    states = [pipe.prepare_encode(**call, **size) for call in calls]
    alone = [pipe.advance(state) for state in states]
    mixed = [pipe.advance(state, steps) for state, steps in zip(states, (3, 0, 1, 2), strict=True)]
    joined = StepState.join(*mixed)
    assert joined.steps_done.tolist() == [3, 0, 1, 2] and joined.done.tolist() == [False, False, False, True]
    seen = []

    def look(_, step, timestep, given):
        seen.append((step, timestep))

    ended = pipe.advance(joined, callback_on_step_end=look)
    for end, single in zip(ended, alone, strict=True):
        np.testing.assert_array_equal(end.latents, single.latents)
    assert [step for step, _ in seen] == [3, 4, 4] and all(len(timesteps) == 4 for _, timesteps in seen)
    assert [made["call"]["seed"] for made in ended.settings] == [1, 2, 3, 4]


def test_states_that_cannot_go_together_are_refused(pipe):
    size = dict(height=32, width=48, num_frames=5)
    state = pipe.prepare_encode("x", seed=1, **size)
    for other in (size | dict(num_frames=9), size | dict(max_sequence_length=77)):
        with pytest.raises(ValueError, match="are denoised apart"):
            StepState.join(state, pipe.prepare_encode("x", seed=1, **other))
    with pytest.raises(ValueError, match="there is no video"):
        StepState.join()
    with pytest.raises(IndexError, match="no video 1 among 1"):
        state[1]
    with pytest.raises(TypeError, match="output_type is an argument of a call, and none of prepare_encode"):
        pipe.prepare_encode("x", output_type="latent")


def test_editing_latents_and_guidance_between_steps(pipe):
    """As a plain loop of the halves does it, in which nothing is hidden."""
    size = dict(height=32, width=48, num_frames=5, seed=5, num_inference_steps=4, guidance_scale=4.0)
    noise = 0.1 * unit_noise((1, 16, 2, 4, 6), seed=9)
    state = start = pipe.advance(pipe.prepare_encode("x", **size), 2)
    changed = state.replace(latents=state.latents + noise, guidance_scale=2.0)
    assert (changed.entries[0].inputs.controls.guidance[:2] == 4.0).all()
    quick = pipe.advance(changed)
    slow = changed
    while not slow.done.all():
        slow = pipe.step_scheduler(slow, pipe.denoise_step(slow))
    assert relative_error(slow.latents, quick.latents) < APART
    plain = pipe.advance(start)
    assert relative_error(quick.latents, plain.latents) > 0.01
    assert "edits between steps" in quick.settings[0]["inputs"] and "inputs" not in plain.settings[0]
    off = start.replace(guidance_scale=1.0)  # from now on the cond velocity alone
    rows = pipe.encode_prompt("x")
    assert relative_error(pipe.denoise_step(off), pipe.predict(off.latents, off.timesteps, rows)) < APART
    assert [Loop(pipe.parts.denoiser, s.entries).timetable.now.period for s in (start, off)] == [
        2,
        1,
    ]  # half of the work
    on = off.replace(guidance_scale=4.0)  # its negative text is still there
    np.testing.assert_array_equal(pipe.advance(on).latents, plain.latents)
    np.testing.assert_array_equal(start.latents, state.latents)  # states never change


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"latents": np.zeros((1, 16, 2, 4, 5))}, r"latents has shape \(1, 16, 2, 4, 5\), expected \(1, 16, 2, 4, 6\)"),
        ({"latents": np.full((1, 16, 2, 4, 6), np.nan)}, "not finite"),
        ({"guidance_scale": [1, 2]}, "has 2 values for 1 videos"),
        ({"guidance_scale": 3.0}, "was prepared without guidance"),
        ({"guidance_scale": "high"}, "guidance_scale='high' must be a number"),
        ({"guidance_scale_2": float("nan")}, "guidance_scale_2=nan"),
    ],
)
def test_bad_edits_are_refused(pipe, arguments, words):
    state = pipe.prepare_encode("x", seed=1, height=32, width=48, num_frames=5, guidance_scale=1.0)
    with pytest.raises(ValueError, match=words):
        state.replace(**arguments)
    with pytest.raises(ValueError, match="velocity has shape"):
        pipe.step_scheduler(state, np.zeros(3))


def test_a_callback_may_return_other_latents(pipe):
    """They go in before the next step, of one video or all, and the steps stay together."""
    call = CALL | dict(output_type="latent")
    edits = {1: (0,), 2: (0, 1, 2), 4: (1,)}
    noise = 0.1 * unit_noise((3, 16, 2, 4, 6), seed=9)

    def edited(latents, step):
        out = latents.copy()
        for i in edits.get(step, ()):
            out[i] += noise[i]
        return out

    seen = []

    def change(_, step, timestep, given):
        seen.append((step, given["latents"].copy()))
        if step == 2:  # in place, as people do with torch
            given["latents"] += noise
            return given
        return {"latents": edited(given["latents"], step)}

    output = pipe(callback_on_step_end=change, **call)
    state, expected = pipe.prepare_encode(**CALL), []
    for step in range(6):
        state = pipe.advance(state, 1)
        expected.append((step, state.latents))
        state = state.replace(latents=edited(state.latents, step))
    for (a, latents), (b, wanted) in zip(seen, expected, strict=True):
        assert a == b
        np.testing.assert_array_equal(latents, wanted)
    np.testing.assert_array_equal(output.latents, state.latents)
    assert ["edits between steps" in made.get("inputs", []) for made in output.settings] == [True] * 3


def test_rings_side_by_side_take_the_steps_of_one_device(folder, pipe, called):
    """Whoever looks, edits, goes on elsewhere or takes the halves of a step."""
    other = WanPipeline.from_pretrained(folder("t2v-A14B"), "dp=2,cfg=2,pp=2", progress=False)
    for ours, expected in zip(run_ours(other, **CALL).steps, called.steps, strict=True):
        np.testing.assert_array_equal(ours, expected)

    def change(_, step, timestep, given):
        return {
            "latents": given["latents"] + np.float32(0.01 * step) * (np.arange(3) != step)[:, None, None, None, None]
        }

    call = CALL | dict(output_type="latent", callback_on_step_end=change)
    np.testing.assert_array_equal(other(**call).latents, pipe(**call).latents)
    state = other.advance(pipe.prepare_encode(**CALL), 2)
    np.testing.assert_array_equal(state.latents, called.steps[1])
    np.testing.assert_array_equal(pipe.advance(state).latents, called.steps[-1])
    np.testing.assert_array_equal(other.denoise_step(state), pipe.denoise_step(state))
    off = state.replace(guidance_scale=1.0)
    np.testing.assert_array_equal(other.advance(off).latents, pipe.advance(off).latents)
    given = state.latents, state.timesteps, pipe.encode_prompt(CALL["prompt"])
    np.testing.assert_array_equal(other.predict(*given), pipe.predict(*given))
    alone = {key: CALL[key] for key in ("height", "width", "num_frames")} | dict(guidance_scale=1.0, seed=1)
    assert len(StepState.join(state, other.prepare_encode("x", **alone))) == 4  # beside others it may be
    alone |= dict(num_inference_steps=2, output_type="latent")
    with pytest.warns(UserWarning, match="no video of this call is guided: those are idle"):
        np.testing.assert_array_equal(other("x", **alone).latents, pipe("x", **alone).latents)


def test_a_callback_that_returns_nothing_new_changes_nothing(pipe, called):
    output = pipe(callback_on_step_end=lambda *given: given[-1], **CALL)
    np.testing.assert_array_equal(output.latents, called.latents)
    assert all("inputs" not in made for made in output.settings)
    for returned, words in (
        (True, "returned a bool: it may return a dict or None"),
        ({"prompt_embeds": 1}, "returned prompt_embeds: it can change nothing but latents"),
        ({"latents": np.zeros(3)}, "latents that callback_on_step_end returned has shape"),
    ):
        with pytest.raises(ValueError, match=words):
            pipe(callback_on_step_end=lambda *_, returned=returned: returned, **CALL)


def test_a_given_first_frame_is_put_back_at_the_end(folder):
    pipe = WanPipeline.from_pretrained(folder("ti2v-5B"), progress=False)
    call = dict(
        prompt=["x", "y"], image=[IMAGE, None], seed=1, num_inference_steps=2, height=64, width=96, num_frames=5
    )
    state = pipe.advance(pipe.prepare_encode(**call))
    output = pipe(**call)
    np.testing.assert_array_equal(pipe.post_decode(state), output.frames)
    assert not np.array_equal(state.latents[0], output.latents[0])  # the sampler moved the first frame too
    np.testing.assert_array_equal(state.latents[:, :, 1:], output.latents[:, :, 1:])


def test_fewer_text_rows_equal_diffusers(pipe, reference):
    """Diffusers' max_sequence_length, longer and shorter than the prompt."""
    theirs: Reference = reference("t2v-A14B")
    for length in (4, 77):
        rows, _ = theirs.encode_prompt(PROMPTS[0], do_classifier_free_guidance=False, max_sequence_length=length)
        ours = pipe.prepare_encode(
            PROMPTS[0], seed=1, guidance_scale=1.0, max_sequence_length=length, height=32, width=48, num_frames=5
        ).entries[0].inputs.text  # fmt: skip
        assert ours.shape == (1, length, 24) and relative_error(ours, rows.detach().numpy()) < APART
    call = dict(prompt="x", seed=1, num_inference_steps=2, height=32, width=48, num_frames=5, output_type="latent")
    short = pipe(max_sequence_length=64, **call).latents
    assert 1e-4 < relative_error(short, pipe(**call).latents)  # each text has fewer empty rows
    assert compilations(lambda: pipe(max_sequence_length=64, **call | dict(prompt="y"))) == 0


def test_driving_the_steps_compiles_nothing_after_the_first(pipe):
    size = dict(height=32, width=48, num_frames=5, num_inference_steps=2, guidance_scale=3.0)

    def drive(**call):
        state = pipe.prepare_encode(**call, **size)
        while not state.done.all():
            state = pipe.step_scheduler(state, pipe.denoise_step(state))
        return pipe.advance(state)

    drive(prompt="x", seed=1)
    assert compilations(lambda: drive(prompt="y", seed=2, sampler="euler")) == 0
