"""search.md: the table of a search, to be passed on."""

from __future__ import annotations

from valkyrie_core.report import CandidateScore, Estimate, SearchReport


def search_page(report: SearchReport, picture: str) -> str:
    """The whole search in Markdown."""
    chosen = report.chosen or "none"
    lines = [
        f"# Layouts of {report.recipe}",
        "",
        f"Chosen: **{chosen}**. {report.reason}.",
        "",
        f"![loss against recall]({picture})",
        "",
        *table(report),
        "",
        *(f"- {rule}." for rule in report.rules),
        f"- {budget_line(report)}.",
        "",
    ]
    return "\n".join(lines)


def table(report: SearchReport) -> list[str]:
    """The Pareto table, a row a candidate."""
    lines = [
        "| candidate | rung | seeds | bits per byte | recall | by pairs | bytes per decoded token "
        "| training FLOPs per token | Pareto |",
        "|---|---:|---:|---:|---:|---|---:|---:|---|",
    ]
    for one in report.candidates:
        name = f"**{one.candidate}**" if one.candidate == report.chosen else one.candidate
        lines.append(
            f"| {name} | {one.rung} | {one.bpb.seeds} | {estimate(one.bpb, 4)} | "
            f"{estimate(one.recall, 3)} | {pairs_line(one)} | {one.decode_bytes:,} | "
            f"{one.training_flops:,} | {'yes' if one.pareto else ''} |"
        )
    return lines


def estimate(value: Estimate, digits: int) -> str:
    """A mean and, where there is one, its 95 % interval."""
    if value.mean is None:
        return "diverged"
    text = f"{value.mean:.{digits}f}"
    return text if value.half_width is None else f"{text} ± {value.half_width:.{digits}f}"


def pairs_line(one: CandidateScore) -> str:
    """Recall by number of pairs: `8: 1.00, 16: 0.93`."""
    return ", ".join(f"{pairs}: {share:.2f}" for pairs, share in one.recall_by_pairs.items())


def budget_line(report: SearchReport) -> str:
    """What the numbers are made of."""
    sizes = "; ".join(
        f"{task}: {low:,} to {high:,} parameters"
        for task, (low, high) in report.proxy_parameters.items()
    )
    budget = ", ".join(f"{name} {value:,}" for name, value in report.budget.items())
    return (
        f"loss and recall are measured on proxies ({sizes}; {budget}), intervals are Student's "
        "95 % over the seeds; bytes and FLOPs are of the recipe's own width, by formula: decoding "
        "after 16,384 tokens in bf16"
    )
