"""A sum over programs whose next scores are issued an iteration ahead.

Comes in: what `gluon_spread` takes. Goes out: the same kernel with its loop rotated. There, an iteration ends with
nothing left to multiply, waits for the others' weights and issues its part of their product and its own first scores.
Here those come at the end of the iteration before, behind its last sum:

    the other products; weights; first sum; wait for the others' weights, store one's own; last sum;
    the part of the tile before; the next iteration's first scores; wait for the sums; store the part

and the part is sent off then, or behind the other products of the next iteration; so that the tensor cores have work
while a warpgroup waits for its sums, hands tiles back and begins anew. The price is registers: the next scores are held
beside the sums and the part.
"""

from __future__ import annotations

from functools import cached_property

from einscade.codegen.gluon_chain import Iteration
from einscade.codegen.gluon_form import WeightedSum
from einscade.codegen.gluon_spread import ARRIVE, FENCE, SpreadChain
from einscade.codegen.gluon_values import Printer

__all__ = ["AheadChain"]


class AheadChain(SpreadChain):
    """The kernel of a form with a sum of its programs, whose first scores an iteration gets from the one before."""

    late = ()

    @cached_property
    def ahead(self) -> tuple[str, ...]:
        """The products that are issued in the iteration before: those that the first sum needs."""
        needed = self._needed(self.order[0][0].weights)
        return tuple(s for s in self.order[1] if s in needed)

    def _step_arguments(self) -> list[str]:
        return [*super()._step_arguments(), "count"]

    def _running(self) -> list[str]:
        return [*(self.name(s) for s in self.ahead), *super()._running()]

    def _begin(self) -> list[str]:
        """The scores of the tile that is visited first; every program has one."""
        it = Iteration(stage="0", phase="0")
        counted = [] if self.listed else [f"count = {self._count()}"]
        return [*counted, *self._issue_ahead(it), self._await_ahead()]

    def _issue_ahead(self, it: Iteration) -> list[str]:
        return [line for score in self.ahead for line in self._issue_product(score, it)]

    def _await_ahead(self) -> str:
        names = [self.name(s) for s in self.ahead]
        return self._waited(0, names, names)

    @property
    def left(self) -> bool:
        """Whether what waits for stores stands behind products, and the part is left to the next iteration to send off:
        it gains where masks are behind a branch, and loses where whole tiles have a loop of their own."""
        return not self.split

    def _issue_products(self, it: Iteration) -> list[str]:
        """The first scores are there, and so are their tiles."""
        rings = dict.fromkeys(self.ring(x.moving) for x in self.shape.products if x.score.name in self.ahead)
        it.seen |= {r.name for r in rings}
        lines = [f"{r.name}_tile = {self._view(r, 'stage')}" for r in rings]
        lines += [line for s in self.order[1] if s not in self.ahead for line in self._issue_product(s, it)]
        return [*lines, *self._unsent()]

    def _await_score(self, name: str, it: Iteration) -> list[str]:
        return [] if name in self.ahead else super()._await_score(name, it)

    def _keep_weights(self, x: WeightedSum, printer: Printer) -> list[str]:
        """Nobody reads any more what was in their place two iterations ago."""
        *lines, converted = super()._keep_weights(x, printer)
        return [*self._await_others(), *lines, *([] if self.left else [FENCE]), converted]

    def _behind(self, x: WeightedSum) -> list[str]:
        """Everybody may read the weights only when the part before them is multiplied, too."""
        return [FENCE] if self.left and x.weights == self.spread.weights else []

    def _complete(self, it: Iteration) -> list[str]:
        """What is multiplied behind the last sum; everything is waited for in the order in which it was issued."""
        *sums, last = self.order[0]
        following = Iteration(it.flying, stage="next_stage", phase="next_phase", there="iteration + 1 < count")
        return [
            *(line for x in sums for line in self._await_sum(x, it)),
            *self._multiply_part(it),
            *self._stage_after(),
            *self._issue_ahead(following),
            *self._await_sum(last, it),
            self._await(it, "part"),
            *self._store_part(),
            *([] if self.left else self._send(1)),
            ARRIVE,
            self._await_ahead(),
        ]

    def _unsent(self) -> list[str]:
        return self._send(2) if self.left else []
