"""Notes on a call: what its caller would else find out late, or never."""

from collections.abc import Iterator, Sequence
from typing import Any

from jaxwan.pipelines.checkpoint import Checkpoint
from jaxwan.pipelines.condition import choose_expert
from jaxwan.pipelines.prompt import lost_text
from jaxwan.pipelines.request import Request


def cut_texts(checkpoint: Checkpoint, requests: Sequence[Request]) -> Iterator[str]:
    """On texts that are longer than what the model reads, if the checkpoint has its tokenizer."""
    if checkpoint.tokenizer is None:
        return
    rows = requests[0].max_sequence_length
    texts = [("prompt", r.prompt) for r in requests]
    texts += [("negative prompt", r.negative_prompt) for r in requests if r.guided]
    for name, text in dict.fromkeys(texts):
        if lost := text and lost_text(checkpoint.tokenizer, text, rows):
            yield f"the {name} is longer than {rows} tokens, its end is not read: {lost!r}"


def without_effect(requests: Sequence[Request], draws: Sequence[bool], **given: Any) -> Iterator[str]:
    """On arguments that change no prompt's video; of those that are given one a prompt, on each that does not."""
    for name, value in given.items():
        several = isinstance(value, (list, tuple))
        values = value if several else [value] * len(requests)
        silent = [v is None or (isinstance(v, str) and not v) for v in values]
        whys = [None if s else _why_idle(name, *of) for s, *of in zip(silent, requests, draws, strict=True)]
        idle = [i for i, why in enumerate(whys) if why]
        if len(idle) == len(requests):
            yield f"{name} has no effect: {whys[0]}"
        elif several:
            yield from (f"{name} of prompt {i} has no effect: {whys[i]}" for i in idle)


def _why_idle(name: str, request: Request, draws: bool) -> str | None:
    """Why an argument that is given changes nothing of a video, or None."""
    if name in ("seed", "index"):
        return None if draws else "the noise is given, as latents"
    if name == "flow_shift":
        return None if request.sampling.flow_shift is not None else "timesteps are used as they are"
    if not request.guided:
        return f"guidance_scale={request.guidance_scale:g} turns guidance off (of both experts, if there are two)"
    timesteps = request.table.timesteps[: request.table.num_steps]
    if name == "guidance_scale_2" and not choose_expert(timesteps, request.boundary_ratio).any():
        return "no step is the low-noise expert's"
    return None


def sampling_lines(requests: Sequence[Request]) -> Iterator[str]:
    """How each prompt is sampled: a line for all, or one for those of which it holds."""
    prompts: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
        prompts.setdefault(_sampled(request), []).append(i)
    for line, own in prompts.items():
        whose = f"prompt{'s' * (len(own) > 1)} {', '.join(map(str, own))}: "
        yield line if len(prompts) == 1 else whose + line


def _sampled(request: Request) -> str:
    """Preset, sampler, steps, shift, guidance and where experts change, in a line."""
    own, steps = request.sampling, int(request.table.num_steps)
    sigmas = "" if own.sigma_schedule == "diffusers" else f" on {own.sigma_schedule} sigmas"
    parts = [own.sampler + sigmas, f"{steps} step{'s' * (steps > 1)}"]
    parts += [f"timesteps {' '.join(f'{t:g}' for t in own.timesteps)}"] if own.timesteps is not None else []
    parts += [f"shift {own.flow_shift:g}"] if own.flow_shift is not None else []
    low = choose_expert(request.table.timesteps[:steps], request.boundary_ratio)
    second = f" and {request.guidance_scale_2:g}" * (request.boundary_ratio is not None)
    parts.append(f"guidance {request.guidance_scale:g}{second}" if request.guided else "no guidance")
    if request.boundary_ratio is not None:
        change = int(low.argmax()) + 1
        parts.append(
            f"the low-noise expert from step {change}" if 0 < low.sum() < steps
            else f"the {'low' if low.all() else 'high'}-noise expert alone"
        )  # fmt: skip
    return f"preset {request.preset}: {', '.join(parts)}"


def equal_videos(requests: Sequence[Request]) -> Iterator[str]:
    """On videos that will be equal, because all that makes them is."""
    first: dict[tuple, int] = {}
    for i, request in enumerate(requests):
        settings = request.settings()
        made_of = repr(settings["call"]), *(id(getattr(request, name)) for name in settings.get("inputs", ()))
        if first.setdefault(made_of, i) != i:
            yield f"videos {first[made_of]} and {i} will be the same: prompt, seed and all else are equal"
