"""Classification from frozen features: k-nearest-neighbour voting and logistic regression.

Both read the features, a matrix in memory, one block of rows at a time. So the memory they need besides depends on the
number of classes, not of images. Blocks are cut by position alone, so a block's result is the same in any process.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES, ROWS = 256, 8192  # images of a block: of queries, and of any other features


class Features(NamedTuple):
    """Features of a data set's images, shape (N, C), float16 or float32, and labels, shape (N,), int64."""

    values: Tensor
    labels: Tensor


def count_correct(scores: Tensor, labels: Tensor) -> Tensor:
    """Number of images whose label has the highest score, or one of the five highest: shape (2,), int64.

    Args:
        scores: Shape (N, classes).
        labels: Shape (N,).
    """
    best = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
    return torch.stack([best[:, 0].sum(), best.any(1).sum()])


# --------------------------------------------------------------------------------------------------- nearest neighbours


def nearest(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` rows of ``bank`` that are most similar to each query, the most similar first.

    Args:
        queries: Shape (Q, C).
        bank: Shape (N, C), N >= k.
        k: Neighbours.

    Returns:
        Cosine similarities, shape (Q, k), float32, and rows, shape (Q, k).
    """
    queries = F.normalize(queries.float(), dim=1)
    similar = queries.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), ROWS):
        block = F.normalize(bank[start : start + ROWS].float(), dim=1)
        values, where = (queries @ block.T).topk(min(k, len(block)))
        similar, rows = torch.cat([similar, values], 1), torch.cat([rows, where + start], 1)
        similar, order = similar.topk(min(k, similar.shape[1]))
        rows = rows.gather(1, order)
    return similar, rows


def knn_correct(
    bank: Features,
    queries: Features,
    ks: Sequence[int],
    *,
    classes: int,
    temperature: float = 0.07,
    rank: int = 0,
    world_size: int = 1,
    after_block: Callable[[int], None] = lambda images: None,
) -> Tensor:
    """Correct k-NN classifications; neighbours by cosine vote with weight exp(similarity / temperature).

    Args:
        bank: Images that vote.
        queries: Images to classify.
        ks: Numbers of neighbours, each at most the size of ``bank``.
        classes: Number of classes.
        temperature: Of the weights.
        rank: Takes every ``world_size``-th block of queries from this one on; all ranks together do each block once.
        world_size: Processes that share the queries.
        after_block: Called with the number of queries just done.

    Returns:
        Shape (len(ks), 2), int64: :func:`count_correct` of these queries, for each k.

    Source: arXiv 1805.01978 (instance discrimination), section 3.4; the temperature and k = 10, 20, 100, 200 are those
    of DINO, arXiv 2104.14294.
    """
    correct = torch.zeros(len(ks), 2, dtype=torch.int64, device=bank.labels.device)
    for start in range(rank * QUERIES, len(queries.labels), world_size * QUERIES):
        block = slice(start, start + QUERIES)
        similar, rows = nearest(queries.values[block], bank.values, max(ks))
        weights = ((similar - similar[:, :1]) / temperature).exp()  # a common factor changes no vote
        labels = bank.labels[rows]
        for position, k in enumerate(ks):
            votes = weights.new_zeros(len(weights), classes).scatter_add_(1, labels[:, :k], weights[:, :k])
            correct[position] += count_correct(votes, queries.labels[block])
        after_block(len(similar))
    return correct


# -------------------------------------------------------------------------------------------------- logistic regression


class LinearProbe(NamedTuple):
    """Logits are ``(x - mean) / std @ weight.T + bias``: shapes (C,), (C,), (classes, C) and (classes,)."""

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor
    iterations: int

    def logits(self, values: Tensor) -> Tensor:
        """Logits of features (N, C): shape (N, classes), float32."""
        return (values.float() - self.mean) / self.std @ self.weight.T + self.bias


def fit_linear(data: Features, chosen: Tensor, *, classes: int, l2: float, iterations: int) -> LinearProbe:
    """Multinomial logistic regression on standardised features, by L-BFGS with a line search, in float32.

    It minimises the mean cross entropy + l2 / 2 * ||weight||^2. That is convex: the result depends on the data alone,
    unless ``iterations`` end it early. In scikit-learn's ``LogisticRegression`` this is ``C = 1 / (l2 * images)``.

    Args:
        data: Features, of which some are used.
        chosen: Rows to train on, shape (n,), int64.
        classes: Number of classes.
        l2: Weight of the penalty, above 0.
        iterations: Largest number of iterations; the result has the number taken.
    """
    blocks = chosen.split(ROWS)

    def mean_of(function: Callable[[Tensor], Tensor]) -> Tensor:
        total = 0
        for rows in blocks:
            total = total + function(data.values[rows].float()).sum(0) / len(chosen)
        return total

    mean = mean_of(lambda x: x)
    std = mean_of(lambda x: (x - mean) ** 2).sqrt().clamp(min=1e-6)  # a constant feature stays zero
    weight = torch.zeros(classes, data.values.shape[1], device=mean.device, requires_grad=True)
    bias = torch.zeros(classes, device=mean.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=iterations,
        max_eval=10 * iterations,
        tolerance_grad=1e-4 / classes,  # a class has 1 / classes of the images, and about that share of the gradient
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def loss_and_gradient() -> Tensor:
        optimizer.zero_grad()
        loss = l2 / 2 * weight.square().sum()
        loss.backward()
        losses = [loss.detach()]
        for rows in blocks:
            logits = (data.values[rows].float() - mean) / std @ weight.T + bias
            loss = F.cross_entropy(logits, data.labels[rows], reduction="sum") / len(chosen)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).cpu().double().sum()  # float32 is too coarse for the line search near the minimum

    optimizer.step(loss_and_gradient)
    return LinearProbe(mean, std, weight.detach(), bias.detach(), optimizer.state[weight]["n_iter"])
