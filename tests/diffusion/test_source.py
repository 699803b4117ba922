"""Checkpoints as people have them: older names, single files of several kinds, tokenizers, repositories of the hub."""

import functools
import hashlib
import json
import re
import runpy
import shlex
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file
from transformers import CLIPTokenizer

from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion import source as sources
from hgdpo_jax.diffusion import stable_diffusion
from hgdpo_jax.diffusion.klein import KLEIN
from hgdpo_jax.diffusion.schedule import NoiseSchedule
from hgdpo_jax.diffusion.stable_diffusion import STABLE_DIFFUSION
from hgdpo_jax.models import architectures
from hgdpo_jax.models.architectures import SD15
from hgdpo_jax.models.convert import abstract, from_torch, keys, load_model, to_torch
from hgdpo_jax.models.ldm import SDXL_PARTS, TranslatedWeights
from hgdpo_jax.models.text import of_first
from hgdpo_jax.models.unet import UNet2DConditionModel
from hgdpo_jax.models.vae import AutoencoderKL
from hgdpo_jax.models.weights import Weights
from hgdpo_jax.results.images import from_checkpoint
from hgdpo_jax.run.errors import UserError
from tests import klein, tiny
from tests.full.components import shrunken
from tests.full.original import single_file


@pytest.fixture
def changing(base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base, which a test may change."""
    return shutil.copytree(base, tmp_path / "base")


@pytest.fixture(scope="module")
def small() -> Iterator[dict[str, np.ndarray]]:
    """A single file of Stable Diffusion 1.5 at a fraction of its width, which is then taken for it."""
    configs = shrunken(SD15)
    configs["unet"] |= {"layers_per_block": 1}
    configs["vae"] |= {"layers_per_block": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(architectures, "SD15", replace(SD15, configs=configs))
        yield single_file(configs)


class EmptyUNet(UNet2DConditionModel):
    def __init__(self, *_: object, **__: object) -> None:
        pass


@pytest.fixture
def no_unet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelines have an empty UNet, the largest of their models, where a test is about another."""
    monkeypatch.setitem(STABLE_DIFFUSION.models, "unet", EmptyUNet)


@functools.cache
def keys_of(part: str, config: str) -> list[str]:
    return keys(abstract(STABLE_DIFFUSION.models[part], json.loads(config)))


def weights_of(path: Path, part: str, vae: Path | str = "") -> dict[str, np.ndarray]:
    """The weights of a part in a checkpoint, as its model gets them."""
    source = sources.open_source(str(path), str(vae))
    return dict(source.open(part, keys_of(part, json.dumps(source.configs[part]))))


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_a_vae_with_the_names_of_before_2023_is_read(base: Path, tmp_path: Path) -> None:
    expected = to_torch(load_model(AutoencoderKL, base / "vae"))
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    shutil.copytree(base / "vae", tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    for convolution in (False, True):
        older = {}
        for key, value in load_file(base / "vae" / path.name).items():
            old = re.sub(r"to_out\.0|to_[qkv]", lambda match: names[match[0]], key)
            older[old] = value[:, :, None, None] if convolution and old != key and value.ndim == 2 else value
        assert sum("query" in key for key in older) == 4  # weight and bias, of encoder and decoder
        save_file(older, path)
        assert same(to_torch(load_model(AutoencoderKL, tmp_path / "vae")), expected)


def test_a_file_with_novelais_names_is_read(small: dict[str, np.ndarray], tmp_path: Path) -> None:
    inside = "cond_stage_model.transformer."
    other = {key.replace(f"{inside}text_model.", inside): value for key, value in small.items()}
    assert other.keys() != small.keys()
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(small, a)
    save_file(other, b)
    assert same(weights_of(a, "text_encoder"), weights_of(b, "text_encoder"))


@pytest.mark.parametrize("beside", ["text_projection.weight", "text_model.embeddings.position_ids", "logit_scale"])
def test_what_clip_has_beside_a_text_encoder_is_passed_over(small: dict, tmp_path: Path, beside: str) -> None:
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(small, a)
    save_file(small | {f"cond_stage_model.transformer.{beside}": np.ones(3, np.float32)}, b)
    assert same(weights_of(a, "text_encoder"), weights_of(b, "text_encoder"))


def test_a_file_without_a_vae_takes_one_from_another(small: dict, tmp_path: Path) -> None:
    whole, rest, other = (tmp_path / f"{name}.safetensors" for name in ("whole", "rest", "vae"))
    prefix = "first_stage_model."
    inside = {key: value for key, value in small.items() if key.startswith(prefix)}
    alone = {key.removeprefix(prefix): value for key, value in inside.items()}
    mean = {"model_ema.decay": np.ones((), np.float32), "model_ema.encoderconv_inweight": np.ones(3, np.float32)}
    save_file(small, whole)
    save_file({key: value for key, value in small.items() if not key.startswith(prefix)}, rest)
    with pytest.raises(UserError, match=r"rest\.safetensors: holds no VAE; give one with --config\.model\.vae="):
        sources.open_source(str(rest))
    expected = weights_of(whole, "vae")
    for kind in (inside, alone, alone | mean, small):
        save_file(kind, other)
        assert same(weights_of(rest, "vae", other), expected)
    assert same(weights_of(rest, "text_encoder", other), weights_of(whole, "text_encoder"))


@pytest.mark.usefixtures("no_unet")
def test_where_a_single_file_does_not_fit_no_config_json_is_spoken_of(small: dict, tmp_path: Path) -> None:
    save_file({key: value for key, value in small.items() if "norm_out" not in key}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="does not fit Stable Diffusion 1.5, which it was taken for") as error:
        pipelines.load_pipeline(tmp_path / "a.safetensors")
    assert "config.json" not in str(error.value)
    save_file(small, tmp_path / "b.safetensors")
    save_file({"encoder.conv_in.weight": np.zeros((8, 3, 3, 3), np.float32)}, tmp_path / "vae.safetensors")
    source = sources.open_source(str(tmp_path / "b.safetensors"), vae=str(tmp_path / "vae.safetensors"))
    vae = abstract(AutoencoderKL, source.configs["vae"])
    with pytest.raises(UserError, match=r"does not fit the VAE that --config\.model\.vae=\S* replaces"):
        from_torch(source.open("vae", keys(vae)), vae, expected_by=source.expected("vae"))


@pytest.mark.parametrize(
    ("metadata", "tensors", "prediction", "last"),
    [
        ({}, (), "epsilon", 0.0047),
        ({"modelspec.prediction_type": "epsilon"}, (), "epsilon", 0.0047),
        ({"modelspec.prediction_type": "v"}, (), "v_prediction", 0.0047),
        ({"ss_v_parameterization": "True"}, (), "v_prediction", 0.0047),
        ({}, ("v_pred",), "v_prediction", 0.0047),
        ({}, ("v_pred", "ztsnr"), "v_prediction", 0.0),
    ],
)
def test_a_single_file_says_what_it_predicts(
    small: dict, tmp_path: Path, metadata: dict, tensors: tuple, prediction: str, last: float
) -> None:
    save_file(small | dict.fromkeys(tensors, np.zeros(0, np.float32)), tmp_path / "a.safetensors", metadata)
    scheduler = sources.open_source(str(tmp_path / "a.safetensors")).scheduler
    found = NoiseSchedule.from_config(scheduler)
    assert found.prediction_type == prediction == scheduler["prediction_type"]
    assert found.alphas_cumprod[-1] == pytest.approx(last, abs=1e-4)


@pytest.mark.parametrize(
    ("stated", "tensors", "message"),
    [
        ("epsilon", ("v_pred",), "metadata has modelspec.prediction_type='epsilon', and v_pred"),
        ("flow", (), "metadata has modelspec.prediction_type='flow'; expected epsilon or v"),
        ("epsilon", ("ztsnr",), "rescale_betas_zero_snr=True with prediction_type='epsilon'"),
    ],
)
def test_a_single_file_that_contradicts_itself_is_refused(
    small: dict, tmp_path: Path, stated: str, tensors: tuple, message: str
) -> None:
    more = dict.fromkeys(tensors, np.zeros(0, np.float32))
    save_file(small | more, tmp_path / "a.safetensors", {"modelspec.prediction_type": stated})
    with pytest.raises(UserError, match=message):
        NoiseSchedule.from_config(sources.open_source(str(tmp_path / "a.safetensors")).scheduler)


@pytest.mark.usefixtures("no_unet")
def test_words_that_were_added_to_a_tokenizer_do_not_end_the_text(tmp_path: Path) -> None:
    folder = tiny.write_sdxl(tmp_path / "xl")

    save_file({}, folder / "unet" / "diffusion_pytorch_model.safetensors")
    pipeline = pipelines.load_pipeline(folder)
    for name in ("text_encoder", "text_encoder_2"):
        path = next((folder / name).glob("*.safetensors"))
        weights, key = load_file(path), "text_model.embeddings.token_embedding.weight"
        key = key if key in weights else key.removeprefix("text_model.")
        weights[key] = np.concatenate([weights[key], weights[key][320:321]])  # the new word is the old one
        save_file(weights, path)
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps(config | {"vocab_size": 49409}))
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = CLIPTokenizer.from_pretrained(folder / name)
        assert tokenizer.convert_ids_to_tokens(320) == "a</w>" and tokenizer.add_tokens("<person>") == 1
        tokenizer.save_pretrained(folder / name)
    taught = pipelines.load_pipeline(folder)
    old, new = pipeline.tokenize(["a photo of a cat"]), taught.tokenize(["<person> photo of a cat"])
    assert of_first(jnp.asarray(new))[0, 1] == 49408 and np.array_equal(np.delete(new, 1), np.delete(old, 1))
    embed = nnx.jit(lambda text, ids: text(ids, (64, 64)))
    expected, found = (embed(p.text, jnp.asarray(ids)) for p, ids in ((pipeline, old), (taught, new)))
    assert np.array_equal(found.encoder_hidden_states, expected.encoder_hidden_states)
    assert np.array_equal(found.added_cond["text_embeds"], expected.added_cond["text_embeds"])


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_sdxl(tmp_path_factory.mktemp("xl"))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("unet/config.json", {"addition_time_embed_dim": 3}, "_embeddings_input_dim=44, its .* make 38;"),
        ("text_encoder_2/config.json", {"projection_dim": None}, "_embeddings_input_dim=44, its .* make 536;"),
        ("text_encoder/config.json", {"hidden_size": None}, "give embeddings of width 524, its UNet reads 20"),
        ("tokenizer_2/tokenizer_config.json", {"model_max_length": 9}, "its tokenizers have model_max_length 9 and 77"),
        ("model_index.json", {"text_encoder_2": None}, "give embeddings of width 8, its UNet reads 20"),
    ],
)
def test_parts_of_xl_that_do_not_fit_are_named(
    xl: Path, tmp_path: Path, file: str, change: dict[str, Any], message: str
) -> None:
    shutil.copytree(xl, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_text(json.dumps(json.loads((tmp_path / file).read_text()) | change))
    with pytest.raises(UserError, match=f"^model {tmp_path}: .*{message}"):
        sources.open_source(str(tmp_path))


def test_an_xl_unet_without_the_second_text_encoder_is_refused(xl: Path, tmp_path: Path) -> None:
    shutil.copytree(xl, tmp_path, dirs_exist_ok=True)
    for file, change in (("model_index.json", {"text_encoder_2": None}),
                         ("unet/config.json", {"cross_attention_dim": 8})):  # fmt: skip
        (tmp_path / file).write_text(json.dumps(json.loads((tmp_path / file).read_text()) | change))
    with pytest.raises(UserError, match=f"^model {tmp_path}: its UNet is XL's, and it has no text_encoder_2"):
        sources.open_source(str(tmp_path))


def test_a_number_in_place_of_the_three_of_open_clip_is_named(tmp_path: Path) -> None:
    key = "transformer.resblocks.0.attn.in_proj_weight"
    save_file({key: np.zeros((), np.float32)}, tmp_path / "a.safetensors")
    _, translate = SDXL_PARTS["text_encoder_2"]
    asked = "text_model.encoder.layers.0.self_attn.q_proj.weight"
    weights = TranslatedWeights(Weights(tmp_path / "a.safetensors"), "", translate, [asked], {})
    with pytest.raises(UserError, match=rf"^{tmp_path / 'a.safetensors'}: weight {key} is \(\); does not fit"):
        weights[asked]


def _tokenizer_config(folder: Path, change: Callable[[dict], dict]) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_a_tokenizer_without_a_length_has_clips(base: Path, tmp_path: Path) -> None:
    folder, long = shutil.copytree(base / "tokenizer", tmp_path / "tokenizer"), ["a cat " * 100, "a cat"]
    _tokenizer_config(folder, lambda config: config.pop("model_max_length") and config)
    expected, found = (stable_diffusion.tokenize(CLIPTokenizer.from_pretrained(path), long)
                       for path in (base / "tokenizer", folder))  # fmt: skip
    assert expected.shape == (2, 77) and np.array_equal(found, expected)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("merges.txt", None, r"tokenizer: has neither tokenizer\.json nor vocab\.json and merges\.txt"),
        ("vocab.json", POINTER, r"vocab\.json: is a pointer of Git LFS, not the file; run git lfs pull"),
        ("vocab.json", "{", r"tokenizer: not a tokenizer that can be read \(.*\); copy the folder again"),
        ("tokenizer_config.json", "[]", r"tokenizer: not a tokenizer that can be read"),
        ("tokenizer_config.json", '{"model_max_length": "x"}', r"tokenizer: not a tokenizer that can be read"),
        ("tokenizer_config.json", '{"model_max_length": 1}', r"tokenizer: not a tokenizer that can be read"),
    ],
)
def test_a_broken_tokenizer_is_named(changing: Path, name: str, content: str | None, message: str) -> None:
    path = changing / "tokenizer" / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        sources.open_source(str(changing))
    assert str(changing) in str(error.value) and "\n" not in str(error.value)


def test_a_tokenizer_with_more_words_than_its_text_encoder_is_refused(changing: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(changing / "tokenizer")
    tokenizer.add_tokens("<person>")
    tokenizer.save_pretrained(changing / "tokenizer")
    with pytest.raises(UserError, match="its tokenizer gives ids up to 49408, the text encoder has 49408 words; they"):
        sources.open_source(str(changing))


def test_a_card_in_another_encoding_is_read(changing: Path) -> None:
    (changing / "README.md").write_bytes("---\nlicense: mit\nauthor: Ørsted\n---\n".encode("latin-1"))
    assert sources.open_source(str(changing)).licence == "mit"


def test_a_size_may_be_a_height_and_a_width_or_unsaid(changing: Path) -> None:
    path = changing / "unet" / "config.json"
    for size, expected in (([8, 16], (8 * 8, 16 * 8)), (None, (64 * 8, 64 * 8))):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": size}))
        assert from_checkpoint(str(changing)).resolution == expected


def _convert(error: pytest.ExceptionInfo[UserError], monkeypatch: pytest.MonkeyPatch) -> None:
    """Does what a line advises, elsewhere and in this process, which has PyTorch."""
    assert "\n" not in str(error.value)
    program, *command = shlex.split(str(error.value).partition("installed: ")[2])
    assert program == "python"
    with monkeypatch.context() as patch:
        patch.chdir("/")
        patch.setattr(sys, "argv", command)
        runpy.run_path(command[0], run_name="__main__")


def test_a_lightning_checkpoint_is_converted_by_the_command_that_is_printed(
    small: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lightning = type(sys)("pytorch_lightning")
    lightning.Callback = type("Callback", (), {"__module__": "pytorch_lightning"})
    monkeypatch.setitem(sys.modules, "pytorch_lightning", lightning)
    state = {key: torch.from_numpy(value) for key, value in small.items()}
    checkpoint = {"state_dict": state, "callbacks": {lightning.Callback: lightning.Callback()}, "epoch": 3}
    torch.save(checkpoint, tmp_path / "a b.ckpt")
    with pytest.raises(UserError, match="is a pickle; convert it where PyTorch is installed") as error:
        sources.open_source(str(tmp_path / "a b.ckpt"))
    monkeypatch.delitem(sys.modules, "pytorch_lightning")
    _convert(error, monkeypatch)
    found = Weights(tmp_path / "a b.safetensors")
    assert all(np.array_equal(found[key], value) for key, value in small.items())


def test_pickles_in_a_folder_are_converted_to_what_is_looked_for(
    changing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = changing / "text_encoder" / "model.safetensors"
    expected = load_file(path)
    state = {key: torch.from_numpy(value) for key, value in expected.items()}
    for names in (["pytorch_model.bin"], [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]):
        path.unlink()
        for i, name in enumerate(names):
            torch.save(dict(list(state.items())[i :: len(names)]), path.with_name(name))
        with pytest.raises(UserError, match="is a pickle") as error:
            sources.open_source(str(changing))
        _convert(error, monkeypatch)
        assert same(weights_of(changing, "text_encoder"), expected)
        for name in names:
            path.with_name(name).unlink()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path, dict[str, int]]]:
    """A server that answers as the hub does: its address, the folder of its one repository, and what it sent of it."""
    root, sent = tmp_path / "repository", {}
    commit = "a" * 40

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def _files(self) -> list[str]:
            return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())

        def _answer(self, body: bytes, headers: dict[str, str], send: bool) -> None:
            self.send_response(200)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if send:
                self.wfile.write(body)

        def _handle(self, send: bool) -> None:
            path = self.path.partition("?")[0]
            if path.startswith("/api/models/"):
                files = self._files()
                found: Any = {"id": "o/n", "sha": commit, "siblings": [{"rfilename": name} for name in files]}
                if "/tree/" in path:
                    found = [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in files]
                self._answer(json.dumps(found).encode(), {"Content-Type": "application/json"}, send)
                return
            name = path.partition(f"/resolve/{commit}/")[2]
            body = (root / name).read_bytes()
            if send:
                sent[name] = len(body)
            self._answer(body, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(body).hexdigest()}"'}, send)

        def do_GET(self) -> None:  # noqa: N802
            self._handle(send=True)

        def do_HEAD(self) -> None:  # noqa: N802
            self._handle(send=False)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", root, sent
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("kind", ["sd15", "klein"])
def test_of_a_repository_only_what_will_be_read_is_fetched(
    kind: str,
    hub: tuple,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And of weights in shards, which klein's are, all of them."""
    address, root, sent = hub
    family = {"sd15": STABLE_DIFFUSION, "klein": KLEIN}[kind]
    if kind == "sd15":
        shutil.copytree(base, root)
    else:
        klein.pipeline().save_pretrained(root, max_shard_size="100KB")
    whole = {str(path.relative_to(root)) for path in root.rglob("*.safetensors")}
    denoiser = f"{family.denoiser}/diffusion_pytorch_model"
    unneeded = ["v1-5-pruned.safetensors", "safety_checker/model.safetensors", "safety_checker/config.json",
                f"{denoiser}.fp16.safetensors", f"{denoiser}.non_ema.safetensors",
                "vae/diffusion_pytorch_model.bin", "text_encoder/flax_model.msgpack"]  # fmt: skip
    for name in unneeded:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"not wanted")
    for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(tmp_path)}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)

    def open_at(endpoint: str) -> sources.Source:
        monkeypatch.setattr(sources, "HfApi", functools.partial(huggingface_hub.HfApi, endpoint=endpoint))
        monkeypatch.setattr(
            sources, "snapshot_download", functools.partial(huggingface_hub.snapshot_download, endpoint=endpoint)
        )
        return sources.open_source(f"owner/name@{'a' * 40}")

    found = open_at(address)
    assert not {*unneeded} & sent.keys() and "does not answer" not in caplog.text
    weights = {name for name in sent if name.endswith(".safetensors")}
    assert weights == whole and ((len(whole) > 3) == (kind == "klein"))
    for part in family.needed:
        model = abstract(family.models[part], found.configs[part])
        from_torch(found.open(part, keys(model)), model)
        assert same(to_torch(model), to_torch(load_model(family.models[part], root / part)))
    assert ("tokenizer/chat_template.jinja" in sent) == (kind == "klein")  # which an export hands on
    before = dict(sent)
    assert open_at("http://127.0.0.1:9").files == found.files and sent == before  # where nobody answers
    assert "the hub does not answer" in caplog.text
