"""What each token of a text did for a reward model's score: attention, prefix differences, gradients.

Each function reads some texts once and returns their scores with one number for each of the reward model's tokens;
`credit.py` makes shares of the score of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .attention import AttentionChoice, AttentionLayer, attention_layers, mean_row
from .config import UserError
from .data import position_ids
from .model import head_scores, hidden_states, last_attended, score_head
from .reading import Reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Attribution:
    """scores: [B] fp32, normalised. tokens: [B, L] fp32. weights: [B, L] fp32, attention, where it was asked for."""

    scores: Tensor
    tokens: Tensor
    weights: Tensor | None = None


@torch.no_grad()
def attention(
    model: PreTrainedModel, reading: Reading, choice: AttentionChoice, *, from_response: bool = False
) -> Attribution:
    """The attention row of the token that the score is read at; of the response's last token with `from_response`."""
    last = last_attended(reading.attention_mask)
    with attention_layers(model, choice.layers) as layers:
        hidden = hidden_states(model, reading.tokens, reading.attention_mask)
    query = reading.last_response() if from_response else last
    row = mean_row(layers, query, reading.attention_mask, choice, reading.response)
    return Attribution(_score(model, hidden, last), row)


@torch.no_grad()
def prefix_differences(model: PreTrainedModel, reading: Reading, smoothing: float = 0.0) -> Attribution:
    """score(y up to t) − score(y before t) at each response token, from one forward pass; the sum is the score.

    The first token has the score of the prompt too. smoothing: weight of the past in an exponential moving average of
    the prefix scores, 0 to 1; the last prefix score stays as it is. A head that was trained on whole texts alone has
    never been read anywhere else.
    """
    last = last_attended(reading.attention_mask)
    hidden = hidden_states(model, reading.tokens, reading.attention_mask)
    prefix = head_scores(model, hidden)
    columns = torch.arange(prefix.shape[1], device=prefix.device)
    differences = torch.zeros_like(prefix)
    before = torch.zeros_like(prefix[:, 0])
    started = torch.zeros_like(before, dtype=torch.bool)
    for column in columns.tolist():
        inside = (reading.response[:, column] | (last == column)) & reading.attention_mask[:, column]
        moved = smoothing * before + (1 - smoothing) * prefix[:, column]
        now = torch.where(started & (last != column), moved, prefix[:, column])
        differences[:, column] = torch.where(inside, now - before, 0)
        before = torch.where(inside, now, before)
        started = started | inside
    return Attribution(_score(model, hidden, last), differences)


def grad_x_input(model: PreTrainedModel, reading: Reading) -> Attribution:
    """⟨∂score/∂e_t, e_t⟩ with e_t a token's input embedding: signed, complete only to first order."""
    embeddings = model.get_input_embeddings()(reading.tokens).detach()
    last = last_attended(reading.attention_mask)
    with torch.enable_grad():
        embeddings.requires_grad_()
        hidden = model.base_model(
            inputs_embeds=embeddings,
            attention_mask=reading.attention_mask,
            position_ids=position_ids(reading.attention_mask),
            use_cache=False,
        ).last_hidden_state
        scores = _score(model, hidden, last)
        (gradient,) = torch.autograd.grad(scores.sum(), embeddings)
    products = (gradient.float() * embeddings.detach().float()).sum(-1)
    return Attribution(scores.detach(), torch.where(reading.attention_mask, products, 0))


@torch.no_grad()
def value_attention(model: PreTrainedModel, reading: Reading, choice: AttentionChoice) -> Attribution:
    """What the last layer's attention block brought from each token straight into the score, signed.

        a_t = Σ_h attention_h(last, t) · ⟨w_eff, W_o,h v_h(t)⟩

    w_eff is the head seen through the final norm with its scale held fixed, so that Σ_t a_t over all tokens is exactly
    the block's part in the score (the block's own MLP, which reads it, apart).
    """
    last = last_attended(reading.attention_mask)
    with _final_norm(model) as norm, attention_layers(model, (-1,)) as (layer,):
        hidden = hidden_states(model, reading.tokens, reading.attention_mask)
    rows = layer.head_rows(last, reading.attention_mask, choice.heads)
    query, value = layer.query, layer.value
    assert query is not None and value is not None and layer.module is not None  # head_rows has seen to it
    direction = norm.direction(score_head(model).weight[0], hidden, last)
    heads, shared = query.shape[1], query.shape[1] // value.shape[1]
    effect = _through_output(model, layer, direction, heads * value.shape[-1]).view(len(last), heads, -1)
    chosen = [head % heads for head in choice.heads] or list(range(heads))
    paid = torch.zeros_like(rows[:, 0])
    for place, head in enumerate(chosen):
        worth = torch.einsum("bd,bld->bl", effect[:, head].float(), value[:, head // shared].float())
        paid += torch.where(reading.attention_mask, rows[:, place] * worth, 0)
    weights = layer.reduced_row(last, reading.attention_mask, choice, reading.response)
    return Attribution(_score(model, hidden, last), paid / model.config.score_std, weights)


def _score(model: PreTrainedModel, hidden: Tensor, last: Tensor) -> Tensor:
    return head_scores(model, hidden[torch.arange(len(last), device=last.device), last])


# ------------------------------------------------------------------------------- parts of a model, value_attention's

OUTPUT_PROJECTIONS = ("o_proj", "c_proj", "dense", "out_proj", "wo")
NORMS_OF_A_BLOCK = ("post_feedforward_layernorm", "post_self_attn_layernorm")
"""Norms that some architectures put between an attention block and what it is added to."""


@dataclass
class FinalNorm:
    """Input and output of the last norm that ran, [B, L, d] each."""

    module: nn.Module | None = None
    input: Tensor | None = None
    output: Tensor | None = None

    def direction(self, weight: Tensor, hidden: Tensor, last: Tensor) -> Tensor:
        """w_eff [B, d]: ⟨w_eff, norm input⟩ is the raw score at `last` up to a constant, with its scale held fixed."""
        if self.input is None or self.output is None or not torch.equal(self.output, hidden):
            raise UserError("value-attention: the model's last hidden states are not the output of a norm")
        rows = torch.arange(len(last), device=last.device)
        before, after = self.input[rows, last].float(), self.output[rows, last].float()
        bias = getattr(self.module, "bias", None)
        centered = bias is not None or isinstance(self.module, nn.LayerNorm)
        if bias is not None:
            after = after - bias.float()
        if centered:
            before = before - before.mean(-1, keepdim=True)
        scale = torch.where(before == 0, 0, after / torch.where(before == 0, 1, before))
        direction = weight.float() * scale
        return direction - direction.mean(-1, keepdim=True) if centered else direction


@contextmanager
def _final_norm(model: PreTrainedModel) -> Iterator[FinalNorm]:
    """Keeps what the last norm of the forward pass made inside has seen."""
    found = FinalNorm()

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.module, found.input, found.output = module, inputs[0], output

    norms = [module for module in model.base_model.modules() if "norm" in type(module).__name__.lower()]
    handles = [module.register_forward_hook(keep) for module in norms]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _through_output(model: PreTrainedModel, layer: AttentionLayer, direction: Tensor, width: int) -> Tensor:
    """[B, width]: W_oᵀ direction, with W_o the output projection of an attention block."""
    block = layer.module
    name = next((each for each in OUTPUT_PROJECTIONS if hasattr(block, each)), None)
    parent = next(module for module in model.modules() if any(child is block for child in module.children()))
    between = [each for each in NORMS_OF_A_BLOCK if hasattr(parent, each)]
    if name is None or between:
        what = f"a norm, {between[0]}, follows its attention" if between else "its attention has no output projection"
        raise UserError(f"value-attention: {type(model).__name__} is not supported: {what}")
    projection = getattr(block, name)
    with torch.enable_grad():
        mixed = torch.zeros(len(direction), width, dtype=direction.dtype, device=direction.device, requires_grad=True)
        out = projection(mixed.to(next(projection.parameters()).dtype))
        (gradient,) = torch.autograd.grad((out.float() * direction).sum(), mixed)
    return gradient
