"""Behaviour cloning with the masked loss (paper 2.3, App. D), on any number of devices."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gato_lib import distributed
from gato_lib.checkpoint import Checkpointer
from gato_lib.config import ModelConfig, TrainConfig
from gato_lib.distributed import ALONE, Placement
from gato_lib.mixture import Mixture, Sample
from gato_lib.model import Gato, forward_flops, modality_losses
from gato_lib.sequence import MODALITIES, PADDING_POSITION, Batch


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """The rate after so many updates: linear warm-up, cosine decay (App. D) or constant (App. E).

    Up to the first of `config.restarts` it is that of a training which ends there.
    """
    start = min(config.start_lr, config.peak_lr)
    if config.schedule == "cosine":
        cycles = [
            optax.warmup_cosine_decay_schedule(
                init_value=start,
                peak_value=config.peak_lr,
                warmup_steps=config.warmup_steps,
                decay_steps=end - begin,
                end_value=config.peak_lr * config.final_lr_factor,
            )
            for begin, end in itertools.pairwise((0, *config.restarts, config.steps))
        ]
        return optax.join_schedules(cycles, config.restarts)
    if config.warmup_steps:
        return optax.linear_schedule(start, config.peak_lr, config.warmup_steps)
    return optax.constant_schedule(config.peak_lr)


def learning_rates(config: TrainConfig) -> np.ndarray:
    """`learning_rate` of every update, float32 (steps,)."""
    return np.asarray(jax.jit(jax.vmap(learning_rate(config)))(np.arange(config.steps)), np.float32)


def optimizer(config: TrainConfig, rate: Any) -> optax.GradientTransformation:
    """AdamW at a rate, gradients clipped where `clip_norm` says so."""
    adamw = optax.adamw(
        lambda _: rate,  # as a schedule: checkpoints hold its count of updates
        config.beta1,
        config.beta2,
        config.epsilon,
        weight_decay=config.weight_decay,
    )
    if config.clip_norm:
        return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
    return adamw


@functools.lru_cache(maxsize=64)
def graph_of(model: ModelConfig) -> Any:
    """The network's graph definition, without parameters."""
    shell = nnx.eval_shape(lambda: Gato(model, rngs=nnx.Rngs(0)))
    return nnx.split(shell, nnx.Param)[0]


def initial_state(
    model: ModelConfig, config: TrainConfig, mesh: Mesh | None = None
) -> dict[str, Any]:
    """{"params", "opt"} at step 0, plain pytrees of arrays; on a mesh made where they belong."""

    def make() -> dict[str, Any]:
        _, params = nnx.split(Gato(model, rngs=nnx.Rngs(config.seed)), nnx.Param)
        params = nnx.to_pure_dict(params)
        return {"params": params, "opt": optimizer(config, 0.0).init(params)}

    if mesh is None or mesh.size == 1:
        return make()
    shardings = distributed.state_shardings(jax.eval_shape(make), mesh)
    with jax.set_mesh(mesh):
        return jax.jit(make, out_shardings=shardings)()


def merge(graph: Any, params: Any) -> Gato:
    """A model from its graph definition and pure parameters."""
    return nnx.merge(graph, nnx.State(params))


def _placed(params: Any, like: Any) -> Any:
    """Copies of `params` where the arrays of `like` are; raises ValueError for other shapes."""
    given, wanted = (
        {jax.tree_util.keystr(k): v.shape for k, v in jax.tree.leaves_with_path(tree)}
        for tree in (params, like)
    )
    if given != wanted:
        differ = sorted(k for k in given.keys() | wanted.keys() if given.get(k) != wanted.get(k))
        raise ValueError(f"the parameters to start from are another network's: {differ[:3]} differ")
    return jax.tree.map(
        lambda new, own: jax.device_put(jnp.array(new, own.dtype), own.sharding), params, like
    )


class StepReport(NamedTuple):
    """What an update returns, whole on every device.

    Attributes:
      loss_sums: (3,), sums of -log p by `MODALITIES`. counts: (3,), numbers of targets.
      gradient_norm: global, before clipping. tokens: of the batch, padding not counted.
    """

    loss_sums: jax.Array
    counts: jax.Array
    gradient_norm: jax.Array
    tokens: jax.Array


class Now(NamedTuple):
    """What tells one update from another, besides its batch.

    Attributes:
      step: updates done before it. rate: its learning rate. seed: of dropout and stochastic depth.
    """

    step: Any = np.int32(0)
    rate: Any = np.float32(0.0)
    seed: Any = np.int32(0)


def make_step(model: ModelConfig, config: TrainConfig, mesh: Mesh | None = None):
    """The jitted update: (state, Now, batch) -> (state, StepReport).

    Trainings that differ in their rates, number of updates or seed share it, and what is compiled.
    With a mesh, call and lower it inside `jax.set_mesh(mesh)`.
    """
    named = ("beta1", "beta2", "epsilon", "weight_decay", "clip_norm", "soft_sigma")
    return _kept_step(model, TrainConfig(**{f: getattr(config, f) for f in named}), mesh)


def _new_step(model: ModelConfig, config: TrainConfig, mesh: Mesh | None):
    graph = graph_of(model)

    def step_fn(state, now, batch):
        key = jax.random.fold_in(jax.random.key(now.seed), now.step)

        def loss_fn(params):
            sums, counts = modality_losses(merge(graph, params), batch, key, config.soft_sigma)
            return sums.sum() / jnp.maximum(counts.sum(), 1.0), (sums, counts)

        (_, report), grads = jax.value_and_grad(loss_fn, has_aux=True)(state["params"])
        tx = optimizer(config, now.rate)
        updates, opt = tx.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        tokens = (batch.local != PADDING_POSITION).sum()
        report = StepReport(*report, optax.tree.norm(grads), tokens)
        state = {"params": params, "opt": opt}
        if mesh is not None:
            state = jax.lax.with_sharding_constraint(
                state, distributed.state_shardings(state, mesh)
            )
            report = jax.lax.with_sharding_constraint(report, NamedSharding(mesh, PartitionSpec()))
        return state, report

    return jax.jit(step_fn, donate_argnums=0)


_kept_step = functools.lru_cache(maxsize=16)(_new_step)


@functools.lru_cache(maxsize=16)
def make_validation(model: ModelConfig, soft_sigma: float, mesh: Mesh | None = None):
    """Jitted (params, batch) -> sum of -log p and number of targets."""
    graph = graph_of(model)

    def validate(params, batch):
        both = modality_losses(merge(graph, params), batch, None, soft_sigma)
        return jnp.stack(both).sum(axis=1)

    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.jit(validate, out_shardings=whole)


def abstract_batch(
    sequences: int, length: int, targets: int, patches: int = 0, packed: bool = False
) -> Batch:
    """Shapes of a batch with so many targets a sequence and distinct patches in all."""
    array = jax.ShapeDtypeStruct
    grid, slots = array((sequences, length), np.int32), array((sequences, targets), np.int32)
    return Batch(
        ids=grid,
        local=grid,
        patch=grid,
        rows=grid,
        cols=grid,
        patches=array((patches, 16, 16, 3), np.uint8),
        target_positions=slots,
        target_ids=slots,
        target_weights=array((sequences, targets), np.float32),
        target_kinds=slots,
        segments=grid if packed else None,
    )


def lower_step(model: ModelConfig, config: TrainConfig, batch: Batch, mesh: Mesh) -> Any:
    """The update traced for a mesh, from shapes alone: nothing is allocated, no device is needed.

    It is always traced anew: 15 replaces parts of the model. `.compile()` then says what a device
    would hold and exchange (`memory_analysis`, `as_text`).
    """
    state = jax.eval_shape(lambda: initial_state(model, config))
    put = lambda tree, shardings: jax.tree.map(  # noqa: E731
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )
    state = put(state, distributed.state_shardings(state, mesh))
    batch = put(batch, distributed.batch_shardings(batch, mesh))
    with jax.set_mesh(mesh):
        return _new_step(model, config, mesh).lower(state, Now(), batch)


# --- what a run reports ---------------------------------------------------------------------------


@dataclasses.dataclass
class Metrics:
    """What `train` reports: averages since the last report.

    Attributes:
      loss: by domain, nats a target. modality_loss: by `MODALITIES`, those that had targets.
      validation_loss: by domain, on held-out episodes; empty where this step was not validated.
      gradient_norm: global norm, before clipping.
      tokens: seen so far, padding not counted. tokens_per_second: likewise.
      flops_share: of the peak of a matrix product measured at the start (model FLOPs utilisation).
      data_wait: share of the time spent waiting for batches. padding: share of tokens.
    """

    step: int
    loss: dict[str, float]
    modality_loss: dict[str, float]
    validation_loss: dict[str, float]
    gradient_norm: float
    tokens: int
    tokens_per_second: float
    flops_share: float
    seconds_left: float
    data_wait: float
    padding: float


@functools.cache
def matmul_peak(dtype: str = "float32", side: int = 0) -> float:
    """FLOP/s of a product of two square matrices on one device, the best of several."""
    device = jax.local_devices()[0]
    cpu = device.platform == "cpu"
    side = side or (1024 if cpu else 8192)
    x = jax.device_put(jnp.ones((side, side), dtype), device)
    product = jax.jit(jnp.dot)
    product(x, x).block_until_ready()
    best = math.inf
    for _ in range(8):
        begin = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - begin)
    return 2.0 * side**3 / best


def step_flops(model: ModelConfig, batch: Batch) -> float:
    """Floating-point operations of an update's matrix products (`model.forward_flops`).

    What is recomputed to save memory does not count.
    """
    b, t = batch.ids.shape
    forward = forward_flops(model, b, t, batch.target_ids.size, batch.patches.shape[0])
    return 3.0 * sum(forward.values())


class _Tally:
    """Sums over the steps since the last report. Arrays stay on their devices until `read`."""

    def __init__(self, tokens: int = 0):
        self.tokens = tokens  # of the whole run, up to the last report
        self.size = 0  # tokens since then, with padding
        self.waited = self.flops = 0.0
        self.pending: list[tuple[str, tuple[str, ...], StepReport]] = []

    def add(self, sample: Sample, size: int, flops: float, report: StepReport) -> None:
        self.size, self.flops = self.size + size, self.flops + flops
        self.pending.append((sample.domain, sample.tasks, report))

    def read(self, done: int) -> None:
        """Fetch what is pending.

        Raises FloatingPointError naming the first step that is not finite, and its batch.
        """
        reports = jax.device_get([report for _, _, report in self.pending])
        for offset, ((domain, tasks, _), report) in enumerate(
            zip(self.pending, reports, strict=True)
        ):
            report = StepReport(*(np.asarray(x, np.float64) for x in report))
            self.pending[offset] = (domain, tasks, report)
            for what, value in (
                ("loss", report.loss_sums.sum()),
                ("gradient norm", report.gradient_norm),
            ):
                if not np.isfinite(value):
                    step = done - len(self.pending) + offset
                    raise FloatingPointError(
                        f"{what} is {value} at step {step}, in a batch of domain {domain}, tasks "
                        f"{', '.join(tasks)}"
                    )

    @property
    def seen(self) -> int:
        """Tokens since the last report, padding not counted."""
        return int(sum(report.tokens for _, _, report in self.pending))

    def losses(self) -> tuple[dict[str, float], dict[str, float], float]:
        """Loss by domain (mean over batches), by modality (over targets), and gradient norm."""
        domains: dict[str, list[float]] = {}
        sums, counts = np.zeros(len(MODALITIES)), np.zeros(len(MODALITIES))
        for domain, _, report in self.pending:
            loss = report.loss_sums.sum() / max(report.counts.sum(), 1.0)
            domains.setdefault(domain, []).append(float(loss))
            sums, counts = sums + report.loss_sums, counts + report.counts
        return (
            {k: float(np.mean(v)) for k, v in sorted(domains.items())},
            {m: float(sums[i] / counts[i]) for i, m in enumerate(MODALITIES) if counts[i]},
            float(np.mean([report.gradient_norm for _, _, report in self.pending])),
        )


# --- the run --------------------------------------------------------------------------------------


def train(
    model: ModelConfig,
    config: TrainConfig,
    mixture: Mixture,
    checkpointer: Checkpointer | None = None,
    *,
    mesh: Mesh | None = None,
    report_every: int = 100,
    save_every: int = 1000,
    params: Any = None,
) -> Iterator[tuple[Metrics, Any]]:
    """Train, yielding (metrics, params) every `report_every` steps, at every save and at the end.

    The parameters are given away to the next step: copy what is to outlive it. A save follows its
    report: who stops at the last report loses the last checkpoint.

    `mesh` spreads parameters and batches over devices and processes (`distributed`); without it
    everything is on one device. `params`, those of another training of the same network, are
    started from in place of random ones. Every `save_every` steps, and at the end, the run is
    validated on held-out episodes and, with a checkpointer, saved. It goes on from the latest
    checkpoint, on whatever mesh; on one device the result does not depend on where a run was cut.
    Raises ValueError for the parameters of another network, and FloatingPointError at the next
    report where a loss or gradient norm was not finite, naming the step and, on several hosts, this
    host's part of its batch; the last good checkpoint stays.
    """
    mesh = None if mesh is None or mesh.size == 1 else mesh
    placement = ALONE if mesh is None else Placement.of(mesh)
    state = initial_state(model, config, mesh)
    if params is not None:
        state["params"] = _placed(params, state["params"])
    batches = mixture.iterate(config.seed, placement)
    start, tally = 0, _Tally()
    if checkpointer is not None and checkpointer.latest() is not None:
        start, state, counters = checkpointer.restore(state)
        tally = _Tally(counters["tokens"])
        batches.restore(counters["data"])
    if start == config.steps:
        return
    step_fn = make_step(model, config, mesh)
    rates, seed = learning_rates(config), np.int32(config.seed + 1)
    evaluate = make_validation(model, config.soft_sigma, mesh)
    held_out = mixture.validation(placement)
    # The simulated devices of a CPU share its cores and count as one.
    devices = 1 if mesh is None else mesh.size
    devices = jax.process_count() if jax.default_backend() == "cpu" else devices
    peak = matmul_peak(model.compute_dtype) * devices

    def on_mesh(function, *arguments):
        """Call with the last argument, a batch, put where it belongs."""
        if mesh is None:
            return function(*arguments)
        with jax.set_mesh(mesh):  # here only: a generator must not change its caller's mesh
            return function(*arguments[:-1], distributed.place(arguments[-1], mesh, placement))

    def validation_loss() -> dict[str, float]:
        sums: dict[str, np.ndarray] = {}
        for sample in held_out:
            both = np.asarray(on_mesh(evaluate, state["params"], sample.batch), np.float64)
            sums[sample.domain] = sums.get(sample.domain, 0.0) + both
        losses = {domain: float(loss / max(n, 1.0)) for domain, (loss, n) in sums.items()}
        for domain, loss in losses.items():
            if not math.isfinite(loss):
                raise FloatingPointError(f"validation loss of {domain} is {loss} at step {done}")
        return losses

    scale = placement.parts / len(placement.mine)  # of the global batch to this process's part
    begin = since = time.perf_counter()
    for step in range(start, config.steps):
        before = time.perf_counter()
        sample = next(batches)
        tally.waited += time.perf_counter() - before
        now = Now(np.int32(step), rates[step], seed)
        state, report = on_mesh(step_fn, state, now, sample.batch)
        size, flops = sample.batch.ids.size, step_flops(model, sample.batch)
        tally.add(sample, round(size * scale), flops * scale, report)
        done = step + 1
        save = done % save_every == 0 or done == config.steps
        if not save and done % report_every:
            continue
        tally.read(done)
        now = time.perf_counter()
        validated = validation_loss() if save else {}
        by_domain, by_modality, norm = tally.losses()
        tokens = tally.tokens + tally.seen
        metrics = Metrics(
            step=done,
            loss=by_domain,
            modality_loss=by_modality,
            validation_loss=validated,
            gradient_norm=norm,
            tokens=tokens,
            tokens_per_second=tally.seen / (now - since),
            flops_share=tally.flops / (now - since) / peak,
            seconds_left=(config.steps - done) * (now - begin) / (done - start),
            data_wait=tally.waited / (now - since),
            padding=1.0 - tally.seen / tally.size,
        )
        tally = _Tally(tokens)
        yield metrics, state["params"]
        if save and checkpointer is not None:
            counters = {"tokens": tokens, "data": batches.state}
            checkpointer.save(done, state, counters, _mean_over(mixture, validated))
        since = time.perf_counter()  # neither the caller's time nor saving counts as training's


def _mean_over(mixture: Mixture, losses: dict[str, float]) -> float | None:
    """Mean validation loss by the mixture's weights; None where nothing is held out."""
    weights = [mixture.weights[d] for d in losses]
    return float(np.average(list(losses.values()), weights=weights)) if losses else None
