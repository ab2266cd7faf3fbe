"""How sure a classifier is of each sound while all of them together are of many classes: the inception score.

(Salimans et al. 2016.) It sees no original: sounds of other classes than the videos' score as well as the right ones.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def inception_score(logits: Tensor, splits: int = 10, shuffle: bool = True, seed: int = 2020) -> tuple[float, float]:
    """Mean and deviation over `splits` parts of logits (N, C) of exp(mean KL(p(class | sound) | p(class))).

    Between 1 and C. The published variant shuffles first, and takes logits without the classifier's bias. Raises ValueError
    where there are fewer sounds than parts.
    """
    if len(logits) < splits:
        raise ValueError(f"{len(logits)} sounds cannot be divided into {splits} parts")
    logits = logits.cpu().double()
    if shuffle:
        logits = logits[torch.from_numpy(np.random.RandomState(seed).permutation(len(logits)))]
    scores = []
    for part in range(splits):
        rows = logits[part * len(logits) // splits : (part + 1) * len(logits) // splits]
        log_p = rows.log_softmax(1)
        log_marginal = log_p.logsumexp(0) - np.log(len(rows))
        scores.append(float((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))
