"""Teach a classifier of mels what is heard in them: the judges of generated sound, Melception and VGGish-ish."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning import LightningModule
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from vaura.data.clips import Batch
from vaura.errors import InputError
from vaura.files import write_aside
from vaura.metric.classification import classification_scores, rarity, weighted_cross_entropy
from vaura.metric.classifier import statistics_of


class Classification(LightningModule):
    """A network learns the labels of mels by cross-entropy: batches bring "mel" (B, n_mels, M) in [0, 1], "label" (B,) int64.

    Where its network does not know yet how mels are normalised, the training clips are measured first. `val/loss` is never
    weighted, so that trainings can be compared.

    Args:
        network: mel (B, n_mels, M) -> logits (B, C), with `normalise_by(mean, std)` and these two as buffers.
        optimizer: parameters -> their optimizer.
        class_weighted: whether rare classes count for more: each as much as any other.
        auxiliary: weight of the loss of a second head, where the network has one; 0: it does not learn.
        measured: training clips that statistics are measured from.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        class_weighted: bool = False,
        auxiliary: float = 0.0,
        measured: int = 10_000,
    ) -> None:
        super().__init__()
        self.network = network
        self.optimizer_of, self.class_weighted = optimizer, class_weighted
        self.auxiliary, self.measured = auxiliary, measured
        self.class_weights: Tensor | None = None
        self.heard: list[tuple[Tensor, Tensor]] = []  # logits and labels of the validation so far
        second = getattr(network, "AuxLogits", None)
        if auxiliary and second is None:
            raise InputError(f"task.auxiliary={auxiliary:g}, but {type(network).__name__} has no second head; set it to 0")
        if second is not None and not auxiliary:
            second.requires_grad_(False)

    # --- before the first step ---

    def on_train_start(self) -> None:
        dataset, keys = self._training_clips()
        if cast(Tensor, self.network.mean).isnan().any():
            mean, std = statistics_of(_mels(dataset, islice(keys, self.measured)))
            mean, std = self.trainer.strategy.broadcast((mean, std))  # the processes see different clips
            cast(Any, self.network).normalise_by(mean.to(self.device), std.to(self.device))
        if self.class_weighted:
            labels = torch.tensor([clip.label for clip in dataset.clips])
            self.class_weights = rarity(self._checked(labels), self._num_classes())

    def _training_clips(self) -> tuple[Any, Iterator[Any]]:
        """The dataset of training, and its keys in the order of the next epoch, without touching the loader."""
        loader = cast(Any, self.trainer.train_dataloader)
        return loader.dataset, iter(loader.sampler)

    def _num_classes(self) -> int:
        linear = [module for module in self.network.modules() if isinstance(module, nn.Linear)]
        return linear[-1].out_features

    def _checked(self, labels: Tensor) -> Tensor:
        classes = self._num_classes()
        if not ((labels >= 0) & (labels < classes)).all():
            strange = int(labels[(labels < 0) | (labels >= classes)][0])
            told = "a clip has no label" if strange < 0 else f"a clip is of class {strange}"
            raise InputError(
                f"{told}, and the classifier knows {classes} classes; check data.labels_file and network.num_classes"
            )
        return labels

    # --- learning ---

    def training_step(self, batch: Batch | None, index: int) -> Tensor:
        if not batch:  # nothing could be read; other processes of a distributed run still wait for gradients
            return torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum() * 0.0
        labels = self._checked(batch["label"])
        if self.auxiliary:
            logits, second = cast(Any, self.network).with_auxiliary(batch["mel"])
            main, aside = (weighted_cross_entropy(one, labels, self.class_weights) for one in (logits, second))
            loss = main + self.auxiliary * aside
            self.log("train/auxiliary_loss", aside)
        else:
            loss = weighted_cross_entropy(self.network(batch["mel"]), labels, self.class_weights)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch | None, index: int) -> None:
        if batch is None:
            return
        labels = self._checked(batch["label"])
        logits = self.network(batch["mel"])
        self.heard.append((logits.float().cpu(), labels.cpu()))
        loss = weighted_cross_entropy(logits, labels)
        self.log("val/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(labels))

    def on_validation_epoch_end(self) -> None:
        """Accuracies and areas over all clips of all processes, each of which is told them."""
        heard, self.heard = self.heard, []
        if dist.is_available() and dist.is_initialized():
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, heard)
            heard = [pair for part in everyone for pair in part]
        if heard:
            logits, labels = (torch.cat(parts) for parts in zip(*heard, strict=True))
            scores = classification_scores(logits, labels)
            self.log_dict({f"val/{name}": torch.tensor(score, device=self.device) for name, score in scores.items()})

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer_of([p for p in self.parameters() if p.requires_grad])

    def save_classifier(self, path: str | Path) -> None:
        """Write the network alone, its statistics with it, as its `weights` are read."""
        state = {name: value.detach().cpu().contiguous() for name, value in self.network.state_dict().items()}
        settings = {"network": type(self.network).__name__, "num_classes": self._num_classes()}
        with write_aside(path) as aside:
            save_file(state, aside, {"settings": json.dumps(settings)})


def _mels(dataset: Any, keys: Iterable[Any]) -> Iterator[Tensor]:
    for key in keys:
        item = dataset[key]
        if item is not None:
            yield item["mel"]
