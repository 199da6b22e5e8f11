"""Checkpoint tensors into device arrays: what is placed where, and what is refused."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from runs import compilations
from safetensors.numpy import load_file, save_file

from jaxwan.config import TextEncoderConfig, TransformerConfig
from jaxwan.convert import load as convert_load
from jaxwan.convert.diffusers import TEXT_ENCODER, TRANSFORMER
from jaxwan.convert.files import TensorFiles
from jaxwan.convert.load import count_bytes, flat_shapes, load_arrays, load_module, load_state, plan_reads, prove
from jaxwan.convert.rules import CheckpointError, Rule, expected_sources
from jaxwan.convert.save import save_arrays
from jaxwan.models.text_encoder import UMT5Encoder
from jaxwan.models.transformer import WanTransformer
from jaxwan.pipelines.dit import abstract_weights, load_weights, shapes_at
from jaxwan.sharding.mesh import MeshSpec, make_mesh

CFG = TransformerConfig(num_attention_heads=2, attention_head_dim=12, text_dim=10, freq_dim=8, ffn_dim=20, num_layers=5)
FILE = "diffusion_pytorch_model.safetensors"
ROW = "blocks.3.ffn.net.2.weight"


def make(dtype=jnp.float32):
    return WanTransformer(CFG, dtype=dtype, rngs=nnx.Rngs(0))


def random_arrays(cfg, seed):
    abstract = nnx.eval_shape(lambda: WanTransformer(cfg, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)
    return {path: rng.standard_normal(s.shape, np.float32) for path, s in flat_shapes(nnx.state(abstract)).items()}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Two folders and what was written into them."""
    made = []
    for seed in (0, 1):
        arrays = random_arrays(CFG, seed)
        made.append((save_arrays(arrays, tmp_path_factory.mktemp("expert"), TRANSFORMER).parent, arrays))
    return made


@pytest.fixture
def tensors(experts):
    return load_file(experts[0][0] / FILE)


def load(folder, dtype=jnp.float32):
    return load_module(lambda: make(dtype), TensorFiles.find(folder), TRANSFORMER)


@pytest.fixture(params=["on the host", "on the device"])
def where(request, monkeypatch):
    """Where stacks are made, which their size decides otherwise."""
    if request.param == "on the device":
        monkeypatch.setattr(convert_load, "ON_HOST", 0)


@pytest.mark.usefixtures("where")
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_sharded_stacks_equal_the_tensors_and_padded_layers_are_zero(experts, stages):
    mesh = make_mesh(MeshSpec(pp=stages))
    weights = load_weights(CFG, [TensorFiles.find(folder) for folder, _ in experts], mesh, jnp.float32)
    blocks = flat_arrays(weights.blocks)
    own = -(-CFG.num_layers // stages)
    for path, value in blocks.items():
        expected = np.stack([arrays[path] for _, arrays in experts])
        np.testing.assert_array_equal(value[:, : CFG.num_layers], expected, err_msg=path)
        assert value.shape[1] == own * stages and not np.any(value[:, CFG.num_layers :])
        assert {shard.data.shape[1] for shard in value.addressable_shards} == {own}
    ends = flat_arrays(weights.ends)
    for path, value in ends.items():
        np.testing.assert_array_equal(value, np.stack([arrays[path] for _, arrays in experts]), err_msg=path)
        assert len(value.addressable_shards) == stages and value.sharding.is_fully_replicated
    assert blocks.keys() | ends.keys() == experts[0][1].keys()


def flat_arrays(state):
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}


@pytest.mark.usefixtures("where")
def test_float32_tensors_become_bfloat16_as_numpy_rounds_them(experts):
    folder, arrays = experts[0]
    loaded = flat_arrays(nnx.state(load(folder, jnp.bfloat16)))
    assert {value.dtype.name for value in loaded.values()} == {"float32", "bfloat16"}  # some modules stay in float32
    for path, value in loaded.items():
        np.testing.assert_array_equal(np.asarray(value), arrays[path].astype(value.dtype), err_msg=path)


@pytest.mark.usefixtures("where")
def test_sixteen_bit_tensors_become_float32_exactly(tmp_path, tensors):
    tensors = {k: v.astype(ml_dtypes.bfloat16 if i % 2 else np.float16) for i, (k, v) in enumerate(tensors.items())}
    save_file(tensors, tmp_path / FILE)
    loaded = flat_arrays(nnx.state(load(tmp_path)))
    for key, (into, _) in expected_sources({p: v.shape for p, v in loaded.items()}, TRANSFORMER).items():
        value = loaded[into.path] if into.layer is None else loaded[into.path][into.layer]
        np.testing.assert_array_equal(np.asarray(value), into.transform.apply(tensors[key]).astype(np.float32))


def test_progress_counts_every_byte_once(experts, tensors):
    placed = []
    load_module(make, TensorFiles.find(experts[0][0]), TRANSFORMER, progress=placed.append)
    assert sum(placed) == sum(value.nbytes for value in tensors.values()) and len(placed) == len(tensors)


def test_a_small_model_is_loaded_without_compiling_anything(experts):
    assert compilations(lambda: load(experts[0][0], jnp.bfloat16)) == 0


def test_a_large_stack_is_allocated_once_however_many_tensors_it_takes(experts, monkeypatch):
    monkeypatch.setattr(convert_load, "ON_HOST", 0)
    allocated = []
    zeros = convert_load._zeros
    monkeypatch.setattr(convert_load, "_zeros", lambda targets: allocated.append(targets) or zeros(targets))
    load(experts[0][0])
    stacked = {path for path in experts[0][1] if path.startswith("blocks.")}
    assert [targets.keys() for targets in allocated] == [stacked]


# Parts of tensors

# how tp splits A14B's layers: columns of Linear kernels (in, out) and what goes with them, and rows
COLUMNS = [f"blocks.{a}.{n}.{p}" for a in ("attn1", "attn2") for n in "qkv" for p in ("kernel", "bias")]
COLUMNS += [f"blocks.{a}.norm_{n}.scale" for a in ("attn1", "attn2") for n in "qk"]
COLUMNS += ["blocks.ffn.up.kernel", "blocks.ffn.up.bias"]
ROWS = ["blocks.attn1.out.kernel", "blocks.attn2.out.kernel", "blocks.ffn.down.kernel"]


def parameters(mesh, dtype="float32", **others):
    """Path -> shape and sharding of two experts' parameters: layers over pp, heads and MLP over tp, others as said."""
    _, shapes = abstract_weights(CFG, 2, mesh.shape["pp"], dtype)
    targets = {}
    for path, leaf in (flat_shapes(shapes.blocks) | flat_shapes(shapes.ends)).items():
        axes = others.get(path, ("pp",) if path.startswith("blocks.") else ())
        if path in COLUMNS:
            axes = ("pp", *[None] * (leaf.ndim - 3), "tp")
        elif path in ROWS:
            axes = ("pp", "tp")
        targets[path] = leaf, NamedSharding(mesh, P(None, *axes))
    return targets


def sources(experts):
    shapes = {path: value.shape for path, value in experts[0][1].items()}
    files = [TensorFiles.find(folder) for folder, _ in experts]
    return [((i,), f, prove(shapes, f, TRANSFORMER, what="checkpoint")) for i, f in enumerate(files)]


@pytest.fixture
def asked(monkeypatch):
    """What the system is asked for: (number of the file, first byte, the one behind the last)."""
    asked, files, preadv = [], {}, os.preadv

    def counted(descriptor, buffers, offset):
        asked.append((files.setdefault(descriptor, len(files)), offset, offset + sum(map(len, buffers))))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    return asked


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("rank", range(2))
def test_one_device_of_pp_4_tp_2_reads_its_layers_and_of_them_its_rows(experts, asked, stage, rank):
    mesh, found = make_mesh(MeshSpec(pp=4, tp=2)), sources(experts)
    ((device,),) = mesh.devices[:, :, stage, :, rank].reshape(1, 1)
    reads = plan_reads(parameters(mesh), found, {device})
    # 5 layers in stages of 2, 2, 1 and 0; d = 24 = 2 heads of 12, one of them here; 20 numbers of the MLP, 10 here
    layers = range(5)[2 * stage : 2 * stage + 2]
    whole = 2 * 24 * 24 + 20 * 24  # column slices: both attentions' out and the MLP's down are read whole
    rows = 6 * 12 * 24 + 10 * 24  # q, k, v and the MLP's up
    vectors = 10 * 12 + 10 + 2 * 24 + 24 + 2 * 24  # biases and norms that are split; biases of out and down; norm2
    own = 4 * (whole + rows + vectors + 6 * 24)  # and the table of modulation
    ends = sum(value.nbytes for path, value in experts[0][1].items() if not path.startswith("blocks."))
    assert sum(read.num_bytes for read in reads) == 2 * (len(layers) * own + ends)

    assert {key.split(".")[1] for key in {read.key for read in reads} if "blocks." in key} == set(map(str, layers))
    rows = {(read.source, read.key): read.rows for read in reads if read.rows is not None}
    assert len(rows) == 2 * len(layers) * len(COLUMNS)
    for layer in layers:
        assert rows[1, f"blocks.{layer}.attn2.to_k.weight"] == slice(12 * rank, 12 * rank + 12)
        assert rows[0, f"blocks.{layer}.ffn.net.0.proj.bias"] == slice(10 * rank, 10 * rank + 10)

    asked.clear()
    for read in reads:
        assert found[read.source][1].read(read.key, read.rows).nbytes == read.num_bytes
    assert sum(end - start for _, start, end in asked) == sum(read.num_bytes for read in reads)
    assert asked == sorted(asked)  # as it lies on disk


@pytest.mark.parametrize(
    ("layout", "dtype"), [("pp=4,tp=2", "bfloat16"), ("dp=2,pp=2,tp=2", "float32"), ("cfg=2,sp=2,tp=2", "bfloat16")]
)
def test_parts_are_those_of_the_whole_and_each_byte_is_read_once(experts, asked, monkeypatch, layout, dtype):
    monkeypatch.setattr(convert_load, "ON_HOST", 4000)  # kernels on the devices, vectors on the host
    mesh = make_mesh(MeshSpec.parse(layout))
    others = {  # any axes, several mesh axes on one, and several axes of one array
        "text_embedder.linear_1.kernel": ("dp", ("pp", "tp")),
        "patch_embedding.kernel": (None, "dp", None, "sp", ("tp", "cfg")),
        "proj_out.kernel": (("pp", "sp"),),
        "scale_shift_table": (None, "cfg"),
    }
    some = [*others, *(f"blocks.{name}" for name in ("attn1.q.kernel", "attn1.q.bias", "norm2.scale")), *ROWS]
    targets = {path: target for path, target in parameters(mesh, dtype, **others).items() if path in some}
    found = [(i, f, {k: into for k, into in keys.items() if into.path in some}) for i, f, keys in sources(experts)]
    assert len(targets) == len(some)
    asked.clear()
    placed = []
    arrays = load_arrays(targets, found, placed.append)
    assert arrays.keys() == targets.keys()
    for path, array in arrays.items():
        whole = np.stack([expert[path] for _, expert in experts]).astype(array.dtype)
        whole = np.pad(whole, [(0, n - m) for n, m in zip(array.shape, whole.shape, strict=True)])  # layers, by zeros
        assert (array.dtype, array.sharding) == (targets[path][0].dtype, targets[path][1])
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index], err_msg=path)
    everything = sum(files.num_bytes(key) for _, files, keys in found for key in keys)
    assert sum(placed) == count_bytes(targets, found) == everything == sum(end - start for _, start, end in asked)
    assert asked == sorted(asked)  # nothing twice, then, and all as it lies on disk


def test_a_state_is_loaded_to_where_it_says_that_its_parameters_lie(tmp_path, asked):
    """A text encoder with layers and the rows of its embedding over four devices."""
    cfg = TextEncoderConfig(vocab_size=20, d_model=8, d_kv=3, d_ff=10, num_layers=4, num_heads=2)
    state = nnx.state(nnx.eval_shape(lambda: UMT5Encoder(cfg, dtype=jnp.float32, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    arrays = {path: rng.standard_normal(s.shape, np.float32) for path, s in flat_shapes(state).items()}
    files = TensorFiles.find(save_arrays(arrays, tmp_path, TEXT_ENCODER).parent)
    split = NamedSharding(make_mesh(MeshSpec(pp=4)), P("pp"))
    placed = shapes_at(split, state)  # the norm's 8 numbers too
    assert files.shapes
    asked.clear()
    loaded = flat_arrays(load_state(placed, files, TEXT_ENCODER))
    assert loaded.keys() == arrays.keys()
    for path, array in loaded.items():
        assert array.sharding == split
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, arrays[path][shard.index], err_msg=path)
    table, part = files.tensors["shared.weight"], 5 * 8 * 4  # 20 rows of 8 numbers on 4 devices
    spans = [span for span in asked if table.offset <= span[1] < table.offset + table.num_bytes]
    assert spans == [(0, table.offset + i * part, table.offset + i * part + part) for i in range(4)]


def test_tensors_of_no_axes_and_of_no_numbers_are_loaded(tmp_path):
    tensors = {"scalar": np.array(3.5, np.float32), "empty": np.zeros((0, 2), np.float32)}
    save_file(tensors, tmp_path / FILE)
    place, files = SingleDeviceSharding(jax.devices()[1]), TensorFiles.find(tmp_path)
    targets = {key: (jax.ShapeDtypeStruct(value.shape, jnp.bfloat16), place) for key, value in tensors.items()}
    found = prove({k: v.shape for k, v in tensors.items()}, files, [Rule("{path}", "{path}")], what="checkpoint")
    arrays = load_arrays(targets, [((), files, found)])
    assert arrays["scalar"] == 3.5 and arrays["scalar"].shape == () and arrays["empty"].shape == (0, 2)
    assert all(array.dtype == jnp.bfloat16 for array in arrays.values())


# Shards


def save_shards(folder, tensors, count):
    """Write `tensors` as `count` files and their index, as Diffusers does."""
    names = [f"diffusion_pytorch_model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    keys = sorted(tensors)
    weight_map = {key: names[i * count // len(keys)] for i, key in enumerate(keys)}
    for name in names:
        save_file({k: tensors[k] for k in keys if weight_map[k] == name}, folder / name)
    (folder / (FILE + ".index.json")).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return [folder / name for name in names]


def test_shards_hold_what_one_file_holds(tmp_path, experts, tensors):
    save_shards(tmp_path, tensors, 3)
    whole, sharded = (flat_arrays(nnx.state(load(folder))) for folder in (experts[0][0], tmp_path))
    assert whole.keys() == sharded.keys()
    for path, value in whole.items():
        np.testing.assert_array_equal(value, sharded[path], err_msg=path)


def test_a_missing_shard_is_named_before_any_is_opened(tmp_path, tensors):
    save_shards(tmp_path, tensors, 3)[1].unlink()
    with pytest.raises(FileNotFoundError, match="lacks diffusion_pytorch_model-00002-of-00003.safetensors"):
        TensorFiles.find(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path, tensors):
    paths = save_shards(tmp_path, tensors, 2)
    save_file(tensors, paths[1])
    with pytest.raises(CheckpointError, match="00002-of-00002.safetensors holds .* a second time"):
        load(tmp_path)


def test_an_index_that_is_no_index_is_refused(tmp_path):
    (tmp_path / (FILE + ".index.json")).write_text('{"metadata": {}')
    with pytest.raises(CheckpointError, match="index.json is no index of shards"):
        TensorFiles.find(tmp_path)


# What is refused


def test_a_folder_without_tensors_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no diffusion_pytorch_model.safetensors or model.safetensors"):
        TensorFiles.find(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 2000, -1])
def test_a_truncated_file_is_named(tmp_path, experts, kept):
    path = tmp_path / FILE
    path.write_bytes((experts[0][0] / FILE).read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=f"{FILE} is truncated or no safetensors file"):
        load(tmp_path)


def test_missing_extra_and_misshaped_tensors_are_one_error_that_names_the_folder(tmp_path, tensors):
    del tensors["scale_shift_table"]
    tensors = tensors | {"lora.up": np.zeros(1, np.float32), ROW: np.zeros((20, 24), np.float32)}
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(CheckpointError) as error:
        load_weights(CFG, [TensorFiles.find(tmp_path)], make_mesh(MeshSpec(pp=2)), jnp.float32)
    assert str(error.value) == (
        f"{tmp_path} does not fit its configuration: 1 missing (scale_shift_table); 1 unexpected (lora.up); "
        f"1 of another shape ({ROW} (20, 24), expected (24, 20))"
    )


@pytest.mark.parametrize("dtype", [np.int8, np.float64, ml_dtypes.float8_e4m3fnuz])
def test_a_dtype_that_no_published_file_has_is_refused_by_name(tmp_path, tensors, dtype):
    save_file(tensors | {ROW: tensors[ROW].astype(dtype)}, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=f"{ROW} is [FI][0-9A-Z_]+; readable are F32, BF16, F16"):
        load(tmp_path)


# Several processes

PROCESS = """
import json, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jaxwan.config import TransformerConfig
from jaxwan.convert import load
from jaxwan.convert.diffusers import TRANSFORMER
from jaxwan.convert.files import TensorFiles
from jaxwan.models.transformer import WanTransformer
from jaxwan.pipelines.dit import load_weights
from jaxwan.sharding.mesh import MeshSpec, make_mesh

address, number, load.ON_HOST, config, shards, *folders = map(json.loads, sys.argv[1:])
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(address, 2, number)
assert len(jax.devices()) == 4
cfg = TransformerConfig.from_json(config)
files = [TensorFiles.find(Path(folder)) for folder in folders]
placed, of_first = [], []
weights = load_weights(cfg, files, make_mesh(MeshSpec(pp=4)), jnp.dtype("float32"), placed.append)
leaves = enumerate(jax.tree.leaves(weights))
np.savez(shards, **{f"{i}/{n}": shard.data for i, leaf in leaves for n, shard in enumerate(leaf.addressable_shards)})
make = lambda: WanTransformer(cfg, dtype=jnp.float32, rngs=nnx.Rngs(0))
first = load.load_module(make, files[0], TRANSFORMER, device=jax.devices()[0], progress=of_first.append)
held = sum(s.data.nbytes for leaf in jax.tree.leaves(nnx.state(first)) for s in leaf.addressable_shards)
print(json.dumps([sum(placed), sum(of_first), held]))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("where")
def test_each_of_two_processes_reads_what_its_own_devices_hold(tmp_path, experts):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    saved, folders = [tmp_path / "0.npz", tmp_path / "1.npz"], [str(folder) for folder, _ in experts]
    processes = []
    for i, path in enumerate(saved):
        given = (address, i, convert_load.ON_HOST, dataclasses.asdict(CFG), str(path), *folders)
        command = [sys.executable, "-c", PROCESS, *map(json.dumps, given)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    told = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in processes]

    arrays = experts[0][1]
    layer = sum(value.nbytes for path, value in arrays.items() if path.startswith("blocks.")) // CFG.num_layers
    ends = sum(value.nbytes for path, value in arrays.items() if not path.startswith("blocks."))
    whole = CFG.num_layers * layer + ends
    assert told[0] == [2 * (4 * layer + ends), whole, whole]  # stages of 2, 2, 1 and 0 layers, and a device for all
    assert told[1] == [2 * (1 * layer + ends), 0, 0]
    weights = load_weights(CFG, [TensorFiles.find(Path(f)) for f in folders], make_mesh(MeshSpec(pp=4)), jnp.float32)
    with np.load(saved[0]) as first, np.load(saved[1]) as second:
        for i, leaf in enumerate(jax.tree.leaves(weights)):
            stages = first[f"{i}/0"], first[f"{i}/1"], second[f"{i}/0"], second[f"{i}/1"]
            for shard, stage in zip(leaf.addressable_shards, stages, strict=True):
                np.testing.assert_array_equal(stage, shard.data)


# Memory

WIDE = dataclasses.replace(
    CFG, num_attention_heads=16, attention_head_dim=128, text_dim=64, freq_dim=64, ffn_dim=8192, num_layers=5
)
MEASURE = """
import json, sys
from pathlib import Path
import jax, jax.numpy as jnp
from jaxwan.config import TransformerConfig
from jaxwan.convert.files import TensorFiles
from jaxwan.pipelines.dit import load_weights
from jaxwan.sharding.mesh import MeshSpec, make_mesh

def status(field):
    return next(int(l.split()[1]) * 1.024e-3 for l in Path("/proc/self/status").read_text().splitlines() if field in l)

config, dtype, *folders = sys.argv[1:]
mesh = make_mesh(MeshSpec(pp=2))
files = [TensorFiles.find(Path(folder)) for folder in folders]
jnp.zeros(1).block_until_ready()
before = status("VmRSS")
weights = load_weights(TransformerConfig.from_json(json.loads(config)), files, mesh, jnp.dtype(dtype))
parameters = sum(s.data.nbytes for leaf in jax.tree.leaves(weights) for s in leaf.addressable_shards) / 1e6
print(json.dumps({"before": before, "peak": status("VmHWM"), "parameters": parameters}))
"""


@pytest.fixture(scope="module")
def wide_experts(tmp_path_factory):
    """Two experts of 1.5 GB in two files each; gone afterwards."""
    root = tmp_path_factory.mktemp("wide")
    shapes = {path: value.shape for path, value in random_arrays(WIDE, 0).items()}
    keys = {key: shape for key, (_, shape) in expected_sources(shapes, TRANSFORMER).items()}
    for name in ("transformer", "transformer_2"):
        (root / name).mkdir()
        save_shards(root / name, {key: np.full(shape, 0.5, np.float32) for key, shape in keys.items()}, 2)
    yield [root / "transformer", root / "transformer_2"]
    shutil.rmtree(root)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_needs_no_more_memory_than_the_parameters_and_one_file(wide_experts, dtype):
    sizes = [path.stat().st_size for folder in wide_experts for path in folder.glob("*.safetensors")]
    assert len(sizes) >= 4 and sum(sizes) >= 2e9
    # a process of its own: the peak of this one is that of the tests before
    command = [sys.executable, "-c", MEASURE, json.dumps(dataclasses.asdict(WIDE)), dtype, *map(str, wide_experts)]
    mb = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    mb["over"] = mb["peak"] - mb["parameters"]
    print(f"\n{sum(sizes) / 1e9:.2f} GB in {len(sizes)} files as {dtype}, MB: {mb}")
    assert mb["parameters"] >= sum(sizes) / 1e6 * jnp.dtype(dtype).itemsize / 4
    assert mb["over"] <= max(sizes) / 1e6  # though this counts the interpreter and its libraries, too
