"""``instance``: the group."""

import click

from hypervisor.ctl.lazygroup import LazyGroup, Place

__all__ = ["instance"]


@click.group(
    cls=LazyGroup,
    places={
        "list": Place("instance_views:list_instances", "Show instances."),
        "get": Place("instance_views:get_instance", "Show one instance, and what its driver cannot do."),
        "create": Place("instance_create:create", "Create an instance from options or a file."),
        "explain": Place("instance_explain:explain", "Show why an instance is on its node."),
        "start": Place("instance_actions:start", "Start stopped instances."),
        "stop": Place("instance_actions:stop", "Stop instances: politely, then by force."),
        "restart": Place("instance_actions:restart", "Stop instances and start them again."),
        "update": Place("instance_update:update", "Change how much processor and memory an instance has."),
        "pause": Place("instance_states:pause", "Freeze running instances in memory."),
        "resume": Place("instance_states:resume", "Let paused instances go on."),
        "suspend": Place("instance_states:suspend", "Put the memory of instances on disk and end them."),
        "snapshot": Place("instance_snapshots:snapshot", "Keep states of an instance, and go back to them."),
        "move": Place("instance_move:move", "Move instances to other nodes."),
        "delete": Place("instance_actions:delete", "Remove instances and everything they use."),
        "stats": Place("instance_stats:stats", "Show what an instance uses."),
        "console": Place("instance_console:console", "Attach to the terminal of an instance."),
        "logs": Place("instance_logs:logs", "Print what an instance printed on its console."),
    },
)
def instance() -> None:
    """Virtual machines, containers and microVMs: the same commands for all of them."""
