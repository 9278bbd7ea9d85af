"""RGB Stacking: put the red object on the blue one and ignore the green (paper 3.1, 4.3; Table 1).

The paper's robot is a Sawyer arm with a gripper over a walled table. Its Cartesian controller is
what the agent acts through, so ours is only that: a gripper on a gantry that moves in x, y, z and
yaw. As in the paper the agent commands velocities and a gripper that is open or closed, 20 times a
second for 400 steps, and sees two camera images and the robot's own state, never the objects'. The
paper's images are 128 x 128; ours are 64 x 64, 32 patches a step in place of 128.

What differs between object sets, robots and skills is a `Scene` and a `goal`; the basic scene has
three boxes of random size.
"""

from __future__ import annotations

import atexit
import dataclasses
import itertools
import math
import os
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np

from gato_lib.domains.base import Domain, Expert, TaskSpec, gaussian

MAX_STEPS = 400
STEP = 0.05  # s: control at 20 Hz
PHYSICS = 0.002  # s
IMAGE = 64
HOLD = 5  # steps that the stack must stand, released and still

SPEED = 0.15  # m/s at action 1
TURN = 2.0  # rad/s at action 1
REACH = 0.24  # m: the gantry's half range in x and y
HEIGHT = (0.016, 0.30)  # m: range of the point between the fingers; their tips are 14 mm lower
YAW = 1.7  # rad: half range; any direction of grasp is within it
OPEN = 0.039  # m: how far each finger opens

COLOURS = {"red": ".85 .1 .1 1", "green": ".1 .7 .15 1", "blue": ".1 .2 .85 1"}


@dataclasses.dataclass(frozen=True)
class Solid:
    """A convex object: its corners (n, 3) in m about its centre, or a box by its half sizes."""

    corners: np.ndarray
    half: tuple[float, float, float] | None = None

    @classmethod
    def box(cls, x: float, y: float, z: float) -> Solid:
        return cls(np.array(list(itertools.product((-x, x), (-y, y), (-z, z)))), (x, y, z))


@dataclasses.dataclass(frozen=True)
class Scene:
    """What an episode is played with.

    Attributes:
      solids: colour -> object.
      friction: of the objects, sliding.
      density: of the objects, kg/m3.
      cameras: name -> (position, its right and up axes); the images' keys in the observation.
      delay: control steps until an action takes effect.
    """

    solids: dict[str, Solid]
    friction: float = 1.0
    density: float = 400.0
    cameras: dict[str, tuple[str, str]] = dataclasses.field(
        default_factory=lambda: {
            "front": (".55 0 .42", "0 1 0 -.6 0 .8"),
            "side": ("0 -.55 .42", "1 0 0 0 .6 .8"),
        }
    )
    delay: int = 0


def basic(rng: np.random.Generator) -> Scene:
    """Three boxes of 34 to 52 mm."""
    return Scene({c: Solid.box(*rng.uniform(0.017, 0.026, 3)) for c in COLOURS})


_XML = """
<mujoco>
  <compiler angle="radian"/>
  <option timestep="{physics}" integrator="implicitfast" cone="elliptic" impratio="10">
    <flag multiccd="enable"/>
  </option>
  <visual>
    <global fovy="45" offwidth="{image}" offheight="{image}"/>
    <quality shadowsize="0" offsamples="0"/>
    <headlight ambient=".5 .5 .5" diffuse=".5 .5 .5" specular="0 0 0"/>
  </visual>
  <default>
    <geom friction="1 .01 .001"/>
    <default class="wall"><geom type="box" rgba=".3 .3 .3 1"/></default>
    <default class="solid">
      <geom density="{density}" friction="{friction} .01 .001" condim="4" solref=".008 1"/>
    </default>
    <default class="finger">
      <geom type="box" size=".012 .005 .032" rgba=".1 .1 .1 1" mass=".05" condim="4"
            friction="1.5 .02 .002"/>
    </default>
    <default class="jaw">
      <joint type="slide" range="0 .04" damping="50"/>
      <position kp="1000" forcerange="-12 12"/>
    </default>
  </default>
  <asset>
    <texture name="checker" type="2d" builtin="checker" rgb1=".62 .58 .5" rgb2=".54 .5 .43"
             width="64" height="64"/>
    <material name="table" texture="checker" texrepeat="5 5"/>
    {meshes}
  </asset>
  <worldbody>
    {cameras}
    <geom name="table" type="box" size=".28 .28 .02" pos="0 0 -.02" material="table"/>
    <geom class="wall" size=".01 .28 .03" pos=".27 0 .01"/>
    <geom class="wall" size=".01 .28 .03" pos="-.27 0 .01"/>
    <geom class="wall" size=".28 .01 .03" pos="0 .27 .01"/>
    <geom class="wall" size=".28 .01 .03" pos="0 -.27 .01"/>
    <body name="hand" gravcomp="1">
      <joint name="x" type="slide" axis="1 0 0" damping="20"/>
      <joint name="y" type="slide" axis="0 1 0" damping="20"/>
      <joint name="z" type="slide" axis="0 0 1" damping="20"/>
      <joint name="yaw" axis="0 0 1" damping=".5"/>
      <geom type="box" size=".025 .055 .02" pos="0 0 .07" mass=".8" rgba=".2 .2 .25 1"/>
      <geom type="cylinder" size=".015 .1" pos="0 0 .18" mass=".1" rgba=".6 .6 .65 1"
            contype="0" conaffinity="0"/>
      <body name="left" gravcomp="1">
        <joint class="jaw" name="left" axis="0 1 0"/>
        <geom class="finger" pos="0 .005 .018"/>
      </body>
      <body name="right" gravcomp="1">
        <joint class="jaw" name="right" axis="0 -1 0"/>
        <geom class="finger" pos="0 -.005 .018"/>
      </body>
    </body>
    {solids}
  </worldbody>
  <contact><exclude body1="left" body2="right"/></contact>
  <equality><joint joint1="left" joint2="right"/></equality>
  <actuator>
    <position joint="x" kp="2000" kv="150" forcerange="-20 20"/>
    <position joint="y" kp="2000" kv="150" forcerange="-20 20"/>
    <position joint="z" kp="2000" kv="150" forcerange="-20 20"/>
    <position joint="yaw" kp="30" kv="2"/>
    <position class="jaw" joint="left"/>
    <position class="jaw" joint="right"/>
  </actuator>
</mujoco>
"""


def build(scene: Scene, image: int = IMAGE) -> Any:
    """The scene's `mujoco.MjModel`; an object's body has its colour's name.

    `multiccd` lets a mesh rest on several points of a face; on the usual single one it topples.
    """
    import mujoco

    meshes, solids = [], []
    for colour, solid in scene.solids.items():
        if solid.half is not None:
            shape = f'type="box" size="{" ".join(map(repr, map(float, solid.half)))}"'
        else:
            vertices = " ".join(map(repr, map(float, solid.corners.ravel())))
            meshes.append(f'<mesh name="{colour}" vertex="{vertices}"/>')
            shape = f'type="mesh" mesh="{colour}"'
        solids.append(
            f'<body name="{colour}"><freejoint name="{colour}"/>'
            f'<geom class="solid" {shape} rgba="{COLOURS[colour]}"/></body>'
        )
    cameras = [
        f'<camera name="{name}" pos="{position}" xyaxes="{axes}"/>'
        for name, (position, axes) in scene.cameras.items()
    ]
    xml = _XML.format(
        physics=PHYSICS,
        image=image,
        density=scene.density,
        friction=scene.friction,
        meshes="".join(meshes),
        cameras="".join(cameras),
        solids="".join(solids),
    )
    return mujoco.MjModel.from_xml_string(xml)


class _Renderer:
    """Draws a model's cameras with what costs most in software left out (shadows, reflections,
    antialiasing): about 1 ms an image. One graphics context serves all the episodes' models.
    """

    def __init__(self, size: int):
        os.environ.setdefault("MUJOCO_GL", "egl")  # without a display MuJoCo must be told how
        import mujoco

        self._mj, self._size = mujoco, size
        self._gl = mujoco.GLContext(size, size)
        # EGL ends itself at exit and complains of contexts that are freed later. Exit functions run
        # last in, first out: EGL's is registered by now.
        atexit.register(lambda mine: mine() and mine().close(), weakref.ref(self))
        self._option, self._camera = mujoco.MjvOption(), mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._context = None

    def load(self, model: Any) -> None:
        mj = self._mj
        self._gl.make_current()
        if self._context is not None:
            self._context.free()
        self._context = mj.MjrContext(model, mj.mjtFontScale.mjFONTSCALE_100.value)
        mj.mjr_setBuffer(mj.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        self._scene = mj.MjvScene(model, maxgeom=64)
        for flag in ("SHADOW", "REFLECTION", "HAZE", "SKYBOX"):
            self._scene.flags[getattr(mj.mjtRndFlag, f"mjRND_{flag}")] = 0

    def draw(self, model: Any, data: Any, camera: str) -> np.ndarray:
        mj = self._mj
        self._gl.make_current()
        self._camera.fixedcamid = model.camera(camera).id
        mj.mjv_updateScene(
            model, data, self._option, None, self._camera, mj.mjtCatBit.mjCAT_ALL, self._scene
        )
        view = mj.MjrRect(0, 0, self._size, self._size)
        image = np.empty((self._size, self._size, 3), np.uint8)
        mj.mjr_render(view, self._scene, self._context)
        mj.mjr_readPixels(image, None, view, self._context)
        return image[::-1].copy()

    def close(self) -> None:
        if self._context is not None:
            self._gl.make_current()
            self._context.free()
            self._context = None
        self._gl.free()


class RGBStacking(gym.Env):
    """`goal` = (upper, lower): the episode ends when the one rests on the other, let go.

    `draw` draws an episode's scene; the cameras' names must be the same in all.
    """

    def __init__(
        self,
        draw: Callable[[np.random.Generator], Scene] = basic,
        goal: tuple[str, str] = ("red", "blue"),
        image: int = IMAGE,
    ):
        self._draw, self.goal, self._image = draw, goal, image
        self._cameras = tuple(draw(np.random.default_rng(0)).cameras)
        self._renderer: _Renderer | None = None
        images = {c: gym.spaces.Box(0, 255, (image, image, 3), np.uint8) for c in self._cameras}
        state = gym.spaces.Box(-np.inf, np.inf, (19,), np.float64)
        self.observation_space = gym.spaces.Dict(images | {"proprioception": state})
        self.action_space = gym.spaces.Box(-1.0, 1.0, (5,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        import mujoco

        super().reset(seed=seed)
        rng = self.np_random
        self._mj = mujoco
        self.scene = self._draw(rng)
        self.model = build(self.scene, self._image)
        self.data = mujoco.MjData(self.model)
        self._target = np.array([*rng.uniform(-0.15, 0.15, 2), rng.uniform(0.12, 0.25), 0.0, OPEN])
        self.data.qpos[:6] = [*self._target, OPEN]
        self._scatter(rng)
        self._waiting = deque(
            [np.array([0, 0, 0, 0, -1.0], np.float32)] * self.scene.delay,
            maxlen=self.scene.delay + 1,
        )
        self._steps = self._stood = 0
        self._advance(0.1)  # the objects come to rest
        if self._renderer is None:
            self._renderer = _Renderer(self._image)
        self._renderer.load(self.model)
        return self._observe(), {"success": False}

    def _scatter(self, rng: np.random.Generator) -> None:
        """Lay the objects on the table, turned at random and clear of each other."""
        places: list[np.ndarray] = []
        for colour, solid in self.scene.solids.items():
            place = rng.uniform(-0.17, 0.17, 2)
            while any(np.linalg.norm(place - other) < 0.1 for other in places):
                place = rng.uniform(-0.17, 0.17, 2)
            places.append(place)
            height, turn = 0.001 - solid.corners[:, 2].min(), rng.uniform(-np.pi, np.pi) / 2
            pose = [*place, height, math.cos(turn), 0.0, 0.0, math.sin(turn)]
            self.data.joint(colour).qpos[:] = pose

    def _advance(self, seconds: float) -> None:
        self.data.ctrl[:] = [*self._target, self._target[4]]
        self._mj.mj_step(self.model, self.data, round(seconds / PHYSICS))
        self._mj.mj_forward(self.model, self.data)  # poses and contacts of this very state

    def step(self, action: np.ndarray):
        action = np.clip(np.asarray(action, np.float64), -1.0, 1.0)
        self._waiting.append(action)
        action = self._waiting[0]
        low = np.array([-REACH, -REACH, HEIGHT[0], -YAW])
        high = np.array([REACH, REACH, HEIGHT[1], YAW])
        move = action[:4] * STEP * np.array([SPEED, SPEED, SPEED, TURN])
        self._target[:4] = np.clip(self._target[:4] + move, low, high)
        self._target[4] = 0.0 if action[4] > 0 else OPEN
        self._advance(STEP)
        self._steps += 1
        self._stood = self._stood + 1 if self.stacked() else 0
        success = self._stood >= HOLD
        truncated = self._steps >= MAX_STEPS
        return self._observe(), float(success), success, truncated, {"success": success}

    def _observe(self) -> dict[str, np.ndarray]:
        data, hand = self.data, self.data.body("hand")
        images = {c: self._renderer.draw(self.model, data, c) for c in self._cameras}
        state = [data.qpos[:6], data.qvel[:6], hand.xpos, hand.xquat]
        return images | {"proprioception": np.concatenate(state)}

    def stacked(self) -> bool:
        """Whether the upper object is still, above the lower one, and touches nothing else."""
        upper, lower = (self.model.body(c).id for c in self.goal)
        owner = self.model.geom_bodyid
        pairs = [{int(owner[a]), int(owner[b])} for a, b in self.data.contact.geom]
        touched = set().union(*(pair for pair in pairs if upper in pair)) - {upper}
        velocity = np.abs(self.data.joint(self.goal[0]).qvel)
        still = velocity[:3].max() < 0.02 and velocity[3:].max() < 0.2
        return (
            touched == {lower} and still and self.span(self.goal[0])[0] > self.data.xpos[lower, 2]
        )

    def pose(self, colour: str) -> tuple[np.ndarray, np.ndarray]:
        """Position of an object, and its corners about it, (n, 3), turned as it is."""
        body = self.data.body(colour)
        return body.xpos.copy(), self.scene.solids[colour].corners @ body.xmat.reshape(3, 3).T

    def span(self, colour: str) -> tuple[float, float]:
        """Heights of an object's lowest and highest corner."""
        position, corners = self.pose(colour)
        return position[2] + corners[:, 2].min(), position[2] + corners[:, 2].max()

    def hand(self) -> tuple[np.ndarray, float]:
        """The point between the fingers, and the yaw."""
        return self.data.qpos[:3].copy(), float(self.data.qpos[3])

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


class StateMachine(Expert):
    """Above the object, down, grasp, over to the other, down, let go, up; again where that failed.

    It reads the objects' poses and shapes. Each phase is a method that returns the action and says
    which phase is next; each has so much time, then the attempt begins anew with another grasp.
    """

    GAIN = 0.45  # share of the distance commanded for the next step; more overshoots
    TRAVEL = 0.12  # m: a height at which the empty hand clears the objects

    def reset(self, env: gym.Env) -> None:
        self._sim: RGBStacking = env.unwrapped
        self._attempts = 0
        self._begin("above")

    def act(self, observation: Any, executed: np.ndarray | None) -> np.ndarray:
        self._ticks += 1
        if self._ticks > 80:
            self._retry()
        self._at, self._yaw = self._sim.hand()
        return getattr(self, f"_{self._phase}")()

    def _begin(self, phase: str) -> None:
        self._phase, self._ticks = phase, 0

    def _retry(self) -> None:
        self._attempts += 1
        self._begin("above")

    def _go(self, target: Any, yaw: float, closed: bool, fast: float = 1.0) -> np.ndarray:
        """Towards a place; `fast` bounds the vertical speed."""
        velocity = self.GAIN * (np.asarray(target) - self._at) / (SPEED * STEP)
        velocity[2] = np.clip(velocity[2], -fast, fast)
        turn = self.GAIN * (yaw - self._yaw) / (TURN * STEP)
        action = [*velocity, turn, 1.0 if closed else -1.0]
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    def _grasp_yaw(self) -> float:
        """Where the object is narrow, the fingers have room and the hand turns little.

        The hand's y axis, along which the fingers close, is at yaw + 90 degrees.
        """
        sim, (upper, _) = self._sim, self._sim.goal
        yaws = np.linspace(-YAW + 0.05, YAW - 0.05, 133)
        along = np.stack([-np.sin(yaws), np.cos(yaws)])  # (2, yaws)
        place, corners = sim.pose(upper)
        width = np.ptp(corners[:, :2] @ along, axis=0)
        narrow = np.flatnonzero((width[1:-1] <= width[:-2]) & (width[1:-1] <= width[2:])) + 1
        if not len(narrow):
            narrow = np.array([width.argmin()])
        cost = np.abs(yaws - self._yaw) + 40 * width
        fingers = place[:2, None] + np.stack([along, -along]) * (OPEN + 0.005)  # (2, 2, yaws)
        cost += 2.0 * (np.abs(fingers).max(axis=(0, 1)) > 0.245)  # a wall in the way
        for colour in sim.scene.solids:
            if colour != upper:
                other = sim.pose(colour)[0][:2]
                near = np.linalg.norm(fingers - other[None, :, None], axis=1).min(axis=0)
                cost += 2.0 * (near < 0.035)
        order = narrow[np.argsort(cost[narrow])]
        return float(yaws[order[self._attempts % min(2, len(order))]])

    def _above(self) -> np.ndarray:
        place = self._sim.pose(self._sim.goal[0])[0]
        if self._ticks == 1:
            self._turn = self._grasp_yaw()
        away = np.linalg.norm(place[:2] - self._at[:2])
        height = max(place[2] + 0.08, self.TRAVEL if away > 0.02 else 0.0)
        if away > 0.02 and self._at[2] < height - 0.03:
            return self._go([*self._at[:2], height], self._yaw, False)
        near = away < 0.01 and abs(self._yaw - self._turn) < 0.08
        if near and 0.05 < self._at[2] - place[2] < 0.1:
            self._begin("down")
        return self._go([*place[:2], height], self._turn, False)

    def _down(self) -> np.ndarray:
        upper = self._sim.goal[0]
        place = self._sim.pose(upper)[0]
        # A little up from the object's foot, so that the fingertips stay off what it stands on.
        height = max(HEIGHT[0], self._sim.span(upper)[0] + 0.02)
        if self._at[2] < height + 0.006:
            self._begin("close")
        return self._go([*place[:2], height], self._turn, False)

    def _close(self) -> np.ndarray:
        if self._ticks > 6:
            self._begin("carry")
        return self._go(self._at, self._turn, True)

    def _over(self, gap: float) -> np.ndarray:
        """Where the hand is when the held object is `gap` above the middle of the lower one."""
        upper, lower = self._sim.goal
        held = self._sim.pose(upper)[0][:2] - self._at[:2]
        up = self._sim.span(lower)[1] + gap - self._sim.span(upper)[0]
        return np.array([*(self._sim.pose(lower)[0][:2] - held), self._at[2] + up])

    def _lost(self) -> bool:
        return bool(np.linalg.norm(self._sim.pose(self._sim.goal[0])[0] - self._at) > 0.05)

    def _carry(self) -> np.ndarray:
        if self._lost():
            self._retry()
        target = self._over(0.03)
        away = np.linalg.norm(target[:2] - self._at[:2])
        if away > 0.02 and target[2] - self._at[2] > 0.012:  # up before sideways
            target[:2] = self._at[:2]
        elif away < 0.006:
            self._begin("lower")
        return self._go(target, self._turn, True)

    def _lower(self) -> np.ndarray:
        if self._lost():
            self._retry()
        target = self._over(0.0)
        if self._at[2] - target[2] < 0.002:
            self._begin("release")
        return self._go(target, self._turn, True, fast=0.35)

    def _release(self) -> np.ndarray:
        if self._ticks > 5:
            self._begin("retreat")
        return self._go(self._at, self._turn, False)

    def _retreat(self) -> np.ndarray:
        if self._ticks > 30:
            self._retry()
        height = max(self.TRAVEL, self._sim.span(self._sim.goal[0])[1] + 0.03)
        return self._go([*self._at[:2], height], self._turn, False)


def make_env(name: str) -> gym.Env:
    return {"red-on-blue": RGBStacking}[name]()


DOMAINS = (
    Domain(
        name="rgb_stacking",
        tasks={
            "rgb_stacking/red-on-blue": TaskSpec(
                id="rgb_stacking/red-on-blue",
                metric="success",
                floor=1.0,
                floor_source="every episode solved",
                noise="standard deviation of Gaussian noise on each of the five actions",
                expert="a state machine: reach, grasp, carry, lower, release; again if it failed",
                sees="poses and shapes of the objects, which the agent sees only in the images",
            )
        },
        make_env=make_env,
        make_expert=lambda name: StateMachine(),
        sources=("rgb_stacking.py",),
        perturb=gaussian,
    ),
)
