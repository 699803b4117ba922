"""What benchmarks/on_gpu.sh measures, in order of worth, and which programs each part needs."""

from dataclasses import dataclass
from typing import NamedTuple


class Step(NamedTuple):
    """An optimizer step of stage 1 with LoRA of rank 8; SD1.5 at 512x512, SDXL at 1024x1024.

    Attributes:
        chunks: attention as XLA computes it, in chunks, where the device has a kernel of its own.
        deterministic: compiled with `--xla_gpu_deterministic_ops`.
    """

    pairs: int
    dtype: str = "bfloat16"
    model: str = "sd15"
    checkpointing: str = "none"
    chunks: bool = False
    deterministic: bool = False

    def __str__(self) -> str:
        words = [self.model, self.dtype, f"{self.pairs} pairs"]
        words += [f"checkpointing {self.checkpointing}"] if self.checkpointing != "none" else []
        words += ["attention in chunks"] if self.chunks else []
        return ", ".join(words + (["deterministic"] if self.deterministic else []))


class Drawing(NamedTuple):
    """Drawing and decoding images of SD1.5 at 512x512: DPM-Solver++, 50 steps, guidance 5."""

    images: int
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"sd15, {self.dtype}, {self.images} images"


class Other(NamedTuple):
    """What a process of its own prepares: `planned` or `torch_peer` of this folder."""

    module: str
    arguments: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join((self.module, *self.arguments))


Program = Step | Drawing | Other


@dataclass(frozen=True)
class Part:
    """Attributes:
    name: in the results.
    kind: function of `measure.py`.
    programs: that it needs; several steps are timed alternately.
    limit: seconds after which it is given up, without compiling.
    """

    name: str
    kind: str
    programs: tuple[Program, ...] = ()
    limit: float = 60.0


FOUR, SIXTEEN = Step(4), Step(16)
BLOCKS, SDXL = Step(16, checkpointing="blocks"), Step(4, model="sdxl", checkpointing="blocks")
POOL = Drawing(16)
PLANNED = (FOUR, SIXTEEN, BLOCKS, SDXL)  # whose memory `planned` estimates


def _steps(*programs: Step) -> Part:
    return Part(f"step: {programs[0]}", "steps", programs)


# The programs of a wave are compiled side by side, then its parts are measured one after the other. The first three
# waves are the half that is worth having alone.
WAVES: tuple[tuple[Part, ...], ...] = (
    (
        Part("products", "products"),
        Part("attention", "attention"),
    ),
    (
        _steps(FOUR),
        _steps(SIXTEEN),
        Part(f"pool: {POOL}", "pool", (POOL,), 90.0),
        Part("plan", "plan", (Other("planned"),)),
    ),
    (
        _steps(Step(4, "float16"), FOUR),
        _steps(Step(4, chunks=True), FOUR),
        Part("deterministic", "deterministic", (Step(4, deterministic=True), FOUR)),
        _steps(BLOCKS, SIXTEEN),
    ),
    (
        _steps(SDXL),
        _steps(Step(16, "float16"), SIXTEEN),
    ),
    (
        Part("diffusers: step", "peer", (FOUR, Other("torch_peer", ("step", "4")))),
        Part("diffusers: images", "peer", (POOL, Other("torch_peer", ("images", "16"))), 120.0),
    ),
    (
        _steps(Step(8)),
        _steps(Step(1)),
        _steps(Step(8, "float16")),
        _steps(Step(1, "float16")),
    ),
)
PARTS = {part.name: part for wave in WAVES for part in wave}
COMPILING = "compiling"  # what a worker does before it measures a wave
COMPILING_LIMIT = 300.0  # seconds for one more program
