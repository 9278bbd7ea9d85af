"""Strict settings for every test, and small real data shared by them."""

from __future__ import annotations

import os

os.environ.setdefault("MUJOCO_GL", "egl")

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# A thousand arrays a codec, and ten thousand in `make test-slow`. The same ones at every run: a
# test that fails once in ten runs is no use to the change that it fails on.
settings.register_profile(
    "thorough",
    max_examples=10_000 if os.environ.get("GATO_THOROUGH") else 1_000,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    database=None,
)

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)  # simulated: what names no device runs on the first

from gato_lib import collection, domains  # noqa: E402


@pytest.fixture(scope="session")
def demonstrations():
    """Two expert episodes of one task of each domain, from the real simulators."""
    out = {}
    for task in ("babyai/GoToObj", "metaworld/drawer-close"):
        env, expert = domains.make_env(task), domains.make_expert(task)
        out[task] = [
            collection.rollout(env, expert, task, seed, 0.1, np.random.default_rng(seed))
            for seed in (1, 2)
        ]
        env.close()
    return out
