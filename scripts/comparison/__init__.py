"""The parts of ``scripts/compare.py``: the study and its runs, their execution, the statistics and the page."""
