"""RGB Stacking: put one object on another and ignore the third (paper 3.3, 4.2, 5.3, App. F).

The paper's robot is a Sawyer arm with a gripper over a walled table. Its Cartesian controller is
what the agent acts through, so ours is only that: a gripper on a gantry that moves in x, y, z and
yaw. As in the paper the agent commands velocities and a gripper that is open or closed, 20 times a
second for 400 steps, and sees two camera images and the robot's own state, never the objects'. The
paper's images are 128 x 128; ours are 64 x 64 unless asked, 32 patches a step in place of 128. Both
of its cameras stand before the table; one of ours is on the hand, without which a network that two
cores can train grasps next to nothing.

What differs between object sets and robots is a `Scene`, between skills a goal.

- `rgb_stacking` is the paper's simulator. Red on blue with training shapes is what pretraining
  sees; the five triplets and blue on green are held out.
- `rgb_stacking_shifted` stands in for the paper's real robot. It is a simulator as well: other
  cameras, light and friction, heavier objects, actions that come late, noise in what is seen.
- `rgb_stacking_state` tells the objects' poses and sizes instead of images: for cheap studies, and
  nothing that the paper has.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import math
import os
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np

from gato_lib.domains.base import Domain, Expert, TaskSpec, gaussian
from gato_lib.domains.rgb_objects import COLOURS, TRIPLETS, Shape, training_shape

MAX_STEPS = 400
STEP = 0.05  # s: control at 20 Hz
PHYSICS = 0.002  # s
IMAGE = 64
STATE = 6  # numbers of the robot's own state
HOLD = 5  # steps that the stack must stand, released and still

SPEED = 0.15  # m/s at action 1
TURN = 2.0  # rad/s at action 1
REACH = 0.24  # m: the gantry's half range in x and y
HEIGHT = (0.016, 0.30)  # m: range of the point between the fingers; their tips are 14 mm lower
YAW = 1.7  # rad: half range; any direction of grasp is within it
OPEN = 0.039  # m: how far each finger opens

PAINT = dict(zip(COLOURS, (".85 .1 .1 1", ".1 .7 .15 1", ".1 .2 .85 1"), strict=True))


@dataclasses.dataclass(frozen=True)
class Camera:
    """Place, right and up axes, and `fovy` in degrees; fixed, or on the hand."""

    position: tuple[float, float, float]
    axes: tuple[float, float, float, float, float, float]
    fovy: float = 45.0
    on_hand: bool = False


CAMERAS = {
    "front": Camera((0.45, 0.0, 0.5), (0.0, 1.0, 0.0, -0.707, 0.0, 0.707)),
    # Beside the fingers, looking at what is between them and at what is below.
    "hand": Camera((0.09, 0.0, 0.09), (0.0, 1.0, 0.0, -0.906, 0.0, 0.423), 80.0, on_hand=True),
}

SHIFTED_CAMERAS = {  # up to 7 cm and some degrees from the others
    "front": Camera((0.48, 0.05, 0.46), (-0.09, 0.996, 0.0, -0.66, -0.06, 0.749)),
    "hand": Camera((0.09, 0.01, 0.1), (-0.08, 0.997, 0.0, -0.88, -0.07, 0.47), 75.0, True),
}


@dataclasses.dataclass(frozen=True)
class Scene:
    """What an episode is played with.

    Attributes:
      objects: colour -> shape.
      friction: of objects and table, sliding; the fingers have more.
      density: of the objects, kg/m3.
      cameras: by name, the images' keys in the observation.
      light: ambient and diffuse, of a lamp at the camera.
      delay: control steps until an action takes effect.
      noise: standard deviations of what is added to images, in grey levels, and to the robot's
        state, in m, m/s and rad.
    """

    objects: dict[str, Shape]
    friction: float = 1.0
    density: float = 400.0
    cameras: dict[str, Camera] = dataclasses.field(default_factory=lambda: dict(CAMERAS))
    light: tuple[float, float] = (0.5, 0.5)
    delay: int = 0
    noise: tuple[float, float] = (0.0, 0.0)


Draw = Callable[[np.random.Generator], Scene]


def training(rng: np.random.Generator) -> Scene:
    """New training shapes in every episode."""
    return Scene({colour: training_shape(rng) for colour in COLOURS})


@dataclasses.dataclass(frozen=True)
class Triplet:
    """Draws the scene of a test triplet, 1 to 5."""

    number: int

    def __call__(self, rng: np.random.Generator) -> Scene:
        return Scene(TRIPLETS[self.number])


@dataclasses.dataclass(frozen=True)
class Shifted:
    """The scenes of another `draw` in the shifted world, at a seed with the same poses."""

    draw: Draw

    def __call__(self, rng: np.random.Generator) -> Scene:
        scene, (rng,) = self.draw(rng), rng.spawn(1)
        return dataclasses.replace(
            scene,
            friction=float(rng.uniform(0.6, 0.9)),
            density=float(rng.uniform(500.0, 900.0)),
            cameras=SHIFTED_CAMERAS,
            light=(float(rng.uniform(0.25, 0.4)), float(rng.uniform(0.5, 0.8))),
            delay=1,
            noise=(6.0, 0.001),
        )


_XML = """
<mujoco>
  <compiler angle="radian"/>
  <option timestep="{physics}" integrator="implicitfast" cone="elliptic" impratio="10">
    <flag multiccd="enable"/>
  </option>
  <visual>
    <global offwidth="{image}" offheight="{image}"/>
    <quality shadowsize="0" offsamples="0"/>
    <headlight ambient="{ambient}" diffuse="{diffuse}" specular="0 0 0"/>
  </visual>
  <default>
    <geom friction="{friction} .01 .001"/>
    <default class="wall"><geom type="box" rgba=".3 .3 .3 1"/></default>
    <default class="object">
      <geom density="{density}" condim="4" solref=".008 1" margin=".0002" gap=".0002"/>
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
      {on_hand}
      <body name="left" gravcomp="1">
        <joint class="jaw" name="left" axis="0 1 0"/>
        <geom class="finger" pos="0 .005 .018"/>
      </body>
      <body name="right" gravcomp="1">
        <joint class="jaw" name="right" axis="0 -1 0"/>
        <geom class="finger" pos="0 -.005 .018"/>
      </body>
    </body>
    {objects}
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

    `multiccd` lets a mesh rest on several points of a face; on the usual single one it topples. The
    margin finds these points 0.2 mm early, without force, or they come and go and the stack
    trembles.
    """
    import mujoco

    meshes, objects = [], []
    for colour, shape in scene.objects.items():
        if shape.is_box:
            half = np.array([shape.length, shape.width, shape.height]) / 2000
            geom = f'type="box" size="{_numbers(half)}"'
        else:
            meshes.append(f'<mesh name="{colour}" vertex="{_numbers(shape.corners.ravel())}"/>')
            geom = f'type="mesh" mesh="{colour}"'
        objects.append(
            f'<body name="{colour}"><freejoint name="{colour}"/>'
            f'<geom class="object" {geom} rgba="{PAINT[colour]}"/></body>'
        )
    cameras: dict[bool, str] = {True: "", False: ""}
    for name, camera in scene.cameras.items():
        cameras[camera.on_hand] += (
            f'<camera name="{name}" pos="{_numbers(camera.position)}" '
            f'xyaxes="{_numbers(camera.axes)}" fovy="{camera.fovy}"/>'
        )
    ambient, diffuse = (_numbers([level] * 3) for level in scene.light)
    xml = _XML.format(
        physics=PHYSICS,
        image=image,
        density=scene.density,
        friction=scene.friction,
        ambient=ambient,
        diffuse=diffuse,
        meshes="".join(meshes),
        cameras=cameras[False],
        on_hand=cameras[True],
        objects="".join(objects),
    )
    return mujoco.MjModel.from_xml_string(xml)


def _numbers(values: Any) -> str:
    return " ".join(repr(float(v)) for v in values)


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

    `draw` draws an episode's scene; the cameras' names must be the same in all. `image` is the side
    of the images in pixels; 0 puts "objects" in their place, for each object in the order of
    `COLOURS` its position, rotation matrix and the sizes of the box around its foot, and up, in mm.
    """

    def __init__(
        self,
        draw: Draw = training,
        goal: tuple[str, str] = ("red", "blue"),
        image: int = IMAGE,
    ):
        self._draw, self.goal, self._image = draw, goal, image
        self._cameras = tuple(draw(np.random.default_rng(0)).cameras) if image else ()
        self._renderer: _Renderer | None = None
        spaces = {c: gym.spaces.Box(0, 255, (image, image, 3), np.uint8) for c in self._cameras}
        if not image:
            spaces["objects"] = gym.spaces.Box(-np.inf, np.inf, (45,), np.float64)
        spaces["proprioception"] = gym.spaces.Box(-np.inf, np.inf, (STATE,), np.float64)
        self.observation_space = gym.spaces.Dict(spaces)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (5,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        import mujoco

        super().reset(seed=seed)
        rng = self.np_random
        self._mj = mujoco
        self.scene = self._draw(rng)
        self.model = build(self.scene, self._image or 256)  # 256: for pictures of the scene
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
        if self._image:
            if self._renderer is None:
                self._renderer = _Renderer(self._image)
            self._renderer.load(self.model)
        return self._observe(), {"success": False}

    def _scatter(self, rng: np.random.Generator) -> None:
        """Lay the objects on the table, turned at random and clear of each other."""
        places: list[np.ndarray] = []
        for colour, shape in self.scene.objects.items():
            place = rng.uniform(-0.17, 0.17, 2)
            while any(np.linalg.norm(place - other) < 0.1 for other in places):
                place = rng.uniform(-0.17, 0.17, 2)
            places.append(place)
            height, turn = 0.001 - shape.corners[:, 2].min(), rng.uniform(-np.pi, np.pi) / 2
            pose = [*place, height, math.cos(turn), 0.0, 0.0, math.sin(turn)]
            self.data.joint(colour).qpos[:] = pose

    def _advance(self, seconds: float) -> None:
        self.data.ctrl[:] = [*self._target, self._target[4]]
        self._mj.mj_step(self.model, self.data, round(seconds / PHYSICS))
        self._mj.mj_forward(self.model, self.data)  # poses and contacts of this very state

    def step(self, action: np.ndarray):
        action = np.asarray(action, np.float64)
        if action.shape != (5,) or not np.isfinite(action).all():
            raise ValueError(f"action is {action}, expected five finite numbers")
        action = np.clip(action, -1.0, 1.0)
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
        """The fingers move as one: the joints of the gantry, the left finger, and its velocity."""
        data, (grey, small) = self.data, self.scene.noise
        state = np.array([*data.qpos[:5], data.qvel[4]])
        seen = {c: self._renderer.draw(self.model, data, c) for c in self._cameras}
        if small:
            state += self.np_random.normal(0.0, small, state.shape)
        if grey:
            for camera, image in seen.items():
                noisy = image + self.np_random.normal(0.0, grey, image.shape)
                seen[camera] = noisy.clip(0, 255).round().astype(np.uint8)
        if not self._image:
            seen["objects"] = np.concatenate([self._told(c) for c in COLOURS])
        return seen | {"proprioception": state}

    def _told(self, colour: str) -> np.ndarray:
        body, shape = self.data.body(colour), self.scene.objects[colour]
        return np.array([*body.xpos, *body.xmat, shape.length, shape.width, shape.height])

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
        return body.xpos.copy(), self.scene.objects[colour].corners @ body.xmat.reshape(3, 3).T

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
        for colour in sim.scene.objects:
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


# Names of tasks: the pair, and behind it the number of a test triplet.
TASKS = ("red-on-blue", *(f"red-on-blue-{n}" for n in TRIPLETS), "blue-on-green-1")


def make_env(name: str, shifted: bool = False, image: int = IMAGE) -> RGBStacking:
    """The environment of a task: any pair of colours, and a test triplet or training shapes.

    Raises ValueError for another name.
    """
    pair, _, number = name.replace("-on-", " ").partition("-")
    upper, _, lower = pair.partition(" ")
    if not {upper, lower} <= set(COLOURS) or upper == lower or number not in ("", *"12345"):
        raise ValueError(f"{name!r}: expected a task as in red-on-blue or blue-on-green-1")
    draw: Draw = Triplet(int(number)) if number else training
    return RGBStacking(Shifted(draw) if shifted else draw, (upper, lower), image)


def _domain(name: str, sees: str, extra: bool = False, **settings: Any) -> Domain:
    return Domain(
        name=name,
        tasks={
            f"{name}/{task}": TaskSpec(
                id=f"{name}/{task}",
                metric="success",
                floor=1.0,
                floor_source="every episode solved",
                noise="standard deviation of Gaussian noise on each of the five actions",
                expert="a state machine: reach, grasp, carry, lower, release; again if it failed",
                sees=sees,
            )
            for task in TASKS
        },
        make_env=functools.partial(make_env, **settings),
        make_expert=lambda name: StateMachine(),
        sources=("rgb_stacking.py", "rgb_objects.py"),
        perturb=gaussian,
        extra=extra,
    )


SEES = "poses and shapes of the objects, which the agent sees only in the images"
CORNERS = "corners of the objects, of which the agent is told poses and sizes"
DOMAINS = (
    _domain("rgb_stacking", SEES),
    _domain("rgb_stacking_shifted", SEES, shifted=True),
    _domain("rgb_stacking_state", CORNERS, extra=True, image=0),
)
