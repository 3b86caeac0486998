"""``completion``."""

import click
from click.shell_completion import get_completion_class

from hypervisor.ctl.app import PROGRAM, cli
from hypervisor.ctl.output import write

__all__ = ["COMPLETE_VARIABLE", "completion"]

COMPLETE_VARIABLE = "_HYPERVISOR_CTL_COMPLETE"
"""The environment variable by which the scripts ask this program for completions; click derives it from the name."""


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that lets a shell complete commands, options and names.

    \b
    bash:  source <(hypervisor-ctl completion bash)          in ~/.bashrc
    zsh:   source <(hypervisor-ctl completion zsh)           in ~/.zshrc
    fish:  hypervisor-ctl completion fish | source           in ~/.config/fish/config.fish
    """
    maker = get_completion_class(shell)
    if maker is None:
        raise click.UsageError(f"{shell} is not supported")
    # Not BashComplete.source(): it starts a bash to check its version.
    write(maker.source_template % maker(cli, {}, PROGRAM, COMPLETE_VARIABLE).source_vars())
