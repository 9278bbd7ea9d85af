"""Tidy result rows, and where a run keeps its files."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import pathlib
import platform
import subprocess
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from gato_lib import distributed
from gato_lib.files import write_text

COLUMNS = (
    "run",
    "git_sha",
    "seed",
    "hardware",
    "versions",
    "step",
    "domain",
    "task",
    "metric",
    "value",
    "n",
)
REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
COMMITTED = REPOSITORY / "experiments" / "results"


@functools.cache
def git_sha() -> str:
    """Short commit, "+" appended where gato_lib has changes; "unknown" without git."""
    try:
        run = lambda *a: subprocess.run(  # noqa: E731
            ["git", *a], cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = run("status", "--porcelain", "--untracked-files=no", "--", "gato_lib")
        return run("rev-parse", "--short=10", "HEAD") + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@functools.cache
def hardware() -> str:
    """What this ran on, e.g. "2 cores, AMD EPYC (x86_64)"."""
    model = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    import jax

    accelerators = [d.device_kind for d in jax.devices() if d.platform != "cpu"]
    devices = f", {len(accelerators)} x {accelerators[0]}" if accelerators else ""
    return f"{os.cpu_count()} cores, {model} ({platform.machine()}){devices}"


@functools.cache
def versions() -> str:
    """Versions of what decides the numbers."""
    numbers = ("jax", "flax", "optax", "numpy")
    simulators = ("mujoco", "metaworld", "minigrid", "dm-control", "ale-py", "miniworld")
    return " ".join(f"{n}={importlib.metadata.version(n)}" for n in numbers + simulators)


def row(
    run: str, seed: int, step: int, domain: str, task: str, metric: str, value: float, n: int
) -> dict[str, Any]:
    """One number with everything needed to know where it came from."""
    return {
        "run": run,
        "git_sha": git_sha(),
        "seed": seed,
        "hardware": hardware(),
        "versions": versions(),
        "step": step,
        "domain": domain,
        "task": task,
        "metric": metric,
        "value": float(value),
        "n": n,
    }


def write_rows(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Write rows as CSV, whole or not at all, and return them; only process 0 writes.

    Raises ValueError for a missing or unknown column.
    """
    frame = pd.DataFrame(list(rows))
    if set(frame.columns) != set(COLUMNS):
        odd = sorted(set(frame.columns) ^ set(COLUMNS))
        raise ValueError(f"{path}: result columns differ in {odd}")
    frame = frame[list(COLUMNS)]
    if distributed.is_writer():
        write_text(path, frame.to_csv(index=False, float_format="%.10g"))
    return frame


def read_rows(path: str | os.PathLike) -> pd.DataFrame:
    """Read a CSV of result rows; raises ValueError where a column is missing."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no result rows there")
    frame = pd.read_csv(path)
    missing = [c for c in COLUMNS if c not in frame.columns]
    if missing:
        raise ValueError(f"{path}: not a result table, columns {missing} are missing")
    return frame
