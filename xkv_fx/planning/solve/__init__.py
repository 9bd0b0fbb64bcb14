"""From curves and a limit to capacities. Pure: arrays in, capacities out."""
