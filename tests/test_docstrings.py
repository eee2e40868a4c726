"""A list of parameters is whole and says of each what it is; classes and what users import leave none out."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import madad

ROOT = Path(__file__).parents[1]
LISTS, RAISED = ("Parameters", "Attributes"), ("Raises", "Warns")
UNDERLINED = re.compile(r"^(\w[\w ]*)\n-{3,}$", re.MULTILINE)
WORD, POINTER = re.compile(r"[A-Za-z]\w+"), re.compile(r"(?:[Ss]ee|[Pp]arameters as) `[\w.]+`")
FEWEST_WORDS = 3
NOT_FILLED_IN = {"self", "cls", "args", "kwargs"}
MODULES = sorted(m.name for m in pkgutil.walk_packages(madad.__path__, "madad.") if "__main__" not in m.name)


def sections(docstring):
    """Body of each section of a numpydoc docstring; under "" what stands before the first."""
    before, *rest = UNDERLINED.split(inspect.cleandoc(docstring or ""))
    return {"": before} | dict(zip(rest[::2], rest[1::2], strict=True))


def entries(body):
    """Name -> (what follows its colon, description) in a section's body."""
    found, names = {}, []
    for line in body.splitlines():
        if line and not line[0].isspace():
            head, _, kind = line.partition(" :")
            names = [name.strip(" *") for name in head.split(",")]
            found |= {name: (kind.strip(), "") for name in names}
        elif line.strip():
            found |= {name: (found[name][0], f"{found[name][1]} {line.strip()}") for name in names}
    return found


def is_explained(kind, description):
    words = WORD.findall(description)
    return kind == "ignored" or len(words) >= FEWEST_WORDS or bool(POINTER.search(description))


def parameters(documented):
    """Names that a caller fills in; of classes only where they are madad's own."""
    if inspect.isclass(documented) and not issubclass(documented, tuple):
        if not getattr(documented.__init__, "__module__", "").startswith("madad"):
            return []
    return [name for name in inspect.signature(documented).parameters if name not in NOT_FILLED_IN]


def functions_of(cls):
    """Public methods, with class methods and properties as the functions that they wrap."""
    members = (inspect.getattr_static(cls, name) for name in dir(cls) if name[0] != "_" or name == "__call__")
    unwrapped = (getattr(member, "fget", None) or getattr(member, "__func__", member) for member in members)
    return {f for f in unwrapped if inspect.isfunction(f) and f.__module__.startswith("madad")}


def imported_by_users():
    """What a package names in ``__all__``, and the methods of it."""
    found = set()
    for name in ("madad", *MODULES):
        package = importlib.import_module(name)
        faces = [getattr(package, face) for face in getattr(package, "__all__", ())]
        found |= {face for face in faces if inspect.isclass(face) or inspect.isfunction(face)}
        found |= {method for face in faces if inspect.isclass(face) for method in functions_of(face)}
    return found


def faults_of(documented, is_for_users):
    docstring = documented.__doc__ or ""
    by_section, is_class = sections(docstring), inspect.isclass(documented)
    lists = {name: entries(by_section[name]) for name in LISTS if name in by_section}
    listed = {name for section in lists.values() for name in section}
    expected = parameters(documented)
    for name in expected if lists.get("Parameters") else ():
        if name not in listed:
            yield f"{name} is not in the list"
    for name in lists.get("Parameters", ()):
        if name not in expected:
            yield f"{name} is listed, and the signature lacks it"
    for section in lists.values():
        yield from (
            f"{name} has no description" for name, entry in section.items() if not is_explained(*entry)
        )
    for section in RAISED:
        for name, (_, description) in entries(by_section.get(section, "")).items():
            if not WORD.search(description):
                yield f"{section}: nothing says when {name} is"
    if "Parameters" not in lists and not POINTER.search(docstring) and (is_for_users or is_class):
        for name in expected:  # one sentence may do, if it names them all
            if name not in listed and not re.search(rf"`[^`]*\b{name}\b[^`]*`", docstring):
                yield f"{name} is neither listed nor named in the text"


def planted(a, b, c):
    """Return nothing.

    Parameters
    ----------
    a : int
        T.
    b, d : int
        How many of them there are.

    Raises
    ------
    ValueError
    """


def test_planted_faults_are_found():
    assert set(faults_of(planted, is_for_users=True)) == {
        "c is not in the list",
        "d is listed, and the signature lacks it",
        "a has no description",
        "Raises: nothing says when ValueError is",
    }
    planted.__doc__ = "Of `a` and ``b + 1``."
    assert list(faults_of(planted, is_for_users=True)) == ["c is neither listed nor named in the text"]
    assert not list(faults_of(planted, is_for_users=False))


@pytest.fixture(scope="module")
def for_users():
    return imported_by_users()


@pytest.mark.parametrize("name", MODULES)
def test_every_parameter_is_explained(name, for_users):
    module, faults = importlib.import_module(name), []
    own = [obj for obj in vars(module).values() if getattr(obj, "__module__", None) == name]
    classes = [obj for obj in own if inspect.isclass(obj)]
    functions = {obj for obj in own if inspect.isfunction(obj)}
    methods = {f for cls in classes for f in functions_of(cls) if f.__module__ == name}
    for documented in (*classes, *functions, *methods):
        where = documented.__qualname__
        if not where.startswith("_"):
            found = faults_of(documented, documented in for_users)
            faults += [f"{where}: {fault}" for fault in found]
    assert not faults, "\n" + "\n".join(sorted(faults))


@pytest.mark.parametrize("folder", ["madad", "benchmarks", "examples", "tests"])
def test_headings_that_are_cited_exist(folder):
    headings = re.findall(
        r"^#+ (.+)$", (ROOT / "docs" / "method.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    for path in sorted((ROOT / folder).rglob("*.py")):
        text = re.sub(r"\n\s*#?\s*", " ", path.read_text(encoding="utf-8"))
        cited = re.findall(r'docs/method\.md`?, "([^"]+)"(?: and "([^"]+)")?', text)
        missing = {heading for pair in cited for heading in pair if heading} - set(headings)
        assert not missing, f"{path}: {missing}"
        if path != Path(__file__):
            assert not re.search(r"\b(METHOD|DESIGN)\b", text), (
                f"{path} cites a page that readers do not have"
            )
