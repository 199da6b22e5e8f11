"""The mesh that chooses itself: of every mesh that can be, the bytes by the dry run's account, and the time by its
account of work and the table of chips; the fastest that fits is taken.

Seconds are estimates: products at the rate that a chip is expected to reach, then what is sent, one after the other.
What is not counted is small or the same for all: reading weights, the halos of the VAE's strips, writing files.
"""

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxwan.convert.lora import Lora
from jaxwan.flops import text_encoder_flops, vae_decode_flops, vae_encode_flops
from jaxwan.models.video_coder import WHOLE
from jaxwan.pipelines.arguments import whole
from jaxwan.pipelines.call import make_job
from jaxwan.pipelines.checkpoint import Checkpoint, open_checkpoint
from jaxwan.pipelines.chips import Machine, find_chip, find_link
from jaxwan.pipelines.dit import layers_per_stage, most_ulysses
from jaxwan.pipelines.dry_run import (
    bytes_text,
    dealt,
    encodes_frames,
    memory_fraction,
    needed_bytes,
    parse_memory,
    present_memory,
    steps_of,
    stood_in,
    tick_work,
)
from jaxwan.pipelines.load import check_mesh, check_use, default_dtype, parse_dtype
from jaxwan.pipelines.request import Job
from jaxwan.sharding.mesh import AXES, MeshSpec, find_devices

GOALS = ("latency", "throughput")
_FITTING, _NOT_FITTING = 9, 4  # rows of a table beside the chosen one
_TOLD = 2  # meshes that are named, which would be faster and which are slower
_COUNTS = (2, 4, 8, 16)  # of devices that machines have
_MERGING = 0.05  # of attention's work, where keys and values go round: parts are merged, and each is smaller; a guess


class Estimate(NamedTuple):
    """Seconds of the phases: of a call, or of each video where a machine is always full."""

    encode: float
    denoise: float
    decode: float


class Tick(NamedTuple):
    """Seconds of a tick of the ring, in which a device computes, and then sends."""

    computing: float
    sending: float


class Candidate(NamedTuple):
    """A mesh, what it is expected to take, and the bytes of its fullest device."""

    mesh: MeshSpec
    phases: Estimate
    seconds: float
    bytes: int
    fits: bool


@dataclass(frozen=True)
class MeshPlan:
    """The mesh that was chosen. Print it for a table of the best mesh of each kind.

    bytes: of the fullest device. seconds: expected of the call, or for "throughput" of each video. why: a few lines;
    the first says all in one. fits: whether it does; where none does it is the mesh that needs least. rows: the best
    mesh of each combination of axes.
    """

    mesh: MeshSpec
    bytes: int
    seconds: float
    why: str
    fits: bool
    rows: tuple[Candidate, ...]
    room: int | None  # bytes that a device has for it; None: not known
    relative: bool  # whether seconds are for comparing alone, because the chip is not known or virtual

    def __str__(self) -> str:
        width = max(len(label(row.mesh)) for row in self.rows)
        unit, of = ("time", self.seconds) if self.relative else ("seconds", 1.0)
        lines = [f"{'mesh':<{width}} {'devices':>8} {'a device':>12} {unit:>8}"]
        for row in self.rows:
            numbers = f"{row.mesh.num_devices:>8} {bytes_text(row.bytes):>12} {_seconds(row.seconds / of):>8}"
            lines.append(f"{label(row.mesh):<{width}} {numbers}  {self._verdict(row)}")
        return "\n".join([*lines, "", self.why])

    def _verdict(self, row: Candidate) -> str:
        if row.mesh == self.mesh and self.fits:
            return "chosen"
        return against(row, self.seconds, self.room)


def plan_mesh(
    model: "str | Path | Checkpoint | None" = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    requests: int = 1,
    devices: int | None = None,
    device_memory: int | str | None = None,
    goal: str = "latency",
    *,
    chip: str | None = None,
    link: str | None = None,
    between: str = "Ethernet",
    devices_per_host: int | None = None,
    dtype: Any = None,
    vae_dtype: Any = "float32",
    vae_devices: int | None = None,
    variant: str | None = None,
    components: Mapping[str, Any] | None = None,
    loras: Sequence[Lora | str | Path] = (),
    **call: Any,
) -> MeshPlan:
    """The fastest mesh of at most so many devices that a call fits, from the configuration files alone.

    requests: videos at a time, of each prompt if there are several. goal: "latency", the seconds of a whole call, or
    "throughput", those of each video where so many are always on their way.
    devices, device_memory: of a machine that need not be here; None: what is here. chip: one of `chips.CHIPS`, such as
    "H100"; None: that of the devices here, or one with so much memory, and then seconds are for comparing alone.
    devices_per_host: None is one host. link, between: of devices in a host, None: the chip's own, and of hosts, by
    their names in `chips.LINKS`.
    height, width, num_frames: None: the model's. call, and all else: as of `dry_run`.

    Raises ValueError where no mesh fits, and as `dry_run`.

        print(plan_mesh("Wan-AI/Wan2.2-T2V-A14B-Diffusers", devices=8, device_memory="80GB", chip="H100"))
    """
    size = {"height": height, "width": width, "num_frames": num_frames}
    checkpoint = open_checkpoint(model, variant, components, loras)
    if "num_videos_per_prompt" in call:
        raise ValueError("num_videos_per_prompt is called requests here: give that alone")
    call |= size | {"num_videos_per_prompt": whole("requests", requests, 1)}
    job = make_job(checkpoint, False, **stood_in(checkpoint, call))
    plan = choose_mesh(
        checkpoint, job, devices=devices, device_memory=device_memory, goal=goal, chip=chip, link=link,
        between=between, devices_per_host=devices_per_host, dtype=dtype, vae_dtype=vae_dtype, vae_devices=vae_devices,
    )  # fmt: skip
    return fitting(plan)


def fitting(plan: MeshPlan) -> MeshPlan:
    """A plan whose mesh fits. Raises ValueError for another."""
    if not plan.fits:
        raise ValueError(plan.why.splitlines()[0])
    return plan


def choose_mesh(
    checkpoint: Checkpoint, job: Job, *, devices: int | None = None, device_memory: int | str | None = None,
    goal: str = "latency", chip: str | None = None, link: str | None = None, between: str = "Ethernet",
    devices_per_host: int | None = None, dtype: Any = None, vae_dtype: Any = None, vae_devices: int | None = None,
) -> MeshPlan:  # fmt: skip
    """The mesh for a job, as `plan_mesh`; where none fits the one that needs least."""
    if goal not in GOALS:
        raise ValueError(f"goal={goal!r:.40} is not one of {', '.join(GOALS)}")
    own = 0 if vae_devices is None else whole("vae_devices", vae_devices, 1)
    dtype, vae_dtype = parse_dtype("dtype", dtype), parse_dtype("vae_dtype", vae_dtype) or "float32"
    if device_memory is None and chip is None:
        here = find_devices()
        count = len(here) if devices is None else whole("devices", devices, 1)
        dtype, room, kind = dtype or default_dtype(here[0]), present_memory(here[0]), here[0].device_kind
        devices_per_host = devices_per_host or (jax.local_device_count() if jax.process_count() > 1 else None)
    elif devices is None:
        raise ValueError("mesh=auto for a machine that is not here needs to know how many devices it has: devices=8")
    else:
        count, dtype, kind = whole("devices", devices, 1), dtype or "bfloat16", ""
        room = parse_memory(device_memory) or find_chip(chip)[0].memory
    if count <= own:
        raise ValueError(f"vae_devices={own} of {count} devices leave none for a mesh: the most is {count - 1}")
    found, known = find_chip(chip, kind, room)
    per_host = sys.maxsize if devices_per_host is None else whole("devices_per_host", devices_per_host, 1)
    machine = Machine(found, find_link(link or found.link), find_link(between), per_host, known)
    if kind == "" and room is not None:
        room = int(room * memory_fraction())
    search = Search(checkpoint, job, machine, room, dtype, vae_dtype, own, goal)
    candidates = search.candidates(count - own)
    chosen = next((c for c in candidates if c.fits), None) or min(candidates, key=lambda c: c.bytes)
    why = search.why(chosen, candidates, count)
    return MeshPlan(
        chosen.mesh,
        chosen.bytes,
        chosen.seconds,
        why,
        chosen.fits,
        _best_of_each_kind(candidates, chosen),
        room,
        machine.relative,
    )


# Which meshes there are


def possible_meshes(checkpoint: Checkpoint, job: Job, devices: int) -> Iterator[MeshSpec]:
    """Every mesh of at most so many devices, none of which would be idle in a job; sp in each of its forms."""
    cfg, heads = checkpoint.transformer, checkpoint.transformer.num_attention_heads

    def most(*taken: int) -> range:
        return range(1, devices // math.prod(taken) + 1)

    for dp in most():
        for branches in (1, 2):
            for pp in most(dp, branches):
                for tp in most(dp, branches, pp):
                    for sp in most(dp, branches, pp, tp):
                        mesh = MeshSpec(dp, branches, pp, sp, tp)
                        if not works(mesh, checkpoint, job):
                            continue
                        yield mesh
                        fewer = range(1, most_ulysses(cfg, dict(zip(AXES, mesh.sizes, strict=True))))
                        yield from (replace(mesh, ulysses=n) for n in fewer if sp % n == 0 and heads // tp % n == 0)


def works(mesh: MeshSpec, checkpoint: Checkpoint, job: Job) -> bool:
    """Whether a job can be laid out on a mesh, with work for every device."""
    try:
        check_mesh(mesh, checkpoint)
        check_use(mesh, checkpoint, job)
    except ValueError:
        return False
    return 0 not in layers_per_stage(checkpoint.transformer.num_layers, mesh.pp)


# What they take


@dataclass(frozen=True)
class Search:
    """What meshes are looked for. room: bytes of a device, None where not known; own: devices of the VAE's."""

    checkpoint: Checkpoint
    job: Job
    machine: Machine
    room: int | None
    dtype: str
    vae_dtype: str
    own: int = 0
    goal: str = "latency"

    def candidates(self, devices: int) -> list[Candidate]:
        """All of at most so many devices, the fastest first."""
        found = map(self.candidate, possible_meshes(self.checkpoint, self.job, devices))
        return sorted(found, key=lambda c: (c.seconds, c.mesh.num_devices, c.bytes))

    def candidate(self, mesh: MeshSpec) -> Candidate:
        """What a mesh takes."""
        phases = self.expected(mesh)
        side_by_side = self.own and self.goal == "throughput"
        seconds = max(phases.denoise, phases.encode + phases.decode) if side_by_side else sum(phases)
        size = max(needed_bytes(self.checkpoint, mesh, self.job, self.dtype, self.vae_dtype, self.own))
        return Candidate(mesh, phases, seconds, size, self.room is None or size <= self.room)

    def expected(self, mesh: MeshSpec) -> Estimate:
        """Seconds of the phases on a mesh."""
        videos, plan, steps = len(self.job.requests), dealt(mesh, self.job), steps_of(self.job)
        tick, text = sum(self.tick(mesh)), self._text_seconds(mesh)
        encode, decode = self._coding_seconds(self.own or mesh.num_devices)
        if self.goal == "throughput":
            return Estimate(encode + text / videos, plan.period * sum(steps) / videos * tick / videos, decode)
        return Estimate(videos * encode + text, plan.ticks(steps) * tick, videos * decode)

    def tick(self, mesh: MeshSpec) -> Tick:
        """Of the device that has as much to do as any."""
        work, sizes = tick_work(self.checkpoint, mesh, self.job, self.dtype), dict(zip(AXES, mesh.sizes, strict=True))
        around = work.share.ulysses < mesh.sp
        flops = work.flops.total + work.flops.self_attention * (_MERGING if around else 0.0)
        sending = math.fsum(self.machine.seconds(sizes, one, work.share.layers) for one in work.sent)
        return Tick(self._computing(flops, mesh.num_devices), sending)

    def _computing(self, flops: float, devices: int) -> float:
        """FLOPs of a device's part of the DiT or the text encoder."""
        chip = self.machine.chip
        return flops * self._crowd(devices) / chip.rate(chip.dit, self.dtype)

    def _crowd(self, devices: int) -> int:
        """How many devices wait for the same cores."""
        return devices if self.machine.chip.shared else 1

    def _text_seconds(self, mesh: MeshSpec) -> float:
        """Of all texts, through a ring of all devices."""
        if self.checkpoint.text_encoder is None:
            return 0.0
        given = {(r.prompt, r.negative_prompt, r.guided) for r in self.job.requests if r.prompt is not None}
        count = mesh.num_devices
        ticks = sum(1 + guided for *_, guided in given) + count - 1 if given else 0
        return ticks * self._computing(text_encoder_flops(self.checkpoint.text_encoder) / count, count)

    def _coding_seconds(self, devices: int) -> tuple[float, float]:
        """Of a video's way into latents, if it has one, and out of them."""
        checkpoint, job, request = self.checkpoint, self.job, self.job.requests[0]
        frames, height, width = checkpoint.geometry.latent_shape(*job.size)
        longer, tiling = max(height, width), request.tiling
        share = -(-longer // devices) / longer  # of a frame
        if tiling is not None and tiling.cuts(*job.size[1:]):
            layout = tiling.layout(checkpoint.vae, "decode", (height, width))
            (height, width), share = layout.largest, layout.rounds(devices)
        elif longer < WHOLE:
            share = 1
        comes_in = frames if encodes_frames(checkpoint, job) else int(request.image is not None)
        rate = self.machine.chip.rate(self.machine.chip.vae, self.vae_dtype) / self._crowd(devices)
        encode = vae_encode_flops(checkpoint.vae, (comes_in, height, width)) if comes_in else 0
        return encode * share / rate, vae_decode_flops(checkpoint.vae, (frames, height, width)) * share / rate

    # In words

    def why(self, chosen: Candidate, found: list[Candidate], devices: int) -> str:
        """A few lines, the first of which says all in one."""
        count = f"{len(found)} mesh{'es' * (len(found) > 1)} of up to {devices} device{'s' * (devices > 1)}"
        if not chosen.fits:
            least = f"{label(chosen.mesh)} needs least, {self._memory(chosen)}"
            return f"none of {count} fits: {least}, {_excess(chosen, self.room)}{self._more(devices)}"
        videos = len(self.job.requests)
        what = f"each of {videos} at a time" if self.goal == "throughput" else f"{videos} video{'s' * (videos > 1)}"
        taken = self.machine.trust(self.dtype)
        if not self.machine.relative:
            phases = ", ".join(f"{name} {_seconds(taken)}" for name, taken in chosen.phases._asdict().items())
            taken = f"about {_seconds(chosen.seconds)} s for {what} ({phases})"
        lines = [f"{label(chosen.mesh)}, the best of {count} for {self.goal}: {taken}; {self._memory(chosen)}"]
        sooner = [c for c in found if not c.fits and c.seconds < chosen.seconds]
        lines += [
            f"{label(c.mesh)} would take {100 * c.seconds / chosen.seconds:.0f} % of the time and does not fit: "
            + _excess(c, self.room)
            for c in _of_each_kind(sooner)[:_TOLD]
        ]
        later = [c for c in _of_each_kind(c for c in found if c.fits) if c.mesh != chosen.mesh]
        lines += [
            f"{label(c.mesh)} is {against(c, chosen.seconds, self.room)}, with {bytes_text(c.bytes)} a device"
            for c in later[:_TOLD]
        ]
        return "\n".join([*lines, *[self.machine.trust(self.dtype)] * (not self.machine.relative)])

    def _memory(self, one: Candidate) -> str:
        of = "" if self.room is None else f" of {bytes_text(self.room)}"
        return f"{bytes_text(one.bytes)}{of} a device"

    def _more(self, devices: int) -> str:
        """How many devices would do, if a usual number does."""
        for count in (n for n in _COUNTS if n > devices):
            if fitting := [c for c in self.candidates(count - self.own) if c.fits]:
                return f"; {count} such devices would do, {label(fitting[0].mesh)}"
        return ""


def label(mesh: MeshSpec) -> str:
    """A mesh as flags say it, such as "sp=8 ulysses=4"."""
    return str(mesh) + (f" ulysses={mesh.ulysses}" if mesh.ulysses is not None else "")


def against(row: Candidate, seconds: float, room: int | None) -> str:
    """What speaks against a mesh beside one that takes so long."""
    if not row.fits:
        return f"does not fit: {_excess(row, room)}"
    more = 100 * (row.seconds / seconds - 1)
    return "as fast" if more < 0.05 else f"{more:.{1 if more < 9.95 else 0}f} % slower"


def _seconds(taken: float) -> str:
    return f"{taken:,.0f}" if taken >= 1000 else f"{taken:.3g}"


def _excess(row: Candidate, room: int | None) -> str:
    return f"{bytes_text(row.bytes - (room or 0))} too much"


def _best_of_each_kind(found: list[Candidate], chosen: Candidate) -> tuple[Candidate, ...]:
    """The chosen mesh, the best others that fit and faster ones that do not; where none fits, those that need least."""
    if not chosen.fits:
        return tuple(_of_each_kind(sorted(found, key=lambda c: c.bytes)))[: 1 + _FITTING]
    others = [c for c in _of_each_kind(c for c in found if c.fits) if c.mesh != chosen.mesh]
    faster = _of_each_kind(c for c in found if not c.fits and c.seconds < chosen.seconds)
    return (chosen, *others[:_FITTING], *faster[:_NOT_FITTING])


def _of_each_kind(found: Iterable[Candidate]) -> list[Candidate]:
    """The first of each combination of axes."""
    kinds: dict[tuple[bool, ...], Candidate] = {}
    for one in found:
        kinds.setdefault(tuple(size > 1 for size in one.mesh.sizes), one)
    return list(kinds.values())
