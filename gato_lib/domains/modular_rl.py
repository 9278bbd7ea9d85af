"""Modular RL: walkers, hoppers and humanoids with limbs missing (paper 3.1, Table 1, App. F).

The bodies are those of gymnasium's Walker2d, Hopper and Humanoid (v5), with subsets of their limbs
that hold the torso and are connected. Each has its own sizes of observation and action, and its own
dynamics. All else is gymnasium's: observations; the reward, which is the speed ahead and 1 for each
step upright, less the effort; and the episode's end when the body falls, or after 1,000 steps. A
body that stands lower for want of a shin starts lower, and may go lower in proportion.

The humanoids move in a plane, as in Huang et al., "One Policy to Control Them All"
(arXiv:2007.04976), where this benchmark comes from: their joints turn about the y axis only, and
observations and reward are Walker2d's.

The paper's experts are trained agents (D4PG), and so are ours, in a small way: linear maps from
what is observed to controls, found by random search (`experiments/gaits.py`). Left out are
morphologies that a planner in the simulator could not keep up for most of an episode, such as a
single leg without a foot, and humanoids in three dimensions.
"""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
import xml.etree.ElementTree as ElementTree
from typing import Any

import gymnasium as gym
import numpy as np

from gato_lib.domains import gaits
from gato_lib.domains.base import Domain, Expert, TaskSpec, gaussian

STEPS = 1000


@dataclasses.dataclass(frozen=True)
class Family:
    """A body with all its limbs.

    Attributes:
      env_id: gymnasium's environment.
      asset: gymnasium's model.
      height: of the torso at the start.
      least: height at which it has fallen.
      angle: of the torso at which it has fallen, in radians.
    """

    env_id: str
    asset: str
    height: float
    least: float
    angle: float


FAMILIES = {
    "walker": Family("Walker2d-v5", "walker2d_v5.xml", 1.25, 0.8, 1.0),
    "hopper": Family("Hopper-v5", "hopper.xml", 1.25, 0.7, 0.2),
    "humanoid": Family("Walker2d-v5", "humanoid.xml", 1.4, 1.0, 1.0),
}

# The bodies that each morphology keeps besides the torso. The number in a name counts the torso. A
# walker without its right leg is missing: it would be the one without its left in all but name.
_RIGHT, _LEFT = ("thigh", "leg", "foot"), ("thigh_left", "leg_left", "foot_left")
_LOWER = (
    *("lwaist", "pelvis", "right_thigh", "right_shin", "right_foot"),
    *("left_thigh", "left_shin", "left_foot"),
)
_RIGHT_ARM, _LEFT_ARM = (
    tuple(f"{side}_{part}_arm" for part in ("upper", "lower")) for side in ("right", "left")
)
BODIES: dict[str, tuple[str, ...]] = {
    "walker_7_full": (*_RIGHT, *_LEFT),
    "walker_6_no_left_foot": (*_RIGHT, *_LEFT[:2]),
    "walker_6_no_right_foot": (*_RIGHT[:2], *_LEFT),
    "walker_5_no_feet": (*_RIGHT[:2], *_LEFT[:2]),
    "walker_5_no_left_shin": (*_RIGHT, *_LEFT[:1]),
    "walker_5_no_right_shin": (*_RIGHT[:1], *_LEFT),
    "walker_4_no_left_leg": _RIGHT,
    "walker_3_no_shins": (*_RIGHT[:1], *_LEFT[:1]),
    "hopper_4_full": _RIGHT,
    "humanoid_2d_13_full": (*_LOWER, *_RIGHT_ARM, *_LEFT_ARM),
    "humanoid_2d_11_no_left_arm": (*_LOWER, *_RIGHT_ARM),
    "humanoid_2d_11_no_right_arm": (*_LOWER, *_LEFT_ARM),
    "humanoid_2d_11_no_forearms": (*_LOWER, *_RIGHT_ARM[:1], *_LEFT_ARM[:1]),
    "humanoid_2d_9_no_arms": _LOWER,
}

# How much lower a walker or a hopper stands when its longest leg ends there ("leg" is the shin).
_LOWER_BY = {"foot": 0.0, "leg": 0.02, "thigh": 0.51}


def family(name: str) -> Family:
    return FAMILIES[name.split("_")[0]]


def height(name: str) -> float:
    """Of a morphology's torso at the start."""
    ends = [_LOWER_BY[part] for body in BODIES[name] if (part := body.split("_")[0]) in _LOWER_BY]
    return round(family(name).height - min(ends, default=0.0), 3)


def least(name: str) -> float:
    """Of a morphology's torso before it has fallen."""
    return family(name).least * height(name) / family(name).height


# --- Environments ---


def _into_plane(torso: ElementTree.Element) -> None:
    """Give a humanoid the root of a walker, and joints that turn about the y axis only."""
    torso.remove(torso.find("joint[@type='free']"))
    for name, kind, axis in (
        ("rooty", "hinge", "0 1 0"),
        ("rootz", "slide", "0 0 1"),
        ("rootx", "slide", "1 0 0"),
    ):
        free = {"armature": "0", "damping": "0", "limited": "false"}
        torso.insert(0, ElementTree.Element("joint", name=name, type=kind, axis=axis, **free))
    for body in torso.iter("body"):
        for joint in body.findall("joint[@range]"):
            if joint.get("name").endswith(("shoulder1", "elbow")):
                joint.set("axis", "0 1 0")
            elif joint.get("axis") not in ("0 1 0", "0 -1 0"):
                body.remove(joint)


def model_xml(name: str) -> str:
    """The model of a morphology."""
    from gymnasium.envs.mujoco import mujoco_env

    asset = pathlib.Path(mujoco_env.__file__).parent / "assets" / family(name).asset
    root = ElementTree.parse(asset).getroot()
    torso = root.find("worldbody/body[@name='torso']")
    for body in list(torso.iter("body")):
        for limb in body.findall("body"):
            if limb.get("name") not in BODIES[name]:
                body.remove(limb)
    if name.startswith("humanoid"):
        _into_plane(torso)
    torso.set("pos", f"0 0 {height(name)}")
    torso.find("joint[@name='rootz']").set("ref", str(height(name)))
    joints = {joint.get("name") for joint in torso.iter("joint")}
    actuators = root.find("actuator")
    for motor in actuators.findall("motor"):
        if motor.get("joint") not in joints:
            actuators.remove(motor)
    return ElementTree.tostring(root, encoding="unicode")


def make_env(name: str) -> gym.Env:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model.xml"
        path.write_text(model_xml(name))
        highest = np.inf if name.startswith("hopper") else 2.0
        return gym.make(
            family(name).env_id,
            xml_file=str(path),
            healthy_z_range=(least(name), highest),
            max_episode_steps=STEPS,
            disable_env_checker=True,
        )


# --- Experts ---


class GaitExpert(Expert):
    """Plays a linear map of what the agent sees."""

    def __init__(self, name: str):
        self._gait = gaits.MAPS[name]

    def reset(self, env: gym.Env) -> None:
        self._space = env.action_space

    def act(self, observation: np.ndarray, executed: Any | None) -> np.ndarray:
        low, high = self._space.low, self._space.high
        controls = (observation @ self._gait[:-1] + self._gait[-1]).clip(-1, 1)
        return ((low + high) / 2 + (high - low) / 2 * controls).astype(self._space.dtype)


DOMAINS = (
    Domain(
        name="modular_rl",
        tasks={
            f"modular_rl/{name}": TaskSpec(
                id=f"modular_rl/{name}",
                metric="return",
                floor=float(STEPS),
                floor_source="standing still for the whole episode: 1 a step for 1,000 steps",
                noise="standard deviation of Gaussian noise on each control, in half its range",
                expert="a linear map of the observation, found by random search",
            )
            for name in BODIES
        },
        make_env=make_env,
        make_expert=GaitExpert,
        sources=("modular_rl.py", "gaits.py"),
        perturb=gaussian,
    ),
)
