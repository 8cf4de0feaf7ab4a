"""Writing files whole or not at all, and where those go that can be made again."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to in the same folder, that takes the place of `path` at the end, or vanishes on an error.

    A reader thus finds the old file or the new one, never a part of it. The suffix stays that of `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def default_cache_dir() -> Path:
    """The folder named by `$GRIDREG_CACHE`, else `~/.cache/gridreg_jax`."""
    return Path(os.environ.get("GRIDREG_CACHE") or "~/.cache/gridreg_jax").expanduser()
