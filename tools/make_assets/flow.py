"""Lays out the embedded flow base, a FLUX.2-klein in small, or puts a trained transformer into it.

python -m tools.make_assets.flow PORTRAITS --people PEOPLE                    all, the transformer random
python -m tools.make_assets.flow PORTRAITS --transformer EXPORT/transformer

Its VAE is that of the embedded Stable Diffusion, with the statistics of its latents' patches. Its text encoder learns,
as Qwen3 did, to continue texts: the captions of the made people.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Int
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import Qwen2Tokenizer

from hgdpo_jax.data.photographs import list_photographs
from hgdpo_jax.data.pixels import load_images
from hgdpo_jax.devices.start import start
from hgdpo_jax.models.architectures import KLEIN_4B
from hgdpo_jax.models.chat import MARKS, chat, chat_ids
from hgdpo_jax.models.convert import from_torch, load_model, save_model, to_torch
from hgdpo_jax.models.flux2 import Flux2Transformer2DModel
from hgdpo_jax.models.flux2_vae import AutoencoderKLFlux2, patchify
from hgdpo_jax.models.qwen3 import Qwen3Model
from hgdpo_jax.models.vae import AutoencoderKL
from hgdpo_jax.models.weights import write_weights
from hgdpo_jax.run import command
from hgdpo_jax.run.files import write_json
from tools.make_assets.photographs import SIZE
from tools.make_assets.vae import CHANNELS
from tools.make_assets.vae import CONFIG as SD_VAE

WORDS, TOKENS = 512, 36  # at most, of the vocabulary; of a prompt with its chat: those of captions have at most 32
TEXT = {
    **KLEIN_4B.configs["text_encoder"],
    "head_dim": 16,
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": TOKENS,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
}
TRANSFORMER = {
    **KLEIN_4B.configs["transformer"],
    "attention_head_dim": 32,
    "axes_dims_rope": [8, 8, 8, 8],
    "in_channels": 4 * CHANNELS,
    "joint_attention_dim": 3 * TEXT["hidden_size"],
    "num_attention_heads": 4,
    "num_layers": 3,
    "num_single_layers": 3,
    "timestep_guidance_channels": 64,
}
VAE = {
    **KLEIN_4B.configs["vae"],
    "latent_channels": CHANNELS,
    "sample_size": SIZE,
    **{key: SD_VAE[key] for key in ("block_out_channels", "layers_per_block", "norm_num_groups")},
    # The official checkpoints of Stable Diffusion have both.
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
# For diffusers, which asks transformers for what :func:`hgdpo_jax.models.chat.chat` makes.
TEMPLATE = chat("{{ messages[0].content }}").replace("\n", "{{ '\\n' }}")
SHOWN = 4000  # pictures whose latents the statistics are of


def make_tokenizer(captions: list[str], folder: Path) -> Qwen2Tokenizer:
    """Byte pairs of the captions in their chat, with Qwen3's marks."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(captions, trainers.BpeTrainer(vocab_size=WORDS, initial_alphabet=letters))
    made = json.loads(learner.to_str())["model"]
    merges: Any = [tuple(merge) for merge in made["merges"]]  # transformers' annotation knows strings alone
    tokenizer = Qwen2Tokenizer(vocab=made["vocab"], merges=merges, model_max_length=TOKENS, chat_template=TEMPLATE)
    tokenizer.add_tokens([AddedToken(mark, special=mark.startswith("<|"), normalized=False) for mark in MARKS])
    tokenizer.save_pretrained(folder)
    return tokenizer


def continued(model: Qwen3Model, ids: Int[Array, "b s"], padding: int) -> Array:
    """Cross-entropy of a token after those before it, in nats, their mean: float32 []. Padding is not learnt."""
    mask = ids != padding
    states = model(ids, mask)
    unit = states * jax.lax.rsqrt(jnp.square(states).mean(-1, keepdims=True) + 1e-6)
    logits = unit[:, :-1] @ model.embed_tokens.embedding[...].T
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
    return jnp.sum(losses * mask[:, 1:]) / mask[:, 1:].sum()


def language_model(vocabulary: int) -> Qwen3Model:
    """Gives the states after all layers of the text encoder, from which it learns to tell the next token.

    :class:`Qwen3Model` never computes its last layer: here that is one more than the text encoder has.
    """
    layers = TEXT["num_hidden_layers"]
    config = TEXT | {"vocab_size": vocabulary, "num_hidden_layers": layers + 1}
    return Qwen3Model(config, rngs=nnx.Rngs(1), read=(layers,))


def make_text_encoder(captions: list[str], tokenizer: Qwen2Tokenizer, folder: Path, steps: int) -> None:
    """Writes a language model that has learnt the captions, as transformers writes Qwen3ForCausalLM."""
    model = language_model(len(tokenizer))
    graph, weights = nnx.split(model)
    ids, rng = chat_ids(tokenizer, captions, TOKENS), np.random.default_rng(0)
    rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 12, steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))

    @jax.jit
    def step(weights: Any, optimizer: Any, ids: Array) -> tuple[Any, Any, Array]:
        objective = lambda weights: continued(nnx.merge(graph, weights), ids, tokenizer.pad_token_id)  # noqa: E731
        loss, grads = jax.value_and_grad(objective)(weights)
        updates, optimizer = tx.update(grads, optimizer, weights)
        return optax.apply_updates(weights, updates), optimizer, loss

    optimizer = jax.jit(tx.init)(weights)
    with tqdm(range(steps), desc="text of the flow") as bar:
        for _ in bar:
            weights, optimizer, loss = step(weights, optimizer, ids[rng.integers(len(ids), size=64)])
    print(f"text of the flow: {float(loss):.2f} nats a token")
    nnx.update(model, weights)
    tensors = {f"model.{key}": value for key, value in to_torch(model).items()}
    tensors["model.norm.weight"] = np.ones(TEXT["hidden_size"], np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder / "model.safetensors", tensors, np.float16)
    write_json(folder / "config.json", TEXT | {"vocab_size": len(tokenizer)})


def fresh_transformer() -> Flux2Transformer2DModel:
    """Random, but that each block begins as the identity, and the prediction as 0 (Peebles and Xie 2023)."""
    model = Flux2Transformer2DModel(TRANSFORMER, rngs=nnx.Rngs(2))
    modulations = model.double_stream_modulation_img, model.double_stream_modulation_txt, model.single_stream_modulation
    for layer in (*(modulation.linear for modulation in modulations), model.norm_out.linear, model.proj_out):
        layer.kernel[...] = jnp.zeros_like(layer.kernel[...])
    return model


def make_vae(portraits: Path, people: Path, folder: Path) -> None:
    """The embedded VAE, and mean and variance of each channel of its latents' patches."""
    sd = load_model(AutoencoderKL, portraits / "base" / "vae")
    listed = list_photographs(people, "base")
    _, images = load_images(listed[:: -(-len(listed) // SHOWN)], (SIZE, SIZE))
    encode = nnx.jit(lambda vae, images: patchify(vae.encode(images)[0]))
    latents = np.concatenate([encode(sd, images[i : i + 50]) for i in range(0, len(images) - 49, 50)])
    weights = to_torch(sd) | {
        "bn.running_mean": latents.mean((0, 1, 2)),
        "bn.running_var": latents.var((0, 1, 2)),
        "bn.num_batches_tracked": np.int64(len(latents)),
    }
    vae = AutoencoderKLFlux2(VAE, rngs=nnx.Rngs(0))
    from_torch(weights, vae)
    save_model(vae, folder, dtype=np.float16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("portraits", type=Path)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--people", type=Path, help="the folder of made people")
    group.add_argument("--transformer", type=Path, help="folder of a trained one")
    parser.add_argument("--steps", type=int, default=600, help="of the text encoder")
    arguments = parser.parse_args()
    start()
    base = arguments.portraits / "flow"
    if arguments.transformer:
        model = load_model(Flux2Transformer2DModel, arguments.transformer)
        save_model(model, base / "transformer", dtype=np.float16)
        return
    captions = sorted({photograph.caption for photograph in list_photographs(arguments.people, "base")})
    tokenizer = make_tokenizer([chat(caption) for caption in captions], base / "tokenizer")
    make_text_encoder(captions, tokenizer, base / "text_encoder", arguments.steps)
    make_vae(arguments.portraits, arguments.people, base / "vae")
    save_model(fresh_transformer(), base / "transformer", dtype=np.float16)
    plain = {"shift": 1.0, "use_dynamic_shifting": False}  # of so few tokens FLUX.2's shift leaves noise alone
    write_json(base / "scheduler" / "scheduler_config.json", {**KLEIN_4B.scheduler, **plain})
    write_json(base / "model_index.json", KLEIN_4B.index)


if __name__ == "__main__":
    command.run(main)
