"""What a step computes, and for which requests."""
