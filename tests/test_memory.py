import platform
import subprocess
import sys

import pytest

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
