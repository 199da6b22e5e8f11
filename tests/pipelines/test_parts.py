"""The pipeline's parts on their own against diffusers' modules: texts, VAE and single model evaluations; bfloat16."""

import shutil
from dataclasses import asdict, replace

import jax
import numpy as np
import pytest
import runs
import torch
from diffusers import WanImageToVideoPipeline
from diffusers import WanPipeline as DiffusersPipeline
from oracle import relative_error
from PIL import Image, ImageOps
from published import edit
from runs import IMAGE, LAST_IMAGE, NEGATIVES, PROMPTS, compilations, picture, run_diffusers, run_ours, unit_noise

from jaxwan.models.tiles import Tiling
from jaxwan.pipelines.media import to_uint8
from jaxwan.pipelines.pipeline import WanPipeline

# An independent float32 implementation differs by 3e-6 to 5e-6 in a forward, by 7e-7 in the VAE.
FORWARD, VAE = 2e-5, 1e-5

GRID = (3, 6, 4)  # latents (T, H, W)
TEXTS = [*PROMPTS, *NEGATIVES, "", "  a&amp;b <br> ‘c’ "]


def embeddings(width: int = 24, batch: int = 2) -> np.ndarray:
    return unit_noise((batch, 512, width), seed=3)


def forward(model, latents, timestep, text, image_rows=None) -> np.ndarray:
    with torch.no_grad():
        return model(
            torch.as_tensor(latents), torch.as_tensor(timestep), torch.from_numpy(text), image_rows, return_dict=False
        )[0].numpy()  # fmt: skip


@pytest.mark.parametrize("family", ["t2v-A14B", "2.1-t2v"])  # text encoders in bfloat16 and in float32 on disk
def test_prompt_embeddings_equal_diffusers(reference, pipeline, family):
    expected, _ = reference(family).encode_prompt(TEXTS, do_classifier_free_guidance=False, max_sequence_length=512)
    actual = pipeline(family).encode_prompt(TEXTS)
    errors = [relative_error(a, e) for a, e in zip(actual, expected.detach().numpy(), strict=True)]
    print("measured", max(errors))
    assert max(errors) < FORWARD


def test_prompt_embeddings_do_not_depend_on_the_batch(pipeline):
    pipe = pipeline("t2v-A14B")
    batch = np.asarray(pipe.encode_prompt(TEXTS))
    for text, rows in zip(TEXTS, batch, strict=True):
        np.testing.assert_array_equal(np.asarray(pipe.encode_prompt([text]))[0], rows)


def test_given_embeddings_stand_for_the_texts_they_were_made_of(pipeline):
    pipe = pipeline("t2v-A14B")
    call = dict(
        height=32, width=48, num_frames=5, num_inference_steps=2, guidance_scale=4.0, seed=1, output_type="latent"
    )
    by_text = pipe(prompt=PROMPTS[0], negative_prompt=NEGATIVES[0], **call).latents
    rows = np.asarray(pipe.encode_prompt([PROMPTS[0], NEGATIVES[0]]))
    by_rows = pipe(prompt_embeds=rows[:1], negative_prompt_embeds=rows[1:], **call).latents
    np.testing.assert_array_equal(by_text, by_rows)


def without(folder, path, *parts, **index):
    """A copy of a checkpoint that lacks some of its parts."""
    shutil.copytree(folder, path, ignore=shutil.ignore_patterns(*parts))
    edit(path / "model_index.json", **dict.fromkeys(parts, [None, None]), **index)
    return path


def test_a_checkpoint_without_a_text_encoder_takes_embeddings_alone(folder, pipeline, tmp_path):
    pipe = WanPipeline.from_pretrained(
        without(folder("t2v-A14B"), tmp_path / "model", "text_encoder", "tokenizer"), None, "float32", progress=False,
        warmup=dict(num_frames=1, height=16, width=16),
    )  # fmt: skip
    rows = dict(prompt_embeds=unit_noise((1, 512, 24)), negative_prompt_embeds=unit_noise((1, 512, 24), seed=1))
    call = dict(height=16, width=16, num_frames=1, num_inference_steps=2, seed=1, output_type="latent")
    np.testing.assert_array_equal(pipe(**rows, **call).latents, pipeline("t2v-A14B")(**rows, **call).latents)
    for refused, words in (
        (dict(prompt="a cat"), "prompt='a cat': this checkpoint has no text encoder: give prompt_embeds"),
        (dict(prompt_embeds=rows["prompt_embeds"]), "give negative_prompt_embeds too, or guidance_scale=1"),
    ):
        with pytest.raises(ValueError, match=words):
            pipe(**refused, **call)
    with pytest.raises(ValueError, match="model has no text encoder: encode prompts with another pipeline"):
        pipe.encode_prompt("a cat")


@pytest.mark.parametrize("shard_size", ["10GB", "400KB"])
def test_a_variant_that_diffusers_saved_loads_by_its_name(reference, pipeline, tmp_path, shard_size):
    reference("t2v-A14B").save_pretrained(tmp_path, variant="fp16", max_shard_size=shard_size)
    for name in ("scheduler", "tokenizer"):  # in the published forms
        shutil.copytree(pipeline("t2v-A14B").checkpoint.folder / name, tmp_path / name, dirs_exist_ok=True)
    loaded = WanPipeline.from_pretrained(tmp_path, None, "float32", variant="fp16", progress=False).parts
    expected = pipeline("t2v-A14B").parts
    assert loaded.encode_text is not None and expected.encode_text is not None
    for ours, theirs in (
        (loaded.denoiser.weights, expected.denoiser.weights), (loaded.coder.state, expected.coder.state),
        (loaded.encode_text.weights, expected.encode_text.weights),
    ):  # fmt: skip
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize(("absent", "boundary"), [("transformer", 1.0), ("transformer_2", 0.0)])
def test_one_expert_alone_equals_diffusers_and_takes_half_the_memory(folder, pipeline, tmp_path, absent, boundary):
    path, both = without(folder("t2v-A14B"), tmp_path / "model", absent, boundary_ratio=boundary), pipeline("t2v-A14B")
    pipe = WanPipeline.from_pretrained(path, None, "float32", progress=False)
    sizes = [sum(x.nbytes for x in jax.tree.leaves(p.parts.denoiser.weights)) for p in (pipe, both)]
    assert 2 * sizes[0] == sizes[1]
    latents = unit_noise((1, 16, 1, 2, 2))
    call = dict(height=16, width=16, num_frames=1, num_inference_steps=2, latents=latents, guidance_scale=2.0)
    rows = dict(prompt_embeds=embeddings(batch=1), negative_prompt_embeds=embeddings(batch=1) / 2)
    reference = DiffusersPipeline.from_pretrained(path, torch_dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    torch_call = {name: torch.from_numpy(x) for name, x in (rows | {"latents": latents}).items()}
    expected = reference(**call | torch_call, output_type="latent").frames.numpy()
    assert relative_error(pipe(**call, **rows, output_type="latent").latents, expected) < 1e-4


@pytest.mark.parametrize(("family", "height", "width"), [("2.1-t2v", 32, 48), ("ti2v-5B", 64, 96)])
def test_encode_and_decode_equal_diffusers_vae_with_normalisation(reference, pipeline, family, height, width):
    pixels = np.random.default_rng(0).random((2, 5, height, width, 3), np.float32)
    expected = runs.encode(reference(family), torch.from_numpy(pixels).permute(0, 4, 1, 2, 3) * 2 - 1)
    actual = pipeline(family).encode(pixels)
    assert actual.shape == expected.shape and actual.dtype == np.float32
    frames = pipeline(family).decode(actual)
    errors = [
        relative_error(actual, expected.numpy()), relative_error(frames, runs.decode(reference(family), expected))
    ]  # fmt: skip
    print("measured", *errors)
    assert frames.shape == pixels.shape and max(errors) < VAE
    tensors = torch.tensor(pixels, requires_grad=True), torch.tensor(actual, requires_grad=True)
    np.testing.assert_array_equal(pipeline(family).encode(tensors[0]), actual)
    np.testing.assert_array_equal(pipeline(family).decode(tensors[1]), frames)


def test_bytes_and_pictures_are_the_rounded_frames(pipeline):
    pipe, latents = pipeline("2.1-t2v", "pp=2"), unit_noise((2, 16, 2, 4, 6))
    frames, made = pipe.decode(latents), pipe.decode(latents, output_type="uint8")
    assert made.dtype == np.uint8 and made.std() > 10
    np.testing.assert_array_equal(made, to_uint8(frames))
    np.testing.assert_array_equal(np.stack(pipe.decode(latents, output_type="pil")), made)
    with pytest.raises(ValueError, match="output_type='latent' decodes nothing"):
        pipe.decode(latents, output_type="latent")


def test_tiles_equal_diffusers_tiles_in_a_call_and_on_their_own(reference, pipeline):
    """Of both directions; an output is decoded as its call says."""
    vae, pipe, tiling = reference("2.1-t2v").vae, pipeline("2.1-t2v", "pp=2"), Tiling(32, 32, 32, 16)
    video = np.random.default_rng(0).random((1, 1, 32, 48, 3), np.float32)
    vae.enable_tiling(*asdict(tiling).values())
    try:
        latents = runs.encode(reference("2.1-t2v"), torch.from_numpy(video).permute(0, 4, 1, 2, 3) * 2 - 1)
        frames = runs.decode(reference("2.1-t2v"), latents)
    finally:
        vae.use_tiling = False
    assert relative_error(pipe.encode(video, tiling=tiling), latents.numpy()) < VAE
    assert relative_error(pipe.decode(latents, tiling=asdict(tiling)), frames) < VAE
    assert relative_error(pipe.decode(latents), frames) > 1e3 * VAE  # the exact one is another
    call = dict(video=video[0], prompt="a", height=32, width=48, seed=1, num_inference_steps=2, tiling=tiling)
    tiled, latent = pipe(**call), pipe(**call, output_type="latent")
    assert tiled.settings[0]["call"]["tiling"] == asdict(tiling)
    assert relative_error(tiled.latents, pipe(**call | dict(tiling=None)).latents) > 1e-3  # the source was tiled too
    for made in (pipe.decode(latent).frames, pipe.decode(latent.latents, tiling=tiling)):
        np.testing.assert_array_equal(made, tiled.frames)
    with pytest.raises(ValueError, match="an Output is decoded with the tiling of its call"):
        pipe.decode(latent, tiling=tiling)


def test_fit_is_what_the_models_see(pipeline):
    """The VAE the crop or the bars, CLIP the crop or the whole image without bars."""
    image, size = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 100, 3), dtype=np.uint8)), (48, 32)

    def inputs(image, **fit):
        call = dict(height=size[1], width=size[0], num_frames=5, num_inference_steps=2, seed=1)
        return pipeline("2.1-i2v").prepare_encode("a", image=image, **call, **fit).entries[0].inputs

    plain, lanczos = inputs(image), Image.Resampling.LANCZOS
    crop, pad = inputs(image, fit="crop"), inputs(image, fit="pad")
    np.testing.assert_array_equal(crop.channels, inputs(ImageOps.fit(image, size, lanczos)).channels)
    np.testing.assert_array_equal(crop.image, inputs(image.crop((12, 0, 87, 50))).image)
    np.testing.assert_array_equal(pad.channels, inputs(ImageOps.pad(image, size, lanczos)).channels)
    np.testing.assert_array_equal(pad.image, plain.image)
    assert not np.array_equal(crop.image, plain.image)


def test_predict_chooses_the_expert_by_each_samples_timestep(reference, pipeline):
    x, text, pipe, modules = unit_noise((2, 16, *GRID)), embeddings(), pipeline("t2v-A14B"), reference("t2v-A14B")
    high = forward(modules.transformer, x, [875.0, 875.0], text)  # the boundary itself is high noise
    low = forward(modules.transformer_2, x, [874.5, 874.5], text)
    assert relative_error(pipe.predict(x, 875, text), high) < FORWARD
    mixed = pipe.predict(x, np.array([874.5, 875.0]), text)
    assert relative_error(mixed[0], low[0]) < FORWARD and relative_error(mixed[1], high[1]) < FORWARD
    tensors = torch.tensor(x, requires_grad=True), torch.tensor([874.5, 875]), torch.tensor(text)
    np.testing.assert_array_equal(pipe.predict(*tensors), mixed)


def test_predict_takes_timesteps_of_samples_latent_frames_and_tokens(reference, pipeline):
    x, text, model = unit_noise((2, 48, *GRID)), embeddings(), reference("ti2v-5B").transformer
    frames, tokens = GRID[0], GRID[1] * GRID[2] // 4
    rng = np.random.default_rng(0)
    per_frame = rng.uniform(0, 1000, (2, frames)).astype(np.float32)
    per_token = rng.uniform(0, 1000, (2, frames * tokens)).astype(np.float32)
    cases = {
        "number": (321, np.full(2, 321.0, np.float32)),
        "samples": (np.array([999.5, 1.0]), np.float32([999.5, 1.0])),
        "latent frames": (per_frame, per_frame.repeat(tokens, axis=1)),
        "tokens": (per_token, per_token),
    }
    errors = {
        name: relative_error(pipeline("ti2v-5B").predict(x, given, text), forward(model, x, as_tokens, text))
        for name, (given, as_tokens) in cases.items()
    }
    split = pipeline("ti2v-5B", "sp=2,tp=2").predict(x, per_token, text)  # each device takes those of its own tokens
    errors["split tokens"] = relative_error(split, forward(model, x, per_token, text))
    print("measured", errors)
    assert max(errors.values()) < FORWARD


@pytest.mark.parametrize(
    ("family", "images"),
    [
        ("i2v-A14B", {"image": IMAGE}),
        ("i2v-A14B", {"image": IMAGE, "last_image": LAST_IMAGE}),
        ("2.1-i2v", {"image": IMAGE}),
        ("2.1-flf2v", {"image": IMAGE, "last_image": LAST_IMAGE}),
    ],
)
def test_predict_with_images_beside_the_latents_equals_diffusers(reference, pipeline, family, images):
    x, text, pipe = unit_noise((2, 16, *GRID)), embeddings(), reference(family)
    pixels = {
        key: pipe.video_processor.preprocess(value, height=GRID[1] * 8, width=GRID[2] * 8)
        for key, value in images.items()
    }
    with torch.no_grad():
        _, condition = pipe.prepare_latents(
            batch_size=2, height=GRID[1] * 8, width=GRID[2] * 8, num_frames=GRID[0] * 4 - 3, dtype=torch.float32,
            latents=torch.from_numpy(x), **pixels,
        )  # fmt: skip
        rows = None
        if pipe.image_encoder is not None:
            rows = pipe.encode_image(list(images.values())).repeat(2, 1, 1)
    given = np.concatenate([x, condition.numpy()], axis=1)
    expected = forward(pipe.transformer, given, [950.0, 950.0], text, rows)
    error = relative_error(pipeline(family).predict(x, 950.0, text, **images), expected)
    print("measured", error)
    assert error < FORWARD


@pytest.mark.parametrize("expanded", [None, "latent frames", "tokens"])
def test_predict_shows_ti2v_its_image_as_a_clean_first_frame(reference, pipeline, expanded):
    x, text = unit_noise((2, 48, *GRID)), embeddings()
    pipe, size = reference("ti2v-5B", cls=WanImageToVideoPipeline), dict(height=GRID[1] * 16, width=GRID[2] * 16)
    tokens = GRID[1] * GRID[2] // 4
    clean = runs.encode(pipe, pipe.video_processor.preprocess(IMAGE, **size)[:, :, None])
    shown = x.copy()
    shown[:, :, :1] = clean.numpy()
    timesteps = np.full((2, GRID[0] * tokens), 700.0, np.float32)
    given = {None: 700.0, "latent frames": timesteps[:, : GRID[0]].copy(), "tokens": timesteps.copy()}[expanded]
    timesteps[:, :tokens] = 0
    expected = forward(pipe.transformer, shown, timesteps, text)
    error = relative_error(pipeline("ti2v-5B").predict(x, given, text, image=IMAGE), expected)
    print("measured", error)
    assert error < FORWARD


def test_bfloat16_stays_within_twice_diffusers_own_error(reference, pipeline):
    arguments = dict(
        prompt=PROMPTS[0], negative_prompt=NEGATIVES[0], height=32, width=48, num_frames=5, num_inference_steps=5,
        guidance_scale=4.0, guidance_scale_2=3.0, latents=unit_noise((1, 16, 2, 4, 6)),
    )  # fmt: skip
    exact = run_diffusers(reference("t2v-A14B"), **arguments)
    theirs = run_diffusers(reference("t2v-A14B", torch.bfloat16), **arguments)
    ours = run_ours(pipeline("t2v-A14B", dtype="bfloat16"), **arguments)
    for name in ("latents", "frames"):
        values = [getattr(run, name) for run in (ours, theirs, exact)]
        errors = relative_error(values[0], values[2]), relative_error(values[1], values[2])
        print("measured", name, *errors)
        assert 1e-3 < errors[0] < 2 * errors[1]  # and it did run in bfloat16


def test_a_second_call_with_clip_and_other_images_compiles_nothing(pipeline):
    pipe, size = pipeline("2.1-flf2v"), dict(height=32, width=48, num_frames=5, num_inference_steps=3)
    pipe(prompt=PROMPTS[0], image=IMAGE, last_image=LAST_IMAGE, guidance_scale=4.0, seed=1, **size)
    others = dict(image=picture(4, 100, 31), last_image=picture(5, 30, 99))
    assert compilations(lambda: pipe(prompt=PROMPTS[1], guidance_scale=2.0, seed=2, **others, **size)) == 0


def test_what_a_model_made_nan_is_told_at_the_callers_line(pipeline):
    """Of a damaged checkpoint, or one whose numbers are too large for the dtype."""
    pipe = pipeline("2.1-t2v")
    nan = jax.tree.map(lambda x: x * np.nan, pipe.parts.denoiser.weights.ends)
    weights = pipe.parts.denoiser.weights._replace(ends=nan)
    damaged = WanPipeline(pipe.checkpoint, pipe.parts._replace(denoiser=replace(pipe.parts.denoiser, weights=weights)))
    call = dict(prompt="x", height=32, width=48, num_frames=5, num_inference_steps=1, seed=1, output_type="latent")
    with pytest.warns(UserWarning, match="the model computed NaN") as told:
        damaged(**call)
    assert told[-1].filename == __file__
    with pytest.warns(UserWarning, match="negative_prompt has no effect") as told:
        pipe(**call, negative_prompt="y", guidance_scale=1.0)
    assert told[-1].filename == __file__
