"""What a discriminator and the network it judges hold against each other.

Logits come as discriminators give them, see vaura/task/discriminators.py: a list of networks, of each the outputs of its
layers, logits last.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vaura.errors import InputError, nearest
from vaura.task.discriminators import Seen

KINDS = ("hinge", "vanilla", "squares")


def discriminator_loss(kind: str, real: Seen, fake: Seen) -> Tensor:
    """How badly true and made sound are told apart, a mean over networks and over the two.

    hinge (Lim and Ye 2017): relu(1 - real) and relu(1 + fake); vanilla (Goodfellow et al. 2014): softplus(-real) and
    softplus(fake); squares (Mao et al. 2017): (1 - real)^2 and fake^2.
    """
    losses = []
    for true, made in ((one[-1], other[-1]) for one, other in zip(real, fake, strict=True)):
        if kind == "hinge":
            pair = F.relu(1 - true).mean(), F.relu(1 + made).mean()
        elif kind == "vanilla":
            pair = F.softplus(-true).mean(), F.softplus(made).mean()
        else:
            pair = (1 - true).square().mean(), made.square().mean()
        losses.append((pair[0] + pair[1]) / 2)
    return torch.stack(losses).mean()


def generator_loss(kind: str, fake: Seen) -> Tensor:
    """How far made sound is from passing as true, a mean over networks: (1 - logits)^2 for squares, else -logits."""
    losses = [(1 - made[-1]).square().mean() if kind == "squares" else -made[-1].mean() for made in fake]
    return torch.stack(losses).mean()


def feature_matching(real: Seen, fake: Seen, relative: bool = False, logits: bool = False) -> Tensor:
    """How differently the layers see made and true sound: mean absolute difference, a mean over networks and layers.

    (Larsen et al. 2016; Kumar et al. 2019, equation 5.) With `relative` each is a share of the mean absolute value of the true
    one, as in EnCodec. The logits count only with `logits`, as in HiFi-GAN's code; the true side gets no gradient.
    """
    terms = []
    for true, made in zip(real, fake, strict=True):
        layers = slice(None) if logits else slice(-1)
        for wanted, got in zip(true[layers], made[layers], strict=True):
            wanted = wanted.detach()
            difference = (wanted - got).abs().mean()
            terms.append(difference / wanted.abs().mean().clamp_min(1e-8) if relative else difference)
    return torch.stack(terms).mean() if terms else fake[0][-1].new_zeros(())


def adaptive_weight(faithful: Tensor, passing: Tensor, last: Tensor, least: float, most: float) -> Tensor:
    """What makes the gradient of `passing` as long as that of `faithful` in the weight `last`, within [least, most].

    (Esser et al. 2021, equation 7.) A constant for what comes after it.
    """
    one, other = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (faithful, passing))
    return (one / (other + 1e-4)).clamp(least, most).detach()


class Judged(NamedTuple):
    """What an adversary asks of made sound."""

    loss: Tensor  # its whole share in the loss: weighted
    passing: Tensor  # how far the made sound is from passing as true
    weight: Tensor  # of that
    matching: Tensor  # how differently its layers see made and true sound


class Adversary(nn.Module):
    """A discriminator, and from when on and how much it counts.

    Args:
        discriminator: judges what is made.
        loss: "hinge", "vanilla" or "squares". Raises InputError for any other.
        start: batches of training before it begins to learn and to count.
        weight: of passing as true in the loss.
        adaptive: whether that is multiplied by the adaptive weight, see `adaptive_weight`, in [least, most]; where both are the
            same nothing needs to be measured.
        matching: weight of feature matching in the loss.
        relative, match_logits: whether feature matching is relative, and counts the logits, see `feature_matching`.
    """

    def __init__(
        self,
        discriminator: nn.Module,
        loss: str = "hinge",
        start: int = 0,
        weight: float = 0.8,
        adaptive: bool = True,
        least: float = 0.0,
        most: float = 1e4,
        matching: float = 0.0,
        relative: bool = False,
        match_logits: bool = False,
    ) -> None:
        super().__init__()
        if loss not in KINDS:
            raise InputError(f"the adversary's loss={loss} is none of {', '.join(KINDS)}." + nearest(loss, KINDS))
        if least > most:
            raise InputError(f"the adversary's weight cannot lie between least={least:g} and most={most:g}; exchange them")
        self.discriminator, self.kind, self.start = discriminator, loss, start
        self.weight, self.adaptive, self.least, self.most = weight, adaptive, least, most
        self.matching, self.relative, self.match_logits = matching, relative, match_logits

    def counts(self, batches: int) -> bool:
        """Whether it counts in the batch that `batches` went before."""
        return batches >= self.start

    def learn(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The discriminator's own loss, and its mean logits of the true and of the made; neither gets a gradient of it."""
        true, made = self.discriminator(real.detach()), self.discriminator(fake.detach())
        means = [torch.stack([one[-1].detach().mean() for one in seen]).mean() for seen in (true, made)]
        return discriminator_loss(self.kind, true, made), means[0], means[1]

    def judge(self, real: Tensor, fake: Tensor, faithful: Tensor, last: Tensor | None) -> Judged:
        """What it asks of `fake`, which leaves no gradient in the discriminator.

        `faithful` is the other loss of what is made, `last` the weight of its last layer; without one, as in validation, the
        adaptive weight is 0.
        """
        learns = [p for p in self.discriminator.parameters() if p.requires_grad]
        for parameter in learns:
            parameter.requires_grad_(False)
        try:
            seen = self.discriminator(fake)
            true = self.discriminator(real) if self.matching else seen
        finally:
            for parameter in learns:
                parameter.requires_grad_(True)
        how = self.relative, self.match_logits
        matching = feature_matching(true, seen, *how) if self.matching else fake.new_zeros(())
        passing = generator_loss(self.kind, seen)
        weight = fake.new_tensor(self.weight)
        if self.adaptive and last is None:
            weight = weight * 0.0
        elif self.adaptive and self.least == self.most:
            weight = weight * self.least
        elif self.adaptive:
            assert last is not None
            weight = weight * adaptive_weight(faithful, passing, last, self.least, self.most)
        return Judged(weight * passing + self.matching * matching, passing, weight, matching)


@dataclass(frozen=True)
class Adam:
    """Adam for what makes and what judges, one group of parameters each; called with both.

    Adam looks at each parameter alone, so one optimizer does what two of these settings would; and its steps are batches.

    `lr` is the rate as it is: no number of GPUs, clips or batches multiplies it. `discriminator_lr` is that of what judges;
    None: `lr`.
    """

    lr: float
    betas: tuple[float, float] = (0.5, 0.9)
    discriminator_lr: float | None = None

    def __call__(self, makes: Iterable[nn.Parameter], judges: Iterable[nn.Parameter] = ()) -> torch.optim.Optimizer:
        other = self.lr if self.discriminator_lr is None else self.discriminator_lr
        groups = [{"params": list(makes), "lr": self.lr}]
        if judges := list(judges):
            groups.append({"params": judges, "lr": other})
        return torch.optim.Adam(groups, betas=(self.betas[0], self.betas[1]))
