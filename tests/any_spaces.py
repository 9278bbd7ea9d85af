"""Spaces that several tests share."""

from __future__ import annotations

import gymnasium as gym
import numpy as np


class AnySpaces:
    """Stands for an environment nobody wrote code for: every kind of space, nested."""

    observation_space = gym.spaces.Dict(
        {
            "camera": gym.spaces.Box(0, 255, (20, 16, 3), np.uint8),
            "depth": gym.spaces.Box(0, 255, (16, 16), np.uint8),
            "arm": gym.spaces.Tuple(
                [gym.spaces.Box(-9, 9, (3,), np.float32), gym.spaces.MultiBinary(2)]
            ),
            "words": gym.spaces.Text(8, charset="abc"),
            "where": gym.spaces.MultiDiscrete([4, 5], start=[-2, 0]),
        }
    )
    action_space = gym.spaces.Dict(
        {
            "move": gym.spaces.Box(-2, 3, (2,), np.float32),
            "button": gym.spaces.MultiDiscrete([3, 2]),
            "hold": gym.spaces.Discrete(2, start=1),
        }
    )
