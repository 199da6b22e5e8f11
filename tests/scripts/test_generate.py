"""generate.py as a person runs it: files, what is said, and refusals that leave nothing behind."""

import contextlib
import errno
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import checkpoints
import jax
import numpy as np
import pytest
import torch
from comfyui import EXPERTS, FILE, make_twins
from loras import lora_tensors, write_lora
from oracle import relative_error
from originals import original_transformer
from PIL import Image
from published import edit, write_configs
from runs import IMAGE, NEGATIVES, PROMPTS, run_diffusers, unit_noise
from safetensors.torch import load_file, save_file

import jaxwan
from jaxwan import BUNDLED_MODEL, OFFICIAL_NEGATIVE_PROMPT, Tiling
from jaxwan.commands import running
from jaxwan.engine import coding, ring
from jaxwan.engine.engine import Engine
from jaxwan.pipelines import load
from jaxwan.pipelines.axes import to_internal
from jaxwan.pipelines.checkpoint import read_checkpoint
from jaxwan.pipelines.condition import make_controls
from jaxwan.pipelines.denoise import begin
from jaxwan.pipelines.dit import Inputs
from jaxwan.pipelines.media import background, load_video, save_video, to_uint8
from jaxwan.pipelines.output import Output
from jaxwan.pipelines.parts import job_settings
from jaxwan.pipelines.pipeline import WanPipeline
from jaxwan.schedulers.presets import PRESETS
from jaxwan.schedulers.table import SIGMA_SCHEDULES
from jaxwan.sharding.mesh import MeshSpec

pytestmark = pytest.mark.usefixtures("logging_as_before")

SCRIPT = Path(__file__).parents[2] / "scripts/generate.py"


@pytest.fixture(scope="module")
def main():
    """The script's main, as a module in this process."""
    spec = importlib.util.spec_from_file_location("generate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A user's cache folder."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(main, tmp_path, monkeypatch, cache):
    """(flags) -> (exit status, stdout, stderr) of the script in an empty folder."""

    def call(*flags):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = main([str(flag) for flag in flags])
            except SystemExit as stopped:
                status = stopped.code
        return status, out.getvalue(), err.getvalue()

    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.92")  # else the script would say it, and it would stay
    return call


class Made(NamedTuple):
    jobs: list
    outputs: list


@pytest.fixture(scope="module")
def parts():
    """The bundled model's, on one device."""
    return load.load_parts(read_checkpoint(BUNDLED_MODEL), MeshSpec(), "float32", "float32", progress=False)


@pytest.fixture
def made(monkeypatch, parts):
    """The jobs that reach the pipeline, and what it makes of them without loading or computing anything."""
    seen = Made([], [])

    def submit_job(self, job, **given):
        checkpoint, count, (num_frames, height, width) = self.pipe.checkpoint, len(job.requests), job.size
        shape = count, 16, *checkpoint.geometry.latent_shape(*job.size)
        latents = np.random.default_rng(len(seen.jobs)).standard_normal(shape).astype(np.float32)
        ramp = np.linspace(0, 0.9, width, dtype=np.float32)[:, None]
        video = np.arange(count, dtype=np.float32)[:, None, None, None, None]
        frames = np.broadcast_to((video + ramp) / count, (count, num_frames, height, width, 3))
        seen.jobs.append(job)
        settings = job_settings(checkpoint, self.pipe.parts, job)
        seen.outputs.append(Output(frames, latents, job.requests[0].fps, settings, {}))
        return submit(self, job, **given)

    def prepare(checkpoint, parts, requests, *_):
        """Videos that have no step left."""
        (output,) = (o for job, o in zip(seen.jobs, seen.outputs, strict=True) if job.requests is requests)
        for request, x in zip(requests, to_internal(output.latents), strict=True):
            inputs = Inputs(make_controls(request, None, len(x)), np.zeros((1, 2, 4), np.float32))
            entries = begin(x, inputs)
            yield entries._replace(done=np.array(entries.num_steps))

    def decoded_groups(coder, latents, kind, kept):
        (frames,) = (
            output.frames[i]
            for output in seen.outputs
            for i, own in enumerate(to_internal(output.latents))
            if own.shape == latents.shape and (own == latents).all()
        )
        frames = to_uint8(frames) if kind == "uint8" else frames
        if kept is not None:
            kept[:] = frames
        yield from np.split(frames, range(1, len(frames), 4))

    def compiled(self, key, job, decode):
        with self.lock:
            self._ready[key] = True
            self.lock.notify_all()

    submit = Engine.submit_job
    monkeypatch.setattr(Engine, "submit_job", submit_job)
    monkeypatch.setattr(Engine, "_compile", compiled)
    monkeypatch.setattr(coding, "prepare", lambda *given: list(prepare(*given)))
    monkeypatch.setattr(coding, "decoded_groups", decoded_groups)
    monkeypatch.setattr("jaxwan.pipelines.pipeline.load_parts", lambda *_, **__: parts)
    return seen


def in_a_process_of_its_own(folder, cache, *flags, before=""):
    """The script run by Python, after the lines `before`."""
    code = f"{before}\nimport runpy, sys\nsys.argv = {['generate.py', *map(str, flags)]!r}\n"
    return python(f"{code}runpy.run_path({str(SCRIPT)!r}, run_name='__main__')", folder, XDG_CACHE_HOME=str(cache))


def python(code, folder, **environment):
    """A program of its own, whose JAX sees a plain CPU."""
    kept = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    environment = kept | {"JAX_PLATFORMS": "cpu"} | environment
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=environment)


BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'diffusers'):
            raise ModuleNotFoundError(f'{name} is blocked', name=name)
sys.meta_path.insert(0, Blocked())
"""


# Runs


def test_without_any_model_a_mesh_of_four_ends_with_an_mp4_and_no_torch(tmp_path, cache):
    done = in_a_process_of_its_own(tmp_path, cache, "--mesh", "pp=4", "--save-npz", "arrays.npz", before=BLOCK)
    assert done.returncode == 0, done.stderr
    assert "the tiny bundled one" in done.stderr
    assert "no --prompt: 'a red circle" in done.stderr
    assert "no accelerator: 4 virtual CPU devices" in done.stderr
    (seed,) = re.findall(r"^seed (\d+)$", done.stderr, re.MULTILINE)
    (path,) = (tmp_path / "outputs").iterdir()
    assert re.fullmatch(rf"\d{{8}}-\d{{6}}-seed{seed}\.mp4", path.name)
    prompt = "'a red circle moves to the right over a blue background'"
    assert done.stdout == f"outputs/{path.name}  96x64, 17 frames at 8 fps, seed {seed}: {prompt}\n"
    frames, fps = load_video(path)
    assert frames.shape == (17, 64, 96, 3) and fps == 8
    with np.load(tmp_path / "arrays.npz") as arrays:
        assert {name: (a.shape, a.dtype) for name, a in arrays.items()} == {
            "latents": ((1, 16, 5, 8, 12), np.float32), "frames": ((1, 17, 64, 96, 3), np.float32)
        }  # fmt: skip
        assert np.abs(frames / 255 - arrays["frames"][0]).mean() < 0.1 < 2 * arrays["frames"].std()
    lines = done.stderr.splitlines()
    assert lines[0] == f"jaxwan {jaxwan.__version__}, mesh pp=4"
    for phase in (
        "trace",
        "load",
        "compile",
        "text",
        "denoise",
        "decode",
    ):  # nothing is encoded, so nothing is said of it
        assert [line for line in lines if re.match(rf"{phase}: \d", line)], phase
    assert "encode:" not in done.stderr and "\r" not in done.stderr and "Warning" not in done.stderr
    told = re.fullmatch(
        r"seconds: ([\d.]+) = (.*)  \(WanPipeline\(jaxwan-tiny, float32, mesh pp=4, 4 x cpu\)\)", lines[-1]
    )
    phases = dict(re.findall(r"(\w+) ([\d.]+)", told[2]))
    assert set(phases) == {
        "start", "prepare", "trace", "load", "compile", "text", "encode", "denoise", "decode", "write", "other"
    }  # fmt: skip
    assert abs(sum(map(float, phases.values())) - float(told[1])) <= 0.05 * len(phases) + 0.05  # each is rounded


def test_from_python_too_the_devices_are_there_by_themselves(tmp_path):
    code = f"""
import jax
from jaxwan import WanPipeline
pipe = WanPipeline.from_pretrained({str(BUNDLED_MODEL)!r}, mesh="pp=3", progress=False)
print(pipe.parts.denoiser.mesh.devices.size, len(jax.devices()))
"""
    done = python(code, tmp_path)
    assert done.stdout.split() == ["3", "8"], done.stderr


def test_a_checkpoint_that_diffusers_saved_gives_diffusers_frames_on_four_stages(main, tmp_path):
    folder = tmp_path / "model"
    checkpoints.make_checkpoint(folder, "i2v-A14B")
    size = {"height": 48, "width": 32, "num_frames": 9, "num_inference_steps": 4}
    noise = unit_noise((1, 16, 3, 6, 4))
    np.save(tmp_path / "noise.npy", noise)
    IMAGE.save(tmp_path / "image.png")
    flags = [text for key, value in size.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    status = main([
        "--model", str(folder), "--mesh", "pp=4", "--vae-devices", "2",
        "--prompt", PROMPTS[0], "--negative-prompt", NEGATIVES[0], "--guidance-scale", "4", "--guidance-scale-2", "3",
        "--image", str(tmp_path / "image.png"), *flags,
        "--latents", str(tmp_path / "noise.npy"), "--save-npz", str(tmp_path / "ours.npz"),
        "--output", str(tmp_path / "video.mp4"),
    ])  # fmt: skip
    assert status == 0 and load_video(tmp_path / "video.mp4")[0].shape == (9, 48, 32, 3)
    reference = checkpoints.load_reference(folder, "i2v-A14B")
    expected = run_diffusers(
        reference, latents=noise, prompt=PROMPTS[0], negative_prompt=NEGATIVES[0], image=IMAGE, guidance_scale=4.0,
        guidance_scale_2=3.0, **size,
    )  # fmt: skip
    with np.load(tmp_path / "ours.npz") as ours:  # the bound of a whole loop in float32
        assert relative_error(ours["latents"], expected.latents) <= 1e-4
        assert relative_error(ours["frames"], expected.frames) <= 1e-4


def test_the_popular_job_makes_the_video_of_its_twin_with_merged_weights(run, tmp_path):
    """Image to video from two fp8 files of ComfyUI with a pair of LoRAs for four steps, on two stages."""
    twin, files = tmp_path / "twin", tmp_path / "files"
    files.mkdir()
    parts = make_twins(twin, files)
    loras = []
    for i, (name, noise) in enumerate(EXPERTS.items()):
        path = files / f"wan2.2_i2v_A14B_{noise}_noise_lora_rank4_lightx2v_4step.safetensors"
        merge_by_hand(twin / name / FILE, path, seed=i, strength=(0.5, 1.0)[i])
        loras += ["--lora", f"{path}:0.5" if noise == "high" else path]
    IMAGE.save("image.png")
    flags = ["--prompt", PROMPTS[0], "--image", "image.png", "--preset", "lightx2v-4step", "--mesh", "pp=2",
             "--seed", 3, "--height", 32, "--width", 48, "--num-frames", 5]  # fmt: skip
    popular = [text for name, path in parts.items() for text in ("--component", f"{name}={path}")]
    made = {}
    for name, own in {"ours": popular + loras, "twin": ["--model", twin], "plain": popular}.items():
        status, _, err = run(*own, *flags, "--save-npz", f"{name}.npz", "-o", f"{name}.mp4")
        assert status == 0, err
        assert "4 steps, shift 5, no guidance, the low-noise expert from step 3" in err
        with np.load(f"{name}.npz") as arrays:
            made[name] = arrays["latents"]
    np.testing.assert_array_equal(made["ours"], made["twin"])
    assert relative_error(made["plain"], made["twin"]) > 0.1
    frames, fps = load_video("ours.mp4")
    assert frames.shape == (5, 32, 48, 3) and fps == 16 and frames.std() > 10
    np.testing.assert_array_equal(frames, load_video("twin.mp4")[0])
    settings = jaxwan.read_settings("ours.mp4")
    assert settings["loras"] == [
        {"file": f"wan2.2_i2v_A14B_{noise}_noise_lora_rank4_lightx2v_4step.safetensors", "strength": strength,
         "expert": noise} for noise, strength in (("high", 0.5), ("low", 1.0))
    ]  # fmt: skip
    assert settings["call"]["preset"] == "lightx2v-4step" and "loras" not in jaxwan.read_settings("twin.mp4")


def merge_by_hand(weights, lora, *, seed, strength):
    """Write a LoRA in LightX2V's style, and add it to a DiT in the Diffusers layout.

    Its numbers are multiples of 1/8 and few, so that what is added is exact, and only the sum is rounded.
    """
    tensors, generator = load_file(weights), torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randint(-4, 5, shape, generator=generator) / 8

    factors, differences = {}, {}
    for key, tensor in tensors.items():
        module, _, kind = key.rpartition(".")
        if kind == "weight" and tensor.ndim == 2 and key.startswith("blocks"):
            factors[module] = numbers(4, tensor.shape[1]), numbers(tensor.shape[0], 4)
        else:
            (name,) = original_transformer({key: tensor})
            ending = {"weight": "diff", "bias": "diff_b"}.get(kind, "diff_m")
            name = f"diffusion_model.{name.rpartition('.')[0]}.{ending}"
            differences[name] = numbers(*tensor.shape) / 4
            tensors[key] = tensor + strength * differences[name]
    for module, (down, up) in factors.items():
        tensors[f"{module}.weight"] += strength * 2 / 4 * (up @ down)
    write_lora(lora, lora_tensors(factors, "lightx2v", alpha=2) | differences)
    save_file(tensors, weights, {"format": "pt"})


def test_each_video_of_a_batch_is_a_file(run, made):
    status, out, err = run(
        "--model", BUNDLED_MODEL, "--prompt", "a", "--prompt", "b", "--num-videos-per-prompt", 2, "--height", 32,
        "--width", 48, "--num-frames", 5, "--fps", 12, "--output", "made/here/clip.mp4", "--mesh", "pp=2", "--seed", 7,
        "--seed", 8,
    )  # fmt: skip
    assert status == 0, err
    (output,) = made.outputs
    names = ["clip-0-seed7.mp4", "clip-1-seed7-index1.mp4", "clip-2-seed8.mp4", "clip-3-seed8-index1.mp4"]
    assert sorted(os.listdir("made/here")) == names
    lines = out.splitlines()
    for i, (name, prompt) in enumerate(zip(names, "aabb", strict=True)):
        clip, fps = load_video(f"made/here/{name}")
        assert fps == 12 and clip.shape == (5, 32, 48, 3)
        assert np.argmin([np.abs(clip / 255 - frames).mean() for frames in output.frames]) == i
        index = ", index 1" if i % 2 else ""
        assert lines[i] == f"made/here/{name}  48x32, 5 frames at 12 fps, seed {7 + i // 2}{index}: '{prompt}'"


def test_one_frame_may_go_to_a_png(run, made):
    status, out, err = run("--prompt", "a", "--num-frames", 1, "--output", "new/picture.PNG", "--model", BUNDLED_MODEL)
    assert status == 0, err
    (output,) = made.outputs
    np.testing.assert_array_equal(Image.open("new/picture.PNG"), (output.frames[0, 0] * 255).round().astype(np.uint8))
    assert os.listdir("new") == ["picture.PNG"]


def test_a_video_is_compressed_as_told(run, made):
    for flags in ([], ["--crf", 40], ["--x264-preset", "medium"], ["--save-npz", "all.npz", "--crf", 40]):
        assert run("--prompt", "a", "--seed", 1, *flags, "-o", f"{len(made.jobs)}.mp4")[0] == 0
    usual, small, slow, kept = (Path(f"{i}.mp4").read_bytes() for i in range(4))
    assert len(small) < len(usual) != len(slow) and kept == small
    assert run("--prompt", "a", "-o", "clip.webm")[0] == 0 and len(load_video("clip.webm")[0]) == 17


def test_latents_of_a_file_are_the_noise(run, made):
    noise = np.random.default_rng(0).standard_normal((1, 16, 5, 8, 12)).astype(np.float32)
    np.save("noise.npy", noise)
    status, _, err = run("--model", BUNDLED_MODEL, "--prompt", "", "--latents", "noise.npy", "--save-npz", "arrays.npz")
    assert status == 0, err
    (job,), (output,) = made.jobs, made.outputs
    np.testing.assert_array_equal(job.requests[0].latents, noise[0])
    with np.load("arrays.npz") as arrays:
        np.testing.assert_array_equal(arrays["frames"], output.frames)
        np.testing.assert_array_equal(arrays["latents"], output.latents)


def test_every_flag_reaches_the_job(run, made, files):
    status, _, err = run(
        "--model", BUNDLED_MODEL, "--prompt", "a", "--prompt", "b", "--official-negative-prompt",
        "--video", files["CLIP"], "--strength", 0.5, "--height", 64, "--width", 32, "--num-frames", 5, "--fps", 7.5,
        "--num-inference-steps", 4, "--num-inference-steps", 6, "--guidance-scale", 2, "--guidance-scale", 3,
        "--guidance-scale-2", 1.5, "--boundary-ratio", 0.5, "--flow-shift", 8,
        "--sampler", "euler", "--sampler", "unipc1", "--seed", 3,
        "--num-videos-per-prompt", 2, "--index", 3, "--vae-tile", "16x32", "--vae-stride", "16x24", "-o", "clip.mp4",
    )  # fmt: skip
    assert status == 0, err
    (job,) = made.jobs
    assert [(r.prompt, r.index) for r in job.requests] == [("a", 3), ("a", 4), ("b", 3), ("b", 4)]
    a, _, b, _ = job.requests
    assert a.negative_prompt == b.negative_prompt == OFFICIAL_NEGATIVE_PROMPT
    assert (job.size, a.fps) == ((5, 64, 32), 7.5)
    assert a.video.shape == (5, 64, 32, 3) and a.video is b.video
    assert (a.table.num_steps, b.table.num_steps) == (2, 3)  # half of 4 and 6
    assert a.table.timesteps[0] % 1 and not b.table.timesteps[0] % 1  # Euler's are no whole numbers
    assert [(r.guidance_scale, r.guidance_scale_2, r.seed) for r in (a, b)] == [(2.0, 1.5, 3), (3.0, 1.5, 3)]
    assert b.boundary_ratio == 0.5 and b.tiling == Tiling(32, 16, 24, 16)
    assert sorted(os.listdir()) == [f"clip-{i}-seed3-index{3 + i % 2}.mp4" for i in range(4)]


def test_each_prompt_may_have_its_video(run, made, files):
    video = ["--video", files["CLIP"], "--video", files["WHITE"], "--num-frames", 5]
    assert run("--prompt", "a", "--prompt", "b", *video, "-o", "clip.mp4")[0] == 0
    a, b = made.jobs[0].requests
    assert a.video.read().mean() < 5 and b.video.read().mean() > 250


# What the command says of itself


def test_every_flag_is_in_the_help(run):
    status, out, _ = run("--help")
    assert status == 0
    for flag in (
        "--model --prompt --negative-prompt --official-negative-prompt --image --last-image --video --strength --fit "
        "--height --width --num-frames --fps --num-inference-steps --timesteps --guidance-scale --guidance-scale-2 "
        "--boundary-ratio --flow-shift --sampler --seed --latents --num-videos-per-prompt --index --mesh --dtype "
        "--vae-dtype --vae-devices --vae-tiling --vae-tile --vae-stride -o --overwrite --no-metadata --save-npz --json "
        "--crf --x264-preset -q --version --like --no-compilation-cache --dry-run --device-memory --sigma-schedule "
        "--preset --ulysses --prompts-file --slots --save --save-every --resume --devices --chip --devices-per-host"
    ).split():
        assert re.search(rf"^  {flag}\b", out, re.MULTILINE), flag
    told = " ".join(out.split())
    for name in (*PRESETS, *SIGMA_SCHEDULES):
        assert re.search(rf"\b{name}\b", told), name


def test_a_dry_run_needs_neither_weights_nor_devices(tmp_path, cache):
    folder = write_configs(tmp_path / "configs", "Wan2.2-T2V-A14B")
    here = tmp_path / "here"
    here.mkdir()
    watch = (
        "import atexit\nfrom jax._src import xla_bridge\n"
        "atexit.register(lambda: print('devices:', xla_bridge.backends_are_initialized(), file=sys.stderr))"
    )
    flags = ["--model", folder, "--mesh", "pp=40", "--dry-run", "--json", "--device-memory", "80GB"]
    done = in_a_process_of_its_own(here, cache, *flags, before=watch)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["tokens"], report["layers_per_stage"], report["ticks"]) == (75_600, [1] * 40, 1640)
    assert report["fits"] is True and report["dtype"] == "bfloat16"
    assert report["memory_fraction"] == 0.92  # of a card, for which the script asks where nothing is said
    assert done.stderr.splitlines()[-1] == "devices: False"
    assert os.listdir(here) == []


def test_a_dry_run_reads_as_text_too(run):
    status, out, _ = run("--model", BUNDLED_MODEL, "--dry-run", "--mesh", "pp=5", "--vae-devices", 2)
    assert status == 0 and "TFLOP a video, on 2 devices of its own" in out
    assert "layers      2 + 2 + 2 + 2 + 0 on 5 devices" in out and "the fullest device needs" in out
    sampled = "preset diffusers: unipc2, 20 steps, shift 3, guidance 5 and 3, the low-noise expert from step 8"
    assert sampled in out.splitlines()
    assert os.listdir() == []


def test_a_dry_run_that_does_not_fit_says_what_would_and_exits_with_3(run):
    status, out, _ = run("--dry-run", "--device-memory", "30MB")
    assert status == 3
    taken = "the 92% of 28.61 MiB that JAX takes, a device"
    assert re.search(rf"^DOES NOT FIT: .* of 26.32 MiB, {taken}. What would fit: .*mesh pp=4", out, re.MULTILINE)
    status, out, _ = run("--dry-run", "--device-memory", "30MB", "--json")
    assert status == 3 and "mesh pp=4" in json.loads(out)["would_fit"]


def test_a_dry_run_chooses_the_mesh_of_a_machine_that_is_not_here(run):
    machine = ["--dry-run", "--mesh", "auto", "--devices", 4, "--device-memory", "80GB"]
    status, out, err = run(*machine, "--chip", "H100")
    assert status == 0, err
    (chosen,) = re.findall(r"^(\S+) .* chosen$", out, re.MULTILINE)
    assert f", mesh {chosen}; bfloat16" in out and "estimates until measured: H100 at" in out
    status, out, _ = run(*machine, "--json")
    assert status == 0 and "the chip is not known, times are relative" in json.loads(out)["plan"]
    status, out, _ = run("--dry-run", "--mesh", "auto", "--devices", 1, "--device-memory", "20MB")
    assert status == 3 and out.startswith("mesh") and "none of 1 mesh of up to 1 device fits" in out


def test_the_mesh_that_was_chosen_is_told(run, made):
    status, out, err = run("--mesh", "auto", "--json", "-o", "clip.gif", "--no-compilation-cache")
    assert status == 0, err
    assert json.loads(out)["mesh"] == "pp=1"
    assert re.search(r"^mesh auto: pp=1, the best of \d+ meshes .*: times are relative", err, re.MULTILINE)


def test_auto_makes_tiles_only_where_nothing_else_fits(run):
    """The bundled model at a size whose exact decoding needs most of all."""
    plan = ["--dry-run", "--json", "--height", 512, "--width", 512, "--num-frames", 5, "--vae-tiling", "auto"]
    needed = {}
    for memory, told in (
        ("1GB", "no tiles, the exact form fits"),
        ("450MB", "in tiles, because the exact form does not fit"),
        ("20MB", "no tiles, it does not fit with them either"),
    ):
        status, out, err = run(*plan, "--device-memory", memory)
        assert f"--vae-tiling auto: {told}" in err
        needed[memory] = max(json.loads(out)["needed_bytes"])
    assert needed["450MB"] < needed["1GB"] == needed["20MB"]
    assert "no tiles, the exact form may fit, and how much" in run(*plan)[2]


# For scripts


def test_json_holds_files_settings_and_seconds(run, made):
    status, out, err = run(
        "--prompt", "a", "--prompt", "b", "--seed", 5, "--json", "-o", "clip.gif", "--save-npz", "x.npz"
    )
    assert status == 0, err
    told = json.loads(out)
    assert [(f["path"], f["call"]["prompt"], f["call"]["seed"]) for f in told["files"]] == [
        ("clip-0-seed5.gif", "a", 5), ("clip-1-seed5.gif", "b", 5)
    ]  # fmt: skip
    assert told["files"][0] == {"path": "clip-0-seed5.gif"} | made.outputs[0].settings[0]
    assert told["npz"] == "x.npz" and told["mesh"] == "pp=1"
    seconds = told["seconds"]
    assert sum(seconds.values()) == pytest.approx(2 * seconds["total"])
    for flags in (["--sede", 1], ["--device-memory", "80GB"], ["--height", "tall"]):
        status, out, err = run("--json", *flags)
        assert status == 2 and json.loads(out)["error"] == err.removeprefix("error: ").strip()
    status, out, err = run("--num-frames", 6, "--json")
    assert status == 1 and json.loads(out)["error"] == err.splitlines()[-1].removeprefix("error: ")


def test_a_reader_that_is_gone_and_a_closed_stderr_are_no_tracebacks(tmp_path, cache):
    code = f"{sys.executable} {SCRIPT} --dry-run"
    shell = (
        f"({code} --json; echo rc $? >&2) | true; {code} 2>&- | head -n 1"  # true is gone before anything is written
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert "Traceback" not in done.stderr and "Errno" not in done.stderr and "rc 1" in done.stderr
    assert done.stdout.startswith("Wan2.2-T2V-A14B-like")


def test_a_picture_is_a_png_by_itself(run, made):
    assert run("--num-frames", 1)[0] == 0
    (path,) = Path("outputs").iterdir()
    assert path.suffix == ".png"


def test_quiet_tells_names_alone(run, made):
    status, out, err = run("--prompt", "a cat", "-q", "-o", "clip.gif")
    assert (status, out, err) == (0, "clip.gif\n", "")
    status, out, err = run("--num-frames", 6, "--quiet")
    assert (status, out) == (1, "") and err.startswith("error: ") and len(err.splitlines()) == 1


def test_the_version(run):
    assert run("--version") == (0, f"jaxwan {jaxwan.__version__}\n", "")


def test_files_are_kept_unless_told_otherwise(run, made):
    Path("clip.mp4").write_text("dear")
    status, _, err = run("-o", "clip.mp4")
    assert status == 1 and "error: output clip.mp4 exists: choose another name, or say --overwrite" in err
    assert Path("clip.mp4").read_text() == "dear" and made.jobs == []
    status, _, err = run("--save-npz", "clip.mp4")
    assert status == 1 and "clip.mp4 exists" in err and made.jobs == []
    assert run("-o", "clip.mp4", "--overwrite")[0] == 0
    assert load_video("clip.mp4")[0].shape == (17, 64, 96, 3)


# When the end goes wrong


TWO = "--prompt", "a", "--prompt", "b", "--seed", 5, "--num-frames", 5


@pytest.fixture
def spoiling(monkeypatch, tmp_path):
    """(error of a path or None) -> from then on videos are written unless there is one."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    write = background.write_output

    def use(problem):
        def spoiled(frames, path, *rest):
            if (error := problem(Path(path))) is not None:
                raise error
            write(frames, path, *rest)

        monkeypatch.setattr(background, "write_output", spoiled)

    return use


def full(path):
    return OSError(errno.ENOSPC, "No space left on device", str(path))


def test_a_video_that_cannot_be_written_goes_to_another_place_and_costs_no_other(run, made, spoiling, tmp_path):
    spoiling(
        lambda path: (
            full(path) if path.parent.name == "videos" and "seed5" in path.stem and "-1-" in path.stem else None
        )
    )
    status, out, err = run(*TWO, "-o", "videos/clip.mp4")
    assert status == 1 and out.splitlines()[0].startswith("videos/clip-0-seed5.mp4  ")
    elsewhere = tmp_path / "here/clip-1-seed5.mp4"
    reason = f"videos/clip-1-seed5.mp4 could not be written (No space left on device): it is {elsewhere}"
    assert f"error: {reason}\n" in err and out.splitlines()[1].startswith(f"{elsewhere}  ")
    assert len(load_video("videos/clip-0-seed5.mp4")[0]) == len(load_video(elsewhere)[0]) == 5
    status, out, err = run(*TWO, "-o", "videos/clip.mp4", "--json", "--overwrite")  # elsewhere nothing is replaced
    (elsewhere,) = (tmp_path / "temporary").iterdir()
    told = json.loads(out)
    assert status == 1 and [f["path"] for f in told["files"]] == ["videos/clip-0-seed5.mp4", str(elsewhere)]
    assert told["error"] == reason.rsplit(" ", 1)[0] + f" {elsewhere}" and f"error: {told['error']}\n" in err


@pytest.mark.parametrize(
    "error", [RuntimeError("the encoder broke"), MemoryError("no room"), OSError("encoder error -2")]
)
def test_of_a_video_that_cannot_be_encoded_the_latents_are_kept(run, made, spoiling, error):
    spoiling(lambda path: error if path.suffix == ".mp4" else None)
    verb = "written" if isinstance(error, OSError) else "made"
    status, out, err = run(*TWO, "-o", "clip.mp4", "--save-npz", "all.npz")
    assert (status, out) == (
        1,
        "",
    ) and f"error: clip-1-seed5.mp4 could not be {verb} ({error or 'MemoryError'})" in err
    for i in range(2):
        assert f"its latents are clip-{i}-seed5.npz" in err
        with np.load(f"clip-{i}-seed5.npz") as arrays:
            assert arrays.files == ["latents"]
            np.testing.assert_array_equal(arrays["latents"], made.outputs[0].latents[i : i + 1])
    with np.load("all.npz") as arrays:
        assert arrays["frames"].shape == (2, 5, 64, 96, 3)


def test_a_video_that_cannot_be_decoded_costs_none_that_is_there(run, made, monkeypatch):
    decode = coding.decoded_groups

    def without_memory(coder, latents, *given):
        if (latents == to_internal(made.outputs[-1].latents)[1]).all():
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmuch more")
        yield from decode(coder, latents, *given)

    monkeypatch.setattr(coding, "decoded_groups", without_memory)
    for npz in [], ["--save-npz", "all.npz"]:
        status, out, err = run(*TWO, "-o", "clip.mp4", "-q", *npz)
        assert (status, out) == (1, "clip-0-seed5.mp4\n")
        reason = "clip-1-seed5.mp4 could not be made (RESOURCE_EXHAUSTED: Out of memory)"
        assert err == f"error: {reason}; its latents are clip-1-seed5.npz\n"
        if not npz:
            for name in ("clip-0-seed5.mp4", "clip-1-seed5.npz"):
                Path(name).unlink()
    for name, latents in {"clip-1-seed5.npz": made.outputs[1].latents[1:], "all.npz": made.outputs[1].latents}.items():
        with np.load(name) as arrays:
            assert arrays.files == ["latents"]
            np.testing.assert_array_equal(arrays["latents"], latents)


def test_a_folder_that_is_gone_since_it_was_checked_costs_nothing(run, made, monkeypatch):
    compute = coding.prepare

    def in_the_way(*given):
        Path("new").write_text("a file in place of a folder")
        return compute(*given)

    monkeypatch.setattr(coding, "prepare", in_the_way)
    status, out, err = run("--prompt", "a", "-o", "new/clip.mp4", "--save-npz", "new/clip.npz", "-q")
    assert status == 1 and len(err.splitlines()) == 2 and "new/clip.npz could not be written (" in err
    assert out == f"{Path.cwd()}/clip.mp4\n" and load_video("clip.mp4")[0].shape == (17, 64, 96, 3)
    with np.load("clip.npz") as arrays:
        assert set(arrays.files) == {"latents", "frames"}


def test_another_run_that_took_the_name_meanwhile_keeps_its_file(run, made, monkeypatch, tmp_path):
    compute = coding.prepare

    def beside_another(*given):
        Path("clip.mp4").write_text("another's")
        return compute(*given)

    monkeypatch.setattr(coding, "prepare", beside_another)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    status, out, err = run("--prompt", "a", "-o", "clip.mp4", "-q")
    assert status == 1 and "error: clip.mp4 could not be written" in err and "exists" in err
    assert Path("clip.mp4").read_text() == "another's" and len(load_video(out.strip())[0]) == 17


@contextlib.contextmanager
def gone():
    """A stream whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        yield stream


@pytest.mark.parametrize(
    "stream", [gone, lambda: open("/dev/full", "w"), contextlib.nullcontext], ids=["gone", "full", "closed"]
)
def test_where_success_cannot_be_told_the_video_is_there(main, run, made, stream):
    flags = "--prompt", "a", "--overwrite", "-o", "clip.mp4"
    with stream() as out, stream() as err, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(flags) == 0
    assert len(load_video("clip.mp4")[0]) == 17
    err = io.StringIO()
    with stream() as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main([*flags, "--json"]) == (0 if out is None else 1)
    assert ("error: the result could not be printed (" in err.getvalue()) == (out is not None)


@pytest.mark.parametrize(
    "encoding, told", [("ascii", rb"k\xe4tzchen" + b"-\xff.gif"), ("utf-8", "kätzchen-".encode() + b"\xff.gif")]
)
def test_a_name_that_cannot_be_printed_is_no_failure(main, run, made, encoding, told):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    err = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(["--prompt", "ein Kätzchen 🎬", "-o", "kätzchen-\udcff.gif"]) == 0
        assert main(["--prompt", "ein Kätzchen 🎬", "-o", "kätzchen-\udcff.gif"]) == 1  # the error names it too
    err.flush()
    assert out.buffer.getvalue().startswith(told + b"  96x64") and told in err.buffer.getvalue()
    assert Path("kätzchen-\udcff.gif").is_file()


def test_a_run_whose_stdout_is_gone_ends_well_in_a_process_of_its_own(tmp_path, cache):
    """Python's exit flushes it once more."""
    command = f"{sys.executable} {SCRIPT} --dry-run --quiet"
    shell = f"{command} > /dev/full; echo rc $? >&2; {command} >&-; echo rc $? >&2"
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.stderr == "error: the result could not be printed (No space left on device)\nrc 1\nrc 0\n"


@pytest.mark.parametrize("said, times", [("trace", 2), pytest.param("denoise", 1, marks=pytest.mark.slow)])
def test_ctrl_c_ends_a_run_at_once(tmp_path, said, times):
    """While programs compile, and while the video is decoded and written."""
    flags = "--mesh", "pp=2", "-o", "clip.mp4", "--no-compilation-cache"
    code = f"import runpy, signal, sys\nsys.argv = {['generate.py', *flags]!r}\n"
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests ignore it\n"
    code += f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not process.stderr.readline().startswith(said):
        assert process.poll() is None
    start = time.monotonic()
    for _ in range(times):
        process.send_signal(signal.SIGINT)
    err = process.communicate()[1]
    assert process.returncode == 130 and time.monotonic() - start < 2
    assert "Traceback" not in err and err.endswith("interrupted\n") and os.listdir(tmp_path) == []


# Many prompts, stopping and going on


LINES = """
{"prompt": "a", "height": 32, "width": 48, "num_frames": 5, "seed": 1, "output": "own/a.gif"}

{"prompt": ["b", "c"], "num_frames": 5, "num_inference_steps": 3}
{"num_frames": 1, "guidance_scale": 2.5, "output": null}
"""


def test_each_line_of_a_file_is_a_call_and_flags_say_what_it_leaves_out(run, made):
    Path("calls.jsonl").write_text(LINES)
    flags = "--prompts-file", "calls.jsonl", "--prompt", "d", "--seed", 7, "--fps", 12, "--num-inference-steps", 9
    status, out, err = run(*flags, "-o", "many/clip.mp4")
    assert status == 0, err
    a, bc, d = made.jobs
    assert [(r.prompt, r.seed, r.fps) for job in made.jobs for r in job.requests] == [
        ("a", 1, 12), ("b", 7, 12), ("c", 7, 12), ("d", 7, 12)
    ]  # fmt: skip
    assert [job.size for job in made.jobs] == [(5, 32, 48), (5, 64, 96), (1, 64, 96)]
    assert [job.requests[0].sampling.num_inference_steps for job in made.jobs] == [9, 3, 9]
    assert d.requests[0].guidance_scale == 2.5
    names = ["many/clip-1-0-seed7.mp4", "many/clip-1-1-seed7.mp4", "many/clip-2-seed7.mp4", "own/a.gif"]
    assert sorted(line.split("  ")[0] for line in out.splitlines()) == names and all(map(os.path.exists, names))
    assert re.search(r"^run: 24 steps in ", err, re.MULTILINE) and "line 4" not in err


def test_what_goes_wrong_with_a_line_is_told_and_costs_no_other(run, made, monkeypatch):
    prepare = coding.prepare

    def damaged(checkpoint, parts, requests, *rest):
        if requests[0].prompt == "b":
            raise ValueError("the text encoder is damaged")
        return prepare(checkpoint, parts, requests, *rest)

    monkeypatch.setattr(coding, "prepare", damaged)
    Path("calls.jsonl").write_text("\n".join(f'{{"prompt": "{p}", "output": "{p}.gif"}}' for p in "abc"))
    status, out, err = run("--prompts-file", "calls.jsonl", "--seed", 5, "-q")
    assert (status, sorted(out.split()), err) == (1, ["a.gif", "c.gif"], "error: line 2: the text encoder is damaged\n")
    status, out, _ = run("--prompts-file", "calls.jsonl", "--seed", 5, "--json", "--overwrite")
    told = json.loads(out)
    assert status == 1 and told["error"] == "line 2: the text encoder is damaged"
    assert [(f["path"], f["from"], f["error"], f["call"]["prompt"]) for f in told["files"]] == [
        ("a.gif", "line 1", None, "a"), (None, "line 2", "the text encoder is damaged", "b"),
        ("c.gif", "line 3", None, "c"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("", "calls.jsonl has no line with a call: such as {"),
        ("\n{'prompt': 1}", "calls.jsonl, line 2: is no JSON (Expecting property name"),
        ("[1, 2]", "calls.jsonl, line 1: '[1, 2]' is no JSON object of a call's arguments, such as"),
        ('{"prompt": "a"}\n{"num_frames": 5}', "calls.jsonl, line 2: a prompt is missing"),
        ('{"prompt": "a"}\n{"prompt": "b", "num_frames": 6}', "line 2: num_frames=6 is not 4k+1"),
        ('{"prompt": "a", "promt": "b"}', "line 1: there is no argument promt"),
        ('{"prompt": "a", "output": 3}', "line 1: output=3 is no name of a file"),
        ('{"prompt": "a", "output": "a.avi"}', "line 1: output a.avi must end in"),
        ('{"prompt": "a", "output": "a.mp4"}\n{"prompt": "b", "output": "./a.mp4"}',
         "line 2: a.mp4 is also where a video of line 1 goes"),
    ],
)  # fmt: skip
def test_all_lines_are_checked_before_anything_is_loaded(run, monkeypatch, lines, words):
    monkeypatch.setattr(WanPipeline, "from_pretrained", None)
    Path("calls.jsonl").write_text(lines)
    status, _, err = run("--prompts-file", "calls.jsonl")
    assert status == 1 and words in err.splitlines()[-1] and os.listdir() == ["calls.jsonl"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompts-file", "x", "--dry-run"], "--dry-run is for a single call from its beginning to its end: leave"),
        (
            ["--save", "x", "--save-npz", "x.npz"],
            "--save-npz is for a single call from its beginning to its end: leave",
        ),
        (["--save-every", 5], "--save-every needs a folder: --save FOLDER"),
        (["--save", "x", "--save-every", 0], "'0' is no number of seconds from 1"),
        (["--slots", 0], "'0' is no whole number from 1"),
        (["--resume", "x", "--seed", 1], "--resume goes on with what was saved as it was: leave --seed out"),
        (["--resume", "x", "-o", "a.mp4"], "--resume goes on with what was saved as it was: leave --output out"),
    ],
)
def test_flags_that_mean_nothing_together_are_refused(run, flags, words):
    status, _, err = run(*flags)
    assert status == 2 and words in err


@pytest.fixture
def stopping(monkeypatch):
    """Ctrl-C as soon as a step is done, by what a signal calls."""
    first = running.first_signal_to

    @contextlib.contextmanager
    def soon(hear, saying):
        with first(hear, saying):
            yield threading.Thread(target=wait, args=(hear,)).start()

    def wait(hear):
        (engine,) = opened
        engine.wait_for(lambda: any(handle.progress.steps for handle in engine.handles), 60)
        hear(signal.SIGINT)

    opened, init = [], Engine.__init__
    monkeypatch.setattr(Engine, "__init__", lambda self, *a, **k: (opened.append(self), init(self, *a, **k))[1])
    monkeypatch.setattr(running, "first_signal_to", soon)
    monkeypatch.setattr(ring, "SEGMENT", 0.0)  # a round each, so that this takes a while


SMALL = "--height", 32, "--width", 48, "--num-frames", 5, "--num-inference-steps", 60, "--seed", 3


@pytest.fixture(scope="module")
def plain(main, cache, tmp_path_factory, optimised, logging_as_before_module):
    """Files of calls that nothing stops, and the programs that they compiled when they had been loaded."""
    folder = tmp_path_factory.mktemp("plain")
    late, load_parts = [], load.load_parts

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            late.append(duration)

    def loaded(*given, **named):
        parts = load_parts(*given, **named)
        jax.monitoring.register_event_duration_secs_listener(listen)
        return parts

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr("jaxwan.pipelines.pipeline.load_parts", loaded)
        patch.setenv("XLA_CLIENT_MEM_FRACTION", "0.92")
        flags = ["--prompt", "a", "--prompt", "b", *SMALL, "--mesh", "pp=2", "-o", folder / "clip.mp4"]
        assert main([str(flag) for flag in flags]) == 0
    jax.monitoring.unregister_event_duration_listener(listen)
    return [folder / "clip-0-seed3.mp4", folder / "clip-1-seed3.mp4"], late


def test_nothing_is_compiled_once_the_weights_are_there(plain):
    assert plain[1] == []


@pytest.mark.parametrize("mesh", ["pp=1", "pp=2"])
def test_what_ctrl_c_stopped_goes_on_to_the_same_files_on_another_mesh(run, plain, stopping, monkeypatch, mesh):
    one = "--prompt", "a", "--prompt", "b", "-o", "clip.mp4"
    Path("calls.jsonl").write_text("\n".join(f'{{"prompt": "{p}", "output": "{p}.mp4"}}' for p in "ab"))
    many = "--prompts-file", "calls.jsonl", "--slots", 2
    calls, names = (one, ["clip-0-seed3.mp4", "clip-1-seed3.mp4"]) if mesh == "pp=1" else (many, ["a.mp4", "b.mp4"])
    status, out, err = run(*calls, *SMALL, "--mesh", "pp=2", "--save", "saved")
    assert status == 130 and out == "" and not any(map(os.path.exists, names))
    assert re.search(rf"^{1 if calls is one else 2} calls? saved: --resume saved goes on$", err, re.MULTILINE)
    status, _, err = run("--prompt", "c", "--save", "saved")
    assert status == 1 and "saved holds saved calls, which would be lost: resume them, or choose another" in err
    monkeypatch.setattr(running, "first_signal_to", never)
    status, out, err = run("--resume", "saved", "--mesh", mesh)
    assert status == 0, err
    for name, path in zip(names, plain[0], strict=True):
        assert f"{Path.cwd() / name}  48x32, 5 frames" in out
        np.testing.assert_array_equal(load_video(name)[0], load_video(path)[0])
    assert sorted(os.listdir()) == sorted(["calls.jsonl", *names])  # and nothing is saved any more


def never(hear, saying):
    return contextlib.nullcontext()


def test_what_cannot_go_on_is_refused_before_anything_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(WanPipeline, "from_pretrained", None)
    Path("empty").mkdir()
    Path("strange").mkdir()
    Path("strange/engine.json").write_text("{}")
    Path("other").mkdir()
    index = {"format": 1, "model": {"dim": 7}, "made_by": {"model": "jaxwan-tiny", "dtype": "float32"}, "calls": []}
    Path("other/engine.json").write_text(json.dumps(index))
    Path("named").mkdir()
    Path("named/engine.json").write_text(json.dumps(index | {"made_by": {"model": "Wan2.2-A14B"}}))
    for folder, words in {
        "nowhere": "nowhere holds no saved calls: there is no engine.json in it",
        "empty": "empty holds no saved calls",
        "strange": "lists no saved calls ('format')",
        "other": "was made by a model of ",
        "named": "named was made with the model 'Wan2.2-A14B': say where it is, --model …",
    }.items():
        status, _, err = run("--resume", folder)
        assert status == 1 and words in err.splitlines()[-1], err
    status, _, err = run("--save", ".")
    assert status == 1 and "holds no saved calls: choose another folder to save them in" in err


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_the_first_ctrl_c_saves_and_a_second_one_leaves_at_once(tmp_path, cache, times):
    flags = "--num-inference-steps", "128", "--prompt", "a", "-o", "clip.mp4", "--save", "saved", "--save-every", "1"
    code = f"import runpy, signal, sys\nsys.argv = {['generate.py', *flags]!r}\n"
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests ignore it\n"
    code += f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "saved/engine.json").exists():  # it saves while it runs
        assert process.poll() is None
        time.sleep(0.01)
    start = time.monotonic()
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05 * (times - 1))
    err = process.communicate()[1]
    assert process.returncode == 130 and "saving; Ctrl-C again to leave without\n" in err and "Traceback" not in err
    assert os.listdir(tmp_path) == ["saved"] and (tmp_path / "saved/engine.json").exists()
    assert ("--resume saved goes on" in err) == (times == 1) and (times == 1 or time.monotonic() - start < 2)


# The same again


def test_a_file_is_made_again_by_its_settings(run, made):
    first = (
        "--prompt a --prompt b --negative-prompt c --seed 5 --num-videos-per-prompt 2 --index 1 --height 32 "
        "--width 48 --num-frames 5 --fps 12 --sampler euler --num-inference-steps 3 --flow-shift 4 --guidance-scale 2 "
        "--boundary-ratio 0.5"
    ).split()
    assert run(*first, "-o", "clip.mp4")[0] == 0
    for i, settings in enumerate(made.outputs[0].settings):
        name = f"clip-{i}-seed5-index{settings['call']['index']}.mp4"
        status, _, err = run("--like", name, "-o", f"again-{i}.gif")
        assert status == 0, err
        assert made.outputs[-1].settings == (settings,)


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        (["--prompt", "a blue star"], {"prompt": "a blue star"}),
        (["--seed", 6], {"seed": 6, "index": 0}),
        (["--sampler", "euler", "--num-inference-steps", 5], {
            "sampler": "euler", "num_inference_steps": 5, "flow_shift": 3.0, "timesteps": None}),
        (["--timesteps", 900, 700, 500], {"timesteps": (900.0, 700.0, 500.0)}),
        (["--preset", "lightx2v-4step"], {
            "preset": "lightx2v-4step", "sampler": "euler", "sigma_schedule": "even", "num_inference_steps": 4,
            "flow_shift": 5.0, "timesteps": None, "guidance_scale": 1.0, "guidance_scale_2": None,
            "negative_prompt": None}),
        (["--no-metadata"], {}),
        (["--vae-stride", "64x48"], {
            "tiling": {"tile_height": 64, "tile_width": 64, "stride_height": 48, "stride_width": 64}}),
        (["--vae-tiling", "off"], {"tiling": None}),
    ],
)  # fmt: skip
def test_flags_say_what_is_other_than_in_the_file(run, made, flags, changed):
    timesteps = ["--sampler", "renoise", "--timesteps", 1000, 500]
    tiles = ["--vae-tiling", "--vae-tile", "64x64", "--vae-stride", "64x64"]
    assert run("--prompt", "a red star", "--seed", 5, "--index", 2, *timesteps, *tiles, "-o", "clip.gif")[0] == 0
    status, _, err = run("--like", "clip.gif", *flags, "-o", "other.gif")
    assert status == 0, err
    expected = made.outputs[0].settings[0]["call"] | changed
    assert made.outputs[1].settings[0]["call"] == {name: value for name, value in expected.items() if value is not None}


@pytest.mark.parametrize("preset", ["lightx2v-4step", "fastwan-3step"])
def test_a_preset_is_made_again_and_left_for_another(run, made, preset):
    status, _, err = run("--prompt", "a red star", "--seed", 5, "--preset", preset, "-o", "clip.gif")
    assert status == 0 and f"preset {preset}: " in err and "no guidance, the low-noise expert from step " in err
    assert run("--like", "clip.gif", "-o", "again.gif")[0] == 0
    assert made.outputs[0].settings == made.outputs[1].settings
    assert made.outputs[0].settings[0]["call"]["preset"] == preset
    assert run("--like", "clip.gif", "--preset", "diffusers", "-o", "other.gif")[0] == 0
    assert run("--prompt", "a red star", "--seed", 5, "-o", "plain.gif")[0] == 0
    assert made.outputs[2].settings == made.outputs[3].settings
    assert run("--like", "clip.gif", "--timesteps", 900, 400, "-o", "given.gif")[0] == 0
    given = made.jobs[-1].requests[0].sampling
    assert given.timesteps == (900, 400) and given.sigma_schedule in ("diffusers", "lookup")


def test_another_preset_leaves_the_official_negative_prompt_and_keeps_ones_own(main):
    script = main.__globals__
    args = script["parse"](["--preset", "diffusers"])
    before = {"prompt": "a", "preset": "official", "flow_shift": 12.0, "sigma_schedule": "original"}
    for negative, kept in ((OFFICIAL_NEGATIVE_PROMPT, {}), ("blurry", {"negative_prompt": "blurry"})):
        call = script["arguments"](args, {"call": before | {"negative_prompt": negative}})
        assert call == {"prompt": "a", "preset": "diffusers"} | kept


def test_what_a_file_does_not_hold_must_be_given_again(run, made, files, tmp_path):
    assert run("--video", files["CLIP"], "-o", "clip.gif")[0] == 0
    status, _, err = run("--like", "clip.gif")
    assert status == 1 and "was made from 'video', which it does not hold: give --video again" in err
    assert run("--like", "clip.gif", "--video", files["CLIP"], "-o", "again.gif")[0] == 0
    assert made.outputs[0].settings == made.outputs[1].settings
    folder = Path(shutil.copytree(BUNDLED_MODEL, tmp_path / "some-model"))
    assert run("--model", folder, "--prompt", "a", "-o", "model.gif")[0] == 0
    status, _, err = run("--like", "model.gif")
    assert status == 1 and "was made with the model 'some-model': say where it is, --model …" in err
    assert run("--like", "model.gif", "--model", folder, "-o", "again-2.gif")[0] == 0


# Refusals: (flags) -> words of the sentence; `MODEL` is the bundled checkpoint, named

BAD = [
    (["--height", 30, "--width", 48], "height=30 is no multiple of 16: nearest are 16 and 32"),
    (["--crf", 0], "crf=0 must be a whole number from 1 to 51 for "),
    (["--crf", 20, "-o", "a.gif"], "crf=20 is for mp4 and webm, and a.gif is neither"),
    (["--x264-preset", "fastest"], "x264_preset='fastest' is not one of ultrafast, superfast, veryfast"),
    (["--vae-tile", "64"], "'64' is no width and height, such as 256x256"),
    (["--vae-tile", "64x64"], "stride_height=192 leaves gaps between tiles of 64: it may be 32 to 64 pixels"),
    (["--vae-tiling", "off", "--vae-stride", "64x64"], "--vae-tiling off makes no tiles: leave it out, or --vae-tile"),
    (["--num-frames", 8], "num_frames=8 is not 4k+1: nearest are 5 and 9"),
    (["--model", "MODEL"], '--prompt is missing (an empty one, --prompt "", is allowed)'),
    (["--mesh", "ppp=4"], "mesh 'ppp=4' has no axis 'ppp' (did you mean \"pp=4\"?)"),
    (["--mesh", "4"], "mesh '4' has no axis '4' (did you mean \"pp=4\"?)"),
    (["--mesh", "pp=2 dp=1"], "(did you mean \"pp=2,dp=1\"?)"),
    (["--model", ""], "model is an empty text: give a folder or a hub id, owner/name"),
    (["--promt", "a"], "error: there is no flag --promt: did you mean --prompt?"),
    (["--num_frames=5"], "error: there is no flag --num_frames: did you mean --num-frames?"),
    (["--xyz"], "error: there is no flag --xyz: see --help"),
    (["a", "red", "star"], "error: what is 'a' for? Texts go behind a flag, in quotes: --prompt 'a red star'"),
    (["--like", "none.mp4"], "none.mp4 does not exist"),
    (["--like", "CLIP"], "clip.mp4 does not say how it was made"),
    (["--mesh", "pp=9"], "mesh pp=9 has 9 stages for 8 layers: the largest is pp=8"),
    (["--mesh", "tp=5"], "tp=5 does not divide the model's "),
    (["--mesh", "sp=2", "--ulysses", 3], "ulysses=3 does not divide the 2 devices of sp and the "),
    (["--mesh", "dp=2"], "mesh dp=2 deals videos to 2 groups of devices and this call has 1 video: leave dp out, or"),
    (["--mesh", "cfg=2", "--guidance-scale", 1], "no video of this call is guided: leave cfg out, or give a guidance_"),
    (["--mesh", "pp=2", "--vae-devices", 7], "mesh pp=2 and vae_devices=7 need 9 devices and JAX is already"),
    (["--mesh", "auto", "--ulysses", 2], "mesh 'auto' is one that has to be chosen, and ulysses with it: leave uly"),
    (["--mesh", "auto", "--dry-run", "--chip", "H100"], "needs to know how many devices it has: devices=8"),
    (["--dry-run", "--devices", 8], "devices=8 is for mesh='auto': leave it out, or choose that mesh"),
    (["--mesh", "cfg=4", "--dry-run"], "cfg=4 is for the two branches of guidance, the largest is cfg=2"),
    (["--num-inference-steps", 0], "num_inference_steps=0 is outside 1 to 128: nearest is 1"),
    (["--num-inference-steps", "many"], "invalid int value: 'many'"),
    (["--strength", 0.5], "strength=0.5 is for video to video"),
    (["--video", "none.mp4"], "video none.mp4 does not exist"),
    (["--video", "CLIP", "--strength", 0], "strength=0.0 is outside"),
    (["--image", "CLIP"], "this is a text-to-video model (built like Wan2.2-T2V-A14B): it takes no image"),
    (["--last-image", "CLIP"], "takes no last image"),
    (["--seed", 1, "--seed", 2], "seed is a list of 2 for 1 prompts"),
    (["--seed", -1], "seed=-1 is outside 0 to"),
    (["--sampler", "dpm"], "sampler='dpm' is not one of"),
    (["--sampler", "renoise"], "timesteps are missing"),
    (["--timesteps", 1000, 500], "timesteps are for sampler='renoise' or 'euler' only: unipc makes its own"),
    (["--negative-prompt", "a", "--official-negative-prompt"], "are both given: give one of them"),
    (["--latents", "none.npy"], "latents none.npy does not exist"),
    (["--latents", "CLIP"], "is no readable .npy file of plain numbers"),
    (["--latents", "EMPTY"], "is no readable .npy file of plain numbers"),
    (["--latents", "NOISE"], "of shape (1, 16, 2, 4, 4), expected floats of shape (1, 16, 5, 8, 12)"),
    (["--model", "no-such-folder", "--prompt", "a"], "there is no folder no-such-folder"),
    (["--model", ".", "--prompt", "a"], ". is no Diffusers checkpoint: it has no model_index.json"),
    (["--model", "CLIP", "--prompt", "a"], "clip.mp4 is truncated or no safetensors file"),
    (["--output", "clip.avi"], "output clip.avi must end in .mp4 or .webm or .gif for 17 frame(s)"),
    (["--output", "clip.png"], "must end in .mp4 or .webm or .gif for 17 frame(s)"),
    (["--output", "CLIP/clip.mp4"], "cannot be written"),
    (["--save-npz", "CLIP/arrays.npz"], "cannot be written"),
    (["--output", "a.mp4", "--save-npz", "a.mp4"], "--save-npz a.mp4 is also where the video goes"),
    (["--dtype", "float16"], "dtype='float16' is not one of bfloat16, float32: nearest is bfloat16"),
    (["--dry-run", "--device-memory", "many"], "device memory 'many' is no size from 1MB up, such as 80GB or 80GiB"),
    (["--dry-run", "--device-memory", "24"], "device memory '24' has no unit: 24GB, 24GiB?"),
    (["--device-memory", "80GB"], "--device-memory is for --dry-run"),
    (["--prompt", "half \udcc3"], "prompt is no valid Unicode text"),
]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Names in BAD -> files."""
    folder = tmp_path_factory.mktemp("files")
    save_video(np.zeros((5, 16, 16, 3), np.uint8), folder / "clip.mp4", 8)
    save_video(np.full((6, 16, 16, 3), 255, np.uint8), folder / "white.mp4", 8)
    (folder / "empty.npy").touch()
    np.save(folder / "noise.npy", np.zeros((1, 16, 2, 4, 4), np.float32))
    names = {"CLIP": "clip.mp4", "WHITE": "white.mp4", "EMPTY": "empty.npy", "NOISE": "noise.npy"}
    return {"MODEL": str(BUNDLED_MODEL)} | {name: str(folder / file) for name, file in names.items()}


@pytest.mark.parametrize(("flags", "words"), BAD)
def test_bad_input_is_explained_and_leaves_nothing_behind(run, files, flags, words):
    def named(flag):
        return re.sub("|".join(files), lambda match: files[match[0]], str(flag))

    status, out, err = run(*map(named, flags))
    assert status not in (0, None)
    last = err.splitlines()[-1]
    assert last.startswith("error: ") and words in last
    assert "Traceback" not in err
    assert os.listdir() == []


def test_bad_input_in_a_process_of_its_own(tmp_path, cache):
    done = in_a_process_of_its_own(tmp_path, cache, "--model", BUNDLED_MODEL, "--prompt", "a", "--mesh", "pp=5",
                                   "--output", "/proc/no/clip.mp4")  # fmt: skip
    assert done.returncode == 1
    first, error = done.stderr.splitlines()
    assert first.startswith("jaxwan ") and error.startswith("error: ")
    assert os.listdir(tmp_path) == []


# Refusals: checkpoints whose files are broken


def spoil(folder, name):
    shard = next((folder / "transformer_2").glob("*.safetensors"))
    if name == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif name == "no safetensors":
        shard.write_bytes(b"version https://git-lfs")
    elif name == "absent":
        shard.unlink()
    elif name == "misshaped":
        for expert in ("transformer", "transformer_2"):
            edit(folder / expert / "config.json", ffn_dim=144)
    elif name == "tokenizer":
        (folder / "tokenizer/tokenizer.json").unlink()
    elif name == "config":
        (folder / "vae/config.json").unlink()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("truncated", "is truncated or no safetensors file"),
        ("no safetensors", "is a git-lfs pointer and not the weights: fetch them with `git lfs pull`"),
        ("absent", "transformer_2 has no diffusion_pytorch_model.safetensors"),
        ("misshaped", "transformer does not fit its configuration: 24 of another shape (blocks.0.ffn.net.0.proj.bias"),
        ("tokenizer", "has no tokenizer.json"),
        ("config", "is no Diffusers checkpoint: it has no vae/config.json"),
    ],
)
def test_a_broken_checkpoint_is_explained_before_a_tensor_is_read(run, tmp_path, name, words):
    folder = Path(shutil.copytree(BUNDLED_MODEL, tmp_path / "broken"))
    spoil(folder, name)
    status, _, err = run("--model", folder, "--prompt", "a", "--output", "new/clip.mp4")
    assert status == 1
    first, line = (
        s for s in err.splitlines() if not s.startswith(("seed ", "preset "))
    )  # no progress: nothing was loaded
    assert line.startswith("error: ") and words in line
    assert os.listdir() == []


def test_the_variant_of_the_weights_is_a_flag_and_one_of_the_settings_that_make_a_file_again(
    run, tmp_path, monkeypatch
):
    folder = Path(shutil.copytree(BUNDLED_MODEL, tmp_path / "model"))
    for path in folder.glob("*/*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    assert run("--model", folder, "--dry-run", "--variant", "fp16")[0] == 0
    for flags, words in (
        ([], "give --variant fp16"),
        (["--variant", "bf16"], "no weights of variant='bf16'; those th"),
    ):
        status, _, err = run("--model", folder, "--dry-run", *flags)
        assert status == 1 and words in err
    for model, expected in (("model", 0), ("another", 1)):
        made = {"jaxwan": "0", "model": model, "variant": "fp16", "call": {"prompt": "a"}}
        monkeypatch.setattr(jaxwan, "read_settings", lambda path, made=made: made)
        assert run("--model", folder, "--dry-run", "--like", "x.mp4")[0] == expected


def test_parts_from_files_of_their_own_are_flags_and_asked_for_again(run, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(BUNDLED_MODEL, tmp_path / "model"))
    vae = next((folder / "vae").glob("*.safetensors")).rename(tmp_path / "vae.safetensors")
    assert run("--model", folder, "--dry-run")[0] == 1
    assert run("--model", folder, "--dry-run", "--component", f"vae={vae}")[0] == 0
    made = {"jaxwan": "0", "model": "model", "components": ["vae"], "call": {"prompt": "a"}}
    monkeypatch.setattr(jaxwan, "read_settings", lambda path: made)
    assert run("--model", folder, "--dry-run", "--like", "x.mp4", "--component", f"vae={vae}")[0] == 0
    for flags, words in (
        (["--like", "x.mp4"], "was made with a file for 'vae': say where it is, --component vae="),
        (["--component", "vae"], "--component vae is no NAME=FILE: such as --component vae=wan_2.1_vae.safetensors"),
        (["--component", f"vae={vae}", "--component", "vae=x"], "--component vae=x names vae again"),
        (["--component", "vae=none.pth"], "vae: there is no file or folder none.pth"),
        (["--component", f"unet={vae}"], "'unet' is none of transformer, transformer_2, vae, text_encoder, image_enc"),
        (["--component", f"image_encoder={vae}"], "has no image_encoder; its parts are vae, text_encoder, transformer"),
    ):
        status, _, err = run("--model", folder, "--dry-run", *flags)
        assert status == 1 and words in err


def test_loras_are_flags_and_asked_for_again(run, made, tmp_path):
    module = "blocks.0.attn1.to_q"
    width = read_checkpoint(BUNDLED_MODEL).transformer.dim
    style, other = (
        write_lora(tmp_path / name, lora_tensors({module: (torch.ones(1, width), torch.ones(width, 1))}, "comfyui"))
        for name in ("style.safetensors", "c:low_noise.safetensors")
    )
    status, _, err = run("--prompt", "a", "--lora", f"{style}:-0.5", "--lora", f"low={other}", "-o", "clip.gif")
    assert status == 0, err
    assert "style.safetensors says no expert by its name (high or low): it goes to both" in err
    assert jaxwan.read_settings("clip.gif")["loras"] == [
        {"file": "style.safetensors", "strength": -0.5, "expert": None},
        {"file": "c:low_noise.safetensors", "strength": 1.0, "expert": "low"},
    ]
    status, _, err = run("--like", "clip.gif", "-o", "again.gif")
    assert status == 1
    told = "say where they are, --lora style.safetensors:-0.5 --lora low=c:low_noise.safetensors:1.0"
    assert f"clip.gif was made with LoRAs: {told}" in err
    assert run("--like", "clip.gif", "--lora", f"{style}:-0.5", "-o", "again.gif")[0] == 0
    assert run("--lora", other, "--dry-run")[0] == 0
    for lora, words in (("none.pt:1", "there is no file none.pt"), (f"{other}:2:3", "there is no file")):
        status, _, err = run("--lora", lora, "--dry-run")
        assert status == 1 and words in err


# Hub ids


def test_the_weights_of_a_hub_id_are_fetched_last(run, monkeypatch):
    def fetch(repo, *_):
        asked.append(repo)
        raise OSError("no network")

    asked = []
    monkeypatch.setattr("jaxwan.pipelines.checkpoint._fetch_configs", lambda repo: BUNDLED_MODEL)
    monkeypatch.setattr("jaxwan.pipelines.checkpoint.fetch_weights", fetch)
    status, _, err = run("--model", "owner/name", "--prompt", "a", "--num-frames", 8)
    assert status == 1 and asked == []
    status, _, err = run("--model", "owner/name", "--prompt", "a", "--dry-run")
    assert status == 0 and asked == []
    status, _, err = run("--model", "owner/name", "--prompt", "a")
    assert status == 1 and asked == ["owner/name"]
    assert err.endswith("error: no network\n")
    assert os.listdir() == []
