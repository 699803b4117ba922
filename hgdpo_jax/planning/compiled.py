"""What a compiler makes of a program; the figures are kept, so that it compiles each program once."""

import json
import os
import re
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import jax

from hgdpo_jax.planning import hlo, topologies, traffic
from hgdpo_jax.planning.topologies import Topology
from hgdpo_jax.run.files import file_hash, json_hash, write_json

CODE = 1_288_490_188  # bytes of a TPU's program: 0.3 to 1.2 GiB of every step that was compiled to its end
_PLACED = "after_optimizations-buffer-assignment.txt"
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (.*)$", re.MULTILINE)
_KINDS = ("parameter", "preallocated-temp", "maybe-live-out")  # of an allocation, which may say more than one


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a program, for one device. Sizes in bytes.

    Attributes:
        refused: the compiler's words where it finds no room; everything else is then 0.
        arguments, outputs, temporaries: in memory, padded as the device needs it; outputs without those that take the
            place of arguments.
        code: what is left for the program itself on a TPU.
        traffic: read from and written to memory.
        collectives: kind → count, bytes, sent; see :class:`hgdpo_jax.planning.traffic.Collective`.
        loops: number of loops that count once, since nobody knows how often they run.
        seconds: that compiling took.
    """

    refused: str = ""
    arguments: int = 0
    outputs: int = 0
    temporaries: int = 0
    code: int = 0
    traffic: int = 0
    collectives: dict[str, dict[str, float]] | None = None
    loops: int = 0
    seconds: float = 0.0


def compile_for(lowered: jax.stages.Lowered, topology: Topology, trips: int = 1) -> Compiled:
    """Compiles a program, unless its figures were kept.

    The compiler is left once each value has its place in memory: next are the kernels' instructions, which take most
    of its time and nothing here counts. It goes on in a thread, and writes to a folder in `tempfile.gettempdir()`; a
    caller who does not want that ends the process and removes the folder.

    Args:
        lowered: for the topology's devices.
        topology: see there.
        trips: of loops whose number of turns is an argument of the program.
    """
    code = [file_hash(Path(module)) for module in (__file__, hlo.__file__, topologies.__file__, traffic.__file__)]
    about = [topology.name, asdict(topology.chip), topology.compiler, topology.options, jax.__version__, trips]
    flags = [os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    path = None
    with suppress(RuntimeError):  # there is no home
        key = json_hash([lowered.as_text(), about, flags, code])
        path = Path.home() / ".cache" / "hgdpo_jax" / "planned" / f"{key}.json"
    if path and path.is_file():
        return Compiled(**json.loads(path.read_text()))
    found = _compile(lowered, topology, trips)
    try:
        if path is None:
            raise OSError("there is no home folder")
        write_json(path, asdict(found))
    except OSError as error:
        print(f"figures are not kept, the same step will be compiled again: {error}", file=sys.stderr)
    return found


def _compile(lowered: jax.stages.Lowered, topology: Topology, trips: int) -> Compiled:
    begin, folder = time.perf_counter(), tempfile.mkdtemp()
    options = topology.options | {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    running = ThreadPoolExecutor(1).submit(lowered.compile, compiler_options=options)
    placed = _placed(Path(folder), running)
    if not placed:
        return Compiled(refused=str(running.exception()).splitlines()[0], seconds=time.perf_counter() - begin)
    module = hlo.HloModule(_text_beside(placed).read_text(), trips, len(topology.devices))
    sizes = dict.fromkeys(_KINDS, 0)
    for size, about in _ALLOCATION.findall(placed.read_text()):
        kind = next((kind for kind in _KINDS if kind in about), None)
        if kind:
            sizes[kind] += int(size)
    return Compiled(
        arguments=sizes["parameter"],
        outputs=sizes["maybe-live-out"],
        temporaries=sizes["preallocated-temp"],
        code=CODE if topology.chip.platform == "tpu" else 0,
        traffic=traffic.memory_traffic(module),
        collectives={kind: asdict(found) for kind, found in traffic.collectives(module).items()},
        loops=len(module.unknown) if trips == 1 else 0,
        seconds=time.perf_counter() - begin,
    )


def _text_beside(placed: Path) -> Path:
    """The program's HLO, which the compiler writes beside the file of :func:`_placed`, before it or after it."""
    return placed.with_name(placed.name.replace("-buffer-assignment", ""))


def _is_whole(text: Path) -> bool:
    """Whether HLO is there to its end: the entry computation comes last."""
    content = text.read_text() if text.is_file() else ""
    return "\nENTRY " in content and content.rstrip().endswith("}")


def _placed(folder: Path, running: Future[jax.stages.Compiled]) -> Path | None:
    """The file in which a compiler says what lies where, as soon as it is whole; None where there is no room.

    Raises what the compiler does for any other reason.
    """
    while True:
        ended = running.done()
        for path in folder.glob(f"*{_PLACED}"):
            later = folder.glob(f"{path.name.partition('.')[0]}.*debug_options")
            if any(each.stat().st_size for each in later) and (ended or _is_whole(_text_beside(path))):
                return path
        if ended:
            error = running.exception()
            if isinstance(error, jax.errors.JaxRuntimeError) and str(error).startswith("RESOURCE_EXHAUSTED"):
                return None
            raise error or FileNotFoundError(f"{folder}: the compiler has not written down what lies where")
        time.sleep(0.1)
