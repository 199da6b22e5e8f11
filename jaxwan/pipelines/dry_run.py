"""What a call would take: tokens, stages, ticks, work and memory, from the configuration files alone.

Parameter bytes are exact: the shapes that loading would allocate. Activation bytes are sums of named buffers, each
described where it is counted; a compiler keeps a few more or fewer alive, so leave some room.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxwan.config import ImageInput, TransformerConfig
from jaxwan.flops import transformer_flops, vae_decode_flops
from jaxwan.kernels.attention import query_chunk
from jaxwan.models.vae import VAE
from jaxwan.pipelines.checkpoint import Checkpoint
from jaxwan.pipelines.denoise import RENOISINGS, abstract_weights, carries_text
from jaxwan.pipelines.load import default_dtype
from jaxwan.pipelines.parts import component_makers
from jaxwan.pipelines.prompt import MAX_TOKENS
from jaxwan.pipelines.request import Job
from jaxwan.sharding.mesh import MeshSpec, request_virtual_devices
from jaxwan.sharding.ring import RingPlan

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


@dataclass(frozen=True)
class DryRun:
    """The report. Bytes are per device; lists go by device, and device 0 also holds the encoders and the VAE."""

    variant: str
    mesh: str
    dtype: str
    vae_dtype: str
    num_frames: int
    height: int
    width: int
    latent_shape: tuple[int, int, int]
    tokens: int
    layers_per_stage: list[int]
    microbatches: int
    period: int
    ticks: int
    utilisation: float
    forwards: int  # model evaluations, all videos and branches
    forward_tflop: dict[str, float]  # one of them, by where the work is
    decode_tflop: float  # one video
    parameter_bytes: list[int]
    activation_bytes: dict[str, dict[str, int]]  # phase -> named buffers; all phases but denoise on device 0 alone
    needed_bytes: list[int]
    device_memory: int | None
    fits: bool | None

    def to_json(self) -> str:
        """The report as one JSON object."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        steps = ", ".join(f"{n}" for n in self.layers_per_stage)
        lines = [
            f"{self.variant}-like, {self.width}x{self.height}, {self.num_frames} frames, {self.dtype} DiT, "
            f"{self.vae_dtype} VAE, mesh {self.mesh}",
            f"tokens      {self.tokens:,} ({'x'.join(map(str, self.latent_shape))} latents)",
            f"stages      {len(self.layers_per_stage)} with {steps} layers",
            f"ring        {self.microbatches} micro-batches, a step every {self.period} ticks, {self.ticks} ticks, "
            f"{self.utilisation:.0%} used" + self._advice(),
            f"work        {self._work()}",
        ]
        for phase, buffers in self.activation_bytes.items():
            lines.append(f"{phase:<11} {_gib(sum(buffers.values()))}")
            lines += [f"    {_gib(size)}  {name}" for name, size in buffers.items()]
        lines.append("device      parameters    needed")
        rows = list(zip(self.parameter_bytes, self.needed_bytes, strict=True))
        lines += [f"{i:<8} {_gib(p)} {_gib(n)}" for i, (p, n) in enumerate(rows)]
        return "\n".join([*lines, self._verdict()])

    def _work(self) -> str:
        forward = sum(self.forward_tflop.values())
        return (
            f"{forward:,.4g} TFLOP a forward ({self.forward_tflop['self_attention'] / forward:.0%} self-attention), "
            f"{self.forwards} forwards; decoding a video {self.decode_tflop:,.4g} TFLOP"
        )

    def _advice(self) -> str:
        if self.utilisation > 0.99 or len(self.layers_per_stage) == 1:
            return ""
        return " (more prompts or videos in one call fill the idle stages)"

    def _verdict(self) -> str:
        most = _gib(max(self.needed_bytes)).strip()
        if self.device_memory is None:
            return f"each device must have {most} (say --device-memory 80GB to compare)"
        return f"{'fits' if self.fits else 'DOES NOT FIT'}: {most} of {_gib(self.device_memory).strip()}"


def dry_run(
    checkpoint: Checkpoint,
    mesh: MeshSpec,
    job: Job,
    dtype: str | None = None,
    vae_dtype: str = "float32",
    device_memory: int | None = None,
) -> DryRun:
    """The report for a checked job on a mesh that need not exist here.

    dtype None: bfloat16 when device_memory names an accelerator's, else what the devices here would use.
    device_memory None: the present accelerator's, where there is one.
    """
    request_virtual_devices(mesh.num_devices)  # a later pipeline is to find them, if this asks JAX for its devices
    if dtype is None:
        dtype = "bfloat16" if device_memory is not None else default_dtype(jax.devices()[0])
    if device_memory is None:
        device_memory = present_memory()
    cfg, size = checkpoint.transformer, (job.num_frames, job.height, job.width)
    plan = RingPlan(mesh.pp, job.batch, 2 if job.guided else 1)
    steps = [int(r.table.num_steps) for r in job.requests for _ in range(job.num_videos)]
    parameters = parameter_bytes(checkpoint, mesh.pp, dtype, vae_dtype)
    activations = activation_bytes(checkpoint, job, plan, dtype, vae_dtype)
    peaks = {phase: sum(buffers.values()) for phase, buffers in activations.items()}
    needed = [p + (max(peaks.values()) if i == 0 else peaks["denoise"]) for i, p in enumerate(parameters)]
    full = -(-cfg.num_layers // mesh.pp)
    return DryRun(
        variant=checkpoint.variant.name, mesh=str(mesh), dtype=dtype, vae_dtype=vae_dtype,
        num_frames=job.num_frames, height=job.height, width=job.width,
        latent_shape=checkpoint.geometry.latent_shape(*size), tokens=checkpoint.geometry.num_tokens(*size),
        layers_per_stage=[min(full, max(0, cfg.num_layers - i * full)) for i in range(mesh.pp)],
        microbatches=plan.microbatches, period=plan.period, ticks=plan.ticks(steps),
        utilisation=plan.utilisation(steps), forwards=plan.branches * sum(steps),
        forward_tflop=_forward_tflop(checkpoint, job),
        decode_tflop=vae_decode_flops(checkpoint.vae, checkpoint.geometry.latent_shape(*size)) / 1e12,
        parameter_bytes=parameters, activation_bytes=activations,
        needed_bytes=needed, device_memory=device_memory,
        fits=None if device_memory is None else max(needed) <= device_memory,
    )  # fmt: skip


def _forward_tflop(checkpoint: Checkpoint, job: Job) -> dict[str, float]:
    cfg, size = checkpoint.transformer, (job.num_frames, job.height, job.width)
    expand = checkpoint.variant.image_input is ImageInput.FIRST_FRAME
    flops = transformer_flops(
        cfg, checkpoint.geometry.num_tokens(*size), image_rows=image_rows(cfg),
        timesteps=checkpoint.geometry.latent_shape(*size)[0] if expand else 1,
    )  # fmt: skip
    return {name: value / 1e12 for name, value in flops._asdict().items()}


def image_rows(cfg: TransformerConfig) -> int:
    """CLIP rows in cross-attention: 257 an image of 224 pixels, none for models that take no CLIP rows."""
    return 0 if cfg.image_dim is None else cfg.pos_embed_seq_len or 257


def parameter_bytes(checkpoint: Checkpoint, stages: int, dtype: DTypeLike, vae_dtype: DTypeLike) -> list[int]:
    """Bytes of parameters on each device: a stage's layers and the DiT's ends; the other models on the first."""
    _, weights = abstract_weights(checkpoint.transformer, checkpoint.num_experts, stages, dtype)
    each = tree_bytes(weights.blocks) // stages + tree_bytes(weights.ends)
    makers = component_makers(checkpoint, dtype, vae_dtype).values()
    first = sum(tree_bytes(nnx.split(nnx.eval_shape(make))[1]) for make in makers)
    return [each + first, *[each] * (stages - 1)]


def activation_bytes(
    checkpoint: Checkpoint, job: Job, plan: RingPlan, dtype: DTypeLike, vae_dtype: DTypeLike
) -> dict[str, dict[str, int]]:
    """Named buffers of each phase; phases follow one another, so a device needs the largest."""
    return {
        "denoise": _denoise_bytes(checkpoint, job, plan, jnp.dtype(dtype).itemsize),
        "decode": _decode_bytes(checkpoint, job, vae_dtype),
    }


def _denoise_bytes(checkpoint: Checkpoint, job: Job, plan: RingPlan, item: int) -> dict[str, int]:
    cfg, geometry = checkpoint.transformer, checkpoint.geometry
    latent = 4 * math.prod(geometry.latent_shape(job.num_frames, job.height, job.width)) * geometry.z_dim
    tokens = geometry.num_tokens(job.num_frames, job.height, job.width)
    hidden = tokens * cfg.dim * item
    _, weights = abstract_weights(cfg, 1, 1, jnp.bfloat16 if item == 2 else jnp.float32)
    chunk = query_chunk(1, tokens, tokens, cfg.num_attention_heads)
    image = 4 * image_rows(cfg) * (cfg.image_dim or 0)
    stage_layers = -(-cfg.num_layers // plan.stages) * checkpoint.num_experts
    keys_values = 2 * stage_layers * plan.microbatches * MAX_TOKENS * cfg.dim * item
    extra = cfg.in_channels - geometry.z_dim  # mask and image channels
    return {
        "latents, x0 history and velocity of all requests (6 x float32)": 6 * plan.requests * latent,
        "noise of renoise (8 x float32)": RENOISINGS * plan.requests * latent,
        "text rows, all branches": 4 * plan.microbatches * MAX_TOKENS * cfg.text_dim,
        "text keys and values of a stage's layers": keys_values if carries_text(cfg, tokens) else 0,
        "image rows and channels": plan.requests * (image + latent * extra // geometry.z_dim),
        "hidden state, held and received": 2 * hidden,
        "one layer: residual, its norm, q, k, v, attention's output": 6 * hidden,
        "one layer: float32 of the hidden state": tokens * cfg.dim * 4,
        "one layer: MLP": tokens * cfg.ffn_dim * item,
        "attention: one chunk of logits (XLA's form)": 4 * cfg.num_attention_heads * chunk * tokens,
        "one layer's weights": tree_bytes(weights.blocks) // cfg.num_layers,
        "one expert's ends": tree_bytes(weights.ends),
    }


def _decode_bytes(checkpoint: Checkpoint, job: Job, vae_dtype: DTypeLike) -> dict[str, int]:
    """One step of four frames: the convolutions' halos, exactly, and three arrays of the largest size in the step."""
    vae = nnx.eval_shape(lambda: VAE(checkpoint.vae, dtype=vae_dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(vae)
    frames, height, width = checkpoint.geometry.latent_shape(job.num_frames, job.height, job.width)
    latent = jax.ShapeDtypeStruct((1, 1, height, width, checkpoint.vae.z_dim), jnp.float32)

    def step(state, cache, latent):
        return nnx.merge(graph, state).decode_chunk(cache, latent, formulation="direct")  # as on accelerators

    cache, _ = jax.eval_shape(lambda s, x: step(s, None, x), state, latent)
    return {
        "halos of the causal convolutions": tree_bytes(cache),
        "three arrays of the step's largest size": 3 * largest_buffer(step, state, cache, latent),
        "latents": 4 * frames * height * width * checkpoint.vae.z_dim,
    }


def largest_buffer(function: Callable, *arguments: Any) -> int:
    """Bytes of the largest array that a function computes, from its jaxpr."""
    sizes = [0]

    def visit(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            sizes.extend(v.aval.size * v.aval.dtype.itemsize for v in equation.outvars if hasattr(v.aval, "dtype"))
            for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")):
                if hasattr(value, "jaxpr"):
                    visit(value.jaxpr)

    visit(jax.make_jaxpr(function)(*arguments).jaxpr)
    return max(sizes)


def tree_bytes(tree: Any) -> int:
    """Bytes of all leaves of a tree of arrays or their shapes."""
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def present_memory() -> int | None:
    """Memory of the first device when it is an accelerator that says so."""
    device = jax.devices()[0]
    return None if device.platform == "cpu" else (device.memory_stats() or {}).get("bytes_limit")


def parse_memory(text: str | None) -> int | None:
    """Bytes of "80GB" (80e9) or "80GiB" (80 * 2**30). Raises ValueError for what is no size."""
    if text is None:
        return None
    number = text.strip().rstrip("BKMGTIbkmgti")
    unit = text.strip()[len(number) :].upper()
    try:
        size = int(float(number) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise ValueError(f"device memory {text!r} is no size above 0, such as 80GB or 80GiB")
    return size


def _gib(size: int) -> str:
    return f"{size / 2**30:9.2f} GiB" if size >= 2**27 else f"{size / 2**20:9.2f} MiB"
