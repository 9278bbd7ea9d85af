"""Settings, result rows and the glue between notebooks."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np
import pandas as pd
import pytest

from gato_lib import domains, films, results, workbook
from gato_lib.agent import Agent
from gato_lib.config import ConfigError, DataConfig, TrainConfig, count_of, model_config
from gato_lib.episodes import DataError
from gato_lib.mixture import STANDS_FOR
from gato_lib.sampling import Sampling
from gato_lib.tokenizers import train_text_tokenizer
from gato_lib.training import initial_state
from gato_lib.workbook import Run, Trial, duration, select_tasks


def test_select_tasks():
    everything = select_tasks("all")
    assert set(everything) == {
        t
        for t, spec in domains.TASKS.items()
        if t not in domains.HELD_OUT
        and domains.DOMAINS[spec.domain].installed
        and not domains.DOMAINS[spec.domain].extra
    }
    assert select_tasks("small") == workbook.SMALL_TASKS
    assert select_tasks("metaworld/push, babyai")[0] == "metaworld/push"
    assert len(select_tasks("babyai,babyai/Open")) == 46
    assert set(everything) - set(select_tasks("all, -babyai/Synth")) == {"babyai/Synth"}
    with pytest.raises(ConfigError, match="'-babyai/Opne' leaves out what is not among those"):
        select_tasks("babyai, -babyai/Opne")
    with pytest.raises(ConfigError, match="unknown task 'babyai/Opne'"):
        select_tasks("babyai/Opne")
    with pytest.raises(ConfigError, match="held out"):
        select_tasks("metaworld/assembly")


def test_episodes_by_domain():
    tasks = ("metaworld/push", "babyai/Open")
    parse = workbook.episodes_by_domain
    assert parse("babyai 8, others 2", tasks) == (("babyai", 8), ("metaworld", 2))
    assert parse("metaworld 3, babyai 8", tasks[:1]) == (("metaworld", 3),)
    assert parse("babyai 8, metaworld/push 5", tasks) == (("babyai", 8), ("metaworld/push", 5))
    both = ("metaworld/reach", "metaworld/push")
    assert parse("metaworld 3, metaworld/push 5", both) == (("metaworld", 3), ("metaworld/push", 5))
    counts = parse("metaworld 3, metaworld/push 5, atari/Pong 1", both)
    assert [count_of(counts, t) for t in (*both, *tasks[1:])] == [3, 5, 0]
    with pytest.raises(ConfigError, match="'babyai 8' has no number for metaworld or others"):
        parse("babyai 8", tasks)
    for text in ("baby 8", "babyai eight", "babyai 0", "babyai 1, babyai 2", "8", "", "babyai/x 1"):
        with pytest.raises(ConfigError, match="once each, a number behind a task or one of babyai"):
            parse(text, tasks)


def test_the_papers_table_1():
    table = workbook.paper_table1()
    assert len(table) == 24 and table.tasks.count() == 16
    assert table.tasks.sum() == 596  # as printed
    assert table.weight.sum() == pytest.approx(99.93)  # and 100 is not
    assert table.episodes.sum() == pytest.approx(63e6, rel=0.01)
    assert table.tokens.sum() == pytest.approx(1.61e12, rel=0.01)  # printed: 1.5 T
    ours = [name for name, domain in domains.DOMAINS.items() if not domain.extra]
    assert {key for name in ours for key in STANDS_FOR.get(name, (name,))} <= set(table.index)
    assert table.loc["babyai"].to_dict() == {
        "name": "BabyAI", "weight": 9.06, "tasks": 46, "episodes": 4.61e6, "tokens": 22.8e9,
    }  # fmt: skip


def test_pictures_of_tasks_that_are_seen_and_that_are_not():
    seen = films.picture("sokoban/8x8-2", seed=3)
    env = domains.make_env("sokoban/8x8-2")
    np.testing.assert_array_equal(seen, env.reset(seed=3)[0]["image"])
    for task in ("metaworld/reach", "dmc/cartpole-balance"):
        image = films.picture(task, size=32)
        assert image.shape == (32, 32, 3) and image.dtype == np.uint8
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20  # something can be seen
        np.testing.assert_array_equal(image, films.picture(task, size=32))


def test_runs_by_their_folder(tmp_path):
    run = workbook.Run.at(str(tmp_path), "smoke")
    assert workbook.Run.of("", run) is run
    other = workbook.Run.of("experiments/runs/laptop", run)
    assert other == workbook.Run.named("laptop")
    assert workbook.Run.at("", "smoke") == workbook.Run.named("smoke")
    with pytest.raises(ConfigError, match="copy in experiments/runs/laptop/notebooks"):
        workbook.Run.at("", "laptop")  # would write smoke results where laptop's are
    assert workbook.Run.of(str(tmp_path / "x"), run).root == tmp_path / "x"


def test_a_tiny_agent_is_for_smoke_runs_only(tmp_path):
    with pytest.raises(ConfigError, match="run 04_training at 'laptop' first"):
        workbook.tiny_agent(Run(tmp_path, "laptop"), "generalist", 0)


def test_a_tiny_agent_is_trained_found_and_loaded(tmp_path, monkeypatch):
    run = Run(tmp_path, "smoke")
    assert workbook.find_agent(run, "g") is None
    folder = workbook.tiny_agent(run, "g", 0)
    assert workbook.find_agent(run, "g") == folder
    metrics = pd.read_csv(folder / "metrics.csv")
    assert metrics.step.max() == 60 and set(metrics.domain) <= {"babyai", "metaworld"}
    agent = workbook.load_agent(folder, continuous="mean")
    assert agent.context_length == 56
    assert workbook.trained_on(folder).tasks == workbook.SMALL_TASKS
    monkeypatch.setattr(workbook, "train", None)  # a second call must not train
    assert workbook.tiny_agent(run, "g", 0) == folder


def test_what_watches_a_training(tmp_path):
    """Live curves are given every report; TensorBoard's file holds the same numbers."""
    from tensorboardX.proto.event_pb2 import Event

    run = Run(tmp_path, "smoke")
    data = DataConfig(
        tasks=("metaworld/drawer-close",),
        episodes=(("metaworld", 4),),
        context_length=44,
        batch_tokens=88,
        validation_fraction=0.25,
        vocabulary_size=1024,
    )
    seen = []
    folder, metrics = workbook.train_agent(
        run,
        "a",
        model_config("w64d2", text_rows=1024),
        TrainConfig(steps=4, warmup_steps=1),
        workbook.prepare(run, data),
        watch=lambda frame: seen.append(frame.step.max()),
        tensorboard=True,
        report_every=2,
        save_every=4,
    )
    assert seen == [2, 4]
    assert metrics.validation_loss.isna().tolist() == [True, False]
    assert metrics.continuous_loss.notna().all() and metrics.text_loss.isna().all()
    (path,) = (folder / "tensorboard").iterdir()
    content, logged = path.read_bytes(), {}
    while content:  # records: length (8 bytes), its checksum (4), the event, its checksum (4)
        size = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + size])
        for value in event.summary.value:
            logged[event.step, value.tag] = value.simple_value
        content = content[16 + size :]
    last = metrics.iloc[-1]
    assert logged[4, "loss/metaworld"] == pytest.approx(last.loss)
    assert logged[4, "validation_loss/metaworld"] == pytest.approx(last.validation_loss)
    assert logged[2, "gradient_norm"] == pytest.approx(metrics.gradient_norm[0])
    for checkpoint in ("latest", "best"):
        assert workbook.load_agent(folder, checkpoint).lengths == {"metaworld": 44}
    with pytest.raises(ConfigError, match="checkpoint is 'last'"):
        workbook.load_agent(folder, "last")


def small_trials(count: int) -> list[Trial]:
    network = model_config("w64d2", text_rows=1024, stochastic_depth=0.0)
    data = DataConfig(
        tasks=("metaworld/drawer-close",),
        episodes=(("metaworld", 2),),
        context_length=88,
        batch_tokens=352,
        vocabulary_size=1024,
    )
    fit = TrainConfig(steps=2, warmup_steps=1)
    return [
        Trial(f"t{seed}", network, dataclasses.replace(fit, seed=seed), data, episodes=1)
        for seed in range(count)
    ]


@pytest.mark.slow
def test_trials_side_by_side_equal_trials_in_turn(tmp_path):
    trials = [
        dataclasses.replace(t, train=dataclasses.replace(t.train, steps=4)) for t in small_trials(3)
    ]
    outcomes = {}
    for workers in (1, 2):
        run = Run(tmp_path / str(workers), "smoke")
        for trial, metrics, played in workbook.run_trials(run, trials, workers):
            outcomes[workers, trial.name] = metrics.loss.tolist(), len(played)
    for trial in trials:
        (one, played), (two, _) = outcomes[1, trial.name], outcomes[2, trial.name]
        assert one == pytest.approx(two, rel=1e-5)  # a core each sums in another order than two
        assert played == 1
    assert len({tuple(outcomes[1, t.name][0]) for t in trials}) == 3, "seeds differ"


def rows_of(trial, metrics, played):
    return [results.row(trial.name, trial.train.seed, 2, "all", "all", "loss", 1.0, len(played))]


def test_a_sweep_runs_what_is_missing_and_shares_can_be_put_together(tmp_path, monkeypatch):
    ran = []

    def run_trials(run, trials, workers):
        for trial in trials:
            if trial.name == "t3" and not ran[3:]:
                raise KeyboardInterrupt
            ran.append(trial.name)
            yield trial, pd.DataFrame(), pd.DataFrame(index=range(5))

    monkeypatch.setattr(workbook, "run_trials", run_trials)
    run, trials = Run(tmp_path / "a", "smoke"), small_trials(5)
    with pytest.raises(KeyboardInterrupt):
        workbook.sweep(run, "grid", trials, rows_of)
    assert ran == ["t0", "t1", "t2"], "and their rows are kept"
    assert not len(workbook.sweep(Run(tmp_path / "none", "smoke"), "grid", [], rows_of))
    ran.append("restarted")
    frame = workbook.sweep(run, "grid", trials, rows_of)
    assert ran[4:] == ["t3", "t4"] and frame.run.tolist() == [t.name for t in trials]
    again = workbook.sweep(run, "grid", trials, rows_of)
    assert len(ran) == 6 and again.equals(frame)
    changed = dataclasses.replace(trials[0], episodes=2)
    workbook.sweep(run, "grid", [changed, *trials[1:]], rows_of)
    assert ran[6:] == ["t0"], "other settings are another trial"

    shares = [Run(tmp_path / name, "smoke") for name in "bc"]
    for index, share in enumerate(shares):
        workbook.sweep(share, "grid", trials, rows_of, part=(index, 2))
    assert ran[7:] == ["t0", "t2", "t4", "t1", "t3"]
    for path in (shares[1].results / "grid").iterdir():
        path.rename(shares[0].results / "grid" / path.name)
    together = workbook.sweep(shares[0], "grid", trials, rows_of)
    assert len(ran) == 12 and together.equals(frame)
    with pytest.raises(ConfigError, match="two trials are the same"):
        workbook.sweep(run, "grid", [trials[0], trials[0]], rows_of)


def test_after_a_failure_nothing_begins():
    begun, release = [], threading.Event()

    def trial(number):
        begun.append(number)
        if number == 0:
            raise ValueError("in trial 0")
        release.wait(60)
        return 10 * number

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        ended = workbook._in_turn(pool, trial, range(6), 2)
        threading.Timer(0.2, release.set).start()
        assert next(ended) == (1, 10), "what ran beside it is not lost"
        with pytest.raises(ValueError, match="in trial 0"):
            next(ended)
    assert begun == [0, 1]


SWEEP = """
import sys
sys.path.insert(0, {tests!r})
from test_workbook import Run, pathlib, rows_of, small_trials, workbook

if __name__ == "__main__":
    run = Run(pathlib.Path({root!r}), "smoke")
    workbook.sweep(run, "grid", small_trials(4), rows_of, workers=2)
"""


@pytest.mark.slow
def test_a_sweep_that_was_killed_loses_nothing_and_repeats_nothing(tmp_path):
    script = tmp_path / "sweep.py"
    script.write_text(SWEEP.format(tests=str(pathlib.Path(__file__).parent), root=str(tmp_path)))
    process = subprocess.Popen([sys.executable, script])
    folder, until = tmp_path / "results" / "grid", time.time() + 300
    while not list(folder.glob("*.csv")):
        assert process.poll() is None and time.time() < until
        time.sleep(0.05)
    process.kill()
    process.wait()
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*.csv")}
    subprocess.run([sys.executable, script], check=True)
    after = {p: p.stat().st_mtime_ns for p in folder.glob("*.csv")}
    assert len(after) == 4 and after.items() >= before.items()
    agents = [p for p in (tmp_path / "agents").iterdir() if p.is_dir()]
    assert len(agents) == 4, "what was trained is not trained under another name"


def test_few_demonstrations_are_a_part_of_more_and_draws_differ():
    episodes = list(range(20))
    draws = [workbook.draw_few(episodes, 10, draw) for draw in range(3)]
    for draw, some in enumerate(draws):
        assert len(set(some)) == 10
        assert workbook.draw_few(episodes, 3, draw) == some[:3]
    assert len({tuple(some) for some in draws}) == 3
    with pytest.raises(DataError, match="20 demonstrations are there, 21 are wanted"):
        workbook.draw_few(episodes, 21, 0)


@pytest.mark.slow
def test_fine_tuning_begins_where_the_agent_is_and_plays_as_it_learns(tmp_path, monkeypatch):
    run, (trial, _) = Run(tmp_path, "smoke"), small_trials(2)
    folder, _ = workbook.train_agent(
        run, "start", trial.model, trial.train, workbook.prepare(run, trial.data)
    )
    agents, lasting = [], workbook.Evaluation.play

    def play(evaluation, lanes):  # the first steps of each episode are enough
        agents.append(evaluation.make_agent())
        return lasting(evaluation, lanes)

    monkeypatch.setattr(workbook.Evaluation, "play", play)
    monkeypatch.setattr(domains.metaworld, "MAX_STEPS", 6)
    tuning = workbook.FineTuning(
        "few",
        dataclasses.replace(trial.model, dropout=0.1),
        dataclasses.replace(trial.train, steps=4, warmup_steps=0, schedule="constant", seed=1),
        dataclasses.replace(
            trial.data, tasks=("metaworld/assembly",), episodes=(("metaworld", 3),)
        ),
        few=2,
        pieces=str(folder),
        start=str(folder),
        every=2,
        episodes=2,
        final=3,
    )
    metrics, played = tuning.run(run)
    assert metrics.step.tolist() == [2, 4]
    assert played.groupby(["updates", "final"])["index"].agg(list).to_dict() == {
        (2, False): [0, 1],
        (4, False): [0, 1],
        (4, True): [2, 3, 4],
    }
    assert set(played.task) == {"metaworld/assembly"}
    table = [np.asarray(a.params["embedding"]["table"]) for a in agents]
    begun = np.asarray(workbook.load_agent(folder).params["embedding"]["table"])
    moved = [np.abs(t - begun).mean() for t in table]
    assert 0 < moved[0] < moved[1] == moved[2]

    agents.clear()
    metrics, played = dataclasses.replace(tuning, few=0).run(run)
    assert not len(metrics) and played.updates.eq(0).all() and played.final.all()
    elsewhere = dataclasses.replace(tuning, start=f"/another/{folder.name}")
    assert elsewhere.key == tuning.key != dataclasses.replace(tuning, start="").key
    assert (np.asarray(agents[0].params["embedding"]["table"]) == begun).all()
    agents.clear()
    dataclasses.replace(tuning, few=0, start="").run(run)
    assert (np.asarray(agents[0].params["embedding"]["table"]) != begun).any()
    with pytest.raises(DataError, match="3 demonstrations are there, 4 are wanted"):
        workbook.run_trial(run, dataclasses.replace(tuning, few=4))


def test_rows_are_tidy(tmp_path):
    row = results.row("r", 0, 5, "all", "all", "loss", 0.5, 3)
    results.write_rows(tmp_path / "a.csv", [row])
    (back,) = results.read_rows(tmp_path / "a.csv").to_dict("records")
    assert list(back) == list(results.COLUMNS) and back["value"] == 0.5
    with pytest.raises(ValueError, match="columns differ in"):
        results.write_rows(tmp_path / "b.csv", [{"run": "r"}])
    (tmp_path / "c.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="not a result table"):
        results.read_rows(tmp_path / "c.csv")
    with pytest.raises(FileNotFoundError, match="d.csv"):
        results.read_rows(tmp_path / "d.csv")


def test_committed_rows_are_tidy():
    paths = [p for p in results.COMMITTED.glob("*.csv") if p.name != "references.csv"]
    assert paths
    for path in paths:
        frame = results.read_rows(path)
        assert frame.value.notna().all() and (frame.n > 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ()}, "there are no tasks, no imports and no documents"),
        ({"episodes": (("metaworld", 3),)}, r"no number for \['babyai'\]"),
        ({"prompt_fraction": 1.5}, "prompt_fraction"),
        ({"vocabulary_size": 50_000}, "vocabulary_size is 50000"),
        ({"bacth_tokens": 1}, "unknown key"),
    ],
)
def test_bad_data_settings_are_refused(changes, message):
    values = {"tasks": ("babyai/Open",), "episodes": (("babyai", 1),)} | changes
    with pytest.raises(ConfigError, match=message):
        DataConfig.from_dict(values)
    with pytest.raises(ConfigError, match="warmup_steps 9 must be below steps 5"):
        TrainConfig(steps=5, warmup_steps=9)


def test_duration():
    assert [duration(s) for s in (3.6, 200, 7500)] == ["4 s", "3 min 20 s", "2 h 05 min"]


# --- conversation ---------------------------------------------------------------------------------


def test_replies_end_with_their_line_and_forget_the_oldest_turns(tmp_path, monkeypatch):
    text = train_text_tokenizer(["A: hello there\nB: hi\n" * 3], tmp_path / "t.model", 300)
    network = model_config("w64d2", width=32, head_dim=8, mlp_dim=64, text_rows=1024)
    params = initial_state(network, TrainConfig(steps=2, warmup_steps=1))["params"]
    agent = Agent(network, params, text, 64)
    hot = Sampling(temperature=2.0)
    first = workbook.reply(agent, [(0, "hello")], hot, 64, 0, most=8)
    assert "\n" not in first and first == workbook.reply(agent, [(0, "hello")], hot, 64, 0, most=8)

    prompts = []

    def record(*arguments, **keywords):
        prompts.append(arguments[3][0].items[0])
        return [["hi"]]

    monkeypatch.setattr(workbook, "sample_texts", record)
    turns = [(i % 2, f"turn {i}") for i in range(9)]
    assert workbook.reply(agent, turns, hot, 64, 0, most=8) == "hi"
    (prompt,) = prompts
    assert prompt.endswith("A: turn 8\nB:") and prompt.count("\n") < 9
    assert len(text.encode(prompt)) <= 56
    with pytest.raises(ConfigError, match="the last turn does not fit 64 tokens, less 8"):
        workbook.reply(agent, [(0, "long " * 40)], hot, 64, 0, most=8)


def test_what_people_type_is_shown_as_they_typed_it():
    shown = workbook.talk_html([(0, "<b>&"), (1, "ok")])
    assert shown == "<b>you</b>: &lt;b&gt;&amp;<br><b>agent</b>: ok"
