"""Memories that are a matrix per head, written by outer products."""
