import numpy as np

from benchmarks import brain


def test_overlap_is_the_dice_of_two_masks():
    one, other = np.zeros((2, 10), bool)
    one[:6], other[3:9] = True, True
    assert brain.overlap(one, other) == 2 * 3 / (6 + 6)
    assert brain.overlap(one, one) == 1
    assert brain.overlap(one, ~one) == 0
