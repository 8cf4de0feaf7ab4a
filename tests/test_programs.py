import dataclasses
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gridreg_jax import programs
from gridreg_jax.programs import stored


def make():
    """A function of a tree, as another process would make it, and the list of its tracings."""
    traced = []

    def scaled_power(numbers, scale, *, power):
        traced.append(power)
        return {"sum": numbers["a"] ** power + scale * numbers["b"]}

    return stored(scaled_power, static_argnames=("power",)), traced


def arguments(size=3):
    return {"a": np.arange(size, dtype=np.float32), "b": jnp.ones(size, jnp.int32)}, 0.5


def test_another_process_does_not_trace_again(program_cache):
    (first, traced), (later, traced_later) = make(), make()
    for function in (first, first, later):
        np.testing.assert_allclose(function(*arguments(), power=2)["sum"], [0.5, 1.5, 4.5])
    assert traced == [2] and not traced_later
    # Other static arguments and other shapes are other programs.
    np.testing.assert_allclose(later(*arguments(), power=3)["sum"], [0.5, 1.5, 8.5])
    assert later(*arguments(4), power=2)["sum"].shape == (4,)
    assert traced_later == [3, 2]


@pytest.mark.parametrize("cached", [True, False])
def test_what_was_loaded_from_shapes_alone_is_ready(program_cache, cached):
    if not cached:
        jax.config.update("jax_compilation_cache_dir", None)
    function, traced = make()
    numbers, scale = arguments()
    scale = np.float32(scale)  # a number of Python's has a type of its own
    function.load(jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), numbers), scale, power=2)
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))
    np.testing.assert_allclose(function(numbers, scale, power=2)["sum"], [0.5, 1.5, 4.5])
    assert traced == [2] and not [name for name in events if "compile" in name]
    function(*arguments(4), power=2)
    assert [name for name in events if "compile" in name]


def test_programs_are_kept_in_the_users_folder_unless_jax_has_one(program_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("GRIDREG_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    programs.keep()
    assert jax.config.jax_compilation_cache_dir == str(program_cache)
    jax.config.update("jax_compilation_cache_dir", None)
    programs.keep()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "cache" / "xla")
    make()[0](*arguments(), power=2)
    # The program as it was traced, and as it was compiled.
    assert len(list((tmp_path / "cache" / "xla").rglob("scaled_power_*"))) == 1
    assert list((tmp_path / "cache" / "xla").glob("jit_*"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


@pytest.mark.parametrize("damage", ["truncated", "a bit", "empty"])
def test_a_damaged_program_is_traced_anew(program_cache, damage):
    make()[0](*arguments(), power=2)
    (path,) = (program_cache / "programs").iterdir()
    kept = bytearray(path.read_bytes())
    kept[len(kept) // 2] ^= 1
    path.write_bytes({"truncated": kept[:100], "a bit": kept, "empty": b""}[damage])
    function, traced = make()
    np.testing.assert_allclose(function(*arguments(), power=2)["sum"], [0.5, 1.5, 4.5])
    assert traced == [2]


def test_of_a_class_from_elsewhere_nothing_is_kept(program_cache):
    function = stored(lambda x, *, by: by.factor * x, static_argnames=("by",))
    by = dataclasses.make_dataclass("By", [("factor", float)], frozen=True, order=True)(2.0)
    assert function(3.0, by=by) == 6 and not (program_cache / "programs").exists()


def test_without_a_cache_nothing_is_written(program_cache):
    jax.config.update("jax_compilation_cache_dir", None)
    np.testing.assert_allclose(make()[0](*arguments(), power=2)["sum"], [0.5, 1.5, 4.5])
    assert not (program_cache / "programs").exists()


def test_only_so_many_programs_are_held(program_cache, monkeypatch):
    held, keep = [], programs._kept

    def observed(*arguments):
        program = keep(*arguments)
        held.append(weakref.ref(program))
        return program

    monkeypatch.setattr(programs, "PROGRAMS", 2)
    monkeypatch.setattr(programs, "_kept", observed)
    function, _ = make()
    for size in (3, 4, 5):
        function(*arguments(size), power=2)
    gc.collect()
    assert [reference() is None for reference in held] == [True, False, False]


def test_another_setting_of_jax_is_another_program(program_cache):
    function, traced = make()
    function(*arguments(), power=2)
    with jax.default_matmul_precision("highest"):
        function(*arguments(), power=2)
    assert traced == [2, 2]


def test_where_nothing_can_be_written_it_runs_all_the_same_and_says_so(program_cache):
    program_cache.mkdir()
    (program_cache / "programs").write_text("in the way")
    with pytest.warns(UserWarning, match="programs: cannot be written .*: later starts take longer"):
        np.testing.assert_allclose(make()[0](*arguments(), power=2)["sum"], [0.5, 1.5, 4.5])


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the CPU's options")
@pytest.mark.parametrize("unknown", [{"xla_cpu_of_another_version": 1}, {"xla_cpu_scheduler_type": "ANOTHER"}])
def test_only_options_that_xla_knows_are_given(monkeypatch, unknown):
    known = {name: value for name, value in programs.compiler_options().items() if name not in unknown}
    assert known
    monkeypatch.setattr(programs, "OPTIONS", {**programs.OPTIONS, **unknown})
    assert programs._known_options.__wrapped__() == known


@pytest.mark.parametrize("library_sums", [True, False])
def test_each_function_says_whether_a_library_does_its_sums(program_cache, monkeypatch, library_sums):
    given, compile_ = [], jax.stages.Lowered.compile
    monkeypatch.setattr(
        jax.stages.Lowered, "compile", lambda self, options: (given.append(options), compile_(self, options))[1]
    )
    stored(lambda x: x + 1, library_sums=library_sums)(np.float32(1))
    assert given == [programs.compiler_options(library_sums=library_sums)]
    if programs.LIBRARY in programs.compiler_options():
        assert bool(given[0][programs.LIBRARY]) == library_sums


def test_a_program_that_was_loaded_is_not_compiled_again(program_cache, monkeypatch):
    function, _ = make()
    function.load(*arguments(), power=2)
    monkeypatch.setattr(jax.stages.Lowered, "compile", None)
    found = function(*arguments(), power=2)
    np.testing.assert_allclose(found["sum"], [0.5, 1.5, 4.5])


def test_threads_compile_two_programs_at_once_and_one_program_once():
    def function(wait):
        made = Mock()
        made.lower.return_value.compile.side_effect = lambda options: (wait(), Mock())[1]
        return made

    def compiled(program):
        return program.compiled

    both = threading.Barrier(2)
    one = function(lambda: threading.Event().wait(0.2))
    with ThreadPoolExecutor(2) as pool:
        # Each goes on when the other one is being compiled too.
        two = [programs._Program(function(lambda: both.wait(20)), (), True) for _ in range(2)]
        assert len({*pool.map(compiled, two)}) == 2
        assert len({*pool.map(compiled, [programs._Program(one, (), True)] * 2)}) == one.lower.call_count == 1
