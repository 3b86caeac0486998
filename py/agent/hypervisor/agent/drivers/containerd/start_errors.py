"""What a failed start means to the user. Pure.

runc's refusals reach us as text; those that the instance's specification causes become InvalidArgument of its field.
"""

import re

from hypervisor.core.errors import FailedPrecondition, HypervisorError, InvalidArgument

__all__ = ["explain_start_failure"]

_NO_PROGRAM = re.compile(
    r'exec: "(?P<program>[^"]*)": (?P<why>executable file not found in \$PATH'
    r"|(?:stat \S+: )?no such file or directory|permission denied|is a directory)"
)
_EXEC_FORMAT = re.compile(r"exec format error")
_TOO_LITTLE_MEMORY = re.compile(
    r"memory limit too low|OOM-killed|failed to write .*memory\.(limit_in_bytes|max)"
)
_WORKING_DIR = re.compile(
    r"(?:chdir to cwd .*|container init: mkdir \S+): ?(?P<why>permission denied|not a directory|no such file)"
)


def explain_start_failure(error: HypervisorError) -> HypervisorError:
    """The same error, or a clearer one for what a changed specification can mend."""
    if not isinstance(error, FailedPrecondition) or error.reason != "RUNTIME_REFUSED":
        return error
    details = error.metadata.get("details", "")
    if found := _NO_PROGRAM.search(details):
        return InvalidArgument.of_field(
            "spec.command",
            f"the image cannot run {found['program']!r} ({found['why']}): name a program that is in it",
            reason="COMMAND_NOT_FOUND",
        )
    if _EXEC_FORMAT.search(details):
        return InvalidArgument.of_field(
            "spec.command", "the program is not for this machine's architecture", reason="COMMAND_NOT_FOUND"
        )
    if _TOO_LITTLE_MEMORY.search(details):
        return InvalidArgument.of_field(
            "spec.memory_mb", "is too small to start the program: raise it", reason="MEMORY_TOO_SMALL"
        )
    if found := _WORKING_DIR.search(details):
        return InvalidArgument.of_field(
            "spec.working_dir",
            f"the program cannot begin there ({found['why']})",
            reason="WORKING_DIR_UNUSABLE",
        )
    return error
