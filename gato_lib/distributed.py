"""Many devices and many processes: one mesh, one table of sharding rules (paper 2.3).

A mesh has three axes. `data` copies the parameters and splits the batch; `fsdp` splits both;
`tensor` splits heads, feed-forward units and the rows of the head. The program is the same on one
device and on a pod slice: XLA derives every exchange from where arrays lie (`RULES`) and from the
constraints that the network puts on its activations (`constrain`).

On several hosts each runs the same program on the same global batches and builds only the rows
that its own devices need (`Placement`). They share one run folder, which process 0 writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gato_lib.config import ConfigError

AXES = ("data", "fsdp", "tensor")

# Logical axis of an array -> mesh axes that split it.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),  # sequences, and distinct patches
    "rows": ("data", "fsdp", "tensor"),  # target positions, flat: the head is the widest product
    "width": ("fsdp",),  # of parameters; activations keep their width whole
    "heads": ("tensor",),
    "hidden": ("tensor",),  # feed-forward units
}

# Last names of a parameter's path -> logical axes of its last dimensions. What is not listed is
# small and whole on every device. The depth axis of stacked blocks comes before these.
PARAMETERS: dict[tuple[str, ...], tuple[str | None, ...]] = {
    ("table",): (None, "width"),
    ("output",): (None, "width"),
    ("local",): (None, "width"),
    ("patch_row",): (None, "width"),
    ("patch_col",): (None, "width"),
    ("project", "kernel"): (None, "width"),
    ("qkv", "kernel"): ("width", None, "heads", None),
    ("relative", "kernel"): ("width", "heads", None),
    ("out", "kernel"): ("heads", None, "width"),
    ("gate", "kernel"): ("width", "hidden"),
    ("up", "kernel"): ("width", "hidden"),
    ("down", "kernel"): ("hidden", "width"),
}


# --- processes ------------------------------------------------------------------------------------


def start() -> None:
    """Join the other processes of this run; call it before anything else of JAX.

    Reads JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, which
    `experiments/run.py --distributed` checks. Without them, or with one process, does nothing.
    """
    count = int(os.environ.get("JAX_NUM_PROCESSES", "1"))
    if count > 1 and not jax.distributed.is_initialized():
        number = int(os.environ["JAX_PROCESS_ID"])
        jax.distributed.initialize(os.environ["JAX_COORDINATOR_ADDRESS"], count, number)
        if jax.process_index() != number:  # then the run's writer and run.py's would be two hosts
            raise ConfigError(
                f"JAX_PROCESS_ID is {number}, but the devices say process {jax.process_index()}"
            )


def is_writer() -> bool:
    """Whether this process writes the run's files: process 0 does."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Return when every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def writer_first(name: str) -> Iterator[None]:
    """Process 0 runs the block, then the others: what it wrote, they find.

    An error in process 0 is its own to tell; the others wait until they notice that it is gone.
    """
    if not is_writer():
        wait(name)
    yield
    if is_writer():
        wait(name)


# --- the mesh -------------------------------------------------------------------------------------


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Any = None) -> Mesh:
    """A (data, fsdp, tensor) mesh; one size may be -1: whatever is left of all devices.

    Fewer devices than there are is the first of them, but on several hosts every device is needed.
    Raises ConfigError where the sizes do not fit.
    """
    sizes = [data, fsdp, tensor]
    devices = list(jax.devices() if devices is None else devices)
    there = len(devices)
    known = int(np.prod([s for s in sizes if s != -1]))
    if sizes.count(-1) == 1 and known > 0 and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    elif -1 not in sizes and jax.process_count() == 1:
        devices = devices[:known]
    if min(sizes) < 1 or np.prod(sizes) != len(devices):
        raise ConfigError(
            f"a mesh of data {data}, fsdp {fsdp}, tensor {tensor} does not fit {there} devices"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def parse_mesh(text: str) -> Mesh:
    """The mesh of a notebook's parameter, "data, fsdp, tensor"; raises ConfigError."""
    try:
        data, fsdp, tensor = (int(x) for x in text.split(","))
    except ValueError:
        raise ConfigError(f"mesh is {text!r}, expected three whole numbers as in '-1, 1, 1'") from (
            None
        )
    return make_mesh(data, fsdp, tensor)


def _spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """Mesh axes for each dimension. What the devices do not divide evenly stays whole."""
    entries = []
    for axis, size in zip(axes, shape, strict=True):
        names = tuple(n for n in RULES.get(axis, ()) if mesh.shape[n] > 1)
        split = int(np.prod([mesh.shape[n] for n in names]))
        entries.append(names if names and size % split == 0 else None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Say how an activation is split, by logical axes; without a mesh, `x` as it is.

    Where the network leaves this out XLA may gather a whole batch on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(axes, x.shape, mesh))


def on_each_device(
    function: Callable[..., jax.Array],
    arguments: Sequence[jax.Array | None],
    axes: Sequence[tuple[str | None, ...]],
    result: tuple[str | None, ...],
    shape: tuple[int, ...],
) -> jax.Array:
    """Call a function on every device's own part of the arguments, which are split as named.

    For what XLA cannot split by itself, or splits badly. Without a mesh it is a plain call.

    Args:
      axes: logical axes of each argument; an argument may be None.
      result, shape: logical axes and global shape of the result.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(*arguments)
    given = [i for i, x in enumerate(arguments) if x is not None]

    def call(*parts: jax.Array) -> jax.Array:
        whole: list[jax.Array | None] = [None] * len(arguments)
        for i, part in zip(given, parts, strict=True):
            whole[i] = part
        return function(*whole)

    specs = tuple(_spec(axes[i], arguments[i].shape, mesh) for i in given)
    return jax.shard_map(
        call, in_specs=specs, out_specs=_spec(result, shape, mesh), check_vma=False
    )(*[arguments[i] for i in given])


def part_of(size: int) -> jax.Array | int:
    """Within `on_each_device`: which part of a batch axis of `size` this device has; 0 if whole."""
    mesh = jax.sharding.get_abstract_mesh()
    names = () if mesh.empty else _spec(("batch",), (size,), mesh)[0]
    return jax.lax.axis_index(names) if names else 0


def parameter_axes(path: tuple[Any, ...]) -> tuple[str | None, ...]:
    """Logical axes of the last dimensions of the array at a tree path; () where it is whole."""
    names = tuple(str(getattr(p, "key", getattr(p, "name", p))) for p in path)
    for ends, axes in PARAMETERS.items():
        if names[-len(ends) :] == ends:
            return axes
    return ()


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Where every array of a training state lies. Moments lie where their parameters do."""

    def sharding(path, leaf):
        axes = parameter_axes(path)
        axes = (None,) * (len(leaf.shape) - len(axes)) + axes
        return NamedSharding(mesh, _spec(axes, leaf.shape, mesh))

    return jax.tree.map_with_path(sharding, state)


def batch_shardings(batch: Any, mesh: Mesh) -> Any:
    """Where the arrays of a batch lie: first dimensions split, the others whole."""
    return jax.tree.map(
        lambda x: NamedSharding(
            mesh, _spec(("batch",) + (None,) * (len(x.shape) - 1), x.shape, mesh)
        ),
        batch,
    )


# --- who builds which rows ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Placement:
    """Which parts of a global batch each process builds.

    The batch is cut into `parts` equal parts, one for every place along the mesh's data and fsdp
    axes. `owners[p]` are the parts on process p's devices. Processes whose devices differ only
    along `tensor` build the same parts.
    """

    owners: tuple[tuple[int, ...], ...] = ((0,),)
    parts: int = 1
    process: int = 0

    @classmethod
    def of(cls, mesh: Mesh) -> Placement:
        grid = np.asarray(mesh.devices).reshape(-1, mesh.shape["tensor"])
        owned: dict[int, set[int]] = {}
        for part, devices in enumerate(grid):
            for device in devices:
                owned.setdefault(device.process_index, set()).add(part)
        owners = tuple(tuple(sorted(owned[p])) for p in sorted(owned))
        for a in owners:
            for b in owners:
                if set(a) & set(b) and a != b:
                    raise ConfigError(
                        "the mesh's tensor axis cuts across hosts unevenly: choose a size that "
                        "divides the devices of a host"
                    )
        return cls(owners, len(grid), jax.process_index())

    @property
    def mine(self) -> tuple[int, ...]:
        return self.owners[self.process]

    def rows(self, process: int, total: int) -> np.ndarray:
        """Row numbers of a global batch of `total` rows that a process builds."""
        if total % self.parts:
            raise ConfigError(
                f"a batch of {total} rows does not divide over {self.parts} places of the mesh: "
                f"set rows_multiple to {self.parts}"
            )
        each = total // self.parts
        return np.concatenate([np.arange(p * each, (p + 1) * each) for p in self.owners[process]])


ALONE = Placement()  # one process, one device


def place(local: Any, mesh: Mesh, placement: Placement) -> Any:
    """Arrays over all devices from this process's parts of them, first dimensions in order."""
    index = {part: i for i, part in enumerate(placement.mine)}

    def build(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
        each = len(x) // len(placement.mine)
        shape = (each * placement.parts, *x.shape[1:])

        def shard(where: tuple[slice, ...]) -> np.ndarray:
            first, last, _ = where[0].indices(shape[0])
            if (first, last) == (0, shape[0]):  # whole on every device: all there is, or empty
                return x
            begin = index[first // each] * each + first % each
            return x[begin : begin + last - first]

        return jax.make_array_from_callback(shape, sharding, shard)

    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            (len(x) // len(placement.mine) * placement.parts, *x.shape[1:]), x.dtype
        ),
        local,
    )
    return jax.tree.map(build, local, batch_shardings(shapes, mesh))
