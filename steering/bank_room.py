"""What plans need of a bank, and whether a bank has room: the accounting without the buffers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.steering.errors import SpecError
from trimtab.steering.plan import Part, Plan


@dataclass(frozen=True)
class Needs:
    """Places in a bank: slots, additive rows, low-rank pairs, guides."""

    slots: int
    rows: int
    low: int
    guides: int

    @classmethod
    def of(cls, parts: Sequence[Part]) -> Needs:
        """Return what parts need that share nothing."""
        terms = [term for part in parts for term in part.layers.values()]
        return cls(
            slots=len(parts),
            rows=sum(term.add is not None for term in terms),
            low=sum(len(term.low_a) for term in terms if term.low_a is not None),
            guides=sum(len(term.guides) for term in terms),
        )

    def within(self, other: Needs) -> bool:
        """Return whether there is enough of everything in `other`."""
        return all(mine <= its for mine, its in zip(self._all(), other._all(), strict=True))

    def plus(self, other: Needs, *, times: int = 1) -> Needs:
        """Return the sum with `times` times another."""
        pairs = zip(self._all(), other._all(), strict=True)
        return Needs(*(mine + times * its for mine, its in pairs))

    def _all(self) -> tuple[int, int, int, int]:
        return self.slots, self.rows, self.low, self.guides

    def __str__(self) -> str:
        return (
            f"{self.slots} slots, {self.rows} rows, {self.low} low-rank pairs and "
            f"{self.guides} guides"
        )


def check_fits(plan: Plan, have: Needs, *, param: str = "steering") -> None:
    """Refuse a plan that could never be held, even by an empty bank of this size.

    Raises:
        SpecError: it needs more rows or low-rank pairs than the bank has.
    """
    need = Needs.of(plan.parts)
    if not need.within(have):
        raise SpecError(
            f"{param} needs {need}; this server has {have}. Name fewer layers.", param=param
        )


class BankRoom:
    """Keeps account of a bank that is elsewhere, such as in another process.

    Args:
        size: the bank's.
    """

    def __init__(self, size: Needs) -> None:
        self.size = size
        self._used = Needs(0, 0, 0, 0)
        self._holders: Counter[str] = Counter()

    @property
    def used(self) -> Needs:
        """What is taken."""
        return self._used

    def take(self, plan: Plan) -> bool:
        """Take a plan's places; return False (and change nothing) while there is no room."""
        new = {part.digest: part for part in plan.parts if not self._holders[part.digest]}
        after = self._used.plus(Needs.of(list(new.values())))
        if not after.within(self.size):
            return False
        self._used = after
        self._holders.update(part.digest for part in plan.parts)
        return True

    def give_back(self, plan: Plan) -> None:
        """Give a taken plan's places back."""
        self._holders.subtract(part.digest for part in plan.parts)
        freed = {part.digest: part for part in plan.parts if self._holders[part.digest] <= 0}
        for digest in freed:
            del self._holders[digest]
        self._used = self._used.plus(Needs.of(list(freed.values())), times=-1)
