"""Processes beside a rank that do what may hang, crash or swell, and are killed from outside."""
