"""House rules, enforced by reading the source: import direction, which modules may know what, and no pickle."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

# what imports what: each may import its own layer and those above this line, never one below
LAYERS = [
    {"config", "data.plan", "data.waiting", "train.schedule", "train.guard"},
    {"data"},
    {"model"},
    {"train"},
    {"finetune"},
    {"mlops"},
    {"encoder", "estimator"},
    {"look", "study"},
    {"pretrain", "finetune.__main__", "finetune.predict", "ablate", "demo", "doctor", "bench", "cli"},
]
# foreign package → the modules that may import it
KNOWN_BY = {
    "deepspeed": {"train.engine"},
    "mlflow": {"mlops"},
    "ray": {"train.cluster", "train.rank"},
}
NOT_IN = {
    "arithmetic": {"torch", "torch_geometric"},
    "model": {"pydantic", "yaml"},  # it runs where there is but torch
    "sharding": {"torch", "deepspeed", "mlflow", "cdssl_dist"},
}


def imports(path: Path) -> set[str]:
    """Dotted names of all that a module imports, wherever in it, but for the eyes of a type checker."""
    tree = ast.parse(path.read_text())
    checked_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in checked_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer_of(module: str) -> int:
    """Of a dotted name inside ``cdssl_dist``: that of the longest prefix that has one."""
    parts = module.split(".")
    for n in range(len(parts), 0, -1):
        for i, names in enumerate(LAYERS):
            if ".".join(parts[:n]) in names:
                return i
    pytest.fail(f"cdssl_dist.{module} has no layer; put it into one, here and in docs/architecture.md")


def modules(repo: Path) -> dict[str, Path]:
    """Dotted name inside ``cdssl_dist`` → file, without what only describes a package."""
    home = repo / "cdssl_dist"
    found = {".".join(p.relative_to(home).with_suffix("").parts): p for p in home.rglob("*.py")}
    return {name: path for name, path in found.items() if path.stem != "__init__"}


def sources(repo: Path) -> list[Path]:
    return [*(repo / "cdssl_dist").rglob("*.py"), *(repo / "sharding").rglob("*.py")]


def test_imports_go_downward(repo: Path) -> None:
    for module, path in modules(repo).items():
        for name in imports(path):
            inner = name.removeprefix("cdssl_dist.")
            if inner != name and not inner.startswith("__"):
                assert layer_of(inner) <= layer_of(module), f"{module} imports {name}"


def test_each_system_is_known_to_one_place(repo: Path) -> None:
    for module, path in modules(repo).items():
        roots = {name.split(".")[0] for name in imports(path)}
        for package, knowing in KNOWN_BY.items():
            assert package not in roots or {module, module.split(".")[0]} & knowing, f"{module} imports {package}"
        if layer_of(module) == 0:
            assert not roots & NOT_IN["arithmetic"], module
        if module.startswith("model."):
            assert not roots & NOT_IN["model"], module
        if module.startswith("finetune."):  # on a laptop, with neither Ray nor DeepSpeed
            assert not any(name.startswith("cdssl_dist.train") for name in imports(path)), module
    for path in (repo / "sharding").rglob("*.py"):
        assert "ray" not in {name.split(".")[0] for name in imports(path)} or path.stem in ("executor", "ray_start"), (
            path
        )
        assert not {name.split(".")[0] for name in imports(path)} & NOT_IN["sharding"], path


def test_nothing_shared_is_pickled(repo: Path) -> None:
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for path in sources(repo):
        assert not {name.split(".")[0] for name in imports(path)} & forbidden, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("torch.load", "torch.save", "eval", "exec"), f"{path}:{node.lineno}: {called}"
                for keyword in node.keywords:
                    value = getattr(keyword.value, "value", None)
                    unsafe = {("allow_pickle", True), ("weights_only", False), ("shell", True)}
                    assert (keyword.arg, value) not in unsafe, f"{path}:{node.lineno}"


def test_every_public_thing_says_what_it_is(repo: Path) -> None:
    for path in sources(repo):
        assert ast.get_docstring(ast.parse(path.read_text())) or not path.read_text().strip(), f"{path}: no docstring"


def test_all_configurations_are_packaged(repo: Path) -> None:
    packages = tomllib.loads((repo / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.name for path in (repo / "configs").glob("*/*.yaml")}
    assert {f"cdssl_dist.configs.{name}" for name in folders} <= set(packages)
