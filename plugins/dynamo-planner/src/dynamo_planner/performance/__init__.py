"""What one replica can do: measured beforehand, read from somebody else's measurements, or learned while it serves."""
