"""Families of expressions that differ in settings: the settings that torch has, and Flax's.

A family is an expression of tensors that are known to agree, such as an attention, with the
settings that people get wrong, such as its scale. Its settings are torch's where they give torch's
tensor, and a cause is named where others give Flax's.

Networks are large, so the search is bounded: it looks at as many examples of the batch as tell
enough, settings are tried on a few numbers first where the expression allows that, and every trial
is paid from a purse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

import numpy as np

from gam_flax.parity.glue import NEAR, UNFIT, Like, lay_safely, near
from gam_flax.parity.judge import magnitude

Settings = dict[str, str]
"""Name of a setting → its value, in words that are said to the user."""

Trial = tuple[Any, np.ndarray]
"""An index into the tensor that is sought, and what stands there."""

_ENOUGH = 2**12  # numbers that no wrong expression gives by chance
_PURSE = 1e10  # numbers that one search may compute, some seconds
_TRIALS = 50_000  # expressions that one search may try, some seconds where these are small
_APART = 10  # so many times the slack must torch's tensor and Flax's differ
_TERMS = 6  # known tensors that may be one term of a sum, the latest
_CHANGES = 2  # settings in which Flax's expression may differ from torch's


@dataclass(frozen=True)
class Family:
    """One expression and its settings.

    noun: what it is, in words.
    choices: name of a setting → all values, torch's usual ones first.
    make: (settings, few) → where in the tensor, and what: all of it (...), or a few numbers that
        are cheap. It raises where the settings do not fit.
    cost, few_cost: numbers that one such call computes.
    tried: the values that torch's expression is sought among, where these are fewer.
    always: settings that are said even where both have the same.
    slack: Flax's tensor is given where none differs by more than this part of the largest number.
    """

    noun: str
    choices: Mapping[str, Sequence[str]]
    make: Callable[[Settings, bool], Trial]
    cost: float
    few_cost: float
    tried: Mapping[str, Sequence[str]]
    always: tuple[str, ...] = ()
    slack: float = NEAR

    def difference(self, own: Settings, flax: Settings) -> str:
        """In words."""
        other = [name for name in own if own[name] != flax[name]]
        common = [own[name] for name in self.always if name not in other]
        torch_says, flax_says = (" and ".join(side[n] for n in other) for side in (own, flax))
        return f"{', '.join([self.noun, *common])}: torch {torch_says}, Flax {flax_says}"


@dataclass(frozen=True)
class Problem:
    """Two tensors that should be one, in torch's layout, and what is known to agree.

    known: name → tensor, the latest last.
    beside: what torch and Flax have in common and was taken off, in words.
    """

    known: Mapping[str, np.ndarray]
    torch: np.ndarray
    flax: np.ndarray
    beside: str = ""


Kind = Callable[[Problem], Iterator[Family | str]]
"""The families that fit a problem, or causes that need no search."""


class Purse:
    """What a search may still cost."""

    def __init__(self) -> None:
        self._numbers, self._trials = _PURSE, _TRIALS

    def pay(self, cost: float) -> bool:
        """Whether there was enough for one more trial."""
        self._numbers -= cost
        self._trials -= 1
        return self._numbers >= 0 and self._trials >= 0


def explain_by_families(
    known: Mapping[str, np.ndarray],
    torch: np.ndarray,
    flax: np.ndarray,
    like: Like,
    kinds: Sequence[Kind],
) -> Iterator[str]:
    """In which settings of an expression of `known` torch's tensor and Flax's differ.

    Args: as for `glue.explain_glue`.
        kinds: are asked one after the other.
    """
    whole = _problem(known, torch, flax, like)
    if whole is None or not magnitude(whole.torch):
        return
    purse = Purse()
    for problem in _views(whole):
        for kind in kinds:
            for family in kind(problem):
                told = isinstance(family, str)
                said = family if told else _settle(family, problem, purse)
                if said is not None:
                    yield said + problem.beside
                    return


def _problem(
    known: Mapping[str, np.ndarray], torch: np.ndarray, flax: np.ndarray, like: Like
) -> Problem | None:
    """A few examples of it in torch's layout; None where Flax's tensor has not torch's numbers'
    places."""
    if len({array.shape[:1] for array in (torch, flax, *known.values())}) == 1 and torch.ndim:
        some = max(1, _ENOUGH * len(torch) // max(torch.size, 1))
        known = {name: array[:some] for name, array in known.items()}
        torch, flax = torch[:some], flax[:some]
    places = lay_safely(like(torch, flax), np.arange(torch.size, dtype=float).reshape(torch.shape))
    if places is None or places.shape != flax.shape:
        return None
    places = places.ravel().astype(int)
    if not np.array_equal(np.sort(places), np.arange(torch.size)):
        return None
    moved = np.empty(torch.size, flax.dtype)
    moved[places] = flax.ravel()
    return Problem(known, torch, moved.reshape(torch.shape))


def _views(whole: Problem) -> Iterator[Problem]:
    """The problem as it is, for the channels that differ, and without a term of a sum."""
    yield whole
    for axis in dict.fromkeys((1, whole.torch.ndim - 1)):
        if 0 < axis < whole.torch.ndim:
            yield from _narrowed(whole, axis)
    for name, term in [*whole.known.items()][::-1][:_TERMS]:
        same = term.shape == whole.torch.shape
        if same and not near(term, whole.torch) and not near(term, whole.flax):
            torch, flax = whole.torch - term, whole.flax - term
            yield replace(whole, torch=torch, flax=flax, beside=f", beside {name}")


def _narrowed(whole: Problem, axis: int) -> Iterator[Problem]:
    """Where torch and Flax agree in the first or the last channels, the others: one part of a
    concatenation."""
    own, flax = (
        np.moveaxis(a, axis, 0).reshape(a.shape[axis], -1) for a in (whole.torch, whole.flax)
    )
    differ = np.flatnonzero([not near(a, b) for a, b in zip(own, flax, strict=True)])
    if not differ.size or np.ptp(differ) == len(own) - 1:  # dead channels among them may agree
        return
    part = [slice(None)] * whole.torch.ndim
    part[axis] = slice(differ[0], differ[-1] + 1)
    index = tuple(part)
    where = f", at {differ[0]}–{differ[-1]} of axis {axis} in torch"
    yield replace(whole, torch=whole.torch[index], flax=whole.flax[index], beside=where)


def _settle(family: Family, problem: Problem, purse: Purse) -> str | None:
    """The settings in which torch and Flax differ, in words."""
    if not magnitude(problem.torch) or not magnitude(problem.flax):
        return None  # zeros are made in many ways
    if near(problem.torch, problem.flax, _APART * family.slack):
        return None  # too near to tell one from another
    names = list(family.choices)
    lists = [family.tried.get(name, family.choices[name]) for name in names]
    for values in product(*lists):
        own = dict(zip(names, values, strict=True))
        gives = _gives(family, own, problem.torch, NEAR, purse)
        if gives is None:
            return None
        if gives:
            flax = _changed_to(family, own, problem.flax, purse)
            return None if flax is None else family.difference(own, flax)
    return None


def _changed_to(family: Family, own: Settings, flax: np.ndarray, purse: Purse) -> Settings | None:
    """The settings that give Flax's tensor, the fewest others than torch's."""
    others = {n: [v for v in values if v != own[n]] for n, values in family.choices.items()}
    for count in range(1, _CHANGES + 1):
        for names in combinations(others, count):
            for values in product(*(others[name] for name in names)):
                changed = own | dict(zip(names, values, strict=True))
                gives = _gives(family, changed, flax, family.slack, purse)
                if gives is None:
                    return None
                if gives:
                    return changed
    return None


def _gives(
    family: Family, settings: Settings, wanted: np.ndarray, slack: float, purse: Purse
) -> bool | None:
    """Whether the settings give the tensor; None where the purse is empty."""
    for few, cost in ((True, family.few_cost), (False, family.cost)):
        if not purse.pay(cost):
            return None
        try:
            with np.errstate(all="ignore"):
                where, value = family.make(settings, few)
            sought = wanted[where]
        except UNFIT:
            return False
        if not near(value, sought, slack):
            return False
        if where is ...:  # that was all of it
            break
    return True


def few_places(shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """The index of some numbers of a tensor, spread over all of it."""
    size = int(np.prod(shape))
    flat = np.random.default_rng(0).choice(size, min(size, 64), replace=False)
    return np.unravel_index(flat, shape)
