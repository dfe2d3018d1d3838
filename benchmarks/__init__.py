"""What `make bench` runs: this system and its peers, side by side, on one machine."""
