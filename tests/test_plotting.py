import sys

import matplotlib
import nibabel as nib
import numpy as np
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from madad import plotting
from madad.plotting import _cuts, summary_figure, volume_figure


@pytest.fixture
def panels():
    rng = np.random.default_rng(0)
    lesion_masks = np.zeros((3, 20, 16), bool)
    lesion_masks[0, 5:9, 5:9] = lesion_masks[1, 10:12, 3:9] = True
    return {
        "images": rng.random((3, 20, 16), dtype=np.float32),
        "restored": rng.random((3, 20, 16), dtype=np.float32),
        "anomaly_maps": np.array([0.1, 0.5, 1])[:, None, None] * rng.random((3, 20, 16)),
        "lesion_masks": lesion_masks,
    }


@pytest.fixture
def drawn(monkeypatch):
    """The figures, which are closed once they are written."""
    figures, save = [], plotting.save_figure

    def keep(figure, path):
        figures.append(figure)
        return save(figure, path)

    monkeypatch.setattr(plotting, "save_figure", keep)
    return figures


def images_of(figure):
    axes = [axis for axis in figure.axes if axis.get_label() != "<colorbar>"]
    return np.array(axes).reshape(-1, 4)


def test_each_row_shows_input_restored_map_and_truth(panels, drawn, tmp_path):
    summary_figure(tmp_path / "summary.png", **panels, titles=["a", "b", "c"])
    axes = images_of(drawn[0])
    assert [axis.get_title() for axis in axes[0]] == ["input", "restored", "anomaly map", "truth"]
    assert [axis.get_ylabel() for axis in axes[:, 0]] == ["a", "b", "c"]
    for column, name in enumerate(("images", "restored", "anomaly_maps", "images")):
        for row in range(3):
            np.testing.assert_array_equal(axes[row, column].images[0].get_array(), panels[name][row])
    outlined = [[bool(axis.collections) for axis in row] for row in axes]
    assert outlined == [[False, False, True, True], [False, False, True, True], [False] * 4]


@pytest.mark.parametrize("map_range", [None, (0.2, 0.5)])
def test_all_maps_have_one_colour_scale(map_range, panels, drawn, tmp_path):
    summary_figure(tmp_path / "summary.png", **panels, map_range=map_range)
    scales = {axis.images[0].get_clim() for axis in images_of(drawn[0])[:, 2]}
    assert scales == {map_range or (0.0, float(np.quantile(panels["anomaly_maps"], 0.999)))}
    for row in images_of(drawn[0]):  # input, restored and truth can be compared by eye
        assert len({row[column].images[0].get_clim() for column in (0, 1, 3)}) == 1


def test_maps_of_zeros_can_be_drawn(panels, drawn, tmp_path):
    summary_figure(tmp_path / "summary.png", **(panels | {"anomaly_maps": np.zeros((3, 20, 16))}))
    low, high = images_of(drawn[0])[0, 2].images[0].get_clim()
    assert low == 0 < high


def test_the_file_is_a_png_that_grows_with_the_rows(panels, tmp_path):
    one = {name: values[:1] for name, values in panels.items()}
    paths = [summary_figure(tmp_path / "3.png", **panels), summary_figure(str(tmp_path / "1.png"), **one)]
    assert paths == [tmp_path / "3.png", tmp_path / "1.png"]
    three, single = (plt.imread(path) for path in paths)
    assert three.shape[1] == single.shape[1] == round(8.4 * 110)
    assert three.shape[0] > 1.5 * single.shape[0]
    assert three.std() > 0.1  # not a blank page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.png", "3.png"]
    assert not plt.get_fignums()


def test_an_interrupted_call_leaves_the_old_file(panels, tmp_path, monkeypatch):
    path = summary_figure(tmp_path / "summary.png", **panels)
    before = path.read_bytes()

    def fail(self, file, **kwargs):
        file.write_bytes(b"half a pict")
        raise OSError("No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="No space left"):
        summary_figure(path, **panels)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.png"]
    assert not plt.get_fignums()


def test_missing_matplotlib_says_what_to_install(panels, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'matplotlib must be installed .* pip install "madad\[plot\]"'):
        summary_figure(tmp_path / "summary.png", **panels)
    assert not list(tmp_path.iterdir())


# Volumes


@pytest.fixture
def volume():
    """A scan, its map, and where it lies: oblique and left-handed."""
    rng = np.random.default_rng(0)
    image = np.zeros((24, 30, 20), np.float32)
    image[3:-3, 3:-3, 3:-3] = rng.uniform(100, 300, (18, 24, 14))
    anomaly_map = np.zeros(image.shape, np.float32)
    anomaly_map[12:17, 8:14, 6:12] = 0.9
    linear = nib.eulerangles.euler2mat(z=0.2, x=0.1) @ np.diag([-2.0, 2, 3])
    affine = nib.affines.from_matvec(linear, [20, -30, -10])
    return {"image": image, "anomaly_map": anomaly_map, "affine": affine, "threshold": 0.5}


@pytest.fixture
def lesion(volume):
    lesion = np.zeros(volume["image"].shape, bool)
    lesion[13:18, 9:15, 6:12] = True
    return lesion


def test_cuts_go_where_most_of_the_region_is_seen(volume):
    region = np.zeros((24, 30, 20), bool)
    region[2:8, 5, 7] = region[4, 3:12, 7] = region[4, 5, 1:19] = True  # three lines that meet
    region[20, 25, 15] = True
    expected = nib.affines.apply_affine(volume["affine"], [4, 5, 7])
    np.testing.assert_allclose(_cuts(region, volume["affine"]), expected)
    middle = nib.affines.apply_affine(volume["affine"], [11.5, 14.5, 9.5])
    np.testing.assert_allclose(_cuts(np.zeros_like(region), volume["affine"]), middle)


@pytest.mark.parametrize("drawn_lesion", ["none", "empty", "some"])
@pytest.mark.parametrize("title", [None, "sub-01 T1"])
def test_a_volume_is_drawn_whole(volume, lesion, drawn_lesion, title, drawn, tmp_path):
    pytest.importorskip("nilearn", reason="volumes are drawn by nilearn")
    mask = {"none": None, "empty": np.zeros_like(lesion), "some": lesion}[drawn_lesion]
    path = volume_figure(str(tmp_path / "volume.png"), **volume, lesion_mask=mask, title=title)
    assert [entry.name for entry in tmp_path.iterdir()] == ["volume.png"] and path == tmp_path / "volume.png"
    picture = plt.imread(path)
    assert picture.shape[:2] == (round(5.6 * 110), round(8.4 * 110)) and picture.std() > 0.1
    texts = [text.get_text() for axis in drawn[0].axes for text in axis.texts]
    assert ("sub-01 T1" in texts) == (title is not None)
    red, green, blue = (picture[..., channel] for channel in range(3))
    n_cyan = np.count_nonzero((green > 0.9) & (blue > 0.9) & (red < 0.2))
    assert (n_cyan > 50) == (drawn_lesion == "some")
    assert np.count_nonzero((green > 0.9) & (red > 0.9) & (blue < 0.2)) > 50  # yellow: the map's outline
    assert not plt.get_fignums()


def test_a_map_that_reaches_no_threshold_has_no_outline(volume, tmp_path):
    pytest.importorskip("nilearn", reason="volumes are drawn by nilearn")
    volume |= {"anomaly_map": np.zeros(volume["image"].shape), "image": np.zeros(volume["image"].shape)}
    picture = plt.imread(volume_figure(tmp_path / "volume.png", **volume))
    red, green, blue = (picture[..., channel] for channel in range(3))
    assert not ((green > 0.9) & (red > 0.9) & (blue < 0.2)).any()


def test_an_interrupted_volume_leaves_the_old_file(volume, tmp_path, monkeypatch):
    pytest.importorskip("nilearn", reason="volumes are drawn by nilearn")
    (tmp_path / "volume.png").write_bytes(b"before")

    def fail(self, file, **kwargs):
        file.write_bytes(b"half a pict")
        raise OSError("No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="No space left"):
        volume_figure(tmp_path / "volume.png", **volume)
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [b"before"]
    assert not plt.get_fignums()


def test_missing_nilearn_says_what_to_install(volume, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nilearn", None)
    with pytest.raises(ImportError, match=r'nilearn must be installed .* pip install "madad\[plot\]"'):
        volume_figure(tmp_path / "volume.png", **volume)
    assert not list(tmp_path.iterdir()) and not plt.get_fignums()
