"""Functions whose programs later processes find ready: neither traced nor compiled again."""

import functools
import hashlib
import os
import threading
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from gridreg_jax.files import default_cache_dir, replacing

# Of each function that a process holds at a time. On Linux a program for the CPU takes hundreds of the 65 530 mappings
# that a process may have, and the compiler dies without.
PROGRAMS = 32
# Bytes of the digest before each program that is kept.
DIGEST = 32
# The option that says what XLA leaves to that library of its own which also does sums.
LIBRARY = "xla_cpu_experimental_ynn_fusion_type"
# For the CPU. XLA would order what it runs for more cores than most computers have, at the cost of a third more memory;
# where vectors of 512 bits exist it takes half of them; and of its libraries, the one that is meant for convolutions
# uses one core, where the one that it would take otherwise uses all.
OPTIONS = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_cpu_prefer_vector_width": 512,
    LIBRARY: "LIBRARY_FUSION_TYPE_REDUCE",
}


def keep() -> None:
    """Keep compiled programs in the user's cache folder, unless JAX is told of another (JAX_COMPILATION_CACHE_DIR)."""
    if jax.config.jax_compilation_cache_dir:
        return
    jax.config.update("jax_compilation_cache_dir", str(default_cache_dir() / "xla"))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        # A registration has many small programs: each is read faster than it is compiled.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # Where something has been compiled before, JAX has settled that there is no cache.
    compilation_cache.reset_cache()


def compiler_options(*, library_sums: bool = True) -> dict[str, str | int]:
    """What XLA is told about this library's programs on the present platform.

    Args:
      library_sums: whether XLA may leave sums to one of its libraries. That one is several times as fast where many
        features are summed at once, as in the norms of a network, and as slow where there is much arithmetic on what is
        summed.
    """
    options = _known_options()
    return options if library_sums or LIBRARY not in options else options | {LIBRARY: ""}


@functools.cache
def _known_options() -> dict[str, str | int]:
    """Of `OPTIONS`, those that XLA knows."""
    if jax.default_backend() != "cpu":
        return {}
    if _are_known(OPTIONS):
        return OPTIONS
    return {name: value for name, value in OPTIONS.items() if _are_known({name: value})}


def _are_known(options: dict[str, str | int]) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):  # options and their values come and go with XLA's versions
            raise
        return False
    return True


class _Program:
    """A function of arguments of certain shapes, and the same compiled, once it is asked for."""

    def __init__(self, function: Callable, shapes, library_sums: bool):
        self.function, self._shapes, self._library_sums = function, shapes, library_sums
        self._compiled, self._compiling = None, threading.Lock()

    @property
    def compiled(self) -> Callable:
        # Whoever asks meanwhile waits. (`functools.cached_property` lets it compile too, or, before Python 3.12, all
        # other programs wait.)
        with self._compiling:
            if self._compiled is None:
                lowered = self.function.lower(*self._shapes)
                self._compiled = lowered.compile(compiler_options(library_sums=self._library_sums))
        return self._compiled


def stored(function: Callable, *, static_argnames: tuple[str, ...] = (), library_sums: bool = True) -> Callable:
    """`jax.jit`, whose traced programs are kept beside the compiled ones where there is a compilation cache.

    The cache of compiled programs is found by what was traced, and tracing a registration takes Python some seconds. A
    kept program is used as long as this library's source, JAX, its settings, Flax, Optax, the platform, the shapes and
    types of the arguments, and the static arguments are the same. Where one of these is of a class from elsewhere, or
    has a true attribute `runs_foreign_code`, nothing is kept: nobody would see that code change.

    What is returned has a function `load` of the same arguments (shapes and types will do: `jax.ShapeDtypeStruct`), by
    which another thread has a program ready before it is called. Within another function that is traced, it is a part
    of that; but what is kept can be neither differentiated nor mapped (`jax.vmap`) from outside.

    Args:
      function: of arrays and numbers (or trees of them), and of keyword arguments.
      static_argnames: these; every keyword argument must be among them.
      library_sums: of `compiler_options`.
    """
    jitted = jax.jit(function, static_argnames=static_argnames)

    @functools.lru_cache(PROGRAMS)
    def program(folder, settings, structure, types, static) -> _Program:
        name = f"{function.__name__}_{_digest(function, settings, structure, types, static)}"
        path, shapes = Path(folder) / "programs" / name, jax.tree.unflatten(structure, types)
        return _Program(_restored(path) or _kept(path, jitted, shapes, dict(static)), shapes, library_sums)

    def found(arguments, static) -> _Program | None:
        folder = jax.config.jax_compilation_cache_dir
        if not folder or any(map(_is_foreign, static.values())):
            return None
        settings = repr(sorted(jax.config.values.items()))  # precision and the like; more than tracing looks at
        leaves, structure = jax.tree.flatten(arguments)
        return program(folder, settings, structure, tuple(map(_type, leaves)), tuple(sorted(static.items())))

    @functools.wraps(function)
    def call(*arguments, **static):
        kept = found(arguments, static)
        if kept is None:
            return jitted(*arguments, **static)
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments))
        return (kept.function if traced else kept.compiled)(*arguments)

    def load(*arguments, **static) -> None:
        kept = found(arguments, static)
        if kept is None:
            jitted.lower(*jax.tree.map(_type, arguments), **static).compile()
        else:
            _ = kept.compiled

    call.load = load
    return call


def _is_foreign(value) -> bool:
    own = type(value).__module__.split(".")[0] in ("gridreg_jax", "builtins", "flax")
    return not own or getattr(value, "runs_foreign_code", False)


def _type(leaf) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf))


def _restored(path: Path) -> Callable | None:
    try:
        kept = path.read_bytes()
    except OSError:
        return None
    digest, program = kept[:DIGEST], kept[DIGEST:]
    if hashlib.sha256(program).digest() != digest:  # damaged: it is written anew
        return None
    return jax.jit(jax.export.deserialize(bytearray(program)).call)


def _kept(path: Path, jitted: Callable, shapes, static: dict) -> Callable:
    exported = jax.export.export(jitted)(*shapes, **static)
    program = exported.serialize()
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(hashlib.sha256(program).digest() + program)
    except OSError as error:  # As JAX does with compiled programs.
        warnings.warn(f"{path.parent}: cannot be written ({error.strerror}): later starts take longer", stacklevel=2)
    return jax.jit(exported.call)


def _digest(function: Callable, *key) -> str:
    known = function.__module__, function.__qualname__, _code(), jax.default_backend(), key
    return hashlib.sha256(repr(known).encode()).hexdigest()[:32]


@functools.cache
def _code() -> str:
    """Digest of this library's source and the versions of those that it is traced with."""
    digest = hashlib.sha256(repr([metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")]).encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
