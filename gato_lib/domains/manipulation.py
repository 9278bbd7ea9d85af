"""Manipulation Playground: a Jaco arm lifts, places and stacks (paper 3.1, Table 1, App. F).

The paper's four tasks (lift a box, stack a banana, insert, slide) are not public. These are their
public kin, dm_control's own manipulation tasks, unmodified: a Jaco arm of six joints and three
fingers, commanded in velocities 25 times a second. As in the paper the agent sees features of the
physics state, not images. Every episode is 250 steps of a reward between 0 and 1.

The observation is the suite's, changed in form only: its leading axis, of the one last observation,
is dropped, and a '/' in keys is a '.', as '/' joins keys here.

The paper's experts are trained agents. Ours are controllers that see what the agent sees, and know
the arm's geometry and the bricks': they move the hand by damped least squares (Wampler, 1986) and
grasp, lift, place and stack by a state machine.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np

from gato_lib.domains.base import Domain, Expert, TaskSpec, gaussian

STEPS = 250  # dm_control's limit of 10 s


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """dm_control draws poses until one can be reached, and logs each that cannot."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


class Manipulation(gym.Env):
    """A feature task of dm_control.manipulation, with gymnasium's interface.

    Attributes:
      model, data, frame_skip: the simulation, as gymnasium's MujocoEnv names it; the first two are
        new in each episode.
    """

    def __init__(self, name: str):
        from dm_control import composer, manipulation

        self._failed = composer.EpisodeInitializationError
        self._env = manipulation.load(f"{name}_features", seed=0)
        self.frame_skip = round(self._env.control_timestep() / self._env.physics.timestep())
        action = self._env.action_spec()
        self.action_space = gym.spaces.Box(
            action.minimum.astype(np.float32), action.maximum.astype(np.float32)
        )
        self.observation_space = gym.spaces.Dict(
            {
                key.replace("/", "."): gym.spaces.Box(-np.inf, np.inf, spec.shape[1:], np.float64)
                for key, spec in self._env.observation_spec().items()
            }
        )

    @property
    def model(self) -> Any:
        return self._env.physics.model.ptr

    @property
    def data(self) -> Any:
        return self._env.physics.data.ptr

    @staticmethod
    def _observation(timestep: Any) -> dict[str, np.ndarray]:
        return {
            key.replace("/", "."): value[0].copy() for key, value in timestep.observation.items()
        }

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        # All that is random is drawn from here, and the physics is compiled anew at each reset.
        self._env.random_state.seed(self.np_random.integers(2**32))
        self._steps = 0
        with _no_warnings():
            while True:
                try:
                    return self._observation(self._env.reset()), {}
                except self._failed:  # ten drawn poses all collide: go on drawing
                    pass

    def step(self, action: np.ndarray):
        timestep = self._env.step(np.asarray(action, np.float64))
        self._steps += 1
        truncated = self._steps >= STEPS
        return self._observation(timestep), float(timestep.reward), False, truncated, {}

    def close(self) -> None:
        self._env.close()


class _Controller(Expert):
    """Moves the hand, and its fingers.

    The hand is where its pinch site is, between the fingertips. The site's axes: x along which the
    fingers close, one of them on the positive side; y across; z out of the hand.
    """

    GAIN = 10.0  # 1/s: velocity by distance
    GRIP = 20.0  # 1/s: the same for the fingers
    DAMPING = 0.05  # m: keeps joint velocities sane where the arm is stretched
    NEAR = (0.08, 0.4)  # m and rad: what is farther counts as no farther than this
    ROTATION = 0.2  # m/rad: weight of the orientation

    def reset(self, env: gym.Env) -> None:
        import mujoco

        self._mj, self._sim = mujoco, env.unwrapped
        model = self._sim.model
        self._site = model.site("jaco_arm/jaco_hand/pinchsite").id
        self._joints = [model.joint(f"jaco_arm/joint_{i}").dofadr[0] for i in range(1, 7)]
        self._limits = self._sim.action_space.high

    def act(self, observation: dict[str, np.ndarray], executed: Any | None) -> np.ndarray:
        self._seen = observation
        self._at = observation["jaco_arm.jaco_hand.pinch_site_pos"]
        self._axes = observation["jaco_arm.jaco_hand.pinch_site_rmat"].reshape(3, 3)
        self._fingers = observation["jaco_arm.jaco_hand.joints_pos"]
        return self._act()

    def _act(self) -> np.ndarray:
        raise NotImplementedError

    def _turn(self, axes: np.ndarray) -> np.ndarray:
        """The rotation from the hand's axes to others, as a vector."""
        quaternion, turn = np.empty(4), np.empty(3)
        self._mj.mju_mat2Quat(quaternion, (axes @ self._axes.T).ravel())
        self._mj.mju_quat2Vel(turn, quaternion, 1.0)
        return turn

    def _move(self, place: np.ndarray, axes: np.ndarray, fingers: Any) -> np.ndarray:
        """The action towards a place and orientation of the hand and angles of its fingers."""
        model, weights = self._sim.model, np.repeat([1.0, self.ROTATION], 3)
        jacobian = np.empty((6, model.nv))
        self._mj.mj_jacSite(model, self._sim.data, jacobian[:3], jacobian[3:], self._site)
        jacobian = weights[:, None] * jacobian[:, self._joints]
        error = np.concatenate([place - self._at, self._turn(axes)])
        for part, near in zip((error[:3], error[3:]), self.NEAR, strict=True):
            part *= near / max(near, np.linalg.norm(part))
        damped = jacobian @ jacobian.T + self.DAMPING**2 * np.eye(6)
        velocity = self.GAIN * jacobian.T @ np.linalg.solve(damped, weights * error)
        velocity /= max(1.0, (np.abs(velocity) / self._limits[:6]).max())  # all slower, or none
        action = np.concatenate([velocity, self.GRIP * (fingers - self._fingers)])
        return np.clip(action, -self._limits, self._limits).astype(np.float32)


class Reach(_Controller):
    """Straight to the target, or a little above it if it is a brick."""

    ROTATION = 0.03  # any orientation will do: the hand may turn where that is quicker
    FINGERS = np.full(3, 1.0)  # rad: half closed, out of the way

    def reset(self, env: gym.Env) -> None:
        super().reset(env)
        self._start: np.ndarray | None = None

    def _act(self) -> np.ndarray:
        if self._start is None:
            self._start = self._axes
        if "target_position" in self._seen:
            target = self._seen["target_position"]
        else:
            target = self._seen["duplo2x4.position"] + [0, 0, 0.02]
        return self._move(target, self._start, self.FINGERS)


class Lift(_Controller):
    """Above the brick, down, grasp, up; again where the brick was lost.

    Each phase is a method that returns the action and says which phase is next.
    """

    BRICK = "duplo2x4"  # as it is called in the observation
    MIDDLE = 0.012  # m: the three fingers' middle is this far from the pinch site, along -y
    CLEAR = 0.003  # m: so much higher than the brick's middle are the fingertips when they close
    HOVER = 0.07  # m: so far from the brick the hand must be in line with it
    OPEN = np.array([0.85, 0.7, 0.85])  # rad: of the fingers, for the brick's width, length, height
    HEIGHT = 0.36  # m: where the brick is held

    def reset(self, env: gym.Env) -> None:
        super().reset(env)
        self._tries = 0
        self._begin("above")

    def _begin(self, phase: str) -> None:
        self._phase, self._ticks = phase, 0

    def _act(self) -> np.ndarray:
        self._ticks += 1
        self._brick = self._seen[f"{self.BRICK}.position"]
        lost = np.linalg.norm(self._brick - self._at) > 0.04
        if lost and self._phase in ("lift", "carry", "lower"):
            self._begin("above")
        return getattr(self, f"_{self._phase}")()

    def _sides(self) -> tuple[np.ndarray, np.ndarray]:
        """The two of the brick's three axes that lie flat: which, and their directions."""
        axes = self._axes_of(self.BRICK).T
        which = np.sort(np.abs(axes[:, 2]).argsort()[:2])
        return which, axes[which]

    def _axes_of(self, brick: str) -> np.ndarray:
        axes = np.empty(9)
        self._mj.mju_quat2Mat(axes, self._seen[f"{brick}.orientation"])
        return axes.reshape(3, 3)

    def _choose(self, sides: np.ndarray) -> tuple[int, np.ndarray]:
        """The side to close along, that which turns the hand least, and where to point: down."""
        return int(np.abs(sides @ self._axes[:, 0]).argmax()), np.array([0.0, 0.0, -1.0])

    def _plan(self) -> None:
        """Choose a grasp: the fingers' opening, and the hand's axes when it grasps."""
        which, sides = self._sides()
        side, z = self._choose(sides)
        self._open = np.full(3, self.OPEN[which[side]])
        x = sides[side] - (sides[side] @ z) * z
        x *= (-1) ** self._tries * np.sign(x @ self._axes[:, 0]) / np.linalg.norm(x)
        self._grasp = np.stack([x, np.cross(z, x), z], axis=1)

    def _before(self, distance: float) -> np.ndarray:
        """Where the hand is at a distance from where it has the brick between the fingers."""
        return self._brick + self._grasp @ [0, self.MIDDLE, -distance]

    def _travel(self) -> float:
        """Not lower than this to the brick."""
        return min(self._at[2], 0.2)

    def _again(self) -> None:
        """Something is in the way: turn the hand the other way round."""
        self._tries += 1
        self._begin("above")

    def _above(self) -> np.ndarray:
        if self._ticks == 1:
            self._plan()
        place = self._before(self.HOVER)
        away = np.linalg.norm((place - self._at)[:2])
        if away < 0.012 and np.linalg.norm(self._turn(self._grasp)) < 0.12:
            self._begin("down")
        elif self._ticks > 90:
            self._again()
        if away > 0.04:
            place[2] = max(place[2], self._travel())
        return self._move(place, self._grasp, self._open)

    def _down(self) -> np.ndarray:
        place = self._before(self.CLEAR)
        if (place - self._at) @ self._grasp[:, 2] < 0.005:
            self._begin("close")
        elif self._ticks > 30:
            self._again()
        return self._move(place, self._grasp, self._open)

    def _close(self) -> np.ndarray:
        if self._ticks == 1:
            self._held = self._before(self.CLEAR)
        still = np.abs(self._seen["jaco_arm.jaco_hand.joints_vel"]).max() < 0.05
        if self._ticks > 20 or (self._ticks > 8 and still):
            self._begin("lift")
        return self._hold(self._held)

    def _hold(self, place: np.ndarray) -> np.ndarray:
        """Move with the brick. One finger presses; two go where it is, to keep in the middle."""
        return self._move(place, self._grasp, np.array([3.0, *self._fingers[[0, 0]]]))

    def _lift(self) -> np.ndarray:
        return self._hold(np.array([*self._held[:2], self.HEIGHT]))


class Place(Lift):
    """Lifts the brick, carries it over the pedestal, lowers it, lets go and draws back."""

    CLEAR = 0.006  # more than on the free table: a hand that leans has a lower finger
    BASE = "pedestal"
    LEAN = 0.35  # rad: at most
    SPREAD = np.array([0.045, 0.06, 0.045])  # m: how far the open fingers are from the brick

    def __init__(self, rest: float):
        self._rest = rest  # m: height of the placed brick's middle over the pedestal

    def _act(self) -> np.ndarray:
        self._base = self._seen[f"{self.BASE}.position"]
        self._goal = self._base + np.array([0, 0, self._rest])
        return super()._act()

    def _choose(self, sides: np.ndarray) -> tuple[int, np.ndarray]:
        """Beside the pedestal: close where the fingers have most room, and lean away from it."""
        gap = (self._brick - self._base) * [1, 1, 0]
        distance = np.linalg.norm(gap)
        if distance > 0.17:
            return super()._choose(sides)
        reach = sides * self.SPREAD[self._sides()[0]][:, None]
        room = np.linalg.norm(gap + np.stack([reach, -reach]), axis=-1).min(0)
        side = sides[room.argmax()]
        away = gap - (gap @ side) * side
        angle = self.LEAN * min(1.0, (0.17 - distance) / 0.07)
        z = -np.sin(angle) * away / max(np.linalg.norm(away), 1e-9) - [0, 0, np.cos(angle)]
        return int(room.argmax()), z

    def _travel(self) -> float:
        return max(super()._travel(), self._base[2] + 0.06)

    def _over(self, gap: float) -> np.ndarray:
        """Where the hand is when the brick that it holds is `gap` above its goal."""
        return self._at - self._brick + self._goal + [0, 0, gap]

    def _lift(self) -> np.ndarray:
        if self._brick[2] > self._goal[2] + 0.01:
            self._begin("carry")
        return self._hold(np.array([*self._held[:2], self._over(0.05)[2]]))

    def _carry(self) -> np.ndarray:
        place = self._over(0.03)
        if np.linalg.norm((place - self._at)[:2]) < 0.006:
            self._begin("lower")
        return self._hold(place)

    def _lower(self) -> np.ndarray:
        if self._brick[2] < self._goal[2] + 0.003 or self._ticks > 30:
            self._begin("release")
        return self._hold(self._over(0.0))

    def _release(self) -> np.ndarray:
        if self._ticks == 1:
            self._held = self._at
        if self._ticks > 10:
            self._begin("retreat")
        return self._move(self._held, self._grasp, self._open)

    def _retreat(self) -> np.ndarray:
        if self._ticks > 20 and np.linalg.norm(self._brick - self._goal) > 0.04:
            self._begin("above")
        return self._move(self._held + np.array([0, 0, 0.22]), self._grasp, self._open)


class Stack(Place):
    """Carries the brick over the other one, in line with it, and presses until it clicks."""

    BRICK, BASE = "duplo2x4_2", "duplo2x4"
    CLEAR, LEAN = 0.0, 0.0
    PRESS = 0.004  # m: so far below its place the brick is sent
    SLOW = 0.006  # m: and by no more than this at a time

    def _align(self) -> float:
        """Have the hand turned so that the bricks are in line; the angle that is missing."""
        base, brick = self._axes_of(self.BASE), self._axes_of(self.BRICK)
        if base[:, 0] @ brick[:, 0] < 0:  # half a turn makes no difference
            base = base * [-1, -1, 1]
        self._grasp = base @ brick.T @ self._axes
        return float(np.linalg.norm(self._turn(self._grasp)))

    def _carry(self) -> np.ndarray:
        place = self._over(0.02)
        near = (np.abs(place - self._at) < [0.001, 0.001, 0.005]).all()
        if self._align() < 0.03 and near:
            self._begin("lower")
        return self._hold(place)

    def _lower(self) -> np.ndarray:
        self._align()
        if np.linalg.norm(self._brick - self._goal) < 0.0005:
            self._begin("release")
        elif self._ticks > 25:
            self._begin("carry")
        place = self._over(-self.PRESS)
        place[2] = max(place[2], self._at[2] - self.SLOW)
        return self._hold(place)

    def _retreat(self) -> np.ndarray:
        if self._ticks > 20 and np.linalg.norm(self._brick - self._goal) > 0.001:
            self._begin("above")
        return self._move(self._held + np.array([0, 0, 0.1]), self._grasp, self._open)


_EXPERTS: dict[str, Callable[[], Expert]] = {
    "reach_site": Reach,
    "reach_duplo": Reach,
    "lift_brick": Lift,
    "place_brick": lambda: Place(rest=0.036),
    "place_cradle": lambda: Place(rest=0.03),
    "stack_2_bricks": lambda: Stack(rest=0.0192),
}

DOMAINS = (
    Domain(
        name="manipulation",
        tasks={
            f"manipulation/{name}": TaskSpec(
                id=f"manipulation/{name}",
                metric="return",
                floor=float(STEPS),
                floor_source="upper bound of the reward: 1 a step for 250 steps",
                noise="standard deviation of Gaussian noise on each velocity, in half its range",
                expert="a script: damped least squares moves the hand, a state machine says where",
            )
            for name in _EXPERTS
        },
        make_env=Manipulation,
        make_expert=lambda name: _EXPERTS[name](),
        sources=("manipulation.py",),
        perturb=gaussian,
    ),
)
