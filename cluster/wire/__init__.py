"""Between protobuf messages and Baton's own types, for server and client."""
