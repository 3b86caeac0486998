"""Required terms across servers: how two servers that place at the same time do not break one together.

A placement compares the node it chose, so two on one node always notice each other. Two on different nodes do not, and
may break a term over a wider place (a zone), or both be the first of a group that wants to be together. So such terms
are entered in a register before an instance that has one is placed, every placement compares the register, and those
that a term in it is about also write it: of any two of these one thinks again, on a view that has the other.

That the register is ahead of the placements it is about matters: a placement that was made without knowing of the term
was committed before it was entered, and is in the view of whoever places after that.
"""

from collections.abc import Mapping

from msgspec import structs

from hypervisor.core.errors import Conflict, Unavailable
from hypervisor.core.model import HOSTNAME_LABEL
from hypervisor.server import keys
from hypervisor.server.drafts import Draft
from hypervisor.server.records import HeldTerm, PlacementTerms
from hypervisor.server.scheduler.contract import PlacedInstance, matches
from hypervisor.server.services import InstanceDraft

__all__ = ["UNREGISTERED", "enter_terms", "guard_terms", "terms_to_enter"]

UNREGISTERED = "PLACEMENT_TERMS_UNREGISTERED"
_CLEANED_FROM = 64
"""So many terms in the register, and those that nobody has any more are removed with the next that is entered."""


def terms_to_enter(order: InstanceDraft) -> tuple[HeldTerm, ...]:
    """The terms of an instance that have to be in the register before it is placed."""
    spec = order.spec
    wide = [t for t in spec.anti_affinity if not t.preferred and t.topology != HOSTNAME_LABEL]
    # One that is waived for the first of a group.
    own = [t for t in spec.affinity if not t.preferred and matches(t.selector, order.labels)]
    return tuple(HeldTerm(project=order.project, term=term) for term in dict.fromkeys((*wide, *own)))


def enter_terms(draft: Draft, order: InstanceDraft, placed: Mapping[str, PlacedInstance]) -> None:
    """Enter the terms of the instance. ``placed`` tells which terms somebody has."""
    found = draft.get(keys.PLACEMENT_TERMS)
    register = PlacementTerms() if found is None else found.value
    kept = register.terms
    if len(kept) >= _CLEANED_FROM:
        held = {HeldTerm(project=p.project, term=term) for p in placed.values() for term in p.refuses}
        kept = tuple(one for one in kept if one in held)
    new = tuple(one for one in terms_to_enter(order) if one not in kept)
    draft.put(
        keys.PLACEMENT_TERMS,
        structs.replace(register, terms=(*kept, *new), placements=register.placements + 1),
    )


def guard_terms(draft: Draft, order: InstanceDraft, *, node_id: str) -> None:
    """Have the placement on the node committed only if no other that a term is about comes between.

    Raises ``Conflict`` (:data:`UNREGISTERED`) where the instance's terms are not in the register (any more), and
    ``Unavailable`` (``VIEW_BEHIND``) where what was learned from a conflict is not yet in the view.
    """
    found = draft.get(keys.PLACEMENT_TERMS)
    register = PlacementTerms() if found is None else found.value
    own = terms_to_enter(order)
    if any(one not in register.terms for one in own):
        raise Conflict("the instance's terms are to be entered first", reason=UNREGISTERED)
    spec = order.spec
    if not (order.labels or spec.affinity or spec.anti_affinity):
        return
    known = draft.batch.known
    if known.ahead(keys.PLACEMENT_TERMS.path) or known.ahead(keys.allocation(node_id).path):
        raise Unavailable(
            "this server has not yet seen a placement that it heard of: try again",
            reason="VIEW_BEHIND",
            retry_after_s=1.0,
        )
    about = (
        one
        for one in register.terms
        if one.project == order.project and matches(one.term.selector, order.labels)
    )
    if own or any(True for _ in about):
        draft.put(keys.PLACEMENT_TERMS, structs.replace(register, placements=register.placements + 1))
