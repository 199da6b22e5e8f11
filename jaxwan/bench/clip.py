"""Whole clips: what a call of the pipeline takes, and a whole generation, measured or extrapolated."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np

from jaxwan.bench.dit import FLOW_SHIFT, GUIDANCE, Ring, random_text, random_weights
from jaxwan.bench.item import TERA, Item, dtype
from jaxwan.bench.measure import (
    card_log,
    compilations,
    compiled,
    memory,
    random_state,
    seconds_of,
)
from jaxwan.bench.presets import BOUNDARY, Preset
from jaxwan.bench.report import Row
from jaxwan.bench.vae import Coding, make_codings, text_program
from jaxwan.config import recognise
from jaxwan.flops import text_encoder_flops
from jaxwan.pipelines.checkpoint import Checkpoint
from jaxwan.pipelines.parts import abstract_parts
from jaxwan.pipelines.pipeline import WanPipeline
from jaxwan.schedulers.config import SamplerDefaults
from jaxwan.sharding.mesh import MeshSpec, make_mesh

STEPS_AN_EXPERT = 2  # measured at full size
VAE_DTYPE = "float32"  # the pipeline's default


# The pipeline as it is called


def make_checkpoint(preset: Preset) -> Checkpoint:
    """The configurations of a preset, as if read from a folder; its size and steps are the defaults."""
    frames, height, width = preset.size
    variant = recognise(preset.transformer, preset.experts, preset.first_frame)
    return Checkpoint(
        folder=Path("random"),
        transformer=preset.transformer,
        experts=("transformer", "transformer_2")[: preset.experts],
        vae=preset.vae,
        text_encoder=preset.text_encoder,
        image_encoder=None,
        sampler=SamplerDefaults("unipc", 2, FLOW_SHIFT),
        boundary_ratio=BOUNDARY if preset.experts == 2 else None,
        variant=variant,
        defaults=replace(
            variant.defaults, height=height, width=width, num_frames=frames, num_inference_steps=preset.steps,
            guidance_scale=GUIDANCE, guidance_scale_2=GUIDANCE if preset.experts == 2 else None,
        ),
    )  # fmt: skip


def random_pipeline(preset: Preset, spec: MeshSpec | None = None) -> WanPipeline:
    """A pipeline with random weights, on one device or on a mesh. It has no tokenizer or text encoder: prompts come as
    embeddings."""
    mesh, checkpoint = make_mesh(spec or MeshSpec()), make_checkpoint(preset)
    parts = abstract_parts(checkpoint, mesh, dtype(), VAE_DTYPE)._replace(encode_text=None)
    vae = random_state(parts.coder.state)
    return WanPipeline(checkpoint, parts.filled({"vae": vae}, random_weights(preset, mesh)), progress=False)


def random_prompt(preset: Preset) -> dict[str, np.ndarray]:
    """Embeddings of a prompt and a negative one, as arguments of a call."""
    return {
        name: np.asarray(random_text(seed, 1, width=preset.transformer.text_dim))
        for seed, name in enumerate(("prompt_embeds", "negative_prompt_embeds"), 8)
    }


def measure_pipeline(item: Item) -> Iterator[Row]:
    """Calls of WanPipeline from embeddings to frames: the first compiles, the others must not, whatever they ask for.

    At full size of two steps each, else of all.
    """
    preset = item.preset
    pipe, prompt = random_pipeline(preset), random_prompt(preset)
    steps = 2 if preset.needs_accelerator else preset.steps
    calls: dict[str, dict[str, Any]] = {
        "first call": {"num_inference_steps": steps},
        "second call": {"num_inference_steps": steps},
        "other seed, steps, sampler, shift": {
            "num_inference_steps": steps - 1, "seed": 7, "sampler": "dpm++2m", "flow_shift": 3.0,
        },
    }  # fmt: skip
    for part, arguments in calls.items():
        outputs = []
        with compilations() as programs:
            seconds = seconds_of(lambda a=arguments, o=outputs: o.append(pipe(**prompt, **({"seed": 1} | a))), 1, 0)
        stages = {f"{name} s": s for name, s in outputs[0].seconds.items() if name != "compile"}
        yield item.row(
            part, seconds=seconds, compile_seconds=outputs[0].seconds.get("compile"), memory=memory(),
            details={"steps": arguments["num_inference_steps"], "programs compiled": len(programs)} | stages,
        )  # fmt: skip


# A generation, end to end


def measure_e2e(item: Item) -> Iterator[Row]:
    """A prompt and a negative one to frames. At full size from two steps of each expert, labelled so; else whole."""
    preset, whole = item.preset, not item.preset.needs_accelerator
    text = _encoder(preset)
    steps = preset.steps if whole else STEPS_AN_EXPERT * preset.experts
    ring = Ring(preset, steps)
    (coding,) = make_codings(preset, VAE_DTYPE, ("decode",))
    if whole:
        yield _whole(item, text, ring, coding, steps)
        return
    encode = seconds_of(text, item.runs)
    yield item.row("text", seconds=encode, tflop=text_encoder_flops(preset.text_encoder) / TERA)
    with card_log() as card:
        denoise = seconds_of(lambda: ring.run(2), steps, warmups=0)
    ring.check()
    yield item.row(
        "step", seconds=denoise, compile_seconds=ring.compile_seconds, tflop=2 * ring.tflop,
        memory=memory(ring.executable),
        details={"guided steps measured": f"{STEPS_AN_EXPERT} of each of {preset.experts} experts"} | card,
    )  # fmt: skip
    with card_log() as card:
        decode = seconds_of(coding.video, 1)
    yield item.row(
        "decode", seconds=decode, compile_seconds=coding.compile_seconds, tflop=coding.tflop,
        memory=memory(*coding.executables), details={"dtype": VAE_DTYPE} | card,
    )  # fmt: skip
    seconds = 2 * median(encode) + preset.steps * median(denoise) + median(decode)
    yield item.row("whole clip", details={
        "seconds, extrapolated": seconds, "from": f"{steps} of {preset.steps} steps; not measured as a whole",
    })  # fmt: skip


def _whole(item: Item, text: Any, ring: Ring, coding: Coding, steps: int) -> Row:
    """A generation measured as a whole. Its stages wait for each other, but do not read each other's output."""

    def generate():
        for _ in range(2):
            text()
        ring.start(steps)
        jax.block_until_ready(ring.run(ring.ticks))
        return coding.video()

    with card_log() as card:
        seconds = seconds_of(generate, item.runs)
    ring.check()
    text_tflop = text_encoder_flops(item.preset.text_encoder) / TERA
    return item.row(
        "whole clip", seconds=seconds, compile_seconds=ring.compile_seconds + coding.compile_seconds,
        tflop=2 * text_tflop + 2 * steps * ring.tflop + coding.tflop,
        memory=memory(ring.executable, *coding.executables),
        details={"measured": f"as a whole, {steps} guided steps, {item.preset.experts} experts"} | card,
    )  # fmt: skip


def _encoder(preset: Preset) -> Any:
    """A call that encodes one prompt."""
    encode, abstract, prompt = text_program(preset)
    weights = random_state(abstract)
    executable, _ = compiled(encode, weights, *prompt)
    return lambda: jax.block_until_ready(executable(weights, *prompt))
