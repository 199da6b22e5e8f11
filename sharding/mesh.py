"""Mesh specifications ("pp=4") and the devices behind them.

A mesh always has all five axes, most of them of size 1: dp (requests), cfg (guidance branches), pp (layers), sp
(tokens), tp (heads). Sharding specs name axes freely; `spec` drops those of size 1, so that one program text serves
every mesh and emits no collective over an axis that is not there.
"""

import re
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec


@dataclass(frozen=True)
class MeshSpec:
    """Sizes of the five axes. `str(MeshSpec(pp=4))` is "pp=4".

    ulysses: of how many devices of sp trade tokens for heads (`sequence.TokenSplit`); None: as many as can be.
    """

    dp: int = 1
    cfg: int = 1
    pp: int = 1
    sp: int = 1
    tp: int = 1
    ulysses: int | None = None

    @classmethod
    def parse(cls, value: Any, ulysses: int | None = None) -> "MeshSpec":
        """Read "pp=4" or "dp=2,pp=4"; None or "" is one device, a MeshSpec is itself.

        Raises ValueError, with the right spelling where one can be guessed, for anything else.
        """
        if isinstance(value, MeshSpec):
            return value if ulysses is None else replace(value, ulysses=ulysses)
        if not isinstance(value, str | None):
            shown = value if isinstance(value, int) else f"of type {type(value).__name__}"
            raise ValueError(f'mesh {shown} is no text such as "pp=4"{_spelling(value)}: axes are {", ".join(AXES)}')
        if is_auto(value):
            remedy = f"axes are {', '.join(AXES)}" if ulysses is None else f"leave ulysses={ulysses} out"
            raise ValueError(f"mesh {value!r} is one that has to be chosen, and ulysses with it: {remedy}")
        sizes: dict[str, int] = {}
        for part in (value or "").split(","):
            axis, _, size = (word.strip() for word in part.partition("="))
            if not axis and not size:
                continue
            if axis not in AXES:
                raise ValueError(f"mesh {value!r} has no axis {axis!r}{_spelling(value)}: axes are {', '.join(AXES)}")
            if axis in sizes:
                raise ValueError(f"mesh {value!r} names {axis} twice")
            if not size.isdecimal() or int(size) < 1:
                raise ValueError(
                    f"mesh {value!r}: {axis}={size or '?'} must be a whole number from 1{_spelling(value)}"
                )
            sizes[axis] = int(size)
        return cls(**sizes, ulysses=ulysses)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes in the order of AXES."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def num_devices(self) -> int:
        """How many devices the mesh takes."""
        return int(np.prod(self.sizes))

    def __str__(self) -> str:
        return ",".join(f"{a}={n}" for a, n in zip(AXES, self.sizes, strict=True) if n > 1) or "pp=1"


AUTO = "auto"  # in place of a mesh: one is to be chosen
AXES = tuple(field.name for field in fields(MeshSpec) if field.name != "ulysses")


def is_auto(value: Any) -> bool:
    """Whether a mesh is to be chosen."""
    return isinstance(value, str) and value.strip() == AUTO


def _spelling(value: Any) -> str:
    """ " (did you mean "pp=2"?)" for what can be read as a mesh: 2, "2", "pp2", "PP=2 dp=1", a jax.sharding.Mesh."""
    if isinstance(value, Mesh):
        pairs = [(str(axis), size) for axis, size in value.shape.items()]
    elif re.fullmatch(r"\s*\d+\s*", str(value)):
        pairs = [("pp", int(value))]
    else:
        pairs = re.findall(r"([a-z]+)[\s=:]*([1-9][0-9]*)", str(value).lower())
    near = [(get_close_matches(axis, AXES, 1), size) for axis, size in pairs]
    meant = ",".join(f"{axes[0]}={size}" for axes, size in near if axes)
    return f' (did you mean "{meant}"?)' if meant and meant != value and len(meant.split(",")) == len(pairs) else ""


def request_virtual_devices(count: int) -> None:
    """Ask for max(8, count) virtual CPU devices; touches the CPU platform only, never accelerators.

    At least 8, so that a later, larger mesh finds room. Does nothing once JAX is initialised: `make_mesh` then says
    what is missing.
    """
    try:
        present = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_num_cpu_devices", max(8, count, present))
    except RuntimeError:
        pass  # already initialised: its device count stands


def find_devices(count: int = 1) -> list:
    """JAX's devices; without an accelerator at least `count` virtual CPU ones, unless JAX runs already.

    Raises ValueError where JAX_PLATFORMS names what is not here.
    """
    request_virtual_devices(count)
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter, without a word, where JAX's CUDA plugin is absent
        chosen = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
        reason = f" ({str(error).strip().splitlines()[0]})" if str(error).strip() else ""
        raise ValueError(
            f"JAX_PLATFORMS={chosen}: JAX has no such device here; leave it out, or set cpu{reason}"
        ) from error


def make_mesh(mesh: MeshSpec, *, vae_devices: int = 0) -> Mesh:
    """The first `mesh.num_devices` devices as a Mesh with all five axes, of which so many more for the VAE follow.

    Without an accelerator these are virtual CPU devices. Raises ValueError when there are too few, with the remedy.
    """
    need = mesh.num_devices + vae_devices
    devices = find_devices(need)
    if len(devices) < need:
        raise ValueError(_too_few(mesh, vae_devices, devices))
    return _arranged(devices[: mesh.num_devices], mesh)


def in_line(mesh: Mesh) -> Mesh:
    """The same devices in the same order, all of them stages: pp = all."""
    return _arranged(mesh.devices, MeshSpec(pp=mesh.size))


def _arranged(devices: Any, mesh: MeshSpec) -> Mesh:
    # Auto, not make_mesh's default Explicit: the program is manual over all axes, and its inputs come unsharded too
    return Mesh(np.reshape(devices, mesh.sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def devices_behind(mesh: Mesh, count: int) -> list:
    """The `count` devices that follow those of a mesh (`make_mesh`)."""
    return jax.devices()[mesh.size : mesh.size + count]


def _too_few(mesh: MeshSpec, vae_devices: int, devices: list) -> str:
    need, have = mesh.num_devices + vae_devices, len(devices)
    asked = f"mesh {mesh} and vae_devices={vae_devices} need" if vae_devices else f"mesh {mesh} needs"
    if devices[0].platform == "cpu":
        return (
            f"{asked} {need} devices and JAX is already initialised with {have} on the CPU: "
            f"add jax.config.update('jax_num_cpu_devices', {need}) before the first use of JAX"
        )
    left = have - mesh.num_devices  # for the VAE, of which it may have 1 or more, or share the mesh's
    fit = [f"vae_devices={left}"] if left > 0 else [f"mesh {mesh} alone"] if left == 0 else _that_fit(mesh, have)
    return (
        f"{asked} {need} devices and there are {have} ({devices[0].device_kind}): "
        f"what fits is {' or '.join(fit)}; or set JAX_PLATFORMS=cpu to run on virtual CPU devices"
    )


def _that_fit(mesh: MeshSpec, devices: int) -> list[str]:
    """Meshes for so many devices: with one axis as large as it can be and the others as they are, else pp alone."""
    largest = {axis: devices * size // mesh.num_devices for axis, size in zip(AXES, mesh.sizes, strict=True)}
    fit = [str(replace(mesh, **{axis: size})) for axis, size in largest.items() if size and getattr(mesh, axis) > 1]
    return fit or [f"pp={devices}"]


def spec(mesh: Mesh, *axes: str | None) -> PartitionSpec:
    """PartitionSpec(*axes) without the axes of size 1 and without trailing Nones.

    One canonical form: P("pp") and P("pp", None) mean the same but are different keys of JAX's compilation cache.
    """
    kept = [axis if axis is not None and mesh.shape[axis] > 1 else None for axis in axes]
    while kept and kept[-1] is None:
        kept.pop()
    return PartitionSpec(*kept)
