"""Exchanges between devices are found, counted and weighed, in typed and in real programs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gato_lib import distributed
from gato_lib.exchanges import collectives

# A loop of three turns, and one exchange after it. What else a program says is left out.
PROGRAM = """HloModule jit_step

%body (p: f32[8,4]) -> f32[8,4] {
  %g = bf16[8,4]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}

%condition (p: f32[8,4]) -> pred[] {
  %n = s32[] constant(3)
  %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %w = f32[8,4]{1,0} while(%a), condition=%condition, body=%body
  %r = f32[8,4]{1,0} all-reduce(%w), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %s = f32[2,4]{1,0} reduce-scatter(%r), channel_id=3, replica_groups=[2,4]<=[8], to_apply=%add
}
"""


def test_a_typed_program():
    gather, reduce, scatter = collectives(PROGRAM, 8)
    assert (gather.kind, gather.times, gather.inside, gather.group) == ("all-gather", 3, True, 4)
    assert gather.result == 8 * 4 * 2 and gather.sent == 64 * 3 / 4
    assert (reduce.kind, reduce.times, reduce.inside, reduce.group) == ("all-reduce", 1, False, 8)
    assert reduce.result == 128 and reduce.sent == 2 * 128 * 7 / 8
    assert (scatter.kind, scatter.group, scatter.sent) == ("reduce-scatter", 4, 32 * 3)


def test_what_cannot_be_read_is_refused():
    endless = PROGRAM.replace("direction=LT", "direction=NE")
    with pytest.raises(ValueError, match="cannot tell how often this loop turns"):
        collectives(endless, 8)
    with pytest.raises(ValueError, match=r"bytes of \['f8'\] are not known"):
        collectives(PROGRAM.replace("bf16[8,4]", "f8[8,4]"), 8)


def test_a_real_program():
    """A product over a split dimension: partial sums are added, once outside and in every turn."""
    mesh = distributed.make_mesh(8, 1, 1)
    split = NamedSharding(mesh, PartitionSpec(None, "data"))
    whole = NamedSharding(mesh, PartitionSpec())

    def step(x, w):
        def turn(carry, _):
            y = jax.lax.with_sharding_constraint(carry @ w, whole)
            return jax.lax.with_sharding_constraint(y, split), None

        x, _ = jax.lax.scan(turn, x, None, length=5)
        return jax.lax.with_sharding_constraint(x, whole)

    shape = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=split)
    weights = jax.ShapeDtypeStruct(
        (64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data", None))
    )
    found = collectives(jax.jit(step).lower(shape, weights).compile().as_text(), 8)
    inside = [c for c in found if c.inside]
    assert inside and {c.times for c in inside} == {5} and {c.group for c in found} == {8}
    assert sum(c.kind in ("all-reduce", "reduce-scatter") for c in inside) >= 1
    (last,) = [c for c in found if not c.inside]
    assert last.kind == "all-gather" and last.result == 16 * 64 * 4
