"""When pools grow and shrink by themselves."""
