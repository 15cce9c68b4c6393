"""A memory and attention joined in one layer."""
