"""What the vocoders that learn have in common: chains of convolutions from mels to sound, their weights, and their file."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import is_parametrized

from vaura.checkpoint import folded, load_exactly, tensors_in
from vaura.errors import InputError
from vaura.kept import agree, keep, kept_settings
from vaura.media.pieces import Reach, join, stream
from vaura.timing import cover

WEIGHTS = "vocoder.weights=FILE, or tokenizer.vocoder.weights=FILE where a tokenizer holds it"
FRAMES_AT_ONCE = 4096  # of a batch, where nothing learns: the widest layer of a published vocoder then takes 134 MB


class LearntVocoder(nn.Module):
    """Mel (B, n_mels, M) in [0, 1] as `DecibelMel` writes it -> wav (B, 1, M * hop_length) in [-1, 1].

    Where no gradient is asked for, mels longer than `piece` seconds are worked on in pieces and sound as they would whole, and
    autocast around it changes nothing. One that neither read weights nor learns would make noise: then it raises InputError.

    A kind of vocoder sets `reach` and, where its paddings ask for it, `shortest`, and defines `sound`. All of its parameters
    are the weights and biases of convolutions.
    """

    kind = "learnt"  # what its files are called by
    piece = 2.0  # on a CPU a fifth faster than ten seconds at once
    reach: Reach
    shortest = 1  # mel frames that its paddings need at least
    taught = False  # whether its weights are more than chance, or on their way there

    def __init__(self, sample_rate: int, n_mels: int, hop_length: int, **settings: Any) -> None:
        super().__init__()
        self.sample_rate, self.n_mels, self.hop_length = sample_rate, n_mels, hop_length
        self.settings = {"sample_rate": sample_rate, "n_mels": n_mels, **settings}

    def sound(self, mel: Tensor) -> Tensor:
        """mel (B, n_mels, M) -> wav (B, 1, M * hop_length), whole."""
        raise NotImplementedError

    def forward(self, mel: Tensor) -> Tensor:
        """Raises InputError for a mel of another number of bands and, where no gradient is asked for, before it is taught."""
        frames, samples = mel.shape[-1], mel.shape[-1] * self.hop_length
        size = cover(self.piece, self.sample_rate / self.hop_length)
        if torch.is_grad_enabled():
            return self._sound(mel)
        if frames > size:
            return join(self.stream(mel.split(size, -1)), samples)
        return torch.cat([self._heard(part) for part in mel.split(max(1, FRAMES_AT_ONCE // max(frames, 1)))])

    @torch.no_grad()
    def stream(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """mel that comes in pieces (B, n_mels, M) -> wav in pieces (B, 1, N), as if the mel had come whole."""
        self.check_taught()
        yield from stream(self._heard, self.reach, pieces)

    def check_taught(self, weights: str = WEIGHTS) -> None:
        """Raise InputError where it would make noise; `weights` is what to give it, and how."""
        if not self.taught:
            raise InputError(f"the {self.kind} vocoder has learnt nothing and would make noise of every mel; give {weights}")

    def _heard(self, mel: Tensor) -> Tensor:
        """What `_sound` makes of it where nothing learns."""
        self.check_taught()
        with torch.autocast(mel.device.type, enabled=False):
            return self._sound(mel)

    def _sound(self, mel: Tensor) -> Tensor:
        frames = mel.shape[-1]
        if mel.dim() != 3 or mel.shape[1] != self.n_mels:
            raise InputError(
                f"vocoder.n_mels is {self.n_mels}, but the mel is of the shape {tuple(mel.shape)}; make them agree"
            )
        if not frames:
            return mel.new_zeros(len(mel), 1, 0)
        mel = mel.to(next(self.parameters()).dtype)
        if frames < self.shortest:
            mel = F.pad(mel, (0, self.shortest - frames), mode="replicate")
        return self.sound(mel)[..., : frames * self.hop_length]

    # --- weights ---

    def normalise(self) -> None:
        """Divide every weight into its length and its direction, in which it learns better (Salimans and Kingma 2016).

        One that learns can be heard on its way.
        """
        self.taught = True
        for _, module in convolutions(self):
            if not is_parametrized(module, "weight"):
                parametrizations.weight_norm(module, "weight", dim=0)

    def weights(self) -> dict[str, Tensor]:
        """One weight and one bias of every convolution, whether they are normalised or not."""
        parts = [
            (f"{name}.{part}", getattr(module, part)) for name, module in convolutions(self) for part in ("weight", "bias")
        ]
        return dict(parts)

    def save(self, path: str | Path) -> None:
        """Write the weights with the settings, as safetensors that the constructor reads."""
        keep(path, self.weights(), self.kind, self.settings)

    def load(self, path: str | Path) -> None:
        """Read what `save` wrote, or published tensors by the same names with weight_g and weight_v in place of weight.

        For a vocoder that is not normalised. Raises InputError where the file is absent, of another kind or other settings.
        """
        path = Path(path)
        if path.suffix == ".safetensors" and path.is_file():
            written = kept_settings(path, self.kind, "vocoder.weights")
            if written is None:
                raise InputError(f"vocoder.weights: {path} was not written by a {self.kind} vocoder; give a file that was")
            agree("vocoder", self.settings, written, path)
        where = f"vocoder.weights: {path}"
        load_exactly(self, folded(tensors_in(path), where), where)
        self.taught = True


def check_voice(tokenizer: object, weights: str = WEIGHTS) -> None:
    """Raise InputError where the vocoder of a tokenizer, if it has one, would make noise; `weights` is what to give it."""
    vocoder = getattr(tokenizer, "vocoder", None)
    if isinstance(vocoder, LearntVocoder):
        vocoder.check_taught(weights)


def has_voice(tokenizer: object) -> bool:
    """Whether what a tokenizer decodes can be heard: not, and a warning says so, by a vocoder that has learnt nothing."""
    heard = bool(getattr(getattr(tokenizer, "vocoder", None), "taught", True))
    if not heard:
        warnings.warn("no sound is previewed, for the vocoder has learnt nothing: tokenizer.vocoder.weights=FILE", stacklevel=2)
    return heard


def convolutions(module: nn.Module) -> list[tuple[str, nn.Conv1d | nn.ConvTranspose1d]]:
    found = module.named_modules()
    return [(name, part) for name, part in found if isinstance(part, nn.Conv1d | nn.ConvTranspose1d)]


def whole_numbers(values: Sequence[int]) -> list[int]:
    """As JSON keeps them, to compare with what a file says."""
    return [int(value) for value in values]
