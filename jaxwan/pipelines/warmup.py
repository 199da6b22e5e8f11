"""Compiling ahead of time: the programs that a job runs, and several of them at once."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import NamedTuple

import jax
import numpy as np

from jaxwan.config import ImageInput
from jaxwan.models.tiles import coder_for
from jaxwan.pipelines.checkpoint import Checkpoint
from jaxwan.pipelines.condition import noise_program
from jaxwan.pipelines.encoders import abstract_entry, latent_shape
from jaxwan.pipelines.parts import Parts
from jaxwan.pipelines.progress import Progress
from jaxwan.pipelines.prompt import abstract_prompt
from jaxwan.pipelines.request import Job, Request

THREADS = 4  # there are two or three long ones, and each is spread over cores by the compiler itself
Program = tuple[str, Callable, tuple]  # name, jitted function, its arguments or their shapes


class Warmup(NamedTuple):
    """What `WanPipeline.warmup` did.

    seconds: until everything was there. programs: seconds of tracing and compiling each one, beside the others; 0 (but
    for looking) where it was there already.
    """

    seconds: float
    programs: dict[str, float]


class Compiled(NamedTuple):
    """A program that was compiled ahead, and the seconds of tracing and compiling it."""

    name: str
    seconds: float
    program: jax.stages.Compiled


# What a job runs


def job_programs(
    checkpoint: Checkpoint, parts: Parts, job: Job, *, decode: bool = True, videos: int = 0
) -> Iterator[Program]:
    """Every program that a job runs on these parts, whose parameters may be shapes; those that take long first.

    videos: for how many there is to be room in the ring, where that is more than the job's own.
    """
    size, requests = job.size, job.requests
    shape = latent_shape(checkpoint, requests[0])
    bucket = parts.denoiser.bucket([abstract_entry(checkpoint, request) for request in requests], videos)
    yield from parts.denoiser.programs(bucket).listed(parts.denoiser.weights)
    coder = coder_for(parts.coder, requests[0].tiling)
    if decode:
        yield from coder.programs("decode", (1, *shape))
    encoded = _encoded_frames(checkpoint, requests)
    if encoded:
        yield from coder.programs("encode", (1, encoded, *size[1:], 3))
    encode = parts.encode_text
    if encode is not None and _has_texts(job):
        yield "text encoder", *encode.program(*abstract_prompt(requests[0].max_sequence_length))
    encode, cfg = parts.encode_image, checkpoint.image_encoder
    if encode is not None and cfg is not None:
        image = jax.ShapeDtypeStruct((cfg.image_size, cfg.image_size, 3), np.float32)
        yield "image encoder", *encode.program(image)
    yield noise_program(shape)


def programs_key(checkpoint: Checkpoint, parts: Parts, job: Job, *, decode: bool = True, videos: int = 0) -> tuple:
    """What `job_programs` depend on: jobs of the same key run the same programs."""
    bucket = parts.denoiser.bucket([abstract_entry(checkpoint, request) for request in job.requests], videos)
    request, encoded = job.requests[0], _encoded_frames(checkpoint, job.requests)
    return bucket, job.size[1:], min(encoded, 2), decode and min(job.size[0], 2), request.tiling, _has_texts(job)


def _has_texts(job: Job) -> bool:
    given = [r.prompt_embeds for r in job.requests] + [r.negative_prompt_embeds for r in job.requests if r.guided]
    return any(rows is None for rows in given)


def _encoded_frames(checkpoint: Checkpoint, requests: Sequence[Request]) -> int:
    """Frames of what the VAE encodes before the loop."""
    if requests[0].video is not None:
        return requests[0].num_frames
    if all(request.image is None for request in requests):
        return 0
    return 1 if checkpoint.image_input is ImageInput.FIRST_FRAME else requests[0].num_frames


# Compiling


@contextmanager
def compiling(programs: Sequence[Program], progress: Progress) -> Iterator[Iterator[Compiled]]:
    """Compile programs while the block runs; yields each, to be waited for inside the block.

    They are traced first, as a phase of `progress`, here in the caller's thread, whose settings of JAX hold for them;
    compiling then releases the GIL. Where compiling one fails, waiting raises. When the block is left early, none is
    begun any more.
    """
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="compile")
    try:
        futures = []
        with progress.phase("trace", len(programs), "program", apart=False) as update:
            for name, *rest in programs:
                futures.append(pool.submit(_compile, name, *_lowered(*rest)))
                update(1)
        yield (future.result() for future in as_completed(futures))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _lowered(function: Callable, arguments: tuple) -> tuple[jax.stages.Lowered, float]:
    start = time.perf_counter()
    return function.lower(*arguments), time.perf_counter() - start  # pyright: ignore[reportFunctionMemberAccess]


def _compile(name: str, lowered: jax.stages.Lowered, seconds: float) -> Compiled:
    start = time.perf_counter()
    program = lowered.compile()
    return Compiled(name, seconds + time.perf_counter() - start, program)
