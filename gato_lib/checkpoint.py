"""Checkpoints with orbax, whole or not at all: parameters, optimiser, step, place in the data.

Beside them, once for a run, meta.json holds every setting and seed. An agent that is given away has
its parameters alone, in one file of safetensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import operator
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.flax
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from gato_lib import distributed
from gato_lib.files import write_text


@contextlib.contextmanager
def _silenced(name: str) -> Iterator[None]:
    """Only errors of a logger inside the block."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# Orbax keeps metrics only where it is told how to rank them.
_VALIDATION_LOSS = operator.itemgetter("validation_loss")


class Checkpointer:
    """Keeps a run's last `keep` checkpoints and its best, and its settings in meta.json.

    The best is the one with the lowest validation loss among those saved with one. A kill during a
    save leaves the previous checkpoint as the latest; what it left behind is removed when training
    starts again. `read_only` touches nothing, so an agent can be loaded while it is being trained.
    With several processes each writes the arrays on its own devices, into one shared folder.
    Raises ValueError where the folder holds a run of other settings.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        meta: dict[str, Any],
        keep: int = 2,
        read_only: bool = False,
    ):
        self.folder = pathlib.Path(folder).absolute()
        steps = self.folder / "steps"
        if read_only:
            # Orbax warns about what read_only implies, with a path, into a notebook's outputs.
            with _silenced("absl"):
                options = ocp.CheckpointManagerOptions(
                    read_only=True, best_fn=_VALIDATION_LOSS, best_mode="min"
                )
                self._manager = ocp.CheckpointManager(steps, options=options)
            return
        path = self.folder / "meta.json"
        if path.is_file() and read_meta(folder) != json.loads(json.dumps(meta)):
            raise ValueError(f"{path}: the run there has other settings; choose another folder")
        if distributed.is_writer():
            for partial in steps.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(partial, ignore_errors=True)
            write_text(path, json.dumps(meta, indent=1, sort_keys=True))
        # The name holds every setting and the code: hosts that differ in them fail here.
        distributed.wait(f"checkpointer {self.folder.name}")
        best = policies.BestN(
            get_metric_fn=lambda metrics: -_VALIDATION_LOSS(metrics),  # what ranks last is kept
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            best_fn=_VALIDATION_LOSS,
            best_mode="min",
        )
        self._manager = ocp.CheckpointManager(steps, options=options)

    def latest(self) -> int | None:
        """Step of the latest checkpoint."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Step of the checkpoint with the lowest validation loss; None where none has one."""
        return self._manager.best_step()

    def save(
        self,
        step: int,
        state: Any,
        counters: dict[str, Any],
        validation_loss: float | None = None,
    ) -> None:
        """Start saving arrays and plain counters; the previous save is finished first."""
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), counters=ocp.args.JsonSave(counters)
        )
        metrics = None if validation_loss is None else {"validation_loss": validation_loss}
        # Without metrics Orbax warns that there is nothing to rank this one by.
        with _silenced("absl") if metrics is None else contextlib.nullcontext():
            if not self._manager.save(step, args=args, metrics=metrics):
                raise RuntimeError(f"{self.folder}: checkpoint {step} was not saved")

    def restore(self, state: Any, step: int | None = None) -> tuple[int, Any, dict[str, Any]]:
        """(step, state, counters) of a checkpoint, the latest by default.

        Shaped, typed and placed on devices like `state`, arrays or `jax.ShapeDtypeStruct`; what has
        no place there comes to this process's first device, wherever it was trained. Raises
        FileNotFoundError where there is none.
        """
        step = self.latest() if step is None else step
        if step is None or step not in self._manager.all_steps():
            raise FileNotFoundError(f"{self.folder}: no checkpoint{f' {step}' if step else ''}")
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=getattr(x, "sharding", None) or here
            ),
            state,
        )
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(target), counters=ocp.args.JsonRestore()
            ),
        )
        return step, restored.state, restored.counters

    def finish(self) -> None:
        """Wait until what was saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self.finish()
        self._manager.close()


def read_meta(folder: str | os.PathLike) -> dict[str, Any]:
    """Settings of the run in `folder`; raises FileNotFoundError where there is none."""
    path = pathlib.Path(folder) / "meta.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no trained agent there")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not a run's settings ({error})") from error


# --- parameters alone ---------------------------------------------------------------------------


DTYPES = {"BF16": jnp.bfloat16, "F32": np.float32}  # by their names in the file


def parameters_to_bytes(params: Any, dtype: Any = jnp.bfloat16) -> bytes:
    """A tree of parameters, rounded to `dtype`, as the content of a file of safetensors."""
    return safetensors.flax.save({n: jnp.asarray(v, dtype) for n, v in _by_name(params).items()})


def read_parameters(path: str | os.PathLike, like: Any, sha256: str) -> Any:
    """The parameters in a file of safetensors, with the tree, shapes and dtypes of `like`.

    Raises FileNotFoundError where there is no file, and ValueError, naming it, where its sha256 is
    another or what it holds does not fit `like`.
    """
    content = pathlib.Path(path).read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise ValueError(f"{path}: sha256 is {found[:12]}..., expected {sha256[:12]}...")
    try:
        parts = dict(safetensors.deserialize(content))
        arrays = {
            name: np.frombuffer(part["data"], DTYPES[part["dtype"]]).reshape(part["shape"])
            for name, part in parts.items()
        }
    except (safetensors.SafetensorError, KeyError) as error:
        raise ValueError(f"{path}: not a file of safetensors ({error})") from error
    expected = _by_name(like)
    if odd := sorted(set(arrays) ^ set(expected)):
        where = "missing" if odd[0] in expected else "not expected"
        raise ValueError(f"{path}: {odd[0]} is {where} ({len(odd)} such names)")
    for name, array in arrays.items():
        if array.shape != expected[name].shape:
            text = f"{array.shape}, expected {expected[name].shape}"
            raise ValueError(f"{path}: {name} has shape {text}")
    leaves = [jnp.asarray(arrays[name], leaf.dtype) for name, leaf in expected.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _by_name(tree: Any) -> dict[str, Any]:
    """Leaves by their path, as in "transformer/block0/norm1/scale", in the tree's order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
