"""What a service is doing now and has done in the last minutes, for those who look."""
