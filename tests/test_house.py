"""The rules of the house, kept by reading the source: the direction of imports, who may know what, and no pickle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

LAYERS = [
    {"config", "plan", "schedule", "guard", "waiting"},
    {"batch", "noise", "edges", "megnet", "compiled", "kernels", "heads", "loss", "pretext", "precision"},
    {"remote", "cache", "storage", "dataset", "loader", "subset", "tables", "labeled", "stream"}
    | {
        "runlog",
        "system",
        "perf",
        "engine",
        "checkpoint",
        "evaluate",
        "export",
        "watch",
        "mirror",
        "structures",
        "embedding",
    }
    | {
        "targets",
        "splits",
        "baselines",
        "tuning",
        "predictor",
        "experiment",
        "models",
        "model_card",
        "parity",
        "uncertainty",
    }
    | {"study_config", "study_data", "study_cells", "study_run", "study_statistics", "study_tables", "uncertainty"},
    {"train_loop"},
    {"mlflow_server", "tracking", "registry", "registry_store", "pyfunc", "model_folder", "record"}
    | {"live", "rank", "cluster"},
    {"commands", "pretrain", "replay", "status", "registry_cli", "demo", "bench", "doctor", "cli"}
    | {
        "encoder",
        "estimator",
        "finetune",
        "finetune_results",
        "predict",
        "embed",
        "probe",
        "report",
        "report_page",
        "study",
    }
    | {"map", "map_page", "encoder_map"},
]
# foreign package → the modules that may import it
KNOWN_BY = {
    "deepspeed": {"engine"},
    "mlflow": {"mlflow_server", "tracking", "registry", "registry_store", "pyfunc", "model_folder", "record"},
    "ray": {"cluster", "rank"},
}
NOT_IN = {
    "sharding": {"torch", "deepspeed", "mlflow", "cdssl_dist"},
    "layer 1": {"torch", "torch_geometric"},
    "layer 2": {"pydantic", "yaml"},
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
    for i, names in enumerate(LAYERS):
        if module in names:
            return i
    pytest.fail(f"cdssl_dist/{module}.py has no layer; put it into one, here and in docs/architecture.md")


def sources(repo: Path) -> list[Path]:
    return [*(repo / "cdssl_dist").rglob("*.py"), *(repo / "sharding").rglob("*.py")]


def test_imports_go_downward(repo: Path) -> None:
    for path in (repo / "cdssl_dist").glob("*.py"):
        if path.stem == "__init__":
            continue
        own = layer_of(path.stem)
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "cdssl_dist" and len(parts) > 1 and not parts[1].startswith("__"):
                assert layer_of(parts[1]) <= own, f"{path.name} (layer {own + 1}) imports {name}"


def test_each_system_is_known_to_one_place(repo: Path) -> None:
    for path in (repo / "cdssl_dist").rglob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        for package, knowing in KNOWN_BY.items():
            assert package not in roots or path.stem in knowing, f"{path.name} imports {package}"
        if path.parent.name == "cdssl_dist" and path.stem != "__init__" and layer_of(path.stem) < 2:
            assert not roots & NOT_IN[f"layer {layer_of(path.stem) + 1}"], path.name
    for path in (repo / "sharding").rglob("*.py"):
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
