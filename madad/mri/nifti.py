"""NIfTI volumes: read in closest-canonical orientation, write back on the grid of the original file."""

import gzip
import itertools
import os
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel import orientations
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from madad._runtime.files import whole_file

GZIP_LEVEL = 1
"""Level of compression that nibabel uses too; higher ones take several times as long for a tenth less."""
_BROKEN = (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, RuntimeError, zlib.error)


@dataclass(frozen=True, eq=False)
class Volume:
    """A volume in closest-canonical orientation that knows the grid of its file.

    Attributes
    ----------
    values : ndarray of shape (X, Y, Z), float32
        First axis to the subject's right, second to the front, third up, as far as swapping and flipping the
        file's axes can bring them. In the unit of the file, its slope and intercept applied; finite.
    affine : ndarray of shape (4, 4), float64
        Index into `values` to world coordinates in mm.
    header : nibabel.Nifti1Header
        The file's header, unchanged; a NIfTI-2 or pair header where the file has one.
    orientation : ndarray of shape (3, 2)
        How the file's axes were brought to those of `values`, as nibabel's ``apply_orientation`` takes it.
    path : Path or None
        The file; None for an image made in memory.
    n_not_finite : int
        How many voxels were NaN or infinite and are 0 in `values`.
    stored_dtype : numpy.dtype
        Type of the file's numbers; float64 where a slope or an intercept changes them.

    Notes
    -----
    ``dataclasses.replace(volume, values=...)`` is the same grid with other values.
    """

    values: np.ndarray
    affine: np.ndarray
    header: nib.Nifti1Header
    orientation: np.ndarray
    path: Path | None = None
    n_not_finite: int = 0
    stored_dtype: np.dtype = np.dtype(np.float32)

    @property
    def shape(self):
        """Number of voxels to the right, to the front and up: three int."""
        return self.values.shape

    @property
    def spacing_mm(self):
        """Distance in mm between voxels to the right, to the front and up: three float."""
        return tuple(float(mm) for mm in nib.affines.voxel_sizes(self.affine))

    @property
    def name(self):
        """The file's path, for messages."""
        return "an image in memory" if self.path is None else str(self.path)

    def in_file_order(self, values):
        """Turn an array on the canonical grid so that its axes are those of the file.

        Parameters
        ----------
        values : ndarray of shape (X, Y, Z)
            On the canonical grid, as `values` of the volume.

        Returns
        -------
        ndarray of three dimensions
            The same voxels in the order in which the file stores them.
        """
        canonical = orientations.axcodes2ornt("RAS")
        return orientations.apply_orientation(
            values, orientations.ornt_transform(canonical, self.orientation)
        )


def read_volume(image):
    """Read a NIfTI volume.

    Parameters
    ----------
    image : str, os.PathLike, nibabel NIfTI image or Volume
        A file, ``.nii`` or ``.hdr``/``.img``, also compressed; NIfTI-1 or -2; of three dimensions, or more if
        the others have length 1. A `Volume` is returned as it is.

    Returns
    -------
    Volume
        The volume in closest-canonical orientation; it shares no memory with `image` and needs its file no
        more.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    TypeError
        If `image` is none of the above.
    ValueError
        If the file is a folder, is no NIfTI file (a DICOM file is called so), is cut short or damaged, has
        several time points or other than three dimensions, has no voxels, complex numbers or colours, or no
        finite value; or if its affine does not span space.

    Warns
    -----
    UserWarning
        If voxels are NaN or infinite. They become 0, as in nilearn; SPM writes NaN outside the brain.

    Notes
    -----
    Axes are swapped and flipped, nothing is interpolated: `Volume.values` does not depend on the order in
    which the file stores its axes. As in nibabel, the sform is used if its code is above 0, else the qform,
    else voxel sizes alone, with the first axis to the left and the origin in the middle. Units other than mm
    in the header are ignored, as most programs do.
    """
    if isinstance(image, Volume):
        return image
    path = None
    if isinstance(image, str | os.PathLike):
        path = Path(image)
        image = _open(path)
    if not isinstance(image, nib.Nifti1Pair):
        raise TypeError(
            f"image must be a path or a nibabel NIfTI image, got {type(image).__name__}. "
            "Wrap an array in nibabel.Nifti1Image(array, affine)."
        )
    if path is None and image.get_filename() is not None:
        path = Path(image.get_filename())
    where = "image" if path is None else f"image {str(path)!r}"
    _check_layout(image, where)
    orientation = orientations.io_orientation(image.affine)
    with _as_value_error(path), np.errstate(over="ignore"):
        values = image.get_fdata(dtype=np.float32, caching="unchanged")
    values = orientations.apply_orientation(values.reshape(image.shape[:3]), orientation)
    values = np.array(values, dtype=np.float32, order="C")
    n_not_finite = _replace_not_finite(values, where)
    affine = image.affine @ orientations.inv_ornt_aff(orientation, image.shape[:3])
    dtype = _stored_dtype(image.dataobj)
    return Volume(values, affine, image.header.copy(), orientation, path, n_not_finite, dtype)


def _stored_dtype(dataobj):
    # of an image in memory there is no slope
    is_scaled = (getattr(dataobj, "slope", 1), getattr(dataobj, "inter", 0)) != (1, 0)
    return np.dtype(np.float64 if is_scaled else dataobj.dtype)


def _open(path):
    if not path.exists():
        raise FileNotFoundError(
            f"image must name an existing file, got {str(path)!r}. Check spelling and folder."
        )
    if path.is_dir():
        raise ValueError(
            f"image must name a NIfTI file, got the folder {str(path)!r}. "
            "Give its files; convert DICOM series with dcm2niix first."
        )
    with open(path, "rb") as file:
        is_dicom = file.read(132)[128:] == b"DICM"
    if is_dicom:
        raise ValueError(
            f"image must name a NIfTI file, got the DICOM file {str(path)!r}. "
            "Convert its series with dcm2niix."
        )
    with _as_value_error(path):
        if path.suffix.lower() == ".gz":
            with gzip.open(path) as file:  # to its end, where the checksum is: nibabel stops before
                while file.read(1 << 20):
                    pass
        image = nib.load(path)
    if not isinstance(image, nib.Nifti1Pair):
        raise ValueError(
            f"image must name a NIfTI file, got {type(image).__name__} in {str(path)!r}. Convert it, for "
            "example with mri_convert."
        )
    return image


@contextmanager
def _as_value_error(path):
    """Turn what nibabel says of a broken file into a ValueError that names it."""
    try:
        yield
    except _BROKEN as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's fault, not the file's
            raise
        raise ValueError(
            f"image must name a whole NIfTI file, got {str(path)!r} ({error}). Copy or convert it again."
        ) from error


def _check_layout(image, where):
    """Raise ValueError if the image is not one volume of real numbers at a place in space."""
    shape, affine, dtype = image.shape, image.affine, image.dataobj.dtype
    if any(n != 1 for n in shape[3:]) and 0 not in shape:
        raise ValueError(
            f"{where} must be one volume, got a series of shape {shape}. Save one of its volumes or a mean."
        )
    if len(shape) < 3:
        raise ValueError(f"{where} must have 3 dimensions, got shape {shape}. Save a whole volume.")
    if 0 in shape:
        raise ValueError(f"{where} must have voxels, got shape {shape}. Export it again.")
    if dtype.kind not in "iufb":
        kind = "complex numbers" if dtype.kind == "c" else "colours"
        raise ValueError(f"{where} must hold real numbers, got {kind} ({dtype}). Save the magnitude alone.")
    spans_space = affine is not None and np.isfinite(affine).all()
    if spans_space:
        lengths = nib.affines.voxel_sizes(affine)
        spans_space = lengths.min() > 0 and abs(np.linalg.det(affine[:3, :3] / lengths)) > 1e-3
    if not spans_space:
        rows = None if affine is None else affine[:3, :3].tolist()
        raise ValueError(
            f"{where} must have an affine that spans space, got {rows}. Repair the header's sform and qform."
        )


def _replace_not_finite(values, where):
    """Set NaN and infinity to 0 in place, warn, and return how many there were."""
    bad = ~np.isfinite(values)
    n_bad = int(np.count_nonzero(bad))
    if n_bad == values.size:
        raise ValueError(f"{where} must have finite values, got NaN or infinity throughout. Export it again.")
    if n_bad:
        values[bad] = 0
        warnings.warn(
            f"{where} should be finite, got NaN or infinity in {n_bad} of {values.size} voxels, which become "
            "0. Harmless in the background; check the file if they are in the brain.",
            stacklevel=3,
        )
    return n_bad


def write_like(path, values, volume, *, dtype=np.float32):
    """Write values as a NIfTI file on the grid of a volume's original file.

    Parameters
    ----------
    path : str or os.PathLike
        File to write; ends in ``.nii`` or ``.nii.gz``. An existing file is replaced.
    values : array-like of shape (X, Y, Z)
        What to write, on the canonical grid of `volume`; finite.
    volume : Volume
        The volume as it was read from the original file.
    dtype : dtype, default=numpy.float32
        How numbers are stored: float32 for maps, uint8 for masks. Integers must hold `values` exactly.

    Raises
    ------
    ValueError
        If `path` has another ending, or `values` another shape, is not finite or not exact in `dtype`.
    OSError
        If the folder is missing or read-only, or the disk is full. `path` is then what it was before.

    Notes
    -----
    The header is that of the original file: shape (also axes of length 1), sform, qform, their codes, voxel
    sizes, units, intent, description and extensions. What spoke of the original's values is reset: data
    type, slope 1 and intercept 0, display range ``cal_min = cal_max = 0`` (none). A pair is written as one
    file.

    The file is written beside `path` under another name and then moved, so that it appears whole or not at
    all. Equal values give equal bytes, compressed ones too.
    """
    path = Path(path)
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise ValueError(f"path must end in .nii or .nii.gz, got {str(path)!r}. Rename it.")
    image = _image_on_original_grid(values, volume, np.dtype(dtype))
    with whole_file(path) as scratch, open(scratch, "xb") as file:
        if path.suffix.lower() == ".gz":
            with gzip.GzipFile("", "wb", GZIP_LEVEL, file, mtime=0) as packed:
                image.to_stream(packed)
        else:
            image.to_stream(file)


def _image_on_original_grid(values, volume, dtype):
    values = np.asarray(values)
    if values.shape != volume.shape:
        raise ValueError(
            f"values must have the shape of the volume, got {values.shape} and {volume.shape} for "
            f"{volume.name}. Give them on its canonical grid."
        )
    if not np.isfinite(values).all():
        raise ValueError(f"values must be finite, got NaN or infinity for {volume.name}. Set them to 0.")
    with np.errstate(invalid="ignore"):
        stored = values.astype(dtype, copy=False)
    if dtype.kind in "iu" and not np.array_equal(stored, values):
        raise ValueError(
            f"values must be whole numbers that fit dtype, got {values.min():g} to {values.max():g} for "
            f"{dtype}. Use float32."
        )
    stored = volume.in_file_order(stored).reshape(volume.header.get_data_shape())

    is_second = isinstance(volume.header, nib.Nifti2Header)
    header_type, image_type = (
        (nib.Nifti2Header, nib.Nifti2Image) if is_second else (nib.Nifti1Header, nib.Nifti1Image)
    )
    # Built from bytes: nibabel's own conversion of a pair's header keeps only some of its fields.
    header = header_type(volume.header.binaryblock, volume.header.endianness, False, volume.header.extensions)
    try:
        header.set_data_dtype(dtype)
    except HeaderDataError as error:
        raise ValueError(f"dtype must be one that NIfTI has, got {dtype}. Use float32 or uint8.") from error
    header["cal_min"] = header["cal_max"] = 0
    return image_type(stored, None, header)  # without an affine the header's own stay untouched


def same_grid(a, b, tolerance_mm=None):
    """Return whether two volumes have the same voxels in the same places.

    Parameters
    ----------
    a, b : Volume
        Two volumes, whatever the order of axes in their files.
    tolerance_mm : float, default=None
        How far in mm a voxel of one may lie from that of the other, from 0. None: half the smallest edge of
        a voxel of `a`.

    Returns
    -------
    bool
        True if the shapes are equal and no corner is further off than `tolerance_mm`.
    """
    return a.shape == b.shape and _shift_mm(a, b) <= _tolerance(a, tolerance_mm)


def check_same_grid(a, b, tolerance_mm=None):
    """Raise ValueError, which names both files, unless two volumes lie on one grid.

    Parameters
    ----------
    a, b : Volume
        Two volumes, as in `same_grid`.
    tolerance_mm : float, default=None
        How far in mm voxels may lie apart, as in `same_grid`.

    Raises
    ------
    ValueError
        If the shapes differ, or corners lie further apart than `tolerance_mm`.
    """
    if same_grid(a, b, tolerance_mm):
        return
    if a.shape != b.shape:
        found = f"shapes {a.shape} and {b.shape}"
    else:
        found = f"{_shift_mm(a, b):.2f} mm between corners, above {_tolerance(a, tolerance_mm):.2f} mm,"
    raise ValueError(
        f"volumes must lie on one grid, got {found} for {a.name} and {b.name}. "
        "Resample one to the other's grid (nearest neighbour for masks) or repair its header."
    )


def _tolerance(a, tolerance_mm):
    return min(a.spacing_mm) / 2 if tolerance_mm is None else tolerance_mm


def _shift_mm(a, b):
    corners = itertools.product(*((0, n - 1) for n in a.shape))
    corners = np.array([(*corner, 1) for corner in corners])
    return float(np.linalg.norm(corners @ (a.affine - b.affine).T, axis=1).max())
