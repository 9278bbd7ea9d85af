"""An agent that is given away: its parameters alone, and the file that was meant."""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from gato_lib import domains, results, workbook
from gato_lib.checkpoint import parameters_to_bytes, read_parameters
from gato_lib.workbook import Run


def write(path, dtype=jnp.bfloat16):
    """TREE in a file, whose sha256 is returned."""
    path.write_bytes(content := parameters_to_bytes(TREE, dtype))
    return hashlib.sha256(content).hexdigest()


TREE = {"a": {"w": np.arange(6.0, dtype=np.float32).reshape(2, 3)}, "b": [np.float32([1 / 3])]}


def test_parameters_come_back_rounded(tmp_path):
    path = tmp_path / "p.safetensors"
    digest = write(path)
    back = read_parameters(path, TREE, digest)
    assert jax.tree.structure(back) == jax.tree.structure(TREE)
    np.testing.assert_array_equal(back["a"]["w"], TREE["a"]["w"])  # small whole numbers are exact
    assert back["b"][0].dtype == np.float32 and back["b"][0] == jnp.bfloat16(1 / 3)
    assert path.stat().st_size < 300
    assert write(tmp_path / "again") == digest
    exact = write(path, np.float32)
    assert read_parameters(path, TREE, exact)["b"][0] == np.float32(1 / 3)


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "p.safetensors"
    digest = write(path)
    with pytest.raises(ValueError, match=r"p\.safetensors: sha256 is .* expected 0000"):
        read_parameters(path, TREE, "0" * 64)
    with pytest.raises(ValueError, match=r"b/0 is not expected \(1 such names\)"):
        read_parameters(path, {"a": TREE["a"]}, digest)
    with pytest.raises(ValueError, match=r"c is missing \(1 such names\)"):
        read_parameters(path, TREE | {"c": np.zeros(1)}, digest)
    with pytest.raises(ValueError, match=r"a/w has shape \(2, 3\), expected \(3, 2\)"):
        read_parameters(path, TREE | {"a": {"w": np.zeros((3, 2))}}, digest)
    path.write_bytes(b"pickled")
    with pytest.raises(ValueError, match="not a file of safetensors"):
        read_parameters(path, TREE, hashlib.sha256(b"pickled").hexdigest())
    with pytest.raises(FileNotFoundError, match="none"):
        read_parameters(tmp_path / "none", TREE, digest)


@pytest.mark.slow
def test_a_released_agent_plays_like_the_rounded_one(tmp_path):
    own, given = Run(tmp_path / "smoke", "smoke"), Run(tmp_path / "given", "smoke")
    folder = workbook.tiny_agent(own, "generalist", 0)
    released = workbook.release(own, folder, given, "small")
    assert workbook.find_agent(given, "small") == released
    digest = hashlib.sha256((released / "params.safetensors").read_bytes()).hexdigest()
    assert released.name == f"small-{digest[:8]}"
    assert sorted(p.name for p in released.iterdir()) == [
        "meta.json", "metrics.csv", "params.safetensors", "text.model",
    ]  # fmt: skip
    assert workbook.trained_on(released) == workbook.trained_on(folder)
    assert workbook.checkpoint_step(released) == workbook.checkpoint_step(folder) == 60
    meta = json.loads((released / "meta.json").read_text())
    assert meta["released"]["from"] == folder.name and "prompts_sha256" not in meta["released"]
    one, other = workbook.load_agent(folder), workbook.load_agent(released)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_array_equal(jnp.asarray(a, jnp.bfloat16).astype(np.float32), b)
    again = workbook.release(given, released, Run(tmp_path / "third", "smoke"), "small")
    content = (released / "params.safetensors").read_bytes()
    assert (again / "params.safetensors").read_bytes() == content
    played = workbook.play(
        own, released, 1, 0, lanes=1, prompt="none", tasks=("metaworld/drawer-close",)
    )
    assert len(played) == 1 and played.score.notna().all()

    # The same by the command.
    program = [sys.executable, str(results.REPOSITORY / "experiments" / "release.py")]
    where = ["--preset", "smoke", "--runs", str(tmp_path), "--to", str(tmp_path / "agents")]
    done = subprocess.run([*program, *where], capture_output=True, text=True, check=True)
    assert meta["released"]["sha256"] in done.stdout
    run = Run(tmp_path / "agents", "smoke")
    one = workbook.find_agent(run, "generalist")
    assert (one / "params.safetensors").read_bytes() == content
    assert workbook.prompts_for(run, one, "end")("babyai/GoToObj")
    done = subprocess.run([*program, *where, "--most", "1e4"], capture_output=True, text=True)
    assert done.returncode == 1 and "0.0 MB are wanted" in done.stdout
    assert workbook.find_agent(run, "generalist") == one, "the last one is still there"
    assert workbook.prompts_for(run, one, "end")("babyai/GoToObj")
    where[3] = str(tmp_path / "elsewhere")
    done = subprocess.run([*program, *where], capture_output=True, text=True)
    assert done.returncode == 2 and "make reproduce PRESET=smoke first" in done.stdout


HOME = Run(results.REPOSITORY / "experiments" / "agents" / "released", "released")


AGENTS = ["arcade", "released", "stacking"]


@pytest.mark.parametrize("name", AGENTS)
def test_the_agents_that_come_with_the_repository_load(name):
    """Whatever the code has become: their checkpoints hold the optimizer's state, too."""
    run = Run.of(f"experiments/agents/{name}", None)
    folders = [p for p in run.agents.iterdir() if p.is_dir()]
    assert folders
    for folder in folders:
        params = jax.tree.leaves(workbook.load_agent(folder).params)
        assert sum(p.size for p in params) > 1e5
        assert all(jnp.isfinite(p).all() for p in params)


def test_the_released_agent_was_trained_on_every_task_but_what_is_kept_from_it():
    folder = workbook.find_agent(HOME, "generalist")
    trained = workbook.trained_on(folder)
    preset = yaml.safe_load((results.REPOSITORY / "experiments/params/pretrain.yaml").read_text())
    levels = preset["notebooks"]["06_simulated_control"]["levels"]
    levels = {level.strip() for level in levels.split(",")}
    assert set(trained.tasks) == set(domains.TASKS) - domains.HELD_OUT - levels
    assert trained.data.goals_aside
    workbook.load_agent(folder)  # its parameters are those that its sha256 names
    assert sum(path.stat().st_size for path in folder.iterdir()) < 40e6
    prompts = workbook.prompts_for(HOME, folder, "end")
    assert all(prompts(task) for task in (*trained.tasks, *levels))


def test_the_card_tells_of_the_agent_that_is_here(monkeypatch):
    monkeypatch.syspath_prepend(str(results.REPOSITORY / "experiments"))
    card = importlib.import_module("card").card(HOME, "generalist", results.COMMITTED)
    assert (HOME.root / "README.md").read_text() == card, "python experiments/card.py"
    assert workbook.find_agent(HOME, "generalist").name in card
