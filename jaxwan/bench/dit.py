"""The DiT as the pipeline runs it, in the ring on one device, and what the ring and the sampler add to the forwards."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxwan.bench.ceilings import ceiling
from jaxwan.bench.item import TERA, Item, dtype
from jaxwan.bench.measure import card_log, compiled, memory, random_input, random_state, seconds_of
from jaxwan.bench.presets import Preset
from jaxwan.bench.report import Row
from jaxwan.flops import TEXT_ROWS
from jaxwan.models.transformer import token_grid
from jaxwan.pipelines.condition import frame_timesteps, to_float32
from jaxwan.pipelines.denoise import Bucket, Denoiser, Entry, Loop, begin
from jaxwan.pipelines.dit import (
    Controls,
    Inputs,
    Weights,
    abstract_weights,
    guide,
    make_stage,
    placed_weights,
    split_on,
)
from jaxwan.schedulers.table import SamplerState, make_table, step, table_row
from jaxwan.sharding.mesh import MeshSpec, make_mesh
from jaxwan.sharding.ring import RingState, Slot

PROMPT_ROWS = 40  # tokens of a typical prompt
FLOW_SHIFT = 5.0
GUIDANCE = 4.0
FEW_STEPS, MANY_STEPS = 4, 20  # of the loop that is compared with its forwards: at full size, and on a CPU


def random_text(seed: int, *lead: int, width: int) -> jax.Array:
    """Context rows as a prompt of PROMPT_ROWS tokens gives them: random, then zeros."""
    text = random_input(seed, *lead, TEXT_ROWS, width, dtype=jnp.float32)
    return jnp.where((jnp.arange(TEXT_ROWS) < PROMPT_ROWS)[:, None], text, 0)


def make_entries(preset: Preset, steps: int, videos: int = 1) -> list[Entry]:
    """Guided videos of random normal texts and latents. The experts share the steps evenly, in order."""
    table, shape = make_table("unipc", steps, FLOW_SHIFT), (*preset.latent_shape, preset.vae.z_dim)
    images: dict[str, Any] = {}
    if preset.first_frame:
        images = {"first": np.zeros((1, *shape[1:]), np.float32), "has_first": np.array(False)}
    expert = np.minimum(np.arange(len(table.timesteps)) * preset.experts // steps, preset.experts - 1)
    controls = Controls(
        table=table,
        timesteps=frame_timesteps(table.timesteps, images.get("has_first"), shape[0]),
        expert=expert.astype(np.int32),
        guidance=np.full(table.timesteps.shape, GUIDANCE),
        guided=np.array(True),
    )
    text = np.asarray(random_text(3, 2, width=preset.transformer.text_dim))
    latents = np.asarray(random_input(4, *shape, dtype=jnp.float32))
    return [begin(latents, Inputs(to_float32(controls), text, **images))] * videos


def random_weights(preset: Preset, mesh: jax.sharding.Mesh) -> Weights:
    """Random parameters of all experts as the ring holds them, made on their devices."""
    placed = placed_weights(preset.transformer, preset.experts, mesh, dtype())
    return Weights(*(random_state(part, lead=lead) for part, lead in zip(placed, (2, 1), strict=True)))


class Ring:
    """The ring on one device, compiled ahead for guided videos of a preset, with random weights."""

    def __init__(self, preset: Preset, steps: int, videos: int = 1):
        mesh = make_mesh(MeshSpec())
        self.preset, self.videos = preset, videos
        self.denoiser = Denoiser(preset.transformer, random_weights(preset, mesh), mesh, dtype())
        self.start(steps)
        _, ring, arguments = next(self.programs.listed(self.weights))
        self.executable, self.compile_seconds = compiled(ring, *arguments)
        self.tflop = preset.forward.total / TERA  # of a tick

    @property
    def weights(self) -> Weights:
        """Those of the denoiser."""
        return self.denoiser.weights

    def start(self, steps: int) -> None:
        """From the first tick again, with so many steps."""
        entries = make_entries(self.preset, steps, self.videos)
        self.programs = self.denoiser.programs(Bucket.of(entries))
        self.running = self.programs.empty()
        for slot, entry in enumerate(entries):
            self.running = self.programs.insert(self.running, (0, slot), entry)
        members = {(0, slot): self.programs.member(entry) for slot, entry in enumerate(entries)}
        self.timetable = self.programs.timetable().changed(members)

    @property
    def ticks(self) -> int:
        """Until all videos are done."""
        return self.timetable.end - self.timetable.tick

    def run(self, ticks: int) -> RingState:
        """So many ticks; their outputs may not be there yet."""
        self.running = self.programs.run(self.weights, self.running, self.timetable, ticks)
        self.timetable = self.timetable.ran(ticks)
        return self.running.state

    def velocity(self) -> np.ndarray:
        """The first video's latest."""
        return np.asarray(self.programs.read(self.running, (0, 0)).velocity)

    def check(self) -> None:
        """Raises RuntimeError when numbers got lost on the way."""
        if not np.isfinite(self.velocity()).all():
            raise RuntimeError("the velocity is not finite")


def measure_dit(item: Item) -> Iterator[Row]:
    """One tick of the ring: a model evaluation with head and sampler step. Then two (guidance), and `predict`."""
    preset = item.preset
    ring = Ring(preset, preset.steps)
    before = ceiling(preset)
    with card_log() as card:
        seconds = seconds_of(lambda: ring.run(1), item.runs)
    after = ceiling(preset)
    ring.check()
    held = (before + after) / 2
    yield item.row(
        seconds=seconds, compile_seconds=ring.compile_seconds, tflop=ring.tflop, ceiling=held,
        memory=memory(ring.executable),
        details={"tokens": preset.tokens, "dtype": str(dtype()), "experts held": preset.experts,
                 "self-attention's share of TFLOP": preset.forward.self_attention / TERA / ring.tflop,
                 "ceiling before": before, "ceiling after": after} | card,
    )  # fmt: skip
    guided = seconds_of(lambda: ring.run(2), 1, warmups=0)
    yield item.row("guided step", seconds=guided, tflop=2 * ring.tflop, ceiling=held)

    def predict():
        ring.start(1)
        ring.run(1)
        return ring.velocity()

    predict()  # compiles what puts in and reads out
    once = seconds_of(predict, 1, warmups=0)
    yield item.row("predict", seconds=once, tflop=ring.tflop, ceiling=held,
                   details={"what": "latents in, velocity out, on the host"})  # fmt: skip


# What the loop adds


def measure_sampler(item: Item) -> Iterator[Row]:
    """One step of the sampler with guidance, by itself; and a denoising loop against the sum of its forwards."""
    preset = item.preset
    entry = make_entries(preset, FEW_STEPS)[0]
    table, latents = entry.inputs.controls.table, jnp.asarray(entry.latents)
    state = SamplerState(*[latents] * 5)

    def one(state, cond, uncond):
        velocity = guide(cond, uncond, jnp.float32(GUIDANCE))
        return step(table_row(table, 2), state, velocity, 0.0)

    executable, took = compiled(jax.jit(one), state, latents, latents)
    seconds = seconds_of(lambda: executable(state, latents, latents), 10 * item.runs, warmups=3)
    yield item.row("step", seconds=seconds, compile_seconds=took, memory=memory(executable))
    yield _loop_row(item)


def _loop_row(item: Item) -> Row:
    """The loop as the pipeline drives it, step by step; forwards alone, of the same weights, run before and after."""
    preset = replace(item.preset, experts=1)
    steps, rounds = (FEW_STEPS, 1) if preset.needs_accelerator else (MANY_STEPS, item.runs)
    ring = Ring(preset, steps)
    forward = _forward_alone(ring)
    entries = make_entries(preset, steps)
    Loop(ring.denoiser, entries).advance()  # compiles

    def loop():
        running = Loop(ring.denoiser, entries)
        for _ in range(steps):
            running.advance()

    alone, loops = [seconds_of(forward, max(1, steps // 4))], []
    for _ in range(rounds):
        loops += seconds_of(loop, 1, warmups=0)
        alone.append(seconds_of(forward, max(1, steps // 4), warmups=0))
    forwards = [2 * steps * median(before + after) for before, after in pairwise(alone)]
    return item.row(
        "loop", seconds=loops, tflop=2 * steps * ring.tflop, memory=memory(),
        details={"guided steps": steps, "seconds a tick": median(loops) / (2 * steps),
                 "loop / sum of its forwards": median(took / sum_ for took, sum_ in zip(loops, forwards, strict=True))},
    )  # fmt: skip


def _forward_alone(ring: Ring) -> Callable[[], jax.Array]:
    """Latents to velocity with the ring's own parts and weights, but no ring, guidance or sampler."""
    preset, cfg = ring.preset, ring.preset.transformer
    graph, _ = abstract_weights(cfg, 1, 1, dtype())
    stage = make_stage(cfg, graph, preset.latent_shape, split_on(make_mesh(MeshSpec()), cfg, preset.latent_shape))
    slot = Slot(jnp.int32(0), jnp.int32(0), jnp.bool_(False), jnp.int32(0), jnp.bool_(True))

    def forward(weights, inputs, carry):
        hidden, _ = stage.layers(weights, inputs, stage.enter(weights, inputs, carry, slot), (), slot)
        one = jax.tree.map(lambda p: p.reshape(p.shape[1:]), weights)  # the only expert
        model = nnx.merge(graph, one.blocks, one.ends)
        temb, _ = model.embed_time(inputs.controls.timesteps[0, :1])
        return model.head(hidden, temb, token_grid(cfg, preset.latent_shape))

    inputs, carry = ring.running.inputs, jax.tree.map(lambda x: x[0, 0], ring.running.state.carry)
    executable, _ = compiled(jax.jit(forward), ring.weights, inputs, carry)
    return lambda: executable(ring.weights, inputs, carry)
