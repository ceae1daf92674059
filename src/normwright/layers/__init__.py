"""The layers: torch's twins, any pattern, and those outside the notation."""
