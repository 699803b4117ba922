"""A VAE sees few pixels at once, whatever the batch is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from hgdpo_jax.diffusion import programs
from tests import tiny


@pytest.mark.parametrize(
    ("images", "pixels", "parts"),
    [
        (16, 1024 * 704, 16),
        (4, 1024 * 1024, 4),
        (16, 512 * 512, 4),
        (6, 512 * 512, 2),
        (7, 512 * 512, 7),  # nothing else divides it
        (3, 2048 * 2048, 3),
        (1, 2048 * 2048, 1),
        (32, 64 * 64, 1),  # the demo, whose program is as it was
        (256, 64 * 64, 1),
        (257, 64 * 64, 257),
    ],
)
def test_parts_are_the_fewest_that_fit(images: int, pixels: int, parts: int) -> None:
    assert programs._parts(images, pixels) == parts


@pytest.mark.parametrize(("rows", "parts", "ways"), [(8, 4, 1), (16, 2, 4), (24, 3, 8), (5, 5, 1)])
def test_a_part_at_a_time_gives_the_same_and_each_device_keeps_its_rows(rows: int, parts: int, ways: int) -> None:
    seen: list[int] = []

    def function(x: jax.Array) -> jax.Array:
        seen.append(len(x))
        return jnp.tile(x, (1, 1, 2)).sum(1) + 1

    x = np.random.default_rng(0).integers(0, 9, (rows, 3, 2)).astype(np.float32)
    sharding = NamedSharding(tiny.mesh(ways), PartitionSpec(("data", "fsdp")))
    run = jax.jit(lambda x: programs._in_parts(function, x, parts), out_shardings=sharding)
    placed = jax.device_put(x, sharding)
    assert np.array_equal(run(placed), function(x)) and set(seen[:-1]) == {rows // parts}
    text = run.lower(placed).compile().as_text()
    assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))
