"""Other packages' functions in the form of our ops, or why there is none: `pip install ".[bench]"` brings them."""

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_AT_A_TIME = 64  # sequences' worth of tokens, for what loops over the first dimension in Python
CHUNK = 256  # tokens, of what takes a sequence or a few at a time


def of(package: str, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any] | str:
    """What `make` builds from the package, or the reason why it cannot."""
    if importlib.util.find_spec(package) is None:
        return f'{package} is not installed: pip install ".[bench]"'
    try:
        return make()
    except (ImportError, AttributeError, RuntimeError) as error:
        return f"{package} {importlib.metadata.version(package)}: {str(error).strip().splitlines()[0]}"


# ------------------------------------------------------------------------------------------------ log-probabilities


def trl_selective_log_softmax() -> Callable[..., Any]:
    function = importlib.import_module("trl.trainer.utils").selective_log_softmax

    def call(logits: Tensor, tokens: Tensor) -> Tensor:  # [N, V] as [N / 64, 64, V], the shape that it is made for
        shape = (-1, ROWS_AT_A_TIME) if len(tokens) % ROWS_AT_A_TIME == 0 else (1, -1)
        return function(logits.view(*shape, logits.shape[-1]), tokens.view(shape)).view(-1)

    return call


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    return -F.cross_entropy(logits, tokens, reduction="none")


def liger_cross_entropy() -> Callable[..., Any]:
    if not torch.cuda.is_available():
        raise RuntimeError("its Triton kernels need a GPU")
    loss = importlib.import_module("liger_kernel.transformers").LigerCrossEntropyLoss(reduction="none")
    return lambda logits, tokens: -loss(logits.clone(), tokens)  # it overwrites the logits with their gradient


def trl_chunked_logprob() -> Callable[..., Any]:
    function = importlib.import_module("trl.kernels").ChunkedLogProbFunction
    chunk = 8192  # of the vocabulary

    def call(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        return function.apply(hidden, weight, None, tokens, 1.0, chunk, None, 1.0, ())[0]

    return call


def liger_grpo(cliprange: float) -> Callable[..., Any]:
    """Its advantage is a sequence's, so each token here is a sequence of one; "bnpo" divides by the mask's count."""
    module = importlib.import_module("liger_kernel.chunked_loss.grpo_loss")
    options = {"loss_type": "bnpo", "use_ref_model": False, "chunk_size": CHUNK, "compiled": False}
    loss = module.LigerFusedLinearGRPOLoss(beta=0.0, epsilon_low=cliprange, epsilon_high=cliprange, **options)

    def call(hidden: Tensor, weight: Tensor, tokens: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        arguments = (hidden[:, None], weight, tokens[:, None], mask[:, None].to(hidden.dtype), advantages)
        return loss(*arguments, old_per_token_logps=old[:, None])[0]

    return call


# ------------------------------------------------------------------------------------------------------- advantages


def torchrl_gae(name: str, gamma: float, lam: float) -> Callable[..., Any]:
    """For responses padded on the right: the episode is done at the last token, what follows is another one.

    With a done at every place behind it the vectorised form would pad each of them to an episode of T steps.
    """
    function = getattr(importlib.import_module("torchrl.objectives.value.functional"), name)

    def call(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        following = F.pad(values[:, 1:], (0, 1))
        done = mask & ~F.pad(mask[:, 1:], (0, 1))
        tensors = (x[..., None] for x in (values, following, rewards, done))
        advantages, returns = (x[..., 0] for x in function(gamma, lam, *tensors))
        return torch.where(mask, advantages, 0), torch.where(mask, returns, 0)

    return call


def gae_of_torchrl(gamma: float, lam: float) -> dict[str, Callable[..., Any] | str]:
    return {
        "torchrl vectorised": of(
            "torchrl", functools.partial(torchrl_gae, "vec_generalized_advantage_estimate", gamma, lam)
        ),
        "torchrl loop": of("torchrl", functools.partial(torchrl_gae, "generalized_advantage_estimate", gamma, lam)),
    }
