"""Who listens at the meeting point, as another rank sees it while rank 0 opens its socket."""

import socket

import pytest

from ultramem_ds.utils.environment import World, world_of
from ultramem_ds.utils.ports import free_port
from ultramem_ds.zero import rendezvous


def world(port: int) -> World:
    return world_of(
        {
            "RANK": "1",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "1",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    )


def test_a_listener_that_nobody_can_name_is_looked_at_again(monkeypatch):
    seen = iter([[None], [None], []])  # a socket that rank 0 opened and closed meanwhile
    monkeypatch.setattr(rendezvous, "_listeners", lambda port: next(seen))
    monkeypatch.setattr(rendezvous, "LOOK_S", 0.0)
    with rendezvous.meeting_point(world(free_port())):
        assert not list(seen)


def test_a_listener_that_stays_is_another_programs():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        taken = pytest.raises(ValueError, match=f"port {port} of 127.0.0.1 is taken")
        with taken, rendezvous.meeting_point(world(port)):
            pass
