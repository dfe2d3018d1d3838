"""The commands of the planner, one file each."""
