"""The main job, killed and started again, ends where an uninterrupted one ends."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from gato_lib import workbook

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


def command(runs: pathlib.Path) -> list[str]:
    """Smoke run of the training notebook, long enough to be killed in the middle."""
    settings = ("steps=400", "save_every=50")
    return [
        sys.executable,
        str(REPOSITORY / "experiments" / "run.py"),
        *("--preset", "smoke", "--notebook", "04_training", "--runs", str(runs)),
        *(word for text in settings for word in ("--set", text)),
    ]


def trained(runs: pathlib.Path):
    """(parameters, metrics) of the finished agent."""
    folder = workbook.find_agent(workbook.Run(runs / "smoke", "smoke"), "generalist")
    metrics = pd.read_csv(folder / "metrics.csv")
    return workbook.load_agent(folder).params, metrics


@pytest.mark.slow
def test_kill_and_continue_equals_an_uninterrupted_run(tmp_path):
    import jax

    straight = tmp_path / "straight"
    subprocess.run(command(straight), check=True, stdout=subprocess.DEVNULL, timeout=600)

    cut = tmp_path / "cut"
    kills = 0
    for wanted in ("data", "steps/100", "steps/250"):  # in collection, then twice in training
        process = subprocess.Popen(
            command(cut), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.time() + 300
        while process.poll() is None and time.time() < deadline:
            if any(
                cut.glob(f"smoke/{wanted}/*" if wanted == "data" else f"smoke/agents/*/{wanted}")
            ):
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.02)
        process.wait()
        time.sleep(12)  # the kernel notices that its parent is gone
    assert kills == 3
    assert not (cut / "smoke" / "state" / "04_training.json").exists()
    subprocess.run(command(cut), check=True, stdout=subprocess.DEVNULL, timeout=600)

    (params, metrics), (again, resumed) = trained(straight), trained(cut)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    for column in ("step", "domain", "loss", "tokens"):
        assert metrics[column].tolist() == resumed[column].tolist(), column
    state = json.loads((cut / "smoke" / "state" / "04_training.json").read_text())
    assert state["fingerprint"]
    output = subprocess.run(command(cut), check=True, capture_output=True, text=True).stdout
    assert "up to date" in output and "done in" not in output
