"""Figures. matplotlib is imported when one is drawn (extra ``plot``)."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

from madad._runtime.files import whole_file


def summary_figure(
    path,
    *,
    images: np.ndarray,
    restored: np.ndarray,
    anomaly_maps: np.ndarray,
    lesion_masks: np.ndarray,
    titles: list[str] | None = None,
    map_range: tuple[float, float] | None = None,
) -> Path:
    """Draw input, restored, map and truth, one row per slice, with one colour scale for all maps.

    Parameters
    ----------
    path : path-like
        PNG to write; it appears whole or not at all.
    images, restored : ndarray of shape (n, H, W), in 0..1
        Slices and their pseudo-healthy images.
    anomaly_maps : ndarray of shape (n, H, W), in 0..1
        Their maps; higher = more anomalous.
    lesion_masks : ndarray of shape (n, H, W), bool
        True = lesion; outlined on the map and on the truth.
    titles : list of str or None, default=None
        Text to the left of each row. None = none.
    map_range : (float, float) or None, default=None
        Limits of the colour scale. None = 0 to the 99.9th percentile of the maps shown.

    Returns
    -------
    Path
        The file that was written.
    """
    plt = require_matplotlib()
    n = len(images)
    low, high = map_range or (0.0, max(float(np.quantile(anomaly_maps, 0.999)), 1e-6))
    figure, axes = plt.subplots(n, 4, figsize=(8.4, 2.05 * n + 0.5), squeeze=False, layout="constrained")
    for row in range(n):
        grey = {"cmap": "gray", "vmin": 0.0, "vmax": max(float(images[row].max()), 0.5)}
        axes[row, 0].imshow(images[row], **grey)
        axes[row, 1].imshow(restored[row], **grey)
        coloured = axes[row, 2].imshow(anomaly_maps[row], cmap="inferno", vmin=low, vmax=high)
        axes[row, 3].imshow(images[row], **grey)
        if lesion_masks[row].any():
            for axis in axes[row, 2:]:
                axis.contour(lesion_masks[row], levels=[0.5], colors="cyan", linewidths=0.8)
        if titles is not None:
            axes[row, 0].set_ylabel(titles[row], fontsize=7)
    for axis, name in zip(axes[0], ("input", "restored", "anomaly map", "truth"), strict=True):
        axis.set_title(name, fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(coloured, ax=axes[:, 2], orientation="horizontal", shrink=0.9, aspect=25, pad=0.01)
    return save_figure(figure, Path(path))


def volume_figure(
    path,
    *,
    image,
    anomaly_map,
    affine: np.ndarray,
    threshold: float,
    lesion_mask=None,
    title: str | None = None,
) -> Path:
    """Draw a scan and its anomaly map in the scan's own space, cut where the lesion or the map is largest.

    Parameters
    ----------
    path : path-like
        PNG to write; it appears whole or not at all.
    image, anomaly_map : ndarray of shape (X, Y, Z)
        The scan in any unit and its map in 0..1, on one canonical grid.
    affine : ndarray of shape (4, 4)
        Voxel indices to world mm.
    threshold : float
        Where the map reaches it, in 0..1, the scan has a yellow outline.
    lesion_mask : ndarray of shape (X, Y, Z) or None, default=None
        True = lesion; has a cyan outline on scan and map. None = not known.
    title : str or None, default=None
        Text above the scan. None = none.

    Returns
    -------
    Path
        The file that was written.

    Raises
    ------
    ImportError
        If matplotlib or nilearn is not installed (extra ``plot``).
    """
    plt = require_matplotlib()
    plotting = _require_nilearn()
    scan, colours = (nib.Nifti1Image(np.asarray(one, np.float32), affine) for one in (image, anomaly_map))
    has_lesion = lesion_mask is not None and np.any(lesion_mask)
    cuts = _cuts(lesion_mask if has_lesion else np.asarray(anomaly_map) >= threshold, affine)
    figure = plt.figure(figsize=(8.4, 5.6), facecolor="black")
    bright = float(np.quantile(image, 0.999)) or 1.0
    shared = {"cut_coords": cuts, "black_bg": True, "draw_cross": False, "annotate": False}
    above = plotting.plot_anat(
        scan,
        figure=figure,
        axes=(0, 0.5, 1, 0.5),
        title=title,
        vmin=0.0,
        vmax=bright,
        colorbar=False,
        **shared,
    )
    below = plotting.plot_img(
        colours,
        figure=figure,
        axes=(0, 0, 1, 0.5),
        cmap="inferno",
        vmin=0.0,
        vmax=1.0,
        colorbar=True,
        **shared,
    )
    found = np.asarray(anomaly_map) >= threshold
    if found.any():
        _outline(above, found, affine, "yellow")
    if has_lesion:
        _outline(above, lesion_mask, affine, "cyan")
        _outline(below, lesion_mask, affine, "cyan")
    return save_figure(figure, Path(path))


def _outline(display, mask: np.ndarray, affine: np.ndarray, color: str) -> None:
    image = nib.Nifti1Image(np.asarray(mask, np.float32), affine)
    display.add_contours(image, levels=[0.5], colors=color, linewidths=0.8)


def _cuts(region: np.ndarray, affine: np.ndarray) -> tuple[float, float, float]:
    """World mm through which most of a region is seen in each plane; the middle if it is empty."""
    if not np.any(region):
        places = [(n - 1) / 2 for n in np.shape(region)]
    else:
        others = ((1, 2), (0, 2), (0, 1))
        places = [float(np.argmax(np.sum(region, axis=axes))) for axes in others]
    x, y, z = affine[:3, :3] @ places + affine[:3, 3]
    return float(x), float(y), float(z)


def _require_nilearn():
    try:
        from nilearn import plotting
    except ImportError as error:
        raise ImportError(
            'nilearn must be installed to draw volumes, got no such package. Run: pip install "madad[plot]"'
        ) from error
    return plotting


def require_matplotlib():
    """Import matplotlib's pyplot.

    Returns
    -------
    module
        ``matplotlib.pyplot``, set to draw without a screen.

    Raises
    ------
    ImportError
        If matplotlib is not installed; the message names the extra.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "matplotlib must be installed to draw figures, got no such package. "
            'Run: pip install "madad[plot]"'
        ) from error
    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot

    return pyplot


def save_figure(figure, path: Path) -> Path:
    """Write a figure, whole or not at all, and close it.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
        The figure to write.
    path : Path
        The file; its suffix says which format, PNG without.

    Returns
    -------
    Path
        The file that was written.
    """
    plt = require_matplotlib()
    try:
        with whole_file(path) as scratch:
            figure.savefig(scratch, dpi=110, format=path.suffix.removeprefix(".") or "png")
    finally:
        plt.close(figure)
    return path
