"""The ring of the published models at full size, lowered and compiled without a single weight."""

import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published import write_configs

from jaxwan.pipelines.checkpoint import CHANNEL_MASK, read_checkpoint
from jaxwan.pipelines.condition import Conditioning, make_controls
from jaxwan.pipelines.denoise import WEIGHT_AXES, Inputs, Weights, abstract_weights, make_program, to_float32
from jaxwan.pipelines.dry_run import make_report
from jaxwan.pipelines.request import make_job
from jaxwan.sharding.mesh import MeshSpec, make_mesh, sharding
from jaxwan.sharding.ring import Turns
from jaxwan.sharding.turns import RingPlan

pytestmark = pytest.mark.usefixtures("optimised")

STAGES = 4
PIXEL = np.zeros((1, 1, 3), np.uint8)
SHAPE = re.compile(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]")


def abstract(tree, place):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def conditioning(name, shape):
    """What the variant takes besides text, for one video of latents `shape` (T, H, W, Z)."""
    t, h, w, z = shape
    if "TI2V" in name:
        return Conditioning(first=np.zeros((1, 1, h, w, z), np.float32), has_first=np.ones(1, bool))
    if "FLF2V" in name:
        channels = np.zeros((1, t, h, w, z + CHANNEL_MASK), np.float32)
        return Conditioning(image=np.zeros((1, 514, 1280), np.float32), channels=channels)
    return Conditioning()


def compile_ring(checkpoint, dtype):
    """The compiled denoising program of a plain call (one video, guided) on four stages."""
    cfg, mesh = checkpoint.transformer, make_mesh(MeshSpec(pp=STAGES))
    d, everywhere = checkpoint.defaults, sharding(mesh)
    shape = (*checkpoint.geometry.latent_shape(d.num_frames, d.height, d.width), checkpoint.geometry.z_dim)
    given = conditioning(checkpoint.variant.name, shape)
    _, weights = abstract_weights(cfg, checkpoint.num_experts, STAGES, dtype)
    weights = Weights(*(abstract(w, sharding(mesh, *axes)) for w, axes in zip(weights, WEIGHT_AXES, strict=True)))
    images = {} if given.image is None else {"image": PIXEL, "last_image": PIXEL, "height": d.height, "width": d.width}
    job = make_job(checkpoint, prompt="a", **images)
    inputs = Inputs(
        to_float32(make_controls(job.requests, given, shape[0])), np.zeros((1, 2, 512, cfg.text_dim), np.float32),
        *given, np.zeros((1, 8, *shape), np.float32),
    )  # fmt: skip
    begin, run = make_program(cfg, mesh, RingPlan(STAGES, 1, 2), (1, *shape), dtype)
    state = jax.eval_shape(begin, jax.ShapeDtypeStruct((1, *shape), jnp.float32, sharding=everywhere))
    turns, ticks = Turns(*[np.zeros(1, np.int32)] * 3), jax.ShapeDtypeStruct((), jnp.int32)
    return run.lower(weights, abstract(inputs, everywhere), abstract(turns, everywhere), state, ticks).compile()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(name, dtype) -> the checkpoint and its compiled ring."""

    @cache
    def compile_once(name, dtype):
        checkpoint = read_checkpoint(write_configs(tmp_path_factory.mktemp("configs"), name))
        return checkpoint, compile_ring(checkpoint, dtype)

    return compile_once


@pytest.mark.parametrize(
    ("name", "dtype", "tokens"),
    [
        ("Wan2.2-T2V-A14B", jnp.bfloat16, 75_600),
        ("Wan2.2-T2V-A14B", jnp.float32, 75_600),
        ("Wan2.2-TI2V-5B", jnp.bfloat16, 27_280),
        ("Wan2.1-FLF2V-14B", jnp.bfloat16, 75_600),
    ],
)
def test_the_ring_compiles_at_full_size_without_tokens_by_tokens(compiled, name, dtype, tokens):
    checkpoint, ring = compiled(name, dtype)
    cfg, program = checkpoint.transformer, ring.as_text()
    shapes = {tuple(map(int, sizes.split(","))) for sizes in SHAPE.findall(program)}
    assert any(tokens in shape and cfg.ffn_dim in shape for shape in shapes)  # the search finds what is there
    assert not [shape for shape in shapes if sum(size >= tokens for size in shape) > 1]
    # nor folded into other axes: the largest buffers are the MLP's, tokens x 2.7 D (5B: 4.7 D), and a stage's weights
    assert max(int(np.prod(shape)) for shape in shapes) < 5 * tokens * cfg.dim < tokens**2
    # stages pass on the hidden state alone, and nothing is gathered
    assert "collective-permute" in program
    assert not re.search(r"all-(gather|reduce|to-all)\(", program)


def test_the_compiler_takes_no_more_than_the_dry_run_tells(compiled):
    """In float32: in bfloat16 a CPU's program holds float32 copies of the weights, which no accelerator needs."""
    checkpoint, ring = compiled("Wan2.2-T2V-A14B", jnp.float32)
    told = make_report(checkpoint, MeshSpec(pp=STAGES), make_job(checkpoint, prompt="a"), "float32", "float32", 10**12)
    memory = ring.memory_analysis()
    taken = memory.argument_size_in_bytes + memory.temp_size_in_bytes  # the results take the arguments' place
    parameters, activations = told.parameter_bytes[1], sum(told.activation_bytes["denoise"].values())
    assert parameters < memory.argument_size_in_bytes < 1.1 * parameters
    assert parameters + activations / 2 < taken <= parameters + activations
