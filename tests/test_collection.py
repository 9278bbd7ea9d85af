"""Collection: what is written, what a kill leaves, what a second call does."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from gato_lib import collection, domains, workbook
from gato_lib.collection import Collection
from gato_lib.episodes import DataError, read_shard, write_shard

TASK = "babyai/GoToObj"


def collect(root, task=TASK, episodes=4, seed=0):
    item = Collection(str(root), task, episodes, (0.0, 0.3), seed)
    return item, list(collection.collect([item], workers=1))


def test_collect_filter_and_load(tmp_path):
    item, lines = collect(tmp_path)
    assert item.done and lines[-1] == "4 episodes of 1 tasks collected"
    kept, card = collection.load(item)
    assert card["collected"] == 4 == len(card["scores"]) and card["kept"] == len(kept)
    assert min(e.episode_return for e in kept) >= 0.8 * card["expert_return"]
    assert [p.name for p in tmp_path.iterdir()] == [item.folder.name]  # shards are gone
    assert list(collection.collect([item])) == []  # finished: nothing to do
    other, _ = collect(tmp_path, seed=1)
    assert other.folder != item.folder


def test_a_second_call_goes_on_from_the_shards(tmp_path):
    item = Collection(str(tmp_path), TASK, 3, (0.0,), 0)
    item.gather([0, 2])
    before = {i: item.shard(i).stat().st_mtime_ns for i in (0, 2)}
    lines = []
    for line in collection.collect([item], workers=1):
        lines.append(line)
        if "collecting" in line:
            assert line == "collecting 1 of 3 episodes of 1 tasks"
            assert all(item.shard(i).stat().st_mtime_ns == t for i, t in before.items())
    straight = Collection(str(tmp_path / "straight"), TASK, 3, (0.0,), 0)
    list(collection.collect([straight], workers=1))
    for a, b in zip(collection.load(item)[0], collection.load(straight)[0], strict=True):
        np.testing.assert_array_equal(a.observations["image"], b.observations["image"])
        np.testing.assert_array_equal(a.actions, b.actions)


KILLED = """
from gato_lib.collection import Collection, collect
if __name__ == "__main__":
    for line in collect([Collection({root!r}, "babyai/Open", 200, (0.0,), 0)], workers=1):
        print(line, flush=True)
"""


def test_a_kill_leaves_whole_episodes_only(tmp_path):
    script = tmp_path / "collect.py"
    script.write_text(KILLED.format(root=str(tmp_path / "data")))
    process = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.DEVNULL, start_new_session=True
    )
    item = Collection(str(tmp_path / "data"), "babyai/Open", 200, (0.0,), 0)
    folder = item.shard(0).parent
    deadline = time.time() + 60
    while time.time() < deadline and not (folder.is_dir() and len(list(folder.glob("*.npz"))) > 3):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    shards = list(folder.glob("*.npz"))
    assert 3 < len(shards) < 200 and not item.done
    assert all(read_shard(s).task == "babyai/Open" for s in shards)


def test_several_machines_collect_parts_and_one_merges(tmp_path):
    item = Collection(str(tmp_path), TASK, 5, (0.0,), 0)
    for part, count in (((0, 2), 3), ((1, 2), 2)):
        lines = list(collection.collect([item], workers=1, part=part))
        assert lines[0] == f"collecting {count} of {count} episodes of 1 tasks"
        assert not item.done
    assert len(list(item.shard(0).parent.glob("*.npz"))) == 5
    foreign = item.shard(0).parent / ".000001.npz.1.partial"  # another machine is writing it
    foreign.touch()
    again = list(collection.collect([item], workers=1, part=(0, 2)))
    assert again[0] == "collecting 0 of 3 episodes of 1 tasks"
    assert foreign.is_file()
    merged = list(collection.collect([item], workers=1))
    assert merged[0] == "collecting 0 of 5 episodes of 1 tasks"
    straight = Collection(str(tmp_path / "straight"), TASK, 5, (0.0,), 0)
    list(collection.collect([straight], workers=1, notes={TASK: {"random_score": 0.25}}))
    assert collection.load(straight)[1]["random_score"] == 0.25
    for a, b in zip(collection.load(item)[0], collection.load(straight)[0], strict=True):
        np.testing.assert_array_equal(a.actions, b.actions)
    with pytest.raises(ValueError, match=r"part is \(2, 2\)"):
        list(collection.collect([item], part=(2, 2)))


def test_a_task_that_fails_does_not_stop_the_others(tmp_path):
    bad = Collection(str(tmp_path), "babyai/Open", 2, (0.0,), 0)
    good = Collection(str(tmp_path), TASK, 2, (0.0,), 0)
    bad.shard(0).parent.mkdir(parents=True)
    bad.shard(0).write_bytes(b"not an archive")
    lines = []
    with pytest.raises(DataError, match="1 of 2 tasks could not be collected") as caught:
        for line in collection.collect([bad, good], workers=1):
            lines.append(line)
    assert "babyai/Open: DataError" in str(caught.value) and "000000.npz" in str(caught.value)
    assert lines[-1] == "2 episodes of 1 tasks collected"
    assert good.done and not bad.done and bad.shard(1).is_file()
    bad.shard(0).unlink()
    assert list(collection.collect([bad, good], workers=1))[-1] == "2 episodes of 1 tasks collected"


def test_seeds_of_collection_and_evaluation_never_meet():
    from gato_lib.evaluation import episode_seed

    item = Collection("x", TASK, 10, (0.0,), 0)
    assert all(item.episode_seed(i, a) < 2**30 for i in range(50) for a in range(3))
    assert all(2**30 <= episode_seed(TASK, s, i) < 2**31 for s in range(3) for i in range(50))


def test_bad_shards_are_named_and_kept(tmp_path):
    item = Collection(str(tmp_path), TASK, 2, (0.0,), 0)
    item.gather([0, 1])
    good = read_shard(item.shard(1))
    image = good.observations["image"][:, :32]
    write_shard(
        item.shard(1),
        dataclasses.replace(good, observations=good.observations | {"image": image}),
    )
    with pytest.raises(DataError, match=r"000001.npz: observations/image has shape"):
        collection._merge(item)
    write_shard(item.shard(1), dataclasses.replace(good, task="babyai/Open"))
    with pytest.raises(DataError, match=r"000001.npz: task is babyai/Open"):
        collection._merge(item)
    assert not item.done and item.shard(0).is_file()
    write_shard(item.shard(1), good)
    item.folder.with_name(f".{item.folder.name}.1.partial").mkdir()  # a killed merge
    assert list(collection.collect([item], workers=1))[-1] == "2 episodes of 1 tasks collected"
    assert [p.name for p in tmp_path.iterdir()] == [item.folder.name]


def test_a_task_without_a_solved_episode_is_named(tmp_path):
    item = Collection(str(tmp_path), "metaworld/drawer-close", 1, (0.0,), 0)
    item.gather([0])
    write_shard(item.shard(0), dataclasses.replace(read_shard(item.shard(0)), success=False))
    with pytest.raises(DataError, match="metaworld/drawer-close: the expert solved no episode"):
        collection._merge(item)


def test_a_data_set_of_another_collection_is_refused(tmp_path):
    item, _ = collect(tmp_path)
    other = dataclasses.replace(item, seed=9)
    item.folder.rename(other.folder)
    with pytest.raises(DataError, match="seed is 0, expected 9"):
        collection.load(other)


ORPHAN = """
import os, sys, time
from gato_lib.collection import worker_pool
if __name__ == "__main__":
    with worker_pool(1) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 60)
        time.sleep(60)
"""


def test_workers_end_with_a_killed_parent(tmp_path):
    script = tmp_path / "pool.py"
    script.write_text(ORPHAN)
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    with process:
        worker = int(process.stdout.readline())
        process.kill()
    deadline = time.time() + 20
    while time.time() < deadline and psutil.pid_exists(worker):
        if psutil.Process(worker).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.05)
    assert time.time() < deadline


def test_an_expert_that_always_fails_is_reported(tmp_path, monkeypatch):
    class Broken(domains.Expert):
        def reset(self, env):
            pass

        def act(self, observation, executed):
            raise domains.ExpertError("no plan")

    monkeypatch.setattr(domains, "make_expert", lambda task: Broken())
    item = Collection(str(tmp_path), TASK, 1, (0.0,), 0)
    with pytest.raises(ValueError, match="babyai/GoToObj: the expert failed on 20 seeds"):
        item.gather([0])


@pytest.mark.slow
def test_the_command_collects_shards_and_merges(tmp_path):
    """What it merges is what 02_datasets asks for."""
    repository = pathlib.Path(__file__).resolve().parent.parent
    command = [sys.executable, str(repository / "experiments" / "collect.py"), "--preset", "smoke"]
    command += ["--run-dir", str(tmp_path)]

    def say(*arguments):
        return subprocess.run([*command, *arguments], capture_output=True, text=True)

    first, second, merge = say("--shard", "1/2"), say("--shard", "2/2"), say()
    assert first.stdout.startswith("about") and "GB of disk" in first.stdout
    for done, episodes in ((first, 6), (second, 6), (merge, 12)):
        assert done.returncode == 0, done.stderr
        assert f"{episodes} episodes of 2 tasks collected" in done.stdout
    config = workbook.data_config(
        "small", "babyai 8, metaworld 4", "0, 0.1, 0.3", "equal", vocabulary_size=1024
    )
    wanted = workbook.collections(workbook.Run(tmp_path, "smoke"), config)
    assert [c.done for c in wanted] == [True, True]
    for c in wanted:
        _, card = collection.load(c)
        assert card["expert_score"] > card["random_score"] and card["n"] >= 20
        assert "metaworld=" in card["versions"] and card["expert"]
    wrong = say("--shard", "3/2")
    assert wrong.returncode == 2 and "'3/2', expected i/n" in wrong.stderr
    assert "unknown preset" in say("--preset", "laptob").stderr
