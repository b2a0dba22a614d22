"""long_context.png: losses, speed and memory of a long reading, on one page."""

from __future__ import annotations

from io import BytesIO

from valkyrie_core.report import LongContextReport

_POSITION, _CONTEXT, _TRAINED = "#4c72b0", "#c44e52", "#8c8c8c"
_SPEED, _STATE, _CACHE, _GRID = "#55a868", "#8172b3", "#dd8452", "#e6e6e6"
MEBIBYTE = 1 << 20


def draw_long_context(report: LongContextReport) -> bytes:
    """A PNG of bits per byte by position and by context, of speed, and of what a state holds."""
    # imported here: it costs half a second; the object interface, because pyplot wants a screen
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 9), layout="constrained")
    FigureCanvasAgg(figure)
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[3, 2, 2])
    title = f"{report.run}, step {report.step}: {report.text}"
    top.set_title(title, loc="left", fontsize=12, parse_math=False)
    positions = [x for x in report.by_position if x.bpb is not None]
    top.plot(
        [x.end for x in positions],
        [x.bpb for x in positions],
        color=_POSITION,
        marker="o",
        label="tokens up to this position",
    )
    top.plot(
        [x.context for x in report.by_context],
        [x.bpb for x in report.by_context],
        color=_CONTEXT,
        marker="s",
        label="the same tokens from this much context",
    )
    top.axvline(report.trained_context, color=_TRAINED, linestyle=":", label="trained context")
    top.set_ylabel("bits per byte")
    lengths = [x.length for x in report.memory]
    speeds = [x.tokens_per_second for x in report.memory]
    middle.plot(lengths, speeds, color=_SPEED, marker="o", label="tokens/s")
    middle.set_ylim(bottom=0)
    middle.set_ylabel("tokens/s")
    for values, colour, label in (
        ([x.state_bytes for x in report.memory], _STATE, "recurrent state"),
        ([x.cache_bytes for x in report.memory], _CACHE, "keys and values"),
    ):
        shown = [value / MEBIBYTE for value in values]
        bottom.plot(lengths, shown, color=colour, marker="o", label=label)
    bottom.set_ylim(bottom=0)
    bottom.set_ylabel("MiB")
    bottom.set_xlabel("tokens")
    bottom.set_xscale("log", base=2)
    for axes in (top, middle, bottom):
        axes.grid(color=_GRID, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="best", frameon=False)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()
