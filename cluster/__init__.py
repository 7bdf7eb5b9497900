"""Many workers as one service: actors, pools, router, engine, gRPC server, command line."""
