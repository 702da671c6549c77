"""One report over many runs: ``python -m utils.report DIR… --out report/``.

Finds the runs below the folders, joins those that differ only in the seed, and writes ``report.md``, ``report.csv``,
``report.tex`` and ``report.html`` in the layout of the paper's table, with the paper's numbers beside ours. Measures
are computed again from the accuracies, and all text is escaped.
"""
