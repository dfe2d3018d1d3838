"""What is seen: the frontends' series, directly or through a Prometheus server, and the workers' own reports."""
