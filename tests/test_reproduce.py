"""Runs that are killed and started again end where uninterrupted ones end."""

from __future__ import annotations

import json
import os
import pathlib
import random
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


TRAIN = """
import pathlib, sys
from gato_lib import workbook
from gato_lib.config import DataConfig, TrainConfig, model_config

run = workbook.Run(pathlib.Path(sys.argv[1]), "smoke")
data = DataConfig(
    tasks=workbook.SMALL_TASKS,
    episodes=(("babyai", 8), ("metaworld", 4)),
    context_length=56,
    batch_tokens=700,
    validation_fraction=0.25,
    vocabulary_size=1024,
)
network = model_config("w64d2")  # 32,000 rows of text: a checkpoint takes a while to write
fit = TrainConfig(steps=240, peak_lr=2e-3, warmup_steps=20, clip_norm=1.0)
prepared = workbook.prepare(run, data)
workbook.train_agent(run, "agent", network, fit, prepared, report_every=15, save_every=10)
"""


def train(folder: pathlib.Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, str(folder)], cwd=REPOSITORY, stdout=subprocess.DEVNULL
    )


def state_of(folder: pathlib.Path):
    """(step, parameters and optimiser state, counters, metrics) of a finished run."""
    import jax

    from gato_lib.checkpoint import Checkpointer, read_meta
    from gato_lib.config import ModelConfig, TrainConfig
    from gato_lib.training import initial_state

    (agent,) = (folder / "agents").glob("agent-*")
    meta = read_meta(agent)
    model, fit = ModelConfig.from_dict(meta["model"]), TrainConfig.from_dict(meta["train"])
    checkpointer = Checkpointer(agent, meta, read_only=True)
    shapes = jax.eval_shape(lambda: initial_state(model, fit))
    return *checkpointer.restore(shapes), pd.read_csv(agent / "metrics.csv")


@pytest.mark.slow
def test_killed_at_any_moment_training_ends_bit_for_bit_the_same(tmp_path):
    """kill -9 three times: anywhere, and as a checkpoint is being written.

    GATO_KILLS asks for more of them. Moments are random: a failure is no flake but a bug.
    """
    import jax

    straight, cut = tmp_path / "straight", tmp_path / "cut"
    assert train(straight).wait(300) == 0
    moments, kills = random.Random(), int(os.environ.get("GATO_KILLS", "3"))
    inside, last = 0, 0
    for number in range(kills):
        process = train(cut)
        deadline = time.monotonic() + 120
        saved = lambda: [  # noqa: E731
            int(p.name) for p in cut.glob("agents/*/steps/*") if p.name.isdecimal()
        ]
        wanted = last + 10 * moments.randint(1, max(1, 24 // kills - 1))
        in_a_write = number % 3 == 1
        while process.poll() is None and time.monotonic() < deadline:
            if max(saved(), default=0) >= wanted:  # further than the last time
                if not in_a_write:
                    time.sleep(moments.uniform(0.0, 0.5))
                    break
                if any(cut.glob("agents/*/steps/*.orbax-checkpoint-tmp*")):
                    break
            time.sleep(0.001)
        assert process.poll() is None, "training ended before it was killed"
        process.kill()
        process.wait()
        inside += any(cut.glob("agents/*/steps/*.orbax-checkpoint-tmp*"))
        last = max(saved())
    assert train(cut).wait(300) == 0
    assert inside >= kills // 3, "some kills left a checkpoint half written"
    (step, state, counters, metrics), again = state_of(straight), state_of(cut)
    assert step == again[0] == 240 and counters == again[2]
    jax.tree.map(np.testing.assert_array_equal, state, again[1])
    for column in ("step", "domain", "loss", "validation_loss", "gradient_norm", "tokens"):
        np.testing.assert_array_equal(metrics[column], again[3][column], err_msg=column)
