"""Many calls of all sorts: nothing is compiled, lost or kept, and a sample has the bits of a call alone."""

import gc
import random
import time
import weakref

import jax
import numpy as np
import pytest
from runs import PROMPTS, compilations

from jaxwan import Aborted, Engine
from jaxwan.engine import coding
from jaxwan.engine.handle import Handle
from jaxwan.pipelines.denoise import Programs

SIZE = dict(height=32, width=48, num_frames=5)
SLOTS, OPEN = 3, 12  # calls at a time


def some_call(rng, seed):
    return SIZE | dict(
        prompt=f"{seed} {rng.choice(PROMPTS)}", seed=seed, num_inference_steps=rng.randint(1, 4),
        guidance_scale=rng.choice([1.0, 3.5]), flow_shift=rng.choice([3.0, 5.0]),
        sampler=rng.choice(["unipc", "euler", "dpm++2m"]),
    )  # fmt: skip


def number_of(request):
    return int(request.prompt.split()[0])


def wait_for_room(engine):
    deadline = time.monotonic() + 120
    while len(engine.handles) > OPEN:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_200_mixed_calls_compile_nothing_after_warming_up(pipe):
    rng = random.Random(0)
    with Engine(pipe, slots=SLOTS) as engine:
        engine.warmup(**SIZE)

        def calls():
            handles = []
            for seed in range(200):
                kept = "np" if seed % 20 == 0 else "latent"
                handles.append(engine.submit(**some_call(rng, seed), priority=seed % 3 % 2, output_type=kept))
                if seed % 10 == 5:
                    rng.choice(handles).abort()
                wait_for_room(engine)
            assert engine.drain(120)
            return handles

        done = []
        assert compilations(lambda: done.extend(calls())) == 0
    assert sum(handle.state == "done" for handle in done) >= 180
    assert {handle.state for handle in done} == {"done", "aborted"}


class Soak:
    """Calls by their numbers, and what became of them."""

    def __init__(self, pipe, folder, monkeypatch):
        self.pipe, self.folder, self.rng = pipe, folder, random.Random(1)
        self.calls, self.aborted, self.latents, self.errors = {}, set(), {}, {}
        self.handles = weakref.WeakSet()
        chance, run, prepare = random.Random(2), Programs.run, coding.prepare

        def failing_run(*given):
            if chance.random() < 0.02:
                raise RuntimeError("injected into the program")
            return run(*given)

        def failing_prepare(checkpoint, parts, requests, *rest):
            if number_of(requests[0]) % 17 == 3:
                raise OSError("injected into encoding")
            return prepare(checkpoint, parts, requests, *rest)

        monkeypatch.setattr(Programs, "run", failing_run)
        monkeypatch.setattr(coding, "prepare", failing_prepare)

    def take(self, handle: Handle):
        self.handles.add(handle)
        handle.add_done_callback(self.note)

    def note(self, handle):
        seed, error = number_of(handle.job.requests[0]), handle.future.exception()
        if error is None:
            assert seed not in self.latents
            self.latents[seed] = handle.result().latents
        elif not isinstance(error, Aborted):
            self.errors[seed] = str(error)

    def submit(self, engine, seed):
        call = some_call(self.rng, seed)
        if seed % 13 == 5:
            call["latents"] = np.full((1, 16, 2, 4, 6), 1e38, np.float32)  # squares of which are infinite
        self.calls[seed] = call
        self.take(engine.submit(**call, priority=self.rng.randint(-1, 1), output_type="latent"))
        if self.rng.random() < 0.15:
            handle = self.rng.choice(engine.handles or [None])
            if handle is not None and handle.abort():
                self.aborted.add(number_of(handle.job.requests[0]))
        if self.rng.random() < 0.1 and engine.handles:
            engine.handles[0].preview(timeout=60)
        wait_for_room(engine)

    def run(self, count, restarts):
        engine = Engine(self.pipe, slots=SLOTS)
        for seed in range(count):
            self.submit(engine, seed)
            if (seed + 1) % (count // restarts) == 0:
                engine.save(self.folder)
                engine.close()
                engine = Engine(self.pipe, slots=SLOTS)
                for handle in engine.restore(self.folder):
                    if number_of(handle.job.requests[0]) in self.latents:  # it was done between saving and closing
                        handle.abort()
                    else:
                        self.take(handle)
        assert engine.drain(240)
        engine.close()


@pytest.mark.parametrize("count", [50, pytest.param(500, marks=pytest.mark.slow)])
def test_whatever_happens_no_call_is_lost_and_nothing_of_it_is_kept(pipe, tmp_path, monkeypatch, count):
    Engine(pipe).close()  # which looks at all shards of the parameters, and so makes arrays of them
    before = len(jax.live_arrays())
    with monkeypatch.context() as patch:
        soak = Soak(pipe, tmp_path / "saved", patch)
        soak.run(count, restarts=2 if count == 50 else 10)
    ended = soak.latents.keys() | soak.errors.keys() | soak.aborted
    assert ended == set(range(count)), "each call has a result, an error that was made for it, or was aborted"
    assert len(soak.latents) > count / 2 and soak.aborted and soak.errors
    for seed, error in soak.errors.items():
        assert "injected" in error or ("is not finite" in error and seed % 13 == 5), error
    gc.collect()
    assert not list(soak.handles) and len(jax.live_arrays()) <= before
    for seed in sorted(soak.latents)[:: count // 10]:
        np.testing.assert_array_equal(soak.latents[seed], pipe(**soak.calls[seed], output_type="latent").latents)
