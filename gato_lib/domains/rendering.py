"""Small camera images of MuJoCo scenes, fast without a GPU.

MuJoCo's default quality costs a software renderer about 20 ms a frame, whatever the size of the
image. Nearly all of it is shadow maps, multisampling and the facets of round things, of which
64 x 64 pixels show little. Without them it draws about 1,000 frames a second.
"""

from __future__ import annotations

import atexit
import functools
import os
import weakref
from typing import Any

import numpy as np

_open: weakref.WeakSet[Renderer] = weakref.WeakSet()


@functools.cache
def _close_at_exit() -> None:
    """To be called once a context is there.

    EGL ends itself at exit, and a context freed after that complains. Exit functions run last in,
    first out, and EGL registers its own with the first context.
    """
    atexit.register(lambda: [renderer.close() for renderer in list(_open)])


class Renderer:
    """Draws a model from one of its cameras as (size, size, 3) uint8.

    Without a display MuJoCo needs to be told how to draw before it is first imported; unless
    MUJOCO_GL says otherwise this module asks for EGL, which works with and without a GPU.
    """

    def __init__(self, model: Any, size: int = 64, camera: int | str = 0):
        os.environ.setdefault("MUJOCO_GL", "egl")
        import mujoco

        quality = model.vis.quality  # read once, when the context is made
        quality.offsamples = quality.shadowsize = 0
        quality.numslices, quality.numstacks = 12, 8  # facets of a ball, of 28 and 16
        self._camera = camera
        self._renderer = mujoco.Renderer(model, size, size)
        flags = self._renderer.scene.flags
        for flag in ("SHADOW", "REFLECTION", "HAZE"):
            flags[getattr(mujoco.mjtRndFlag, f"mjRND_{flag}")] = False
        _close_at_exit()
        _open.add(self)

    def __call__(self, data: Any) -> np.ndarray:
        self._renderer.update_scene(data, self._camera)
        return self._renderer.render()

    def close(self) -> None:
        self._renderer.close()
