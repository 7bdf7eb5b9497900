"""A service in simulated time: the real engine, pools, queue and router over workers that only reckon."""
