"""Distributed pretraining of crystal encoders, and tools for using them."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cdssl_dist.encoder import CrystalEncoder as CrystalEncoder
    from cdssl_dist.estimator import CrystalClassifier as CrystalClassifier
    from cdssl_dist.estimator import CrystalRegressor as CrystalRegressor

_WHERE = {"CrystalEncoder": "encoder", "CrystalRegressor": "estimator", "CrystalClassifier": "estimator"}
__all__ = ["CrystalClassifier", "CrystalEncoder", "CrystalRegressor", "__version__"]


def __getattr__(name: str) -> Any:
    """Import an attribute on first access: importing torch alone takes a second."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
