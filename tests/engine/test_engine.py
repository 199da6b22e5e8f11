"""Calls that share a ring: each has the bits that it has alone, whatever comes, goes and fails beside it."""

import asyncio
import json
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import checkpoints
import jax
import numpy as np
import pytest
from compilation import compiling_quickly
from runs import IMAGE, PROMPTS

from jaxwan import Aborted, Engine, NotFinite, QueueFull
from jaxwan.commands.draw_ring import Traced, main
from jaxwan.engine import engine as engine_module
from jaxwan.engine import ring
from jaxwan.engine.admission import Admission
from jaxwan.pipelines.pipeline import WanPipeline
from jaxwan.sharding.mesh import MeshSpec

SIZE = dict(height=32, width=48, num_frames=5)
CALLS = [
    dict(prompt=PROMPTS[0], num_inference_steps=4, guidance_scale=4.0, guidance_scale_2=3.0, sampler="unipc", seed=1),
    dict(prompt="a moon", num_inference_steps=6, guidance_scale=1.0, sampler="euler", flow_shift=5.0, seed=2),
    dict(prompt=[PROMPTS[1], "x"], num_inference_steps=[3, 5], guidance_scale=2.5, sampler="dpm++2m", seed=[3, 4]),
    dict(prompt="", num_inference_steps=1, guidance_scale=6.0, seed=5, num_videos_per_prompt=2),
]
LONG = CALLS[1] | dict(num_inference_steps=100)


@pytest.fixture(scope="module")
def alone(pipe):
    return [pipe(**call, **SIZE) for call in CALLS]


def assert_same(output, expected):
    np.testing.assert_array_equal(output.latents, expected.latents)
    np.testing.assert_array_equal(output.frames, expected.frames)
    assert output.settings == expected.settings and output.fps == expected.fps


def at_step(handle, steps):
    """Wait until it has so many steps, and is not over."""
    deadline = time.monotonic() + 60
    while handle.progress.steps < steps and not handle.done():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("slots", [1, 3])
def test_calls_that_arrive_at_any_time_have_the_bits_of_a_call_alone(pipe, alone, slots):
    with Engine(pipe, slots=slots) as engine:
        handles = []
        for call in CALLS:
            handles.append(engine.submit(**call, **SIZE))
            at_step(handles[0], 1)
        done = [handle.result(60) for handle in handles]
    for output, expected in zip(done, alone, strict=True):
        assert_same(output, expected)
    assert all(handle.progress.fraction == 1.0 and handle.state == "done" for handle in handles)


def test_an_abort_frees_its_slot_and_changes_nothing_beside_it(pipe, alone):
    with Engine(pipe, slots=2) as engine:
        first = engine.submit(**CALLS[0], **SIZE)
        other = engine.submit(**LONG, **SIZE)
        third = engine.submit(**CALLS[2], **SIZE)  # waits
        at_step(other, 2)
        assert other.abort() and not other.abort()
        with pytest.raises(Aborted):
            other.result(60)
        assert other.state == "aborted" and other.progress.fraction < 1
        assert_same(first.result(60), alone[0])
        assert_same(third.result(60), alone[2])


def test_an_urgent_call_takes_a_slot_and_the_other_goes_on_later(pipe, alone, monkeypatch):
    monkeypatch.setattr(ring, "SEGMENT", 0.0)  # a round each, so that this takes a while
    with Engine(pipe, slots=1) as engine:
        slow = engine.submit(**LONG, **SIZE)
        at_step(slow, 2)
        urgent = engine.submit(**CALLS[0], **SIZE, priority=1)
        assert_same(urgent.result(60), alone[0])
        assert not slow.done()
        np.testing.assert_array_equal(slow.result(60).latents, pipe(**LONG, **SIZE).latents)


def test_saved_calls_go_on_in_another_engine_on_another_mesh(pipe, folder, alone, tmp_path):
    with Engine(pipe, slots=2) as engine:
        handles = [engine.submit(**call, **SIZE) for call in CALLS]
        at_step(handles[1], 2)
        assert engine.save(tmp_path / "saved") >= 3
        left = [handle.arrived for handle in engine.handles]
        engine.close()
    assert all(isinstance(handle.future.exception(), Aborted) for handle in handles if not handle.state == "done")
    other = WanPipeline.from_pretrained(folder, progress=False)
    with Engine(other, slots=3) as engine:
        again = engine.restore(tmp_path / "saved")
        assert any(handle.progress.steps for handle in again)
        results = [handle.result(60) for handle in again]
    for output, number in zip(results[-len(left) :], left, strict=True):
        np.testing.assert_array_equal(output.latents, alone[number].latents)


def test_a_video_whose_numbers_are_lost_fails_alone_and_says_where(pipe, alone):
    latents = np.full((1, 16, 2, 4, 6), 1e38, np.float32)  # squares of which are infinite
    with Engine(pipe, slots=2) as engine:
        broken = engine.submit(prompt="a moon", latents=latents, num_inference_steps=6, **SIZE)
        fine = engine.submit(**CALLS[0], **SIZE)
        with pytest.raises(
            NotFinite, match=r"'a moon', step \d of 6 by the (high|low)-noise expert: the (velocity|latents)"
        ):
            broken.result(60)
        assert_same(fine.result(60), alone[0])


def test_a_device_program_that_fails_fails_those_that_ran_and_the_queue_goes_on(pipe, alone, monkeypatch):
    from jaxwan.pipelines.denoise import Programs

    run, failing = Programs.run, [True]

    def fails_once(*given):
        if failing:
            failing.clear()
            raise RuntimeError("the device is gone")
        return run(*given)

    monkeypatch.setattr(Programs, "run", fails_once)
    with Engine(pipe, slots=1) as engine:
        first, second = engine.submit(**CALLS[0], **SIZE), engine.submit(**CALLS[1], **SIZE)
        with pytest.raises(RuntimeError, match="the device is gone"):
            first.result(60)
        assert_same(second.result(60), alone[1])


def test_bad_calls_are_refused_where_they_are_made_and_a_full_queue_too(pipe):
    with Engine(pipe, slots=1, queue=1) as engine:
        with pytest.raises(ValueError, match="num_frames=6"):
            engine.submit("x", num_frames=6)
        with pytest.raises(TypeError, match="handles have progress"):
            engine.submit("x", callback_on_step_end=print)
        running = engine.submit("x", num_inference_steps=100, **SIZE)
        at_step(running, 1)
        waiting = engine.submit("x", **SIZE)
        with pytest.raises(QueueFull, match="1 calls wait already"):
            engine.submit("x", **SIZE)
        assert waiting.abort() and running.abort()
        assert engine.drain(60)
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit("x", **SIZE)


def test_a_call_that_can_never_fit_is_refused_with_numbers_and_what_would_fit(pipe):
    with Engine(pipe, device_memory="24MB") as engine:
        with pytest.raises(ValueError, match=r"needs \d.* GiB of a device that has .*: what would fit is .* frames"):
            engine.submit("x", height=480, width=832, num_frames=81)


def test_handles_wait_in_asyncio_and_call_back(pipe, alone):
    called = threading.Event()

    async def both(engine):
        handles = [engine.submit(**call, **SIZE) for call in CALLS[:2]]
        handles[0].add_done_callback(lambda handle: called.set())
        return await asyncio.gather(*handles)

    async def gathered(engine):
        return await both(engine)

    with Engine(pipe, slots=2) as engine:
        for output, expected in zip(asyncio.run(gathered(engine)), alone, strict=False):
            assert_same(output, expected)
    assert called.wait(10)


def test_a_preview_is_the_estimate_of_the_latest_step(pipe, alone):
    with Engine(pipe, slots=1) as engine:
        handle = engine.submit(**LONG, **SIZE)
        at_step(handle, 3)
        shown = handle.preview(timeout=60)
        assert shown is not None and shown.shape == alone[1].latents.shape[1:] and np.isfinite(shown).all()
        handle.abort()


def test_files_are_written_while_frames_are_decoded(pipe, alone, tmp_path):
    with Engine(pipe, slots=2) as engine:
        handle = engine.submit(**CALLS[0], **SIZE, save=tmp_path / "x.mp4")
        gone = engine.submit(**CALLS[1], **SIZE, save=tmp_path / "y.mp4")
        gone.abort()
        output = handle.result(60)
    assert output.paths == (tmp_path / "x.mp4",) and output.frames is output.latents
    assert [path.name for path in tmp_path.iterdir()] == ["x.mp4"]


def test_videos_of_other_sizes_take_turns(pipe):
    other = dict(height=48, width=32, num_frames=5, prompt="x", seed=1, num_inference_steps=3)
    expected = pipe(**other), pipe(**CALLS[0], **SIZE)
    with Engine(pipe, slots=2, resident=1) as engine:
        handles = [engine.submit(**call) for call in (other, CALLS[0] | SIZE, other)]
        results = [handle.result(120) for handle in handles]
    for output, one in zip(results, (*expected, expected[0]), strict=True):
        assert_same(output, one)


def test_images_are_encoded_and_videos_decoded_beside_the_ring_where_the_vae_has_devices(tmp_path, optimised):
    """In the VAE's own thread; and without devices of its own between two segments, as the other tests have it."""
    checkpoints.make_checkpoint(tmp_path, "i2v-A14B")
    pipe = WanPipeline.from_pretrained(tmp_path, "pp=2", vae_devices=1, progress=False)
    calls = [dict(prompt=PROMPTS[i], image=IMAGE, seed=i, num_inference_steps=3) | SIZE for i in range(2)]
    expected = [pipe(**call) for call in calls]
    with Engine(pipe, slots=1) as engine:
        for handle, one in zip([engine.submit(**call) for call in calls], expected, strict=True):
            assert_same(handle.result(60), one)
            assert set(handle.seconds) >= {"wait", "encode", "text", "denoise", "decode"}


SMALL = dict(height=48, width=32, num_frames=5)  # another size


def test_programs_that_do_not_compile_fail_those_that_wait_for_them_and_the_engine_goes_on(pipe, alone, monkeypatch):
    programs, fail = engine_module.job_programs, Engine.fail

    def none(*_, **__):
        raise RuntimeError("no program")

    def slowly(self, handle, error):  # the engine's threads look at the call meanwhile
        with self.lock:
            self.lock.notify_all()
        time.sleep(0.1)
        fail(self, handle, error)

    monkeypatch.setattr(engine_module, "job_programs", none)
    monkeypatch.setattr(Engine, "fail", slowly)
    with Engine(pipe, slots=3) as engine:
        with pytest.raises(RuntimeError, match="no program"):
            engine.submit(**CALLS[0], **SIZE).result(60)
        with pytest.raises(RuntimeError, match="no program"):
            engine.warmup(**SIZE)
        monkeypatch.setattr(engine_module, "job_programs", programs)
        assert_same(engine.submit(**CALLS[0], **SIZE).result(60), alone[0])


def test_an_error_of_the_engines_own_fails_all_calls_and_closes_it(pipe, monkeypatch):
    engine = Engine(pipe, slots=2)
    running = engine.submit(**LONG, **SIZE)
    at_step(running, 1)
    monkeypatch.setattr(engine._encode, "ready", None)  # calling it is a TypeError
    with pytest.raises(TypeError, match="NoneType"):
        running.result(60)
    engine._mesh._thread.join(60)
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(**CALLS[0], **SIZE)
    engine.close()


def test_a_callback_may_wait_for_others_that_use_the_engine(pipe):
    waited = []

    def look(handle):
        other = threading.Thread(target=lambda: engine.handles)
        other.start()
        other.join(10)
        waited.append(not other.is_alive())

    with Engine(pipe, slots=1) as engine:
        handle = engine.submit(**CALLS[1], **SIZE, output_type="latent")
        handle.add_done_callback(look)
        handle.result(60)
    assert waited == [True]


def test_a_kind_of_call_that_waits_to_be_let_in_comes_before_later_ones_of_another(pipe, monkeypatch):
    monkeypatch.setattr(engine_module, "PATIENCE", 0.0)
    order, begin = [], Engine.begin

    def noted(engine, handle, state):
        order.extend([handle.arrived] * (state == "denoising"))
        begin(engine, handle, state)

    monkeypatch.setattr(Engine, "begin", noted)
    with Engine(pipe, slots=2, resident=1) as engine:
        for size in (SIZE, SMALL):
            engine.warmup(**size)
        for call in (LONG | SIZE, *[CALLS[1] | SIZE] * 3, CALLS[1] | SMALL, *[CALLS[1] | SIZE] * 3):
            handle = engine.submit(**call)
            at_step(handle, handle.arrived == 0)
    assert order.index(4) < min(order.index(later) for later in (5, 6, 7)), order


def test_what_calls_were_made_of_is_kept_no_longer_than_their_results(pipe):
    with Engine(pipe, slots=1) as engine:
        done, gone = engine.submit(**CALLS[0], **SIZE), engine.submit(**LONG, **SIZE)
        done.result(60)
        at_step(gone, 1)
        gone.abort()
        late = engine.submit(**CALLS[1], **SIZE)
        at_step(late, 6)  # it is denoised, and may be decoded by now
        late.abort()
        engine.submit(**CALLS[1], **SIZE).result(60)
    for handle in (done, gone, late):
        assert handle.frames == [None] and handle.videos[0].entry is None


def test_rings_of_kinds_that_nobody_calls_for_are_let_go(pipe, monkeypatch):
    monkeypatch.setattr(engine_module, "RINGS", 1)
    with Engine(pipe, slots=2, trace=True) as engine:
        for call in (CALLS[1] | SIZE, CALLS[1] | SMALL, CALLS[1] | SIZE):
            engine.submit(**call, output_type="latent").result(60)
            engine.drain()
        assert len(engine._rings) == 1 and len(engine._mesh.tasks) == 4  # with encoding and decoding
        assert len(engine.trace) == 3 and engine.ticks[0] == sum(map(len, engine.trace))


def test_what_is_drawn_of_an_engine_is_what_has_entered_its_ring(pipe, tmp_path):
    with Engine(pipe, slots=3, trace=True) as engine:
        handles = [engine.submit(**call, **SIZE, output_type="latent") for call in CALLS[:2]]
        for handle in handles:
            handle.result(60)
        ticks, idle = engine.ticks
    (tmp_path / "trace.json").write_text(json.dumps(engine.trace))
    traced = Traced.read(MeshSpec(pp=2), tmp_path / "trace.json")
    first, second = traced.rows.values()
    assert [at is None for at in first].count(True) == idle and len(first) == ticks and second == [None, *first[:-1]]
    assert sum(at is not None for at in first) == 4 * 2 + 6  # steps with guidance, and without
    assert main(["--mesh", "pp=2", "--trace", f"{tmp_path}/trace.json", "-o", f"{tmp_path}/engine.svg"]) == 0


def test_calls_of_a_folder_are_all_taken_or_none(pipe, tmp_path):
    with Engine(pipe, slots=1) as engine:
        handles = [engine.submit(**LONG, **SIZE) for _ in range(3)]
        engine.save(tmp_path / "saved")
        for handle in handles:
            handle.abort()
    with Engine(pipe, slots=1, queue=1) as engine:
        with pytest.raises(QueueFull):
            engine.restore(tmp_path / "saved")
        assert engine.handles == []


def test_an_older_save_is_kept_where_the_new_one_cannot_take_its_place(pipe, tmp_path, monkeypatch):
    folder, rename = tmp_path / "saved", Path.rename

    def refuse(self, target):
        if ".new-" in self.name and target == folder:
            raise OSError("no")
        return rename(self, target)

    with Engine(pipe, slots=1) as engine:
        handle = engine.submit(**LONG, **SIZE)
        assert engine.save(folder) == 1
        before = (folder / "engine.json").read_text()
        monkeypatch.setattr(Path, "rename", refuse)
        with pytest.raises(OSError, match="no"):
            engine.save(folder)
        handle.abort()
    assert (folder / "engine.json").read_text() == before and list(tmp_path.iterdir()) == [folder]


def test_programs_that_do_not_fit_are_refused_with_numbers(pipe):
    admission = Admission(pipe, "1GB")
    asked = SimpleNamespace(temp_size_in_bytes=2**30, output_size_in_bytes=2**20, alias_size_in_bytes=0)
    admission.compiled(("kind",), mock.Mock(jax.stages.Compiled, memory_analysis=lambda: asked))
    admission.check_compiled(("other",), 2**20)
    with pytest.raises(ValueError, match=r"its compiled programs need 1\.\d\d GiB of a device that has \d\.\d\d GiB"):
        admission.check_compiled(("kind",), 2**20)
    assert not admission.fits([2**20])
    admission.forget(("kind",))
    assert admission.fits([2**20])


@pytest.mark.slow
@compiling_quickly()
def test_the_examples_in_the_docs_run(tmp_path, monkeypatch):
    page = Path(__file__).parents[2] / "docs/engine.md"
    blocks, names = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S), {}
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, "docs/engine.md", "exec"), names)
    assert names["video"].frames.shape == (1, 17, 64, 96, 3) and names["urgent"].state == "done"
    assert names["second"].state in ("aborted", "done") and len(names["videos"]) == 3
