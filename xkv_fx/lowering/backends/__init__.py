"""What makes a decode graph run: one backend a file."""
