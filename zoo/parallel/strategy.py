"""Expert parallelism for Lightning: a strategy for any module with MoE layers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.parallel import ParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from . import checkpoint as store
from . import requeue
from .mesh import Mesh, Sizes
from .parts import clip_grad_norm_, clip_grad_value_, meshes_of
from .spread import parallelize


class ExpertParallelStrategy(ModelParallelStrategy):
    """Experts, FSDP2, tensor and data parallelism of a LightningModule with MoE layers, by `parallelize`.

    In YAML, under trainer: `strategy: {class_path: zoo.parallel.ExpertParallelStrategy, init_args: {expert: 4}}`. Sizes
    are those of `zoo.parallel.Sizes`; what is left of replicate and shard is what the world has left, so by default
    every parameter is sharded over all data-parallel processes. Started by torchrun, SLURM or Lightning itself, on
    CPUs (gloo) too.

    The modules that the LightningModule holds are parallelised after its `configure_model`, when they are made; it may
    do so itself in a method `parallelize(mesh)`. reshard_after_forward, chunks, within, shadows and places are those
    of `parallelize`.
    Data loaders get each process's share by `trainer.distributed_sampler_kwargs`. Clipping takes the norm of all
    parameters, whatever mesh they are on.

    Checkpoints are folders (see `zoo.parallel.checkpoint`) that any other sizes read, and are whole or absent; with
    background_checkpoints they are written while training goes on; save_distributed_checkpoint=False gathers them into
    one file. Training goes on from either with this strategy, on one process too, and from what one process saved
    without it; `tasks` go on from one file without it too.
    Under SLURM a job whose time ends is saved after the step it is in, and queued again (`requeue`).

    Raises ValueError where the sizes do not make the world.
    """

    def __init__(
        self,
        replicate: int | None = None,
        shard: int | None = None,
        expert: int = 1,
        tensor: int = 1,
        reshard_after_forward: bool = True,
        chunks: int = 1,
        within: int = 1,
        shadows: int = 0,
        places: int = 0,
        save_distributed_checkpoint: bool = True,
        background_checkpoints: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.given = {"replicate": replicate, "shard": shard, "expert": expert, "tensor": tensor}
        Sizes(*(size or 1 for size in self.given.values()))
        self.options: dict[str, Any] = {"reshard_after_forward": reshard_after_forward}
        self.options |= {"chunks": chunks, "within": within, "shadows": shadows, "places": places}
        self.saver = store.Saver(background_checkpoints)
        self.mesh: Mesh | None = None

    @property
    def writes_whole(self) -> bool:
        """Whether checkpoints take the place of others by themselves, when they are whole."""
        return self._save_distributed_checkpoint

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """How many shares the data has, and which one is this process's."""
        mesh = self._mesh
        return {"num_replicas": mesh.sizes.data, "rank": mesh.data_rank}

    @property
    def _mesh(self) -> Mesh:
        if self.mesh is None:
            raise RuntimeError("ExpertParallelStrategy: there is no mesh before the processes have met")
        return self.mesh

    def setup_environment(self) -> None:
        """Meet the other processes, and lay out the mesh."""
        _warn_of_restarts()
        ParallelStrategy.setup_environment(self)
        self._setup_distributed()
        sizes = Sizes.of_world(self.world_size, **self.given)  # type: ignore[arg-type]
        self.mesh = Mesh(sizes, self.root_device.type, self._timeout)
        self._device_mesh = self.mesh.dense

    def setup(self, trainer: Any) -> None:
        """Parallelise, then make optimizers."""
        module: Any = self.lightning_module
        module.to(self.root_device)
        if hasattr(module, "parallelize"):
            module.parallelize(self._mesh)
        else:
            for child in module.children():
                if any(True for _ in child.parameters()):
                    parallelize(child, self._mesh, **self.options)
        super().setup(trainer)
        requeue.prepare(trainer)
        # Lightning's own take the norm of a list of tensors, which may not lie on several meshes.
        plugin: Any = self.precision_plugin
        plugin.clip_grad_by_norm = lambda optimizer, value: clip_grad_norm_(plugin.main_params(optimizer), value)
        plugin.clip_grad_by_value = lambda optimizer, value: clip_grad_value_(plugin.main_params(optimizer), value)

    def teardown(self) -> None:
        """Wait for a checkpoint that is being written."""
        self.saver.wait()
        super().teardown()

    def setup_optimizers(self, trainer: Any) -> None:
        """Make optimizers; a group whose parameters lie on several meshes is stepped one parameter at a time."""
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if len(meshes_of(group["params"])) > 1:
                    group.update({name: False for name in ("foreach", "fused") if name in group})

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """As Lightning's; a sum counts each share of the data once, though several processes may have it."""
        result = super().reduce(tensor, group, reduce_op)
        if isinstance(result, Tensor) and str(reduce_op).lower().endswith("sum"):
            return result / self._mesh.sizes.tensor
        return result

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing where parts are saved: `save_checkpoint` asks the model itself."""
        return {} if self._save_distributed_checkpoint else super().lightning_module_state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Nothing where parts are saved."""
        return {} if self._save_distributed_checkpoint else super().optimizer_state(optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a folder of parts, or one file."""
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        if storage_options is not None:
            raise TypeError("ExpertParallelStrategy: storage_options have no meaning for checkpoints in parts")
        path = Path(self.broadcast(filepath))
        meta = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
        self.saver.save(path, self._module, self._named_optimizers(), meta, self._left_out())

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a folder of parts, written by whatever number of processes, or one file of Lightning's."""
        path = store.found(Path(self.broadcast(checkpoint_path)))
        module: Any = self.lightning_module
        if path.is_dir():
            safe = True if weights_only is None else weights_only
            meta = store.load(
                path, self._module, self._named_optimizers(), module.strict_loading, safe, self._left_out()
            )
        else:
            meta = store.load_file(path, self._module, self.optimizers, module.strict_loading, weights_only)
        self._fit_schedules(meta)
        return meta

    def _left_out(self) -> set[str]:
        """Names of what the module keeps out of its checkpoints: frozen weights of files that it was read from."""
        return getattr(self.lightning_module, "left_out", set)()

    @property
    def _module(self) -> torch.nn.Module:
        assert self.model is not None
        return self.model

    def _named_optimizers(self) -> dict[str, Optimizer]:
        return {f"optimizer_{i}": optimizer for i, optimizer in enumerate(self.optimizers)}

    def _fit_schedules(self, meta: Mapping[str, Any]) -> None:
        """Learning rates of schedules are a list, one a group; with other groups it is another."""
        for state, config in zip(meta.get("lr_schedulers", ()), self.lr_scheduler_configs):
            scheduler: Any = config.scheduler
            if "base_lrs" not in state or len(state["base_lrs"]) == len(scheduler.base_lrs):
                continue
            groups = scheduler.optimizer.param_groups
            state |= {"base_lrs": [g["initial_lr"] for g in groups], "_last_lr": [g["lr"] for g in groups]}
            if "lr_lambdas" in state:
                state["lr_lambdas"] = state["lr_lambdas"][:1] * len(groups)


def _warn_of_restarts() -> None:
    """Seen with torch 2.13 on gloo, with its own rendezvous alone too (pytorch issue 135712)."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ.get("TORCHELASTIC_MAX_RESTARTS") == "0":
        return
    warnings.warn(
        "torchrun --max-restarts: processes that are started again do not find each other as long as torch has one "
        "store for all tries; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun, and give it --standalone or "
        "--rdzv-backend c10d",
        stacklevel=2,
    )
