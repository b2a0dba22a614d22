"""The tables of `valkyrie experts`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from valkyrie_cli.render import human_count, human_seconds, make_table, safe_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.table import Table

    from valkyrie_core.report import ExpertsReport, KnockOut, LayerExperts, RouterSaturation

MOST_EXPERTS = 64
"""Experts of all layers together that have a row of their own."""
PAIRS = 3
"""Pairs of experts of a layer that are told."""


def draw_experts(report: ExpertsReport, console: Console) -> None:
    """Balance, what routers know, knock-outs, tokens, pairs, saturation."""
    console.print(
        f"{report.run}, step {report.step}, {human_count(report.parameters)} parameters, "
        f"{human_seconds(report.seconds)}"
    )
    read = ", ".join(
        f"{safe_line(one.name)} {one.tokens:,} tokens ({one.windows} windows, documents: "
        f"{one.documents})"
        for one in report.domains
    )
    console.print(f"text: {read}")
    _draw_balance(report, console)
    _draw_loads(report.layers, console)
    _draw_information(report, console)
    if any(layer.knock_out for layer in report.layers):
        _draw_knock_outs(report.layers, console)
    _draw_tokens(report.layers, console)
    _draw_pairs(report.layers, console)
    if report.saturation is not None:
        _draw_saturation(report.layers, report.saturation, console)
    for note in report.notes:
        console.print(f"- {safe_line(note)}")


def _draw_balance(report: ExpertsReport, console: Console) -> None:
    columns = ["layer", "block", "gate", "experts", "least", "most", "CV", "MaxVio", "batch"]
    columns += ["effective", "dead"]
    table = _narrow(*columns, right=[x for x in columns if x not in ("block", "gate")])
    for layer in report.layers:
        table.add_row(
            str(layer.layer),
            layer.block,
            layer.gate,
            f"{_met(layer)} of {layer.num_experts}",
            _number(layer.load_min),
            _number(layer.load_max),
            _number(layer.load_cv),
            _number(layer.max_vio),
            _number(layer.max_vio_per_batch),
            _number(layer.effective_experts),
            "-" if layer.dead is None else str(len(layer.dead)),
            style="bold red" if layer.dead else None,
        )
    console.print(table)
    console.print(
        "Load over a fair one: 1 is fair. MaxVio: (most - mean) / mean, of the whole text and of "
        f"batches of {report.batch_windows} windows. Effective: exp of the load's entropy."
    )
    for layer in report.layers:
        for one in layer.dead or ():
            since = ""
            if one.steps is not None:
                since = (
                    f"; in training for {one.steps} steps" if one.steps else "; alive in training"
                )
            console.print(
                f"layer {layer.layer}: expert {one.expert} is dead on this text "
                f"(load {one.load:.2f}{since})",
                style="bold red",
            )


def _met(layer: LayerExperts) -> str:
    """Experts of a token: the mean where they are not always as many."""
    mean = f"{layer.experts_per_token:.1f}"
    return str(layer.top_k) if float(mean) == layer.top_k else mean


def _draw_loads(layers: Sequence[LayerExperts], console: Console) -> None:
    table = make_table("layer", "load over a fair one, by expert", right=["layer"])
    for layer in layers:
        loads = "-" if layer.load is None else "  ".join(f"{x:.2f}" for x in layer.load)
        table.add_row(str(layer.layer), loads)
    console.print(table)


def _draw_information(report: ExpertsReport, console: Console) -> None:
    columns = ["layer", "routing entropy", "top-1 margin", "I(expert; domain)"]
    columns += ["shuffled", "95 %"]
    table = _narrow(*columns, right=columns)
    for layer in report.layers:
        found = layer.mutual_information
        table.add_row(
            str(layer.layer),
            _number(layer.routing_entropy, 3),
            _number(layer.top1_margin, 3),
            _number(None if found is None else found.value, 4),
            _number(None if found is None else found.null_mean, 4),
            _number(None if found is None else found.null_95, 4),
        )
    console.print(table)
    console.print(
        "Entropy in nats and margin: of a token's affinities, mean. I(expert; domain) over "
        f"H(domain), and what chance gives: mean and 95th percentile of {report.shuffles} shuffles "
        "of the windows' domains."
    )


def _draw_knock_outs(layers: Sequence[LayerExperts], console: Console) -> None:
    costs = _narrow("layer", "domain", "without it the loss rises by, by expert", right=["layer"])
    table = _narrow(
        *("layer", "domain", "costliest", "rise", "95 %", "specialisation"),
        right=["layer", "costliest", "rise", "specialisation"],
    )
    for layer in layers:
        for row in layer.knock_out or []:
            worst = max(range(len(row.change)), key=row.change.__getitem__)
            place = (str(layer.layer), safe_line(row.domain))
            costs.add_row(*place, "  ".join(f"{x:+.4f}" for x in row.change))
            table.add_row(
                *place,
                str(worst),
                f"{row.change[worst]:+.4f}",
                _interval(row, worst),
                _number(row.specialisation, 3),
            )
    console.print(costs)
    console.print(table)
    console.print(
        "Knock-outs: how much the loss rises, in nats per token, where one expert may not be "
        "chosen, on the same windows with and without it. Specialisation: the Gini index of a "
        "domain's row, 0 if all experts matter alike, 1 if one alone does."
    )


def _interval(row: KnockOut, expert: int) -> str:
    low, high = row.low[expert], row.high[expert]
    return "-" if low is None or high is None else f"{low:+.4f} to {high:+.4f}"


def _draw_tokens(layers: Sequence[LayerExperts], console: Console) -> None:
    if sum(layer.num_experts for layer in layers) > MOST_EXPERTS:
        console.print("Tokens of each expert: in experts.json and experts.html.")
        return
    table = _narrow("layer", "expert", "tokens of the greatest lift", right=["layer", "expert"])
    for layer in layers:
        for expert, lifts in enumerate(layer.top_tokens):
            told = "  ".join(
                f"{safe_line(one.text).replace(' ', '␣')} {one.lift:.1f}" for one in lifts
            )
            table.add_row(str(layer.layer), str(expert), told or "-")
    console.print(table)


def _draw_pairs(layers: Sequence[LayerExperts], console: Console) -> None:
    rows = []
    for layer in layers:
        found = [
            (value, i, j)
            for i, row in enumerate(layer.co_activation or [])
            for j, value in enumerate(row[:i])
            if value is not None
        ]
        found.sort(reverse=True)
        if found:
            told = "  ".join(f"{j}+{i} {value:.2f}" for value, i, j in found[:PAIRS])
            rows.append((str(layer.layer), told))
    if not rows:
        return
    table = make_table("layer", "pairs at one token most often, over chance", right=["layer"])
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _draw_saturation(
    layers: Sequence[LayerExperts], saturation: RouterSaturation, console: Console
) -> None:
    columns = ["step", *(f"layer {layer.layer}" for layer in layers)]
    table = make_table(*columns, right=columns)
    for one in saturation.earlier:
        shares = ["-" if share is None else f"{share:.1%}" for share in one.share]
        table.add_row(str(one.step), *shares)
    console.print(table)
    console.print(
        f"The share of a token's experts at step {saturation.newest} that earlier checkpoints "
        f"chose as well, over {saturation.tokens:,} tokens."
    )


def _narrow(*columns: str, right: Sequence[str]) -> Table:
    table = make_table(*columns, right=right)
    # one space between columns, so that 80 of them are enough
    table.padding = (0, 1, 0, 0)
    return table


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
