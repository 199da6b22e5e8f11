"""The VAE on whole videos, and the text encoder."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxwan.bench.item import TERA, Item, dtype
from jaxwan.bench.measure import card_log, compiled, memory, random_input, random_module, random_state, seconds_of
from jaxwan.bench.presets import Preset
from jaxwan.bench.report import Row
from jaxwan.flops import TEXT_ROWS, text_encoder_flops, vae_decode_flops, vae_encode_flops
from jaxwan.models.text_encoder import UMT5Encoder
from jaxwan.models.vae import VAE
from jaxwan.models.video_coder import VideoCoder

DIRECTIONS = ("decode", "encode")


class Coding(NamedTuple):
    """One direction of the VAE, compiled for a preset's size."""

    video: Callable[[], Any]  # a whole video, chunk by chunk; its last chunk
    executables: tuple[Any, Any]  # of the first latent frame, and of each of the others
    compile_seconds: float
    tflop: float


def make_codings(preset: Preset, vae_dtype: str, directions: tuple[str, ...] = DIRECTIONS) -> Iterator[Coding]:
    """The directions, one after the other, with the same random weights."""
    graph, weights = random_module(lambda: VAE(preset.vae, dtype=jnp.dtype(vae_dtype), rngs=nnx.Rngs(0)))
    coder = VideoCoder(nnx.merge(graph, weights))
    t, h, w = preset.latent_shape
    shapes = {"decode": (t, h, w, preset.vae.z_dim), "encode": (*preset.size, 3)}
    counts = {"decode": vae_decode_flops, "encode": vae_encode_flops}
    for direction in directions:
        _, *pixels = shapes[direction]
        steps = (1, 1) if direction == "decode" else (1, 4)
        first, later = (jnp.tanh(random_input(5, 1, step, *pixels, dtype=jnp.float32)) for step in steps)
        # not those that make bytes of frames
        programs = (one for one in coder.programs(direction, (1, *shapes[direction])) if one[0].startswith("VAE"))
        (go, took_later), (begin, took_first) = (compiled(function, *given) for _, function, given in programs)

        def video(begin=begin, go=go, first=first, later=later):
            cache, out = begin(coder.state, None, first)
            for _ in range(t - 1):
                cache, out = go(coder.state, cache, later)
            return out

        tflop = counts[direction](preset.vae, (t, h, w)) / TERA
        yield Coding(video, (begin, go), took_first + took_later, tflop)


def measure_vae(item: Item) -> Iterator[Row]:
    """Whole videos, chunk by chunk: the first latent frame's program and the one of all others."""
    for direction, coding in zip(DIRECTIONS, make_codings(item.preset, item.form), strict=True):
        with card_log() as card:
            seconds = seconds_of(coding.video, item.runs)
        yield item.row(
            direction, seconds=seconds, compile_seconds=coding.compile_seconds, memory=memory(*coding.executables),
            tflop=coding.tflop, details={"frames": item.preset.size[0]} | card,
        )  # fmt: skip


def text_program(preset: Preset) -> tuple[Any, nnx.State, tuple[jax.Array, jax.Array]]:
    """The text encoder as a jitted function, its abstract weights, and one prompt's (tokens, mask), all 512 real."""
    cfg = preset.text_encoder
    graph, abstract = nnx.split(nnx.eval_shape(lambda: UMT5Encoder(cfg, dtype=dtype(), rngs=nnx.Rngs(0))))
    tokens = jax.random.randint(jax.random.key(7), (1, TEXT_ROWS), 0, cfg.vocab_size)
    encode = jax.jit(lambda state, tokens, mask: nnx.merge(graph, state)(tokens, mask))
    return encode, abstract, (tokens, jnp.ones_like(tokens))


def measure_text(item: Item) -> Iterator[Row]:
    """One prompt through UMT5, padding included."""
    encode, abstract, prompt = text_program(item.preset)
    weights = random_state(abstract)
    executable, took = compiled(encode, weights, *prompt)
    with card_log() as card:
        seconds = seconds_of(lambda: executable(weights, *prompt), item.runs)
    yield item.row(
        seconds=seconds, compile_seconds=took, tflop=text_encoder_flops(item.preset.text_encoder) / TERA,
        memory=memory(executable), details=card,
    )  # fmt: skip
