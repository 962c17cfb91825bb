"""Where the radiographs of IU X-Ray lie: Open-i's PNG or DICOM, Kaggle's PNG, R2Gen's folders."""

from __future__ import annotations

import os
from pathlib import Path

from mrg_r1.data.prepare.iu_xray.study import IuImage, IuStudy, image_key
from mrg_r1.types import StudyImage


class ImageFolder:
    """Finds the images of studies in a folder.

    R2Gen's are looked for under their path in it. The others are looked for by name at any depth, whichever of
    `CXR1000_IM-0003-1001.png`, `1000_IM-0003-1001.dcm.png` and `1000_IM-0003-1001.dcm` the layout and the folder have.

    Raises:
        OSError: there is no such folder.
    """

    def __init__(self, folder: Path, layout: str) -> None:
        if not folder.is_dir():
            raise NotADirectoryError(
                f"{folder}: no such folder of images; unpack an archive first, leave --images out where there are none"
            )
        self._folder = folder
        self._files: dict[str, list[Path]] | None = None
        if layout != "r2gen":
            self._files = {}
            for root, folders, names in os.walk(folder):
                folders.sort()
                for name in sorted(names):
                    self._files.setdefault(image_key(name), []).append(Path(root, name))

    def find(self, study: IuStudy) -> tuple[tuple[StudyImage, ...], str]:
        """All images of a study, or none; and why it has to be refused, if it is for its images."""
        found: list[StudyImage] = []
        missing: list[IuImage] = []
        for image in study.images:
            paths = self._paths(image)
            if len(paths) > 1:
                return (), f"{paths[0]} and {paths[1]} are both image {image.name!r}; keep one of them"
            if paths:
                found.append(StudyImage(paths[0].absolute(), image.view))
            else:
                missing.append(image)
        if found and missing:
            there = f"{len(found)} of the study's {len(study.images)} images are there"
            return (), f"{self.missing(missing[0])}, though {there}; fetch it"
        return tuple(found), ""

    def missing(self, image: IuImage) -> str:
        """That an image is not there, for a message."""
        if self._files is None:
            return f"{self._folder / image.name}: no such file"
        return f"{self._folder}: no file of image {image.name!r}"

    def _paths(self, image: IuImage) -> list[Path]:
        if self._files is not None:
            return self._files.get(image_key(image.name), [])
        path = self._folder / image.name
        return [path] if path.is_file() else []
