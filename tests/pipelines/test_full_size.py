"""The ring of the published models at full size, lowered and compiled without a single weight."""

import re
from dataclasses import replace
from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
from published import write_configs

from jaxwan.pipelines.call import make_job
from jaxwan.pipelines.checkpoint import read_checkpoint
from jaxwan.pipelines.denoise import Bucket, Programs
from jaxwan.pipelines.dit import placed_weights
from jaxwan.pipelines.dry_run import make_report, parameter_bytes
from jaxwan.pipelines.encoders import abstract_entry
from jaxwan.sharding.mesh import MeshSpec, make_mesh

pytestmark = pytest.mark.usefixtures("optimised")

STAGES = 4
PIXEL = np.zeros((1, 1, 3), np.uint8)
SHAPE = re.compile(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]")


def compile_ring(checkpoint, dtype):
    """The compiled denoising program of a plain call (one video, guided) on four stages."""
    mesh, d = make_mesh(MeshSpec(pp=STAGES)), checkpoint.defaults
    images = {}
    if checkpoint.image_encoder is not None:
        images = {"image": PIXEL, "last_image": PIXEL, "height": d.height, "width": d.width}
    (request,) = make_job(checkpoint, prompt="a", **images).requests
    weights = placed_weights(checkpoint.transformer, checkpoint.num_experts, mesh, dtype)
    programs = Programs(checkpoint.transformer, mesh, dtype, Bucket.of([abstract_entry(checkpoint, request)]))
    name, ring, arguments = next(programs.listed(weights))
    assert name == "ring"
    return ring.lower(*arguments).compile()


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


def test_the_compiler_takes_about_what_the_dry_run_tells(compiled):
    """In float32: in bfloat16 a CPU's program holds float32 copies of the weights, which no accelerator needs. It fuses
    less than a GPU's, with which tests/aot compares."""
    checkpoint, ring = compiled("Wan2.2-T2V-A14B", jnp.float32)
    told = make_report(checkpoint, MeshSpec(pp=STAGES), make_job(checkpoint, prompt="a"), "float32", "float32", 10**12)
    memory = ring.memory_analysis()
    taken = memory.argument_size_in_bytes + memory.temp_size_in_bytes  # the results take the arguments' place
    alone = replace(checkpoint, text_encoder=None)  # what the ring is given
    parameters = parameter_bytes(alone, MeshSpec(pp=STAGES), "float32", "float32")[1]
    activations = sum(told.activation_bytes["denoise"].values())
    assert parameters < memory.argument_size_in_bytes < 1.1 * parameters
    assert parameters + activations / 1.5 < taken < parameters + 1.5 * activations
