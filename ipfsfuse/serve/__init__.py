"""`ipfsfuse serve`: a trustless gateway for local content
(https://specs.ipfs.tech/http-gateways/trustless-gateway/)."""
