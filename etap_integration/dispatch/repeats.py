"""Calls decided once: what `decision` said of a call holds for the next one of the same form, shapes and values.

An engine makes the same few calls over and over, once a layer. The first of its kind goes the long way (`Call`,
`decide`, the operator's own checks); from then on one look-up stands for all of it.

What a look-up compares is all that the decision saw: which parameters are passed and how, the tensors' shapes, dtypes,
devices and strides (`decision.static_key`), and every other value but those in `decision.ACCEPTED`, which have no say.
What may differ from call to call at the same key is looked at each time: gradients, and the measured rules, since they
may depend on `max_seqlen_k`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from etap_integration.dispatch.calls import Call, Normaliser
from etap_integration.dispatch.decision import ACCEPTED, static_key

TENSORS = (
    "q_rope", "q_nope", "k_cache", "v_cache", "page_table", "cache_seqlens", "cu_seqlens_q", "cache_batch_idx", "out",
)  # fmt: skip
_PLAIN = (type(None), bool, int, float, str)  # a key must not keep tensors alive


@dataclass(frozen=True, slots=True)
class Facts:
    """What was found out about one kind of call. reason: why upstream computes it; None: ETAP does."""

    reason: str | None
    rows: int = 0
    batch: int = 0
    capacity: int = 0
    sms: int = 0
    run: Callable[..., Any] | None = None  # of the tensors, in the order of `TENSORS`


class Form:
    """One way of writing a call: so many positional arguments, then these keywords.

    Its methods take `values`: the positional arguments, the keywords' values, and a None, which stands for whatever is
    not passed.
    """

    CAPACITY = 4096  # remembered kinds of call; all are dropped when it is reached

    def __init__(self, normalise: Normaliser, positional: int, keywords: tuple[str, ...]) -> None:
        """Raises LookupError where a tensor that is not passed has another default than None."""
        names = (*normalise.positional[:positional], *keywords)
        place = {name: i for i, name in enumerate(names)}
        roles = normalise.interface.roles
        where = []
        for role in TENSORS:
            name = roles.get(role, role)
            if name not in place and normalise.default(name) is not None:
                raise LookupError(name)
            where.append(place.get(name, -1))
        self.tensors = itemgetter(*where)
        others = [i for i, name in enumerate(names) if i not in where and name not in ACCEPTED]
        self._plain = itemgetter(*others, -1, -1)  # at least two, for it to return a tuple
        self._max_seqlen_k = place.get("max_seqlen_k", -1)
        self._known: dict[tuple[Any, ...], Facts] = {}

    def recall(self, values: tuple[Any, ...], tensors: tuple[Any, ...]) -> Facts | None:
        """What is known of such calls, if anything. `tensors`: `self.tensors(values)`."""
        try:
            facts = self._known.get((static_key(*tensors), self._plain(values)))
        except (AttributeError, IndexError, RuntimeError, TypeError):  # a number for a tensor, an unhashable value
            return None
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
            return None
        return facts

    def length_bound(self, values: tuple[Any, ...], facts: Facts) -> int:
        """As `Call.length_bound`."""
        given = values[self._max_seqlen_k]
        return min(given, facts.capacity) if type(given) is int else facts.capacity

    def remember(self, values: tuple[Any, ...], facts: Facts) -> None:
        """Keeps `facts` for calls like this one, unless it is of a kind that cannot be told by its key."""
        tensors, plain = self.tensors(values), self._plain(values)
        if not all(x is None or isinstance(x, Tensor) for x in tensors) or not all(map(_is_plain, plain)):
            return
        if len(self._known) >= self.CAPACITY:
            self._known = {}
        try:
            self._known[static_key(*tensors), plain] = facts
        except (AttributeError, IndexError, RuntimeError, TypeError):
            return


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(isinstance(x, _PLAIN) for x in value))


class Repeats:
    """The forms of one function's calls. Safe to share between threads."""

    CAPACITY = 256  # forms; nobody writes a call in so many ways

    def __init__(self, normalise: Normaliser) -> None:
        self._normalise = normalise
        self._forms: dict[tuple[Any, ...], Form] = {}

    def form(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Form | None:
        """The form of such a call, where there is one that was remembered."""
        return self._forms.get((len(args), *kwargs))

    def remember(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], facts: Facts) -> None:
        """Keeps `facts` for calls like this one."""
        if call.malformed is not None:
            return
        name = (len(args), *kwargs)
        form = self._forms.get(name)
        if form is None:
            if len(self._forms) >= self.CAPACITY:
                return
            try:
                form = self._forms[name] = Form(self._normalise, len(args), tuple(kwargs))
            except LookupError:
                return
        form.remember((*args, *kwargs.values(), None), facts)
