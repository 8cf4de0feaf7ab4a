"""What the programs share: set-up of the process, and one line instead of a traceback for user mistakes."""

import atexit
import gc
import socket
import sys
from collections.abc import Callable

from absl import app, flags, logging

from gridreg_jax.errors import InputError
from gridreg_jax.memory import limit_freed_memory


def main(function: Callable) -> None:
    """Run a program: parse flags, call `function(argv)`, exit with 2 and one line on a user's mistake."""

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            fail(f"unexpected argument {argv[1]!r}: options are written --name=value")
        logging.set_verbosity(logging.WARNING)
        prepare_process()
        try:
            function(argv)
        except (InputError, FloatingPointError, OSError) as error:
            # OSError: a config that is not there (found when it is used), a folder that cannot be written, a full disk.
            fail(error)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    app.run(guarded, flags_parser=_parse_flags)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    # A config file is read, and its values are replaced, while flags are parsed.
    except (AttributeError, KeyError) as error:
        # Quoted once or more, with what that does to quotes and line ends.
        text = str(error.args[0] if error.args else error).replace("\\n", "\n").replace("\n", ". ")
        text = text.translate(dict.fromkeys(map(ord, "\\\"'")))
        fail(f"the config has no such option: {text}")
    except (flags.Error, TypeError, ValueError, OSError) as error:
        # The message of a config that refuses its argument comes as the last line of a traceback.
        before, _, refusal = str(error).rpartition("\nValueError: ")
        fail(refusal if "Traceback (most recent call last)" in before else error)


def fail(message: object) -> None:
    """One line on standard error, and exit status 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def prepare_process() -> None:
    """Keep compiled programs (`programs.keep`), and little freed memory; start and end without a search for cycles."""
    limit_freed_memory()
    # JAX's many objects stay: to look for cycles among them while they come, and at the end, takes a third of a second.
    gc.disable()
    from gridreg_jax import programs  # brings JAX

    gc.freeze()
    gc.enable()
    atexit.register(gc.freeze)
    programs.keep()


def join_processes(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Join the other processes of a run on several hosts, before JAX is used; nothing without a coordinator.

    Args:
      coordinator: "host:port" of process 0; "auto" for what JAX finds out on a cluster that it knows.
      processes, process: how many there are, and which this one is; not with "auto".

    Raises:
      InputError: one without the others, no such cluster or coordinator, or a port that another program has.
    """
    explicit = (processes, process)
    if coordinator is None and explicit != (None, None):
        raise InputError("--processes and --process need --coordinator=host:port")
    if coordinator is None:
        return
    if coordinator != "auto" and None in explicit:
        raise InputError("--coordinator=host:port needs --processes (how many) and --process (which one, from 0)")
    if coordinator == "auto" and explicit != (None, None):
        raise InputError("--coordinator=auto finds --processes and --process by itself: leave them out")
    if process == 0:
        # JAX would crash where another program has the port, and share it with another run of JAX.
        try:
            socket.create_server(("", int(coordinator.rpartition(":")[2]))).close()
        except (OSError, OverflowError, ValueError) as error:
            raise InputError(f"--coordinator={coordinator}: that port cannot be used here ({error})") from error
    import jax

    try:
        jax.distributed.initialize(*(() if coordinator == "auto" else (coordinator, *explicit)))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"--coordinator={coordinator}: the processes did not find each other ({reason})") from error
