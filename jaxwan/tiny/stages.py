"""The stages of the bundled model's training, in order: VAE, encoded clips, text encoder, base denoiser, two experts.

Each goes on where it was stopped, and needs what the stages before it wrote to the output folder.
"""

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import takewhile
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxwan.pipelines.prompt import Tokenizer, load_tokenizer
from jaxwan.tiny import train_text
from jaxwan.tiny.checkpoint import EXPERTS, read_component, write_component, write_surroundings
from jaxwan.tiny.dit_quality import Judge
from jaxwan.tiny.latents import PIECES, VALIDATION, make_latents, pieces_folder, read_latents
from jaxwan.tiny.muon import Params
from jaxwan.tiny.train_dit import (
    BASE,
    EXPERT_PLANS,
    Data,
    Plan,
    abstract_state,
    initial_parameters,
    make_optimizer,
    make_phases,
)
from jaxwan.tiny.train_vae import load_vae, train_vae
from jaxwan.tiny.training import Phase, Report, Saved, Saver, latest_step, read_history, run, start

STAGES = ("vae", "latents", "text", "base", *EXPERTS)
REPORT_MINUTES = 10.0
_ENCODER = "text_encoder."


class Settings(NamedTuple):
    """Folders of the saved states and of the model, and how to train."""

    states: Path
    output: Path
    scale: float = 1.0
    minutes: float | None = None
    seed: int = 0
    dtype: str = "bfloat16"

    def since(self, began: float) -> "Settings":
        """With the minutes that are left of those that began at a time of the monotonic clock."""
        if self.minutes is None:
            return self
        return self._replace(minutes=max(0.0, self.minutes - (time.monotonic() - began) / 60))


def train_stage(name: str, settings: Settings) -> bool:
    """Train a stage; returns whether it is done and written. Raises ValueError when an earlier stage is missing."""
    if name == "vae":
        s = settings
        return train_vae(s.states, s.output / "vae", scale=s.scale, minutes=s.minutes, seed=s.seed)
    if not (settings.output / "vae" / "config.json").is_file():
        raise ValueError(f"{settings.output} has no vae: run the stage 'vae' first")
    if name == "latents":
        return encode_all(settings)
    if name == "text":
        return train_text_encoder(settings)
    if not (settings.output / "text_encoder" / "config.json").is_file():
        raise ValueError(f"{settings.output} has no text_encoder: run the stage 'text' first")
    return train_base(settings) if name == "base" else train_expert(name, settings)


def encode_all(settings: Settings, kinds: Iterable[str] = tuple(PIECES)) -> bool:
    """Encode what of the clips and pictures is not encoded yet; returns whether the minutes were enough."""
    from tqdm import tqdm

    until = inf if settings.minutes is None else time.monotonic() + 60 * settings.minutes
    for kind in kinds:
        in_time = takewhile(lambda _: time.monotonic() < until, (VALIDATION, *range(PIECES[kind])))
        numbers = tqdm(in_time, f"encoding {kind}", PIECES[kind] + 1, disable=None)
        make_latents(settings.output / "vae", settings.states / "latents", kind, numbers)
    return time.monotonic() < until


def train_text_encoder(settings: Settings) -> bool:
    """Train the text encoder, and write all that surrounds the trained weights."""
    write_surroundings(settings.output)
    optimizer, dtype = make_optimizer(), jnp.dtype(settings.dtype)
    saver = Saver(settings.states / "text")
    saved = saver.restore(train_text.abstract_state(optimizer))
    if saved is None:
        params = train_text.initial_parameters(settings.seed)
        if (settings.output / "text_encoder" / "config.json").is_file():
            _say(f"no state in {saver.folder}: goes on from the weights in {settings.output}")
            params |= {_ENCODER + path: p for path, p in read_component(settings.output, "text_encoder").items()}
        saved = Saved(start(params, optimizer))
    tokenizer = load_tokenizer(settings.output / "tokenizer")
    phase = train_text.make_phase(tokenizer, dtype, optimizer, scale=settings.scale, seed=settings.seed)
    measure = train_text.make_report(tokenizer, dtype)
    average, done = _run([phase], saver, saved, settings, lambda saved: measure(saved.state.average))
    if done:
        encoder = {path.removeprefix(_ENCODER): p for path, p in average.items() if path.startswith(_ENCODER)}
        write_component(encoder, settings.output, "text_encoder")
    return done


def train_base(settings: Settings) -> bool:
    """Train the base denoiser; experts that are not trained yet are then copies of it."""
    write_surroundings(settings.output)
    saver = Saver(settings.states / "base")
    saved = saver.restore(abstract_state())
    if saved is None and (settings.output / "transformer_2" / "config.json").is_file():
        _say(f"no state in {saver.folder}: goes on with the last phase from the weights in {settings.output}")
        params = read_component(settings.output, "transformer_2")
        saved = Saved(start(params, make_optimizer()), phase=len(BASE) - 1)
    saved = saved or Saved(start(initial_parameters(settings.seed), make_optimizer()))
    average, done = _train(BASE, saver, saved, settings)
    if done:
        for name, folder in EXPERTS.items():
            if latest_step(settings.states / name) is None:
                write_component(average, settings.output, folder)
    return done


def train_expert(name: str, settings: Settings) -> bool:
    """Train the base on for the noise levels of one expert."""
    if not (settings.output / EXPERTS[name] / "config.json").is_file():
        raise ValueError(f"{settings.output} has no {EXPERTS[name]}: run the stage 'base' first")
    saver = Saver(settings.states / name)
    saved = saver.restore(abstract_state())
    saved = saved or Saved(start(read_component(settings.output, EXPERTS[name]), make_optimizer()))
    average, done = _train(EXPERT_PLANS[name], saver, saved, settings)
    if done:
        write_component(average, settings.output, EXPERTS[name])
    return done


def learning_curve(states: Path) -> str:
    """What was measured along the trainings whose states are kept, as Markdown: a table a stage."""
    tables = []
    for stage in STAGES:
        history = read_history(states / stage)
        names = list(dict.fromkeys(name for entry in history for name in entry))
        lines = [names, ["---"] * len(names), *([str(entry.get(name, "")) for name in names] for entry in history)]
        if history:
            tables.append("\n".join([f"{stage}:", "", *(f"| {' | '.join(line)} |" for line in lines)]))
    return "\n\n".join(tables) or f"no state in {states}"


def _train(plans: Sequence[Plan], saver: Saver, saved: Saved, settings: Settings) -> tuple[Params, bool]:
    """A denoiser's averaged parameters after the plans, and whether they were done. Encodes first what is missing."""
    began = time.monotonic()
    if not encode_all(settings, dict.fromkeys(plan.kind for plan in plans)):
        _say("stopped while clips were being encoded; the same command goes on")
        return saved.state.average, False
    settings = settings.since(began)
    tokenizer = load_tokenizer(settings.output / "tokenizer")
    encoder = read_component(settings.output, "text_encoder")
    phases = make_phases(plans, _data(settings, tokenizer), jnp.dtype(settings.dtype), encoder, scale=settings.scale)
    return _run(phases, saver, saved, settings, _reporter(plans, settings, tokenizer, encoder, saver.folder.name))


def _run(
    phases: Sequence[Phase], saver: Saver, saved: Saved, settings: Settings, report: Report
) -> tuple[Params, bool]:
    """The averaged parameters after the phases, and whether they were done."""
    _say(f"step {int(saved.state.step)}; states go to {saver.folder}")
    saved, done = run(
        phases, saved, saver, minutes=settings.minutes, seed=settings.seed, report=report,
        report_minutes=REPORT_MINUTES,
    )  # fmt: skip
    if not done:
        _say(f"stopped at step {int(saved.state.step)}; the same command goes on")
    return saved.state.average, done


def _data(settings: Settings, tokenizer: Tokenizer) -> Callable[[str], Data]:
    """Encoded training data of a kind, read on first use."""
    folder = pieces_folder(settings.output / "vae", settings.states / "latents")

    @cache
    def data(kind: str) -> Data:
        return Data(read_latents(folder, kind, range(PIECES[kind])), tokenizer, settings.seed)

    return data


def _reporter(plans: Sequence[Plan], settings: Settings, tokenizer: Tokenizer, encoder: Params, name: str) -> Report:
    vae_folder = settings.output / "vae"
    folder = pieces_folder(vae_folder, settings.states / "latents")

    @cache
    def judge(kind: str) -> Judge:
        return Judge(read_latents(folder, kind, [VALIDATION]), tokenizer, encoder, load_vae(vae_folder),
                     settings.states / "samples")  # fmt: skip

    def report(saved: Saved) -> Mapping[str, Any]:
        own = judge(plans[min(saved.phase, len(plans) - 1)].kind)
        params = saved.state.average
        losses = {f"loss@{level}": round(loss, 4) for level, loss in own.losses(params).items()}
        return losses | own.gaps(params) | own.samples(params, f"{name}-{int(saved.state.step):06}")

    return report


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
