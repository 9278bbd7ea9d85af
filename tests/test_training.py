"""Mixture, training, resuming, acting and scoring on a tiny network and real demonstrations."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import shutil

import jax
import numpy as np
import pandas as pd
import pytest
from any_spaces import AnySpaces

from gato_lib import distributed, domains, evaluation, workbook
from gato_lib import sequence as sq
from gato_lib import tokenizers as tk
from gato_lib.agent import Agent
from gato_lib.checkpoint import Checkpointer
from gato_lib.config import FINE_TUNING, ConfigError, DataConfig, TrainConfig, model_config
from gato_lib.episodes import DataError, Episode, select, stack_observations, validate
from gato_lib.mixture import (
    PAPER_WEIGHTS,
    Mixture,
    build_group,
    draw_row,
    group_batch,
    mixture_weights,
)
from gato_lib.model import modality_losses
from gato_lib.training import (
    Now,
    graph_of,
    initial_state,
    learning_rate,
    learning_rates,
    make_step,
    merge,
    optimizer,
    train,
)

NETWORK = model_config(
    "w64d2", width=32, head_dim=8, mlp_dim=64, text_rows=1024, value_rows="ordinal"
)
DATA = DataConfig(
    tasks=workbook.SMALL_TASKS,
    episodes=(("babyai", 2), ("metaworld", 2)),
    context_length=90,
    batch_tokens=180,
    validation_fraction=0.5,
    prompt_fraction=0.25,
    vocabulary_size=1024,
)
FIT = TrainConfig(steps=8, peak_lr=1e-3, warmup_steps=2, clip_norm=1.0, soft_sigma=2.0)


@pytest.fixture(scope="module")
def text(tmp_path_factory, demonstrations):
    missions = {m for e in demonstrations["babyai/GoToObj"] for m in e.observations["mission"]}
    return tk.train_text_tokenizer(missions, tmp_path_factory.mktemp("text") / "t.model", 1024)


def make_groups(text, demonstrations, config):
    out = {}
    for task, episodes in demonstrations.items():
        env = domains.make_env(task)
        tokenizer = sq.Tokenizer(env.observation_space, env.action_space, text)
        out[task.split("/")[0]] = {task: [tokenizer.episode(e) for e in episodes]}
    return [build_group(name, tasks, config) for name, tasks in out.items()]


@pytest.fixture(scope="module")
def groups(demonstrations, text):
    return make_groups(text, demonstrations, DATA)


@pytest.fixture(scope="module")
def mixture(groups):
    return Mixture(groups, DATA)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- mixture --------------------------------------------------------------------------------------


def test_batches_have_fixed_shapes_and_both_domains(mixture):
    shapes = {}
    for i in range(20):
        domain, batch, tasks = mixture[i]
        assert {t.split("/")[0] for t in tasks} == {domain}
        shapes.setdefault(domain, set()).add(tuple(x.shape for x in jax.tree.leaves(batch)))
    assert set(shapes) == {"babyai", "metaworld"}
    assert len(shapes["metaworld"]) == 1 and len(shapes["babyai"]) <= 2


def test_batch_number_is_all_it_takes(mixture, groups):
    again = Mixture(groups, DATA)
    for i in (0, 1, 7):
        assert_equal(mixture[i].batch, again[i].batch)
    straight = list(itertools.islice(mixture.iterate(), 6))
    resumed = again.iterate()
    for _ in range(3):
        next(resumed)
    saved = json.loads(json.dumps(resumed.state))
    fresh = again.iterate()
    fresh.restore(saved)
    for a, b in zip(straight[3:], fresh, strict=False):
        assert a.domain == b.domain
        assert_equal(a.batch, b.batch)
    different = Mixture(groups, dataclasses.replace(DATA, seed=1))
    assert any(not np.array_equal(mixture[i].batch.ids, different[i].batch.ids) for i in range(4))
    # The training run's own seed: other batches of the same data.
    reseeded = itertools.islice(mixture.iterate(seed=1), 6)
    assert any(
        not np.array_equal(a.batch.ids, b.batch.ids)
        for a, b in zip(straight, reseeded, strict=True)
    )


def test_weights_are_kept(groups):
    weighted = dataclasses.replace(DATA, weights=(("babyai", 1.0), ("metaworld", 3.0)))
    names = [Mixture(groups, weighted)[i].domain for i in range(40)]
    assert names.count("metaworld") == 30
    with pytest.raises(ConfigError, match=r"weights: \['atari'\], but the mixture has"):
        Mixture(groups, dataclasses.replace(DATA, weights=(("atari", 1.0),)))


def test_parallel_actions_are_zeroed_as_inputs_and_remain_targets(groups, demonstrations, text):
    config = dataclasses.replace(DATA, parallel_actions=("metaworld",))
    blanked = {g.name: g for g in make_groups(text, demonstrations, config)}
    for group in groups:
        told = group_batch(group, DATA, 3).batch
        batch = group_batch(blanked[group.name], config, 3).batch
        action = told.local == sq.ACTION_POSITION
        assert action.any()
        blank = action if group.name == "metaworld" else np.zeros_like(action)
        np.testing.assert_array_equal(batch.ids, np.where(blank, sq.NO_ID, told.ids))
        assert_equal(batch._replace(ids=told.ids), told)
    with pytest.raises(ConfigError, match=r"parallel_actions: \['atari'\], but the mixture has"):
        Mixture(groups, dataclasses.replace(DATA, parallel_actions=("atari",)))


def test_the_papers_weights():
    """Table 1, renormalised over what there is."""
    assert sum(w for _, w in PAPER_WEIGHTS.values()) == pytest.approx(99.93)
    both = dict(mixture_weights("paper", ["babyai", "metaworld"]))
    assert both["babyai"] == pytest.approx(9.06 / (9.06 + 8.96)) and sum(
        both.values()
    ) == pytest.approx(1)
    assert dict(mixture_weights("equal", ["x", "y"])) == {"x": 0.5, "y": 0.5}
    assert dict(mixture_weights("x 1, y 3", ["x", "y"])) == {"x": 0.25, "y": 0.75}
    for text in ("x 1", "x one, y 2", "x 0, y 1", "papre", "x 1, x 5, y 1", "x 1, y nan"):
        with pytest.raises(ConfigError, match="expected"):
            mixture_weights(text, ["x", "y"])
    with pytest.raises(ConfigError, match=r"no weight for \['chess'\]"):
        mixture_weights("paper", ["babyai", "chess"])


def test_a_task_may_have_a_weight_of_its_own(text, demonstrations):
    """It is drawn that often; the others of its domain share what is the domain's own."""
    easy, push, reach = "babyai/GoToObj", "metaworld/push", "metaworld/reach"
    tasks = (easy, push, reach, "metaworld/soccer")
    given = "babyai 1, metaworld 2, metaworld/push 5"
    weights = mixture_weights(given, ["babyai", "metaworld"], tasks)
    counts = (("babyai", 1), ("metaworld", 1))
    config = DataConfig(tasks=tasks, episodes=counts, weights=weights)
    assert config.domain_weights == pytest.approx({"babyai": 1 / 8, "metaworld": 7 / 8})
    assert config.task_weights([easy]) is None
    (name,) = (t for t in demonstrations if t.startswith("metaworld"))
    env = domains.make_env(name)
    tokenizer = sq.Tokenizer(env.observation_space, env.action_space, text)
    episodes = [tokenizer.episode(e) for e in demonstrations[name]]
    config = dataclasses.replace(config, context_length=90)
    group = build_group("metaworld", dict.fromkeys(tasks[1:], episodes), config)
    rows = [draw_row(group, np.random.default_rng(i))[0].task for i in range(700)]
    assert abs(rows.count(push) - 500) < 60 and abs(rows.count(reach) - 100) < 40  # 5 deviations
    assert config.task_weights(list(tasks[1:])) == pytest.approx(
        {push: 5 / 8, reach: 1 / 8, "metaworld/soccer": 1 / 8}
    )
    for text in (f"{given}, metaworld/push 1", "babyai 1, metaworld/push 5", f"{given}, {easy}x 1"):
        with pytest.raises(ConfigError, match="at most one for a task"):
            mixture_weights(text, ["babyai", "metaworld"], tasks)
    alone = dataclasses.replace(config, tasks=(easy, push))
    with pytest.raises(ConfigError, match="0 of 1 tasks of metaworld have none of their own"):
        alone.task_weights([push])


@pytest.mark.parametrize("context", [90, 1024])
def test_prompts_come_from_another_episode_and_fit(text, demonstrations, context):
    always = dataclasses.replace(DATA, context_length=context, prompt_fraction=1.0)
    for group in make_groups(text, demonstrations, always):
        (task,) = group.tasks.values()
        at, unseen = group.seq.offsets, 0
        episode = lambda token: np.searchsorted(at[task.episodes[:, 1]], token, "right")  # noqa: B023, E731
        for draw in range(60):
            held_out = bool(draw % 2)
            row = draw_row(group, np.random.default_rng(draw), held_out)
            assert sum(w.tokens for w in row) <= group.length
            assert len(row) == 1 or group.packed
            for window in row:
                assert {x for span in window.spans for x in span} <= set(at.tolist())
                first, last = window.spans[-1]
                assert (episode(first) == 1) == held_out and episode(last - 1) == episode(first)
                if len(window.spans) == 1:  # training has no other; or no whole step fits
                    continue
                (a, b), _ = window.spans
                assert held_out and episode(a) == 0 and b - a <= group.length // 2
                unseen += 1
        assert unseen > 20


def test_prompts_of_ends_alone(text, demonstrations):
    """`prompt_ends`: all of them, or none but by chance."""
    for ends, least, most in ((1.0, 1.0, 1.0), (0.0, 0.0, 0.4)):
        config = dataclasses.replace(DATA, prompt_fraction=1.0, prompt_ends=ends)
        group = make_groups(text, demonstrations, config)[1]
        (task,) = group.tasks.values()
        last = group.seq.offsets[task.seen[0, 1]]
        rows = [draw_row(group, np.random.default_rng(i), True) for i in range(80)]
        prompts = [w.spans[0] for row in rows for w in row if len(w.spans) > 1]
        assert len(prompts) > 20
        assert least <= np.mean([b == last for _, b in prompts]) <= most


@pytest.mark.parametrize("prompted", [0.0, 1.0])
def test_every_step_is_seen_live(text, demonstrations, prompted):
    """With a prompt in front or not; the last step, which earns the reward, nearly as often."""
    config = dataclasses.replace(DATA, prompt_fraction=prompted, validation_fraction=0.0)
    for group in make_groups(text, demonstrations, config):
        (task,) = group.tasks.values()
        at, live = group.seq.offsets, collections.Counter()
        for draw in range(6000):
            for window in draw_row(group, np.random.default_rng(draw)):
                assert len(window.spans) == 1 + prompted
                first, last = np.searchsorted(at, window.spans[-1])
                live.update(range(first, last))
        for begin, end in task.episodes:
            steps = [live[s] for s in range(begin, end)]
            assert min(steps[0], steps[-1]) > 0.4 * np.median(steps)
            assert min(steps) > 0


def test_short_episodes_are_packed(text, demonstrations):
    """Padding stays under a tenth where episodes are far shorter than the context."""
    long = dataclasses.replace(DATA, context_length=1024, batch_tokens=4096, rows_multiple=4)
    by_name = {g.name: g for g in make_groups(text, demonstrations, long)}
    baby = by_name["babyai"]
    step = np.diff(baby.seq.offsets).max()
    assert baby.packed and 1024 - step < baby.length <= 1024 and baby.batch_size == 4
    for row in Mixture(list(by_name.values()), long).describe():
        assert row["padding"] < 0.1, row
    batch = group_batch(baby, long, 3).batch
    assert batch.segments.max() > 0
    for ids, segments in zip(batch.local, batch.segments, strict=True):
        assert ((ids == sq.PADDING_POSITION) == (segments == -1)).all()
        inside = segments[segments >= 0]
        assert (np.diff(inside) >= 0).all() and set(np.diff(inside)) <= {0, 1}


def test_processes_build_the_rows_of_one_batch(groups, mixture):
    """Two processes of two devices: together the batch that one process builds."""
    data = dataclasses.replace(DATA, rows_multiple=4)
    for group in groups:
        group = dataclasses.replace(group, batch_size=8)
        whole = group_batch(group, data, 5).batch
        owners = ((0, 2), (1, 3))  # parts of a host need not be neighbours
        parts = [
            group_batch(group, data, 5, distributed.Placement(owners, 4, p)).batch for p in (0, 1)
        ]
        slots = len(parts[0].patches) // 2
        patches = [parts[p].patches[i * slots :][:slots] for i in (0, 1) for p in (0, 1)]
        patches = np.concatenate(patches)
        for p, part in enumerate(parts):
            rows = np.concatenate([np.arange(2 * o, 2 * o + 2) for o in owners[p]])
            for name in ("ids", "local", "rows", "cols", "target_ids", "target_weights"):
                np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[rows])
            image = whole.patch[rows] < len(whole.patches)
            np.testing.assert_array_equal(part.patch == len(patches), ~image)
            if image.any():  # a row's patches lie in its own part: none is fetched from another
                part_of_row = np.repeat(owners[p], 2)[:, None]
                assert (part.patch // slots == part_of_row)[image].all()
            np.testing.assert_array_equal(
                patches[part.patch[image]], whole.patches[whole.patch[rows][image]]
            )
        with pytest.raises(ConfigError, match="a batch of 8 rows does not divide over 3 places"):
            group_batch(group, data, 5, distributed.Placement(((0, 1, 2),), 3, 0))


def test_a_timestep_that_does_not_fit_is_refused(groups, demonstrations, text):
    env = domains.make_env("metaworld/drawer-close")
    tokenizer = sq.Tokenizer(env.observation_space, env.action_space, text)
    tokens = [tokenizer.episode(demonstrations["metaworld/drawer-close"][0])]
    with pytest.raises(ValueError, match="a timestep has 44 tokens, context_length is 40"):
        build_group("metaworld", {"t": tokens}, dataclasses.replace(DATA, context_length=40))


# --- training -------------------------------------------------------------------------------------


def last(iterator):
    (item,) = collections.deque(iterator, maxlen=1)
    return item


def test_resuming_equals_running_straight(tmp_path, mixture):
    kwargs = {"report_every": 3, "save_every": 2}  # reports at 2, 3, 4, 6 and 8
    reports = [(m, p) for m, p in train(NETWORK, FIT, mixture, None, **kwargs)]
    straight = reports[-1][1]
    cut = Checkpointer(tmp_path, {"a": 1})
    steps = train(NETWORK, FIT, mixture, cut, **kwargs)
    next(steps)
    assert next(steps)[0].step == 3  # three steps done, the checkpoint of step 2 on disk
    steps.close()
    cut.close()
    again = Checkpointer(tmp_path, {"a": 1})
    assert again.latest() == 2
    repeated = [(m, p) for m, p in train(NETWORK, FIT, mixture, again, **kwargs)]
    again.close()
    resumed = repeated[-1][1]
    assert [m.step for m, _ in reports] == [2, 3, 4, 6, 8]
    assert [bool(m.validation_loss) for m, _ in reports] == [True, False, True, True, True]
    for (a, _), (b, _) in zip(reports[1:], repeated, strict=True):
        for field in ("step", "loss", "modality_loss", "validation_loss", "tokens", "padding"):
            assert getattr(a, field) == getattr(b, field), field
    assert_equal(straight, resumed)


def test_what_a_report_says(mixture):
    metrics, params = last(train(NETWORK, FIT, mixture, report_every=8))
    model = merge(graph_of(NETWORK), params)
    assert set(metrics.loss) == {"babyai", "metaworld"}
    assert set(metrics.modality_loss) == set(sq.MODALITIES)
    assert metrics.tokens == sum(sq.count_tokens(mixture[i].batch) for i in range(8))
    assert 0 <= metrics.padding < 1 and 0 <= metrics.data_wait < 1 and metrics.flops_share > 0
    sums = collections.Counter()
    for sample in mixture.validation():
        loss, count = modality_losses(model, sample.batch, soft_sigma=FIT.soft_sigma)
        sums[sample.domain, "loss"] += float(loss.sum())
        sums[sample.domain, "count"] += float(count.sum())
    for domain, value in metrics.validation_loss.items():
        assert value == pytest.approx(sums[domain, "loss"] / sums[domain, "count"], rel=1e-5)
    assert set(metrics.validation_loss) == {"babyai", "metaworld"}


def test_modalities_of_targets_by_hand(mixture):
    for i in range(4):
        domain, batch, _ = mixture[i]
        kinds = batch.target_kinds[batch.target_weights > 0]
        ids = batch.target_ids[batch.target_weights > 0]
        if domain == "metaworld":
            assert set(kinds) == {2}
        else:
            assert set(kinds) == {0, 1}
            assert (ids[kinds == 1] < 7).all(), "BabyAI has seven actions"


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_eight_devices_train_like_one(shape, text, demonstrations):
    """Losses over five steps to 1e-5, whatever the mesh; parameters and moments are split."""
    data = dataclasses.replace(DATA, batch_tokens=800, rows_multiple=8)
    mixture = Mixture(make_groups(text, demonstrations, data), data)
    network = dataclasses.replace(NETWORK, stochastic_depth=0.1, dropout=0.1)
    fit = dataclasses.replace(FIT, steps=5)
    losses = {}
    for mesh in (None, distributed.make_mesh(*shape)):
        reports = train(network, fit, mixture, mesh=mesh, report_every=1, save_every=5)
        losses[mesh] = [(m.loss, m.gradient_norm, m.validation_loss) for m, _ in reports]
    for one, eight in zip(*losses.values(), strict=True):
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
            assert abs(a - b) < 1e-5
    if shape == (1, 8, 1):
        state = initial_state(network, fit, distributed.make_mesh(*shape))
        arrays = jax.tree.leaves(state)
        total = sum(x.nbytes for x in arrays)
        local = sum(x.addressable_shards[0].data.nbytes for x in arrays)
        (table,) = [x for x in arrays if x.shape == (2049, 32)][:1]
        assert table.addressable_shards[0].data.shape == (2049, 4)
        assert local < total / 2, "an eighth each, and small arrays whole (most, at this size)"


@pytest.mark.slow
def test_a_run_goes_on_with_another_mesh(tmp_path, text, demonstrations):
    data = dataclasses.replace(DATA, batch_tokens=800, rows_multiple=8)
    mixture = Mixture(make_groups(text, demonstrations, data), data)
    straight = [m.loss for m, _ in train(NETWORK, FIT, mixture, report_every=1)]
    resumed = []
    for mesh, stop in ((distributed.make_mesh(2, 4, 1), 4), (distributed.make_mesh(4, 1, 2), 8)):
        checkpointer = Checkpointer(tmp_path, {})
        for metrics, _ in train(
            NETWORK, FIT, mixture, checkpointer, mesh=mesh, report_every=1, save_every=4
        ):
            resumed.append(metrics.loss)
            if metrics.step == stop + 1:
                resumed.pop()
                break
        checkpointer.close()
    for a, b in zip(straight, resumed, strict=True):
        assert {k: pytest.approx(v, abs=1e-5) for k, v in a.items()} == b


def test_meshes_that_do_not_fit():
    assert dict(distributed.parse_mesh("2, -1, 1").shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert distributed.parse_mesh("1, 2, 1").size == 2, "the first two"
    for text in ("9, 1, 1", "-1, -1, 1", "0, 8, 1", "3, -1, 1"):
        with pytest.raises(ConfigError, match="does not fit 8 devices"):
            distributed.parse_mesh(text)
    with pytest.raises(ConfigError, match="expected three whole numbers"):
        distributed.parse_mesh("8")


def test_the_sharding_table_names_every_large_parameter():
    """Of the paper's network nothing above a millionth of the parameters stays whole."""
    for size in ("1.18B", "364M", "79M"):
        model = model_config(size)
        state = jax.eval_shape(lambda m=model: initial_state(m, TrainConfig()))
        used = set()
        for path, leaf in jax.tree.leaves_with_path(state["params"]):
            axes = distributed.parameter_axes(path)
            used |= {e for e, a in distributed.PARAMETERS.items() if a == axes and axes}
            if not axes:
                assert leaf.size <= 400_000, path
        assert set(distributed.PARAMETERS.values()) == {distributed.PARAMETERS[e] for e in used}


def test_the_best_checkpoint_is_kept(tmp_path):
    state = initial_state(NETWORK, FIT)
    keeper = Checkpointer(tmp_path, {}, keep=2)
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5), (5, 4.0)):
        keeper.save(step, state, {"step": step}, loss)
    keeper.finish()
    assert (keeper.latest(), keeper.best()) == (5, 2)
    assert sorted(int(p.name) for p in (tmp_path / "steps").iterdir()) == [2, 4, 5]
    assert keeper.restore(state, 2)[2] == {"step": 2}
    with pytest.raises(FileNotFoundError, match="no checkpoint 3"):
        keeper.restore(state, 3)
    keeper.close()


def test_other_settings_do_not_overwrite_a_run(tmp_path):
    Checkpointer(tmp_path, {"a": 1}).close()
    with pytest.raises(ValueError, match="other settings"):
        Checkpointer(tmp_path, {"a": 2})


def test_a_checkpoint_cut_short_is_ignored(tmp_path):
    state = initial_state(NETWORK, FIT)
    one = Checkpointer(tmp_path, {})
    one.save(1, state, {"tokens": 5})
    one.close()
    left = tmp_path / "steps" / "2.orbax-checkpoint-tmp"
    left.mkdir()
    (left / "half").write_text("x")
    again = Checkpointer(tmp_path, {})
    step, restored, counters = again.restore(state)
    assert (step, counters) == (1, {"tokens": 5}) and not left.exists()
    assert again.best() is None
    assert_equal(state, restored)
    again.close()


class Fake:
    """Stands for a mixture that gives chosen samples."""

    def __init__(self, sample):
        self._sample = sample

    def iterate(self, seed, placement):
        fake = self

        class Endless:
            state = {}  # noqa: RUF012
            number = -1

            def __next__(self):
                self.number += 1
                return fake._sample(self.number)

        return Endless()

    def validation(self, placement):
        return []


def test_training_overfits_one_batch(mixture):
    fit = dataclasses.replace(FIT, steps=300, peak_lr=5e-3, soft_sigma=0.0, weight_decay=0.0)
    still = dataclasses.replace(NETWORK, stochastic_depth=0.0)
    metrics, _ = last(train(still, fit, Fake(lambda i: mixture[0]), report_every=10))
    (loss,) = metrics.loss.values()
    assert loss < 0.01


def test_fine_tuning_is_adam_at_a_constant_rate():
    """App. E: no decay, no warm-up; the first step moves every weight by the rate."""
    params = {"w": np.array([1.0, -2.0, 3.0], np.float32)}
    (rate, *others) = learning_rates(dataclasses.replace(FINE_TUNING, steps=3))
    assert others == [rate, rate]
    tx = optimizer(FINE_TUNING, rate)
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update({"w": np.array([0.1, -5.0, 2.0], np.float32)}, state, params)
        np.testing.assert_allclose(updates["w"], [-1e-5, 1e-5, -1e-5], rtol=1e-3)
    slow = dataclasses.replace(FINE_TUNING, warmup_steps=10, start_lr=0.0)
    np.testing.assert_allclose(learning_rates(slow)[[0, 5, 10]], [0.0, 5e-6, 1e-5], atol=1e-12)
    tx = optimizer(slow, learning_rates(slow)[0])
    updates, _ = tx.update({"w": np.ones(3, np.float32)}, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], 0.0, atol=1e-9)


def test_trainings_of_other_rates_share_what_is_compiled(mixture):
    """Peers compile for every schedule: a sweep over rates then spends its time in XLA."""
    other = dataclasses.replace(FIT, steps=99, peak_lr=5e-2, warmup_steps=7, seed=3)
    step = make_step(NETWORK, FIT)
    assert make_step(NETWORK, other) is step
    assert make_step(NETWORK, dataclasses.replace(FIT, weight_decay=0.5)) is not step
    compiled, moved = step._cache_size(), []
    for fit in (FIT, other):
        for at in (0, 1, 2):
            state = initial_state(NETWORK, FIT)
            before = state["params"]["embedding"]["table"].copy()
            now = Now(np.int32(at), learning_rates(fit)[at])
            state, _ = step(state, now, mixture[0].batch)
            moved.append(np.abs(state["params"]["embedding"]["table"] - before).max())
    assert step._cache_size() <= compiled + 1
    rates = [learning_rates(fit)[at] for fit in (FIT, other) for at in (0, 1, 2)]
    np.testing.assert_allclose(moved, rates, rtol=0.15)  # Adam's first step, and some decay


def test_a_rate_that_starts_anew():
    """By hand: peak 1, from 0.2 in two updates, down to 0.1; the cosine's middle is 0.55."""
    once = TrainConfig(steps=6, peak_lr=1.0, start_lr=0.2, warmup_steps=2)
    cycle = [0.2, 0.6, 1.0, 0.868198, 0.55, 0.231802]
    rates = [float(learning_rate(once)(i)) for i in range(7)]
    np.testing.assert_allclose(rates, [*cycle, 0.1], rtol=1e-5)
    twice = dataclasses.replace(once, steps=12, restarts=[6])
    rates = [float(learning_rate(twice)(i)) for i in range(13)]
    np.testing.assert_allclose(rates, [*cycle, *cycle, 0.1], rtol=1e-5)
    assert TrainConfig.from_dict(json.loads(json.dumps(twice.to_dict()))) == twice
    assert TrainConfig.from_dict({"steps": 6, "warmup_steps": 2}).restarts == ()


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"restarts": (6, 4)}, "must rise"),
        ({"restarts": (12,)}, "must rise, between 0 and steps 12"),
        ({"restarts": (0,)}, "must rise"),
        ({"restarts": (5.5,)}, "must be whole numbers"),
        ({"restarts": (1,)}, "warmup_steps 2 must be below steps 12, and below"),
        ({"restarts": (6,), "schedule": "constant"}, "a constant rate has no restarts"),
    ],
)
def test_a_rate_cannot_start_anew_there(changed, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**{"steps": 12, "warmup_steps": 2} | changed)


@pytest.mark.slow
def test_trained_on_after_a_restart_equals_a_straight_run(tmp_path, mixture):
    """What was trained to its end is a checkpoint of the training with a restart there."""
    short = Checkpointer(tmp_path / "short", {})
    list(train(NETWORK, FIT, mixture, short, report_every=4, save_every=8))
    short.close()
    on = dataclasses.replace(FIT, steps=12, restarts=(8,))
    *_, (_, straight) = train(NETWORK, on, mixture, report_every=4)
    shutil.copytree(tmp_path / "short" / "steps", tmp_path / "long" / "steps")
    longer = Checkpointer(tmp_path / "long", {})
    reports = list(train(NETWORK, on, mixture, longer, report_every=4))
    longer.close()
    assert [m.step for m, _ in reports] == [12]
    assert_equal(straight, reports[-1][1])


def test_dropout_acts_in_training_only(mixture):
    _, batch, _ = mixture[0]
    dropped = dataclasses.replace(NETWORK, stochastic_depth=0.0, dropout=0.5)
    params = initial_state(dropped, FIT)["params"]
    hidden = lambda config, key: np.asarray(  # noqa: E731
        merge(graph_of(config), params).hidden(batch, key)
    )
    none = dataclasses.replace(dropped, dropout=0.0)
    plain = hidden(none, None)
    assert_equal(plain, hidden(dropped, None))
    assert_equal(plain, hidden(none, jax.random.key(0)))
    assert np.abs(plain - hidden(dropped, jax.random.key(0))).max() > 0.01


def test_a_loss_that_is_not_finite_stops_with_its_source(tmp_path, mixture):
    def poisoned(i):
        sample = mixture[i]
        weights = sample.batch.target_weights * (np.nan if i == 5 else 1.0)
        return sample._replace(batch=sample.batch._replace(target_weights=weights.astype("f4")))

    keeper = Checkpointer(tmp_path, {})
    with pytest.raises(
        FloatingPointError,
        match=r"loss is nan at step 5, in a batch of domain (\w+), tasks \1/[\w-]+$",
    ):
        last(train(NETWORK, FIT, Fake(poisoned), keeper, report_every=4, save_every=2))
    keeper.finish()
    assert keeper.latest() == 4, "the last good checkpoint stays"
    keeper.close()


# --- scoring --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("discrete_range", ["shared", "own"])
def test_any_gymnasium_spaces_train_and_act(text, discrete_range):
    """Random episodes of every kind of space: tokens, updates, and legal actions."""
    observations, actions = AnySpaces.observation_space, AnySpaces.action_space
    observations.seed(0), actions.seed(0)
    recorded = [stack_observations([s.sample() for _ in range(5)]) for s in (observations, actions)]
    four = stack_observations([actions.sample() for _ in range(4)])
    episode = Episode("t/x", recorded[0], four, four, np.zeros(4), True, 0)
    validate(episode, observations, actions, "here")
    network = dataclasses.replace(NETWORK, discrete_range=discrete_range)
    tokenizer = sq.Tokenizer(observations, actions, text, discrete_range)
    tokens = tokenizer.episode(episode)
    for step, ids in enumerate(tokenizer.action_spec.encode(four)):
        assert tokens.ids[tokens.offsets[step + 1] - 5 : tokens.offsets[step + 1]].tolist() == [
            *ids
        ]
    own = (tokens.ids >= 33025).sum()
    assert own == (4 * (2 + 2 + 3) if discrete_range == "own" else 0)
    group = build_group("t", {"t/x": [tokens]}, dataclasses.replace(DATA, context_length=60))
    mixture = Mixture([group], dataclasses.replace(DATA, discrete_range=discrete_range))
    metrics, params = last(train(network, FIT, mixture))
    assert metrics.loss["t"] < 12
    agent = Agent(network, params, text, 60, continuous="mean")
    player = agent.player(tokenizer, [0])
    for step in range(4):
        (action,) = player.act([select(recorded[0], step)])
        assert actions.contains(action), action


def test_normalized_score():
    assert evaluation.normalized_score(5.0, 0.0, 10.0) == 0.5
    assert evaluation.normalized_score(-5.0, 0.0, 10.0) == -0.5
    for random, expert in ((1.0, 1.0), (2.0, 1.0)):
        with pytest.raises(ValueError, match="no scale"):
            evaluation.normalized_score(3.0, random, expert)


def test_score_table_and_domain_means():
    played = pd.DataFrame(
        {
            "task": ["babyai/Open"] * 4,
            "score": [0.0, 0.5, 0.5, 1.0],
            "success": [False, True, True, True],
        }
    )
    references = pd.DataFrame(
        {"random": [0.1], "expert": [0.9], "sound": [True], "weak": [False]}, index=["babyai/Open"]
    )
    (row,) = evaluation.score_table(played, references).to_dict("records")
    assert row["normalized"] == pytest.approx(0.5) and row["n"] == 4
    assert row["low"] < 0.5 < row["high"]
    for no in (references.assign(sound=False, random=0.9), references.assign(weak=True)):
        (row,) = evaluation.score_table(played, no).to_dict("records")
        assert np.isnan([row["normalized"], row["low"], row["high"]]).all() and row["score"] == 0.5
        assert evaluation.domain_means(played, no).empty
        assert not evaluation.normalized_episodes(played, no)
    (mean,) = evaluation.domain_means(played, references).to_dict("records")
    assert mean["domain"] == "babyai" and mean["mean"] == pytest.approx(0.5) and mean["n"] == 1
    low, high = evaluation.bootstrap([np.ones(5), np.zeros(5)])
    assert low == high == 0.5


def test_difference_is_by_episode():
    played = pd.DataFrame(
        {
            "task": ["babyai/Open"] * 3 + ["metaworld/reach"] * 3,
            "seed": 0,
            "index": [0, 1, 2] * 2,
            "score": [0.1, 0.5, 0.9, 0.0, 1.0, 0.0],
        }
    )
    references = pd.DataFrame(
        {"random": [0.1, 0.0], "expert": [0.9, 1.0], "sound": [True, True], "weak": False},
        index=["babyai/Open", "metaworld/reach"],
    )
    better = played.assign(score=played.score + np.repeat([0.08, 1.0, 0.0], [3, 1, 2]))[::-1]
    table = evaluation.difference(better, played, references).set_index("domain")
    assert table["mean"].to_dict() == pytest.approx(
        {"all": (0.1 + 1 / 3) / 2, "babyai": 0.1, "metaworld": 1 / 3}
    )
    assert table.low["babyai"] == pytest.approx(0.1) == table.high["babyai"]
    assert table.low["metaworld"] == 0.0 and table.n.to_dict()["all"] == 2
    for no in (references.assign(sound=[False, True]), references.assign(weak=[True, False])):
        assert set(evaluation.difference(better, played, no).domain) == {"all", "metaworld"}
    with pytest.raises(ValueError, match="different episodes"):
        evaluation.difference(better.iloc[1:], played, references)


def test_episodes_become_rows_and_back():
    played = pd.DataFrame(
        {
            "task": ["a/x", "a/x", "b/y"],
            "seed": 3,
            "index": [0, 10, 0],
            "score": [0.5, -1.0, 2.0],
            "success": [True, False, True],
            "steps": [7, 500, 1],
        }
    )
    rows = pd.concat(
        [
            played.assign(
                metric=[f"{m} {i}" for i in played["index"]], value=played[m].astype(float)
            )
            for m in ("steps", "score", "success")
        ]
    )
    pd.testing.assert_frame_equal(evaluation.episodes_of(rows), played)
    with pytest.raises(DataError, match="episode 0 of b/y, seed 3: score"):
        evaluation.episodes_of(rows[:-1])


def test_references_measured_now_agree_with_the_committed_ones():
    from gato_lib import results

    path = results.COMMITTED / "references.csv"
    committed = evaluation.read_references(path)
    assert set(committed.index) <= set(domains.TASKS) and (committed.n >= 20).all()
    task = "babyai/GoToObj"
    for policy in ("random", "expert"):
        now = evaluation._reference(task, policy, 20, 1)
        was, se = committed.loc[task, [policy, f"{policy}_se"]]
        assert abs(now["mean"] - was) < 4 * np.hypot(se, now["standard_error"]) + 1e-9
