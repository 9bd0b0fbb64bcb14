"""What was measured, as curves and as files."""
