"""An image processor that image workers can import in a moment, and that misbehaves where an image asks for it by its
size.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np
import torch
from PIL import Image

DIES, FAILS, IS_SLOW = (13, 13), (17, 17), (19, 19)


class SumProcessor:
    """One patch an image: its size, the sum of its pixels, and the process that made it."""

    def __call__(self, *, images: list[Image.Image], return_tensors: str) -> dict[str, Any]:
        sizes = [image.size for image in images]
        if DIES in sizes:
            os.kill(os.getpid(), signal.SIGKILL)
        if FAILS in sizes:
            raise RuntimeError("a fault of the processor")
        if IS_SLOW in sizes:
            time.sleep(60)
        rows = [[*image.size, int(np.asarray(image).astype(int).sum()), os.getpid()] for image in images]
        return {
            "pixel_values": torch.tensor(rows, dtype=torch.float32),
            "image_grid_thw": torch.tensor([[1, 2, 2]] * len(rows)),
        }
