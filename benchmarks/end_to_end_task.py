"""What the end-to-end comparison trains on: a random GPT-2, prompts, and a reward model that was learnt.

The task: half of the words are good, and a text should be made of good words. The reward model is not told the rule, it
is trained on random texts and their share of good words. All of it is written with save_pretrained, so that each side
of the comparison reads the same bytes.
"""

import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCABULARY, EOS, PAD = 4096, "<|endoftext|>", "<|pad|>"
PROMPTS, HELDOUT, PROMPT_LENGTHS = 1024, 256, (8, 16)  # words a prompt, both ends included
RM_STEPS, RM_ROWS, RM_LEARNING_RATE = 120, 16, 1e-3


def make(folder: Path, response_length: int, *, seed: int = 0, rm_steps: int = RM_STEPS, width: int = 256) -> float:
    """Writes policy/, reward_model/, prompts.jsonl and heldout.json; returns how the score correlates with the rule."""
    torch.manual_seed(seed)
    tokenizer = word_tokenizer()
    length = PROMPT_LENGTHS[1] + response_length
    policy, reward_model = models(width, length)
    correlation = train_reward_model(reward_model, length, rm_steps)
    for name, model in (("policy", policy), ("reward_model", reward_model)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    draw = random.Random(seed)
    words = [word for word in tokenizer.get_vocab() if word not in (EOS, PAD)]
    texts = [" ".join(draw.choices(words, k=draw.randint(*PROMPT_LENGTHS))) for _ in range(PROMPTS + HELDOUT)]
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
    """A policy and a reward model of the same size, from torch's global generator."""
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

    sizes = {"vocab_size": VOCABULARY, "n_positions": length, "n_embd": width, "n_layer": 4, "n_head": 4}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    policy = GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, **ids))
    reward_model = GPT2ForSequenceClassification(GPT2Config(**sizes, **no_dropout, **ids, num_labels=1))
    # Ours divides scores by these; TRL takes them as they come, and so do both here.
    reward_model.config.score_mean, reward_model.config.score_std = 0.0, 1.0
    return policy, reward_model


def train_reward_model(model: Any, length: int, steps: int) -> float:
    from rlhf.cpu import speed_up

    speed_up(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RM_LEARNING_RATE, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RM_LEARNING_RATE * min((step + 1) / 10, 1 - step / steps)
        tokens, target = random_texts(RM_ROWS, length)
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(score(model, tokens), target).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        tokens, target = random_texts(8 * RM_ROWS, length)
        return torch.corrcoef(torch.stack([score(model, tokens), target]))[0, 1].item()


def random_texts(rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Word ids [rows, length] with every share of good words, and what the score should be: [rows] in −4 to 4."""
    good = torch.rand(rows, length) < torch.rand(rows, 1)
    tokens = 2 * torch.randint(1, VOCABULARY // 2, (rows, length)) + ~good  # a good word has an even id
    return tokens, 8 * good.float().mean(1) - 4


def score(model: Any, tokens: Tensor) -> Tensor:
    return model.score(model.transformer(tokens, use_cache=False).last_hidden_state[:, -1]).squeeze(-1)
