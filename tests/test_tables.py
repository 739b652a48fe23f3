"""Tables of lists under CUDA graphs, on a card that is a stand-in: it has streams, and a capture that can be told."""

import contextlib
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

tables = pytest.importorskip("fastnorm.triton_kernels.tables", exc_type=ImportError)
DEVICE = torch.device("cuda", 0)


class Card:
    """What the tables ask a card for: the current stream, whether it is captured, and a copy of host memory."""

    def __init__(self, monkeypatch) -> None:
        self.stream, self.capturing = 1, False
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=self.stream))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda host: SimpleNamespace(to=lambda *_, **__: host.clone()))

    @contextlib.contextmanager
    def graph(self):
        """As torch.cuda.graph: a capture on a stream of its own."""
        before, self.stream, self.capturing = self.stream, 7, True
        try:
            yield
        finally:
            self.stream, self.capturing = before, False


@pytest.fixture
def card(monkeypatch):
    for cache in ("_layouts", "_tables"):
        monkeypatch.setattr(tables, cache, tables._Recent(32))
    return Card(monkeypatch)


def table_at(address: int):
    """The table of two tensors that lie there."""
    entries = (tables.Entry(address, 4, torch.float32), tables.Entry(address + 64, 3, torch.bfloat16))
    return tables.recent(entries, DEVICE, lambda: tables.Table(entries, DEVICE))


def memory_of(table) -> list[weakref.ref]:
    """What the kernels read of a table."""
    return [weakref.ref(t) for t in (table.addresses, table.layout.tensors, table.layout.chunk_tensor)]


def test_a_capture_finds_what_another_stream_has_made(card):
    warm = table_at(1024)
    with card.graph():
        assert table_at(1024) is warm
        with pytest.raises(RuntimeError, match="call the clip once on the same gradients before the capture"):
            table_at(4096)
    table_at(4096)
    with card.graph():
        assert table_at(4096).entries[0].address == 4096


def test_other_streams_make_their_own(card):
    """Outside of a capture nobody waits for another stream's copies."""
    first = table_at(1024)
    card.stream = 2
    assert table_at(1024) is not first and table_at(1024) is table_at(1024)


def test_what_a_graph_reads_is_kept(card):
    """Its replays read a table's memory however many other lists have come since; what no graph reads is freed."""
    kept, dropped = memory_of(table_at(1024)), memory_of(table_at(2048))
    with card.graph():
        table_at(1024)
    for i in range(40):
        # tensors of other sizes: layouts of their own
        entries = (tables.Entry(1 << 20, i + 5, torch.float32),)
        tables.recent(entries, DEVICE, lambda entries=entries: tables.Table(entries, DEVICE))
    gc.collect()
    assert all(memory() is not None for memory in kept)
    assert dropped[0]() is None and len(tables._tables.values) == len(tables._layouts.values) == 32
    with card.graph():
        assert table_at(1024).addresses is kept[0]()
