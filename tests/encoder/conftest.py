from contextlib import contextmanager

import pytest


@pytest.fixture
def full_disk():
    """A limit, for as long as it is entered, that ends every file at a hundred bytes, as a full disk would."""
    resource = pytest.importorskip("resource", reason="no limits of a process here")

    @contextmanager
    def limited():
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited
