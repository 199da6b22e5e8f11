"""Which mesh axis splits which axis of an array.

Arrays name their axes by what these count, such as layers or requests. Where the parts lie follows from one table here,
for placement, loading and the plan of memory alike.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxwan.sharding.mesh import spec


@dataclass(frozen=True)
class Rules:
    """The mesh axis of each axis that is split. An array's axis that has no name (None) is whole on every device."""

    request: str = "dp"
    branch: str = "cfg"  # cond, uncond
    layer: str = "pp"
    stage: str = "pp"  # what each stage has a copy of its own of
    row: str = "pp"  # of a table that is looked up
    token: str = "sp"  # those of each latent frame
    head: str = "tp"
    mlp: str = "tp"

    def mesh_axes(self, *axes: str | None) -> tuple[str | None, ...]:
        """The mesh axes of an array's axes."""
        rules = asdict(self)
        return tuple(rules[axis] if axis is not None else None for axis in axes)

    def spec(self, mesh: Mesh, *axes: str | None) -> PartitionSpec:
        """Of an array whose leading axes are these; in its one canonical form (`mesh.spec`)."""
        return spec(mesh, *self.mesh_axes(*axes))

    def sharding(self, mesh: Mesh, *axes: str | None) -> NamedSharding:
        """NamedSharding of `spec(mesh, *axes)`."""
        return NamedSharding(mesh, self.spec(mesh, *axes))

    def parts(self, sizes: Mapping[str, int], *axes: str | None) -> int:
        """How many parts an array of these leading axes is cut into on a mesh of these sizes; one is on each device."""
        return math.prod(sizes[axis] for axis in self.mesh_axes(*axes) if axis is not None)


RULES = Rules()
