"""One GPU budget over several planners."""
