"""The folder of a report: everything is written through it, and what an earlier report left there goes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speechllm_prune.experiment import write_text
from speechllm_prune.reporting.tables import Table, to_csv, to_markdown

OWNED = re.compile(
    r"report\.html"
    r"|(table[12]|points|kept_share|efficiency|extras|paper|matrices|redundancy|compared|forgetting|heatmaps"
    r"|figure2(_ast)?)\.(md|csv|png|svg)"
    r"|(heatmap|pruning_curve|training_curve)(_.+)?\.(png|svg)"
)
"""Names that only a report gives its files."""


class ReportFolder:
    """Where a report is written, and what was.

    Arguments
    ---------
    path : Path
        The folder; it is made with the first file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written: set[str] = set()

    def tables(self, stem: str, tables: Sequence[Table]) -> None:
        """Write tables as Markdown, and their records as CSV."""
        text = "\n".join(to_markdown(table) for table in tables)
        self.text(f"{stem}.md", text)
        self.text(f"{stem}.csv", to_csv([r for table in tables for r in table.records]))

    def text(self, name: str, text: str) -> Path:
        """Write a text file."""
        self.written.add(name)
        return write_text(self.path / name, text)

    def figure(self, stem: str, figure: Any) -> list[Path]:
        """Write a figure as PNG and SVG; returns their paths."""
        from speechllm_prune.reporting import figures

        files = figures.save_figure(figure, self.path / stem)
        self.written |= {file.name for file in files}
        return files

    def remove_old(self) -> None:
        """Delete what an earlier report wrote and this one did not, such as the curve of a set that is no more."""
        for file in self.path.iterdir():
            if OWNED.fullmatch(file.name) and file.name not in self.written and file.is_file():
                file.unlink()
