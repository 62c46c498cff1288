"""Fixed device buffers that hold the live plans, with reference-counted slots.

A part of a plan takes one slot; parts with the same digest share it. Content changes when requests
come and go, addresses and sizes do not, so captured graphs and compiled code stay valid. A plan
that finds no room is not an error: the caller keeps the request waiting.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from trimtab.kernels import LayerBank
from trimtab.steering.bank_room import Needs, check_fits
from trimtab.steering.goal_table import GoalTable
from trimtab.steering.plan import MAX_RANK, Gate, Guide, Part, Plan
from trimtab.steering.reader_shelf import ReaderShelf


@dataclass(frozen=True, eq=False)
class Lease:
    """A plan's hold on the bank: one slot a part, in the plan's order."""

    plan: Plan
    slots: tuple[int, ...]


class Bank:
    """Buffers for every live plan of one model.

    Args:
        n_layers: decoder layers.
        hidden_size: width of the residual stream.
        device: where the buffers live.
        max_slots: live distinct parts, the null slot not counted.
        max_rows: live (part, layer) additive rows; default a row a slot and layer, at most
            what fits in 256 MiB but never less than four plans on all layers.
        max_low_rank: live low-rank pairs; default likewise within 256 MiB for both factors.
        max_guides: live guides (a classifier's labels and steps at a layer).
    """

    def __init__(
        self,
        *,
        n_layers: int,
        hidden_size: int,
        device: torch.device | str = "cpu",
        max_slots: int = 256,
        max_rows: int | None = None,
        max_low_rank: int | None = None,
        max_guides: int | None = None,
    ) -> None:
        fits = 2**28 // (4 * hidden_size)
        if max_rows is None:
            max_rows = max(4 * n_layers, min(max_slots * n_layers, fits))
        if max_low_rank is None:
            max_low_rank = max(4 * n_layers, min(16 * n_layers, fits // 2))
        self.n_layers = n_layers
        self.hidden_size = hidden_size
        self.device = torch.device(device)
        self.max_slots = max_slots

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=self.device)

        self.rows = zeros(max_rows + 1, hidden_size)
        self.low_a = zeros(max_low_rank + 1, hidden_size)
        self.low_b = zeros(max_low_rank + 1, hidden_size)
        self.row_of = zeros(n_layers, max_slots + 1, dtype=torch.int64)
        self.low_of = zeros(n_layers, max_slots + 1, MAX_RANK, dtype=torch.int64)
        self.norm = zeros(n_layers, max_slots + 1, dtype=torch.bool)
        self._views = tuple(
            LayerBank(
                rows=self.rows,
                row_of=self.row_of[index],
                norm=self.norm[index],
                low_a=self.low_a,
                low_b=self.low_b,
                low_of=self.low_of[index],
            )
            for index in range(n_layers)
        )
        # Host copies, so that planning a step never waits for the device.
        self.touches = np.zeros((n_layers, max_slots + 1), dtype=bool)
        self.has_low_rank = np.zeros((n_layers, max_slots + 1), dtype=bool)
        self.has_norm = np.zeros((n_layers, max_slots + 1), dtype=bool)
        self.gates: dict[int, Gate] = {}
        # Guides of a slot, with their rows of the goals' table, by (layer, slot).
        self.guides: dict[tuple[int, int], tuple[tuple[Guide, int], ...]] = {}
        self.has_guides = np.zeros((n_layers, max_slots + 1), dtype=bool)
        self.max_guides = max_guides if max_guides is not None else 4 * max_slots
        self.goals = GoalTable(self.max_guides, device=self.device)
        self.readers = ReaderShelf(self.device)

        self._free_slots = list(range(max_slots, 0, -1))
        self._free_rows = list(range(max_rows, 0, -1))
        self._free_low = list(range(max_low_rank, 0, -1))
        self._slot_of: dict[str, int] = {}
        self._held: dict[int, _Held] = {}
        self._leases: set[Lease] = set()
        self.max_rows = max_rows
        self.max_low_rank = max_low_rank

    def holds(self, lease: Lease) -> bool:
        """Return whether a lease has not been released."""
        return lease in self._leases

    @property
    def n_live(self) -> int:
        """Slots in use."""
        return len(self._held)

    def layer(self, index: int) -> LayerBank:
        """Return the op's view of one layer; the tensors are the bank's own, not copies."""
        return self._views[index]

    @property
    def size(self) -> Needs:
        """All it can hold."""
        return Needs(self.max_slots, self.max_rows, self.max_low_rank, self.max_guides)

    def check_fits(self, plan: Plan, *, param: str = "steering") -> None:
        """Refuse a plan that could never be held, even by an empty bank.

        Raises:
            SpecError: it needs more rows or low-rank pairs than the bank has.
        """
        check_fits(plan, self.size, param=param)

    def acquire(self, plan: Plan) -> Lease | None:
        """Hold a plan's parts, or return None (and change nothing) while there is no room."""
        new = {part.digest: part for part in plan.parts if part.digest not in self._slot_of}
        free = Needs(
            len(self._free_slots), len(self._free_rows), len(self._free_low), self.goals.n_free
        )
        if not Needs.of(list(new.values())).within(free):
            return None
        slots = []
        for part in plan.parts:
            slot = self._slot_of.get(part.digest)
            if slot is None:
                slot = self._write(part)
            self._held[slot].count += 1
            slots.append(slot)
        lease = Lease(plan, tuple(slots))
        self._leases.add(lease)
        return lease

    def release(self, lease: Lease) -> None:
        """Let go of a lease; a slot nobody holds any more is cleared.

        Raises:
            ValueError: the lease is not held, as after a first release.
        """
        if lease not in self._leases:
            raise ValueError("this lease is not held; was it released before?")
        self._leases.remove(lease)
        for slot in lease.slots:
            held = self._held[slot]
            held.count -= 1
            if held.count == 0:
                self._clear(slot)

    def _write(self, part: Part) -> int:
        slot = self._free_slots.pop()
        held = _Held(part.digest)
        for layer, term in part.layers.items():
            self.touches[layer, slot] = term.has_change
            if term.guides:
                self.has_guides[layer, slot] = True
                self.guides[layer, slot] = tuple(
                    (guide, self.goals.write(guide)) for guide in term.guides
                )
                for guide in term.guides:
                    self.readers.hold(guide.reader)
            if term.add is not None:
                row = self._free_rows.pop()
                held.rows.append(row)
                self.rows[row] = term.add.to(self.device)
                self.row_of[layer, slot] = row
            if term.low_a is not None and term.low_b is not None:
                for k, (a, b) in enumerate(zip(term.low_a, term.low_b, strict=True)):
                    pair = self._free_low.pop()
                    held.low.append(pair)
                    self.low_a[pair] = a.to(self.device)
                    self.low_b[pair] = b.to(self.device)
                    self.low_of[layer, slot, k] = pair
                self.has_low_rank[layer, slot] = True
            if term.normalize:
                self.norm[layer, slot] = True
                self.has_norm[layer, slot] = True
        if part.gate is not None:
            self.gates[slot] = part.gate
            self.readers.hold(part.gate.reader)
        self._slot_of[part.digest] = slot
        self._held[slot] = held
        return slot

    def _clear(self, slot: int) -> None:
        held = self._held.pop(slot)
        del self._slot_of[held.digest]
        gate = self.gates.pop(slot, None)
        if gate is not None:
            self.readers.drop(gate.reader)
        for layer in np.flatnonzero(self.has_guides[:, slot]).tolist():
            for guide, row in self.guides.pop((layer, slot)):
                self.goals.free(row)
                self.readers.drop(guide.reader)
        for table in (self.touches, self.has_low_rank, self.has_norm, self.has_guides):
            table[:, slot] = False
        for buffer in (self.row_of, self.low_of, self.norm):
            buffer[:, slot] = 0
        self._free_rows.extend(held.rows)
        self._free_low.extend(held.low)
        self._free_slots.append(slot)


class _Held:
    def __init__(self, digest: str) -> None:
        self.digest = digest
        self.count = 0
        self.rows: list[int] = []
        self.low: list[int] = []
