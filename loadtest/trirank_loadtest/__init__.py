"""Load on a served ensemble, over gRPC, through the client that a service would use."""
