"""Replacing a function wherever a module holds it, and putting it back.

`from engine import f` leaves a second binding of `f` in the importing module, out of reach of `engine.f = g`. So every
module in sys.modules is searched for names bound to the very object. Bindings elsewhere (attributes of classes and
instances, closures, functools.partial) are not reached.

Nothing here locks: the caller does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

_MISSING = object()


@dataclass(frozen=True, eq=False)
class Binding:
    """`module.name`, once the original and now the replacement."""

    module: ModuleType
    name: str

    def __str__(self) -> str:
        return f"{self.module.__name__}.{self.name}"

    @property
    def value(self) -> Any:
        """What the name is bound to now."""
        return vars(self.module).get(self.name, _MISSING)


def holders(value: Any) -> Iterator[Binding]:
    """Every module-level name bound to `value` itself, each module once. Triggers no lazy import."""
    seen: set[int] = set()
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType) or id(module) in seen:
            continue
        seen.add(id(module))
        for name, held in list(vars(module).items()):
            if held is value:
                yield Binding(module, name)


class Replacement:
    """One function replaced by another in every module that holds it."""

    def __init__(self, home: ModuleType, name: str, original: Any, replacement: Any) -> None:
        self.home = Binding(home, name)
        self.original, self.replacement = original, replacement
        self.bindings: list[Binding] = []

    def install(self) -> None:
        """Binds the replacement wherever the original is bound. Again: also where it has come up since."""
        # The home first: what is imported from it during the search is the replacement already.
        if self.home.value is self.original:
            self._bind(self.home)
        for binding in list(holders(self.original)):
            self._bind(binding)

    def _bind(self, binding: Binding) -> None:
        setattr(binding.module, binding.name, self.replacement)
        if not any(b.module is binding.module and b.name == binding.name for b in self.bindings):
            self.bindings.append(binding)

    def foreign(self) -> list[str]:
        """Where something else stands by now, in words."""
        ours = (self.original, self.replacement)
        return [f"{b} is {_name(b.value)}" for b in self.bindings if not any(b.value is x for x in ours)]

    def restore(self) -> list[str]:
        """Binds the original wherever the replacement stands, also where it was imported to since.

        What somebody else bound meanwhile is left alone. Returns those bindings, in words.
        """
        left_alone = self.foreign()
        for binding in self.bindings:
            if binding.value is self.replacement:
                setattr(binding.module, binding.name, self.original)
        for binding in list(holders(self.replacement)):
            setattr(binding.module, binding.name, self.original)
        self.bindings = []
        return left_alone


def _name(value: Any) -> str:
    if value is _MISSING:
        return "gone"
    where = getattr(value, "__module__", None)
    name = getattr(value, "__qualname__", None)
    return f"now {where}.{name}" if where and name else f"now {value!r}"
