"""A call's arguments: what they mean and what is refused, from configurations alone (no folder here has a tensor)."""

import inspect
import io
import json
import warnings
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from clips import damage, write_clip
from PIL import Image, ImageOps
from published import PUBLISHED, edit, write_configs
from tokenizer_files import write_tokenizer

from jaxwan.models.tiles import Tiling
from jaxwan.pipelines.arguments import local_path
from jaxwan.pipelines.call import ARGUMENTS, make_job
from jaxwan.pipelines.checkpoint import BUNDLED_MODEL, open_checkpoint, read_checkpoint
from jaxwan.pipelines.condition import choose_expert
from jaxwan.pipelines.load import check_mesh, check_use, parse_dtype
from jaxwan.pipelines.media import check_writable, load_video, read_settings, save_output, save_video, videos
from jaxwan.pipelines.output import check_save
from jaxwan.pipelines.pipeline import WanPipeline
from jaxwan.schedulers import make_table
from jaxwan.schedulers.presets import OFFICIAL_NEGATIVE_PROMPT
from jaxwan.sharding.mesh import MeshSpec

T2V, I2V, TI2V = "Wan2.2-T2V-A14B", "Wan2.2-I2V-A14B", "Wan2.2-TI2V-5B"
T2V_21, I2V_21, FLF = "Wan2.1-T2V-1.3B", "Wan2.1-I2V-14B", "Wan2.1-FLF2V-14B"
SIZE = {"height": 64, "width": 96, "num_frames": 9}  # (3, 8, 12) latents
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 100, 3), dtype=np.uint8))
CLIP = np.random.default_rng(1).integers(0, 256, (10, 48, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """name of the variant -> its checkpoint, tiny but for the table's row."""
    root = tmp_path_factory.mktemp("configs")
    return {name: read_checkpoint(write_configs(root / str(i), name, tiny=True)) for i, name in enumerate(PUBLISHED)}


@pytest.fixture
def job(checkpoints):
    """make_job of the two-expert text-to-video checkpoint, for one prompt unless told otherwise."""

    def make(name=T2V, **arguments):
        return make_job(checkpoints[name], **({} if "prompt_embeds" in arguments else {"prompt": "a cat"}) | arguments)

    return make


def scales(job):
    return [(r.guidance_scale, r.guidance_scale_2) for r in job.requests]


# What a call means


def test_what_is_left_out_comes_from_the_checkpoint(job):
    made = job()
    (request,) = made.requests
    assert (made.size, request.fps) == ((81, 720, 1280), 16.0)
    assert (request.index, request.boundary_ratio) == (0, 0.875)
    assert (request.prompt, request.negative_prompt) == ("a cat", "")
    assert (request.image, request.last_image, request.video, request.latents) == (None,) * 4
    assert request.table.num_steps == 40
    assert request.table.timesteps[:3].tolist() == [999, 991, 982]  # UniPC at shift 3, the scheduler config's
    assert request.guided and made.guided


def test_a_generation_config_speaks_where_the_call_is_silent(tmp_path):
    folder = write_configs(tmp_path, T2V_21, tiny=True)
    (folder / "generation_config.json").write_text("{}")
    given = {"sampler": "euler", "flow_shift": 5, "num_inference_steps": 4, "negative_prompt": "dull", "fps": 8}
    edit(folder / "generation_config.json", **SIZE, **given)
    made = make_job(read_checkpoint(folder), prompt="x")
    (request,) = made.requests
    assert (request.size, request.fps) == ((9, 64, 96), 8.0)
    assert request.negative_prompt == "dull"
    # FlowMatchEulerDiscreteScheduler at shift 5
    np.testing.assert_allclose(request.table.timesteps[:5], [1000, 909.70715, 717.31744, 24.414066, 0], rtol=1e-6)
    assert make_job(read_checkpoint(folder), prompt="x", negative_prompt="").requests[0].negative_prompt == ""


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        (T2V, {}, (4.0, 3.0)),  # the table's pair holds only when neither is given
        (T2V, {"guidance_scale": 6}, (6.0, 6.0)),
        (T2V, {"guidance_scale_2": 2.5}, (4.0, 2.5)),
        (T2V, {"guidance_scale": 6.0, "guidance_scale_2": 2}, (6.0, 2.0)),
        (TI2V, {}, (5.0, 5.0)),
        (T2V_21, {"guidance_scale": 1.5}, (1.5, 1.5)),
    ],
)
def test_guidance_of_the_two_experts(job, name, given, expected):
    assert scales(job(name, **given)) == [expected]


def test_guidance_is_on_by_the_first_scale_alone(job):
    assert not job(guidance_scale=1.0, guidance_scale_2=5.0).guided
    assert job(guidance_scale=1.5, guidance_scale_2=0.5).guided
    mixed = job(prompt=["a", "b"], guidance_scale=[1.0, 3.0])
    assert [r.guided for r in mixed.requests] == [False, True] and mixed.guided


def test_lists_are_one_value_a_prompt_and_values_are_for_all(job):
    made = job(
        prompt=["a", "b"], negative_prompt=["x", ""], num_inference_steps=[3, 7], guidance_scale=[2, 3],
        guidance_scale_2=1.5, sampler=["euler", "unipc3"], flow_shift=[5, 8.0], seed=[1, 2**64 - 1],
    )  # fmt: skip
    a, b = made.requests
    assert (a.prompt, a.negative_prompt, a.seed) == ("a", "x", 1)
    assert (b.prompt, b.negative_prompt, b.seed) == ("b", "", 2**64 - 1)
    assert (a.table.num_steps, b.table.num_steps) == (3, 7)
    assert scales(made) == [(2.0, 1.5), (3.0, 1.5)]
    np.testing.assert_allclose(a.table.timesteps[:4], [1000, 834.71, 24.414, 0], rtol=1e-3)
    assert b.table.timesteps[1] == 979  # shift 8
    shared = job(prompt=["a", "b", "c"], seed=7, num_inference_steps=(2, 3, 4))
    assert [r.seed for r in shared.requests] == [7, 7, 7]
    assert [r.table.num_steps for r in shared.requests] == [2, 3, 4]


def test_none_in_a_list_is_that_prompts_default(job):
    made = job(
        prompt=["a", "b", "c"], negative_prompt=["x", None, None], sampler=[None, "euler", None],
        guidance_scale=[6, None, None], guidance_scale_2=[None, 2.5, None], num_inference_steps=[None, None, 3],
        flow_shift=[None, 5, None], seed=[None, 7, None],
    )  # fmt: skip
    assert [r.negative_prompt for r in made.requests] == ["x", "", ""]
    assert scales(made) == [(6.0, 6.0), (4.0, 2.5), (4.0, 3.0)]
    assert [int(r.table.num_steps) for r in made.requests] == [40, 40, 3]
    assert [r.table.timesteps[0] for r in made.requests] == [999, 1000, 999]
    first, given, last = [r.seed for r in made.requests]
    assert given == 7 and first != last and made.notes == (f"seeds {first}, 7, {last}",)


def test_several_videos_of_a_prompt_make_the_batch(job):
    made = job(prompt=["a", "b"], num_videos_per_prompt=3, latents=np.zeros((6, 16, 3, 8, 12)), **SIZE)
    assert [(r.prompt, r.index) for r in made.requests] == [(prompt, i) for prompt in "ab" for i in range(3)]
    assert {(r.latents.dtype, r.latents.shape) for r in made.requests} == {(np.dtype(np.float32), (16, 3, 8, 12))}


def test_a_seed_left_out_is_drawn_and_said(job):
    first, second = job(prompt=["a", "a"], num_videos_per_prompt=2), job()
    seeds = [r.seed for r in first.requests]
    assert len(set(seeds)) == 2 and seeds[0] == seeds[1] and seeds[2] == seeds[3]
    assert first.notes == (f"seeds {seeds[0]}, {seeds[2]}",)
    assert second.notes == (f"seed {second.requests[0].seed}",) and second.requests[0].seed not in seeds
    assert job(seed=0).notes == ()


def test_videos_that_will_be_equal_are_told(job):
    two = dict(prompt=["a", "a"], seed=7)
    assert job(**two).notes == ("videos 0 and 1 will be the same: prompt, seed and all else are equal",)
    assert job(**two, guidance_scale=[2, 3]).notes == () and job(**two, num_videos_per_prompt=2).notes != ()
    image = np.zeros((32, 32, 3), np.uint8)
    assert not any("the same" in note for note in job(TI2V, **two, image=[image, image.copy()]).notes)


UNGUIDED, IN_VAIN = dict(guidance_scale=1), "has no effect: guidance_scale=1 turns guidance off"


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (UNGUIDED | dict(guidance_scale_2=4), [f"guidance_scale_2 {IN_VAIN}"]),
        (UNGUIDED | dict(negative_prompt="x"), [f"negative_prompt {IN_VAIN}"]),
        (UNGUIDED | dict(negative_prompt_embeds=np.ones((1, 512, 24))), [f"negative_prompt_embeds {IN_VAIN}"]),
        (UNGUIDED | dict(negative_prompt=""), []),
        (dict(negative_prompt="x", guidance_scale_2=4), []),
        (dict(prompt=["a", "b"], negative_prompt="x", guidance_scale=[1, 2]), []),
        (
            dict(prompt=["a", "b"], negative_prompt=["x", "y"], guidance_scale=[1, 2]),
            ["negative_prompt of prompt 0 has no effect: guidance_scale=1 turns"],
        ),
        (dict(guidance_scale_2=4, boundary_ratio=0), ["guidance_scale_2 has no effect: no step is"]),
        (dict(sampler="renoise", timesteps=[1000, 500], flow_shift=3), ["flow_shift has no effect: timesteps"]),
        (dict(sampler="euler", timesteps=[1000, 500], flow_shift=3), ["flow_shift has no effect: timesteps"]),
        (dict(sampler="euler", timesteps=[1000, 500], flow_shift=3, sigma_schedule="lookup"), []),
        (dict(latents=np.zeros((1, 16, 21, 90, 160))), ["seed has no effect: the noise is given, as latents"]),
        (SIZE | dict(tiling=Tiling()), ["tiling has no effect: 96x64 is no larger than a tile of 256x256"]),
        (SIZE | dict(tiling=Tiling(256, 64, 192, 64)), []),
    ],
)
def test_arguments_without_effect_are_told(job, call, told):
    notes = job(**({"seed": 7} | call)).notes
    assert len(notes) == len(told) and all(note.startswith(start) for note, start in zip(notes, told, strict=True))


def test_a_text_that_will_be_cut_is_told_with_what_is_lost(checkpoints, tmp_path):
    assert checkpoints[T2V].tokenizer is None  # of configurations alone
    write_tokenizer(tmp_path / "tokenizer")
    checkpoint, text = replace(checkpoints[T2V], folder=tmp_path), "a {} runs on the moon"
    call = dict(seed=7, max_sequence_length=4, prompt=text.format("cat"), negative_prompt=text.format("dog"))
    lost = "longer than 4 tokens, its end is not read: 'on the moon'"
    assert make_job(checkpoint, **call).notes == (f"the prompt is {lost}", f"the negative prompt is {lost}")
    assert make_job(checkpoint, **call | dict(guidance_scale=1)).notes[0] == f"the prompt is {lost}"
    assert not any("negative prompt is" in note for note in make_job(checkpoint, **call | UNGUIDED).notes)
    assert make_job(checkpoint, **call | dict(max_sequence_length=7)).notes == ()  # six words and the closing token


@pytest.mark.parametrize("name", ["image", "last_image", "video", "latents", "prompt_embeds"])
def test_open_files_are_refused_as_such(job, name):
    call = {"image": PHOTO} if name == "last_image" else {}
    model = I2V if "image" in name else T2V
    with pytest.raises(ValueError, match=f"{name} is an open file: give its path"):
        job(model, **call | {name: io.BytesIO(b"x")})
    if name in ("image", "video", "latents"):
        with pytest.raises(ValueError, match=f"{name} is an empty text"):
            job(model, **call | {name: ""})


def test_no_seed_is_drawn_or_told_where_the_noise_is_given(job):
    latents = np.zeros((1, 16, 21, 90, 160))
    (request,) = (made := job(latents=latents)).requests
    assert request.seed is None and made.notes == () and not {"seed", "index"} & made.settings()[0]["call"].keys()
    assert job(latents=latents, seed=3).requests[0].seed is None
    renoised = job(latents=latents, sampler="renoise", timesteps=[1000, 500])
    assert renoised.notes == (f"seed {renoised.requests[0].seed}",)


def test_embeddings_stand_in_for_texts(job):
    embeds = np.ones((2, 512, 24))
    made = job(prompt_embeds=jnp.asarray(embeds, jnp.bfloat16), negative_prompt=["x", "y"])
    assert [(r.prompt, r.negative_prompt) for r in made.requests] == [(None, "x"), (None, "y")]
    assert {(r.prompt_embeds.dtype, r.prompt_embeds.shape) for r in made.requests} == {
        (np.dtype(np.float32), (512, 24))
    }
    made = job(prompt=["a", "b"], negative_prompt_embeds=embeds)
    assert [(r.prompt, r.negative_prompt) for r in made.requests] == [("a", None), ("b", None)]


def test_a_boundary_left_out_is_the_checkpoints_and_one_expert_has_none(job):
    assert job().requests[0].boundary_ratio == 0.875
    assert job(boundary_ratio=0).requests[0].boundary_ratio == 0
    assert job(TI2V).requests[0].boundary_ratio is None
    timesteps = np.array([[999.0, 875.0, 874.0, 0.0]])
    assert choose_expert(timesteps, 0.875).tolist() == [[0, 0, 1, 1]]  # at the boundary still high noise
    assert choose_expert(timesteps, None).tolist() == [[0, 0, 0, 0]]
    assert choose_expert(timesteps, 0.0).tolist() == [[0, 0, 0, 0]]


def test_a_distilled_checkpoint_names_its_few_steps_and_a_named_sampler_leaves_them(tmp_path):
    folder = write_configs(tmp_path / "distilled", "Wan2.2-T2V-A14B")
    given = {"sampler": "renoise", "timesteps": [1000, 757, 522], "guidance_scale": 1, "boundary_ratio": 0.5}
    (folder / "generation_config.json").write_text(json.dumps(given))
    checkpoint = read_checkpoint(folder)
    silent = make_job(checkpoint, prompt="a", seed=1)
    assert silent.requests[0].table.timesteps[:4].tolist() == [1000, 757, 522, 0]
    assert silent.requests[0].boundary_ratio == 0.5
    assert make_job(checkpoint, prompt="a", seed=1, sampler="euler").requests[0].table.num_steps == 40


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """name of the variant -> its checkpoint as published."""
    root = tmp_path_factory.mktemp("published")
    return {name: read_checkpoint(write_configs(root / str(i), name)) for i, name in enumerate(PUBLISHED)}


HD, SD = {"height": 720, "width": 1280}, {"height": 480, "width": 832}
CHINESE = OFFICIAL_NEGATIVE_PROMPT
OFFICIAL_VALUES = [  # what the original repositories' generate.py take: shift, steps, guidance, negative prompt
    (T2V, HD, 12, 40, (4, 3), CHINESE),
    (T2V, SD, 12, 40, (4, 3), CHINESE),
    (I2V, HD, 5, 40, (3.5, 3.5), CHINESE),
    (TI2V, {}, 5, 50, (5, 5), CHINESE),
    (T2V_21, SD, 5, 50, (5, 5), CHINESE),
    ("Wan2.1-T2V-14B", HD, 5, 50, (5, 5), CHINESE),
    (I2V_21, HD, 5, 40, (5, 5), "镜头晃动，" + CHINESE),
    (I2V_21, SD, 3, 40, (5, 5), "镜头晃动，" + CHINESE),
    (I2V_21, {"height": 832, "width": 480}, 3, 40, (5, 5), "镜头晃动，" + CHINESE),
    (FLF, HD, 16, 50, (5, 5), "镜头切换，镜头晃动，" + CHINESE),
]


@pytest.mark.parametrize(("name", "size", "shift", "steps", "guidance", "negative"), OFFICIAL_VALUES)
def test_the_official_preset_is_how_the_original_repositories_sample(
    full_size, name, size, shift, steps, guidance, negative
):
    images = {"image": PHOTO} if "I2V-" in name and "TI2V" not in name else {}
    images = {"image": PHOTO, "last_image": PHOTO} if name == FLF else images
    made = make_job(full_size[name], prompt="a", seed=1, preset="official", **size, **images)
    (request,) = made.requests
    assert scales(made) == [guidance] and request.negative_prompt == negative
    expected = make_table("unipc2", steps, shift, sigma_schedule="original")
    for own, right in zip(request.table, expected, strict=True):
        np.testing.assert_array_equal(own, right)
    assert request.boundary_ratio == {T2V: 0.875, I2V: 0.9}.get(name)


def test_an_expert_alone_has_its_own_official_guidance(tmp_path):
    for expert, boundary, scale in (("transformer", 0.0, 4.0), ("transformer_2", 1.0, 3.0)):
        folder = write_configs(tmp_path / expert, T2V)
        other = {"transformer": "transformer_2", "transformer_2": "transformer"}[expert]
        edit(folder / "model_index.json", boundary_ratio=boundary, **{other: [None, None]})
        made = make_job(read_checkpoint(folder), prompt="a", seed=1, preset="official")
        assert scales(made) == [(scale, scale)]


FEW_STEPS = [
    ("lightx2v-4step", "euler", [1, 0.9375, 2.5 / 3, 0.625], [1000, 937.5, 2500 / 3, 625]),
    ("fastwan-3step", "renoise", [1, 2.24 / 2.96, 0.96 / 1.84], [1000, 757, 522]),
    ("self-forcing-4step", "renoise", [1, 0.9375, 2.5 / 3, 0.625], [1000, 937.5, 2500 / 3, 625]),
]


@pytest.mark.parametrize(("preset", "sampler", "sigmas", "timesteps"), FEW_STEPS)
def test_presets_of_few_steps_have_the_sigmas_of_their_references_and_no_guidance(
    job, preset, sampler, sigmas, timesteps
):
    made = job(preset=preset, seed=1)
    (request,), n = made.requests, len(sigmas)
    assert (request.sampling.sampler, request.table.num_steps, made.guided) == (sampler, n, False)
    np.testing.assert_array_equal(request.table.sigmas[: n + 1], [*np.array(sigmas, np.float32), 0])
    np.testing.assert_allclose(request.table.timesteps[:n], timesteps, rtol=1.2e-7)  # two roundings to float32
    (note,) = made.notes
    assert note.startswith(f"preset {preset} is for weights that were distilled for it")
    assert ("full attention" in note) == (preset == "self-forcing-4step")


def test_each_value_of_a_preset_gives_way_to_its_own_argument(job, full_size):
    base = {"seed": 1, "preset": "lightx2v-4step"}
    (other,) = job(**base, flow_shift=7).requests  # of its NVFP4 models
    np.testing.assert_allclose(other.table.sigmas[:5], [1, 21 / 22, 0.875, 0.7, 0], rtol=1e-7)
    assert job(**base, num_inference_steps=8).requests[0].table.num_steps == 8
    assert job(**base, sampler="renoise").requests[0].table.renoises
    assert scales(job(**base, guidance_scale=2)) == [(2, 2)]
    (given,) = job(**base, timesteps=[900, 500]).requests
    np.testing.assert_allclose(given.table.sigmas[:3], [0.9, 0.5, 0], rtol=1e-7)  # instead of the preset's schedule
    (kept,) = job(seed=1, preset="fastwan-3step", timesteps=[1000, 700]).requests
    assert kept.sampling.sigma_schedule == "lookup" and kept.table.sigmas[1] != np.float32(0.7)
    (plain,) = job(seed=1, preset="fastwan-3step", sigma_schedule="diffusers").requests
    assert plain.table.sigmas[1] == np.float32(0.757)
    (own,) = make_job(
        full_size[T2V], prompt="a", preset="official", sampler="euler", negative_prompt="", guidance_scale=6,
        flow_shift=[8], num_inference_steps=3,
    ).requests  # fmt: skip
    assert (own.negative_prompt, own.guidance_scale, own.guidance_scale_2) == ("", 6, 6)
    np.testing.assert_array_equal(own.table.sigmas, make_table("euler", 3, 8, sigma_schedule="original").sigmas)


def test_the_default_preset_is_what_the_checkpoint_says(job, tmp_path):
    assert job(seed=1, preset="diffusers").settings() == job(seed=1).settings()
    folder = write_configs(tmp_path, T2V, tiny=True)
    (folder / "generation_config.json").write_text('{"sigma_schedule": "original", "guidance_scale_2": 1.5}')
    checkpoint = read_checkpoint(folder)
    (request,) = make_job(checkpoint, prompt="a", seed=1, preset="diffusers").requests
    assert (request.sampling.sigma_schedule, request.guidance_scale_2) == ("original", 1.5)
    other = make_job(checkpoint, prompt="a", seed=1, preset="lightx2v-4step", guidance_scale=2)
    assert scales(other) == [(2, 2)]  # nothing is left of the checkpoint's pair


@pytest.mark.parametrize(
    "call",
    [
        *(dict(preset=name) for name, *_ in FEW_STEPS),
        dict(preset="fastwan-3step", sigma_schedule="diffusers"),
        dict(preset="lightx2v-4step", timesteps=[1000, 500], guidance_scale=2),
        dict(sampler="renoise", timesteps=[900, 100], sigma_schedule="lookup", flow_shift=4),
        dict(sigma_schedule="original"),
    ],
)
def test_settings_hold_the_preset_and_what_it_came_to(job, call):
    made = job(seed=1, **call)
    (settings,) = made.settings()
    json.dumps(settings)
    assert settings["call"].get("preset") == call.get("preset")
    again = job(**settings["call"])
    assert again.settings() == (settings,)
    for a, b in zip(again.requests[0].table, made.requests[0].table, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("name", "call", "line"),
    [
        (T2V, {}, "preset diffusers: unipc2, 40 steps, shift 3, guidance 4 and 3, the low-noise expert from step 14"),
        (T2V, {"preset": "official"},
         "preset official: unipc2 on original sigmas, 40 steps, shift 12, guidance 4 and 3, the low-noise expert from "
         "step 27"),
        (I2V, {"preset": "official", "image": PHOTO, **HD},
         "preset official: unipc2 on original sigmas, 40 steps, shift 5, guidance 3.5 and 3.5, the low-noise expert "
         "from step 16"),
        (T2V, {"preset": "lightx2v-4step"},
         "preset lightx2v-4step: euler on even sigmas, 4 steps, shift 5, no guidance, the low-noise expert from step "
         "3"),
        (T2V_21, {"preset": "fastwan-3step"},
         "preset fastwan-3step: renoise on lookup sigmas, 3 steps, timesteps 1000 757 522, shift 8, no guidance"),
        (T2V, {"sampler": "euler", "timesteps": [900], "guidance_scale": 2},
         "preset diffusers: euler, 1 step, timesteps 900, guidance 2 and 2, the high-noise expert alone"),
        (T2V, {"boundary_ratio": 1, "num_inference_steps": 2},
         "preset diffusers: unipc2, 2 steps, shift 3, guidance 4 and 3, the low-noise expert alone"),
    ],
)  # fmt: skip
def test_how_a_call_samples_is_told_in_a_line(full_size, name, call, line):
    """Steps of the high-noise expert: 13 and 26 are known (docs/samplers.md); 15 is 40 steps of the original at 5."""
    assert make_job(full_size[name], prompt="a", seed=1, **call).sampling == (line,)


def test_prompts_that_are_sampled_differently_have_a_line_each(job):
    made = job(prompt=["a", "b", "c"], seed=1, sampler=["euler", "unipc", "euler"], num_videos_per_prompt=2)
    first, second = made.sampling
    assert first.startswith("prompts 0, 2: preset diffusers: euler, 40")
    assert second.startswith("prompt 1: preset diffusers: unipc2, 40")


def test_renoise_takes_its_timesteps_as_they_are(job):
    (request,) = job(sampler="renoise", timesteps=[1000, 757.5, 522]).requests
    assert request.table.num_steps == 3
    assert request.table.timesteps[:4].tolist() == [1000, 757.5, 522, 0]
    np.testing.assert_allclose(request.table.sigmas[:4], [1, 0.7575, 0.522, 0], rtol=1e-6)
    both = job(sampler="renoise", timesteps=np.array([900, 500]), num_inference_steps=2, flow_shift=9).requests[0]
    np.testing.assert_allclose(both.table.sigmas[:3], [0.9, 0.5, 0], rtol=1e-6)


# Images and videos


def test_the_size_follows_the_aspect_of_the_image_and_is_said(job):
    made = job(I2V, image=PHOTO, seed=1)
    assert made.size[1:] == (672, 1344)  # 1:2 at 720 x 1280, multiples of 16
    assert made.notes == ("size 1344x672, from the image's 100x50",)
    given = job(I2V, image=PHOTO, seed=1, **SIZE)
    assert (given.size[1:], given.notes) == (
        (64, 96), ("image of 100x50 is stretched to 96x64: fit crop or pad would keep its shape",)
    )  # fmt: skip
    assert job(TI2V, image=PHOTO).size[1] % 32 == 0


@pytest.mark.parametrize(
    ("shape", "height", "width", "told"),
    [
        ((1080, 1920), 464, 832, False),  # 468 is no multiple of 16, and 464 the nearest
        ((1080, 1920), 480, 832, True),
        ((1080, 1920), 720, 1280, False),
        ((512, 512), 480, 832, True),
        ((720, 1280), 1280, 720, True),
        ((64, 96), 64, 96, False),
    ],
)
def test_an_image_that_changes_its_shape_is_told(job, shape, height, width, told):
    image, size = Image.new("RGB", shape[::-1]), dict(height=height, width=width, num_frames=5, seed=1)
    note = f"of {shape[1]}x{shape[0]} is stretched to {width}x{height}: fit crop or pad would keep its shape"
    assert job(I2V, image=image, **size).notes == (f"image {note}",) * told
    assert job(I2V, prompt=["a", "b"], image=image, last_image=image, **size).notes == (
        f"image {note}", f"last_image {note}",
    ) * told  # fmt: skip
    clip = np.zeros((5, *shape, 3), np.uint8)
    assert job(T2V, video=clip, **size).notes == (f"video {note}",) * told
    for fit in ("crop", "pad"):
        assert job(I2V, image=image, fit=fit, **size).notes == ()


def test_a_size_that_follows_the_image_does_not_stretch_it_but_others(job):
    strip = Image.new("RGB", (130, 77))
    assert job(I2V, image=strip, seed=1).notes == ("size 1232x736, from the image's 130x77",)
    made = job(I2V, prompt=["a", "b"], image=[strip, PHOTO], seed=1)
    assert made.notes[1:] == ("image of 100x50 is stretched to 1232x736: fit crop or pad would keep its shape",)


def test_fit_is_a_setting_where_it_is_not_the_default(job):
    made = job(I2V, image=PHOTO, fit="crop", **SIZE)
    assert made.requests[0].fit == made.settings()[0]["call"]["fit"] == "crop"
    for fit in (None, "stretch"):
        made = job(I2V, image=PHOTO, fit=fit, **SIZE)
        assert made.requests[0].fit == "stretch" and "fit" not in made.settings()[0]["call"]


def test_a_video_is_fitted_frame_by_frame(job):
    for fit, operation in (("crop", ImageOps.fit), ("pad", ImageOps.pad)):
        (request,) = job(video=CLIP, fit=fit, **SIZE).requests
        expected = [operation(Image.fromarray(frame), (96, 64), Image.Resampling.LANCZOS) for frame in CLIP[:9]]
        np.testing.assert_array_equal(request.video.read(), np.stack(expected))


def test_one_image_is_for_all_prompts_or_one_for_each(job):
    made = job(I2V, prompt=["a", "b"], image=PHOTO, **SIZE)
    assert made.requests[0].image.size == made.requests[1].image.size == (100, 50)
    other = np.zeros((20, 30, 3), np.uint8)
    made = job(I2V, prompt=["a", "b"], image=[PHOTO, other], last_image=[other, PHOTO], **SIZE)
    assert [r.image.size for r in made.requests] == [(100, 50), (30, 20)]
    assert [r.last_image.size for r in made.requests] == [(30, 20), (100, 50)]


def test_only_ti2v_takes_an_image_for_some_prompts(job):
    made = job(TI2V, prompt=["a", "b"], image=[None, PHOTO], seed=1)
    assert [r.image is None for r in made.requests] == [True, False]
    assert made.notes == ("size 1312x640, from the image's 100x50",)
    assert job(TI2V).requests[0].image is None


def test_images_may_be_files(job, tmp_path):
    PHOTO.save(tmp_path / "photo.png")
    made = job(I2V_21, image=str(tmp_path / "photo.png"), **SIZE)
    np.testing.assert_array_equal(made.requests[0].image, PHOTO)
    assert job(FLF, image=tmp_path / "photo.png", last_image=PHOTO, **SIZE).requests[0].last_image.size == (100, 50)


def test_a_video_gives_frames_rate_and_size(job, tmp_path):
    save_video(CLIP, tmp_path / "clip.mp4", 12.5)
    made = job(T2V_21, video=tmp_path / "clip.mp4", seed=1)
    (request,) = made.requests
    assert (request.size, request.fps) == ((9, 544, 720), 12.5)
    assert made.notes == ("size 720x544, from the video's 64x48", "9 frames, the largest 4k+1 in the video's 10")
    assert request.video.shape == request.video.read().shape == (9, 544, 720, 3)
    short = job(T2V_21, video=str(tmp_path / "clip.mp4"), height=64, width=96, num_frames=5, fps=30, seed=1)
    (request,) = short.requests
    stretched = "video of 64x48 is stretched to 96x64: fit crop or pad would keep its shape"
    assert (short.size[0], request.fps, request.video.shape[0], short.notes) == (5, 30.0, 5, (stretched,))
    of_images = job(T2V, video=[PHOTO] * 5, seed=1)
    assert (of_images.size[0], of_images.requests[0].fps) == (5, 16.0)  # no rate of its own: the table's


def write_long(path):
    """100 frames, repeating CLIP."""
    save_video([CLIP[i % 10] for i in range(100)], path, 16)
    return path


def test_a_long_video_gives_the_models_own_length_unless_told_otherwise(job, tmp_path):
    path = write_long(tmp_path / "long.mp4")
    images = [Image.fromarray(frame) for frame in CLIP] * 10
    note = "the first 81 frames of the video's 100, this model's own length: give num_frames for more"
    for video in (path, images, np.concatenate([CLIP] * 10)):
        made = job(T2V_21, video=video, seed=1, height=48, width=64)
        assert (made.size[0], made.requests[0].video.num_frames, made.notes) == (81, 81, (note,))
        more = job(T2V_21, video=video, seed=1, height=48, width=64, num_frames=97)
        assert (more.size[0], more.requests[0].video.num_frames, more.notes) == (97, 97, ())
    whole = job(T2V_21, video=images[:81], seed=1, height=48, width=64)
    assert whole.notes == ("81 frames, the largest 4k+1 in the video's 81",)
    assert job(TI2V, video=path, seed=1, height=64, width=96).size[0] == 97  # its own length is 121


def test_no_more_of_a_file_is_decoded_than_is_taken(job, tmp_path, monkeypatch):
    """Once to count frames, of which none is kept, and again when it is encoded."""
    path, decoded, shown = write_long(tmp_path / "long.mp4"), [], []
    frames, show = videos._frames, videos._shown
    monkeypatch.setattr(videos, "_frames", lambda *given: (decoded.append(1) or f for f in frames(*given)))
    monkeypatch.setattr(videos, "_shown", lambda *frame: (shown.append(1), show(*frame))[1])
    made = job(T2V_21, video=path, height=64, width=96)
    assert (len(decoded), len(shown)) == (1 + 81, 0)  # the first when it is opened
    assert [len(group) for group in made.requests[0].video.groups(4)] == [1] + [4] * 20
    assert (len(decoded), len(shown)) == (1 + 2 * 81, 81)


def test_a_video_is_decoded_last_and_not_at_all_for_a_plan(job, checkpoints, tmp_path, monkeypatch):
    path = write_long(tmp_path / "long.mp4")
    monkeypatch.setattr(videos.Video, "count", None)  # not reached
    for wrong in ({"strength": 0}, {"num_inference_steps": 0}, {"guidance_scale_2": 3.0}, {"num_frames": 6}, {"fps": 0},
                  {"seed": -1}, {"height": 15, "width": 16}, {"latents": CLIP}, {"sampler": "a"}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            job(T2V_21, video=path, **wrong)
    plan = make_job(checkpoints[T2V_21], False, prompt="a cat", video=path, height=64, width=96)
    assert plan.requests[0].video.shape == (81, 64, 96, 3)
    with pytest.raises(TypeError):
        job(T2V_21, video=path)


def test_images_are_read_at_once_because_any_may_be_none(job, checkpoints):
    images = [Image.fromarray(frame) for frame in CLIP[:5]]
    given = dict(prompt="a", height=48, width=64, seed=1)
    made = make_job(checkpoints[T2V_21], video=images, **given)
    assert (made.requests[0].video.video.source == CLIP[:5]).all()
    images[3] = images[3].convert("F")
    with pytest.raises(ValueError, match="a frame of video has pixels of mode F, which are not read"):
        make_job(checkpoints[T2V_21], video=images, **given)
    assert make_job(checkpoints[T2V_21], False, video=images, **given).requests[0].video.video.source is images


def test_an_array_is_not_copied(job):
    """Neither bytes nor floats, of whatever kind."""
    for clip in (CLIP, CLIP / 255, (CLIP / 255).astype(np.float32)):
        (request,) = job(T2V_21, video=clip, height=48, width=64, seed=1).requests
        assert np.shares_memory(request.video.video.source, clip)
        groups = list(request.video.groups(4))
        assert {group.dtype for group in groups} == {clip.dtype}
        np.testing.assert_array_equal(np.concatenate(groups), clip[:9])


def test_a_file_that_changes_after_it_was_checked_is_told(job, tmp_path):
    path = write_long(tmp_path / "long.mp4")
    (request,) = job(T2V_21, video=path, height=48, width=64, seed=1, num_frames=97).requests
    with pytest.raises(OSError, match="had 101 frames when it was opened, and has 100 now: it was changed or damaged"):
        replace(request.video, num_frames=101).read()
    save_video(CLIP, path, 16)
    with pytest.raises(OSError, match=f"video {path} was changed after it was opened: let it be until it is encoded"):
        request.video.read()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"video {path} does not exist"):
        request.video.read()


def test_frames_are_read_in_the_jobs_own_size(job, tmp_path):
    save_video(CLIP, tmp_path / "clip.mp4", 8)
    frames, _ = load_video(tmp_path / "clip.mp4")
    expected = [np.asarray(Image.fromarray(f).resize((96, 32), Image.Resampling.LANCZOS)) for f in frames[:9]]
    for video in (tmp_path / "clip.mp4", frames, [Image.fromarray(frame) for frame in frames]):
        (request,) = job(T2V_21, video=video, height=32, width=96, seed=1).requests
        assert request.video.read().dtype == np.uint8
        np.testing.assert_array_equal(request.video.read(), expected)


LOUD, DARK = CLIP, CLIP // 4


@pytest.mark.parametrize(
    "sources",
    [
        lambda folder: [folder / "0.mkv", str(folder / "1.mkv")],
        lambda folder: [LOUD, DARK],
        lambda folder: np.stack([LOUD, DARK]),
        lambda folder: ([Image.fromarray(f) for f in LOUD], [Image.fromarray(f) for f in DARK]),
        lambda folder: [LOUD, folder / "1.mkv"],
    ],
)
def test_each_prompt_may_have_its_video(job, tmp_path, sources):
    for i, frames in enumerate((LOUD, DARK)):
        write_clip(tmp_path / f"{i}.mkv", frames, "ffv1", "bgr0")
    made = job(T2V_21, prompt=["a", "b"], video=sources(tmp_path), height=48, width=64, seed=1, num_videos_per_prompt=2)
    for request, expected in zip(made.requests, (LOUD, LOUD, DARK, DARK), strict=True):
        np.testing.assert_array_equal(request.video.read(), expected[:9])
    assert made.requests[0].video is made.requests[1].video  # and is encoded once


def test_one_video_is_read_once_for_all_prompts(job, tmp_path):
    path = tmp_path / "clip.mp4"
    save_video(CLIP, path, 8)
    for video in (path, [path, str(path)], CLIP, [CLIP, CLIP]):
        a, b = job(T2V_21, prompt=["a", "b"], video=video, seed=1).requests
        assert a.video is b.video
        assert a.settings()["inputs"] == ["video"]


def test_videos_of_several_kinds_get_one_size_length_and_rate(job, tmp_path):
    save_video(CLIP, tmp_path / "clip.mp4", 8)
    save_video(CLIP[:7, :, :32], tmp_path / "short.mp4", 12)
    made = job(T2V_21, prompt=["a", "b"], video=[tmp_path / "clip.mp4", tmp_path / "short.mp4"], seed=1)
    assert (made.size, made.requests[1].fps) == ((5, 544, 720), 8)
    assert made.notes == (
        "size 720x544, from video[0]'s 64x48",
        "fps 8, video[0]'s: video[1] has 12",
        "5 frames, the largest 4k+1 in video[1]'s 7",
        "video[1] of 32x48 is stretched to 720x544: fit crop or pad would keep its shape",
    )
    assert made.warnings == made.notes[3:]  # the others were left open


@pytest.mark.parametrize(
    ("video", "words"),
    [
        ([CLIP] * 3, "video is a list of 3 for 2 prompts: give one, or one a prompt"),
        (np.stack([CLIP]), "video is a list of 1 for 2 prompts"),
        ([CLIP, None], "video[1] is None: give one video for all prompts, or one for each"),
        ([CLIP, "none.mp4"], "video[1] none.mp4 does not exist"),
        ([CLIP, []], "the frames of video[1] must have one size, got no frames"),
        ([CLIP, [PHOTO, 3]], "frame 1 of video[1] is a int"),
        ([CLIP, CLIP / 255.0], "video[1] is a float array of 48 x 64 but 544 x 720 is asked for"),
        ([np.repeat(CLIP, 2, 0), CLIP], "num_frames=13 but video[1] has 10 frames: the largest is 9"),
        ([CLIP, CLIP.astype(int)], "video[1] has dtype int64, must be uint8, or float in [0, 1]"),
        (CLIP[None, None], "video has shape (1, 1, 10, 48, 64, 3), must be (F, H, W, 3)"),
    ],
)
def test_a_wrong_video_among_several_is_named(job, video, words):
    with pytest.raises((ValueError, OSError)) as caught:
        job(T2V_21, prompt=["a", "b"], video=video, num_frames=13 if "13" in words else None)
    assert words in str(caught.value)
    assert_one_sentence(str(caught.value))


def test_a_damaged_video_gives_what_is_whole(job, tmp_path):
    path = write_clip(tmp_path / "clip.mkv", CLIP, gop=1)
    frames, _ = load_video(path)
    damage(path, 2, 6)
    told = pytest.warns(UserWarning, match="clip.mkv is damaged: frames lost or faulty: 2")
    with told:
        made = job(T2V_21, video=path, seed=1, height=48, width=64)
    assert made.notes == ("5 frames, the largest 4k+1 in the video's 8 whole ones",)
    np.testing.assert_array_equal(made.requests[0].video.read(), frames[[0, 1, 3, 4, 5]])
    with told, pytest.raises(ValueError, match="num_frames=9 but the video has 8 whole frames: the largest is 5"):
        job(T2V_21, video=path, num_frames=9)
    latents = np.zeros((1, 16, 3, 6, 8), np.float32)  # for the 9 frames that the file promises
    with told, pytest.raises(ValueError, match=r"expected floats of shape \(1, 16, 2, 6, 8\)"):
        job(T2V_21, video=path, latents=latents, height=48, width=64)


def test_what_was_decided_of_colours_and_rate_is_told(job, tmp_path):
    times = [40 * i for i in range(10)]
    path = write_clip(tmp_path / "hdr.mkv", CLIP, pix_fmt="yuv420p10le", times=times, tags=(9, 1, 9, 18))
    fps = "fps 25, from the times of the video's frames: its header says 1000"
    colours = "the video: HDR (HLG) is read as sRGB, clipped at its white"
    given = dict(video=path, height=48, width=64, num_frames=5, seed=1)
    made = job(T2V_21, **given)
    assert (made.requests[0].fps, made.notes) == (25, (fps, colours))
    assert job(T2V_21, fps=8, **given).notes == (colours,)


@pytest.mark.parametrize(
    ("strength", "steps", "remaining"),
    [(None, 50, 40), (0.8, 50, 40), (1, 50, 50), (0.5, 5, 2), (0.02, 50, 1), (0.34, 3, 1)],
)
def test_strength_decides_how_many_steps_remain(job, strength, steps, remaining):
    (request,) = job(T2V_21, video=CLIP, strength=strength, num_inference_steps=steps).requests
    (whole,) = job(T2V_21, num_inference_steps=steps).requests
    assert request.table.num_steps == remaining
    np.testing.assert_array_equal(request.table.timesteps[:remaining], whole.table.timesteps[steps - remaining : steps])
    np.testing.assert_array_equal(request.table.corrector[0], np.eye(6)[0])  # the solver warms up from there


def test_strength_of_renoise_counts_its_timesteps(job):
    given = {"sampler": "renoise", "timesteps": [1000, 750, 500, 250]}
    (request,) = job(T2V_21, video=CLIP, strength=0.5, **given).requests
    assert request.table.timesteps[:3].tolist() == [500, 250, 0]


# Paths and arrays

URLS = ["https://example.com/a/b.png", "s3://bucket/clip.mp4", "file:///tmp/a.npy", "data:image/png;base64,iVBO"]
TAKE_PATHS = {
    "image": lambda job, path: job(I2V, image=path),
    "last_image": lambda job, path: job(I2V, image=PHOTO, last_image=path),
    "video": lambda job, path: job(video=path),
    "latents": lambda job, path: job(latents=path, **SIZE),
    "output": lambda job, path: check_save(job(), path),
    "file": lambda job, path: read_settings(path),
    "model": lambda job, path: open_checkpoint(path),
}


@pytest.mark.parametrize("what", TAKE_PATHS)
@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("url", URLS)
def test_a_url_is_refused_as_one_and_not_as_a_missing_file(job, what, kind, url):
    if kind is Path and not url.startswith(("http", "s3")):
        url = URLS[0]  # of the others a Path keeps too little
    with pytest.raises(ValueError) as caught:
        TAKE_PATHS[what](job, kind(url))
    assert str(caught.value).startswith(f"{what} {url} is a URL: give a ")
    assert_one_sentence(str(caught.value))


@pytest.mark.parametrize("home", ["~", "~user"])
@pytest.mark.parametrize("kind", [str, Path])
def test_every_path_knows_the_home_folder(job, tmp_path, monkeypatch, home, kind):
    monkeypatch.setattr("os.path.expanduser", lambda path: str(path).replace(home, str(tmp_path)))
    monkeypatch.setenv("HOME", str(tmp_path))
    PHOTO.save(tmp_path / "a.png")
    save_video(CLIP, tmp_path / "a.mp4", 8)
    save_output(CLIP, tmp_path / "a.gif", 8, {"comment": json.dumps({"jaxwan": "0", "call": {}})})
    np.save(tmp_path / "a.npy", np.full((1, 16, 3, 8, 12), 0.5, np.float16))
    write_configs(tmp_path / "model", T2V, tiny=True)
    own = kind(home)
    job(I2V, image=kind(f"{home}/a.png"), last_image=kind(f"{home}/a.png"), **SIZE)
    assert job(video=kind(f"{home}/a.mp4"), seed=1).size[0] == 9
    assert (job(latents=kind(f"{home}/a.npy"), **SIZE).requests[0].latents == 0.5).all()
    assert read_settings(kind(f"{home}/a.gif"))["call"] == {}
    assert open_checkpoint(kind(f"{home}/model")).folder == tmp_path / "model"
    assert check_save(job(), kind(f"{home}/b.mp4")) == [tmp_path / "b.mp4"]
    assert check_writable(kind(f"{home}/b.npz")) == tmp_path / "b.npz"
    assert local_path(own, "x") == tmp_path


def test_a_tilde_before_no_users_name_is_part_of_the_name():
    assert local_path("~no-such-user/a.png", "image") == Path("~no-such-user/a.png")
    assert local_path("a/~/b~.png", "image") == Path("a/~/b~.png")


def test_a_latents_file_is_plain_numbers(job, tmp_path):
    np.save(tmp_path / "pickled.npy", np.array([{}], object))
    np.save(tmp_path / "whole.npy", np.zeros((1, 16, 3, 8, 12)))
    (tmp_path / "half.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:500])
    for name in ("pickled", "half"):
        with pytest.raises(OSError, match=f"latents {tmp_path}/{name}.npy is no readable .npy file of plain numbers"):
            job(latents=tmp_path / f"{name}.npy", **SIZE)


TENSORS = {
    "bfloat16 with a gradient": lambda x: torch.tensor(x, dtype=torch.bfloat16, requires_grad=True),
    "float16": lambda x: torch.tensor(x, dtype=torch.float16),
    "float8": lambda x: torch.tensor(x, dtype=torch.float32).to(torch.float8_e4m3fn),
    "a view, negated": lambda x: torch.complex(torch.tensor(x), torch.tensor(-x)).conj().imag,
    "JAX's bfloat16": lambda x: jnp.asarray(x, jnp.bfloat16),
}


@pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS)
def test_tensors_of_torch_and_jax_are_arrays(job, tensor):
    """Values that all of these types have."""
    values = lambda *shape: np.random.default_rng(0).integers(0, 9, shape).astype(np.float32) / 8  # noqa: E731
    image, latents, embeds = values(64, 96, 3), values(1, 16, 3, 8, 12), values(1, 512, 24)
    (request,) = job(
        I2V, prompt=None, image=tensor(image), last_image=[tensor(image)], latents=tensor(latents),
        prompt_embeds=tensor(embeds), negative_prompt_embeds=[tensor(embeds[0])], **SIZE,
    ).requests  # fmt: skip
    for got, given in ((request.image, image), (request.last_image, image), (request.latents, latents[0]),
                       (request.prompt_embeds, embeds[0]), (request.negative_prompt_embeds, embeds[0])):  # fmt: skip
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, given)
    clip = np.stack([image] * 9)
    np.testing.assert_array_equal(job(video=tensor(clip), **SIZE).requests[0].video.read(), clip)


def test_a_uint8_tensor_is_an_image_and_a_video(job):
    np.testing.assert_array_equal(job(I2V, image=torch.tensor(np.asarray(PHOTO)), **SIZE).requests[0].image, PHOTO)
    (ours,), (theirs,) = (job(video=clip, **SIZE).requests for clip in (CLIP, torch.tensor(CLIP)))
    np.testing.assert_array_equal(ours.video.read(), theirs.video.read())


def test_values_of_each_prompt_may_be_a_tensor(checkpoints):
    plain = inspect.unwrap(make_job)  # signatures name numbers and lists alone
    given = {"seed": torch.tensor([1, 2]), "guidance_scale": jnp.array([2.5, 3])}
    a, b = plain(checkpoints[T2V], prompt=["a", "b"], **given).requests
    assert (a.seed, b.seed, a.guidance_scale, b.guidance_scale) == (1, 2, 2.5, 3)
    (request,) = plain(checkpoints[T2V], prompt="a", sampler="renoise", timesteps=torch.tensor([1000, 500.5])).requests
    assert request.sampling.timesteps == (1000, 500.5)


# Names, words, settings


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"guidence_scale": 4}, "there is no argument guidence_scale: did you mean guidance_scale?"),
        ({"promt": "a"}, "did you mean prompt?"),
        ({"num_frame": 5}, "did you mean num_frames?"),
        ({"steps": 4}, "there is no argument steps: did you mean num_inference_steps?"),
        ({"cfg": 4}, "did you mean guidance_scale?"),
        ({"shift": 4}, "did you mean flow_shift?"),
        ({"xyz": None}, "there is no argument xyz: there are prompt, negative_prompt, image,"),
        (
            {"progress": False},
            "progress is no argument of a call: say it when loading, WanPipeline.from_pretrained(…, pr",
        ),
        ({"mesh": "pp=2"}, "mesh is no argument of a call"),
        ({"output_typ": "pil"}, "did you mean output_type?"),
        ({"generator": object()}, "has no meaning here: noise comes from seed, a whole number"),
        ({"return_dict": False}, "return_dict=False has no meaning here: a call returns an Output"),
        ({"attention_kwargs": {"scale": 1}}, "there are no attention processors"),
        ({"image_embeds": np.zeros(3)}, "give the image itself, as image"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "callback_on_step_end is given the latents"),
    ],
)
def test_an_argument_that_there_is_not_is_refused_with_the_right_one(job, arguments, words):
    with pytest.raises(TypeError) as caught:
        job(**arguments)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_loading_refuses_an_argument_that_there_is_not():
    for name, right in (("torch_dtype", "dtype"), ("device_map", "mesh"), ("warmp", "warmup")):
        with pytest.raises(TypeError, match=f"there is no argument {name}: did you mean {right}?"):
            WanPipeline.from_pretrained(BUNDLED_MODEL, **{name: 1})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mesh": 2}, 'mesh 2 is no text such as "pp=4"'),
        ({"mesh": "pp=9"}, "mesh pp=9 has 9 stages for 8 layers"),
        ({"dtype": np.float16}, "is not one of bfloat16, float32: nearest is"),
        ({"dtype": "bf16"}, "dtype='bf16' is not one of bfloat16, float32: nearest is bfloat16"),
        ({"vae_dtype": int}, "is not one of bfloat16, float32"),
        ({"model": ""}, "model is an empty text"),
        ({"warmup": True}, "warmup=True is no call's arguments, such as dict(num_frames=81)"),
    ],
)
def test_loading_refuses_what_it_cannot_do_before_it_reads_a_tensor(monkeypatch, arguments, words):
    monkeypatch.setattr("jaxwan.pipelines.pipeline.load_parts", None)
    plain = inspect.unwrap(WanPipeline.from_pretrained.__func__)  # without the type checks of the tests
    with pytest.raises(ValueError) as caught:
        plain(WanPipeline, **{"model": BUNDLED_MODEL} | arguments)
    assert words in str(caught.value)
    assert_one_sentence(str(caught.value))


def test_texts_have_as_many_rows_as_are_asked_for(job):
    assert job().requests[0].max_sequence_length == 512
    (request,) = job(max_sequence_length=226).requests
    assert request.max_sequence_length == 226 == request.settings()["call"]["max_sequence_length"]
    job(prompt=None, prompt_embeds=np.zeros((1, 7, 24)), max_sequence_length=7)
    with pytest.raises(ValueError, match=r"prompt_embeds has shape \(1, 512, 24\), expected \(B, 7, 24\)"):
        job(prompt=None, prompt_embeds=np.zeros((1, 512, 24)), max_sequence_length=7)
    for wrong, nearest in ((0, 1), (513, 512)):
        with pytest.raises(ValueError, match=f"max_sequence_length={wrong} .*nearest is {nearest}|must be .*1"):
            job(max_sequence_length=wrong)


@pytest.mark.parametrize("given", [jnp.bfloat16, "bfloat16", np.dtype(jnp.bfloat16), "torch.bfloat16"])
def test_dtypes_are_taken_as_people_write_them(given):
    assert parse_dtype("dtype", given) == "bfloat16"
    assert parse_dtype("dtype", None) is None and parse_dtype("dtype", np.float32) == "float32"


def test_arguments_of_diffusers_that_change_nothing_are_taken(job):
    job(generator=None, return_dict=True, attention_kwargs=None,
        callback_on_step_end_tensor_inputs=["latents"])  # fmt: skip


def test_scalars_of_arrays_are_numbers(checkpoints):
    plain = inspect.unwrap(make_job)  # without the type checks of the tests
    given = dict(guidance_scale=jnp.float32(3), num_inference_steps=np.int64(4), seed=jnp.uint32(7))
    (request,) = plain(checkpoints[T2V], prompt="a", **given).requests
    assert (request.guidance_scale, request.table.num_steps, request.seed) == (3.0, 4, 7)


def test_a_call_of_a_pipeline_shows_its_whole_signature():
    call = inspect.signature(inspect.unwrap(WanPipeline.__call__)).parameters
    made = inspect.signature(inspect.unwrap(make_job)).parameters
    own = ("self", "output_type", "save", "callback_on_step_end")
    assert {n: (p.default, p.annotation) for n, p in call.items() if n not in own} == {
        n: (p.default, p.annotation) for n, p in made.items() if p.kind is not p.POSITIONAL_ONLY
    }
    assert list(call)[1:3] == ["prompt", "negative_prompt"] and set(ARGUMENTS) < set(call)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("scheduler", "choose a sampler in each call"),
        ("_guidance_scale", "give guidance_scale to each call"),
        ("transformer", "models are in pipe.parts"),
        ("to", "say the devices when loading"),
        ("enable_vae_tiling", "give a tiling to each call"),
        ("shedule", "has no attribute shedule$"),
    ],
)
def test_attributes_of_other_pipelines_are_neither_read_nor_set_silently(name, told):
    pipe = WanPipeline.__new__(WanPipeline)
    with pytest.raises(AttributeError, match=told):
        getattr(pipe, name)
    with pytest.raises(AttributeError, match=told):
        setattr(pipe, name, None)
    assert not hasattr(pipe, name)
    pipe.progress = False
    assert pipe.progress is False


def test_words_that_a_model_of_few_words_does_not_know_are_told():
    checkpoint = read_checkpoint(BUNDLED_MODEL)
    with pytest.warns(UserWarning) as caught:
        make_job(checkpoint, prompt=["a Cat, on the moon", "a red star, up-right; cat"], seed=1)
    (warning,) = caught
    assert warning.filename == __file__  # the caller's line, not one of ours
    example = checkpoint.defaults.example_prompt
    assert str(warning.message) == f"the model does not know the words 'cat', 'moon'; it knows those of {example!r}"
    with pytest.warns(UserWarning, match="the words 'b', 'c', 'd', 'e', 'f' and 2 more; it"):
        make_job(checkpoint, prompt="a b c d e f g h", seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_job(checkpoint, prompt=[example, "", "A RED circle; it's", "a (white) star."][:2], seed=1)
        make_job(checkpoint, prompt="a white star that grows", negative_prompt="cat", seed=1)


def test_settings_are_a_call_that_makes_each_video_again(job):
    made = job(
        prompt=["a", "b"], guidance_scale=[2, 3.5], seed=[1, 2], num_inference_steps=[3, 4], num_videos_per_prompt=2,
        index=5, sampler=["euler", "unipc"], tiling=Tiling(32, 48, 24, 32), **SIZE,
    )  # fmt: skip
    json.dumps(made.settings())
    settings = [s["call"] for s in made.settings()]
    assert [(s["prompt"], s["seed"], s["index"]) for s in settings] == [
        ("a", 1, 5), ("a", 1, 6), ("b", 2, 5), ("b", 2, 6)
    ]  # fmt: skip
    assert [s["sampler"] for s in settings] == ["euler", "euler", "unipc2", "unipc2"]
    for own in settings:
        again = job(**own)
        (request,) = again.requests
        assert again.settings() == ({"call": own},) and request.index == own["index"]
        assert request.tiling == Tiling(32, 48, 24, 32)
        original = made.requests[2 * "ab".index(request.prompt)]
        for a, b in zip(request.table, original.table, strict=True):
            np.testing.assert_array_equal(a, b)


# What is refused: arguments -> words of the sentence (what came, what is allowed, the nearest valid value)


def floats(*shape):
    return np.zeros(shape, np.float32)


BAD = [
    # sizes
    ({"height": 500, "width": 100}, "height=500 is no multiple of 16: nearest are 496 and 512; width=100 is no"),
    ({"height": 64, "width": 0}, "width=0 must be a whole number from 1"),
    ({"height": -16, "width": 64}, "height=-16 must be"),
    ({"height": 64}, "height=64 without width: give both, or neither"),
    ({"width": 64}, "width=64 without height"),
    ({"num_frames": 80}, "num_frames=80 is not 4k+1: nearest are 77 and 81"),
    ({"num_frames": 0}, "num_frames=0 must be a whole number from 1"),
    ({"num_frames": 5000}, "num_frames=5000 is not 4k+1: nearest are 4997 and 5001"),
    ({"num_frames": 5001}, "5001x720x1280 is (1251, 45, 80) tokens, and the model counts to 1024"),
    ({"height": 64, "width": 160_000}, "counts to 1024"),
    ({"fps": 0}, "fps=0 is outside 0.01 to 1000"),
    ({"tiling": Tiling(250, 256, 192, 192)}, "tile_height=250 is no multiple of 8, the pixels of a latent: nearest"),
    ({"tiling": {"tile_height": 64}}, "stride_height=192 leaves gaps between tiles of 64: it may be 32 to 64 pixels"),
    ({"tiling": {"tile": 64}}, "is no jaxwan.Tiling, nor a dict of tile_height, tile_width, stride_height, stride_"),
    ({"fps": float("nan")}, "fps=nan is not finite"),
    ({"index": -1}, "index=-1 must be a whole number from 0"),
    ({"index": 2**32}, "index=4294967296 is outside 0 to 4294967295: nearest is 4294967295"),
    ({"num_videos_per_prompt": 0}, "num_videos_per_prompt=0 must be a whole number from 1"),
    # texts
    ({"prompt": None}, 'a prompt is missing (an empty one, "", is allowed)'),
    ({"prompt": []}, "prompt is an empty list"),
    ({"prompt": "cut in \ud83d half"}, "prompt is no valid Unicode text: 'cut in \\ud83d half'"),
    ({"negative_prompt": "\udfff"}, "negative_prompt is no valid Unicode text"),
    ({"prompt_embeds": floats(1, 512, 24), "prompt": "a"}, "prompt and prompt_embeds are both given"),
    ({"negative_prompt": "a", "negative_prompt_embeds": floats(1, 512, 24)}, "negative_prompt_embeds are both given"),
    ({"prompt_embeds": floats(1, 511, 24)}, "prompt_embeds has shape (1, 511, 24), expected (B, 512, 24)"),
    ({"prompt_embeds": floats(512, 24)}, "prompt_embeds has shape (512, 24), expected (B, 512, 24)"),
    ({"prompt_embeds": floats(0, 512, 24)}, "has shape (0, 512, 24)"),
    ({"prompt_embeds": np.full((1, 512, 24), np.nan)}, "prompt_embeds holds values that are not finite"),
    ({"negative_prompt_embeds": floats(2, 512, 24)}, "has shape (2, 512, 24), expected (1, 512, 24)"),
    # lists
    ({"prompt": ["a", "b"], "negative_prompt": ["x"]}, "negative_prompt is a list of 1 for 2 prompts: give one value"),
    ({"prompt": ["a", "b"], "seed": [1, 2, 3]}, "seed is a list of 3 for 2 prompts"),
    ({"prompt": ["a", "b"], "num_inference_steps": [4]}, "num_inference_steps is a list of 1 for 2 prompts"),
    ({"prompt": ["a", "b"], "guidance_scale": [4.0] * 3}, "guidance_scale is a list of 3 for 2 prompts"),
    ({"prompt": ["a", "b"], "guidance_scale_2": [4.0] * 3}, "guidance_scale_2 is a list of 3 for 2 prompts"),
    ({"prompt": ["a", "b"], "sampler": ["euler"]}, "sampler is a list of 1 for 2 prompts"),
    ({"prompt": ["a", "b"], "flow_shift": [3.0]}, "flow_shift is a list of 1 for 2 prompts"),
    ({"seed": [1, 2]}, "seed is a list of 2 for 1 prompts"),
    # sampling
    ({"num_inference_steps": 0}, "num_inference_steps=0 is outside 1 to 128: nearest is 1"),
    ({"num_inference_steps": 129}, "num_inference_steps=129 is outside 1 to 128: nearest is 128"),
    ({"num_inference_steps": True}, "num_inference_steps=True must be a whole number"),
    ({"sampler": "unipcc"}, "sampler='unipcc' is not one of unipc, unipc1"),
    ({"sampler": "Euler a"}, "nearest is euler"),
    ({"flow_shift": 0}, "flow_shift=0 is outside 0.01 to 100.0: nearest is 0.01"),
    ({"flow_shift": float("inf")}, "flow_shift=inf is not finite"),
    ({"guidance_scale": float("nan")}, "guidance_scale=nan is not finite"),
    ({"boundary_ratio": 1.5}, "boundary_ratio=1.5 is outside 0 to 1: nearest is 1"),
    ({"boundary_ratio": -1}, "boundary_ratio=-1 is outside 0 to 1: nearest is 0"),
    ({"seed": -1}, "seed=-1 is outside 0 to 18446744073709551615: nearest is 0"),
    ({"seed": 2**64}, "nearest is 18446744073709551615"),
    ({"timesteps": [1000, 500]}, "timesteps are for sampler='renoise' or 'euler' only: unipc makes its own"),
    ({"preset": "offical"}, "preset='offical' is not one of diffusers, official, lightx2v-4step, fastwan-3step, self"),
    ({"preset": "lightx2v"}, "self-forcing-4step: nearest is lightx2v-4step"),
    ({"preset": "official"}, "is of published models, and this is none, though built like Wan2.2-T2V-A14B: say instea"),
    ({"preset": "lightx2v-4step", "sampler": "unipc"}, "sigma_schedule='even' is not for sampler='unipc', which takes"),
    ({"preset": "fastwan-3step", "num_inference_steps": 4}, "timesteps are missing: sampler='renoise' takes 2 to 9"),
    ({"preset": "self-forcing-4step", "num_inference_steps": 10}, "num_steps=10 is outside 2 to 9: nearest is 9"),
    ({"sigma_schedule": "originl"}, "sigma_schedule='originl' is not one of diffusers, original, even, lookup: near"),
    ({"sampler": "renoise"}, "timesteps are missing: sampler='renoise' takes 2 to 9 timesteps in (0, 1000]"),
    ({"sampler": "renoise", "timesteps": []}, "timesteps has 0 values"),
    ({"sampler": "renoise", "timesteps": [1000]}, "timesteps has 1 values"),
    ({"sampler": "renoise", "timesteps": list(range(1000, 900, -10))}, "timesteps has 10 values"),
    ({"sampler": "renoise", "timesteps": [500, 500]}, "strictly decreasing"),
    ({"sampler": "renoise", "timesteps": [1001, 500]}, "in (0, 1000]"),
    ({"sampler": "renoise", "timesteps": [500, 0]}, "in (0, 1000]"),
    ({"sampler": "renoise", "timesteps": [900, 500], "num_inference_steps": 4}, "num_inference_steps=4 for 2 timest"),
    # latents, for 9 frames of 64 x 96
    ({"latents": floats(1, 16, 3, 8, 11), **SIZE}, "(1, 16, 3, 8, 11), expected floats of shape (1, 16, 3, 8, 12"),
    ({"latents": floats(2, 16, 3, 8, 12), **SIZE}, "expected floats of shape (1, 16, 3, 8, 12)"),
    ({"latents": floats(1, 3, 8, 12, 16), **SIZE}, "expected floats of shape (1, 16, 3, 8, 12)"),
    ({"latents": np.zeros((1, 16, 3, 8, 12), int), **SIZE}, "latents are int64"),
    ({"latents": np.full((1, 16, 3, 8, 12), np.inf), **SIZE}, "latents hold values that are not finite"),
    # arrays
    ({"latents": np.zeros((1, 16, 3, 8, 12), complex), **SIZE}, "latents must be an array of numbers, and those of d"),
    ({"prompt_embeds": np.zeros((1, 512, 24), complex)}, "dtype complex128 are complex: give real ones"),
    ({"prompt_embeds": [["a"]]}, "dtype <U1 are none"),
    ({"prompt_embeds": [[1], [1, 2]]}, "prompt_embeds must be an array of numbers: setting an array element with"),
    ({"latents": torch.zeros(1, 16, 3, 8, 12).to_sparse(), **SIZE}, "latents must be an array of numbers: can't conv"),
    ({"latents": torch.zeros(1, 16, 3, 8, 12, device="meta"), **SIZE}, "latents must be an array of numbers: Cannot"),
    ({"video": torch.zeros(9, 3, 64, 96)}, "video has shape (9, 3, 64, 96), must be (F, H, W, 3): the colours come la"),
    ({"video": torch.zeros(64, 96, 3)}, "must be (F, H, W, 3): give a picture as image"),
    # images and videos
    ({"video": CLIP, "fit": "cover"}, "fit='cover' is not one of stretch, crop, pad"),
    ({"video": CLIP, "fit": "Crop"}, "fit='Crop' is not one of stretch, crop, pad: nearest is crop"),
    ({"fit": "crop"}, "fit='crop' is for images and videos of another shape: give one, or leave it out"),
    ({"fit": "stretch"}, "fit='stretch' is for images and videos"),
    ({"image": PHOTO}, "this is a text-to-video model (built like Wan2.2-T2V-A14B): it takes no image"),
    ({"last_image": PHOTO}, "takes no last image"),
    ({"strength": 0.5}, "strength=0.5 is for video to video: give a video, or leave it out"),
    ({"video": CLIP, "image": PHOTO}, "image and video are both given: give one of them"),
    ({"video": CLIP, "strength": 0}, "strength=0 is outside 0.025 to 1.0, which keeps at least one of 40 steps"),
    ({"video": CLIP, "strength": 1.2}, "strength=1.2 is outside 0.025 to 1.0"),
    ({"video": CLIP, "strength": 0.02}, "nearest is 0.025"),
    ({"video": CLIP, "num_frames": 13}, "num_frames=13 but the video has 10 frames: the largest is 9"),
    ({"video": CLIP, "num_frames": 6}, "num_frames=6 is not 4k+1: nearest are 5 and 9"),
    ({"video": []}, "must have one size, got no frames"),
    ({"video": CLIP / 255.0, "height": 64, "width": 96}, "video is a float array of 48 x 64 but 64 x 96 is asked for"),
    ({"video": CLIP[0]}, "video has shape (48, 64, 3), must be (F, H, W, 3): give a picture as image"),
    ({"video": PHOTO}, "video has shape (50, 100, 3), must be (F, H, W, 3): give a picture as image"),
]  # fmt: skip

BAD_FOR = [
    (T2V_21, {"guidance_scale_2": 3.0}, "guidance_scale_2=3.0 is for a second expert, and this model has one: use gui"),
    (TI2V, {"guidance_scale_2": 3.0}, "guidance_scale_2=3.0 is for a second expert"),
    (T2V_21, {"boundary_ratio": 0.9}, "boundary_ratio=0.9 is for a second expert, and this model has one"),
    (I2V, {}, "this is an image-to-video model (built like Wan2.2-I2V-A14B): it needs an image for every prompt"),
    (I2V_21, {}, "built like Wan2.1-I2V-14B): it needs an image for every prompt"),
    (I2V, {"prompt": ["a", "b"], "image": [PHOTO, None]}, "needs an image for every prompt"),
    (I2V, {"prompt": ["a", "b"], "image": [PHOTO]}, "image is a list of 1 for 2 prompts: give one, or one a prompt"),
    (I2V, {"image": PHOTO, "last_image": [PHOTO, PHOTO]}, "last_image is a list of 2 for 1 prompts"),
    (I2V, {"last_image": PHOTO}, "needs an image for every prompt"),
    (I2V, {"image": PHOTO, "last_image": PHOTO, "num_frames": 1}, "num_frames=1 has no last frame beside the first"),
    (I2V, {"video": CLIP}, "this is an image-to-video model (built like Wan2.2-I2V-A14B): it takes no video"),
    (I2V_21, {"video": CLIP}, "it takes no video"),
    (FLF, {"video": CLIP}, "it takes no video"),
    (I2V, {"video": CLIP, "image": PHOTO}, "image and video are both given"),
    (TI2V, {"video": CLIP, "image": PHOTO}, "image and video are both given"),
    (TI2V, {"image": PHOTO, "last_image": PHOTO}, "(built like Wan2.2-TI2V-5B) takes no last image"),
    (I2V_21, {"image": PHOTO, "last_image": PHOTO}, "takes no last image (it has no pos_embed_seq_len)"),
    (FLF, {"image": PHOTO}, "this is a first-last-frame model (built like Wan2.1-FLF2V-14B): it needs a last image"),
    (TI2V, {"tiling": Tiling(64, 64, 48, 40)}, "stride_width=40 is no multiple of 16, the pixels of a latent: nearest"),
    (TI2V, {"height": 48, "width": 64}, "height=48 is no multiple of 32: nearest are 32 and 64"),
    (TI2V, {"latents": floats(1, 16, 3, 4, 6), **SIZE}, "expected floats of shape (1, 48, 3, 4, 6)"),
    (I2V, {"image": PHOTO, "latents": floats(1, 36, 3, 8, 12), **SIZE}, "expected floats of shape (1, 16, 3, 8, 12)"),
    (I2V, {"image": floats(50, 100, 3), **SIZE}, "image is a float array of 50 x 100 but 64 x 96 is asked for"),
    (I2V, {"image": PHOTO, "last_image": floats(9, 9, 3), **SIZE}, "last_image is a float array of 9 x 9"),
    (I2V, {"image": floats(64, 96, 3) + 2, **SIZE}, "image has values from 2.0 to 2.0"),
    (I2V, {"image": floats(64, 96)}, "image has shape (64, 96), must be (H, W, 3)"),
    (I2V, {"image": torch.zeros(3, 64, 96)}, "image has shape (3, 64, 96), must be (H, W, 3): the colours come last"),
    (I2V, {"image": np.zeros((64, 96, 3), complex)}, "image must be an array of numbers, and those of dtype complex12"),
]  # fmt: skip


def assert_one_sentence(text):
    assert "\n" not in text and len(text) < 300


@pytest.mark.parametrize(("arguments", "words"), BAD)
def test_bad_input_is_refused_in_a_sentence(job, arguments, words):
    with pytest.raises(ValueError) as caught:
        job(**arguments)
    assert words in str(caught.value)
    assert_one_sentence(str(caught.value))


@pytest.mark.parametrize(("name", "arguments", "words"), BAD_FOR)
def test_what_a_model_does_not_take_is_refused_in_a_sentence(job, name, arguments, words):
    with pytest.raises(ValueError) as caught:
        job(name, **arguments)
    assert words in str(caught.value)
    assert_one_sentence(str(caught.value))


@pytest.mark.parametrize(("name", "argument"), [(I2V, "image"), (T2V, "video")])
def test_a_file_that_cannot_be_read_is_an_os_error(job, tmp_path, name, argument):
    with pytest.raises(FileNotFoundError, match=f"{argument} {tmp_path}/none does not exist"):
        job(name, **{argument: tmp_path / "none"})
    (tmp_path / "text").write_text("no pixels")
    with pytest.raises(OSError, match=f"{argument} {tmp_path}/text is no readable {argument}"):
        job(name, **{argument: str(tmp_path / "text")})


def test_a_second_scale_needs_a_boundary(tmp_path):
    folder = write_configs(tmp_path, T2V, tiny=True)
    edit(folder / "model_index.json", boundary_ratio=None)
    checkpoint = read_checkpoint(folder)
    assert make_job(checkpoint, prompt="a").requests[0].boundary_ratio is None
    assert make_job(checkpoint, prompt="a", guidance_scale_2=2.0, boundary_ratio=0.9).requests[0].boundary_ratio == 0.9
    with pytest.raises(ValueError, match="guidance_scale_2=2.0 needs a boundary_ratio too"):
        make_job(checkpoint, prompt="a", guidance_scale_2=2.0)


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        (MeshSpec(pp=6), "mesh pp=6 has 6 stages for 5 layers: the largest is pp=5"),
        (MeshSpec(pp=40), "the largest is pp=5"),
        (MeshSpec(tp=3), "mesh tp=3: tp=3 does not divide the model's 2 heads and MLP of 72: what does is tp=1 or 2"),
        (
            MeshSpec(sp=4, ulysses=4),
            "ulysses=4 does not divide the 4 devices of sp and the 2 heads that each has: what",
        ),
        (MeshSpec(sp=4, tp=2, ulysses=2), "the 4 devices of sp and the 1 heads that each has: what does is 1"),
        (MeshSpec(tp=2, ulysses=2), "ulysses=2 is for devices of sp, and mesh tp=2 has none: leave it out"),
        (MeshSpec(sp=4, ulysses=3), "what does is 1 or 2"),
        (MeshSpec(cfg=3, pp=2), "mesh cfg=3,pp=2: cfg=3 is for the two branches of guidance, the largest is cfg=2"),
    ],
)
def test_a_mesh_that_a_checkpoint_does_not_fit_is_refused(checkpoints, mesh, words):
    with pytest.raises(ValueError) as caught:
        check_mesh(mesh, checkpoints[T2V])
    assert words in str(caught.value)
    assert_one_sentence(str(caught.value))
    check_mesh(MeshSpec(dp=7, cfg=2, pp=5, tp=2), checkpoints[T2V])  # as many stages as layers, and parts as heads
    check_mesh(MeshSpec(sp=6, ulysses=2), checkpoints[T2V])


@pytest.mark.parametrize(
    ("mesh", "call", "words"),
    [
        (MeshSpec(dp=2, pp=2), {}, "deals videos to 2 groups of devices and this call has 1 video: leave dp out, or"),
        (MeshSpec(dp=4), {"num_videos_per_prompt": 3}, "this call has 3 videos: dp=3 is the most, or ask for more"),
        (MeshSpec(cfg=2, pp=2), {"guidance_scale": 1}, "no video of this call is guided: leave cfg out, or give"),
        (
            MeshSpec(sp=4), {"height": 48, "width": 48},
            "splits the tokens of a frame over 4 devices, and 3 with 3 each have all 9 of 48x48 pixels: sp=3 does the",
        ),
        (MeshSpec(sp=7), {"height": 32, "width": 48}, "and 6 with 1 each have all 6 of 48x32 pixels: sp=6 does the"),
    ],
)  # fmt: skip
def test_a_mesh_with_devices_that_a_call_leaves_idle_is_refused(checkpoints, mesh, call, words):
    with pytest.raises(ValueError) as caught:
        check_use(mesh, checkpoints[T2V], make_job(checkpoints[T2V], **{"prompt": "a"} | call))
    assert words in str(caught.value)
    assert_one_sentence(str(caught.value))


def test_a_mesh_with_work_for_each_device_is_taken(checkpoints, recwarn):
    some = make_job(checkpoints[T2V], prompt=["a", "b", "c"], guidance_scale=[1, 1, 2])
    check_use(MeshSpec(dp=3, cfg=2), checkpoints[T2V], some)  # one video is guided
    check_use(MeshSpec(dp=2), checkpoints[T2V], some)
    check_use(MeshSpec(sp=4), checkpoints[T2V], make_job(checkpoints[T2V], prompt="a", height=48, width=80))
    check_use(MeshSpec(dp=3, cfg=2), checkpoints[T2V], some, loaded=True)
    assert not recwarn.list


def test_a_loaded_pipeline_takes_a_call_that_leaves_devices_idle_and_tells(checkpoints):
    """Its next call may give them work."""
    with pytest.warns(UserWarning) as told:
        job = make_job(checkpoints[T2V], prompt="a", guidance_scale=1)
        check_use(MeshSpec(dp=4, cfg=2), checkpoints[T2V], job, loaded=True)
    assert [str(one.message) for one in told] == [
        "mesh dp=4,cfg=2 deals videos to 4 groups of devices and this call has 1 video: the others are idle",
        "mesh dp=4,cfg=2 has devices for the negative prompts and no video of this call is guided: those are idle",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": 5}, "prompt=5 must be a text"),
        ({"prompt": ["a", None]}, "prompt=None must be a text"),
        ({"negative_prompt": 5}, "negative_prompt=5 must be a text"),
        ({"seed": 1.5}, "seed=1.5 must be a whole number"),
        ({"seed": "1"}, "seed='1' must be a whole number"),
        ({"num_inference_steps": 4.0}, "num_inference_steps=4.0 must be a whole number"),
        ({"num_frames": "9"}, "num_frames='9' must be a whole number"),
        ({"height": 64.0, "width": 64}, "height=64.0 must be a whole number"),
        ({"guidance_scale": "4"}, "guidance_scale='4' must be a number"),
        ({"sampler": 3}, "sampler=3 must be a text"),
        ({"timesteps": 4}, "timesteps=4 must be a list of numbers"),
        ({"preset": ["official"]}, "preset=['official'] must be a text"),
        ({"timesteps": ["1000", "500"]}, "timesteps='1000' must be a number"),
        ({"sampler": "renoise", "timesteps": [1000, None]}, "timesteps=[1000, nan]: sampler='renoise' takes"),
    ],
)
def test_a_value_of_another_kind_is_refused_in_a_sentence(checkpoints, arguments, words):
    plain = inspect.unwrap(make_job)  # without the type checks of the tests, whose own refusal would come first
    with pytest.raises(ValueError) as caught:
        plain(checkpoints[T2V], **{"prompt": "a"} | arguments)
    assert words in str(caught.value)
    assert_one_sentence(str(caught.value))
