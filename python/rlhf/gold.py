"""A gold judge for real sentences: logistic regression on words and word pairs, trained on data of its own.

Each n-gram counts by its naive Bayes log-ratio, which gains two points of accuracy over plain counts (Wang and Manning
2012, "Baselines and bigrams"). Training is deterministic and takes about a second.
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Labelled = Sequence[tuple[str, bool]]
"""Sentences and whether they are positive."""

L2 = 0.1
"""Penalty ½·L2·‖w‖², against a loss summed over sentences; chosen by accuracy on movie-review sentences."""


class NgramJudge:
    """Called with (prompts, responses), gives 2·P(positive) − 1 for each text, in [−1, 1].

    accuracy: share of the `check` sentences, unseen in training, that it labels as people did.
    """

    def __init__(self, train: Labelled, check: Labelled) -> None:
        counts = Counter(ngram for text, _ in train for ngram in set(ngrams(text)))
        kept = sorted(ngram for ngram, count in counts.items() if count > 1)
        self.vocabulary = {ngram: index for index, ngram in enumerate(kept)}
        self.ratio = torch.ones(len(kept), dtype=torch.float64)
        labels = torch.tensor([float(label) for _, label in train], dtype=torch.float64)
        self.trained_on = [text for text, _ in train]
        features = self._features(self.trained_on)
        self.ratio = _log_ratio(features, labels)
        self.weight, self.bias = _fit(features * self.ratio, labels)
        right = [(logit > 0) == label for logit, (_, label) in zip(self.logits([text for text, _ in check]), check)]
        self.accuracy = sum(right) / len(right)

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        return [math.tanh(logit / 2) for logit in self.logits([p + r for p, r in zip(prompts, responses)])]

    def logits(self, texts: Sequence[str]) -> list[float]:
        return (self._features(texts) @ self.weight + self.bias).tolist()

    def _features(self, texts: Sequence[str]) -> Tensor:
        """[texts, vocabulary] sparse fp64: which n-grams occur, as unit vectors, times their log-ratios."""
        rows, columns, sizes = [], [], []
        for row, text in enumerate(texts):
            known = sorted({self.vocabulary[ngram] for ngram in ngrams(text) if ngram in self.vocabulary})
            rows += [row] * len(known)
            columns += known
            sizes += [len(known)] * len(known)
        indices = torch.tensor([rows, columns], dtype=torch.int64)
        data = torch.tensor(sizes, dtype=torch.float64).rsqrt() * self.ratio[indices[1]]
        shape = (len(texts), len(self.vocabulary))
        return torch.sparse_coo_tensor(indices, data, shape, check_invariants=True).coalesce()


def _log_ratio(features: Tensor, labels: Tensor) -> Tensor:
    """[vocabulary]: log of how much likelier an n-gram is in a positive sentence, add-one smoothed."""
    present = torch.sparse_coo_tensor(
        features.indices(), torch.ones_like(features.values()), features.shape, check_invariants=True
    )
    positive, negative = 1 + present.t() @ labels, 1 + present.t() @ (1 - labels)
    return (positive / positive.sum() / (negative / negative.sum())).log()


def _fit(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [vocabulary] and the bias of an L2-penalised logistic regression."""
    weight = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = features @ weight + bias
        loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") + L2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def ngrams(text: str) -> list[str]:
    """The words between spaces and the pairs of neighbours."""
    words = text.lower().split()
    return words + [f"{first} {second}" for first, second in itertools.pairwise(words)]
