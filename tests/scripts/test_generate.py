"""generate.py as a person runs it: files, what is said, and refusals that leave nothing behind."""

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import checkpoints
import numpy as np
import pytest
from oracle import relative_error
from PIL import Image
from published import edit, write_configs
from runs import IMAGE, NEGATIVES, PROMPTS, run_diffusers, unit_noise

from jaxwan import BUNDLED_MODEL, OFFICIAL_NEGATIVE_PROMPT
from jaxwan.pipelines import load
from jaxwan.pipelines.media import load_video, save_video
from jaxwan.pipelines.pipeline import Output, WanPipeline

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
    return call


class Made(NamedTuple):
    jobs: list
    outputs: list


@pytest.fixture
def made(monkeypatch):
    """The jobs that reach the pipeline, and what it makes of them without computing anything."""
    seen = Made([], [])

    def run(self, job, *, stages):
        latents = np.random.default_rng(0).standard_normal((job.batch, 16, 2, 4, 4)).astype(np.float32)
        ramp = np.linspace(0, 0.9, job.width, dtype=np.float32)[:, None]
        video = np.arange(job.batch, dtype=np.float32)[:, None, None, None, None]
        frames = np.broadcast_to((video + ramp) / job.batch, (job.batch, job.num_frames, job.height, job.width, 3))
        seen.jobs.append(job)
        seen.outputs.append(Output(frames, latents, job.fps, (), stages.seconds))
        return seen.outputs[-1]

    monkeypatch.setattr(WanPipeline, "run", run)
    monkeypatch.setattr(load, "job_programs", lambda *_: ())  # what would be compiled for it meanwhile
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
    (seed,) = re.findall(r"^seed (\d+)$", done.stdout, re.MULTILINE)
    (path,) = (tmp_path / "outputs").iterdir()
    assert re.fullmatch(rf"\d{{8}}-\d{{6}}-{seed}\.mp4", path.name)
    assert f"outputs/{path.name}  96x64, 17 frames at 8 fps" in done.stdout
    frames, fps = load_video(path)
    assert frames.shape == (17, 64, 96, 3) and fps == 8
    with np.load(tmp_path / "arrays.npz") as arrays:
        assert {name: (a.shape, a.dtype) for name, a in arrays.items()} == {
            "latents": ((1, 16, 5, 8, 12), np.float32), "frames": ((1, 17, 64, 96, 3), np.float32)
        }  # fmt: skip
        assert np.abs(frames / 255 - arrays["frames"][0]).mean() < 0.1 < 2 * arrays["frames"].std()
    timings = done.stdout.splitlines()[-1]
    for stage in ("load", "compile", "text", "denoise", "decode", "write"):
        assert re.search(rf"\b{stage} \d+\.\d", timings) and f"{stage}:" in done.stderr
    assert "float32 DiT, float32 VAE, 4 x cpu" in timings


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
        "--model", str(folder), "--mesh", "pp=4", "--prompt", PROMPTS[0], "--negative-prompt", NEGATIVES[0],
        "--image", str(tmp_path / "image.png"), "--guidance-scale", "4", "--guidance-scale-2", "3", *flags,
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


def test_each_video_of_a_batch_is_a_file(run, made):
    status, out, err = run(
        "--model", BUNDLED_MODEL, "--prompt", "a", "--prompt", "b", "--num-videos-per-prompt", 2, "--height", 32,
        "--width", 48, "--num-frames", 5, "--fps", 12, "--output", "made/here/clip.mp4", "--mesh", "pp=2",
    )  # fmt: skip
    assert status == 0, err
    (output,) = made.outputs
    assert sorted(os.listdir("made/here")) == [f"clip-{i}.mp4" for i in range(4)]
    for i in range(4):
        clip, fps = load_video(f"made/here/clip-{i}.mp4")
        assert fps == 12 and clip.shape == (5, 32, 48, 3)
        assert np.argmin([np.abs(clip / 255 - frames).mean() for frames in output.frames]) == i
        assert f"made/here/clip-{i}.mp4  48x32, 5 frames at 12 fps" in out


def test_one_frame_may_go_to_a_png(run, made):
    status, out, err = run("--prompt", "a", "--num-frames", 1, "--output", "new/picture.PNG", "--model", BUNDLED_MODEL)
    assert status == 0, err
    (output,) = made.outputs
    np.testing.assert_array_equal(Image.open("new/picture.PNG"), (output.frames[0, 0] * 255).round().astype(np.uint8))
    assert os.listdir("new") == ["picture.PNG"]


def test_latents_of_a_file_are_the_noise(run, made):
    noise = np.random.default_rng(0).standard_normal((1, 16, 5, 8, 12)).astype(np.float32)
    np.save("noise.npy", noise)
    status, _, err = run("--model", BUNDLED_MODEL, "--prompt", "", "--latents", "noise.npy", "--save-npz", "arrays.npz")
    assert status == 0, err
    (job,), (output,) = made.jobs, made.outputs
    np.testing.assert_array_equal(job.latents, noise)
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
        "--num-videos-per-prompt", 2, "--output", "clip.mp4",
    )  # fmt: skip
    assert status == 0, err
    (job,) = made.jobs
    a, b = job.requests
    assert (a.prompt, b.prompt) == ("a", "b")
    assert a.negative_prompt == b.negative_prompt == OFFICIAL_NEGATIVE_PROMPT
    assert (job.height, job.width, job.num_frames, job.fps, job.num_videos) == (64, 32, 5, 7.5, 2)
    assert job.video.shape == (5, 16, 16, 3)
    assert (a.table.num_steps, b.table.num_steps) == (2, 3)  # half of 4 and 6
    assert a.table.timesteps[0] % 1 and not b.table.timesteps[0] % 1  # Euler's are no whole numbers
    assert [(r.guidance_scale, r.guidance_scale_2, r.seed) for r in job.requests] == [(2.0, 1.5, 3), (3.0, 1.5, 3)]
    assert job.boundary_ratio == 0.5
    assert sorted(os.listdir()) == [f"clip-{i}.mp4" for i in range(4)]


# What the command says of itself


def test_every_flag_is_in_the_help(run):
    status, out, _ = run("--help")
    assert status == 0
    for flag in (
        "--model --prompt --negative-prompt --official-negative-prompt --image --last-image --video --strength "
        "--height --width --num-frames --fps --num-inference-steps --timesteps --guidance-scale --guidance-scale-2 "
        "--boundary-ratio --flow-shift --sampler --seed --latents --num-videos-per-prompt --mesh --dtype --vae-dtype "
        "--output --save-npz --no-compilation-cache --dry-run --device-memory"
    ).split():
        assert re.search(rf"^  {flag}\b", out, re.MULTILINE), flag


def test_a_dry_run_needs_neither_weights_nor_devices(tmp_path, cache):
    folder = write_configs(tmp_path / "configs", "Wan2.2-T2V-A14B")
    here = tmp_path / "here"
    here.mkdir()
    done = in_a_process_of_its_own(
        here, cache, "--model", folder, "--prompt", "a cat", "--mesh", "pp=40", "--dry-run=json", "--device-memory",
        "80GB", before="import atexit\nfrom jax._src import xla_bridge\n"
        "atexit.register(lambda: print('devices:', xla_bridge.backends_are_initialized(), file=sys.stderr))",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["tokens"], report["layers_per_stage"], report["ticks"]) == (75_600, [1] * 40, 1640)
    assert report["fits"] is True and report["dtype"] == "bfloat16"
    assert done.stderr.splitlines()[-1] == "devices: False"
    assert os.listdir(here) == []


def test_a_dry_run_reads_as_text_too(run):
    status, out, _ = run("--model", BUNDLED_MODEL, "--prompt", "a", "--dry-run", "--mesh", "pp=5")
    assert status == 0
    assert "stages      5 with 2, 2, 2, 2, 0 layers" in out and "each device must have" in out
    assert os.listdir() == []


# Refusals: (flags) -> words of the sentence; `MODEL` is the bundled checkpoint, named

BAD = [
    (["--height", 30, "--width", 48], "height=30 is no multiple of 16: nearest are 16 and 32"),
    (["--num-frames", 8], "num_frames=8 is not 4k+1: nearest are 5 and 9"),
    (["--model", "MODEL"], '--prompt is missing (an empty one, --prompt "", is allowed)'),
    (["--mesh", "ppp=4"], "mesh 'ppp=4' has no axis 'ppp' (did you mean pp?)"),
    (["--mesh", "pp=9"], "mesh pp=9 has 9 stages for 8 layers: the largest is pp=8"),
    (["--mesh", "tp=2"], "tp=2 is not built yet"),
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
    (["--timesteps", 1000, 500], "timesteps are for sampler='renoise' only"),
    (["--negative-prompt", "a", "--official-negative-prompt"], "are both given: give one of them"),
    (["--latents", "none.npy"], "--latents none.npy cannot be read (No such file or directory)"),
    (["--latents", "CLIP"], "is no .npy file of plain numbers"),
    (["--latents", "EMPTY"], "is no .npy file of plain numbers"),
    (["--latents", "NOISE"], "of shape (1, 16, 2, 4, 4), expected floats of shape (1, 16, 5, 8, 12)"),
    (["--model", "no-such-folder", "--prompt", "a"], "there is no folder no-such-folder"),
    (["--model", ".", "--prompt", "a"], ". is no Diffusers checkpoint: it has no model_index.json"),
    (["--model", "CLIP", "--prompt", "a"], "clip.mp4 is a file; a checkpoint is a folder"),
    (["--output", "clip.avi"], "output clip.avi must end in .mp4 or .gif for 17 frame(s)"),
    (["--output", "clip.png"], "must end in .mp4 or .gif for 17 frame(s)"),
    (["--output", "CLIP/clip.mp4"], "cannot be written"),
    (["--save-npz", "CLIP/arrays.npz"], "cannot be written"),
    (["--output", "a.mp4", "--save-npz", "a.mp4"], "--save-npz a.mp4 is also where the video goes"),
    (["--dtype", "float16"], "invalid choice: 'float16'"),
    (["--dry-run", "--device-memory", "many"], "device memory 'many' is no size above 0, such as 80GB or 80GiB"),
    (["--device-memory", "80GB"], "--device-memory is for --dry-run"),
    (["--prompt", "half \udcc3"], "prompt is no valid Unicode text"),
]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Names in BAD -> files."""
    folder = tmp_path_factory.mktemp("files")
    save_video(np.zeros((5, 16, 16, 3), np.uint8), folder / "clip.mp4", 8)
    (folder / "empty.npy").touch()
    np.save(folder / "noise.npy", np.zeros((1, 16, 2, 4, 4), np.float32))
    names = {"CLIP": "clip.mp4", "EMPTY": "empty.npy", "NOISE": "noise.npy"}
    return {"MODEL": str(BUNDLED_MODEL)} | {name: str(folder / file) for name, file in names.items()}


@pytest.mark.parametrize(("flags", "words"), BAD)
def test_bad_input_is_explained_and_leaves_nothing_behind(run, files, flags, words):
    def named(flag):
        return re.sub("|".join(files), lambda match: files[match[0]], str(flag))

    status, out, err = run(*map(named, flags))
    assert status not in (0, None)
    last = err.splitlines()[-1]
    assert words in last and re.match("error: |generate.*: error: |usage: |.*: error: ", last)
    assert "Traceback" not in err
    assert os.listdir() == []


def test_bad_input_in_a_process_of_its_own(tmp_path, cache):
    done = in_a_process_of_its_own(tmp_path, cache, "--model", BUNDLED_MODEL, "--prompt", "a", "--mesh", "pp=5",
                                   "--output", "/proc/no/clip.mp4")  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
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
        ("no safetensors", "is truncated or no safetensors file"),
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
    (line,) = err.splitlines()  # no progress bar: nothing was loaded
    assert line.startswith("error: ") and words in line
    assert os.listdir() == []


# Hub ids


def test_the_weights_of_a_hub_id_are_fetched_last(run, monkeypatch):
    import huggingface_hub

    def fetch(repo, *, allow_patterns):
        asked.append("*.safetensors" in allow_patterns)
        if asked[-1]:
            raise ConnectionError("no network")
        return str(BUNDLED_MODEL)

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    status, _, err = run("--model", "owner/name", "--prompt", "a", "--num-frames", 8)
    assert status == 1 and asked == [False]
    status, _, err = run("--model", "owner/name", "--prompt", "a", "--dry-run")
    assert status == 0 and asked == [False] * 2
    status, _, err = run("--model", "owner/name", "--prompt", "a")
    assert status == 1 and asked == [False] * 3 + [True]
    assert err == "error: owner/name is no local folder, and the hub did not give it: no network\n"
    assert os.listdir() == []
