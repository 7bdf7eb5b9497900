"""The two pools of workers: who is in them, how they meet, how they are replaced, how they grow and shrink."""
