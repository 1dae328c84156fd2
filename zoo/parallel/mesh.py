"""Which process does what: the sizes of a mesh, and the meshes of dense parameters and of experts over it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Sizes:
    """How many processes share each kind of work; the world is their product.

    replicate  copies of everything, each with its own data (data parallelism)
    shard      parts of every parameter, each with its own data (FSDP)
    expert     parts of the experts, each with its own data; dense parameters are in shard * expert parts
    tensor     parts of attention and dense MLPs, which see the same data; each sends its own part of the tokens to
               experts, whose parameters are in shard * tensor parts beside

    So data = replicate * shard * expert processes have data of their own. Raises ValueError for a size below one.
    """

    replicate: int = 1
    shard: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name}: expected a number of processes of at least 1, got {size!r}")

    @property
    def data(self) -> int:
        """Processes that have data of their own."""
        return self.replicate * self.shard * self.expert

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.data * self.tensor

    @classmethod
    def of_world(
        cls, world: int, *, replicate: int | None = None, shard: int | None = None, expert: int = 1, tensor: int = 1
    ) -> Sizes:
        """Sizes for so many processes; of replicate and shard, what is not given is what remains.

        With neither given, shard is what remains and replicate 1. Raises ValueError where sizes do not make `world`.
        """
        fixed = cls(replicate or 1, shard or 1, expert, tensor)
        left = world // fixed.world
        if shard is None:
            found = cls(fixed.replicate, left or 1, expert, tensor)
        elif replicate is None:
            found = cls(left or 1, fixed.shard, expert, tensor)
        else:
            found = fixed
        if found.world != world:
            given = {"replicate": replicate, "shard": shard, "expert": expert, "tensor": tensor}
            shown = " * ".join(f"{name} {size}" for name, size in given.items() if size is not None)
            needs = "" if replicate and shard else "a multiple of "
            raise ValueError(f"{world} processes cannot be split as {shown}: that needs {needs}{fixed.world}")
        return found


class Mesh:
    """The processes of a run, laid out by `Sizes`: rank = ((replicate * shards + shard) * experts + expert) * tensors +
    tensor.

    `dense` is the mesh of ordinary parameters, (replicate, shard, tensor) with shard * expert parts in shard; `expert`
    that of experts, (replicate, shard, expert) with shard * tensor parts in shard. All processes make it together. They
    wait for each other for at most `timeout`, torch's own by default.
    Raises ValueError when the world is of another size.
    """

    def __init__(self, sizes: Sizes, device_type: str = "cpu", timeout: timedelta | None = None) -> None:
        if dist.get_world_size() != sizes.world:
            raise ValueError(f"a mesh of {sizes.world} processes, {sizes}, in a world of {dist.get_world_size()}")
        self.sizes, self.device_type = sizes, device_type
        self._nodes: dict[int, DeviceMesh] = {}
        ranks = torch.arange(sizes.world).view(sizes.replicate, sizes.shard, sizes.expert, sizes.tensor)
        self.dense = DeviceMesh(device_type, ranks.flatten(1, 2), mesh_dim_names=("replicate", "shard", "tensor"))
        self._shares = self.dense
        if sizes.tensor > 1:
            names = ("data", "tensor")
            self._shares = DeviceMesh(device_type, ranks.view(-1, sizes.tensor), mesh_dim_names=names)
        by_expert = ranks.permute(0, 1, 3, 2).flatten(1, 2)
        self.experts = DeviceMesh(device_type, by_expert, mesh_dim_names=("replicate", "shard", "expert"))
        if timeout is not None:
            for group in {g for mesh in (self.dense, self.experts, self._shares) for g in mesh.get_all_groups()}:
                # Groups of a mesh do not take over the world's.
                dist.distributed_c10d._set_pg_timeout(timeout, group)

    @cached_property
    def data_rank(self) -> int:
        """Which of the processes with data of their own this is; those of one tensor group have the same."""
        return dist.get_rank() // self.sizes.tensor

    @property
    def data_group(self) -> dist.ProcessGroup | None:
        """This and other processes that have all data between them, each its own share; None for all there are."""
        return None if self.sizes.tensor == 1 else self._shares["data"].get_group()

    def node_groups(self, within: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        """An expert group's processes at this one's place in every node, and those in its node, of `within` each.

        All processes call it together. Raises ValueError where nodes do not divide an expert group.
        """
        if self.sizes.expert % within:
            raise ValueError(f"within: {within} processes a node do not divide expert groups of {self.sizes.expert}")
        if within not in self._nodes:
            ranks = self.experts.mesh.unflatten(2, (-1, within))
            names = ("replicate", "shard", "between", "within")
            self._nodes[within] = DeviceMesh(self.device_type, ranks, mesh_dim_names=names)
        nodes = self._nodes[within]
        return nodes["between"].get_group(), nodes["within"].get_group()

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        """The processes that share this one's data."""
        return self.dense["tensor"].get_group()
