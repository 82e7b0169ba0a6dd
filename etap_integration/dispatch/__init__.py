"""Routes the attention calls of an unpatched FlashAttention-3, SGLang, vLLM or FlashInfer to `mla_decode`, and back.

    enable(), disable()     for the process
    with patched(): ...     for a while; may be nested, also inside enable()
    status()                what is patched, what ran where and why
    supports(call)          the decision itself

Patching is a matter of the process, not of a thread: it holds for every thread, and has to be done in every worker
process. Whoever asked last decides the options; a function is put back when nobody asks for it any more.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from etap_integration.dispatch.bindings import Replacement
from etap_integration.dispatch.calls import Call, Machine, UnknownSignature
from etap_integration.dispatch.decision import DEFAULT_MAX_ROWS, Limits, choose, supports
from etap_integration.dispatch.routing import TALLY, FallbackError, Options, Route, log
from etap_integration.dispatch.targets import TARGETS, Target, TargetError
from etap_integration.dispatch.wrappers import WrapperTarget

__all__ = [
    "TARGETS",
    "Call",
    "FallbackError",
    "Limits",
    "Machine",
    "Status",
    "TargetError",
    "TargetStatus",
    "choose",
    "disable",
    "enable",
    "patched",
    "reset_counts",
    "status",
    "supports",
]

_LOCK = threading.RLock()
_ENABLED = object()  # the token of enable(); each patched() has its own


class _Patch:
    """A target while somebody asks for it: its routes, and who asked, in order."""

    def __init__(self, pairs: list[tuple[Route, Replacement]]) -> None:
        self.pairs = pairs
        self.holders: dict[object, Options] = {}

    def hold(self, token: object, options: Options) -> None:
        self.holders[token] = options
        self._follow_last()
        for _, replacement in self.pairs:
            replacement.install()

    def release(self, token: object) -> list[str]:
        """Returns the bindings left alone, where this was the last holder."""
        del self.holders[token]
        if self.holders:
            self._follow_last()
            return []
        left_alone = []
        for route, replacement in self.pairs:
            left_alone += replacement.restore()
            route.engine = None  # whoever still holds the wrapper gets upstream
        return left_alone

    def _follow_last(self) -> None:
        """Whoever asked last decides the options."""
        options = next(reversed(self.holders.values()))
        for route, _ in self.pairs:
            if route.engine is None or route.engine.options != options:
                route.engine = route.make_engine(options)


_patches: dict[str, _Patch] = {}
_skipped: dict[str, str] = {}
_left_alone: list[str] = []


def enable(
    *targets: str,
    max_rows: int = DEFAULT_MAX_ROWS,
    only_where_faster: bool = True,
    strict: bool | None = None,
    operator: Callable[..., Any] | None = None,
    machine: Callable[[torch.device], Machine] | None = None,
) -> Status:
    """Routes the targets' MLA decode calls to ETAP until `disable()`. Called again, it changes nothing.

    Args:
      targets: names from `TARGETS`; none: all that are installed, which imports them. A target that is named must be
        there, one that is not named is passed over and `status()` says why.
      max_rows: calls with more query rows (tokens of the longest request times heads) stay with upstream.
      only_where_faster: leave to upstream what `choose` says it is faster at. False: run all that ETAP can compute.
      strict: raise FallbackError instead of leaving an MLA call to upstream. None: ETAP_STRICT=1 in the environment.
      operator: runs in place of `mla_decode`, with its arguments. machine: answers in place of the real devices.

    Returns:
      `status()`.

    Raises:
      TargetError (an ImportError): a named target is not installed, cannot be imported, or lacks the function or the
        parameters it is known by. Nothing was patched then.
      ValueError: an unknown name; max_rows below 1; or enabled already, with other options.
    """
    options = _options(max_rows, only_where_faster, strict, operator, machine)
    found = _resolve(targets)
    with _LOCK:
        for name in found:
            held = _patches[name].holders.get(_ENABLED) if name in _patches else None
            if held is not None and held != options:
                raise ValueError(f"{name}: enabled already, with {held}, not {options}; disable() first")
        _hold(found, _ENABLED, options, by_name=bool(targets))
        return status()


def disable(*targets: str) -> tuple[str, ...]:
    """Takes back `enable()`: everything, or the named targets. A surrounding `patched()` keeps its own hold.

    Every binding that still is ours gets the original back. One that somebody else replaced meanwhile is left as it
    is, logged, and returned: "module.name is now other.function". Without an `enable()` before it, does nothing.

    Raises ValueError for an unknown name.
    """
    _check_names(targets)
    with _LOCK:
        return _release(targets or tuple(_patches), _ENABLED)


@contextlib.contextmanager
def patched(
    *targets: str,
    max_rows: int = DEFAULT_MAX_ROWS,
    only_where_faster: bool = True,
    strict: bool | None = None,
    operator: Callable[..., Any] | None = None,
    machine: Callable[[torch.device], Machine] | None = None,
) -> Iterator[None]:
    """As `enable`, for the length of a with block, whose options hold inside it. Blocks may nest and overlap."""
    options = _options(max_rows, only_where_faster, strict, operator, machine)
    found, token = _resolve(targets), object()
    with _LOCK:
        _hold(found, token, options, by_name=bool(targets))
    try:
        yield
    finally:
        with _LOCK:
            _release(tuple(found), token)


@dataclass(frozen=True)
class TargetStatus:
    """A target: whether it is patched, under which names, and where somebody replaced ours since.

    note: why it is not patched, or which of its functions are not.
    """

    patched: bool
    bindings: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Status:
    """What `status()` found. `fallbacks`: reason -> calls; `left_alone`: what the last restoring did not touch."""

    targets: dict[str, TargetStatus]
    etap_calls: int
    fallbacks: dict[str, int] = field(default_factory=dict)
    left_alone: tuple[str, ...] = ()

    @property
    def enabled(self) -> bool:
        return any(target.patched for target in self.targets.values())

    def __str__(self) -> str:
        lines = []
        for name, target in self.targets.items():
            note = f" ({target.note})" if target.note else ""
            lines.append(f"{name}: {'patched' if target.patched else 'not patched'}{note}")
            lines += [f"    {binding}" for binding in target.bindings]
            lines += [f"    replaced by somebody else: {binding}" for binding in target.replaced]
        lines += [f"left alone: {binding}" for binding in self.left_alone]
        lines.append(f"calls on ETAP: {self.etap_calls}")
        for reason, count in sorted(self.fallbacks.items(), key=lambda item: -item[1]):
            lines.append(f"calls left to upstream: {count}: {reason}")
        return "\n".join(lines)


def status() -> Status:
    """What is patched now, and the counts of the process since the start or `reset_counts()`."""
    with _LOCK:
        targets = {}
        for name in TARGETS:
            patch, note = _patches.get(name), _skipped.get(name, "")
            if patch is None:
                targets[name] = TargetStatus(False, note=note)
                continue
            foreign = [line for _, replacement in patch.pairs for line in replacement.foreign()]
            gone = {line.split(" is ")[0] for line in foreign}
            ours = [str(b) for _, replacement in patch.pairs for b in replacement.bindings if str(b) not in gone]
            targets[name] = TargetStatus(True, tuple(ours), tuple(foreign), note)
        return Status(targets, *TALLY.read(), tuple(_left_alone))


def reset_counts() -> None:
    """Sets the counts of `status()` to zero, and lets every reason be logged once more."""
    TALLY.clear()


def _options(max_rows: int, only_where_faster: bool, strict: bool | None, operator: Any, machine: Any) -> Options:
    Limits(max_rows)  # checks it
    if strict is None:
        strict = os.environ.get("ETAP_STRICT", "0") not in ("", "0")
    return Options(max_rows, only_where_faster, strict, operator, machine)


def _check_names(names: tuple[str, ...]) -> None:
    for name in names:
        if name not in TARGETS:
            raise ValueError(f"{name!r} is no target; they are {', '.join(TARGETS)}")


def _resolve(names: tuple[str, ...]) -> dict[str, ModuleType]:
    """Name -> imported module. Outside the lock: an import may run code that comes back here from another thread."""
    _check_names(names)
    found = {}
    for name in names or TARGETS:
        try:
            found[name] = TARGETS[name].load()
        except TargetError as failure:
            if names:
                raise
            _skipped[name] = str(failure)
    return found


def _hold(found: dict[str, ModuleType], token: object, options: Options, by_name: bool) -> None:
    new: dict[str, _Patch] = {}
    for name, module in found.items():
        if name in _patches:
            continue
        try:
            new[name] = _prepare(TARGETS[name], module)
        except TargetError as failure:
            if by_name:
                raise
            _skipped[name] = str(failure)
    if new:
        _left_alone.clear()
    _patches.update(new)
    for name in found:
        if name in _patches:
            _patches[name].hold(token, options)


def _prepare(target: Target, module: ModuleType) -> _Patch:
    """The routes of a target, nothing patched yet. Raises TargetError where the required function is not as known."""
    pairs, notes = [], []
    if isinstance(target, WrapperTarget):
        pairs, notes = target.prepare(module)
    for name, interface in getattr(target, "functions", {}).items():
        current = original = getattr(module, name, None)
        if not callable(current):
            notes.append(f"{name}: not there")
            continue
        while (earlier := getattr(original, "__etap_route__", None)) is not None and earlier.engine is None:
            original = earlier.original  # our stand-in of an earlier time, which somebody put back
        if earlier is not None:
            notes.append(f"{name}: routed as {earlier.label} already")
            continue
        try:
            route = Route(f"{target.module}.{name}", original, interface)
        except UnknownSignature as failure:
            if name == target.required:
                known = f"{target.module}.{name} is not the function etap_integration knows"
                raise TargetError(f"{known}: {failure}") from failure
            notes.append(f"{name}: {failure}")
            continue
        if current is not original:
            setattr(module, name, original)
        pairs.append((route, Replacement(module, name, original, route.wrapper)))
    _skipped[target.module] = "; ".join(notes)
    return _Patch(pairs)


def _release(names: tuple[str, ...], token: object) -> tuple[str, ...]:
    left_alone: list[str] = []
    for name in names:
        patch = _patches.get(name)
        if patch is None or token not in patch.holders:
            continue
        left_alone += patch.release(token)
        if not patch.holders:
            del _patches[name]
    if left_alone:
        _left_alone[:] = left_alone
        log.warning("left alone, somebody else replaced it: %s", "; ".join(left_alone))
    return tuple(left_alone)
