"""The ranks of one worker as replicas that are given the same."""
