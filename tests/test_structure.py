"""The shape of the library: imports run one way, optional packages stay optional, files stay short."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parent.parent / "pqk_fast"
KERNELS = sorted((LIBRARY / "triton_kernels").glob("*.py"))  # a link, which rglob does not follow
FILES = sorted({*LIBRARY.rglob("*.py"), *KERNELS})
MOST_LINES = 400

# Each part may import those before it. A new file must be placed here or below.
ORDER = (
    "files",
    "allocator",
    "reference",
    "triton_kernels",
    "gpu",
    "native",
    "settings",
    "config",
    "patterns",
    "recipe_files",
    "schedule",
    "dispatch",
    "autograd",
    "dual_ops",
    "batch_norm",
    "pooling",
    "selection",
    "sharding",
    "packing",
    "ops",
    "step_size",
    "two_phase",
    "dual_batch_norm",
    "layers",
    "branches",
    "fusion",
    "folding",
    "prepare",
    "masks",
    "guards",
    "losses",
    "callbacks",
    "tensorboard",
    "lightning",
    "checkpoint",
    "training",
    "trainer",
    "experiments",
    "deploy",
    "commands",
    "cli",
    "__main__",
)
# Parts that stand beside that order, and what each may import. Only experiments and what comes after may import them.
LEAVES = {
    "models": ("pooling",),
    "data": ("files", "settings", "config"),
    "record": ("files",),
    "pages": ("files",),
    "plots": (),
    "report": ("files", "pages", "record"),
}
OPTIONAL = {
    "torchvision", "torchaudio", "matplotlib", "triton", "espeakng_loader", "PIL", "soundfile", "tensorboard",
    "lightning", "pytorch_lightning", "onnx", "onnxruntime", "onnxscript",
}  # fmt: skip
# Modules for users of another package, whose classes they extend: they import it at their top, and nothing else in the
# library imports them.
ADAPTERS = {"lightning": {"lightning", "pytorch_lightning"}}


def module_name(path: Path) -> str:
    """``pqk_fast/data/load.py`` -> ``data.load``; an ``__init__.py`` has its package's name, the library's own none."""
    return ".".join(path.relative_to(LIBRARY).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


MODULES = {module_name(path): path for path in FILES}


def part(module: str) -> str:
    return module.split(".")[0]


def imports_of(path: Path, top_level_only: bool = False) -> Iterator[str]:
    """Absolute names of the modules that a file imports; ``from a import b`` gives ``a.b``.

    ``top_level_only``: without those inside of functions and those for the type checker.
    """
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}, line {node.lineno}: import by the full name, not relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (top_level_only and is_lazy(node)):
            nodes.extend(ast.iter_child_nodes(node))


def is_lazy(node: ast.AST) -> bool:
    """True for code that importing its module does not run."""
    for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not node.orelse
    return for_types or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def own_imports(path: Path) -> set[str]:
    """Modules of the library that a file imports: the longest known name each, ``""`` for the package itself."""
    found = set()
    for name in imports_of(path):
        if part(name) == "pqk_fast":
            name = name.removeprefix("pqk_fast").removeprefix(".")
            while name not in MODULES:
                name = name.rpartition(".")[0]
            found.add(name)
    return found


def allowed(module: str) -> set[str]:
    """Parts that a module may import, its own aside."""
    name = part(module)
    if name in LEAVES:
        return set(LEAVES[name])
    before = set(ORDER[: ORDER.index(name)])
    return before | set(LEAVES) if ORDER.index(name) >= ORDER.index("experiments") else before


def test_every_file_has_its_place() -> None:
    placed = {*ORDER, *LEAVES, ""}
    unknown = {part(module) for module in MODULES} - placed
    assert not unknown, f"say in ORDER or LEAVES what {sorted(unknown)} may import"
    assert not placed - {part(module) for module in MODULES}, "a part that is no longer there"


@pytest.mark.parametrize("module", [module for module in MODULES if module])
def test_imports_run_one_way(module: str) -> None:
    imported = own_imports(MODULES[module])
    if part(module) in ("cli", "__main__"):
        imported.discard("")  # for the version
    assert "" not in imported, "import from the module, not from the package"
    wrong = {name for name in imported if part(name) not in {part(module), *allowed(module)}}
    assert not wrong, f"{module} comes before {sorted(wrong)}"


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {module: own_imports(path) - {"", module} for module, path in MODULES.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(order) == set(MODULES)


@pytest.mark.parametrize("path", sorted({*FILES} - {*KERNELS}), ids=module_name)
def test_optional_packages_are_imported_only_where_they_are_used(path: Path) -> None:
    found = {part(name) for name in imports_of(path, top_level_only=True)} & OPTIONAL
    assert found == ADAPTERS.get(module_name(path), set())


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_nothing_imports_a_module_that_needs_another_package(path: Path) -> None:
    assert not own_imports(path) & set(ADAPTERS)


def test_importing_the_library_imports_no_optional_package() -> None:
    """What torch itself imports does not count."""
    program = (
        "import sys, torch; before = set(sys.modules); import pqk_fast; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    plain = {name: value for name, value in os.environ.items() if not name.startswith("TRITON")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=plain)
    imported = set(done.stdout.split())
    assert "pqk_fast" in imported
    assert not imported & OPTIONAL


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < MOST_LINES


def test_the_checks_see_what_they_look_for(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import torch\n"
        "from pqk_fast import ops, __version__\n"
        "from pqk_fast.data.load import Splits\n"
        "try:\n    import PIL.Image\nexcept ImportError:\n    pass\n"
        "if TYPE_CHECKING:\n    import soundfile\n"
        "def f():\n    import matplotlib.pyplot as plt\n    from pqk_fast.trainer import Trainer\n"
    )
    assert own_imports(path) == {"ops", "", "data.load", "trainer"}
    assert {part(name) for name in imports_of(path)} & OPTIONAL == {"PIL", "matplotlib", "soundfile"}
    assert {part(name) for name in imports_of(path, top_level_only=True)} & OPTIONAL == {"PIL"}
    assert "trainer" not in allowed("ops")
    assert "models" not in allowed("trainer")
    assert {"ops", "models"} < allowed("experiments.run")
    assert allowed("data.load") == {"files", "settings", "config"}
