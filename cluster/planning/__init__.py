"""How many workers of each pool a workload needs, from what workers have measured of themselves: `baton plan`."""
