"""Calls decided once: what `decision` said of a call holds for the next one of the same form, shapes and values.

An engine makes the same few calls over and over, once a layer. The first of its kind goes the long way (`Call`,
`decide`, the operator's own checks); from then on one look-up stands for all of it.

What a look-up compares is all that the decision saw: which parameters are passed and how, the tensors' shapes, dtypes,
devices and strides (`attention_key`, `index_key`), and every other value but those in `decision.ACCEPTED`, which have
no say. What may differ from call to call at the same key is looked at each time: gradients, and the measured rules,
since they may depend on `max_seqlen_k`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from torch import Tensor

from etap_integration.dispatch.calls import Call, Normaliser
from etap_integration.dispatch.decision import ACCEPTED, attention_key, index_key, needs_gradients, slower

_ATTENTION, _INDEX = ("q_rope", "q_nope", "k_cache", "v_cache", "out", "ckv_scale", "kpe_scale"), (
    "page_table", "cache_seqlens", "cu_seqlens_q", "cache_batch_idx",
)  # fmt: skip
TENSORS = (*_ATTENTION, *_INDEX)
_PLAIN = (type(None), bool, int, float, str)  # a key must not keep tensors alive


@dataclass(frozen=True, slots=True)
class Facts:
    """What was found out about one kind of call. reason: why upstream computes it; None: ETAP does.

    slower_at: what the measured rules said at each bound of the lengths that came up.
    """

    reason: str | None
    rows: int = 0
    batch: int = 0
    capacity: int = 0
    sms: int = 0
    measured: bool = True  # whether the measured rules are about it
    run: Callable[..., Any] | None = None  # of the tensors, in the order of `TENSORS`; None: it did not run yet
    slower_at: dict[int, str | None] = field(default_factory=dict, compare=False)


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
        self._attention = itemgetter(*where[: len(_ATTENTION)])
        self._index = itemgetter(*where[len(_ATTENTION) :])
        others = [i for i, name in enumerate(names) if i not in where and name not in ACCEPTED]
        self._plain = itemgetter(*others, -1, -1)  # at least two, for it to return a tuple
        self._max_seqlen_k = place.get("max_seqlen_k", -1)
        self._known: dict[tuple[Any, ...], Facts] = {}
        self._refused: dict[tuple[Any, ...], Facts] = {}  # by q's shape and k's dtype alone
        self._index_keys: dict[tuple[Any, ...], int] = {}
        self._last_index: tuple[Any, ...] = (_nothing, _nothing, _nothing, _nothing, self._number(()))

    def recall(self, values: Sequence[Any]) -> tuple[Facts, tuple[Any, ...]] | None:
        """What is known of such calls, if anything, and the arguments of its `run`."""
        attention, tensors, plain = self._attention(values), self._index(values), self._plain(values)
        try:
            if self._refused:
                facts = self._refused.get((attention[0].shape, attention[2].dtype, plain))
                if facts is not None:
                    return facts, ()
            facts = self._known.get((attention_key(*attention), self._index_number(tensors), plain))
        except (AttributeError, TypeError):  # a number in a tensor's place, a value that cannot be hashed
            return None
        if facts is None or needs_gradients(*attention):
            return None
        return facts, attention + tensors

    def _index_number(self, tensors: tuple[Tensor | None, ...]) -> int:
        """Stands for `index_key`. Every layer of a model passes the same table and lengths: they are known by sight."""
        table, lengths, cu, index = tensors
        seen = self._last_index
        if seen[0]() is table and seen[1]() is lengths and seen[2]() is cu and seen[3]() is index:
            return seen[4]
        number = self._number(index_key(tensors))
        self._last_index = (*(_nothing if x is None else weakref.ref(x) for x in tensors), number)
        return number

    def _number(self, key: tuple[Any, ...]) -> int:
        return self._index_keys.setdefault(key, len(self._index_keys))

    def slower(self, values: Sequence[Any], facts: Facts) -> str | None:
        """As `decision.slower`, asked once for each bound of the lengths that the host knows (`Call.length_bound`)."""
        given = values[self._max_seqlen_k]
        bound = min(given, facts.capacity) if type(given) is int else facts.capacity
        try:
            return facts.slower_at[bound]
        except KeyError:
            if len(facts.slower_at) >= self.CAPACITY:
                facts.slower_at.clear()
            reason = facts.slower_at[bound] = slower(facts.rows, facts.batch, bound, facts.sms)
            return reason

    def remember(self, values: Sequence[Any], facts: Facts, by_query: bool) -> None:
        """Keeps `facts` for calls like this one, unless it is of a kind that cannot be told by its key.

        by_query: they hold at other tensors too, if q's shape and k's dtype are the same.
        """
        tensors, plain = self._attention(values) + self._index(values), self._plain(values)
        if not all(map(_is_plain, plain)):
            return
        if max(len(self._known), len(self._refused), len(self._index_keys)) >= self.CAPACITY:
            self._known, self._refused, self._index_keys = {}, {}, {}
            self._last_index = (_nothing, _nothing, _nothing, _nothing, self._number(()))
        if by_query and isinstance(tensors[0], Tensor) and isinstance(tensors[2], Tensor):
            self._refused[tensors[0].shape, tensors[2].dtype, plain] = facts
            return
        if not all(isinstance(x, Tensor) or (x is None and i >= 4) for i, x in enumerate(tensors)):
            return
        key = (attention_key(*self._attention(values)), self._index_number(self._index(values)), plain)
        earlier = self._known.get(key)
        if earlier is None or earlier.run is None:  # a rule may send away what ran before
            self._known[key] = facts


def _nothing() -> None:
    """The weak reference to None."""


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
        return self._forms.get((len(args), tuple(kwargs)))

    def remember(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], facts: Facts, by_query: bool) -> None:
        """Keeps `facts` for calls like this one. by_query: as in `Form.remember`."""
        if call.malformed is not None:
            return
        name = (len(args), tuple(kwargs))
        form = self._forms.get(name)
        if form is None:
            if len(self._forms) >= self.CAPACITY:
                return
            try:
                form = self._forms[name] = Form(self._normalise, len(args), tuple(kwargs))
            except LookupError:
                return
        form.remember([*args, *kwargs.values(), None], facts, by_query)
