"""The context of a development cluster in the configuration file: made by ``dev up``, removed by ``dev down``."""

from collections.abc import Mapping

from hypervisor.ctl import settings
from hypervisor.ctl.dev.plan import CONTEXT, Plan

__all__ = ["forget_context", "previous_context", "use_context"]


def previous_context(environ: Mapping[str, str]) -> str:
    """The context in use now, for a later return to it; empty where there is none, or it is that of a dev cluster."""
    current = settings.load(settings.config_path(environ)).current
    return current if current and current != CONTEXT else ""


def use_context(environ: Mapping[str, str], plan: Plan) -> None:
    """Make the context of the cluster and use it."""
    known = settings.load(settings.config_path(environ))
    contexts = {**known.contexts, CONTEXT: settings.Context(server=plan.server_address)}
    settings.save(known._replace(current=CONTEXT, contexts=contexts))


def forget_context(environ: Mapping[str, str], plan: Plan) -> None:
    """Remove the context of the cluster, and go back to the one before, unless it was pointed elsewhere since."""
    known = settings.load(settings.config_path(environ))
    mine = known.contexts.get(CONTEXT)
    if mine is None or mine.server != plan.server_address:
        return
    contexts = {name: value for name, value in known.contexts.items() if name != CONTEXT}
    current = known.current
    if current == CONTEXT:
        current = plan.previous_context if plan.previous_context in contexts else None
    settings.save(known._replace(current=current, contexts=contexts))
