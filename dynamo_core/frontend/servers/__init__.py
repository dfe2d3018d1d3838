"""What runs the ASGI application (kind `http_server`)."""
