"""A step planned on eight processors' worth of devices, against formulas; and what the user may get wrong."""

import json
import math
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from safetensors import safe_open

from hgdpo_jax import plan as command_line
from hgdpo_jax.devices.sharding import batch_sharding, heads_sharding, replicated
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.faces.concepts import encoder_of
from hgdpo_jax.models import attend
from hgdpo_jax.planning import compiled, figures, hlo, plan, program, table, topologies, traffic
from hgdpo_jax.planning.compiled import Compiled
from hgdpo_jax.planning.figures import Plan
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.progress import Progress
from hgdpo_jax.run.settings import load_config
from hgdpo_jax.training import step as steps
from hgdpo_jax.training.cost import operations
from tests import tiny

PORTRAITS = ["--config", "configs/stage3.py:portraits"]


@pytest.fixture
def compiling(tmp_path: Path) -> Iterator[None]:
    """As in a process that has compiled nothing yet, with a cache of programs of the test's own."""
    cache = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "compiled"))
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", cache)
    compilation_cache.reset_cache()


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, compiling: None
) -> Callable[..., str]:
    """The command; what it keeps is in folders of the test's own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", "")

    def command(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["plan", *PORTRAITS, *arguments])
        command_line.main()
        return capsys.readouterr().out

    return command


def shapes(folder: Path, names: str | tuple[str, ...] = "") -> list[tuple[int, ...]]:
    """Of the weights in a model's folder whose names end so."""
    with safe_open(next(folder.glob("*.safetensors")), "np") as file:
        return [tuple(file.get_slice(key).get_shape()) for key in file.keys() if key.endswith(names)]  # noqa: SIM118


def test_a_step_agrees_with_formulas_and_is_compiled_once(
    run: Callable[..., str], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("--topology", "cpu:8", f"--config.model.base={base}", "--config.data.resolutions=32x32")
    asked += ("--config.train.steps=20", "--config.train.lora_modules=attention")
    (found,) = json.loads(run(*asked, "--json", "--share", "0.5"))
    assert not [*tmp_path.glob("compiled/jit_step*")]  # the figures are kept, not the program

    def size(part: str) -> int:
        return 4 * sum(map(math.prod, shapes(base / part)))

    # LoRA of rank 8 on the four projections of each attention: 8 numbers for every input and output.
    adapted = shapes(base / "unet", ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"))
    lora, weights = 4 * 8 * sum(map(sum, adapted)), size("unet") + size("text_encoder")
    assert found["held"] | {"optimizer": 0} == {
        "weights": weights,
        "policy": lora,
        "reference": lora,
        "optimizer": 0,
        "policy of the base": lora,  # stage 3 goes on from stage 2's
        "VAE": size("vae"),
    }
    assert found["held"]["optimizer"] == pytest.approx(2 * lora, abs=32)  # AdamW's moments; some numbers
    latents, tokens = 2 * 2 * math.prod(tiny.LATENT), 4 * 77  # of one pair: float16 and int32
    compiled = found["compiled"]
    assert compiled["arguments"] == pytest.approx(weights + 4 * lora + latents + tokens, abs=100)
    # Gradients are added up, and some thirty numbers for the log. Where q, k and v (k and v) are one product, those of
    # their LoRA's B come as three by three (two by two) blocks, of which three (two) are kept.
    blocks = 4 * 8 * (6 + 2) * sum(width for width, _ in shapes(base / "unet", "attn1.to_q.weight"))
    assert 0 <= compiled["collectives"]["all-reduce"]["bytes"] - lora - blocks < 40 * 4
    moved = sum(each["bytes"] for kind, each in compiled["collectives"].items() if kind != "all-reduce")
    assert moved < 8 * 100 * latents  # winners and losers change places; no weight does
    assert compiled["traffic"] > weights and found["fits"] and found["bound"] == "arithmetic"
    assert found["examples_per_second"] == pytest.approx(8 * 0.5 / found["seconds"]["arithmetic"])
    assert found["hours"] == pytest.approx(20 * 8 / found["examples_per_second"] / 3600)

    (kept,) = tmp_path.glob(".cache/hgdpo_jax/planned/*.json")
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"seconds": 12_345}))
    monkeypatch.setattr(plan, "in_subprocess", lambda make, *arguments: make(*arguments))  # it takes seconds to begin
    monkeypatch.setattr(program, "counted", lambda *_, **__: (1.0, 1.0))  # it would trace the step once more
    shown = run(*asked)  # which goes by what is kept
    assert "8 x cpu" in shown and "fits" in shown and "hours for 20 steps" in shown and "12,345 s" in shown


def test_operations_of_known_products() -> None:
    x, w = jnp.ones((5, 7)), jnp.ones((7, 7))
    image, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 4))

    def looped(x: jax.Array, count: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, count, lambda _, x: x @ w, jax.lax.scan(lambda x, _: (x @ w, None), x, None, 3)[0])

    def convolved(image: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=numbers)

    one = 2 * 5 * 7 * 7
    assert operations(jax.make_jaxpr(looped)(x, 11).jaxpr, trips=11) == (3 + 11) * one
    twice = jax.make_jaxpr(lambda x: (jnp.tanh(x) @ w + jnp.tanh(x) @ w, x @ w))(x)
    assert operations(twice.jaxpr) == 2 * one
    both = program.counted(jax.jit(lambda x, image: (x @ w, convolved(image))).trace, x, image)
    assert both == (2 * (2 * 8 * 8 * 4) * (3 * 3 * 3), one)


def test_attention_counts_the_same_whatever_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    q, sharding = jax.ShapeDtypeStruct((8, 64, 3, 8), jnp.float32), heads_sharding(tiny.mesh(data=8))
    traced = jax.jit(lambda q: attend.attend(q, q, q, sharding)).trace
    monkeypatch.setattr(attend, "kernel", lambda *_: lambda q, k, v: jax.pure_callback(lambda q: q, q, q))
    assert program.counted(traced, q) == (0, 2 * 2 * (8 * 3 * 64 * 64 * 8))
    part = jax.shard_map(lambda q: q @ q.mT, mesh=sharding.mesh, in_specs=sharding.spec, out_specs=sharding.spec)
    assert operations(jax.make_jaxpr(part)(q).jaxpr) == 2 * 8 * 64 * 3 * 3 * 8


@pytest.mark.parametrize("params", ["lora", "text_lora", "all", "adapter"])
def test_every_kind_of_policy_is_planned_and_split_over_the_mesh(
    params: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "device_put", lambda *_: pytest.fail("devices that are only described hold nothing"))
    config = tiny.config(base)
    config.train.params = params
    if params == "adapter":
        config.train.objective, config.pairs.winner, config.pairs.loser = "sft", "photograph", "none"
        config.adapter.image_encoder = str(tiny.write_scorer(tmp_path / "scorer"))
    source, mesh = program.open_architecture(config, ""), tiny.mesh(data=2, fsdp=4)
    step = program.step(config, source, mesh)
    held = step.held
    assert "@main" in step.lowered.as_text()
    policy = steps.split_params(program.pipeline_of(config, source, mesh), params)[1]
    whole = sum(x.size * 4 for x in jax.tree.leaves(policy))
    assert (held["policy"] == whole) == params.endswith("lora")  # LoRA is too small to be split
    assert whole / 4 <= held["policy"] <= whole and held["optimizer"] == pytest.approx(2 * held["policy"], abs=32)
    # The policy lies there twice: the base's, which is the reference of the first stage, and what is trained.
    twice = (held["policy"], 0) if config.train.objective == "dpo" else (0, held["policy"])
    assert (held["reference"], held["policy of the base"]) == twice


def test_what_an_adapter_reads_is_known_without_its_encoder(tmp_path: Path) -> None:
    scorer = tiny.write_scorer(tmp_path / "scorer")
    config = load_config("configs/personalise.py:portraits", [f"adapter.image_encoder={scorer}"])
    assert program.concept_shape(config) == encoder_of(config).nothing.shape[1:]
    config = load_config("configs/personalise.py:sd15")
    assert program.concept_shape(config) == (257, 1280)


def test_each_step_of_drawing_is_counted(base: Path, tmp_path: Path) -> None:
    config, mesh, scorer = tiny.config(base), tiny.mesh(data=2), tiny.write_scorer(tmp_path / "scorer")
    config.pairs.update(guidance=3.0, batch=3, steps=9, scorer=str(scorer))
    source = program.open_architecture(config, "")
    draw, decode = program.drawing(config, source, mesh)
    held = draw.held
    assert held["scorer"] == 4 * sum(map(math.prod, shapes(scorer)))
    assert decode.beside == held["unet"] + held["text"] + held["scorer"]
    assert draw.beside == held["VAE"] + held["scorer"]
    config.pairs.loser = "given"
    assert program.drawing(config, source, mesh)[0].held["scorer"] == 0  # nothing is chosen
    pipeline = program.pipeline_of(config, source, mesh)
    sampler = Sampler.from_config(pipeline, mesh, config.pairs, seed=0)
    before = sum(program.counted(lambda: sampler.traced((32, 32))[0], trips=0))
    assert not any(isinstance(x, jax.Array) for x in jax.tree.leaves(nnx.state(pipeline.networks)))  # for any device
    graph, weights = nnx.split(pipeline.denoiser)

    def step(weights: nnx.State, x: jax.Array, text: jax.Array) -> jax.Array:
        unet = nnx.merge(graph, weights)
        return unet(x, jnp.zeros(len(x), jnp.int32), unet.read_text(text))

    text = jax.ShapeDtypeStruct((8, 77, 8), jnp.float32)  # four images, with and without a caption
    both = sum(
        program.counted(jax.jit(step).trace, weights, jax.ShapeDtypeStruct((4, *tiny.LATENT), jnp.float32), text)
    )
    memory = jax.jit(lambda weights, text: nnx.merge(graph, weights).read_text(text)).trace
    assert sum(draw.operations) - before == 9 * (both - sum(program.counted(memory, weights, text)))


@pytest.mark.parametrize(
    "per_example",
    [lambda n: 10 * n, lambda n: 10 * n + n * n / 40, lambda n: 30 * n**0.8, lambda n: 10 * n + 30 * (n < 2)],
)
def test_the_largest_batch_fits_and_one_that_is_a_tenth_larger_does_not(per_example) -> None:
    tried = []

    def at(count: int) -> Plan:
        tried.append(count)
        made = Compiled(arguments=100, temporaries=math.ceil(per_example(count)))
        return Plan("cpu", 1, "XLA", count, {}, 0, made, 1000.0, 0.0, {}, {}, "", "float32")

    count, found = figures.largest(at)
    assert found.fits and found.examples == count and 100 + per_example(1.1 * count) > 1000
    assert len(tried) <= 5 and max(tried) < 2 * count  # far beyond it not even arrays can be described


def test_a_compiler_that_refuses_leaves_what_fitted() -> None:
    def at(count: int) -> Plan:
        made = Compiled(temporaries=10 * count) if count < 70 else Compiled(refused="RESOURCE_EXHAUSTED: 17 of 16 G")
        return Plan("v5e", 1, "XLA", count, {}, 0, made, 1000.0, 0.0, {}, {}, "", "bfloat16")

    count, found = figures.largest(at)
    assert 60 < count < 70 and found.fits
    assert not at(70).fits and figures.largest(lambda count: at(count + 69)) == (0, None)


@pytest.mark.parametrize("name", ["v9:4x4", "v5e:4", "h100:9", "h100:2x8", "cpu:0", "cpu:x", "a100", "rtx4090:16"])
def test_an_unknown_topology_is_one_line(name: str) -> None:
    with pytest.raises(UserError, match=rf"^topology {name}: unknown; write v5e:4x4.*") as caught:
        topologies.prepare_compilers([name])
    assert "\n" not in str(caught.value)


def test_a_share_above_one_an_unknown_variant_and_no_base_are_refused(run: Callable[..., str]) -> None:
    with pytest.raises(SystemExit):
        run("--share", "1.5")
    with pytest.raises(UserError, match="config variant nothing: unknown"):
        run("--config", "configs/stage3.py:nothing")
    with pytest.raises(UserError, match="config key model.base: is empty"):
        run("--config.model.base=")


@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_of_a_gpu_a_program_may_fill_what_jax_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, tpu = topologies.CHIPS["h100"], topologies.CHIPS["v5e"]
    monkeypatch.delenv(name, raising=False)
    assert figures._room(gpu) == 0.75 * gpu.memory
    monkeypatch.setenv(name, "0.9")
    assert figures._room(gpu) == 0.9 * gpu.memory and figures._room(tpu) == tpu.memory
    monkeypatch.setenv(name, "most")
    with pytest.raises(UserError, match=f"^{name}=most: expects a part of a GPU's memory, such as 0.9$"):
        figures._room(gpu)


def test_figures_are_kept_for_one_compiler_with_its_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    topology, lowered, made = topologies.describe_topology("cpu"), jax.jit(jnp.sin).lower(1.0), []
    monkeypatch.setattr(compiled, "_compile", lambda *_: made.append(Compiled(traffic=len(made))) or made[-1])

    def found() -> Compiled:
        return compiled.compile_for(lowered, topology)

    first = found()
    assert found() == first and len(made) == 1
    assert compiled.compile_for(lowered, topology, trips=2) is made[1]
    for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS"):
        monkeypatch.setenv(name, "--another")
        assert found() is made[-1]
    assert len(made) == 4

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiled, "write_json", full)
    monkeypatch.setenv("XLA_FLAGS", "--one-more")
    assert found() is made[4] and "figures are not kept" in capsys.readouterr().err
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert found() is made[5] and "figures are not kept" in capsys.readouterr().err


def test_the_tensor_axis_splits_products_and_not_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "compile_for", lambda *_: Compiled(traffic=819, collectives={"x": {"sent": 200e9}}))
    mesh, chip = tiny.mesh(data=2, fsdp=2, tensor=2), topologies.CHIPS["v5e"]
    monkeypatch.setattr(program, "counted", lambda *_, **__: (8e12, 16e12))
    step = program.Program(lambda: jax.jit(jnp.sin).trace(1.0), {}, 0)
    topology = topologies.Topology("v5e:2x4", chip, list(mesh.devices.flat), {}, "XLA")
    found = figures.plan_program(step, topology, mesh, "bfloat16", 16)
    assert found.operations == 8e12 / 4 + 16e12 / 8 and found.bound == "interconnect"
    assert found.seconds == {"arithmetic": 4e12 / chip.peak["bfloat16"], "memory": 1e-9, "interconnect": 1.0}
    assert found.rate(0.5) == 8.0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiling: None) -> Path:
    """For what compilers write, of whose programs none comes from a cache."""
    jax.config.update("jax_enable_compilation_cache", False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


class Begun(jax.stages.Lowered):
    """A program whose compiler does not come to its end once it has done its work."""

    def __init__(self, lowered: jax.stages.Lowered, then: Callable[[], object]) -> None:
        self.lowered, self.then = lowered, then

    def compile(self, compiler_options: dict[str, object]) -> jax.stages.Compiled:
        made = self.lowered.compile(compiler_options=compiler_options)
        self.then()
        return made


@pytest.mark.usefixtures("folder")
def test_sizes_are_those_of_the_whole_program_before_it_is_whole() -> None:
    mesh, end = tiny.mesh(data=8), threading.Event()
    x = jax.ShapeDtypeStruct((64, 48), jnp.float32, sharding=batch_sharding(mesh))
    w = jax.ShapeDtypeStruct((48, 48), jnp.float32, sharding=replicated(mesh))

    def step(x: jax.Array, w: jax.Array) -> tuple[jax.Array, ...]:
        return jnp.tanh(x @ w) @ w, x + 1, w - jnp.sin(x).sum()

    lowered = jax.jit(step, donate_argnums=0).lower(x, w)
    whole = lowered.compile()
    sizes = whole.memory_analysis()
    try:
        found = compiled._compile(Begun(lowered, end.wait), topologies.describe_topology("cpu"), 1)
    finally:
        end.set()
    assert (found.arguments, found.temporaries) == (sizes.argument_size_in_bytes, sizes.temp_size_in_bytes)
    assert found.outputs == sizes.output_size_in_bytes - sizes.alias_size_in_bytes > 4 * 48 * 48
    counted = hlo.HloModule(whole.as_text(), 1, 8)
    assert found.traffic == traffic.memory_traffic(counted) > 0
    assert found.collectives == {"all-reduce": asdict(traffic.collectives(counted)["all-reduce"])}


def test_a_compiler_that_refuses_fails_or_writes_half_of_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lowered, topology = jax.jit(jnp.sin).lower(1.0), topologies.describe_topology("cpu")

    def found(error: Exception | None) -> Compiled:
        def compile(_: object, compiler_options: dict[str, str]) -> None:
            written = Path(compiler_options["xla_dump_to"]) / "module_0001.jit_sin"
            Path(f"{written}.cpu_after_optimizations-buffer-assignment.txt").write_text("allocation 0: size 8, param")
            Path(f"{written}.debug_options").touch()  # which a full disk leaves empty
            if error:
                raise error

        monkeypatch.setattr(jax.stages.Lowered, "compile", compile)
        return compiled._compile(lowered, topology, 1)

    refused = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 17 of 16 G\nmore")
    assert found(refused).refused == "RESOURCE_EXHAUSTED: 17 of 16 G"
    with pytest.raises(ValueError, match="another"):
        found(ValueError("another"))
    with pytest.raises(FileNotFoundError, match=f"{folder}.*has not written down what lies where"):
        found(None)


def test_a_batch_that_is_computed_in_parts_counts_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """70 pairs fit at a time on each of eight devices."""

    def step(_: object, spec: str, overrides: list[str], name: str) -> Plan:
        config = load_config(spec, overrides)
        each = config.train.batch // config.train.accumulate // 8
        made = Compiled(temporaries=each)
        return Plan("cpu:8", 8, "XLA", config.train.batch, {}, 0, made, 70.0, 0.0, {}, {}, "", "float32")

    monkeypatch.setattr(plan, "in_subprocess", step)
    overrides = ["train.accumulate=4", "train.batch=32"]
    found = plan.plan_largest(
        PORTRAITS[1], overrides, topologies.describe_topology("cpu:8"), "blocks", Progress(unit="program", disable=True)
    )
    assert found[:3] == ("blocks", 4 * 70, 4 * 70 * 8) and found.plan and found.plan.examples == found.batch


def test_the_table_states_the_limits_of_each_topology() -> None:
    """Between hosts GPUs have others than in one."""
    config = load_config(PORTRAITS[1], ["data.resolutions=64x64,96x64"])
    plans = [
        Plan(
            name, 8, "XLA", 16, {}, 0, Compiled(), 1.0, 0.0, {"interconnect": 1.0}, {"interconnect": peak}, "sheet", ""
        )
        for name, peak in (("h100:8", 450e9), ("h100:64", 50e9), ("h200:8", 450e9))
    ]
    text = table.describe(config, "base", plans, [()] * 3, [(one, one) for one in plans], 0.4)
    assert "h100:8, h200:8: interconnect 450 GB/s (sheet)\nh100:64: interconnect 50 GB/s (sheet)" in text
    assert "pairs a step of 96x64 (height x width), " in text and text.count("16 images, 0.00 MiB") == 6


def test_each_topology_is_planned_in_the_dtype_that_suits_it(
    base: Path, compiling: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(topologies, "package_of", lambda platform: "jaxlib" if platform == "cpu" else "")
    for dtype, found in (
        ("auto", ["float16", "float16", "bfloat16", "float32"]),
        ("bfloat16", ["bfloat16", "float16", "bfloat16", "bfloat16"]),  # a T4 has none
    ):
        overrides = [f"model.base={base}", f"model.dtype={dtype}"]
        opened = [plan._open("configs/stage1.py:sd15", overrides, name)[0] for name in ("h100", "t4", "v5e", "cpu")]
        assert [config.model.dtype for config in opened] == found


def test_without_a_compiler_a_step_is_estimated(
    run: Callable[..., str], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topologies, "package_of", lambda platform: "jaxlib" if platform == "cpu" else "")
    monkeypatch.setattr(plan, "in_subprocess", lambda *_: pytest.fail("nothing is compiled"))
    config = (f"--config.model.base={base}", "--config.data.resolutions=32x32", "--config.model.dtype=bfloat16")
    several, alone = json.loads(run(*config, *_on("h100:8", "h100"), "--json"))
    assert several["estimated"] and several["held"] == alone["held"]
    lora = several["held"]["policy"]
    assert several["compiled"]["collectives"] == {"all-reduce": {"count": 1, "bytes": lora, "sent": 2 * 7 / 8 * lora}}
    assert not alone["compiled"]["collectives"] and several["bound"] in several["seconds"]
    # One of eight pairs needs less than all of them, and the weights are read all the same.
    assert 8 * several["operations"] == alone["operations"]
    less, more = several["compiled"], alone["compiled"]
    assert 6 * less["temporaries"] < more["temporaries"] and less["traffic"] < more["traffic"] < 8 * less["traffic"]
    assert sum(several["held"].values()) < several["total"] < alone["total"]
    shown = run(*config, *_on("t4"), "--drawing")
    assert "\nt4: estimated, for the compiler is not installed (pip install -e '.[plan-gpu]'): " in shown
    (dtypes,) = (line for line in shown.splitlines() if line.startswith("model.dtype"))
    assert dtypes.split()[1:] == ["float16"]
    assert "t4: has no bfloat16; planned, and to be trained, with model.dtype=float16" in shown
    assert "images a second at 40%" in shown


def _on(*names: str) -> list[str]:
    return [word for name in names for word in ("--topology", name)]
