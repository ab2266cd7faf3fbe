import subprocess
import sys

import pytest

PAGES = """
import resource, torch
from vaura.task.memory import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        held = [torch.ones(1 << 20) for _ in range(20)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
torch.set_num_threads(1)
def least():  # the machine may take pages away at any time
    return min(faults() for _ in range(5))
least()
print(least(), keep_freed_memory(), least())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is told")
def test_what_is_freed_is_not_asked_for_again():
    said = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=True).stdout.split()
    if said[1] == "False":
        pytest.skip("this C library cannot be told to keep memory")
    before, after = int(said[0]), int(said[2])
    if before < 1000:
        pytest.skip(f"this C library kept it before it was told: {before} page faults for 800 MB")
    assert after < before / 5
