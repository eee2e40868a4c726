import sys

import numpy as np
import pytest

pytest.importorskip("nilearn", reason="the template ships with nilearn")

from madad.datasets.templates import load_template


def test_probabilities_and_brain_agree():
    template = load_template()
    assert template.grey.shape == template.white.shape == template.t1.shape == template.brain_masks.shape
    total = template.grey + template.white
    assert total.min() >= 0 and total.max() <= 1 + 1e-5
    outside = (total > 0.5) & ~template.brain_masks
    assert outside.sum() < 0.01 * template.brain_masks.sum()
    volume_ml = template.brain_masks.sum() / 1000
    assert 1500 < volume_ml < 2200


def test_anterior_is_at_the_top_and_the_origin_is_mni_zero():
    template = load_template()
    k = template.at(0)
    assert template.z_mm[k] == 0
    row, column = template.origin_px
    rows = np.flatnonzero(template.brain_masks[k].any(axis=1))
    columns = np.flatnonzero(template.brain_masks[k].any(axis=0))
    # The anterior commissure lies about 70 mm behind the front of the brain and 105 mm before its back.
    assert 60 < row - rows[0] < 80
    assert 95 < rows[-1] - row < 115
    assert abs((columns[0] + columns[-1]) / 2 - column) < 3


def test_loaded_once_and_read_only():
    template = load_template()
    assert load_template() is template
    with pytest.raises(ValueError, match="read-only"):
        template.t1[0, 0, 0] = 1


def test_missing_nilearn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "nilearn", None)
    with pytest.raises(ImportError, match=r'pip install "madad\[mri\]"'):
        load_template.__wrapped__()
