import pytest


@pytest.fixture
def full_disk():
    """A limit that ends every file at a hundred bytes, as a full disk would."""
    resource = pytest.importorskip("resource", reason="no limits of a process here")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
