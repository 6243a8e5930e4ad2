"""What the end-to-end comparison trains on: a random GPT-2, prompts, and a reward model that was learnt.

The task: half of the words are good, and a text should be made of good words. Good are those on one side of a plane
through the policy's embeddings, so that what is learnt of some words holds for others. The reward model is not told the
rule: it starts as the policy's trunk and is trained on random texts and their share of good words. All of it is written
with save_pretrained, so that each side of the comparison reads the same bytes.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCABULARY, EOS, PAD = 4096, "<|endoftext|>", "<|pad|>"
PROMPTS, HELDOUT, PROMPT_LENGTHS = 1024, 256, (8, 16)  # words a prompt, both ends included
RM_STEPS, RM_ROWS, RM_LEARNING_RATE = 80, 16, 1e-3


def make(folder: Path, response_length: int, *, seed: int = 0, rm_steps: int = RM_STEPS, width: int = 256) -> float:
    """Writes policy/, reward_model/, prompts.jsonl and heldout.json; returns how the score correlates with the rule."""
    torch.manual_seed(seed)
    random.seed(seed)
    tokenizer = word_tokenizer()
    lengths = [prompt + response_length for prompt in PROMPT_LENGTHS]
    policy, reward_model = models(width, lengths[1])
    correlation = train_reward_model(reward_model, good_words(policy), lengths, rm_steps)
    for name, model in (("policy", policy), ("reward_model", reward_model)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    words = [word for word in tokenizer.get_vocab() if word not in (EOS, PAD)]
    texts = [" ".join(random.choices(words, k=random.randint(*PROMPT_LENGTHS))) for _ in range(PROMPTS + HELDOUT)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts[:PROMPTS]))
    (folder / "heldout.json").write_text(json.dumps(texts[PROMPTS:]))
    return correlation


def word_tokenizer() -> Any:
    """EOS and pad are 0 and 1, every other id is the word "w<id>"."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {EOS: 0, PAD: 1} | {f"w{number}": number for number in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, padding_side="left")


def models(width: int, length: int) -> tuple[Any, Any]:
    """A policy, and a reward model with its trunk, from torch's global generator."""
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

    sizes = {"vocab_size": VOCABULARY, "n_positions": length, "n_embd": width, "n_layer": 4, "n_head": 4}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    policy = GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, **ids))
    reward_model = GPT2ForSequenceClassification(GPT2Config(**sizes, **no_dropout, **ids, num_labels=1))
    reward_model.transformer.load_state_dict(policy.transformer.state_dict())
    # Ours divides scores by these; TRL takes them as they come, and so do both here.
    reward_model.config.score_mean, reward_model.config.score_std = 0.0, 1.0
    return policy, reward_model


def good_words(policy: Any) -> Tensor:
    """[V] bool: half of the words; EOS and pad are none."""
    side = policy.transformer.wte.weight.detach()[:, 0]
    return (side > side[2:].median()) & (torch.arange(VOCABULARY) >= 2)


def train_reward_model(model: Any, good: Tensor, lengths: Sequence[int], steps: int) -> float:
    from rlhf.cpu import speed_up

    speed_up(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RM_LEARNING_RATE, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RM_LEARNING_RATE * min((step + 1) / 10, 1 - step / steps)
        tokens, target = random_texts(good, RM_ROWS, random.randint(*lengths))
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(score(model, tokens), target).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        parts = [random_texts(good, RM_ROWS, random.randint(*lengths)) for _ in range(8)]
        found = torch.cat([score(model, tokens) for tokens, _ in parts])
        return torch.corrcoef(torch.stack([found, torch.cat([target for _, target in parts])]))[0, 1].item()


def random_texts(good: Tensor, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Word ids [rows, length] with every share of good words, and what the score should be: [rows] in −4 to 4."""
    is_good = torch.rand(rows, length) < torch.rand(rows, 1)
    words = [kind.nonzero().squeeze(1) for kind in (~good, good)]
    words[0] = words[0][2:]  # without EOS and pad
    drawn = [kind[torch.randint(len(kind), (rows, length))] for kind in words]
    return torch.where(is_good, drawn[1], drawn[0]), 8 * is_good.float().mean(1) - 4


def score(model: Any, tokens: Tensor) -> Tensor:
    return model.score(model.transformer(tokens, use_cache=False).last_hidden_state[:, -1]).squeeze(-1)
