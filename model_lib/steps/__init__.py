"""What only a pipeline does: its first and its last step, and what it makes of its candidates."""
