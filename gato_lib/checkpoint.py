"""Checkpoints with orbax: parameters, optimiser state and step, whole or not at all."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

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


class Checkpointer:
    """Keeps the last `keep` checkpoints of a run in `folder`, and its settings in meta.json.

    A kill during a save leaves the previous checkpoint as the latest; what it left behind is
    removed when training starts again. `read_only` touches nothing, so an agent can be loaded
    while it is being trained. Raises ValueError where the folder holds a run of other settings.
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
                options = ocp.CheckpointManagerOptions(read_only=True)
                self._manager = ocp.CheckpointManager(steps, options=options)
            return
        for partial in steps.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(partial, ignore_errors=True)
        path = self.folder / "meta.json"
        if path.is_file() and read_meta(folder) != json.loads(json.dumps(meta)):
            raise ValueError(f"{path}: the run there has other settings; choose another folder")
        write_text(path, json.dumps(meta, indent=1, sort_keys=True))
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._manager = ocp.CheckpointManager(steps, options=options)

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any, counters: dict[str, Any]) -> None:
        """Start saving arrays and plain counters; the previous save is finished first."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), counters=ocp.args.JsonSave(counters)
            ),
        )

    def restore(self, state: Any) -> tuple[int, Any, dict[str, Any]]:
        """(step, state, counters) of the latest checkpoint, shaped and typed like `state`.

        Raises FileNotFoundError where there is none.
        """
        step = self.latest()
        if step is None:
            raise FileNotFoundError(f"{self.folder}: no checkpoint")
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(target), counters=ocp.args.JsonRestore()
            ),
        )
        return step, restored.state, restored.counters

    def close(self) -> None:
        self._manager.wait_until_finished()
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
