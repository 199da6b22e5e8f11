"""The DiT as the pipeline runs it, in the ring on one device, and what the ring and the sampler add to the forwards."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from statistics import median

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
from jaxwan.pipelines.condition import frame_timesteps
from jaxwan.pipelines.denoise import (
    RENOISINGS,
    WEIGHT_AXES,
    Controls,
    Denoiser,
    Inputs,
    Weights,
    abstract_weights,
    guide,
    make_program,
    make_stage,
    to_float32,
)
from jaxwan.schedulers.table import SamplerState, make_table, stack_tables, step, table_row
from jaxwan.sharding.mesh import MeshSpec, make_mesh, sharding
from jaxwan.sharding.ring import Slot, Turns
from jaxwan.sharding.turns import RingPlan

PROMPT_ROWS = 40  # tokens of a typical prompt
FLOW_SHIFT = 5.0
GUIDANCE = 4.0
FEW_STEPS, MANY_STEPS = 4, 20  # of the loop that is compared with its forwards: at full size, and on a CPU


def random_text(seed: int, *lead: int, width: int) -> jax.Array:
    """Context rows as a prompt of PROMPT_ROWS tokens gives them: random, then zeros."""
    text = random_input(seed, *lead, TEXT_ROWS, width, dtype=jnp.float32)
    return jnp.where((jnp.arange(TEXT_ROWS) < PROMPT_ROWS)[:, None], text, 0)


def ring_inputs(preset: Preset, steps: int, requests: int = 1) -> tuple[Inputs, jax.Array]:
    """What guided requests bring, and their latents; random normal. The experts share the steps evenly, in order."""
    table = stack_tables([make_table("unipc", steps, FLOW_SHIFT)] * requests)
    shape = requests, *preset.latent_shape, preset.vae.z_dim
    has_first = np.zeros(requests, bool) if preset.first_frame else None
    expert = np.minimum(np.arange(table.timesteps.shape[1]) * preset.experts // steps, preset.experts - 1)
    controls = Controls(
        table=table,
        timesteps=frame_timesteps(table.timesteps, has_first, shape[1]),
        expert=np.tile(expert.astype(np.int32), (requests, 1)),
        guidance=np.full(table.timesteps.shape, GUIDANCE),
        guided=np.ones(requests, bool),
    )
    inputs = Inputs(
        controls=to_float32(controls),
        text=random_text(3, requests, 2, width=preset.transformer.text_dim),
        image=None,
        channels=None,
        first=None if has_first is None else np.zeros((requests, 1, *shape[2:]), np.float32),
        has_first=has_first,
        noise=np.zeros((requests, RENOISINGS, *shape[1:]), np.float32),
    )
    return inputs, random_input(4, *shape, dtype=jnp.float32)


def random_weights(preset: Preset, mesh: jax.sharding.Mesh) -> Weights:
    """Random parameters of all experts as the ring holds them, made on their devices."""
    _, abstract = abstract_weights(preset.transformer, preset.experts, mesh.shape["pp"], dtype())
    return Weights(
        *(
            random_state(part, lead=lead, place=sharding(mesh, *axes))
            for part, axes, lead in zip(abstract, WEIGHT_AXES, (2, 1), strict=True)
        )
    )


class Ring:
    """The ring on one device, compiled ahead for guided requests of a preset, with random weights."""

    def __init__(self, preset: Preset, steps: int, requests: int = 1):
        mesh, cfg = make_mesh(MeshSpec()), preset.transformer
        self.preset, self.requests, self.place = preset, requests, sharding(mesh)
        self.weights = random_weights(preset, mesh)
        self.plan = RingPlan(1, requests, 2)
        shape = requests, *preset.latent_shape, preset.vae.z_dim
        self.begin, run = make_program(cfg, mesh, self.plan, shape, dtype())
        self.start(steps)
        self.executable, self.compile_seconds = compiled(run, self.weights, *self.read, self.state, np.int32(1))
        self.tflop = preset.forward.total / TERA  # of a tick

    def start(self, steps: int) -> None:
        """From the first tick again, with so many steps."""
        inputs, self.latents = ring_inputs(self.preset, steps, self.requests)
        none = np.zeros(self.requests, np.int32)
        turns = Turns(none, none + np.int32(steps), none)
        self.read = jax.device_put((inputs, turns), self.place)
        self.state = self.begin(self.latents)

    def run(self, ticks: int):
        """So many ticks of the executable; its outputs may not be there yet."""
        self.state = self.executable(self.weights, *self.read, self.state, np.int32(ticks))
        return self.state

    def check(self) -> None:
        """Raises RuntimeError when numbers got lost on the way."""
        if not np.isfinite(np.asarray(self.state.carry.velocity)).all():
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
        ring.state = ring.begin(ring.latents)
        return np.asarray(ring.run(1).carry.velocity)

    jax.block_until_ready(ring.begin(ring.latents))
    once = seconds_of(predict, 1, warmups=0)
    yield item.row("predict", seconds=once, tflop=ring.tflop, ceiling=held,
                   details={"what": "latents in, velocity out, on the host"})  # fmt: skip


# What the loop adds


def measure_sampler(item: Item) -> Iterator[Row]:
    """One step of the sampler with guidance, by itself; and a denoising loop against the sum of its forwards."""
    preset = item.preset
    inputs, latents = ring_inputs(preset, FEW_STEPS)
    state = SamplerState(*[latents[0]] * 5)

    def one(state, cond, uncond):
        velocity = guide(cond, uncond, jnp.float32(GUIDANCE))
        return step(table_row(jax.tree.map(jnp.asarray, inputs.controls.table), 0, 2), state, velocity, 0.0)

    executable, took = compiled(jax.jit(one), state, latents[0], latents[0])
    seconds = seconds_of(lambda: executable(state, latents[0], latents[0]), 10 * item.runs, warmups=3)
    yield item.row("step", seconds=seconds, compile_seconds=took, memory=memory(executable))
    yield _loop_row(item)


def _loop_row(item: Item) -> Row:
    """The loop as the pipeline drives it, step by step; forwards alone, of the same weights, run before and after."""
    preset = replace(item.preset, experts=1)
    steps, rounds = (FEW_STEPS, 1) if preset.needs_accelerator else (MANY_STEPS, item.runs)
    ring = Ring(preset, steps)
    forward = _forward_alone(ring)
    inputs, latents = ring_inputs(preset, steps)
    denoiser, noise = Denoiser(preset.transformer, ring.weights, make_mesh(MeshSpec()), dtype()), np.asarray(latents)
    denoiser.start(noise, inputs).advance(1)  # compiles

    def loop():
        running = denoiser.start(noise, inputs)
        for index in range(running.rounds):
            running.advance(index + 1)

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
    stage = make_stage(cfg, graph, ring.plan, preset.latent_shape)
    slot = Slot(jnp.int32(0), jnp.int32(0), jnp.int32(0), jnp.bool_(True))

    def forward(weights, inputs, carry):
        hidden, _ = stage.layers(weights, inputs, stage.enter(weights, inputs, carry, slot), (), slot)
        one = jax.tree.map(lambda p: p.reshape(p.shape[1:]), weights)  # the only expert
        model = nnx.merge(graph, one.blocks, one.ends)
        temb, _ = model.embed_time(inputs.controls.timesteps[0, :1])
        return model.head(hidden, temb, model.token_grid(preset.latent_shape))

    carry = jax.tree.map(lambda x: x[0], ring.state.carry)
    executable, _ = compiled(jax.jit(forward), ring.weights, ring.read[0], carry)
    return lambda: executable(ring.weights, ring.read[0], carry)
