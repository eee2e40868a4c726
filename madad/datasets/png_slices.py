"""Reader of the PNG slices of the original MAD-AD code."""

import os
import re
from pathlib import Path

import numpy as np
from sklearn.utils import Bunch
from threadpoolctl import threadpool_limits

from madad.datasets.npz_slices import Grid, scale_slices

_NAME = re.compile(r"(?P<subject>.+)-slice_(?P<index>\d+)-(?P<kind>[^-]+)\.png")


def load_png_slices(root, *, modality, size=None, center="median", target=0.4):
    """Load slices from a folder in the layout of the original code: skull removed, intensities normalised.

    Parameters
    ----------
    root : str or os.PathLike
        Folder with ``{id}-slice_{k}-{modality}.png`` and, for each, ``{id}-slice_{k}-brainmask.png`` of the
        same size; optionally ``{id}-slice_{k}-segmentation.png`` for all or for none. 8-bit grey; any value
        above 0 in a mask counts. Folders inside are not searched.
    modality : str
        The kind of image in the file names, for example "T1"; upper or lower case.
    size : int, default=None
        Height and width of the result in pixels: padded to a square and resampled as in `load_slices`. None
        keeps the extent of the files, which must be the same for all.
    center : {"median", "mode"} or None, default="median"
        Per-subject scale, as in `load_slices`. None divides by 255, as the original code does.
    target : float, default=0.4
        Where the centre goes, in 0..1.

    Returns
    -------
    sklearn.utils.Bunch
        The arrays of `load_slices`, by subject (the ``id``) and then by slice; `z_frac` and `spacing_mm` are
        None, and `z_index` (n,) int is the ``k`` of the file names. Slices lie as they are stored.

    Raises
    ------
    ImportError
        If pillow is not installed (it comes with the extra `plot`).
    FileNotFoundError
        If there is no such folder.
    ValueError
        If it has no slice of the modality, a brain mask or some of the lesion masks are missing, a file is
        not 8-bit grey, sizes differ, or an argument is out of its range.
    """
    image_module = _import_image()
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(
            f"root must name an existing folder, got {os.fspath(root)!r}. Check its spelling."
        )
    by_subject, written, has_lesion_masks = _find(root, modality)
    parts = []
    with threadpool_limits(limits=1, user_api="blas"):  # the products are small
        for subject, slices in by_subject.items():
            images, brains, lesions = (
                _read_stack(image_module, root, subject, slices, kind)
                for kind in (written, "brainmask", "segmentation" if has_lesion_masks else None)
            )
            for kind, masks in (("brainmask", brains), ("segmentation", lesions)):
                if masks is not None and masks.shape != images.shape:
                    raise ValueError(
                        f"{kind} must have the size of its image, got {masks.shape[1:]} and "
                        f"{images.shape[1:]} for {subject!r}. Save both on one grid."
                    )
            brains = brains > 0
            lesions = brains & (lesions > 0) if has_lesion_masks else np.zeros_like(brains)
            grid = Grid.choose(images.shape[1:], None, size, None)
            images = scale_slices(images, brains, subject=subject, center=center, target=target)
            parts.append((*grid.resample_brain(images, brains), grid.resample_labels(lesions)))
            if parts[-1][0].shape[1:] != parts[0][0].shape[1:]:
                raise ValueError(
                    f"size must be given where the files' sizes differ, got None for {parts[0][0].shape[1:]} "
                    f"and, for {subject!r}, {parts[-1][0].shape[1:]}. Set size."
                )
    images, brain_masks, lesion_masks = (np.concatenate(stacks) for stacks in zip(*parts, strict=True))
    numbers = [(subject, index) for subject, slices in by_subject.items() for index in slices]
    return Bunch(
        images=images,
        brain_masks=brain_masks,
        lesion_masks=lesion_masks,
        has_lesion_masks=has_lesion_masks,
        subjects=np.array([subject for subject, _ in numbers]),
        z_frac=None,
        modality=modality,
        spacing_mm=None,
        z_index=np.array([index for _, index in numbers]),
    )


def _find(root, modality):
    """Return subject -> slice number -> kind -> file name, the modality as written, and if masks exist."""
    files = {}
    for path in root.glob("*-slice_*-*.png"):
        if match := _NAME.fullmatch(path.name):
            files.setdefault((match["subject"], int(match["index"])), {})[match["kind"]] = path.name
    written = {kind for kinds in files.values() for kind in kinds if kind.lower() == modality.lower()}
    modality = min(written, default=modality)
    chosen = {key: kinds for key, kinds in sorted(files.items()) if modality in kinds}
    if not chosen or modality in ("brainmask", "segmentation"):
        found = sorted({kind for kinds in files.values() for kind in kinds})
        raise ValueError(
            f"root must hold {{id}}-slice_{{k}}-{modality}.png, got {os.fspath(root)!r} with {found}. "
            "Choose another modality, or the folder of one split (train, val, test)."
        )
    with_lesions = sum("segmentation" in kinds for kinds in chosen.values())
    needed = ("brainmask", "segmentation") if with_lesions else ("brainmask",)
    by_subject = {}
    for (subject, index), kinds in chosen.items():
        for kind in needed:
            if kind not in kinds:
                raise ValueError(
                    f"root must hold a {kind} for each slice, got {kinds[modality]!r} without. Write "
                    f"{kinds[modality].replace(f'-{modality}.png', f'-{kind}.png')!r}"
                    f"{', black where there is no lesion' if kind == 'segmentation' else ''}."
                )
        by_subject.setdefault(subject, {})[index] = kinds
    return by_subject, modality, with_lesions > 0


def _read_stack(image_module, root, subject, slices, kind):
    """Return the subject's files of one kind as uint8 (n, height, width), None for no kind."""
    if kind is None:
        return None
    stack = []
    for kinds in slices.values():
        with image_module.open(root / kinds[kind]) as image:
            if image.mode not in ("L", "1"):
                raise ValueError(
                    f"root must hold 8-bit grey images, got mode {image.mode!r} in {kinds[kind]!r}. "
                    "Convert them to grey, mode 'L'."
                )
            stack.append(np.asarray(image.convert("L")))
    shapes = sorted({array.shape for array in stack})
    if len(shapes) > 1:
        raise ValueError(
            f"root must hold slices of one size per subject, got {shapes} for {subject!r} ({kind}). "
            "Pad them to one size."
        )
    return np.stack(stack)


def _import_image():
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            'pillow must be installed to read PNG files, got no such package. Run: pip install "madad[plot]"'
        ) from error
    return Image
