"""Complete groups of tokens: equal to a walk token by token, whatever the documents and windows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from valkyrie_core.nn.groups import find_groups
from valkyrie_core.nn.state import Ctx

DOCS = [
    [5] * 7 + [6] * 1 + [7] * 11 + [6] * 4,
    [-1] * 2 + [3] * 6 + [-1] * 3 + [3] * 2 + [4] * 8 + [-1] * 2,
    [9] * 23,
    [-1] * 23,
]
"""Documents of four rows; -1 is padding, and the same number right after it the same document."""


def walked(x_TD: Tensor, doc: list[int], size: int) -> tuple[Tensor, list[Tensor]]:
    """What the latest complete group's summary is at every token, and all summaries."""
    own: list[Tensor] = []
    now, last, rows, found = None, torch.zeros(x_TD.shape[1]).to(x_TD), [], []
    for x_D, name in zip(x_TD, doc, strict=True):
        if name >= 0:
            if name != now:
                now, own, last = name, [], torch.zeros_like(last)
            own.append(x_D)
            if len(own) == size:
                last, own = torch.stack(own).mean(0), []
                found.append(last)
        rows.append(last)
    return torch.stack(rows), found


def context(docs: list[list[int]], start: int, stop: int, before: list[int]) -> Ctx:
    """Of a window, as a model makes it; `before` is the document that each row was in."""
    fresh, segment, now = [], [], list(before)
    for row, doc in enumerate(docs):
        fresh.append([])
        segment.append([])
        for name in doc[start:stop]:
            fresh[-1].append(name >= 0 and name != now[row])
            now[row] = name if name >= 0 else now[row]
            segment[-1].append(now[row])
    before[:] = now
    valid_BT = torch.tensor([doc[start:stop] for doc in docs]) >= 0
    zeros = torch.zeros_like(valid_BT, dtype=torch.int64)
    return Ctx(zeros, torch.tensor(segment), fresh_BT=torch.tensor(fresh), valid_BT=valid_BT)


@pytest.mark.parametrize("sizes", [[23], [1] * 23, [4, 4, 1, 9, 5]])
@pytest.mark.parametrize("size", [2, 3, 5, 30])
def test_windows_agree_with_a_walk(size: int, sizes: list[int]) -> None:
    torch.manual_seed(0)
    x_BTD = torch.randn(4, 23, 6, dtype=torch.float64)
    read_B, open_BD = torch.zeros(4, dtype=torch.int64), torch.zeros(4, 6, dtype=torch.float64)
    said_BD, start, before = torch.zeros_like(open_BD), 0, [-2] * 4
    pieces, found = [], [[] for _ in range(4)]  # type: list[Tensor], list[list[Tensor]]
    for length in sizes:
        window_BTD = x_BTD[:, start : start + length]
        groups = find_groups(read_B, context(DOCS, start, start + length, before), size)
        mean_BGD, open_BD = groups.summaries(window_BTD, open_BD)
        out_BTD, said_BD = groups.latest(mean_BGD, said_BD)
        read_B = groups.read_B
        pieces.append(out_BTD)
        for row in range(4):
            found[row] += list(mean_BGD[row, groups.real_BG[row]])
        start += length
    out_BTD = torch.cat(pieces, dim=1)
    for row, doc in enumerate(DOCS):
        expected, summaries = walked(x_BTD[row], doc, size)
        real = torch.tensor(doc) >= 0
        torch.testing.assert_close(out_BTD[row, real], expected[real])
        assert len(found[row]) == len(summaries)
        for a, b in zip(found[row], summaries, strict=True):
            torch.testing.assert_close(a, b)


def test_whole_windows_of_one_document_are_known_without_a_look() -> None:
    ctx = Ctx(torch.arange(12).expand(2, 12), torch.zeros(2, 12, dtype=torch.int64))
    for read in (0, 2):
        groups = find_groups(torch.full((2,), read), ctx, 4)
        assert groups.always
        assert groups.real_BG.all()
        of_groups = groups.context(ctx)
        assert of_groups.valid_BT is None
        assert of_groups.pos_BT.tolist() == [[0, 1, 2]] * 2
        assert groups.end_BG.tolist() == [[3 - read, 7 - read, 11 - read]] * 2
    assert not find_groups(torch.zeros(2, dtype=torch.int64), ctx, 5).always
