import pytest
import torch

from vaura.data.world import World, imagine, render
from vaura.media.mux import write_video
from vaura.serve.request import Limits
from vaura.serve.rooms import Rooms
from vaura.serve.shelf import Shelf, find_entries
from vaura.serve.work import Manner, Workshop


@pytest.fixture
def rooms(tmp_path):
    rooms = Rooms(tmp_path, 60)
    yield rooms
    rooms.close()


@pytest.fixture(scope="session")
def shelf(tiny):
    return Shelf(find_entries(tiny.folder), device="cpu", precision="float32", engine="torch")


@pytest.fixture
def shop(shelf, rooms):
    return Workshop(shelf, rooms, Limits(upload_mb=5, seconds=3, samples=3), Manner())


@pytest.fixture(scope="session")
def silent_video(tmp_path_factory):
    """A video of 1.28 s, 32 pixels a side, without sound."""
    path = tmp_path_factory.mktemp("silent") / "silent film.mp4"
    settings = World(size=32, duration=1.92)
    frames = render(imagine(3, settings), settings)
    write_video(path, frames[:32].to(torch.uint8), 25)
    return path
