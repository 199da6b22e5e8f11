"""A video on its way as a file: it goes on elsewhere with the same bits, and what does not fit is refused by name."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from checkpoints import make_checkpoint
from runs import IMAGE, LAST_IMAGE, NEGATIVES, PROMPTS
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxwan.pipelines.pipeline import WanPipeline
from jaxwan.pipelines.steps import StepState

pytestmark = pytest.mark.usefixtures("optimised_ring")

SIZE = dict(height=32, width=48, num_frames=5)
CALL = SIZE | dict(prompt=PROMPTS[0], negative_prompt=NEGATIVES[0], seed=7, num_inference_steps=5, guidance_scale=4.0)


@pytest.fixture(scope="module")
def pipe(folder):
    return WanPipeline.from_pretrained(folder("t2v-A14B"), progress=False)


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    """A video after two of five steps, where it would end, and its file."""
    path = tmp_path_factory.mktemp("states") / "video.safetensors"
    state = pipe.advance(pipe.prepare_encode(**CALL), 2)
    assert pipe.save_state(state, path) == [path]
    return state, pipe.advance(state).latents, path


def test_the_file_speaks_the_public_axis_order(saved):
    state, _, path = saved
    with safe_open(path, "numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("sampler.x"), state.latents[0])
        about = json.loads(file.metadata()["jaxwan"])
    assert about["size"] == [5, 32, 48] and about["settings"]["call"]["prompt"] == PROMPTS[0]
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name]  # nothing half-written beside it


def test_it_goes_on_beside_other_neighbours_on_another_mesh_with_the_same_bits(folder, pipe, saved):
    state, end, path = saved
    loaded = pipe.load_state(path)
    assert loaded.steps_done.tolist() == [2] and loaded.settings == state.settings
    np.testing.assert_array_equal(pipe.advance(loaded).latents, end)
    other = WanPipeline.from_pretrained(folder("t2v-A14B"), "dp=2,cfg=2,pp=2", progress=False)
    neighbour = other.prepare_encode("a moon", seed=1, guidance_scale=1.0, num_inference_steps=6, **SIZE)
    together = other.advance(StepState.join(neighbour, other.load_state(path)))
    np.testing.assert_array_equal(together[1].latents, end)
    np.testing.assert_array_equal(other.advance(other.load_state(path)).latents, end)  # a rank has no video


def test_it_goes_on_in_another_process(folder, saved, tmp_path):
    _, end, path = saved
    script = f"""
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
from jaxwan import WanPipeline
pipe = WanPipeline.from_pretrained({str(folder("t2v-A14B"))!r}, "pp=2", progress=False)
np.save({str(tmp_path / "end.npy")!r}, pipe.advance(pipe.load_state({str(path)!r})).latents)
"""
    env = {name: value for name, value in os.environ.items() if name != "JAX_DISABLE_MOST_OPTIMIZATIONS"}
    subprocess.run([sys.executable, "-c", script], check=True, env=env)
    np.testing.assert_array_equal(np.load(tmp_path / "end.npy"), end)


@pytest.mark.parametrize(
    ("family", "call"),
    [
        ("2.1-flf2v", SIZE | dict(image=IMAGE, last_image=LAST_IMAGE)),
        ("ti2v-5B", dict(image=IMAGE, height=64, width=96, num_frames=5)),
        ("t2v-A14B", SIZE | dict(sampler="renoise", timesteps=[900, 500, 100], max_sequence_length=33)),
    ],
)
def test_every_kind_of_input_comes_back_as_it_was(folder, tmp_path, family, call):
    pipe = WanPipeline.from_pretrained(folder(family), progress=False)
    state = pipe.prepare_encode("x", seed=1, **call)
    two = StepState.join(state, pipe.prepare_encode("y", seed=2, **call))
    paths = pipe.save_state(two, tmp_path / "a.safetensors")
    assert [path.name for path in paths] == ["a-0-seed1.safetensors", "a-1-seed2.safetensors"]
    loaded = pipe.load_state(paths)
    assert loaded.settings == tuple(json.loads(json.dumps(made)) for made in two.settings)
    for ours, theirs in zip(loaded.entries, two.entries, strict=True):
        for (name, a), (_, b) in zip(named(ours), named(theirs), strict=True):
            assert a.dtype == b.dtype, name
            np.testing.assert_array_equal(a, b, err_msg=name)


def named(entry):
    from jaxwan.pipelines.snapshot import _flat

    return list(_flat(entry))


# Refusals


@pytest.fixture
def rewrite(saved, tmp_path):
    """(change of the arrays, change of what the file says of itself) -> a file with them."""

    def write(arrays=None, about=None):
        with safe_open(saved[2], "numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            told = json.loads(file.metadata()["jaxwan"])
        (arrays or (lambda tensors: None))(tensors)
        (about or (lambda told: None))(told)
        save_file(tensors, tmp_path / "changed.safetensors", {"jaxwan": json.dumps(told)})
        return tmp_path / "changed.safetensors"

    return write


@pytest.mark.parametrize(
    ("arrays", "about", "words"),
    [
        (None, lambda a: a.update(format=2), "is of format 2, and jaxwan .* reads 1"),
        (None, lambda a: a["model"].update(num_layers=40), "of num_layers=40, this one has 5"),
        (None, lambda a: a["model"].update(dtype="bfloat16"), "of dtype='bfloat16', this one has 'float32'"),
        (None, lambda a: a["model"].update(tensors="0"), "names, shapes or dtypes of its tensors differ"),
        (None, lambda a: a["model"].pop("experts"), "of experts=None, this one has 2"),
        (None, lambda a: a.update(size=[9, 32, 48]), "does not fit this model at 9x32x48: .*sampler.*is .* not"),
        (None, lambda a: a.update(size=[9, 31, 48]), "height=31"),
        (None, lambda a: a.update(size=[10**9, 10**9, 48]), "num_frames=1000000000"),
        (None, lambda a: a.update(settings=3), "holds no video on its way"),
        (None, lambda a: a.update(model=[]), "of .*=None|holds no video"),
        (lambda t: t.pop("sampler.m2"), None, "sampler.m2 is missing, not"),
        (lambda t: t.update(more=np.zeros(3)), None, r"more is \(\(3,\), 'F64'\), not missing"),
        (lambda t: t.update({"inputs.text": np.zeros((3, 512, 24), np.float32)}), None, "no texts of 1 to 512 rows"),
        (lambda t: t.update({"inputs.text": np.zeros((), np.float32)}), None, "no texts of 1 to 512 rows"),
        (lambda t: t.update({"inputs.text": t["inputs.text"][:1]}), None, "numbers that no video on its way has"),
        (lambda t: t.update({"done": np.array(6, np.int32)}), None, "numbers that no video on its way has"),
        (lambda t: t.update({"sampler.x": t["sampler.x"] * np.nan}), None, "numbers that no video on its way has"),
        (lambda t: t.update({"inputs.controls.expert": t["inputs.controls.expert"] + 7}), None, "holds numbers"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_by_name(pipe, rewrite, arrays, about, words):
    with pytest.raises(ValueError, match=words):
        pipe.load_state(rewrite(arrays, about))


def test_what_is_no_such_file_is_refused(pipe, saved, tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="absent"):
        pipe.load_state(tmp_path / "absent.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(saved[2].read_bytes()[:-7])
    with pytest.raises(ValueError, match="is truncated or no safetensors file"):
        pipe.load_state(cut)
    with pytest.raises(ValueError, match="holds no video on its way"):
        pipe.load_state(next((folder("t2v-A14B") / "vae").glob("*.safetensors")))


def test_a_model_of_other_tensors_is_another_model(saved, tmp_path):
    """The same configuration, but stored in another precision."""
    import torch

    make_checkpoint(tmp_path, "t2v-A14B")
    for path in (tmp_path / "transformer").glob("*.safetensors"):
        from safetensors.torch import load_file
        from safetensors.torch import save_file as save_torch

        save_torch({k: v.to(torch.bfloat16) for k, v in load_file(path).items()}, path, {"format": "pt"})
    other = WanPipeline.from_pretrained(tmp_path, progress=False)
    with pytest.raises(ValueError, match="names, shapes or dtypes of its tensors differ"):
        other.load_state(saved[2])


def test_nothing_is_left_of_a_file_that_cannot_be_written(pipe, saved, tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "there.safetensors").write_text("mine")
    for name, error, words in (
        ("folder.safetensors", OSError, "is a folder"), ("pipe.safetensors", OSError, "is no regular file"),
        ("there.safetensors", FileExistsError, "exists"), ("x.mp4", ValueError, "is saved as .safetensors, not as"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            pipe.save_state(saved[0], tmp_path / name, overwrite=False)
    assert len(list(tmp_path.iterdir())) == 3 and (tmp_path / "there.safetensors").read_text() == "mine"
    pipe.save_state(saved[0], tmp_path / "there.safetensors")
    (tmp_path / "plain").touch()
    assert (tmp_path / "there.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
