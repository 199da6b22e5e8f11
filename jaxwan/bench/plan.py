"""What a sub-command measures, in the order of what is worth knowing first, and what each item is expected to cost."""

from typing import Any

from jaxwan.bench.compiling import candidates
from jaxwan.bench.engine import BRANCHES, FORMS, LONG, REQUESTS, STEPS
from jaxwan.bench.item import TERA, Item
from jaxwan.bench.mesh import LAYERS, MESHES
from jaxwan.bench.presets import Preset
from jaxwan.flops import vae_decode_flops
from jaxwan.kernels.attention import IMPLEMENTATIONS

KINDS = ("ceilings", "attention", "dit", "block", "vae", "convolution", "blend", "text", "sampler", "pipeline", "load",
         "e2e", "compile", "growth", "flags", "mesh", "mesh-plan", "engine", "all")  # fmt: skip
COMPARABLE = ("dit", "vae", "sampler")  # what `--against diffusers` measures
GPU_RATE, CPU_RATE = 500.0, 0.05  # TFLOP/s that predictions count on
STARTING, COMPILING = 15.0, 12.0  # seconds of a process with its weights, and of each program that takes long
ON_CPU = 5.0, 4.0  # the same
RIVAL = 50.0, 75.0  # seconds in which torch starts and compiles, on a GPU and on a CPU
# programs that take long; of a kind that is not here, none
PROGRAMS = {"dit": 1, "block": 2, "flags": 1, "vae": 2, "convolution": 10, "blend": 2, "sampler": 1, "pipeline": 3,
            "load": 4, "e2e": 3, "compile": 3, "growth": 8, "mesh": 6, "mesh-plan": 9, "engine": 5}  # fmt: skip


def make_items(kind: str, presets: list[Preset], *, against: str = "", runs: int = 3, profile: str = "",
               flags: tuple[str, ...] = ()) -> list[Item]:  # fmt: skip
    """The items of a sub-command. flags: XLA flags to try instead of the usual candidates.

    Raises ValueError for a comparison of what cannot be compared.
    """
    if against and kind not in COMPARABLE:
        raise ValueError(f"--against is for {', '.join(COMPARABLE)}, not for {kind}")
    if kind == "all":
        return _everything(presets, runs, profile)

    def items(some: list[Preset], *forms: str) -> list[Item]:
        return [Item(kind, p, form, against, runs, profile if kind == "block" else "") for p in some for form in forms]

    if kind in ("ceilings", "mesh", "mesh-plan"):
        return items(presets[:1], "")
    if kind == "engine":  # many requests of the first preset; the last one's are long enough to be cut into segments
        return items(presets[:1], FORMS[0]) + items(presets[-1:], FORMS[1])
    if kind == "attention":
        return items(presets, *IMPLEMENTATIONS)
    if kind == "blend":
        return items(presets, "xla", "pallas")
    if kind == "vae":
        whole = [item for preset in _different_vaes(presets) for item in items([preset], *_vae_dtypes(preset))]
        return whole if against else whole + make_items("convolution", presets, runs=runs)
    if kind == "convolution":
        return items(_different_vaes(presets), "float32", "bfloat16")
    if kind == "compile":
        return items(presets, "cold", "warm")
    if kind == "flags":
        return [item for p in presets for item in items([p], "none", *(flags or candidates(p)), "none again")]
    return items(presets, "")


def _everything(presets: list[Preset], runs: int, profile: str) -> list[Item]:
    """What matters most comes first: a budget cuts the end off. Flags, meshes and the engine only where asked for."""

    def items(kind: str, some: list[Preset]) -> list[Item]:
        return make_items(kind, some, runs=runs, profile=profile)

    first = presets[:1]
    vaes = [item for item in items("vae", presets) if item.kind == "vae"]
    found = items("ceilings", first) + items("attention", first) + items("dit", presets) + items("block", first)
    found += [item for item in vaes if item.form == "float32"]  # what is used unless another is asked for
    found += items("e2e", first) + [item for item in vaes if item.form != "float32"]
    for kind in ("text", "blend", "convolution", "sampler", "compile", "pipeline", "load", "growth"):
        found += items(kind, first)
    return found


def _different_vaes(presets: list[Preset]) -> list[Preset]:
    unique: dict[Any, Preset] = {}
    for preset in presets:
        unique.setdefault((preset.vae, preset.latent_shape), preset)
    return list(unique.values())


def _vae_dtypes(preset: Preset) -> tuple[str, ...]:
    return ("float32", "bfloat16") if preset.needs_accelerator else ("float32",)


def predicted_seconds(item: Item) -> float:
    """A cautious guess, start and compilation included, at what Hopper cards have done elsewhere."""
    gpu = item.preset.needs_accelerator
    starting, compiling = (STARTING, COMPILING) if gpu else ON_CPU
    overhead = starting + compiling * PROGRAMS.get(item.kind, 0)
    work = _tflop(item) / (GPU_RATE if gpu else CPU_RATE)
    if item.against:  # the same work twice in each of the ways in which torch runs
        overhead, work = overhead + RIVAL[not gpu], 6 * work
    return overhead + work + 2 * item.preset.sustain * (item.kind in ("ceilings", "dit"))


def _tflop(item: Item) -> float:
    preset, calls = item.preset, item.runs + 1
    forward = preset.forward.total / TERA
    layers = preset.transformer.num_layers
    layer = forward / layers
    decode = 5 * vae_decode_flops(preset.vae, preset.latent_shape) / TERA  # it is further from the peak
    slow = 5 if item.form == "xla" else 1
    clip_steps = 5 if preset.needs_accelerator else preset.steps
    return {
        "attention": preset.forward.self_attention / TERA / layers * calls * slow,
        "dit": (8 * layer * calls if item.against else forward * (calls + 3)),
        "block": 8 * layer * (calls + 1), "vae": decode * calls,
        "convolution": 4 * decode * calls / preset.latent_shape[0], "e2e": 2 * clip_steps * forward + decode,
        "sampler": forward * (10 if preset.needs_accelerator else 100),
        "pipeline": 6 * forward + 3 * decode, "growth": 150 * layer, "flags": 8 * layer * calls,
        "engine": forward * BRANCHES * (4 * REQUESTS * sum(STEPS) / 2 if item.form == FORMS[0] else 2 * calls * LONG),
        "mesh": len(MESHES) * calls * 6 * (LAYERS * layer if preset.needs_accelerator else 2 * forward),
        "mesh-plan": 9 * calls * 6 * (LAYERS * layer if preset.needs_accelerator else 2 * forward),
    }.get(item.kind, 0.0)  # fmt: skip
