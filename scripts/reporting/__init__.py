"""From run directories to a Markdown table: what `scripts/report.py` is made of."""
