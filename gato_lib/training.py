"""Behaviour cloning with the masked loss (paper 2.3, App. D)."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from gato_lib.checkpoint import Checkpointer
from gato_lib.config import ModelConfig, TrainConfig
from gato_lib.mixture import Mixture
from gato_lib.model import Gato, masked_loss
from gato_lib.sequence import count_tokens


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW, linear warm-up, cosine decay to a tenth (App. D)."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=min(config.start_lr, config.peak_lr),
        peak_value=config.peak_lr,
        warmup_steps=config.warmup_steps,
        decay_steps=config.steps,
        end_value=config.peak_lr * config.final_lr_factor,
    )
    adamw = optax.adamw(
        schedule, config.beta1, config.beta2, config.epsilon, weight_decay=config.weight_decay
    )
    if config.clip_norm:
        return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
    return adamw


def graph_of(model: ModelConfig) -> Any:
    """The network's graph definition, without parameters."""
    shell = nnx.eval_shape(lambda: Gato(model, rngs=nnx.Rngs(0)))
    return nnx.split(shell, nnx.Param)[0]


def initial_state(model: ModelConfig, config: TrainConfig) -> dict[str, Any]:
    """{"params", "opt"} at step 0, plain pytrees of arrays."""
    _, params = nnx.split(Gato(model, rngs=nnx.Rngs(config.seed)), nnx.Param)
    params = nnx.to_pure_dict(params)
    return {"params": params, "opt": optimizer(config).init(params)}


def merge(graph: Any, params: Any) -> Gato:
    """A model from its graph definition and pure parameters."""
    return nnx.merge(graph, nnx.State(params))


@dataclasses.dataclass
class Metrics:
    """What `train` reports: averages since the last report."""

    step: int
    loss: dict[str, float]  # by domain
    gradient_norm: float
    tokens: int  # seen so far, padding not counted
    tokens_per_second: float
    seconds_left: float
    data_wait: float  # share of time spent waiting for batches
    padding: float  # share of tokens that are padding


def make_step(graph: Any, config: TrainConfig, train_key: jax.Array):
    """The jitted update: (state, step, batch) -> (state, loss, gradient norm)."""
    tx = optimizer(config)

    def step_fn(state, step, batch):
        key = jax.random.fold_in(train_key, step)

        def loss_fn(params):
            return masked_loss(merge(graph, params), batch, key, config.soft_sigma)

        loss, grads = jax.value_and_grad(loss_fn)(state["params"])
        updates, opt = tx.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt": opt}, loss, optax.tree.norm(grads)

    return jax.jit(step_fn, donate_argnums=0)


def train(
    model: ModelConfig,
    config: TrainConfig,
    mixture: Mixture,
    checkpointer: Checkpointer | None = None,
    *,
    report_every: int = 100,
    save_every: int = 1000,
) -> Iterator[tuple[Metrics, Any]]:
    """Train, yielding (metrics, params) every `report_every` steps and at the end.

    The parameters are given away to the next step: copy what is to outlive it.

    Goes on from the checkpointer's latest checkpoint; the result does not depend on where a run
    was cut. Raises FloatingPointError where the loss is not finite, naming the step and domain;
    the last checkpoint stays.
    """
    state = initial_state(model, config)
    start, tokens, seen, padded, pending = 0, 0, 0, 0, []
    if checkpointer is not None and checkpointer.latest() is not None:
        start, state, counters = checkpointer.restore(state)
        tokens, seen, padded, pending = (
            counters[k] for k in ("tokens", "seen", "padded", "pending")
        )
    step_fn = make_step(graph_of(model), config, jax.random.key(config.seed + 1))
    batches = mixture.iterate(start, config.seed)
    begin = since = time.perf_counter()
    waited = 0.0
    for step in range(start, config.steps):
        before = time.perf_counter()
        domain, batch = next(batches)
        waited += time.perf_counter() - before
        used = count_tokens(batch)
        seen, padded = seen + used, padded + batch.ids.size - used
        state, loss, norm = step_fn(state, np.int32(step), batch)
        pending.append((domain, loss, norm))
        done = step + 1
        save = checkpointer is not None and (done % save_every == 0 or done == config.steps)
        report = done % report_every == 0 or done == config.steps
        if save or report:
            _check_finite(pending, done)
        if report:
            now = time.perf_counter()
            losses: dict[str, list[float]] = {}
            for name, value, _ in pending:
                losses.setdefault(name, []).append(float(value))
            tokens += seen
            rate = (done - start) / (now - begin)
            yield (
                Metrics(
                    step=done,
                    loss={k: float(np.mean(v)) for k, v in sorted(losses.items())},
                    gradient_norm=float(np.mean([float(n) for _, _, n in pending])),
                    tokens=tokens,
                    tokens_per_second=seen / (now - since),
                    seconds_left=(config.steps - done) / rate,
                    data_wait=waited / (now - since),
                    padding=padded / (seen + padded),
                ),
                state["params"],
            )
            seen, padded, waited, pending, since = 0, 0, 0.0, [], time.perf_counter()
        if save:
            # What the next report averages over belongs to the state of the run.
            counters = {
                "tokens": tokens,
                "seen": seen,
                "padded": padded,
                "pending": [(name, float(x), float(y)) for name, x, y in pending],
            }
            checkpointer.save(done, state, counters)


def _check_finite(pending: list[tuple[str, Any, Any]], done: int) -> None:
    """Raise FloatingPointError naming the first step whose loss or gradient is not finite."""
    for offset, (domain, loss, norm) in enumerate(pending):
        for what, value in (("loss", float(loss)), ("gradient norm", float(norm))):
            if not math.isfinite(value):
                at = done - len(pending) + offset
                raise FloatingPointError(f"{what} is {value} at step {at}, domain {domain}")
