"""Faults under load: what `make chaos` does to a fleet, and what became of every token."""
