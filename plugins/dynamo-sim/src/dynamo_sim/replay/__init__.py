"""Replay of request traces in virtual time: production routers before simulated engines, hours of traffic in seconds."""
