"""What run folders hold, as tables, pictures and JSON."""
