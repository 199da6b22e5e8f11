"""The pipeline's parts on their own against diffusers' modules: texts, VAE and single model evaluations; bfloat16."""

import numpy as np
import pytest
import runs
import torch
from diffusers import WanImageToVideoPipeline
from oracle import relative_error
from runs import IMAGE, LAST_IMAGE, NEGATIVES, PROMPTS, compilations, picture, run_diffusers, run_ours, unit_noise

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


def test_predict_chooses_the_expert_by_each_samples_timestep(reference, pipeline):
    x, text, pipe, modules = unit_noise((2, 16, *GRID)), embeddings(), pipeline("t2v-A14B"), reference("t2v-A14B")
    high = forward(modules.transformer, x, [875.0, 875.0], text)  # the boundary itself is high noise
    low = forward(modules.transformer_2, x, [874.5, 874.5], text)
    assert relative_error(pipe.predict(x, 875, text), high) < FORWARD
    mixed = pipe.predict(x, np.array([874.5, 875.0]), text)
    assert relative_error(mixed[0], low[0]) < FORWARD and relative_error(mixed[1], high[1]) < FORWARD


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
