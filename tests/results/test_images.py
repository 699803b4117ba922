"""What the sampling command draws is what diffusers draws, with every part of the recipe; and what it refuses."""

import functools
import importlib.util
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from flax import nnx
from jax.sharding import Mesh
from PIL import Image
from safetensors.numpy import save_file

from hgdpo_jax import config as configuration
from hgdpo_jax import sample
from hgdpo_jax.data.photographs import list_photographs
from hgdpo_jax.data.pixels import load_images
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion import recipe
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.diffusion.schedule import NoiseSchedule
from hgdpo_jax.diffusion.trajectory import from_noise
from hgdpo_jax.diffusion.trajectory import sample as draw_latents
from hgdpo_jax.faces.concepts import ConceptEncoder
from hgdpo_jax.models import ip_adapter
from hgdpo_jax.models.lora import add_lora
from hgdpo_jax.models.unet import UNet2DConditionModel
from hgdpo_jax.results import images
from hgdpo_jax.results.contents import PEFT_FILE, PEFT_NORMAL_FILE, PEFT_TEXT_FILE, RECIPE
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import write_json
from hgdpo_jax.run.folder import stage_folder
from hgdpo_jax.run.prompts import read_prompts
from hgdpo_jax.training.finished import with_trained_adapter
from hgdpo_jax.training.step import split_params
from tests import tiny
from tests.rounding import EPS, NETWORK, assert_close

PROMPTS = ["a portrait photograph of a woman, blue background!", "a <|endoftext|> man"]
STEPS, GUIDANCE = 13, 3.0  # of the 13 timesteps one is at least 900
# Each step adds the UNet's rounding, guidance 3 times that of one half of its batch and 2 times that of the other.
DRAWN = STEPS * (2 * GUIDANCE - 1) * NETWORK
ALL, UP = ({"blocks": blocks, "weight": 0.5} for blocks in ("all", "up"))  # in hgdpo.json


class Setup(NamedTuple):
    """A base, its pipeline with LoRA everywhere, the policies hard, normal and text, a folder with their files, and a
    sampler."""

    base: Path
    pipeline: pipelines.Pipeline
    policies: dict[str, Any]
    folder: Path
    sampler: Sampler


@pytest.fixture(scope="module")
def setups(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Setup]:
    """sd15 or sdxl → what the tests share."""
    return functools.cache(lambda kind: setup(kind, tmp_path_factory.mktemp(kind)))


def shaken(policy: Any, seed: int) -> Any:
    """A LoRA that does something, B included."""
    leaves, tree = jax.tree.flatten(policy)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [x + jnp.asarray(0.4 * rng.standard_normal(x.shape), x.dtype) for x in leaves])


def setup(kind: str, folder: Path) -> Setup:
    base = tiny.write_base(folder / "base") if kind == "sd15" else tiny.write_sdxl(folder / "base")
    pipeline = pipelines.load_pipeline(base)
    for i, (name, model) in enumerate(pipeline.models.items()):
        if name != "vae":
            add_lora(model, 2, 2.0, nnx.Rngs(i))
    fresh = {name: split_params(pipeline, params)[1] for name, params in (("unet", "lora"), ("text", "text_lora"))}
    policies = {"hard": shaken(fresh["unet"], 1), "normal": shaken(fresh["unet"], 2), "text": shaken(fresh["text"], 3)}
    write_json(folder / "export" / "hgdpo.json", UP)
    for name, file in (("hard", PEFT_FILE), ("normal", PEFT_NORMAL_FILE), ("text", PEFT_TEXT_FILE)):
        nnx.update(pipeline.networks, policies[name])
        models = {part: model for part, model in pipeline.models.items() if part.startswith("text") == (name == "text")}
        weights = pipeline.layout.lora_weights(models, "peft")
        save_file(weights, folder / "export" / file)
    nnx.update(pipeline.networks, fresh["unet"])
    nnx.update(pipeline.networks, fresh["text"])
    return Setup(base, pipeline, policies, folder / "export", sampler_of(pipeline))


def sampler_of(pipeline: pipelines.Pipeline, **settings: Any) -> Sampler:
    chosen = {"solver": "dpmpp_2m", "steps": STEPS, "guidance": GUIDANCE, "batch": 2, "seed": 0} | settings
    return Sampler(pipeline, chosen.pop("mesh", tiny.mesh()), **chosen)


def ours(sampler: Sampler, pipeline: pipelines.Pipeline, *policies: Any, concept: Any = None) -> np.ndarray:
    """Images in [0, 1]."""
    sampler.use_policies(*policies)
    keys = sampler.keys("test", PROMPTS, [0, 1])
    latents = sampler.generate(pipeline.tokenize(PROMPTS), keys, (32, 32), "", concept)
    return (sampler.decode(latents, "") + 1) / 2


def start(sampler: Sampler) -> torch.Tensor:
    keys = sampler.keys("test", PROMPTS, [0, 1])
    latents = jax.vmap(lambda key: jax.random.normal(jax.random.split(key)[0], tiny.LATENT))(keys)
    return torch.tensor(np.asarray(latents).transpose(0, 3, 1, 2))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """What export puts beside the weights."""
    spec = importlib.util.spec_from_file_location("hgdpo_recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def theirs(script: ModuleType, pipeline: Any, sampler: Sampler, **more: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "height": 32, "width": 32}
    return script.draw(pipeline, PROMPTS, latents=start(sampler), output_type="np", **settings, **more).images


def chosen(policies: dict[str, Any], blocks: str, text: bool, weight: float = 0.5) -> list[Any]:
    hard = policies["hard"]
    if blocks != "all":
        hard = recipe.in_up_blocks(hard, policies["normal"] if blocks == "up+normal" else None)
    return [recipe.weighted(policy, weight) for policy in (hard, *([policies["text"]] if text else []))]


@pytest.mark.parametrize(
    ("kind", "said", "given", "blocks", "files"),  # what hgdpo.json says, unless something else is given
    [
        ("sd15", ALL, {}, "all", [PEFT_FILE, PEFT_NORMAL_FILE]),
        ("sd15", UP | {"weight": 0.25}, {}, "up", [PEFT_FILE]),  # hard without normal, naive
        ("sd15", UP, {"blocks": "up+normal"}, "up+normal", [PEFT_FILE, PEFT_NORMAL_FILE]),
        ("sd15", ALL, {"blocks": "up", "weight": 0.75}, "up", [PEFT_FILE, PEFT_NORMAL_FILE, PEFT_TEXT_FILE]),
        ("sdxl", UP, {}, "up", [PEFT_FILE, PEFT_NORMAL_FILE, PEFT_TEXT_FILE]),
    ],
)
def test_the_recipe_gives_the_images_of_diffusers(
    setups: Callable[[str], Setup],
    script: ModuleType,
    tmp_path: Path,
    kind: str,
    said: dict[str, Any],
    given: dict[str, Any],
    blocks: str,
    files: list[str],
) -> None:
    base, pipeline, policies, folder, sampler = setups(kind)
    write_json(tmp_path / "hgdpo.json", said)
    for file in files:
        (tmp_path / file).symlink_to(folder / file)
    reference = DiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    script.load(reference, tmp_path, **given)
    text, weight = PEFT_TEXT_FILE in files, (said | given)["weight"]
    found = ours(sampler, pipeline, *chosen(policies, blocks, text, weight))
    assert_close(found, theirs(script, reference, sampler), DRAWN)
    others = [ours(sampler, pipeline), ours(sampler, pipeline, *chosen(policies, blocks, not text, weight))]
    assert all(np.abs(other - found).max() > 10 * DRAWN for other in others)
    assert sampler._programs.draw._cache_size() == 2  # without and with the text encoder's policy


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_without_policies_the_images_are_those_of_the_base(
    setups: Callable[[str], Setup], script: ModuleType, tmp_path: Path, kind: str
) -> None:
    base, pipeline, *_, sampler = setups(kind)
    write_json(tmp_path / "hgdpo.json", UP)
    reference = script.load(DiffusionPipeline.from_pretrained(base, dtype=torch.float32), tmp_path)
    assert_close(ours(sampler, pipeline), theirs(script, reference, sampler), DRAWN)


def test_a_folder_that_does_not_say_how_to_draw_is_refused(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"hgdpo\.json"):
        script.load(None, tmp_path)
    write_json(tmp_path / "hgdpo.json", UP)
    for blocks, line in (("up+normal", "has no normal_lora.safetensors"), ("mid", "'mid': expects one of all, up, up")):
        with pytest.raises(ValueError, match=line):
            script.load(None, tmp_path, blocks=blocks)


def test_a_concept_image_gives_the_images_of_diffusers_with_and_without_lora(
    setups: Callable[[str], Setup], script: ModuleType, tmp_path: Path
) -> None:
    """tests/models/test_ip_adapter.py compares the other kinds, and SDXL's UNet."""
    base, pipeline, policies, folder, sampler = setups("sd15")
    encoder = ConceptEncoder("ip_adapter_plus", str(tiny.write_scorer(tmp_path / "clip")))
    adapter = ip_adapter.fresh(pipeline.denoiser, "ip_adapter_plus", encoder.nothing.shape[-1], nnx.Rngs(5))
    ip_adapter.save(adapter, tmp_path / "adapter.safetensors")
    settings = configuration.default().adapter
    settings.update(weights=str(tmp_path / "adapter.safetensors"), image_encoder=str(tmp_path / "clip"))
    with_adapter, encoder = with_trained_adapter(pipeline, settings, None, tiny.mesh())
    photographs = list_photographs(configuration.ASSETS / "portraits", "heldout")[:1]
    concept = encoder(load_images(photographs, (64, 64))[1]).features
    with_concept = sampler_of(with_adapter, concept_scale=0.7)
    embeds = torch.tensor(np.concatenate([encoder.nothing, concept]))[:, None]  # diffusers counts images first
    hard = chosen(policies, "up", False)
    without_concept = [ours(sampler, pipeline), ours(sampler, pipeline, *hard)]
    write_json(tmp_path / "hgdpo.json", UP)
    for number, used in enumerate(([], hard)):
        reference = DiffusionPipeline.from_pretrained(base, dtype=torch.float32)
        script.load(reference, folder if used else tmp_path)
        reference.hgdpo_text = {}
        if used:
            reference.delete_adapters("text")
        reference.load_ip_adapter(str(tmp_path), "", "adapter.safetensors", image_encoder_folder=None)
        reference.set_ip_adapter_scale(0.7)
        expected = theirs(script, reference, sampler, ip_adapter_image_embeds=[embeds])
        found = ours(with_concept, pipeline, *used, concept=np.repeat(concept, 2, axis=0))
        assert_close(found, expected, DRAWN)
        assert np.abs(without_concept[number] - found).max() > 10 * DRAWN


def test_lan_restores_the_statistics_of_a_policy_that_shifts_channels() -> None:
    schedule = NoiseSchedule.from_config(tiny.SCHEDULER)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(jax.random.key(1), (3, 8, 8, 4))

    def base(x: jax.Array, t: jax.Array) -> jax.Array:
        return 0.8 * x + 0.1 * jnp.sin(3 * x)

    def shifted(x: jax.Array, t: jax.Array) -> jax.Array:
        return 1.1 * base(x, t) + jnp.asarray([0.5, -0.4, 0.3, 0.0])

    trajectory = from_noise(schedule, "dpmpp_2m", 10)

    def draw(denoise: Any, anchor: Any = None) -> np.ndarray:
        return np.asarray(draw_latents(denoise, schedule, trajectory, x, keys, anchor)[0])

    wanted, drifted, restored = draw(base), draw(shifted), draw(shifted, base)
    for statistic in (np.mean, np.std):
        of = [statistic(latents, axis=(1, 2)) for latents in (wanted, drifted, restored)]
        assert np.abs(of[1] - of[0]).max() > 0.1
        # Ten steps of a few roundings; x̂_0 divides them by √ᾱ, 0.068 at the first.
        assert_close(of[2], of[0], 10 * 5 * EPS / 0.068)
    assert np.abs(restored - wanted).max() > 0.01


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[images.Generator]:
    """A base, drawn on two devices; a sampler of the same settings is made, and its programs traced, once."""
    base = tiny.write_base(tmp_path_factory.mktemp("base"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "local_mesh", functools.cache(lambda: tiny.mesh(data=2)))
        samplers: dict[tuple, Sampler] = {}

        def sampler(pipeline: pipelines.Pipeline, mesh: Mesh, **settings: Any) -> Sampler:
            key = (id(pipeline), *settings.items())
            return samplers.setdefault(key, samplers.get(key) or Sampler(pipeline, mesh, **settings))

        patch.setattr(images, "Sampler", sampler)
        yield images.from_checkpoint(str(base))._replace(resolution=(32, 32))


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_negative_prompt_is_diffusers(setups: Callable[[str], Setup], kind: str) -> None:
    base, pipeline, *_, sampler = setups(kind)
    negative = "blurry, a drawing"
    found = ours(sampler_of(pipeline, negative=negative), pipeline)
    reference = DiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "height": 32, "width": 32}
    settings |= {"negative_prompt": [negative] * 2, "latents": start(sampler), "output_type": "np"}
    assert_close(found, reference(PROMPTS, **settings).images, DRAWN)
    assert np.abs(found - ours(sampler, pipeline)).max() > 10 * DRAWN


def test_a_negative_prompt_without_guidance_says_that_it_has_no_effect(
    setups: Callable[[str], Setup], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        sampler_of(setups("sd15").pipeline, negative="blurry", guidance=1.0)
    assert "negative prompt 'blurry': has no effect, guidance 1 means none" in caplog.text


def test_a_byte_order_mark_is_not_of_the_prompt(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("a woman\u2028in red\r\n\na man\n".encode("utf-8-sig"))
    assert read_prompts(tmp_path / "p.txt", "--prompts ") == ["a woman\u2028in red", "a man"]
    (tmp_path / "p.txt").write_bytes("a w\xf6man".encode("latin-1"))
    with pytest.raises(UserError, match=r"p\.txt line 1: is not UTF-8"):
        read_prompts(tmp_path / "p.txt", "--prompts ")


def test_a_concept_that_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 60)
    with pytest.raises(UserError, match=r"--concept .*a\.png: cannot be read as an image \(") as error:
        images.read_concept(tmp_path / "a.png")
    assert "\n" not in str(error.value)


def draw(source: images.Generator, prompts: list[str], seeds: list[int], out: Path, **settings: Any) -> Sampler:
    chosen = {"steps": 2, "guidance": 2.0, "per_device": 2} | settings
    return images.draw(source, prompts, seeds, out, images.Settings(**chosen))


def test_lan_with_the_base_as_policy_changes_nothing(setups: Callable[[str], Setup]) -> None:
    _, pipeline, *_, sampler = setups("sd15")
    assert_close(ours(sampler_of(pipeline, normalise=True), pipeline), ours(sampler, pipeline), DRAWN)


def test_a_file_of_prompts_is_drawn_with_one_compilation_by_devices_that_do_not_ask_each_other(
    source: images.Generator, tmp_path: Path
) -> None:
    prompts = [f"prompt {i}" for i in range(5)]
    sampler = draw(source, prompts, [3, 4], tmp_path / "out")
    assert sampler._programs.draw._cache_size() == sampler._programs.decode._cache_size() == 1
    assert len(list((tmp_path / "out").glob("0*.png"))) == 10 and (tmp_path / "out" / "sheet_000.png").is_file()
    for program in sampler.traced((32, 32)):
        text = program.lower().compile().as_text()
        assert "num_partitions=2" in text
        assert not {name for name in ("all-to-all", "all-reduce", "all-gather", "collective-permute") if name in text}


def test_an_image_is_a_function_of_prompt_seed_and_settings_and_says_so(
    source: images.Generator, tmp_path: Path
) -> None:
    draw(source, ["a woman", "a man"], [7, 8], tmp_path / "many")
    draw(source, ["a man"], [8, 9, 10], tmp_path / "one")  # as many at once, by the same program
    with Image.open(tmp_path / "many" / "00001_8.png") as many, Image.open(tmp_path / "one" / "00000_8.png") as one:
        np.testing.assert_array_equal(np.asarray(many), np.asarray(one))
        said = json.loads(many.text["hgdpo_jax"])
        assert many.text["parameters"].startswith("a man\n")
    assert (said["prompt"], said["seed"], said["steps"], said["guidance"]) == ("a man", 8, 2, 2.0)


def test_guidance_up_to_one_is_none_as_in_diffusers(source: images.Generator, tmp_path: Path) -> None:
    drawn = []
    for guidance in (0.5, 1.0):
        draw(source, ["a man"], [0], tmp_path / str(guidance), guidance=guidance)
        drawn.append(np.asarray(Image.open(tmp_path / str(guidance) / "00000_0.png"), np.int32))
    assert max(abs(image - drawn[-1]).max() for image in drawn) <= 1  # one program, compiled twice


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["--guidance", "nan"], "--guidance nan: expects a number from 0"),
        (["--steps", "0"], "--steps 0: expects a number from 1"),
        (["--lora-weight", "inf"], "--lora-weight inf: expects a finite number"),
    ],
)
def test_numbers_out_of_range_are_named(
    given: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["sample", "--model", "m", "--prompt", "p", "--out", str(tmp_path / "out"), *given]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(UserError, match=line):
        sample.main()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ("--model m --stage hard", "--stage: does nothing without --workdir"),
        ("--model m --lora-weight 0.5", "--lora-weight: does nothing without --workdir"),
        ("--model m --lora-weight 0", "--lora-weight: does nothing without --workdir"),
        ("--model m --blocks up", "--blocks: does nothing without --workdir"),
        ("--model m --base m", "--base: does nothing without --workdir"),
        ("--model m --no-text-encoder", "--no-text-encoder: does nothing without --workdir"),
        ("--model m --lan", "--lan: does nothing without --workdir"),
        ("--workdir w --adapter a.safetensors", "--adapter: does nothing without --concept"),
        ("--model m --concept-scale 0", "--concept-scale: does nothing without --concept"),
        ("--workdir w --identity a.onnx", "--identity: does nothing without --concept"),
        ("--workdir w --stage base --blocks up", "--blocks: does nothing with --stage base"),
        ("--workdir w --stage base --lan", "--lan: does nothing with --stage base"),
        ("--workdir w --stage personalise --concept a.png --lora-weight 1", "--lora-weight: does nothing with --stage"),
        ("--workdir w --stage text_encoder --no-text-encoder", "--no-text-encoder: does nothing with --stage text_enc"),
    ],
)
def test_an_option_that_does_nothing_is_refused(
    given: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["sample", "--prompt", "p", "--out", "out", *given.split()])
    with pytest.raises(UserError, match=option):
        sample.main()
    assert not list(tmp_path.iterdir())


def test_stages_have_one_name_in_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, folder in (
        ("hard", "stage3"),
        ("stage3", "stage3"),
        ("naive", "naive"),
        ("stage0", "stage0"),
        ("my", "my"),
    ):
        monkeypatch.setattr("sys.argv", ["sample", "--workdir", "w", "--prompt", "p", "--out", "o", "--stage", name])
        assert sample.parse().stage == stage_folder(name) == folder


def test_what_is_there_is_kept_and_another_runs_folder_is_refused(source: images.Generator, tmp_path: Path) -> None:
    seeds = list(range(3))  # more than there are devices
    whole = draw(source, ["a man"], seeds, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "00000_1.png").unlink()
    kept = (tmp_path / "out" / "00000_0.png").stat().st_mtime_ns
    rest = draw(source, ["a man"], seeds, tmp_path / "out")
    assert rest.batch == whole.batch  # the same program
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert (tmp_path / "out" / "00000_0.png").stat().st_mtime_ns == kept
    with pytest.raises(UserError, match=r"holds images of another run \(guidance 2.0, now it is 3.0\); choose another"):
        draw(source, ["a man"], seeds, tmp_path / "out", guidance=3.0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(UserError, match="holds something else; choose another folder"):
        draw(source, ["a man"], [0, 1], tmp_path / "mine")


def test_a_model_that_moved_is_the_same(tmp_path: Path) -> None:
    images.claim(tmp_path / "out", {"model": "here", "base": "1"})
    images.require_own(tmp_path / "out", {"model": "there", "base": "1"})
    with pytest.raises(UserError, match="holds images of another run"):
        images.require_own(tmp_path / "out", {"model": "here", "base": "2"})


def test_what_is_refused_before_the_first_image_leaves_no_settings(source: images.Generator, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="65x65: this model needs"):
        draw(source._replace(resolution=(65, 65)), ["a man"], [0], tmp_path / "out")
    assert not list(tmp_path.iterdir())
    draw(source, ["a man"], [0, 1, 2], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["size"] == "32x32"


def test_long_prompts_are_said_and_cut_as_diffusers_does(
    source: images.Generator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = " ".join(["portrait"] * 90)
    draw(source, [long, "a man"], [0, 1], tmp_path / "out")
    assert [r.message for r in caplog.records if "tokens" in r.message] == [
        f"prompt {long!r} has 92 tokens: the first 77 are used"
    ]
    ids = source.pipeline.tokenize([long, " ".join(["portrait"] * 75)])
    np.testing.assert_array_equal(ids[0], ids[1])


@pytest.mark.parametrize(("latent", "pixel"), [(np.nan, 0.0), (0.0, np.nan), (-np.inf, 1.0)])
def test_a_picture_of_nan_or_infinity_is_named_and_not_written(
    source: images.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, latent: float, pixel: float
) -> None:
    def candidates(sampler: Sampler, ids: np.ndarray, *_: Any) -> tuple[np.ndarray, np.ndarray]:
        return np.full((len(ids), 4, 4, 4), latent, np.float32), np.full((len(ids), 32, 32, 3), pixel, np.float32)

    monkeypatch.setattr(Sampler, "candidates", candidates)
    with pytest.raises(UserError, match=r"prompt 'a man', seed 3: NaN or infinity was drawn"):
        draw(source, ["a man"], [3, 4], tmp_path / "out")
    assert not [*(tmp_path / "out").glob("*.png")]


def test_seeds_that_overlap_and_prompts_that_repeat_are_named(tmp_path: Path) -> None:
    assert sample.all_seeds([0, 10], 3) == [0, 1, 2, 10, 11, 12]
    with pytest.raises(UserError, match="--seed 0 2: with --samples 3 the seeds overlap, 2 comes twice"):
        sample.all_seeds([0, 2], 3)
    for seed in (-1, 2**32 - 1):
        with pytest.raises(UserError, match=f"--seed {seed}: expects numbers from 0 to {2**32 - 2}"):
            sample.all_seeds([seed], 2)
    (tmp_path / "prompts.txt").write_text("a man\n\na woman\na man\n")
    with pytest.raises(UserError, match="prompts.txt line 4: repeats line 1"):
        read_prompts(tmp_path / "prompts.txt", "--prompts ")
    (tmp_path / "prompts.txt").write_text("\n")
    with pytest.raises(UserError, match="is empty; expects one prompt a line"):
        read_prompts(tmp_path / "prompts.txt", "--prompts ")


def test_concept_images_and_adapters_that_do_not_fit_are_named(source: images.Generator, tmp_path: Path) -> None:
    settings = configuration.default().adapter
    photograph = configuration.ASSETS / "portraits" / "photographs" / "000f.jpg"
    with pytest.raises(UserError, match="--concept: needs an IP-Adapter"):
        images.with_concept(source, photograph, settings, None)
    with pytest.raises(UserError, match=r"notes.txt: cannot be read as an image"):
        (tmp_path / "notes.txt").write_text("no image")
        images.with_concept(source, tmp_path / "notes.txt", settings, None)
    other = tiny.random_model(UNet2DConditionModel, tiny.TINY_XL, 0)
    ip_adapter.save(ip_adapter.fresh(other, "face_id", 128, nnx.Rngs(0)), tmp_path / "other.safetensors")
    settings.weights = str(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other.safetensors: is for another UNet: it has"):
        images.with_concept(source, photograph, settings, None)
    adapter = ip_adapter.fresh(source.pipeline.denoiser, "face_id", 128, nnx.Rngs(0))
    ip_adapter.save(adapter, tmp_path / "face.safetensors")
    settings.weights = str(tmp_path / "face.safetensors")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    with pytest.raises(UserError, match=r"noise.png: no face found; give a photograph that shows one"):
        images.with_concept(source, tmp_path / "noise.png", settings, None)
    found = images.with_concept(source, photograph, settings, None)
    draw(found, ["a man"], [0, 1, 2], tmp_path / "out")
    draw(source, ["a man"], [0, 1, 2], tmp_path / "plain")
    with Image.open(tmp_path / "out" / "00000_0.png") as one, Image.open(tmp_path / "plain" / "00000_0.png") as two:
        assert not np.array_equal(np.asarray(one), np.asarray(two))
