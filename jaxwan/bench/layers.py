"""One transformer layer, by slope: programs of 2 and of 6 layers, whose difference is 4 layers and nothing else."""

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxwan.bench.compiling import REASONS
from jaxwan.bench.dit import random_text
from jaxwan.bench.item import TERA, Item, dtype
from jaxwan.bench.measure import card_log, compiled, memory, random_input, random_module, seconds_in_turns, seconds_of
from jaxwan.bench.presets import Preset
from jaxwan.bench.profile import profile_rows
from jaxwan.bench.report import Row
from jaxwan.flops import TransformerFlops
from jaxwan.models.transformer import WanTransformer, token_grid

FEW, MORE = 2, 6  # layers


class Forward(NamedTuple):
    """The whole forward of a model with so many layers, compiled."""

    run: Callable[[], Any]
    executable: Any
    compile_seconds: float
    tflop: float


def make_forwards(preset: Preset, depths: tuple[int, ...]) -> dict[int, Forward]:
    """Forwards of one random model that run its first layers only: depth -> program."""
    cfg = preset.with_layers(max(depths)).transformer
    graph, weights = random_module(lambda: WanTransformer(cfg, dtype=dtype(), rngs=nnx.Rngs(0)))
    latents = random_input(4, 1, *preset.latent_shape, cfg.in_channels, dtype=jnp.float32)
    text = random_text(3, 1, width=cfg.text_dim)
    arguments = weights, latents, jnp.full((1, preset.timesteps), 500.0), text
    return {depth: _forward(preset.with_layers(depth), graph, arguments) for depth in depths}


def _forward(preset: Preset, graph: Any, arguments: tuple) -> Forward:
    def forward(weights, latents, timesteps, text):
        model = nnx.merge(graph, weights)
        grid = token_grid(preset.transformer, latents.shape[1:])
        temb, modulation = model.embed_time(timesteps)
        rows, context = jnp.arange(preset.transformer.num_layers), model.embed_context(text, None)
        x = model.run_blocks(model.embed_latents(latents), rows, context, modulation, grid)
        return model.head(x, temb, grid)

    executable, took = compiled(jax.jit(forward), *arguments)
    return Forward(lambda: executable(*arguments), executable, took, preset.forward.total / TERA)


def slope(few: list[float], more: list[float]) -> list[float]:
    """Seconds of a layer, of each pair of runs."""
    return [(long - short) / (MORE - FEW) for short, long in zip(few, more, strict=True)]


def layer_tflop(forward: TransformerFlops, preset: Preset) -> float:
    """Work of one layer of such a forward."""
    return (forward.total - forward.ends) / preset.transformer.num_layers / TERA


def attention_that_ran(executable: Any) -> str:
    """Which implementation of attention is in a program."""
    calls = {"cuDNN": "__cudnn$fmha", "splash (TPU)": "splash_mha"}
    return next((name for name, call in calls.items() if call in executable.as_text()), "XLA")


def measure_block(item: Item) -> Iterator[Row]:
    """Both programs in turns, their difference, and with a profile folder where the time goes in the longer one."""
    preset = item.preset
    forwards = make_forwards(preset, (FEW, MORE))
    with card_log() as card:
        seconds = seconds_in_turns({depth: f.run for depth, f in forwards.items()}, item.runs)
    for depth, forward in forwards.items():
        yield item.row(
            f"{depth} layers", seconds=seconds[depth], compile_seconds=forward.compile_seconds, tflop=forward.tflop,
            memory=memory(forward.executable), details=card,
        )  # fmt: skip
    flops, layers = preset.forward, preset.transformer.num_layers
    layer = slope(seconds[FEW], seconds[MORE])
    yield item.row(
        "a layer", seconds=layer, tflop=layer_tflop(preset.forward, preset),
        details={"attention": attention_that_ran(forwards[MORE].executable),
                 "linear TFLOP": flops.linear / layers / TERA,
                 "self-attention TFLOP": flops.self_attention / layers / TERA,
                 f"{layers} such layers, extrapolated s": layers * median(layer)},
    )  # fmt: skip
    if item.profile:
        yield from profile_rows(item, forwards[MORE])


def measure_flag(item: Item) -> Iterator[Row]:
    """The longer program under the XLA flag that this process was started with."""
    forward = make_forwards(item.preset, (MORE,))[MORE]
    with card_log() as card:
        seconds = seconds_of(forward.run, item.runs)
    reason = REASONS.get(item.form.removesuffix(" again"), "asked for")
    yield item.row(
        seconds=seconds, compile_seconds=forward.compile_seconds, tflop=forward.tflop,
        memory=memory(forward.executable), details={"why": reason} | card,
    )  # fmt: skip
