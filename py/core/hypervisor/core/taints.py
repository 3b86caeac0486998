"""Taints as people write them: ``gpu:no_schedule``, ``gpu=yes:prefer_no_schedule``. ``str(taint)`` is the way back."""

from hypervisor.core.model import Taint
from hypervisor.core.names import check_labels, shorten
from hypervisor.core.states import TaintEffect

__all__ = ["parse_taint"]


def parse_taint(text: str) -> Taint:
    """The taint that the text means. ValueError says how to write it."""
    label, colon, effect = text.strip().rpartition(":")
    key, _, value = label.partition("=")
    known = [member.value for member in TaintEffect]
    if not colon or not key or effect not in known:
        raise ValueError(
            f"{shorten(text)}: write KEY:EFFECT or KEY=VALUE:EFFECT, EFFECT one of {', '.join(known)}"
        )
    wrong = check_labels("taint", {key: value})
    if wrong:
        raise ValueError(f"{shorten(text)}: {wrong[0].description}")
    return Taint(key=key, value=value, effect=TaintEffect(effect))
