"""Memories whose weights learn from every token."""
