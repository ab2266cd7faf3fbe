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
faults()
print(faults(), keep_freed_memory(), faults() and faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is told")
def test_what_is_freed_is_not_asked_for_again():
    said = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=True).stdout.split()
    if said[1] == "False":
        pytest.skip("this C library cannot be told to keep memory")
    assert int(said[0]) > 10_000  # 20 times 4 MB in pages of 4 kB
    assert int(said[2]) < int(said[0]) / 20
