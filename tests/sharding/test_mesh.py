"""Mesh specifications, the devices behind them, and specs in their one canonical form."""

import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxwan.sharding.collectives import gather, position, psum, shift
from jaxwan.sharding.mesh import AXES, MeshSpec, in_line, make_mesh, request_virtual_devices, spec
from jaxwan.sharding.rules import RULES


@pytest.mark.parametrize(
    ("text", "mesh", "said"),
    [
        (None, MeshSpec(), "pp=1"),
        ("", MeshSpec(), "pp=1"),
        ("pp=4", MeshSpec(pp=4), "pp=4"),
        ("pp=4,dp=2", MeshSpec(dp=2, pp=4), "dp=2,pp=4"),
        (" tp=2 , sp=3 ", MeshSpec(sp=3, tp=2), "sp=3,tp=2"),
        ("cfg=2,pp=1", MeshSpec(cfg=2), "cfg=2"),
    ],
)
def test_a_mesh_is_read_and_said(text, mesh, said):
    assert MeshSpec.parse(text) == mesh
    assert str(mesh) == said
    assert MeshSpec.parse(said) == mesh


def test_a_mesh_that_was_read_before_is_itself():
    assert MeshSpec.parse(MeshSpec(pp=3)) == MeshSpec(pp=3)


def test_devices_are_the_product_of_the_axes():
    mesh = MeshSpec(dp=2, cfg=2, pp=3, sp=1, tp=5)
    assert mesh.num_devices == 60
    assert dict(zip(AXES, mesh.sizes, strict=True)) == {"dp": 2, "cfg": 2, "pp": 3, "sp": 1, "tp": 5}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cgf=4", "mesh 'cgf=4' has no axis 'cgf' (did you mean \"cfg=4\"?): axes are dp, cfg, pp, sp, tp"),
        ("gpu=4", "has no axis 'gpu': axes are dp, cfg, pp, sp, tp"),
        ("4", "has no axis '4' (did you mean \"pp=4\"?): axes are dp, cfg, pp, sp, tp"),
        ("PP=4", "has no axis 'PP' (did you mean \"pp=4\"?)"),
        ("pp2", "has no axis 'pp2' (did you mean \"pp=2\"?)"),
        ("pp:2", '(did you mean "pp=2"?)'),
        ("pp=2 dp=1", '(did you mean "pp=2,dp=1"?)'),
        ("pp=2;dp=1", '(did you mean "pp=2,dp=1"?)'),
        (2, 'mesh 2 is no text such as "pp=4" (did you mean "pp=2"?)'),
        (2.0, "mesh of type float is no text"),
        (
            jax.make_mesh((2, 1), ("pp", "tp")),
            'mesh of type Mesh is no text such as "pp=4" (did you mean "pp=2,tp=1"?)',
        ),
        ("pp=4,pp=2", "names pp twice"),
        ("pp=0", "pp=0 must be a whole number from 1"),
        ("pp=-1", "pp=-1 must be a whole number from 1"),
        ("pp=2.5", "pp=2.5 must be"),
        ("pp", "pp=? must be"),
        ("pp=²", "pp=² must be"),
        ("pp=4=2", "pp=4=2 must be"),
    ],
)
def test_what_is_no_mesh_is_refused(text, words):
    with pytest.raises(ValueError) as caught:
        MeshSpec.parse(text)
    assert words in str(caught.value)


# Devices


def test_a_mesh_has_all_five_axes_and_takes_the_first_devices():
    for size in (1, 3, 8):
        mesh = make_mesh(MeshSpec(pp=size))
        assert mesh.axis_names == AXES
        assert dict(mesh.shape) == {"dp": 1, "cfg": 1, "pp": size, "sp": 1, "tp": 1}
        assert list(mesh.devices.flat) == jax.devices()[:size]
    assert make_mesh(MeshSpec(dp=2, pp=4)).devices.shape == (2, 1, 4, 1, 1)


def test_any_mesh_is_also_a_line_of_its_devices_in_their_order():
    mesh = make_mesh(MeshSpec(dp=2, cfg=2, pp=2))
    assert in_line(mesh) == make_mesh(MeshSpec(pp=8)) and list(in_line(mesh).devices.flat) == list(mesh.devices.flat)


def test_too_few_cpu_devices_are_told_with_the_line_to_add():
    with pytest.raises(ValueError) as caught:
        make_mesh(MeshSpec(pp=9))
    assert str(caught.value) == (
        "mesh pp=9 needs 9 devices and JAX is already initialised with 8 on the CPU: "
        "add jax.config.update('jax_num_cpu_devices', 9) before the first use of JAX"
    )


@pytest.mark.parametrize(
    ("mesh", "present", "words"),
    [
        (MeshSpec(pp=4), 2, "mesh pp=4 needs 4 devices and there are 2 (H200): what fits is pp=2"),
        (
            MeshSpec(dp=2, pp=4),
            7,
            "mesh dp=2,pp=4 needs 8 devices and there are 7 (H200): what fits is pp=4 or dp=2,pp=3",
        ),
        (MeshSpec(dp=4, pp=2), 3, "mesh dp=4,pp=2 needs 8 devices and there are 3 (H200): what fits is pp=2"),
        (MeshSpec(cfg=2), 1, "mesh cfg=2 needs 2 devices and there are 1 (H200): what fits is pp=1"),
        (MeshSpec(dp=2, cfg=2, pp=2), 6, "what fits is cfg=2,pp=2 or dp=2,pp=2 or dp=2,cfg=2"),
        (MeshSpec(dp=4, pp=4), 3, "what fits is pp=3"),
    ],
)
def test_too_few_accelerators_are_told_with_the_largest_mesh_and_the_way_to_the_cpu(monkeypatch, mesh, present, words):
    device = SimpleNamespace(platform="gpu", device_kind="H200")
    monkeypatch.setattr(jax, "devices", lambda: [device] * present)
    with pytest.raises(ValueError) as caught:
        make_mesh(mesh)
    assert str(caught.value).endswith(f"{words}; or set JAX_PLATFORMS=cpu to run on virtual CPU devices")


@pytest.mark.parametrize(
    ("mesh", "vae_devices", "words"),
    [
        (
            MeshSpec(pp=2),
            4,
            "mesh pp=2 and vae_devices=4 need 6 devices and there are 4 (H200): what fits is vae_devices=2",
        ),
        (MeshSpec(pp=4), 1, "need 5 devices and there are 4 (H200): what fits is mesh pp=4 alone"),
        (MeshSpec(pp=5), 1, "need 6 devices and there are 4 (H200): what fits is pp=4"),
    ],
)
def test_too_few_accelerators_for_a_vae_of_its_own_are_told_with_what_is_left(monkeypatch, mesh, vae_devices, words):
    device = SimpleNamespace(platform="gpu", device_kind="H200")
    monkeypatch.setattr(jax, "devices", lambda: [device] * 4)
    with pytest.raises(ValueError) as caught:
        make_mesh(mesh, vae_devices=vae_devices)
    assert f"{words}; or set JAX_PLATFORMS=cpu" in str(caught.value)


@pytest.mark.parametrize(
    "error", [RuntimeError("Unable to initialize backend 'cuda': no plugin\nmore"), AssertionError()]
)
def test_a_platform_that_is_not_here_is_told(monkeypatch, error):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(ValueError, match="JAX has no such device here; leave it out, or set cpu") as caught:
        make_mesh(MeshSpec(pp=2))
    assert "\n" not in str(caught.value)


def test_once_jax_runs_its_device_count_stands():
    request_virtual_devices(99)
    assert len(jax.devices()) == 8


def run_python(text):
    """stdout of a program with a JAX of its own, on the CPU and nowhere else."""
    code = textwrap.dedent(text)
    kept = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    environment = kept | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return run.stdout.split()


def test_virtual_devices_are_there_by_themselves_and_importing_starts_nothing():
    assert run_python(
        """
        import jax, jaxwan
        from jax._src import xla_bridge
        from jaxwan.sharding.mesh import MeshSpec, make_mesh
        print(xla_bridge.backends_are_initialized())
        first = make_mesh(MeshSpec(pp=3))
        print(first.devices.size, len(jax.devices()), make_mesh(MeshSpec(pp=8)).devices.size)
        """
    ) == ["False", "3", "8", "8"]


def test_at_least_eight_devices_are_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(jax.config, "update", lambda name, count: asked.append((name, count)))
    request_virtual_devices(3)
    request_virtual_devices(11)
    assert asked == [("jax_num_cpu_devices", 8), ("jax_num_cpu_devices", 11)]


def test_a_larger_count_that_was_asked_for_stays():
    assert run_python(
        """
        import jax
        jax.config.update("jax_num_cpu_devices", 13)
        from jaxwan.sharding.mesh import MeshSpec, make_mesh
        make_mesh(MeshSpec(pp=11))
        print(len(jax.devices()))
        """
    ) == ["13"]


# Specs and collectives


def test_specs_have_one_form_without_axes_of_size_one():
    mesh = make_mesh(MeshSpec(dp=2, pp=3))
    assert spec(mesh, "dp", "pp") == P("dp", "pp")
    assert spec(mesh, None, "pp", "tp", None) == P(None, "pp")
    assert spec(mesh, "cfg", "tp") == spec(mesh) == P()


def test_rules_say_where_the_parts_of_an_array_lie():
    mesh = make_mesh(MeshSpec(dp=2, pp=3))
    assert RULES.spec(mesh, "stage", "request", "branch") == P("pp", "dp")
    assert RULES.sharding(mesh, None, "layer").spec == P(None, "pp")
    placed = jax.device_put(jnp.zeros((4, 6, 5)), RULES.sharding(mesh, "request", "layer", None))
    assert RULES.parts(mesh.shape, "request", "layer", None) == 6
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 2, 5)}
    with pytest.raises(KeyError, match="layers"):
        RULES.spec(mesh, "layers")


def over(mesh, axis, body, x):
    places = spec(mesh, axis)
    return jax.shard_map(body, mesh=mesh, in_specs=places, out_specs=places)(x)


@pytest.mark.parametrize("axis", ["pp", "cfg"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_collectives_pass_on_count_sum_and_gather(size, axis):
    mesh, x = make_mesh(MeshSpec(dp=2, **{axis: size})), jnp.arange(size) + 5
    assert over(mesh, axis, lambda x: shift(x, axis), x).tolist() == jnp.roll(x, 1).tolist()
    assert over(mesh, axis, lambda x: x * 0 + position(axis), x).tolist() == list(range(size))
    assert over(mesh, axis, lambda x: psum(x, axis) + 0 * x, x).tolist() == [sum(x.tolist())] * size
    gathered = jax.shard_map(lambda x: gather(x, axis), mesh=mesh, in_specs=spec(mesh, axis), out_specs=P())(x)
    assert gathered.tolist() == [[value] for value in x.tolist()]  # out_specs: proved to be the same on all


def test_gathering_is_exact_whatever_the_values():
    mesh, x = make_mesh(MeshSpec(cfg=2)), np.array([[1e38, 2e-38, -0.1], [-1e38, 3e38, np.inf]], np.float32)
    gathered = jax.shard_map(lambda x: gather(x[0], "cfg"), mesh=mesh, in_specs=P("cfg"), out_specs=P())(x)
    np.testing.assert_array_equal(gathered, x)


def test_an_axis_of_size_one_brings_no_collective():
    def body(x):
        return gather(psum(shift(x, "pp"), "pp"), "pp")[0] + position("pp")

    run = jax.shard_map(body, mesh=make_mesh(MeshSpec()), in_specs=P(), out_specs=P())
    shown = str(jax.make_jaxpr(run)(jnp.zeros(3)))
    assert not any(word in shown for word in ("ppermute", "psum", "axis_index"))
