"""What a plan is worth: tasks, divergences, tables."""
