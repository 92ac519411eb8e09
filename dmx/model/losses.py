"""The losses of DomainMix.

Symbols: N samples of this worker, M samples of all workers, C identities, K domains; f features before the
neck, d_ap and d_an an anchor's distance to its hardest positive and negative. Losses are computed in float32
at least, whatever the input.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Compat = Literal["official", "fixed"]

MIN_SQUARED_DISTANCE = 1e-12


def identity_loss(logits: Tensor, labels: Tensor, *, smoothing: float = 0.1, scale: float = 0.5) -> Tensor:
    """Cross-entropy over identities with label smoothing, on scaled logits.

        L = -1/N sum_i sum_c q_ic log softmax(scale * z_i)_c
        q_ic = (1 - smoothing) [c = y_i] + smoothing / C

    Args:
        logits: z, (N, C).
        labels: y, (N,) int64 in [0, C).
        smoothing: mass spread over all C identities, the right one included.
        scale: factor of the logits (published code halves them).

    Returns:
        Scalar.

    Source: Szegedy et al., CVPR 2016, section 7; Wang et al., "DomainMix", BMVC 2021.
    """
    return F.cross_entropy(_at_least_float32(logits) * scale, labels, label_smoothing=smoothing)


def soft_triplet_loss(
    features: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.0,
    all_features: Tensor | None = None,
    all_labels: Tensor | None = None,
) -> Tensor:
    """Batch-hard softmax triplet loss on Euclidean distances.

        p = softmax(d_ap, d_an),    L = mean(-margin log p_ap - (1 - margin) log p_an)

    With margin 0 this is mean(-log softmax(d_an)) = mean(log(1 + exp(d_ap - d_an))). d_ap is the largest
    distance to a sample of the anchor's identity, d_an the smallest to one of another. Features are not
    normalised. An anchor without another sample of its identity, or without one of another identity, is no
    triplet: it adds 0, and still counts in the mean, so that the mean over equally large workers is the
    loss of the whole batch.

    The distance matrix only selects; the selected distances are then computed from differences, so that
    they are exact where features almost coincide. Duplicates have distance 1e-6 and gradient 0.

    Args:
        features: anchors f, (N, D).
        labels: (N,) int64.
        margin: weight of the wrong answer, in [0, 1].
        all_features: (M, D) candidates, the anchors among them, gathered from all workers; the anchors
            when left out. Gradients flow into it.
        all_labels: (M,) labels of the candidates.

    Returns:
        Scalar.

    Raises:
        ValueError: only one of all_features and all_labels is given.

    Source: Hermans et al., "In Defense of the Triplet Loss", 2017 (batch-hard); Ge, Chen, Li, "Mutual
    Mean-Teaching", ICLR 2020 (softmax triplet).
    """
    if (all_features is None) != (all_labels is None):
        raise ValueError("all_features and all_labels go together: give both or neither")
    anchors = _at_least_float32(features)
    candidates = anchors if all_features is None else _at_least_float32(all_features)
    same = labels[:, None] == (labels if all_labels is None else all_labels)[None, :]
    with torch.no_grad():
        # An anchor's own norm shifts its whole row, so that selecting needs no more than this.
        ranked = candidates.square().sum(1)[None, :] - 2 * anchors @ candidates.T
        positive = ranked.masked_fill(~same, -math.inf).argmax(dim=1)
        negative = ranked.masked_fill(same, math.inf).argmin(dim=1)
        counts = same.sum(dim=1)
        is_triplet = (counts > 1) & (counts < same.shape[1])
    d_ap = _distance(anchors, candidates[positive])
    d_an = _distance(anchors, candidates[negative])
    log_p = F.log_softmax(torch.stack((d_ap, d_an), dim=1), dim=1)
    losses = -margin * log_p[:, 0] - (1 - margin) * log_p[:, 1]
    return torch.where(is_triplet, losses, torch.zeros_like(losses)).mean()


def domain_loss(logits: Tensor, domains: Tensor) -> Tensor:
    """Cross-entropy of the discriminator: L = -1/N sum_i log softmax(z_i)_{t_i}.

    Args:
        logits: z, (N, K).
        domains: t, (N,) int64 in [0, K).

    Source: Wang et al., "DomainMix", BMVC 2021.
    """
    return F.cross_entropy(_at_least_float32(logits), domains)


def domain_balance_loss(logits: Tensor, compat: Compat = "fixed") -> Tensor:
    """Negative entropy of the predicted domain: minimised, it makes domains indistinguishable.

        fixed:     L = 1/N sum_i (sum_c p_ic log p_ic + log K),    log p = log_softmax(z_i)
        official:  L = 1/N sum_i sum_c (p_ic log p_ic + 0.5)

    `fixed` lies in [0, log K], is 0 where every domain is equally likely, and is finite with finite
    gradients for any finite logits. `official` is the published code's: for K = 2 its minimum is 1 - log 2
    = 0.307, and it is NaN when a probability underflows to 0.

    Args:
        logits: discriminator logits z, (N, K).

    Source: Wang et al., "DomainMix", BMVC 2021.
    """
    z = _at_least_float32(logits)
    if compat == "official":
        p = F.softmax(z, dim=1)
        return (p * p.log() + 0.5).sum(dim=1).mean()
    log_p = F.log_softmax(z, dim=1)
    return (log_p.exp() * log_p).sum(dim=1).mean() + math.log(logits.shape[1])


def domain_labels(labels: Tensor, num_source: int, compat: Compat = "fixed") -> Tensor:
    """Domain of each sample from its identity label: 0 the synthetic source, 1 the real target.

    Identities 0 to num_source - 1 are synthetic, later ones pseudo-identities. `official` takes the first
    pseudo-identity for a synthetic one (`label > num_source`), as the published code does.

    Args:
        labels: (N,) int64.
        num_source: number S of synthetic identities.

    Returns:
        (N,) int64.
    """
    return (labels > num_source if compat == "official" else labels >= num_source).long()


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """Row-wise Euclidean distance; clamping cuts the gradient where the root has none."""
    return (x - y).square().sum(dim=1).clamp(min=MIN_SQUARED_DISTANCE).sqrt()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
