"""One optimizer step: losses as functions of (policy, reference, frozen, batch, numbers), and the jitted update.

Nothing here knows which stage is trained, and no number of a stage is a constant of the program: the stages of a
curriculum share one. Legend: `b` pairs, `h w c` latent, `s` tokens, `m f` a concept's features.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from hgdpo_jax.diffusion.pipeline import Pipeline
from hgdpo_jax.diffusion.process import Process, Timesteps
from hgdpo_jax.diffusion.recipe import in_up_blocks
from hgdpo_jax.models.ip_adapter import join
from hgdpo_jax.models.lora import drop as drop_inputs
from hgdpo_jax.models.text import Encoded, conditioning
from hgdpo_jax.training import objectives
from hgdpo_jax.training.loss_scale import LOSS_SCALE, SKIPPED
from hgdpo_jax.training.objectives import Compared, WinnerLoser

Params = Mapping[Any, Any]  # nested by name; the leaves are arrays, or shapes where a program is planned
Batch = dict[str, Array]
Captions = Int[Array, "b s"] | Encoded  # token ids, or what text encoders made of them before
Metrics = dict[str, Array]
TIMESTEP_BINS = 10
GRADIENT_NORM = "gradient_norm"  # in the optimizer's state, before clipping
ESTIMATE = "estim_lr"  # there, of Prodigy
LEAD = "dpo/lead"  # mean of |u|


class Numbers(NamedTuple):
    """The scalars of a stage's step: all are arguments of the program.

    Attributes:
        key: data of the stage's PRNG key.
        rate: learning rate of this step.
        ema: decay of the averaged policy.
        least_scale: a step whose gradient is not finite is skipped while the loss's scale is above it; infinite where
            the dtype has room enough.
        beta, lambda_stat: `train.beta` and `train.lambda_stat`.
        caption_dropout, concept_dropout: those of the group `data`.
        objective_weight, label_smoothing, safeguard, sft_weight, auto_beta: the settings of the group `train`; None is
            without, and then not in the program.
        lead: running mean of |u|, from which `auto_beta` finds β; None: β is `beta`.
    """

    key: UInt32[np.ndarray, "2"]
    rate: np.float32
    ema: np.float32
    least_scale: np.float32
    beta: np.float32
    lambda_stat: np.float32
    caption_dropout: np.float32
    concept_dropout: np.float32
    objective_weight: Any = None
    label_smoothing: Any = None
    safeguard: Any = None
    sft_weight: Any = None
    auto_beta: Any = None
    lead: Any = None

    @property
    def stage_key(self) -> Key[Array, ""]:
        """The stage's PRNG key."""
        return jax.random.wrap_key_data(self.key)  # type: ignore[arg-type]  # an array of JAX inside the program


class Denoiser(NamedTuple):
    """UNet (or transformer), text encoders and perhaps an adapter as one pure function of their weights.

    The weights are {"unet": ..., "text": ..., "adapter": ...} in two parts: the policy is what is trained, `frozen` the
    rest.

    Attributes:
        networks: all of them.
        name: of the one that predicts, the family's `denoiser`.
        pixels_per_latent: of the VAE.
        no_concept: see :class:`hgdpo_jax.diffusion.pipeline.Pipeline`.
    """

    networks: nnx.GraphDef
    name: str
    pixels_per_latent: int
    no_concept: Float[np.ndarray, "1 m f"] | None

    def __call__(
        self,
        policy: Params,
        frozen: Params,
        x_t: Float[Array, "n h w c"],
        t: Int[Array, "n"] | Float[Array, "n"],
        captions: Captions,
        concept: Float[Array, "b m f"] | None = None,
        drop: tuple[Bool[Array, "b"], Bool[Array, "b"]] | None = None,
        dropout: Key[Array, "b"] | None = None,
    ) -> Float[Array, "n h w c"]:
        """The prediction, float32.

        Args:
            policy, frozen: the weights.
            x_t, t: noisy latents and their timesteps; n is a multiple of b: each caption is repeated, for its winner
                and its loser.
            captions: b.
            concept: features of concept images, for an adapter.
            drop: which captions are replaced by the empty one, and which concepts by none.
            dropout: keys of LoRA's dropout; none: nothing is dropped.
        """
        networks = nnx.merge(self.networks, policy, frozen)
        if dropout is not None:
            drop_inputs(networks.values(), dropout)
        size = (x_t.shape[1] * self.pixels_per_latent, x_t.shape[2] * self.pixels_per_latent)
        text = networks["text"]
        encoded = conditioning(captions, size) if isinstance(captions, Encoded) else text(captions, size)
        given, count = (encoded, concept), len(encoded.encoder_hidden_states)
        if drop is not None:
            empty = (text.empty(count, size), None if concept is None else self.no_concept)
            given = tuple(
                jax.tree.map(lambda x, e, d=d: jnp.where(d.reshape(-1, *[1] * (x.ndim - 1)), e, x), *both)
                for d, both in zip(drop, zip(given, empty, strict=True), strict=True)
            )
        repeats = x_t.shape[0] // count
        condition, concept = jax.tree.map(lambda x: jnp.repeat(x, repeats, 0), given)
        memory = networks[self.name].read_text(condition.encoder_hidden_states)
        if concept is not None:
            memory = join(memory, networks["adapter"](concept), 1.0)
        return networks[self.name](x_t, t, memory, condition.added_cond)


def policy_filter(params: str, denoiser: str) -> nnx.filterlib.Filter:
    """Which weights are the policy, as `train.params` says; `denoiser` is the name of the model that predicts."""
    part, kind = {
        "lora": (denoiser, nnx.LoRAParam),
        "all": (denoiser, nnx.Param),
        "text_lora": ("text", nnx.LoRAParam),
        "adapter": ("adapter", nnx.Param),
    }[params]
    return nnx.All(nnx.PathContains(part), kind)


def split_params(pipeline: Pipeline, params: str) -> tuple[Denoiser, Params, Params]:
    """(denoiser, policy, frozen); see :func:`policy_filter`.

    The states are copies of the containers, not of the arrays: a later write into the pipeline does not show in them.
    """
    name = pipeline.family.denoiser
    networks, *states = nnx.split(pipeline.networks, policy_filter(params, name), ...)
    policy, frozen = jax.tree.map(lambda x: x, states)
    return Denoiser(networks, name, pipeline.vae.pixels_per_latent, pipeline.no_concept), policy, frozen


Loss = Callable[[Params, Params, Params, Batch, Numbers], tuple[Float[Array, ""], Metrics]]


def _noise(key: Key[Array, "b"], shape: tuple[int, ...], process: Process) -> tuple[Timesteps, Float[Array, "b h w c"]]:
    """Timestep and noise of each example, from its own key."""
    keys = jax.vmap(jax.random.split)(key)
    t = process.draw_times(keys[:, 0])
    return t, jax.vmap(lambda k: jax.random.normal(k, shape))(keys[:, 1])


def _float32(batch: Batch) -> Batch:
    """The batch with its latents and concepts, which are stored as float16, in float32."""
    return {name: x.astype(jnp.float32) if name in ("winner", "loser", "concept") else x for name, x in batch.items()}


def _captions(batch: Batch) -> Captions:
    if "encoder_hidden_states" in batch:
        return Encoded(batch["encoder_hidden_states"], batch.get("text_embeds"))
    return batch["input_ids"]


class Noised(NamedTuple):
    """Winner and loser of each pair side by side, so that both stay on the device that holds their pair.

    Attributes:
        t: the timestep of each pair, [b].
        t_pair, x_t, target: timesteps [2b], noisy latents and what is to be predicted of them [2b h w c].
    """

    t: Timesteps
    t_pair: Int[Array, "2b"] | Float[Array, "2b"]
    x_t: Float[Array, "2b h w c"]
    target: Float[Array, "2b h w c"]


def _noised(batch: Batch, schedule: Process) -> Noised:
    """A batch of pairs at the noise of its keys, which winner and loser share."""
    t, noise = _noise(batch["key"], batch["winner"].shape[1:], schedule)
    pair = jnp.stack([batch["winner"], batch["loser"]], 1).reshape(-1, *noise.shape[1:])
    t_pair, noise_pair = jnp.repeat(t, 2), jnp.repeat(noise, 2, 0)
    x_t = schedule.add_noise(pair, noise_pair, t_pair)
    return Noised(t, t_pair, x_t, schedule.target(pair, noise_pair, t_pair))


def predict_pairs(
    denoiser: Denoiser, schedule: Process, params: Params, frozen: Params, batch: Batch
) -> Float[Array, "b 2 h w c"]:
    """Predictions for winners and losers of a batch of :func:`preference_loss`, float32."""
    batch = _float32(batch)
    noised = _noised(batch, schedule)
    pred = denoiser(params, frozen, noised.x_t, noised.t_pair, _captions(batch))
    return pred.reshape(-1, 2, *pred.shape[1:])


PerPair = Float[Array, "b"]
# `train.objective` → the loss of each pair, of what the models make of it, its margin, the numbers and the batch.
_OBJECTIVES: dict[str, Callable[[Compared, PerPair, Numbers, Batch], PerPair]] = {
    "dpo": lambda pairs, z, numbers, _: objectives.dpo(z, numbers.label_smoothing),
    "hinge": lambda pairs, z, numbers, _: objectives.hinge(z),
    "ipo": lambda pairs, z, numbers, _: jnp.square(0.5 * numbers.beta) * objectives.ipo(pairs.gain, numbers.beta),
    "kto": lambda pairs, z, numbers, _: objectives.kto(pairs.gain, numbers.beta),
    "dspo": lambda pairs, z, numbers, _: objectives.dspo(pairs, numbers.objective_weight),
    "mapo": lambda pairs, z, numbers, _: objectives.mapo(pairs.error, numbers.objective_weight),
    "smpo": lambda pairs, z, numbers, batch: objectives.smpo(z, _scores(batch), numbers.objective_weight),
}


def _sides(x: Float[Array, "n h w c"]) -> WinnerLoser:
    """What :class:`Noised` has side by side."""
    return WinnerLoser(x[::2], x[1::2])


def _taken_for_others(frozen: Params, name: str) -> Params:
    """Frozen weights, of which the network `name` has those that the compiler does not know to be the same."""
    return {key: jax.lax.optimization_barrier(part) if key == name else part for key, part in frozen.items()}


def _scores(batch: Batch) -> WinnerLoser:
    return objectives.scaled_scores(WinnerLoser(*batch["scores"].T))


def preference_loss(
    denoiser: Denoiser, schedule: Process, blocks: str = "all", objective: str = "dpo", sharded: bool = False
) -> Loss:
    """An objective on pairs, L_D-DPO unless told, + λ_stat · L_stat, on batches {winner, loser [b h w c], input_ids
    [b s], key [b]}; `smpo` needs scores [b 2] too. The policy's LoRA drops numbers where they bring `dropout` [b], keys
    of their own; the reference's never does.

    Batches that bring the reference's :func:`predict_pairs`, `reference` [b 2 h w c], spare computing them. So do those
    that bring what text encoders made of their captions, `encoder_hidden_states` [b s d] and XL's `text_embeds` [b p].

    Args:
        denoiser, schedule: of ε_base.
        blocks: `up`: only the UNet's up blocks learn. The policy is the reference's below them, so that the compiler
            finds both passes the same as far as that and computes one, and no gradient goes there.
        objective: `train.objective`; `mapo` has no reference, and computes none.
        sharded: each device holds a part of the weights (`mesh.fsdp`). Both passes read the same frozen ones, and a
            compiler that gathers a layer once for both keeps all layers until the second pass has read them. So each
            gathers its own; but with `blocks=up`, where most of the two is one pass.
    """

    def loss(
        policy: Params, reference: Params, frozen: Params, batch: Batch, numbers: Numbers
    ) -> tuple[Float[Array, ""], Metrics]:
        batch = _float32(batch)
        t, t_pair, x_t, target = _noised(batch, schedule)
        if blocks == "up":
            policy = in_up_blocks(policy, reference)
        pred = denoiser(policy, frozen, x_t, t_pair, _captions(batch), dropout=batch.get("dropout"))
        ref = None
        if "reference" in batch:
            ref = batch["reference"].reshape(pred.shape)
        elif objective != "mapo":  # where the text encoder is frozen both get the same embeddings, computed once by XLA
            own = _taken_for_others(frozen, denoiser.name) if sharded and blocks == "all" else frozen
            ref = jax.lax.stop_gradient(denoiser(reference, own, x_t, t_pair, _captions(batch)))
        pairs = Compared(_sides(pred), None if ref is None else _sides(ref), _sides(target))
        added = {}
        if numbers.safeguard is not None:
            guarded, share = objectives.safeguard(pairs.policy, pairs.target, numbers.safeguard)
            pairs, added["dpo/safeguard"] = pairs._replace(policy=guarded), share.mean()
        if numbers.lead is not None:
            lead = objectives.mean_lead(pairs.gain)
            beta = objectives.beta_for(objectives.running_lead(numbers.lead, lead), numbers.auto_beta, numbers.beta)
            numbers = numbers._replace(beta=beta)  # type: ignore[arg-type]  # an array of JAX inside the program
            added |= {LEAD: lead, "dpo/beta": beta}
        z = objectives.mapo_margin(pairs.error) if ref is None else objectives.margin(pairs, numbers.beta)
        preference = _OBJECTIVES[objective](pairs, z, numbers, batch)
        accuracy = 0.5 * (1.0 + jnp.sign(z))  # a tie counts half
        errors = {"": pairs.error} | ({} if ref is None else {"_reference": pairs.error_reference})
        stat = None
        if ref is not None:
            stat = objectives.statistics_loss(pairs.policy.winner, pairs.reference.winner, schedule.mean_shift(t))
        bins = jax.nn.one_hot(schedule.bin_of(t, TIMESTEP_BINS), TIMESTEP_BINS)
        metrics = {f"loss/{objective}": preference.mean()} | ({} if stat is None else {"loss/statistics": stat.mean()})
        metrics |= {f"error/{side}{of}": x.mean() for of, both in errors.items() for side, x in both._asdict().items()}
        metrics |= {
            "dpo/margin": z.mean(),
            "dpo/margin_deviation": z.std(),
            "dpo/sigmoid_minus_z": jax.nn.sigmoid(-z).mean(),
            "dpo/accuracy": accuracy.mean(),
            "bins/accuracy": accuracy @ bins / len(t),
            "bins/share": bins.mean(0),
        }
        total = preference.mean()
        if stat is not None:
            total += numbers.lambda_stat * stat.mean()
        if numbers.sft_weight is not None:
            total += numbers.sft_weight * errors[""].winner.mean()
        return total, {"loss/total": total, **metrics, **added}

    return loss


def sft_loss(denoiser: Denoiser, schedule: Process) -> Loss:
    """‖ε − ε_θ(x_t, t, c)‖² (Ho et al. 2020, eq. 14) on the winners of batches {winner [b h w c], input_ids [b s],
    key [b]}, without a reference; with an adapter they hold concept [b m f] too.

    Every caption is replaced by the empty one with probability `caption_dropout`, every concept image by none with
    probability `concept_dropout`. Where the two are the same, half of the dropped concepts lose their caption too, as
    guidance needs.
    """

    def loss(
        policy: Params, reference: Params, frozen: Params, batch: Batch, numbers: Numbers
    ) -> tuple[Float[Array, ""], Metrics]:
        del reference
        batch = _float32(batch)
        latent = batch["winner"]
        t, noise = _noise(batch["key"], latent.shape[1:], schedule)
        x_t = schedule.add_noise(latent, noise, t)
        u = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 2)))(batch["key"])
        begin = 0.5 * numbers.caption_dropout
        drop = (u < numbers.caption_dropout, (u >= begin) & (u < begin + numbers.concept_dropout))
        keys = batch.get("dropout")
        pred = denoiser(policy, frozen, x_t, t, _captions(batch), batch.get("concept"), drop, keys)
        error = objectives.mean_squared_error(pred, schedule.target(latent, noise, t)).mean()
        return error, {"loss/total": error}

    return loss


def example_keys(numbers: Numbers, examples: Int[Array, "b"]) -> Key[Array, "b"]:
    """The keys of examples that draw the same noise whenever they come."""
    return jax.vmap(lambda i: jax.random.fold_in(numbers.stage_key, i))(examples)


class TrainState(NamedTuple):
    """What a step changes: policy, its running average (None without EMA), optimizer state, step count, and the running
    mean of |u| (None without `train.auto_beta`)."""

    policy: Params
    ema: Params | None
    optimizer: optax.OptState
    step: Int[Array, ""]
    lead: Float[Array, ""] | None = None

    @property
    def result(self) -> Params:
        """What the stage hands on: the average where there is one, else the policy."""
        return self.policy if self.ema is None else self.ema


def init_state(
    policy: Params, tx: optax.GradientTransformationExtraArgs, ema: float, auto_beta: float = 0.0
) -> TrainState:
    """The state before the first step. Copies the policy, since a step donates its input."""
    average = jax.tree.map(jnp.copy, policy) if ema else None
    lead = jnp.zeros(()) if auto_beta else None
    return TrainState(jax.tree.map(jnp.copy, policy), average, tx.init(policy), jnp.zeros((), jnp.int32), lead)


def make_step(
    loss: Loss, tx: optax.GradientTransformationExtraArgs, accumulate: int, shardings: TrainState | None = None
) -> Any:
    """The jitted update `step(state, reference, frozen, batch, numbers) -> (state, metrics)`; `state` is donated.

    Every example draws from a key folded from (the stage's key, step, position in the batch), so neither the number of
    devices nor the number of microbatches changes what is drawn. Where the batch has `example` [b], the keys are those
    of :func:`example_keys`, and only those of dropout change with the step.

    Args:
        loss: of a batch.
        tx: of a rate of 1, see :func:`hgdpo_jax.training.optimizer.make_optimizer`.
        accumulate: microbatches that a batch is split into.
        shardings: of the old state and of the new, so that a second step compiles nothing.
    """

    def step(
        state: TrainState, reference: Params, frozen: Params, batch: Batch, numbers: Numbers
    ) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(numbers.stage_key, state.step)
        keys = jax.vmap(lambda i: jax.random.fold_in(step_key, i))(jnp.arange(batch["input_ids"].shape[0]))
        dropout = jax.vmap(lambda key: jax.random.fold_in(key, 3))(keys)
        if "example" in batch:
            keys = example_keys(numbers, batch["example"])
        batch = batch | {"key": keys, "dropout": dropout}
        scale = optax.tree.get(state.optimizer, LOSS_SCALE)
        numbers = numbers._replace(lead=state.lead)

        def scaled(policy: Params, part: Batch) -> tuple[Float[Array, ""], Metrics]:
            total, metrics = loss(policy, reference, frozen, part, numbers)
            return scale * total, metrics

        def microbatch(part: Batch) -> tuple[Params, Metrics]:
            return jax.grad(scaled, has_aux=True)(state.policy, part)

        if accumulate == 1:
            grads, metrics = microbatch(batch)
        else:
            # Strided, so that each device keeps the examples it holds.
            parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
            one = jax.eval_shape(microbatch, jax.tree.map(lambda x: x[0], parts))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one)
            total, _ = jax.lax.scan(lambda s, part: (jax.tree.map(jnp.add, s, microbatch(part)), None), zeros, parts)
            grads, metrics = jax.tree.map(lambda x: x / accumulate, total)
        updates, optimizer = tx.update(grads, state.optimizer, state.policy, least_scale=numbers.least_scale)
        policy = jax.tree.map(lambda p, u: p + numbers.rate * u, state.policy, updates)
        average = None
        if state.ema is not None:
            average = optax.incremental_update(policy, state.ema, 1.0 - numbers.ema)
        lead = None if state.lead is None else objectives.running_lead(state.lead, metrics.pop(LEAD))
        metrics |= {name: optax.tree.get(optimizer, name) for name in (GRADIENT_NORM, LOSS_SCALE, SKIPPED)}
        if (estimate := optax.tree.get(optimizer, ESTIMATE)) is not None:
            metrics["estimated_rate"] = estimate
        return TrainState(policy, average, optimizer, state.step + 1, lead), metrics

    out_shardings: Any = None
    if shardings is not None:  # metrics are on every device, since all hosts read them
        out_shardings = shardings, NamedSharding(jax.tree.leaves(shardings)[0].mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=out_shardings)
