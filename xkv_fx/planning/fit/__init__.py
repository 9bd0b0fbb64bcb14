"""From a limit to a plan: what could be best is measured and solved, and the best on held-out prompts is taken."""
