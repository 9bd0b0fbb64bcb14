"""A table of a session, and a picture: `python -m xkv_fx.evaluation.speed.gpu_session.report FOLDER`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from xkv_fx.evaluation.pictures import new_figure
from xkv_fx.evaluation.speed.gpu_session.__main__ import LIMITS
from xkv_fx.evaluation.speed.gpu_session.record import Record, line_of

_COLUMNS = {
    "attention": ("format", "slots", "rows", "milliseconds", "bytes_per_second", "share_of_copy"),
    "steps": ("name", "rows", "tokens_per_second", "to_full", "kv_bytes", "skipped"),
    "prefill": ("name", "tokens", "seconds", "peak_bytes"),
}


def table(folder: Path) -> str:
    """All stages in Markdown: what was measured, and why what was not was not."""
    return "\n\n".join(_section(Record.load(folder, stage)) for stage in LIMITS) + "\n"


def _section(record: Record) -> str:
    head = f"## {record.stage}: {record.state}{'' if record.why is None else f', {record.why}'}"
    if record.stage == "kernels" and record.rows:
        return f"{head}\n\n{_of_kernels(record.rows)}"
    columns = _COLUMNS.get(record.stage)
    if columns is None or not record.rows:
        return "\n".join([head, *(f"\n- {line_of(row)}" for row in record.rows)])
    lines = [_cells(columns), _cells(["---"] * len(columns))]
    lines += [_cells([_short(row.get(column)) for column in columns]) for row in record.rows]
    return "\n".join([head, "", *lines])


def _of_kernels(rows: Sequence[dict[str, Any]]) -> str:
    """The largest error of each format and dtype over all shapes."""
    worst: dict[tuple[str, str], float] = {}
    for row in rows:
        key = row["format"], row["dtype"]
        worst[key] = max(worst.get(key, 0.0), row["error"])
    unlike = sum(not row["written"] for row in rows)
    lines = ["| format | dtype | largest relative error |", "| --- | --- | --- |"]
    lines += [f"| {name} | {dtype} | {error:.2g} |" for (name, dtype), error in worst.items()]
    return "\n".join([*lines, "", f"{unlike} of {len(rows)} wrote other bits than plain torch."])


def _cells(values: Sequence[str]) -> str:
    return f"| {' | '.join(values)} |"


def _short(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value)


def draw(folder: Path, path: Path) -> None:
    """Shares of the speed of a copy, and throughputs relative to the full cache.

    Raises:
        XkvError: matplotlib is missing.
    """
    figure = new_figure(9, 3.5)
    left, right = figure.subplots(1, 2)
    shares = [row for row in Record.load(folder, "attention").rows if row.get("share_of_copy") is not None]
    names = [f"{row['format']}, {row['slots'] // 1024}k, {row['rows']}" for row in shares]
    left.barh(names, [row["share_of_copy"] for row in shares])
    left.set(title="decode attention: format, slots, rows", xlabel="share of copy speed", xlim=(0, 1))
    ratios = [row for row in Record.load(folder, "steps").rows if row.get("to_full") is not None]
    right.barh([row["name"] for row in ratios], [row["to_full"] for row in ratios])
    right.set(title="tokens a second, largest batch", xlabel="times the full cache")
    figure.savefig(path)


def main(
    folder: Annotated[Path, typer.Argument(help="What a session wrote.")],
    picture: Annotated[Path | None, typer.Option(help="Where a picture goes (.png, .svg, .pdf).")] = None,
) -> None:
    """A table of a session, and a picture if asked."""
    typer.echo(table(folder), nl=False)
    if picture is not None:
        draw(folder, picture)


if __name__ == "__main__":
    typer.run(main)
