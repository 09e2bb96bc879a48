"""Hostile inputs against the real server while honest clients go on: `make fuzz`."""
