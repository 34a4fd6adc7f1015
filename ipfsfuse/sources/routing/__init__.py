"""Providers on the open network, found by delegated routing
(https://specs.ipfs.tech/routing/http-routing-v1/)."""
