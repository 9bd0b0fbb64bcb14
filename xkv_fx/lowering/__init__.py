"""From readable graphs to what runs: one file a target."""
