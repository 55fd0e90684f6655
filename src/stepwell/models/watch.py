"""Makes transformers' Auto classes know ours (models/register.py), as soon as they are loaded.

`import stepwell` loads neither torch nor transformers, yet Auto classes and `pipeline` must find our models
however they are imported. So the import system is watched until transformers' auto modules are loaded. Their
import pulls in half of the library, and ours are built on classes of it: registering waits until the
outermost import of a module of transformers, or of ours, is over, when none of them is half made.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

__all__ = ["register_when_needed"]


def register_when_needed() -> None:
    """Registers now where transformers' auto modules are loaded, else right after they are."""
    if _auto_is_loaded():
        _register()
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def _register() -> None:
    from stepwell.models.register import register

    register()


def _auto_is_loaded() -> bool:
    return any(name.startswith("transformers.models.auto.") for name in sys.modules)


class _Watch(MetaPathFinder):
    """Stands in front of the import system, and registers behind the import that brings the auto modules."""

    def __init__(self) -> None:
        self.importing = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if self.importing or fullname.partition(".")[0] not in ("transformers", "stepwell"):
            return None
        self.importing = True
        try:
            spec = find_spec(fullname)
        finally:
            self.importing = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Outermost(spec.loader, self)
        return spec


class _Outermost(Loader):
    """The loader of a module that no other module of transformers or of ours imports."""

    def __init__(self, loader: Any, watch: _Watch) -> None:
        self.loader, self.watch = loader, watch

    def __getattr__(self, name: str) -> Any:  # `python -m stepwell` asks a loader for its code
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.watch.importing = True
        try:
            self.loader.exec_module(module)
        finally:
            self.watch.importing = False
        if self.watch in sys.meta_path and _auto_is_loaded():
            sys.meta_path.remove(self.watch)
            _register()
