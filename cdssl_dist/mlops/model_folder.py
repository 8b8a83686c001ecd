"""An encoder as a folder that MLflow loads: ``pyfunc.py``, the modules that it needs, and the encoder's two files."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import mlflow.pyfunc
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from mlflow.models import Model, ModelSignature
from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec

PYFUNC: Final = Path(__file__).with_name("pyfunc.py")
ROOT: Final = PYFUNC.parents[2]
REQUIREMENTS: Final = ("mlflow", "torch", "numpy", "safetensors", "gemmi")  # to load the pyfunc
EXAMPLE: Final = {  # caesium chloride
    "lattice": {"a": 4.12, "b": 4.12, "c": 4.12, "alpha": 90, "beta": 90, "gamma": 90},
    "sites": [
        {"species": [{"element": "Cs", "occu": 1}], "abc": [0, 0, 0]},
        {"species": [{"element": "Cl", "occu": 1}], "abc": [0.5, 0.5, 0.5]},
    ],
}


def save_data(path: Path, folder: Path, files: Sequence[str]) -> None:
    """Write a model as data only: its files, and no code that MLflow could load."""
    (path / "artifacts").mkdir(parents=True)
    for name in files:
        shutil.copy(folder / name, path / "artifacts" / name)


def save_model(path: Path, folder: Path, model: Any, run_id: str | None) -> None:
    """Write an encoder as an MLflow model: ``pyfunc.py``, the modules that it needs, and the two files of the encoder.

    Args:
        path: the folder to create.
        folder: holds ``encoder.safetensors`` and ``encoder.json``.
        model: MLflow's logged model, of which this folder is the content.
        run_id: the MLflow run that trained it.
    """
    about = Model(
        artifact_path=model.artifact_location, model_uuid=model.model_id, run_id=run_id, model_id=model.model_id
    )
    width = json.loads((folder / "encoder.json").read_text())["model"]["width"]
    with tempfile.TemporaryDirectory() as scratch:
        for source in needed_sources():
            copy = Path(scratch) / source.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            text = source.read_text()
            if source.name == "__init__.py":
                # MLflow puts these copies before the installed packages, whose other modules must stay importable.
                text += "\n__path__ = __import__('pkgutil').extend_path(__path__, __name__)\n"
            copy.write_text(text)
        mlflow.pyfunc.save_model(
            str(path),
            python_model=str(PYFUNC),
            artifacts={"weights": str(folder / "encoder.safetensors"), "card": str(folder / "encoder.json")},
            code_paths=[str(p) for p in sorted(Path(scratch).iterdir())],
            pip_requirements=[f"{p}=={importlib.metadata.version(p).partition('+')[0]}" for p in REQUIREMENTS],
            signature=ModelSignature(
                Schema([ColSpec("string", "structure")]),
                Schema([TensorSpec(np.dtype(np.float32), (-1, 3 * width))]),
                ParamSchema([ParamSpec("refused", "string", "error")]),
            ),
            input_example=pd.DataFrame({"structure": [json.dumps(EXAMPLE)]}),
            mlflow_model=about,
        )


def needed_sources() -> list[Path]:
    """The files of our packages that ``pyfunc.py`` imports, directly or indirectly, imports in functions included."""
    found: set[Path] = set()
    unread = [PYFUNC]
    while unread:
        for node in _imports(ast.parse(unread.pop().read_text())):
            package, *rest = (node.module or "").split(".")
            if package not in ("cdssl_dist", "sharding"):
                continue
            base = ROOT.joinpath(package, *rest)
            files = [base.with_suffix(".py"), *(base / f"{name.name}.py" for name in node.names)]
            files += [folder / "__init__.py" for folder in (base, *base.parents) if ROOT in folder.parents]
            new = {file for file in files if file.exists()} - found
            found |= new
            unread += new
    return sorted(found)


def _imports(tree: ast.AST) -> Iterator[ast.ImportFrom]:
    """All ``from`` imports except those that only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom):
            yield node
        elif not (isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"):
            yield from _imports(node)
