"""Where the brain is: a mask that is given, a background of zeros, a network, or the template."""

import shutil
import subprocess
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from madad.mri.nifti import read_volume
from madad.mri.registration import mni_template, register_affine
from madad.mri.resampling import check_brain_mask, check_volume, largest_part, resample_mask, to_isotropic

MIN_BACKGROUND = 0.4
"""Least share of voxels at 0 in a skull-stripped volume; a brain fills about half of its bounding box."""
MIN_BRAIN_LITRES = 0.3
"""Least volume of a mask that can be a human brain."""
MAX_BRAIN_LITRES = 2.5
"""Largest volume of a mask that can be a brain alone; a head has more than 3 litres."""


def find_brain(values, affine, *, brain_mask=None, method="auto"):
    """Return where the brain is and how that was found.

    Parameters
    ----------
    values : array-like of shape (X, Y, Z)
        Intensities in any unit in which air is lowest.
    affine : array-like of shape (4, 4)
        Voxel indices to world mm (right, anterior, superior).
    brain_mask : array-like of shape (X, Y, Z), default=None
        A mask that is known, non-zero inside the brain. It is returned as it is. None: it is looked for.
    method : {"auto", "stripped", "deepbet", "template", "hd-bet", "synthstrip"}, default="auto"
        "auto" takes `brain_mask`, or else the first of the next three that works. "stripped": the
        voxels above 0 of a volume whose skull is removed. "deepbet": a network for T1-weighted heads.
        "template": the MNI152 brain after registration, fitted to the volume's own border of the brain.
        "hd-bet", "synthstrip": the commands ``hd-bet`` (version 2) and ``mri_synthstrip``, if installed.

    Returns
    -------
    brain_mask : ndarray of shape (X, Y, Z), bool
        True = brain with the fluid in and around it. Where it was looked for: one component without holes.
    made_by : str
        "given" or the method that made it.

    Raises
    ------
    ImportError
        If deepbet, SimpleITK or nilearn is needed and not installed. "auto" does without deepbet.
    OSError
        If a command is not on the PATH or fails.
    ValueError
        If an argument is out of its range, `values` is not finite or constant, or no mask of 0.3 to 2.5
        litres is found.
    """
    if method != "auto" and method not in _METHODS:
        raise ValueError(f"method must be one of {list(METHODS)}, got {method!r}. Use 'auto'.")
    values, affine = check_volume(values, affine)
    if brain_mask is not None:
        if method != "auto":
            raise ValueError(
                f"method must be 'auto' with a brain_mask, got {method!r}. Leave out one of the two."
            )
        return check_brain_mask(brain_mask, values), "given"
    litres = {}
    for name in _AUTO if method == "auto" else (method,):
        try:
            brain = clean_mask(_METHODS[name](values, affine))
        except ImportError:
            if method == "auto" and name == "deepbet":
                continue
            raise
        litres[name] = np.count_nonzero(brain) * abs(np.linalg.det(affine[:3, :3])) / 1e6
        if MIN_BRAIN_LITRES <= litres[name] <= MAX_BRAIN_LITRES:
            return brain, name
    found = ", ".join(f"{amount:.2f} by {name!r}" for name, amount in litres.items())
    raise ValueError(
        f"values must show a brain of {MIN_BRAIN_LITRES} to {MAX_BRAIN_LITRES} litres, got {found}. "
        "Give a brain mask, or leave the file out."
    )


def is_stripped(values, affine):
    """Tell whether the skull is removed and the background 0.

    Parameters
    ----------
    values : array-like of shape (X, Y, Z)
        Intensities in any unit, with air at 0 where the skull is removed.
    affine : array-like of shape (4, 4)
        Voxel indices to world mm.

    Returns
    -------
    bool
        Whether at least 40 % of the voxels are not above 0, the others fill at most 2.5 litres, and voxels
        below 0 are fewer than a tenth of these. The share alone does not tell: raw T1 volumes of IXI have 0
        in up to 38 % of their voxels.
    """
    values = np.asarray(values)
    n_inside, n_negative = np.count_nonzero(values > 0), np.count_nonzero(values < 0)
    litres = n_inside * abs(np.linalg.det(np.asarray(affine)[:3, :3])) / 1e6
    background = 1 - n_inside / values.size
    return bool(background >= MIN_BACKGROUND and litres <= MAX_BRAIN_LITRES and n_negative <= 0.1 * n_inside)


def clean_mask(mask):
    """Keep the largest component of a mask and fill its holes.

    Parameters
    ----------
    mask : ndarray of shape (X, Y, Z), bool
        Any mask, also an empty one.

    Returns
    -------
    ndarray of shape (X, Y, Z), bool
        One component, connected by faces; a hole is what the outside does not reach through faces.
    """
    return ndimage.binary_fill_holes(largest_part(mask))


def _from_background(values, affine):
    return (values > 0) if is_stripped(values, affine) else np.zeros(values.shape, dtype=bool)


def _from_deepbet(values, affine):
    try:
        _, mask, _ = _deepbet().run(nib.Nifti1Image(values, affine))
    except (AssertionError, ValueError):  # its network saw no brain, and there is no box to cut out
        return np.zeros(values.shape, dtype=bool)
    return np.asarray(mask.dataobj) > 0


@lru_cache(maxsize=1)
def _deepbet():
    try:
        import deepbet
    except ImportError as error:
        raise ImportError(
            "method must not be 'deepbet' without deepbet, got no deepbet. "
            'Install it: pip install "madad[deepbet]".'
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit.load, which it calls
        return deepbet.BrainExtraction(no_gpu=True)  # the same mask on all machines


_CUBE_MM = 2.0
_RING_MM = 8  # from the registered template's brain to where the volume's own may end
_DARK = 0.25  # of the brain's median: skull and air
_NECK_MM = 6  # half the width of what may connect brain and scalp
_SULCUS_MM = 8


def _from_template(values, affine):
    """Cut the bright region near the registered template's brain from its surroundings.

    A mask that is only warped has a Dice of 0.88 to 0.90: 12 parameters do not make one brain another's.
    """
    template = mni_template()
    back = np.linalg.inv(register_affine(values, affine).matrix)
    start = resample_mask(template.brain_mask, template.affine, values.shape, affine, back)
    if not start.any():
        return start
    cubes, grid = to_isotropic(values, affine, start, _CUBE_MM, margin_mm=_RING_MM + _SULCUS_MM + _CUBE_MM)
    start = resample_mask(template.brain_mask, template.affine, cubes.shape, grid, back)
    air = np.percentile(values, 1)
    typical = np.median(cubes[_shrink(start, _NECK_MM)])
    bright = (cubes > air + _DARK * (typical - air)) & _grow(start, _RING_MM)
    brain = _grow(largest_part(_shrink(bright, _NECK_MM)), _NECK_MM)
    brain = ndimage.binary_fill_holes(_shrink(_grow(brain, _SULCUS_MM), _SULCUS_MM))
    return resample_mask(brain, grid, values.shape, affine)


def _grow(cubes, mm):
    return ndimage.distance_transform_edt(~cubes, sampling=_CUBE_MM) <= mm if cubes.any() else cubes


def _shrink(cubes, mm):
    return ndimage.distance_transform_edt(cubes, sampling=_CUBE_MM) > mm


def _from_hd_bet(values, affine):
    # Version 2 writes the mask of out.nii.gz to out_bet.nii.gz.
    options = ["-device", "cpu", "--disable_tta", "--save_bet_mask", "--no_bet_image"]
    return _from_command(
        values, affine, ["hd-bet", "-i", "in.nii.gz", "-o", "out.nii.gz", *options], "out_bet.nii.gz"
    )


def _from_synthstrip(values, affine):
    return _from_command(
        values, affine, ["mri_synthstrip", "-i", "in.nii.gz", "-m", "mask.nii.gz"], "mask.nii.gz"
    )


def _from_command(values, affine, command, mask_name):
    program = shutil.which(command[0])
    if program is None:
        raise FileNotFoundError(
            f"method must be one whose command is on the PATH, got no {command[0]!r}. "
            "Install it, or use 'auto'."
        )
    with tempfile.TemporaryDirectory() as folder:
        nib.save(nib.Nifti1Image(values, affine), Path(folder, "in.nii.gz"))
        ran = subprocess.run([program, *command[1:]], cwd=folder, capture_output=True, text=True, check=False)
        mask_file = Path(folder, mask_name)
        if ran.returncode or not mask_file.exists():
            last = (ran.stderr or ran.stdout).strip()[-300:]
            raise ChildProcessError(
                f"{command[0]} must end with a mask, got exit status {ran.returncode}: {last}. "
                "Run it by hand, or use method='auto'."
            )
        mask = read_volume(mask_file)
        mask = mask.in_file_order(mask.values > 0)
    if mask.shape != values.shape:
        raise ChildProcessError(
            f"{command[0]} must return a mask of shape {values.shape}, got {mask.shape}. Use method='auto'."
        )
    return mask


_METHODS = {
    "stripped": _from_background,
    "deepbet": _from_deepbet,
    "template": _from_template,
    "hd-bet": _from_hd_bet,
    "synthstrip": _from_synthstrip,
}
_AUTO = ("stripped", "deepbet", "template")
METHODS = ("auto", *_METHODS)
"""How `find_brain` can be told to find the brain."""
