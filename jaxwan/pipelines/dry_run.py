"""What a call would take: tokens, stages, ticks, work and memory, from the configuration files; of weights the headers.

Parameter bytes are exact: the shapes that loading would allocate. Activation bytes are sums of named buffers that live
at once, within a tenth of what XLA takes when it compiles for an H100 (`tests/aot`); what cuDNN and cuBLAS ask for as
workspace comes on top.
"""

import html
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxwan.config import ImageInput, TransformerConfig
from jaxwan.convert.lora import Lora
from jaxwan.flops import (
    Sent,
    Share,
    TransformerFlops,
    device_flops,
    device_share,
    tick_traffic,
    transformer_flops,
    vae_decode_flops,
)
from jaxwan.kernels.attention import query_chunk
from jaxwan.pipelines.arguments import whole
from jaxwan.pipelines.call import make_job, with_prompt
from jaxwan.pipelines.checkpoint import Checkpoint, open_checkpoint
from jaxwan.pipelines.chips import find_chip
from jaxwan.pipelines.denoise import room
from jaxwan.pipelines.dit import RENOISINGS, abstract_weights, layers_per_stage, map_axes, most_ulysses
from jaxwan.pipelines.encoder_ring import share_of
from jaxwan.pipelines.load import check_mesh, check_use, check_weights, default_dtype, parse_dtype
from jaxwan.pipelines.parts import abstract_components
from jaxwan.pipelines.request import Job
from jaxwan.pipelines.vae_memory import tree_bytes, vae_bytes
from jaxwan.sharding.mesh import AXES, MeshSpec, find_devices, is_auto
from jaxwan.sharding.rules import RULES
from jaxwan.sharding.turns import Deal, deal

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
_LEAST_MEMORY = 10**6  # bytes
_WORKSPACE = 2**30  # bytes that libraries may ask for beside all that is named


@dataclass(frozen=True)
class DryRun:
    """The report. Bytes are per device; lists go by device, in the mesh's order with dp outermost, and then the VAE's
    own, if it has any."""

    variant: str
    mesh: str
    dtype: str
    vae_dtype: str
    num_frames: int
    height: int
    width: int
    latent_shape: tuple[int, int, int]
    tokens: int
    layers_per_stage: list[int]  # of each of the rings, one for each rank of dp and cfg
    microbatches: int  # of a period, in all ranks of dp
    period: int
    ticks: int
    utilisation: float
    forwards: int  # model evaluations, all videos and branches
    forward_tflop: dict[str, float]  # one of them, by where the work is
    device_tflop: float  # of a tick, on a device that has as much to do as any
    sent: dict[str, dict[str, int]]  # of a tick, by mesh axis: collectives, and bytes that such a device sends
    decode_tflop: float  # one video
    parameter_bytes: list[int]
    activation_bytes: dict[str, dict[str, int]]  # phase -> named buffers, of each device that has a part in it
    needed_bytes: list[int]
    device_memory: int | None
    memory_fraction: float  # of it that JAX takes; 1 where device_memory is what JAX says that it took
    fits: bool | None
    would_fit: tuple[str, ...] = ()  # changes, in words
    notes: tuple[str, ...] = ()  # what the call leaves open, or gives in vain
    vae_devices: int = 0  # of its own
    sampling: tuple[str, ...] = ()  # preset, sampler, shift, guidance and experts
    weights: str = ""  # whether their headers were checked
    plan: str = ""  # of mesh="auto": what was chosen among, and why

    def to_json(self) -> str:
        """The report as one JSON object."""
        return json.dumps(asdict(self), indent=2)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def __str__(self) -> str:
        lines = [
            *[self.plan, ""] * bool(self.plan),
            f"{self.variant}-like, {self.width}x{self.height}, {self.num_frames} frames, mesh {self.mesh}; "
            f"{self.dtype} transformer, {self.vae_dtype} VAE",
            f"model runs  {self.forwards} of {self.tokens:,} tokens "
            f"({'x'.join(map(str, self.latent_shape))} latents), {sum(self.forward_tflop.values()):,.4g} TFLOP each",
            f"decoding    {self.decode_tflop:,.4g} TFLOP a video"
            + f", on {self.vae_devices} device{'s' * (self.vae_devices > 1)} of its own" * (self.vae_devices > 0),
            f"layers      {_plus(self.layers_per_stage)}" + self._use(),
            *[f"each tick   {self.device_tflop:,.4g} TFLOP a device" + self._sent()] * (len(self.parameter_bytes) > 1),
            *[f"weights     {self.weights}"] * bool(self.weights),
            "",
            f"memory          {'weights':>13} {'denoising':>13} {'decoding':>13} {'needed':>13}",
            *self._memory(),
            "",
            *self._buffers(),
            "",
            *self.sampling,
            *self.notes,
            self._verdict(),
        ]
        return "\n".join(lines)

    def _use(self) -> str:
        mesh, stages = MeshSpec.parse(self.mesh), len(self.layers_per_stage)
        devices, more = mesh.num_devices, ""
        if devices == 1:
            return " on one device"
        rings = f" in each of {mesh.dp * mesh.cfg} rings" if mesh.dp * mesh.cfg > 1 else ""
        share = f", each stage {mesh.sp * mesh.tp} of them" if mesh.sp * mesh.tp > 1 and stages > 1 else ""
        if idle := self.layers_per_stage.count(0):
            more = f"; the last {idle} of pp have no layer: pp={stages - idle} does the same"
        elif self.utilisation < 0.99 and self.microbatches < self.period * mesh.dp:
            more = "; more prompts or videos in one call fill the idle time"
        elif self.utilisation < 0.99 and mesh.cfg > 1:
            more = "; videos without guidance leave half of the devices idle"
        return f"{rings} on {devices} devices{share}, at work {self.utilisation:.0%} of the time{more}"

    def _sent(self) -> str:
        told = (
            f"{bytes_text(one['bytes'])} over {axis} in {one['collectives']} collective{'s' * (one['collectives'] > 1)}"
            for axis, one in self.sent.items()
        )
        return f", which sends {', '.join(told)}" if self.sent else ""

    def _memory(self) -> list[str]:
        """A line a device, or one for several that are alike."""
        phases = _phases(MeshSpec.parse(self.mesh), self.vae_devices, self.activation_bytes)
        rows = [
            (weights, taken.get("denoise", 0), taken.get("decode", 0), needed)
            for weights, taken, needed in zip(self.parameter_bytes, phases, self.needed_bytes, strict=True)
        ]
        lines, start = [], 0
        for end in range(1, len(rows) + 1):
            if end == len(rows) or rows[end] != rows[start]:
                name = f"device {start}" if end - start == 1 else f"devices {start}-{end - 1}"
                lines.append(f"{name:<15} " + " ".join(f"{bytes_text(size):>13}" for size in rows[start]))
                start = end
        return lines

    def _buffers(self) -> list[str]:
        """The largest of what a phase needs, those that make up all but a fiftieth."""
        lines = []
        for phase, buffers in self.activation_bytes.items():
            shown = 0
            lines.append(f"{phase.removesuffix('e')}ing needs, beside the weights:")
            for what, size in sorted(buffers.items(), key=lambda item: -item[1]):
                if shown < 0.98 * sum(buffers.values()):
                    lines.append(f"  {bytes_text(size):>13}  {what}")
                    shown += size
        return lines

    def _verdict(self) -> str:
        most = bytes_text(max(self.needed_bytes))
        if self.device_memory is None:
            return f"the fullest device needs {most} (say how much one has, such as 80GB, to compare)"
        room = bytes_text(int(self.device_memory * self.memory_fraction))
        if self.memory_fraction < 1:
            room += f", the {self.memory_fraction:.0%} of {bytes_text(self.device_memory)} that JAX takes,"
        if self.fits:
            left = self.device_memory * self.memory_fraction - max(self.needed_bytes)
            close = "; that is close: what cuDNN and cuBLAS ask for comes on top" if left < _WORKSPACE else ""
            return f"fits: {most} of {room} a device".removesuffix(",") + close
        would = "; ".join(self.would_fit) or "nothing tried does: other sizes, lengths, numbers of devices, dtypes"
        return f"DOES NOT FIT: {most} of {room} a device. What would fit: {would}"


def dry_run(
    model: "str | Path | Checkpoint | None" = None,
    *,
    mesh: str | MeshSpec | None = None,
    ulysses: int | None = None,
    dtype: Any = None,
    vae_dtype: Any = "float32",
    vae_devices: int | None = None,
    variant: str | None = None,
    components: Mapping[str, Any] | None = None,
    loras: Sequence[Lora | str | Path] = (),
    device_memory: int | str | None = None,
    devices: int | None = None,
    chip: str | None = None,
    devices_per_host: int | None = None,
    **call: Any,
) -> DryRun:
    """What a call would take on a mesh that need not exist here. Print it, or ask its fields.

    mesh="auto" chooses one (`plan_mesh`), among the devices here or of so many with so much memory: `devices`, `chip`
    and `devices_per_host` are for it. Where none fits the report is of the mesh that needs least.

    Of weights the headers are read, where the folder has any, so that what cannot be loaded is refused here too; of a
    source video what its header says.

    components, loras: as of `open_checkpoint`. call: arguments of a WanPipeline call; prompt and images may be left
    out.
    dtype None: bfloat16 when device_memory names an accelerator's, else what the devices here would use.
    device_memory: of one device, "80GB" or bytes, of which JAX takes 75 % (XLA_CLIENT_MEM_FRACTION;
    scripts/generate.py says 0.92); None: what JAX took of the present
    accelerator's, where there is one. Raises as `WanPipeline.from_pretrained` and a call do.

        print(dry_run("Wan-AI/Wan2.2-T2V-A14B-Diffusers", mesh="pp=4", device_memory="80GB", num_frames=81))
    """
    ulysses = None if ulysses is None else whole("ulysses", ulysses, 1)
    own = 0 if vae_devices is None else whole("vae_devices", vae_devices, 1)
    memory, machine = parse_memory(device_memory), dict(devices=devices, chip=chip, devices_per_host=devices_per_host)
    if not is_auto(mesh) and (given := [name for name, value in machine.items() if value is not None]):
        raise ValueError(f"{given[0]}={machine[given[0]]!r:.40} is for mesh='auto': leave it out, or choose that mesh")
    spec = None if is_auto(mesh) and ulysses is None else MeshSpec.parse(mesh, ulysses)
    dtype, vae_dtype = parse_dtype("dtype", dtype), parse_dtype("vae_dtype", vae_dtype) or "float32"
    checkpoint, plan = open_checkpoint(model, variant, components, loras), ""
    if spec is not None:
        check_mesh(spec, checkpoint)
    job = make_job(checkpoint, False, **stood_in(checkpoint, call))
    if spec is None:
        from jaxwan.pipelines.plan import choose_mesh  # which asks this module about every mesh

        chosen = choose_mesh(
            checkpoint, job, device_memory=memory, dtype=dtype, vae_dtype=vae_dtype, vae_devices=vae_devices, **machine
        )
        spec, plan = chosen.mesh, str(chosen)
        memory = memory if memory is not None or chip is None else find_chip(chip)[0].memory
    check_use(spec, checkpoint, job)
    weights = check_weights(checkpoint)
    return replace(make_report(checkpoint, spec, job, dtype, vae_dtype, memory, own), weights=weights, plan=plan)


def stood_in(checkpoint: Checkpoint, call: Mapping[str, Any]) -> dict[str, Any]:
    """The call with a prompt and the images that its model cannot do without, where it has none."""
    call = {"seed": 0} | with_prompt(checkpoint, call)
    needs = checkpoint.image_input in (ImageInput.CHANNELS, ImageInput.CHANNELS_AND_CLIP)
    if not needs or call.get("video") is not None:
        return call
    if call.get("height") is None and call.get("width") is None and call.get("image") is None:
        call |= {"height": checkpoint.defaults.height, "width": checkpoint.defaults.width}
    size = call.get("height") or 64, call.get("width") or 64
    blank = np.zeros((*(size if all(isinstance(side, int) for side in size) else (64, 64)), 3), np.uint8)
    names = ["image"] + ["last_image"] * (checkpoint.transformer.pos_embed_seq_len is not None)
    return call | {name: blank for name in names if call.get(name) is None}


def make_report(
    checkpoint: Checkpoint,
    mesh: MeshSpec,
    job: Job,
    dtype: str | None = None,
    vae_dtype: str = "float32",
    device_memory: int | None = None,
    vae_devices: int = 0,
) -> DryRun:
    """The report for a checked job; arguments as `dry_run`'s."""
    fraction = memory_fraction()
    if device_memory is None:
        device = find_devices(mesh.num_devices + vae_devices)[0]  # as many as a later pipeline is to find
        dtype, device_memory, fraction = dtype or default_dtype(device), present_memory(device), 1.0
    report = _report(checkpoint, mesh, job, dtype or "bfloat16", vae_dtype, vae_devices, device_memory, fraction)
    if report.fits is not False:
        return report
    return replace(report, would_fit=tuple(_would_fit(report, checkpoint, mesh, job)))


def _report(
    checkpoint: Checkpoint, mesh: MeshSpec, job: Job, dtype: str, vae_dtype: str, vae_devices: int,
    device_memory: int | None, fraction: float,
) -> DryRun:  # fmt: skip
    cfg, size = checkpoint.transformer, job.size
    steps, plan = steps_of(job), dealt(mesh, job)
    forwards = sum(n * (1 + r.guided) for n, r in zip(steps, job.requests, strict=True))
    ticks = plan.ticks(steps)
    needed = needed_bytes(checkpoint, mesh, job, dtype, vae_dtype, vae_devices)
    return DryRun(
        variant=checkpoint.variant.name, mesh=str(mesh), dtype=dtype, vae_dtype=vae_dtype,
        num_frames=size[0], height=size[1], width=size[2],
        latent_shape=checkpoint.geometry.latent_shape(*size), tokens=checkpoint.geometry.num_tokens(*size),
        layers_per_stage=layers_per_stage(cfg.num_layers, mesh.pp),
        microbatches=plan.microbatches, period=plan.period, ticks=ticks,
        utilisation=forwards / (ticks * mesh.dp * mesh.cfg), forwards=forwards,
        forward_tflop=_forward_tflop(checkpoint, job),
        **_of_a_tick(checkpoint, mesh, job, jnp.dtype(dtype)),
        decode_tflop=vae_decode_flops(checkpoint.vae, checkpoint.geometry.latent_shape(*size)) / 1e12,
        parameter_bytes=parameter_bytes(checkpoint, mesh, dtype, vae_dtype, vae_devices),
        activation_bytes=activation_bytes(checkpoint, mesh, job, dtype, vae_dtype, vae_devices),
        needed_bytes=needed, device_memory=device_memory, memory_fraction=fraction,
        fits=None if device_memory is None else max(needed) <= fraction * device_memory, notes=job.notes,
        vae_devices=vae_devices, sampling=job.sampling,
    )  # fmt: skip


def dealt(mesh: MeshSpec, job: Job) -> Deal:
    """The videos of a job in the rings of a mesh."""
    branches = [1 if mesh.cfg > 1 else 1 + r.guided for r in job.requests]
    return deal(branches, ranks=mesh.dp, stages=mesh.pp)


def steps_of(job: Job) -> list[int]:
    """Steps of each video."""
    return [int(r.table.num_steps) for r in job.requests]


def needed_bytes(
    checkpoint: Checkpoint, mesh: MeshSpec, job: Job, dtype: DTypeLike, vae_dtype: DTypeLike, vae_devices: int = 0
) -> list[int]:
    """Bytes that each device needs in the largest of its phases, parameters too; in the order of `parameter_bytes`."""
    given = dtype, vae_dtype, vae_devices
    phases = _phases(mesh, vae_devices, activation_bytes(checkpoint, mesh, job, *given))
    parameters = parameter_bytes(checkpoint, mesh, *given)
    return [weights + max(taken.values()) for weights, taken in zip(parameters, phases, strict=True)]


def _would_fit(report: DryRun, checkpoint: Checkpoint, mesh: MeshSpec, job: Job) -> Iterator[str]:
    """Changes to a job that does not fit, in words, with each of which alone it would; else the least of all kinds."""
    meshes = [replace(mesh, pp=pp) for pp in (2, 4, 8, 16, 32) if mesh.pp < pp]
    meshes += [replace(mesh, tp=tp) for tp in (2, 4, 8) if mesh.tp < tp]
    meshes = [m for m in meshes if _can_be(m, checkpoint)]
    dtypes = ["bfloat16"] * (report.dtype != "bfloat16")
    vae_dtypes = ["bfloat16"] * (report.vae_dtype != "bfloat16")
    smaller = [Job(tuple(replace(r, **size) for r in job.requests)) for size in _smaller(checkpoint, job)]

    def fits(mesh: MeshSpec = mesh, job: Job = job, dtype: str = report.dtype, vae_dtype: str = report.vae_dtype):
        memory = report.device_memory, report.memory_fraction
        return _report(checkpoint, mesh, job, dtype, vae_dtype, report.vae_devices, *memory).fits

    told = [
        *(f"mesh {m}" for m in _first(meshes, lambda m: fits(mesh=m))),
        *(f"dtype {d}" for d in _first(dtypes, lambda d: fits(dtype=d))),
        *(f"vae_dtype {d}" for d in _first(vae_dtypes, lambda d: fits(vae_dtype=d))),
        *(f"{_named(j)}" for j in _first(smaller, lambda j: fits(job=j))),
    ]
    yield from told
    if not told:
        changes = [(j, m) for j in (job, *smaller) for m in (mesh, *meshes)]
        for j, m in _first(changes, lambda both: fits(both[1], both[0], "bfloat16", "bfloat16")):
            yield f"mesh {m}, dtype and vae_dtype bfloat16, {_named(j)}, all together"


def _can_be(mesh: MeshSpec, checkpoint: Checkpoint) -> bool:
    try:
        check_mesh(mesh, checkpoint)
    except ValueError:
        return False
    return True


def _named(job: Job) -> str:
    num_frames, height, width = job.size
    return f"{width}x{height}, {num_frames} frames"


def _smaller(checkpoint: Checkpoint, job: Job) -> Iterator[dict[str, int]]:
    """Sizes below a job's, the nearest first: fewer frames at its size, then as many or fewer at less of it."""
    step, stride = checkpoint.geometry.temporal, checkpoint.geometry.stride
    for scale in (1, 2 / 3, 1 / 2, 1 / 3):
        height, width = (max(1, int(side * scale) // stride) * stride for side in job.size[1:])
        for share in (1, 3 / 4, 1 / 2, 1 / 4):
            num_frames = int((job.size[0] - 1) * share) // step * step + 1
            if (num_frames, height, width) != job.size:
                yield {"num_frames": num_frames, "height": height, "width": width}


def _first(candidates: Iterable[Any], accept: Callable[[Any], bool]) -> list[Any]:
    """The first accepted candidate, alone in a list, which is empty where none is."""
    return next(([c] for c in candidates if accept(c)), [])


def _forward_tflop(checkpoint: Checkpoint, job: Job) -> dict[str, float]:
    cfg = checkpoint.transformer
    flops = transformer_flops(
        cfg, checkpoint.geometry.num_tokens(*job.size), image_rows=image_rows(cfg),
        timesteps=_timesteps(checkpoint, job),
    )  # fmt: skip
    return {name: value / 1e12 for name, value in flops._asdict().items()}


def _of_a_tick(checkpoint: Checkpoint, mesh: MeshSpec, job: Job, dtype: np.dtype) -> dict[str, Any]:
    """What a device computes and sends in a tick, by mesh axis."""
    tick = tick_work(checkpoint, mesh, job, dtype)
    sent: dict[str, dict[str, int]] = {}
    for one in tick.sent:
        total = sent.setdefault(one.axis, {"collectives": 0, "bytes": 0})
        total["collectives"] += one.times(tick.share.layers)
        total["bytes"] += one.sent(tick.share.layers)
    return {"device_tflop": tick.flops.total / 1e12, "sent": sent}


class TickWork(NamedTuple):
    """What a device that has as much to do as any does in a tick; pads and padding layers count."""

    share: Share
    flops: TransformerFlops
    sent: list[Sent]


def tick_work(checkpoint: Checkpoint, mesh: MeshSpec, job: Job, dtype: DTypeLike) -> TickWork:
    """What a device computes and sends in a tick."""
    cfg, rows = checkpoint.transformer, image_rows(checkpoint.transformer)
    share, frames, per_frame = _share(checkpoint, mesh, job)
    flops = device_flops(cfg, share, frames, per_frame, image_rows=rows, timesteps=_timesteps(checkpoint, job))
    return TickWork(share, flops, tick_traffic(cfg, share, frames, jnp.dtype(dtype).itemsize, image_rows=rows))


def _timesteps(checkpoint: Checkpoint, job: Job) -> int:
    """Timesteps of an evaluation: one a latent frame, where a first one can be given."""
    frames = checkpoint.geometry.latent_shape(*job.size)[0]
    return frames if checkpoint.variant.image_input is ImageInput.FIRST_FRAME else 1


def image_rows(cfg: TransformerConfig) -> int:
    """CLIP rows in cross-attention: 257 an image of 224 pixels, none for models that take no CLIP rows."""
    return 0 if cfg.image_dim is None else cfg.pos_embed_seq_len or 257


def parameter_bytes(
    checkpoint: Checkpoint, mesh: MeshSpec, dtype: DTypeLike, vae_dtype: DTypeLike, vae_devices: int = 0
) -> list[int]:
    """Bytes of parameters on each device, in the mesh's order and then the VAE's own: shares of DiT and encoders, and
    the whole VAE where it has no devices of its own."""
    each = sum(_weight_bytes(checkpoint.transformer, checkpoint.num_experts, mesh, jnp.dtype(dtype)))
    encoders, vae = _component_bytes(checkpoint, mesh.num_devices, jnp.dtype(dtype), jnp.dtype(vae_dtype))
    each += encoders + (0 if vae_devices else vae)
    return [each] * mesh.num_devices + [vae] * vae_devices


def _weight_bytes(cfg: TransformerConfig, num_experts: int, mesh: MeshSpec, dtype: np.dtype) -> tuple[int, int]:
    """Bytes of a device's share of the layers, padding too, and of its ends."""
    return _split_weight_bytes(cfg, num_experts, MeshSpec(pp=mesh.pp, tp=mesh.tp), dtype)  # other axes hold copies


@cache  # like what else traces a model: a search for what fits asks for the same again and again
def _split_weight_bytes(cfg: TransformerConfig, num_experts: int, mesh: MeshSpec, dtype: np.dtype) -> tuple[int, int]:
    _, weights = abstract_weights(cfg, num_experts, RULES.parts(asdict(mesh), "layer"), dtype)
    parts = map_axes(lambda *axes: RULES.parts(asdict(mesh), *axes), weights)
    blocks, ends = (
        sum(x.size * x.dtype.itemsize // n for x, n in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
        for a, b in zip(weights, parts, strict=True)
    )
    return blocks, ends


@cache
def _component_bytes(checkpoint: Checkpoint, devices: int, dtype: np.dtype, vae_dtype: np.dtype) -> tuple[int, int]:
    """Bytes of a device's shares of the encoders, and of the VAE."""
    states = {name: state for name, (_, state) in abstract_components(checkpoint, dtype, vae_dtype).items()}
    vae = tree_bytes(states.pop("vae"))
    return sum(tree_bytes(share_of(state, devices)) for state in states.values()), vae


def activation_bytes(
    checkpoint: Checkpoint, mesh: MeshSpec, job: Job, dtype: DTypeLike, vae_dtype: DTypeLike, vae_devices: int = 0
) -> dict[str, dict[str, int]]:
    """Named buffers of each phase that live at once, on each device that has a part in it.

    Phases follow one another, so a device needs the largest.

    Encoding texts (0.1 GiB of UMT5's, on every device) and single images comes before them, and takes less.
    """
    of_the_vae = checkpoint, job, jnp.dtype(vae_dtype), vae_devices or mesh.num_devices
    encode = {"encode": vae_bytes("encode", *of_the_vae)} if encodes_frames(checkpoint, job) else {}
    return {
        **encode,
        "denoise": _denoise_bytes(checkpoint, mesh, job, jnp.dtype(dtype)),
        "decode": vae_bytes("decode", *of_the_vae),
    }


def encodes_frames(checkpoint: Checkpoint, job: Job) -> bool:
    """Whether the VAE encodes as many frames as a video has: a source video, or channels beside the latents."""
    channels = checkpoint.image_input in (ImageInput.CHANNELS, ImageInput.CHANNELS_AND_CLIP)
    return channels or any(request.video is not None for request in job.requests)


def _phases(mesh: MeshSpec, vae_devices: int, activations: Mapping[str, Mapping[str, int]]) -> list[dict[str, int]]:
    """What each device needs in the phases that it has a part in: with devices of its own the VAE is on no others."""
    peaks = {phase: sum(buffers.values()) for phase, buffers in activations.items()}
    if not vae_devices:
        return [peaks] * mesh.num_devices
    denoise = {"denoise": peaks.pop("denoise")}
    return [denoise] * mesh.num_devices + [peaks] * vae_devices


def _denoise_bytes(checkpoint: Checkpoint, mesh: MeshSpec, job: Job, dtype: np.dtype) -> dict[str, int]:
    """What a tick keeps, and the largest of a layer's moments."""
    cfg, geometry = checkpoint.transformer, checkpoint.geometry
    share, frames, per_frame = _share(checkpoint, mesh, job)
    slots, texts = room(-(-len(job.requests) // mesh.dp)), max(1 + job.guided, mesh.cfg) // mesh.cfg
    renoises = any(r.table.renoises for r in job.requests)
    latent = 4 * frames * share.tokens * math.prod(cfg.patch_size) * geometry.z_dim
    blocks, _ = _weight_bytes(cfg, 1, replace(mesh, pp=1), dtype)
    image = 4 * image_rows(cfg) * (cfg.image_dim or 0)
    extra = cfg.in_channels - geometry.z_dim  # mask and image channels
    moments = _layer_moments(cfg, share, frames, per_frame, dtype.itemsize)
    moment = max(moments, key=lambda name: moments[name])
    return {
        "latents, x0 history and velocity of a ring's videos (6 x float32)": 6 * slots * latent,
        "noise of renoise (8 x float32)": RENOISINGS * slots * latent * renoises,
        "text rows of a ring's videos": 4 * slots * texts * job.requests[0].max_sequence_length * cfg.text_dim,
        "image rows and channels": slots * (image + latent * extra // geometry.z_dim),
        "hidden state": frames * share.tokens * cfg.dim * dtype.itemsize,
        moment: moments[moment],
        "half of a layer's weights, cut out of their stack": blocks // cfg.num_layers // 2,
    }


def _layer_moments(cfg: TransformerConfig, share: Share, frames: int, per_frame: int, itemsize: int) -> dict[str, int]:
    """What a layer holds beside the hidden state that it began with, where it holds most. 16-bit attention is cuDNN's,
    which holds no logits."""
    tp, groups = share.sizes["tp"], share.sizes["sp"] // share.ulysses
    hidden, inner = (frames * share.tokens * width * itemsize for width in (cfg.dim, cfg.ffn_dim // tp))
    heads = hidden // tp  # of q, k, v and the result each
    moments = {
        "one layer, in attention: q, k, v and the result": max(4 * heads, hidden + 3 * heads),
        "one layer, in the MLP: its input and inner state": hidden + inner,
        "one layer, in attention: the result, and its sum over tp": (heads + 2 * hidden) * (tp > 1),
        "one layer, in attention: q, k, v and the result, one of them while tokens are traded for heads":
            5 * heads * (share.ulysses > 1),
        "one layer, in attention: q, and k and v twice, to pass them on": 5 * heads * (groups > 1),
        "one layer, in attention: q, k and v twice, to pass them on, and what was seen (float32)":
            8 * heads * (groups > 2),
    }  # fmt: skip
    if itemsize == 4:
        rows = frames * (per_frame if groups == 1 else share.tokens * share.ulysses)
        n = cfg.num_attention_heads // tp // share.ulysses
        logits = 4 * n * query_chunk(1, rows, rows, n) * rows
        moments = {name: size + hidden + logits * ("attention" in name) for name, size in moments.items() if size}
        moments["one layer, in the MLP: its input and inner state"] = 2 * hidden + inner
    return moments


def _share(checkpoint: Checkpoint, mesh: MeshSpec, job: Job) -> tuple[Share, int, int]:
    """What a device has of a forward; latent frames, and tokens of each."""
    cfg, geometry, sizes = checkpoint.transformer, checkpoint.geometry, dict(zip(AXES, mesh.sizes, strict=True))
    per_frame = geometry.num_tokens(1, *job.size[1:])
    share = device_share(cfg, sizes, per_frame, mesh.ulysses or most_ulysses(cfg, sizes))
    return share, geometry.latent_shape(*job.size)[0], per_frame


def memory_fraction() -> float:
    """Share of a card's memory that JAX takes: what the environment says, else its default."""
    given = os.environ.get("XLA_CLIENT_MEM_FRACTION") or os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or "0.75"
    try:
        fraction = float(given)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise ValueError(f"XLA_CLIENT_MEM_FRACTION={given} is no share of a device's memory, such as 0.92")
    return fraction


def present_memory(device: jax.Device) -> int | None:
    """Memory of a device, as much as JAX takes of it, when it is an accelerator that says so."""
    return None if device.platform == "cpu" else (device.memory_stats() or {}).get("bytes_limit")


def parse_memory(value: str | int | None, what: str = "device memory") -> int | None:
    """Bytes of "80GB" (80e9) or "80GiB" (80 * 2**30); a number of Python's is bytes. ValueError for what is no size."""
    if value is None:
        return None
    text = str(value).strip()
    number = text.rstrip("BKMGTIbkmgti")
    unit = text[len(number) :].upper() if isinstance(value, str) else "B"
    try:
        size = int(float(number) * (_UNITS[unit] if unit else _LEAST_MEMORY))
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size > 0 and not unit:
        raise ValueError(f"{what} {value!r} has no unit: {number}GB, {number}GiB?")
    if size < _LEAST_MEMORY:
        raise ValueError(f"{what} {value!r} is no size from 1MB up, such as 80GB or 80GiB")
    return size


def bytes_text(size: int) -> str:
    """Bytes as a person reads them."""
    if not size:
        return "-"
    return f"{size / 2**30:,.2f} GiB" if size >= 2**27 else f"{size / 2**20:,.2f} MiB"


def _plus(counts: list[int]) -> str:
    """ "40", "10 + 10 + 10 + 10" or, of many, "16 x 2 + 1"."""
    if len(counts) <= 8:
        return " + ".join(map(str, counts))
    runs = [(n, sum(1 for _ in same)) for n, same in groupby(counts)]
    return " + ".join(f"{times} x {n}" if times > 1 else f"{n}" for n, times in runs)
