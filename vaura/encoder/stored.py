"""Features that lie beside the data already: what a task has to know of an encoder that nobody runs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vaura.errors import InputError


class StoredFeatures:
    """Stands where an encoder would, for clips that bring their features: it tells their width and rate, and encodes nothing.

    Args:
        kinds: folders of the features, as the corpus calls them; of several the vectors are laid end to end, in this order.
        dim: width of all of them together.
        frame_rate: features a second.
        instead: the encoder that makes the first of `kinds` from pictures.
    """

    size = resize = 224
    segment, context = 1, 0.0

    def __init__(self, kinds: Sequence[str], dim: int, frame_rate: float = 21.5, instead: str = "resnet50") -> None:
        if dim < 1:
            raise InputError(f"encoder.dim is {dim}; features are at least 1 wide")
        self.kinds, self.dim, self.instead = tuple(kinds), dim, instead
        self.fps = self.frame_rate = frame_rate

    @property
    def settings(self) -> dict[str, object]:
        """What decides the features of a clip."""
        return {"kinds": self.kinds, "dim": self.dim}

    def __call__(self, video: Tensor) -> Tensor:
        """Raises InputError: there is nothing here that could look at a video."""
        alone = "" if len(self.kinds) < 2 else f", for a model trained with {self.kinds[0]} alone (encoder.kinds, encoder.dim)"
        raise InputError(
            f"the features {' and '.join(self.kinds)} are read from files and are not made from a video here; "
            f"set encoder={self.instead} and encoder.weights=FILE{alone}"
        )
