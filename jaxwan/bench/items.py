"""The measurements: each a function of a preset that yields rows. They run in a process of their own."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxwan.bench.measure import (
    card_log,
    compiled,
    memory,
    peak_rate,
    random_input,
    random_module,
    random_state,
    seconds_of,
    sustained,
)
from jaxwan.bench.presets import BOUNDARY, Preset
from jaxwan.bench.report import Row
from jaxwan.flops import TEXT_ROWS, text_encoder_flops, vae_decode_flops, vae_encode_flops
from jaxwan.kernels.attention import IMPLEMENTATIONS, attend, attention
from jaxwan.models.text_encoder import UMT5Encoder
from jaxwan.models.vae import VAE
from jaxwan.pipelines.condition import choose_expert, frame_timesteps
from jaxwan.pipelines.denoise import (
    RENOISINGS,
    WEIGHT_AXES,
    Controls,
    Denoiser,
    Inputs,
    Weights,
    abstract_weights,
    make_program,
    to_float32,
)
from jaxwan.pipelines.load import default_dtype
from jaxwan.schedulers.table import make_table, stack_tables
from jaxwan.sharding.mesh import MeshSpec, make_mesh, sharding
from jaxwan.sharding.ring import RingPlan, Turns

TERA = 1e12
CHECKED_ROWS = 256  # queries of an attention output that are compared with float32
FLOW_SHIFT = 5.0
LOOP_STEPS = 4  # of the short denoising run: one to warm up, then both experts
_NOT_HERE = (RuntimeError, ValueError, NotImplementedError)  # how JAX and cuDNN say that they cannot run something


@dataclass(frozen=True)
class Item:
    """One child process: what to measure, of which preset, in which of its forms."""

    kind: str
    preset: Preset
    form: str = ""  # attention: the implementation; VAE: the dtype

    @property
    def name(self) -> str:
        """The name of its (first) row."""
        return "/".join(filter(None, (self.kind, self.preset.name, self.form)))

    def predicted_seconds(self, runs: int) -> float:
        """A cautious guess, start and compilation included, at what Hopper cards have done elsewhere."""
        start, work = (30.0, self._tflop(runs) / 400) if self.preset.needs_accelerator else (8.0, 0.0)
        return start + work + 2 * self.preset.sustain * (self.kind in ("ceilings", "dit"))

    def _tflop(self, runs: int) -> float:
        preset = self.preset
        forward = preset.forward.total / TERA
        layer = preset.forward.self_attention / preset.transformer.num_layers / TERA
        decode = vae_decode_flops(preset.vae, preset.latent_shape) / TERA
        slow = 5 if self.form == "xla" else 1
        return {
            "ceilings": 0.0, "attention": layer * (runs + 1) * slow, "dit": forward * (runs + 1),
            "vae": 5 * decode * (runs + 1), "pipeline": 2 * LOOP_STEPS * forward + 5 * decode,
        }[self.kind]  # fmt: skip


def make_items(kind: str, presets: list[Preset]) -> list[Item]:
    """The items of a sub-command, in the order of what is worth knowing first."""
    first = presets[0]
    if kind == "ceilings":
        return [Item(kind, first)]
    if kind == "attention":
        return [Item(kind, preset, name) for preset in presets for name in IMPLEMENTATIONS]
    if kind == "vae":
        unique: dict[Any, Preset] = {}
        for preset in presets:
            unique.setdefault((preset.vae, preset.latent_shape), preset)
        return [Item(kind, preset, dtype) for preset in unique.values() for dtype in _vae_dtypes(preset)]
    if kind in ("dit", "pipeline"):
        return [Item(kind, preset) for preset in presets]
    several = [("ceilings", [first]), ("attention", [first]), ("dit", presets), ("vae", presets), ("pipeline", [first])]
    return [item for name, chosen in several for item in make_items(name, chosen)]


def _vae_dtypes(preset: Preset) -> tuple[str, ...]:
    return ("float32", "bfloat16") if preset.needs_accelerator else ("float32",)


def measure(item: Item, runs: int) -> Iterator[Row]:
    """The rows of an item; what cannot run here is a row that says why."""
    if item.preset.needs_accelerator and jax.default_backend() == "cpu":
        yield Row(item.name, "skipped", "a full-size preset needs an accelerator: --preset small is for a CPU")
        return
    functions = {"ceilings": _ceilings, "attention": _attention, "dit": _dit, "vae": _vae, "pipeline": _pipeline}
    try:
        yield from functions[item.kind](item, runs)
    except _NOT_HERE as error:
        yield Row(item.name, "failed", f"{type(error).__name__}: {str(error).strip()[:300]}")


def _measured(item: Item, part: str = "", **fields: Any) -> Row:
    return Row("/".join(filter(None, (item.name, part))), "ok", "", peak=peak_rate(), **fields)


def _dtype() -> Any:
    return jnp.dtype(default_dtype(jax.devices()[0]))


# Ceilings


def _ceilings(item: Item, runs: int) -> Iterator[Row]:
    preset = item.preset
    square = (preset.matmul,) * 3
    mlp = preset.tokens, preset.transformer.dim, preset.transformer.ffn_dim
    for part, (m, k, n) in (("square matmul", square), ("MLP matmul", mlp)):
        with card_log() as card:
            seconds, took = _matmul(m, k, n, preset.sustain)
        tflop = 2 * m * k * n / TERA
        yield _measured(
            item, part, seconds=seconds, compile_seconds=took, tflop=tflop, details={"shape": f"{m}x{k}x{n}"} | card
        )
    x = random_input(0, preset.copy_bytes // 2)
    copy, took = compiled(jax.jit(lambda x: -x), x)
    seconds = sustained(lambda: copy(x), preset.sustain / 3)
    speed = 2 * preset.copy_bytes / TERA / sorted(seconds)[len(seconds) // 2]
    yield _measured(item, "memory", seconds=seconds, compile_seconds=took, details={"TB/s read and written": speed})


def _matmul(m: int, k: int, n: int, duration: float) -> tuple[list[float], float]:
    """Seconds of each bfloat16 product [m, k] @ [k, n], held for `duration`; seconds to compile it."""
    left, right = random_input(1, m, k), random_input(2, k, n)
    product, took = compiled(jax.jit(jnp.matmul), left, right)
    return sustained(lambda: product(left, right), duration), took


def _ceiling(preset: Preset) -> float:
    """TFLOP/s of the square matrix product right now."""
    size = preset.matmul
    seconds, _ = _matmul(size, size, size, preset.sustain)
    return 2 * preset.matmul**3 / TERA / sorted(seconds)[len(seconds) // 2]


# Attention


def _attention(item: Item, runs: int) -> Iterator[Row]:
    """Of one layer, after its output was compared with float32 on some rows."""
    preset, cfg = item.preset, item.preset.transformer
    shape = 1, preset.tokens, cfg.num_attention_heads, cfg.attention_head_dim
    q, k, v = (random_input(seed, *shape) for seed in range(3))
    call = jax.jit(lambda q, k, v: attention(q, k, v, implementation=item.form))
    executable, took = compiled(call, q, k, v)
    rows = np.sort(np.random.default_rng(0).choice(preset.tokens, min(CHECKED_ROWS, preset.tokens), replace=False))
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(attend)(*(x.astype(jnp.float32) for x in (q[:, rows], k, v)))
    got = executable(q, k, v)[:, rows].astype(jnp.float32)
    error = float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected))
    if not error < 2e-2:  # bfloat16 weights and outputs round at 4e-3; NaN is no better than wrong
        raise RuntimeError(f"wrong result: relative error {error:.3g} against float32 on {len(rows)} rows")
    with card_log() as card:
        seconds = seconds_of(lambda: executable(q, k, v), runs)
    yield _measured(
        item, seconds=seconds, compile_seconds=took, memory=memory(executable),
        tflop=4 * preset.tokens**2 * cfg.dim / TERA,
        details={"shape": "x".join(map(str, shape)), "relative error": error} | card,
    )  # fmt: skip


# The DiT


def ring_inputs(preset: Preset, steps: int) -> tuple[Inputs, jax.Array]:
    """What one guided request reads, and its latents; random normal."""
    table = stack_tables([make_table("unipc", steps, FLOW_SHIFT)])
    shape = 1, *preset.latent_shape, preset.vae.z_dim
    has_first = np.zeros(1, bool) if preset.first_frame else None
    expert = choose_expert(table.timesteps, BOUNDARY if preset.experts == 2 else None)
    controls = Controls(
        table,
        frame_timesteps(table.timesteps, has_first, shape[1]),
        expert,
        np.full(expert.shape, 4.0),
        np.ones(1, bool),
    )
    first = None if has_first is None else np.zeros((1, 1, *shape[2:]), np.float32)
    text = random_input(3, 1, 2, TEXT_ROWS, preset.transformer.text_dim, dtype=jnp.float32)
    noise = np.zeros((1, RENOISINGS, *shape[1:]), np.float32)
    return Inputs(to_float32(controls), text, None, None, first, has_first, noise), random_input(
        4, *shape, dtype=jnp.float32
    )


def random_weights(preset: Preset, mesh: jax.sharding.Mesh) -> Weights:
    """Random parameters of all experts as the ring holds them, made on their devices."""
    _, abstract = abstract_weights(preset.transformer, preset.experts, mesh.shape["pp"], _dtype())
    return Weights(
        *(
            random_state(part, lead=lead, place=sharding(mesh, *axes))
            for part, axes, lead in zip(abstract, WEIGHT_AXES, (2, 1), strict=True)
        )
    )


def _dit(item: Item, runs: int) -> Iterator[Row]:
    """One tick of the ring on one device: one model evaluation, the head and the sampler's step included."""
    preset, mesh = item.preset, make_mesh(MeshSpec())
    weights, (inputs, latents) = random_weights(preset, mesh), ring_inputs(preset, preset.steps)
    begin, run = make_program(preset.transformer, mesh, RingPlan(1, 1, 2), latents.shape, _dtype())
    placed = jax.device_put((inputs, Turns(np.zeros(1, np.int32), np.full(1, preset.steps, np.int32))), sharding(mesh))
    state, one = begin(latents), np.int32(1)
    executable, took = compiled(run, weights, *placed, state, one)

    def tick():
        nonlocal state
        state = executable(weights, *placed, state, one)
        return state

    before = _ceiling(preset)
    with card_log() as card:
        seconds = seconds_of(tick, runs)
    after = _ceiling(preset)
    if not np.isfinite(np.asarray(state.carry.velocity)).all():
        raise RuntimeError("the velocity is not finite")
    flops = preset.forward
    yield _measured(
        item, seconds=seconds, compile_seconds=took, tflop=flops.total / TERA, ceiling=(before + after) / 2,
        memory=memory(executable),
        details={"tokens": preset.tokens, "dtype": str(_dtype()), "experts held": preset.experts,
                 "self-attention's share of TFLOP": flops.self_attention / flops.total,
                 "ceiling before": before, "ceiling after": after} | card,
    )  # fmt: skip


# The VAE


def _vae(item: Item, runs: int) -> Iterator[Row]:
    """Whole videos, chunk by chunk: the first latent frame's program and the one of all others."""
    preset = item.preset
    graph, weights = random_module(lambda: VAE(preset.vae, dtype=jnp.dtype(item.form), rngs=nnx.Rngs(0)))
    t, h, w = preset.latent_shape
    frames, height, width = preset.size
    counts = {"decode": vae_decode_flops, "encode": vae_encode_flops}
    inputs = {
        "decode": [random_input(5, 1, 1, h, w, preset.vae.z_dim, dtype=jnp.float32)] * 2,
        "encode": [jnp.tanh(random_input(6, 1, f, height, width, 3, dtype=jnp.float32)) for f in (1, 4)],
    }
    for direction, (first, later) in inputs.items():
        code = _coding(graph, f"{direction}_chunk")
        begin, took_first = compiled(code, weights, None, first)
        cache, _ = begin(weights, None, first)
        go, took_later = compiled(code, weights, cache, later)

        def video(begin=begin, go=go, first=first, later=later):
            cache, out = begin(weights, None, first)
            for _ in range(t - 1):
                cache, out = go(weights, cache, later)
            return out

        with card_log() as card:
            seconds = seconds_of(video, runs)
        yield _measured(
            item, direction, seconds=seconds, compile_seconds=took_first + took_later, memory=memory(begin, go),
            tflop=counts[direction](preset.vae, (t, h, w)) / TERA, details={"frames": frames} | card,
        )  # fmt: skip


def _coding(graph: Any, name: str) -> Any:
    """A jitted direction of the VAE, as VideoCoder runs it."""
    return jax.jit(lambda state, cache, x: getattr(nnx.merge(graph, state), name)(cache, x), donate_argnums=1)


# The pipeline


def _pipeline(item: Item, runs: int) -> Iterator[Row]:
    """Text, a short denoising loop of both experts and one VAE decode; a whole clip follows by multiplication."""
    preset, mesh = item.preset, make_mesh(MeshSpec())
    text = _encode_text(item, runs)
    yield text
    inputs, latents = ring_inputs(preset, LOOP_STEPS)
    loop = Denoiser(preset.transformer, random_weights(preset, mesh), mesh, _dtype()).start(np.asarray(latents), inputs)
    loop.advance(1)
    with card_log() as card:
        rounds = iter(range(2, loop.rounds + 1))
        steps = seconds_of(lambda: loop.advance(next(rounds)), loop.rounds - 1, warmups=0)
    yield (denoise := _measured(
        item, "step", seconds=steps, tflop=2 * preset.forward.total / TERA, memory=memory(),
        details={"guided steps, experts in turn": [int(e) for e in inputs.controls.expert[0, 1:LOOP_STEPS]]} | card,
    ))  # fmt: skip
    del loop
    decode = next(row for row in _vae(Item("vae", preset, "float32"), 1) if row.name.endswith("decode"))
    yield Row(f"{item.name}/decode", **{k: v for k, v in vars(decode).items() if k != "name"})
    whole = 2 * (text.median or 0) + preset.steps * (denoise.median or 0) + (decode.median or 0)
    yield _measured(
        item, "whole clip", details={
            "seconds, extrapolated": whole, "from": f"{len(steps)} of {preset.steps} steps; not measured as a whole",
        },
    )  # fmt: skip


def _encode_text(item: Item, runs: int) -> Row:
    cfg = item.preset.text_encoder
    graph, weights = random_module(lambda: UMT5Encoder(cfg, dtype=_dtype(), rngs=nnx.Rngs(0)))
    tokens = jax.random.randint(jax.random.key(7), (1, TEXT_ROWS), 0, cfg.vocab_size)
    encode = jax.jit(lambda state, tokens, mask: nnx.merge(graph, state)(tokens, mask))
    executable, took = compiled(encode, weights, tokens, jnp.ones_like(tokens))
    seconds = seconds_of(lambda: executable(weights, tokens, jnp.ones_like(tokens)), runs)
    return _measured(
        item, "text", seconds=seconds, compile_seconds=took, tflop=text_encoder_flops(cfg) / TERA,
        memory=memory(executable),
    )  # fmt: skip
