"""What XLA takes when it compiles for an H100, without one, against what the dry run tells.

It needs packages of its own, beside the environment and 2.7 GB large:

    pip install --no-deps --target DIR jax-cuda12-pjrt==JAX jax-cuda12-plugin==JAX nvidia-cuda-nvcc-cu12 \\
        nvidia-cudnn-cu12 nvidia-cublas-cu12 nvidia-cuda-runtime-cu12 nvidia-cuda-nvrtc-cu12     # JAX: jax's version
    export PYTHONPATH=DIR JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 LD_LIBRARY_PATH=$(echo DIR/nvidia/*/lib | tr ' ' :)
    pytest -q -m aot -s

Without a card nothing is tried out: which algorithms products and convolutions take, and the workspace they need, is
left open, so times cannot be had this way.
"""

import importlib.util
import math
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import collectives
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from published import write_configs

from jaxwan.kernels import attention
from jaxwan.models import causal_conv
from jaxwan.models.tiles import Tiling, coder_for
from jaxwan.pipelines.call import make_job
from jaxwan.pipelines.checkpoint import read_checkpoint
from jaxwan.pipelines.dry_run import make_report
from jaxwan.pipelines.encoder_ring import share_of
from jaxwan.pipelines.parts import abstract_components, abstract_parts
from jaxwan.pipelines.vae_memory import tree_bytes, vae_bytes
from jaxwan.pipelines.warmup import job_programs
from jaxwan.sharding.mesh import AXES, MeshSpec

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="see the file's docstring"),
    pytest.mark.usefixtures("optimised"),
]

GIB = 2**30
WITHIN = 0.1  # of the activations, in either direction
PICTURE = np.zeros((64, 64, 3), np.uint8)
A14B, TI2V, SMALL = "Wan2.2-T2V-A14B", "Wan2.2-TI2V-5B", "Wan2.1-T2V-1.3B"
P480 = dict(num_frames=81, height=480, width=832)
RENOISE = dict(sampler="renoise", timesteps=[900, 500], guidance_scale=1)
CASES = [
    # model, mesh, dtype, arguments of the call
    (A14B, "pp=4", "bfloat16", {}),
    (A14B, "pp=4", "bfloat16", P480),
    (A14B, "pp=4", "bfloat16", P480 | dict(num_frames=17)),
    (A14B, "pp=4", "bfloat16", P480 | dict(num_frames=1)),
    (A14B, "pp=8", "bfloat16", P480 | dict(num_videos_per_prompt=8)),
    (A14B, "pp=4", "bfloat16", P480 | RENOISE | dict(num_videos_per_prompt=2)),
    (A14B, "pp=4", "float32", {}),
    ("Wan2.2-I2V-A14B", "pp=4", "bfloat16", dict(image=PICTURE, height=720, width=1280)),
    ("Wan2.1-FLF2V-14B", "pp=4", "bfloat16", dict(image=PICTURE, last_image=PICTURE, height=720, width=1280)),
    (TI2V, "pp=1", "bfloat16", {}),
    (TI2V, "pp=4", "bfloat16", dict(num_videos_per_prompt=4)),
    (TI2V, "pp=2", "float32", {}),
    (SMALL, "pp=1", "bfloat16", {}),
    (SMALL, "pp=1", "float32", {}),
    (A14B, "pp=8", "bfloat16", {}),
    (A14B, "pp=2,sp=4", "bfloat16", {}),
    (A14B, "cfg=2,sp=4", "bfloat16", {}),
    (A14B, "sp=4,tp=2", "bfloat16", {}),
    (A14B, "sp=3", "bfloat16", {}),
    (A14B, "sp=16", "bfloat16", {}),
    ("Wan2.1-FLF2V-14B", "tp=4", "bfloat16", dict(image=PICTURE, last_image=PICTURE, height=720, width=1280)),
    (TI2V, "sp=2", "bfloat16", {}),
    (SMALL, "pp=2,sp=2", "float32", P480),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def as_on_the_card():
    """What the code chooses where a GPU is, it must choose here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_cudnn_fits", lambda q: q.dtype == jnp.bfloat16 and q.shape[-1] <= 128)
        patch.setattr(causal_conv, "default_formulation", lambda c_in: "direct")
        yield


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return cache(lambda name: read_checkpoint(write_configs(tmp_path_factory.mktemp("configs"), name)))


def h100s(mesh: MeshSpec) -> Mesh:
    target = Path(__file__).with_name("h100.txtpb").read_text()
    described = topologies.get_topology_desc("h100", "cuda", target_config=target, topology=f"1x1x{mesh.num_devices}")
    return Mesh(np.array(described.devices).reshape(mesh.sizes), AXES, axis_types=(AxisType.Auto,) * 5)


def compiled_for_h100s(program, **options):
    _, function, arguments = program
    return function.trace(*arguments).lower(lowering_platforms=("cuda",)).compile(compiler_options=options)


def beside_parameters(program, parameters: int, **options) -> float:
    """GiB that a program takes at its peak, without its parameters."""
    return (compiled_for_h100s(program, **options).memory_analysis().peak_memory_in_bytes - parameters) / GIB


@pytest.mark.parametrize(("name", "mesh", "dtype", "call"), CASES)
def test_denoising_takes_what_the_dry_run_tells(published, name, mesh, dtype, call):
    checkpoint, mesh = published(name), MeshSpec.parse(mesh)
    job = make_job(checkpoint, prompt="a", seed=0, **call)
    parts = abstract_parts(checkpoint, h100s(mesh), dtype, "float32")
    ring = next(job_programs(checkpoint, parts, job))
    assert ring[0] == "ring"
    weights = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(parts.denoiser.weights)]
    sizes = [leaf.dtype.itemsize for leaf in jax.tree.leaves(parts.denoiser.weights)]
    weights = sum(math.prod(shape) * size for shape, size in zip(weights, sizes, strict=True))
    taken = beside_parameters(ring, weights)
    told = make_report(checkpoint, mesh, job, dtype, "float32", 10**12)
    told = sum(told.activation_bytes["denoise"].values()) / GIB
    videos = f", {len(job.requests)} videos" * (len(job.requests) > 1)
    print(
        f"\n| {name}, {'x'.join(map(str, job.size))}{videos}, {mesh}, {dtype} | {taken:.2f} | {told:.2f} "
        f"| {taken + weights / GIB:.2f} |"
    )
    assert told == pytest.approx(taken, rel=WITHIN)


@pytest.mark.parametrize(("devices", "tiling"), [(1, None), (4, None), (8, None), (1, Tiling())])
@pytest.mark.parametrize("vae_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("direction", ["decode", "encode"])
@pytest.mark.parametrize("name", [A14B, TI2V])
def test_the_vae_takes_what_the_dry_run_tells(published, name, direction, vae_dtype, devices, tiling):
    checkpoint, mesh = published(name), MeshSpec(pp=devices)
    job = make_job(checkpoint, prompt="a", seed=0, tiling=tiling)
    parts = abstract_parts(checkpoint, h100s(mesh), "bfloat16", vae_dtype)
    latents = (1, *checkpoint.geometry.latent_shape(*job.size), checkpoint.geometry.z_dim)
    shape = latents if direction == "decode" else (1, *job.size, 3)
    coder, how = coder_for(parts.coder, tiling), " in tiles" * (tiling is not None)
    later = next(p for p in coder.programs(direction, shape) if p[0] == f"VAE {direction}{how}, later frames")
    told = vae_bytes(direction, checkpoint, job, jnp.dtype(vae_dtype), devices)
    # what is kept until all tiles are there is no part of the program
    told = sum(size for name, size in told.items() if "of tiles" not in name) / GIB
    # the other direction's parameters are none of its arguments
    used = ("decoder", "post_quant_conv") if direction == "decode" else ("encoder", "quant_conv")
    used = sum(tree_bytes(parts.coder.state[module]) for module in used)
    # products by cuBLAS: without a card to try tiles on, XLA finds none for a strip's attention with Triton
    taken = beside_parameters(later, used, xla_gpu_enable_triton_gemm=devices == 1)
    size = "x".join(map(str, job.size))
    print(f"\n| {name}, VAE {direction}{how} {size}, {vae_dtype}, {devices} devices | {taken:.2f} | {told:.2f} |")
    assert told == pytest.approx(taken, rel=WITHIN)


def test_encoders_take_less_than_denoising_and_send_each_other_no_weights(published):
    checkpoint, devices = published("Wan2.1-FLF2V-14B"), 8
    call = P480 | dict(num_frames=17)  # less to denoise than what anybody takes so many devices for
    job = make_job(checkpoint, prompt="a", seed=0, image=PICTURE, last_image=PICTURE, **call)
    parts = abstract_parts(checkpoint, h100s(MeshSpec(pp=devices)), "bfloat16", "float32")
    told = make_report(checkpoint, MeshSpec(pp=devices), job, "bfloat16", "float32", 10**12)
    sent = {"text encoder": ["all-reduce", "collective-permute"], "image encoder": ["collective-permute"]}
    models = abstract_components(checkpoint, "bfloat16", "float32")
    for program in job_programs(checkpoint, parts, job):
        if program[0] in sent:
            share = tree_bytes(share_of(models[program[0].replace(" ", "_")][1], devices))
            compiled = compiled_for_h100s(program)
            taken = (compiled.memory_analysis().peak_memory_in_bytes - share) / GIB
            print(f"\n| {program[0]}, {devices} devices, {share / GIB:.2f} GiB of parameters | {taken:.2f} |")
            assert [kind for kind, _ in collectives(compiled.as_text())] == sent.pop(program[0])
            assert 0 < taken < sum(told.activation_bytes["denoise"].values()) / GIB
    assert not sent


def test_attention_is_cudnns_and_stages_pass_on_nothing_but_the_hidden_state(published):
    checkpoint = published(A14B)
    parts = abstract_parts(checkpoint, h100s(MeshSpec(pp=4)), "bfloat16", "float32")
    text = compiled_for_h100s(next(job_programs(checkpoint, parts, make_job(checkpoint, prompt="a", seed=0)))).as_text()
    assert text.count("__cudnn$fmha") >= 2 and "collective-permute" in text
    assert not any(f"{word}(" in text for word in ("all-gather", "all-reduce", "all-to-all"))
    assert jax.default_backend() == "cpu"
