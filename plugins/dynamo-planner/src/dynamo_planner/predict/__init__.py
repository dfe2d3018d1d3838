"""What load to expect: forecasters of one series, and how they are asked."""
