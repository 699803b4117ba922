"""Every test sees eight virtual CPU devices, so that sharding is exercised wherever the tests run.

Tests that wait for another process do so for a while only, four times as long as it takes at most on two free cores.
HGDPO_TEST_PATIENCE=20 makes it twenty times, for a slow or busy machine; all deadlines come from `tests.patience`.
"""

import gc
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

import tests.typed  # noqa: F401  # the hook looks it up by name

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling is most of what the tests do: without LLVM's optimisations it takes two thirds of the time. The programs
# stay the same up to the order of instructions. The user's flags come last, so that they win.
FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
FLAGS.append("--xla_cpu_parallel_codegen_split_count=1")  # the tests already run one process a core
if version("jaxlib").startswith("0.10."):  # later ones do not know the flag, and would stop at it
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # those of before compile in half the time
os.environ["XLA_FLAGS"] = " ".join([*FLAGS, os.environ.get("XLA_FLAGS", "")])
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # PyTorch's threads wait by spinning; the tests already run one process a core
# Many tests train the same tiny model: compile it once.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parent.parent / ".pytest_cache" / "compiled")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # as a command does
# Shapes and dtypes that annotations state are checked at each call. Imported before the package is.
install_import_hook("hgdpo_jax", "tests.typed.checked")
gc.set_threshold(20_000)  # as hgdpo_jax.devices.processor does


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of several processes wait a lot, and the demo takes long. They come first, so that others run meanwhile to
    the end."""
    first = ("tests/launch/test_demo", "tests/processes")
    items.sort(key=lambda item: not item.nodeid.startswith(first))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ε_base, which no test changes."""
    from tests import tiny  # and JAX, which reads the environment

    return tiny.write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def glance() -> Iterator[None]:
    """Trainings look at nothing, where a test is not about what people see."""
    from hgdpo_jax.training.monitor import Monitor
    from tests import tiny

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "evaluate", tiny.glance)
        yield
