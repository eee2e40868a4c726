import contextlib
import io

import numpy as np
import pytest

from madad import cli


def _run(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main([str(argument) for argument in arguments])
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="session")
def run():
    """``run(*arguments)``: exit status, stdout and stderr of the command."""
    return _run


@pytest.fixture(scope="session")
def write_slices():
    """``write_slices(path)``: twelve subjects with four slices each in the layout of the real scans."""

    def write(path, *, without=(), lesions=True):
        rng = np.random.default_rng(0)
        n, height, width = 48, 40, 32
        y, x = np.mgrid[:height, :width]
        brain = np.broadcast_to(((y - 19.5) / 17) ** 2 + ((x - 15.5) / 13) ** 2 < 1, (n, height, width))
        tissue = 90 + 30 * np.sin(x / 4 + rng.uniform(0, 6, (n, 1, 1))) + 8 * rng.standard_normal(brain.shape)
        lesion = np.zeros(brain.shape, np.uint8)
        if lesions:
            lesion[::2, 14:20, 12:17] = 4
        arrays = {
            "image": np.where(brain, np.where(lesion > 0, 230, tissue.clip(1, 200)), 0).astype(np.uint8),
            "brain_mask": brain.astype(np.uint8),
            "lesion_mask": lesion,
            "subject": np.repeat([f"s{i:02d}" for i in range(12)], 4),
            "z_frac": np.tile(np.linspace(0.4, 0.7, 4), 12),
            "modality": "FLAIR",
        }
        np.savez(path, **{name: values for name, values in arrays.items() if name not in without})
        return path

    return write
