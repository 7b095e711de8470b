"""What ``scripts/compare.py`` consists of: the study and its runs, their execution, the statistics and the page."""
