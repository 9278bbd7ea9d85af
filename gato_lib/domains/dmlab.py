"""Rooms and mazes in first person: MiniWorld for DeepMind Lab (paper 3.1, Table 1, App. F).

DeepMind Lab has no package for this Python; MiniWorld has the same view of the world (first person,
RGB), the same kind of actions (turn, step, pick up) and similar tasks (reach a goal, collect,
remember). Its 60 x 80 view is drawn as 64 x 80, so that 16 x 16 patches fill it: 20
patches a step.

The experts know where everything is and the agent does not: they go straight to a goal that is
behind a wall or behind the agent. What an agent can learn from them is to go to what it sees, and
to turn where it sees nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import math
from collections.abc import Iterable
from typing import Any

import gymnasium as gym
import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import dijkstra

from gato_lib.domains.base import Domain, Expert, ExpertError, TaskSpec

HEIGHT, WIDTH = 64, 80


@dataclasses.dataclass(frozen=True)
class Level:
    """A MiniWorld level: its step limit, how it is scored, the score of a flawless episode."""

    steps: int
    metric: str = "success"
    best: float = 1.0
    best_source: str = "every episode solved"


# MiniWorld's own limits but for two: its 20 steps are too few to read the sign and then to go by
# it, and surviving 1,000 steps shows nothing that surviving 300 does not (health lasts for 50).
LEVELS = {
    "OneRoom": Level(180),
    "Hallway": Level(250),
    "FourRooms": Level(250),
    "TMaze": Level(280),
    "YMaze": Level(280),
    "MazeS2": Level(96),
    "MazeS3": Level(216),
    "WallGap": Level(300),
    "Sidewalk": Level(150),
    "Sign": Level(40),
    "PickupObjects": Level(400, "return", 5.0, "one for each of the five objects"),
    "CollectHealth": Level(300, "return", 600.0, "2 for each step survived"),
}


@functools.cache
def _world_class(name: str) -> type:
    """MiniWorld's class of a level, made fit to share a process with other levels."""
    import pyglet

    pyglet.options["headless"] = True  # EGL, no display; read when pyglet.window is imported
    import miniworld.envs
    from pyglet import gl

    class World(getattr(miniworld.envs, name)):
        """Draws its walls from a display list of its own.

        All windows of a process share their display lists, and MiniWorld compiles the walls of
        every world into list 1: the world that was reset last would be seen in all of them. Nor
        does its reset make its own context the current one, which may be another simulator's.
        """

        def reset(self, **kwargs: Any):
            self.shadow_window.switch_to()
            return super().reset(**kwargs)

        def _gen_world(self) -> None:
            if name == "Sign":  # MiniWorld fixes both for good; here each episode has its own
                self._color_index, self._goal = self.np_random.integers((3, 2)).tolist()
            super()._gen_world()

        def _render_static(self) -> None:
            if not hasattr(self, "_walls"):
                self._walls = gl.glGenLists(1)
            gl.glNewList(self._walls, gl.GL_COMPILE)
            # Three numbers for four: the light is infinitely far away. MiniWorld adds 1 to each
            # instead of appending it, and so do we, to draw the same pictures.
            for parameter, value in (
                (gl.GL_POSITION, self.light_pos + 1),
                (gl.GL_AMBIENT, self.light_ambient),
                (gl.GL_DIFFUSE, self.light_color),
            ):
                gl.glLightfv(gl.GL_LIGHT0, parameter, (gl.GLfloat * 4)(*value))
            gl.glShadeModel(gl.GL_SMOOTH)
            gl.glColorMaterial(gl.GL_FRONT_AND_BACK, gl.GL_AMBIENT_AND_DIFFUSE)
            for switch in (gl.GL_LIGHTING, gl.GL_LIGHT0, gl.GL_COLOR_MATERIAL, gl.GL_TEXTURE_2D):
                gl.glEnable(switch)
            for room in self.rooms:
                room._render()
            for entity in self.entities:
                if entity.is_static:
                    entity.render()
            gl.glEndList()

        def _render_world(self, frame_buffer: Any, render_agent: bool) -> np.ndarray:
            gl.glCallList(self._walls)
            for entity in self.entities:
                if not entity.is_static and (render_agent or entity is not self.agent):
                    entity.render()
            return frame_buffer.resolve()

        def close(self) -> None:
            if self.shadow_window.context is not None:
                self.shadow_window.switch_to()
                gl.glDeleteLists(self._walls, 1)
                self.shadow_window.close()

    return World


class Lab(gym.Wrapper):
    """A level with this module's step limit; `info["success"]` where it has a goal to reach."""

    def __init__(self, name: str):
        level = LEVELS[name]
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how many samples a pixel gets
            # The window is for people, never drawn here, and 800 x 600 x 16 samples by default.
            world = _world_class(name)(
                obs_height=HEIGHT, obs_width=WIDTH, window_height=16, window_width=16
            )
        super().__init__(world)
        world.max_episode_steps = level.steps
        self._has_goal = level.metric == "success"
        spaces = {"image": gym.spaces.Box(0, 255, (HEIGHT, WIDTH, 3), np.uint8)}
        if name == "Sign":
            letters = "abcdefghijklmnopqrstuvwxyz "
            spaces["mission"] = gym.spaces.Text(max_length=64, charset=letters)
        self.observation_space = gym.spaces.Dict(spaces)

    def _observe(self, observation: Any) -> dict[str, Any]:
        if not isinstance(observation, dict):
            return {"image": observation}
        thing = ("box", "key")[observation["goal"]]
        return {
            "image": observation["obs"],
            "mission": f"go to the {thing} of the color on the sign",
        }

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        observation, _ = self.env.reset(seed=seed)
        return self._observe(observation), {}

    def step(self, action: int):
        observation, reward, terminated, truncated, _ = self.env.step(int(action))
        info = {"success": bool(terminated and reward > 0)} if self._has_goal else {}
        return self._observe(observation), float(reward), bool(terminated), truncated, info


def _flat(position: np.ndarray) -> np.ndarray:
    """(x, z) of (..., x, y, z): everything happens on the floor."""
    return np.asarray(position)[..., [0, 2]]


def _wall_distance(world: Any, points: np.ndarray) -> np.ndarray:
    """Distance of each (x, z) to the nearest wall."""
    start, end = _flat(world.wall_segs[:, 0]), _flat(world.wall_segs[:, 1])
    along = end - start
    offset = points[..., None, :] - start
    share = np.sum(offset * along, -1) / np.sum(along**2, -1)
    offset = offset - np.clip(share, 0, 1)[..., None] * along
    return np.linalg.norm(offset, axis=-1).min(-1)


def _inside(room: Any, points: np.ndarray, margin: float = 0.0) -> np.ndarray:
    """Which points are in the room and at least `margin` away from its edges."""
    offset = points[..., None, :] - _flat(room.outline)
    return (np.sum(offset * _flat(room.edge_norms), -1) > margin).all(-1)


class Floor:
    """The floor as a grid of cells, those where the agent can stand, and the ways through them.

    `discs` are places to keep away from: (position, distance).
    """

    CELL = 0.2
    MARGIN = 0.1  # more room than the agent needs: it turns in steps and never walks quite straight

    def __init__(self, world: Any, discs: Iterable[tuple[np.ndarray, float]]):
        x = np.arange(world.min_x + self.CELL / 2, world.max_x, self.CELL)
        street = getattr(world, "street", None)  # of Sidewalk, which must not be entered
        low, high = (world.min_z, world.max_z) if street is None else (0, 12)
        z = np.arange(low + self.CELL / 2, high, self.CELL)
        self._corner = np.array([x[0], z[0]])
        self.points = np.stack(np.meshgrid(x, z, indexing="ij"), -1)
        free = _wall_distance(world, self.points) > world.agent.radius + self.MARGIN
        free &= np.any([_inside(room, self.points, -0.01) for room in world.rooms], axis=0)
        if street is not None:
            free &= ~_inside(street, self.points, -0.3)
        for position, distance in discs:
            gap = np.linalg.norm(self.points - _flat(position), axis=-1)
            free &= gap > distance + self.MARGIN
        self.free = free
        number = np.arange(free.size).reshape(free.shape)
        rows, columns, lengths = [], [], []
        for first, second, length in (
            (np.s_[:-1, :], np.s_[1:, :], 1.0),
            (np.s_[:, :-1], np.s_[:, 1:], 1.0),
            (np.s_[:-1, :-1], np.s_[1:, 1:], math.sqrt(2)),
            (np.s_[:-1, 1:], np.s_[1:, :-1], math.sqrt(2)),
        ):
            both = free[first] & free[second]
            rows.append(number[first][both])
            columns.append(number[second][both])
            lengths.append(np.full(len(rows[-1]), length * self.CELL))
        edges = np.concatenate(lengths), (np.concatenate(rows), np.concatenate(columns))
        self._graph = csr_array(edges, shape=(free.size, free.size))

    def aim(self, goal: np.ndarray) -> None:
        """Find the way from everywhere to the nearest cell of `goal`, a mask of the grid."""
        cells = np.flatnonzero(goal & self.free)
        if not len(cells):
            raise ExpertError("no room to stand where the goal can be reached")
        distance, following, _ = dijkstra(
            self._graph, directed=False, indices=cells, min_only=True, return_predecessors=True
        )
        self.distance, self._following = distance.reshape(self.free.shape), following

    def cell(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The indices of the cells that hold the points."""
        index = np.rint((points - self._corner) / self.CELL).astype(np.intp)
        index = np.clip(index, 0, np.array(self.free.shape) - 1)
        return index[..., 0], index[..., 1]

    def remaining(self, point: np.ndarray) -> float:
        """Length of the way from a point; infinite where one cannot stand."""
        return float(self.distance[self.cell(point)])

    def waypoint(self, point: np.ndarray, stride: float) -> np.ndarray:
        """The farthest point of the way from `point` to which one can walk straight.

        It is at least a stride away, where the way is that long: steps have a fixed length, and
        nearer points would be overshot back and forth.
        """
        points = self.points.reshape(-1, 2)
        far = np.where(np.isfinite(self.distance.ravel()), 0.0, np.inf)
        cell = int(np.argmin(np.linalg.norm(points - point, axis=-1) + far))
        way = [cell]
        while self._following[way[-1]] >= 0:
            way.append(self._following[way[-1]])
        lengths = np.linalg.norm(points[way] - point, axis=-1)
        for candidate, length in zip(reversed(way), reversed(lengths), strict=True):
            share = np.linspace(0, 1, 2 + int(length / (self.CELL / 2)))[1:, None]
            if self.free[self.cell(point + share * (points[candidate] - point))].all():
                break
        if length < stride:
            candidate = way[np.argmax(lengths >= stride) if (lengths >= stride).any() else -1]
        return points[candidate]


class Walker(Expert):
    """Walks to the level's box by the shortest way, which it finds on the map."""

    def reset(self, env: gym.Env) -> None:
        self.world = env.unwrapped
        self.agent = self.world.agent
        self.hazards: list[tuple[np.ndarray, float]] = []
        self.turn = math.radians(self.world.params.sample(None, "turn_step"))
        self.stride = self.world.params.sample(None, "forward_step")
        self._detour: list[int] = []
        self._walking = False
        self.begin()

    def begin(self) -> None:
        self.go_to(self.world.box)

    def act(self, observation: Any, executed: Any | None) -> int:
        return self.walk(self.floor.waypoint(_flat(self.agent.pos), self.stride))

    def touch_distance(self, entity: Any) -> float:
        """How near counts as reached."""
        reach = 1.1 * self.world.params.get_max("forward_step")
        return entity.radius + self.agent.radius + reach

    def go_to(self, entity: Any) -> None:
        """Set out for where the entity is reached, keeping away from the hazards."""
        discs = [
            (e.pos, e.radius + self.agent.radius)
            for e in self.world.entities
            if e not in (entity, self.agent) and e.radius
        ]
        self.floor = Floor(self.world, [*discs, *self.hazards])
        gap = np.linalg.norm(self.floor.points - _flat(entity.pos), axis=-1)
        self.floor.aim(gap < self.touch_distance(entity) - 0.1)

    def error(self, target: np.ndarray) -> float:
        """How far to turn left to face a point."""
        dx, dz = target - _flat(self.agent.pos)
        return (math.atan2(-dz, dx) - self.agent.dir + math.pi) % (2 * math.pi) - math.pi

    def ahead(self, turns: int = 0) -> np.ndarray:
        """Where a step leads, after some turns to the left."""
        heading = self.agent.dir + turns * self.turn
        return self.agent.pos + self.stride * np.array([math.cos(heading), 0, -math.sin(heading)])

    def safe(self, position: np.ndarray) -> bool:
        """Whether one can step there."""
        street = getattr(self.world, "street", None)
        return not (
            self.world.intersect(self.agent, position, self.agent.radius)
            or (street is not None and street.point_inside(position))
            or any(np.linalg.norm(_flat(position - p)) < d for p, d in self.hazards)
        )

    def walk(self, target: np.ndarray) -> int:
        """Turn to a point, then step; around what is in the way."""
        actions = self.world.actions
        if self._detour:
            action = self._detour.pop(0)
            if action != actions.move_forward or self.safe(self.ahead()):
                return int(action)
            self._detour = []
        error = self.error(target)
        # More error is borne while walking: with one bound, a target between two headings makes
        # for a turn at each step.
        if abs(error) > self.turn * (0.75 if self._walking else 0.5) + 1e-6:
            self._walking = False
            return int(actions.turn_left if error > 0 else actions.turn_right)
        if self.safe(self.ahead()):
            self._walking = True
            return int(actions.move_forward)
        half = round(math.pi / self.turn)
        options = [k for k in range(-half, half + 1) if k and self.safe(self.ahead(k))]
        if not options:
            raise ExpertError("stuck")
        turns = min(
            options,
            key=lambda k: (
                np.linalg.norm(_flat(self.ahead(k)) - target) + abs(k) * self.stride / 4,
                k,
            ),
        )
        turn = actions.turn_left if turns > 0 else actions.turn_right
        self._detour = [turn] * (abs(turns) - 1) + [actions.move_forward]
        return int(turn)


class Reader(Walker):
    """Goes to see the sign before it goes to what the sign and the mission name."""

    def begin(self) -> None:
        self._read = False
        self._sign = self.world.entities[-2]  # the agent is the last
        wanted = (self.world._goal, self.world._color_index)
        for kind, things in enumerate(self.world._objects):
            for color, thing in enumerate(things):
                if (kind, color) == wanted:
                    self._thing = thing
                else:  # touching it ends the episode
                    self.hazards.append((thing.pos, self.touch_distance(thing)))
        self.floor = Floor(self.world, self.hazards)
        # The whole of the second room looks at the sign.
        self.floor.aim(_inside(self.world.rooms[1], self.floor.points))

    def act(self, observation: Any, executed: Any | None) -> int:
        here = _flat(self.agent.pos)
        if not self._read and _inside(self.world.rooms[1], here):
            error = self.error(_flat(self._sign.pos))
            if abs(error) > self.turn / 2 + 1e-6:
                actions = self.world.actions
                return int(actions.turn_left if error > 0 else actions.turn_right)
            self._read, self._detour = True, []
            self.go_to(self._thing)
        return super().act(observation, executed)


class Collector(Walker):
    """Picks up the nearest object that can be picked up, again and again."""

    def begin(self) -> None:
        self._things: list[tuple[int, float, float]] = []

    def movable_things(self) -> list[Any]:
        return [e for e in self.world.entities if e is not self.agent and not e.is_static]

    def act(self, observation: Any, executed: Any | None) -> int:
        # MiniWorld picks up what a circle ahead of the agent meets, unless it meets a wall.
        radius = self.agent.radius
        probe = self.agent.pos + 1.5 * radius * self.agent.dir_vec
        if self.world.intersect(self.agent, probe, 1.2 * radius) not in (None, True):
            self._detour = []
            return int(self.world.actions.pickup)
        things = self.movable_things()
        places = [(id(e), *_flat(e.pos)) for e in things]
        if places != self._things:
            self._things, self._detour = places, []
            self._aim(things)
        here = _flat(self.agent.pos)
        if self.floor.remaining(here) == 0 and not self._detour:
            gaps = [np.linalg.norm(_flat(e.pos) - here) - e.radius for e in things]
            return self.walk(_flat(things[int(np.argmin(gaps))].pos))
        return self.walk(self.floor.waypoint(here, self.stride))

    def _aim(self, things: list[Any]) -> None:
        radius = self.agent.radius
        self.floor = Floor(self.world, [(e.pos, e.radius + radius) for e in things])
        points, goal = self.floor.points, np.zeros(self.floor.free.shape, bool)
        for thing in things:
            to = _flat(thing.pos) - points
            gap = np.linalg.norm(to, axis=-1, keepdims=True)
            reach = gap[..., 0] < thing.radius + 2.7 * radius - 0.1
            probe = points[reach] + 1.5 * radius * to[reach] / gap[reach]
            reach[reach] = _wall_distance(self.world, probe) > 1.2 * radius + 0.05
            goal |= reach
        self.floor.aim(goal)


_EXPERTS = {"Sign": Reader, "PickupObjects": Collector, "CollectHealth": Collector}

_SKILLS = {
    Walker: "walks the shortest way to the box",
    Reader: "walks to where the sign is in view, then to the object that it names",
    Collector: "walks to the nearest object and picks it up, until none is left",
}


def make_expert(name: str) -> Expert:
    return _EXPERTS.get(name, Walker)()


def perturb(action: int, noise: float, env: gym.Env, rng: np.random.Generator) -> int:
    """Turns and steps only: noise never picks up, drops or ends an episode."""
    return int(rng.integers(3)) if rng.random() < noise else action


DOMAINS = (
    Domain(
        name="dmlab",
        tasks={
            f"dmlab/{name}": TaskSpec(
                id=f"dmlab/{name}",
                metric=level.metric,
                floor=level.best,
                floor_source=level.best_source,
                noise="share of actions replaced by a random turn or step",
                expert=_SKILLS[_EXPERTS.get(name, Walker)],
                sees="the map with all objects and its own place on it",
            )
            for name, level in LEVELS.items()
        },
        make_env=Lab,
        make_expert=make_expert,
        sources=("dmlab.py",),
        perturb=perturb,
    ),
)
