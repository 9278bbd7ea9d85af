"""What a step of acting takes, and what must be computed and moved for it (paper 5.5, App. G).

`measure` times a real `Player` on made-up observations, `measure_uncached` the same step without a
cache, and `step_cost` counts. Parameters are random: what the weights say changes neither how many
numbers are multiplied nor how many are read, so it does not change the time.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gato_lib.agent import Agent, Player
from gato_lib.config import ModelConfig
from gato_lib.embedding import INIT, table_row
from gato_lib.model import Gato, forward_flops, parameters_by_part
from gato_lib.sequence import Batch, Tokenizer, make_batch
from gato_lib.tokenizers import NUM_BINS
from gato_lib.training import abstract_batch, graph_of, matmul_peak, merge

# --- measured -------------------------------------------------------------------------------------


class Timing(NamedTuple):
    """An episode's steps. Of all rows of the batch together, which act in step.

    Attributes:
      seconds: float (steps,), wall time of each step.
      tokens: int (steps,), in a row's window when it has acted.
      again: bool (steps,), whether a part of the window was computed anew.
      step, span: tokens of a timestep, and the most that the window can hold.
    """

    seconds: np.ndarray
    tokens: np.ndarray
    again: np.ndarray
    step: int
    span: int

    @property
    def full(self) -> float:
        """Median seconds of the steps in a nearly full window, without those that rebuild it.

        Nearly full: at most one more timestep would fit. Raises ValueError where no step is.
        """
        chosen = (self.tokens + 2 * self.step > self.span) & ~self.again
        if not chosen.any():
            raise ValueError(f"{len(self.seconds)} steps, none in a window of {self.span} tokens")
        return float(np.median(self.seconds[chosen]))

    @property
    def mean(self) -> float:
        """Seconds a step over the whole episode, with all that was computed anew."""
        return float(self.seconds.mean())


def measure(
    config: ModelConfig,
    *,
    context: int,
    observations: int,
    actions: int,
    rows: int = 1,
    steps: int,
    parallel: bool = False,
    keep: float = 0.5,
    memory: int = 0,
) -> Timing:
    """Time every step of an episode in so many environments.

    A timestep is that many continuous observations, a separator and so many continuous actions.
    `keep`, `memory` as in `Agent`; `parallel`: whether all tokens of an action come from one pass.
    An episode before it, long enough to meet every shape, compiles and is thrown away. Raises
    ValueError where not one timestep fits.
    """
    step, span = observations + 1 + actions, memory or context
    if step > span or min(observations, actions, rows, steps) < 1:
        raise ValueError(
            f"{rows} x {steps} timesteps of {observations} + 1 + {actions} tokens in a window of "
            f"{span}: expected at least one of each, and a timestep that fits"
        )
    box = lambda n: gym.spaces.Box(-1.0, 1.0, (n,), np.float32)  # noqa: E731
    tokenizer = Tokenizer(box(observations), box(actions))
    here = {"here"} if parallel else ()
    agent = Agent(config, _parameters(config), None, context, None, here, keep=keep, memory=memory)
    agent = agent.for_domain("here")
    rng = np.random.default_rng(0)
    for count in (min(steps, span // step + 2), steps):
        player = agent.player(tokenizer, range(rows))
        seconds, tokens = np.zeros(count), np.zeros(count, int)
        for t in range(count):
            shown = list(rng.uniform(-1.0, 1.0, (rows, observations)).astype(np.float32))
            begin = time.perf_counter()
            player.act(shown)  # its actions are on the host when it returns
            seconds[t] = time.perf_counter() - begin
            tokens[t] = len(player.window(0))
    grown = np.diff(tokens, prepend=0) == step
    return Timing(seconds, tokens, ~grown & (tokens > step) & (memory == 0), step, span)


def measure_uncached(
    config: ModelConfig,
    *,
    context: int,
    actions: int,
    rows: int = 1,
    parallel: bool = False,
    repeats: int = 3,
) -> float:
    """Seconds a step without a cache: a forward pass over a full window for each action token.

    Or, with `parallel`, one. The fastest of `repeats`, so that the comparison is with the best
    that could be had without a cache.
    """
    batch = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), abstract_batch(rows, context, 1))
    arguments = graph_of(config), _parameters(config), batch, np.array([context - 1])
    _forward(*arguments).block_until_ready()  # compiles
    return (1 if parallel else actions) * _best(lambda: _forward(*arguments), repeats)


def full_pass(player: Player, row: int) -> np.ndarray:
    """Log-probabilities (A,) of a row's latest action, by one forward pass over its window.

    What `Player.log_p` must be, computed without a cache.
    """
    agent, seq, spec = player.agent, player.window(row), player.tokenizer.action_spec
    first, length = len(seq) - spec.num_tokens, -(-len(seq) // 32) * 32
    patches = -(-len(seq.patches) // 16) * 16
    batch = make_batch(
        seq, [[(0, len(seq))]], length, length, patches, parallel=agent.parallel
    )  # (1, T)
    at = np.arange(first, len(seq)) - 1  # a token is predicted one place before its own
    logits = _forward(graph_of(agent.config), agent.params, batch, at)
    logits, out = np.asarray(logits, np.float64), []
    for chosen, (low, high), some in zip(seq.ids[first:], spec.legal_ids, logits, strict=True):
        begin = int(table_row(np.int32(low), agent.config))
        legal = some[begin : begin + high - low]
        out.append(legal[chosen - low] - np.logaddexp.reduce(legal))
    return np.array(out)


@functools.lru_cache(maxsize=2)
def _parameters(config: ModelConfig) -> Any:
    """Random parameters; drawn by NumPy, as there is nothing to compile then."""
    shapes = nnx.eval_shape(lambda: nnx.split(Gato(config, rngs=nnx.Rngs(0)), nnx.Param)[1])
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(INIT * rng.standard_normal(x.shape, np.float32))  # noqa: E731
    return jax.tree.map(draw, nnx.to_pure_dict(shapes))


@functools.partial(jax.jit, static_argnums=0)
def _forward(graph, params, batch: Batch, positions):
    """Logits (B * P, V) at P positions of every row."""
    model = merge(graph, params)
    hidden = model.hidden(batch)[:, positions]
    return model.embedding.logits(hidden.reshape(-1, hidden.shape[-1]))


def _best(call, repeats: int) -> float:
    """Shortest wall time of some calls."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begin)
    return min(times)


# --- counted --------------------------------------------------------------------------------------


def step_cost(
    config: ModelConfig,
    *,
    context: int,
    observations: int,
    actions: int,
    rows: int = 1,
    parallel: bool = False,
    patches: int = 0,
) -> dict[str, float]:
    """What a step at a full context needs: operations of matrix products, and bytes that are read.

    O observations (`patches` of them image patches) and A actions make a step of n = O + 1 + A
    tokens; a full window holds S = n * floor(context / n). Since the step before, n tokens go in,
    its last action token first: O + 2 in one pass, and each of A - 1 actions in a pass of its own,
    so p = A passes; or all in p = 1 pass, `parallel`. For B rows, L layers of width D, N heads of
    size H, in operations (a product m x k by k x n is 2mkn):

        weights    2 B n (parameters of the layers' matrices), and the patch embedder's
        attention  2 L B N H * 3 * (S-n + ... + S-1): a query meets its own and all earlier tokens'
                   keys, their distances (no such term unless relative) and values
        head       2 B A D * 1024: only legal rows of the table are multiplied

    and in numbers, each of as many bytes as `compute_dtype` has:

        weights    p (parameters of the layers): once a pass, whatever the rows
        cache      L N H (2 B + 1) * ((S-p) + ... + (S-1)): keys and values of each row, and the
                   distances' features, which rows share
        head       A D * 1024

    The projection of distances is not among the parameters: its result is what is cached. Left out
    are activations, what is written, table rows of inputs and all that is no product. So it is a
    lower bound, but for a processor's own cache, which may be read faster than memory.
    """
    c, step = config, observations + 1 + actions
    if step > context:
        raise ValueError(f"a timestep has {step} tokens, the context {context}")
    window, passes = context // step * step, 1 if parallel else actions
    inner, relative = c.num_heads * c.head_dim, c.sequence_positions == "relative"
    products = forward_flops(c, rows, step, 0, rows * patches)
    parts = ("attention, projections", "feed-forward up", "feed-forward down", "patches")
    met = sum(range(window - step, window))
    head = actions * NUM_BINS * c.width
    operations = sum(products[part] for part in parts)
    operations += 2 * c.depth * rows * inner * (2 + relative) * met + 2 * rows * head
    weights = parameters_by_part(c)["transformer"] - c.depth * c.width * inner * relative
    cached = c.depth * inner * (2 * rows + relative) * sum(range(window - passes, window))
    numbers = passes * weights + cached + head
    size = jnp.dtype(c.compute_dtype).itemsize
    return {"operations": float(operations), "bytes": float(size * numbers)}


class Rates(NamedTuple):
    """What a device can do at best: operations a second in products, bytes read a second."""

    operations: float
    bytes: float

    def bound(self, cost: Mapping[str, float]) -> float:
        """Seconds that `step_cost` takes at least: computing and reading may overlap."""
        return max(cost["operations"] / self.operations, cost["bytes"] / self.bytes)


def machine_rates(megabytes: int = 256) -> Rates:
    """This device's: a product of two square matrices, and the sum of an array of that size."""
    numbers = jnp.ones(megabytes * 2**20 // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    total(numbers).block_until_ready()
    return Rates(matmul_peak(), numbers.nbytes / _best(lambda: total(numbers), 8))
