"""CUDA graphs without a GPU: what a recording would replay is run again on the tensors it was recorded with."""

from contextlib import contextmanager, nullcontext
from unittest.mock import MagicMock

import torch

from rkd.acceleration import Replayed


class Recording:
    """Stands in for `torch.cuda.CUDAGraph`: while it records, nothing runs."""

    def __init__(self):
        self.call, self.replays = None, 0

    def replay(self):
        self.replays += 1
        step, arguments = self.call
        step(*arguments)


def fake_graphs(monkeypatch):
    """Recordings take the place of CUDA graphs; gives the list in which they appear."""
    recordings, recording_now = [], []

    def make():
        recordings.append(Recording())
        return recordings[-1]

    @contextmanager
    def graph(recording):
        recording_now.append(recording)
        yield
        recording_now.pop()

    plain = Replayed.__init__

    def init(self, step):
        def record_or_run(*arguments):
            if recording_now:
                recording_now[-1].call = step, arguments
            else:
                step(*arguments)

        plain(self, record_or_run)

    monkeypatch.setattr(Replayed, "__init__", init)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", make)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", MagicMock)
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    return recordings
