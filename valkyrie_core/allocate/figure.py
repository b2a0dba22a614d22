"""search.png: what a search found, recall against loss."""

from __future__ import annotations

from io import BytesIO

from valkyrie_core.report import SearchReport

_FRONT, _REST, _CHOSEN, _GRID = "#4c72b0", "#b0b0b0", "#c44e52", "#e6e6e6"
SMALLEST, LARGEST = 40.0, 400.0
"""Areas of the discs, in square points."""


def draw_search(report: SearchReport) -> bytes:
    """A PNG of the last rung: loss against recall, discs as large as the bytes of a decoded token.

    Lines are 95 % intervals over the seeds.
    """
    # imported here: it costs half a second; the object interface, because pyplot wants a screen
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    last = max(one.rung for one in report.candidates)
    shown = [x for x in report.candidates if x.rung == last and x.bpb.mean is not None]
    most = max((one.decode_bytes for one in shown), default=1)
    for one in shown:
        assert one.bpb.mean is not None
        assert one.recall.mean is not None
        colour = _FRONT if one.pareto else _REST
        if one.candidate == report.chosen:
            colour = _CHOSEN
        axes.errorbar(
            one.bpb.mean,
            one.recall.mean,
            xerr=one.bpb.half_width,
            yerr=one.recall.half_width,
            color=colour,
            linewidth=1,
        )
        area = SMALLEST + (LARGEST - SMALLEST) * one.decode_bytes / most
        axes.scatter(one.bpb.mean, one.recall.mean, s=area, color=colour, alpha=0.7)
        axes.annotate(
            one.candidate, (one.bpb.mean, one.recall.mean), (8, 8), textcoords="offset points"
        )
    seeds = shown[0].bpb.seeds if shown else 0
    axes.set_title(
        f"{report.recipe}: proxies of the last rung, {seeds} seeds, 95 % intervals",
        loc="left",
        fontsize=12,
        parse_math=False,
    )
    axes.set_xlabel("bits per byte (lower is better)")
    axes.set_ylabel("MQAR recall (higher is better)")
    axes.set_ylim(-0.05, 1.05)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()
