"""Models: loading them, and what the stages read from them: log-probabilities, scores, values.

The log-probability shift (the logits of one position score the token of the next) stands in `response_logits` and
`head.response_states`, and the pooling rule of reward models (the last attended token) in `last_attended`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

import rlhf_kernels as rk

from .config import UserError
from .data import Batch, position_ids
from .head import head_for, logprobs_entropy_of, logprobs_of, response_states
from .lora import Adapter, Lora, add_adapter, has_head, read_adapter, share_frozen
from .run import resolve_device, resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TINY = "tiny"
"""The model name that stands for a small model from scratch, with a tokenizer trained on the task's texts."""

TINY_VOCABULARY = 4096
"""An upper bound: a small corpus runs out of merges long before."""

NORMALIZATIONS = ("affine", "bias-only", "none")

EOS, PAD = "<|endoftext|>", "<|pad|>"


# Loading


def load_policy(
    name: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
    trust_remote_code: bool = False,
    tokenizer_texts: Iterable[str] | None = None,
    lora: Lora | None = None,
    frozen: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, without dropout, in eval mode.

    Args:
        name: a run folder, a save_pretrained folder, a hub name, or "tiny": a small Llama from scratch (about one
            million parameters, initialised from torch's global generator).
        device, dtype: where the weights go and what they are.
        trust_remote_code: run the Python files that come with the model.
        tokenizer_texts: what the byte-level BPE of "tiny" is trained on.
        lora: train an adapter instead of the weights: the one in the folder, or a new one. A folder that has one is
            loaded with it anyway.
        frozen: the model will not be trained. Frozen weights, those below an adapter too, are shared between the models
            that come from the same folder.

    Raises:
        UserError: "tiny" without texts or with LoRA; a tokenizer without an EOS token, or with more tokens than the
            model has; a `lora` that is not the folder's.
        FileNotFoundError: a local path that is not there.
    """
    from transformers import AutoModelForCausalLM

    if name == TINY:
        tokenizer = train_tokenizer(_needed(tokenizer_texts, lora))
        model = AutoModelForCausalLM.from_config(tiny_config(tokenizer), dtype=as_dtype(dtype))
    else:
        path = resolve_model(name)
        saved = checked_adapter(path, lora)
        base = saved.base if saved else path
        with _loading(path):
            tokenizer = load_tokenizer(described(path, saved, "tokenizer_config.json"), trust_remote_code)
            config = config_without_dropout(described(path, saved, "config.json"), trust_remote_code)
            model = AutoModelForCausalLM.from_pretrained(
                base, config=config, dtype=as_dtype(dtype), trust_remote_code=trust_remote_code
            )
    _check_tokenizer(name, model, tokenizer)
    if name != TINY:
        freeze_and_adapt(model, base, device, lora, saved, frozen)
    model.config.pad_token_id = tokenizer.pad_token_id
    return _ready(model, device), tokenizer


def load_reward_model(
    name: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
    trust_remote_code: bool = False,
    tokenizer_texts: Iterable[str] | None = None,
    lora: Lora | None = None,
    frozen: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model with one score for a text, and its tokenizer, without dropout, in eval mode.

    `name`, `lora` and `frozen` are as in `load_policy`; the head trains whole. From a causal language model only the
    trunk is taken; a head that is not in the folder is new: N(0, 1/√(d+1)) with bias 0. `config.score_mean` and
    `config.score_std` (0 and 1 where there are none) normalise what `scores` returns.
    """
    from transformers import AutoModelForSequenceClassification

    saved = None
    if name == TINY:
        tokenizer = train_tokenizer(_needed(tokenizer_texts, lora))
        config = tiny_config(tokenizer)
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config, dtype=as_dtype(dtype))
        missing: Iterable[str] = ("score.weight",)
    else:
        path = resolve_model(name)
        saved = checked_adapter(path, lora)
        base = saved.base if saved else path
        with _loading(path):
            tokenizer = load_tokenizer(described(path, saved, "tokenizer_config.json"), trust_remote_code)
            config = config_without_dropout(described(path, saved, "config.json"), trust_remote_code)
            config.num_labels = 1
            model, info = AutoModelForSequenceClassification.from_pretrained(
                base,
                config=config,
                dtype=as_dtype(dtype),
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
        missing = info["missing_keys"]
    head = score_head(model)
    new = any(key.endswith("score.weight") for key in missing) and not (saved and has_head(saved))
    if new:
        nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
        if head.bias is not None:
            nn.init.zeros_(head.bias)
    if new or not hasattr(model.config, "score_mean"):  # a head that was trained elsewhere keeps its scale
        model.config.score_mean, model.config.score_std = 0.0, 1.0
    _check_tokenizer(name, model, tokenizer)
    if name != TINY:
        freeze_and_adapt(model, base, device, lora, saved, frozen)
    model.config.pad_token_id = tokenizer.pad_token_id
    return _ready(model, device), tokenizer


def loading_options(config: Any) -> dict[str, Any]:
    """Where and how a stage's flags want models loaded: keywords of `load_policy` and `load_reward_model`."""
    return {
        "device": resolve_device(config.device),
        "dtype": config.dtype,
        "trust_remote_code": config.trust_remote_code,
    }


def load_reference(name: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> PreTrainedModel:
    """The policy that a KL is measured to, frozen. Raises UserError unless its tokenizer is the policy's."""
    model, own = load_policy(name, frozen=True, **options)
    if own.get_vocab() != tokenizer.get_vocab():
        raise UserError(f"reference {name} must have the policy's tokenizer: both score the same tokens")
    return model


def checked_adapter(path: str, lora: Lora | None) -> Adapter | None:
    """The adapter in a model folder, if there is one; it must be of the rank and the layers that are asked for."""
    saved = read_adapter(path)
    if saved is not None and lora is not None:
        for flag in ("r", "alpha", "target_modules"):
            there, asked = getattr(saved.lora, flag), getattr(lora, flag)
            if there != asked and (flag != "target_modules" or asked):
                raise UserError(
                    f"{path} has an adapter with lora_{flag} = {there}, and it goes on with that; got {asked}"
                )
    return saved


def described(path: str, saved: Adapter | None, file: str) -> str:
    """Where a model's `file` is: in its folder, or with the base of an adapter that another program has written."""
    return path if saved is None or (saved.folder / file).exists() else saved.base


def freeze_and_adapt(
    model: PreTrainedModel,
    base: str,
    device: str | torch.device,
    lora: Lora | None,
    saved: Adapter | None,
    frozen: bool,
) -> None:
    """Makes a model that was just loaded from `base` share its frozen weights, and gives it its adapter."""
    wanted = saved.lora if saved else lora
    if frozen or wanted:
        share_frozen(model, base, device)
    if wanted and (saved or not frozen):
        add_adapter(model, base, wanted, saved)
    if frozen:
        model.requires_grad_(False)


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. One without a pad token pads with EOS: masks never come from the pad id."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no EOS token, so a response could not end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocabulary: int = TINY_VOCABULARY) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer with separate EOS and pad tokens, trained on the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)


def tiny_config(tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def config_without_dropout(path: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model's config with every dropout at 0: old and new log-probabilities must come from the same function."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    for name, value in config.to_dict().items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
            setattr(config, name, 0.0)
    return config


def check_context(model: PreTrainedModel, tokens: int, what: str) -> None:
    """Raises UserError where `what`, which has that many tokens, is longer than the model can read."""
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and tokens > context:
        raise UserError(f"{what} has {tokens} tokens, and the model's context is {context} (max_position_embeddings)")


def _check_tokenizer(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    embeddings: Any = model.get_input_embeddings()
    largest, known = max(tokenizer.get_vocab().values()), embeddings.weight.shape[0]
    if largest >= known:
        raise UserError(f"{name}: its tokenizer is of another model: it has token {largest}, the model {known} tokens")


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _needed(texts: Iterable[str] | None, lora: Lora | None) -> Iterable[str]:
    if lora is not None:
        raise UserError(
            f'model "{TINY}" is made from scratch: there is nothing trained that lora_r could leave as it is'
        )
    if texts is None:
        raise UserError(
            f'model "{TINY}" is made from scratch and needs texts for its tokenizer: start from a stage with data'
        )
    return texts


def _ready(model: PreTrainedModel, device: str | torch.device) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    # Weights that are mapped from a file lie at any address, and the last bits of a matrix product depend on it: a
    # resumed run would differ from one that was not interrupted. Memory of torch's own is aligned.
    for weight in model.parameters():
        weight.data = weight.data.clone()
    if torch.device(device).type == "cpu":
        from .cpu import speed_up

        speed_up(model)
    return model.to(device).eval()  # type: ignore[arg-type]


@contextmanager
def _loading(path: str) -> Iterator[None]:
    """No progress bar, and no warning about the language-model head that a reward model leaves behind.

    Raises UserError where the model would have to run code of its own.
    """
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(f"{path} needs Python files that come with it; --trust-remote-code runs them") from error
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


# Policies


def response_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """logits [B, T, V] that predict each response token: those of the position before it. THE shift."""
    logits = model(
        input_ids=batch.tokens,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        logits_to_keep=batch.mask.shape[1] + 1,
        use_cache=False,
    ).logits
    return logits[:, :-1]


@overload
def response_logprobs(
    model: PreTrainedModel,
    batch: Batch,
    temperature: float = ...,
    *,
    entropy: Literal[False] = ...,
    micro_batch: int | None = ...,
) -> Tensor: ...
@overload
def response_logprobs(
    model: PreTrainedModel,
    batch: Batch,
    temperature: float = ...,
    *,
    entropy: Literal[True],
    micro_batch: int | None = ...,
) -> tuple[Tensor, Tensor]: ...
def response_logprobs(
    model: PreTrainedModel,
    batch: Batch,
    temperature: float = 1.0,
    *,
    entropy: bool = False,
    micro_batch: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """logprobs [B, T] fp32 of the response tokens, 0 outside the mask; with `entropy` also the entropies [B, T], nats.

    Differentiable; `micro_batch` rows go through the model at a time, None for all. Logits that would be too large
    (`head.WHOLE_LOGITS`) are never whole.
    """
    parts = batch.split(micro_batch)
    if not entropy:
        return torch.cat([_logprobs(model, part, temperature) for part in parts])
    both = [_logprobs_entropy(model, part, temperature) for part in parts]
    return torch.cat([logprobs for logprobs, _ in both]), torch.cat([entropies for _, entropies in both])


def _logprobs(model: PreTrainedModel, batch: Batch, temperature: float) -> Tensor:
    if head := head_for(model, batch):
        return logprobs_of(head, response_states(model, batch), batch, temperature)
    return rk.token_logprobs(response_logits(model, batch), batch.responses, batch.mask, temperature=temperature)


def _logprobs_entropy(model: PreTrainedModel, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
    if head := head_for(model, batch):
        return logprobs_entropy_of(head, response_states(model, batch), batch, temperature)
    logits = response_logits(model, batch)
    return rk.token_logprobs_entropy(logits, batch.responses, batch.mask, temperature=temperature)


@torch.no_grad()
def exact_kl(
    policy: PreTrainedModel,
    ref: PreTrainedModel,
    batch: Batch,
    temperature: float = 1.0,
    *,
    micro_batch: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, ref_logprobs, entropy, kl), each [B, T] fp32 in nats; the KL is exact, over the vocabulary."""
    parts = [policy_ref_logprobs(policy, ref, part, temperature) for part in batch.split(micro_batch)]
    logprobs, ref_logprobs, entropy, kl = (torch.cat(column) for column in zip(*parts))
    return logprobs, ref_logprobs, entropy, kl


def policy_ref_logprobs(
    policy: PreTrainedModel, ref: PreTrainedModel, batch: Batch, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same in one micro-batch, differentiable in the policy."""
    with torch.no_grad():
        ref_logits = response_logits(ref, batch)
    logits = response_logits(policy, batch)
    return rk.policy_ref_logprobs(logits, ref_logits, batch.responses, batch.mask, temperature=temperature)


# Reward and value models


def score_head(model: PreTrainedModel) -> nn.Linear:
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise UserError(
            f"{type(model).__name__}: a reward or value model must have a linear head `score` with one output, "
            f"got {head if head is None else type(head).__name__}"
        )
    return head


def last_attended(attention_mask: Tensor) -> Tensor:
    """[B] int64: the index of the last attended token of each row, wherever the padding is."""
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return torch.where(attention_mask.bool(), columns, 0).amax(1)


def scores(
    model: PreTrainedModel,
    tokens: Tensor,
    attention_mask: Tensor,
    *,
    normalized: bool = True,
    micro_batch: int | None = None,
) -> Tensor:
    """scores [B] fp32 of texts, read at the last attended token; differentiable.

    Args:
        tokens: [B, L] int64, padded on either side. attention_mask: [B, L] bool.
        normalized: (score − config.score_mean) / config.score_std rather than the output of the head.
        micro_batch: rows at a time, None for all.
    """
    size = micro_batch or max(1, len(tokens))
    pooled = []
    for part, mask in zip(tokens.split(size), attention_mask.split(size)):
        rows = torch.arange(len(part), device=part.device)
        pooled.append(hidden_states(model, part, mask)[rows, last_attended(mask)])
    return head_scores(model, torch.cat(pooled), normalized=normalized)


def token_scores(
    model: PreTrainedModel,
    tokens: Tensor,
    attention_mask: Tensor,
    *,
    normalized: bool = True,
    micro_batch: int | None = None,
) -> Tensor:
    """scores [B, L] fp32 at every position, what `scores` would say of the text up to there; differentiable."""
    size = micro_batch or max(1, len(tokens))
    parts = zip(tokens.split(size), attention_mask.split(size))
    each = [head_scores(model, hidden_states(model, part, mask), normalized=normalized) for part, mask in parts]
    return torch.cat(each)


def hidden_states(model: PreTrainedModel, tokens: Tensor, attention_mask: Tensor) -> Tensor:
    """[B, L, d]: the trunk's last hidden states."""
    return model.base_model(
        input_ids=tokens, attention_mask=attention_mask, position_ids=position_ids(attention_mask), use_cache=False
    ).last_hidden_state


def head_scores(model: PreTrainedModel, hidden: Tensor, *, normalized: bool = True) -> Tensor:
    """[…] fp32 from hidden states […, d]."""
    raw = score_head(model)(hidden).float().squeeze(-1)
    return (raw - model.config.score_mean) / model.config.score_std if normalized else raw


def set_score_normalization(model: PreTrainedModel, raw_scores: Tensor, kind: str = "affine") -> None:
    """Makes these raw scores have mean 0 and standard deviation 1 (population) under `scores`.

    kind: "bias-only" leaves the deviation, "none" the mean too.
    """
    if kind not in NORMALIZATIONS:
        raise ValueError(f"set_score_normalization: kind must be one of {', '.join(NORMALIZATIONS)}, got {kind!r}")
    std = raw_scores.std(unbiased=False).item() if kind == "affine" else 1.0
    model.config.score_mean = 0.0 if kind == "none" else raw_scores.mean().item()
    model.config.score_std = std if std > 0 else 1.0


def values(model: PreTrainedModel, batch: Batch) -> Tensor:
    """values [B, T+1] fp32 before each response token, where its logits stand, and after the last; differentiable."""
    hidden = hidden_states(model, batch.tokens, batch.attention_mask)
    return head_scores(model, hidden[:, batch.prompt_width - 1 :], normalized=False)


def share_trunk(value: PreTrainedModel, policy: PreTrainedModel) -> None:
    """The value model becomes a head on the policy's trunk. Raises UserError where their architectures differ."""
    trunk = policy.base_model
    if trunk is policy or type(trunk) is not type(value.base_model):
        raise UserError(
            f"a value head cannot stand on the trunk of {type(policy).__name__}: "
            f"{type(value).__name__} has {type(value.base_model).__name__}"
        )
    setattr(value, value.base_model_prefix, trunk)


@contextmanager
def trunk_states(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collects the last hidden states [B, L, d] of each pass through the model's trunk inside."""
    states: list[Tensor] = []
    hook = model.base_model.register_forward_hook(lambda module, args, output: states.append(output.last_hidden_state))
    try:
        yield states
    finally:
        hook.remove()


def zero_head(model: PreTrainedModel) -> None:
    """Values start at 0 everywhere."""
    head = score_head(model)
    nn.init.zeros_(head.weight)
    if head.bias is not None:
        nn.init.zeros_(head.bias)
