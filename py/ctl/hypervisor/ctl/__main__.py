"""The program: parse, run, and turn every outcome into an exit code (see ``failures``)."""

import gc
import os
import sys
from typing import TYPE_CHECKING, NoReturn

from hypervisor.ctl import lazygrpc

if TYPE_CHECKING:
    import click

    from hypervisor.core.errors import HypervisorError
    from hypervisor.ctl.invocation import Invocation

__all__ = ["main", "run"]


def main() -> NoReturn:
    """Run with the arguments of the process, and end it with the exit code."""
    # A command ends before a collection could pay: what is imported stays until the end.
    gc.disable()
    lazygrpc.silence_core()
    lazygrpc.defer()
    code = run(sys.argv[1:])
    _flush()
    # Connections are closed and output is flushed; taking the interpreter apart would only cost time.
    os._exit(code)


def run(arguments: list[str], *, invocation: "Invocation | None" = None) -> int:
    """Run with these arguments and return the exit code; prints errors, raises nothing but programming errors."""
    import click

    from hypervisor.core.errors import HypervisorError
    from hypervisor.ctl import failures
    from hypervisor.ctl.app import PROGRAM, cli
    from hypervisor.ctl.invocation import Invocation

    state = invocation or Invocation()
    try:
        # Exit codes of click itself (--help: 0) come back as the result.
        result = cli.main(arguments, prog_name=PROGRAM, standalone_mode=False, obj=state)
        return result if isinstance(result, int) else failures.OK
    except HypervisorError as exc:
        _report(exc, state)
        return failures.exit_code(exc)
    except click.UsageError as exc:
        _report_usage(exc, state)
        return failures.USAGE
    except click.ClickException as exc:
        exc.show()
        return failures.FAILURE
    except click.Abort as exc:  # what click makes of an interruption, after a line break on standard error
        _report_interrupt(exc.__cause__)
        return failures.INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (| head): nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return failures.FAILURE
    finally:
        state.close()


def _report(error: "HypervisorError", invocation: "Invocation") -> None:
    from hypervisor.ctl import failures

    as_json = invocation.output == "json"
    print(failures.as_json(error) if as_json else failures.as_text(error), file=sys.stderr)


def _report_usage(error: "click.UsageError", invocation: "Invocation") -> None:
    if invocation.output == "json":
        from hypervisor.core.errors import InvalidArgument

        _report(InvalidArgument(error.format_message(), reason="USAGE"), invocation)
        return
    lines = [f"Error: {error.format_message()}"]
    if error.ctx is not None:
        lines.append(f"Next: {error.ctx.command_path} --help")
    print("\n".join(lines), file=sys.stderr)


def _report_interrupt(cause: BaseException | None) -> None:
    operation_id = getattr(cause, "operation_id", "")
    if operation_id:
        print(f"Interrupted; it goes on: hypervisor-ctl operation wait {operation_id}", file=sys.stderr)


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.stderr.flush()


if __name__ == "__main__":
    main()
