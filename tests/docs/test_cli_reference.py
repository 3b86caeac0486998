"""The reference of the command line says what the command line says."""

import os
from pathlib import Path

from hypervisor.ctl.reference import every_command, reference

PAGE = Path(os.environ.get("CLI_REFERENCE", "docs/guide/cli.md"))


def test_the_page_is_what_the_commands_say():
    assert PAGE.read_text(encoding="utf-8") == reference(), (
        "run: python -m hypervisor.ctl.reference > docs/guide/cli.md"
    )


def test_every_command_of_the_tree_is_there():
    paths = {" ".join(path) for path in every_command()}

    expected = (
        "node list, node get, node drain, node cordon, node uncordon, node deregister, instance list, instance get, "
        "instance create, instance start, instance stop, instance restart, instance delete, instance stats, "
        "instance console, operation list, operation get, operation wait, operation cancel, cluster info, version, "
        "dev up, dev down, dev status, dev image, dev guest, events, completion, context list, context use, "
        "context set, context delete, context show"
    )
    assert paths >= set(expected.split(", "))
