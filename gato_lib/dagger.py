"""Demonstrations in which the agent leads and the expert says what it would have done (DAgger).

A clone of demonstrations alone never saw what its own mistakes lead to. Here an agent plays, the
expert takes over now and then so that the task gets on, and at every step the expert's own action
is recorded beside the one that was executed (Ross et al. 2011, "A Reduction of Imitation Learning
... to No-Regret Online Learning"). The paper has none of it: its demonstrations were recorded while
its experts were still learning (3.1), and so hold mistakes and what came after. README, Deviations.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from gato_lib import domains, set_aside
from gato_lib.agent import Agent
from gato_lib.collection import ATTEMPTS, Collection
from gato_lib.config import source_digest
from gato_lib.episodes import DataError, Episode, stack_observations, write_shard
from gato_lib.evaluation import Lane, demonstrated, environments, made, play_out

# Steps that the agent leads, on average, before the expert does, in one episode or another: a body
# that must not fall is down before the agent has led for 30. And those that the expert leads.
LEADS, FOLLOWS = (30, 3), 10
LED = 150  # steps that the agent leads in an episode, at most
STEPS = 400  # an episode that is not over is cut here, or when those are spent


@dataclasses.dataclass(frozen=True)
class Practice(Collection):
    """What is collected for one task with an agent in the lead; `folder` holds it.

    Attributes:
      learner: the agent's name, which holds a digest of what it is.
      make_agent, demonstrations: who leads, and what it is prompted with the end of, as in
        `evaluation.Evaluation`; without demonstrations it is not prompted.
      goals_aside: whether starts that `set_aside` names are not played.
    """

    learner: str = ""
    make_agent: Callable[[], Agent] | None = None
    demonstrations: Callable[[str], Sequence[Episode]] | None = None
    goals_aside: bool = False
    chunk: ClassVar[int] = 16  # played in one batch

    @property
    def folder(self) -> pathlib.Path:
        code = source_digest("collection.py", "episodes.py", "agent.py", "dagger.py")
        settings = [code + domains.domain_of(self.task).code, *self.card.values()]
        digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
        return pathlib.Path(self.root) / f"{self.task.replace('/', '-')}-led-{digest}"

    @property
    def card(self) -> dict[str, Any]:
        """What identifies it, as kept in the data set."""
        known = super().card | {"learner": self.learner, "goals_aside": self.goals_aside}
        return known | {"prompted": self.demonstrations is not None}

    def episode_seed(self, index: int, attempt: int) -> int:
        """Neither those of evaluation, nor of demonstrations without an agent."""
        text = f"{self.learner} {self.task} {self.seed} {index} {attempt}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:4], "little") % 2**30

    def gather(self, indices: Sequence[int]) -> int:
        """Write the shards of `indices`, played in one batch, and return how many.

        An episode in which the expert fails before its first action, or whose start is set aside,
        is played with another seed. Raises DataError where that fails too often.
        """
        left = list(indices)
        for attempt in range(ATTEMPTS):
            seeds = [self.episode_seed(index, attempt) for index in left]
            for index, episode in zip(list(left), self._play(seeds), strict=True):
                if episode is not None:
                    write_shard(self.shard(index), episode)
                    left.remove(index)
            if not left:
                return len(indices)
        raise DataError(f"{self.task}: the expert failed on {ATTEMPTS} seeds, episodes {left}")

    def keep(self, episodes: Sequence[Episode], scores: Sequence[float]) -> np.ndarray:
        """Where success is the score, solved episodes, if there are any; otherwise all.

        What is imitated is what the expert says, and that does not depend on the return, half of
        which is the agent's.
        """
        solved = np.array([e.success for e in episodes])
        if domains.TASKS[self.task].metric == "success" and solved.any():
            return solved
        return np.ones(len(episodes), bool)

    def _play(self, seeds: Sequence[int]) -> list[Episode | None]:
        """An episode for each seed; None where there is none to be had from it."""
        agent = made(self.make_agent).for_domain(domains.TASKS[self.task].domain)
        with environments([self.task] * len(seeds)) as envs:
            begun = [env.reset(seed=s)[0] for env, s in zip(envs, seeds, strict=True)]
            lanes = [_Led(self.task, *lane) for lane in zip(seeds, envs, begun, strict=True)]
            playing = [
                lane
                for lane in lanes
                if not (self.goals_aside and set_aside.is_aside(self.task, lane.observation))
            ]
            if not playing:
                return [None] * len(lanes)
            tokenizer, prompts = agent.tokenizer(envs[0]), None
            if self.demonstrations is not None:
                known = demonstrated(self.demonstrations, self.task)
                prompts = [
                    agent.prompt(tokenizer, known[x.index % len(known)], "end", x.observation)
                    for x in playing
                ]
            play_out(agent.player(tokenizer, [x.index for x in playing], prompts), playing)
        return [lane.episode() for lane in lanes]


class _Led(Lane):
    """An episode, with its seed as `index`, in which the agent leads or the expert does."""

    def __init__(self, task: str, seed: int, env: Any, observation: Any):
        super().__init__(task, seed, env, observation)
        self._observations = [observation]
        self._actions: list[Any] = []
        self._executed: list[Any] = []
        self._expert = domains.make_expert(task)
        self._expert.reset(env)
        self._rng = np.random.default_rng([seed, 4])
        self._leads, self._led = True, 0
        self._stretch = LEADS[self._rng.integers(len(LEADS))]

    def step(self, action: Any) -> Any:
        last = self._executed[-1] if self._executed else None
        try:
            right = self._expert.act(self.observation, last)
        except domains.ExpertError:
            self.over = True  # what it said until here holds
            return action
        before_the_other = self._stretch if self._leads else FOLLOWS
        if self._actions and self._rng.random() < 1 / before_the_other:  # the first is the agent's
            self._leads = not self._leads
        leads = self._leads and self._led < LED
        if leads:
            self._led += 1
            self._expert.interrupted()
        executed = super().step(action if leads else right)
        self._observations.append(self.observation)
        self._actions.append(right)
        self._executed.append(executed)
        # Where every step counts, the expert alone would mostly rest at the goal.
        spent = self._led >= LED and domains.TASKS[self.task].metric != "success"
        self.over |= spent or len(self._actions) >= STEPS
        return executed

    def episode(self) -> Episode | None:
        if not self._actions:
            return None
        space = self.env.action_space
        return Episode(
            task=self.task,
            observations=stack_observations(self._observations),
            actions=stack_observations(self._actions, space),
            executed=stack_observations(self._executed, space),
            rewards=np.asarray(self.rewards, np.float64),
            success=self.success,
            seed=self.index,
        )
