"""Encoders over several devices: the bits of one device, whatever is encoded together, and nothing sent without need.

Five layers each, and a table of 101 rows: what none of the meshes divides, and one has more devices than layers.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import collectives
from flax import nnx
from oracle import relative_error
from runs import compilations
from safetensors.numpy import save_file

from jaxwan.config import ImageEncoderConfig, TextEncoderConfig
from jaxwan.convert.files import TensorFiles
from jaxwan.convert.load import flat_shapes, load_state
from jaxwan.convert.rules import KEEP, Rule
from jaxwan.models.image_encoder import CLIPVisionEncoder
from jaxwan.models.text_encoder import UMT5Encoder
from jaxwan.pipelines.encoder_ring import SLOTS, make_encoder_ring, placed, share_of
from jaxwan.pipelines.vae_memory import tree_bytes
from jaxwan.sharding.mesh import MeshSpec, make_mesh

TEXT = TextEncoderConfig(vocab_size=101, d_model=16, d_kv=6, d_ff=24, num_layers=5, num_heads=3)
IMAGE = ImageEncoderConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=6, num_attention_heads=2, image_size=28, patch_size=14
)
MODELS = {"text": (UMT5Encoder, TEXT), "image": (CLIPVisionEncoder, IMAGE)}
MESHES = ["pp=2", "dp=3", "sp=2,tp=2", "dp=2,cfg=2,pp=2"]  # 2, 3, 4 and 8 devices
COUNT = SLOTS + 3


@pytest.fixture(scope="module")
def module():
    """kind -> a random model in which norms, biases and padding all count."""

    @cache
    def make(kind):
        cls, cfg = MODELS[kind]
        rng, model = np.random.default_rng(0), cls(cfg, dtype=jnp.float32, rngs=nnx.Rngs(0))
        graph, state = nnx.split(model)
        return graph, jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), state)

    return make


@pytest.fixture(scope="module")
def given():
    """kind -> more of what it encodes than there are slots."""
    rng = np.random.default_rng(1)
    mask = np.arange(20) < rng.permutation(COUNT)[:, None] + 3
    tokens = np.where(mask, rng.integers(0, TEXT.vocab_size, mask.shape), 0).astype(np.int32)
    tokens[0, :2] = 0, TEXT.vocab_size - 1  # the table's ends
    return {"text": (tokens, mask), "image": (rng.standard_normal((COUNT, 28, 28, 3), np.float32),)}


def put(value, place):
    """A parameter padded with zeros to the shape that `place` says, and where."""
    padding = [(0, size - own) for size, own in zip(place.shape, value.shape, strict=True)]
    return jax.device_put(np.pad(value, padding), place.sharding)


@pytest.fixture(scope="module")
def ring(module):
    """(kind, mesh) -> the encoder on a mesh."""

    @cache
    def make(kind, mesh):
        mesh, (graph, state) = make_mesh(MeshSpec.parse(mesh)), module(kind)
        return make_encoder_ring(MODELS[kind][0], graph, jax.tree.map(put, state, placed(state, mesh)), mesh)

    return make


@pytest.fixture(scope="module")
def on_one_device(ring, given):
    return cache(lambda kind: ring(kind, "pp=1")(*given[kind]))


@pytest.mark.parametrize("kind", MODELS)
def test_one_device_makes_what_the_module_makes(module, given, on_one_device, kind):
    graph, state = module(kind)
    expected = jax.jit(lambda state, *given: nnx.merge(graph, state)(*given))(state, *given[kind])
    actual = on_one_device(kind)
    assert actual.dtype == np.float32 and actual.shape == expected.shape
    seen = given["text"][1] if kind == "text" else slice(None)  # rows behind the mask mean nothing
    assert relative_error(actual[seen], expected[seen]) < 1e-6  # another program, all at once: float32's own


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kind", MODELS)
def test_any_mesh_has_the_bits_of_one_device(ring, given, on_one_device, kind, mesh):
    np.testing.assert_array_equal(ring(kind, mesh)(*given[kind]), on_one_device(kind))


@pytest.mark.parametrize(("kind", "mesh"), [("text", "pp=1"), ("text", "dp=3"), ("image", "pp=2")])
def test_others_beside_it_change_nothing_and_compile_nothing(ring, given, on_one_device, kind, mesh):
    encode, made = ring(kind, mesh), []
    encode(*(x[:1] for x in given[kind]))
    parts = [slice(0, 1), slice(4, 5), slice(3, 6), slice(2, 2 + SLOTS)]
    assert compilations(lambda: made.extend(encode(*(x[part] for x in given[kind])) for part in parts)) == 0
    for part, rows in zip(parts, made, strict=True):
        np.testing.assert_array_equal(rows, on_one_device(kind)[part])


@pytest.mark.parametrize("mesh", ["pp=1", "sp=2,tp=2"])
@pytest.mark.parametrize("kind", MODELS)
def test_devices_send_each_other_hidden_states_and_looked_up_rows_and_nothing_else(ring, given, kind, mesh):
    devices = list(range(MeshSpec.parse(mesh).num_devices))
    encode = ring(kind, mesh)
    run, arguments = encode.program(*(jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in given[kind]))
    hops = sorted([a, b] for a, b in zip(devices, devices[1:] + devices[:1], strict=True))
    expected = [("all-reduce", [devices])] * (kind == "text") + [("collective-permute", hops)]
    assert collectives(run.lower(*arguments).compile().as_text()) == expected * (len(devices) > 1)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kind", MODELS)
def test_every_device_holds_the_same_share(ring, module, kind, mesh):
    devices, (_, state) = MeshSpec.parse(mesh).num_devices, module(kind)
    held = dict.fromkeys(range(devices), 0)
    for leaf in jax.tree.leaves(ring(kind, mesh).weights):
        for shard in leaf.addressable_shards:
            held[shard.device.id] += shard.data.nbytes
    assert set(held.values()) == {tree_bytes(share_of(state, devices))}
    shares = flat_shapes(share_of(state, devices))
    assert shares["layers.q.kernel"].shape[0] == -(-flat_shapes(state)["layers.q.kernel"].shape[0] // devices)
    if kind == "text":
        assert shares["embedding"].shape == (-(-101 // devices), 16)


def test_rows_beyond_a_files_are_zero(module, tmp_path):
    """Of the layers and of the table, on the devices that hold nothing else too."""
    _, state = module("text")
    arrays = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state)}
    tensors = {path: x for path, x in arrays.items() if not path.startswith("layers.")}
    for path in arrays.keys() - tensors.keys():
        name = path.removeprefix("layers.")
        tensors |= {f"layers.{i}.{name}": np.ascontiguousarray(row) for i, row in enumerate(arrays[path])}
    save_file(tensors, tmp_path / "model.safetensors")
    rules = [Rule("layers.{layer}.{path}", "layers.{path}", KEEP)]
    rules += [Rule(path, path, KEEP) for path in arrays if not path.startswith("layers.")]
    into = placed(state, make_mesh(MeshSpec(pp=4)))
    loaded = load_state(state, TensorFiles.find(tmp_path), rules, placed=into)
    jax.tree.map(np.testing.assert_array_equal, loaded, jax.tree.map(put, state, into))
    assert (loaded["layers"]["o"]["kernel"].shape[0], len(loaded["embedding"])) == (8, 104)
