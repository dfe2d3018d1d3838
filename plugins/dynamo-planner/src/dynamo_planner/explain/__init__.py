"""Decisions for people: as text, as a page with plots, and as they would have been with another load."""
