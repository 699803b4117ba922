"""What is said of GPUs, against the sizes of their parts."""

import pytest

from hgdpo_jax.devices.peaks import known_peak, peak
from hgdpo_jax.planning.chips import CHIPS, Chip

GPUS = {name: chip for name, chip in CHIPS.items() if chip.platform == "cuda"}
# Operations a clock that a multiprocessor's tensor cores do with float16 and float32 sums, of dense products. GeForce
# cards do half of what the same architecture does elsewhere.
TENSOR = dict.fromkeys(("t4", "a10", "l4", "l40s"), 1024) | dict.fromkeys(("a100-40gb", "a100-80gb"), 2048)
TENSOR |= dict.fromkeys(("rtx3090", "rtx4090", "rtx5090"), 512)


@pytest.mark.parametrize("chip", GPUS.values(), ids=GPUS)
def test_float32_is_what_the_units_of_a_gpu_do(chip: Chip) -> None:
    units, clock = chip.gpu["cores"] * chip.gpu["units"], 1e9 * chip.gpu["clock"]
    assert chip.peak["float32"] == pytest.approx(2 * units * clock, rel=0.01)


@pytest.mark.parametrize("name", TENSOR)
def test_peaks_are_of_dense_products_with_float32_sums(name: str) -> None:
    chip = GPUS[name]
    a_clock = TENSOR[name] * chip.gpu["cores"]
    assert chip.peak["float16"] == pytest.approx(a_clock * 1e9 * chip.gpu["clock"], rel=0.015)
    assert chip.peak["tf32"] <= chip.peak["float16"] / 2 * 1.02


def test_a_t4_computes_bfloat16_as_float32() -> None:
    assert [name for name, chip in CHIPS.items() if not chip.has_bfloat16] == ["t4"]
    assert peak("Tesla T4", "bfloat16") == peak("Tesla T4", "tf32") == peak("Tesla T4", "float32") == 8.1e12
    assert peak("Tesla T4", "float16") == 65e12


def test_cards_that_share_the_beginning_of_a_name_are_told_apart() -> None:
    assert peak("NVIDIA L4", "bfloat16") == 121e12 and peak("NVIDIA L40S", "bfloat16") == 362.05e12
    for kind in ("NVIDIA A10G", "NVIDIA L40", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 D"):
        assert known_peak(kind) is None


@pytest.mark.parametrize("name", GPUS)
def test_xla_is_told_of_a_gpu(name: str) -> None:
    chip = GPUS[name]
    text = chip.target_config
    assert f"cuda_compute_capability {{ major: {chip.gpu['major']} minor: {chip.gpu['minor']} }}" in text
    assert f"device_memory_size: {chip.memory}\n" in text and f"memory_bandwidth: {chip.bandwidth:.0f}\n" in text
    assert f'device_description_str: "{chip.kind}"' in text and chip.source.startswith("NVIDIA's ")
