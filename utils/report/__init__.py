"""One report over many runs: ``python -m utils.report DIR… --out report/``.

Finds the runs below the folders, joins those that differ only in the seed, and writes ``report.md``,
``report.csv``, ``report.tex`` and ``report.html`` in the layout of the paper's table, with the paper's
numbers beside ours. What runs say of themselves (names, settings, folders) is not trusted: measures are
computed anew from the matrices, and all text is escaped.
"""
