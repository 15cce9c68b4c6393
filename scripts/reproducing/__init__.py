"""From a file of scripts/reproductions/ to a table: what `scripts/reproduce.py` is made of."""
