"""Search for the linear maps that play, and write them: `python experiments/gaits.py`.

Writes gato_lib/domains/gaits.py, what experts of Modular RL, and of two tasks of DM Control,
play. The paper's are trained agents (D4PG), and so are these, by a far simpler method: augmented
random search (Mania et al. 2018, "Simple random search provides a competitive approach to
reinforcement learning", V2-t). It adds random numbers to all weights, plays one episode with them
and one with their opposites, and moves the weights by what the better pairs say. Two changes: what
is played is disturbed by noise, so that small mistakes, as an imitator makes, are survived; and
several short tries in a coarser simulation are made first, of which the best goes on, since many
end at standing still.

A morphology takes some eight million steps, five minutes of one core, and half of that where it
goes on from a relative's gait or that one's mirror image. Those that are committed came from
nothing for walker_6_no_left_foot, humanoid_2d_9_no_arms, hopper_4_full, walker_5_no_feet (--seed 1,
then --start itself with 2, 3 and 4) and walker_3_no_shins (--upright 1 1: it can do little but
stand); with --start humanoid_2d_9_no_arms for the other humanoids; with --start
walker_6_no_left_foot for walker_7_full, walker_6_no_right_foot and walker_5_no_left_shin; with
--start walker_5_no_left_shin for the other two. Then `--start itself --noise 0.3 --seed 5` made six
of them survive more, and two are the mirror images of what others then had: walker_5_no_left_shin
of walker_5_no_right_shin's, and walker_6_no_right_foot of walker_6_no_left_foot's.

DM Control's take six to eight million steps without tries, and came from nothing; its walker, which
begins lying about, was not found to walk.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import copy
import dataclasses
import runpy

import numpy as np
import pandas as pd

from gato_lib.collection import worker_pool
from gato_lib.domains import dmc, gaits, modular_rl
from gato_lib.files import write_text
from gato_lib.workbook import Progress

TRIES, TRY, COARSE, TRUE = 6, 700_000, 2_500_000, 800_000  # of each, steps to a try and a stage
PAIRS, BEST = 16, 8  # directions tried for one move, and those that count
TOLD = (0.0, 0.1, 0.2, 0.3)  # noise at which gaits are compared
SUITE = 8_000_000  # steps to a task of DM Control
MOVES = {"walker": {"rate": 0.3, "width": 0.2}, "cheetah": {"rate": 0.05, "width": 0.05}}
CHECKED = 8  # episodes to tell whether weights are the best so far, every tenth move


def controls_of(gait: np.ndarray, observed: np.ndarray, disturbance: np.ndarray) -> np.ndarray:
    """What is played, in half the controls' range."""
    return ((observed @ gait[:-1] + gait[-1]).clip(-1, 1) + disturbance).clip(-1, 1)


class Body:
    """A morphology's environment, without what gymnasium adds around the simulation.

    Attributes:
      inputs, controls: how many there are.
      rows, columns: what each row and column of a gait is about: what of which joint.
    """

    def __init__(self, name: str, coarse: bool):
        import mujoco

        env = modular_rl.make_env(name)
        self._env = sim = env.unwrapped
        self._model, self._data = copy.copy(sim.model), mujoco.MjData(sim.model)
        self._substeps, self._seconds = sim.frame_skip, sim.dt
        if coarse:
            self._model.opt.integrator = mujoco.mjtIntegrator.mjINT_EULER
            self._model.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON
            self._substeps, self._model.opt.timestep = 1, sim.dt
        low, high = self._model.actuator_ctrlrange.T
        self._middle, self._half = (low + high) / 2, (high - low) / 2
        self.inputs = self._model.nq - 1 + self._model.nv
        self.controls = self._model.nu
        joints = [self._model.joint(i).name for i in range(self._model.njnt)]
        self.rows = [f"{joint} is" for joint in joints[1:]] + [f"{joint} moves" for joint in joints]
        self.rows.append("constant")
        self.columns = [joints[i] for i in self._model.actuator_trnid[:, 0]]

    def play(
        self,
        gait: np.ndarray,
        seed: int,
        noise: float = 0.0,
        seen: list[np.ndarray] | None = None,
        upright: float = 1.0,
        fastest: float = np.inf,
        steps: int = modular_rl.STEPS,
    ) -> float:
        """Play an episode and return the sum of its rewards.

        Args:
          gait: (inputs + 1, controls), from what is observed and a constant to controls.
          noise: on controls, standard deviation in half their range.
          seen: where every fifth observation is appended.
          upright, fastest: what a step upright is worth, and the speed above which none is.
          steps: after which the episode ends, if it has not before.
        """
        import mujoco

        sim, model, data = self._env, self._model, self._data
        rng = np.random.default_rng(seed)
        mujoco.mj_resetData(model, data)
        spread = sim._reset_noise_scale
        data.qpos[:] = sim.init_qpos + rng.uniform(-spread, spread, model.nq)
        data.qvel[:] = sim.init_qvel + rng.uniform(-spread, spread, model.nv)
        mujoco.mj_forward(model, data)
        disturbed = noise * rng.normal(size=(steps, self.controls))
        (lowest, highest), (back, ahead) = sim._healthy_z_range, sim._healthy_angle_range
        total = 0.0
        for step in range(steps):
            observed = np.concatenate([data.qpos[1:], data.qvel.clip(-10, 10)])
            if seen is not None and step % 5 == 0:
                seen.append(observed)
            data.ctrl[:] = self._middle + self._half * controls_of(gait, observed, disturbed[step])
            before = data.qpos[0]
            mujoco.mj_step(model, data, self._substeps)
            speed = (data.qpos[0] - before) / self._seconds
            total += min(speed, fastest) - sim._ctrl_cost_weight * np.square(data.ctrl).sum()
            if not (lowest < data.qpos[1] < highest and back < data.qpos[2] < ahead):
                break
            total += upright
        return total


class SuiteTask:
    """A task of DM Control, without what dm_control adds around the simulation.

    Attributes: as `Body`'s.
    """

    def __init__(self, name: str, coarse: bool):
        self._env, self._task = dmc.Suite(name), name
        model = self._env.model
        self._substeps = self._env.frame_skip
        if coarse and self._substeps > 2:
            model.opt.timestep *= self._substeps / 2
            self._substeps = 2
        self._observed = dmc.OBSERVED[name.split("-")[0]]
        self._speed = model.sensor("torso_subtreelinvel").adr[0]
        self.controls = model.nu
        self.inputs = len(self._observed(self._env.data))

    def play(
        self,
        gait: np.ndarray,
        seed: int,
        noise: float = 0.0,
        seen: list[np.ndarray] | None = None,
        steps: int = dmc.STEPS,
    ) -> float:
        """Play an episode and return the sum of its rewards; arguments as of `Body.play`."""
        import mujoco

        rng = np.random.default_rng(seed)
        self._env.reset(seed=int(seed))
        model, data = self._env.model, self._env.data
        disturbed = noise * rng.normal(size=(steps, self.controls))
        torso = np.empty((steps, 3))
        for step in range(steps):
            observed = self._observed(data)
            if seen is not None and step % 5 == 0:
                seen.append(observed)
            data.ctrl[:] = controls_of(gait, observed, disturbed[step])
            mujoco.mj_step2(model, data)  # as dm_control steps, so that what is read is of now
            if self._substeps > 1:
                mujoco.mj_step(model, data, self._substeps - 1)
            mujoco.mj_step1(model, data)
            torso[step] = data.xpos[1, 2], data.xmat[1, 8], data.sensordata[self._speed]
        return float(self._rewards(*torso.T).sum())

    def _rewards(self, height: np.ndarray, upright: np.ndarray, speed: np.ndarray) -> np.ndarray:
        if self._task == "cheetah-run":
            return (speed / 10).clip(0, 1)
        standing = 0.1 ** np.square((1.2 - height).clip(0, None) / 0.6)
        return (3 * standing + (1 + upright) / 2) / 4


@dataclasses.dataclass
class Search:
    """Weights for inputs of mean 0 and variance 1, what makes inputs so, and the best so far.

    `start` is a gait that the weights add to, `noise` what its moves are tried with.
    """

    start: np.ndarray
    noise: float
    weights: np.ndarray
    mean: np.ndarray
    square: np.ndarray  # sum of squared differences from the mean
    count: float = 1.0
    best: float = -np.inf
    gait: np.ndarray | None = None

    @classmethod
    def begin(cls, body: Body | SuiteTask, noise: float, start: np.ndarray | None = None) -> Search:
        n, m = body.inputs, body.controls
        start = np.zeros((n + 1, m)) if start is None else start
        return cls(start, noise, np.zeros((n, m)), np.zeros(n), np.ones(n))

    def gait_of(self, weights: np.ndarray) -> np.ndarray:
        scaled = weights / np.sqrt(self.square / self.count).clip(1e-2)[:, None]
        return self.start + np.concatenate([scaled, -self.mean[None] @ scaled])

    def observe(self, seen: np.ndarray) -> None:
        mean, new = seen.mean(0), self.count + len(seen)
        apart = mean - self.mean
        self.square += np.square(seen - mean).sum(0) + apart**2 * self.count * len(seen) / new
        self.mean += apart * len(seen) / new
        self.count = new

    def check(self, body: Body | SuiteTask, **worth: float) -> None:
        gait, seeds = self.gait_of(self.weights), range(10**6, 10**6 + CHECKED)
        score = mean_return(body, gait, self.noise, seeds, **worth)
        if score > self.best:
            self.best, self.gait = score, gait

    def run(
        self,
        body: Body | SuiteTask,
        steps: int,
        rng: np.random.Generator,
        rate: float,
        width: float,
        **worth: float,
    ) -> None:
        """Move for some `steps` of the simulation: `width` is of the random numbers, `rate` of a
        move, `worth` for `Body.play`."""
        done, moves, self.best = 0, 0, -np.inf
        self.check(body, **worth)
        while done < steps:
            tried = rng.normal(size=(PAIRS, *self.weights.shape))
            scores, seen = np.zeros((PAIRS, 2)), []
            for i, seed in enumerate(rng.integers(2**31, size=PAIRS)):
                for j, sign in enumerate((1, -1)):
                    gait = self.gait_of(self.weights + sign * width * tried[i])
                    scores[i, j] = body.play(gait, seed, self.noise, seen, **worth)
            kept = np.argsort(-scores.max(1))[:BEST]
            pull = scores[kept, 0] - scores[kept, 1]
            self.weights += (
                rate / (BEST * scores[kept].std()) * np.tensordot(pull, tried[kept], axes=1)
            )
            self.observe(np.array(seen))
            done += 5 * len(seen)
            moves += 1
            if moves % 10 == 0:
                self.check(body, **worth)


def mirrored(label: str) -> str:
    """Of a joint on the right, the same on the left, and the other way round."""
    if "right_" in label:
        return label.replace("right_", "left_")
    if label.startswith("left_"):
        return label.replace("left_", "right_")
    if "_left_joint" in label:
        return label.replace("_left_joint", "_joint")
    return label.replace("_joint", "_left_joint")


def carried_over(gait: np.ndarray, of: Body, to: Body) -> np.ndarray:
    """Another body's gait, for the joints that both have and nothing for the others; or that of its
    mirror image, whichever serves better."""
    ways = []
    for named in (str, mirrored):
        known = pd.DataFrame(gait, map(named, of.rows), map(named, of.columns))
        ways.append(known.reindex(index=to.rows, columns=to.columns, fill_value=0.0).to_numpy())
    return max(ways, key=lambda way: mean_return(to, way, 0.1))


def tried(body: Body, upright: float, noise: float, seed: int) -> Search:
    """The best of several tries from nothing."""
    tries = [Search.begin(body, noise) for _ in range(TRIES)]
    for number, one in enumerate(tries):
        rng = np.random.default_rng([seed, number])
        one.run(body, TRY, rng, rate=0.03, width=0.05, upright=upright, fastest=1.5)
    return max(tries, key=lambda one: one.best)


def search(
    name: str, start: str | None, upright: tuple[float, float], noise: float, seed: int
) -> tuple[np.ndarray, str]:
    """A gait, with weights of three digits, and what was found on the way."""
    before = {}
    rng = np.random.default_rng([seed, TRIES])
    start = name if start == "itself" else start
    known = gaits.MAPS
    if name in dmc.MAPPED:
        coarse, true = SuiteTask(name, coarse=True), SuiteTask(name, coarse=False)
        one = Search.begin(coarse, noise, known[start] if start else None)
        one.run(coarse, SUITE, rng, **MOVES[name.split("-")[0]])
        one.run(true, TRUE, rng, rate=0.02, width=0.03)
    else:
        coarse, true = Body(name, coarse=True), Body(name, coarse=False)
        if start:
            before[start] = carried_over(known[start], Body(start, coarse=False), true)
            one = Search.begin(coarse, noise, before[start])
        else:
            one = tried(coarse, upright[0], noise, seed)
            before["tries"] = one.gait
        one.run(coarse, COARSE, rng, rate=0.02, width=0.03, upright=upright[1])
        one.run(true, TRUE, rng, rate=0.02, width=0.03, upright=upright[1])
    if name in known:
        before[name] = known[name]
    gait = np.array([[float(f"{x:.3g}") for x in row] for row in one.gait])
    scores = {
        k: [mean_return(true, g, level) for level in TOLD]
        for k, g in (before | {"now": gait}).items()
    }
    if name in before and sum(scores[name]) > sum(scores["now"]):
        gait = before[name]
    return gait, "; ".join(
        f"{k} " + " ".join(f"{x:.0f}" for x in each) for k, each in scores.items()
    )


def mean_return(
    body: Body | SuiteTask,
    gait: np.ndarray,
    noise: float,
    seeds: range = range(20),
    **worth: float,
) -> float:
    return float(np.mean([body.play(gait, seed, noise, **worth) for seed in seeds]))


HEAD = '''"""Linear maps that play Modular RL and some of DM Control, found by experiments/gaits.py.

By morphology or task: a row for each number observed and one for a constant, a column for each
control, in half its range.
"""

import numpy as np

_TEXT = {
'''
TAIL = """}

MAPS = {
    name: np.array([row.split() for row in rows.strip().splitlines()], float)
    for name, rows in _TEXT.items()
}
"""


def written(gaits: dict[str, np.ndarray]) -> str:
    """The module's text."""
    blocks = []
    for name, gait in gaits.items():
        rows = "\n".join(" ".join(f"{x:.3g}" for x in row) for row in gait)
        blocks.append(f'    "{name}": """\n{rows}\n""",\n')
    return HEAD + "".join(blocks) + TAIL


def _kind(name: str) -> str:
    return name.split("-")[0] if name in dmc.MAPPED else "modular_rl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="body or task; all, if none")
    starts = ["itself", *gaits.MAPS]
    parser.add_argument("--start", choices=starts, help="whose gait to go on from")
    worth = "what a step upright is worth in the tries, and after"
    parser.add_argument("--upright", type=float, nargs=2, default=(0.1, 0.5), help=worth)
    parser.add_argument("--noise", type=float, default=0.1, help="on controls, in half their range")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int)
    args = parser.parse_args()
    every = [*modular_rl.BODIES, *dmc.MAPPED]
    unknown = set(args.names) - set(every)
    if unknown:
        parser.error(f"{sorted(unknown)} have no gait; there are {every}")
    progress, names = Progress(every=0.0), args.names or every
    for name in names if args.start in gaits.MAPS else ():
        if _kind(name) != _kind(args.start):
            parser.error(f"{name} cannot start from {args.start}, another kind of body")
    with worker_pool(args.workers) as pool:
        running = {
            pool.submit(search, name, args.start, args.upright, args.noise, args.seed): name
            for name in names
        }
        for future in concurrent.futures.as_completed(running):
            name = running[future]
            gait, found = future.result()
            # Read again: another search may have written since.
            known = runpy.run_path(gaits.__file__)["MAPS"] | {name: gait}
            write_text(gaits.__file__, written({k: known[k] for k in every if k in known}))
            progress(f"{name}: {found}")


if __name__ == "__main__":
    main()
