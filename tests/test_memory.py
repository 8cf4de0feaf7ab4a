import math
import platform
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from gridreg_jax import memory
from gridreg_jax.errors import InputError
from gridreg_jax.memory import left_to_group

# Pages that are mapped anew by blocks of some MiB, taken and freed again and again.
PROGRAM = """
import resource
import numpy as np
from gridreg_jax.memory import limit_freed_memory

def pages(mebibytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(mebibytes * 2**20, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

limit_freed_memory()
for mebibytes in (32, 128):
    pages(mebibytes)
    print(min(pages(mebibytes) for _ in range(3)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_what_is_freed_is_kept_up_to_a_size():
    answer = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
    kept, given_back = map(int, answer.stdout.split())
    # Pages may be large: of 2 MiB.
    assert kept < 32 < given_back


def test_the_tightest_group_limits_whatever_the_version(tmp_path):
    def group(folder, names, most, taken, files):
        folder.mkdir(parents=True)
        for name, value in zip(names, (most, taken), strict=True):
            (folder / f"memory.{name}").write_text(f"{value}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {files}\ntotal_inactive_file {files}\n")

    def left(text):
        (tmp_path / "groups").write_text(text)
        return left_to_group(tmp_path, tmp_path / "groups")

    group(tmp_path / "job", ("max", "current"), 1000, 700, 50)
    group(tmp_path / "job" / "step", ("max", "current"), "max", 600, 10)
    group(tmp_path / "memory" / "job", ("limit_in_bytes", "usage_in_bytes"), 500, 700, 0)
    assert left("0::/job/step\n") == 350
    assert left("3:cpuset:/\n2:cpu,memory:/job\n0::/\n") == 0
    assert left("0::/elsewhere\n") == math.inf
    assert left_to_group(tmp_path, tmp_path / "none") == math.inf


@pytest.mark.parametrize("accepted", [True, False])
def test_the_allocators_own_thresholds_stay_where_it_refuses_one(monkeypatch, accepted):
    given = []

    def mallopt(option, value):
        given.append(option)
        return option != memory._M_MMAP_THRESHOLD or accepted

    monkeypatch.setattr(memory, "_glibc", lambda: SimpleNamespace(mallopt=mallopt))
    memory.limit_freed_memory()
    assert (memory._M_TRIM_THRESHOLD in given) == accepted


@pytest.mark.parametrize(
    ("platform", "stats", "free", "granted", "expected"),
    [
        ("cpu", None, 1000, 900, 300),
        ("cpu", None, 900, math.inf, 300),
        ("gpu", dict(bytes_limit=800, bytes_in_use=300), 900, 900, 500),
        ("gpu", None, 900, 900, None),
    ],
)
def test_three_devices_share_what_the_cpu_has_left(platform, stats, free, granted, expected, monkeypatch):
    device = SimpleNamespace(platform=platform, memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "local_devices", lambda: [device] * 3)
    monkeypatch.setattr(jax, "local_device_count", lambda: 3)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    monkeypatch.setattr(memory, "left_to_group", lambda: granted)
    assert memory.memory_available() == expected


def test_what_a_step_holds_already_is_not_needed_again(monkeypatch):
    monkeypatch.setattr(memory, "memory_available", lambda: 100)
    memory.check_memory(150, "a step", None, held=50)
    with pytest.raises(InputError, match="a step at grid size 5 needs .* a smaller data.shape or grid size"):
        memory.check_memory(151, "a step", (5, 5, 5), held=50)


def test_each_device_holds_its_part_of_what_is_split_and_all_of_what_is_not():
    mesh = jax.sharding.Mesh(jax.devices(), "all")
    parts = [jax.sharding.PartitionSpec(*axes) for axes in (["all"], [])]
    split, whole = (jax.device_put(np.zeros(64, np.float32), jax.sharding.NamedSharding(mesh, part)) for part in parts)
    assert memory.bytes_held({"split": split, "whole": [whole]}) == 256 // jax.device_count() + 256
