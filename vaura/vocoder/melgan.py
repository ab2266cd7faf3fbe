"""MelGAN (Kumar, Kumar, de Boissiere, Gestin, Teoh, Sotelo, de Brebisson, Bengio, Courville 2019) as SpecVQGAN trained it.

Four transposed convolutions make 256 samples of every mel frame, each followed by residual blocks whose dilations triple. The
modules bear the names of the published weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from vaura.errors import InputError
from vaura.kept import agree
from vaura.media.pieces import Reach, reach
from vaura.vocoder.learnt import LearntVocoder, whole_numbers

SLOPE = 0.2  # of the leaky rectifiers
ARGUMENTS = "args.yml"  # what the original writes beside its weights
THEIRS = {"n_mel_channels": "n_mels", "ngf": "width", "n_residual_layers": "residual_layers"}


class MelGAN(LearntVocoder):
    """Mel (B, n_mels, M) in [0, 1] -> wav (B, 1, M * hop_length); the ends of every layer are padded with their reflection.

    Args:
        weights: what `save` wrote, or the original's best_netG.pt; where its args.yml lies beside that, the two must agree.
        width: channels of the last layer; every layer before it has twice as many.
        residual_layers: residual blocks behind every transposed convolution.
        rates: by how much each of these lengthens the signal; their product is the hop.

    Raises InputError where `weights` is absent, broken or of another size.
    """

    kind = "melgan"

    def __init__(
        self,
        weights: str | None = None,
        sample_rate: int = 22_050,
        n_mels: int = 80,
        width: int = 32,
        residual_layers: int = 3,
        rates: Sequence[int] = (8, 8, 2, 2),
    ) -> None:
        rates = whole_numbers(rates)
        super().__init__(sample_rate, n_mels, math.prod(rates), width=width, residual_layers=residual_layers, rates=rates)
        dim = width * 2 ** len(rates)
        layers: list[nn.Module] = [Reflection(3), nn.Conv1d(n_mels, dim, 7)]
        length, needed = 1, [Fraction(4)]
        for rate in rates:
            up = nn.ConvTranspose1d(dim, dim // 2, 2 * rate, rate, rate // 2 + rate % 2, output_padding=rate % 2)
            dim, length = dim // 2, length * rate
            layers += [nn.LeakyReLU(SLOPE), up, *[Residual(dim, 3**depth) for depth in range(residual_layers)]]
            needed.append(Fraction(3 ** max(residual_layers - 1, 0) + 1, length))
        layers += [nn.LeakyReLU(SLOPE), Reflection(3), nn.Conv1d(dim, 1, 7), nn.Tanh()]
        self.model = nn.Sequential(*layers)
        self.reach = reach(self.model).mirrored()
        self.shortest = math.ceil(max(needed))  # a reflection is shorter than what it reflects
        if weights is not None:
            self.load(weights)

    def load(self, path: str | Path) -> None:
        beside = Path(path).with_name(ARGUMENTS)
        if Path(path).suffix != ".safetensors" and beside.is_file():
            said = read_arguments(beside)
            agree("vocoder", self.settings, {ours: said[name] for name, ours in THEIRS.items() if name in said}, beside)
        super().load(path)

    def sound(self, mel: Tensor) -> Tensor:
        return self.model(mel)


class Reflection(nn.ReflectionPad1d):
    """(B, C, N) -> (B, C, N + 2 n)."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.reach = Reach(before=Fraction(n), after=Fraction(-n))


class Residual(nn.Module):
    """(B, C, N) -> the same."""

    def __init__(self, dim: int, dilation: int) -> None:
        super().__init__()
        wide, narrow = nn.Conv1d(dim, dim, 3, dilation=dilation), nn.Conv1d(dim, dim, 1)
        self.block = nn.Sequential(nn.LeakyReLU(SLOPE), Reflection(dilation), wide, nn.LeakyReLU(SLOPE), narrow)
        self.shortcut = nn.Conv1d(dim, dim, 1)
        self.reach = reach(self.block)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.block(x)


# --- the arguments that the original keeps beside its weights ---


class _Arguments(yaml.SafeLoader):
    """Reads what yaml.dump makes of an argparse.Namespace: dicts, lists, numbers and text, and nothing is run."""


def _namespace(loader: _Arguments, node: yaml.Node) -> dict[str, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise yaml.constructor.ConstructorError(None, None, "a Namespace that is no mapping", node.start_mark)
    return loader.construct_mapping(node, deep=True)  # type: ignore[return-value]


def _path(loader: _Arguments, node: yaml.Node) -> str:
    if not isinstance(node, yaml.SequenceNode):
        raise yaml.constructor.ConstructorError(None, None, "a path that is no list of its parts", node.start_mark)
    return str(Path(*[str(part) for part in loader.construct_sequence(node)]))


_Arguments.add_constructor("tag:yaml.org,2002:python/object:argparse.Namespace", _namespace)
for _module in ("pathlib", "pathlib._local"):  # the latter in Python 3.13
    for _kind in ("PosixPath", "WindowsPath"):
        _Arguments.add_constructor(f"tag:yaml.org,2002:python/object/apply:{_module}.{_kind}", _path)


def read_arguments(path: str | Path) -> dict[str, Any]:
    """The pickled arguments (args.yml) of a published training as a plain dict, paths as text.

    Raises InputError where the file is absent, is no such list, or holds any other object, which would have to be run.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Arguments)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; check the path") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise InputError(
            f"{path} is not read: {reason}; give the {ARGUMENTS} of a MelGAN training, plain values only"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no arguments by name; give the {ARGUMENTS} of a MelGAN training")
    return content
