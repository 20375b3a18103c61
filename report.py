#!/usr/bin/env python3
"""Tables, figures and a page from experiment folders; needs no GPU and loads no model.

    python report.py results/demo                          # every seed below it
    python report.py results/demo/3407 results/demo_random # beside a decoder with random weights
    python report.py results/first results/second --compare
    python report.py --paper                               # the paper's own numbers through the same functions

Writes table1, table2, points, kept_share, efficiency, extras, paper (ours beside its numbers), matrices and redundancy
(.md, .csv), figure2 and heatmaps (.md, .csv, .png, .svg), pruning curves (.png, .svg) and report.html into the
experiment's report/ folder, or into results/report/ if several experiments with results are given. Experiments that
were only measured are material to compare with and do not count as several. Seeds of one experiment stand side by side.
"""

from __future__ import annotations

import argparse
import sys

from speechllm_prune.runtime import UserError, verb


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="report.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "folders",
        nargs="*",
        metavar="EXPERIMENT_FOLDER",
        help="results/<experiment_name> or results/<experiment_name>/<seed>",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="matrices, paths and points of equal depth side by side, against the first",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        help="largest accepted relative degradation of every experiment (default: `tolerance` of its YAML)",
    )
    parser.add_argument("--paper", action="store_true", help="recompute the paper's claims")
    parser.add_argument("--json", action="store_true", help="with --paper: print JSON")
    return parser.parse_args(argv)


@verb
def main(argv: list[str]) -> int | None:
    """Make a report, or recompute the paper's claims."""
    arguments = parse_arguments(argv)
    if arguments.paper:
        from speechllm_prune.reporting.paper import paper_claims, render_claims

        if arguments.folders:
            raise UserError("--paper takes no experiment folder; run: python report.py --paper")
        print(render_claims(paper_claims(), arguments.json))
        return None
    if not arguments.folders or arguments.json:
        what = "--json goes with --paper" if arguments.json else "no experiment folder given"
        raise UserError(
            f"{what}; run: python report.py results/<experiment_name>, or python report.py --paper"
        )
    if arguments.tolerance is not None and not 0 <= arguments.tolerance < float("inf"):
        raise UserError(
            f"--tolerance is {arguments.tolerance}; give a share of at least 0, such as 0.25"
        )
    from speechllm_prune.reporting.build import build_report

    report = build_report(arguments.folders, arguments.tolerance, arguments.compare)
    if report.table1:
        print(report.table1)
    if report.further:
        print(report.further)
    if report.compared:
        print(report.compared)
    for line in report.incomplete:
        print(f"incomplete: {line}", file=sys.stderr)
    print(f"report: {report.page}")
    return None


if __name__ == "__main__":
    sys.exit(main())
