"""The one door to OpenCV, whose ways to optical flow serve beside the house's own TV-L1. It is optional.

TV-L1 is in OpenCV's contributed modules alone, which are in no wheel but opencv-contrib-python(-headless).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vaura.errors import InputError

MISSING = "the flow by {method} needs OpenCV{part} ({why}): pip install 'vaura[flow]', or choose flow=tvl1, which needs nothing"

PRESETS = ("ultrafast", "fast", "medium")


class Farneback:
    """Grey frames -> flow after Farneback, "Two-frame motion estimation based on polynomial expansion" (2003).

    Args:
        levels: pictures of the pyramid.
        scale: how much smaller each is than the one before.
        window: pixels over which the motion is averaged; larger is smoother and surer of fast motion.
        iterations: at each level.
        neighbours: pixels a side from which the polynomial of a pixel is made, 5 or 7.
        sigma: how far those count, pixels; 1.1 suits 5 and 1.5 suits 7.
    """

    def __init__(
        self,
        levels: int = 3,
        scale: float = 0.5,
        window: int = 15,
        iterations: int = 3,
        neighbours: int = 5,
        sigma: float = 1.2,
    ) -> None:
        for name, number in (("levels", levels), ("window", window), ("iterations", iterations)):
            if number < 1:
                raise InputError(f"flow.method.{name} is {number}; give 1 or more")
        if not 0 < scale < 1:
            raise InputError(f"flow.method.scale is {scale}; each picture of the pyramid is smaller: choose between 0 and 1")
        if neighbours not in (5, 7):
            raise InputError(f"flow.method.neighbours is {neighbours}; choose 5 or 7")
        self.levels, self.scale, self.window = levels, scale, window
        self.iterations, self.neighbours, self.sigma = iterations, neighbours, sigma

    @property
    def settings(self) -> dict[str, object]:
        """What decides the flow."""
        return {"method": "farneback", **vars(self)}

    def __call__(self, grey: Tensor) -> Tensor:
        """grey (F, H, W) uint8 -> flow (F-1, 2, H, W) float32, pixels to the right and down. InputError without OpenCV."""
        cv2 = _opencv("Farneback")
        how = (self.scale, self.levels, self.window, self.iterations, self.neighbours, self.sigma, 0)
        return _between(grey, lambda one, other: cv2.calcOpticalFlowFarneback(one, other, None, *how))


class DIS:
    """Grey frames -> flow after Kroeger et al., "Fast optical flow using dense inverse search" (2016).

    Args:
        preset: "ultrafast", "fast" or "medium".
    """

    def __init__(self, preset: str = "medium") -> None:
        if preset not in PRESETS:
            raise InputError(f"flow.method.preset is '{preset}'; choose from {', '.join(PRESETS)}")
        self.preset = preset

    @property
    def settings(self) -> dict[str, object]:
        """What decides the flow."""
        return {"method": "dis", **vars(self)}

    def __call__(self, grey: Tensor) -> Tensor:
        """grey (F, H, W) uint8 -> flow (F-1, 2, H, W) float32, pixels to the right and down. InputError without OpenCV."""
        search = _opencv("DIS").DISOpticalFlow.create(PRESETS.index(self.preset))
        return _between(grey, lambda one, other: search.calc(one, other, None))


class OpenCVTVL1:
    """Grey frames -> flow by OpenCV's own TV-L1, on one core and with its defaults: to compare with."""

    @property
    def settings(self) -> dict[str, object]:
        """What decides the flow."""
        return {"method": "opencv_tvl1"}

    def __call__(self, grey: Tensor) -> Tensor:
        """grey (F, H, W) uint8 -> flow (F-1, 2, H, W) float32, pixels to the right and down.

        InputError without OpenCV's contributed modules.
        """
        cv2 = _opencv("OpenCV's TV-L1")
        if not hasattr(cv2, "optflow"):
            why = "this OpenCV has no cv2.optflow; uninstall opencv-python(-headless) first"
            raise InputError(MISSING.format(method="OpenCV's TV-L1", part=" with its contributed modules", why=why))
        solver = cv2.optflow.DualTVL1OpticalFlow_create()
        return _between(grey, lambda one, other: solver.calc(one, other, None))


def _opencv(method: str) -> Any:
    try:
        import cv2
    except ImportError as error:
        why = next(iter(str(error).splitlines()), "it does not load")
        raise InputError(MISSING.format(method=method, part="", why=why)) from error
    return cv2


def _between(grey: Tensor, flow: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Tensor:
    frames = grey.cpu().numpy()
    found = np.empty((max(len(frames) - 1, 0), 2, *frames.shape[1:]), np.float32)
    for number in range(len(found)):
        found[number] = flow(frames[number], frames[number + 1]).transpose(2, 0, 1)
    return torch.from_numpy(found).to(grey.device)
